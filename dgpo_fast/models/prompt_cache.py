"""Prompt embeddings on disk: encoded once per machine, a safetensors file for each prompt."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dgpo_fast.environment import device_name
from dgpo_fast.files import write_atomically
from dgpo_fast.records import Conditioning


def cache_directory() -> Path:
    """Where prompt embeddings lie: $DGPO_FAST_CACHE, else dgpo-fast/ in $XDG_CACHE_HOME or in ~/.cache."""
    if chosen := os.environ.get("DGPO_FAST_CACHE"):
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "dgpo-fast"


def computed_by(device: torch.device) -> dict[str, str]:
    """What decides how an embedding is rounded: the processor, and the libraries whose kernels it runs."""
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    return {"processor": device_name(device), **versions}


class PromptCache:
    """The embeddings of one model in one setting, below `directory`.

    Any number of processes may read and write it at once. What is damaged counts as absent. Where nothing can be
    written, a warning says so once, and the run goes on without.

    Args:
        settings: everything but the prompt that decides an embedding, to the bit; part of the key.
    """

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        self._settings = dict(settings)
        self.directory = directory / "prompts" / _digest(json.dumps(self._settings, sort_keys=True).encode())
        self._may_write = True

    def path(self, prompt: str) -> Path:
        """The file of a prompt, whether it is there or not."""
        return self.directory / f"{_digest(self._key(prompt).encode())}.safetensors"

    def __contains__(self, prompt: str) -> bool:
        """Whether there is a file for the prompt; only reading it tells whether it is whole."""
        return self.path(prompt).is_file()

    def read(self, prompt: str) -> Conditioning | None:
        """The embedding of a prompt, text [1, N, D] and pooled [1, D] on the CPU; None where there is no whole one."""
        try:
            with safe_open(self.path(prompt), framework="pt") as file:
                about = file.metadata() or {}
                # Copies: safetensors' own tensors are the file itself, mapped into memory.
                conditioning = Conditioning(
                    text_BND=file.get_tensor("text").clone(), pooled_BD=file.get_tensor("pooled").clone()
                )
        except (OSError, SafetensorError):
            return None
        is_whole = about == {"key": self._key(prompt), "digest": _digest_of(conditioning)}
        return conditioning if is_whole else None

    def write(self, prompt: str, conditioning: Conditioning) -> None:
        """Keeps the embedding of a prompt, tensors on the CPU."""
        if not self._may_write:
            return
        about = {"key": self._key(prompt), "digest": _digest_of(conditioning)}
        content = save({"text": conditioning.text_BND, "pooled": conditioning.pooled_BD}, metadata=about)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(prompt), content)
        except OSError as error:
            self._may_write = False
            print(
                f"warning: prompt embeddings are not kept in {self.directory} ({error.strerror or error}); point "
                "DGPO_FAST_CACHE elsewhere, or set model.prompt_cache=false",
                file=sys.stderr,
            )

    def _key(self, prompt: str) -> str:
        return json.dumps({**self._settings, "prompt": prompt}, sort_keys=True)


def _digest_of(conditioning: Conditioning) -> str:
    tensors = (conditioning.text_BND, conditioning.pooled_BD)
    return _digest(b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=20).hexdigest()
