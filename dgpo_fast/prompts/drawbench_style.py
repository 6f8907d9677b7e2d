"""Prompts for evaluations out of domain: this package's own, in the manner of DrawBench."""

from __future__ import annotations

import json
from pathlib import Path

from dgpo_fast.records import Prompt

DRAWBENCH_STYLE = "drawbench-style:test"
FILE = Path(__file__).parents[1] / "assets" / "prompts" / "drawbench-style.jsonl"


def drawbench_style_prompts() -> list[str]:
    """64 prompts, each with its `category`: eight in each of eight of DrawBench's (Imagen, arXiv 2205.11487)."""
    lines = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    return [Prompt(known.pop("prompt"), known) for known in lines]
