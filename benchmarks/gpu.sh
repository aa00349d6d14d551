#!/usr/bin/env bash
# Everything that a machine with a GPU is for, within nine minutes:
# bash benchmarks/gpu.sh OUT_DIR [--only tests|suite|micro|tune]
#
# Builds in place, runs the GPU tests, measures the micro-benchmarks, then the gpu suite, most telling cases first:
# against torch.nn, and in what time is left against the other peers that are installed. Needs Python 3.11 or newer with
# torch, Triton, pybind11, numba, pytest, pytest-benchmark, pytest-timeout, matplotlib and hypothesis, and no network.
# What is found is in OUT_DIR as it comes, at most eight files: build.log, tests.log, micro.csv, micro.log, results.csv,
# suite.log and two charts. By itself only, --only tune: table.json, as it is shipped and what the time allows to find,
# with everything that was tried in table.csv. GPU_SECONDS is the time for all of it, PYTHON the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: bash benchmarks/gpu.sh OUT_DIR [--only tests|suite|micro|tune]}
only=${3:-all}
[[ ${2:---only} == --only ]] || { echo "unknown option $2" >&2; exit 2; }
case $only in
    all | tests | suite | micro | tune) ;;
    *) echo "--only takes tests, suite, micro or tune, got $only" >&2; exit 2 ;;
esac
mkdir -p "$out"
out=$(cd "$out" && pwd)
started=$SECONDS
limit=${GPU_SECONDS:-540}
left() { echo $((limit - SECONDS + started)); }
wanted() { [[ $only == all || $only == "$1" ]]; }
python=${PYTHON:-python3}
status=0

# within SECONDS COMMAND...: at most so long and no longer than what is left, less what the report needs. Asked to end
# as by Ctrl-C, so that pytest prints its table, and ended for good soon after: a compiler may not listen.
within() {
    local most=$(($(left) - 20))
    if ((most < 10)); then
        echo "out of time: not run: ${*:2}"
        return 124
    fi
    timeout --signal=INT --kill-after=15 "$(($1 < most ? $1 : most))" "${@:2}"
}

{
    within 200 "$python" setup.py -q build_ext --inplace || status=$?
    within 30 "$python" -m rnnkern info
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv
} >"$out/build.log" 2>&1
tail -n 3 "$out/build.log"

if wanted tests; then
    within 180 "$python" -m pytest -q -m gpu tests -p no:cacheprovider >"$out/tests.log" 2>&1
    result=$?
    ((result == 0 || result == 5)) || status=$result # 5: there are no such tests
    tail -n 1 "$out/tests.log"
fi
if [[ $only == tune ]]; then
    cp rnnkern/backends/triton/table.json "$out/table.json"
    # It ends by itself, between two measurements.
    within "$(left)" "$python" -m benchmarks.tune search --out "$out/table.json" --seconds $(($(left) - 40)) \
        >"$out/tune.log" 2>&1 || status=$?
    tail -n 40 "$out/tune.log"
fi
if wanted micro; then
    within 150 "$python" -m benchmarks.micro --out "$out/micro.csv" --seconds 110 >"$out/micro.log" 2>&1 || status=$?
    head -n 60 "$out/micro.log"
fi
if wanted suite; then
    # A row is written after each case, so what the time allows is kept.
    suite() {
        within "$@" --results "$out/results.csv" -q -rfE -p no:cacheprovider >>"$out/suite.log" 2>&1
        local result=$?
        ((result == 0 || result == 2 || result == 124 || result == 137)) || status=$result # the time was up
        ! grep -q "NO NUMBER" "$out/suite.log" || status=1 # a wrong result counts, also when the time was up
        tail -n 40 "$out/suite.log" # the means are the last lines of a table
    }
    # By name: the rows are what automatic choice is made from, so it must not have made them.
    run=("$python" -m pytest benchmarks --suite gpu --seconds 0.3 --backend triton)
    : >"$out/suite.log"
    others=$("$python" - 2>/dev/null <<'PYTHON'
from importlib.util import find_spec
modules = {"torchrl": "torchrl", "flashrnn": "flashrnn", "haste": "haste_pytorch"}
print(*(peer for peer, module in modules.items() if find_spec(module)))
PYTHON
    )
    reserved=0
    [[ -z $others ]] || reserved=$(($(left) / 4))
    suite $(($(left) - reserved)) "${run[@]}" --peer torch.nn
    if [[ -n $others ]]; then
        # shellcheck disable=SC2086  # several words
        suite "$(left)" "${run[@]}" --peer $others --case T512-B64-H512 T1024-B16-H256 T128-B128-H256-resets
    fi
    if [[ -s "$out/results.csv" ]] && (($(left) > 5)); then
        charts=$(mktemp -d)
        # Without plotly there is no page, but the pictures are there.
        timeout "$(left)" "$python" benchmarks/report.py "$out/results.csv" --out "$charts" >/dev/null 2>&1
        find "$charts" -name 'speedup-*.png' | sort | head -n 2 | xargs -r -I{} cp {} "$out/"
        rm -rf "$charts"
    fi
fi
ls "$out"
exit "$status"
