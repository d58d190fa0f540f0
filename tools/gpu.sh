#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: every stage against the CPU, then speed beside PyTorch, in one table.
#
#     tools/gpu.sh [--smoke] [PYTHON]
#
# PYTHON (python3 by default) has torch and timm; the table goes to standard output, everything else to standard error.
# --smoke runs tiny settings without a GPU, to test the scripts themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

smoke=false
if [ "${1:-}" = --smoke ]; then
    smoke=true
    shift
fi
python=${1:-python3}

missing=()
need() { command -v "$1" >/dev/null || missing+=("$1: $2"); }
need cargo "the Rust toolchain"
need "$python" "a Python with torch and timm, as tools/requirements.txt has them"
if ! $smoke; then
    need nvidia-smi "NVIDIA's driver"
    need nvcc "a CUDA toolkit that the driver can run, with its bin folder in PATH; tools/cuda_toolkit.sh makes one"
fi
if command -v "$python" >/dev/null; then
    "$python" -c 'import timm, torch' 2>/dev/null || missing+=("torch and timm: in $python")
    $smoke || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
        missing+=("a PyTorch that sees the GPU: in $python")
fi
if [ ${#missing[@]} -gt 0 ]; then
    printf 'missing: %s\n' "${missing[@]}" >&2
    exit 1
fi

# One set of features and one profile, so that candle's CUDA kernels are compiled once.
build=(--locked --workspace)
measure=()
if $smoke; then
    build+=(--profile dev)
    measure=(--smoke --seconds 0.05)
else
    build+=(--profile bench --features cuda)
    nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv >&2
fi

cargo test "${build[@]}" --test devices -- --nocapture >&2

ours=$(mktemp)
trap 'rm -f "$ours"' EXIT
cargo bench "${build[@]}" --bench gpu -- "${measure[@]}" >"$ours"
"$python" tools/gpu.py --ours "$ours" "${measure[@]}"
