"""Joint, normalised queries and keys in Triton. Equations, arguments and checks: dgpo_fast/ops/joint_qk_norm.py.

Shape letters: B samples, N tokens, H heads, D elements of a head, P blocks of one sample: those of its image tokens,
then those of its text tokens. A row is one head of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_fast.kernels.numbers import quotient, reciprocal_root, two_parts, whole

# Elements of a block, a whole number of rows: 32 of SD3.5's heads of 64. Four warps with 16 elements a thread: two
# 16-byte accesses for each bfloat16 operand. Chosen from the machine code; not timed on a GPU yet.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def rows_of(i_block, num_image_blocks, num_image, num_text, H: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of a block, among the image's or among the text's; where they exist; whether they are the text's."""
    text = i_block >= num_image_blocks
    o_r = (i_block - tl.where(text, num_image_blocks, 0)) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    return o_r, o_r < tl.where(text, num_text, num_image) * H, text


@triton.jit
def load_rows(
    p_image, image_stride_b, image_stride_n, p_text, text_stride_b, text_stride_n,
    text, i_b, o_r, o_d, m, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows of a projection, [B, N, H D], of the image or of the text."""
    p_b = tl.where(text, p_text, p_image) + i_b * tl.where(text, text_stride_b, image_stride_b)
    stride_n = tl.where(text, text_stride_n, image_stride_n)
    return tl.load(p_b + o_r // H * stride_n + o_r % H * D + o_d, mask=m, other=0)


@triton.jit
def reciprocal_rms(b_x, eps, eps_rest, D: tl.constexpr):
    return reciprocal_root(quotient(tl.sum(b_x * b_x, 1, keep_dims=True), D) + whole(eps, eps_rest).to(b_x.dtype))


@triton.jit
def joint_qk_norm_kernel(
    p_q_image,  # [B, N_image, H D], as those of k and v
    p_k_image,
    p_v_image,
    p_q_text,  # [B, N_text, H D], as those of k and v
    p_k_text,
    p_v_text,
    p_w_q_image,  # [D], as the other weights
    p_w_k_image,
    p_w_q_text,
    p_w_k_text,
    p_q,  # [B, N_image + N_text, H, D], as k and v
    p_k,
    p_v,
    q_image_stride_b,
    q_image_stride_n,
    k_image_stride_b,
    k_image_stride_n,
    v_image_stride_b,
    v_image_stride_n,
    q_text_stride_b,
    q_text_stride_n,
    k_text_stride_b,
    k_text_stride_n,
    v_text_stride_b,
    v_text_stride_n,
    eps,
    eps_rest,
    num_image_blocks,
    num_blocks,  # P
    num_image,  # tokens
    num_text,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One grid axis: the others end at 65535. 64-bit before it meets a stride.
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_blocks
    o_r, m_r, text = rows_of(i_program % num_blocks, num_image_blocks, num_image, num_text, H, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    m = m_r & m_d
    stored = p_q.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    b_q = load_rows(
        p_q_image, q_image_stride_b, q_image_stride_n, p_q_text, q_text_stride_b, q_text_stride_n,
        text, i_b, o_r, o_d, m, H, D,
    ).to(dtype)  # fmt: skip
    b_k = load_rows(
        p_k_image, k_image_stride_b, k_image_stride_n, p_k_text, k_text_stride_b, k_text_stride_n,
        text, i_b, o_r, o_d, m, H, D,
    ).to(dtype)  # fmt: skip
    b_v = load_rows(
        p_v_image, v_image_stride_b, v_image_stride_n, p_v_text, v_text_stride_b, v_text_stride_n,
        text, i_b, o_r, o_d, m, H, D,
    )  # fmt: skip
    b_w_q = tl.load(tl.where(text, p_w_q_text, p_w_q_image) + o_d, mask=m_d).to(dtype)
    b_w_k = tl.load(tl.where(text, p_w_k_text, p_w_k_image) + o_d, mask=m_d).to(dtype)

    o_out = (i_b * (num_image + num_text) + tl.where(text, num_image, 0)) * (H * D) + o_r * D + o_d
    tl.store(p_q + o_out, (b_q * reciprocal_rms(b_q, eps, eps_rest, D) * b_w_q).to(stored), mask=m)
    tl.store(p_k + o_out, (b_k * reciprocal_rms(b_k, eps, eps_rest, D) * b_w_k).to(stored), mask=m)
    tl.store(p_v + o_out, b_v, mask=m)


@triton.jit
def normalisation_gradients(b_grad, b_x, b_w, eps, eps_rest, D: tl.constexpr):
    """Of x for each row, and of the weight, summed over the rows."""
    scale = reciprocal_rms(b_x, eps, eps_rest, D)
    b_n = b_x * scale
    b_grad_n = b_grad * b_w
    b_along = tl.sum(b_grad_n * b_n, 1, keep_dims=True) / D
    return scale * (b_grad_n - b_n * b_along), tl.sum(b_grad * b_n, 0, keep_dims=True)


@triton.jit
def joint_qk_norm_backward_kernel(
    p_grad_q,  # [B, N_image + N_text, H, D], as those of k and v
    p_grad_k,
    p_grad_v,
    p_q_image,  # [B, N_image, H D], as k
    p_k_image,
    p_q_text,  # [B, N_text, H D], as k
    p_k_text,
    p_w_q_image,  # [D], as the other weights
    p_w_k_image,
    p_w_q_text,
    p_w_k_text,
    p_grad_image,  # [B, N_image, 3 H D]: of q, of k, of v
    p_grad_text,  # [B, N_text, 3 H D]
    p_sums,  # [B, P, 2, D]: of q and of k, not written unless WITH_WEIGHTS
    q_image_stride_b,
    q_image_stride_n,
    k_image_stride_b,
    k_image_stride_n,
    q_text_stride_b,
    q_text_stride_n,
    k_text_stride_b,
    k_text_stride_n,
    eps,
    eps_rest,
    num_image_blocks,
    num_blocks,  # P
    num_image,  # tokens
    num_text,
    WITH_WEIGHTS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program // num_blocks
    o_r, m_r, text = rows_of(i_program % num_blocks, num_image_blocks, num_image, num_text, H, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    m = m_r & m_d
    stored = p_grad_q.dtype.element_ty
    dtype = tl.float64 if stored == tl.float64 else tl.float32

    o_joint = (i_b * (num_image + num_text) + tl.where(text, num_image, 0)) * (H * D) + o_r * D + o_d
    b_grad_q = tl.load(p_grad_q + o_joint, mask=m, other=0).to(dtype)
    b_grad_k = tl.load(p_grad_k + o_joint, mask=m, other=0).to(dtype)
    b_grad_v = tl.load(p_grad_v + o_joint, mask=m)
    b_q = load_rows(
        p_q_image, q_image_stride_b, q_image_stride_n, p_q_text, q_text_stride_b, q_text_stride_n,
        text, i_b, o_r, o_d, m, H, D,
    ).to(dtype)  # fmt: skip
    b_k = load_rows(
        p_k_image, k_image_stride_b, k_image_stride_n, p_k_text, k_text_stride_b, k_text_stride_n,
        text, i_b, o_r, o_d, m, H, D,
    ).to(dtype)  # fmt: skip
    b_w_q = tl.load(tl.where(text, p_w_q_text, p_w_q_image) + o_d, mask=m_d, other=0).to(dtype)
    b_w_k = tl.load(tl.where(text, p_w_k_text, p_w_k_image) + o_d, mask=m_d, other=0).to(dtype)

    b_grad_q, b_sum_q = normalisation_gradients(b_grad_q, b_q, b_w_q, eps, eps_rest, D)
    b_grad_k, b_sum_k = normalisation_gradients(b_grad_k, b_k, b_w_k, eps, eps_rest, D)
    o_out = i_b * tl.where(text, num_text, num_image) * (3 * H * D) + (2 * (o_r // H) * H + o_r) * D + o_d
    p_out = tl.where(text, p_grad_text, p_grad_image) + o_out
    tl.store(p_out, b_grad_q.to(stored), mask=m)
    tl.store(p_out + H * D, b_grad_k.to(stored), mask=m)
    tl.store(p_out + 2 * H * D, b_grad_v, mask=m)
    if WITH_WEIGHTS:
        p_sum = p_sums + i_program * 2 * D + o_d
        tl.store(p_sum, b_sum_q, mask=m_d)
        tl.store(p_sum + D, b_sum_k, mask=m_d)


def joint_qk_norm(
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor | None,
    k_text: Tensor | None,
    v_text: Tensor | None,
    w_q_image: Tensor,
    w_k_image: Tensor,
    w_q_text: Tensor | None,
    w_k_text: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The joint q, k and v; the arguments are checked by the caller."""
    image = [unit_stride(x) for x in (q_image, k_image, v_image)]
    text = with_stand_ins([q_text, k_text, v_text], image)
    weights = dense_weights(w_q_image, w_k_image, w_q_text, w_k_text)
    num_samples, num_image, width = q_image.shape
    num_text = 0 if q_text is None else q_text.shape[1]
    size = width // num_heads
    q, k, v = (q_image.new_empty(num_samples, num_image + num_text, num_heads, size) for _ in range(3))
    if q.numel() == 0:
        return q, k, v
    block_r, block_d, num_image_blocks, num_blocks = blocks(num_image, num_text, num_heads, size)
    with torch.cuda.device_of(q_image):
        joint_qk_norm_kernel[(num_samples * num_blocks,)](
            *image, *text, *weights, q, k, v, *strides(image), *strides(text),
            *two_parts(eps), num_image_blocks, num_blocks, num_image, num_text,
            H=num_heads, D=size, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return q, k, v


def joint_qk_norm_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q_image: Tensor,
    k_image: Tensor,
    q_text: Tensor | None,
    k_text: Tensor | None,
    w_q_image: Tensor,
    w_k_image: Tensor,
    w_q_text: Tensor | None,
    w_k_text: Tensor | None,
    num_heads: int,
    eps: float,
    with_weights: bool,
) -> tuple[Tensor, ...]:
    """The gradients of projections and, where asked for, of weights; the arguments are checked by the caller."""
    image = [unit_stride(x) for x in (q_image, k_image)]
    text = with_stand_ins([q_text, k_text], image)
    weights = dense_weights(w_q_image, w_k_image, w_q_text, w_k_text)
    num_samples, num_image, width = q_image.shape
    num_text = 0 if q_text is None else q_text.shape[1]
    size = width // num_heads
    grad_image = q_image.new_empty(num_samples, num_image, 3 * width)
    grad_text = q_image.new_empty(0 if q_text is None else (num_samples, num_text, 3 * width))
    block_r, block_d, num_image_blocks, num_blocks = blocks(num_image, num_text, num_heads, size)
    dtype = torch.float64 if q_image.dtype == torch.float64 else torch.float32
    sums = q_image.new_empty(num_samples, num_blocks, 2, size if with_weights else 0, dtype=dtype)
    if grad_q.numel():
        with torch.cuda.device_of(q_image):
            joint_qk_norm_backward_kernel[(num_samples * num_blocks,)](
                grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous(), *image, *text, *weights,
                grad_image, grad_text, sums, *strides(image), *strides(text),
                *two_parts(eps), num_image_blocks, num_blocks, num_image, num_text, WITH_WEIGHTS=with_weights,
                H=num_heads, D=size, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    w_q_i, w_k_i = (sums[:, :num_image_blocks, i].sum((0, 1)).to(q_image.dtype) for i in range(2))
    w_q_t, w_k_t = (sums[:, num_image_blocks:, i].sum((0, 1)).to(q_image.dtype) for i in range(2))
    if q_text is None:
        w_q_t, w_k_t = q_image.new_empty(0), q_image.new_empty(0)
    return grad_image, grad_text, w_q_i, w_k_i, w_q_t, w_k_t


def blocks(num_image: int, num_text: int, num_heads: int, size: int) -> tuple[int, int, int, int]:
    """Rows and columns of a block, and the numbers of the blocks of a sample's image tokens and of all its tokens."""
    block_d = triton.next_power_of_2(size)
    block_r = max(1, BLOCK // block_d)
    num_image_blocks = triton.cdiv(num_image * num_heads, block_r)
    return block_r, block_d, num_image_blocks, num_image_blocks + triton.cdiv(num_text * num_heads, block_r)


def unit_stride(x: Tensor) -> Tensor:
    """`x` with its last dimension dense; itself if it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_stand_ins(text: list[Tensor | None], image: list[Tensor]) -> list[Tensor]:
    """Projections of the text, or, without one, of the image in their place, of which no row is read."""
    return [of_image if x is None else unit_stride(x) for x, of_image in zip(text, image, strict=True)]


def dense_weights(
    w_q_image: Tensor, w_k_image: Tensor, w_q_text: Tensor | None, w_k_text: Tensor | None
) -> list[Tensor]:
    of_text = (w_q_image if w_q_text is None else w_q_text, w_k_image if w_k_text is None else w_k_text)
    return [weight.contiguous() for weight in (w_q_image, w_k_image, *of_text)]


def strides(projections: list[Tensor]) -> list[int]:
    """Those of samples and tokens, for each projection."""
    return [stride for x in projections for stride in x.stride()[:2]]
