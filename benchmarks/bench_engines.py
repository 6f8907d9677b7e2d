"""Whole engines on one recipe, interleaved in one process: correct first, then how fast, how big, and on what.

    python -m benchmarks.bench_engines [--out DIR] [--device cpu|cuda] [--model NAME] [--seconds N] [--only VARIANT ...]

On CUDA `random:sd35-medium` with the shapes of the recipe sd35m-geneval, an iteration being what each of its four GPUs
does: 2 groups of 16 images, scored by their mean brightness. On a CPU the embedded pipeline with tiny-dgpo as it is.

Variants: "published", the published loop on diffusers and peft (see published.py: in bfloat16 autocast on CUDA, float32
on a CPU), and this package's engines "eager", "compile" (on a CPU only where `--only` names it), "fused", which samples
in the model's dtype, and with samples drawn in lower precision "fused + fp8" and, on a CPU, "fused + bfloat16". Each
answers a probe first: its velocities and the gradients of its adapters, against diffusers in
float64. diffusers' own code may err as the roundings of its depth add up, the fused engine 1.2 times as far as it in
the same dtype. What errs further gets no number, and the script ends with status 1.

Then, a round at a time, each variant once, in random order: a rollout's trajectory (all solver steps of as many images
as are sampled at a time), a micro-step (noise, reference, old, policy, loss, backward), a whole iteration, beside a
large matrix product in the model's dtype. FLOPs are those of the model (models/architectures.py), the same for all
variants. Prompts are new in every iteration, and none comes from a cache on disk. DIR gets

    engines.csv            times, TFLOP/s, share of the product's, speedup over "published", peak memory
    engines_stages.csv     where an iteration's time goes, by stage
    engines_kernels.csv    where a rollout's and a micro-step's time goes: the 25 kernels (CPU: operators) with most
    engines_attention.csv  attention kernels at the recipe's shapes, forward and backward, and their errors

and without DIR the first goes to stdout. What cannot run is named with its reason, and does not stop the rest.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity

from benchmarks.console import people
from benchmarks.engine_variants import (
    BASELINE,
    SPECS,
    Answer,
    Probe,
    Published,
    Truth,
    Variant,
    num_sampled,
    share_weights,
)
from benchmarks.operator_table import provenance
from benchmarks.tables import write_rows
from dgpo_fast.algorithm_config import DGPOConfig
from dgpo_fast.config import load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.models.architectures import TransformerShape
from dgpo_fast.models.fused.attention import ATTENTIONS, Attention
from dgpo_fast.models.sources import ModelSource, find_model, transformer_shape, vae_shape
from dgpo_fast.planning import cost, text_tokens
from dgpo_fast.profiling import BACKGROUND, StageClock, use_clock

NOT_MEASURED = "not measured"
MATMUL = "matmul"
PURPOSES = (
    "text", "transformer", "solver", "vae", "reward", "reference", "old", "weights", "policy", "backward", "optimizer",
)  # fmt: skip
"""Stages of an iteration; the rest is Python, noise and loss. What the thread that decodes and scores does meanwhile is
the stage BACKGROUND, which is no part of the sum; where it is waited for, that is "reward"."""
NUM_KERNELS = 25
ROUNDINGS_PER_BLOCK = 20
"""One behind another on the way of an image token through a block; as a random walk their sum grows with the root."""
FUSED_MARGIN = 1.2
QUIET = 1.3
"""80 % quantile of a product's times over their 20 %: 1.2 on two cores that nothing else wanted, 1.5 on shared ones."""

TINY = ("steps=1", "model.prompt_cache=false", "logging.tensorboard=false")
FULL = (
    *TINY, "prompts.train=shapes:train", "prompts.test=shapes:test", "groups.per_iteration=2",
    "rewards.terms=[{name: 'benchmarks.bench_engines:MeanBrightness'}]",
)  # fmt: skip

QUANTILE_80 = 0.8416
"""Of a normal distribution: between its 20 % and 80 % lie twice as many standard deviations."""
OF_A_MEDIAN = 1.2533
"""Its standard error, in those of a mean: sqrt(pi / 2)."""

