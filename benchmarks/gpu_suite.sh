#!/usr/bin/env bash
# What only a GPU can tell, in ten minutes: tests, sanitizers, benchmarks, hardware counters.
#
#   benchmarks/gpu_suite.sh --out DIR [--only REGEX] [--seconds N] [--dry-run]
#
#   --out DIR      where everything goes: bench/*.csv, tests.xml and others of pytest, ncu.csv and ncu_hottest.csv (its
#                  five kernels that take most of the time), summary.txt, and what each part printed
#   --only REGEX   the parts whose whole names match, such as 'build|tests' or 'bench_.*'. Minutes long, and run only
#                  where they are asked for, are
#                    engines   whole engines beside the published loop; compile is the one that torch.compile makes
#                    costs     what an image costs each method
#                    zero      full fine-tuning under ZeRO 1 to 3
#                    hottest   the five kernels that a training step spends most time in (hottest.csv), by ncu
#                    far       tests of tensors whose samples lie 2^31 elements apart: 60 GB
#                  each behind 'build' ('build|engines') where the operators in CUDA C++ are to serve
#   --seconds N    time for the whole run (590); a part that none is left for is left out, and counts as failed
#   --dry-run      print the parts and run nothing
#
# Needs torch with CUDA, triton, numpy, rich, pytest and hypothesis, of the Python that PYTHON names (python3), and for
# 'trains' and what runs by name all that the package needs; cmake and nvcc for the operators in CUDA C++;
# compute-sanitizer; ncu where it is found. What fails does not stop the rest.
# DGPO_FAST_COMMIT names the commit for the tables where the directory is a copy without git.

# Each part is a function, run in a shell of its own that stops at the first error, for $limit seconds at most.

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

# side_by_side ARGUMENT...: `python ARGUMENT...` for every script, whose name takes the place of SCRIPT, all at once.
side_by_side() {
  printf '%s\n' $scripts | xargs -P "$(nproc)" -I{} \
    bash -euo pipefail -c '"$@"' part for_script {} "${FUNCNAME[1]}" "$@"
}
for_script() {
  local log=$out/$2_$1.txt arguments=("${@:3}")
  "$PYTHON" "${arguments[@]//SCRIPT/$1}" >"$log" 2>&1 || { cat "$log"; return 1; }
}

# Compiles Triton's kernels as well: the parts behind it find them in its cache.
launches() { side_by_side -m benchmarks.launches SCRIPT --device cuda; }

# Fills the caches of torch.compile as well, so that the benchmarks spend their time on timing.
check() {
  export TORCHINDUCTOR_COMPILE_THREADS=1
  side_by_side -m benchmarks.SCRIPT --device cuda --check
}

bench() { "$PYTHON" -m "benchmarks.$1" --device cuda --out "$out/bench"; }

# No cache of memory, so that a test which spreads a tensor over gigabytes gives them back.
pytest_ops() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops --device cuda "$@"
}
tests() {
  workers=()
  if "$PYTHON" -c 'import xdist'; then workers=(-n $(($(nproc) < 12 ? $(nproc) : 12))); fi
  pytest_ops "${workers[@]}" -m 'not own_process and not slow and not far' --junitxml="$out/tests.xml"
}
far() { pytest_ops -m far --junitxml="$out/far.xml"; }

# The package itself: models, rollouts and training runs on the device.
trains() {
  mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
  "$PYTHON" -m pytest -q -p no:cacheprovider "${files[@]}" -m gpu --junitxml="$out/trains.xml"
}

# Without a cache of memory a tensor ends where its allocation ends, and a write behind it is seen. PyTorch asks CUDA for
# things that it may refuse: not our errors.
sanitizer() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  compute-sanitizer --tool "$1" --error-exitcode 9 --report-api-errors no \
    "$PYTHON" -m benchmarks.launches --device cuda
}

# Models of several sizes in one process: segments that grow keep the memory whole.
bench_engines() {
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  "$PYTHON" -m benchmarks.bench_engines --device cuda --out "$1" --seconds $((limit > 120 ? limit - 60 : 60)) \
    --only "${@:2}"
}
engines() { bench_engines "$out/bench" published eager fused 'fused + fp8'; }
compile() { bench_engines "$out/bench/compile" published compile; }

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
    "$PYTHON" -m benchmarks.launches --device cuda --shapes cuda --few
  "$PYTHON" -m benchmarks.hottest_kernels "$out/ncu.csv" "$out/ncu_hottest.csv"
}

