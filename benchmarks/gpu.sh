#!/usr/bin/env bash
# Everything that wants a CUDA device, from a checkout that need not be installed:
#
#   bash benchmarks/gpu.sh OUTDIR [all|validate|experiments|head]
#
# validate     every operator against fp64, then the numerics tests on the device
# experiments  benchmarks/experiments.py
# head         benchmarks/head.py on the heads of four models
#
# Records (JSON) and logs go to OUTDIR. Each part stays under 8 minutes. A failed step does not stop the others;
# the exit status is 1 if any failed, 2 if there is no CUDA device.
# REHEARSE=1 runs the same steps on the CPU with tiny sizes: it shows that they run, and measures nothing.
set -uo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }
case "${2:-all}" in all | validate | experiments | head) part=${2:-all} ;; *) usage >&2; exit 64 ;; esac
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
wants() { [ "$part" = all ] || [ "$part" = "$1" ]; }

if wants validate; then
    step validate 210 "$python" -m fastpref.cli validate "${device[@]}" --json "$out/validate.json"
    step tests 250 "$python" -m pytest tests -q -p no:cacheprovider --maxfail=20 \
        --ignore=tests/test_benchmarks.py --ignore=tests/test_packaging.py --ignore=tests/test_aot.py
fi
if wants experiments; then
    step experiments 460 "$python" -m benchmarks.experiments "${device[@]}" --json "$out"
fi
if wants head; then
    for limit_and_case in 190:llama-8b 90:smollm2 90:qwen-0.5b 90:gemma-2b; do
        model=${limit_and_case#*:}
        step "head-$model" "${limit_and_case%%:*}" \
            "$python" -m benchmarks.head "${device[@]}" --cases "$model" --json "$out"
    done
fi

echo
printf '%s\n' "${summary[@]}"
exit "$failed"
