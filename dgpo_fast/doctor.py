"""What this machine has, and which implementation serves each operator: what `dgpo-fast doctor` shows."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from dgpo_fast import ops
from dgpo_fast.environment import machine_name, package_versions
from dgpo_fast.models.sources import EMBEDDED
from dgpo_fast.ops.registry import NATIVE_LIBRARIES


def examine() -> dict[str, Any]:
    """Findings as plain data: machine, versions and parts (None where absent), and what serves each operator."""
    return {
        "machine": machine_name(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": {"triton": None, **package_versions(), "flash-attn": _version("flash-attn")},
        "parts": {
            "native library": str(NATIVE_LIBRARIES["cpu"]) if NATIVE_LIBRARIES["cpu"].exists() else None,
            "embedded model": str(EMBEDDED) if (EMBEDDED / "model_index.json").exists() else None,
        },
        "environment": {name: os.environ.get(name) for name in ("DGPO_FAST_OPS", "TRITON_INTERPRET")},
        "operators": [asdict(serving) for serving in ops.serving()],
    }


def render(findings: dict[str, Any]) -> RenderableType:
    """The findings for a terminal."""
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("machine", findings["machine"])
    facts.add_row("cuda", findings["cuda"] or "[dim]none that torch sees[/]")
    for group, absent in (("versions", "absent"), ("parts", "absent"), ("environment", "not set")):
        for name, value in findings[group].items():
            facts.add_row(name, value or f"[dim]{absent}[/]")
    operators = Table(title="Operators", title_justify="left")
    for column in ("operator", "device", "served by", "because"):
        operators.add_column(column)
    for serving in findings["operators"]:
        operators.add_row(serving["operator"], serving["device"], serving["implementation"], serving["reason"])
    return Group(facts, operators)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
