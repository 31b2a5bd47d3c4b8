#!/usr/bin/env bash
# Everything that wants a CUDA device, from a checkout that need not be installed:
#
#   bash benchmarks/gpu.sh OUTDIR [all|validate|suites|experiments|tests|trainers]
#
# validate     every operator against fp64
# suites       every benchmark suite at full size
# experiments  benchmarks/experiments.py
# tests        the numerics tests on the device (not part of all)
# trainers     DPO training end to end beside TRL, two model sizes, and a step of each host (not part of all; wants
#              transformers, datasets, trl)
#
# Records (JSON), logs and report/report.html go to OUTDIR; all of it takes at most 9 minutes. A suite starts no case
# that would not end in its time. A failed step does not stop the others; the exit status is 1 if any failed, 2 if
# there is no CUDA device. REHEARSE=1 runs the same steps on the CPU with small sizes: it shows that they run.
set -uo pipefail

usage() { sed -n '2,17s/^# \{0,1\}//p' "$0"; }
case "${2:-all}" in all | validate | suites | experiments | tests | trainers) part=${2:-all} ;; *) usage >&2; exit 64 ;; esac
[ $# -ge 1 ] && [ $# -le 2 ] || { usage >&2; exit 64; }

python=${PYTHON:-$(command -v python || command -v python3)}
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"

if [ "${REHEARSE:-0}" = 1 ]; then
    device=(--device cpu --quick)
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=(--device cuda)
else
    echo "benchmarks/gpu.sh: PyTorch finds no CUDA device on this machine, so nothing was run." >&2
    exit 2
fi

summary=()
failed=0
# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) summary+=("ok      $name, $((SECONDS - begin)) s") ;;
        124 | 137) summary+=("FAILED  $name: took longer than $limit s") ;;
        *) summary+=("FAILED  $name: exit status $status, see $name.log") ;;
    esac
    [ "$status" = 0 ] || failed=1
}
wants() { [ "$part" = "$1" ] || { [ "$part" = all ] && [ "$1" != tests ] && [ "$1" != trainers ]; }; }

# the limits of `all` add up to 540 s
if wants validate; then
    step validate 80 "$python" -m fastpref.commands.cli validate "${device[@]}" --quick --json "$out/validate.json"
fi
if wants suites; then
    for suite_and_limit in head:150 logits:30 kl:30 reward:15 losses:20 train:45 scale:40; do
        suite=${suite_and_limit%%:*} limit=${suite_and_limit#*:}
        step "$suite" "$limit" "$python" -m benchmarks "$suite" "${device[@]}" --seconds $((limit * 6 / 10)) \
            --repeats "${REPEATS:-10}" --json "$out"
    done
fi
if wants experiments; then
    step experiments 105 "$python" -m benchmarks.experiments "${device[@]}" --repeats "${REPEATS:-10}" --json "$out"
    if records=$(ls -t "$out"/*-experiments-cuda-*.json 2>/dev/null); then # tile sizes for the kernels' configs/
        step tune 10 "$python" -m benchmarks.tune "${records%%$'\n'*}" --out "$out"
    fi
fi
if wants tests; then
    step tests 480 "$python" -m pytest tests -q -p no:cacheprovider --maxfail=20 \
        --ignore=tests/test_benchmarks.py --ignore=tests/test_packaging.py --ignore=tests/test_aot.py
fi
if wants trainers; then
    if [ "${REHEARSE:-0}" = 1 ]; then
        step trainers-tiny 240 "$python" -m benchmarks.trainers --model tiny --steps 3 --max-length 128 --json "$out"
        step hosts-tiny 240 "$python" -m benchmarks.hosts --model tiny --host "TRL DPOTrainer" --batches 1 --max-length 128 --json "$out"
    else
        for model in llama-1b qwen-0.5b; do
            step "trainers-$model" 280 "$python" -m benchmarks.trainers --device cuda --model "$model" --steps 12 \
                --batch-size 8 --max-length 1024 --json "$out"
        done
        step hosts 420 "$python" -m benchmarks.hosts --device cuda --model qwen-0.5b --pairs 8 --max-length 1024 --json "$out"
    fi
fi
if wants suites; then
    step report 15 "$python" -m benchmarks.report "$out" --out "$out/report"
fi

echo
printf '%s\n' "${summary[@]}"
exit "$failed"
