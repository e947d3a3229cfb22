#!/usr/bin/env bash
# Everything that wants a GPU, in one go: builds, tests, sanitizers, measurements.
#
#   benchmarks/gpu_check.sh [FOLDER]    logs and results go to FOLDER (default: benchmarks/results)
#
# Needs torch, pybind11, pytest, hypothesis, cmake, ninja and a CUDA toolkit; downloads nothing and
# installs nothing: the extension is built into this checkout, by CMake alone. A step that fails doesn't
# keep the others from running, unless they need what it builds. Without a GPU it goes as far as it
# can and ends with status 77; 1: a step failed; 0: all is well.
#
#   PYTHON                  the interpreter (default: python3)
#   GPU_CHECK_SECONDS       all steps end within so long (default: 540)
#   GPU_CHECK_BUILD         where all is built (default: build/gpu_check)
#   EMA_FUSED_COMMIT        recorded as the commit where the checkout came without its history
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-benchmarks/results}")
python=${PYTHON:-python3}
build=${GPU_CHECK_BUILD:-build/gpu_check}
total=${GPU_CHECK_SECONDS:-540}
measuring=$((total * 30 / 100)) # kept free for the measurements, whatever comes before them
no_gpu_status=77

if ! interpreter=$(command -v "$python"); then
  echo "$python was not found; PYTHON=... names the interpreter" >&2
  exit 1
fi
mkdir -p "$folder"
# Tools that are installed beside the interpreter are found after those that were on PATH before.
PATH="$PATH:$(dirname "$interpreter"):/usr/local/cuda/bin"
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

steps=() outcomes=() durations=()
failures=0
passed=ok # what a step is called that ended well

# note STEP OUTCOME SECONDS: a line of the summary.
note() {
  steps+=("$1") outcomes+=("$2") durations+=("$3")
  printf -- '--- %s: %s, %s s\n' "$1" "$2" "$3"
}

# fail STEP REASON [SECONDS]
fail() {
  failures=$((failures + 1))
  note "$1" "FAILED: $2" "${3:-0}"
}

# step NAME PERCENT COMMAND...: run it within PERCENT of all the time, logged; returns its status.
step() {
  local name=$1 percent=$2
  shift 2
  local log="$folder/gpu_$name.log" start=$SECONDS status=0
  printf '\n=== %s\n' "$name"
  local limit=$((total * percent / 100)) left=$((total - SECONDS))
  if [ "$name" != speed ]; then left=$((left - measuring)); fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$limit" -le 0 ]; then
    fail "$name" "no time was left for it"
    return 1
  fi
  # The benchmark is told how long it has, so that it ends by itself and writes what it has.
  timeout --kill-after=5 "$limit" "${@//@SECONDS@/$((limit * 85 / 100))}" >"$log" 2>&1 || status=$?
  local took=$((SECONDS - start))
  if [ "$status" -eq 0 ]; then
    tail -n "${shown_lines:-3}" "$log"
    note "$name" "$passed" "$took"
  elif [ "$status" -eq "$no_gpu_status" ] && [ -z "$gpu" ]; then
    tail -n 3 "$log"
    note "$name" "no GPU" "$took"
  else
    tail -n 40 "$log"
    case $status in
      124 | 137) fail "$name" "stopped after $limit s" "$took" ;;
      "$no_gpu_status") fail "$name" "sees no GPU, though torch does" "$took" ;;
      *) fail "$name" "status $status" "$took" ;;
    esac
  fi
  return "$status"
}

# ---- The device ----------------------------------------------------------------------------------

gpu='' slug=''
if found=$("$python" -m benchmarks.gpu_device); then
  read -r gpu slug <<<"$found"
  echo "GPU: $slug, compute capability $gpu"
else
  echo "no GPU: everything else is done"
fi

# ---- Builds --------------------------------------------------------------------------------------

# For this GPU alone; without one for the default list of architectures.
architectures=${gpu/./}
for_gpu=(-G Ninja -DEMA_FUSED_CUDA=ON "-DEMA_FUSED_CUDA_ARCHITECTURES=${architectures:+$architectures-real}")

built=''
step configure 10 cmake -S . -B "$build/extension" "${for_gpu[@]}" \
  "-DPython_EXECUTABLE=$interpreter" \
  "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" \
  "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/ema_fused" &&
  step build 30 cmake --build "$build/extension" --target _C && built=yes

program_built=''
step configure_program 10 cmake -S . -B "$build/program" "${for_gpu[@]}" \
  -DEMA_FUSED_PYTHON=OFF -DEMA_FUSED_TESTS=ON &&
  step build_program 25 cmake --build "$build/program" --target gpu_update && program_built=yes

# ---- The test program, alone and under the sanitizers --------------------------------------------

sanitizer=$(command -v compute-sanitizer || true)
if [ -z "$program_built" ]; then
  fail update "not run, its build failed"
else
  step update 5 "$build/program/gpu_update"
fi
declare -A percent=([memcheck]=16 [racecheck]=8 [initcheck]=14)
for tool in memcheck racecheck initcheck; do
  if [ -z "$program_built" ]; then
    fail "$tool" "not run, the program's build failed"
  elif [ -z "$gpu" ]; then
    note "$tool" "no GPU" 0
  elif [ -z "$sanitizer" ]; then
    fail "$tool" "compute-sanitizer was not found on PATH or in /usr/local/cuda/bin"
  else
    step "$tool" "${percent[$tool]}" "$sanitizer" --tool "$tool" --error-exitcode 1 "$build/program/gpu_update"
  fi
done

# ---- Tests and measurements ----------------------------------------------------------------------

results="$folder/gpu_${slug:-none}"
if [ -z "$built" ]; then
  # An older extension may lie there; it is not what is to be tested.
  fail tests "not run, the extension's build failed"
  fail speed "not run, the extension's build failed"
else
  if [ -z "$gpu" ]; then passed="no GPU: all skipped"; fi
  # By name: other files need packages that the image may not have.
  mapfile -t files < <(grep -rl --include="test_*.py" "mark\.gpu" tests | sort)
  step tests 20 "$python" -m pytest -m gpu -q "${files[@]}"
  passed=ok
  shown_lines=200 step speed 44 "$python" -m benchmarks --device cuda --seconds @SECONDS@ \
    --json "$results.json" --markdown "$results.md"
fi

# ---- Summary -------------------------------------------------------------------------------------

printf '\n%-18s %8s  %s\n' step seconds outcome
for i in "${!steps[@]}"; do
  printf '%-18s %8s  %s\n' "${steps[i]}" "${durations[i]}" "${outcomes[i]}"
done
printf '%-18s %8s\n' all "$SECONDS"
if [ -z "$gpu" ]; then
  echo "No GPU: no kernel has run, no sanitizer has seen one, and all of the speed is unmeasured."
fi
if [ "$failures" -gt 0 ]; then
  echo "$failures step(s) failed; logs: $folder/gpu_*.log"
  exit 1
fi
if [ -z "$gpu" ]; then exit "$no_gpu_status"; fi
