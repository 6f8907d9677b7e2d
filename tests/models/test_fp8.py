"""fp8 linear layers: how far from float64 they may be, and what they do with numbers that fp8 cannot hold."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.models import fp8
from dgpo_fast.models.fp8 import Fp8Weight, fp8_linear, quantise, why_unsupported

DTYPES = (torch.bfloat16, torch.float32)
LARGEST = 448.0  # 1.75 2^8: e4m3 has no infinities, so that the last exponent holds numbers too
# A step between neighbours is 2^-3 of their power of two, so the nearest is within half of that; below 2^-6, the
# smallest normal number, the step stays 2^-9.
HALF_STEP, HALF_SUBNORMAL_STEP = 2**-4, 2**-10


def normal(*shape: int, std: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def with_outlier_channels(x: Tensor) -> Tensor:
    return x * torch.ones(x.shape[-1], dtype=x.dtype).index_fill_(0, torch.tensor([3, 40]), 100.0)


def with_unlike_tokens(x: Tensor) -> Tensor:
    return x * torch.logspace(-6, 3, len(x), dtype=x.dtype)[:, None]


def rounding_bound(x: Tensor) -> Tensor:
    """The most by which quantising moves each element of `x`, given the scale of its row, float64.

    The scale, its inverse and the product with it are rounded to float32: hence the last factor.
    """
    scale = x.double().abs().amax(1, keepdim=True) / LARGEST
    return torch.maximum(HALF_STEP * x.double().abs(), HALF_SUBNORMAL_STEP * scale) * (1 + 2**-20)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def dequantised(weight: Fp8Weight) -> Tensor:
    return weight.values_NK.double() * weight.scale_1N.double().T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [lambda x: x, with_outlier_channels, with_unlike_tokens])
def test_error_is_within_what_three_mantissa_bits_allow(dtype: torch.dtype, change: Any) -> None:
    x, weight = change(normal(48, 96, dtype=dtype)), normal(32, 96, std=0.025, seed=1, dtype=dtype)
    bias = normal(32, seed=2, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double()
    size_x, size_w, bound_x, bound_w = (
        x.double().abs(),
        weight.double().abs(),
        rounding_bound(x),
        rounding_bound(weight),
    )
    bound = (size_x + bound_x) @ (size_w + bound_w).T - size_x @ size_w.T
    # Sums of 96 float32 products, then one rounding to the dtype.
    bound += 100 * 2**-24 * (size_x @ size_w.T + bias.double().abs())
    bound += torch.finfo(dtype).eps / 2 * (exact.abs() + bound)
    assert ((fp8_linear(x, quantise(weight), bias).double() - exact).abs() <= bound).all()


def test_error_of_gaussian_numbers_is_that_of_uniform_rounding() -> None:
    # Rounding errors uniform within a step have the standard deviation 2^-3 / sqrt(12) of the power of two below the
    # number, which is between half of the number and all of it. Two independent factors: sqrt(2) of that. One mantissa
    # bit more or less would leave the interval.
    largest = 2**-3 / 6**0.5
    x, weight = normal(256, 512), normal(128, 512, std=0.025, seed=1)
    error = relative_error(fp8_linear(x, quantise(weight)), x.double() @ weight.double().T)
    assert largest / 2 < error < largest


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_error_is_the_same_on_cuda(dtype: torch.dtype) -> None:
    """Whose products are summed up with fewer digits than float32 has, but more than fp8's roundings show."""
    if (missing := why_unsupported(torch.device("cuda"))) is not None:
        pytest.skip(missing)
    x, weight = normal(256, 512, dtype=dtype).cuda(), normal(128, 512, std=0.025, seed=1, dtype=dtype).cuda()
    exact = x.double() @ weight.double().T
    assert 2**-3 / 6**0.5 / 2 < relative_error(fp8_linear(x, quantise(weight)), exact) < 2**-3 / 6**0.5


