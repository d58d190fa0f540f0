//! Every stage on the best device of this build and machine, against a reference on the CPU.
//!
//! With a graphics card (`--features cuda` or `metal`) the reference is the CPU's result in `f32`. Without one the fused
//! `f32` kernels are compared with the same stage in `f64`, which runs the compositions that other devices run.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod operations;
mod place;
mod stages;
#[path = "../stripes/mod.rs"]
mod stripes;
mod whole;
