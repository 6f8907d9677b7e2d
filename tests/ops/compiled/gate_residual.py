from case import Case

from dgpo_fast.kernels import gate_residual
from dgpo_fast.kernels.layer_norm import ROWS_PER_SUM, row_block

WIDE = ("p_x", "p_y", "p_gate", "p_hidden", "p_grad", "p_grad_y")


def case(name: str, *, width: int, loads: int, stores: int, **of_backward: int) -> Case:
    block = row_block(width)
    return Case(
        name=f"{name} D={width} bf16",
        kernel=gate_residual.gate_residual_backward_kernel if of_backward else gate_residual.gate_residual_kernel,
        types={**dict.fromkeys(WIDE, "*bf16"), "p_sums": "*fp32"},
        constants={"BLOCK_D": block["BLOCK_D"], **of_backward},
        num_warps=block["num_warps"],
        loads=loads,
        stores=stores,
    )


ROW = {"SUMMED": False, "ROWS": 1}
SUM = {"SUMMED": True, "ROWS": ROWS_PER_SUM}
CASES = [
    # Eight elements of a row a thread: one access for a bfloat16 row, two for the float32 sum over rows.
    case("gate_residual", width=1536, loads=3, stores=1),
    case("gate_residual", width=2432, loads=3, stores=1),
    case("gate_residual_backward", width=1536, loads=2, stores=1, **ROW),
    case("gate_residual_backward", width=2432, loads=2, stores=1, **ROW),
    case("gate_residual_backward summed", width=1536, loads=3, stores=1 + 2, **SUM),
    case("gate_residual_backward summed", width=2432, loads=3, stores=1 + 2, **SUM),
]
