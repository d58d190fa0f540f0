//! A server that scores uploads: `cargo run --release --bin serve -- MODEL [ADDRESS]`, then
//! `curl --data-binary @photo.jpg http://127.0.0.1:8080/score`.
//!
//! One detector serves all requests. Scoring takes processor time, so it runs on threads for blocking work, as many at a time as there
//! are processors: further uploads wait.

use std::sync::Arc;

use anyhow::{Context, Result};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use defend_core::Novelty;
use defend_core::prelude::*;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Most bytes of an upload.
const LARGEST_UPLOAD: usize = 32 << 20;

#[derive(Clone)]
struct Service {
    detector: Arc<Detector>,
    /// A permit for each processor.
    processors: Arc<Semaphore>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("expected MODEL [ADDRESS]")?;
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:8080".into());
    let processors = std::thread::available_parallelism()?.get();
    let service = Service {
        detector: Arc::new(Detector::load(&model, &best_device())?),
        processors: Arc::new(Semaphore::new(processors)),
    };
    let app = Router::new()
        .route("/score", post(score))
        .route("/model", get(describe))
        .layer(DefaultBodyLimit::max(LARGEST_UPLOAD))
        .with_state(service);
    let listener = TcpListener::bind(&address).await.context(address)?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}

/// The score of the image in the body, or why there is none.
async fn score(State(service): State<Service>, body: Bytes) -> (StatusCode, Json<Value>) {
    let found = async {
        // The permit goes along: it is held until the score is there, even if nobody waits for it any more.
        let permit = Arc::clone(&service.processors).acquire_owned().await?;
        let detector = Arc::clone(&service.detector);
        let scoring = move || {
            let _permit = permit;
            detector.score_encoded(&body, "the upload")
        };
        anyhow::Ok(tokio::task::spawn_blocking(scoring).await?)
    };
    let failed = |status, error: anyhow::Error| {
        let error = json!({ "error": format!("{error:#}") });
        (status, Json(error))
    };
    match found.await {
        Ok(Ok(novelty)) => (StatusCode::OK, Json(answer(&novelty))),
        Ok(Err(error)) => failed(StatusCode::UNPROCESSABLE_ENTITY, error.into()),
        Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

fn answer(novelty: &Novelty) -> Value {
    let nearest = novelty.explanation.as_ref();
    let nearest = nearest.and_then(|found| found.nearest.first().map(|near| near.name.clone()));
    json!({ "score": novelty.score, "verdict": novelty.verdict, "nearest": nearest })
}

/// What the server scores with.
async fn describe(State(service): State<Service>) -> Json<Value> {
    let calibration = service.detector.calibration();
    Json(json!({
        "teacher": service.detector.teacher().spec().name,
        "threshold": calibration.map(|found| found.threshold),
    }))
}
