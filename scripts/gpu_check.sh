#!/usr/bin/env bash
# Everything that needs one GPU, in under ten minutes: the checks of tests/gpu, then `python -m tools.bench gpu`.
#
#   scripts/gpu_check.sh [--out DIR] [--wheels DIR] [--tests SECONDS] [--budget SECONDS] [tests|bench]
#
# It runs with the interpreter in $PYTHON (default python3) and installs nothing: wheels of --wheels DIR (torch-fidelity, lpips) go to a
# temporary folder. Checks whose package is missing are skipped and named. DIR gets tests.log, bench.log and bench.json.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=gpu_check wheels= tests=230 budget=260 parts="tests bench"
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --wheels) wheels=$2; shift 2 ;;
        --tests) tests=$2; shift 2 ;;
        --budget) budget=$2; shift 2 ;;
        tests | bench) parts=$1; shift ;;
        *) echo "unknown argument $1; see the first lines of $0" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl ||
        echo "the wheels cannot be installed: what needs them is skipped" >&2
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
failed=0
if [[ $parts == *tests* ]]; then
    timeout --signal=INT --kill-after=10 "$tests" "$python" -m pytest -m gpu -p no:cacheprovider -p no:xdist -v --durations=15 --tb=short tests/gpu 2>&1 | tee "$out/tests.log"
    failed=${PIPESTATUS[0]}
fi
if [[ $parts == *bench* ]]; then
    timeout --signal=INT --kill-after=10 $((budget + 70)) "$python" -m tools.bench gpu --budget "$budget" --json "$out/bench.json" 2>&1 | tee "$out/bench.log"
    code=${PIPESTATUS[0]}
    [ "$failed" -ne 0 ] || failed=$code
fi
exit "$failed"
