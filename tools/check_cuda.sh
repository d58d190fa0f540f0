#!/usr/bin/env bash
# Whether the code behind the feature `cuda` has the right types, on a machine with neither nvcc nor a GPU.
#
#     tools/check_cuda.sh
#
# A stand-in for nvcc writes empty files, so the kernels themselves are not compiled: for that see tools/cuda_toolkit.sh. About two
# minutes, in a target folder of its own (target/cuda-check).
set -euo pipefail
cd "$(dirname "$0")/.."
toolkit=$(mktemp -d)
trap 'rm -rf "$toolkit"' EXIT
mkdir -p "$toolkit"/{bin,include,lib64}
echo '#define CUDA_VERSION 13000' >"$toolkit/include/cuda.h"
cat >"$toolkit/bin/nvcc" <<'STAND_IN'
#!/usr/bin/env bash
case "$*" in
    *--list-gpu-code*) echo sm_90; exit ;;
esac
previous=
for argument in "$@"; do
    [ "$previous" = -o ] && output=$argument
    [ "$previous" = --output-directory ] && folder=$argument
    case $argument in
        --output-directory=*) folder=${argument#*=} ;;
        *.cu) name=$(basename "$argument" .cu) ;;
    esac
    previous=$argument
done
if [ -n "${output:-}" ]; then : >"$output"; elif [ -n "${folder:-}" ]; then : >"$folder/$name.ptx"; fi
STAND_IN
chmod +x "$toolkit/bin/nvcc"
PATH=$toolkit/bin:$PATH CUDARC_CUDA_VERSION=13000 CUDA_PATH=$toolkit CUDA_HOME=$toolkit CUDA_ROOT=$toolkit \
    CUDA_TOOLKIT_ROOT_DIR=$toolkit CUDA_COMPUTE_CAP=90 CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda-check \
    cargo clippy --locked -p defend-core -p defend-nn -p defend-cuda-kernels --features defend-core/cuda --all-targets -- --deny warnings
