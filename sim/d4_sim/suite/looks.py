"""Other colours, textures and lights of a MuJoCo model, without a change to what moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import mujoco

_TINT = 0.3  # how far every colour goes towards a random one: red stays red, in another shade
_GRAIN = 0.12  # strength of the pattern on textures
_LIGHT = (0.6, 1.15)  # factors of brightness, [least, most]
_DEFAULT = (0.5, 0.5, 0.5, 1.0)  # MuJoCo's, of geoms and sites that say nothing
_TILT = 0.5  # of the lights' directions


def repaint(model: mujoco.MjModel, seed: int) -> None:
    """Redraws the look of a model in place; the same seed gives the same look."""
    rng = np.random.default_rng([seed, 90_210])
    # a colour of its own that is not the default one beats that of the material
    geoms = _is_coloured(model.geom_rgba, model.geom_matid)
    sites = _is_coloured(model.site_rgba, model.site_matid)
    everything = slice(None)
    for colours, chosen in ((model.mat_rgba, everything), (model.geom_rgba, geoms), (model.site_rgba, sites)):
        old = colours[chosen, :3]
        colours[chosen, :3] = old + _TINT * (rng.uniform(size=old.shape) - old)
    _textures(model, rng)
    light = rng.uniform(*_LIGHT) * rng.uniform(0.85, 1.0, 3)
    model.vis.headlight.ambient[:] *= light
    model.vis.headlight.diffuse[:] *= light
    for i in range(model.nlight):
        model.light_diffuse[i] *= rng.uniform(*_LIGHT)
        tilted = model.light_dir[i] + _TILT * rng.uniform(-1, 1, 3)
        model.light_dir[i] = tilted / max(float(np.linalg.norm(tilted)), 1e-6)


def _is_coloured(rgba: np.ndarray, material: np.ndarray) -> np.ndarray:
    """Which geoms or sites show a colour of their own, bool (n,)."""
    return (material < 0) | (rgba != _DEFAULT).any(1)


def _textures(model: mujoco.MjModel, rng: np.random.Generator) -> None:
    """Tints every texture and lays a coarse pattern over it."""
    for i in range(model.ntex):
        height, width, channels = (int(n[i]) for n in (model.tex_height, model.tex_width, model.tex_nchannel))
        begin = int(model.tex_adr[i])
        data = model.tex_data[begin : begin + height * width * channels].reshape(height, width, channels)
        coarse = rng.uniform(-1, 1, (-(-height // 8), -(-width // 8), 1))
        pattern = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width]
        tint = rng.uniform(1 - _TINT, 1 + _TINT, channels)
        data[:] = np.clip(data * tint * (1 + _GRAIN * pattern), 0, 255).astype(np.uint8)
