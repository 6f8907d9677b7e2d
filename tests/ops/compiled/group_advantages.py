from case import Case

from dgpo_fast.kernels import group_advantages

CASES = [
    Case(
        name=f"group_advantages {number} {'global' if global_std else 'group'}",
        kernel=group_advantages.group_advantages_kernel,
        types={
            **dict.fromkeys(("p_reward", "p_advantage", "p_std"), f"*{number}"),
            **dict.fromkeys(("p_valid", "p_clamped"), "*i1"),
        },
        constants={"GLOBAL_STD": global_std, "BLOCK": group_advantages.BLOCK},
        num_warps=group_advantages.NUM_WARPS,
        float32=("epsilon", "epsilon_rest", "clamp", "clamp_rest"),
        loads=None,
        stores=None,
    )
    for number in ("fp32", "fp64")
    for global_std in (False, True)
]
