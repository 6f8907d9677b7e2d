from case import Case

from dgpo_fast.kernels import group_preference

FLOATS = ("beta", "beta_rest", "highest_ratio", "highest_rest", "lowest_ratio", "lowest_rest")


def case(kernel: str, number: str, **constants: bool) -> Case:
    """Tens of numbers, read one by one: nothing of it is worth 16 bytes."""
    numbers = ("error", "reference", "advantage", "size", "score", "old", "objective", "surrogate", "weight")
    return Case(
        name=f"{kernel} {number}",
        kernel=getattr(group_preference, f"{kernel}_kernel"),
        types={
            **{f"p_{name}": f"*{number}" for name in (*numbers, "grad", "grad_error")},
            **{"p_group": "*i64", "p_clipped": "*i1"},
        },
        constants={**constants, "BLOCK": group_preference.BLOCK},
        num_warps=group_preference.NUM_WARPS,
        float32=FLOATS,
        loads=None,
        stores=None,
    )


CASES = [
    case(kernel, number, **constants)
    for number in ("fp32", "fp64")
    for kernel, constants in (
        ("group_scores", {}),
        ("group_preference", {"SCORED": False, "CLIPPED": True}),
        ("group_preference_backward", {}),
    )
]
