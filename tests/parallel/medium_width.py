"""A rank of one optimizer step under ZeRO 3 with three blocks in SD3.5-Medium's width, and a checkpoint of it.

    python ranks.py 2 medium_width.py OUT

The first has a second attention; the last drops its text. OUT/expected.pt gets, from plain autograd, the weights and
gradients of a layer of each kind.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dgpo_fast.config import load_recipe
from dgpo_fast.learner import Learner
from dgpo_fast.models import training
from dgpo_fast.models.architectures import SD35_MEDIUM, VAEShape
from dgpo_fast.models.random_weights import pipeline_of_shape
from dgpo_fast.models.sd3 import StableDiffusion3
from dgpo_fast.parallel.world import World
from dgpo_fast.records import Conditioning

# None before a softmax: of nearly uniform attention, bfloat16 gradients of queries and keys are mostly rounding.
LAYERS = (
    "pos_embed.proj.weight", "context_embedder.weight", "transformer_blocks.0.attn2.to_v.weight",
    "transformer_blocks.0.norm1.linear.weight", "transformer_blocks.1.attn.add_v_proj.bias",
    "transformer_blocks.1.ff_context.net.0.proj.weight", "transformer_blocks.2.attn.to_out.0.bias", "proj_out.weight",
)  # fmt: skip


def main(out: Path) -> None:
    config = load_recipe(
        "tiny-dgpo",
        ["adapter=null", "model.engine=eager", "model.dtype=bfloat16", "model.resolution=64", "parallel.zero_stage=3",
         "parallel.gradients=bfloat16", "parallel.frozen=sharded", "optimizer.eps=1.0", "optimizer.lr=1.0",
         "optimizer.weight_decay=0", "optimizer.warmup_steps=0", "optimizer.max_grad_norm=1e9",
         "optimizer.decay_steps=null"],
    )  # fmt: skip
    world = World.from_environment(config)
    shape = replace(SD35_MEDIUM, layers=3, dual_attention_layers=(0,), pos_embed_max_size=8)  # not 0.9 GB of positions
    vae = VAEShape(block_channels=(32, 32, 32, 32), norm_groups=4)
    pipeline = pipeline_of_shape(shape, vae, dtype=torch.bfloat16, device="cpu")
    text: Any = None  # conditioning is given
    model = StableDiffusion3(pipeline, text, config.model, device=world.device)
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, *model.latent_shape, generator=generator)
    texts = (torch.randn(2, *size, generator=generator).bfloat16() for size in ((12, 4096), (2048,)))
    given = x_BCHW, torch.tensor([900.0, 300.0]), Conditioning(text_BND=next(texts), pooled_BD=next(texts))

    parameters = dict(model.transformer.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in LAYERS]
    gradients = torch.autograd.grad(model.velocity(*given).float().square().mean(), chosen)
    if world.is_first:
        weights = [parameter.detach().clone() for parameter in chosen]
        torch.save(dict(zip(LAYERS, zip(weights, gradients, strict=True), strict=True)), out / "expected.pt")

    training.load_model = lambda *arguments, **options: model  # type: ignore[assignment]
    learner = Learner(config, world)
    velocity = learner.policy.velocity("policy", *given)[0]
    learner.backward(velocity.float().square().mean() / world.size)
    learner.step(0)
    learner.policy.average_into("old", decay=0.5)
    old = learner.policy.velocity("old", *given)[0]
    assert old.isfinite().all()
    assert not torch.equal(old, velocity)
    learner.save(out, 1, {})
    torch.save([piece[:2] for piece in learner.engine.masters().pieces], out / f"pieces-{world.rank}.pt")
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
