from case import Case

from dgpo_fast.kernels import velocity_errors

VELOCITIES = ("p_velocity", "p_old", "p_reference", "p_unconditional", "p_grad_velocity")


def case(
    name: str, *, backward: bool, drawn: bool, aligned: bool = True, others: bool = True, loads: int, stores: int
) -> Case:
    kernel = velocity_errors.velocity_errors_backward_kernel if backward else velocity_errors.velocity_errors_kernel
    return Case(
        name=name,
        kernel=kernel,
        types={
            **dict.fromkeys(VELOCITIES, "*bf16"),
            **dict.fromkeys(("p_x0", "p_sums", "p_grad_policy", "p_grad_distance"), "*fp32"),
            **{"p_group": "*i64", "p_noise": "*i64" if drawn else "*fp32"},
        },
        constants={
            **{"DRAWN": drawn, "REFERENCE": others, "GUIDED": others, "BLOCK": velocity_errors.BLOCK},
            **({} if backward else {"OLD": others, "ALIGNED": aligned}),
        },
        num_warps=velocity_errors.NUM_WARPS,
        float32=("guidance", "guidance_rest"),
        loads=loads,
        stores=stores,
    )


CASES = [
    # 1024 elements over 128 threads: one access for each bfloat16 velocity, two for the samples and for a given noise.
    case("velocity_errors given aligned", backward=False, drawn=False, loads=4 + 2 + 2, stores=0),
    case("velocity_errors drawn aligned", backward=False, drawn=True, loads=4 + 2, stores=0),
    case("velocity_errors alone aligned", backward=False, drawn=True, others=False, loads=1 + 2, stores=0),
    case("velocity_errors given anywhere", backward=False, drawn=False, aligned=False, loads=0, stores=0),
    case("velocity_errors drawn anywhere", backward=False, drawn=True, aligned=False, loads=0, stores=0),
    Case(
        name="velocity_errors_mean",
        kernel=velocity_errors.velocity_errors_mean_kernel,
        types=dict.fromkeys(("p_sums", "p_policy", "p_old", "p_reference", "p_distance"), "*fp32"),
        constants={"OLD": True, "REFERENCE": True, "BLOCK": velocity_errors.SUMS_BLOCK},
        num_warps=1,
        loads=None,
        stores=None,
    ),
    case("velocity_errors_backward drawn", backward=True, drawn=True, loads=3 + 2, stores=1),
]
