//! Settings of the dense stage.

use defend_ot::SinkhornKnopp;
use serde::{Deserialize, Serialize};

use crate::Error;

/// How the full view's assignment Q becomes a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Assignment {
    /// The most likely prototype of each patch (authors' code).
    Hard,
    /// Q itself (the paper's "2D cross-entropy").
    Soft,
}

/// What a crop is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum View {
    /// The whole image (paper, eq. 1). Its pass through the frozen blocks is computed once.
    Whole,
    /// Random large crops of the image with the crops' aspects, resized to its size; each has crops of its own
    /// (Leopart).
    Random {
        /// Views of each image, `1..=8`. Leopart: 2.
        count: usize,
        /// Smallest and largest share of the image's area. Leopart: 0.25 and 1.
        area: [f64; 2],
    },
}

/// How the view's assignments and the crop's scores are brought to one grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Resampling {
    /// Assignments are averaged by area under each patch of the crop; the scores stay as they are.
    Area,
    /// Both are sampled bilinearly at `side` x `side` places (RoIAlign, He et al., 2017). Leopart: 7.
    RoiAlign {
        /// Places along each side of the crop, at least 1.
        side: usize,
    },
}

/// Settings of the dense stage; the default is the paper's (sections 3.1 and 4.2), authors' code where
/// the paper is silent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DenseConfig {
    /// Passes over the images. Paper: 3, for COCO 10.
    pub epochs: usize,
    /// Images a step. Authors' code: 32.
    #[serde(alias = "batch")]
    pub batch_size: usize,
    /// What crops are cut from and compared with. Paper: the whole image.
    pub view: View,
    /// Crops of each view, `1..=8`. Authors' code: 4; eq. 1 has one.
    pub crops: usize,
    /// Side of a resized crop, pixels; a multiple of the patch size. Paper: 96.
    pub crop_size: usize,
    /// Smallest and largest area of a crop as a share of the view. Authors' code: 0.1 and 0.3.
    pub crop_area: [f64; 2],
    /// Smallest and largest ratio of width to height of a crop. Authors' code: 3/4 and 4/3.
    pub crop_aspect: [f64; 2],
    /// Hidden widths of the projection head, GELU between. Paper: two of 2048.
    pub head_hidden: Vec<usize>,
    /// Output width of the projection head, D. Paper: 256.
    pub head_output: usize,
    /// Largest Euclidean norm of all gradients of a step together; larger ones are scaled down to it. Ours: none.
    pub gradient_clip: Option<f64>,
    /// Number of prototypes, K. Paper: twice the object classes seen in the images; 5 in its ablations.
    pub prototypes: usize,
    /// The assignment of patches to prototypes. SwAV: epsilon 0.05, 3 iterations.
    pub sinkhorn: SinkhornKnopp,
    /// Hard or soft targets. Authors' code: hard.
    pub assignment: Assignment,
    /// How targets and crops meet. Ours: by area.
    pub resampling: Resampling,
    /// Patches of earlier batches that take part in the assignment; 0 for none (paper). Leopart: 8192.
    pub queue: usize,
    /// The assigning network is a moving average of the trained one that keeps this share of itself in each
    /// step, `0..1`; without it, the trained network assigns (paper). Leopart: 0.9995.
    pub target_momentum: Option<f64>,
    /// Temperature tau of the crop's scores. Paper: 0.1.
    pub temperature: f64,
    /// Blocks that train, counted from the last. Paper: 2.
    pub trained_blocks: usize,
    /// Learning rate of the blocks. Paper: 1e-5.
    pub backbone_learning_rate: f64,
    /// Learning rate of head and prototypes. Paper: 1e-4.
    pub head_learning_rate: f64,
    /// Decoupled weight decay of blocks and head (the prototypes are normalised, theirs has no effect).
    /// Authors' code: 1e-2.
    pub weight_decay: f64,
    /// Weight decay of the last step, approached along a half cosine; without it, the decay is constant.
    /// Leopart: 0.5.
    pub final_weight_decay: Option<f64>,
    /// Limit of the memory for the frozen blocks' output, bytes. Ours: 1 GiB.
    pub cache_bytes: usize,
}

