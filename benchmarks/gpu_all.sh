#!/usr/bin/env bash
# Everything that needs a GPU, section by section, into one file: OUT/gpu_all.json. It should take ten minutes or less;
# the limits of the sections, which leave a cold machine time to import and to compile, add up to 13.
#
#   benchmarks/gpu_all.sh [OUT]                        OUT: default $OUT, else ./gpu-out
#   benchmarks/gpu_all.sh --half 1 OUT                 half of the sections, at most 6.5 minutes, and --half 2 the
#                                                      others: for a machine where a command may take ten
#   benchmarks/gpu_all.sh --only plans,steps-8b OUT    these sections
#   benchmarks/gpu_all.sh --fresh OUT                  again, also what is complete
#   benchmarks/gpu_all.sh --device cpu --tiny OUT      does every section run? Before a GPU's minute is spent
#   DATA=FOLDER benchmarks/gpu_all.sh OUT              also the section `ground`, four minutes more, in neither half:
#                                                      FOLDER as in experiments/learning.sh
#
# Started again, it skips the sections that are complete. A section that fails or takes too long is written
# down with the end of its output, and the next one runs; the script then ends with 1. Sections that were made
# with --tiny, on another device or for another commit run again. COMMIT names the commit where there is no
# repository. Without bitsandbytes what needs it is left out. `ground` has the first cells of
# experiments/learning.sh, continues with them when it is started again, and leaves them in OUT/learning.
#
# To add a section: one call of `section NAME SECONDS COMMAND…` at the end of this file. In COMMAND, @JSON
# stands for a file whose JSON is kept with the section; what --tiny makes smaller is set above the sections.
# Keep the sum of SECONDS at 395 or below in each half. An arm that is compared needs LoRA r=16 in its own section.

set -uo pipefail
[ -z "${DATA:-}" ] || DATA=$(cd "$DATA" && pwd) || exit 2
device=cuda tiny= only= half= fresh= out=${OUT:-gpu-out}

