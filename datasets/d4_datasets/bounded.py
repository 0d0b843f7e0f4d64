"""A cache folder that keeps what was used last and never grows beyond its limit.

Entries are folders, written aside and renamed. Whoever uses one holds a lock on it, also across processes;
what nobody holds is removed when room is needed, the longest unused first. A kill at any time leaves no entry
half-written, and what it leaves aside is removed by whoever makes room next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from d4_datasets.errors import UserError
from d4_datasets.frame_cache import locked, require_room

_ASIDE, _GONE = ".tmp-", ".gone-"


class CacheFull(UserError):
    """What is in use leaves no room."""


class BoundedCache:
    """Entries by key in `folder`, together at most `limit` bytes; None: as many as the disk holds."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit
        self._held: dict[str, int] = {}  # descriptors with the locks

    def hold(self, key: str, size: int, build: Callable[[Path], None]) -> Path:
        """The folder of an entry, which stays until it is released.

        Args: size: bytes that it will need. build: fills a new folder, if it is not there.

        Raises:
            UserError: it is larger than the limit or the disk. CacheFull: too much is held.
        """
        path = self.folder / key
        if key not in self._held:
            descriptor = self._lock(path) if path.is_dir() else None
            self._held[key] = self._make(path, size, build) if descriptor is None else descriptor
        os.utime(path)
        return path

    def release(self, key: str) -> None:
        """Let an entry go: it may be removed when room is needed."""
        descriptor = self._held.pop(key, None)
        if descriptor is not None:
            os.close(descriptor)

    def drop(self, key: str) -> None:
        """Remove an entry that turned out to be damaged."""
        self.release(key)
        self._remove(self.folder / key)

    def close(self) -> None:
        """Release everything."""
        for key in list(self._held):
            self.release(key)

    # -- entries --

    def _make(self, path: Path, size: int, build: Callable[[Path], None]) -> int:
        """Build an entry; returns the descriptor that holds it."""
        aside, descriptor = self._reserve(path.name, size)
        try:
            build(aside)
            try:
                with locked(self.folder / "room"):  # nobody counts it twice, or not at all
                    os.rename(aside, path)
                return descriptor
            except OSError:  # another process was faster
                other = self._lock(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            os.close(descriptor)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)
        return self._make(path, size, build) if other is None else other

    def _reserve(self, key: str, size: int) -> tuple[Path, int]:
        """A new folder aside, held, whose name says what it will need; others count that at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "room"):
            self._make_room(size, key)
            aside = self.folder / f"{_ASIDE}{key}-{os.getpid()}-{threading.get_ident()}-{size}"
            aside.mkdir()
            descriptor = os.open(aside, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return aside, descriptor

    def _lock(self, path: Path) -> int | None:
        """Hold an entry; None if it went away meanwhile."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
        return None

    def _make_room(self, size: int, name: str) -> None:
        entries = sorted(self._entries())
        if self.limit is not None:
            if size > self.limit:
                raise UserError(
                    f"a part of the dataset ({name}) is {size / 1e9:.2f} GB unpacked and the cache "
                    f"{self.folder} may hold {self.limit / 1e9:.2f} GB: give it more with --cache-gb"
                )
            total = sum(bytes_ for _, bytes_, _ in entries)
            for _, bytes_, path in entries:
                if total + size <= self.limit:
                    break
                total -= bytes_ if self._remove(path) else 0
            if total + size > self.limit:
                raise CacheFull(
                    f"the cache {self.folder} is full of what is in use ({total / 1e9:.2f} of "
                    f"{self.limit / 1e9:.2f} GB): give it more with --cache-gb, or another --cache folder"
                )
        require_room(self.folder, size, f"the cache {self.folder}")

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, folder) of all entries; what is being made, or was left by a kill, first."""
        found = []
        for entry in os.scandir(self.folder):
            if not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.stat().st_size for file in os.scandir(entry.path))
                used = entry.stat().st_mtime
                if entry.name.startswith((_ASIDE, _GONE)):
                    size, used = max(size, int(entry.name.rpartition("-")[2])), 0.0
                found.append((used, size, Path(entry.path)))
        # What was finished while this looked is there under its own name, too.
        return [one for one in found if one[0] > 0 or one[2].exists()]

    def _remove(self, path: Path) -> bool:
        """Remove an entry; False if somebody holds it."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = path.with_name(f"{_GONE}{path.name[-60:]}-{os.getpid()}-0")
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True
