//! Processes that are killed at any moment, and started again.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use defend_random::Rng;
use rand::RngExt;

/// How often a run is killed.
const KILLS: usize = 20;

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

/// Runs a program to its end in peace, then again with twenty kills at random moments, and gives what both have written.
///
/// The program gets `arguments` and `--out FILE`; the runs that are killed also `checkpointing`, with which they go on.
pub fn in_peace_and_killed(
    program: &str,
    arguments: &[&str],
    checkpointing: &[&str],
    folder: &Path,
) -> [Vec<u8>; 2] {
    let start = Instant::now();
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
