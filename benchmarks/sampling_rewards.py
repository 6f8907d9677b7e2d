"""What sampling in lower precision does to rewards: the embedded pipeline draws images from the same noise twice.

    python -m benchmarks.sampling_rewards [--run RUN_DIR] [--out DIR] [--prompts N] [--images N]

With a run of tiny-dgpo its newest policy draws, else the base with adapters that do nothing.

For each precision of `model.sampling`, the difference of a prompt's mean reward, drawn so less drawn exactly, and its
mean over prompts with the standard error: rewards differ within noise where the mean is within two of them. Pixels are
compared too, as a root mean square.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.tables import stamp, write_rows
from dgpo_fast import rng
from dgpo_fast.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from dgpo_fast.config import load_recipe
from dgpo_fast.environment import package_versions
from dgpo_fast.flow.rollout import Sampler, sample_latents
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.prompts import load_prompts
from dgpo_fast.rewards import Scorer

COMPARED = (("float32", "bfloat16"), ("float32", "fp8"), ("bfloat16", "fp8"))
"""A model's dtype, and what its samples are drawn in."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write sampling_rewards.csv there; to stdout without it"
    )
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run of tiny-dgpo whose policy draws")
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="distinct prompts (64)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images of each (8)")
    options = parser.parse_args()
    checkpoint = load_checkpoint(list_checkpoints(options.run)[-1]) if options.run else None
    rows = (row for compared in COMPARED for row in compare(*compared, checkpoint, options.prompts, options.images))
    write_rows(options.out and options.out / "sampling_rewards.csv", rows)


def compare(
    dtype: str, sampling: str, checkpoint: Checkpoint | None, num_prompts: int, images_per_prompt: int
) -> list[dict[str, object]]:
    """A row for each metric of the reward."""
    config = load_recipe("tiny-dgpo", [f"model.dtype={dtype}", f"model.sampling={sampling}", "rollout.guidance=2"])
    assert config.adapter is not None
    policy = AdapterPolicy(load_model(config.model, device="cpu"), config.adapter, seed=0)
    if checkpoint is not None:
        weights = checkpoint.tensors("policy")
        policy.set_weights("policy", torch.cat([weights[name].flatten() for name in policy.trained.shapes]))
    prompts = load_prompts(config.prompts.test, key="prompts.test")[:num_prompts]
    names = [
        rng.stream(0, stage="benchmark", group=group, sample=sample)
        for group in range(len(prompts))
        for sample in range(images_per_prompt)
    ]
    of_prompt_B = torch.arange(len(prompts)).repeat_interleave(images_per_prompt)
    conditioning, unconditional = policy.model.encode(prompts)[of_prompt_B], policy.model.encode([""])
    noise_BCHW = rng.normal(names, policy.model.latent_shape, device=policy.model.device)
    captions = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    drawn, scores = [], []
    for engine in (policy.engine, policy.sampling_engine):
        latents = sample_latents(
            policy, "policy", Sampler.from_config(config.rollout), noise_BCHW, conditioning, unconditional,
            images_per_forward=64, engine=engine,
        )  # fmt: skip
        drawn.append(policy.model.decode(latents, images_per_forward=64))
        scores.append(Scorer(config.rewards)(drawn[-1], captions))
    pixel_rms = (drawn[1] - drawn[0]).square().mean().sqrt().item()
    rows = []
    for name in scores[0].metrics:
        exact_P, drawn_P = (s.metrics[name].view(len(prompts), -1).double().mean(1) for s in scores)
        difference_P = drawn_P - exact_P
        rows.append({
            "dtype": dtype, "sampling": sampling, "steps": checkpoint.step if checkpoint else 0, "reward": name,
            "prompts": len(prompts), "images": len(captions),
            "exact": f"{exact_P.mean():.4f}", "drawn": f"{drawn_P.mean():.4f}",
            "difference": f"{difference_P.mean():.4f}",
            "standard_error": f"{difference_P.std() / len(prompts) ** 0.5:.4f}", "pixel_rms": f"{pixel_rms:.4f}",
            "torch": package_versions()["torch"], **stamp(),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
