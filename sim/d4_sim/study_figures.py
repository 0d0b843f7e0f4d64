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
_FILMED = {"imagination": "after imagination training", "wm_bc": "cloned on the world model"}


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


def figures(out: Path, folder: Path, link: str) -> Iterator[str]:
    """Write the pictures of a study into `folder`; yields Markdown that shows them, under the path `link`."""
    folder.mkdir(parents=True, exist_ok=True)
    for world in WORLDS:
        name = f"{world}-curves.png"
        if draw_curves(out, world, folder / name):
            yield f"## {world}: pictures of imagination training\n"
            yield f"![Imagined reward, value and KL over the steps]({link}/{name})\n"
        for policy, title in _FILMED.items():
            film = out / f"{world}-{SEEDS[0]}" / "run" / "media" / f"real_{policy}.png"
            if film.exists():
                copy = f"{world}-{policy}.png"
                shutil.copyfile(film, folder / copy)
                yield f"{title.capitalize()}, chain 0, best and worst of its episodes; dark: fallen.\n"
                yield f"![Real episodes {title}]({link}/{copy})\n"
