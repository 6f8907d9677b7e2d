"""Counted kernels, bytes and FLOPs: of programs small enough to count by hand, of every operator, of SD3.5 itself."""

from __future__ import annotations

import csv
import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention
from torch.utils.flop_counter import flop_registry

from dgpo_fast import ops
from dgpo_fast.config import PUBLISHED_TARGETS
from dgpo_fast.models.architectures import SD35_LARGE, SD35_MEDIUM, TransformerShape

ROOT = Path(__file__).resolve().parents[1]
SOME_NUMBERS_A_SAMPLE = {"bench_group_advantages", "bench_group_preference"}
SCRIPTS = sorted({f"bench_{serving.stem}" for serving in ops.serving()} - SOME_NUMBERS_A_SAMPLE)
SMALL = dataclasses.replace(
    SD35_MEDIUM, layers=2, heads=2, head_dim=8, dual_attention_layers=(0,), joint_attention_dim=24, pooled_dim=20
)


@pytest.fixture(autouse=True)
def from_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/ is no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def count(program: Callable[[], Any]) -> list[Any]:
    from benchmarks.counting import KernelCounter, meta_gpu

    with meta_gpu(), KernelCounter() as counter:
        program()
    return counter.kernels


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X, Y, ROW = on_meta(4, 8), on_meta(4, 8), on_meta(8)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (lambda: X @ on_meta(8, 3), [("aten.mm", "gemm", 4 * (32 + 24 + 12), 2 * 4 * 8 * 3)]),
        (lambda: on_meta(4, 3).addmm_(X, on_meta(8, 3)), [("aten.addmm", "gemm", 4 * (32 + 24 + 24), 192)]),
        (lambda: torch.mm(X, on_meta(8, 3), out=on_meta(4, 3)), [("aten.mm", "gemm", 4 * (32 + 24 + 12), 192)]),
        (lambda: X + ROW, [("aten.add", "add", 4 * (32 + 8 + 32), 0)]),
        (lambda: X + ROW.expand(4, 8), [("aten.add", "add", 4 * (32 + 8 + 32), 0)]),
        (lambda: X[:2] + 1, [("aten.add", "add", 4 * (16 + 16), 0)]),
        (lambda: Y.mul_(X), [("aten.mul", "mul", 4 * 3 * 32, 0)]),
        (lambda: Y.copy_(ROW), [("aten.copy", "copy", 4 * (8 + 32), 0)]),
        (lambda: Y.zero_(), [("aten.zero", "other", 4 * 32, 0)]),
        (lambda: torch.zeros(8), [("aten.zeros", "other", 4 * 8, 0)]),
        (lambda: X.bfloat16(), [("aten._to_copy", "cast", 32 * (4 + 2), 0)]),
        (lambda: torch.cat([X, Y]), [("aten.cat", "cat", 4 * 2 * 64, 0)]),
        (lambda: X.t().contiguous(), [("aten.clone", "copy", 4 * 2 * 32, 0)]),
        (lambda: (X.view(8, 4).t()[1:].expand(2, 3, 8), X.chunk(2), X.detach(), X.float()), []),
        (lambda: (torch.empty(8), torch.empty_like(X), X.new_empty(3), X.new_zeros(0)), []),
    ],
)
def test_programs_counted_by_hand(program: Callable[[], Any], expected: list[tuple[str, str, int, int]]) -> None:
    kernels = count(program)
    assert [(each.operator, each.category, each.num_bytes, each.flops) for each in kernels] == expected