def test_a_small_token_keeps_its_digits_beside_a_large_one() -> None:
    x, weight = normal(2, 512), normal(128, 512, std=0.025, seed=1)
    x[0] *= 2.0**-20
    exact = x.double() @ weight.double().T
    errors = [
        relative_error(row, exact_row) for row, exact_row in zip(fp8_linear(x, quantise(weight)), exact, strict=True)
    ]
    assert max(errors) < 2**-3 / 6**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_fp8_holds_are_multiplied_exactly(dtype: torch.dtype) -> None:
    # Integers up to 15 have four bits, as many as e4m3 with its hidden one; the power of two leaves room for 448. That
    # largest of a row, times a power of two, makes its scale that power.
    generator = torch.Generator().manual_seed(0)
    x = 16.0 * torch.randint(-15, 16, (24, 32), generator=generator)
    weight = 16.0 * torch.randint(-15, 16, (16, 32), generator=generator)
    x[:, 0], weight[:, 5] = LARGEST, -LARGEST
    x *= 2.0 ** torch.arange(-12, 12)[:, None]
    weight *= 2.0**-12
    bias = torch.arange(16.0)
    quantised = quantise(weight.to(dtype))
    assert torch.equal(dequantised(quantised), weight.double())
    exact = x.double() @ weight.double().T + bias.double()
    assert torch.equal(fp8_linear(x.to(dtype), quantised, bias.to(dtype)), exact.to(dtype))


def test_the_largest_weight_of_each_channel_becomes_448() -> None:
    weight = normal(32, 64, std=0.025)
    quantised = quantise(weight)
    assert quantised.values_NK.dtype == torch.float8_e4m3fn and quantised.values_NK.is_contiguous()
    assert quantised.scale_1N.shape == (1, 32) and quantised.scale_1N.is_contiguous()
    torch.testing.assert_close(quantised.scale_1N[0], weight.float().abs().amax(1) / LARGEST, rtol=2**-23, atol=0)
    assert torch.equal(quantised.values_NK.float().abs().amax(1), torch.full((32,), LARGEST))
    assert ((dequantised(quantised) - weight.double()).abs() <= rounding_bound(weight)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_come_out_as_zeros_and_bias(dtype: torch.dtype) -> None:
    x, weight, bias = normal(3, 32, dtype=dtype), normal(16, 32, seed=1, dtype=dtype), normal(16, seed=2, dtype=dtype)
    x[1], weight[4] = 0, 0
    result = fp8_linear(x, quantise(weight), bias)
    assert torch.equal(result[1], bias) and torch.equal(result[:, 4], bias[4].expand(3))
    assert not torch.equal(result[0], bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2.0**-126, 1e-30, 1e30, 1e38])
def test_numbers_at_the_ends_of_float32_stay_finite_and_right(dtype: torch.dtype, size: float) -> None:
    x = torch.full((2, 64), size, dtype=dtype)
    weight = normal(16, 64, std=0.02, dtype=dtype)
    exact = x.double() @ weight.double().T
    assert ((fp8_linear(x, quantise(weight)).double() - exact).norm(dim=1) < 0.06 * exact.norm(dim=1)).all()


def test_an_infinite_activation_counts_as_the_largest_float32() -> None:
    x = normal(3, 32, dtype=torch.float32)
    saturated = x.clone()
    x[1, 4], saturated[1, 4] = -torch.inf, torch.finfo(torch.float32).min
    weight = quantise(normal(16, 32, std=0.025, seed=1, dtype=torch.float32))
    result = fp8_linear(x, weight)
    assert result.isfinite().all() and torch.equal(result, fp8_linear(saturated, weight))


def test_nan_stays_in_its_token() -> None:
    x = normal(3, 32)
    x[1, 4] = torch.nan
    result = fp8_linear(x, quantise(normal(16, 32, seed=1)))
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 32), (2, 3, 32), (2, 0, 5, 32)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape), quantise(normal(16, 32, seed=1))
    result = fp8_linear(x, weight)
    assert result.shape == (*shape[:-1], 16) and result.dtype == x.dtype
    assert torch.equal(result.reshape(-1, 16), fp8_linear(x.reshape(-1, 32), weight))


def test_strides_change_nothing() -> None:
    x, weight = normal(6, 4, 32), normal(16, 32, seed=1)
    expected = fp8_linear(x, quantise(weight))
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    inner = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(fp8_linear(transposed, quantise(weight.T.contiguous().T)), expected)
    assert torch.equal(fp8_linear(inner, quantise(weight)), expected)
    assert torch.equal(fp8_linear(x[:, 0], quantise(weight)), fp8_linear(x[:, 0].contiguous(), quantise(weight)))


