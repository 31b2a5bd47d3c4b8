#!/usr/bin/env bash
# Everything that wants a CUDA device, in parts of at most 9 minutes, from a checkout that need not be installed:
#
#   bash benchmarks/gpu.sh OUTDIR PART
#   bash benchmarks/gpu.sh OUTDIR list      the parts, in the order in which they are worth running
#
# validate      every operator against fp64, one process a core
# head          losses from hidden states beside their own products, eager PyTorch and the peers, Llama's sizes first
# experiments   tile sizes of the kernels, roofs of the device, what products cost; tile sizes for configs/ from them
# suites        logits, exact KL, reward models, small losses, scaling
# train         whole training steps of small models
# trainers-1b, trainers-0.5b, trainers-8b-lora
#               DPO end to end beside TRL: pairs per second, peak memory (wants transformers, peft, datasets, trl)
# hosts         a step of TRL's trainers as they come and patched (the same)
# tests         the numerics tests on the device (wants pytest-xdist)
#
# A part leaves one file, OUTDIR/PART.tar.gz: records (JSON), logs, a summary. It is written anew every few seconds, so
# a part that is killed keeps what it had; a step that takes too long is interrupted and writes what it measured.
# A failed step does not stop the others; the exit status is 1 if any failed, 2 if there is no CUDA device.
# REHEARSE=1 runs the same steps on the CPU with small sizes: it shows that they run. LIMIT=SECONDS is each step's.
set -uo pipefail

PARTS="validate head experiments suites train trainers-1b trainers-0.5b hosts trainers-8b-lora tests"
usage() { sed -n '2,24s/^# \{0,1\}//p' "$0"; }
[ $# = 2 ] || { usage >&2; exit 64; }
[ "$2" != list ] || { printf '%s\n' $PARTS; exit 0; }
case " $PARTS " in *" $2 "*) part=$2 ;; *) usage >&2; exit 64 ;; esac

python=${PYTHON:-$(command -v python || command -v python3)}
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ "${REHEARSE:-0}" = 1 ]; then
    # memory is measured in processes of its own on a CPU, and in the same one on a GPU
    rehearsal=1 device=(--device cpu --quick) repeats=${REPEATS:-2} memory=--no-memory
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    rehearsal=0 device=(--device cuda) repeats=${REPEATS:-10} memory=
else
    echo "benchmarks/gpu.sh: PyTorch finds no CUDA device on this machine, so nothing was run." >&2
    exit 2
fi

scratch=$(mktemp -d)
results=$scratch/$part
mkdir "$results"
pack() { tar -czf "$out/$part.partial" -C "$scratch" "$part" 2>/dev/null && mv "$out/$part.partial" "$out/$part.tar.gz"; }
# ends after the archive that it is writing, not within: two would write one file
(trap exit TERM; while :; do sleep 5 >/dev/null 2>&1 & wait $!; pack; done) &
packer=$!
finish() { kill "$packer" 2>/dev/null; wait "$packer" 2>/dev/null; pack; rm -rf "$scratch"; }
trap finish EXIT
trap 'exit 143' INT TERM

failed=0
# step NAME SECONDS COMMAND...: the limits of a part's steps add up to 540 s at most
step() {
    local name=$1 limit=${LIMIT:-$2} begin=$SECONDS status
    shift 2
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$results/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) echo "ok      $name, $((SECONDS - begin)) s" ;;
        124 | 137) echo "FAILED  $name: took longer than $limit s" ;;
        *) echo "FAILED  $name: exit status $status, see $name.log" ;;
    esac >>"$results/summary.txt"
    [ "$status" = 0 ] || failed=1
    pack
}
bench() { # bench SUITE SECONDS [OPTIONS...]: starts no case that would not end in its time
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" -m benchmarks "$name" "${device[@]}" --seconds $((limit * 6 / 10)) \
        --repeats "$repeats" $memory --json "$results" "$@"
}
trainers() { # trainers MODEL SECONDS [OPTIONS...]
    local name=$1 limit=$2
    shift 2
    if [ "$rehearsal" = 1 ]; then
        step "trainers-$name" "$limit" "$python" -m benchmarks.trainers --model tiny --steps 2 --max-length 128 \
            --json "$results" "$@"
    else
        step "trainers-$name" "$limit" "$python" -m benchmarks.trainers --device cuda --model "$name" \
            --batch-size 8 --max-length 1024 --json "$results" "$@"
    fi
}

case $part in
    validate)
        step validate 520 "$python" -m fastpref.commands.cli validate "${device[@]}" --jobs "$(nproc)" \
            --json "$results/validate.json"
        ;;
    head) bench head 520 ;;
    experiments)
        step experiments 480 "$python" -m benchmarks.experiments "${device[@]}" --repeats "$repeats" --json "$results"
        if records=$(ls -t "$results"/*-experiments-cuda-*.json 2>/dev/null); then
            step tune 10 "$python" -m benchmarks.tune "${records%%$'\n'*}" --out "$results"
        fi
        ;;
    suites)
        for suite_and_limit in kl:150 logits:120 scale:150 reward:50 losses:50; do
            bench "${suite_and_limit%%:*}" "${suite_and_limit#*:}"
        done
        ;;
    train) bench train 520 ;;
    trainers-1b) trainers llama-1b 520 --steps 12 ;;
    trainers-0.5b) trainers qwen-0.5b 520 --steps 12 ;;
    trainers-8b-lora) trainers llama-8b 520 --steps 6 --lora-r 16 --checkpointing ;;
    hosts)
        if [ "$rehearsal" = 1 ]; then
            step hosts 520 "$python" -m benchmarks.hosts --model tiny --batches 1 --max-length 128 --json "$results"
        else
            step hosts 520 "$python" -m benchmarks.hosts --device cuda --model qwen-0.5b --pairs 8 --max-length 1024 \
                --json "$results"
        fi
        ;;
    tests)
        if [ "$rehearsal" = 1 ]; then
            which=(tests/ops/test_ops.py tests/models/test_attention.py --numprocesses 2)
        else
            which=(tests --numprocesses 8 --maxfail=20 --ignore=tests/benchmarks --ignore=tests/commands
                --ignore=tests/docs --ignore=tests/kernels/test_aot.py --ignore=tests/test_packaging.py)
        fi
        step tests 520 "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors "${which[@]}"
        ;;
esac
if ls "$results"/*.json >/dev/null 2>&1 && [ "$part" != validate ]; then
    step report $((rehearsal ? 120 : 15)) "$python" -m benchmarks.report "$results" --out "$results/report"
fi

echo
cat "$results/summary.txt"
exit "$failed"
