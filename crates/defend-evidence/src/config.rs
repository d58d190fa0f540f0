//! Settings of the closed form.

use serde::{Deserialize, Serialize};

use crate::Error;

/// Settings of the closed form; the default is the rule of docs/METHOD.md, chosen on several data sets and without labels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvidenceConfig {
    /// Images nearer to each other than this share of the median pairwise squared distance are near copies: one group.
    pub group_share: f64,
    /// Settings of the posterior.
    pub posterior: PosteriorConfig,
    /// Settings of the contrast with ordinary images.
    pub contrast: ContrastConfig,
    /// Settings of the patch memory.
    pub patches: PatchConfig,
    /// Settings of the object memory.
    pub objects: ObjectConfig,
    /// Settings of the contrast with known abnormal images.
    pub known: KnownConfig,
    /// Settings of the contrast with the images that are scored together.
    pub together: TogetherConfig,
}

impl Default for EvidenceConfig {
    fn default() -> Self {
        Self {
            group_share: 0.2,
            posterior: PosteriorConfig::default(),
            contrast: ContrastConfig::default(),
            patches: PatchConfig::default(),
            objects: ObjectConfig::default(),
            known: KnownConfig::default(),
            together: TogetherConfig::default(),
        }
    }
}

/// Settings of the posterior: is the image explained by the normal ones?
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PosteriorConfig {
    /// Weight of the embeddings' first part beside the others, which weigh 1. For the tokens of a Vision Transformer it is the CLS
    /// token of the last but one block: less bound to the classes of its training than the last one, more to what is shown.
    pub first_part: f64,
    /// Kernel's width times the median squared distance of a leader to the nearest other one.
    pub width: f64,
    /// Ridge added to the kernel's diagonal: how far an image is trusted. 0.01 to 0.3 hardly differ.
    pub ridge: f64,
    /// Normal images up to which the posterior is exact. Above, an image is judged given its nearest group leaders.
    pub exact_images: usize,
    /// How many of them.
    pub neighbours: usize,
}

impl Default for PosteriorConfig {
    fn default() -> Self {
        Self {
            first_part: 1.5,
            width: 1.5,
            ridge: 0.1,
            exact_images: 4000,
            neighbours: 128,
        }
    }
}

/// Settings of the contrast: is the image more like the normal ones than like images in general?
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContrastConfig {
    /// Whether ordinary images are contrasted with at all.
    pub enabled: bool,
    /// Parts of the embeddings that are compared, the first ones: the CLS tokens; the mean patch token costs here.
    pub parts: usize,
    /// Kernel's width.
    pub width: f64,
    /// Ridge of the regression, on weights that sum to the number of images.
    pub ridge: f64,
    /// Share of the ordinary images that is left out, those nearest to the normal ones: they may show the normal class.
    pub dropped: f64,
    /// Share of ordinary images that the posterior takes for normal from which the contrast has its whole weight.
    pub full_share: f64,
    /// The whole weight.
    pub weight: f64,
}

impl Default for ContrastConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            parts: 2,
            width: 1.0,
            ridge: 1.0,
            dropped: 0.1,
            full_share: 0.02,
            weight: 2.0,
        }
    }
}

/// Settings of the contrast with known abnormal images: is the image like one of them?
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KnownConfig {
    /// Kernel's width.
    pub width: f64,
    /// Ridge of the regression, on weights that sum to the number of images.
    pub ridge: f64,
    /// Deviations of the normal images' left-out values from which it speaks against an image. It never speaks for one: a
    /// kind of abnormal image that was never shown looks normal beside those that were.
    pub margin: f64,
    /// Of k known images the weight is `k / (k + hesitation)`: a single one says little of what abnormal images have in common.
    pub hesitation: f64,
}

impl Default for KnownConfig {
    fn default() -> Self {
        Self {
            width: 1.0,
            ridge: 1.0,
            margin: 1.0,
            hesitation: 2.0,
        }
    }
}

/// Settings of the contrast with the images that are scored together: what do the abnormal ones among them look like?
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TogetherConfig {
    /// Kernel's width.
    pub width: f64,
    /// Ridge of the regression, on weights that sum to the number of images.
    pub ridge: f64,
    /// Images are contrasted with from this probability on of being abnormal (one less the q-value).
    pub least: f64,
    /// How many of them at most, an even sample of more.
    pub images: usize,
    /// Deviations of the estimated share of abnormal images above which it is more than noise.
    pub noise: f64,
    /// Share beyond that at which the contrast has its whole weight, 1.
    pub full_share: f64,
}

impl Default for TogetherConfig {
    fn default() -> Self {
        Self {
            width: 1.0,
            ridge: 1.0,
            least: 0.02,
            images: 2000,
            noise: 2.0,
            full_share: 0.1,
        }
    }
}

