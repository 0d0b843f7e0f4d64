"""Films of evaluated episodes show the best and the worst."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from d4_sim.driver import ScriptedPolicy
from d4_sim.film import extremes, film_again, write_film
from d4_sim.vector import EpisodeBatch, run_episodes


def test_films_and_strips_show_the_best_and_the_worst(tmp_path: Path) -> None:
    n, steps = 8, 21
    returns = np.array([5, 1, 7, 3, 0, 6, 2, 4], np.float32)
    reward = np.zeros((n, steps, 1), np.float32)
    reward[:, 1, 0] = returns
    frames = np.zeros((n, steps, 64, 64, 3), np.uint8)
    frames[:] = (20 + 25 * returns).astype(np.uint8)[:, None, None, None, None]  # brightness tells the return
    batch = EpisodeBatch(
        action=np.zeros((n, steps, 2), np.float32), reward=reward, terminal=np.zeros((n, steps), bool),
        probes={}, length=np.full(n, steps), task=np.zeros(n, np.int64),
        success=np.zeros(n, bool), frames=frames,
    )  # fmt: skip
    picked = extremes(batch, 2)
    write_film(tmp_path, "clone", batch, picked, frames[picked], 10)
    sheet = cv2.imread(str(tmp_path / "real_clone.png"))
    levels = [20 + 25 * r for r in (7, 6, 1, 0)]  # from top to bottom
    column = sheet[:, -100]
    rows = [int(np.flatnonzero((column == level).all(-1)).mean()) for level in levels]
    assert rows == sorted(rows)
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert set(captions) == {"real_clone.mp4", "real_clone.png"}
    assert "returns 7.0, 6.0, 1.0, 0.0" in captions["real_clone.mp4"]
    write_film(tmp_path, "other", batch, picked, frames[picked], 10)
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 4


def test_episodes_driven_again_are_those_that_were_judged(tmp_path: Path, monkeypatch) -> None:
    """Pictures of all episodes at once were the largest thing in memory."""
    seeds = np.arange(5)
    policy = ScriptedPolicy("wander", seed=3)
    batch = run_episodes("yard", seeds.tolist(), [0, 1, 0, 1, 0], policy, 8, keep_frames=True)
    shown = []
    monkeypatch.setattr("d4_sim.film.mp4_bytes", lambda film, fps, enlarge: shown.append(film) or b"")
    assert batch.frames is not None
    picked = extremes(batch, 2)
    write_film(tmp_path, "kept", batch, picked, batch.frames[picked], 10)
    film_again(tmp_path, "again", "yard", seeds, batch, fps=10, count=2)
    np.testing.assert_array_equal(*shown)
    assert extremes(batch, 2).tolist() == [
        *np.argsort(batch.returns)[::-1][:2],
        *np.argsort(batch.returns)[:2][::-1],
    ]
