#!/usr/bin/env bash
# How the runs behind results/README.md are made: ResNet-8 on small images, some days on two cores.
#
#   bash results/evidence.sh        all runs; the verdicts appear in runs/evidence/report/
#   bash results/evidence.sh f m    only the runs that judge the claims with these letters
#   bash results/evidence.sh gpu    ResNet-50 on photographs of 64 px and medical images of 224 px,
#                                   the most decisive runs first
#
# Every command may be stopped and given again. 25 minutes of a large GPU, three runs at a time:
#   CUDA_VISIBLE_DEVICES=0,0,0 timeout 25m bash results/evidence.sh gpu
#
# Data sets are taken from DATA_ROOT: pneumoniamnist.npz and breastmnist.npz (28 px),
# breastmnist_224.npz, chestxray224/ (folders of two classes), train/ and val/ of iNaturalist 2021,
# fashion-mnist/. The runs of missing data sets are left out.
# Seed k of a network uses draw k of the subset, in subsets/seed<k>/.
set -euo pipefail
# shellcheck source=utils/launch.sh disable=SC2086
source "$(dirname "${BASH_SOURCE[0]}")/../utils/launch.sh"  # setup, devices, launch, guard, die

PAPER="untrained ntxent supcon supmin suppro"
LONG_TAIL="kcl tsc sbcl bcl paco"

