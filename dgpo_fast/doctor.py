"""What this machine has, and which implementation serves each operator: what `dgpo-fast doctor` shows."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dgpo_fast import ops
from dgpo_fast.environment import machine_name, package_versions
from dgpo_fast.models.fused.attention import ATTENTIONS
from dgpo_fast.models.sources import EMBEDDED
from dgpo_fast.ops.registry import NATIVE_LIBRARIES, serving_by_reason

ENVIRONMENT = ("DGPO_FAST_OPS", "DGPO_FAST_NATIVE_DIR", "DGPO_FAST_CACHE", "TRITON_INTERPRET")

CPU = torch.device("cpu")

Operators = Sequence[Mapping[str, Any]]


def examine() -> dict[str, Any]:
    """Findings as plain data: machine, versions and parts (None where absent), and what serves each operator."""
    return {
        "machine": machine_name(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": {"triton": None, **package_versions(), "flash-attn": _version("flash-attn")},
        "parts": {
            "native library": _if_there(NATIVE_LIBRARIES["cpu"]),
            **({"native library, CUDA": _if_there(NATIVE_LIBRARIES["cuda"])} if torch.version.cuda else {}),
            "embedded model": str(EMBEDDED) if (EMBEDDED / "model_index.json").exists() else None,
        },
        "attention": _attentions(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "operators": [{**asdict(serving), "language": serving.language} for serving in ops.serving()],
        "because": {device: serving_by_reason(device) for device in dict.fromkeys(s.device for s in ops.serving())},
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
    facts.add_row("attention", _attention_line(findings["attention"], with_reasons=findings["cuda"] is not None))
    return Group(facts, _operators_table(findings["operators"], list(findings["because"])), *_reasons(findings))


def _attentions() -> dict[str, str | None]:
    """Why each attention of the fused engine cannot run here, in a model's usual dtype; None where it can."""
    device, dtype = (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (CPU, torch.float32)
    return {name: attention.missing(device, dtype) for name, attention in ATTENTIONS.items()}


def _attention_line(missing: Mapping[str, str | None], *, with_reasons: bool) -> str:
    """What `auto` takes and what else runs; on a CPU it goes without saying why those for CUDA do not."""
    auto, *others = (name for name, reason in missing.items() if reason is None)
    absent = "; ".join(f"{name} {reason}" for name, reason in missing.items() if reason is not None)
    line = f"auto takes {auto}; {', '.join(others)} runs here too" if others else f"auto takes {auto}"
    return f"{line} [dim]({escape(absent)})[/]" if with_reasons else line


def _operators_table(operators: Operators, devices: Sequence[str]) -> Table:
    """A row for each stem: its other forms, and what serves it on each device."""
    table = Table("operator", "also", *(f"on {device}" for device in devices), box=SIMPLE_HEAD)
    by_stem: dict[str, list[Mapping[str, Any]]] = {}
    for operator in operators:
        by_stem.setdefault(operator["stem"], []).append(operator)
    for stem, servings in by_stem.items():
        forms = dict.fromkeys(_form(serving) for serving in servings)
        cells = [_served_by([serving for serving in servings if serving["device"] == device]) for device in devices]
        table.add_row(f"[bold]{stem}[/]", ", ".join(filter(None, forms)), *cells)
    return table


def _served_by(servings: Operators) -> Text:
    """The language of all the forms, or of each where they differ; PyTorch, which is a fallback, in yellow."""
    languages = dict.fromkeys(serving["language"] for serving in servings)
    cell = Text()
    for serving in servings if len(languages) > 1 else servings[:1]:
        form = f"{_form(serving)}: " if len(languages) > 1 and _form(serving) else ""
        style = "yellow" if serving["implementation"] == "reference" else "green"
        cell.append(", " if cell else "").append(form).append(serving["language"], style=style)
    return cell


def _form(serving: Mapping[str, Any]) -> str:
    """How an operator differs from the one its stem names: "", "backward", "in place"."""
    suffix: str = serving["operator"].removeprefix(serving["stem"])
    return "in place" if suffix == "_" else suffix.replace("_", " ").strip()


def _reasons(findings: Mapping[str, Any]) -> Iterator[Text]:
    for device, phrases in findings["because"].items():
        yield from (Text(f" on {device}: {phrase}") for phrase in phrases)


def _if_there(path: Path) -> str | None:
    return str(path) if path.exists() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
