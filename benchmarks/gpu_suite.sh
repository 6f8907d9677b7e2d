#!/usr/bin/env bash
# What only a GPU can tell, in ten minutes: tests of the operators, sanitizers, benchmarks, hardware counters.
#
#   benchmarks/gpu_suite.sh --out DIR [--only REGEX] [--seconds N] [--dry-run]
#
#   --out DIR      where everything goes: tests.xml, bench/*.csv, ncu.csv, ncu_hottest.csv (its five that take most of
#                  the time), summary.txt, and what each part printed
#   --only REGEX   the parts whose whole names match, such as 'build|tests' or 'bench_.*'
#                  'build|engines' compares whole engines, 'build|costs' what an image costs each method,
#                  'zero' runs full fine-tuning under ZeRO 1 to 3,
#                  'build|hottest' has ncu find the five hottest kernels of a micro-step (hottest.csv): each takes
#                  minutes, up to the ten of a run, and is not in others
#   --seconds N    time for the whole run (590); a part for which none is left counts as failed
#   --dry-run      print the parts and run nothing
#
# Needs torch with CUDA, triton, numpy, rich, pytest and hypothesis, of the Python that PYTHON names (python3), and for
# engines what the package itself needs; cmake and nvcc for the operators in CUDA C++; compute-sanitizer; ncu where it
# is found. What fails does not stop the rest.
# DGPO_FAST_COMMIT names the commit for the tables where the directory is a copy without git.

# Each part is a function, run in a shell of its own that stops at the first error.

machine() {
  for command in 'nvidia-smi' 'nvidia-smi -q -d CLOCK,POWER' 'nvcc --version' 'cmake --version' \
    'compute-sanitizer --version' 'ncu --version'; do
    printf '\n$ %s\n' "$command"
    $command 2>&1 || true
  done
  "$PYTHON" -m pip list || true
  "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_properties("cuda"))'
}

build() {
  arch=$("$PYTHON" -c 'import torch; x, y = torch.cuda.get_device_capability(); print(f"{x}{y}" + "a" * (x >= 9))')
  cmake -S . -B "$DGPO_FAST_NATIVE_DIR" -DDGPO_FAST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$arch-real" \
    -DDGPO_FAST_BUILD_TESTS=OFF -DPython3_EXECUTABLE="$(command -v "$PYTHON")"
  cmake --build "$DGPO_FAST_NATIVE_DIR" --parallel "$(nproc)"
  "$PYTHON" -c 'from dgpo_fast import ops; print(ops.describe_serving("cuda"))'
}

# Compiles Triton's kernels as well: under a sanitizer that would take far longer.
launches() { "$PYTHON" -m benchmarks.launches --device cuda; }

# No cache of memory, so that a test which spreads a tensor over gigabytes gives them back.
tests() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  workers=()
  if "$PYTHON" -c 'import xdist'; then workers=(-n 4); fi
  "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/ops --device cuda \
    -m 'not own_process and not slow' --junitxml="$out/tests.xml"
}

# Without that cache a tensor ends where its allocation ends, and a write behind it is seen.
sanitizer() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m benchmarks.launches --device cuda
}

# Fills the caches of torch.compile as well, so that the benchmarks spend their time on timing.
check() { printf '%s\n' "$@" | xargs -P 4 -I{} bash -euo pipefail -c 'check_one {}'; }
check_one() { "$PYTHON" -m "benchmarks.$1" --device cuda --check >"$out/check_$1.txt" 2>&1; }

bench() { "$PYTHON" -m "benchmarks.$1" --device cuda --out "$out/bench"; }

# Five models of several sizes in one process: segments that grow keep the memory whole.
engines() {
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  "$PYTHON" -m benchmarks.bench_engines --device cuda --out "$out/bench"
}

# Full fine-tuning of SD3.5-Medium under every stage of ZeRO, five steps each.
zero() { "$PYTHON" -m benchmarks.zero_steps --out "$out/bench"; }

# What an image costs DGPO and every method it is compared with: SD3.5-Medium, published recipes, random weights.
costs() {
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  "$PYTHON" -m benchmarks.method_costs --out "$out/bench"
}

