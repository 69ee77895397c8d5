#!/usr/bin/env bash
# The experiment section.
#
#   bash run_all.sh demo        digits, 99-1 and 50-50: SupCon collapses, two losses repair it (minutes on a laptop CPU, no download)
#   bash run_all.sh             the paper's grid over the data sets found under DATA_ROOT; may be killed and run again
#   bash run_all.sh subsets     its first part alone: the subsets of what is found
#   bash run_all.sh --list      its runs, one command per line, e.g. for a SLURM array or GNU parallel (after subsets)
#   bash run_all.sh --dry-run   how many runs and images that is, and how long at the speed of runs already made
#   bash run_all.sh test        the tests
#
# demo, test, subsets and the grid set up what is missing: an active Python that satisfies requirements.txt is used as it is,
# else a virtual environment .venv beside this file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# what the grid is made of; every name can be set from outside, e.g.  SEEDS="0" RATIOS="95-5" bash run_all.sh
DATA_ROOT=${DATA_ROOT-data}                        # holds the data sets, as the README's table says
METHODS=${METHODS-"supcon supmin suppro ntxent kcl tsc sbcl bcl bcl:variant=batchnorm paco paco:alpha=0.05"}   # contrastive; :flag=value
BASELINES=${BASELINES-"ce weighted_ce weighted_ce:no-augment focal ldam_drw logit_adjusted"}     # supervised, from scratch; likewise
RETRAIN=${RETRAIN-"crt tau_norm lws"}              # new classifiers for the encoder of ce
SEEDS=${SEEDS-"0 1 2"}
RUNS=${RUNS-runs}                                  # where the runs go: another place for other FLAGS, since runs are never mixed
RATIOS=${RATIOS-}                                  # unset: 99-1 95-5 50-50 for iNaturalist, natural for the medical sets
FLAGS=${FLAGS-}                                    # added to training of networks, e.g. FLAGS="--arch resnet18 --epochs 20"
PRETRAIN_FLAGS=${PRETRAIN_FLAGS-}                  # to those of pretrain.py alone, e.g. PRETRAIN_FLAGS="--warmup-epochs 2"
FINETUNE_FLAGS=${FINETUNE_FLAGS-}                  # to those of finetune.py alone, e.g. FINETUNE_FLAGS="--lr 0.001"
RETRAIN_FLAGS=${RETRAIN_FLAGS-}                    # to finetune.py --retrain, which takes none of the others, e.g. RETRAIN_FLAGS="--epochs 20"


setup() {  # setup FILE: a Python that satisfies the requirements in FILE, as $PYTHON
    local python=${PYTHON:-python3}
    command -v "$python" > /dev/null || { echo "run_all.sh: no python3 found; install Python 3.10 to 3.13, or name one with PYTHON=..." >&2; exit 2; }
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
        { echo "run_all.sh: $("$python" --version) is not supported; install Python 3.10 to 3.13, or name one with PYTHON=..." >&2; exit 2; }
    PYTHON=$python
    satisfied "$1" && return
    PYTHON=.venv/bin/python                       # relative: survives spaces in the path of the kit
    satisfied "$1" && return
    if ! "$PYTHON" -m pip --version > /dev/null 2>&1; then
        echo "setting up .venv (some minutes, once)"
        "$python" -m venv --clear .venv ||
            { echo "run_all.sh: could not make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
    fi
    "$PYTHON" -m pip install --disable-pip-version-check -r "$1" -c constraints.txt ||
        { echo "run_all.sh: installing $1 failed (see above); mend that and give the same command again" >&2; exit 2; }
}

satisfied() {  # is every requirement of file $1 (and of the files it names with -r) installed for $PYTHON?
    "$PYTHON" - "$1" 2> /dev/null << 'END'
import sys
from importlib.metadata import version
from pathlib import Path
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
def check(name):
    for line in Path(name).read_text().splitlines():
        if line.startswith("-r "):
            check(line[3:].strip())
        elif line.strip() and not line.startswith("#"):
            wanted = Requirement(line)
            if version(wanted.name).split("+")[0] not in wanted.specifier:
                sys.exit(1)
check(sys.argv[1])
END
}


look() {  # $have: the data sets under DATA_ROOT, one per line: name, size or -, folder, with tabs between; $missing: the others
    python=${PYTHON:-python3}
    missing=$("$python" catalog.py "$DATA_ROOT" 2>&1 > /dev/null) ||
        { echo "run_all.sh: cannot run catalog.py; install Python 3.10 to 3.13, or name one with PYTHON=... (${missing##*$'\n'})" >&2; exit 2; }
    have=$("$python" catalog.py "$DATA_ROOT" 2> /dev/null)
    [ -n "$have" ] || { echo "$missing"; echo "run_all.sh: no data set under $DATA_ROOT; set DATA_ROOT, or try 'bash run_all.sh demo', which needs no data"; exit 2; } >&2
    case " $BASELINES " in *" ce "*) ;; *) [ -z "$RETRAIN" ] || echo "not re-trained: ${RETRAIN// /, } take the encoder of ce, which BASELINES lacks" >&2 ;; esac
}

