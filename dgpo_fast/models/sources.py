"""Where a model comes from: a recipe's name for it, resolved and checked without torch, network or weights."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.models.architectures import SD35_SHAPES, TransformerShape, VAEShape

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny-sd3"
PIPELINE_CLASS = "StableDiffusion3Pipeline"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
RANDOM_PREFIX = "random:"
RANDOM_SEED = 0
"""Names the weights of a `random:` model."""
RANDOM_NAMES = tuple(f"{RANDOM_PREFIX}{name}" for name in SD35_SHAPES)
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_FOLDERS = (*ENCODERS, *TOKENIZERS)
LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' name for it."""
PEFT_FILE = "adapter_model.safetensors"
KNOWN_HUB_NAMES = {f"stabilityai/stable-diffusion-3.5-{name.removeprefix('sd35-')}": name for name in SD35_SHAPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model's weights, wherever they are."""

    kind: Literal["embedded", "random", "directory", "hub"]
    location: str
    """A directory, a hub name, or a name of `SD35_SHAPES` where weights are random."""
    revision: str | None = None
    """What the hub is asked for: a branch, a tag or a commit; None: its main branch."""


def find_model(name: str, *, revision: str | None = None) -> ModelSource:
    """The source that `name` means: `embedded`, `random:sd35-medium`, a directory in diffusers' format, or a hub name.

    Raises:
        UserError: the name means none of these, or what it names is no Stable Diffusion 3 pipeline.
    """
    if name == "embedded":
        _check_directory(EMBEDDED)
        return ModelSource(kind="embedded", location=str(EMBEDDED))
    if name.startswith(RANDOM_PREFIX):
        if name not in RANDOM_NAMES:
            raise UserError(f"no model {name!r}{suggest(name, RANDOM_NAMES)}; there are: {', '.join(RANDOM_NAMES)}")
        return ModelSource(kind="random", location=name.removeprefix(RANDOM_PREFIX))
    if Path(name).is_dir():
        _check_directory(Path(name))
        return ModelSource(kind="directory", location=name)
    if Path(name).exists():
        raise UserError(f"model {name!r} is a file; expected a directory in diffusers' format")
    if not HUB_NAME.fullmatch(name):
        known = ("embedded", *RANDOM_NAMES, *KNOWN_HUB_NAMES)
        raise UserError(
            f"no model {name!r}{suggest(name, known)}; expected embedded, {', '.join(RANDOM_NAMES)}, an existing "
            "directory or a hub name such as stabilityai/stable-diffusion-3.5-medium"
        )
    source = ModelSource(kind="hub", location=name, revision=revision)
    index = cached_file(source, "model_index.json")
    if index is not None:
        _check_index(index, name)
    return source


def find_lora(directory: Path) -> Path:
    """The weights of a LoRA that diffusers or peft wrote to `directory`.

    Raises:
        UserError: there are none.
    """
    files = [directory / name for name in (LORA_FILE, PEFT_FILE)]
    if (found := next((file for file in files if file.is_file()), None)) is None:
        raise UserError(
            f"adapter.path {directory}: there is no {LORA_FILE}, which a checkpoint's lora/ has, nor peft's {PEFT_FILE}"
        )
    return found


def transformer_shape(source: ModelSource) -> TransformerShape | None:
    """The shape of the transformer; None for a hub model that is neither known nor in the local cache."""
    if source.kind == "random":
        return SD35_SHAPES[source.location]
    config = _config(source, "transformer")
    if config is not None:
        return TransformerShape.from_config(config)
    return SD35_SHAPES.get(KNOWN_HUB_NAMES.get(source.location, ""))


def vae_shape(source: ModelSource) -> VAEShape:
    """The shape of the VAE; Stable Diffusion 3's own where nothing else is known."""
    config = None if source.kind == "random" else _config(source, "vae")
    return VAEShape() if config is None else VAEShape.from_config(config)


def clip_tokens(source: ModelSource) -> int:
    """Tokens that CLIP makes of every prompt: 77 where nothing else is known."""
    config = None if source.kind == "random" else _config(source, "text_encoder")
    return 77 if config is None else int(config["max_position_embeddings"])


def hub_commit(source: ModelSource) -> str | None:
    """The commit of a hub's model, as the local cache has it, which names its snapshots by them.

    None of another model, or where it is not there.
    """
    index = cached_file(source, "model_index.json") if source.kind == "hub" else None
    return None if index is None else index.parent.name


def missing_parts(source: ModelSource) -> list[str]:
    """Folders of a hub's pipeline that the local cache lacks, or has not whole: a download that was interrupted."""
    index = cached_file(source, "model_index.json")
    if index is None:
        return ["model_index.json"]
    parts = [name for name, kind in _read_json(index).items() if isinstance(kind, list) and kind[0] is not None]
    return [name for name in parts if not _is_whole(index.parent / name)]


def _is_whole(folder: Path) -> bool:
    """Whether a part of a pipeline has its configuration and all its weights; a tokenizer, or a scheduler, any file."""
    if folder.name not in ("transformer", "vae", *ENCODERS):
        return folder.is_dir() and any(folder.iterdir())
    if not (folder / "config.json").is_file():
        return False
    shards = [
        folder / shard
        for index in folder.glob("*.safetensors.index.json")
        for shard in _read_json(index)["weight_map"].values()
    ]
    if shards:
        return all(shard.is_file() for shard in shards)
    weights = (path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    return any(".fp16." not in name and "-of-" not in name for name in weights)


def download_command(source: ModelSource) -> str:
    """Downloads of a pipeline on the hub what is loaded: beside it lie the same weights for other programs."""
    folders = ("scheduler", "transformer", "vae", *TEXT_FOLDERS)
    wanted = [
        word for pattern in ("model_index.json", *(f"{name}/*" for name in folders)) for word in ("--include", pattern)
    ]
    at = [] if source.revision is None else ["--revision", source.revision]
    return shlex.join(["hf", "download", source.location, *at, *wanted, "--exclude", "*.fp16*"])


def text_identity(source: ModelSource) -> dict[str, str | int]:
    """What tells a model's text encoders and tokenizers from all others. A hub model is in the local cache by now."""
    if source.kind == "hub":
        commit = hub_commit(source)
        assert commit is not None, f"{source.location} is not in the cache"
        return {"hub": source.location, "commit": commit}
    if source.kind == "random":
        return {"random": source.location, "seed": RANDOM_SEED}
    return {"files": _fingerprint(Path(source.location))}


END_BYTES = 2**16


def _fingerprint(directory: Path) -> str:
    """A hash over names, sizes, times and both ends of the files that make embeddings.

    Sizes and times are not enough: a fine-tuned encoder is as large as the original, and some archives give every file
    the same time. Of the embedded model too, since `dgpo-fast tiny build` may replace it.
    """
    files = [path for folder in TEXT_FOLDERS for path in sorted((directory / folder).rglob("*")) if path.is_file()]
    hashed = hashlib.blake2b(digest_size=20)
    for path in (directory / "model_index.json", *files):
        about = path.stat()
        hashed.update(f"{path.relative_to(directory)}|{about.st_size}|{about.st_mtime_ns}\n".encode())
        with path.open("rb") as file:
            hashed.update(file.read(END_BYTES))
            file.seek(max(0, about.st_size - END_BYTES))
            hashed.update(file.read())
    return hashed.hexdigest()


def cached_file(source: ModelSource, filename: str) -> Path | None:
    """A file of the model on this machine, in its directory or in the hub's local cache; None where there is none."""
    if source.kind in ("embedded", "directory"):
        path = Path(source.location) / filename
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.location, filename, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def _config(source: ModelSource, module: str) -> dict[str, Any] | None:
    path = cached_file(source, f"{module}/config.json")
    return None if path is None else _read_json(path)


def _check_directory(directory: Path) -> None:
    index = directory / "model_index.json"
    if not index.is_file():
        raise UserError(f"model {str(directory)!r} is no diffusers pipeline: it has no model_index.json")
    _check_index(index, str(directory))
    for module in ("transformer", "vae"):
        if not (directory / module / "config.json").is_file():
            raise UserError(f"model {str(directory)!r} has no {module}/config.json")


def _check_index(index: Path, name: str) -> None:
    found = _read_json(index).get("_class_name")
    if found != PIPELINE_CLASS:
        raise UserError(f"model {name!r} is a {found}, expected a {PIPELINE_CLASS}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