def test_attention_is_one_kernel_each_way() -> None:
    q, k, v = (on_meta(2, 3, 16, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    forward, backward = count(lambda: scaled_dot_product_attention(q, k, v).backward(torch.empty_like(q)))
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert (forward.category, forward.is_backward, forward.flops) == ("attention", False, 2 * product)
    assert (backward.category, backward.is_backward, backward.flops) == ("attention", True, 5 * product)


def test_attention_of_unknown_flops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(flop_registry, torch.ops.aten._scaled_dot_product_flash_attention)
    q = on_meta(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"flash_attention.*no formula"):
        count(lambda: scaled_dot_product_attention(q, q, q))


def test_the_gradient_of_a_slice_is_zeros_and_a_copy() -> None:
    leaf = on_meta(4, 8).requires_grad_()
    zeros, copy = count(lambda: leaf[:1].backward(torch.empty(1, 8)))
    assert (zeros.operator, zeros.num_bytes) == ("aten.zeros", 4 * 32)
    assert (copy.operator, copy.category, copy.num_bytes) == ("aten.slice_backward", "copy", 4 * 2 * 8)


def test_a_gradient_belongs_to_the_module_of_its_forward() -> None:
    with torch.device("meta"):
        norm, projection = RMSNorm(8, eps=1e-6), nn.Linear(8, 8)
    x = on_meta(4, 8).requires_grad_()
    kernels = count(lambda: (projection(norm(x)) * 2).sum().backward())
    assert [(each.operator, each.category, each.module) for each in kernels if not each.is_backward] == [
        ("aten.pow", "rms norm", "RMSNorm"),
        ("aten.mean", "rms norm", "RMSNorm"),
        ("aten.add", "add", "RMSNorm"),
        ("aten.rsqrt", "rms norm", "RMSNorm"),
        ("aten.mul", "mul", "RMSNorm"),
        ("aten.mul", "mul", "RMSNorm"),
        ("aten.addmm", "gemm", "Linear"),
        ("aten.mul", "mul", ""),
        ("aten.sum", "other", ""),
        ("aten.ones_like", "other", ""),
    ]
    backward = [(each.operator, each.module) for each in kernels if each.is_backward]
    assert backward[0] == ("aten.mul", "")
    assert {module for operator, module in backward if operator == "aten.mm"} == {"Linear"}
    assert ("aten.div", "RMSNorm") in backward, "of the mean"


def test_autocast_casts_for_products_and_for_norms() -> None:
    from benchmarks.counting import CudaAutocast

    x, weight = on_meta(4, 8), on_meta(8, 8)
    half = x.bfloat16()

    def program() -> None:
        with CudaAutocast():
            assert linear(half, weight, ROW).dtype == torch.bfloat16
            assert layer_norm(half, (8,)).dtype == torch.float32
            assert (half + half).dtype == torch.bfloat16

    operators = ["_to_copy", "_to_copy", "addmm", "_to_copy", "native_layer_norm", "add"]
    assert [each.operator for each in count(program)] == [f"aten.{name}" for name in operators]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_operator_is_one_kernel_that_moves_the_bytes_of_its_formula(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formulas leave out what has some numbers a sample: here up to 2e-4 of the rest."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    known = {serving.operator for serving in ops.serving()}
    module = importlib.import_module(f"benchmarks.{script}")
    cases = [case for case in module.cases(module.SHAPES["cuda"][:1], torch.device("meta")) if case.operator in known]
    assert cases
    for case in cases:
        kernels = count(partial(getattr(torch.ops.dgpo_fast, case.operator).default, *case.arguments))
        assert [each.category for each in kernels] == [case.operator.removesuffix("_")]
        assert kernels[0].num_bytes == pytest.approx(case.num_bytes, rel=2e-4)


def test_an_operator_under_autograd_is_counted_both_ways() -> None:
    x, bias = on_meta(2, 5, 8).requires_grad_(), on_meta(8)
    forward, backward = count(lambda: ops.bias_gelu(x, bias).backward(torch.empty(2, 5, 8)))
    assert (forward.category, forward.num_bytes) == ("bias_gelu", 4 * (2 * 80 + 8))
    assert (backward.category, backward.num_bytes) == ("bias_gelu_backward", 4 * (3 * 80 + 8))
    assert (forward.is_backward, backward.is_backward) == (False, True)


@pytest.mark.parametrize(
    ("shape", "forward_tflop", "learns"),
    [
        pytest.param(SD35_MEDIUM, 2.224, True, id="medium"),
        pytest.param(SD35_LARGE, 7.176, False, id="large, forward"),
        pytest.param(SD35_LARGE, 7.176, True, id="large", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_the_flop_model_of_sd35_is_what_runs(
    engine: str, shape: TransformerShape, forward_tflop: float, learns: bool
) -> None:
    """The model counts the backward of attention without the scores that kernels compute again: 4 products of 5."""
    from benchmarks import count_engines

    kernels = count_engines.count(engine, shape, count_engines.WORK[learns], count_engines.Batch(1, 512, 205))
    tokens = shape.tokens(512, 205)
    adapters = shape.adapter_flops(tokens, PUBLISHED_TARGETS, rank=count_engines.RANK)
    counted: Counter[tuple[str, bool]] = Counter()
    for each in kernels:
        counted[each.category, each.is_backward] += each.flops

    forward = counted["gemm", False] + counted["attention", False]
    assert forward - adapters.total == pytest.approx(forward_tflop * 1e12, rel=5e-3)
    assert forward == pytest.approx((shape.forward_flops(tokens) + adapters).total, rel=5e-3)
    if learns:
        gemm, attention = shape.backward_flops(tokens, PUBLISHED_TARGETS, rank=count_engines.RANK)
        assert counted["gemm", True] == pytest.approx(gemm, rel=5e-3)
        assert counted["attention", True] * 4 / 5 == pytest.approx(attention, rel=5e-3)


def test_the_official_path_is_as_published() -> None:
    """docs and issues quote 4,753 kernels and 532 GB outside of products; a library's next version may move them."""
    from benchmarks import count_engines
    from benchmarks.counting import PRODUCTS, totals

    kernels = count_engines.count("official", SD35_MEDIUM, count_engines.WORK[0], count_engines.Batch(32, 512, 205))
    moving = totals(each for each in kernels if each.category not in PRODUCTS)
    assert len(kernels) == pytest.approx(4753, rel=0.01)
    assert moving.num_bytes == pytest.approx(532.5e9, rel=0.01)


def test_by_hand_the_transformer_moves_a_sixth() -> None:
    """README's figure: 84 GB outside of products, in 272 kernels; diffusers without autocast moves 337 in 2,299."""
    from benchmarks import count_engines
    from benchmarks.counting import PRODUCTS, totals

    for engine, num_kernels, gigabytes in (("fused", 272, 84.3), ("eager", 2299, 336.6)):
        kernels = count_engines.count(engine, SD35_MEDIUM, count_engines.WORK[0], count_engines.Batch(32, 512, 205))
        moving = totals(each for each in kernels if each.category not in PRODUCTS)
        assert moving.kernels == pytest.approx(num_kernels, rel=0.01), engine
        assert moving.num_bytes == pytest.approx(gigabytes * 1e9, rel=0.01), engine


def test_what_is_compiled_computes_as_much_and_moves_less() -> None:
    """The products of a piece of work are those of the same code as it runs; fewer kernels are between them."""
    from benchmarks import count_engines
    from benchmarks.counting import PRODUCTS, totals, totals_by

    for work in count_engines.WORK:
        eager, compiled = (
            count_engines.count(engine, SMALL, work, count_engines.Batch(2, 64, 20)) for engine in ("eager", "compile")
        )
        flops = [
            {each: sums.flops for each, sums in totals_by(_pass_and_category, ks).items()} for ks in (eager, compiled)
        ]
        assert {each: flops[1][each] for each in flops[0] if each[1] in PRODUCTS} == {
            each: flops[0][each] for each in flops[0] if each[1] in PRODUCTS
        }
        moving = [totals(each for each in ks if each.category not in PRODUCTS) for ks in (eager, compiled)]
        assert moving[1].kernels < moving[0].kernels / 2
        assert moving[1].num_bytes < moving[0].num_bytes / 2


@pytest.mark.slow
def test_compiled_the_transformer_moves_a_third() -> None:
    """README's figure: 119 GB outside of products, in 715 kernels; another version of Inductor may fuse otherwise."""
    from benchmarks import count_engines
    from benchmarks.counting import PRODUCTS, totals

    kernels = count_engines.count("compile", SD35_MEDIUM, count_engines.WORK[0], count_engines.Batch(32, 512, 205))
    moving = totals(each for each in kernels if each.category not in PRODUCTS)
    assert moving.kernels == pytest.approx(715, rel=0.05)
    assert moving.num_bytes == pytest.approx(119.2e9, rel=0.05)


def _pass_and_category(kernel: Any) -> tuple[bool, str]:
    return kernel.is_backward, kernel.category


def test_every_engine_has_its_rows_and_its_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import count_engines

    counted = {}

    def count_and_keep(engine: str, shape: TransformerShape, work: Any, batch: Any) -> list[Any]:
        counted[engine, work] = count_one(engine, shape, work, batch)
        return counted[engine, work]

    count_one = count_engines.count
    monkeypatch.setattr(count_engines, "count", count_and_keep)
    monkeypatch.setattr(count_engines, "SD35_SHAPES", {"small": SMALL})
    monkeypatch.setattr(count_engines, "ENGINES", ("official", "eager", "fused"))  # to compile takes its time
    monkeypatch.setattr("sys.argv", ["count_engines", "--out", str(tmp_path), "--batch", "2", "--resolution", "64"])
    monkeypatch.setenv("COLUMNS", "160")
    count_engines.main()
    with (tmp_path / "engines.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = capsys.readouterr().err
    assert {*counted} == {(engine, work) for engine in count_engines.ENGINES for work in count_engines.WORK}
    for (engine, work), kernels in counted.items():
        assert f"{engine}: kernels" in shown
        mine = [row for row in rows if (row["engine"], row["work"]) == (engine, work.name)]
        assert sum(int(row["kernels"]) for row in mine) == len(kernels)
        assert sum(int(row["bytes"]) for row in mine) == sum(each.num_bytes for each in kernels)
        assert sum(int(row["flops"]) for row in mine) == sum(each.flops for each in kernels)
        assert {row["pass"] for row in mine} == ({"forward", "backward"} if work.learns else {"forward"})
    columns = (
        "model engine work batch resolution text_tokens pass category module kernels bytes flops torch diffusers peft"
    )
    assert all(tuple(row) == (*columns.split(), "commit", "date") and row["commit"] and row["date"] for row in rows)
