"""Kernels, bytes and FLOPs of the transformer in each engine, counted without a GPU and without its weights.

    python -m benchmarks.count_engines [--out DIR] [--batch N] [--resolution PIXELS] [--text-tokens N]

The table goes to stderr; the rows go as CSV to DIR/engines.csv, or to stdout where no DIR is named: one for each model,
engine, piece of work, pass, category and module. Two pieces of work: a "rollout forward" of the batch, without
gradients, and a "micro-step", forward and backward to the adapters, whose gradients are added to those of the
micro-step before. The transformer alone: neither loss nor solver, optimizer or averages. With guidance a batch is half
as many images.

"official" is how the published scripts of DGPO and Flow-GRPO run it: a float32 base under bfloat16 autocast, with
adapters of peft. "eager", "compile" and "fused" are dgpo_fast's engines of these names, in bfloat16 without autocast;
fused with checkpointing "selective", and its modulation, which a rollout computes once for all steps, counted in each
forward; compile as Inductor plans its blocks for a CPU (see counting_compiled.py), which takes some minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from rich.table import Table
from torch import Tensor, nn

from benchmarks import counting_compiled
from benchmarks.console import people
from benchmarks.counting import PRODUCTS, CudaAutocast, Kernel, KernelCounter, Totals, meta_gpu, totals, totals_by
from benchmarks.tables import stamp, write_rows
from dgpo_fast.config import PUBLISHED_TARGETS
from dgpo_fast.environment import package_versions
from dgpo_fast.models.architectures import SD35_SHAPES, TransformerShape
from dgpo_fast.models.fused.attention import ATTENTIONS
from dgpo_fast.models.fused.transformer import FusedTransformer
from dgpo_fast.records import Conditioning

RANK = 64

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_BCHW, timestep_B, text_BND, pooled_BD) -> velocity [B, C, H, W]; all in bfloat16 but the timesteps, float32."""


def official(shape: TransformerShape) -> Velocity:
    transformer = adapted_transformer(shape, torch.float32)

    def velocity(*inputs: Tensor) -> Tensor:
        with CudaAutocast():
            return run(transformer, *inputs)

    return velocity


def eager(shape: TransformerShape) -> Velocity:
    return partial(run, adapted_transformer(shape, torch.bfloat16))


def fused(shape: TransformerShape) -> Velocity:
    transformer = FusedTransformer(
        adapted_transformer(shape, torch.bfloat16), attention=ATTENTIONS["flash"], checkpointing="selective",
        rank=RANK, scaling=1.0,
    )  # fmt: skip
    flat = torch.empty(sum(block.num_adapter_values for block in transformer.blocks), dtype=torch.bfloat16)
    flat.requires_grad_().grad = torch.empty_like(flat)
    adapted = transformer.adapted(flat)

    def velocity(x_BCHW: Tensor, timestep_B: Tensor, text_BND: Tensor, pooled_BD: Tensor) -> Tensor:
        conditioning = Conditioning(text_BND=text_BND, pooled_BD=pooled_BD)
        (conditioned,) = transformer.condition(timestep_B[None], conditioning)
        return transformer.velocity(x_BCHW, conditioned, adapted)

    return velocity


VELOCITIES: Mapping[str, Callable[[TransformerShape], Velocity]] = {
    "official": official, "eager": eager, "fused": fused,
}  # fmt: skip
"""Engines that are counted as they run, by the function that builds their velocity from a shape: called within
`meta_gpu`, so that all it makes is on "meta", with adapters of rank RANK that learn."""
ENGINES = ("official", "eager", "compile", "fused")


class Work(NamedTuple):
    """What is counted."""

    name: str
    learns: bool


WORK = (Work("rollout forward", learns=False), Work("micro-step", learns=True))


class Batch(NamedTuple):
    """Sizes of one forward."""

    samples: int
    resolution: int
    text_tokens: int


def adapted_transformer(shape: TransformerShape, dtype: torch.dtype) -> SD3Transformer2DModel:
    """The frozen transformer with trainable adapters that have a gradient already; to be called within `meta_gpu`."""
    transformer = SD3Transformer2DModel(**shape.to_config()).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PUBLISHED_TARGETS)))
    nn.Module.to(transformer, dtype)  # diffusers' own warns of modules to keep in float32, of which there are none
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return transformer


def run(
    transformer: SD3Transformer2DModel, x_BCHW: Tensor, timestep_B: Tensor, text_BND: Tensor, pooled_BD: Tensor
) -> Tensor:
    """One forward of diffusers' transformer."""
    return transformer(  # type: ignore[no-any-return]
        hidden_states=x_BCHW,
        encoder_hidden_states=text_BND,
        pooled_projections=pooled_BD,
        timestep=timestep_B,
        return_dict=False,
    )[0]


def count(engine: str, shape: TransformerShape, work: Work, batch: Batch) -> list[Kernel]:
    """What an engine launches for a piece of work."""
    if engine != "compile":
        return _count_running(VELOCITIES[engine], shape, work, batch)
    return [
        *_count_running(_around_blocks, shape, work, batch),
        *counting_compiled.count_blocks(
            shape, partial(adapted_transformer, dtype=torch.bfloat16), batch.samples,
            shape.tokens(batch.resolution, batch.text_tokens), learns=work.learns,
        ),
    ]  # fmt: skip


