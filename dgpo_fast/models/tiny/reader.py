"""What a text encoder has to know of a caption: which object stands on which side of the image.

"A red circle left of a blue square" has the words of its opposite, and a flow-matching loss rewards the difference so
little that a small model takes tens of thousands of steps to notice that there is one. So the T5 encoder is taught
before, by questions about captions alone, as large text encoders come trained on text.

Legend: B captions, N tokens, D width, S sides, K answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgpo_fast.shapes.captions import COLORS, SHAPES, Caption

SIDES = ("left", "right", "above", "below")
STANDS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("above", "below"),
    "below": ("below", "above"),
}
"""The sides on which the first and the second object of a relation stand."""
NOTHING = (len(COLORS), len(SHAPES))
"""The answer, a colour's and a shape's number, for a side of which the caption says nothing."""


class SideReader(nn.Module):
    """Answers from a caption's tokens, one attention and one linear map, what stands on each side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_SD = nn.Parameter(torch.randn(len(SIDES), width) * width**-0.5)
        self.key = nn.Linear(width, width)
        self.answer = nn.Linear(width, len(COLORS) + 1 + len(SHAPES) + 1)

    def forward(self, text_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the colours [B, S, colours + 1] and of the shapes [B, S, shapes + 1]; the last means nothing."""
        weight_BNS = (self.key(text_BND) @ self.query_SD.T * self.query_SD.shape[1] ** -0.5).softmax(1)
        color_BSK, shape_BSK = self.answer(weight_BNS.mT @ text_BND).split((len(COLORS) + 1, len(SHAPES) + 1), dim=-1)
        return color_BSK, shape_BSK

    def loss(self, text_BND: Tensor, answers_BS2: Tensor) -> Tensor:
        """Cross-entropy of the answers, summed over colour and shape, mean over captions and sides."""
        pairs = zip(self(text_BND), answers_BS2.unbind(-1), strict=True)
        return torch.stack([F.cross_entropy(scores.flatten(0, 1), right.flatten()) for scores, right in pairs]).sum()


def answers(captions: list[Caption]) -> Tensor:
    """The right answers, int64 [B, S, 2]: the colour's and the shape's number of what stands on each side."""
    rows = []
    for caption in captions:
        found = dict.fromkeys(SIDES, NOTHING)
        if caption.relation is not None:
            for side, item in zip(STANDS[caption.relation], caption.items, strict=True):
                found[side] = (list(COLORS).index(item.color), SHAPES.index(item.shape))
        rows.append(list(found.values()))
    return torch.tensor(rows)
