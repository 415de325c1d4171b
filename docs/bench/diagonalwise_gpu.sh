#!/bin/sh
# Design 8 of docs/evidence.md on a machine with a GPU, in under four minutes: layers and whole networks in fp32 and bf16,
# torch's own depthwise layers (NCHW and channels_last) beside the refactored ones, Triton's kernels and, for one network,
# torch.compile. Reports and plots go to the folder named first (default: diagonalwise-gpu); a part that runs out of its
# seconds is named in failed.txt and the next one goes on.
#
#   docs/bench/diagonalwise_gpu.sh [FOLDER]
set -u

out=${1:-diagonalwise-gpu}
dovetail=${DOVETAIL:-dovetail}
mkdir -p "$out"
: >"$out/failed.txt"

# run SECONDS NAME ARGUMENTS...
run() {
    most=$1 name=$2
    shift 2
    timeout "$most" "$dovetail" bench diagonalwise "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1 ||
        echo "$name: ended with $? of at most $most s; $name.log says why" >>"$out/failed.txt"
}

run 90 nets --networks mobilenet_v1_x1_0,fd_mobilenet_x1_0 --batches 64 --passes step --net-batch 64 --repeats 15 --limit 1.5
run 75 others --networks snet146,menet_228_12x1_g3 --batches 64 --passes step --net-batch 64 --repeats 15 --limit 1.5
run 65 compiled --networks fd_mobilenet_x1_0 --batches 64 --passes step --compiled --net-batch 0 --repeats 10 --limit 1.5
cat "$out/failed.txt" >&2
