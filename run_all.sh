#!/usr/bin/env bash
# The experiment section.
#
#   bash run_all.sh demo        digits, 99-1 and 50-50: SupCon collapses, two losses repair it (minutes on a laptop CPU, no download)
#   bash run_all.sh             the paper's grid over the data sets found under DATA_ROOT, one run per GPU; may be stopped and run again
#   bash run_all.sh subsets     its first part alone: the subsets of what is found
#   bash run_all.sh --list      its runs, one command per line, e.g. for a SLURM array or GNU parallel (after subsets)
#   bash run_all.sh --dry-run   how many runs and images that is, and the GPU hours at the speed of runs already made
#   bash run_all.sh evidence    the runs that results/README.md judges the paper's claims by, or some: evidence f m; hours on a CPU, goes on where it was
#   bash run_all.sh test        the tests
#
# demo, test, subsets, evidence and the grid set up what is missing: an active Python that satisfies requirements.txt is used as it is,
# else a virtual environment .venv beside this file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# what the grid is made of; every name can be set from outside, e.g.  SEEDS="0" RATIOS="95-5" bash run_all.sh
DATA_ROOT=${DATA_ROOT-data}                        # holds the data sets, as the README's table says
METHODS=${METHODS-"supcon supmin suppro ntxent kcl tsc sbcl bcl bcl:variant=batchnorm paco paco:alpha=0.05"}   # contrastive; :flag=value
BASELINES=${BASELINES-"ce weighted_ce weighted_ce:no-augment focal ldam_drw logit_adjusted"}     # supervised, from scratch; likewise
RETRAIN=${RETRAIN-"crt tau_norm lws"}              # new classifiers for the encoder of ce
SEEDS=${SEEDS-}                                    # unset: 0 1 2; for some of the evidence 0 to 4
RUNS=${RUNS-runs}                                  # where the runs go: another place for other FLAGS, since runs are never mixed
RATIOS=${RATIOS-}                                  # unset: 99-1 95-5 50-50 for iNaturalist, natural for the medical sets
FLAGS=${FLAGS-}                                    # added to training of networks, e.g. FLAGS="--arch resnet18 --epochs 20"
PRETRAIN_FLAGS=${PRETRAIN_FLAGS-}                  # to those of pretrain.py alone, e.g. PRETRAIN_FLAGS="--warmup-epochs 2"
FINETUNE_FLAGS=${FINETUNE_FLAGS-}                  # to those of finetune.py alone, e.g. FINETUNE_FLAGS="--lr 0.001"
RETRAIN_FLAGS=${RETRAIN_FLAGS-}                    # to finetune.py --retrain, which takes none of the others, e.g. RETRAIN_FLAGS="--epochs 20"
JOBS=${JOBS-}                                      # runs at a time where there is no GPU; else it is one on each in CUDA_VISIBLE_DEVICES, or on all


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
    missing=$("$python" -m datasets "$DATA_ROOT" 2>&1 > /dev/null) ||
        { echo "run_all.sh: cannot list the data sets; install Python 3.10 to 3.13, or name one with PYTHON=... (${missing##*$'\n'})" >&2; exit 2; }
    have=$("$python" -m datasets "$DATA_ROOT" 2> /dev/null)
    [ -n "$have" ] || { echo "$missing"; echo "run_all.sh: no data set under $DATA_ROOT; set DATA_ROOT, or try 'bash run_all.sh demo', which needs no data"; exit 2; } >&2
    case " $BASELINES " in *" ce "*) ;; *) [ -z "$RETRAIN" ] || echo "not re-trained: ${RETRAIN// /, } take the encoder of ce, which BASELINES lacks" >&2 ;; esac
}

ratios() {  # of data set $1
    if [ -n "$RATIOS" ]; then echo "$RATIOS"; else case $1 in inat21-*) echo 99-1 95-5 50-50 ;; *) echo natural ;; esac; fi
}

subsets() {  # with 50-50 always, for the probe on balanced rows
    # shellcheck disable=SC2086  # the ratios are words
    begin "$PYTHON" make_subsets.py all --data-root "$DATA_ROOT" ${RATIOS:+--ratios $RATIOS 50-50}
    wait $!
}

