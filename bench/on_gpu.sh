#!/usr/bin/env bash
# Everything there is to run on a GPU, in order of value, into one folder, in one command:
#
#   bench/on_gpu.sh [FOLDER]        FOLDER is bench/results/gpu unless given
#
#   WHEEL=path.whl    install this wheel; built from this checkout if unset, into FOLDER/wheel;
#                     WHEEL=none uses what is installed already
#   PYTHON=python3    the interpreter, which has torch; a virtual environment that sees its packages
#                     is made in FOLDER/venv, so that nothing outside FOLDER changes
#   LIMIT=600         seconds a step may take; the test suite has three times as long
#   TOTAL=7200        seconds after which no further step starts
#   MODELS, BATCHES, DTYPES, ROUNDS   what is benchmarked
#   DEVICE=cpu        rehearses it where there is no GPU
#   ONLY=REGEX        only steps whose name matches
#
# A step that is done is not run again: after an interrupt, a crash or a lost machine, the same
# command goes on where it stopped (AGAIN=1 starts over). A step that fails does not stop the rest.
# Exit code: 0 if every step is done, 1 otherwise.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-bench/results/gpu}
mkdir -p "$out/done" "$out/logs"
out=$(cd "$out" && pwd)
device=${DEVICE:-cuda}
limit=${LIMIT:-600}
total=${TOTAL:-7200}
python=${PYTHON:-python3}
models=${MODELS:-resnet50,resnet18}
batches=${BATCHES:-1,32,256}
rounds=${ROUNDS:-30}
if [[ $device == cpu ]]; then dtypes=${DTYPES:-float32}; else dtypes=${DTYPES:-float16,float32}; fi
[[ ${AGAIN:-0} == 1 ]] && rm -f "$out"/done/*
# Tuned tiles are kept with the results; nothing of the user's is read or written.
export FUSED_RESNET_CACHE=$out/cache
unset PYTHONDONTWRITEBYTECODE
summary=()
failed=0
trap 'echo "interrupted; the same command goes on from here"; exit 130' INT TERM

# run NAME SECONDS COMMAND...: once, under a time limit, with a log.
run() {
  local name=$1 seconds=$2 since=$SECONDS status=ok code=0
  shift 2
  [[ -n ${ONLY:-} && ! $name =~ $ONLY ]] && return
  if [[ -e $out/done/$name ]]; then
    summary+=("$(printf '%-14s %7s  %s' 'done before' "$(cat "$out/done/$name")" "$name")")
    return
  fi
  if ((SECONDS > total)); then
    summary+=("$(printf '%-14s %7s  %s' 'no time left' '' "$name")")
    failed=1
    return
  fi
  printf '\n=== %s\n' "$name"
  # SIGINT is Ctrl-C: our commands keep what they have, and get half a minute for it.
  timeout --signal=INT --kill-after=30 "$seconds" "$@" >"$out/logs/$name.log" 2>&1 || code=$?
  tail -n 20 "$out/logs/$name.log"
  case $code in
    0) printf '%d s' $((SECONDS - since)) >"$out/done/$name" ;;
    124 | 130 | 137) status="out of time" failed=1 ;;
    *) status="FAILED ($code)" failed=1 ;;
  esac
  summary+=("$(printf '%-14s %5d s  %s' "$status" $((SECONDS - since)) "$name")")
}

install() {
  local wheel=${WHEEL:-} site
  # Without pip where there is no ensurepip: then $python's own installs for it.
  local pip=("$out/venv/bin/python" -m pip)
  if ! "$python" -m venv "$out/venv"; then
    "$python" -m venv --clear --without-pip "$out/venv" || return
    pip=("$python" -m pip --python "$out/venv/bin/python")
  fi
  # What $python sees, in a virtual environment of its own too.
  site=$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' >"$site/outer.pth"
  if [[ -z $wheel ]]; then
    rm -rf "$out/wheel"
    "${pip[@]}" wheel --no-deps --no-build-isolation -w "$out/wheel" . || return
    wheel=$(echo "$out"/wheel/*.whl)
  fi
  "${pip[@]}" install --no-deps --force-reinstall "$wheel"
}

if [[ ${WHEEL:-} != none ]]; then
  export -f install
  export out python WHEEL
  run install $((3 * limit)) bash -c install
  if [[ ! -e $out/done/install && -z ${ONLY:-} ]]; then
    echo "the package could not be installed: see $out/logs/install.log"
    exit 1
  fi
  python=$out/venv/bin/python
fi
# The installed package, not the source tree that `python -m` would put first.
module='import sys
sys.path = [folder for folder in sys.path if folder]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)'
command=("$python" -c "$module" fused_resnet.cli)
measure=(--device "$device" --rounds "$rounds")
# Compilers take minutes a case, so what is measured before tuning is without them, and so is a
# rehearsal, which is of this script.
untuned=("${measure[@]}" --no-memory)
for engine in "torch.compile" "torch.compile, frozen" "torch.compile, reduce-overhead" \
  "torch.compile, max-autotune" "fused, torch.compile" "OpenVINO" "ONNX Runtime"; do
  untuned+=(--without "$engine")
done
whole=("${measure[@]}")
[[ $device == cpu ]] && whole=("${untuned[@]}")

# 1. Does it work at all, and is it right?
run doctor 120 "${command[@]}" doctor
run smoke "$limit" "${command[@]}" compare resnet18 --device "$device" --rounds 3 --no-memory \
  --json "$out/smoke.json"
# 2. The figures that matter most, before anything that takes long.
first=${batches##*,}
run "kernels-first" "$limit" "${command[@]}" bench kernels --model "${models%%,*}" \
  --batch "$first" --dtype "${dtypes%%,*}" --without torch.compile "${measure[@]}" \
  --json "$out/kernels-first.json"
run tests $((3 * limit)) "$python" -c "$module" pytest -q -p no:cacheprovider ${TESTS:-tests}
# 3. What the sanitizers see of the CUDA kernels, on the operators' own tests.
if [[ $device == cuda ]] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # Each tensor an allocation of its own, or the checker sees only torch's large blocks.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitizer-$tool" "$limit" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all "$python" -c "$module" pytest -q -x -p no:cacheprovider \
      tests/ops/test_scale_shift_act.py tests/backends/cuda/test_cuda_conv.py tests/ops/test_conv_bn_act.py \
      tests/backends/cuda/test_cuda_batch_norm.py tests/ops/test_batch_norm_act.py -k "cuda and not slow"
  done
fi
# 4. Tuning, and everything measured untuned and tuned. One that runs out of time keeps its lines.
for dtype in ${dtypes//,/ }; do
  # On a GPU float32 convolutions may use TF32, as torch has it by default.
  layers=$dtype
  [[ $device == cuda ]] && layers=${dtype/#float32/tfloat32}
  for model in ${models//,/ }; do
    what=(--model "$model" --batch "$batches" --dtype)
    run "models-$model-$dtype-untuned" "$limit" "${command[@]}" bench models "${what[@]}" "$dtype" \
      "${untuned[@]}" --json "$out/models-$model-$dtype-untuned.json"
    tune=("$model" --batch "$batches" --dtype "$layers")
    [[ $device == cpu ]] && tune=("$model" --batch 1 --dry-run --gpu H100)
    run "tune-$model-$dtype" "$limit" "${command[@]}" tune "${tune[@]}"
    run "kernels-$model-$dtype" $((2 * limit)) "${command[@]}" bench kernels "${what[@]}" \
      "$layers" "${measure[@]}" --json "$out/kernels-$model-$dtype.json"
    run "models-$model-$dtype" $((2 * limit)) "${command[@]}" bench models "${what[@]}" "$dtype" \
      "${whole[@]}" --json "$out/models-$model-$dtype.json"
  done
done
# 5. Training, in 16 bits under autocast.
train=${batches#1,}
run "training" "$limit" "${command[@]}" bench models --model "$models" --batch "$train" \
  --dtype "${dtypes%%,*}" --mode training "${whole[@]}" --json "$out/training.json"
run "kernels-training" "$limit" "${command[@]}" bench kernels --model "$models" --batch "$train" \
  --dtype "${dtypes%%,*}" --mode training "${measure[@]}" --json "$out/kernels-training.json"
# 6. One page of it all. Made anew each time, since an earlier step may have added to it.
rm -f "$out/done/report"
shopt -s nullglob
results=()
for file in "$out"/kernels-*.json "$out"/models-*.json "$out"/training.json; do
  [[ -e $file ]] && results+=("$file")
done
if ((${#results[@]})); then
  run report "$limit" "${command[@]}" bench report "${results[@]}" --output "$out/report.html" \
    --plots "$out/plots"
fi

printf '\n=== results in %s\n' "$out"
printf '%s\n' "${summary[@]}"
exit $failed
