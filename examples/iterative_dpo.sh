#!/usr/bin/env bash
# Iterative DPO with a judge instead of human labels (RLAIF): each round samples responses from the policy, lets the
# judge score them, makes pairs of the best and the worst, and trains the next policy on them. Stop it at any time: the
# same command goes on where it was.
#
#   examples/iterative_dpo.sh [OUTPUT]
#
# By default with SmolLM2-135M and the sample prompts; set the variables below for yours.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=${1:-iterative-dpo}
start=${MODEL:-$(python -c 'from fastpref import models; print(models.smollm2())')}
prompts=${PROMPTS:-$here/../fastpref/data/sample_train.jsonl}
heldout=${HELDOUT:-$here/../fastpref/data/sample_heldout.jsonl}
judge=${JUDGE:-$here/concise_judge.py:score}
rounds=${ROUNDS:-2} steps=${STEPS:-20} k=${K:-4} tokens=${TOKENS:-96}
limit=${LIMIT:+--limit $LIMIT} # prompts of each file

# What $1 answers to the prompts in $2, judged and paired, in the folder $3; $4 is the seed.
preferences() {
    mkdir -p "$3"
    # shellcheck disable=SC2086
    fastpref generate --model "$1" --prompts "$2" --output "$3/responses.jsonl" -k "$k" \
        --max-new-tokens "$tokens" --temperature 0.9 --seed "$4" $limit
    fastpref score --responses "$3/responses.jsonl" --output "$3/scores.jsonl" --function "$judge"
    fastpref pairs --scores "$3/scores.jsonl" --output "$3/pairs.jsonl" --how best-worst --min-margin 0.05 \
        --json "$3/pairs.json"
}

preferences "$start" "$heldout" "$output/heldout" 0
policy=$start
for round in $(seq "$rounds"); do
    folder=$output/round-$round
    preferences "$policy" "$prompts" "$folder" "$round"
    if [ ! -e "$folder/model/config.json" ]; then
        fastpref train dpo --model "$policy" --data "$folder/pairs.jsonl" --output_dir "$folder/model" --max_steps "$steps"
    fi
    policy=$folder/model
    fastpref evaluate --model "$policy" --reference "$start" --data "$output/heldout/pairs.jsonl" \
        --json "$folder/evaluation.json" --plot "$folder/reliability.png"
done
