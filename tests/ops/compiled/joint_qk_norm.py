from case import Case

from dgpo_fast.kernels import joint_qk_norm

HEAD_SIZE = 64  # of SD3.5-M, which has 24 heads, and of SD3.5-L, which has 38


def case(stored: str, num_heads: int, *, backward: bool, with_weights: bool = False, loads: int, stores: int) -> Case:
    block_r, block_d, _, _ = joint_qk_norm.blocks(1024, 205, num_heads, HEAD_SIZE)
    kernel = joint_qk_norm.joint_qk_norm_backward_kernel if backward else joint_qk_norm.joint_qk_norm_kernel
    tensors = [name for name in kernel.arg_names if name.startswith("p_")]
    name = f"joint_qk_norm{'_backward' if backward else ''} {stored} {num_heads} heads"
    return Case(
        name=name + (" with weights" if with_weights else ""),
        kernel=kernel,
        types={**dict.fromkeys(tensors, f"*{stored}"), "p_sums": "*fp32"},
        constants={
            **{"H": num_heads, "D": HEAD_SIZE, "BLOCK_R": block_r, "BLOCK_D": block_d},
            **({"WITH_WEIGHTS": with_weights} if backward else {}),
        },
        num_warps=joint_qk_norm.NUM_WARPS,
        float32=("eps", "eps_rest"),
        loads=loads,
        stores=stores,
    )


CASES = [
    # 32 rows of 64 elements over 128 threads, 16 each: two accesses for a bfloat16 operand, four for a float32. Each of
    # the two weights takes one more: a thread reads as many of its elements as of a row at once.
    case("bf16", 24, backward=False, loads=3 * 2 + 2, stores=3 * 2),
    case("bf16", 38, backward=False, loads=3 * 2 + 2, stores=3 * 2),
    case("fp32", 24, backward=False, loads=3 * 4 + 2, stores=3 * 4),
    case("bf16", 24, backward=True, loads=5 * 2 + 2, stores=3 * 2),
    case("bf16", 38, backward=True, with_weights=True, loads=5 * 2 + 2, stores=3 * 2),
]