/// Settings of the patch memory: is some small part unlike anything normal?
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PatchConfig {
    /// Patches that are kept of each block because the others are near one of them (greedy k-centre).
    pub core: usize,
    /// Patches of each block that are kept at random beside these.
    pub random: usize,
    /// Patches that they are chosen from, a random part of all.
    pub candidates: usize,
    /// Channels of the random projection that the choice is made in.
    pub projected: usize,
    /// Images whose patches are looked at.
    pub images: usize,
    /// Worst patches of an image that are averaged.
    pub worst: usize,
    /// Ridge of the regression that finds known faults, on unit tokens.
    pub fault_ridge: f64,
    /// Mean similarity of leaders to their five nearest leaders from which patches count.
    pub alike_from: f64,
    /// Similarity beyond it at which they have their whole weight.
    pub alike_over: f64,
    /// The whole weight.
    pub weight: f64,
}

impl Default for PatchConfig {
    fn default() -> Self {
        Self {
            core: 3000,
            random: 500,
            candidates: 60_000,
            projected: 64,
            images: 2000,
            worst: 5,
            fault_ridge: 1e-4,
            alike_from: 0.92,
            alike_over: 0.03,
            weight: 2.0,
        }
    }
}

/// Settings of the object memory, for maps: which object is the novel one?
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ObjectConfig {
    /// Images whose places are looked at; more of them hardly help.
    pub images: usize,
    /// Places of them that are kept, a random part of all.
    pub places: usize,
    /// Kernel's width.
    pub width: f64,
}

impl Default for ObjectConfig {
    fn default() -> Self {
        Self {
            images: 32,
            places: 1000,
            width: 6.0,
        }
    }
}

impl EvidenceConfig {
    /// Checks every field's range.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn validate(&self) -> Result<(), Error> {
        let (p, c, m) = (&self.posterior, &self.contrast, &self.patches);
        let (k, t) = (&self.known, &self.together);
        let positive = [
            ("evidence.posterior.first_part", p.first_part),
            ("evidence.posterior.width", p.width),
            ("evidence.posterior.ridge", p.ridge),
            ("evidence.contrast.width", c.width),
            ("evidence.contrast.ridge", c.ridge),
            ("evidence.contrast.full_share", c.full_share),
            ("evidence.patches.alike_over", m.alike_over),
            ("evidence.patches.fault_ridge", m.fault_ridge),
            ("evidence.objects.width", self.objects.width),
            ("evidence.known.width", k.width),
            ("evidence.known.ridge", k.ridge),
            ("evidence.together.width", t.width),
            ("evidence.together.ridge", t.ridge),
            ("evidence.together.full_share", t.full_share),
        ];
        for (field, value) in positive {
            check(
                field,
                value,
                value.is_finite() && value > 0.0,
                "a positive number",
            )?;
        }
        let not_negative = [
            ("evidence.contrast.weight", c.weight),
            ("evidence.patches.weight", m.weight),
            ("evidence.known.margin", k.margin),
            ("evidence.known.hesitation", k.hesitation),
            ("evidence.together.noise", t.noise),
        ];
        for (field, value) in not_negative {
            check(
                field,
                value,
                value.is_finite() && value >= 0.0,
                "zero or a positive number",
            )?;
        }
        let shares = [
            ("evidence.group_share", self.group_share),
            ("evidence.contrast.dropped", c.dropped),
            ("evidence.together.least", t.least),
        ];
        for (field, value) in shares {
            check(field, value, (0.0..1.0).contains(&value), "a share in 0..1")?;
        }
        check(
            "evidence.patches.alike_from",
            m.alike_from,
            m.alike_from.is_finite(),
            "a similarity",
        )?;
        let counts = [
            ("evidence.posterior.exact_images", p.exact_images),
            ("evidence.posterior.neighbours", p.neighbours),
            ("evidence.contrast.parts", c.parts),
            ("evidence.patches.core", m.core),
            ("evidence.patches.candidates", m.candidates),
            ("evidence.patches.projected", m.projected),
            ("evidence.patches.images", m.images),
            ("evidence.patches.worst", m.worst),
            ("evidence.objects.images", self.objects.images),
            ("evidence.objects.places", self.objects.places),
            ("evidence.together.images", t.images),
        ];
        for (field, count) in counts {
            check(field, count, count > 0, "at least 1")?;
        }
        Ok(())
    }
}

fn check(
    field: &'static str,
    value: impl ToString,
    fine: bool,
    expected: &'static str,
) -> Result<(), Error> {
    if fine {
        return Ok(());
    }
    Err(Error::Config {
        field,
        value: value.to_string(),
        expected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_the_field() {
        EvidenceConfig::default().validate().unwrap();
        let fault = |change: fn(&mut EvidenceConfig)| {
            let mut config = EvidenceConfig::default();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(fault(|c| c.posterior.ridge = 0.0).contains("evidence.posterior.ridge"));
        assert!(fault(|c| c.contrast.dropped = 1.0).contains("evidence.contrast.dropped"));
        assert!(fault(|c| c.patches.worst = 0).contains("evidence.patches.worst"));
        assert!(fault(|c| c.group_share = f64::NAN).contains("evidence.group_share"));
    }
}
