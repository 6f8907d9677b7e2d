"""Views of one model: the trained policy, its old average, the average that is saved, and the base it all started from.

What a view's weights are, a kind of policy decides: adapters beside a frozen base (`models/adapters.py`), or a
transformer of its own (`models/full.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.models.engines import Conditioned, Engine, MergedEngine, View
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.parallel.weights import Held, Piece, Shapes
from dgpo_fast.records import Conditioning

TRAINED: tuple[View, ...] = ("policy", "old", "ema")
Average = Literal["old", "ema"]
ReadPieces = Callable[[Sequence[Piece], Shapes], None]
"""Fills the values of pieces of parameters of these shapes."""

MERGED_ERROR = 1e-5
"""Relative error of velocities that merged weights may have: some roundings of float32."""
ROUNDED_MARGIN = 1.5
"""Where weights are rounded too, how many times the error of those with nothing merged into them."""


class ModelCall(NamedTuple):
    """One evaluation of the transformer along a trajectory, all but the latents."""

    engine: Engine
    given: Conditioned
    is_guided: bool


class Policy(ABC):
    """A `StableDiffusion3`, seen as `policy`, `old`, `ema` or `ref`.

    Args:
        engine: what errors and evaluations are computed on.
        sampling_engine: what training samples are drawn with.
    """

    ema_file: str | None = None
    """Where diffusers looks for float32 weights that are, piece by piece, those of `averages`; None if nowhere."""
    ema_constants: Mapping[str, Tensor] = MappingProxyType({})
    """What it looks for there besides."""

    def __init__(self, model: StableDiffusion3, engine: Engine, sampling_engine: Engine) -> None:
        self.model, self.engine, self.sampling_engine = model, engine, sampling_engine

    @abstractmethod
    def average_into(self, view: Average, *, decay: float) -> None:
        """view <- decay view + (1 - decay) policy, in float32."""

    @abstractmethod
    def refresh(self, *views: View) -> None:
        """To be called where masters of `views` were written: the layers see them."""

    @abstractmethod
    def make_ready(self, view: View) -> None:
        """To be called on every rank before samples are drawn through `view`, so that drawing exchanges nothing.

        Not where layers gather weights as they compute: those exchange them all the same.
        """

    @abstractmethod
    def averages(self) -> dict[Average, Held]:
        """What this rank holds, in float32, of each average. Who writes to one calls `refresh` afterwards."""

    @abstractmethod
    def take_ema(self, read: ReadPieces) -> None:
        """Shows a saved evaluation EMA, to be evaluated without training."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes the evaluation EMA as diffusers reads it; of `ema_file` all but the file itself."""

    @abstractmethod
    def change_norm(self) -> Tensor | None:
        """Frobenius norm of all that training has added to the base's weights, a float32 scalar, equal on every rank.

        None where no rank has the weights whole.
        """

    @abstractmethod
    def equal_weights(self, *views: View) -> AbstractContextManager[None]:
        """Within, the layers see the same weights through each of `views`, other than the base's if they can be."""

    @abstractmethod
    def check_trained(self) -> None:
        """Makes sure that what is trained has influence on the output.

        Raises:
            UserError: it has not.
        """

    def condition(
        self,
        timestep_EB: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        *,
        guided: Sequence[bool] | None = None,
        engine: Engine | None = None,
    ) -> list[ModelCall]:
        """What the transformer knows beforehand of each of E evaluations; those that are `guided` run as a batch of 2B.

        `unconditional` has one row, or one per sample; with it, all are guided unless `guided` says which. They run on
        `engine`, the policy's own where it is None.
        """
        engine = engine or self.engine
        if unconditional is None:
            return [ModelCall(engine, given, False) for given in engine.condition(timestep_EB, conditioning)]
        num_samples = timestep_EB.shape[1]
        both = Conditioning(
            text_BND=torch.cat([conditioning.text_BND, unconditional.text_BND.expand(num_samples, -1, -1)]),
            pooled_BD=torch.cat([conditioning.pooled_BD, unconditional.pooled_BD.expand(num_samples, -1)]),
        )
        is_guided = [True] * len(timestep_EB) if guided is None else guided
        with_both = iter(engine.condition(_rows(timestep_EB, is_guided, True).repeat(1, 2), both))
        alone = iter(engine.condition(_rows(timestep_EB, is_guided, False), conditioning))
        return [ModelCall(engine, next(with_both if each else alone), each) for each in is_guided]

    def velocity_at(self, view: View, x_BCHW: Tensor, evaluation: ModelCall) -> tuple[Tensor, Tensor | None]:
        """The velocity through `view` with the prompt, and without it where `evaluation` is guided.

        Both [B, C, H, W] in the model's dtype.
        """
        if not evaluation.is_guided:
            return evaluation.engine.velocity(view, x_BCHW, evaluation.given), None
        v_cond, v_uncond = evaluation.engine.velocity(view, x_BCHW.repeat(2, 1, 1, 1), evaluation.given).chunk(2)
        return v_cond, v_uncond

    def velocity(
        self,
        view: View,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`velocity_at` one evaluation: guided where `unconditional` is given."""
        (evaluation,) = self.condition(timestep_B[None], conditioning, unconditional)
        return self.velocity_at(view, x_BCHW, evaluation)

    @torch.no_grad()
    def check_sampling(self) -> str:
        """Makes sure that merged weights give the velocities of weights with adapters beside them, and says so.

        Raises:
            UserError: they do not, as where a bfloat16 weight loses most of what is added to it.
        """
        config, merging = self.model.config, self.sampling_engine
        if not isinstance(merging, MergedEngine):
            return f"samples are drawn with {'the base in fp8' if config.drawn_with == 'fp8' else 'the same weights'}"
        generator = torch.Generator().manual_seed(0)
        x_BCHW = torch.randn(1, *self.model.latent_shape, generator=generator).to(self.model.device)
        timestep_EB = torch.full((1, 1), 500.0, device=self.model.device)
        conditioning = self.model.encode([""])

        def error(view: View) -> float:
            exact, drawn = (
                self.velocity_at(view, x_BCHW, self.condition(timestep_EB, conditioning, engine=engine)[0])[0].float()
                for engine in (self.engine, merging)
            )
            return float((drawn - exact).norm() / exact.norm())

        with self.equal_weights("policy"):
            rounded, merged = error("ref"), error("policy")
        if not merged < max(MERGED_ERROR, ROUNDED_MARGIN * rounded):
            raise UserError(
                f"model.sampling: {config.drawn_with} changes velocities by {merged:.1e} in {config.dtype}, of which "
                f"rounding makes {rounded:.1e}: use same, or model.dtype float32"
            )
        dtype = str(merging.dtype).removeprefix("torch.")
        return f"samples are drawn with merged weights in {dtype}, their velocities {merged:.0e} off"


def _rows(timestep_EB: Tensor, is_guided: Sequence[bool], wanted: bool) -> Tensor:
    """The evaluations that are guided, or that are not. By hand: to index with a mask would wait for the device."""
    rows = [row for row, each in zip(timestep_EB, is_guided, strict=True) if each == wanted]
    return torch.stack(rows) if rows else timestep_EB[:0]
