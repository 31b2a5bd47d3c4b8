#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct with five methods on the sample pairs that fastpref ships, one after the other:
#
#   bash benchmarks/training_runs.sh [OUTDIR [METHOD ...]]
#
# and leaves training.json and summary.png of each in OUTDIR/METHOD (default: benchmarks/results/training). Some 15
# minutes on 2 CPU cores; the models go to build/training while they last. `python -m benchmarks.training_table` shows
# what came of it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/training}
wanted=" ${*:2} "
common=(--model smollm2 --num_train_epochs 1 --max_length 512 --gradient_checkpointing False --save_strategy no)

run() {
    local method=$1
    shift
    [ "$wanted" = "  " ] || [[ $wanted = *" $method "* ]] || return 0
    fastpref train "$method" "${common[@]}" --output_dir "build/training/$method" "$@"
    mkdir -p "$out/$method"
    cp "build/training/$method/"{training.json,summary.png} "$out/$method/"
    rm -rf "build/training/$method"
}

run reward --learning_rate 3e-5 --per_device_train_batch_size 4
run dpo --learning_rate 2e-5 --per_device_train_batch_size 4
run kto --learning_rate 2e-5 --per_device_train_batch_size 8
# without a reference, the base model prefers 20 of 34 rejected responses: these two start behind
run simpo --learning_rate 2e-5 --num_train_epochs 2 --per_device_train_batch_size 4
run orpo --learning_rate 2e-5 --num_train_epochs 2 --beta 1.0 --per_device_train_batch_size 4
