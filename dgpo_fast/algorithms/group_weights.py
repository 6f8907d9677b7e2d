"""Where the weight of a group, sigmoid(s_G), no longer depends on what is learnt of the group."""

from __future__ import annotations

from torch import Tensor

SATURATED = 0.01
"""How near to 0 or 1 a weight is saturated: where its slope, w (1 - w), is below 4 % of what it is at 1/2, |s_G| > 4.6.

Near 0 the group teaches nothing more. Near 1 the policy prefers what scored worse, and is pulled back with the same
weight however far it went."""


def is_saturated(weight_G: Tensor) -> Tensor:
    """Whether each weight is below `SATURATED` or above 1 - `SATURATED`: bool [G]."""
    return (weight_G < SATURATED) | (weight_G > 1 - SATURATED)