evidence() {  # print the commands, those that decide most claims first
    local seeds flags small="--arch resnet8 --batch-size 128"
    local sgd="$small --lr 0.125" adam="$small --lr 0.001"
    local shirts="$sgd --size 28 --epochs 25 --warmup-epochs 5"
    local mammals="$sgd --size 32 --epochs 48 --warmup-epochs 5"
    local pneumonia="$sgd --size 28 --epochs 30 --warmup-epochs 3"
    local breast="$sgd --size 28 --epochs 265 --warmup-epochs 27 --watch-every 20"

    seeds="0 1 2 3 4" flags="$shirts --watch-every 1"
    runs abcdefhijklmnopqr fashionmnist 99-1 $PAPER
    flags=$shirts
    runs aceh fashionmnist 50-50 $PAPER
    seeds="0 1 2" flags="$mammals --watch-every 2"
    runs abcdelqr inat21-mammals 99-1 $PAPER
    flags=$mammals
    runs aceh inat21-mammals 50-50 $PAPER
    flags=$pneumonia
    runs acdelq pneumoniamnist natural $PAPER
    seeds="0 1 2 3 4" flags=$breast
    runs acdelq breastmnist natural untrained:epochs=30 ${PAPER#* }
    seeds="0 1 2" flags="$sgd --size 64 --amp bf16 --epochs 33 --warmup-epochs 3"
    runs acdelq chestxray natural untrained:epochs=4:warmup-epochs=0 ntxent
    flags="$sgd --size 64 --amp bf16 --epochs 265 --warmup-epochs 27 --watch-every 20"
    runs acdelq breastmnist-64 natural untrained:epochs=30:warmup-epochs=0 ntxent

    seeds="0 1 2" flags=$shirts
    runs mn fashionmnist 99-1 {supcon,supmin}:minority-per-batch=4 {supcon,supmin}:relu
    seeds="0 1 2 3 4"
    runs c fashionmnist 99-1 $LONG_TAIL
    seeds="0 1 2" flags=$mammals
    runs c inat21-mammals 99-1 $LONG_TAIL
    flags=$pneumonia
    runs c pneumoniamnist natural $LONG_TAIL
    flags=$breast
    runs c breastmnist natural $LONG_TAIL
    flags="$adam --size 28 --epochs 50"  # one view per image: twice the epochs
    runs k fashionmnist 99-1 weighted_ce ldam_drw
    runs ko fashionmnist 99-1 ce
    runs o fashionmnist 99-1 auc_margin:init={ce,ntxent,supcon,supmin,suppro}
    seeds="0 1 2 3 4"
    runs o fashionmnist 99-1 auc_margin

    seeds="0 1 2" flags=$shirts
    runs abcef fashionmnist 95-5 $PAPER
    runs f fashionmnist 95-5 supcon:batch-size=32:epochs=6:warmup-epochs=1 \
        supcon:batch-size=64:epochs=13:warmup-epochs=3 \
        supcon:batch-size=256:epochs=50:warmup-epochs=10 \
        supcon:batch-size=512:epochs=105:warmup-epochs=21
    runs i fashionmnist 99-1 suppro:margin={0,0.5,1.5,2}
    runs j fashionmnist 99-1 supmin:majority-supervision={0.25,0.5,0.75,1}

    flags="$sgd --size 28 --epochs 13 --warmup-epochs 2"
    runs abcde fashionmnist-b 99-1 $PAPER
    runs acehp fashionmnist-b 50-50 $PAPER
    runs abce fashionmnist-b 95-5 $PAPER
    flags=$shirts
    runs p fashionmnist 99-1 {ntxent,supcon,supmin,suppro}:init=fashionmnist-b
    flags=$mammals
    runs abce inat21-mammals 95-5 $PAPER
    flags="$sgd --size 28 --epochs 115 --warmup-epochs 12"
    runs ah pneumoniamnist 50-50 $PAPER
}

gpu_evidence() {  # print the commands for a large GPU, the most decisive first
    local seeds seed ratio flags small="--size 64 --arch resnet50 --batch-size 256"
    flags="$small --epochs 100 --watch-every 10"
    for seeds in 0 1 2; do for ratio in 99-1 50-50 95-5; do
        runs a inat21-mammals-64 $ratio $PAPER
    done; done
    seeds="0 1 2" flags="--size 224 --arch resnet50 --batch-size 128 --epochs 265 --watch-every 20"
    runs a breastmnist-224 natural untrained:epochs=30:warmup-epochs=0 ${PAPER#* }
    flags="--size 224 --arch resnet50 --batch-size 128 --epochs 33 --watch-every 3"
    runs a chestxray-224 natural untrained:epochs=4:warmup-epochs=0 ${PAPER#* }
    flags="$small --epochs 100 --watch-every 10"
    runs a inat21-mammals-64 99-1 $LONG_TAIL
    for ratio in 99-1 50-50 95-5; do
        runs a inat21-mammals-64 $ratio {ntxent,supcon,supmin,suppro}:epochs=350
    done
}

runs() {  # print the runs for claims $1 on data set $2 at ratio $3 with methods METHOD:FLAG=VALUE
    local method seed subset run options train python
    [[ $1 == *[$LETTERS]* ]] || return 0
    printf -v python %q "$PYTHON"
    for seed in ${SEEDS:-$seeds}; do for method in "${@:4}"; do
        subset=subsets/seed$seed/$2/$3.json
        [ -e "$subset" ] || continue
        run=$RUNS/$2/$3/${method//[:=]/-}/seed$seed
        options="$subset --out $run --seed $seed $flags"
        case $method in
            ce | weighted_ce | ldam_drw | auc_margin*)
                train="$python finetune.py $options --loss $method"
                train=${train/:init=*/ --init $RUNS/$2/$3/${method#*=}/seed$seed}
                [ $method != ce ] || train+=" && $python finetune.py $run --retrain crt"
                echo "$train && $python evaluate_metrics.py $run" ;;
            *)
                train="$python pretrain.py $options --method ${method/untrained/ntxent:lr=0}"
                train=${train/:init=*/:init=$RUNS/fashionmnist-b/50-50/ntxent/seed$seed}
                # the probe that the paper describes, then the kit's; both are kept
                echo "${train//:/ --}" \
                    "&& { [ -e $run/probe_reference.json ] || $python linear_probe.py $run" \
                    "--protocol reference --rows one-percent --optimizer sgd --epochs 50" \
                    "--class-weights none; }" \
                    "&& $python linear_probe.py $run --rows own balanced one-percent" \
                    "&& $python evaluate_metrics.py $run" ;;
        esac
    done; done
}

subsets() {  # draw data set $1 for all seeds if path $2 exists; $3...: flags of make_subsets.py
    local seed
    if [ ! -e "$2" ]; then
        echo "not found: $2; the runs on $1 are left out" >&2
        return
    fi
    for seed in ${SEEDS:-0 1 2 3 4}; do
        guard "$PYTHON" make_subsets.py "$1" --seed "$seed" --out "subsets/seed$seed" "${@:3}"
    done
}

RUNS=${RUNS-runs/evidence}
LETTERS=a-r commands=evidence
if [ "$*" = gpu ]; then
    RUNS=$RUNS-gpu commands=gpu_evidence
elif [ $# != 0 ]; then
    [[ "$*" =~ ^[a-fh-r\ ]*$ ]] ||
        die "unknown claim in '$*'; give gpu, or letters from a to r (g: python -m benchmarks methods)"
    LETTERS=$*
fi
setup requirements.txt
mammals=$("$PYTHON" -m datasets "$DATA_ROOT" 2> /dev/null | sed -n 's/^inat21-mammals.-.//p')
mammals=${mammals:-$DATA_ROOT/train}
fashion=$DATA_ROOT/fashion-mnist
[ -d "$fashion" ] || fashion=/usr/share/datasets/fashion-mnist  # Debian's dataset-fashion-mnist
if [ $commands = gpu_evidence ]; then
    subsets inat21-mammals "$mammals" --data-root "$mammals" --size 64 --name inat21-mammals-64
    subsets npz "$DATA_ROOT/breastmnist_224.npz" --data-root "$DATA_ROOT/breastmnist_224.npz" \
        --size 224 --name breastmnist-224
    subsets folder "$DATA_ROOT/chestxray224" --data-root "$DATA_ROOT/chestxray224" --grayscale \
        --size 224 --store-size 256 --name chestxray-224
else
    subsets fashionmnist "$fashion" --data-root "$fashion"
    subsets fashionmnist "$fashion" --data-root "$fashion" --name fashionmnist-b \
        --minority 2,6 --majority 0,3,4
    subsets inat21-mammals "$mammals" --data-root "$mammals" --size 32 --store-size 36
    subsets pneumoniamnist "$DATA_ROOT/pneumoniamnist.npz" --data-root "$DATA_ROOT" --size 28
    subsets breastmnist "$DATA_ROOT/breastmnist.npz" --data-root "$DATA_ROOT" --size 28
    subsets npz "$DATA_ROOT/breastmnist_224.npz" --data-root "$DATA_ROOT/breastmnist_224.npz" \
        --size 64 --name breastmnist-64
    subsets folder "$DATA_ROOT/chestxray224" --data-root "$DATA_ROOT/chestxray224" --grayscale \
        --size 64 --store-size 72 --name chestxray
fi

read -ra slots <<< "$(devices $((CORES < 4 ? CORES : 4)))"
$commands | "$PYTHON" reporting/estimate.py "$RUNS" "${slots[@]}"
failed=0
launch "${slots[@]}" < <($commands) || failed=1
"$PYTHON" report.py "$RUNS" --claims || failed=1
exit $failed
