#!/usr/bin/env bash
# A CUDA toolkit for building with `--features cuda` on Linux, without root, driver or GPU.
#
#     tools/cuda_toolkit.sh VENV [COMPUTE_CAPABILITY]
#
# Makes the Python environment VENV, installs NVIDIA's compiler and libraries into it (1.2 GB), links what the
# linker looks for, and makes a stub of the driver's library. Prints the `export` lines that the build needs and nothing
# else on standard output: `eval "$(tools/cuda_toolkit.sh VENV)"`. The capability defaults to 90 (Hopper).
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 VENV [COMPUTE_CAPABILITY]" >&2
    exit 2
fi
repository=$(cd "$(dirname "$0")/.." && pwd)
capability=${2:-90}
for program in python3 cargo cc; do
    command -v "$program" >/dev/null || { echo "$0 needs $program in PATH" >&2; exit 1; }
done

# Version 13.0 is what drivers from 580 on can run.
python3 -m venv "$1"
venv=$(cd "$1" && pwd)
"$venv/bin/pip" install --quiet \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 nvidia-cuda-nvrtc==13.0.88 >&2
cuda=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13

# The packages hold libX.so.N alone; the linker looks for libX.so, in lib or lib64.
for library in cublas:13 cublasLt:13 cudart:13 curand:10 nvrtc:13; do
    ln -sfn "lib${library%:*}.so.${library#*:}" "$cuda/lib/lib${library%:*}.so"
done
ln -sfn lib "$cuda/lib64"

# libcuda.so comes with the driver. The stub has the names that cudarc binds; each answers CUDA_ERROR_NO_DEVICE.
driver=$(cargo metadata --manifest-path "$repository/Cargo.toml" --locked --format-version 1 \
    --filter-platform "$(rustc -vV | sed -n 's/^host: //p')" --features cuda |
    python3 -c 'import json, os, sys
print(*(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
mkdir -p "$cuda/lib/stubs"
grep -hoE 'fn cu[A-Z][A-Za-z0-9_]*' "$driver"/src/driver/sys/*.rs | sort -u |
    sed 's/^fn \(.*\)$/int \1(void) { return 100; }/' >"$cuda/lib/stubs/cuda.c"
cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$cuda/lib/stubs/libcuda.so" "$cuda/lib/stubs/cuda.c"
ln -sfn libcuda.so "$cuda/lib/stubs/libcuda.so.1"

cat <<EXPORTS
export CUDA_HOME=$cuda
export CUDA_PATH=$cuda
export NVCC=$cuda/bin/nvcc
export CUDA_COMPUTE_CAP=$capability
export PATH=$cuda/bin:\$PATH
EXPORTS