# measured FILE [ncu's options] COMMAND...: the counters of each launch, in units that are the same in every row. ncu
# writes its table when the command has ended, and what keeps it from measuring into the same file.
measured() {
  metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  ncu --csv --page raw --print-units base --log-file "$1" --clock-control none --metrics "$metrics" "${@:2}" || {
    grep '^==' "$1" || true
    return 1
  }
}

# SD3.5-Medium with random weights, behind a first iteration in which Triton compiles and libraries choose: the last
# blocks' forward, which checkpointing runs again, and their backward. 400 kernels are some five blocks of 24.
hottest() {
  measured "$out/ncu_training.csv" --nvtx --nvtx-include 'dgpo_fast@window/*/backward' --launch-count 400 \
    "$PYTHON" -m dgpo_fast profile sd35m-geneval --model random:sd35-medium --out "$out/profile" --iterations 1 \
    --no-trace --set 'rewards.terms=[{name: shapes}]' --set prompts.train=shapes:train --set prompts.test=shapes:test \
    --set groups.per_iteration=1 --set rollout.steps=5 --set algorithm.train_timesteps=1 \
    --set model.checkpointing=full
  "$PYTHON" -m benchmarks.hottest_kernels "$out/ncu_training.csv" "$out/hottest.csv"
}

# part NAME LIMIT FUNCTION [ARGUMENT...]: for LIMIT seconds at most, and no longer than the run has left.
part() {
  local name=$1 function=$3 arguments=("${@:4}") began=$SECONDS left=$((seconds - SECONDS)) result status=0 signal=TERM
  export limit=$2
  [[ $name =~ ^($only)$ ]] || return 0
  if $dry_run; then
    printf '\n%s, %s s at most: %s\n' "$name" "$limit" "$function ${arguments[*]}"
    [[ $function == bench ]] || declare -f "$function" | sed '1,2d;$d'
    return 0
  fi
  printf '%-26s ' "$name"
  rm -f "$out/$name.txt"
  if ((left < 10)); then
    result='left out: no time is left' status=124
  else
    limit=$((limit < left ? limit : left))
    # Interrupted, pytest says what failed before; xargs would leave its children behind.
    [[ $function == @(tests|far|trains) ]] && signal=INT
    timeout --signal="$signal" --kill-after=10 "$limit" \
      bash -euo pipefail -c '"$@"' part "$function" "${arguments[@]}" >"$out/$name.txt" 2>&1
    status=$?
    case $status in
      0) result=passed ;;
      124 | 137) result='out of time' ;;
      *) result="failed, status $status" ;;
    esac
  fi
  printf '%4d s  %s\n' $((SECONDS - began)) "$result"
  printf '%-26s %4d s  %s\n' "$name" $((SECONDS - began)) "$result" >>"$out/summary.txt"
  if ((status)); then
    failed+=("$name")
    if [[ -e $out/$name.txt ]]; then tail -n 15 "$out/$name.txt" | sed 's/^/    /'; fi
  fi
}

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
out='' only='.*' seconds=590 dry_run=false failed=()
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
# The largest first: it takes longest, and what runs beside it ends sooner.
scripts=$(ls -S benchmarks/bench_*.py | xargs basename -s .py | grep -vxE 'bench_(engines|ranges)')
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH PYTHON PYTHONPATH out scripts PYTHONUNBUFFERED=1 DGPO_FAST_NATIVE_DIR=$PWD/build/gpu
unset DGPO_FAST_OPS TRITON_INTERPRET
export -f machine build side_by_side for_script launches check bench pytest_ops tests far trains sanitizer bench_engines engines \
  compile zero costs counters measured hottest

if ! $dry_run; then mkdir -p "$out/bench" && rm -f "$out/summary.txt"; fi
part machine 30 machine
part build 300 build
part launches 120 launches
part trains 150 trains
part tests 200 tests
part check 250 check
for script in $scripts; do part "$script" 60 bench "$script"; done
if command -v ncu >/dev/null; then part ncu 120 counters; else echo 'ncu: not found, left out'; fi
part memcheck 120 sanitizer memcheck
part racecheck 120 sanitizer racecheck
if [[ $only != '.*' ]]; then # minutes of their own: where they are asked for
  part far 300 far
  part engines 480 engines
  part compile 480 compile
  part zero 580 zero
  part costs 580 costs
  part hottest 400 hottest
fi
$dry_run && exit 0

printf '\n%d s in all; everything is in %s\n' "$SECONDS" "$out"
if ((${#failed[@]})); then printf 'failed: %s\n' "${failed[*]}"; exit 1; fi
