"""Videos of evaluated episodes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from d4_datasets.pictures import mp4_bytes
from d4_sim.vector import EpisodeBatch

_SCALE = 3


def write_film(media: Path, name: str, batch: EpisodeBatch, count: int = 3) -> None:
    """<media>/real_<name>.mp4: the best `count` episodes above the worst `count`, in the real simulator."""
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
    (media / f"real_{name}.mp4").write_bytes(mp4_bytes(film, 10))
    captions = media / "captions.json"
    known = json.loads(captions.read_text()) if captions.exists() else {}
    returns = ", ".join(f"{batch.returns[i]:.1f}" for i in picked)
    known[f"real_{name}.mp4"] = (
        f"{name} in the real simulator: best {count} of {len(order)} episodes above, worst {count} below "
        f"(returns {returns})"
    )
    captions.write_text(json.dumps(known, indent=1))
