"""Files that are there whole or not at all: written aside and renamed; and JSON files that were.

Knows only the standard library and runs on Python 3.10.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from d4_datasets.errors import UserError

_Kind = TypeVar("_Kind", dict, list)


def write(path: Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8; an error leaves what was there before.

    Raises:
        OSError: it cannot be written.
    """
    with aside(path) as new:
        new.write_bytes(data.encode() if isinstance(data, str) else data)


def read_json(path: Path, kind: type[_Kind]) -> _Kind:
    """What a JSON file holds, an empty `kind` where there is no file.

    Raises:
        UserError: it holds no `kind`.
    """
    if not path.exists():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise UserError(f"{path} is damaged: restore it, or delete it and run again what made it")
    return found


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
