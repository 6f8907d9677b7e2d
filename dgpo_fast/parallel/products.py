"""torch's own linear product, for what is not sharded.

Under stage 3 DeepSpeed replaces `torch.nn.functional.linear` in the whole process, so that no gathered weight is kept
for the backward pass. Its product rounds bfloat16 otherwise. What transformers compute must all be made by one of the
two, or equal policies would differ; what text encoders compute must not depend on how the transformer is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import functional

_usual = functional.linear  # this module is imported before any DeepSpeed engine is made


@contextmanager
def usual_products() -> Iterator[None]:
    """Within, `torch.nn.functional.linear` is torch's, in every thread."""
    replaced = functional.linear
    functional.linear = _usual
    try:
        yield
    finally:
        functional.linear = replaced