contrastive() {  # the command for a run: subset $1, folder $2, method $3 with its own flags (:flag=value), seed $4, flags $5, of evaluate_metrics.py $6
    local own=${3#"${3%%:*}"}
    echo "$python pretrain.py $1 --method ${3%%:*} --seed $4 --out $2${5:+ $5}${own//:/ --} && $python linear_probe.py $2 && $python evaluate_metrics.py $2${6:+ $6}"
}

supervised() {  # likewise for a loss of finetune.py; $7: new classifiers for the encoder of ce, $8: their flags
    local own=${3#"${3%%:*}"} new
    echo -n "$python finetune.py $1 --loss ${3%%:*} --seed $4 --out $2${5:+ $5}${own//:/ --} && $python evaluate_metrics.py $2${6:+ $6}"
    if [ "$3" = ce ]; then
        for new in $7; do echo -n " && $python finetune.py $2 --retrain $new${8:+ $8}"; done
    fi
    echo
}

list() {  # the grid's runs, one command per line; each returns at once where its work is finished
    local set seed entry ratio out subset python runs
    printf -v python %q "$PYTHON"; printf -v runs %q "$RUNS"
    while IFS=$'\t' read -r set _; do
        for ratio in $(ratios "$set"); do
            for seed in ${SEEDS:-0 1 2}; do
                subset=subsets/$set/$ratio.json out=$runs/$set/$ratio
                for entry in $METHODS; do
                    contrastive "$subset" "$out/${entry//[:=]/-}/seed$seed" "$entry" "$seed" "$FLAGS${PRETRAIN_FLAGS:+ $PRETRAIN_FLAGS}"
                done
                for entry in $BASELINES; do
                    supervised "$subset" "$out/${entry//[:=]/-}/seed$seed" "$entry" "$seed" "$FLAGS${FINETUNE_FLAGS:+ $FINETUNE_FLAGS}" "" \
                        "$RETRAIN" "$RETRAIN_FLAGS"
                done
            done
        done
    done <<< "$have"
}

demo_list() {  # the demo's training: small enough for a laptop, long enough to tell the methods apart
    local seed ratio method python
    printf -v python %q "$PYTHON"
    for seed in 0 1; do
        for ratio in 99-1 50-50; do
            for method in supcon supmin suppro ntxent; do
                echo "$python pretrain.py subsets/digits/$ratio.json --method $method --seed $seed --out runs/demo/$ratio/$method/seed$seed" \
                     "--arch resnet18 --size 16 --batch-size 64 --epochs 16 --lr 0.125 --watch-every 8 --save-every 8"
            done
        done
    done
}

evidence_subsets() {  # for the claims: images as small as the networks
    local small=${DATA_ROOT}/fashion-mnist name mammals
    "$PYTHON" make_subsets.py digits --out subsets/evidence
    for name in pneumoniamnist breastmnist; do
        [ -e "$DATA_ROOT/$name.npz" ] || { echo "not found: $DATA_ROOT/$name.npz (medmnist.com); its runs are left out" >&2; continue; }
        "$PYTHON" make_subsets.py $name --size 28 --data-root "$DATA_ROOT" --out subsets/evidence \
            --ratios "$([ $name = breastmnist ] || echo 99-1,95-5,)50-50,natural"
    done
    mammals=$("$PYTHON" -m datasets "$DATA_ROOT" 2> /dev/null | sed -n "s/^inat21-mammals\t-\t//p")
    if [ -n "$mammals" ]; then
        "$PYTHON" make_subsets.py inat21-mammals --data-root "$mammals" --size 32 --out subsets/evidence
    else
        echo "not found: inat21-mammals ($DATA_ROOT/train and val); its runs are left out" >&2
    fi
    [ -d "$small" ] || small=/usr/share/datasets/fashion-mnist               # where Debian's package has it
    [ -d "$small" ] || { echo "not found: Fashion-MNIST (Debian's package dataset-fashion-mnist); its runs are left out" >&2; return; }
    "$PYTHON" make_subsets.py fashionmnist --data-root "$small" --out subsets/evidence
}

evidence_list() {  # the runs that the claims in the letters $1 are judged by (none: all), the decisive ones first
    local claims=${1// } python seeds flags few="--arch resnet18 --batch-size 64 --save-every 8"
    printf -v python %q "$PYTHON"
    seeds="0 1 2 3 4" flags="$few --lr 0.125 --size 16 --epochs 16 --watch-every 4"
    of abcehijklm digits 99-1 supcon supmin suppro ntxent
    of abcefhl digits 95-5 supcon supmin suppro
    of abeh digits 50-50 supcon supmin suppro
    of ac digits 99-1 supcon:lr=0:epochs=1                                   # the network untrained
    of m digits 99-1 supcon:minority-per-batch=4 supmin:minority-per-batch=4
    of i digits 99-1 suppro:margin=0 suppro:margin=0.5 suppro:margin=2
    flags="$few --lr 0.001 --size 16 --epochs 32"
    of k digits 99-1 weighted_ce ldam_drw ce
    seeds="0 1 2" flags="$few --lr 0.125 --size 16 --epochs 16 --watch-every 4"
    of c digits 99-1 kcl tsc sbcl bcl paco
    of j digits 99-1 supmin:majority-supervision=0.25 supmin:majority-supervision=0.5 supmin:majority-supervision=0.75
    of f digits 95-5 supcon:batch-size=32:epochs=8:warmup-epochs=5 supcon:batch-size=128:epochs=36:warmup-epochs=22 \
        supcon:batch-size=256:epochs=72:warmup-epochs=45
    of abh digits 99-1 supcon:warmup-epochs=2 supmin:warmup-epochs=2 suppro:warmup-epochs=2 supcon:lr=0.015625:warmup-epochs=2 \
        supmin:lr=0.015625:warmup-epochs=2
    of abh digits 50-50 supcon:warmup-epochs=2 supmin:warmup-epochs=2 suppro:warmup-epochs=2
    of abc digits 99-1 supcon:epochs=64:warmup-epochs=40 supmin:epochs=64:warmup-epochs=40 suppro:epochs=64:warmup-epochs=40
    seeds="0 1 2 3 4" flags="$few --lr 0.125 --size 16 --epochs 12 --watch-every 3"
    of abcdel inat21-mammals 99-1 supcon supmin suppro
    of ac inat21-mammals 99-1 supcon:lr=0:epochs=1
    seeds="0 1 2"
    of aeh inat21-mammals 50-50 supcon supmin suppro
    flags="$few --lr 0.125 --size 16 --epochs 4 --warmup-epochs 2 --watch-every 1"
    of abcdel fashionmnist 99-1 supcon supmin suppro
    of ac fashionmnist 99-1 supcon:lr=0:epochs=1
    of abc fashionmnist 99-1 supcon:epochs=16:warmup-epochs=8 supmin:epochs=16:warmup-epochs=8 suppro:epochs=16:warmup-epochs=8
    of aeh fashionmnist 50-50 supcon supmin suppro
    flags="$few --lr 0.125 --epochs 10 --warmup-epochs 6 --watch-every 2"
    of abcdel pneumoniamnist 99-1 supcon supmin suppro
    of ac pneumoniamnist 99-1 supcon:lr=0:epochs=1
    of aeh pneumoniamnist 50-50 supcon supmin suppro
    of abcdel pneumoniamnist 95-5 supcon supmin suppro
    of abc pneumoniamnist 99-1 supcon:epochs=30:warmup-epochs=18 supmin:epochs=30:warmup-epochs=18 suppro:epochs=30:warmup-epochs=18
    seeds="0 1 2 3 4" flags="$few --lr 0.125 --epochs 16 --watch-every 4"
    of cdel breastmnist natural supcon supmin suppro
    of c breastmnist natural supcon:lr=0:epochs=1
}

of() {  # the runs for the claims $1: data set $2, ratio $3, then methods or losses
    local entry out subset=subsets/evidence/$2/$3.json
    [ -z "$claims" ] || [[ $1 =~ [$claims] ]] || return 0
    [ -e "$subset" ] || return 0
    for seed in ${SEEDS:-$seeds}; do
        for entry in "${@:4}"; do
            out=runs/evidence/$2/$3/${entry//[:=]/-}/seed$seed
            case $entry in
                ce|weighted_ce|ldam_drw) supervised "$subset" "$out" "$entry" "$seed" "$flags" "--picture pca" crt "" ;;
                *) contrastive "$subset" "$out" "$entry" "$seed" "$flags" "--picture pca" ;;
            esac
        done
    done
}

slots() {  # what takes one run at a time: the ids of the GPUs; where there is none, the word cpu, JOBS (or $1) times
    local i
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ', ' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -v -x -e "" -e -1
    else
        nvidia-smi -L 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | grep .
    fi || for ((i = 0; i < ${JOBS:-$1}; i++)); do echo cpu; done
}

run_list() {  # run the commands on standard input, one at a time on each of the slots "$@"; a failed one does not stop the rest
    local commands total cores slot line n=0 failed=0
    commands=$(cat) total=$(wc -l <<< "$commands" | tr -d ' ') cores=$(getconf _NPROCESSORS_ONLN)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo "$total to run, one at a time on: $*"
    for slot in "$@"; do begin worker "$slot" $#; done
    wait
    while IFS= read -r line; do
        n=$((n + 1))
        [ -e "$work/$n/done" ] || { [ $((failed++)) != 0 ] || printf '\nfailed; the same command tries these again:\n'; echo "  $line"; }
    done <<< "$commands" >&2
    rm -rf "$work"
    return $((failed > 0))
}

worker() {  # on slot $1 of $2: run every command that no other worker has begun
    local line n=0
    trap exit INT TERM HUP USR1                   # bash does so once the running script has ended, which got the signal, too
    [ "$1" = cpu ] || export CUDA_VISIBLE_DEVICES=$1
    [ "$2" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > $2 ? cores / $2 : 1))}"
    while IFS= read -r line; do
        n=$((n + 1))
        if mkdir "$work/$n" 2> /dev/null; then    # only one worker can
            if run_one "$2" "[$n/$total] " "$line" "$work/$n/output"; then touch "$work/$n/done"; fi
        fi
    done <<< "$commands"
}