Calls = Mapping[str, Callable[[], object]]
Row = dict[str, object]


class MeanBrightness:
    """A reward that costs nothing: the published one asks a detector on another machine."""

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        brightness: list[float] = images_BCHW.mean((1, 2, 3)).tolist()
        return brightness


@dataclass(slots=True)
class Timing:
    """Of one variant at one piece of work."""

    seconds: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None  # above what was allocated before

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def speedup_over(self, baseline: Timing) -> tuple[float, float]:
        """How many times as fast as the baseline, the median of rounds in which both had their turn, and the relative
        standard error of that; NaN of fewer than three."""
        ratios = [before / after for before, after in zip(baseline.seconds, self.seconds, strict=True)]
        median = statistics.median(ratios)
        if len(ratios) < 3:
            return median, math.nan
        low, *_, high = statistics.quantiles(ratios, n=5)
        return median, OF_A_MEDIAN * (high - low) / (2 * QUANTILE_80) / math.sqrt(len(ratios)) / median

    def quantile_ms(self, fifth: int) -> float:
        if len(self.seconds) == 1:
            return 1e3 * self.seconds[0]
        return 1e3 * statistics.quantiles(self.seconds, n=5, method="inclusive")[fifth - 1]


class Bench:
    """One run of the script.

    Args:
        changes: of the recipe, `key=value`.
        seconds: for everything.
    """

    def __init__(
        self, *, model: str, device: str, out: Path | None, seconds: float, only: Sequence[str], changes: Sequence[str]
    ) -> None:
        self.device, self.out = torch.device(device), out
        self.console = people()
        self.failed = False
        self._end = time.perf_counter() + seconds
        self._recipe = "tiny-dgpo" if model == "embedded" else "sd35m-geneval"
        fixed = TINY if model == "embedded" else FULL
        self._changes = [*fixed, f"model.name={model}", f"device={device}", *changes]
        self.config = load_recipe(self._recipe, self._changes)
        self._wanted = [name for name, spec in SPECS.items() if (name in only if only else device in spec.by_default)]
        self._provenance = provenance(device, packages=("triton", "diffusers", "peft"))

    def run(self, *, only_check: bool = False) -> int:
        """The exit status."""
        with tempfile.TemporaryDirectory() as scratch:
            variants = self._build(Path(scratch), (BASELINE,))
            published = variants.get(BASELINE)
            if not isinstance(published, Published):
                self.console.print("nothing is measured: without the published loop's weights no answer can be checked")
                return 1
            # In float64, before other models lie beside it.
            probe, exact = self._truth(published)
            variants |= self._build(Path(scratch), [name for name in self._wanted if name != BASELINE])
            # The fused engine has stacked its weights, so the others take theirs from it.
            share_weights(variants.values(), list(variants.values())[-1])
            sound = self._sound(variants, probe, exact)
            if not only_check and sound:
                self._measure(sound)
        return int(self.failed)

    def _build(self, scratch: Path, names: Iterable[str]) -> dict[str, Variant]:
        variants: dict[str, Variant] = {}
        for name in names:
            try:
                variants[name] = SPECS[name].build(self._recipe, self._changes, self.device, scratch / name)
            except UserError as refused:
                self.console.print(f"{name}: left out: {refused}", markup=False)
            except Exception as raised:  # whatever a library raises: reported, and the status is 1
                self._report(name, raised)
        return variants

    def _truth(self, published: Published) -> tuple[Probe, Answer]:
        truth = Truth(published)
        probe, exact = truth.probe, truth.answer()
        del truth
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return probe, exact

    def _sound(self, variants: dict[str, Variant], probe: Probe, exact: Answer) -> dict[str, Variant]:
        """Those wanted whose answers are right."""
        errors, sound = {}, {}
        for name, variant in variants.items():
            try:
                errors[name] = _errors(variant.answer(probe), exact)
            except Exception as raised:
                self._report(name, raised)
                continue
            bound = self._bounds(name, errors)
            if all(error <= most for error, most in zip(errors[name], bound, strict=True)):
                sound[name] = variant
            self.failed |= name not in sound
            verdict = "correct" if name in sound else "WRONG, gets no number"
            parts = zip(("velocity", "gradient"), errors[name], bound, strict=True)
            said = ", ".join(f"{part} {error:.1e} of {most:.1e} allowed" for part, error, most in parts)
            self.console.print(f"{name}: {verdict}; error {said}", markup=False)
        return {name: variant for name, variant in sound.items() if name in self._wanted}

    def _bounds(self, name: str, errors: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
        dtype = torch.bfloat16 if self._multiplies_in_bfloat16(name) else torch.float32
        layers = self._shape.layers
        velocity = torch.finfo(dtype).eps * math.sqrt(ROUNDINGS_PER_BLOCK * layers)
        gradient = math.sqrt(2) * velocity  # there and back
        if name.startswith("fused") and "eager" in errors:
            slack = 8 * torch.finfo(torch.float32).eps
            velocity, gradient = (FUSED_MARGIN * error + slack for error in errors["eager"])
        if (rounding := SPECS[name].rounding) is not None:  # four products, one behind another, in a block
            velocity = rounding * math.sqrt(4 * layers)
        return velocity, gradient

    def _multiplies_in_bfloat16(self, name: str) -> bool:
        return self.device.type == "cuda" if name == BASELINE else self.config.model.dtype == "bfloat16"

    @property
    def _source(self) -> ModelSource:
        return find_model(self.config.model.name, revision=self.config.model.version)

    @property
    def _shape(self) -> TransformerShape:
        shape = transformer_shape(self._source)
        assert shape is not None
        return shape

    def _measure(self, variants: Mapping[str, Variant]) -> None:
        flops, images = self._work_flops(), self.config.images_per_iteration
        rows: list[Row] = []
        stages: list[Row] = []
        product = {MATMUL: self._matmul()}
        peak = 0.0
        for work, share in (("rollout", 0.2), ("micro_step", 0.2), ("iteration", 0.8)):
            calls: dict[str, Callable[[], object]] = {name: getattr(each, work) for name, each in variants.items()}
            timings = self._interleaved({**calls, **(product if work == "rollout" else {})}, variants, share=share)
            if MATMUL in timings:
                peak = self._matmul_flops / timings[MATMUL].median_s
                self._warn_of_company(timings[MATMUL])
            for name, timing in timings.items():
                num, flop = (0, self._matmul_flops) if name == MATMUL else flops[work]
                row = self._row(name, work, timing, timings.get(BASELINE), num=num, flop=flop, peak=peak)
                if name in variants and timing.peak_bytes is not None:
                    resident = _num_bytes(variants[name].resident())
                    row["peak_memory_gb"] = f"{(resident + timing.peak_bytes) / 1e9:.2f}"
                rows.append(row)
            self._write("engines", rows)  # what there is so far: the next piece of work takes minutes
            if work == "iteration":
                stages = list(self._stage_rows(self._staged(calls, variants, timings), images))
        if self.out is None:
            self._write_csv(None, rows)
        self._write("engines_stages", stages)
        self._show(rows, stages)
        for stem, phase in (
            ("engines_kernels", partial(self._kernel_rows, variants)),
            ("engines_attention", self._attention_rows),
        ):
            try:
                self._write(stem, list(phase()))
            except Exception as raised:
                self._report(stem, raised)

    def _warn_of_company(self, product: Timing) -> None:
        low_ms, high_ms = product.quantile_ms(1), product.quantile_ms(4)
        if high_ms > QUIET * low_ms:
            self.console.print(
                f"warning: something else runs on this machine: the same product took {low_ms:.1f} to {high_ms:.1f} ms"
            )

    def _interleaved(self, calls: Calls, variants: Mapping[str, Variant], *, share: float) -> dict[str, Timing]:
        """Each call's timing, from rounds in random order for `share` of the time that is left, and two at least."""
        timings, order = {name: Timing() for name in calls}, random.Random(0)
        for name in calls:  # warm: compiled, its memory allocated
            self._turn(name, calls, variants, timings, is_timed=False)
        rounds, start = 0, time.perf_counter()
        end = start + share * (self._end - start)
        while timings and (rounds < 2 or time.perf_counter() + (time.perf_counter() - start) / rounds < end):
            for name in order.sample(list(timings), len(timings)):
                self._turn(name, calls, variants, timings)
            rounds += 1
        return timings

    def _staged(
        self, calls: Calls, variants: Mapping[str, Variant], timings: dict[str, Timing]
    ) -> Mapping[str, Timing]:
        """Timings whose stages are right; on CUDA one more round, which waits for the device around each stage."""
        if self.device.type == "cpu":
            return timings
        exact = {name: Timing() for name in timings}
        for name in timings:
            variants[name].clock.exact = True
            self._turn(name, calls, variants, exact)
            variants[name].clock.exact = False
        return exact

    def _turn(
        self, name: str, calls: Calls, variants: Mapping[str, Variant], timings: dict[str, Timing], *,
        is_timed: bool = True,
    ) -> None:  # fmt: skip
        """One call of one variant; what fails has no timing from then on."""
        timing, on_gpu = timings[name], self.device.type == "cuda"
        clock = variants[name].clock if name in variants else None
        if clock is not None:
            clock.reset()
            use_clock(clock)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            self._synchronize()
            start = time.perf_counter()
            calls[name]()
            self._synchronize()
            seconds = time.perf_counter() - start
        except Exception as raised:
            self._report(name, raised)
            del timings[name]
            if on_gpu:
                torch.cuda.empty_cache()
            return
        if not is_timed:
            return
        timing.seconds.append(seconds)
        if clock is not None:
            timing.stages.append(_stages(clock))
        if on_gpu:
            timing.peak_bytes = max(timing.peak_bytes or 0, torch.cuda.max_memory_allocated() - before)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _work_flops(self) -> dict[str, tuple[int, float]]:
        """Images and useful FLOPs of each piece of work."""
        config, source = self.config, self._source
        whole = cost(config, source, self._shape, vae_shape(source))
        images = config.images_per_iteration
        of = {stage.name: stage.flops for stage in whole.stages}
        trained = sum(of.get(name, 0.0) for name in ("reference", "old policy", "group weights", "policy"))
        num, micro = num_sampled(config), config.optimizer.images_per_micro_batch
        assert isinstance(config.algorithm, DGPOConfig)
        return {
            "rollout": (num, of["rollout"] / images * num),
            "micro_step": (micro, trained / images / config.algorithm.train_timesteps * micro),
            "iteration": (images, whole.flops),
        }

    @property
    def _matmul_size(self) -> int:
        return 8192 if self.device.type == "cuda" else 1024

    @property
    def _matmul_flops(self) -> float:
        return 2.0 * self._matmul_size**3

    def _matmul(self) -> Callable[[], Tensor]:
        dtype = torch.bfloat16 if self.config.model.dtype == "bfloat16" else torch.float32
        a, b = torch.randn(2, self._matmul_size, self._matmul_size, device=self.device).to(dtype)
        return partial(torch.matmul, a, b)

    def _row(
        self, name: str, work: str, timing: Timing, baseline: Timing | None, *, num: int, flop: float, peak: float
    ) -> Row:
        seconds = timing.median_s
        is_variant = name != MATMUL
        speedup, error = timing.speedup_over(baseline) if is_variant and baseline else (None, None)
        return {
            "model": self.config.model.name,
            "variant": name,
            "work": work if is_variant else f"{self._matmul_size}^3",
            "images": num or "",
            "rounds": len(timing.seconds),
            "median_ms": f"{1e3 * seconds:.3f}",
            "low_ms": f"{timing.quantile_ms(1):.3f}",
            "high_ms": f"{timing.quantile_ms(4):.3f}",
            "images_per_s": f"{num / seconds:.3f}" if num else "",
            "tflop": f"{flop / 1e12:.4f}",
            "tflop_per_s": f"{flop / seconds / 1e12:.4f}",
            "share_of_matmul": f"{flop / seconds / peak:.3f}" if peak else NOT_MEASURED,
            "speedup": f"{speedup:.3f}" if speedup else "",
            "speedup_error": f"{error:.4f}" if speedup else "",
            "peak_memory_gb": NOT_MEASURED if is_variant else "",
        }

    def _stage_rows(self, timings: Mapping[str, Timing], images: int) -> Iterator[Row]:
        """Means over the faster half of the rounds, which add up and which little disturbed."""
        for name, timing in timings.items():
            fastest = sorted(zip(timing.seconds, timing.stages, strict=True), key=lambda each: each[0])
            half = fastest[: (len(fastest) + 1) // 2]
            whole = statistics.fmean(seconds for seconds, _ in half)
            means = {purpose: statistics.fmean(stages[purpose] for _, stages in half) for purpose in PURPOSES}
            means["rest"] = whole - sum(means.values())
            means[BACKGROUND] = statistics.fmean(stages[BACKGROUND] for _, stages in half)
            for purpose, seconds in means.items():
                yield {
                    "model": self.config.model.name,
                    "variant": name,
                    "stage": purpose,
                    "ms": f"{1e3 * seconds:.2f}",
                    "share": f"{seconds / whole:.4f}",
                    "images": images,
                }

    def _kernel_rows(self, variants: Mapping[str, Variant]) -> Iterator[Row]:
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        for name, variant in variants.items():
            for work in ("rollout", "micro_step"):
                with torch.profiler.profile(activities=activities) as profiler:
                    getattr(variant, work)()
                    self._synchronize()
                kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
                found = [
                    (event.key, event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
                    for event in profiler.key_averages()
                    if event.device_type == kind
                ]
                total_us = sum(us for *_, us in found)
                for key, count, us in sorted(found, key=lambda each: -each[2])[:NUM_KERNELS]:
                    yield {
                        "model": self.config.model.name,
                        "variant": name,
                        "work": work,
                        "kernel": key[:120],
                        "calls": count,
                        "ms": f"{us / 1e3:.3f}",
                        "share": f"{us / total_us:.4f}",
                    }

    def _attention_rows(self) -> Iterator[Row]:
        """Joint attention, and that of the image alone, at a micro-batch's shapes."""
        config, shape, source = self.config, self._shape, self._source
        tokens = shape.tokens(config.model.resolution, text_tokens(config, source), vae_factor=vae_shape(source).factor)
        dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
        lengths = [tokens.image + tokens.text, *([tokens.image] if shape.dual_attention_layers else [])]
        for length in lengths:
            size = (config.optimizer.images_per_micro_batch, length, shape.heads, shape.head_dim)
            inputs = [torch.randn(size, device=self.device).to(dtype) for _ in range(4)]
            few = [x[:1] for x in inputs]
            exact = _attend(ATTENTIONS["math"], *(x.double() for x in few))
            allowed = [2 * error for error in _distances(_attend(ATTENTIONS["math"], *few), exact)]
            for name, attention in ATTENTIONS.items():
                row: Row = {"attention": name, "shape": "x".join(map(str, size)), "dtype": str(dtype)[6:]}
                if (missing := attention.missing(self.device, dtype)) is not None:
                    yield {**row, "forward_ms": f"{NOT_MEASURED}: {missing}"}
                    continue
                errors = _distances(_attend(attention, *few), exact)
                floor = torch.finfo(dtype).eps
                if not all(error <= most + floor for error, most in zip(errors, allowed, strict=True)):
                    self.failed = True
                    self.console.print(f"attention {name}: WRONG: {errors}, allowed {allowed}", markup=False)
                    continue
                yield {**row, **self._attention_times(attention, inputs), "error": f"{max(errors):.2e}"}

    def _attention_times(self, attention: Attention, inputs: Sequence[Tensor]) -> Row:
        grad, q, k, v = inputs
        out, left = attention.forward(q, k, v)
        calls: Calls = {
            "forward": partial(attention.forward, q, k, v),
            "backward": partial(attention.backward, grad, q, k, v, out, left),
        }
        row: Row = {}
        for work, call in calls.items():
            call()
            times = []
            for _ in range(10):
                self._synchronize()
                start = time.perf_counter()
                call()
                self._synchronize()
                times.append(time.perf_counter() - start)
            num_samples, length, heads, size = q.shape
            # Two products of the scores' size forward, five backward (scores again, dV, dP, dQ, dK), as is usual.
            flop = (2 if work == "forward" else 5) * 2.0 * num_samples * heads * length**2 * size
            row[f"{work}_ms"] = f"{1e3 * statistics.median(times):.4f}"
            row[f"{work}_tflop_per_s"] = f"{flop / statistics.median(times) / 1e12:.3f}"
        return row

    def _write(self, stem: str, rows: Sequence[Row]) -> None:
        """To a file, if a place for it is named and there is something to say."""
        if self.out is None or not rows:
            return
        self._write_csv(self.out / f"{stem}.csv", rows)

    def _write_csv(self, path: Path | None, rows: Sequence[Row]) -> None:
        """Rows of any columns; what a row lacks is empty."""
        columns = dict.fromkeys((key for row in rows for key in row), "")
        write_rows(path, ({**columns, **row, **self._provenance} for row in rows))

    def _show(self, rows: Sequence[Row], stages: Sequence[Row]) -> None:
        columns = (
            "variant", "work", "median_ms", "low_ms", "high_ms", "rounds", "images_per_s", "speedup", "tflop_per_s",
            "share_of_matmul", "peak_memory_gb",
        )  # fmt: skip
        self.console.print(_table(columns, [[str(row.get(column, "")) for column in columns] for row in rows]))
        names = list(dict.fromkeys(str(row["variant"]) for row in stages))
        by_stage = {(row["stage"], row["variant"]): str(row["ms"]) for row in stages}
        purposes = (*PURPOSES, "rest", BACKGROUND)
        lines = [[purpose, *(by_stage[purpose, name] for name in names)] for purpose in purposes]
        self.console.print(_table(["ms of an iteration", *names], lines))

    def _report(self, what: str, raised: Exception) -> None:
        self.failed = True
        reason = str(raised).strip().partition("\n")[0]
        self.console.print(f"{what}: FAILED: {type(raised).__name__}: {reason}", markup=False)


def _stages(clock: StageClock) -> dict[str, float]:
    """Seconds by purpose, and of the background."""
    own = {path: seconds for path, seconds in clock.seconds.items() if path[0] != BACKGROUND}
    sums = {purpose: sum(seconds for path, seconds in own.items() if path[-1] == purpose) for purpose in PURPOSES}
    return {**sums, BACKGROUND: clock.seconds.get((BACKGROUND,), 0.0)}


def _errors(answer: Answer, exact: Answer) -> tuple[float, float]:
    """Relative, of velocity and gradient."""
    velocity, gradient = _distances(answer, exact)
    return velocity, gradient


def _distances(found: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    """Relative distances in the Frobenius norm; what is no number is infinitely far."""
    distances = []
    for one, other in zip(found, exact, strict=True):
        distance = float((one.double() - other.double()).norm() / other.double().norm())
        distances.append(distance if math.isfinite(distance) else math.inf)
    return distances


def _attend(attention: Attention, grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out, left = attention.forward(q, k, v)
    return [out, *attention.backward(grad, q, k, v, out, left)]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory behind `tensors` on a GPU, each piece once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.is_cuda}
    return sum(storages.values())


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in ("variant", "work", columns[0]) else "right")
    for line in lines:
        table.add_row(*line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"where to run ({default})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the tables there; one to stdout without it")
    parser.add_argument("--model", metavar="NAME", help="embedded, random:sd35-medium or random:sd35-large")
    parser.add_argument("--seconds", type=float, metavar="N", help="for all of it (440 on CUDA, 240 on a CPU)")
    parser.add_argument("--only", nargs="+", default=(), choices=tuple(SPECS), metavar="VARIANT", help=", ".join(SPECS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--check", action="store_true", help="check every variant, and time none")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    try:
        bench = Bench(
            model=options.model or ("random:sd35-medium" if on_gpu else "embedded"), device=options.device,
            out=options.out, seconds=options.seconds or (440 if on_gpu else 240), only=options.only,
            changes=options.set,
        )  # fmt: skip
        sys.exit(bench.run(only_check=options.check))
    except UserError as refused:
        sys.exit(f"bench_engines: {refused}")


if __name__ == "__main__":
    main()
