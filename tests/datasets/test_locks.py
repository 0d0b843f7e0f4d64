"""One process at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from d4_datasets import frame_cache
from d4_datasets.errors import UserError
from d4_datasets.frame_cache import locked
from d4_datasets.locks import held, is_held


def test_a_lock_is_held_within_the_block_and_refused_to_others(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not is_held(path)
    with held(path):
        assert is_held(path)
        with pytest.raises(UserError, match="wait for it"), held(path, "wait for it"):
            pass
    assert not is_held(path)


def test_a_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    done, folder = [], tmp_path / "new" / "cache"

    def build() -> None:
        with locked(folder):
            done.append("second")

    with locked(folder):
        thread = threading.Thread(target=build)
        thread.start()
        thread.join(0.2)
        assert is_held(folder.parent / ".cache.lock")
        done.append("first")
    thread.join()
    assert done == ["first", "second"]


def test_a_folder_that_cannot_be_written_is_named_and_what_fails_in_the_block_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        with locked(tmp_path / "cache"):
            raise PermissionError("a video")

    with pytest.raises(PermissionError, match="a video"):
        fail()

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(frame_cache, "held", refuse)
    with pytest.raises(UserError, match=r"cannot write the frame cache to .*cache; name a writable folder"):
        fail()
