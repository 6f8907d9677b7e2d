"""The one exception that means: the user can mend this."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a path, a checkpoint, a reward. One line that says how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """


def suggest(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known name nearest to `given`, or an empty string where none is near."""
    nearest = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
