from case import Case

from dgpo_fast.kernels import layer_norm_modulate
from dgpo_fast.kernels.layer_norm import ROWS_PER_SUM, row_block

WIDE = ("p_x", "p_shift", "p_scale", "p_y", "p_grad", "p_grad_x")


def case(
    name: str,
    *,
    width: int,
    stored: str = "bf16",
    aligned: bool = True,
    loads: int,
    stores: int,
    **of_backward: int,
) -> Case:
    block = row_block(width)
    kernel = layer_norm_modulate.layer_norm_modulate_kernel
    return Case(
        name=f"{name} D={width} {stored} {'aligned' if aligned else 'anywhere'}",
        kernel=layer_norm_modulate.layer_norm_modulate_backward_kernel if of_backward else kernel,
        types={**dict.fromkeys(WIDE, f"*{stored}"), "p_sums": "*fp32"},
        constants={"EPS": 1e-6, "ALIGNED": aligned, "BLOCK_D": block["BLOCK_D"], **of_backward},
        num_warps=block["num_warps"],
        loads=loads,
        stores=stores,
    )


ROW = {"SUMMED": False, "ROWS": 1}
SUM = {"SUMMED": True, "ROWS": ROWS_PER_SUM}
CASES = [
    # Eight elements of a row a thread: one access for a bfloat16 row, two for a float32, sums over rows among them.
    case("layer_norm_modulate", width=1536, loads=3, stores=1),
    case("layer_norm_modulate", width=2432, loads=3, stores=1),
    case("layer_norm_modulate", width=1536, stored="fp32", loads=6, stores=2),
    case("layer_norm_modulate", width=1536, aligned=False, loads=0, stores=0),
    case("layer_norm_modulate_backward", width=1536, loads=3, stores=1, **ROW),
    case("layer_norm_modulate_backward", width=2432, loads=3, stores=1, **ROW),
    case("layer_norm_modulate_backward summed", width=1536, loads=3, stores=1 + 2 * 2, **SUM),
    case("layer_norm_modulate_backward summed", width=2432, loads=3, stores=1 + 2 * 2, **SUM),
]
