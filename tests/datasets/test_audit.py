"""Audit: every planted fault is found by name, and clean data pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_datasets.audit import Audit, audit
from d4_datasets.checks.base import Verdict


def _clean() -> list[synthetic.Episode]:
    """Two labelled episodes of 40 and 25 frames and an unlabelled one of 15, both tasks rewarded."""
    made = [synthetic.episode(40, 1), synthetic.episode(25, 2), synthetic.episode(20, 3, labelled=False)]
    for task, episode in enumerate(made[:2]):
        episode.terminal, episode.task = True, task
        episode.reward[-1, task] = 1.0
    return made


def _audit(tmp_path: Path, episodes: list[synthetic.Episode], **options: object) -> Audit:
    return audit(synthetic.write(tmp_path / "toy", episodes, **options))  # type: ignore[arg-type]


def _found(result: Audit, level: str, check: str) -> list[Verdict]:
    return [v for v in result.verdicts if (v.level, v.check) == (level, check)]


def test_clean_data_pass(tmp_path: Path) -> None:
    result = _audit(tmp_path, _clean())
    assert result.exit_code == 0
    assert {verdict.level for verdict in result.verdicts} == {"OK"}
    assert all(verdict.hint for verdict in result.verdicts if verdict.level != "OK")
    summary = result.summary
    assert (summary["episodes"], summary["frames"]) == (3, 85)
    assert summary["hours"] == pytest.approx(8.5 / 3600)
    assert result.labels["frames"] == pytest.approx(65 / 85)
    assert result.labels["episodes"] == pytest.approx(2 / 3)
    assert result.room["cache_bytes"] == 85 * 16 * 24 * 3
    assert [row.frames for row in result.episodes] == [40, 25, 20]
    assert [row.returns for row in result.episodes] == [[1, 0], [0, 1], [0, 0]]
    assert [row.terminal for row in result.episodes] == [True, True, False]
    right = result.tasks["right"]
    assert (right["episodes"], right["frames"], right["rewarded_episodes"]) == (1, 25, 1)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["exit_code"] == 0


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=4))
def test_label_share_equals_truth(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[int, int]]
) -> None:
    made = []
    for seed, (length, known) in enumerate(plan):
        episode = synthetic.episode(length, seed)
        episode.mask[min(known, length) :] = False
        episode.action[~episode.mask] = 0
        made.append(episode)
    result = _audit(tmp_path_factory.mktemp("share"), made)
    known = [min(known, length) for length, known in plan]
    assert [row.labelled for row in result.episodes] == known
    assert result.labels["frames"] == pytest.approx(sum(known) / sum(n for n, _ in plan))


def test_unlabelled_data_is_a_warning(tmp_path: Path) -> None:
    result = _audit(tmp_path, [synthetic.episode(40, seed, labelled=False) for seed in range(2)])
    assert result.exit_code == 0
    assert "agent phase cannot" in _found(result, "WARN", "labels")[0].message
    assert not _found(result, "ERROR", "actions")


def test_no_frames(tmp_path: Path) -> None:
    result = _audit(tmp_path, [])
    assert result.exit_code == 1
    assert _found(result, "ERROR", "frames")


def test_frozen_camera_throughout(tmp_path: Path) -> None:
    made = _clean()
    for episode in made:
        episode.images[:] = episode.images[0]
    result = _audit(tmp_path, made)
    assert result.exit_code == 1
    assert "cam is frozen" in _found(result, "ERROR", "camera")[0].message


def test_frozen_run_is_counted(tmp_path: Path) -> None:
    made = _clean()
    made[0].images[5:29] = made[0].images[5]
    made[0].images[30:32] = made[0].images[30]
    result = _audit(tmp_path, made)
    assert result.exit_code == 0
    assert (result.episodes[0].repeated, result.episodes[0].longest_repeat) == (23 + 1, 24)
    assert result.episodes[1].repeated == 0
    assert "longest run 24 frames (2.4 s)" in _found(result, "WARN", "camera")[0].message


def test_slow_camera_is_told_from_a_stalled_one(tmp_path: Path) -> None:
    made = _clean()
    for episode in made:
        episode.images[1::2] = episode.images[: len(episode.mask) // 2 * 2 : 2]
    message = _found(_audit(tmp_path, made), "WARN", "camera")[0].message
    assert "delivers about 4.9 Hz, the contract asks for 10" in message


def test_dark_frames(tmp_path: Path) -> None:
    made = _clean()
    made[1].images[5:15, 1:] = 0
    result = _audit(tmp_path, made)
    assert result.episodes[1].dark == 10
    assert "are dark" in _found(result, "WARN", "camera")[0].message


def test_gap_in_a_recording(tmp_path: Path) -> None:
    made = _clean()
    second = 1_000_000_000
    made[0].provenance = {"source": "a", "start_ns": 5 * second, "stale": 3}
    made[1].provenance = {"source": "a", "start_ns": 5 * second + 4 * second + second // 2, "dropped": 7}
    made[2].provenance = {"source": "b", "start_ns": 90 * second}
    result = _audit(tmp_path, made)
    assert [row.gap_s for row in result.episodes] == [None, 0.5, None]
    assert [row.stale for row in result.episodes] == [3, 0, 0]
    assert [row.dropped for row in result.episodes] == [0, 7, 0]


def test_many_stale_frames(tmp_path: Path) -> None:
    made = _clean()
    made[0].provenance = {"stale": 30}
    result = _audit(tmp_path, made)
    assert "35.3% stale frames: pictures came at about 6.5 Hz" in _found(result, "WARN", "rate")[0].message
    assert result.times["achieved_hz"] == pytest.approx(10 * 55 / 85)


def test_action_outside_the_contract(tmp_path: Path) -> None:
    made = _clean()
    made[1].action[4, 1] = 1.5
    result = _audit(tmp_path, made)
    assert result.exit_code == 1
    (error,) = _found(result, "ERROR", "actions")
    assert "base.linear.y is outside its contract in 1 frames" in error.message
    assert result.actions["base.linear.y"]["outside"] == 1
    assert result.actions["base.linear.y"]["max"] == 1.5


def test_constant_actions(tmp_path: Path) -> None:
    made = _clean()
    for episode in made:
        episode.action[:, 0] = 0
    result = _audit(tmp_path / "one", made)
    assert result.exit_code == 0
    assert "base.linear.x never changes" in _found(result, "WARN", "actions")[0].message
    for episode in made:
        episode.action[:] = 0
    result = _audit(tmp_path / "all", made)
    assert result.exit_code == 1
    assert "all actions are constant" in _found(result, "ERROR", "actions")[0].message


def test_wrong_unit_shows_as_unused_range(tmp_path: Path) -> None:
    made = _clean()
    for episode in made:
        episode.action *= 0.01
    assert "uses 0.9% of its range" in _found(_audit(tmp_path, made), "WARN", "actions")[0].message


def test_steps_above_max_rate(tmp_path: Path) -> None:
    spec = synthetic.contract()
    spec["actions"][0]["max_rate"] = [1.0, 1000.0]
    warnings = _found(_audit(tmp_path, _clean(), spec=spec), "WARN", "actions")
    assert [w.message.split()[0] for w in warnings] == ["base.linear.x"]


def test_nan_is_an_error_and_the_rest_is_still_reported(tmp_path: Path) -> None:
    made = _clean()
    made[1].action[3] = np.nan
    result = _audit(tmp_path, made)
    assert result.exit_code == 1
    assert (
        "column action is NaN or infinite in 1 frames of episode 1"
        in _found(result, "ERROR", "numbers")[0].message
    )
    assert result.actions["base.linear.x"]["outside"] == 0
    json.dumps(result.to_dict(), allow_nan=False)


def test_wrong_rate(tmp_path: Path) -> None:
    result = _audit(tmp_path, _clean(), fps=20)
    assert result.exit_code == 1
    assert "runs at 20 Hz, its contract at 10 Hz" in _found(result, "ERROR", "rate")[0].message


def test_contract_changed_after_ingest(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path, _clean())
    path = root / "meta" / "d4.json"
    meta = json.loads(path.read_text())
    meta["contract"]["latency_ms"] = 80
    path.write_text(json.dumps(meta))
    assert _found(audit(root), "ERROR", "contract")


def test_copied_episode(tmp_path: Path) -> None:
    made = _clean()
    result = _audit(tmp_path, [*made, made[1]])
    assert [row.copy_of for row in result.episodes] == [None, None, None, 1]
    assert "episode 3 equals 1" in _found(result, "WARN", "episodes")[0].message


def test_shreds(tmp_path: Path) -> None:
    result = _audit(tmp_path, [synthetic.episode(5, seed) for seed in range(3)])
    assert "3 of 3 episodes have fewer than 16 frames" in _found(result, "WARN", "episodes")[0].message


def test_tasks_without_data_or_reward(tmp_path: Path) -> None:
    made = _clean()
    made[1].task = 0
    made[1].reward[:] = 0
    warnings = [w.message for w in _found(_audit(tmp_path / "a", made), "WARN", "tasks")]
    assert warnings[0] == "no frames of right"
    assert warnings[1].startswith("no reward in any episode for right")
    made[1].task = 7
    assert "25 frames have a task" in _found(_audit(tmp_path / "b", made), "ERROR", "tasks")[0].message


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "d4_datasets.audit", "--no-presets", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_writes_what_it_found(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path / "toy", _clean())
    done = _command(root, "--json", tmp_path / "a.json", "--sheet", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert "3 episodes, 85 frames" in done.stdout
    assert "OK    actions: all within the contract" in done.stdout
    assert json.loads((tmp_path / "a.json").read_text())["summary"]["frames"] == 85
    height, width, _ = cv2.imread(str(tmp_path / "a.png")).shape
    assert height > 3 * 96
    assert width > 10 * 96
    assert not list(tmp_path.glob(".tmp-*"))


def test_command_exit_codes(tmp_path: Path) -> None:
    empty = _command(synthetic.write(tmp_path / "empty", []), "--sheet", tmp_path / "a.png")
    assert empty.returncode == 1
    assert "ERROR frames" in empty.stdout
    for arguments in ([tmp_path / "nowhere"], [tmp_path / "empty", "--json", tmp_path / "no" / "a.json"], []):
        done = _command(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
