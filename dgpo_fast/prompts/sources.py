"""Where prompts come from: generators of this package, files, datasets of the Hugging Face hub.

    shapes:train, shapes:test       captions of the shapes world
    geneval:train, geneval:test     GenEval's six tasks, with what the reward `geneval` looks for
    ocr:train, ocr:test             sentences with a quoted text to be rendered, for the reward `ocr`
    drawbench-style:test            far from what was trained on: counting, rare words, conflicts, text and so on
    FILE                            a UTF-8 text file, a prompt on each line
    FILE.jsonl[#KEY]                a JSON object on each line: its `prompt`, or KEY, and the rest as metadata
    FILE.parquet[#COLUMN]           the column `prompt`, or COLUMN; other columns as metadata
    hf:OWNER/NAME[:SPLIT][#COLUMN]  a dataset, its split "train" and its column `prompt`; or hf:DIRECTORY

Metadata is whatever a reward reads besides the text (`records.Prompt`); of a table the columns that JSON could hold:
text, numbers, truth values, and lists and structures of these. A table names a prompt once per pair of images or per
judgement, so of a Parquet file or a dataset each text is one prompt, with the metadata of its first row; lines of a
text or JSON file are prompts as they stand, repeated where they repeat.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.prompts.drawbench_style import DRAWBENCH_STYLE, drawbench_style_prompts
from dgpo_fast.prompts.geneval import geneval_prompts
from dgpo_fast.prompts.ocr import ocr_prompts
from dgpo_fast.records import Prompt
from dgpo_fast.shapes.captions import split_captions

if TYPE_CHECKING:
    import pyarrow as pa

GENERATORS: Mapping[str, Callable[[], Sequence[str]]] = {
    "shapes:train": lambda: [Prompt(str(caption)) for caption in split_captions("train")],
    "shapes:test": lambda: [Prompt(str(caption)) for caption in split_captions("test")],
    "geneval:train": lambda: geneval_prompts("train"),
    "geneval:test": lambda: geneval_prompts("test"),
    "ocr:train": lambda: ocr_prompts("train"),
    "ocr:test": lambda: ocr_prompts("test"),
    DRAWBENCH_STYLE: drawbench_style_prompts,
}
COLUMN = "prompt"
TABLES = (".csv", ".tsv", ".json", ".yaml", ".yml", ".xlsx", ".gz", ".zip")
"""Files that are often meant as prompts, and whose lines are none."""


def load_prompts(source: str | None, *, key: str) -> list[str]:
    """The prompts of a source, in its order: see above. Each is a `Prompt`, with what the source knows of it.

    Raises:
        UserError: naming the recipe's `key`: no source given, nothing there, nothing that can be read, no such column,
            no prompt in it, or a library that it needs is not installed.
    """
    if source is None:
        raise UserError(
            f"{key}: no prompts given; set it to geneval:train or the like, or a file with a prompt on each line"
        )
    if source in GENERATORS:
        return [*GENERATORS[source]()]
    try:
        prompts = _read(source)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if not prompts:
        raise UserError(f"{key}: {source!r} holds no prompt")
    return prompts


def digest_of(prompts: Sequence[str]) -> str:
    """Equal for equal prompts, with their metadata, in the same order."""
    known = [[prompt, getattr(prompt, "metadata", {})] for prompt in prompts]
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).hexdigest()


def missing_dataset(source: str) -> str | None:
    """Why a dataset cannot be read now, though it may be there once the run starts; None for any other source."""
    if not source.startswith("hf:"):
        return None
    try:
        from datasets import config
    except ModuleNotFoundError as error:
        return str(_not_installed(source, error, extra="datasets"))
    name = _parse_dataset(source).name
    if Path(name).exists():
        return None
    cached = {path.name.lower() for path in Path(config.HF_DATASETS_CACHE).glob("*___*")}
    if name.replace("/", "___").lower() in cached:
        return None
    load = f"import datasets; datasets.load_dataset({json.dumps(name)})"
    return (
        f"the dataset {name} is not in the local cache: `python -c {shlex.quote(load)}` or the first run downloads it"
    )


def _read(source: str) -> list[str]:
    if source.startswith("hf:"):
        return _from_datasets(source)
    path, _, column = source.partition("#")
    if path.endswith(".jsonl"):
        return [*_from_json_lines(source, _read_text(path), column or COLUMN)]
    if path.endswith(".parquet"):
        return _from_parquet(source, path, column or COLUMN)
    if path.endswith(TABLES):
        raise UserError(f"{source!r} is no list of prompts, one on each line; expected text, .jsonl or .parquet")
    return [Prompt(line.strip()) for line in _read_text(source).splitlines() if line.strip()]


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except FileNotFoundError:
        raise _no_file(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path!r}: {error}") from None


def _no_file(path: str) -> UserError:
    return UserError(f"no file {path!r}{suggest(path, GENERATORS)} (and it is none of {', '.join(GENERATORS)})")


# JSON lines


def _from_json_lines(source: str, text: str, column: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold what else `splitlines` breaks at
        if line.strip():
            try:
                yield _json_prompt(line, column)
            except ValueError as error:
                raise UserError(f"{source!r}, line {number}: {error}") from None


def _json_prompt(line: str, column: str) -> Prompt:
    try:
        known = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(known, dict):
        raise ValueError(f"expected an object with the key {column!r}, got {line.strip()[:40]}")
    if column not in known:
        raise ValueError(f"no key {column!r}{suggest(column, known)}; there are: {', '.join(known)}")
    prompt = known.pop(column)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{column!r} is no text: {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column!r} holds half of a character, a lone surrogate: {prompt!r}") from None
    return Prompt(prompt.strip(), known)


# Tables


def _from_parquet(source: str, path: str, column: str) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise _not_installed(source, error, extra="parquet") from None
    try:
        schema = parquet.read_schema(path)
        table = parquet.read_table(path, columns=_columns(source, schema, column))
    except FileNotFoundError:
        raise _no_file(path) from None
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot read {path!r}: {_one_line(error)}") from None
    return _from_table(table, column)


def _columns(source: str, schema: pa.Schema, column: str) -> list[str]:
    """The column of prompts, and those that metadata can be made of.

    Raises:
        UserError: there is no such column, or it is not of text.
    """
    import pyarrow as pa

    if column not in schema.names:
        name = source.partition("#")[0]
        raise UserError(
            f"{source!r} has no column {column!r}{suggest(column, schema.names)}; name one of its own as in "
            f"{name}#{schema.names[0] if schema.names else 'COLUMN'} (there are: {', '.join(schema.names)})"
        )
    if not (pa.types.is_string(of := schema.field(column).type) or pa.types.is_large_string(of)):
        raise UserError(f"the column {column!r} of {source!r} is of {of}, expected text")
    return [column, *(field.name for field in schema if field.name != column and _is_plain(field.type))]


def _is_plain(kind: pa.DataType) -> bool:
    """Whether JSON has values of this type."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    tests = ("is_string", "is_large_string", "is_boolean", "is_integer", "is_floating", "is_null")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _from_table(table: pa.Table, column: str) -> list[str]:
    """Each text once, in the order of its first row; rows without text are none."""
    first_row: dict[str, int] = {}
    for row, text in enumerate(table.column(column).to_pylist()):
        if text is not None and text.strip():
            first_row.setdefault(text.strip(), row)
    known = table.drop_columns([column]).take([*first_row.values()]).to_pylist()
    # A table without columns has no rows.
    return [Prompt(text, metadata) for text, metadata in zip(first_row, known or [{}] * len(first_row), strict=True)]


