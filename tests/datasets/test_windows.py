"""Windows: what was written comes back frame for frame, and no window crosses an episode."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Episode as Recorded
from d4_datasets.lerobot import LeRobotWriter
from d4_datasets.windows import Windows

LENGTHS = (30, 1, 7, 52, 12)


@pytest.fixture(scope="module")
def episodes() -> list[synthetic.Episode]:
    made = [synthetic.episode(n, seed, labelled=seed not in (1, 2)) for seed, n in enumerate(LENGTHS)]
    made[3].terminal, made[3].task = True, 1
    made[3].reward[-1] = 1.0
    return made


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory, episodes: list[synthetic.Episode]) -> Windows:
    return Windows(synthetic.write(tmp_path_factory.mktemp("windows"), episodes))


def test_every_value_comes_back(windows: Windows, episodes: list[synthetic.Episode]) -> None:
    assert windows.num_frames == sum(LENGTHS)
    np.testing.assert_array_equal(windows.images["cam"], np.concatenate([e.images for e in episodes]))
    np.testing.assert_array_equal(windows.action, np.concatenate([e.action for e in episodes]))
    np.testing.assert_array_equal(windows.action_mask, np.concatenate([e.mask for e in episodes]))
    np.testing.assert_array_equal(windows.reward, np.concatenate([e.reward for e in episodes]))
    np.testing.assert_array_equal(windows.vectors["pose"], np.concatenate([e.pose for e in episodes]))
    np.testing.assert_array_equal(windows.task_index, np.repeat([0, 0, 0, 1, 0], LENGTHS))
    assert np.flatnonzero(windows.is_terminal).tolist() == [sum(LENGTHS[:4]) - 1]
    assert windows.labelled.tolist() == [True, False, False, True, True]
    assert windows.episode_length.tolist() == list(LENGTHS)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 4), min_size=1))
def test_windows_stay_in_their_episode(windows: Windows, length: int, seed: int, chosen: set[int]) -> None:
    ids = np.array(sorted(chosen))
    starts = windows.sample_starts(np.random.default_rng(seed), 64, length, ids)
    idx, valid = windows.indices(starts, length)
    assert idx.shape == valid.shape == (64, length)
    owner = np.asarray(windows.episode_index)[idx]
    assert (owner == owner[:, :1]).all()
    assert np.isin(owner, ids).all()
    size = windows.episode_length[owner[:, 0]]
    # Nothing is padded where the episode is long enough, and exactly the missing frames are where it is not.
    np.testing.assert_array_equal(valid.sum(1), np.minimum(length, size))
    steps = np.diff(idx, axis=1)
    np.testing.assert_array_equal(steps, valid[:, 1:].astype(np.int64))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70))
def test_every_frame_is_reachable(windows: Windows, length: int) -> None:
    rng = np.random.default_rng(length)
    starts = windows.sample_starts(rng, 20_000, length, np.arange(5))
    idx, valid = windows.indices(starts, length)
    assert np.bincount(idx[valid], minlength=windows.num_frames).min() > 0


def test_edges_of_an_episode_are_not_starved(windows: Windows) -> None:
    """With starts drawn plainly, the first and last frame of an episode would be in one window of 37 only."""
    idx, _ = windows.indices(windows.sample_starts(np.random.default_rng(0), 20_000, 16, np.array([3])), 16)
    seen = np.bincount(idx.ravel(), minlength=windows.num_frames)[windows.episode_index == 3]
    assert seen.min() > 0.45 * seen.mean()
    assert seen[0] == pytest.approx(seen[-1], rel=0.1)


def test_batch_pads_without_paying_twice(windows: Windows) -> None:
    start = windows.episode_start[3] + 50
    out = windows.batch(*windows.indices(np.array([start]), 5))
    assert out["valid"].tolist() == [[True, True, False, False, False]]
    assert out["is_terminal"].tolist() == [[False, True, False, False, False]]
    assert out["reward"][0, :, 0].tolist() == [0, 1, 0, 0, 0]
    assert not out["action_mask"][0, 2:].any()
    assert not out["action"][0, 2:].any()
    np.testing.assert_array_equal(out["image.cam"][0, 4], windows.images["cam"][start + 1])
    assert out["image.cam"].flags.writeable
    assert type(out["image.cam"]) is np.ndarray
    flags = {"action_mask", "is_terminal", "is_first", "valid"}
    assert set(out) == {"image.cam", "vector.pose", "action", "reward", "task_index"} | flags


def test_is_first_only_on_first_frames(windows: Windows) -> None:
    out = windows.batch(*windows.indices(windows.episode_start[:2], 4))  # episode 1 has a single frame
    assert out["is_first"].tolist() == [[True, False, False, False]] * 2


def test_split_is_deterministic_and_stratified(windows: Windows) -> None:
    train, held = windows.split(0.3, seed=4)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(5))
    assert {True, False} == set(windows.labelled[train]) == set(windows.labelled[held])
    np.testing.assert_array_equal(windows.split(0.3, seed=4)[1], held)
    assert windows.split(0.0)[1].size == 0
    with pytest.raises(UserError, match="holdout"):
        windows.split(1.0)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=40), st.floats(0.02, 0.5))
@settings(deadline=None, max_examples=50)
def test_no_recording_stands_on_both_sides_if_there_are_enough(recordings, holdout) -> None:
    """Pieces of one five-minute recording were trained on and held out."""
    logs = object.__new__(Windows)
    logs.sources = [f"bag-{k}" for k, (count, _) in enumerate(recordings) for _ in range(count)]
    logs.labelled = np.array([known for count, known in recordings for _ in range(count)])
    logs.episode_start = np.arange(len(logs.sources))
    logs.provenance = []
    train, held = logs.split(holdout)
    assert sorted([*train, *held]) == list(range(len(logs.sources)))
    kinds = [sum(known is kind for _, known in recordings) for kind in (True, False)]
    sides = [{logs.sources[k] for k in side} for side in (train, held)]
    if all(not count or count * holdout >= 1 for count in kinds):
        assert not sides[0] & sides[1]
        assert len(sides[1]) == sum(min(max(1, round(holdout * n)), n - 1) for n in kinds if n > 1)
    else:
        assert len(train) >= 1


@pytest.mark.parametrize("drives", [40, 4])
def test_of_a_few_recordings_whole_drives_are_held_out_if_there_are_enough(drives: int) -> None:
    """Six bags of many games each: pieces of one game were trained on and held out."""
    logs = object.__new__(Windows)
    logs.sources = [name for name in ("a", "b") for _ in range(3 * drives)]
    logs.provenance = [{"drive": k // 3} for _ in range(2) for k in range(3 * drives)]
    logs.labelled = np.array([name == "a" for name in logs.sources])
    logs.episode_start = np.arange(len(logs.sources))
    sides = [{(logs.sources[k], logs.provenance[k]["drive"]) for k in side} for side in logs.split(0.05)]
    assert len(sides[1]) == (4 if drives == 40 else 2)
    assert bool(sides[0] & sides[1]) == (drives == 4)


@given(st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_kept_labels_are_nested_and_leave_other_episodes_alone(windows: Windows, a: float, b: float) -> None:
    chosen, kept = np.array([0, 1, 3]), []
    for share in sorted((a, b)):
        own = Windows(windows.root)
        own.keep_labels(chosen, share)
        assert own.labelled[chosen].sum() == round(share * 2)
        assert own.labelled[4]
        assert not (own.action_mask & ~windows.action_mask).any()
        np.testing.assert_array_equal(
            own.labelled, np.logical_or.reduceat(own.action_mask, own.episode_start)
        )
        idx, valid = own.indices(own.episode_start[[0]], 3)
        np.testing.assert_array_equal(own.batch(idx, valid)["action_mask"], own.action_mask[idx])
        kept.append(own.labelled)
    assert not (kept[0] & ~kept[1]).any()


def test_labels_of_other_recordings_are_forgotten(tmp_path: Path, episodes: list[synthetic.Episode]) -> None:
    own = Windows(synthetic.write(tmp_path, episodes))
    assert len(own.sources) == len(LENGTHS)
    picked = own.of(own.sources[3])
    assert picked.tolist() == [name == own.sources[3] for name in own.sources]
    before = own.labelled
    own.keep_labels(np.array([0, 3]), 1.0, own.sources[3])
    assert own.labelled[[0, 3]].tolist() == picked[[0, 3]].tolist()
    assert own.labelled[[1, 2, 4]].tolist() == before[[1, 2, 4]].tolist()


def test_sampling_nothing_is_an_error(windows: Windows) -> None:
    with pytest.raises(UserError, match="no episodes"):
        windows.sample_starts(np.random.default_rng(0), 4, 8, np.array([], np.int64))


def _inode(root: Path) -> int:
    return (root / "cache" / "cam.npy").stat().st_ino


def test_cache_is_reused_and_rebuilt_when_the_data_change(tmp_path: Path) -> None:
    data = [synthetic.episode(9, 1), synthetic.episode(6, 2)]
    root = synthetic.write(tmp_path, data)
    Windows(root)
    built = _inode(root)
    Windows(root)
    assert _inode(root) == built
    for path in root.rglob("*.parquet"):  # copied: other times, same content
        os.utime(path, ns=(1, 1))
    Windows(root)
    assert _inode(root) == built
    data[1].action[3] = 0.25  # same size on disk, one value changed
    synthetic.write(root, data)
    assert Windows(root).action[12].tolist() == [0.25, 0.25]
    assert not list(root.glob(".tmp-*"))


def test_cache_with_a_lost_or_cut_array_is_rebuilt(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path, [synthetic.episode(9)])
    Windows(root)
    os.truncate(root / "cache" / "cam.npy", 200)
    (root / "cache" / "columns" / "action.npy").unlink()
    assert Windows(root).images["cam"].shape == (9, 16, 24, 3)


def test_killed_build_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = synthetic.write(tmp_path, [synthetic.episode(9)])
    monkeypatch.setattr(
        "d4_datasets.frame_cache.unpack_camera", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        Windows(root)
    assert not (root / "cache").exists()
    (root / ".tmp-cache").mkdir()
    (root / ".tmp-cache" / "cam.npy").write_bytes(b"left by kill -9")
    monkeypatch.undo()
    assert Windows(root).num_frames == 9


def test_cache_elsewhere_never_deletes_other_files(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path / "data", [synthetic.episode(5)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a frame cache"):
        Windows(root, tmp_path / "mine")
    assert Windows(root, tmp_path / "cache").num_frames == 5
    assert not (root / "cache").exists()


@pytest.mark.parametrize(("column", "stored"), [("action", "action"), ("pose", "observation.pose")])
def test_nan_names_column_and_episode(tmp_path: Path, column: str, stored: str) -> None:
    data = [synthetic.episode(5), synthetic.episode(6, 1)]
    getattr(data[1], column)[2, 1] = np.nan
    root = synthetic.write(tmp_path, data)
    with pytest.raises(UserError, match=rf"'{stored}'.* 1 frames of episode 1"):
        Windows(root)
    assert Windows(root, strict=False).nonfinite == {(stored, 1): 1}


def test_empty_or_broken_datasets_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a d4 dataset"):
        Windows(tmp_path)
    with pytest.raises(UserError, match="no frames"):
        Windows(synthetic.write(tmp_path / "empty", []))
    root = synthetic.write(tmp_path / "lost", [synthetic.episode(5)])
    next(root.rglob("*.mp4")).unlink()
    with pytest.raises(UserError, match="missing although"):
        Windows(root)
    root = synthetic.write(tmp_path / "cut", [synthetic.episode(5)])
    next(root.rglob("*.mp4")).write_bytes(b"not a video at all")
    with pytest.raises(UserError, match="cannot be decoded"):
        Windows(root)
    assert not (root / "cache").exists()


def test_video_shorter_than_its_labels(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path, [synthetic.episode(8)])
    short = synthetic.write(tmp_path / "short", [synthetic.episode(5)])
    os.replace(next((short / "videos").rglob("*.mp4")), next((root / "videos").rglob("*.mp4")))
    with pytest.raises(UserError, match="lacks frames of episode 0"):
        Windows(root)


@pytest.mark.parametrize("rate", [10, 29.97])
def test_what_the_writer_wrote_is_read(tmp_path: Path, rate: float) -> None:
    """Two cameras, one task (LeRobot stores vectors of width 1 as plain numbers), two rounds of writing."""
    spec = synthetic.contract(tasks=("only",)) | {"rate_hz": rate}
    spec["observations"].append(spec["observations"][0] | {"name": "wrist", "size": [8, 10]})
    contract = Contract.from_dict(spec)
    made = [synthetic.episode(n, seed) for seed, n in enumerate((9, 4, 17))]
    wrist = [
        np.random.default_rng(n).integers(0, 256, (len(e.mask), 8, 10, 3), np.uint8)
        for n, e in enumerate(made)
    ]
    for chosen in ([0, 1], [2]):
        with LeRobotWriter(tmp_path / "set", contract) as writer:
            for i in chosen:
                e = made[i]
                writer.add_episode(
                    Recorded({"cam": e.images, "wrist": wrist[i]}, e.action, e.mask, e.reward[:, :1],
                             np.zeros(len(e.mask), np.int64), np.zeros(len(e.mask), bool), {"pose": e.pose})
                )  # fmt: skip
        windows = Windows(tmp_path / "set")
    np.testing.assert_array_equal(windows.images["cam"], np.concatenate([e.images for e in made]))
    np.testing.assert_array_equal(windows.images["wrist"], np.concatenate(wrist))
    np.testing.assert_array_equal(windows.action, np.concatenate([e.action for e in made]))
    np.testing.assert_array_equal(windows.vectors["pose"], np.concatenate([e.pose for e in made]))
    assert windows.reward.shape == (30, 1)


def test_batches_are_fast(tmp_path: Path) -> None:
    """The trainer never waits: the target is 20,000 frames/s at 64x64 on one core; a loaded machine gets
    half."""
    size = (64, 64)
    root = synthetic.write(
        tmp_path, [synthetic.episode(400, s, size=size) for s in range(2)], synthetic.contract(size)
    )
    windows = Windows(root)
    rng = np.random.default_rng(0)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            windows.batch(*windows.indices(windows.sample_starts(rng, 16, 32, np.arange(2)), 32))
        best = max(best, 4 * 16 * 32 / (time.perf_counter() - begin))
    assert best > 10_000
