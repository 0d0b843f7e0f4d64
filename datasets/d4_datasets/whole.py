"""Files that are there whole or not at all: written aside and renamed.

Knows only the standard library and runs on Python 3.10.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8; an error leaves what was there before.

    Raises:
        OSError: it cannot be written.
    """
    with aside(path) as new:
        new.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write a file for now: beside `path`, with its ending. After the block it becomes `path`; where
    that raises, it is removed.

    Writers of one file do not meet: each process and thread has a name of its own for it, and what the last
    one wrote stays.
    """
    new = path.with_name(f".tmp-{os.getpid()}-{threading.get_native_id()}-{path.name}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
