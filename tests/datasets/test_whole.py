"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from d4_datasets import whole
from d4_datasets.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("data", "held"), [("a line\nÄ", b"a line\n\xc3\x84"), (b"\r\n\x00", b"\r\n\x00"), ("", b"")]
)
def test_what_was_written_is_there_and_nothing_else(tmp_path: Path, data: str | bytes, held: bytes) -> None:
    for before in (None, b"a longer text that was there before"):
        path = tmp_path / "file.txt"
        if before is not None:
            path.write_bytes(before)
        whole.write(path, data)
        assert path.read_bytes() == held
        assert names(tmp_path) == ["file.txt"]


def test_a_library_writes_aside_under_a_name_that_it_takes_for_the_same_kind(tmp_path: Path) -> None:
    """`numpy.save` appends .npy to other names."""
    path = tmp_path / "rows.npy"
    with whole.aside(path) as new:
        assert new.name.startswith(".tmp-")  # as readers and those who tidy know them
        np.save(new, np.arange(3))
        assert not path.exists()
    assert np.load(path).tolist() == [0, 1, 2]
    assert names(tmp_path) == ["rows.npy"]


@pytest.mark.parametrize("wrong", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, wrong: BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with whole.aside(path) as new:
            new.write_text("hal")
            raise wrong

    with pytest.raises(type(wrong)):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        whole.write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        whole.write(tmp_path / "none" / "file.txt", "new")
    assert names(tmp_path) == []


def test_writers_of_one_file_leave_one_of_theirs_whole(tmp_path: Path) -> None:
    path, size, start = tmp_path / "file.txt", 1 << 18, threading.Barrier(4)

    def work(letter: str) -> None:
        start.wait()
        for _ in range(20):
            whole.write(path, letter * size)
            seen = path.read_text()
            assert len(seen) == size
            assert len(set(seen)) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, "abcd"))
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("text", ["{", "[]", "5", "", "[" * 100_000])
def test_what_is_no_object_is_one_sentence(tmp_path: Path, text: str) -> None:
    """Results that were damaged on disk were a traceback that named no file."""
    path = tmp_path / "eval.json"
    assert whole.read_json(path, dict) == {}
    path.write_text(text)
    with pytest.raises(UserError, match=r"eval.json is damaged: restore it, or delete it and run again"):
        whole.read_json(path, dict)
    path.write_text('{"a": 1}')
    assert whole.read_json(path, dict) == {"a": 1}
