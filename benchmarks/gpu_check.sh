#!/usr/bin/env bash
# Everything that wants a GPU: builds, tests, measurements, sanitizers.
#
#   benchmarks/gpu_check.sh [-o FOLDER] [PART...]
#
#   correctness   the tests of a GPU, and the kernels' test program
#   speed         python -m benchmarks --device cuda
#   sanitizers    compute-sanitizer on that program
#
# Without a PART all of them, in this order; each first builds what it needs and isn't built yet, so
# that they may also be called one by one. Logs and results go to FOLDER (default:
# benchmarks/results), each at once: a run that is killed leaves what it had. Of a measured GPU there
# is gpu_NAME.json then, which `python -m benchmarks.pages` turns into README's table.
#
# Needs torch, pybind11, pytest, hypothesis, cmake, ninja and a CUDA toolkit; downloads nothing and
# installs nothing: the extension is built into this checkout, by CMake alone. Tests of the trainers
# need scikit-learn and transformers with accelerate, lightning, or deepspeed, and are skipped for
# what is missing; the log says which. A step that fails doesn't
# keep the others from running, unless they need what it builds. 1: a step failed; 0: all is well.
#
# Without a GPU it rehearses: for one architecture all is built, tests run on the CPU as far as that
# serves, measurements with tiny tensors into rehearsal.json. An extension that was there is put back
# at the end. The status is 77 then if no step failed.
#
#   PYTHON                  the interpreter (default: python3)
#   GPU_CHECK_SECONDS       all steps end within so long (default: 540)
#   GPU_CHECK_BUILD         where all is built (default: build/gpu_check)
#   GPU_CHECK_BUILT         not empty: build nothing (no nvcc here), take what lies there
#   EMA_FUSED_COMMIT        recorded as the commit where the checkout came without its history
set -uo pipefail
cd "$(dirname "$0")/.."
no_gpu_status=77

usage() {
  echo "usage: benchmarks/gpu_check.sh [-o FOLDER] [correctness] [speed] [sanitizers]" >&2
  exit 2
}
folder=benchmarks/results
while getopts o: option; do
  case $option in
    o) folder=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
parts=" ${*:-correctness speed sanitizers} "
for part in $parts; do
  case $part in correctness | speed | sanitizers) ;; *) usage ;; esac
done
wants() { [[ $parts == *" $1 "* ]]; }

folder=$(realpath -m "$folder")
python=${PYTHON:-python3}
build=${GPU_CHECK_BUILD:-build/gpu_check}
total=${GPU_CHECK_SECONDS:-540}
if ! interpreter=$(command -v "$python"); then
  echo "$python was not found; PYTHON=... names the interpreter" >&2
  exit 1
fi
mkdir -p "$folder"
# Tools that are installed beside the interpreter are found after those that were on PATH before.
PATH="$PATH:$(dirname "$interpreter"):/usr/local/cuda/bin"
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

steps=() outcomes=() durations=()
failures=0

# note STEP OUTCOME SECONDS: a line of the summary, written at once.
note() {
  steps+=("$1") outcomes+=("$2") durations+=("$3")
  printf -- '--- %s: %s, %s s\n' "$1" "$2" "$3" | tee -a "$folder/gpu_check.txt"
}

# fail STEP REASON [SECONDS]
fail() {
  failures=$((failures + 1))
  note "$1" "FAILED: $2" "${3:-0}"
}

# begin LOG: the steps that follow write into it.
begin() {
  log="$folder/gpu_$1.log"
  : >"$log"
}

# step NAME PERCENT COMMAND...: run it within PERCENT of all the time, logged; returns its status.
step() {
  local name=$1 percent=$2
  shift 2
  local start=$SECONDS status=0 own
  printf '\n=== %s\n' "$name"
  local limit=$((total * percent / 100)) left=$((total - SECONDS))
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$limit" -le 0 ]; then
    fail "$name" "no time was left for it"
    return 1
  fi
  own=$(($(wc -l <"$log") + 2))
  printf '=== %s: %s\n' "$name" "$*" >>"$log"
  # The benchmark is told how long it has, so that it ends by itself and writes what it has.
  timeout --kill-after=5 "$limit" "${@//@SECONDS@/$((limit * 85 / 100))}" >>"$log" 2>&1 || status=$?
  local took=$((SECONDS - start))
  if [ "$status" -eq 0 ]; then
    tail -n "+$own" "$log" | tail -n "${shown_lines:-3}"
    note "$name" "${passed:-ok}" "$took"
  elif [ "$status" -eq "$no_gpu_status" ] && [ -z "$gpu" ]; then
    note "$name" "no GPU" "$took"
  else
    tail -n "+$own" "$log" | tail -n 40
    case $status in
      124 | 137) fail "$name" "stopped after $limit s" "$took" ;;
      "$no_gpu_status") fail "$name" "sees no GPU, though torch does" "$took" ;;
      *) fail "$name" "status $status" "$took" ;;
    esac
  fi
  return "$status"
}

