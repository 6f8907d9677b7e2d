"""Three views of one frozen base: the trained policy, its old average, the base itself; and the average that is saved.

Each view is a set of LoRA adapters beside the same base weights; the reference view has none active. Looking through
another view moves pointers, never a weight.

The adapters of a view live in one flat tensor, of which peft's parameters are slices. So an average is one lerp, the
optimizer steps one tensor, and a checkpoint writes one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dgpo_fast.config import AdapterConfig
from dgpo_fast.errors import UserError
from dgpo_fast.models.architectures import check_targets
from dgpo_fast.models.engines import Conditioned, Engine, MergedEngine, View, make_engine, sampling_engine
from dgpo_fast.models.projections import adapter_order
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.ops.ema_lerp import ema_lerp_
from dgpo_fast.records import Conditioning

TRAINED: tuple[View, ...] = ("policy", "old", "ema")

MERGED_ERROR = 1e-5
"""Relative error of velocities that merged weights may have: some roundings of float32."""
ROUNDED_MARGIN = 1.5
"""Where weights are rounded too, how many times the error of those with nothing merged into them."""


class Evaluation(NamedTuple):
    """One evaluation of the transformer along a trajectory, all but the latents."""

    engine: Engine
    given: Conditioned
    is_guided: bool


class FlatAdapter:
    """The adapters of one view: float32 masters, and the copy in the model's dtype that the layers multiply with.

    In a float32 model the two are one tensor.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.compute = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        self.master = self.compute if self.compute.dtype == torch.float32 else self.compute.float()
        for parameter, piece in zip(parameters.values(), self.slices(self.compute).values(), strict=True):
            parameter.data = piece

    def slices(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` cut into the parameters' shapes, by name; views, not copies."""
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def refresh(self) -> None:
        """Rounds the masters into the compute copy: once per update."""
        if self.compute is not self.master:
            self.compute.copy_(self.master)


class Policy:
    """A `StableDiffusion3` with LoRA adapters, seen as `policy`, `old`, `ema` or `ref`."""

    def __init__(self, model: StableDiffusion3, config: AdapterConfig, *, seed: int) -> None:
        self.model = model
        self._inject(config, seed)
        self.views = {view: FlatAdapter(dict(self._parameters(view))) for view in TRAINED}
        for view in ("old", "ema"):
            self.set_weights(view, self.views["policy"].master)
        policy = self.views["policy"]
        self.trainable = nn.Parameter(policy.master)
        """The policy's float32 masters: what the optimizer steps. Its gradient is `collect_gradient`'s."""
        self.trainable.grad = torch.zeros_like(policy.master)
        self._gradient = self.trainable.grad if policy.compute is policy.master else torch.zeros_like(policy.compute)
        for (_, parameter), piece in zip(
            self._parameters("policy"), policy.slices(self._gradient).values(), strict=True
        ):
            parameter.grad = piece
        compute = self.trainable if policy.compute is policy.master else nn.Parameter(policy.compute)
        compute.grad = self._gradient
        flats: dict[View, Tensor] = {
            "policy": compute,
            "old": self.views["old"].compute,
            "ema": self.views["ema"].compute,
        }
        self.engine = make_engine(model, config, flats)
        self.sampling_engine = sampling_engine(self.engine, model.config)
        """What training samples are drawn with; errors and evaluations are of `engine`."""

    def condition(
        self,
        timestep_EB: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        *,
        guided: Sequence[bool] | None = None,
        engine: Engine | None = None,
    ) -> list[Evaluation]:
        """What the transformer knows beforehand of each of E evaluations; those that are `guided` run as a batch of 2B.

        `unconditional` has one row, or one per sample; with it, all are guided unless `guided` says which. They run on
        `engine`, the policy's own where it is None.
        """
        engine = engine or self.engine
        if unconditional is None:
            return [Evaluation(engine, given, False) for given in engine.condition(timestep_EB, conditioning)]
        num_samples = timestep_EB.shape[1]
        both = Conditioning(
            text_BND=torch.cat([conditioning.text_BND, unconditional.text_BND.expand(num_samples, -1, -1)]),
            pooled_BD=torch.cat([conditioning.pooled_BD, unconditional.pooled_BD.expand(num_samples, -1)]),
        )
        is_guided = [True] * len(timestep_EB) if guided is None else guided
        with_both = iter(engine.condition(_rows(timestep_EB, is_guided, True).repeat(1, 2), both))
        alone = iter(engine.condition(_rows(timestep_EB, is_guided, False), conditioning))
        return [Evaluation(engine, next(with_both if each else alone), each) for each in is_guided]

    def velocity_at(self, view: View, x_BCHW: Tensor, evaluation: Evaluation) -> tuple[Tensor, Tensor | None]:
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

    def collect_gradient(self) -> None:
        """Adds what the last backward pass left in the compute copy to the float32 gradient of `trainable`."""
        if self._gradient is not self.trainable.grad:
            assert self.trainable.grad is not None
            self.trainable.grad += self._gradient
            self._gradient.zero_()

    def refresh(self) -> None:
        """To be called after the optimizer's step: the layers see the new weights."""
        self.views["policy"].refresh()

    @torch.no_grad()
    def average_into(self, view: Literal["old", "ema"], *, decay: float) -> None:
        """view <- decay view + (1 - decay) policy, in float32."""
        average = self.views[view]
        ema_lerp_([average.master], [self.trainable], decay=decay)
        average.refresh()

    @torch.no_grad()
    def set_weights(self, view: View, flat: Tensor) -> None:
        """Copies `flat`, float32, all adapters in order, into `view`."""
        self.views[view].master.copy_(flat)
        self.views[view].refresh()

    @property
    def layout(self) -> str:
        """A digest of names and shapes of the adapters in their flat tensor."""
        shapes = self.views["policy"].shapes
        return hashlib.sha256(repr([(name, tuple(shape)) for name, shape in shapes.items()]).encode()).hexdigest()

    def restore(self, tensors: Mapping[str, Tensor], *, layout: str | None, views: Sequence[View] = TRAINED) -> None:
        """Takes the weights of `views` from a checkpoint's tensors, which lie as `layout` says.

        Raises:
            UserError: they lie otherwise here.
        """
        if layout != self.layout:
            raise UserError(
                "the checkpoint is of another version of dgpo-fast, peft or diffusers: its adapters lie in another "
                "order, so the run cannot go on; its lora/ directory loads anywhere"
            )
        for view in views:
            self.set_weights(view, tensors[view].to(self.model.device))

    def save_lora(self, directory: Path, *, view: View = "ema") -> None:
        """Writes the float32 adapters of `view` in diffusers' LoRA format, rank and alpha in the file's metadata."""
        adapter = self.views[view]
        weights = {name: piece.contiguous() for name, piece in adapter.slices(adapter.master).items()}
        transformer = self.model.transformer
        StableDiffusion3Pipeline.save_lora_weights(
            save_directory=directory,
            transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict=weights, adapter_name=view),
            transformer_lora_adapter_metadata=transformer.peft_config[view].to_dict(),
        )

    def check_adapters_act(self) -> None:
        """Runs one sample with random adapters, forward and backward, and makes sure that each adapter matters.

        Raises:
            UserError: some adapted layer has no influence on the output (wrong targets, say), or none at all has.
        """
        config, generator = self.model.transformer.config, torch.Generator().manual_seed(0)
        x_BCHW = torch.randn(1, *self.model.latent_shape, generator=generator).to(self.model.device)
        text = torch.randn(1, 8, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
        conditioning = Conditioning(
            text_BND=text.to(self.model.device, self.model.dtype),
            pooled_BD=pooled.to(self.model.device, self.model.dtype),
        )
        timestep_B = torch.full((1,), 500.0, device=self.model.device)
        with self.random_weights("policy"):
            velocity = self.velocity("policy", x_BCHW, timestep_B, conditioning)[0]
            if velocity.requires_grad:  # it does not where no adapter at all is computed with
                velocity.float().square().sum().backward()
        gradients = self.views["policy"].slices(self._gradient)
        dead = [name for name, piece in gradients.items() if not piece.any()]
        self._gradient.zero_()
        unused = self._unused_prefix()
        if idle := [name for name in dead if not name.startswith(unused)]:
            raise UserError(f"adapter.targets: {len(idle)} adapters do not change the output, the first is {idle[0]!r}")

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

        with self.random_weights("policy"):
            rounded, merged = error("ref"), error("policy")
        if not merged < max(MERGED_ERROR, ROUNDED_MARGIN * rounded):
            raise UserError(
                f"model.sampling: {config.drawn_with} changes velocities by {merged:.1e} in {config.dtype}, of which "
                f"rounding makes {rounded:.1e}: use same, or model.dtype float32"
            )
        dtype = str(merging.dtype).removeprefix("torch.")
        return f"samples are drawn with merged weights in {dtype}, their velocities {merged:.0e} off"

    @contextmanager
    def random_weights(self, *views: View) -> Iterator[None]:
        """Within, the layers see the same random adapters through each of `views`; masters stay as they are."""
        before = {view: self.views[view].compute.clone() for view in views}
        for view in views:
            compute = self.views[view].compute
            compute.copy_(0.02 * torch.randn(len(compute), generator=torch.Generator().manual_seed(0)))
        try:
            yield
        finally:
            for view, weights in before.items():
                self.views[view].compute.copy_(weights)

    def _unused_prefix(self) -> str:
        # The last block drops its text stream (context_pre_only), so the queries of the text are computed for nothing.
        # The published targets adapt them all the same.
        return f"transformer_blocks.{self.model.transformer.config.num_layers - 1}.attn.add_q_proj."

    def _inject(self, config: AdapterConfig, seed: int) -> None:
        check_targets(config.targets, [name for name, _ in self.model.transformer.named_modules()])
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that of the view before
            torch.manual_seed(seed)
            for view in TRAINED:
                lora = LoraConfig(
                    r=config.rank,
                    lora_alpha=config.alpha,
                    init_lora_weights="gaussian" if config.init == "gaussian" else True,
                    target_modules=list(config.targets),
                )
                try:
                    self.model.transformer.add_adapter(lora, adapter_name=view)
                except ValueError as error:
                    raise UserError(f"adapter.targets: {' '.join(str(error).split())}") from None

    def _parameters(self, view: View) -> list[tuple[str, nn.Parameter]]:
        marks = {f".lora_{side}.{view}." for side in "AB"}
        named = self.model.transformer.named_parameters()
        adapters = [(name, parameter) for name, parameter in named if any(mark in name for mark in marks)]
        return sorted(adapters, key=lambda item: adapter_order(item[0]))


def _rows(timestep_EB: Tensor, is_guided: Sequence[bool], wanted: bool) -> Tensor:
    """The evaluations that are guided, or that are not. By hand: to index with a mask would wait for the device."""
    rows = [row for row, each in zip(timestep_EB, is_guided, strict=True) if each == wanted]
    return torch.stack(rows) if rows else timestep_EB[:0]
