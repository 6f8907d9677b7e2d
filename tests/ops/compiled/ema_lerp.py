import triton.language as tl
from case import Case

from dgpo_fast.kernels import ema_lerp


def case(value: str, tensors: int, *, loads: int) -> Case:
    return Case(
        name=f"ema_lerp {value} of {tensors}",
        kernel=ema_lerp.ema_lerp_kernel,
        types=dict.fromkeys(("p_first_program", "p_average", "p_value", "p_numel"), "*i64"),
        constants={
            **{"AVERAGE": tl.float32, "VALUE": {"fp32": tl.float32, "bf16": tl.bfloat16}[value]},
            **{"NEAR_AVERAGE": True, "ALIGNED": True, "TENSORS": tensors},
            **{"CHUNKS": ema_lerp.CHUNKS, "BLOCK": ema_lerp.BLOCK},
        },
        num_warps=ema_lerp.NUM_WARPS,
        float32=("weight", "weight_rest"),
        loads=loads,
        stores=2 * ema_lerp.CHUNKS,
    )


CASES = [
    # 1024 elements over 128 threads, in each of four chunks: two accesses for a float32 operand, one for a bfloat16.
    # The table is read 8 bytes at a time, since the number of tensors has no divisor.
    case("fp32", 1, loads=4 * (2 + 2)),
    case("bf16", 512, loads=4 * (2 + 1)),
]