# put_back: the extensions that were there before a rehearsal, each in one move.
put_back() {
  local file name
  for file in ema_fused/_C*.so; do
    if [ ! -e "$kept/${file##*/}" ]; then rm "$file"; fi
  done
  for file in "$kept"/*.so; do
    name="ema_fused/${file##*/}"
    cmp -s "$file" "$name" || { cp -p "$file" "$name.before" && mv "$name.before" "$name"; }
  done
  rm -r "$kept"
}

# ---- The device ----------------------------------------------------------------------------------

: >"$folder/gpu_check.txt"
gpu='' slug='' rehearsed=''
if found=$("$python" -m benchmarks.gpu_device); then
  read -r gpu slug <<<"$found"
  echo "GPU: $slug, compute capability $gpu"
else
  rehearsed='rehearsed on the CPU'
  echo "no GPU: what follows is a rehearsal on the CPU, and shows nothing of a GPU"
  shopt -s nullglob
  kept=$(mktemp -d)
  for file in ema_fused/_C*.so; do cp -p "$file" "$kept"; done
  trap put_back EXIT
fi

# ---- Builds --------------------------------------------------------------------------------------

built='' program_built=''
program="$build/all/gpu_update"
if [ -n "${GPU_CHECK_BUILT:-}" ]; then
  if "$python" -c 'import ema_fused._C'; then built=yes; fi
  if [ -x "$program" ]; then program_built=yes; fi
else
  begin build
  # For this GPU alone; in a rehearsal for one of the architectures, which is as good as any.
  architecture=${gpu/./}
  step configure 10 cmake -S . -B "$build/all" -G Ninja -DEMA_FUSED_CUDA=ON \
    "-DEMA_FUSED_CUDA_ARCHITECTURES=${architecture:-90}-real" -DEMA_FUSED_TESTS=ON \
    "-DPython_EXECUTABLE=$interpreter" \
    "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" \
    "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/ema_fused" &&
    step build 60 cmake --build "$build/all" --target _C && built=yes
fi

# build_program: what `update` and the sanitizers run; once.
build_program() {
  if [ -z "$program_built" ] && [ -z "${GPU_CHECK_BUILT:-}" ] && [ -e "$build/all" ]; then
    step build_program 30 cmake --build "$build/all" --target gpu_update && program_built=yes
  fi
}

# ---- Correctness ---------------------------------------------------------------------------------

if wants correctness; then
  begin correctness
  if [ -z "$built" ]; then
    # An older extension may lie there; it is not what is to be tested.
    fail tests "not run, the extension isn't built"
  else
    # By name: other files need packages that the image may not have.
    mapfile -t files < <(grep -rl --include="test_*.py" "mark\.gpu" tests | sort)
    # Names at once, and a traceback of what hangs: a run that is killed shows where.
    passed=$rehearsed step tests 40 "$python" -m pytest -m gpu --rehearse -v -rfEs --tb=short \
      -o faulthandler_timeout=60 "${files[@]}"
  fi
  build_program
  if [ -z "$program_built" ]; then
    fail update "not run, the test program isn't built"
  else
    step update 5 "$program"
  fi
fi

# ---- Speed ---------------------------------------------------------------------------------------

if wants speed; then
  begin speed
  percent=100
  # What the sanitizers need is kept free.
  if [ -n "$gpu" ] && wants sanitizers; then percent=$(((total - SECONDS) * 100 / total - 30)); fi
  if [ -z "$built" ]; then
    fail speed "not run, the extension isn't built"
  elif [ -n "$gpu" ]; then
    shown_lines=200 step speed "$percent" "$python" -m benchmarks --device cuda \
      --seconds @SECONDS@ --json "$folder/gpu_$slug.json" --markdown "$folder/gpu_$slug.md"
  else
    passed=$rehearsed step speed "$percent" "$python" -m benchmarks --rehearse --threads 1 \
      --seconds @SECONDS@ --json "$folder/rehearsal.json" --markdown "$folder/rehearsal.md"
  fi
fi

# ---- The test program under the sanitizers -------------------------------------------------------

if wants sanitizers; then
  begin sanitizers
  build_program
  sanitizer=$(command -v compute-sanitizer || true)
  declare -A most=([memcheck]=40 [racecheck]=25 [initcheck]=35)
  for tool in memcheck racecheck initcheck; do
    if [ -z "$program_built" ]; then
      fail "$tool" "not run, the test program isn't built"
    elif [ -z "$gpu" ]; then
      note "$tool" "no GPU" 0
    elif [ -z "$sanitizer" ]; then
      fail "$tool" "compute-sanitizer was not found on PATH or in /usr/local/cuda/bin"
    else
      step "$tool" "${most[$tool]}" "$sanitizer" --tool "$tool" --error-exitcode 1 "$program"
    fi
  done
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
