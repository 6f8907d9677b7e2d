"""Compiles the Triton kernels for sm_90 and prints, as JSON, what the machine code of each case does.

Needs no GPU, but a process without TRITON_INTERPRET. Triton carries ptxas and cuobjdump.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgpo_fast.kernels import solver_step

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def machine_code(kernel: Any, *, types: dict[str, str], constants: dict[str, Any], num_warps: int) -> dict[str, Any]:
    """Global loads and stores by width, registers and local memory of a kernel compiled for sm_90.

    `types` are those of Triton's signatures; pointers and 64-bit integers are declared divisible by 16, as the launcher
    finds them for tensors of whole latents.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_[0] in "*i"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        assembly, usage = (
            subprocess.run([CUOBJDUMP, option, cubin.name], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    registers, local_bytes = re.search(r"REG:(\d+).* LOCAL:(\d+)", usage).groups()
    return {
        "accesses": Counter(re.findall(r"\b(?:LDG|STG)\.E(?:\.\d+)?\b", assembly)),
        "registers": int(registers),
        "local_bytes": int(local_bytes),
    }


def solver_step_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for num_states, velocity in ((1, "fp32"), (2, "bf16"), (4, "bf16")):
        pointers = {"p_state": "*fp32", "p_new_state": "*fp32", "p_cond": f"*{velocity}", "p_uncond": f"*{velocity}"}
        strides = {name: "i64" for name in solver_step.solver_step_kernel.arg_names if "stride" in name}
        integers = {"num_rows": "i32", "num_blocks": "i32", "N": "i32"}
        yield (
            f"solver_step K={num_states} {velocity}",
            machine_code(
                solver_step.solver_step_kernel,
                types={**pointers, "p_table": "*fp64", "p_row": "*i64", **strides, **integers},
                constants={"K": num_states, "GUIDED": True, "BLOCK": solver_step.BLOCK},
                num_warps=solver_step.NUM_WARPS,
            ),
        )


if __name__ == "__main__":
    print(json.dumps(dict(solver_step_cases())))