impl Default for DenseConfig {
    fn default() -> Self {
        Self {
            epochs: 3,
            batch_size: 32,
            view: View::Whole,
            crops: 4,
            crop_size: 96,
            crop_area: [0.1, 0.3],
            crop_aspect: [3.0 / 4.0, 4.0 / 3.0],
            head_hidden: vec![2048, 2048],
            head_output: 256,
            gradient_clip: None,
            prototypes: 5,
            sinkhorn: SinkhornKnopp::default(),
            assignment: Assignment::Hard,
            resampling: Resampling::Area,
            queue: 0,
            target_momentum: None,
            temperature: 0.1,
            trained_blocks: 2,
            backbone_learning_rate: 1e-5,
            head_learning_rate: 1e-4,
            weight_decay: 1e-2,
            final_weight_decay: None,
            cache_bytes: 1 << 30,
        }
    }
}

impl DenseConfig {
    /// The paper's recipe for normal images that show objects of `classes` classes: twice as many prototypes
    /// (sections 3.1 and 4.2). COCO trains for 10 epochs instead of 3.
    pub fn paper(classes: usize) -> Self {
        Self {
            prototypes: 2 * classes.max(1),
            ..Self::default()
        }
    }

    /// The authors' dense script: a head of four layers and 20 prototypes. Its defects (METHOD.md, "Where paper and
    /// authors' code differ") are not repeated.
    pub fn official_dense() -> Self {
        Self {
            head_hidden: vec![1024, 1024, 512],
            prototypes: 20,
            ..Self::default()
        }
    }

    /// The authors' second script, after Leopart (Ziegler and Asano, 2022): soft targets from a moving average of the
    /// network, a queue, RoIAlign, two random views with two crops each, and a rising weight decay. Crops are matched with
    /// the view that they are cut from, not with the other one.
    pub fn official_leopart() -> Self {
        Self {
            view: View::Random {
                count: 2,
                area: [0.25, 1.0],
            },
            crops: 2,
            assignment: Assignment::Soft,
            resampling: Resampling::RoiAlign { side: 7 },
            queue: 8192,
            target_momentum: Some(0.9995),
            weight_decay: 0.04,
            final_weight_decay: Some(0.5),
            ..Self::official_dense()
        }
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn validate(&self) -> Result<(), Error> {
        let at_least_one = "at least 1";
        let counts = [
            ("epochs", self.epochs),
            ("batch_size", self.batch_size),
            ("head_output", self.head_output),
            ("trained_blocks", self.trained_blocks),
        ];
        for (field, value) in counts {
            check(value > 0, field, value, at_least_one)?;
        }
        check((1..=8).contains(&self.crops), "crops", self.crops, "1 to 8")?;
        if let Some(clip) = self.gradient_clip {
            let fine = clip.is_finite() && clip > 0.0;
            check(fine, "gradient_clip", clip, "a positive number, or none")?;
        }
        check(
            self.prototypes >= 2,
            "prototypes",
            self.prototypes,
            "at least 2",
        )?;
        check(
            !self.head_hidden.contains(&0),
            "head_hidden",
            format!("{:?}", self.head_hidden),
            "positive widths",
        )?;
        let mut areas = vec![("crop_area", self.crop_area)];
        if let View::Random { count, area } = self.view {
            check((1..=8).contains(&count), "view.count", count, "1 to 8")?;
            areas.push(("view.area", area));
        }
        for (field, [low, high]) in areas {
            check(
                0.0 < low && low <= high && high <= 1.0,
                field,
                format!("{:?}", [low, high]),
                "an increasing pair in 0..=1",
            )?;
        }
        let [low, high] = self.crop_aspect;
        check(
            0.0 < low && low <= high && high.is_finite(),
            "crop_aspect",
            format!("{:?}", self.crop_aspect),
            "an increasing positive pair",
        )?;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        check(
            positive(self.temperature),
            "temperature",
            self.temperature,
            "a positive number",
        )?;
        if let Resampling::RoiAlign { side } = self.resampling {
            check(side > 0, "resampling.side", side, at_least_one)?;
        }
        if let Some(momentum) = self.target_momentum {
            check(
                (0.0..1.0).contains(&momentum),
                "target_momentum",
                momentum,
                "a share in 0..1",
            )?;
        }
        if let Some(decay) = self.final_weight_decay {
            check(
                decay.is_finite() && decay >= 0.0,
                "final_weight_decay",
                decay,
                "zero or a positive number",
            )?;
        }
        Ok(self.sinkhorn.validate()?)
    }
}

fn check(
    ok: bool,
    field: &'static str,
    value: impl std::fmt::Display,
    expected: &'static str,
) -> Result<(), Error> {
    if ok {
        return Ok(());
    }
    Err(Error::Config {
        field,
        value: value.to_string(),
        expected,
    })
}
