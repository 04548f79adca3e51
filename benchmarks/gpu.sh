#!/usr/bin/env bash
# Every figure that only a GPU can give, as ratios of one run, in about 14 minutes.
#
#   benchmarks/gpu.sh OUT [PART...]
#
# Parts: rates manager selftest bf16 fp8 wide. Without names all, in this order. What is finished in OUT is not run
# again: a run that was cut short is completed by the same command. BUDGET (seconds, 840) bounds all parts together.
# PYTHON names the interpreter, SETTINGS further arguments of LLM() as JSON. bf16 ends with 13 % of the experts: close to
# the least slots that its 8 layers can have.
set -u
OUT=${1:?usage: benchmarks/gpu.sh OUT [PART...]}
shift
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(rates manager selftest bf16 fp8 wide)
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-840}
SETTINGS=${SETTINGS:-{\}}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
SECONDS=0

left() { echo $((BUDGET - SECONDS)); }

# part NAME LIMIT COMMAND...: run it unless it is finished or no time is left; its output goes to OUT/NAME.txt too.
part() {
  local name=$1 limit=$2
  shift 2
  if [ -e "$OUT/$name.done" ]; then
    echo "== $name: finished before"
    cat "$OUT/$name.txt"
    return
  fi
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 20 ]; then
    echo "== $name: no time left"
    return
  fi
  echo "== $name, at most $limit s"
  local began=$SECONDS
  if timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.txt"; [ "${PIPESTATUS[0]}" -eq 0 ]; then
    touch "$OUT/$name.done"
    echo "== $name: $((SECONDS - began)) s"
  else
    echo "== $name: FAILED or cut short after $((SECONDS - began)) s"
  fi
}

compare() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" "$HERE/gpu/compare.py" --out "$OUT/$name" --rates "$OUT/rates.json" \
    --budget "$((limit - 10))" --settings "$SETTINGS" "$@"
}

for one in "${PARTS[@]}"; do
  case $one in
    rates) part rates 60 "$PYTHON" -m vllm_moe_offload.integration.selftest '{}' "$OUT/rates.json" ;;
    manager) part manager 90 "$PYTHON" "$HERE/gpu/manager.py" --out "$OUT/manager.json" ;;
    selftest) part selftest 250 "$PYTHON" -m vllm_moe_offload selftest --gpu ;;
    bf16) compare bf16 300 --shape qwen3-30b-a3b --format bf16 --layers 8 --shares 25,50,13 ;;
    fp8) compare fp8 250 --shape qwen3-30b-a3b --format fp8 --layers 12 --shares 25,50 ;;
    wide) compare wide 250 --shape gpt-oss-20b --format bf16 --layers 6 --shares 25,50 ;;
    *) echo "no such part: $one" && exit 2 ;;
  esac
done
[ -s "$OUT/rates.json" ] && echo "== rates" && cat "$OUT/rates.json"
exit 0
