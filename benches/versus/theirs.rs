//! The engines that this workspace is compared with: Python processes, and candle's own operations.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::rows::Work;

/// A prepared row, idle until it is asked to run.
pub(crate) struct Theirs {
    pub(crate) engine: &'static str,
    /// Numbers that ours should agree with.
    pub(crate) check: Vec<f64>,
    place: Place,
}

enum Place {
    Python(Process),
    Here(Box<dyn FnMut()>),
}

/// A Python process.
struct Process {
    engine: &'static str,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Theirs {
    pub(crate) fn start(
        python: &Path,
        threads: usize,
        request: &Value,
        engine: &'static str,
        preload: Option<&PathBuf>,
    ) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/versus/theirs.py");
        let mut command = Command::new(python);
        if let Some(library) = preload {
            command.env("LD_PRELOAD", library);
        }
        let mut child = command
            .arg(script)
            .env("VERSUS_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python starts");
        let requests = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut process = Process {
            engine,
            child,
            requests,
            answers,
        };
        let mut request = request.clone();
        request["engine"] = engine.into();
        let answer = process.ask(&request);
        let check = answer["check"].as_array().expect("numbers to check");
        Self {
            engine: if preload.is_some() {
                "torch, MKL unlocked"
            } else {
                engine
            },
            check: check.iter().filter_map(Value::as_f64).collect(),
            place: Place::Python(process),
        }
    }

    /// In this process.
    pub(crate) fn here(engine: &'static str, mut work: Work) -> Self {
        Self {
            engine,
            check: (work.check)(),
            place: Place::Here(work.run),
        }
    }

    /// Seconds for `times` repetitions.
    pub(crate) fn run(&mut self, times: usize) -> f64 {
        match &mut self.place {
            Place::Python(process) => {
                let answer = process.ask(&json!({ "run": times }));
                answer["seconds"].as_f64().expect("seconds")
            }
            Place::Here(run) => {
                let start = Instant::now();
                (0..times).for_each(|_| run());
                start.elapsed().as_secs_f64()
            }
        }
    }
}

impl Process {
    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.requests, "{request}").expect("Python listens");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("Python answers");
        serde_json::from_str(&line)
            .unwrap_or_else(|_| panic!("{} answered {line:?} to {request}", self.engine))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It only waits for a request; nothing is lost, and there is nobody to tell of a failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