while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift ;;
    --only) only=$2; shift ;;
    --half) half=$2; shift ;;
    --tiny) tiny=1 ;;
    --fresh) fresh=1 ;;
    -*) echo "gpu_all.sh: no option $1; see the top of the file" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[[ $half =~ ^[12]?$ ]] || { echo "gpu_all.sh: --half must be 1 or 2, got $half" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
[ "$device" != cuda ] || "$python" -c 'import torch; torch.zeros(1).cuda()' 2>/dev/null ||
  { echo "gpu_all.sh: torch sees no CUDA device here; --device cpu --tiny shows that every section runs" >&2; exit 2; }
results=$out/gpu_all.json
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 LISATUNE_TEST_DEVICE=$device
export DATA=${DATA:-} TINY=$tiny COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
failed=0 seen=, part=1

# record NAME: is that section complete, for this commit?
# record NAME EXIT SECONDS LIMIT COMMAND: write it down.
record() {
  "$python" - "$results" "$work" "$device" "$@" <<'PY'
import json, os, subprocess, sys
from importlib.metadata import version
from pathlib import Path

path, work, device, name, *more = sys.argv[1:]
path, work = Path(path), Path(work)
kept = json.loads(path.read_text()) if path.exists() else {"sections": {}}
made = {"commit": os.environ["COMMIT"], "device": device, "tiny": bool(os.environ["TINY"])}
if not more:
    old, wanted = kept["sections"].get(name, {}), made | {"status": "complete"}
    sys.exit(any(old.get(key) != value for key, value in wanted.items()))
kept |= {"device": device, "torch": version("torch"), "python": sys.version.split()[0]}
if device == "cuda":
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        kept["card"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        kept["card"] = "unknown"
code, seconds, limit, *command = more
try:
    figures = json.loads((work / "figures.json").read_text())
except (OSError, ValueError):
    figures = None
log = (work / "log").read_text(errors="replace").splitlines()
status = "complete" if code == "0" else "too slow" if code in ("124", "137") else "failed"
kept["sections"][name] = {
    "status": status, "exit": int(code), "seconds": float(seconds), "limit": int(limit),
    "command": " ".join(command), "figures": figures, "log": log[-120:],
} | made
aside = path.with_suffix(".part")
aside.write_text(json.dumps(kept, indent=1) + "\n")
aside.replace(path)
print(f"{name}: {status} in {seconds} s")
PY
}

section() { # NAME SECONDS COMMAND…
  local name=$1 limit=$2 allowed=$2 started code
  shift 2
  [[ -z $only || ,$only, == *,$name,* ]] && [[ -z $half || $half == "$part" ]] || return
  seen+=$name,
  if [ -z "$fresh" ] && record "$name"; then
    echo "$name: complete before"
    return
  fi
  rm -f "$work"/*
  started=${EPOCHREALTIME/./}
  [ "$device" != cpu ] || allowed=$((5 * limit)) # a CPU is asked whether it runs, not how fast
  # A Ctrl-C, because pytest then still says what has failed so far.
  timeout -s INT -k 10 "$allowed" "${@//@JSON/$work/figures.json}" >"$work/log" 2>&1
  code=$?
  record "$name" "$code" "$(((${EPOCHREALTIME/./} - started) / 1000000))" "$limit" "$@"
  [ "$code" = 0 ] || failed=1
}

# A warning of another torch than that of constraints.txt is no failure.
pytest=("$python" -m pytest -q -p no:cacheprovider -o filterwarnings=default)
has() { "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)' "$1"; }
spread=() # over processes: the conformance suite is small models, which leave most of a card idle
[ "$device" != cuda ] || ! has xdist || spread=(-n 4)
arms='LoRA r=16;LISA γ=2;LISA γ=2, ends every 5th period;LISA γ=2, frozen ends;full;BAdam'
methods= qlisa=
if has bitsandbytes; then
  qlisa='LoRA r=16;QLoRA r=16;QLISA int8 γ=8, frozen ends;QLISA NF4 γ=2, frozen ends;QLISA NF4 γ=8, frozen ends'
  arms="$arms;LISA γ=2, 8-bit;LISA γ=8, 8-bit;LISA γ=N, 8-bit, frozen ends"
else
  methods='not qlora'
fi
corrected='LoRA r=16;LISA γ=2 + adapters r=8, 8-bit, frozen ends;LISA γ=2 + adapters r=8 above, 8-bit, frozen ends;LISA γ=2 + sign, 8-bit, frozen ends'
cells=(ground-math/{full,LoRA\ r=64,LoRA\ r=16,{all\ blocks,LISA\ γ=20}\ in\ 8\ bits\ with\ frozen\ ends} correction-math/γ=8\ +\ r={8,32}\ with\ frozen\ ends)
[ -n "$qlisa" ] || cells=(ground-math/{full,LoRA\ r=64,LoRA\ r=16})
compiled='LoRA r=16;LISA γ=2, frozen ends' few=$compiled # two, because a cold compilation may take a minute
[ -z "$qlisa" ] || few="$few;LISA γ=8, 8-bit;full, 8-bit"
shape=llama-3.1-8b length=2048 steps=20 batch=4 rank=16 blocks=32
if [ -n "$tiny" ]; then
  arms='LISA γ=2' qlisa=${qlisa:+QLISA NF4 γ=2, frozen ends} methods='bit_equal and ends' shape=smollm2-135m length=16 steps=2 few='LISA γ=2, frozen ends' compiled=$few batch=2 rank=1 blocks=1 corrected=${corrected##*;} cells=(ground-math/full)
fi

section gpu-tests 75 "${pytest[@]}" tests/gpu tests/unit/optim/test_adamw_triton.py
section optimizer 25 "$python" benchmarks/optimizer.py --device "$device" --lora "$rank" --blocks "$blocks" --output @JSON
section conformance 120 "${pytest[@]}" "${spread[@]}" tests/conformance -k "$methods"
section plans 45 "$python" benchmarks/gpu.py --device "$device" --shape smollm2-135m --length "$((length / 4))" \
  --steps 1 --arms "$arms" --output @JSON
section compiled-8b 130 "$python" benchmarks/gpu.py --device "$device" --shape "$shape" --length "$length" \
  --steps "$steps" --compile --arms "$compiled" --output @JSON

part=2
[ -z "$qlisa" ] || section qlisa-8b 75 "$python" benchmarks/gpu.py --device "$device" --shape "$shape" \
  --length "$length" --steps "$steps" --checkpointing all --arms "$qlisa" --output @JSON
section steps-8b 105 "$python" benchmarks/gpu.py --device "$device" --shape "$shape" --length "$length" \
  --steps "$steps" --arms "$arms" --output @JSON
[ -z "$qlisa" ] || section corrections-8b 50 "$python" benchmarks/gpu.py --device "$device" --shape "$shape" \
  --length "$length" --steps "$steps" --arms "$corrected" --output @JSON
section batch-4-8b 45 "$python" benchmarks/gpu.py --device "$device" --shape "$shape" --length "$length" --batch "$batch" \
  --checkpointing all --steps "$((steps / 2))" --arms "$few" --output @JSON
section compiled-batch-4-8b 110 "$python" benchmarks/gpu.py --device "$device" --shape "$shape" --length "$length" \
  --batch "$batch" --checkpointing all --steps "$((steps / 2))" --compile --arms "$compiled" --output @JSON

part=3
[ -z "${DATA:-}" ] || section ground 240 bash -c '
  PYTHON=$0 DEVICE=$2 SMOKE=$3 LIMIT=205 experiments/learning.sh "$DATA" "$1" "${@:5}"
  code=$?
  "$0" experiments/gather.py --json math "$1" >"$4" && exit "$code"
' "$python" "$out/learning" "$device" "$tiny" @JSON "${cells[@]}"

for name in ${only//,/ }; do
  [[ $seen == *,$name,* ]] || { echo "gpu_all.sh: no section $name" >&2; exit 2; }
done
exit "$failed"
