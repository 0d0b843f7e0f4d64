"""What the presets take stands in the audit: on the terminal, in JSON and on the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import planted
import pytest
import synthetic

from d4_datasets import audit_text, presets
from d4_datasets.audit import audit
from d4_datasets.audit_page import page
from d4_datasets.checks.base import size_text
from d4_datasets.presets import Presets
from d4_datasets.windows import Windows

NANO: dict[str, Any] = {
    "preset": "nano", "parameters": 3_600_000, "train_bytes": 4e8, "seconds": {"tokenizer": 200.0},
    "total_seconds": 1860.0, "device": "cpu", "seen": 8.5, "latents_bytes": 256_000,
    "checkpoints_bytes": 113_000_000,
}  # fmt: skip
PAPER = {"preset": "paper", "reason": "32 is no multiple of <16>"}


def asked(script: str) -> tuple[list[dict[str, Any]], str]:
    """The answer of a process that runs this script in place of d4_core."""
    question = Presets(["data"])
    question._words = [sys.executable, "-c", script]
    with question:
        return question.answer()


def test_presets_on_terminal_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = synthetic.write(tmp_path / "toy", [planted.episode(frames=30)], planted.spec())
    result = audit(root)
    assert result.to_dict()["presets"] == []
    lines = f"import json\nfor p in {[NANO, PAPER]!r}: print(json.dumps(p))"
    result.presets, reason = asked(lines)
    assert reason == ""
    assert result.presets == [NANO, PAPER]
    audit_text.show(json.loads(json.dumps(result.to_dict())))
    room = result.room["disk_bytes"] + result.room["cache_bytes"]
    disk = size_text(room + 113_256_000)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("nano"))
    assert re.split("  +", line)[1:] == ["3.6 M", "400 MB", "31 min", "8.5 times", disk, "256 kB", "113 MB"]
    text = page(result.to_dict(), Windows(root))
    assert '<td class="num">31 min</td>' in text
    assert "does not fit: 32 is no multiple of &lt;16&gt;" in text


def test_times_read_well() -> None:
    said = [audit_text.time_text(s) for s in (0.5, 61, 130, 7300, 3.1e6, 1e9)]
    assert said == ["0.5 s", "61 s", "2.2 min", "2 h", "36 days", "32 years"]


def test_a_failure_is_said_and_no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("import sys; sys.exit('error: no memory')") == ([], "no memory")
    monkeypatch.setattr(presets, "_MOST_S", 0.2)
    found, reason = asked("import time; time.sleep(60)")
    assert (found, reason) == ([], "measuring took more than 0.00333333 min")
    monkeypatch.setattr(presets, "_MODULE", "nothing_of_that_name.x")
    with Presets(["data"]) as question:
        assert question.answer() == ([], "d4_core is not installed")
