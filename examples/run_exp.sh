#!/usr/bin/env bash
# The experiments of the original code's run_exp.sh, on this library: train a split VGG-11 without a defense, with the
# Gaussian mixture and with attention, over several noise levels and weights; invert every one; put it in one table.
#
#   examples/run_exp.sh --short              scikit-learn's digits, a few minutes on two cores
#   examples/run_exp.sh --data-root DIR      CIFAR-10, as in the original: days without a GPU
#
# All other options go to `python -m cem.compare`, and override what is written here; with other --surrogates, give
# --variants anew, or none. Interrupted? The same line again: what is finished is not run again.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    exit
fi

if [[ ${1:-} == --short ]]; then
    shift
    exec python -m cem.compare --quick --surrogates none mixture attention slots --out runs/exp-short "$@"
fi

model=(
    --arch vgg11_bn_sgm         # the encoder ends in a sigmoid
    --cut-layer 4               # two convolutions and two poolings stay with the client
    --bottleneck noRELU_C8S1    # 8 channels cross the cut
)
training=(
    --data cifar10 --augment
    --epochs 240 --batch-size 128 --lr 0.05
)
grid=(
    --surrogates none paper original slots    # the last one is what is recommended, at its own weight
    --variants
    "paper: {surrogate: mixture, lambd: [8, 16], mixture: {var_threshold: 0.125}}"
    "original: {surrogate: attention, lambd: [8, 16], lambd_schedule: rising, attention: {var_threshold: 0.125, reduction: none}}"
    --noise-stds 0.01 0.025 0.05 0.1 0.15
    --seeds 125 126 127         # the original has one seed, which says nothing of the spread
)
attack=(
    --attack.decoder.networks preactN8C64 preactN8C64:ssim preactN8C128 deconvC64
)
exec python -m cem.compare "${model[@]}" "${training[@]}" "${grid[@]}" "${attack[@]}" --out runs/exp-cifar10 "$@"
