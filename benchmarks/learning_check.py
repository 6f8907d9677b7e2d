"""Whether DGPO learns as fast as it did: the second part of `make bench-check`, three minutes of one core.

    python -m benchmarks.learning_check

Trains DGPO at its chosen setting for as many iterations as judge_noise.py did, judges it from the first of the noises
that it was judged from there, and ends with status 1 where the mean score has fallen by more than `ALLOWED`. The same
code on the same processor learns the same to the bit; elsewhere roundings make another run of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import mean

from benchmarks.judge_noise import ITERATIONS, Judged, judge, policy_run, read

NOISES = 3
ALLOWED = 0.08
"""Of images: runs of other seeds differ by half of it, and one that had learnt half as fast would be 10 % behind."""


def verdict(found: Sequence[Judged], known: Sequence[Judged]) -> tuple[str, bool]:
    """A line, and whether the score has not fallen, beyond what another run of the same may be behind."""
    now, before = (mean(each.strict for each in judged) for judged in (found, known))
    is_fine = now >= before - ALLOWED
    line = (
        f"DGPO after {ITERATIONS} iterations: {now:.1%} exact, {before:.1%} recorded: "
        f"{'as fast' if is_fine else 'SLOWER'} (a loss of {100 * ALLOWED:.0f} points would be seen)"
    )
    return line, is_fine


def main() -> None:
    known = read(overrides=" ".join(policy_run().overrides))[:NOISES]
    if not known:
        sys.exit("learning_check: nothing is recorded of DGPO's setting: python -m benchmarks.judge_noise")
    line, is_fine = verdict(judge(NOISES), known)
    print(line)
    sys.exit(not is_fine)


if __name__ == "__main__":
    main()
