#!/usr/bin/env bash
# Everything there is to run on a GPU, in order of value, into one folder: the test suite, the memory
# checker over the CUDA kernels, models eager and fused side by side, untuned and tuned.
#
#   bench/on_gpu.sh [FOLDER]        FOLDER is bench/results/gpu unless given
#
# Needs the package installed with its `test` extra. DEVICE=cpu rehearses it where there is no GPU.
# Each step has a time limit (LIMIT seconds, 600) and a log; one that fails does not stop the rest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-bench/results/gpu}
device=${DEVICE:-cuda}
limit=${LIMIT:-600}
mkdir -p "$out"
failed=0
summary=()

run() {
  local name=$1 since=$SECONDS status=ok
  shift
  echo "=== $name: $*"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { status="FAILED ($?)" && failed=1; }
  tail -n 25 "$out/$name.log"
  summary+=("$(printf '%-12s %5d s  %s' "$status" $((SECONDS - since)) "$name")")
}

run doctor fused-resnet doctor
run tests pytest -q -p no:cacheprovider
if [[ $device == cuda ]] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python -m pytest -q -p no:cacheprovider tests/test_scale_shift_act.py -k cuda
  done
fi
# Tables are kept with the results, and the first comparison has none.
export FUSED_RESNET_CACHE=$out/cache
compare() {
  local suffix=$1
  for model in resnet50 resnet18; do
    for dtype in float16 float32; do
      [[ $device == cpu ]] && dtype=${dtype/float16/bfloat16}
      for batch in 1 32 256; do
        [[ $device == cpu && $batch != 1 ]] && continue
        run "$model-$dtype-$batch$suffix" fused-resnet compare "$model" --batch "$batch" \
          --dtype "$dtype" --device "$device" --json "$out/$model-$dtype-$batch$suffix.json"
      done
    done
  done
}

compare ""
if [[ $device == cuda ]]; then
  # A tuning that runs out of time keeps its lines; the next one goes on from there.
  for batch in 1 32 256; do
    run "tune-$batch" fused-resnet tune resnet50 --batch "$batch" --dtype float16
  done
  compare -tuned
else
  run tune-dry-run fused-resnet tune resnet50 --dry-run --gpu H100
fi

printf '\n=== results in %s\n' "$out"
printf '%s\n' "${summary[@]}"
exit $failed
