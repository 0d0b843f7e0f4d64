"""Pictures of a study's page: curves of imagination training, filmstrips of best and worst episodes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from d4_core.loop import METRICS
from d4_sim.study import SEEDS, WORLDS

_CURVES = {
    "imagined_reward": "imagined reward per rollout",
    "value_mean": "value of imagined states",
    "kl": "KL to the clone, nats",
}
_SHOWN = {
    "open_loop": "Held-out drives, dreamed from four real frames and the logged commands",
    "real_imagination": "After imagination training, best and worst episodes (dark: over)",
    "real_wm_bc": "Cloned on the world model, best and worst episodes (dark: over)",
    "real_planner": "CEM planning in the world model, best and worst episodes (dark: over)",
}


def curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric of imagination training; empty where the run has none."""
    path = run / METRICS
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.open()] if path.exists() else []
    found = [(row["step"], row[name]) for row in rows if row["phase"] == "imagination" and name in row]
    return [step for step, _ in found], [value for _, value in found]


def draw_curves(out: Path, world: str, path: Path) -> bool:
    """Draw imagination training of a world's chains; False if there is nothing to draw."""
    runs = {seed: out / f"{world}-{seed}" / "run" for seed in SEEDS}
    if not any(curve(run, "kl")[0] for run in runs.values()):
        return False
    figure, axes = plt.subplots(1, len(_CURVES), figsize=(11, 3), layout="constrained")
    for axis, (name, title) in zip(axes, _CURVES.items(), strict=True):
        for seed, run in runs.items():
            axis.plot(*curve(run, name), label=f"seed {seed}", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def film(media: Path, name: str, title: str, stem: str, folder: Path, link: str) -> Iterator[str]:
    """Copy <media>/<name>.png and .mp4 to <folder>/<stem>.*; yields Markdown, or nothing without them."""
    kinds = ("png", "mp4")
    if not all((media / f"{name}.{kind}").exists() for kind in kinds):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        shutil.copyfile(media / f"{name}.{kind}", folder / f"{stem}.{kind}")
    yield f"{title} ([film]({link}/{stem}.mp4)):\n"
    yield f"![{title}]({link}/{stem}.png)\n"


def figures(out: Path, folder: Path, link: str) -> Iterator[str]:
    """Write the pictures of a study into `folder`; yields Markdown that shows them, under the path `link`."""
    folder.mkdir(parents=True, exist_ok=True)
    for world in WORLDS:
        name = f"{world}-curves.png"
        if draw_curves(out, world, folder / name):
            yield f"## {world}: pictures\n"
            yield f"Imagination training of all chains; episodes are those of chain {SEEDS[0]}.\n"
            yield f"![Imagined reward, value and KL over the steps]({link}/{name})\n"
        media = out / f"{world}-{SEEDS[0]}" / "run" / "media"
        for name, title in _SHOWN.items():
            yield from film(media, name, title, f"{world}-{name.removeprefix('real_')}", folder, link)
