"""The text encoders of a Stable Diffusion 3 pipeline: each distinct prompt is encoded once.

What is known, from this run or from the disk, needs no encoder: they are loaded when first a prompt is not, and are on
the device only while such prompts are encoded.

An embedding depends on its prompt alone, to the bit: prompts are encoded one at a time, since another batch size takes
other kernels (on the embedded pipeline's float32 pooled text, 3e-6). So a run is the same whether its embeddings were
computed or read, in whichever order, and on any number of ranks.

Shape letters: P prompts, N text tokens, D their width.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice

import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn

from dgpo_fast.models.prompt_cache import PromptCache
from dgpo_fast.models.sources import ENCODERS
from dgpo_fast.parallel.products import usual_products
from dgpo_fast.records import Conditioning

ENCODED_AT_ONCE = 256
"""Prompts that are encoded, where they are foreseen, once the encoders are on the device.

The encoders of SD3.5 are 11 GB: a second or two on the way, against milliseconds for a prompt.
"""
REMEMBERED_BYTES = 4 * 2**30
"""Embeddings kept in the host's memory; SD3.5's, of 205 tokens in bfloat16, are 1.7 MB each."""


class TextEncoders:
    """The text encoders of a pipeline, and the embeddings they made.

    Args:
        load: gives a pipeline with its encoders on the CPU; called when first a prompt is not known.
        dtype: of embeddings.
        text_length: tokens of T5.
        device: where prompts are encoded, and embeddings are returned.
        cache: embeddings that outlast the process; None: of this run only.
    """

    def __init__(
        self,
        load: Callable[[], StableDiffusion3Pipeline],
        *,
        dtype: torch.dtype,
        text_length: int,
        device: torch.device,
        cache: PromptCache | None,
    ) -> None:
        self._load, self._dtype, self._text_length, self._device, self._cache = load, dtype, text_length, device, cache
        self._known: OrderedDict[str, Conditioning] = OrderedDict()  # on the CPU, the last used last
        self._has_warned = False

    def encode(self, prompts: Sequence[str], *, soon: Iterable[str] = ()) -> Conditioning:
        """Conditioning of `prompts`, a row each, on the device: text [P, N, D] and pooled [P, D].

        Args:
            soon: prompts of later calls, in order. Where the encoders have to come to the device for `prompts`, those
                of the next `ENCODED_AT_ONCE` that are unknown are encoded too.
        """
        rows = {prompt: self._recall(prompt) for prompt in dict.fromkeys(prompts)}
        unknown = [prompt for prompt, row in rows.items() if row is None]
        if unknown:
            foreseen = dict.fromkeys(islice(soon, ENCODED_AT_ONCE))
            encoded = self._encode([*unknown, *(p for p in foreseen if p not in rows and not self._knows(p))])
            rows |= {prompt: encoded[prompt] for prompt in unknown}
        place_of = {prompt: place for place, prompt in enumerate(rows)}
        places_P = torch.tensor([place_of[prompt] for prompt in prompts]).to(self._device)
        found = [row for row in rows.values() if row is not None]
        distinct = Conditioning(
            text_BND=torch.cat([row.text_BND for row in found]).to(self._device),
            pooled_BD=torch.cat([row.pooled_BD for row in found]).to(self._device),
        )
        return distinct[places_P]

    @cached_property
    def _pipeline(self) -> StableDiffusion3Pipeline:
        return self._load()

    def _recall(self, prompt: str) -> Conditioning | None:
        row = self._known.get(prompt)
        if row is None and self._cache is not None:
            row = self._cache.read(prompt)
        if row is not None:
            self._remember(prompt, row)
        return row

    def _knows(self, prompt: str) -> bool:
        return prompt in self._known or (self._cache is not None and prompt in self._cache)

    def _remember(self, prompt: str, row: Conditioning) -> None:
        self._known[prompt] = row
        self._known.move_to_end(prompt)
        if len(self._known) * (row.text_BND.nbytes + row.pooled_BD.nbytes) > REMEMBERED_BYTES:
            self._known.popitem(last=False)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Conditioning]:
        encoders = [encoder for name in ENCODERS if (encoder := getattr(self._pipeline, name)) is not None]
        encoded = {}
        with moved_to(self._device, encoders), torch.no_grad(), usual_products():
            for prompt in prompts:
                encoded[prompt] = self._encode_one(prompt)
                self._remember(prompt, encoded[prompt])
                if self._cache is not None:
                    self._cache.write(prompt, encoded[prompt])
        return encoded

    def _encode_one(self, prompt: str) -> Conditioning:
        self._warn_of_length(prompt)
        text, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=[prompt],
            prompt_2=None,
            prompt_3=None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._text_length,
        )
        return Conditioning(text_BND=text.to("cpu", self._dtype), pooled_BD=pooled.to("cpu", self._dtype))

    def _warn_of_length(self, prompt: str) -> None:
        """Once, where T5 does not read all of a prompt. CLIP reads 77 tokens of any."""
        tokenizer = self._pipeline.tokenizer_3
        if self._has_warned or tokenizer is None:
            return
        num_tokens = len(tokenizer(prompt).input_ids)
        if num_tokens > self._text_length:
            self._has_warned = True
            warnings.warn(
                f"a prompt has {num_tokens} tokens, of which {self._text_length} are read (model.text_length); others "
                f"may be as long: {prompt[:80]!r}",
                stacklevel=2,
            )


@contextmanager
def moved_to(device: torch.device, modules: Iterable[nn.Module]) -> Iterator[None]:
    """`modules` on `device` meanwhile, and then where they were: since nothing changes them, without a copy back."""
    tensors = [*chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the allocator keeps for itself, no CUDA graph's pool can use
