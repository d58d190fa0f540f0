//! Fits on a folder of normal images and scores another: `cargo run --example ten_lines -- NORMAL NEW`.

use defend_core::prelude::*;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut folders = std::env::args().skip(1);
    let mut folder = || folders.next().ok_or("expected two folders: NORMAL NEW");
    let normal = ImageFolder::open(folder()?)?;
    let detector = Defend::builder().fit(normal, &mut Silent)?.detector;
    for finding in scan(&detector, ImageFolder::open(folder()?)?, &mut Silent)?.findings {
        let novelty = &finding.novelty;
        println!(
            "{:.3} {:?} {}",
            novelty.score, novelty.verdict, finding.name
        );
    }
    Ok(())
}
