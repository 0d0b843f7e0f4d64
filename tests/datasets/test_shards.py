"""Several datasets as one, behind URLs, and larger than their cache: what was written comes back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import synthetic
from test_bounded import used

from d4_datasets import places, remote, shards, unpack
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Episode as Recorded
from d4_datasets.lerobot import LeRobotWriter
from d4_datasets.windows import Windows

LENGTHS = ((9, 4), (12, 5, 7), (30, 1))
FRAME = 16 * 24 * 3


def write(root: Path, lengths: tuple[int, ...], first: int = 0, **spec) -> Path:
    """A dataset as d4-ingest writes it, of known frames."""
    contract = synthetic.Contract.from_dict(synthetic.contract() | spec)
    with LeRobotWriter(root, contract) as writer:
        for number, length in enumerate(lengths):
            e = synthetic.episode(length, first + number, labelled=number % 2 == 0)
            writer.add_episode(
                Recorded({"cam": e.images}, e.action, e.mask, e.reward, np.zeros(length, np.int64),
                         np.zeros(length, bool), {"pose": e.pose}, source=f"{root.name}-{number}")
            )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets."""
    folder = tmp_path_factory.mktemp("made")
    return [write(folder / f"set{n}", lengths, 10 * n) for n, lengths in enumerate(LENGTHS)]


def upload(root: Path, name: str) -> str:
    """Put a dataset behind a URL."""
    for file in (file for part in ("meta", "data", "videos") for file in (root / part).rglob("*")):
        if file.is_file():
            fsspec.filesystem("memory").pipe_file(f"/{name}/{file.relative_to(root)}", file.read_bytes())
    return f"memory://{name}"


