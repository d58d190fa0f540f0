//! Names of the same parameters in the files of different libraries, brought to timm's.
//!
//! The layout is recognised from the names alone. timm's names are also DINO's, DeiT's and DINOv2's own;
//! Hugging Face has one scheme for `ViTModel` and `DeiTModel` and another for `Dinov2Model`.

use candle_core::Tensor;

use crate::{Error, Weights};

/// What training needs and features do not: masked tokens, DINO's projection, Hugging Face's pooler.
const NOT_NEEDED: [&str; 4] = ["mask_token", "head.mlp.", "head.last_layer.", "pooler."];

/// Brings the names to timm's and the shapes to ours.
///
/// # Errors
/// [`Error::UnknownLayout`] with the names when there is no CLS token to recognise a layout by;
/// [`Error::MissingTensor`] when one of queries, keys and values is not there.
pub(crate) fn to_timm(weights: &mut Weights) -> Result<(), Error> {
    strip_wrapper(weights)?;
    if weights.contains("embeddings.cls_token") {
        from_hugging_face(weights)?;
    }
    weights.rename(|name| match name {
        "register_tokens" => "reg_token".into(),
        _ => name.to_owned(),
    });
    // DINO's projection stands beside its backbone, so its names keep what was before both.
    weights.retain(|name| {
        !NOT_NEEDED
            .iter()
            .any(|part| name.starts_with(part) || name.contains(&format!(".{part}")))
    });
    prefix_positions(weights)
}

/// Removes what stands before `cls_token` in the names, such as `module.backbone.` or `vit.`; of several
/// networks in a file, the teacher's stays.
fn strip_wrapper(weights: &mut Weights) -> Result<(), Error> {
    let mut prefixes: Vec<String> = weights
        .names()
        .filter_map(|name| name.strip_suffix("cls_token"))
        .map(|prefix| prefix.strip_suffix("embeddings.").unwrap_or(prefix))
        .map(str::to_owned)
        .collect();
    prefixes.sort_by_key(|prefix| (prefix.contains("student."), prefix.clone()));
    let Some(prefix) = prefixes.first() else {
        return Err(Error::UnknownLayout {
            origin: weights.origin().to_owned(),
            names: weights.sorted_names(),
        });
    };
    for other in prefixes.iter().skip(1) {
        let _ = weights.split_off(other);
    }
    if !prefix.is_empty() {
        weights.rename(|name| {
            name.strip_prefix(prefix.as_str())
                .unwrap_or(name)
                .to_owned()
        });
    }
    Ok(())
}

/// `ViTModel`, `DeiTModel` and `Dinov2Model`, with or without their classification heads.
fn from_hugging_face(weights: &mut Weights) -> Result<(), Error> {
    weights.rename(|name| {
        let renamed = [
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.distillation_token", "dist_token"),
            ("embeddings.register_tokens", "reg_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            (
                "embeddings.patch_embeddings.projection.",
                "patch_embed.proj.",
            ),
            ("layernorm.", "norm."),
            ("cls_classifier.", "head."),
            ("classifier.", "head."),
            ("distillation_classifier.", "head_dist."),
        ];
        for (theirs, ours) in renamed {
            if let Some(rest) = name.strip_prefix(theirs) {
                return format!("{ours}{rest}");
            }
        }
        let Some((index, part)) = name
            .strip_prefix("encoder.layer.")
            .and_then(|rest| rest.split_once('.'))
        else {
            return name.to_owned();
        };
        let part = [
            ("attention.attention.", "attn."),
            ("attention.output.dense.", "attn.proj."),
            ("intermediate.dense.", "mlp.fc1."),
            ("output.dense.", "mlp.fc2."),
            ("layernorm_before.", "norm1."),
            ("layernorm_after.", "norm2."),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
        ]
        .iter()
        .find_map(|(theirs, ours)| Some(format!("{ours}{}", part.strip_prefix(theirs)?)))
        .unwrap_or_else(|| part.to_owned());
        format!("blocks.{index}.{part}")
    });
    // Dinov2's classifier reads the CLS token beside the mean patch: not a head of the CLS token.
    let width = weights.shape("cls_token").and_then(|s| s.last().copied());
    let head = weights.shape("head.weight").and_then(|s| s.last().copied());
    if head.is_some() && head != width {
        let _ = weights.split_off("head.");
    }
    let queries: Vec<String> = weights
        .names()
        .filter(|name| name.contains(".attn.query."))
        .map(str::to_owned)
        .collect();
    for query in queries {
        let part = |of: &str| query.replace(".query.", &format!(".{of}."));
        let shape = weights.shape(&query).unwrap_or_default().to_vec();
        let parts = [query.clone(), part("key"), part("value")]
            .iter()
            .map(|name| weights.take(name, &shape))
            .collect::<Result<Vec<Tensor>, Error>>()?;
        weights.insert(&part("qkv"), Tensor::cat(&parts, 0)?);
    }
    Ok(())
}

/// Brings timm's two other positional embeddings to ours, which has a row for CLS and distillation token and for each patch.
///
/// With `no_embed_class` there are rows of the patches alone: the other tokens' are zero. Otherwise timm's registers have
/// positions, which are added to them for good.
fn prefix_positions(weights: &mut Weights) -> Result<(), Error> {
    let Some(&[1, rows, width]) = weights.shape("pos_embed") else {
        return Ok(());
    };
    let first = 1 + usize::from(weights.contains("dist_token"));
    let registers = match weights.shape("reg_token") {
        Some(&[1, registers, _]) => registers,
        _ => 0,
    };
    // Grids are square, so the number of rows tells what they belong to.
    let square_behind = |tokens: usize| {
        let patches = rows.checked_sub(tokens).filter(|patches| *patches > 0);
        patches.is_some_and(|patches| patches.isqrt().pow(2) == patches)
    };
    if square_behind(first) {
        return Ok(());
    }
    if square_behind(0) {
        let patches = weights.take("pos_embed", &[1, rows, width])?;
        let none = Tensor::zeros((1, first, width), patches.dtype(), patches.device())?;
        weights.insert("pos_embed", Tensor::cat(&[&none, &patches], 1)?);
    } else if registers > 0 && square_behind(first + registers) {
        let all = weights.take("pos_embed", &[1, rows, width])?;
        let tokens = weights.take("reg_token", &[1, registers, width])?;
        let after = first + registers;
        let patches = all.narrow(1, after, rows - after)?;
        let positions = Tensor::cat(&[&all.narrow(1, 0, first)?, &patches], 1)?;
        weights.insert("reg_token", (tokens + all.narrow(1, first, registers)?)?);
        weights.insert("pos_embed", positions);
    }
    Ok(())
}
