"""Three views of one frozen base: the trained policy, its old average, the base itself; and the average that is saved.

Each view is a set of LoRA adapters beside the same base weights; the reference view has none active. Looking through
another view moves pointers, never a weight.

The adapters of a view live in one flat tensor, of which peft's parameters are slices. So an average is one lerp, the
optimizer steps one tensor, and a checkpoint writes one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dgpo_fast.config import AdapterConfig
from dgpo_fast.errors import UserError
from dgpo_fast.models.architectures import check_targets
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.ops.ema_lerp import ema_lerp_
from dgpo_fast.records import Conditioning

View = Literal["policy", "old", "ema", "ref"]
TRAINED: tuple[View, ...] = ("policy", "old", "ema")


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
        self._layers = [module for module in model.transformer.modules() if isinstance(module, LoraLayer)]
        self.views = {view: FlatAdapter(dict(self._parameters(view))) for view in TRAINED}
        for view in ("old", "ema"):
            self.set_weights(view, self.views["policy"].master)
        self._active: View | None = None
        policy = self.views["policy"]
        self.trainable = nn.Parameter(policy.master)
        """The policy's float32 masters: what the optimizer steps. Its gradient is `collect_gradient`'s."""
        self.trainable.grad = torch.zeros_like(policy.master)
        self._gradient = self.trainable.grad if policy.compute is policy.master else torch.zeros_like(policy.compute)
        for (_, parameter), piece in zip(
            self._parameters("policy"), policy.slices(self._gradient).values(), strict=True
        ):
            parameter.grad = piece

    def velocity(
        self,
        view: View,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity through `view` with the prompt, and without it where `unconditional` is given (one batch of 2B).

        Both [B, C, H, W] in the model's dtype. `unconditional` has one row, or one per sample.
        """
        self.look_through(view)
        if unconditional is None:
            return self.model.velocity(x_BCHW, timestep_B, conditioning), None
        num_samples = len(x_BCHW)
        both = Conditioning(
            text_BND=torch.cat([conditioning.text_BND, unconditional.text_BND.expand(num_samples, -1, -1)]),
            pooled_BD=torch.cat([conditioning.pooled_BD, unconditional.pooled_BD.expand(num_samples, -1)]),
        )
        v_cond, v_uncond = self.model.velocity(x_BCHW.repeat(2, 1, 1, 1), timestep_B.repeat(2), both).chunk(2)
        return v_cond, v_uncond

    def look_through(self, view: View) -> None:
        """Makes `view` the one that the transformer runs with; gradients reach the adapters of `policy` only."""
        if view == self._active:
            return
        for layer in self._layers:
            layer.set_adapter([] if view == "ref" else [view], inference_mode=view != "policy")
        self._active = view

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
        policy = self.views["policy"]
        before = policy.compute.clone()
        generator = torch.Generator().manual_seed(0)
        policy.compute.copy_(0.02 * torch.randn(len(before), generator=generator))
        config = self.model.transformer.config
        x_BCHW = torch.randn(1, *self.model.latent_shape, generator=generator).to(self.model.device)
        text = torch.randn(1, 8, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
        conditioning = Conditioning(
            text_BND=text.to(self.model.device, self.model.dtype),
            pooled_BD=pooled.to(self.model.device, self.model.dtype),
        )
        timestep_B = torch.full((1,), 500.0, device=self.model.device)
        velocity = self.velocity("policy", x_BCHW, timestep_B, conditioning)[0]
        if velocity.requires_grad:  # it does not where no adapter at all is computed with
            velocity.float().square().sum().backward()
        dead = [name for name, piece in policy.slices(self._gradient).items() if not piece.any()]
        self._gradient.zero_()
        policy.compute.copy_(before)
        unused = self._unused_prefix()
        if idle := [name for name in dead if not name.startswith(unused)]:
            raise UserError(f"adapter.targets: {len(idle)} adapters do not change the output, the first is {idle[0]!r}")

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

    def _parameters(self, view: View) -> Iterator[tuple[str, nn.Parameter]]:
        marks = {f".lora_{side}.{view}." for side in "AB"}
        for name, parameter in self.model.transformer.named_parameters():
            if any(mark in name for mark in marks):
                yield name, parameter
