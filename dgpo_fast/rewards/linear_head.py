"""The head of LAION's aesthetic predictor, which ImageReward has too: linear layers with nothing between them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dgpo_fast.errors import UserError

LAYERS = (0, 2, 4, 6, 7)
"""Their numbers in the published Sequential. The others are dropout, which inference leaves out."""


def linear_head(state: Mapping[str, Tensor], prefix: str, *, key: str) -> nn.Sequential:
    """The head in float32: [B, width] -> [B, 1].

    Args:
        state: has its weights as PREFIX0.weight, PREFIX0.bias, PREFIX2.weight and so on.
        key: of the recipe, that names the weights' directory.

    Raises:
        UserError: a weight is missing, or does not fit the layer before.
    """
    layers: list[nn.Module] = []
    for number in LAYERS:
        weight, bias = (state.get(f"{prefix}{number}.{kind}") for kind in ("weight", "bias"))
        if weight is None or bias is None or weight.ndim != 2 or len(bias) != len(weight):
            raise UserError(f"{key}: the checkpoint has no layer {prefix}{number}; expected it as it was published")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False)
