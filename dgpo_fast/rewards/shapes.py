"""The reward of the shapes world: a verifier that looks at the pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.shapes.captions import Caption, parse_caption
from dgpo_fast.shapes.verifier import verify


class ShapesReward:
    """Metrics `soft` in [0, 1] and `strict`, 0 or 1: does the image show what its caption says?"""

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        captions = [caption_of(prompt) for prompt in prompts]
        verdicts = [verify(image, caption) for image, caption in zip(images_BCHW.cpu().numpy(), captions, strict=True)]
        return {
            "soft": [verdict.soft for verdict in verdicts],
            "strict": [float(verdict.strict) for verdict in verdicts],
        }


def caption_of(prompt: str) -> Caption:
    """What a prompt of this world asks for.

    Raises:
        UserError: it is none.
    """
    try:
        return parse_caption(prompt)
    except ValueError as error:
        raise UserError(f"rewards: shapes: {error}") from None
