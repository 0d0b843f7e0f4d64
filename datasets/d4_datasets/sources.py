"""What d4-ingest can read: kinds of recordings, each with a module of its own.

A reader is a module with four names:

    KIND                                    what people call it
    takes(path) -> bool                     whether this file or folder is one recording of this kind
    files(path) -> list[Path]               the files that belong to it; their sizes and times identify it
    fill(path, contract, folder, clip)      its episodes, with lossless videos written into `folder`, and
                                            warnings

Readers are asked in order, and whoever takes a folder keeps what is in it from the others. A reader to whom
the contract says what to take has `for_contract(contract)` besides, which gives the reader that goes by it;
one that decodes messages has `with_types(definitions)`, which gives the reader that knows more types; and one
that calls a recording otherwise than its path has `name(path)`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from d4_datasets import contractor, films, lerobot_source, minerl_streams, recording
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Episode
from d4_datasets.msgtypes import Definitions


class Reader(Protocol):
    """A module that reads one kind of recording."""

    KIND: str

    def takes(self, path: Path) -> bool:
        """Whether this file or folder is one recording of this kind; must not raise."""

    def files(self, path: Path) -> list[Path]:
        """The files that belong to it."""

    def fill(
        self, path: Path, contract: Contract, folder: Path, clip: Sequence[str]
    ) -> tuple[list[Episode], list[str]]:
        """(episodes, warnings); images are `Video`s in `folder`. Raises UserError naming what is wrong."""


_MOST_LOOKED_AT = 10_000  # files, to say what is there

# Films take any video, and so come last.
READERS: tuple[Reader, ...] = (recording, lerobot_source, contractor, minerl_streams, films)


class Found(NamedTuple):
    """A recording and its reader."""

    path: Path
    reader: Reader


def find(source: str | Path, kind: str | None = None, contract: Contract | None = None) -> list[Found]:
    """The recordings under `source`, sorted: itself if it is one, else all below it.

    Args: kind: only those of this kind. contract: what its `files` section says is heeded.

    Raises:
        UserError: there is none, or no such kind.
    """
    source = Path(source)
    readers = [reader for reader in READERS if kind in (None, reader.KIND)]
    if not readers:
        raise UserError(f"there is no kind {kind!r}; kinds are {', '.join(r.KIND for r in READERS)}")
    if not source.exists():
        raise UserError(f"{source} does not exist; give a recording or a folder of recordings")
    readers = [_bound(reader, contract) for reader in readers]
    found = _unclaimed(list(_below(source, readers)), readers)
    if kind is None:  # a dataset that bags beside it were made into would be these once more
        found = [one for one in found if one.path == source or not (one.path / "meta" / "d4.json").is_file()]
    if not found:
        kinds = " or ".join(reader.KIND for reader in readers)
        raise UserError(f"there is no {kinds} in {source}{_held(source)}")
    return found


def _held(source: Path) -> str:
    """What files are in a folder instead of recordings, by their endings, for a sentence."""
    files = (Path(name) for _, _, names in os.walk(source) for name in names if not name.startswith("."))
    counts = Counter(file.suffix or file.name for file in islice(files, _MOST_LOOKED_AT))
    if not counts:
        return ", which is empty" if source.is_dir() else ""
    kinds = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(4))
    return f"; of what is there ({kinds}{', ...' if len(counts) > 4 else ''}) nothing is read"


def name(found: Found) -> str:
    """What a recording is called."""
    own = getattr(found.reader, "name", None)
    return found.path.name if own is None else own(found.path)


def _bound(reader: Reader, contract: Contract | None) -> Reader:
    """The reader that goes by a contract, if there is one."""
    make = getattr(reader, "for_contract", None)
    return reader if make is None or contract is None else make(contract)


def named(kind: str, given: Definitions | None = None) -> Reader:
    """The reader of a kind; one that decodes messages knows the types that are `given` too."""
    reader = next(reader for reader in READERS if kind == reader.KIND)
    make = getattr(reader, "with_types", None)
    return reader if make is None or given is None else make(given)


def _unclaimed(found: list[Found], readers: Sequence[Reader]) -> list[Found]:
    """Without those whose file belongs to a recording of a reader before theirs, as a video to its lines."""
    claimed: set[Path] = set()
    dropped: set[Path] = set()
    for one in sorted(found, key=lambda one: readers.index(one.reader)):
        if one.path in claimed:
            dropped.add(one.path)
        elif one.path.is_file():
            claimed.update(one.reader.files(one.path))
    return [one for one in found if one.path not in dropped]


def _below(path: Path, readers: Sequence[Reader], above: tuple[Path, ...] = ()) -> Iterator[Found]:
    reader = next((reader for reader in readers if reader.takes(path)), None)
    if reader is not None:
        yield Found(path, reader)
    elif path.is_dir() and (real := path.resolve()) not in above:  # a link may lead back up
        for child in sorted(p for p in path.iterdir() if not p.name.startswith(".")):
            yield from _below(child, readers, (*above, real))
