//! The server scores uploads as the program scores files, and refuses what is no image.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use defend_core::data::ImageFolder;
use defend_core::{Defend, Silent, scan};
use image::{Rgb, RgbImage};
use serde_json::Value;

/// Ends the server however the test ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn stripes(period: u32, number: u32) -> RgbImage {
    RgbImage::from_fn(96, 96, |x, y| {
        let on = (x + y / (1 + number % 3) + number).is_multiple_of(period);
        Rgb(if on {
            [220, 210, 40]
        } else {
            [30, 60, (number * 9 % 90) as u8]
        })
    })
}

/// Status and JSON of an answer.
fn post(address: &str, body: &[u8]) -> (u16, Value) {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "POST /score HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let json = &answer[answer.find('{').unwrap()..=answer.rfind('}').unwrap()];
    (status, serde_json::from_str(json).unwrap())
}

#[test]
fn uploads_are_scored_as_files_are() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("normal")).unwrap();
    for number in 0..24 {
        let path = at(&format!("normal/{number:02}.png"));
        stripes(7, number).save(path).unwrap();
    }
    std::fs::create_dir(at("new")).unwrap();
    stripes(19, 3).save(at("new/0.png")).unwrap();
    let normal = ImageFolder::open(at("normal")).unwrap();
    let fitted = Defend::builder().fit(normal, &mut Silent).unwrap();
    fitted.detector.save(at("model")).unwrap();
    let new = ImageFolder::open(folder.path().join("new")).unwrap();
    let expected = scan(&fitted.detector, Arc::new(new), &mut Silent).unwrap();
    let expected = &expected.findings[0].novelty;
    let nearest = expected.explanation.as_ref().unwrap().nearest[0]
        .name
        .clone();

    let mut server = Command::new(env!("CARGO_BIN_EXE_serve"))
        .args(["model", "127.0.0.1:0"])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = server.stdout.take().unwrap();
    let _server = Server(server);
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).unwrap();
    let address = line.trim().rsplit('/').next().unwrap().to_owned();

    let upload = std::fs::read(at("new/0.png")).unwrap();
    let uploads: Vec<_> = (0..4)
        .map(|_| {
            let (address, upload) = (address.clone(), upload.clone());
            std::thread::spawn(move || post(&address, &upload))
        })
        .collect();
    for thread in uploads {
        let (status, found) = thread.join().unwrap();
        assert_eq!(status, 200, "{found}");
        assert_eq!(found["score"].as_f64(), Some(expected.score));
        assert_eq!(found["nearest"].as_str(), Some(&*nearest));
    }
    let (status, found) = post(&address, b"no image");
    assert_eq!(status, 422);
    let error = found["error"].as_str().unwrap();
    assert!(error.contains("the upload"), "{error}");
}
