"""Which episodes a rank draws from at a step: all of the data, each in its part, the same after a restart."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bounded import used
from test_shards import write

from d4_datasets.course import Course, owners
from d4_datasets.errors import UserError
from d4_datasets.pieces import cut
from d4_datasets.windows import Windows

FRAME = 16 * 24 * 3


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 5))
def test_every_piece_has_one_owner_and_all_have_about_as_much(frames, ranks) -> None:
    owner = owners(np.array(frames), ranks)
    loads = np.bincount(owner, frames, ranks)
    assert loads.sum() == sum(frames)
    assert loads.max() - loads.min() <= max(frames)


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=80))
def test_pieces_cover_all_episodes_and_no_two_files(episodes) -> None:
    length = np.array([n for n, _ in episodes])
    file = np.cumsum([changes for _, changes in episodes])
    bounds = cut(length, file, 1)
    assert (bounds[0], bounds[-1]) == (0, len(length))
    assert (np.diff(bounds) > 0).all()
    for begin, end in pairwise(bounds):
        assert len(np.unique(file[begin:end])) == 1
        assert length[begin:end].sum() <= max(length.sum() // 32, length[begin], 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """40 episodes of 10 frames in two datasets, and a cache."""
    folder = tmp_path_factory.mktemp("course")
    roots = [str(write(folder / name, (10,) * 20, 100 * n)) for n, name in enumerate(("one", "two"))]
    Windows(roots, folder / "cache").close()
    return roots, folder / "cache"


def opened(data, frames: int | None, readers: int = 1) -> Windows:
    """With a cache for so many frames per reader."""
    limit = None if frames is None else readers * (frames * FRAME + frames // 10 * 256)  # and headers
    return Windows(data[0], data[1], limit=limit, readers=readers)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_training_episodes(data, ranks) -> None:
    windows = opened(data, None)
    train, _ = windows.split()
    parts = [Course(windows, train, rank=rank, ranks=ranks).part for rank in range(ranks)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), train)
    sizes = [windows.episode_length[part].sum() for part in parts]
    assert max(sizes) - min(sizes) <= 20
    for part in parts:  # of both datasets and both kinds, not one each
        assert len(np.unique(part // 20)) == 2
        assert len(np.unique(windows.labelled[part])) == 2
    windows.close()


def test_more_ranks_than_pieces_all_read_all(data) -> None:
    windows = opened(data, None)
    few = np.array([0, 1])
    for rank in range(5):
        np.testing.assert_array_equal(Course(windows, few, rank=rank, ranks=5).part, few)
    windows.close()


def test_a_dataset_on_this_disk_is_drawn_from_as_ever(data) -> None:
    windows = Windows(data[0][0])
    course = Course(windows, np.arange(3, 9), rank=1, ranks=2, frames_per_step=8)
    np.testing.assert_array_equal(course(0), np.arange(3, 9))
    assert course.at_once is None


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 99), st.integers(1, 2), st.integers(1, 12))
def test_pieces_come_and_go_and_each_round_shows_every_frame(data, seed, ranks, frames_per_step) -> None:
    windows = opened(data, 70, ranks)
    train, _ = windows.split()
    for rank in range(ranks):
        course = Course(windows, train, seed=seed, rank=rank, ranks=ranks, frames_per_step=frames_per_step)
        assert course.at_once is not None
        own = int(windows.episode_length[course.part].sum())
        steps = -(-3 * own // frames_per_step)
        shown = [tuple(course(step)) for step in range(steps)]
        again = Course(windows, train, seed=seed, rank=rank, ranks=ranks, frames_per_step=frames_per_step)
        for step in np.random.default_rng(seed).integers(0, steps, 6):  # a run that is resumed anywhere
            assert tuple(again(int(step))) == shown[step]
        counts = Counter(episode for now in shown for episode in now)
        assert set(counts) == set(course.part.tolist())
        assert min(counts.values()) > 0.5 * np.mean(list(counts.values()))
        assert max(windows.episode_length[list(now)].sum() for now in shown) <= 70
        changes = sum(a != b for a, b in pairwise(shown))
        assert changes <= 3 * len(course.part) + 1
    windows.close()


def test_what_is_drawn_is_unpacked_and_no_more(data) -> None:
    """The next piece is made while this one is drawn from; the cache keeps to its limit."""
    windows = opened(data, 60)
    train, _ = windows.split()
    course = Course(windows, train, frames_per_step=4)
    rng, seen = np.random.default_rng(0), set()
    for step in range(150):
        starts = windows.sample_starts(rng, 4, 1, course(step))
        windows.images["cam"][starts]
        seen |= set(windows.episode_index[starts].tolist())
        assert used(windows.pieces._cache) <= windows.limit
    assert len(seen) > 30
    windows.close()


def test_a_cache_too_small_to_work_with_is_refused(data) -> None:
    windows = opened(data, 15)
    with pytest.raises(UserError, match=r"a piece of the dataset takes .* twice that.*--cache-gb"):
        Course(windows, windows.split()[0])
    windows.close()
