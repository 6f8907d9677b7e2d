from case import Case

from dgpo_fast.kernels import sde_step

SAMPLES = ("p_x", "p_x_next", "p_mean", "p_sums", "p_grad_mean", "p_grad_log_prob", "p_log_prob", "p_coefficients")


def case(name: str, kernel: object, constants: dict[str, object], *, drawn: bool, loads: int, stores: int) -> Case:
    return Case(
        name=name,
        kernel=kernel,
        types={
            **dict.fromkeys(SAMPLES, "*fp32"),
            **dict.fromkeys(("p_velocity", "p_grad_velocity"), "*bf16"),
            **{"p_group": "*i64", "p_noise": "*i64" if drawn else "*fp32"},
        },
        constants=constants,
        num_warps=1 if "log_prob" in name else sde_step.NUM_WARPS,
        loads=loads,
        stores=stores,
    )


def forward(source: str, *, aligned: bool = True, with_mean: bool, loads: int, stores: int) -> Case:
    constants = {"GIVEN": source == "given", "DRAWN": source == "drawn", "WITH_MEAN": with_mean}
    return case(
        f"sde_step {source} {'aligned' if aligned else 'anywhere'}",
        sde_step.sde_step_kernel,
        {**constants, "ALIGNED": aligned, "BLOCK": sde_step.BLOCK},
        drawn=source == "drawn",
        loads=loads,
        stores=stores,
    )


CASES = [
    # 1024 elements over 128 threads: two accesses for x, for a given noise, for x_next and for the mean, one for a
    # bfloat16 velocity.
    forward("drawn", with_mean=False, loads=2 + 1, stores=2),
    forward("noise", with_mean=True, loads=2 + 1 + 2, stores=2 + 2),
    forward("given", with_mean=True, loads=2 + 1 + 2, stores=2),
    forward("drawn", aligned=False, with_mean=False, loads=0, stores=0),
    forward("noise", aligned=False, with_mean=True, loads=0, stores=0),
    forward("given", aligned=False, with_mean=True, loads=0, stores=0),
    case(
        "sde_step_backward",
        sde_step.sde_step_backward_kernel,
        {"OF_MEAN": True, "OF_LOG_PROB": True, "BLOCK": sde_step.BLOCK},
        drawn=False,
        loads=2 + 1 + 2 + 2,
        stores=1,
    ),
    # 32 sums over 32 threads.
    case("sde_log_prob", sde_step.sde_log_prob_kernel, {"BLOCK": sde_step.SUM_BLOCK}, drawn=False, loads=0, stores=0),
]
