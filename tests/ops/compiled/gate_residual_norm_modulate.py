from case import Case

from dgpo_fast.kernels import gate_residual_norm_modulate
from dgpo_fast.kernels.layer_norm import ROWS_PER_SUM, row_block

WIDE = (
    *("p_x", "p_y", "p_hidden", "p_normed", "p_gate", "p_shift", "p_scale"),
    *("p_grad_hidden", "p_grad_normed", "p_grad_x", "p_grad_y"),
)


def case(name: str, *, width: int, aligned: bool = True, loads: int, stores: int, **of_backward: int) -> Case:
    block = row_block(width)
    kernel = gate_residual_norm_modulate.gate_residual_norm_modulate_kernel
    backward_kernel = gate_residual_norm_modulate.gate_residual_norm_modulate_backward_kernel
    return Case(
        name=f"{name} D={width} bf16 {'aligned' if aligned else 'anywhere'}",
        kernel=backward_kernel if of_backward else kernel,
        types={**dict.fromkeys(WIDE, "*bf16"), "p_sums": "*fp32"},
        constants={"EPS": 1e-6, "ALIGNED": aligned, "BLOCK_D": block["BLOCK_D"], **of_backward},
        num_warps=block["num_warps"],
        loads=loads,
        stores=stores,
    )


ROW = {"WITH_GRAD_HIDDEN": True, "SUMMED": False, "ROWS": 1}
SUM = {"WITH_GRAD_HIDDEN": True, "SUMMED": True, "ROWS": ROWS_PER_SUM}
CASES = [
    # Eight elements of a row a thread: one access for a bfloat16 row, two for each of the three float32 sums over rows.
    case("gate_residual_norm_modulate", width=1536, loads=5, stores=2),
    case("gate_residual_norm_modulate", width=2432, loads=5, stores=2),
    case("gate_residual_norm_modulate", width=1536, aligned=False, loads=0, stores=0),
    case("gate_residual_norm_modulate_backward", width=1536, loads=5, stores=2, **ROW),
    case("gate_residual_norm_modulate_backward", width=2432, loads=5, stores=2, **ROW),
    case("gate_residual_norm_modulate_backward summed", width=1536, loads=6, stores=2 + 3 * 2, **SUM),
    case("gate_residual_norm_modulate_backward summed", width=2432, loads=6, stores=2 + 3 * 2, **SUM),
]