run_one() {  # the command $3, number $2, by one of $1 workers: alone with its progress bars, in company as one line when it is done
    local started=$SECONDS
    if [ "$1" = 1 ]; then
        printf '\n%s\n' "$2$3"
        eval "$3" < /dev/null
    elif eval "$3" < /dev/null > "$4" 2>&1; then
        printf '%s  %d s\n' "$2$3" $((SECONDS - started))
        tr '\r' '\n' < "$4" | awk '/^epoch/ { last = $0 } /^  WARNING/ { last = last "\n" $0 } END { if (last) print last }'
    else
        printf '%s  FAILED\n%s\n' "$2$3" "$(tr '\r' '\n' < "$4" | tail -n 3)"
        return 1
    fi
}

begin() {  # start a command in the background, in a process group of its own, through which stop reaches all that it runs
    trap 'stop INT' INT; trap 'stop TERM' TERM; trap 'stop HUP' HUP; trap 'stop USR1' USR1
    set -m
    "$@" &
    set +m
}

stop() {  # hand signal $1 on and wait: the scripts save and end by it
    local group
    echo "run_all.sh: stopped by SIG$1; the same command goes on from what is finished" >&2
    for group in $(jobs -p); do kill -s "${1/HUP/TERM}" -- "-$group" 2> /dev/null || true; done
    wait
    exit $((128 + $(kill -l "$1")))
}

