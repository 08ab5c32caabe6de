#!/usr/bin/env bash
# The learning experiments that a CPU takes nights for, side by side on one GPU, each in OUT/NAME.
#
#   experiments/learning.sh DATA OUT [NAME…]    DATA: alpaca.jsonl, alpaca-val.jsonl, math.jsonl, math-val.jsonl,
#                                               code.jsonl, code-val.jsonl (code_data.py), general.jsonl
#   JOBS=8 DEVICE=cuda LIMIT=540 experiments/learning.sh DATA OUT
#
# The same command continues with what is missing. LIMIT seconds end a comparison; it then continues with the
# run that was interrupted.
# Without names all run, in the order below, JOBS at a time. `SMOKE=1` takes two steps of every arm.

set -uo pipefail
[ $# -ge 2 ] || { sed -n "2,11p" "$0"; exit 2; }
data=$(cd "$1" && pwd) && mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
jobs=${JOBS:-6} limit=${LIMIT:-540} device=${DEVICE:-cuda}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=2

short="data.max_length=512 data.packing=true data.validation_limit=160 run.batch_size=1 run.precision=bf16"
alpaca="data.train=$data/alpaca.jsonl data.validation=$data/alpaca-val.jsonl $short"
math="data.train=$data/math.jsonl data.validation=$data/math-val.jsonl"
code="data.train=$data/code.jsonl data.validation=$data/code-val.jsonl"
general="--general $data/general.jsonl"
list() { # NAME EXPERIMENT ARGUMENTS…
  cat <<LIST
correction-alpaca correction $alpaca
qlisa-alpaca qlisa $alpaca
ground-math ground $math $general
correction-math correction $math --budget tokens=200000 $general
ground-code ground $code $general
LIST
}

run() { # NAME EXPERIMENT ARGUMENTS…
  local name=$1
  shift
  timeout -s TERM -k 20 "$limit" "$python" experiments/compare.py "$@" run.device="$device" \
    ${SMOKE:+--smoke} $([ -n "$SMOKE" ] || echo --output "$out/$name") >>"$out/$name.log" 2>&1
  echo "$name: ended with $? ($(tail -n 1 "$out/$name.log"))"
}
export -f run
export python limit device out SMOKE=${SMOKE:-}

list | while read -r name rest; do
  [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
  echo "$name $rest"
done | xargs -P "$jobs" -I {} bash -c 'run {}'
