"""Several datasets as one, and datasets that lie elsewhere or do not fit the disk.

What is needed of all of them at any time, labels and the episode table, is put together in one index; frames
stay where they are until they are wanted.

    <cache>/index-<key>/manifest.json       which datasets, as they were when the index was made
    <cache>/index-<key>/columns/<name>.npy  the per-frame columns of all, behind each other
    <cache>/index-<key>/episodes/*.npy      length of each episode, and which video it lies in
    <cache>/remote-<key>/meta/...           metadata of a dataset behind a URL
    <cache>/frames/<key>/<camera>.npy       unpacked pieces and fetched videos: bounded, see `bounded`

Everything is written aside and renamed; an index is made again when one of its datasets has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import frame_cache, places
from d4_datasets.bounded import BoundedCache
from d4_datasets.contract import Contract
from d4_datasets.digest import sha256
from d4_datasets.errors import UserError
from d4_datasets.frame_cache import locked, sizes
from d4_datasets.joined import Frames, Joined
from d4_datasets.latents import Origin
from d4_datasets.pieces import Pieces, cut
from d4_datasets.remote import Remote
from d4_datasets.source import Source
from d4_datasets.unpack import Columns, decode_rows, lacking, progress, rows_of_video

FORMAT = 1
_AT_ONCE = 16  # requests to a server


@dataclass
class Store:
    """What `windows.Windows` is made of: arrays over the frames and episodes of one dataset or several."""

    contract: Contract
    episode_length: np.ndarray
    columns: dict[str, np.ndarray]
    images: dict[str, Frames]
    origin: Origin | None
    nonfinite: dict[tuple[str, int], int]
    roots: list[Path]  # where the metadata of each dataset can be read
    shown: list[str]  # what people call each of them
    digest: str
    sources: list[str]
    cache: Path  # what was unpacked lies in it
    piece_bounds: np.ndarray | None = None  # int64 [P + 1], as episodes; None: one dataset on this disk
    pieces: Pieces | None = None  # None: all frames are unpacked


def whole(root: Path, cache: Path | None) -> Store:
    """One dataset, unpacked as a whole."""
    source = Source(root)
    folder = cache if cache is not None else root / "cache"
    manifest = frame_cache.ensure(source, folder)
    return Store(
        contract=source.contract,
        episode_length=source.episode_length,
        columns=_mapped(folder / "columns", source.columns),
        images={name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in source.image_sizes},
        origin=source.origin,
        nonfinite={(column, episode): count for column, episode, count in manifest["nonfinite"]},
        roots=[root],
        shown=[str(root)],
        digest=sha256(root / "meta" / "d4.json"),
        sources=source.sources,
        cache=folder,
    )


def joined(found: Sequence[str], cache: Path | None, limit: int | None, readers: int = 1) -> Store:
    """Datasets behind each other.

    Args:
        found: folders and URLs. cache: where index and frames are kept; None: the user's cache folder, and
        frames that need no limit beside their dataset. limit: bytes of frames and videos there, None: no
        limit. readers: processes of this machine that share the limit.

    Raises:
        UserError: a dataset cannot be read, or they are not of one robot.
    """
    folder = cache if cache is not None else places.cache_folder()
    index = _Index(found, folder)
    store = Store(
        contract=index.contract,
        episode_length=index.array("length"),
        columns=_mapped(index.folder / "columns", index.manifest["columns"]),
        images={},
        origin=index.origin,
        nonfinite={(column, episode): count for column, episode, count in index.manifest["nonfinite"]},
        roots=[Path(member["root"]) for member in index.members],
        shown=list(found),
        digest=index.digest,
        sources=json.loads((index.folder / "sources.json").read_text()),
        cache=folder,
        piece_bounds=index.array("pieces"),
    )
    if limit is None and cache is None and not any(map(places.is_url, found)):
        store.images = _local(store)
    elif index.sizes:
        store.pieces = _pieces(index, folder, limit, readers)
        store.images = dict(store.pieces.images())
    return store


def _mapped(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def _local(store: Store) -> dict[str, Frames]:
    """The frames of datasets on this disk without a limit: each from its own whole cache."""
    parts = [whole(root, None) for root in store.roots]
    bounds = np.cumsum([0, *(int(part.episode_length.sum()) for part in parts)])
    out: dict[str, Frames] = {}
    for camera in parts[0].images:
        arrays = [np.asarray(part.images[camera]) for part in parts]
        out[camera] = Joined(bounds, arrays.__getitem__, arrays[0].shape[1:], np.uint8)
    return out


# ---- the index


class _Index:
    """The index of a list of datasets, made where it is missing or outdated."""

    def __init__(self, found: Sequence[str], cache: Path) -> None:
        self.found, self.cache = found, cache
        self.folder = cache / f"index-{_short('/'.join(map(_absolute, found)))}"
        self.manifest = self._current() or self._build()
        self.members: list[dict[str, Any]] = self.manifest["members"]
        self.contract = Contract.from_dict(self.manifest["contract"])
        origin = self.manifest["origin"]
        self.origin = None if origin is None else Origin(**origin)
        self.sizes: dict[str, tuple[int, int]] = {
            camera.name: camera.size
            for camera in self.contract.images
            if camera.size is not None and self.origin is None
        }

    def array(self, name: str) -> np.ndarray:
        """An array over episodes."""
        return np.load(self.folder / "episodes" / f"{name}.npy", mmap_mode="r").view(np.ndarray)

    @cached_property
    def digest(self) -> str:
        """What the datasets hold, all together."""
        return _hash([member["digest"] for member in self.members])

    def _current(self) -> dict[str, Any] | None:
        try:
            manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        if manifest.get("format") != FORMAT or manifest["arrays"] != sizes(self.folder):
            return None
        members = manifest["members"]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            known = pool.map(_check, self.found, [list(member["check"]) for member in members])
            same = all(now == member["check"] for now, member in zip(known, members, strict=True))
        return manifest if same else None

    def _build(self) -> dict[str, Any]:
        with locked(self.folder):
            manifest = self._current()  # another process may have made it
            if manifest is not None:
                return manifest
            aside = self.folder.with_name(f".tmp-{self.folder.name}")
            shutil.rmtree(aside, ignore_errors=True)  # what a killed build left
            try:
                manifest = self._fill(aside)
                shutil.rmtree(self.folder, ignore_errors=True)
                os.rename(aside, self.folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return manifest

    def _fill(self, folder: Path) -> dict[str, Any]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            members = list(pool.map(partial(_Member, cache=self.cache), self.found))
        first = members[0].source
        for member in members[1:]:
            _require_alike(first, member.source)
        (folder / "columns").mkdir(parents=True)
        (folder / "episodes").mkdir()
        total = sum(member.source.num_frames for member in members)
        columns = Columns(folder, total)
        frame = episode = 0
        with progress(total, "index") as tick:
            for member in members:
                with member.data():
                    columns.add(member.source, frame, episode)
                frame += member.source.num_frames
                episode += len(member.source.episode_length)
                tick(member.source.num_frames)
        _write_episodes(folder / "episodes", [member.source for member in members])
        sources = [name for member in members for name in member.source.sources]
        (folder / "sources.json").write_text(json.dumps(sources))
        manifest = {
            "format": FORMAT,
            "members": [member.entry() for member in members],
            "contract": first.contract.to_dict(),
            "origin": None if first.origin is None else first.origin._asdict(),
            "columns": first.columns,
            "nonfinite": columns.nonfinite(),
            "arrays": sizes(folder),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return manifest


def _require_alike(one: Source, other: Source) -> None:
    places.require_one_robot({one.shown: one.contract, other.shown: other.contract})
    if one.origin != other.origin:
        raise UserError(
            f"{one.shown} holds {one.origin or 'pictures'} and {other.shown} {other.origin or 'pictures'}: "
            "datasets that are used together hold pictures, or latents of one tokenizer in one codec"
        )


def _write_episodes(folder: Path, sources: Sequence[Source]) -> None:
    """length, pieces, and by camera the number of the video in its dataset and of the first frame in it."""
    length = np.concatenate([source.episode_length for source in sources])
    np.save(folder / "length.npy", length)
    where = np.repeat(np.arange(len(sources)), [len(source.episode_length) for source in sources]) << 32
    for number, camera in enumerate(sources[0].image_sizes):
        files = np.concatenate([_file_of_episode(source, camera) for source in sources])
        np.save(folder / f"file-{camera}.npy", files)
        np.save(folder / f"row-{camera}.npy", np.concatenate([s.first_rows(camera) for s in sources]))
        where += files if number == 0 else 0
    frame = sum(3 * height * width for height, width in sources[0].image_sizes.values())
    np.save(folder / "pieces.npy", cut(length, where, frame))


def _file_of_episode(source: Source, camera: str) -> np.ndarray:
    out = np.zeros(len(source.episode_length), np.int64)
    for number, episodes in enumerate(source.videos(camera).values()):
        out[episodes] = number
    return out


# ---- the datasets of it


@dataclass
class _Member:
    """One dataset while the index is made: its metadata at hand, its Parquet files when they are needed."""

    place: str
    cache: Path
    remote: Remote | None = None
    source: Source = field(init=False)
    check: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if not places.is_url(self.place):
            self.source = Source(Path(self.place))
            names = [str(file.relative_to(self.source.root)) for file in self.source.files()]
            self.check = _check(self.place, names)
            return
        self.remote = Remote(self.place)
        # Before it is read: a dataset that changes meanwhile makes the index outdated, never wrong.
        self.check = _check(self.place, ["meta/info.json", "meta/d4.json"])
        root = self.cache / f"remote-{_short(self.place)}"
        aside = root.with_name(f".tmp-{root.name}-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.remote.fetch_meta(aside)
            self.source = Source(aside, self.place)
            self._require_whole()
            shutil.rmtree(root, ignore_errors=True)
            os.rename(aside, root)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self.source.root = root

    def _require_whole(self) -> None:
        """A server that hides a file for a moment must not make a dataset shorter."""
        told = self.source.info.get("total_episodes")
        if told is not None and told != len(self.source.episode_length):
            raise UserError(
                f"{self.place} lists {len(self.source.episode_length)} episodes and says that it has {told}; "
                "try again, or copy the dataset again"
            )

    def data(self) -> _Fetched:
        """The Parquet files, at hand within the block."""
        return _Fetched(self)

    def entry(self) -> dict[str, Any]:
        """What the index keeps of it."""
        source = self.source
        return {
            "place": self.place,
            "check": self.check,
            "root": str(source.root.absolute()),
            "digest": sha256(source.root / "meta" / "d4.json"),
            "fps": source.fps,
            "frames": source.num_frames,
            "episodes": len(source.episode_length),
            "videos": {camera: list(source.videos(camera)) for camera in source.image_sizes},
        }


class _Fetched:
    """Fetches the Parquet files of a dataset behind a URL, and removes them afterwards."""

    def __init__(self, member: _Member) -> None:
        self._remote, self._source = member.remote, member.source

    def __enter__(self) -> None:
        if self._remote is None:
            return
        try:
            numbers = [self._source.episodes[f"data/{part}_index"] for part in ("chunk", "file")]
        except KeyError:
            raise UserError(
                f"{self._remote.url} does not say in which files its rows are; write the dataset again with "
                "d4-ingest"
            ) from None
        template = str(self._source.info["data_path"])
        for chunk, number in np.unique(np.stack(numbers, 1), axis=0):
            name = self._source.checked(template.format(chunk_index=int(chunk), file_index=int(number)))
            self._remote.fetch(name, self._source.root / name)

    def __exit__(self, *exc_info: object) -> None:
        if self._remote is not None:
            shutil.rmtree(self._source.root / "data", ignore_errors=True)


def _check(place: str, names: Sequence[str]) -> dict[str, Any]:
    """What tells whether files of a dataset have changed, by name; None for one that is not there."""
    if places.is_url(place):
        remote = Remote(place)
        return {name: remote.checksum(name) for name in names}
    out: dict[str, Any] = {}
    for name in names:
        try:
            stat = (Path(place) / name).stat()
            out[name] = [stat.st_size, stat.st_mtime_ns]
        except FileNotFoundError:
            out[name] = None
    return out


# ---- frames


class _Unpacker:
    """Fills folders with the frames of pieces."""

    def __init__(self, index: _Index, cache: BoundedCache) -> None:
        self.index, self.cache = index, cache
        self.episodes, self.length = index.array("pieces"), index.array("length")
        starts = np.cumsum([0, *(member["episodes"] for member in index.members)])
        self.member = np.searchsorted(starts, self.episodes[:-1], side="right") - 1
        self.first_episode = starts
        self.files = {camera: index.array(f"file-{camera}") for camera in index.sizes}
        self.rows = {camera: index.array(f"row-{camera}") for camera in index.sizes}

    def keys(self) -> list[str]:
        """Names of the pieces, which change whenever their content does."""
        digests = [_hash([m["place"], m["digest"], m["check"]]) for m in self.index.members]
        shape = _hash({name: list(size) for name, size in self.index.sizes.items()})
        spans = zip(self.member, self.episodes, self.episodes[1:], strict=False)
        return [_short(f"{digests[m]} {a - self.first_episode[m]} {b - a} {shape}") for m, a, b in spans]

    def __call__(self, piece: int, folder: Path) -> None:
        """Write <camera>.npy, uint8 [n, H, W, 3], of a piece."""
        span = slice(int(self.episodes[piece]), int(self.episodes[piece + 1]))
        member = self.index.members[int(self.member[piece])]
        length = self.length[span]
        start = np.cumsum(length) - length
        for camera, size in self.index.sizes.items():
            shape = (int(length.sum()), *size, 3)
            frames = np.lib.format.open_memmap(folder / f"{camera}.npy", "w+", np.uint8, shape)
            filled = np.zeros(len(frames), bool)
            file = self.files[camera][span]
            for number in np.unique(file):
                mine = file == number
                rows = rows_of_video(self.rows[camera][span][mine], start[mine], length[mine])
                self._decode(member, member["videos"][camera][number], rows, frames, filled)
            if not filled.all():
                lost = int(np.searchsorted(start, int(np.argmin(filled)), side="right")) - 1
                first = span.start - int(self.first_episode[self.member[piece]])
                raise UserError(lacking(camera, first + lost, member["place"]))
            frames.flush()

    def _decode(
        self, member: dict[str, Any], name: str, rows: np.ndarray, frames: np.ndarray, filled: np.ndarray
    ) -> None:
        """Decode a video, which is fetched if it lies elsewhere and kept while there is room."""

        def tick(count: int) -> None:
            return None

        if not places.is_url(member["place"]):
            decode_rows(Path(member["root"]) / name, member["fps"], rows, frames, filled, tick)
            return
        remote = Remote(member["place"])
        key = _short(f"{member['place']} {member['digest']} {name}")
        target = Path(name).name
        held = self.cache.hold(key, remote.size(name), lambda aside: remote.fetch(name, aside / target))
        try:
            shown = f"{member['place']}/{name}"
            decode_rows(held / target, member["fps"], rows, frames, filled, tick, shown)
        except UserError:
            self.cache.drop(key)  # it may have been damaged on the way
            raise
        finally:
            self.cache.release(key)


def _pieces(index: _Index, cache: Path, limit: int | None, readers: int) -> Pieces:
    store = BoundedCache(cache / "frames", limit)
    unpacker = _Unpacker(index, store)
    frames = np.cumsum([0, *unpacker.length.tolist()])[unpacker.episodes]
    budget = None if limit is None else limit // max(1, readers)
    return Pieces(frames, index.sizes, unpacker.keys(), unpacker, store, budget)


def _absolute(place: str) -> str:
    return place if places.is_url(place) else str(Path(place).absolute())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
