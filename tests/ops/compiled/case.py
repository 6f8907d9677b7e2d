"""One Triton kernel, compiled for sm_90 as its launcher compiles it, and what its machine code does.

Needs no GPU, but a process without TRITON_INTERPRET. Triton carries ptxas and cuobjdump.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel with the types and constants of one launch, and the 16-byte accesses that a thread should make.

    None of them are counted for a kernel of a few numbers, which has no bulk tensor.

    `types` names the pointers' types as Triton's signatures do ("*bf16"); every other argument that is no constant is
    an integer of 32 bits, as the launcher finds those of tensors below 2^31 elements, but for `float32`. Pointers and
    integers, counts ("num_...") and what Triton is not to look at aside, are declared divisible by 16, as the launcher
    finds them for tensors of whole latents, unless not `divisible`.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    loads: int | None
    stores: int | None
    float32: tuple[str, ...] = ()
    fp_fusion: bool = True
    divisible: bool = True

    def machine_code(self) -> dict[str, Any]:
        """Global and local accesses by width, additions, registers, local memory, narrow offsets, layouts of sums."""
        source = ASTSource(self.kernel, self._signature(), constexprs=dict(self.constants), attrs=self._divisible())
        options = {"num_warps": self.num_warps, "enable_fp_fusion": self.fp_fusion}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            assembly, usage = (
                subprocess.run([CUOBJDUMP, option, cubin.name], check=True, capture_output=True, text=True).stdout
                for option in ("-sass", "-res-usage")
            )
        registers, local_bytes = re.search(r"REG:(\d+).* LOCAL:(\d+)", usage).groups()  # type: ignore[union-attr]
        return {
            "accesses": Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)\.E?[.\w]*", assembly)),
            "additions": len(re.findall(r"\bFADD\b", assembly)),
            "expected": None if self.loads is None else {"LDG.E.128": self.loads, "STG.E.128": self.stores},
            "registers": int(registers),
            "local_bytes": int(local_bytes),
            "narrow_offsets": narrow_offsets(compiled.asm["ttir"]),
            "layouts_of_sums": layouts_of_sums(compiled.asm["ttgir"]),
        }

    def _signature(self) -> dict[str, str]:
        types = {**self.types, **dict.fromkeys(self.float32, "fp32")}
        return {
            name: "constexpr" if name in self.constants else types.get(name, "i32") for name in self.kernel.arg_names
        }

    def _divisible(self) -> dict[tuple[int], list[list[Any]]]:
        if not self.divisible:
            return {}
        return {
            (i,): [["tt.divisibility", 16]]
            for i, (name, type_) in enumerate(self._signature().items())
            if type_[0] in "*i" and not name.startswith("num_") and not self.kernel.params[i].do_not_specialize
        }


def narrow_offsets(ttir: str) -> list[str]:
    """Instructions that take a program's number or a stride in 32 bits, where a product with it would overflow.

    From Triton's code, where nothing is optimised yet: LLVM may narrow what it has proved to fit.
    """
    numbers = re.findall(r"(%\w+) = tt\.get_program_id", ttir)
    numbers += re.findall(r"(%\w*_stride_\w+): i32", ttir)
    numbers += re.findall(r"(%\w+) = arith\.select .*_stride_.* : i32", ttir)
    harmless = ("tt.get_program_id", "tt.func", "arith.extsi", "arith.select")
    return [
        line.strip()
        for line in ttir.splitlines()
        if any(re.search(rf"{number}\b", line) for number in numbers) and not any(word in line for word in harmless)
    ]


def layouts_of_sums(ttgir: str) -> list[str]:
    """How the elements of each sum are shared among threads, which decides its order."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, flags=re.MULTILINE))
    summed = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<.*?, (#\w+)>\)', ttgir, flags=re.DOTALL)
    return sorted({layouts[name] for name in summed})
