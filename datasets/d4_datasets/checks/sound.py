"""Is the dataset sound as a whole: numbers, contract, copies, pieces, and room for it on this machine?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from d4_datasets.checks.base import SHORT, Verdict, error, ok, size_text, warn
from d4_datasets.windows import Windows, cache_bytes


def numbers(nonfinite: Sequence[dict[str, Any]]) -> Iterator[Verdict]:
    """NaN and infinity; `nonfinite` has one entry per column and episode."""
    for bad in nonfinite:
        text = (
            f"column {bad['column']} is NaN or infinite in {bad['frames']} frames of episode {bad['episode']}"
        )
        yield error("numbers", text, "repair or leave out the recording it came from and ingest again")
    if not nonfinite:
        yield ok("numbers", "no NaN or infinite values")


def contract(windows: Windows) -> Iterator[Verdict]:
    """Is the contract the one that the data were written with?"""
    if any(meta.get("contract_hash") != windows.contract.hash for meta in windows.metadata):
        text = "the contract in meta/d4.json was changed after the data were written"
        yield error("contract", text, "ingest again with the contract you mean")


def recordings(windows: Windows) -> Iterator[Verdict]:
    """What d4-ingest said about the recordings."""
    sources = [source for meta in windows.metadata for source in meta.get("sources", [])]
    told = [source for source in sources if source.get("warnings")]
    if told:
        text = (
            f"d4-ingest warned of {len(told)} of {len(sources)} recordings, first: {told[0]['warnings'][0]}"
        )
        yield warn("recordings", text, "see `sources` in meta/d4.json for all of them")
    elif sources:
        yield ok("recordings", f"{len(sources)} recordings, none of them ingested with a warning of its own")


def pieces(rows: Sequence[Any]) -> Iterator[Verdict]:
    """Copies and very short episodes among `rows` (EpisodeRow)."""
    copies = [row for row in rows if row.copy_of is not None]
    if copies:
        first = copies[0]
        text = f"{len(copies)} episodes are copies, first: episode {first.episode} equals {first.copy_of}"
        yield warn("episodes", text, "ingest every recording once: copies leak into the holdout")
    short = sum(row.frames < SHORT for row in rows)
    if short > len(rows) / 2:
        text = f"{short} of {len(rows)} episodes have fewer than {SHORT} frames"
        hint = "gaps split episodes: raise the camera's tolerance_ms, or fix the drops"
        yield warn("episodes", text, hint)
    if not copies and short <= len(rows) / 2:
        yield ok("episodes", f"{len(rows)} episodes, no copies, {short} of fewer than {SHORT} frames")


def room(windows: Windows) -> dict[str, Any]:
    """Bytes that the dataset (of one that lies elsewhere its metadata), its frame cache, and this machine
    have.
    """
    folders = [root / part for root in windows.roots for part in ("meta", "data", "videos")]
    files = (path for folder in folders for path in folder.rglob("*.*"))
    whole = cache_bytes(windows.contract, windows.num_frames) if windows.images else 0
    return {
        "disk_bytes": sum(path.stat().st_size for path in files),
        "cache_bytes": min(whole, windows.limit or whole),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": shutil.disk_usage(windows.cache).free,
    }


def size(found: dict[str, Any]) -> Iterator[Verdict]:
    """Judge the table of `room`."""
    cache, memory = found["cache_bytes"], found["memory_bytes"]
    text = f"{size_text(found['disk_bytes'])} on disk, frame cache {size_text(cache)} more (mapped, not "
    text += f"loaded), {size_text(found['free_bytes'])} free"
    if cache > memory:
        text += f"; this machine has {size_text(memory)} of memory"
        hint = "put the cache on a fast local disk (--cache); batches will be read from it"
        yield warn("size", text, hint)
    else:
        yield ok("size", text)
