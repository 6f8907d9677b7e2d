from case import Case

from dgpo_fast.kernels import flow_interpolate


def forward(
    stored: str, *, drawn: bool, divisible: bool = True, loads: int | None = None, stores: int | None = None
) -> Case:
    return Case(
        name=f"flow_interpolate {'drawn' if drawn else 'given'} {stored}{'' if divisible else ' anywhere'}",
        kernel=flow_interpolate.flow_interpolate_kernel,
        types={
            **{name: f"*{stored}" for name in ("p_x0", "p_x_t", "p_target")},
            **{"p_sigma": "*fp32", "p_group": "*i64", "p_noise": "*i64" if drawn else f"*{stored}"},
        },
        constants={"DRAWN": drawn, "WITH_TARGET": True, "BLOCK": flow_interpolate.BLOCK},
        num_warps=flow_interpolate.NUM_WARPS,
        divisible=divisible,
        loads=loads,
        stores=stores,
    )


CASES = [
    # 1024 elements over 128 threads: two accesses for a float32 operand, one for a bfloat16.
    forward("fp32", drawn=False, loads=4, stores=4),
    forward("bf16", drawn=False, loads=2, stores=2),
    forward("fp32", drawn=True, loads=2, stores=4),
    forward("fp32", drawn=True, divisible=False),
    Case(
        name="flow_interpolate_backward fp32",
        kernel=flow_interpolate.flow_interpolate_backward_kernel,
        types=dict.fromkeys(("p_grad_x_t", "p_grad_target", "p_sigma", "p_grad_x0"), "*fp32"),
        constants={"WITH_TARGET": True, "BLOCK": flow_interpolate.BLOCK},
        num_warps=flow_interpolate.NUM_WARPS,
        loads=4,
        stores=2,
    ),
]
