"""What a run ran on: machine, versions, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shlex
import sys
from pathlib import Path

import torch

from dgpo_fast import launcher

PACKAGES = (
    "dgpo-fast", "torch", "triton", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "safetensors",
    "numpy",
)  # fmt: skip

WORKERS_VARIABLE = "DGPO_FAST_REWARD_PROCESSES"
"""In a worker process of a reward: how many of them the rank has. torchrun says in LOCAL_WORLD_SIZE how many ranks."""


def describe_environment() -> dict[str, object]:
    """{"versions": {package: version}, "machine": str, "command": str}."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"versions": package_versions(), "machine": machine_name(), "command": command}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to results; what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine_name() -> str:
    """The device in words: the GPU's name, or the processor's with its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return f"{processor_name()}, {num_cores()} cores"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """Cores for this process, where other ranks here, and other workers of a reward, take as many; at least 1."""
    cores = num_cores()
    sharers = launcher.sharing_cores(cores) * int(os.environ.get(WORKERS_VARIABLE, "1"))
    return max(1, cores // sharers)


def peak_memory_gb(device: torch.device) -> float:
    """Peak of what torch allocated on a GPU, or of the process's resident memory, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def device_name(device: torch.device) -> str:
    """The GPU or the processor in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """The processor in words."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