counters() {
  kernels=$(grep -Eoh '\b[a-z0-9_]+_kernel\b' kernels/*.py csrc/cuda/*.cu | sort -u | paste -sd '|')
  measured "$out/ncu.csv" --kernel-name "regex:^($kernels)\$" \
    "$PYTHON" -m benchmarks.launches --device cuda --shapes cuda
  "$PYTHON" -m benchmarks.hottest_kernels "$out/ncu.csv" "$out/ncu_hottest.csv"
}

# measured FILE [ncu's options] COMMAND...: the counters of each launch, in units that are the same in every row.
measured() {
  metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  ncu --csv --page raw --print-units base --log-file "$1" --clock-control none --metrics "$metrics" "${@:2}"
}

# SD3.5-Medium with random weights: a forward and a backward of the policy behind the first iteration, in which Triton
# compiles and libraries choose.
hottest() {
  measured "$out/ncu_micro_step.csv" --nvtx --nvtx-include 'dgpo_fast@window/*/policy' \
    --nvtx-include 'dgpo_fast@window/*/backward' --launch-count 4000 \
    "$PYTHON" -m dgpo_fast profile sd35m-geneval --model random:sd35-medium --out "$out/profile" --iterations 1 \
    --no-trace --set 'rewards.terms=[{name: shapes}]' --set prompts.train=shapes:train --set prompts.test=shapes:test \
    --set groups.per_iteration=1 --set rollout.steps=5 --set algorithm.train_timesteps=1
  "$PYTHON" -m benchmarks.hottest_kernels "$out/ncu_micro_step.csv" "$out/hottest.csv"
}

# part NAME LIMIT FUNCTION [ARGUMENT...]: for LIMIT seconds at most, and no longer than the run has left.
part() {
  local name=$1 limit=$2 function=$3 arguments=("${@:4}") began=$SECONDS left=$((seconds - SECONDS)) result status
  [[ $name =~ ^($only)$ ]] || return 0
  if $dry_run; then
    printf '\n%s, %s s at most: %s\n' "$name" "$limit" "$function ${arguments[*]}"
    [[ $function == bench ]] || declare -f "$function" | sed '1,2d;$d'
    return 0
  fi
  printf '%-26s ' "$name"
  timeout --kill-after=10 $((limit < left ? limit : left > 0 ? left : 1)) \
    bash -euo pipefail -c '"$@"' part "$function" "${arguments[@]}" >"$out/$name.txt" 2>&1
  status=$?
  case $status in
    0) result=passed ;;
    124 | 137) result='out of time' ;;
    *) result="failed, status $status" ;;
  esac
  printf '%4d s  %s\n' $((SECONDS - began)) "$result"
  summary+=("$(printf '%-26s %4d s  %s' "$name" $((SECONDS - began)) "$result")")
  if ((status)); then
    failed+=("$name")
    tail -n 15 "$out/$name.txt" | sed 's/^/    /'
  fi
}

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
out='' only='.*' seconds=590 dry_run=false failed=() summary=()
while (($#)); do
  case $1 in
    --out) out=${2:-}; shift ;;
    --only) only=${2:-}; shift ;;
    --seconds) seconds=${2:-}; shift ;;
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "gpu_suite: expected --out, --only, --seconds or --dry-run, got '$1'" >&2; exit 2 ;;
  esac
  shift
done
[[ -n $out ]] || { echo 'gpu_suite: expected --out DIR' >&2; exit 2; }
out=$(realpath -m "$out")

# pip installs cmake beside its Python, CUDA its tools beside nvcc; neither need be on the PATH.
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH:/usr/local/cuda/bin
export PATH PYTHON out PYTHONPATH=$PWD PYTHONUNBUFFERED=1 DGPO_FAST_NATIVE_DIR=$PWD/build/gpu
unset DGPO_FAST_OPS TRITON_INTERPRET
export -f machine build launches tests sanitizer check check_one bench engines zero costs counters measured hottest
mapfile -t scripts < <(basename -s .py benchmarks/bench_*.py | grep -vxE 'bench_(engines|ranges)')

$dry_run || mkdir -p "$out/bench"
part machine 60 machine
part build 300 build
part launches 120 launches
part tests 300 tests
part memcheck 120 sanitizer memcheck
part racecheck 120 sanitizer racecheck
part check 200 check "${scripts[@]}"
for script in "${scripts[@]}"; do part "$script" 60 bench "$script"; done
# Minutes of their own: only where --only asks for them.
[[ $only == '.*' ]] || part engines 480 engines
[[ $only == '.*' ]] || part zero 580 zero
[[ $only == '.*' ]] || part costs 580 costs
[[ $only == '.*' ]] || part hottest 400 hottest
if command -v ncu >/dev/null; then part ncu 120 counters; else echo 'ncu: not found, left out'; fi
$dry_run && exit 0

printf '%s\n' "${summary[@]}" >"$out/summary.txt"
printf '\n%d s in all; everything is in %s\n' "$SECONDS" "$out"
if ((${#failed[@]})); then printf 'failed: %s\n' "${failed[*]}"; exit 1; fi
