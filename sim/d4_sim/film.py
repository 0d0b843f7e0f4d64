"""Videos and filmstrips of evaluated episodes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np

from d4_datasets.pictures import Strip, contact_sheet, mp4_bytes, write_png
from d4_sim.vector import EpisodeBatch

_SCALE = 3
_TILES = 11  # pictures of an episode in a filmstrip


def write_film(media: Path, name: str, batch: EpisodeBatch, count: int = 3, fps: float = 10) -> None:
    """The best `count` episodes above the worst `count`, in the real simulator.

    <media>/real_<name>.mp4 plays them, <media>/real_<name>.png shows them as filmstrips.
    """
    media.mkdir(parents=True, exist_ok=True)
    order = np.argsort(batch.returns)
    picked = np.concatenate([order[::-1][:count], order[:count][::-1]])
    assert batch.frames is not None
    frames = batch.frames[picked]  # (2 count, T, H, W, 3)
    for row, length in zip(frames, batch.length[picked], strict=True):
        row[length:] = row[length - 1] // 2  # an ended episode stays, darkened
    grid = np.concatenate([np.concatenate(list(half), 2) for half in np.split(frames, 2)], 1)
    size = (grid.shape[2] * _SCALE, grid.shape[1] * _SCALE)
    film = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_NEAREST) for f in grid])
    (media / f"real_{name}.mp4").write_bytes(mp4_bytes(film, fps))
    shown = np.linspace(0, frames.shape[1] - 1, min(_TILES, frames.shape[1])).round().astype(int)
    strips = [
        Strip(row[shown], f"task {batch.task[i]}\nreturn {batch.returns[i]:.1f}", [f"t = {t}" for t in shown])
        for row, i in zip(frames, picked, strict=True)
    ]
    text = f"{name} in the real simulator: best {count} of {len(order)} episodes above, worst {count} below"
    write_png(media / f"real_{name}.png", contact_sheet(strips, text))
    returns = ", ".join(f"{batch.returns[i]:.1f}" for i in picked)
    _caption(media, {f"real_{name}.mp4": f"{text} (returns {returns})", f"real_{name}.png": text})


def _caption(media: Path, texts: dict[str, str]) -> None:
    path = media / "captions.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    aside = media / ".tmp-captions.json"
    aside.write_text(json.dumps(known | texts, indent=1))
    os.replace(aside, path)