@pytest.fixture
def memory(made: list[Path]) -> list[str]:
    """The three datasets behind URLs."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return [upload(root, root.name) for root in made]


def same(joined: Windows, alone: list[Windows]) -> None:
    """Everything that is read of datasets together is what is read of each."""
    assert joined.num_frames == sum(w.num_frames for w in alone)
    for name in (
        "action",
        "action_mask",
        "reward",
        "is_terminal",
        "task_index",
        "labelled",
        "episode_length",
    ):
        np.testing.assert_array_equal(
            getattr(joined, name), np.concatenate([getattr(w, name) for w in alone])
        )
    np.testing.assert_array_equal(joined.vectors["pose"], np.concatenate([w.vectors["pose"] for w in alone]))
    np.testing.assert_array_equal(joined.images["cam"][:], np.concatenate([w.images["cam"] for w in alone]))
    assert joined.sources == [name for w in alone for name in w.sources]
    owner = np.repeat(np.arange(len(joined.episode_length)), joined.episode_length)
    np.testing.assert_array_equal(joined.episode_index, owner)
    assert [entry["source"] for entry in joined.provenance] == joined.sources
    rng = np.random.default_rng(0)
    idx, valid = joined.indices(joined.sample_starts(rng, 40, 6, np.arange(len(joined.episode_length))), 6)
    batch = joined.batch(idx, valid)
    np.testing.assert_array_equal(batch["image.cam"], joined.images["cam"][idx])
    np.testing.assert_array_equal(batch["is_first"], np.isin(idx, joined.episode_start) & valid)


@pytest.fixture
def alone(made: list[Path]) -> list[Windows]:
    return [Windows(root) for root in made]


# ---- what is meant by a dataset


def test_folders_lists_and_urls(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text(
        "# of this robot\n\none\n  two/three  \n/abs\ns3://bucket/four/\n#five\n"
    )
    found = places.expand(tmp_path / "all.txt")
    assert found == [str(tmp_path / "one"), str(tmp_path / "two/three"), "/abs", "s3://bucket/four"]
    assert places.expand([tmp_path / "x", "gs://b/c"]) == [str(tmp_path / "x"), "gs://b/c"]
    assert places.expand(Path("s3://bucket/a")) == ["s3://bucket/a"]  # whose slashes a Path has folded
    assert places.expand(f"file://{tmp_path}/x") == [f"{tmp_path}/x"]
    assert places.title([Path("s3://bucket/a"), "b"]) == "s3://bucket/a, b"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "name a dataset"),
        (["a", "./a"], "named twice"),
        (["s3://a/b", "s3://a/b/"], "named twice"),
        (["zip://x::s3://a/b"], "chains protocols"),
    ],
)
def test_places_that_cannot_be_meant(given: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        places.expand(given)


def test_lists_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "film.mp4").write_bytes(b"\xff\xfe\x00\x80")
    for name, sentence in (("empty.txt", "lists no dataset"), ("film.mp4", "not UTF-8")):
        with pytest.raises(UserError, match=sentence):
            places.expand(tmp_path / name)
    with pytest.raises(UserError, match="--cache-gb 0 must be above 0"):
        places.limit_bytes(0)


# ---- together


def test_a_list_of_folders_is_one_dataset(made, alone, tmp_path) -> None:
    (tmp_path / "all.txt").write_text("\n".join(map(str, made)))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    try:
        same(Windows(tmp_path / "all.txt"), alone)
        (index,) = (tmp_path / "d4").glob("index-*")
        stamp = index.stat().st_ino
        Windows([str(root) for root in made])
        assert index.stat().st_ino == stamp  # opened again, not made again
    finally:
        del os.environ["XDG_CACHE_HOME"]
    assert (made[0] / "cache").exists()  # frames where they are for each alone


@pytest.mark.parametrize("limit", [None, 80_000])
def test_a_cache_of_its_own_and_a_limit(made, alone, tmp_path, limit) -> None:
    """The data take 78 kB a third, and never more than the limit lies there."""
    windows = Windows([str(root) for root in made], tmp_path / "cache", limit=limit)
    same(windows, alone)
    size = used(windows.pieces._cache)
    assert size >= windows.num_frames * FRAME if limit is None else size <= limit
    windows.close()


def test_one_dataset_with_a_limit(made, alone, tmp_path) -> None:
    windows = Windows(made[1], tmp_path, limit=60_000)
    same(windows, alone[1:2])
    assert windows.digest != alone[1].digest  # of a list of one
    windows.close()


def test_an_index_is_made_again_when_a_dataset_has_grown(made, tmp_path) -> None:
    one = Path(shutil.copytree(made[0], tmp_path / "one", ignore=shutil.ignore_patterns("cache")))
    where = [str(one), str(made[1])]
    before = Windows(where, tmp_path / "cache")
    write(one, (6,), 70)
    after = Windows(where, tmp_path / "cache")
    assert after.num_frames == before.num_frames + 6
    same(after, [Windows(one), Windows(made[1])])
    assert after.digest != before.digest


def test_an_interrupted_index_leaves_nothing(made, tmp_path, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_episodes", stop)
        with pytest.raises(KeyboardInterrupt):
            Windows([str(root) for root in made], tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert Windows([str(root) for root in made], tmp_path).num_frames == sum(map(sum, LENGTHS))


def test_datasets_of_another_robot_are_refused(made, tmp_path) -> None:
    other = write(tmp_path / "other", (5,), rate_hz=20)
    with pytest.raises(UserError, match=r"other was made with another contract .* than .*set0"):
        Windows([str(made[0]), str(other)], tmp_path / "cache")


def test_a_video_that_is_too_short_is_named_with_its_episode(made, tmp_path) -> None:
    broken = Path(shutil.copytree(made[1], tmp_path / "broken", ignore=shutil.ignore_patterns("cache")))
    video, other = next(broken.rglob("*.mp4")), next(made[0].rglob("*.mp4"))
    shutil.copyfile(other, video)  # 13 frames instead of 24
    windows = Windows([str(made[0]), str(broken)], tmp_path / "cache")
    with pytest.raises(UserError, match=r"lacks frames of episode 1 in .*broken"):
        windows.images["cam"][:]
    assert windows.images["cam"][:13].shape == (13, 16, 24, 3)
    windows.close()


def test_a_name_that_leads_out_of_the_folder_is_refused(made, tmp_path) -> None:
    root = Path(shutil.copytree(made[0], tmp_path / "evil", ignore=shutil.ignore_patterns("cache")))
    info = json.loads((root / "meta/info.json").read_text())
    for name in ("../../{video_key}", "/etc/{video_key}"):
        (root / "meta/info.json").write_text(json.dumps(info | {"video_path": name}))
        with pytest.raises(UserError, match="not below its folder"):
            Windows(root)


# ---- behind URLs


def test_datasets_behind_urls(memory, alone, tmp_path) -> None:
    windows = Windows(memory, tmp_path)
    same(windows, alone)
    windows.close()
    again = Windows(memory, tmp_path)
    fsspec.filesystem("memory").rm("/set0/videos", recursive=True)  # all frames are here by now
    same(again, alone)
    again.close()
    assert not list(tmp_path.rglob("*.parquet")) or not list(tmp_path.rglob("data/*"))


def test_one_dataset_behind_a_url_within_a_limit(memory, alone, tmp_path) -> None:
    windows = Windows(Path(memory[1]), tmp_path, limit=90_000)
    same(windows, alone[1:2])
    assert used(windows.pieces._cache) <= 90_000
    windows.close()


def test_a_list_behind_a_url(memory, alone, tmp_path) -> None:
    fsspec.filesystem("memory").pipe_file("/lists/all.txt", b"../set1\nmemory://set2\n")
    fsspec.filesystem("memory").pipe_file("/all.txt", b"set1\nmemory://set2\n")
    for name in ("lists/all.txt", "all.txt"):
        assert places.expand(f"memory://{name}") == ["memory://set1", "memory://set2"]
    windows = Windows("memory://all.txt", tmp_path)
    same(windows, alone[1:])
    windows.close()
    with pytest.raises(UserError, match=r"memory://lists/none.txt is not there"):
        places.expand("memory://lists/none.txt")


def test_a_dataset_that_changes_behind_its_url_is_read_again(memory, made, tmp_path) -> None:
    before = Windows(memory[:1], tmp_path)
    assert before.num_frames == sum(LENGTHS[0])
    before.close()
    upload(made[2], "set0")
    after = Windows(memory[:1], tmp_path)
    same(after, [Windows(made[2])])
    after.close()


def test_what_is_missing_behind_a_url_is_one_sentence(memory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE_S", 0)
    with pytest.raises(UserError, match=r"memory://nothing is not a d4 dataset: meta/info.json is missing"):
        Windows("memory://nothing", tmp_path)
    with pytest.raises(UserError, match=r"nosuch://x cannot be read: Protocol not known: nosuch"):
        Windows("nosuch://x", tmp_path)
    fsspec.filesystem("memory").rm("/set0/data", recursive=True)
    with pytest.raises(UserError, match=r"memory://set0/data/.* is missing; copy the dataset again"):
        Windows(memory, tmp_path)
    windows = Windows(memory[1:], tmp_path)
    fsspec.filesystem("memory").rm("/set1/videos", recursive=True)
    with pytest.raises(UserError, match=r"memory://set1/videos/.* is missing"):
        windows.images["cam"][0]
    windows.close()
    assert not [path for path in tmp_path.rglob(".tmp-*") if "frames" not in str(path)]


def test_a_protocol_whose_package_is_missing_says_so(tmp_path, monkeypatch) -> None:
    def refuse(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(UserError, match=r"another package is needed .*Install s3fs.* pip install 'd4\[s3\]'"):
        Windows("s3://bucket/robot", tmp_path)


def test_a_moment_without_network_is_bridged(memory, alone, tmp_path, monkeypatch) -> None:
    """Every file fails once; datasets are opened side by side, so a count of calls would tell nothing."""
    monkeypatch.setattr(remote, "_PAUSE_S", 0)
    fs = fsspec.filesystem("memory")
    real, tried = type(fs).get_file, set()

    def flaky(self, path: str, *args: object, **more: object) -> None:
        if path not in tried:
            tried.add(path)
            raise ConnectionResetError("reset by peer")
        real(self, path, *args, **more)

    monkeypatch.setattr(type(fs), "get_file", flaky)
    windows = Windows(memory, tmp_path)
    same(windows, alone)
    windows.close()
    monkeypatch.setattr(type(fs), "get_file", lambda *_: (_ for _ in ()).throw(ConnectionResetError("gone")))
    with pytest.raises(UserError, match=r"memory://set0/meta/info.json cannot be read: gone"):
        Windows(memory, tmp_path / "other")


def test_a_file_that_ends_early_is_fetched_again(memory, alone, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE_S", 0)
    fs = fsspec.filesystem("memory")
    real, calls = type(fs).get_file, []

    def short(self, path: str, target: str, **more: object) -> None:
        real(self, path, target, **more)
        calls.append(path)
        if len(calls) == 3:
            os.truncate(target, 10)

    monkeypatch.setattr(type(fs), "get_file", short)
    windows = Windows(memory, tmp_path)
    same(windows, alone)
    assert calls.count(calls[2]) == 2
    windows.close()


def test_a_damaged_piece_is_made_again(made, alone, tmp_path) -> None:
    """As a machine that went down may leave it."""
    windows = Windows([str(root) for root in made], tmp_path)
    windows.images["cam"][:]
    windows.close()
    pieces = list((tmp_path / "frames").glob("*/cam.npy"))
    assert pieces
    for file in pieces:
        os.truncate(file, 200)
    windows = Windows([str(root) for root in made], tmp_path)
    same(windows, alone)
    windows.close()


def test_frames_are_found_in_the_middle_of_a_video(made, monkeypatch) -> None:
    """A piece begins anywhere in a file; only what it needs is decoded."""
    source = shards.Source(made[2])
    (name, _), *_ = source.videos("cam").items()
    seen = [number for number, _ in unpack._decode(made[2] / name, source.fps, 22)]
    assert seen[0] <= 22
    assert seen[0] > 0
    assert seen[-1] == sum(LENGTHS[2]) - 1
