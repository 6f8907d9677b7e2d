"""A policy of LoRA adapters beside one frozen base. Looking through another view moves pointers, never a weight.

The adapters of a view live in one flat tensor, of which peft's parameters are slices; the reference has none active.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dgpo_fast.config import AdapterConfig
from dgpo_fast.errors import UserError
from dgpo_fast.models.architectures import check_targets
from dgpo_fast.models.engines import View, make_engine, sampling_engine
from dgpo_fast.models.policy import TRAINED, Average, Policy, ReadPieces
from dgpo_fast.models.projections import adapter_order
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.models.sources import clip_tokens, find_model
from dgpo_fast.ops.ema_lerp import ema_lerp_
from dgpo_fast.parallel.weights import FlatWeights, Held, TrainedWeights, cut
from dgpo_fast.records import Conditioning


class AdapterPolicy(Policy):
    """A `StableDiffusion3` with LoRA adapters, seen as `policy`, `old`, `ema` or `ref`."""

    def __init__(self, model: StableDiffusion3, config: AdapterConfig, *, seed: int) -> None:
        _inject(model, config, seed)
        self.scale = config.alpha / config.rank
        self.trained = TrainedWeights(_parameters(model, "policy"))
        self.trainable = self.trained.trainable
        self.views: dict[View, FlatWeights] = {"policy": self.trained}
        averages: tuple[Average, ...] = get_args(Average)
        for view in averages:
            self.views[view] = FlatWeights(_parameters(model, view))
            self.set_weights(view, self.trained.master)
        flats: dict[View, Tensor] = {
            "policy": self.trained.leaf,
            "old": self.views["old"].compute,
            "ema": self.views["ema"].compute,
        }
        engine = make_engine(model, config, flats)
        super().__init__(model, engine, sampling_engine(engine, model.config))

    def collect_gradient(self) -> None:
        """To be called after a backward pass, which leaves gradients in the model's dtype."""
        self.trained.collect_gradient()

    def refresh(self, *views: View) -> None:
        """To be called once masters have changed: the layers see the new weights of `views`."""
        for view in views:
            self.views[view].refresh()

    @torch.no_grad()
    def average_into(self, view: Average, *, decay: float) -> None:
        """view <- decay view + (1 - decay) policy, in float32."""
        average = self.views[view]
        ema_lerp_([average.master], [self.trainable], decay=decay)
        average.refresh()

    @torch.no_grad()
    def set_weights(self, view: View, flat: Tensor) -> None:
        """Copies `flat`, float32, all adapters in order, into `view`."""
        self.views[view].master.copy_(flat)
        self.views[view].refresh()

    def averages(self) -> dict[Average, Held]:
        return {
            view: Held(cut(self.views[view].master, 0, self.trained.shapes), is_sharded=False)
            for view in get_args(Average)
        }

    def make_ready(self, view: View) -> None:
        """Nothing: every view's adapters are there."""

    def take_ema(self, read: ReadPieces) -> None:
        read(self.averages()["ema"].pieces, self.trained.shapes)
        self.refresh("ema")

    @torch.no_grad()
    def change_norm(self) -> Tensor:
        """Of scale B A, over all layers: |B A|^2 is the sum of (A A^T) * (B^T B), which are of rank x rank values."""
        weights = [*self.trained.slices(self.trained.master).items()]
        factors: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
        a_of = {name.removesuffix(".lora_A.weight"): piece for name, piece in weights if ".lora_A." in name}
        b_of = {name.removesuffix(".lora_B.weight"): piece for name, piece in weights if ".lora_B." in name}
        for name, a in a_of.items():
            factors.setdefault((a.shape, b_of[name].shape), []).append((a, b_of[name]))
        squares = []
        for pairs in factors.values():  # those of one shape at once: a GPU is not to be given a thousand small products
            a, b = (torch.stack(each) for each in zip(*pairs, strict=True))
            squares.append(((a @ a.mT) * (b.mT @ b)).sum())
        return self.scale * torch.stack(squares).sum().clamp(min=0).sqrt()

    def save(self, directory: Path) -> None:
        self.save_lora(directory / "lora")

    def save_lora(self, directory: Path, *, view: View = "ema") -> None:
        """Writes the float32 adapters of `view` in diffusers' LoRA format.

        B has the scale, alpha / rank, in it, and the file's alpha is its rank: what reads no metadata, as ComfyUI,
        takes the two to be equal. The file names no setting that an older peft might not know: diffusers hands it all.
        """
        slices = self.views[view].slices(self.views[view].master)
        mark = re.compile(r"\.lora_([AB])\.")
        weights = {
            mark.sub(rf".lora_\1.{view}.", name): piece.contiguous() if ".lora_A." in name else self.scale * piece
            for name, piece in slices.items()
        }
        transformer = self.model.transformer
        config = transformer.peft_config[view]
        StableDiffusion3Pipeline.save_lora_weights(
            save_directory=directory,
            transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict=weights, adapter_name=view),
            transformer_lora_adapter_metadata={
                "r": config.r,
                "lora_alpha": config.r,
                "target_modules": sorted(config.target_modules),
            },
        )

    def check_trained(self) -> None:
        """Runs one sample with random adapters, forward and backward, and makes sure that each adapter matters.

        Raises:
            UserError: some adapted layer has no influence on the output (wrong targets, say), none at all has, or a
                gradient is not finite.
        """
        config, generator = self.model.transformer.config, torch.Generator().manual_seed(0)
        x_BCHW = torch.randn(1, *self.model.latent_shape, generator=generator).to(self.model.device)
        named = self.model.config
        num_tokens = clip_tokens(find_model(named.name, revision=named.version))
        # As many as in training: kernels of attention are chosen, and may fail, by that number.
        text = torch.randn(1, num_tokens + named.text_length, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
        conditioning = Conditioning(
            text_BND=text.to(self.model.device, self.model.dtype),
            pooled_BD=pooled.to(self.model.device, self.model.dtype),
        )
        timestep_B = torch.full((1,), 500.0, device=self.model.device)
        with self.equal_weights("policy"):
            velocity = self.velocity("policy", x_BCHW, timestep_B, conditioning)[0]
            if velocity.requires_grad:  # it does not where no adapter at all is computed with
                velocity.float().square().sum().backward()
        gradients = self.trained.slices(self.trained.compute_gradient)
        spoilt = [name for name, piece in gradients.items() if not piece.isfinite().all()]
        dead = [name for name, piece in gradients.items() if not piece.any()]
        self.trained.compute_gradient.zero_()
        unused = self._unused_prefix()
        if idle := [name for name in dead if not name.startswith(unused)]:
            raise UserError(f"adapter.targets: {len(idle)} adapters do not change the output, the first is {idle[0]!r}")
        if spoilt:
            raise UserError(
                f"the gradients of {len(spoilt)} adapters are not finite, the first of {spoilt[0]!r}, from finite "
                "weights: a kernel is broken here; model.attention, or model.engine eager, takes another"
            )

    @contextmanager
    def equal_weights(self, *views: View) -> Iterator[None]:
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


def _inject(model: StableDiffusion3, config: AdapterConfig, seed: int) -> None:
    """Adds the adapters of every view to the model's transformer."""
    check_targets(config.targets, [name for name, _ in model.transformer.named_modules()])
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
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
                model.transformer.add_adapter(lora, adapter_name=view)
            except ValueError as error:
                raise UserError(f"adapter.targets: {' '.join(str(error).split())}") from None


def _parameters(model: StableDiffusion3, view: View) -> dict[str, nn.Parameter]:
    """The adapters of `view`, in the order of `models/projections.py`; named as peft names them, but for the view."""
    named = sorted(model.transformer.named_parameters(), key=lambda item: adapter_order(item[0]))
    mark = re.compile(rf"\.lora_([AB])\.{view}\.")
    return {mark.sub(r".lora_\1.", name): parameter for name, parameter in named if mark.search(name)}
