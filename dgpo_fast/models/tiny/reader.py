"""What the text encoders have to know of a caption, taught by questions about captions alone and then frozen.

Stable Diffusion 3's text encoders come trained on text. These start from nothing, and a flow-matching loss would teach
them slowly: "a red circle left of a blue square" has the words of its opposite, and telling the two apart improves that
loss so little that a small model takes tens of thousands of steps to begin.

T5, whose tokens the transformer attends to, learns what stands where; the CLIP encoders, whose pooled embedding steers
the transformer as a whole, learn how much there is of each colour and of each shape.

Legend: B captions, N tokens, D width, S spots, K answers, W words (the colours, then the shapes).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgpo_fast.shapes.captions import COLORS, COUNTS, SHAPES, Caption

SPOTS = ("left", "right", "above", "below", "first", "second")
"""Where a caption puts its objects: on a side, or, when it leaves that open, first and second as they are named."""
SPOTS_OF = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("above", "below"),
    "below": ("below", "above"),
    None: ("first", "second"),
}
"""The spots of the first and the second item of a caption, by its relation."""
NOTHING = (0, len(COLORS), len(SHAPES))
"""The answer, a number of objects with those of their colour and their shape, for a spot a caption leaves empty."""
NUM_ANSWERS = (1 + max(COUNTS), len(COLORS) + 1, len(SHAPES) + 1)


class SpotReader(nn.Module):
    """Answers from a caption's tokens, by one attention and one linear map: how many of what stand on each spot?"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_SD = nn.Parameter(torch.randn(len(SPOTS), width) * width**-0.5)
        self.key = nn.Linear(width, width)
        self.answer = nn.Linear(width, sum(NUM_ANSWERS))

    def forward(self, text_BND: Tensor) -> tuple[Tensor, ...]:
        """Scores of the numbers, the colours and the shapes: three times [B, S, K]."""
        weight_BNS = (self.key(text_BND) @ self.query_SD.T * self.query_SD.shape[1] ** -0.5).softmax(1)
        return self.answer(weight_BNS.mT @ text_BND).split(NUM_ANSWERS, dim=-1)  # type: ignore[no-any-return]

    def loss(self, text_BND: Tensor, right_BS3: Tensor) -> Tensor:
        """Cross-entropy of the answers: summed over number, colour and shape, mean over captions and spots."""
        scores = zip(self(text_BND), right_BS3.unbind(-1), strict=True)
        return torch.stack([F.cross_entropy(score.flatten(0, 1), right.flatten()) for score, right in scores]).sum()


class TotalReader(nn.Module):
    """Answers from a caption's pooled embedding, by one linear map: how many objects of each colour and each shape?"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.answer = nn.Linear(width, (len(COLORS) + len(SHAPES)) * (1 + max(COUNTS)))

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Scores of the numbers for each word, [B, W, K]."""
        scores_BWK: Tensor = self.answer(pooled_BD).unflatten(-1, (-1, 1 + max(COUNTS)))
        return scores_BWK

    def loss(self, pooled_BD: Tensor, right_BW: Tensor) -> Tensor:
        """Cross-entropy of the answers, mean over captions and words."""
        return F.cross_entropy(self(pooled_BD).flatten(0, 1), right_BW.flatten())


def spots(captions: list[Caption]) -> Tensor:
    """The right answers of a `SpotReader`, int64 [B, S, 3]: how many objects, of which colour and shape."""
    rows = []
    for caption in captions:
        found = dict.fromkeys(SPOTS, NOTHING)
        for spot, item in zip(SPOTS_OF[caption.relation], caption.items, strict=False):  # one item has no second spot
            found[spot] = (item.count, list(COLORS).index(item.color), SHAPES.index(item.shape))
        rows.append(list(found.values()))
    return torch.tensor(rows)


def totals(captions: list[Caption]) -> Tensor:
    """The right answers of a `TotalReader`, int64 [B, W]: how many objects of each colour, then of each shape."""
    return torch.tensor(
        [
            [
                sum(item.count for item in caption.items if word in (item.color, item.shape))
                for word in (*COLORS, *SHAPES)
            ]
            for caption in captions
        ]
    )