ratios() {  # of data set $1
    if [ -n "$RATIOS" ]; then echo "$RATIOS"; else case $1 in inat21-*) echo 99-1 95-5 50-50 ;; *) echo natural ;; esac; fi
}

subsets() {  # with 50-50 always, for the probe on balanced rows
    # shellcheck disable=SC2086  # the ratios are words
    "$PYTHON" make_subsets.py all --data-root "$DATA_ROOT" ${RATIOS:+--ratios $RATIOS 50-50}
}

list() {  # the grid's runs, one command per line; each returns at once where its work is finished
    local set seed entry ratio out subset line new
    while IFS=$'\t' read -r set _; do
        for ratio in $(ratios "$set"); do
            for seed in $SEEDS; do
                subset=subsets/$set/$ratio.json
                for entry in $METHODS; do
                    out=$RUNS/$set/$ratio/${entry//[:=]/-}/seed$seed
                    echo "$PYTHON pretrain.py $subset --method ${entry//:/ --} --seed $seed --out $out${FLAGS:+ $FLAGS}${PRETRAIN_FLAGS:+ $PRETRAIN_FLAGS}" \
                         "&& $PYTHON linear_probe.py $out && $PYTHON evaluate_metrics.py $out"
                done
                for entry in $BASELINES; do
                    out=$RUNS/$set/$ratio/${entry//[:=]/-}/seed$seed
                    line="$PYTHON finetune.py $subset --loss ${entry//:/ --} --seed $seed --out $out${FLAGS:+ $FLAGS}${FINETUNE_FLAGS:+ $FINETUNE_FLAGS}"
                    line+=" && $PYTHON evaluate_metrics.py $out"
                    if [ "$entry" = ce ]; then
                        for new in $RETRAIN; do line+=" && $PYTHON finetune.py $out --retrain $new${RETRAIN_FLAGS:+ $RETRAIN_FLAGS}"; done
                    fi
                    echo "$line"
                done
            done
        done
    done <<< "$have"
}

demo_list() {  # the demo's training: small enough for a laptop, long enough to tell the methods apart
    local seed ratio method
    for seed in 0 1; do
        for ratio in 99-1 50-50; do
            for method in supcon supmin suppro ntxent; do
                echo "$PYTHON pretrain.py subsets/digits/$ratio.json --method $method --seed $seed --out runs/demo/$ratio/$method/seed$seed" \
                     "--arch resnet18 --size 16 --batch-size 64 --epochs 16 --lr 0.125 --watch-every 8 --save-every 8"
            done
        done
    done
}

run_list() {  # run the commands on standard input, $1 at a time; a failed one does not stop the rest
    local list n=0 line
    list=$(cat)
    export -f run_one
    export JOBS=$1 FAILED; FAILED=$(mktemp)
    # shellcheck disable=SC2016  # $1 is for the inner bash
    while IFS= read -r line; do
        n=$((n + 1)); printf '%s\0' "[$n/$(wc -l <<< "$list" | tr -d ' ')] $line"
    done <<< "$list" | xargs -0 -n 1 -P "$JOBS" bash -c 'run_one "$1"' _
    if [ -s "$FAILED" ]; then
        echo; echo "failed ($(wc -l < "$FAILED" | tr -d ' ')); the same command tries these again:"; cat "$FAILED"; exit 1
    fi >&2
    rm "$FAILED"
}

run_one() {  # "[k/n] COMMAND": alone with its progress bars, in company as one line when it is done
    local command=${1#*] } output started=$SECONDS
    if [ "$JOBS" = 1 ]; then
        printf '\n%s\n' "$1"
        bash -c "$command" < /dev/null || echo "  $command" >> "$FAILED"
    elif output=$(bash -c "$command" 2>&1 < /dev/null); then
        printf '%s  %d s\n' "$1" $((SECONDS - started))
        tr '\r' '\n' <<< "$output" | awk '/^epoch/ { last = $0 } /^  WARNING/ { last = last "\n" $0 } END { if (last) print last }'
    else
        printf '%s  FAILED\n%s\n' "$1" "$(tr '\r' '\n' <<< "$output" | tail -n 3)"
        echo "  $command" >> "$FAILED"
    fi
}

estimate() {  # of the list on standard input: runs, images to train on, hours at the speed of finished runs of the same data set
    "$python" -c '
import collections, glob, json, pathlib, re, sys
runs, left, images = collections.Counter(), collections.Counter(), collections.Counter()
for line in sys.stdin:
    subset, data = re.search(r"(subsets/([^/]+)/[^/ ]+\.json)", line).groups()
    runs[data] += 1
    out = pathlib.Path(re.search(r"--out (\S+)", line)[1])
    if all((out / file).exists() for file in ["encoder.pt", *(f"{new}/finetune.json" for new in re.findall(r"--retrain (\w+)", line))]):
        continue
    left[data] += 1
    epochs = re.findall(r"--epochs (\d+)", line)
    if pathlib.Path(subset).exists():
        counts = json.loads(pathlib.Path(subset).read_text())["counts"]["train"]
        images[data] += sum(counts.values()) * int(epochs[-1] if epochs else 100)
for data in runs:
    logs = "".join(open(log).read() for log in glob.glob(f"{sys.argv[1]}/{data}/*/*/seed*/log.jsonl"))
    speeds = [float(speed) for speed in re.findall(r"\"images_per_s\": ([\d.]+)", logs)]
    work = f"{images[data]:,} training images" if images[data] else "images not counted (bash run_all.sh subsets)" if left[data] else "nothing left"
    time = f", about {images[data] * len(speeds) / sum(speeds) / 3600:.1f} h at the mean of measured epochs" if speeds and images[data] else ", speed not measured yet"
    print(f"{data}: {runs[data]} runs, {left[data]} to do: {work}{time if left[data] else str()}")
' "$RUNS"
}


caller=$PWD
cd "$here"
case $DATA_ROOT in /*) ;; *) DATA_ROOT=$caller/$DATA_ROOT ;; esac
case ${1:-grid} in
    demo)
        setup requirements.txt
        "$PYTHON" make_subsets.py digits
        cores=$(getconf _NPROCESSORS_ONLN)
        jobs=$((cores < 4 ? cores : 4))           # small networks gain more from company than from threads
        export OMP_NUM_THREADS=$((cores / jobs))
        echo "training 16 small networks on $cores cores, $jobs at a time (about ten minutes on two cores)"
        demo_list | run_list "$jobs"
        printf '%s\n' "$PYTHON linear_probe.py runs/demo/*/*/seed*" "$PYTHON evaluate_metrics.py runs/demo/*/*/seed* --picture pca" | run_list "$jobs"
        "$PYTHON" report.py runs/demo
        [ "$PYTHON" != .venv/bin/python ] || echo "to type the README's commands yourself: source .venv/bin/activate"
        ;;
    test)
        setup requirements-test.txt
        "$PYTHON" -m pytest "${@:2}"
        ;;
    grid)
        look
        setup requirements.txt
        failed=0
        subsets || failed=1
        list | run_list 1 || failed=1
        "$PYTHON" report.py "$RUNS"
        exit $failed
        ;;
    subsets)
        look
        setup requirements.txt
        subsets
        ;;
    --list)
        look
        echo "$missing" >&2
        PYTHON=${PYTHON:-python}
        list
        ;;
    --dry-run)
        look
        echo "$missing" >&2
        PYTHON=${PYTHON:-python}
        list
        list | estimate
        ;;
    *)
        echo "run_all.sh: $1 is none of demo, test, subsets, --list, --dry-run; without a word it runs the grid" >&2
        exit 2
        ;;
esac
