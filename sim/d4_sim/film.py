"""Videos and filmstrips of evaluated episodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from d4_datasets import whole
from d4_datasets.locks import held
from d4_datasets.pictures import Strip, contact_sheet, mp4_bytes, write_png
from d4_sim.vector import EpisodeBatch, run_episodes

_SCALE = 3
_TILES = 11  # pictures of an episode in a filmstrip


def film_again(
    media: Path, name: str, world: str, seeds: np.ndarray, batch: EpisodeBatch, fps: float, count: int = 3
) -> None:
    """`write_film` of the best and the worst `count` episodes, whose pictures were not kept: they are driven
    once more.

    A hundred episodes of a thousand ticks have more than a gigabyte of pictures, six of them 70 MB.
    """
    picked = extremes(batch, count)
    again = run_episodes(
        world, seeds[picked].tolist(), batch.task[picked].tolist(), _Replay(batch.action[picked]),
        batch.action.shape[1] - 1, keep_frames=True,
    )  # fmt: skip
    assert again.frames is not None
    write_film(media, name, batch, picked, again.frames, fps)


class _Replay:
    """Does what was done before."""

    def __init__(self, action: np.ndarray) -> None:
        self._action, self._tick = action, -1

    def reset(self, n: int, tasks: np.ndarray) -> None:
        self._tick = -1

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        self._tick += 1
        return self._action[:, self._tick]


def extremes(batch: EpisodeBatch, count: int) -> np.ndarray:
    """Numbers of the best `count` episodes, the best first, then of the worst, the worst last."""
    order = np.argsort(batch.returns)
    return np.concatenate([order[::-1][:count], order[:count][::-1]])


def write_film(
    media: Path, name: str, batch: EpisodeBatch, picked: np.ndarray, frames: np.ndarray, fps: float
) -> None:
    """The episodes `picked` (`extremes`), whose pictures are `frames` (2 count, T, H, W, 3).

    <media>/real_<name>.mp4 plays the best above the worst, <media>/real_<name>.png shows them as filmstrips.
    """
    media.mkdir(parents=True, exist_ok=True)
    count = len(picked) // 2
    for row, length in zip(frames, batch.length[picked], strict=True):
        row[length:] = row[length - 1] // 2  # an ended episode stays, darkened
    grid = np.concatenate([np.concatenate(list(half), 2) for half in np.split(frames, 2)], 1)
    (media / f"real_{name}.mp4").write_bytes(mp4_bytes(grid, fps, enlarge=_SCALE))
    shown = np.linspace(0, frames.shape[1] - 1, min(_TILES, frames.shape[1])).round().astype(int)
    strips = [
        Strip(row[shown], f"task {batch.task[i]}\nreturn {batch.returns[i]:.1f}", [f"t = {t}" for t in shown])
        for row, i in zip(frames, picked, strict=True)
    ]
    of = len(batch.length)
    text = f"{name} in the real simulator: best {count} of {of} episodes above, worst {count} below"
    write_png(media / f"real_{name}.png", contact_sheet(strips, text))
    returns = ", ".join(f"{batch.returns[i]:.1f}" for i in picked)
    _caption(media, {f"real_{name}.mp4": f"{text} (returns {returns})", f"real_{name}.png": text})


def _caption(media: Path, texts: dict[str, str]) -> None:
    path = media / "captions.json"
    with held(media / ".lock"):  # drives of several stages film at the same time
        known = whole.read_json(path, dict)
        whole.write(path, json.dumps(known | texts, indent=1))
