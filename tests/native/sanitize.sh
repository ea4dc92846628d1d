#!/usr/bin/env bash
# Builds the C++ module with AddressSanitizer and UndefinedBehaviorSanitizer, beside the checkout's own build, and runs
# the op tests of the native backend on it, on every instruction set. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r cnm cnm_kernels csrc tests setup.py pyproject.toml "$copy"
cd "$copy"
export PYTHONPATH=$copy
rm -f cnm_kernels/*.so
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
CNM_KERNELS_NATIVE=1 CXXFLAGS="$sanitizers" LDFLAGS="$sanitizers" "$python" setup.py -q build_ext --inplace
export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}  # Python itself leaks
export LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
"$python" -m pytest -q -p no:cacheprovider -k "native and not compiles" "$@" \
    tests/ops/test_native_isa.py tests/ops/test_every_op.py tests/ops/test_gaussian_mask.py tests/ops/test_dropout.py \
    tests/ops/test_dropout_add_layer_norm.py tests/ops/test_intra_video_contrastive_loss.py tests/ops/test_weighted_attention.py \
    tests/ops/test_gaussian_attention.py tests/ops/test_linear_nll.py tests/ops/test_contrastive_reconstruction_loss.py
