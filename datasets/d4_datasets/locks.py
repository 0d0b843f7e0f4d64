"""One writer at a time: a folder is held by a lock that the kernel lets go of when its process ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d4_datasets.errors import UserError


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock file `path`."""
    try:
        with held(path, "held"):
            return False
    except UserError:
        return True


@contextmanager
def held(path: Path, otherwise: str | None = None) -> Iterator[int]:
    """Hold the lock file `path`; yields its descriptor, for processes that are to hold it as well.

    Raises:
        UserError: somebody else holds it; the sentence is `otherwise`. Without one it waits.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
        except BlockingIOError:
            raise UserError(otherwise) from None
        yield lock.fileno()
