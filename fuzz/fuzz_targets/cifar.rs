#![no_main]

#[allow(dead_code, reason = "each target has one of them")]
#[path = "../bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::cifar(bytes));
