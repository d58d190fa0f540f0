//! The Python process of one engine.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

/// A prepared row in another process, idle until it is asked to run.
pub(crate) struct Theirs {
    pub(crate) engine: &'static str,
    /// Numbers that ours should agree with.
    pub(crate) check: Vec<f64>,
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
    ) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/versus/theirs.py");
        let mut child = Command::new(python)
            .arg(script)
            .env("VERSUS_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python starts");
        let requests = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut theirs = Self {
            engine,
            check: Vec::new(),
            child,
            requests,
            answers,
        };
        let mut request = request.clone();
        request["engine"] = engine.into();
        let answer = theirs.ask(&request);
        let check = answer["check"].as_array().expect("numbers to check");
        theirs.check = check.iter().filter_map(Value::as_f64).collect();
        theirs
    }

    /// Seconds for `times` repetitions.
    pub(crate) fn run(&mut self, times: usize) -> f64 {
        let answer = self.ask(&json!({ "run": times }));
        answer["seconds"].as_f64().expect("seconds")
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.requests, "{request}").expect("Python listens");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("Python answers");
        serde_json::from_str(&line)
            .unwrap_or_else(|_| panic!("{} answered {line:?} to {request}", self.engine))
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        // It only waits for a request; nothing is lost, and there is nobody to tell of a failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