estimate() {  # of the list on standard input, on the slots "$@": runs, images to train on, hours at the speed of finished runs of the same data set
    "$python" -c '
import collections, glob, json, pathlib, re, shlex, sys
root, *slots = sys.argv[1:]
runs, left, images, hours = (collections.Counter() for _ in range(4))
for line in sys.stdin:
    words = shlex.split(line)
    subset, out = pathlib.Path(words[2]), pathlib.Path(words[words.index("--out") + 1])
    data = subset.parent.name
    runs[data] += 1
    if all((out / file).exists() for file in ["encoder.pt", *(f"{new}/finetune.json" for new in re.findall(r"--retrain (\w+)", line))]):
        continue
    left[data] += 1
    epochs = re.findall(r"--epochs[ =](\d+)", line)
    if subset.exists():
        counts = json.loads(subset.read_text())["counts"]["train"]
        images[data] += sum(counts.values()) * int(epochs[-1] if epochs else 100)
for data in runs:
    logs = "".join(open(log).read() for log in glob.glob(f"{glob.escape(root)}/{data}/*/*/seed*/log.jsonl"))
    if not logs and root == "runs/evidence" and pathlib.Path("results/runs.jsonl").exists():
        logs = "".join(line for line in open("results/runs.jsonl") if f"\"dataset\": \"{data}\"" in line)
    speeds = [float(speed) for speed in re.findall(r"\"images_per_s\": ([\d.]+)", logs)]
    if speeds and images[data]:
        hours[data] = images[data] * sum(1 / speed for speed in speeds) / len(speeds) / 3600
    work = f"{images[data]:,} training images" if images[data] else "images not counted (bash run_all.sh subsets)" if left[data] else "nothing left"
    time = f", about {hours[data]:.1f} h at the mean of measured epochs" if data in hours else ", speed not measured yet"
    print(f"{data}: {runs[data]} runs, {left[data]} to do: {work}{time if left[data] else str()}")
if hours:
    known = "about" if all(data in hours for data in left) else "without those not measured yet,"
    unit = "hours" if "cpu" in slots else "GPU hours"
    work = sum(hours.values())
    print(f"all: {sum(left.values())} to do: {known} {work:.1f} {unit}, {work / len(slots):.1f} h by the clock on: {chr(32).join(slots)}")
' "$RUNS" "$@"
}


