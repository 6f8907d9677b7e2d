"""How fast an iteration can be expected to run: a table of GPUs, or a matrix product measured on this CPU. No torch."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dgpo_fast.config import Config

GPU_PEAKS = {
    # bfloat16. Hopper: a product of 8192^3 on an H100, whose arithmetic an H200 shares. Ampere: NVIDIA's data sheet.
    "H200": 798e12,
    "H100": 798e12,
    "A100": 312e12,
}
GPU_SHARE = 0.35
"""Of the peak that an eager bfloat16 iteration is expected to reach, estimated from its counted bytes and FLOPs."""
CPU_SHARE = 0.28
"""Of a measured matrix product that an iteration reaches on a CPU: tiny-dgpo's 175 GFLOP took 3.2 s (the median of 100
iterations) on two cores of an EPYC whose product in numpy's OpenBLAS ran at 194 GFLOP/s (torch 2.13, 2026-11)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """FLOPs per second that all ranks together are expected to reach, and where that number comes from."""

    flops_per_s: float
    source: str


def expected_throughputs(config: Config, *, num_ranks: int) -> Iterator[Throughput]:
    """That of this machine's GPU, or of its CPU; for recipes in bfloat16, where the table has no such GPU, of an H100.

    None where a GPU is to compute in float32, of which the table says nothing.
    """
    gpu = None if config.device == "cpu" else gpu_name()
    if gpu is None:
        rate = measured_gemm()
        source = f"this machine's CPU, {CPU_SHARE:.0%} of the {rate / 1e9:.0f} GFLOP/s just measured (float32 product)"
        yield Throughput(flops_per_s=CPU_SHARE * rate, source=source)
    if config.model.dtype == "bfloat16":
        model = next((name for name in GPU_PEAKS if gpu and name in gpu), None)
        unknown = f"; {gpu} is not in the table" if gpu and model is None else ""
        yield _gpu_throughput(model or "H100", num_ranks, unknown)


def _gpu_throughput(model: str, num_ranks: int, remark: str) -> Throughput:
    peak = GPU_PEAKS[model]
    whence = f"{num_ranks} x {model}, {GPU_SHARE:.0%} of {peak / 1e12:.0f} TFLOP/s each (estimated, not measured)"
    return Throughput(flops_per_s=num_ranks * GPU_SHARE * peak, source=whence + remark)


def gpu_name() -> str | None:
    """The first GPU's name, as nvidia-smi gives it; None where there is none."""
    return _nvidia_smi("name")


def gpu_memory_bytes() -> float | None:
    """The first GPU's memory, as nvidia-smi gives it; None where there is none, or it shares the processor's."""
    mebibytes = _nvidia_smi("memory.total")
    return float(mebibytes) * 2**20 if mebibytes and mebibytes.isdecimal() else None


def _nvidia_smi(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout else None


def measured_gemm(*, seconds: float = 0.3, size: int = 768) -> float:
    """FLOPs per second of a float32 matrix product on this machine's CPU: the best of those that fit in `seconds`."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    a @ a
    best, end = 0.0, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
