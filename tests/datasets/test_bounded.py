"""A bounded cache folder: within its limit, never half-written, shared by processes. Arrays in parts."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets.bounded import BoundedCache, CacheFull
from d4_datasets.errors import UserError
from d4_datasets.joined import Joined, gather


def fill(size: int):
    return lambda folder: (folder / "x").write_bytes(bytes(size))


def used(cache: BoundedCache) -> int:
    """Bytes of all entries."""
    return sum(size for _, size, _ in cache._entries())


def keys(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_what_was_used_longest_ago_makes_room(tmp_path) -> None:
    cache = BoundedCache(tmp_path, 100)
    for number, key in enumerate("abc"):
        folder = cache.hold(key, 30, fill(30))
        cache.release(key)
        os.utime(folder, (number, number))
    os.utime(cache.hold("a", 30, fill(0)), (9, 9))  # used again
    cache.release("a")
    cache.hold("d", 60, fill(60))
    assert keys(tmp_path) == {"a", "d"}
    assert (tmp_path / "a" / "x").stat().st_size == 30  # not built twice
    assert used(cache) == 90


def test_what_is_held_stays(tmp_path) -> None:
    cache, other = BoundedCache(tmp_path, 100), BoundedCache(tmp_path, 100)
    cache.hold("a", 60, fill(60))
    with pytest.raises(CacheFull, match=r"is full of what is in use .* --cache-gb"):
        other.hold("b", 60, fill(60))
    cache.release("a")
    other.hold("b", 60, fill(60))
    assert keys(tmp_path) == {"b"}
    with pytest.raises(UserError, match="may hold"):
        other.hold("c", 101, fill(101))


def test_a_build_that_fails_leaves_nothing(tmp_path) -> None:
    def fail(folder: Path) -> None:
        (folder / "x").write_bytes(b"half")
        raise KeyboardInterrupt

    cache = BoundedCache(tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        cache.hold("a", 10, fail)
    assert keys(tmp_path) == set()
    assert (cache.hold("a", 10, fill(10)) / "x").stat().st_size == 10


KILLED = """
import os, sys, pathlib
from d4_datasets.bounded import BoundedCache
def build(folder):
    (folder / "x").write_bytes(bytes(50))
    os.kill(os.getpid(), 9)
BoundedCache(pathlib.Path(sys.argv[1]), 100).hold("a", 50, build)
"""


def test_what_a_kill_left_is_cleared_away(tmp_path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (left,) = keys(tmp_path)
    assert left.startswith(".tmp-a-")
    cache = BoundedCache(tmp_path, 100)
    cache.hold("b", 90, fill(90))
    assert keys(tmp_path) == {"b"}


def test_room_is_reserved_while_something_is_made(tmp_path) -> None:
    """Two that begin at once would otherwise both find room."""
    began, go, told = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> None:
        began.set()
        go.wait(5)
        (folder / "x").write_bytes(bytes(60))

    thread = threading.Thread(target=lambda: BoundedCache(tmp_path, 100).hold("a", 60, slow))
    thread.start()
    began.wait(5)
    with pytest.raises(CacheFull):
        BoundedCache(tmp_path, 100).hold("b", 60, told.append)
    go.set()
    thread.join()
    assert told == []
    assert keys(tmp_path) == {"a"}


def _busy(folder: str, seed: int, result: multiprocessing.Queue) -> None:
    rng, cache, most = np.random.default_rng(seed), BoundedCache(Path(folder), 1000), 0
    for _ in range(60):
        key = str(rng.integers(12))
        size = 100 + 10 * int(key)
        try:
            held = cache.hold(key, size, fill(size))
        except CacheFull:
            cache.close()
            continue
        assert (held / "x").stat().st_size == size
        most = max(most, used(cache))
        if rng.random() < 0.7:
            cache.release(key)
    cache.close()
    result.put(most)


def test_processes_share_it(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    result = context.Queue()
    workers = [context.Process(target=_busy, args=(str(tmp_path), seed, result)) for seed in range(3)]
    for worker in workers:
        worker.start()
    most = [result.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert max(most) <= 1000
    assert not [name for name in keys(tmp_path) if name.startswith(".")]


# ---- arrays in parts


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_parts_read_as_one_array(lengths, data) -> None:
    whole = np.arange(3 * sum(lengths), dtype=np.int16).reshape(-1, 3)
    bounds = np.cumsum([0, *lengths])
    joined = Joined(bounds, lambda k: whole[bounds[k] : bounds[k + 1]], (3,), np.int16)
    assert (joined.shape, len(joined), joined.dtype) == (whole.shape, len(whole), whole.dtype)
    number = st.integers(-len(whole), len(whole) - 1)
    shape = data.draw(st.sampled_from([(), (5,), (2, 3), (0,)]))
    index = np.array(data.draw(st.lists(number, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
    index = index.astype(np.int64).reshape(shape)
    np.testing.assert_array_equal(joined[index], whole[index])
    begin, end = data.draw(number), data.draw(number)
    np.testing.assert_array_equal(joined[begin:end], whole[begin:end])
    np.testing.assert_array_equal(joined[whole[:, 0] % 2 == 0], whole[whole[:, 0] % 2 == 0])


@pytest.mark.parametrize("source", ["array", "joined"])
def test_rows_are_copied_into_what_is_given(source) -> None:
    whole = np.arange(40, dtype=np.float32).reshape(10, 4)
    rows = (
        whole
        if source == "array"
        else Joined(np.array([0, 4, 10]), [whole[:4], whole[4:]].__getitem__, (4,), "f4")
    )
    out = np.zeros((2, 3, 4), np.float32)
    index = np.array([[0, 3, 4], [9, 9, 1]])
    assert gather(rows, index, out) is out
    np.testing.assert_array_equal(out, whole[index])
    for wrong in (10, 99):
        with pytest.raises(IndexError):
            gather(rows, np.array([wrong]), out[0, :1])