class _NoBlock(nn.Module):
    """In the place of all blocks: its output is where a gradient ends."""

    def forward(self, *, hidden_states: Tensor, **_: Any) -> tuple[None, Tensor]:
        return None, hidden_states.detach().requires_grad_(torch.is_grad_enabled())


def _around_blocks(shape: TransformerShape) -> Velocity:
    transformer = adapted_transformer(shape, torch.bfloat16)
    transformer.transformer_blocks = nn.ModuleList([_NoBlock()])
    return partial(run, transformer)


def _count_running(
    engine: Callable[[TransformerShape], Velocity], shape: TransformerShape, work: Work, batch: Batch
) -> list[Kernel]:
    side = batch.resolution // 8
    with meta_gpu():
        velocity_of = engine(shape)
        x_BCHW = torch.empty(batch.samples, shape.channels, side, side, dtype=torch.bfloat16)
        text_BND = torch.empty(batch.samples, batch.text_tokens, shape.joint_attention_dim, dtype=torch.bfloat16)
        pooled_BD = torch.empty(batch.samples, shape.pooled_dim, dtype=torch.bfloat16)
        timestep_B = torch.empty(batch.samples)
        with KernelCounter() as counter, nullcontext() if work.learns else torch.no_grad():
            velocity_BCHW = velocity_of(x_BCHW, timestep_B, text_BND, pooled_BD)
            if work.learns:
                velocity_BCHW.backward(torch.empty_like(velocity_BCHW))
    return counter.kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write engines.csv there; to stdout without it")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="samples of a forward (32)")
    parser.add_argument("--resolution", type=int, default=512, metavar="PIXELS", help="side of the images (512)")
    parser.add_argument("--text-tokens", type=int, default=205, metavar="N", help="tokens of a prompt (205)")
    options = parser.parse_args()
    batch = Batch(options.batch, options.resolution, options.text_tokens)
    write_rows(options.out and options.out / "engines.csv", _counted(batch))


def _counted(batch: Batch) -> Iterator[dict[str, object]]:
    """The rows of the table; what people read of a model is shown once its rows are there."""
    console, provenance = people(), _provenance()
    sizes = {"batch": batch.samples, "resolution": batch.resolution, "text_tokens": batch.text_tokens}
    for model, shape in SD35_SHAPES.items():
        counted = {(engine, work): count(engine, shape, work, batch) for work, engine in product(WORK, ENGINES)}
        for (engine, work), kernels in counted.items():
            named = {"model": model, "engine": engine, "work": work.name, **sizes}
            yield from ({**named, **row, **provenance} for row in _rows(kernels))
        for work in WORK:
            console.print(_table(model, work, batch, {engine: counted[engine, work] for engine in ENGINES}))


def _rows(kernels: list[Kernel]) -> Iterator[dict[str, object]]:
    parts = totals_by(lambda kernel: (kernel.is_backward, kernel.category, kernel.module), kernels)
    for (is_backward, category, module), sums in parts.items():
        yield {
            "pass": "backward" if is_backward else "forward",
            "category": category,
            "module": module,
            "kernels": sums.kernels,
            "bytes": sums.num_bytes,
            "flops": sums.flops,
        }


def _provenance() -> dict[str, str]:
    versions = package_versions()
    packages = {name: versions[name] for name in ("torch", "diffusers", "peft")}
    return {**packages, **stamp()}


def _table(model: str, work: Work, batch: Batch, counted: Mapping[str, list[Kernel]]) -> Table:
    """Kernels and gigabytes by what they do, and the gigabytes outside of products by the modules that they are in."""
    title = f"{model}, {work.name}: {batch.samples} x {batch.resolution} px, {batch.text_tokens} text tokens"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(min_width=37, no_wrap=True)
    for engine in counted:
        table.add_column(f"{engine}: kernels", justify="right", min_width=17)
        table.add_column("GB", justify="right", min_width=8)
        table.add_column("TFLOP a sample", justify="right")

    def add(label: str, sums: Mapping[str, Totals], style: str = "") -> None:
        cells = [cell for engine in counted for cell in _cells(sums.get(engine), batch.samples)]
        table.add_row(label, *cells, style=style)

    def add_all(key: Callable[[Kernel], str], kernels: Mapping[str, list[Kernel]]) -> None:
        sums = {engine: totals_by(key, each) for engine, each in kernels.items()}
        for name in dict.fromkeys(name for each in sums.values() for name in each):
            add(name, {engine: each[name] for engine, each in sums.items() if name in each})

    moving = {
        engine: [each for each in kernels if each.category not in PRODUCTS] for engine, kernels in counted.items()
    }
    add("all", {engine: totals(kernels) for engine, kernels in counted.items()}, "bold")
    add_all(lambda kernel: kernel.category, counted)
    add("outside gemm and attention", {engine: totals(kernels) for engine, kernels in moving.items()}, "bold")
    add_all(lambda kernel: f"in {kernel.module}" if kernel.module else "in no module", moving)
    return table


def _cells(sums: Totals | None, num_samples: int) -> tuple[str, str, str]:
    if sums is None:
        return "", "", ""
    tflop = f"{sums.flops / num_samples / 1e12:.3f}" if sums.flops else ""
    return f"{sums.kernels:,}", f"{sums.num_bytes / 1e9:.2f}", tflop


if __name__ == "__main__":
    main()
