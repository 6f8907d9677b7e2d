"""Where the weights of a reward's model are: a directory of the user's, the Hugging Face cache, or the hub."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dgpo_fast.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """Published weights."""

    repo: str
    """On the Hugging Face hub."""
    key: str
    """Of the recipe, that may name a directory with them."""
    files: tuple[str, ...]
    """Patterns of the files that are used: all of them must be there."""
    gigabytes: float
    licence: str

    def find(self, path: str | None) -> Path:
        """The directory with the files: `path`, or where the hub's are on this machine, once they are.

        What is in the cache is used as it is: the hub is not asked, so that a run goes on with the weights it began
        with, network or not.

        Raises:
            UserError: `path` lacks a file; or the weights are not in the cache and cannot be downloaded. One line says
                what to download, and where to put it.
        """
        if path is not None:
            return self._checked(Path(path).expanduser())
        return self._cached() or self._downloaded()

    def absence(self, path: str | None) -> str | None:
        """What a first run will download, in a line; None where the files are on this machine.

        Raises:
            UserError: `path` lacks a file.
        """
        if path is not None:
            self._checked(Path(path).expanduser())
            return None
        if self._cached() is not None:
            return None
        return f"{self._description} are not in the local cache: `{self._command}` or the first run fetches them"

    @property
    def about(self) -> str:
        """What they are, and how much there is to download."""
        megabytes = 1000 * self.gigabytes
        size = f"{self.gigabytes:g} GB" if megabytes >= 100 else f"{megabytes:g} MB"
        return f"{self.repo} ({size}, {self.licence})"

    def _checked(self, directory: Path) -> Path:
        if not directory.is_dir():
            what = "a file" if directory.exists() else "not there"
            raise UserError(f"{self.key}: {directory} is {what}; expected a directory with {self._origin}")
        missing = self._missing(directory)
        if missing:
            raise UserError(f"{self.key}: {directory} has no {missing[0]}; expected {self._origin}")
        return directory

    def _missing(self, directory: Path) -> list[str]:
        return [pattern for pattern in self.files if not any(directory.glob(pattern))]

    def _cached(self) -> Path | None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            directory = self._snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            return None
        return None if self._missing(directory) else directory  # a download that was interrupted

    def _downloaded(self) -> Path:
        try:
            directory = self._snapshot(local_files_only=False)
        except Exception as error:  # of the hub, of its client, of the network, of the disk: they do not come
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise UserError(self._unavailable(reason)) from None
        missing = self._missing(directory)
        if missing:
            raise UserError(self._unavailable(f"{missing[0]} did not come"))
        return directory

    def _snapshot(self, *, local_files_only: bool) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.repo, allow_patterns=list(self.files), local_files_only=local_files_only))

    def _unavailable(self, reason: str) -> str:
        return (
            f"{self.key}: {self._description} are not on this machine and cannot be downloaded: run `{self._command} "
            f"--local-dir DIR` where there is a network, and set {self.key}=DIR ({reason})"
        )

    @property
    def _description(self) -> str:
        return f"the weights {self.about}"

    @property
    def _origin(self) -> str:
        return f"the files of https://huggingface.co/{self.repo}: {', '.join(self.files)}"

    @property
    def _command(self) -> str:
        """Downloads what is used and no more: some of these repositories have the same weights four times."""
        plain = all("*" not in pattern for pattern in self.files)
        words = self.files if plain else [word for pattern in self.files for word in ("--include", pattern)]
        return shlex.join(["hf", "download", self.repo, *words])
