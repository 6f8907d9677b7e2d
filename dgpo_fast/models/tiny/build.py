"""Trains the embedded pipeline from nothing: tokenizers, VAE, text encoders and, with those frozen, the transformer.

The captions are wrong for a share of the training images, so that the base model is honestly imperfect: without
guidance it draws what a caption says no more often than captions say what is drawn. That is what reinforcement learning
can mend.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dgpo_fast.models.tiny.architecture import (
    CLIP_WIDTHS,
    T5_WIDTH,
    make_clip,
    make_scheduler,
    make_t5,
    make_transformer,
    make_vae,
)
from dgpo_fast.models.tiny.reader import SpotReader, TotalReader, spots, totals
from dgpo_fast.models.tiny.tokenizers import MAX_TOKENS, train_clip_tokenizer, train_t5_tokenizer
from dgpo_fast.shapes.captions import Caption, all_captions, split_captions
from dgpo_fast.shapes.render import corrupt, render

Report = Callable[[str, int, int, float], None]
"""Called as report(stage, step, num_steps, loss) while training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What `dgpo-fast tiny build` does by default; the shipped pipeline was made with these values."""

    seed: int = 0
    num_images: int = 48_000
    wrong_captions: float = 0.28
    dropped_captions: float = 0.1
    vae_steps: int = 2000
    vae_batch: int = 16
    vae_lr: float = 4e-3
    latent_noise: float = 1.5
    text_steps: int = 1500
    text_batch: int = 128
    text_lr: float = 2e-3
    flow_steps: int = 26_000
    flow_batch: int = 32
    flow_lr: float = 1.5e-3
    flow_shift: float = 5.0
    ema_decay: float = 0.999


def build(out: Path, options: BuildOptions, report: Report) -> dict[str, object]:
    """Trains the pipeline, saves it to `out` in diffusers' format (float16), and returns what build.json records."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    pipeline = untrained_pipeline()
    images, texts = draw_dataset(options, rng)
    losses = {"vae": train_vae(pipeline.vae, images, options, report)}
    latents = encode_dataset(pipeline.vae, images)
    torch.manual_seed(options.seed)  # again, so that these stages can be repeated without the one before
    losses |= train_text_encoders(pipeline, options, report)
    losses["flow"] = train_flow(pipeline, latents, texts, options, report)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(out)
    record: dict[str, object] = {
        "command": f"dgpo-fast tiny build --seed {options.seed} --out DIR",
        "options": asdict(options),
        "duration_s": round(time.perf_counter() - start, 1),
        "losses": losses,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
    }
    (out / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def untrained_pipeline() -> StableDiffusion3Pipeline:
    """The pipeline with trained tokenizers and modules of random weights, float32, on the CPU."""
    texts = sorted(str(caption) for caption in all_captions())
    tokenizer = train_clip_tokenizer(texts, pad_token="<|endoftext|>")
    tokenizer_2 = train_clip_tokenizer(texts, pad_token="!")
    tokenizer_3 = train_t5_tokenizer(texts)
    return StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=make_scheduler(),
        vae=make_vae(),
        text_encoder=make_clip(tokenizer, CLIP_WIDTHS[0]),
        tokenizer=tokenizer,
        text_encoder_2=make_clip(tokenizer_2, CLIP_WIDTHS[1]),
        tokenizer_2=tokenizer_2,
        text_encoder_3=make_t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )


def draw_dataset(options: BuildOptions, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Images [num_images, 3, H, W] in [-1, 1] and their captions, a share of them wrong; neither shows the held-out."""
    captions = split_captions("train")
    images: list[np.ndarray] = []
    texts: list[str] = []
    for index in range(options.num_images):
        caption = captions[index % len(captions)]
        images.append(render(caption, rng))
        text = str(wrong(caption, rng) if rng.random() < options.wrong_captions else caption)
        texts.append("" if rng.random() < options.dropped_captions else text)
    stacked = torch.from_numpy(np.stack(images)).mul_(2).sub_(1)
    return stacked.contiguous(memory_format=torch.channels_last), texts  # twice as fast in a VAE on a CPU


def wrong(caption: Caption, rng: np.random.Generator) -> Caption:
    """A wrong caption that is not held out either."""
    while (candidate := corrupt(caption, rng)).held_out:
        pass
    return candidate


def train_vae(vae: AutoencoderKL, images: Tensor, options: BuildOptions, report: Report) -> list[float]:
    """Trains `vae` to reconstruct images from noisy latents, then shifts and scales its latents to unit variance.

    The noise, of up to `latent_noise` standard deviations of the latents, stands in place of the usual KL term. The KL
    term bounds the information in the latents but not their geometry: it left some colours many times closer to each
    other than others, and the transformer, which sees latents through noise, mixed them. What has to survive noise is
    kept far apart.
    """

    def loss_of(index: Tensor) -> Tensor:
        latents = vae.encode(images[index]).latent_dist.mean
        level = options.latent_noise * latents.std() * torch.rand(len(index), 1, 1, 1)
        return F.mse_loss(vae.decode(latents + level * torch.randn_like(latents)).sample, images[index])

    vae.to(memory_format=torch.channels_last).train()
    losses = train(
        "vae", vae.parameters(), loss_of, len(images), options.vae_steps, options.vae_batch, options.vae_lr, report
    )
    vae.eval().requires_grad_(False)
    sample = vae.encode(images[:1024]).latent_dist.mean
    vae.register_to_config(shift_factor=sample.mean().item(), scaling_factor=1.0 / sample.std().item())
    return losses


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The latents of `images` as the transformer sees them: shifted and scaled."""
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(256)])
    return means.sub_(vae.config.shift_factor).mul_(vae.config.scaling_factor).contiguous()


