"""Which linear layers of a transformer block read the same input: they are one product, their adapters neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dgpo_fast.errors import UserError

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "image_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image_out": ("attn.to_out.0",),
    "text_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text_out": ("attn.to_add_out",),
    "second_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "second_out": ("attn2.to_out.0",),
    "image_up": ("ff.net.0.proj",),
    "image_down": ("ff.net.2",),
    "text_up": ("ff_context.net.0.proj",),
    "text_down": ("ff_context.net.2",),
}
"""The linear layers of a block of diffusers' SD3Transformer2DModel, by the product they belong to."""

_PLACES = {
    layer: (index, member) for index, layers in enumerate(PROJECTIONS.values()) for member, layer in enumerate(layers)
}
_PARAMETER = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.lora_([AB])\..*")


def is_in_block(name: str) -> bool:
    """Whether a module is one of a block's linear layers."""
    return re.sub(r"^transformer_blocks\.\d+\.", "", name) in _PLACES


def check_fusible(qk_norm: str | None, adapted: Iterable[str]) -> None:
    """Makes sure that the fused engine can compute a model with such norms, and adapters on the layers `adapted`.

    Raises:
        UserError: it cannot: that only diffusers' own code does.
    """
    if qk_norm != "rms_norm":
        raise UserError(
            f"model.engine: fused is for models with qk_norm rms_norm (SD3.5), this one has {qk_norm}; "
            "use model.engine eager or compile"
        )
    if (elsewhere := next((name for name in adapted if not is_in_block(name)), None)) is not None:
        raise UserError(
            f"model.engine: fused has adapters on the blocks' attention and feed-forward alone, adapter.targets "
            f"asks for {elsewhere}; use model.engine eager or compile"
        )


def adapter_order(name: str) -> tuple[int, int, str, int]:
    """A key that sorts peft's parameters: by block and product, there first all A, then all B; what is elsewhere last.

    So the A of a product are one matrix wherever adapters lie end to end in memory.
    """
    found = _PARAMETER.fullmatch(name)
    if found is None or found[2] not in _PLACES:
        return 2**31, 0, "", 0
    index, member = _PLACES[found[2]]
    return int(found[1]), index, found[3], member
