#!/usr/bin/env bash
# Everything that a machine with a GPU is for, within nine minutes: bash benchmarks/gpu.sh OUT_DIR [--only tests|suite|micro]
#
# Builds in place, runs the GPU tests, measures the micro-benchmarks, then the gpu suite, most telling cases first. Needs
# Python 3.11 or newer with torch, Triton, pybind11, numba, pytest, pytest-benchmark, matplotlib and hypothesis, and no
# network. What is found is in OUT_DIR as it comes: results.csv, micro.csv, charts and logs, at most eight files.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: bash benchmarks/gpu.sh OUT_DIR [--only tests|suite|micro]}
only=${3:-all}
[[ ${2:---only} == --only ]] || { echo "unknown option $2" >&2; exit 2; }
case $only in all | tests | suite | micro) ;; *) echo "--only takes tests, suite or micro, got $only" >&2; exit 2 ;; esac
mkdir -p "$out"
out=$(cd "$out" && pwd)
started=$SECONDS
limit=${GPU_SECONDS:-540}
left() { echo $((limit - SECONDS + started)); }
wanted() { [[ $only == all || $only == "$1" ]]; }
python=${PYTHON:-python3}
status=0

{
    "$python" setup.py -q build_ext --inplace || status=$?
    "$python" -m rnnkern info
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv
} >"$out/build.log" 2>&1
tail -n 3 "$out/build.log"

if wanted tests; then
    timeout "$(($(left) < 180 ? $(left) : 180))" "$python" -m pytest -q -m gpu tests >"$out/tests.log" 2>&1 || status=$?
    tail -n 1 "$out/tests.log"
fi
if wanted micro; then
    timeout "$(($(left) < 150 ? $(left) : 150))" "$python" -m benchmarks.micro --out "$out/micro.csv" 2>&1 | tee "$out/micro.log"
fi
if wanted suite; then
    # The suite flushes a row after each case, so what the time allows is kept.
    timeout --signal=INT "$(($(left) - 30))" "$python" -m pytest benchmarks --suite gpu --seconds 0.3 \
        --results "$out/results.csv" -q -p no:cacheprovider >"$out/suite.log" 2>&1
    tail -n 40 "$out/suite.log"
    if [[ -s "$out/results.csv" ]]; then
        charts=$(mktemp -d)
        # Without plotly there is no page, but the pictures are there.
        "$python" benchmarks/report.py "$out/results.csv" --out "$charts" >/dev/null 2>&1
        cp "$charts"/speedup-*.png "$out/"
        rm -rf "$charts"
    fi
fi
find "$out" -maxdepth 1 -type f | sort | head -n 8
exit "$status"
