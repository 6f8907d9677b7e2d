"""Linear layers in fp8, for rollouts: a frozen weight quantised once, activations quantised as they come.

Both are float8 e4m3 (4 exponent bits, 3 mantissa bits, at most 448) with a float32 scale for each row: a token of the
activations, an output channel of the weight. With scales per row, the samples of a batch do not change one another, and
a token far smaller than its neighbours keeps its digits; with one scale per tensor it comes out as zero.

Relative error (Frobenius norm, against float64) of [2048, 1536] x [1536, 6144], bfloat16 values, weights of std 0.025,
torch 2.13 on a CPU; in brackets that of the worst token:

    activations                      bfloat16           fp8, scales per row     fp8, scales per tensor
    Gaussian                         0.0017 (0.0017)    0.037 (0.040)           0.038 (0.040)
    4 channels 100 times larger      0.0017 (0.0017)    0.031 (0.042)           0.038 (0.062)
    tokens times 2^N(0, 4^2)         0.0017 (0.0017)    0.037 (0.039)           0.037 (1.005)

Shape letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_fast.ops.arguments import check_device, check_dtype, check_no_gradient, check_shape
from dgpo_fast.ops.quantise_rows import quantise_rows

MULTIPLE = 16
"""Of inputs and outputs: cuBLAS and CUTLASS take fp8 matrices in pieces of 16 bytes."""
PROBED_ROWS = 3 * 205
"""As three texts of SD3.5 have: tokens are of any number, and cuBLASLt has refused one that 16 does not divide
(github.com/pytorch/pytorch/issues/167882)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A weight of a linear layer in fp8; what it stands for is `values_NK.float() * scale_1N.T`."""

    values_NK: Tensor
    """float8_e4m3fn [outputs, inputs], contiguous; its transpose is column-major, as `torch._scaled_mm` wants it."""
    scale_1N: Tensor
    """float32 [1, outputs]."""


@torch.no_grad()
def quantise(weight_NK: Tensor) -> Fp8Weight:
    """A copy of `weight_NK` in fp8, each output channel scaled so that its largest weight becomes 448.

    Weights that share an input (q, k and v) are best quantised as one, joined along their outputs.

    Args:
        weight_NK: [outputs, inputs], float32, bfloat16 or float16, both sizes multiples of 16.

    Raises:
        ValueError: another dtype or shape, or a weight that is not finite.
    """
    check_dtype("weight", weight_NK, torch.float32, torch.bfloat16, torch.float16)
    if weight_NK.dim() != 2 or any(size == 0 or size % MULTIPLE for size in weight_NK.shape):
        raise ValueError(
            f"weight: expected [outputs, inputs], multiples of {MULTIPLE}, got {list(weight_NK.shape)}; "
            "leave this layer in bfloat16"
        )
    if not weight_NK.isfinite().all():
        raise ValueError("weight: expected finite values, got infinities or NaN")
    values_NK, scale_N1 = _rows(weight_NK)
    return Fp8Weight(values_NK=values_NK, scale_1N=scale_N1.T.contiguous())


def fp8_linear(x: Tensor, weight: Fp8Weight, bias_N: Tensor | None = None) -> Tensor:
    """x weight^T + bias, [..., outputs] in the dtype of `x`, multiplied in fp8.

    Each token is scaled so that its largest activation becomes 448. An infinite activation counts as the largest
    float32, so it is no NaN that comes out; a NaN makes its token NaN. Nothing here waits for the device.

    Args:
        x: [..., inputs], bfloat16; on the CPU float32 as well.
        weight: of `quantise`.
        bias_N: [outputs], in the dtype of `x`.

    Raises:
        ValueError: a dtype, shape or device that does not fit, or a gradient that is asked for.
    """
    num_outputs, num_inputs = weight.values_NK.shape
    # Of the kernels of torch 2.11 for scales per row on CUDA, some write no other dtype than bfloat16.
    check_dtype("x", x, *((torch.bfloat16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16,)))
    check_shape("x", x, (*x.shape[:-1], num_inputs), meaning="[..., inputs] of weight")
    check_device("x", x, weight.values_NK, meaning="weight")
    if bias_N is not None:
        check_dtype("bias", bias_N, x.dtype)
        check_shape("bias", bias_N, (num_outputs,), meaning="[outputs] of weight")
        check_device("bias", bias_N, x, meaning="x")
    check_no_gradient("x", x, bias_N, reason="fp8 is for rollouts only")
    # Three dimensions are read where they lie; another number of them may take a copy.
    values, scale = quantise_rows(x if x.dim() == 3 else x.reshape(1, -1, num_inputs))
    multiply = _scale_afterwards if x.device.type == "cpu" else _scale_in_kernel
    product_MN = multiply(values.view(-1, num_inputs), scale.view(-1, 1), weight, bias_N, x.dtype)
    return product_MN.view(*x.shape[:-1], num_outputs)


def why_unsupported(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why fp8 products of activations in `dtype` cannot run on `device`, found by running one; None where they can."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has no fp8 arithmetic: compute capability {capability[0]}.{capability[1]}, 8.9 is needed"
    x = torch.ones(PROBED_ROWS, MULTIPLE, dtype=dtype, device=device)
    try:
        fp8_linear(x, quantise(x[:MULTIPLE]), x[0])
    except (RuntimeError, ValueError) as error:
        return f"torch {torch.__version__} cannot multiply in fp8 on {device}: {str(error).splitlines()[0]}"
    return None


def _rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """`x_MK` in fp8 [M, K], and the scale of each row, float32 [M, 1]."""
    values_BMK, scale_BM1 = quantise_rows(x_MK[None])
    return values_BMK[0], scale_BM1[0]


def _scale_in_kernel(
    values_MK: Tensor, scale_M1: Tensor, weight: Fp8Weight, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(
        values_MK, weight.values_NK.T, scale_M1, weight.scale_1N, bias=bias_N, out_dtype=dtype, use_fast_accum=True
    )


def _scale_afterwards(
    values_MK: Tensor, scale_M1: Tensor, weight: Fp8Weight, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same where `_scaled_mm` has one scale per tensor: CPUs, before torch 2.12 or with oneDNN's fp8."""
    one = torch.ones((), device=values_MK.device)
    product_MN = torch._scaled_mm(values_MK, weight.values_NK.T, one, one, out_dtype=torch.float32)
    product_MN *= weight.scale_1N  # first, because the large scale of a token could overflow without it
    product_MN *= scale_M1
    if bias_N is not None:
        product_MN += bias_N
    return product_MN.to(dtype)
