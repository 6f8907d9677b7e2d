from case import Case

from dgpo_fast.kernels import solver_step


def solver_step_case(num_states: int, velocity: str) -> Case:
    return Case(
        name=f"solver_step K={num_states} {velocity}",
        kernel=solver_step.solver_step_kernel,
        types={
            **{"p_state": "*fp32", "p_new_state": "*fp32", "p_cond": f"*{velocity}", "p_uncond": f"*{velocity}"},
            **{"p_table": "*fp64", "p_row": "*i64"},
        },
        constants={"K": num_states, "GUIDED": True, "BLOCK": solver_step.BLOCK},
        num_warps=solver_step.NUM_WARPS,
        # 1024 elements over 128 threads: 8 each, so two accesses for a float32 operand and one for a bfloat16.
        loads=2 * num_states + 2 * (2 if velocity == "fp32" else 1),
        stores=2 * num_states,
    )


CASES = [solver_step_case(1, "fp32"), solver_step_case(2, "bf16"), solver_step_case(4, "bf16")]
