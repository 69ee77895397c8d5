#!/usr/bin/env bash
# Runs of docs/multiclass.md: equal imbalance and steps (300, 600) with 2, 3, 5 and 10 classes.
#   bash results/multiclass.sh digits
#   bash results/multiclass.sh fashionmnist --data-root /usr/share/datasets/fashion-mnist
set -euo pipefail
python=${PYTHON:-python}
dataset=$1
shift

if [ "$dataset" = digits ]; then
    order=8,3,9,5,1,7,2,6,4,0 imbalance=20 flags=(--size 8 --batch-size 32)
    epochs=([2]=75 [3]=75 [5]=50 [10]=30)
else
    order=2,4,6,0,3,5,7,9,8,1 imbalance=100 flags=(--size 14 --batch-size 64)
    epochs=([2]=7 [3]=7 [5]=5 [10]=3)
fi

for seed in ${SEEDS:-0 1 2}; do
    for classes in 2 3 5 10; do
        name=$dataset-${classes}classes subset=subsets/$name/lt$imbalance.json
        [ -f "$subset" ] || "$python" make_subsets.py "$dataset" --name "$name" "$@" \
            --classes "${order:0:2*classes-1}" --imbalance "$imbalance"
        for method in supcon supmin ntxent untrained; do
            out=runs/multiclass/$name/lt$imbalance/$method/seed$seed
            loss=(--method "$method" --lr 0.125)
            [ "$method" = untrained ] && loss=(--method supcon --lr 0)
            "$python" pretrain.py "$subset" "${loss[@]}" "${flags[@]}" --arch resnet8 \
                --epochs "${epochs[classes]}" --warmup-epochs $((epochs[classes] / 5 + 1)) \
                --watch-every 0 --seed "$seed" --out "$out"
            "$python" linear_probe.py "$out" --rows own
            "$python" evaluate_metrics.py "$out" --picture none
        done
    done
done