def test_the_same_bits_twice() -> None:
    x, weight = normal(64, 256), normal(128, 256, std=0.025, seed=1)
    first, second = (fp8_linear(x, quantise(weight)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="_scaled_mm has one scale per tensor on the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_in_the_kernel_mean_the_same_as_scales_afterwards(dtype: torch.dtype) -> None:
    # The first is the call that CUDA gets.
    values, scale = fp8._rows(with_unlike_tokens(normal(24, 64, dtype=dtype)))
    weight, bias = quantise(normal(48, 64, std=0.025, seed=1)), normal(48, seed=2, dtype=dtype)
    inside, after = (
        scaled(values, scale, weight, bias, dtype) for scaled in (fp8._scale_in_kernel, fp8._scale_afterwards)
    )
    exact = (values.double() * scale.double()) @ dequantised(weight).T + bias.double()
    for result in (inside, after):
        # Sums of 64 float32 products, then one rounding to the dtype.
        terms = (values.double() * scale.double()).abs() @ dequantised(weight).abs().T + bias.double().abs()
        assert ((result.double() - exact).abs() <= 70 * 2**-24 * terms + torch.finfo(dtype).eps / 2 * exact.abs()).all()


def test_compiles_without_a_break() -> None:
    x, weight, bias = normal(24, 32), quantise(normal(16, 32, seed=1)), normal(16, seed=2)
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), fp8_linear(x, weight, bias))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(16, 32, dtype=torch.float64), "weight: expected torch.float32 or .*, got torch.float64"),
        (torch.zeros(16, 32, dtype=torch.int64), "weight: expected torch.float32 or .*, got torch.int64"),
        (torch.zeros(16), r"weight: expected \[outputs, inputs\], multiples of 16, got \[16\]"),
        (torch.zeros(16, 40), r"weight: .* multiples of 16, got \[16, 40\]; leave this layer in bfloat16"),
        (torch.zeros(72, 32), r"weight: .* multiples of 16, got \[72, 32\]"),
        (torch.zeros(16, 0), r"weight: .* multiples of 16, got \[16, 0\]"),
        (torch.full((16, 32), torch.inf), "weight: expected finite values"),
        (torch.full((16, 32), torch.nan), "weight: expected finite values"),
    ],
)
def test_weights_that_cannot_be_quantised(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        quantise(weight)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (
            torch.zeros(3, 32, dtype=torch.float16),
            None,
            "x: expected torch.bfloat16 or torch.float32, got torch.float16",
        ),
        (torch.zeros(3, 48), None, r"x: expected \[..., inputs\] of weight, \[3, 32\], got \[3, 48\]"),
        (torch.zeros(()), None, r"x: expected \[..., inputs\] of weight"),
        (
            torch.zeros(3, 32, device="meta", dtype=torch.bfloat16),
            None,
            "x: expected the device of weight, cpu, got meta",
        ),
        (torch.zeros(3, 32), torch.zeros(16, dtype=torch.bfloat16), "bias: expected torch.float32, got torch.bfloat16"),
        (torch.zeros(3, 32), torch.zeros(32), r"bias: expected \[outputs\] of weight, \[16\], got \[32\]"),
        (torch.zeros(3, 32, requires_grad=True), None, "x: requires a gradient, but fp8 is for rollouts only"),
    ],
)
def test_arguments_that_do_not_fit(x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        fp8_linear(x, quantise(torch.ones(16, 32)), bias)


def test_trained_weights_are_quantised_without_a_gradient() -> None:
    layer = torch.nn.Linear(32, 16)
    with torch.no_grad():
        result = fp8_linear(torch.ones(2, 32, requires_grad=True), quantise(layer.weight), layer.bias)
    assert not result.requires_grad and not quantise(layer.weight).scale_1N.requires_grad


def test_the_cpu_is_supported() -> None:
    assert why_unsupported(torch.device("cpu")) is None


def test_why_a_gpu_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    expected = "A100 has no fp8 arithmetic: compute capability 8.0, 8.9 is needed"
    assert why_unsupported(torch.device("cuda", 0)) == expected


def test_what_torch_refuses_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel\nand a long trace")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    reason = why_unsupported(torch.device("cpu"))
    assert reason is not None and re.fullmatch(r"torch \S+ cannot multiply in fp8 on cpu: no kernel", reason)
