//! Compiles the CUDA kernels of the `cuda` feature with `nvcc`; does nothing without it.

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}

#[cfg(feature = "cuda")]
fn main() -> cudaforge::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/kernels.cu");
    println!("cargo::rerun-if-changed=src/attention.cuh");
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    cudaforge::KernelBuilder::new()
        .source_files(["src/kernels.cu"])
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()?;
    Ok(())
}
