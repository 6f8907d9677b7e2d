"""Where the weights of a reward's model are: a directory of the user's, the Hugging Face cache, or the hub."""

from __future__ import annotations

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

        Raises:
            UserError: `path` lacks a file; or the weights are not in the cache and cannot be downloaded. One line says
                what to download, and where to put it.
        """
        return self._checked(Path(path)) if path is not None else self._from_hub()

    def absence(self, path: str | None) -> str | None:
        """What a first run will download, in a line; None where the files are on this machine.

        Raises:
            UserError: `path` lacks a file.
        """
        if path is not None:
            self._checked(Path(path))
            return None
        if self._is_cached():
            return None
        return (
            f"the weights {self.repo} ({self.gigabytes:g} GB, {self.licence}) are not in the local cache: "
            f"`hf download {self.repo}` or the first run fetches them"
        )

    def _is_cached(self) -> bool:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            cached = Path(snapshot_download(self.repo, allow_patterns=list(self.files), local_files_only=True))
        except LocalEntryNotFoundError:
            return False
        return all(any(cached.glob(pattern)) for pattern in self.files)  # of a download that was not interrupted

    def _checked(self, directory: Path) -> Path:
        missing = [pattern for pattern in self.files if not any(directory.glob(pattern))]
        if missing:
            raise UserError(
                f"{self.key}: {directory} has no {missing[0]}; expected the files of "
                f"https://huggingface.co/{self.repo}: {', '.join(self.files)}"
            )
        return directory

    def _from_hub(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.repo, allow_patterns=list(self.files)))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.key}: the weights {self.repo} ({self.gigabytes:g} GB, {self.licence}) are not on this machine "
                f"and cannot be downloaded: run `hf download {self.repo} --local-dir DIR` where there is a network, "
                f"and set {self.key}=DIR ({type(error).__name__}: {reason[:120]})"
            ) from None
