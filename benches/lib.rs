//! Benchmarks live beside this file; there is nothing to import.