def train_text_encoders(
    pipeline: StableDiffusion3Pipeline, options: BuildOptions, report: Report
) -> dict[str, list[float]]:
    """Teaches each text encoder to read captions, and freezes it; returns its losses under its name."""
    captions = list(dict.fromkeys(split_captions("train")))
    texts = [str(caption) for caption in captions]
    losses = {}
    for name, tokenizer, reader, right in (
        ("text_encoder", pipeline.tokenizer, TotalReader(CLIP_WIDTHS[0]), totals(captions)),
        ("text_encoder_2", pipeline.tokenizer_2, TotalReader(CLIP_WIDTHS[1]), totals(captions)),
        ("text_encoder_3", pipeline.tokenizer_3, SpotReader(T5_WIDTH), spots(captions)),
    ):
        encoder = getattr(pipeline, name).train()
        loss_of = _loss_of_reading(encoder, reader, tokenize(tokenizer, texts), right)
        weights = itertools.chain(encoder.parameters(), reader.parameters())
        losses[name] = train(
            name, weights, loss_of, len(captions), options.text_steps, options.text_batch, options.text_lr, report
        )
        encoder.eval().requires_grad_(False)
    return losses


def _loss_of_reading(
    encoder: nn.Module, reader: SpotReader | TotalReader, tokens: Tensor, right: Tensor
) -> Callable[[Tensor], Tensor]:
    """A reader's loss on the first output of an encoder: CLIP's is the pooled embedding, T5's its tokens."""
    return lambda index: reader.loss(encoder(tokens[index])[0], right[index])


def train_flow(
    pipeline: StableDiffusion3Pipeline, latents: Tensor, texts: Sequence[str], options: BuildOptions, report: Report
) -> list[float]:
    """Trains the transformer on the flow-matching loss; the pipeline is left with its moving average."""
    transformer = pipeline.transformer.train()
    text, pooled, caption_of = encode_captions(pipeline, texts)
    average = torch.optim.swa_utils.AveragedModel(
        transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(options.ema_decay)
    )

    def loss_of(index: Tensor) -> Tensor:
        x0, noise = latents[index], torch.randn_like(latents[index])
        u = (torch.rand(len(index)) + torch.randperm(len(index))) / len(index)  # one in each of equal parts of [0, 1]
        sigma = options.flow_shift * u / (1 + (options.flow_shift - 1) * u)
        x_t = torch.lerp(x0, noise, sigma[:, None, None, None])
        caption = caption_of[index]
        velocity = transformer(x_t, text[caption], pooled[caption], 1000 * sigma).sample
        return F.mse_loss(velocity, noise - x0)

    losses = train(
        "flow", transformer.parameters(), loss_of, len(latents), options.flow_steps, options.flow_batch,
        options.flow_lr, report, after_step=lambda: average.update_parameters(transformer),
    )  # fmt: skip
    transformer.load_state_dict(average.module.state_dict())
    transformer.eval().requires_grad_(False)
    return losses


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Token numbers, int64 [B, MAX_TOKENS], padded as the pipeline pads them."""
    padded = tokenizer(list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = padded.input_ids
    return ids


@torch.no_grad()
def encode_captions(pipeline: StableDiffusion3Pipeline, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Text and pooled embeddings of the distinct texts, and the row of each text among them, int64 [len(texts)]."""
    distinct = list(dict.fromkeys(texts))
    text, _, pooled, _ = pipeline.encode_prompt(
        distinct, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
    )
    row = {caption: number for number, caption in enumerate(distinct)}
    return text, pooled, torch.tensor([row[caption] for caption in texts])


def train(
    stage: str,
    parameters: Iterator[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    num_examples: int,
    num_steps: int,
    batch: int,
    lr: float,
    report: Report,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Minimises `loss_of(indices)` with AdamW under a warm-up and a cosine; returns the mean loss of each twentieth."""
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warmup = max(1, num_steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
    )
    history: list[float] = []
    for step in range(num_steps):
        loss = loss_of(torch.randint(num_examples, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        after_step()
        history.append(loss.item())
        report(stage, step + 1, num_steps, history[-1])
    every = max(1, num_steps // 20)
    return [round(sum(history[i : i + every]) / len(history[i : i + every]), 5) for i in range(0, num_steps, every)]
