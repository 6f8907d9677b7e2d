"""What the guard has found."""

from __future__ import annotations

from typing import NamedTuple


class Breach(NamedTuple):
    """A rule that a run has broken: what was seen, in words, and the first step of which."""

    what: str
    since: int


class Finding(NamedTuple):
    """A breach that has just begun."""

    step: int
    name: str
    """Of the rule."""
    since: int
    what: str
    advice: tuple[str, ...]
    """`key=value (now ...)` for a new run, those first that help most."""
    action: str
    """What was done: `guard.action`, or `warn` where it does not apply."""

    @property
    def line(self) -> str:
        """For the person who watches."""
        done = "; the learning rate is halved" if self.action == "lower_lr" else ""
        helps = f"; what helps in a new run: {', '.join(self.advice)}" if self.advice else ""
        return f"guard, step {self.step}: {self.what}, since step {self.since}{done}{helps}"
