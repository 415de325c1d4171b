#!/bin/sh
# The tests of the native kernels under GCC's address and undefined-behaviour sanitizers: the first fault ends them.
#   tests/sanitize.sh PYTHON [PYTEST ARGUMENTS]
# Everything is built in a folder of its own and deleted afterwards; the library in use is not touched.
set -eu
python=$1
shift
here=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT INT TERM
cp -r "$here/kernels" "$here/drafters" "$here/tests" "$here/setup.py" "$here/pyproject.toml" "$here/README.md" "$tree"
rm -f "$tree"/kernels/_native*
cd "$tree"
DOVETAIL_REQUIRE_NATIVE=1 DOVETAIL_SANITIZE=1 "$python" setup.py --quiet build_ext --inplace --parallel 2
# Python itself leaks by design, and its allocator hides what lies behind a tensor's end.
export PYTHONPATH="$tree" PYTHONMALLOC=malloc OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
	"$python" -m pytest -q -p no:cacheprovider -m "not slow" \
	tests/kernels/decoder_layer tests/kernels/linear_lowbit tests/kernels/test_tree_attention.py \
	tests/kernels/test_threads.py tests/drafters/test_native.py \
	-k "not memory_comes_with_rows" "$@"  # the sanitizer keeps freed memory
