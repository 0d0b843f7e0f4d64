"""The cache of one dataset unpacked as a whole, beside it or where the user wants it.

    <root>/cache/manifest.json          what it was made from: size, time, sha256 of each source file
    <root>/cache/<camera>.npy           uint8 [N, H, W, 3], RGB
    <root>/cache/columns/<name>.npy     one array [N, ...] per column

It is written aside and renamed, so an interrupted build leaves nothing half-written, and it is rebuilt when a
source file has changed. Deleting it is always safe.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from d4_datasets import whole
from d4_datasets.contract import Contract
from d4_datasets.digest import sha256
from d4_datasets.errors import UserError
from d4_datasets.locks import held
from d4_datasets.source import Source
from d4_datasets.unpack import Columns, progress, unpack_camera

CACHE_FORMAT = 1


def cache_bytes(contract: Contract, num_frames: int) -> int:
    """Size in bytes of the image cache of `num_frames` frames of this contract."""
    return num_frames * sum(camera.size[0] * camera.size[1] * 3 for camera in contract.images if camera.size)


def ensure(source: Source, cache: Path) -> dict[str, Any]:
    """The manifest of the dataset's cache, which is built where it is missing or outdated.

    Raises:
        UserError: the dataset is damaged, the disk too small, or the folder holds other things.
    """
    return current_manifest(source, cache) or _build(source, cache)


# ---- is the cache the one of this dataset?


def fingerprint(path: Path) -> dict[str, Any]:
    """Size, time and content of a file."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every array in a cache folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.npy"))}


def current_manifest(source: Source, cache: Path) -> dict[str, Any] | None:
    """Return the manifest of the cache, or None where it is missing or was made from other files.

    Size and time are compared first and the content only where the time differs (a copied dataset), as git
    does: opening a large dataset must not read it all.
    """
    path = cache / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if manifest.get("format") != CACHE_FORMAT or manifest["arrays"] != sizes(cache):
        return None
    files = {str(file.relative_to(source.root)): file for file in source.files()}
    known = manifest["sources"]
    if files.keys() != known.keys():
        return None
    touched = False
    for name, file in files.items():
        stat = file.stat()
        if stat.st_size != known[name]["size"]:
            return None
        if stat.st_mtime_ns != known[name]["mtime_ns"]:
            if sha256(file) != known[name]["sha256"]:
                return None
            known[name]["mtime_ns"] = stat.st_mtime_ns
            touched = True
    if touched and os.access(cache, os.W_OK):
        whole.write(path, json.dumps(manifest))
    return manifest


# ---- building it


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build what lies at `folder`.

    Raises:
        UserError: the folder that it lies in cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder.parent / f".{folder.name}.lock"))
        except PermissionError:
            raise UserError(
                f"cannot write the frame cache to {folder}; name a writable folder for the cache"
            ) from None
        yield


def require_room(folder: Path, need: int, what: str) -> None:
    """Refuse what does not fit on the disk, before it is begun.

    Raises:
        UserError: with the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{what} needs {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
            "free some space, name a folder on another disk for the cache (--cache), or keep only a part "
            "unpacked at a time (--cache-gb)"
        )


def _build(source: Source, cache: Path) -> dict[str, Any]:
    """Unpack the dataset into `cache` and return its manifest."""
    if cache.exists() and any(cache.iterdir()) and not (cache / "manifest.json").exists():
        raise UserError(f"{cache} holds files that are not a frame cache; name another folder for the cache")
    with locked(cache):
        # Another process may have built it while this one waited for the lock.
        manifest = current_manifest(source, cache)
        return manifest if manifest is not None else _build_locked(source, cache)


def _build_locked(source: Source, cache: Path) -> dict[str, Any]:
    aside = cache.with_name(f".tmp-{cache.name}")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed build left
    if source.image_sizes:
        need = cache_bytes(source.contract, source.num_frames)
        require_room(cache.parent, need, f"the frame cache {cache}")
    try:
        (aside / "columns").mkdir(parents=True)
        # Before the content is used: a file changed meanwhile makes the cache outdated, never wrong.
        sources = {str(path.relative_to(source.root)): fingerprint(path) for path in source.files()}
        columns = Columns(aside, source.num_frames)
        with progress(source.num_frames * len(source.image_sizes)) as tick:
            columns.add(source)
            for camera in source.image_sizes:
                unpack_camera(source, camera, aside / f"{camera}.npy", tick)
        manifest = {
            "format": CACHE_FORMAT,
            "nonfinite": columns.nonfinite(),
            "sources": sources,
            "arrays": sizes(aside),
        }
        (aside / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(cache, ignore_errors=True)
        os.rename(aside, cache)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest
