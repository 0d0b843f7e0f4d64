"""One large recording shows how far it is, and several are added up."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest

from d4_datasets import progress
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.progress import Shown, note, noted


def test_shares_of_cameras_add_up_and_a_note_that_is_being_written_is_none(tmp_path: Path) -> None:
    assert noted(tmp_path / "nothing") == 0
    note(tmp_path, "left", 0.25)
    note(tmp_path, "right", 0.125)
    (tmp_path / ".progress-wrist").write_text("")
    assert noted(tmp_path) == 0.375
    note(tmp_path, "wrist", 0.9)
    assert noted(tmp_path) == 1


def test_recordings_count_by_their_size(tmp_path: Path) -> None:
    folders = {tmp_path / name: size for name, size in (("a", 100), ("b", 300), ("c", 600))}
    for folder in folders:
        folder.mkdir()
    with Shown(folders) as shown:
        assert shown.done() == 0
        note(tmp_path / "b", "cam", 0.5)
        assert shown.done() == 150
        shown.finish(tmp_path / "a", 7)
        shown.finish(tmp_path / "b", 20)
        assert shown.done() == 400


def test_one_recording_says_how_far_it_is_and_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress counted whole recordings only: a night with one large bag showed nothing."""
    monkeypatch.setattr(progress, "NOTE_EVERY_S", 0)
    monkeypatch.setattr(progress, "_SAY_EVERY_S", 0.001)
    planted.Bag().write(tmp_path / "bag")
    ingest([tmp_path / "bag"], planted.contract(), tmp_path / "data")
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    shares = [int(re.fullmatch(r"(\d+)%, 0 frames, \d+ s left", line)[1]) for line in lines]
    assert shares == sorted(shares)
    assert len(np.unique(shares)) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bag", "data"]


def test_no_thread_outlives_a_mistake(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from d4_datasets.progress import Shown
with Shown({{Path({str(tmp_path)!r}): 1}}):
    raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 3


def test_one_bad_recording_among_several_says_how_to_go_on_without_it(tmp_path: Path) -> None:
    """What was finished is taken up by the command that leaves the bad one out."""
    for name in ("a", "b", "c"):
        planted.Bag(frames=30).write(tmp_path / "bags" / name)
    file = tmp_path / "bags/b/b.mcap"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(
        UserError, match=r"bags/b.*is empty or no MCAP file.* the same command goes on; --skip"
    ):
        ingest([tmp_path / "bags"], planted.contract(), tmp_path / "data")
    assert len([path for path in (tmp_path / ".tmp-data-parts").iterdir() if path.is_dir()]) == 1
    (tmp_path / "bad.txt").write_text("b\n")
    summary = ingest([tmp_path / "bags"], planted.contract(), tmp_path / "data", skip=tmp_path / "bad.txt")
    assert (summary.bags, summary.frames) == (2, 60)
    with pytest.raises(UserError) as alone:
        ingest([tmp_path / "bags/b"], planted.contract(), tmp_path / "other")
    assert "--skip" not in str(alone.value)


@pytest.mark.parametrize(("frames", "held"), [(1, "1 ticks (1 with /cam)"), (3, "81 ticks (3 with /cam)")])
def test_why_nothing_comes_of_a_recording_is_said(tmp_path: Path, frames: int, held: str) -> None:
    """The first warning was quoted, whatever it was about, for example a missing metadata.yaml."""
    bag = planted.Bag(frames=81)
    bag.keep[:] = np.isin(np.arange(81), (0, 40, 80)[:frames])
    (bag.write(tmp_path / "bag") / "metadata.yaml").unlink()
    spec = planted.contract().to_dict()
    spec["observations"][0]["align"] = {"strategy": "drop", "timeline": "header", "tolerance_ms": 90}
    with pytest.raises(UserError, match=re.escape(held) + ", and an episode takes at least 2 in a row"):
        ingest([tmp_path / "bag"], Contract.from_dict(spec), tmp_path / "data")