caller=$PWD
cd "$here"
case $DATA_ROOT in /*) ;; *) DATA_ROOT=$caller/$DATA_ROOT ;; esac
[[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || { echo "run_all.sh: JOBS=$JOBS is not a number from 1 up" >&2; exit 2; }
# shellcheck disable=SC2046  # a slot is a word
case ${1:-grid} in
    demo)
        setup requirements.txt
        "$PYTHON" make_subsets.py digits
        cores=$(getconf _NPROCESSORS_ONLN)
        echo "training 16 small networks (about ten minutes on two cores)"
        few=$((cores < 4 ? cores : 4))            # small networks gain more from company than from threads
        run_list $(slots $few) < <(demo_list)
        run_list $(slots $few) < <(printf '%q %s\n' "$PYTHON" "linear_probe.py runs/demo/*/*/seed*" "$PYTHON" "evaluate_metrics.py runs/demo/*/*/seed* --picture pca")
        "$PYTHON" report.py runs/demo
        [ "$PYTHON" != .venv/bin/python ] || echo "to type the README's commands yourself: source .venv/bin/activate"
        ;;
    evidence)
        [[ "${*:2}" =~ ^[a-fh-m\ ]*$ ]] || { echo "run_all.sh: evidence ${*:2}: takes the letters of claims, a to m, e.g. evidence f m" \
            "(for g: python benchmark.py methods --out results/benchmark)" >&2; exit 2; }
        setup requirements.txt
        python=$PYTHON RUNS=runs/evidence failed=0
        evidence_subsets
        cores=$(getconf _NPROCESSORS_ONLN)
        few=$((cores < 4 ? cores : 4))
        evidence_list "${*:2}" | estimate $(slots $few)
        run_list $(slots $few) < <(evidence_list "${*:2}") || failed=1
        "$PYTHON" report.py runs/evidence --claims || failed=1
        exit $failed
        ;;
    test)
        setup tests/requirements.txt
        "$PYTHON" -m pytest "${@:2}"
        ;;
    grid)
        look
        setup requirements.txt
        failed=0
        subsets || failed=1
        run_list $(slots 1) < <(list) || failed=1
        "$PYTHON" report.py "$RUNS" || failed=1
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
        list | estimate $(slots 1)
        ;;
    *)
        echo "run_all.sh: $1 is none of demo, test, evidence, subsets, --list, --dry-run; without a word it runs the grid" >&2
        exit 2
        ;;
esac
