#!/usr/bin/env bash
# The experiment section: which networks are trained, on which data, with which methods and seeds.
#
#   bash run_all.sh demo      digits (no download): SupCon collapses, the two proposed losses do not
#   bash run_all.sh           the paper's grid over the data sets below DATA_ROOT, one run per GPU
#   bash run_all.sh subsets   the grid's first step alone: decode the images, draw the ratios
#   bash run_all.sh list      the grid's runs, one command per line (SLURM array, GNU parallel)
#   bash run_all.sh dry-run   the same with their number and an estimate of the hours
#   bash run_all.sh evidence  the runs that judge the paper's claims; some: evidence f m, or gpu
#   bash run_all.sh test      the tests
#
# Every command may be stopped and given again: finished runs return at once, others continue.
# An active Python that satisfies requirements.txt is used, else .venv is created beside this file.
# The environment overrides each variable below:  SEEDS=0 RATIOS=95-5 bash run_all.sh
set -euo pipefail

DATA_ROOT=${DATA_ROOT-data}           # folder with the data sets
RUNS=${RUNS-runs}                     # folder of the runs; other FLAGS or EPOCHS need another one
SEEDS=${SEEDS:-"0 1 2"}
RATIOS=${RATIOS-}                     # default: 99-1 95-5 50-50 for iNaturalist, else natural
# Epochs of contrastive pre-training. The published code has 100, the paper's supplement 350:
# EPOCHS=350 RUNS=runs-350 bash run_all.sh
EPOCHS=${EPOCHS-100}
# Contrastive methods; METHOD:FLAG=VALUE adds a flag of pretrain.py.
METHODS=${METHODS-"supcon supmin suppro ntxent kcl tsc sbcl bcl bcl:variant=batchnorm
    paco paco:alpha=0.05"}
# Supervised losses, trained from scratch; LOSS:FLAG adds a flag of finetune.py.
BASELINES=${BASELINES-"ce weighted_ce weighted_ce:no-augment focal ldam_drw logit_adjusted"}
RETRAIN=${RETRAIN-"crt tau_norm lws"}  # new classifiers on the frozen encoder of ce
FLAGS=${FLAGS-}                       # for every network, e.g. "--arch resnet18 --epochs 20"
PRETRAIN_FLAGS=${PRETRAIN_FLAGS-}     # for pretrain.py, e.g. "--warmup-epochs 2"
FINETUNE_FLAGS=${FINETUNE_FLAGS-}     # for finetune.py --loss, e.g. "--lr 0.001"
RETRAIN_FLAGS=${RETRAIN_FLAGS-}       # for finetune.py --retrain, which takes none of the others
JOBS=${JOBS-}                         # runs at a time without a GPU; default: demo up to 4, grid 1
# shellcheck source=utils/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/utils/launch.sh"  # setup, devices, launch, guard, die

grid() {  # print the commands of the grid, one run per line
    local dataset ratio seed method loss classifier subset run python runs
    printf -v python %q "$PYTHON"; printf -v runs %q "$RUNS"
    for dataset in $DATASETS; do for ratio in $(ratios "$dataset"); do for seed in $SEEDS; do
        subset=subsets/$dataset/$ratio.json
        for method in $METHODS; do
            run=$runs/$dataset/$ratio/${method//[:=]/-}/seed$seed
            echo "$python pretrain.py $subset --out $run --seed $seed --epochs $EPOCHS" \
                "$FLAGS $PRETRAIN_FLAGS --method ${method//:/ --}" \
                "&& $python linear_probe.py $run && $python evaluate_metrics.py $run"
        done
        for loss in $BASELINES; do
            run=$runs/$dataset/$ratio/${loss//[:=]/-}/seed$seed
            echo -n "$python finetune.py $subset --out $run --seed $seed" \
                "$FLAGS $FINETUNE_FLAGS --loss ${loss//:/ --} && $python evaluate_metrics.py $run"
            [ "$loss" != ce ] || for classifier in $RETRAIN; do
                echo -n " && $python finetune.py $run --retrain $classifier $RETRAIN_FLAGS"
            done
            echo
        done
    done; done; done | sed 's/  */ /g; s/ $//'
}

ratios() {  # print the class ratios of data set $1
    case $1 in inat21-*) echo "${RATIOS:-99-1 95-5 50-50}" ;; *) echo "${RATIOS:-natural}" ;; esac
}

demo() {  # print the commands of the demo: small enough for a laptop, enough to see the collapse
    local seed run python
    printf -v python %q "$PYTHON"
    for seed in 0 1; do for run in {95-5,50-50}/{supcon,supmin,suppro,ntxent} 95-5/untrained; do
        echo "$python pretrain.py subsets/digits/${run%/*}.json --out runs/demo/$run/seed$seed" \
            "--seed $seed --arch resnet8 --size 16 --batch-size 64 --epochs 60 --warmup-epochs 6" \
            "--lr 0.125 --watch-every 20 --method ${run#*/}"
    done; done | sed 's/--method untrained/--method ntxent --lr 0/'
}

find_datasets() {  # set DATASETS to the names found below DATA_ROOT; print which are missing
    PYTHON=${PYTHON:-python3}
    DATASETS=$("$PYTHON" -m datasets "$DATA_ROOT" | cut -f 1)
    [ -n "$DATASETS" ] || die "no data set below $DATA_ROOT; set DATA_ROOT or try the demo"
}

make_subsets() {  # 50-50 is always drawn, since the probe is also trained on balanced rows
    # shellcheck disable=SC2086  # RATIOS holds several words
    guard "$PYTHON" make_subsets.py all --data-root "$DATA_ROOT" ${RATIOS:+--ratios $RATIOS 50-50}
}

# shellcheck disable=SC2046  # devices are words
case ${1-grid} in
    demo)
        setup requirements.txt
        "$PYTHON" make_subsets.py digits
        echo "training 18 small networks (about six minutes on two cores)"
        launch $(devices $((CORES < 4 ? CORES : 4))) < <(demo)
        guard "$PYTHON" linear_probe.py runs/demo/*/*/seed*
        guard "$PYTHON" evaluate_metrics.py runs/demo/*/*/seed*
        "$PYTHON" report.py runs/demo > /dev/null  # it ranks by accuracies that one CPU gives
        "$PYTHON" -m reporting.demo runs/demo
        [ "$PYTHON" != .venv/bin/python ] || echo "next: source .venv/bin/activate" ;;
    grid)
        find_datasets
        setup requirements.txt
        failed=0
        make_subsets || failed=1
        launch $(devices 1) < <(grid) || failed=1
        "$PYTHON" report.py "$RUNS" || failed=1
        exit $failed ;;
    subsets) find_datasets; setup requirements.txt; make_subsets ;;
    list | --list) find_datasets; grid ;;
    dry-run | --dry-run)
        find_datasets
        grid
        for EPOCHS in $(printf '%s\n' "$EPOCHS" 100 350 | sort -nu); do
            printf '\n%s epochs of pre-training\n' "$EPOCHS"
            grid | "$PYTHON" reporting/estimate.py "$RUNS" $(devices 1)
        done ;;
    evidence) exec bash results/evidence.sh "${@:2}" ;;
    test) setup tests/requirements.txt; "$PYTHON" -m pytest "${@:2}" ;;
    help | --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' run_all.sh ;;
    *) die "unknown command $1; bash run_all.sh --help lists the commands" ;;
esac