# Datasets


class _Dataset(NamedTuple):
    name: str
    split: str
    column: str


def _parse_dataset(source: str) -> _Dataset:
    place, _, column = source.removeprefix("hf:").partition("#")
    name, _, split = place.partition(":")
    if not name:
        raise UserError(f"{source!r} names no dataset; expected hf:OWNER/NAME[:SPLIT][#COLUMN]")
    return _Dataset(name, split or "train", column or COLUMN)


def _from_datasets(source: str) -> list[str]:
    wanted = _parse_dataset(source)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _not_installed(source, error, extra="datasets") from None
    try:
        dataset = _load_dataset(wanted)
    except Exception as error:  # whatever a dataset's own format, its library or the network raises
        cause = error.__cause__ or error  # a DatasetGenerationError says no more than that it is one
        raise UserError(f"cannot load {source!r}: {type(cause).__name__}: {_one_line(cause)}") from None
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(f"cannot load {source!r}: expected one split, got a {type(dataset).__name__}")
    columns = _columns(source, dataset.features.arrow_schema, wanted.column)
    return _from_table(dataset.select_columns(columns).with_format("arrow")[:], wanted.column)


def _load_dataset(wanted: _Dataset) -> Any:
    """The split of a dataset: of a directory that `save_to_disk` wrote, else whatever `load_dataset` takes."""
    import datasets

    directory = Path(wanted.name)
    if (directory / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(wanted.name)
        if wanted.split not in splits:
            raise ValueError(f"no split {wanted.split!r}{_one_of(wanted.split, splits)}")
        return splits[wanted.split]
    if (directory / "state.json").exists():
        return datasets.load_from_disk(wanted.name)
    return datasets.load_dataset(wanted.name, split=wanted.split)


def _one_of(name: str, known: Collection[str]) -> str:
    return f"{suggest(name, known)}; there are: {', '.join(known)}"


def _not_installed(source: str, error: ModuleNotFoundError, *, extra: str) -> UserError:
    return UserError(f"{source!r} needs {error.name}, which is not installed: pip install 'dgpo-fast[{extra}]'")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
