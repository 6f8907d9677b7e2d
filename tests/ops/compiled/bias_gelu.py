from case import Case

from dgpo_fast.kernels import bias_gelu


def case(stored: str, *, backward: bool, with_bias: bool = False, loads: int, stores: int) -> Case:
    tile = {"BLOCK_R": bias_gelu.BLOCK_R, "BLOCK_D": bias_gelu.BLOCK_D}
    steps = {"WITH_BIAS": with_bias, "STEPS": bias_gelu.STEPS if with_bias else 1}
    return Case(
        name=f"bias_gelu{'_backward' if backward else ''} {stored}{' with bias' if with_bias else ''}",
        kernel=bias_gelu.bias_gelu_backward_kernel if backward else bias_gelu.bias_gelu_kernel,
        types={**dict.fromkeys(("p_x", "p_bias", "p_y", "p_grad", "p_grad_x"), f"*{stored}"), "p_sums": "*fp32"},
        constants={**tile, **(steps if backward else {})},
        num_warps=bias_gelu.NUM_WARPS,
        loads=loads,
        stores=stores,
    )


# The widths of SD3.5-M and SD3.5-L, 6144 and 9728, are both divisible by 16: one case stands for both.
CASES = [
    # 4 x 512 elements over 128 threads, 16 each: two accesses for a bfloat16 operand, four for a float32. The bias, 512
    # elements, takes 8 bytes a thread in bfloat16, and 16 in float32.
    case("bf16", backward=False, loads=2, stores=2),
    case("fp32", backward=False, loads=4 + 1, stores=4),
    case("bf16", backward=True, loads=2 + 2, stores=2),
    # The sums: 512 elements of float32.
    case("bf16", backward=True, with_bias=True, loads=2 + 2, stores=2 + 1),
]
