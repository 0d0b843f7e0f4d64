"""The same start states in the model and in the simulator: imagined against real return."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from d4_core.imagination import imagine, weights_of_frames
from d4_core.session import PolicySession, observe
from d4_sim.vector import run_episodes, stack
from d4_sim.world import make_world

if TYPE_CHECKING:
    from d4_core.models import Models


@torch.no_grad()
def imagined_and_real(
    models: Models, world: str, seeds: np.ndarray, tasks: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Undiscounted returns of the first H ticks from the same first frames, (N,) imagined and (N,) real.

    Both are weighted by survival: the simulator by its end, the model by its continuation probability.
    """
    cfg = models.preset.imagination_training.settings
    session = PolicySession(models, len(seeds), seed)
    worlds = [make_world(world) for _ in seeds]
    images, vectors = stack([w.reset(int(s), int(q)) for w, s, q in zip(worlds, seeds, tasks, strict=True)])
    session.reset(len(seeds), tasks)
    tokenizer, device = models.tokenizer, session.device
    tokens = tokenizer.pack(tokenizer.encode_step(observe(tokenizer, images, vectors, device), session.cache))
    task = torch.from_numpy(tasks).to(device)
    unknown = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    h = session.dream.observe(tokens, session._action, unknown, task)
    rollout = imagine(session.dream, models.acting, h, task, cfg)
    imagined = (rollout.reward * weights_of_frames(rollout.proceed)).sum(1).cpu().numpy()
    policy = PolicySession(models, len(seeds), seed)
    real = run_episodes(world, seeds.tolist(), tasks.tolist(), policy, cfg.horizon)
    return imagined, real.returns
