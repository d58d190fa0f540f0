//! Training runs of real processes that are killed at any moment, and resumed: they end with the bytes of a run in peace.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use defend_core::Device;
use defend_core::nn::Rng;
use defend_core::vit::{Architecture, BackboneSpec, Vit, WeightPrecision};
use image::{Rgb, RgbImage};
use rand::RngExt;

/// How often each run is killed.
const KILLS: usize = 20;

/// A backbone with random weights and 24 photos.
fn backbone_and_photos(folder: &Path) {
    let architecture = Architecture {
        image_size: 32,
        patch_size: 8,
        width: 24,
        depth: 3,
        heads: 2,
        mlp_width: 48,
        ..Architecture::vit_tiny()
    };
    let spec = BackboneSpec::new(architecture);
    let vit = Vit::random(spec, 0.2, &mut Rng::seed(1), &Device::Cpu).unwrap();
    let weights = vit.to_safetensors(WeightPrecision::F32).unwrap();
    std::fs::write(folder.join("teacher.safetensors"), weights).unwrap();
    std::fs::create_dir(folder.join("photos")).unwrap();
    for number in 0..24u32 {
        let photo = RgbImage::from_fn(48, 40, |x, y| {
            let phase = (x * (1 + number % 5) + y * (1 + number % 3) + number) as f32;
            let level = |channel: f32| (127.0 + 120.0 * (phase * 0.2 + channel).sin()) as u8;
            Rgb([level(0.0), level(1.0), level(2.5)])
        });
        let path = folder.join(format!("photos/{number:02}.png"));
        photo.save(path).unwrap();
    }
}

/// Runs a program, and kills it after `moment` if it is given. Whether it came to its end.
fn run(program: &str, arguments: &[&str], folder: &Path, moment: Option<Duration>) -> bool {
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    if let Some(moment) = moment {
        std::thread::sleep(moment);
        // On Unix this is SIGKILL: nothing in the program can catch it.
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() || output.status.code().is_none(),
        "{arguments:?}: {said}"
    );
    output.status.success()
}

/// Runs to the end in peace, then again with [`KILLS`] kills, and gives both results.
fn in_peace_and_killed(
    program: &str,
    arguments: &[&str],
    checkpointing: &[&str],
    folder: &Path,
) -> [Vec<u8>; 2] {
    let start = std::time::Instant::now();
    let peace = [arguments, &["--out", "peace"]].concat();
    assert!(run(program, &peace, folder, None));
    let whole = start.elapsed();

    let killed = [arguments, checkpointing, &["--out", "killed"]].concat();
    let rng = &mut Rng::seed(7);
    let mut kills = 0;
    while kills < KILLS {
        // Runs that go on need less and less time, so most are killed in their first part.
        let share = rng.random_range(0.02..0.5);
        if run(program, &killed, folder, Some(whole.mul_f64(share))) {
            break;
        }
        kills += 1;
    }
    assert!(kills >= 3, "the run was too short to be killed: {kills}");
    assert!(run(program, &killed, folder, None));
    ["peace", "killed"].map(|name| std::fs::read(folder.join(name)).unwrap())
}

#[test]
fn a_backbone_in_training() {
    let folder = tempfile::tempdir().unwrap();
    backbone_and_photos(folder.path());
    let arguments = [
        "--weights=teacher.safetensors",
        "--blocks=0,2",
        "--epochs=8",
        "--batch-size=8",
        "--held-out=8",
        "photos=20",
    ];
    let checkpointing = ["--checkpoint=run.checkpoint", "--every=0", "--resume"];
    let [peace, killed] = in_peace_and_killed(
        env!("CARGO_BIN_EXE_train_backbone"),
        &arguments,
        &checkpointing,
        folder.path(),
    );
    assert!(peace == killed);
}

#[test]
fn a_fit_with_the_papers_recipe() {
    let folder = tempfile::tempdir().unwrap();
    backbone_and_photos(folder.path());
    let settings = r#"{
        "dense": {"epochs": 6, "batch_size": 8},
        "student": {"masked": {"distill": {"epochs": 40, "batch_size": 8}}}
    }"#;
    std::fs::write(folder.path().join("settings.json"), settings).unwrap();
    let arguments = [
        "fit",
        "--normal=photos",
        "--backbone=teacher.safetensors",
        "--config=settings.json",
    ];
    let checkpointing = [
        "--checkpoints=checkpoints",
        "--checkpoint-every=0",
        "--resume",
    ];
    let [peace, killed] = in_peace_and_killed(
        env!("CARGO_BIN_EXE_defend"),
        &arguments,
        &checkpointing,
        folder.path(),
    );
    assert!(peace == killed);
}
