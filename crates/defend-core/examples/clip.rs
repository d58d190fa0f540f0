//! Novelty on CLIP's features: `cargo run --release --features transformers --example clip -- CLIP NORMAL IMAGES`. CLIP is a folder with
//! `config.json` and `model.safetensors`, or a model of the hub such as `openai/clip-vit-base-patch32`.

use std::path::Path;
use std::sync::Arc;

use defend_core::TeacherSource;
use defend_core::prelude::*;
use defend_core::transformers::{ClipVision, ModelFiles};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [clip, normal, images] = arguments.as_slice() else {
        return Err("expected CLIP NORMAL IMAGES".into());
    };
    let files = if Path::new(clip).is_dir() {
        ModelFiles::folder(clip)
    } else {
        ModelFiles::hub(clip)?
    };
    let clip = ClipVision::load(&files, &best_device())?;
    let mut bar = ProgressBar::new();
    let detector = Defend::builder()
        .teacher(TeacherSource::Encoder(Arc::new(clip)))
        .fit(ImageFolder::open(normal)?, &mut bar)?
        .detector;
    for finding in scan(&detector, ImageFolder::open(images)?, &mut bar)?.findings {
        let novelty = &finding.novelty;
        println!(
            "{:.3} {:?} {}",
            novelty.score, novelty.verdict, finding.name
        );
    }
    Ok(())
}
