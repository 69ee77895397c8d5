#!/usr/bin/env bash
# How the runs behind results/README.md are made: small networks, some days on one CPU core.
#
#   bash results/evidence.sh        all runs; the verdicts appear in runs/evidence/report/
#   bash results/evidence.sh f m    only the runs that judge the claims with these letters
#
# Data sets are taken from DATA_ROOT: pneumoniamnist.npz and breastmnist.npz (28 px), train/ and
# val/ of iNaturalist 2021, fashion-mnist/. The runs of missing data sets are left out.
set -euo pipefail
# shellcheck source=utils/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../utils/launch.sh"  # setup, devices, launch, die

evidence() {  # print the commands, those that decide most claims first
    local seeds flags small="--arch resnet18 --stem imagenet --batch-size 64 --save-every 8"
    seeds="0 1 2 3 4" flags="$small --lr 0.125 --size 16 --epochs 16 --watch-every 4"
    runs abcehijklm digits 99-1 supcon supmin suppro ntxent
    runs abcefhl digits 95-5 supcon supmin suppro
    runs abeh digits 50-50 supcon supmin suppro
    runs ac digits 99-1 supcon:lr=0:epochs=1  # an untrained network
    runs m digits 99-1 supcon:minority-per-batch=4 supmin:minority-per-batch=4
    runs i digits 99-1 suppro:margin=0 suppro:margin=0.5 suppro:margin=2
    flags="$small --lr 0.001 --size 16 --epochs 32"
    runs k digits 99-1 weighted_ce ldam_drw ce

    seeds="0 1 2" flags="$small --lr 0.125 --size 16 --epochs 16 --watch-every 4"
    runs c digits 99-1 kcl tsc sbcl bcl paco
    runs j digits 99-1 supmin:majority-supervision={0.25,0.5,0.75}
    runs f digits 95-5 supcon:batch-size=32:epochs=8:warmup-epochs=5 \
        supcon:batch-size=128:epochs=36:warmup-epochs=22 \
        supcon:batch-size=256:epochs=72:warmup-epochs=45
    runs abh digits 99-1 {supcon,supmin,suppro}:warmup-epochs=2 \
        {supcon,supmin}:lr=0.015625:warmup-epochs=2
    runs abh digits 50-50 {supcon,supmin,suppro}:warmup-epochs=2
    runs abc digits 99-1 {supcon,supmin,suppro}:epochs=64:warmup-epochs=40

    seeds="0 1 2 3 4" flags="$small --lr 0.125 --size 16 --epochs 12 --watch-every 3"
    runs abcdel inat21-mammals 99-1 supcon supmin suppro
    runs ac inat21-mammals 99-1 supcon:lr=0:epochs=1
    seeds="0 1 2"
    runs aeh inat21-mammals 50-50 supcon supmin suppro

    flags="$small --lr 0.125 --size 16 --epochs 4 --warmup-epochs 2 --watch-every 1"
    runs abcdel fashionmnist 99-1 supcon supmin suppro
    runs ac fashionmnist 99-1 supcon:lr=0:epochs=1
    runs abc fashionmnist 99-1 {supcon,supmin,suppro}:epochs=16:warmup-epochs=8
    runs aeh fashionmnist 50-50 supcon supmin suppro

    flags="$small --lr 0.125 --epochs 10 --warmup-epochs 6 --watch-every 2"
    runs abcdel pneumoniamnist 99-1 supcon supmin suppro
    runs ac pneumoniamnist 99-1 supcon:lr=0:epochs=1
    runs aeh pneumoniamnist 50-50 supcon supmin suppro
    runs abcdel pneumoniamnist 95-5 supcon supmin suppro
    runs abc pneumoniamnist 99-1 {supcon,supmin,suppro}:epochs=30:warmup-epochs=18

    seeds="0 1 2 3 4" flags="$small --lr 0.125 --epochs 16 --watch-every 4"
    runs cdel breastmnist natural supcon supmin suppro
    runs c breastmnist natural supcon:lr=0:epochs=1
}

runs() {  # print the runs for claims $1 on data set $2 at ratio $3 with methods METHOD:FLAG=VALUE
    local method seed run options finetune pretrain metrics python
    local subset=subsets/evidence/$2/$3.json
    [[ $1 == *[$LETTERS]* && -e $subset ]] || return 0
    printf -v python %q "$PYTHON"
    for seed in ${SEEDS:-$seeds}; do for method in "${@:4}"; do
        run=runs/evidence/$2/$3/${method//[:=]/-}/seed$seed
        options="--out $run --seed $seed $flags"
        finetune="$python finetune.py $subset $options --loss $method"
        pretrain="$python pretrain.py $subset $options --method ${method//:/ --}"
        metrics="$python evaluate_metrics.py $run --picture pca"
        case $method in
            ce) echo "$finetune && $metrics && $python finetune.py $run --retrain crt" ;;
            weighted_ce | ldam_drw) echo "$finetune && $metrics" ;;
            *) echo "$pretrain && $python linear_probe.py $run && $metrics" ;;
        esac
    done; done
}

subset() {  # make the subset of data set $1 if path $2 exists; $3...: flags of make_subsets.py
    if [ -e "$2" ]; then
        guard "$PYTHON" make_subsets.py "$1" --out subsets/evidence "${@:3}"
    else
        echo "not found: $2; the runs on $1 are left out" >&2
    fi
}

LETTERS=${*:-a-m}
[[ "$*" =~ ^[a-fh-m\ ]*$ ]] ||
    die "unknown claim in '$*'; give letters from a to m (g: python -m benchmarks methods)"
setup requirements.txt
mammals=$("$PYTHON" -m datasets "$DATA_ROOT" 2> /dev/null | sed -n 's/^inat21-mammals.-.//p')
fashion=$DATA_ROOT/fashion-mnist
[ -d "$fashion" ] || fashion=/usr/share/datasets/fashion-mnist  # Debian's dataset-fashion-mnist
subset digits .
subset pneumoniamnist "$DATA_ROOT/pneumoniamnist.npz" --data-root "$DATA_ROOT" --size 28
subset breastmnist "$DATA_ROOT/breastmnist.npz" --data-root "$DATA_ROOT" --size 28 \
    --ratios 50-50 natural
subset inat21-mammals "${mammals:-$DATA_ROOT/train}" --data-root "$mammals" --size 32
subset fashionmnist "$fashion" --data-root "$fashion"

read -ra slots <<< "$(devices $((CORES < 4 ? CORES : 4)))"
evidence | "$PYTHON" reporting/estimate.py runs/evidence "${slots[@]}"
failed=0
launch "${slots[@]}" < <(evidence) || failed=1
"$PYTHON" report.py runs/evidence --claims || failed=1
exit $failed
