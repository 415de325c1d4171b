#!/bin/sh
# Everything that a machine with a GPU is asked for, in under 12 minutes on one GPU with 16 cores; JSON files go to the
# folder named first (default: gpu-results), one for each measurement, and a list of what failed or was not reached.
#
#   docs/bench/gpu.sh [FOLDER]
#
# DEVICE=cpu tries the script without a GPU, as far as it goes. SHAPE, LAYERS and TOKENS make it smaller.
set -u

out=${1:-gpu-results}
device=${DEVICE:-cuda:0}
shape=${SHAPE:-llama2-7b}
tokens=${TOKENS:-48}
limit_s=${LIMIT_S:-690}
dovetail=${DOVETAIL:-dovetail}
started=$(date +%s)
mkdir -p "$out"
: >"$out/failed.txt"

left() { echo $((limit_s - $(date +%s) + started)); }

# run SECONDS NAME ARGUMENTS...: one measurement into NAME.json, for at most so long, and only while there is time.
run() {
    most=$1 name=$2
    shift 2
    remaining=$(left)
    if [ "$remaining" -le 5 ]; then
        echo "$name: not reached" >>"$out/failed.txt"
        return
    fi
    [ "$most" -gt "$remaining" ] && most=$remaining
    echo "$name ($remaining s left): dovetail $*" >&2
    if timeout "$most" "$dovetail" "$@" >"$out/$name.out" 2>"$out/$name.log"; then
        tail -n 1 "$out/$name.out" >"$out/$name.json"
    else
        echo "$name: ended with $? of at most $most s; $name.log says why" >>"$out/failed.txt"
    fi
    rm -f "$out/$name.out"
}

# One simulated race: plain decoding against drafts of a pretended acceptance, with the time of a real drafter's blocks.
race() {
    most=$1 name=$2
    shift 2
    # shellcheck disable=SC2086  # LAYERS is two words or none
    run "$most" "$name" bench --shape "$shape" ${LAYERS:+--layers $LAYERS} --drafter-device "$device" \
        --max-tokens "$tokens" --repeats 2 "$@"
}

run 60 doctor doctor
for budget in 3GiB 7GiB; do
    run 30 "plan-$budget" plan "$shape" --vram "$budget"
done
race 110 int4-a4 --weights int4 --simulate-acceptance 4 --blocks 1 --rows 8
race 90 int4-a3 --weights int4 --simulate-acceptance 3 --blocks 1 --rows 8
race 90 int4-a6 --weights int4 --simulate-acceptance 6 --blocks 5 --rows 16
race 90 int4-layers --weights int4 --simulate-acceptance 4 --blocks 1 --rows 8 --shape-gpu-layers "${GPU_LAYERS:-8}"
race 90 paper-setting --weights int4 --simulate-acceptance 5.9 --blocks 5 --rows 16 --top-k 10 --depth 7
race 120 int8-a4 --weights int8 --simulate-acceptance 4 --blocks 1 --rows 8
race 150 bf16-a4 --weights bf16 --simulate-acceptance 4 --blocks 1 --rows 8
run 120 smollm2 bench --limit 4 --max-tokens "$tokens" --repeats 2 --against plain --drafter-device "$device"

python3 - "$out" "$(left)" <<'PYTHON'
import json, pathlib, sys

folder, left = pathlib.Path(sys.argv[1]), int(sys.argv[2])
results = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if file.stem != "all"}
missing = (folder / "failed.txt").read_text().splitlines()
(folder / "all.json").write_text(json.dumps({"results": results, "missing": missing, "seconds_left": left}) + "\n")
print(json.dumps({"measured": sorted(results), "missing": missing, "seconds_left": left}))
PYTHON
