"""What watches a run for silent collapse. Everything here is a pure function of what was logged; no torch."""

from dgpo_fast.guard.findings import Finding
from dgpo_fast.guard.guard import STOPPED, Guard

__all__ = ["STOPPED", "Finding", "Guard"]
