"""Datasets that lie elsewhere, read through fsspec: no protocol is spoken here.

`Remote` is one such dataset. Its metadata are mirrored in a local folder, where they are read like any other;
videos are fetched one by one when their frames are wanted. Only what metadata name is read, nothing is
listed, so that servers without listings (plain HTTP) serve as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from d4_datasets import whole
from d4_datasets.errors import UserError

_T = TypeVar("_T")
_ATTEMPTS, _PAUSE_S = 3, 1.0  # beside what the clients of a protocol repeat by themselves
_EPISODES = "meta/episodes/chunk-{:03d}/file-{:03d}.parquet"
_CHUNK_FILES = 1000


def text(url: str, most: int) -> str:
    """The text of a small file.

    Raises:
        UserError: it cannot be read, or has more than `most` bytes.
    """
    remote = Remote(url)
    if remote.size("") > most:
        raise UserError(f"{url} is no list of datasets: it has more than {most >> 20} MiB")
    try:
        return remote.read("").decode()
    except UnicodeDecodeError:
        raise UserError(f"cannot read {url} as a list of datasets: it is not UTF-8 text") from None


class Remote:
    """A folder behind a URL.

    Raises:
        UserError: the protocol is unknown, or the package that speaks it is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, base = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(
                f"{url}: another package is needed to read it ({error}); pip install 'd4[s3]' for S3, "
                "'d4[http]' for HTTP"
            ) from None
        except ValueError as error:
            raise UserError(f"{url} cannot be read: {error}") from None
        self._base = str(base).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def _try(self, name: str, work: Callable[[], _T]) -> _T:
        """Do something with a file, again where the network failed for a moment.

        Raises:
            FileNotFoundError: it is not there. UserError: it cannot be read.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return work()
            except Exception as error:  # clients raise what they like
                if isinstance(error, FileNotFoundError) and _is_absent(error):
                    raise
                if attempt == _ATTEMPTS - 1 or isinstance(error, PermissionError):
                    reason = str(error.__cause__ or error) or type(error).__name__
                    raise UserError(f"{self.url}{'/' * bool(name)}{name} cannot be read: {reason}") from None
                time.sleep(_PAUSE_S * 4**attempt)
        raise AssertionError

    def _missing(self, name: str) -> UserError:
        if not name:
            return UserError(f"{self.url} is not there")
        if name.startswith("meta/"):
            return UserError(f"{self.url} is not a d4 dataset: {name} is missing")
        return UserError(f"{self.url}/{name} is missing; copy the dataset again")

    # -- files --

    def checksum(self, name: str) -> str:
        """What changes whenever the file does: its size, time or tag, as far as the protocol tells.

        Raises:
            UserError: it is not there or cannot be read.
        """
        try:
            return str(self._try(name, lambda: self._fs.checksum(self._path(name))))
        except FileNotFoundError:
            raise self._missing(name) from None

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        try:
            return self._try(name, lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            raise self._missing(name) from None

    def size(self, name: str) -> int:
        """Bytes of a file."""
        try:
            return int(self._try(name, lambda: self._fs.size(self._path(name))) or 0)
        except FileNotFoundError:
            raise self._missing(name) from None

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file, whole or not at all.

        Raises:
            UserError: it is not there, cannot be read, or ends early.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole.aside(target) as new:
                self._try(name, lambda: self._get(name, new))
        except FileNotFoundError:
            raise self._missing(name) from None

    def _get(self, name: str, target: Path) -> None:
        self._fs.get_file(self._path(name), str(target))
        expected = self._fs.size(self._path(name))
        if expected is not None and target.stat().st_size != expected:
            raise OSError(f"{target.stat().st_size} of {expected} bytes came")

    def fetch_meta(self, folder: Path) -> None:
        """Copy info.json, d4.json and the episode tables."""
        for name in ("meta/info.json", "meta/d4.json"):
            self.checksum(name)  # says that it is no dataset
            self.fetch(name, folder / name)
        number = 0
        while number == 0 or self.exists(_episodes_name(number)):
            self.fetch(_episodes_name(number), folder / _episodes_name(number))
            number += 1

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self._try(name, lambda: self._fs.exists(self._path(name))))


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether a file is really not there: over HTTP, a server that does not answer is told alike."""
    cause = error.__cause__
    return not type(cause).__module__.startswith("aiohttp") or getattr(cause, "status", None) in (404, 410)


def _episodes_name(number: int) -> str:
    return _EPISODES.format(*divmod(number, _CHUNK_FILES))
