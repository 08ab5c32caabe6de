#!/usr/bin/env bash
# The learning experiments that a CPU takes nights for, side by side on one GPU, the most useful ones first.
#
#   experiments/learning.sh DATA OUT [CELL…]     CELL: a name below, or NAME/ARM, such as ground-math/full
#   JOBS=8 DEVICE=cuda LIMIT=540 SEEDS=1 experiments/learning.sh DATA OUT
#   SMOKE=1 DEVICE=cpu experiments/learning.sh DATA OUT       two steps of every arm, into OUT/smoke: does it run?
#
# DATA has NAME.jsonl and NAME-val.jsonl of math, code (code_data.py), gsm8k (benchmark_rows.py), alpaca and dolly, and
# general.jsonl; cells whose data is missing are left out. A cell is one arm of one experiment on one data set, in
# OUT/NAME/ARM; JOBS cells run at a time. After LIMIT seconds no cell begins and those that run are stopped. The same
# command continues with what is missing, in the middle of a run too; it ends with 0 once nothing is. A -long cell
# begins once its arm has its rate: NAME/ARM.done says that a cell is complete.
# `python experiments/gather.py NAME OUT/NAME` prints the figures of all arms.
#
# ground-DATA chooses each arm's learning rate, with further rates while the best is at the edge; ground-DATA-long
# trains with it. The best of these deserve more seeds: SEEDS=3 experiments/learning.sh DATA OUT ground-math-long/full …

set -uo pipefail
[ $# -ge 2 ] || { sed -n "2,16p" "$0"; exit 2; }
data=$(cd "$1" && pwd) && mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
shift 2
[ -z "${SMOKE:-}" ] || out=$out/smoke
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
jobs=${JOBS:-8} device=${DEVICE:-cuda} seeds=${SEEDS:-1} ends=$(($(date +%s) + ${LIMIT:-540}))
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

short="data.max_length=512 data.packing=true data.validation_limit=160 run.batch_size=1 run.precision=bf16"
rows="data.max_length=512 data.packing=true data.validation_limit=160"
text="data.max_length=512 data.packing=true run.batch_size=2 run.precision=bf16"
rates="--lr 1e-4,2e-4,4e-4 --widen"
long="--budget tokens=4000000 run.eval_every=98"
list() { # NAME EXPERIMENT DATA ARGUMENTS…; @OUT becomes the folder OUT, ARM the folder of the arm
  cat <<LIST
ground-math ground math --widen
ground-math-long ground math --rates-of @OUT/ground-math/ARM --keep-models $long
correction-math correction math $text --budget tokens=200000 $rates
correction-math-long correction math $text --rates-of @OUT/correction-math/ARM $long
ground-code ground code --widen
ground-code-long ground code --rates-of @OUT/ground-code/ARM $long
correction-code correction code $text --budget tokens=200000 $rates
correction-code-long correction code $text --rates-of @OUT/correction-code/ARM $long
ground-gsm8k ground gsm8k $rows --widen
ground-gsm8k-long ground gsm8k $rows --rates-of @OUT/ground-gsm8k/ARM --budget tokens=6000000 run.eval_every=98
correction-alpaca correction alpaca $short
correction-gsm8k correction gsm8k $short
correction-dolly correction dolly $short
units-math units math $text --budget tokens=200000 $rates
units-alpaca units alpaca $short
row-slices-math row_slices math $text --tokens 200000 --lr 1e-4 2e-4 4e-4
row-slices-alpaca row_slices alpaca $short
methods-alpaca methods alpaca --widen
optimizers-alpaca optimizers alpaca --widen
qlisa-alpaca qlisa alpaca $short
LIST
}

slug() { printf '%s' "$1" | LC_ALL=C tr -cs 'A-Za-z0-9=+.' -; }

script() { # the script of an experiment, and the experiment's name where it needs one
  [ "$1" = row_slices ] && echo experiments/row_slices.py || echo "experiments/compare.py $1"
}

cells() { # NAME, ARM, EXPERIMENT and ARGUMENTS of every cell that was asked for, a line each
  list | while read -r name experiment from rest; do
    [[ $# -eq 0 || " $* " == *" $name "* || " $* " == *" $name/"* ]] || continue
    for file in "$from" "$from-val" general; do
      [ -f "$data/$file.jsonl" ] || { echo "$name: no $file.jsonl in $data" >&2; continue 2; }
    done
    "$python" $(script "$experiment") --list-arms | while read -r arm; do
      [ $# -eq 0 ] || printf '%s\n' "$@" | grep -qxF -e "$name" -e "$name/$arm" || continue
      printf '%s\t%s\t%s\tdata.train=%s data.validation=%s --general %s %s\n' "$name" "$arm" "$experiment" \
        "@DATA/$from.jsonl" "@DATA/$from-val.jsonl" @DATA/general.jsonl "$rest"
    done
  done
}

run() { # a line of `cells`
  local name arm experiment rest given folder rates code left=$((ends - $(date +%s)))
  [ "$left" -gt 20 ] || return 1
  IFS=$'\t' read -r name arm experiment rest <<<"$1"
  folder=$out/$name/$(slug "$arm")
  mkdir -p "$out/$name"
  if [ -z "$SMOKE" ] && [[ $rest =~ --rates-of\ @OUT/([^ ]*)/ARM ]]; then
    rates=$out/${BASH_REMATCH[1]}/$(slug "$arm")
    [ -e "$rates.done" ] || { echo "$name/$arm: its rate is not chosen yet, in $rates"; return 1; }
  fi
  read -ra given <<<"run.device=$device ${SMOKE:+--smoke} ${rest//\/ARM/\/$(slug "$arm")}"
  given=("${given[@]//@DATA/"$data"}") # once the words are apart: folders may have spaces
  given=("${given[@]//@OUT/"$out"}")
  if [ "$experiment" = row_slices ]; then
    given+=(--arms "$arm" --folder "$folder" --seeds $(seq 0 $((seeds - 1))))
  else
    given+=(--methods "$arm" --output "$folder" --seeds "$seeds")
  fi
  timeout -s TERM -k 20 "$left" "$python" $(script "$experiment") "${given[@]}" >>"$folder.log" 2>&1
  code=$?
  [ "$code" != 0 ] || touch "$folder.done"
  echo "$name/$arm: ended with $code ($(tail -n 1 "$folder.log"))"
  return $((code != 0))
}
export -f run script slug
export python ends device seeds data out SMOKE=${SMOKE:-}

if [ $# -gt 0 ]; then
  found=$(cells "$@") tab=$'\t'
  for cell; do
    [[ $'\n'$found == *$'\n'"${cell/\//$tab}$tab"* ]] && continue
    echo "learning.sh: no cell $cell, or no data for it" >&2
    exit 2
  done
  printf '%s\n' "$found"
else
  cells
fi | xargs -d '\n' -P "$jobs" -I {} bash -c 'run "$1"' _ {}
