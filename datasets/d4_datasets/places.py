"""What a command means by a dataset: a folder, a URL, a text file that lists such, or several of them.

runs/mine/dataset            a folder
s3://bucket/robot/dataset    anything that fsspec knows: s3, gs, https, memory, ...
datasets.txt                 one of the above per line, relative to the list; lines with # are comments
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

Place: TypeAlias = str | Path

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])", re.IGNORECASE)
_MOST_BYTES = 1 << 24  # of a list
_LIST_SUFFIXES = (".txt", ".list")


def is_url(place: Place) -> bool:
    """Whether a place is reached through fsspec; file:// is a folder."""
    return _URL.match(str(place)) is not None and not str(place).startswith("file:")


def expand(places: Place | Sequence[Place]) -> list[str]:
    """The datasets that are meant, in order, each a folder or a URL.

    Raises:
        UserError: a list cannot be read or is empty, or a dataset is named twice.
    """
    given = [places] if isinstance(places, str | Path) else list(places)
    found = [one for place in given for one in _expand_one(_plain(place))]
    if not found:
        raise UserError("name a dataset: a folder, a URL, or a text file that lists such")
    seen: set[str] = set()
    for one in found:
        key = one if is_url(one) else str(Path(one).resolve())
        if key in seen:
            raise UserError(
                f"the dataset {one} is named twice; its frames would count twice, so name it once"
            )
        seen.add(key)
    return found


def is_dataset(place: str) -> bool:
    """Whether there is a dataset of d4-ingest at a folder or URL."""
    if not is_url(place):
        return (Path(place) / "meta" / "d4.json").is_file()
    from d4_datasets.remote import Remote

    return Remote(place).exists("meta/d4.json")


def about(place: str) -> dict[str, Any]:
    """The meta/d4.json of a dataset.

    Raises:
        UserError: it is not there, or damaged.
    """
    if is_url(place):
        from d4_datasets.remote import Remote

        text: str | bytes = Remote(place).read("meta/d4.json")
    else:
        try:
            text = (Path(place) / "meta" / "d4.json").read_text()
        except OSError:
            raise UserError(
                f"{place} is not a d4 dataset: meta/d4.json is missing; make one with d4-ingest"
            ) from None
    try:
        meta: dict[str, Any] = json.loads(text)
        Contract.from_dict(meta["contract"], f"{place}/meta/d4.json")
        return meta | {"episodes": meta["episodes"]}
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{place}/meta/d4.json is damaged ({error}); write the dataset again with d4-ingest"
        ) from None


def require_one_robot(contracts: Mapping[str, Contract]) -> None:
    """Refuse datasets, by what they are called, that are to be used together and are not of one contract.

    Raises:
        UserError: which two differ.
    """
    (first, one), *others = contracts.items()
    for place, other in others:
        if other.hash != one.hash:
            raise UserError(
                f"{place} was made with another contract ({other.name}, {other.hash[:12]}) than {first} "
                f"({one.name}, {one.hash[:12]}): datasets that are used together are of one robot; ingest "
                "one of them again"
            )


def title(places: Place | Sequence[Place]) -> str:
    """The places as people gave them, for messages."""
    given = [places] if isinstance(places, str | Path) else list(places)
    return ", ".join(_plain(place) for place in given)


def cache_folder() -> Path:
    """Where what is fetched and unpacked is kept unless a command says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "d4"


def limit_bytes(gigabytes: float | None) -> int | None:
    """Bytes of the option --cache-gb, None for no limit.

    Raises:
        UserError: it is not above 0.
    """
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 1e9:
        raise UserError(f"--cache-gb {gigabytes:g} must be above 0")
    return int(gigabytes * 1e9)


def _plain(place: Place) -> str:
    """A place as text; a Path has folded the slashes of a URL, and file:// names a folder."""
    text = str(place)
    match = _URL.match(text)
    if match is None:
        return text
    rest = text[match.end() :].rstrip("/")
    if match[1].lower() == "file":
        return "/" + rest
    if "::" in text:
        raise UserError(f"{text} chains protocols with ::, which is not supported; name one URL")
    return f"{match[1]}://{rest}"


def _expand_one(place: str) -> list[str]:
    """The lines of a list, or the place itself."""
    if is_url(place):
        if not place.endswith(_LIST_SUFFIXES):
            return [place]
        from d4_datasets import remote

        protocol, _, name = place.partition("://")
        text, base = remote.text(place, _MOST_BYTES), f"{protocol}://{posixpath.dirname(name)}"
    elif Path(place).is_file():
        text, base = _text(Path(place)), str(Path(place).parent)
    else:
        return [place]
    lines = (line.strip() for line in text.splitlines())
    names = [_beside(base, line) for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"{place} lists no dataset; write one folder or URL per line")
    return names


def _beside(base: str, line: str) -> str:
    """A line of a list as a place: relative ones lie beside the list."""
    if is_url(line) or line.startswith(("/", "file:")):
        return _plain(line)
    if "://" in base:
        protocol, _, folder = base.partition("://")
        return f"{protocol}://{posixpath.normpath(posixpath.join(folder, line))}"
    return str(Path(base) / line)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is no list of datasets: it has more than {_MOST_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read {path} as a list of datasets: {reason}") from None
