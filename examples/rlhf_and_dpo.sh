#!/usr/bin/env bash
# The two halves of preference learning side by side: preferences -> reward model -> RLOO with the exact KL in its reward,
# and DPO on the same preferences with the same budget. At the end both are judged on held-out prompts by the reward model
# and by the truth, and a third run without a KL shows the reward model being exploited.
#
#   examples/rlhf_and_dpo.sh [OUTPUT]
#
# By default on a toy that takes some minutes on two cores (examples/rlhf_toy.py). Set the variables below for yours: MODEL,
# PROMPTS and HELDOUT (files), TRUTH (a judge as `fastpref score --function` takes it). Stop it at any time: the same command
# goes on with the step that was not finished.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=${1:-rlhf-and-dpo}
model=${MODEL:-$output/toy/base}
prompts=${PROMPTS:-$output/toy/prompts.jsonl}
heldout=${HELDOUT:-$output/toy/heldout.jsonl}
truth=${TRUTH:-$here/rlhf_toy.py:liked}
steps=${STEPS:-100} batch=${BATCH:-64} tokens=${TOKENS:-48} rate=${RATE:-5e-4}
beta=${BETA:-1} target=${TARGET:-2} rl_rate=${RL_RATE:-2e-4} # of both RLOO runs: so that beta keeps up with the KL
# Both have $steps updates of $batch responses: DPO's are half as many pairs.
common="--max_steps $steps --lr_scheduler_type constant --logging_steps 1 --save_strategy no --gradient_checkpointing false"

if [ "$model" = "$output/toy/base" ] && [ ! -e "$model/config.json" ]; then
    python "$here/rlhf_toy.py" "$output/toy"
fi

# What $1 answers to the prompts in $2, judged by the truth, in $3.
judged() {
    fastpref generate --model "$1" --prompts "$2" --output "$3-responses.jsonl" -k 4 --max-new-tokens "$tokens" --batch-size 128
    fastpref score --responses "$3-responses.jsonl" --output "$3-truth.jsonl" --function "$truth" --name truth
}

judged "$model" "$prompts" "$output/preferences"
fastpref pairs --scores "$output/preferences-truth.jsonl" --output "$output/pairs.jsonl" --how all

if [ ! -e "$output/reward/config.json" ]; then
    fastpref train reward --model "$model" --data "$output/pairs.jsonl" --output_dir "$output/reward" --max_steps 80 \
        --per_device_train_batch_size 32 --learning_rate 1e-3 --eval_split 0.1 --save_strategy no --gradient_checkpointing false
fi

# shellcheck disable=SC2086
rloo() { # the folder, and more options
    [ -e "$output/$1/config.json" ] || fastpref train rloo --model "$model" --data "$prompts" --output_dir "$output/$1" \
        --reward "$output/reward" --heldout_reward "$truth" --num_generations 4 --per_device_train_batch_size "$batch" \
        --max_completion_length "$tokens" --learning_rate "$rl_rate" --track_kl true $common "${@:2}"
}
rloo rloo --kl_estimator exact --beta "$beta" --kl_target "$target"
rloo no-kl --beta 0

if [ ! -e "$output/dpo/config.json" ]; then
    # shellcheck disable=SC2086
    fastpref train dpo --model "$model" --data "$output/pairs.jsonl" --output_dir "$output/dpo" --learning_rate "$rate" \
        --per_device_train_batch_size $((batch / 2)) $common
fi

for name in base rloo no-kl dpo; do
    policy=$output/$name
    [ $name = base ] && policy=$model
    judged "$policy" "$heldout" "$output/$name"
    fastpref score --responses "$output/$name-truth.jsonl" --output "$output/$name-scores.jsonl" \
        --reward-model "$output/reward" --name reward
done
python "$here/rlhf_report.py" "$output" "$model"
