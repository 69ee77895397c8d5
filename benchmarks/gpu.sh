#!/usr/bin/env bash
# The first hours with a GPU: tests of every method, speed, precision, evidence.
#
#   bash benchmarks/gpu.sh              all parts, one after the other; writes below gpu/
#   bash benchmarks/gpu.sh tests speed  these parts alone
#   SMOKE=1 bash benchmarks/gpu.sh      tiny inputs, also without a GPU
#
# A step has at most 9 minutes. Each one that ends well is not run again by the same command;
# its output is in gpu/<step>.log, written as it goes. Data sets are taken from DATA_ROOT.
# shellcheck disable=SC2086,SC2317  # variables hold several words or none; parts are called by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-python3}
FOLDER=${FOLDER:-gpu}
DATA_ROOT=${DATA_ROOT:-data}
SMOKE=${SMOKE:+--smoke}
PARTS="tests speed precision two_gpus evidence"
SUBSET=$FOLDER/subsets/digits/99-1.json
failed=0
mkdir -p "$FOLDER"

step() {  # run command $2... once, as step $1; a failed step does not stop the others
    local name=$1 status=0
    [ ! -e "$FOLDER/$name.done" ] || return 0
    echo "$name: ${*:2}"
    timeout --foreground -k 30 540 "${@:2}" > "$FOLDER/$name.log" 2>&1 || status=$?
    if [ $status = 0 ]; then touch "$FOLDER/$name.done"; else
        echo "$name: exit code $status, see $FOLDER/$name.log" >&2; failed=1
    fi
}

tests() {
    local part
    [ -z "$SMOKE" ] || return 0
    for part in "not every_method" every_method; do
        step "tests-${part// /-}" "$PYTHON" -m pytest -o addopts= -v tests/test_cuda.py -k "$part"
    done
}

speed() {  # rows of pipeline and profile: torch.compile, cuDNN without trials of its algorithms
    local run runs=(auto-224 off-224 auto-64 auto-28)
    [ -z "$SMOKE" ] || runs=(off-8)
    for run in "${runs[@]}"; do
        step "pipeline-$run" "$PYTHON" -m benchmarks pipeline --amp "${run%-*}" --out "$FOLDER/$run" \
            ${SMOKE:---sizes "${run#*-}" --steps 10 --rounds 3}
    done
    step profile "$PYTHON" -m benchmarks profile --out "$FOLDER" ${SMOKE:---rounds 3}
    step methods "$PYTHON" -m benchmarks methods --out "$FOLDER" ${SMOKE:---rounds 3}
    step losses "$PYTHON" -m benchmarks losses --out "$FOLDER" ${SMOKE:---rounds 3}
    step metrics "$PYTHON" -m benchmarks metrics --out "$FOLDER" ${SMOKE:---rounds 1}
}

precision() {  # bf16, TF32 and float32 at ResNet-50, two runs each; a stopped run continues
    local run seed method amp runs=({0,1}-{supmin,supcon}-{bf16,off,fp32})
    local subset=$SUBSET flags="--size 64 --batch-size 64 --epochs 30"
    [ -z "$SMOKE" ] || runs=(0-supmin-bf16)
    step digits "$PYTHON" make_subsets.py digits --out "$FOLDER/subsets"
    if [ -e "$DATA_ROOT/breastmnist_224.npz" ]; then
        subset=$FOLDER/subsets/breastmnist/natural.json flags="--batch-size 128 --epochs 60"
        step breastmnist "$PYTHON" make_subsets.py breastmnist --data-root "$DATA_ROOT" \
            --ratios natural --out "$FOLDER/subsets"
    fi
    for run in "${runs[@]}"; do
        IFS=- read -r seed method amp <<< "$run"
        step "precision-$run" "$PYTHON" pretrain.py "$subset" --method $method --seed $seed \
            --amp $amp --out "$FOLDER/runs/$run" ${SMOKE:-$flags}
        step "probe-$run" "$PYTHON" linear_probe.py "$FOLDER/runs/$run" $SMOKE
    done
}

two_gpus() {
    [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ] || return 0
    step digits "$PYTHON" make_subsets.py digits --out "$FOLDER/subsets"
    step two-gpus "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 pretrain.py \
        "$SUBSET" --out "$FOLDER/runs/two-gpus" ${SMOKE:---size 64 --batch-size 64 --epochs 5}
}

evidence() {  # results/evidence.sh continues where it stopped: as many steps as it takes
    [ -n "$SMOKE" ] || step evidence bash results/evidence.sh gpu
}

[ $# != 0 ] || set -- $PARTS
for part; do
    [[ " $PARTS " == *" $part "* ]] || { echo "unknown part '$part'; give $PARTS" >&2; exit 2; }
done
for part; do "$part"; done
exit $failed
