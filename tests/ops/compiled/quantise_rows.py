from case import Case

from dgpo_fast.kernels.quantise_rows import quantise_rows_kernel, row_block


def case(*, width: int, stored: str = "bf16", loads: int, stores: int) -> Case:
    block = row_block(width)
    return Case(
        name=f"quantise_rows D={width} {stored}",
        kernel=quantise_rows_kernel,
        types={"p_x": f"*{stored}", "p_values": "*fp8e4nv", "p_scale": "*fp32"},
        constants={"BLOCK_D": block["BLOCK_D"]},
        num_warps=block["num_warps"],
        loads=loads,
        stores=stores,
        fp_fusion=False,
    )


CASES = [
    # Sixteen elements of a row a thread: two accesses for a bfloat16 row, four for a float32, one for fp8. 16 warps
    # hold rows of up to 8192; the MLP of SD3.5-L is 9728 wide, in a block of twice that.
    case(width=1536, loads=2, stores=1),
    case(width=2432, loads=2, stores=1),
    case(width=6144, loads=2, stores=1),
    case(width=9728, loads=4, stores=2),
    case(width=1536, stored="fp32", loads=4, stores=1),
]
