"""What recipes name of users' own: `package.module:Name`."""

from __future__ import annotations

import importlib
from typing import Any


def imported(target: str) -> Any:
    """The object of that name.

    Raises:
        Exception: whatever its module raises while it is imported; AttributeError where it has no such name.
    """
    module_name, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module_name), attribute)
