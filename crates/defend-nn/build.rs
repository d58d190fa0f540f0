//! Compiles the CUDA kernels of the `cuda` feature with `nvcc`; does nothing without it.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    {
        println!("cargo::rerun-if-changed=src/cuda/kernels.cu");
        println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
        cudaforge::KernelBuilder::new()
            .source_files(["src/cuda/kernels.cu"])
            .arg("-std=c++17")
            .arg("-O3")
            .build_ptx()?;
    }
    Ok(())
}
