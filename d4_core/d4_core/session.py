"""Policies as sessions: observations in, actions out, frame by frame, for one robot or a batch of worlds."""

from __future__ import annotations

import numpy as np
import torch

from d4_core.agent import Head
from d4_core.baselines import ScratchPolicy, join_vectors
from d4_core.imagination import Dream
from d4_core.models import Models
from d4_core.tokenizer import Tokenizer
from d4_datasets.contract import Contract


def observe(
    tokenizer: Tokenizer,
    images: np.ndarray | dict[str, np.ndarray],
    vectors: dict[str, np.ndarray],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The tokenizer's modalities from pictures (by camera, or the one camera's alone) and proprioception."""
    if not isinstance(images, dict):
        images = {tokenizer.cfg.cameras[0].name: images}
    obs = {camera.name: torch.from_numpy(images[camera.name]).to(device) for camera in tokenizer.cfg.cameras}
    for vector in tokenizer.cfg.vectors:
        obs[vector.name] = torch.from_numpy(np.asarray(vectors[vector.name], np.float32)).to(device)
    return obs


class PolicySession:
    """The world-model policy: tokenizer, one dynamics pass and the policy head per frame.

    All shapes are fixed by the batch size; caches are allocated once and a reset only forgets. A frame's cost
    does not depend on how many came before.

    Args:
        models: loaded networks of an agent or imagination checkpoint.
        batch: number of worlds stepped together.
        seed: decides context noise and action samples.
        head: policy head; default is the checkpoint's policy in force.
        argmax: take the most likely action instead of a sample.
    """

    def __init__(
        self,
        models: Models,
        batch: int,
        seed: int = 0,
        head: Head | None = None,
        argmax: bool = False,
    ) -> None:
        assert models.dynamics is not None
        self.models, self.batch, self.seed, self.argmax = models, batch, seed, argmax
        self.head = head if head is not None else models.acting
        self.device = models.dynamics.slots.device
        self.gen = torch.Generator(self.device)
        self.dream = Dream(models.dynamics, models.agent, batch, self.gen)
        self.cache = models.tokenizer.new_cache(batch)
        self.features = torch.zeros(batch, models.agent.policy.inputs, device=self.device)  # h of the frame
        self.predicted_reward = torch.zeros(batch, device=self.device)
        self._action = torch.zeros(batch, models.dynamics.space.size, device=self.device)
        self._known = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self._task = torch.zeros(batch, dtype=torch.int64, device=self.device)

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Start new episodes of these tasks in all n = batch worlds."""
        if n != self.batch:
            raise ValueError(f"session was made for {self.batch} worlds, not {n}")
        self.gen.manual_seed(self.seed)
        self.dream.reset()
        self.cache.reset()
        self._known.fill_(False)
        self._task.copy_(torch.from_numpy(np.asarray(tasks)))

    def ask(self, tasks: np.ndarray) -> None:
        """Ask for these tasks (n,) from the next frame on; what was seen stays in memory."""
        self._task.copy_(torch.from_numpy(np.asarray(tasks)))

    @torch.no_grad()
    def act(
        self, images: np.ndarray | dict[str, np.ndarray], vectors: dict[str, np.ndarray], alive: np.ndarray
    ) -> np.ndarray:
        """float32 (n, A) in contract units.

        Args:
            images: uint8 (n, H, W, 3) by camera name, or the one camera's alone.
            vectors: proprioception (n, k) by name.
            alive: (n,) worlds that still run; the others are computed and ignored.
        """
        tokenizer = self.models.tokenizer
        obs = observe(tokenizer, images, vectors, self.device)
        tokens = tokenizer.pack(tokenizer.encode_step(obs, self.cache))
        self.features = self.dream.observe(tokens, self._action, self._known, self._task)
        self._action.copy_(self._choose(self.features, alive))
        self._known.fill_(True)
        self.predicted_reward.copy_(self.models.agent.predict_reward(self.features))
        return self._action.cpu().numpy().copy()  # the next frame overwrites the buffer

    def correct(self, action: np.ndarray, known: np.ndarray) -> None:
        """Say what was really done since the last frame, where that is not what `act` chose.

        Args:
            action: float32 (n, A) commands in force, in contract units.
            known: bool (n,) whether that is known; an unknown action is left out as unlabelled video is.
        """
        self._action.copy_(torch.from_numpy(action))
        self._known.copy_(torch.from_numpy(known))

    @torch.no_grad()
    def plan(self) -> np.ndarray:
        """float32 (n, L, A): the action that `act` chose, then the likeliest ones of the frames after it."""
        plan = self.models.dynamics.space.mode(self.head(self.features))
        plan[:, 0] = self._action
        return plan.cpu().numpy()

    def _choose(self, h: torch.Tensor, alive: np.ndarray) -> torch.Tensor:
        """Actions (n, A) at features h (n, F)."""
        params, space = self.head.first(h), self.models.dynamics.space
        return space.mode(params) if self.argmax else space.sample(params, self.gen)


class ScratchSession:
    """A cloned policy without a world model as a session."""

    def __init__(self, policy: ScratchPolicy, seed: int = 0) -> None:
        self.policy, self.seed = policy, seed
        self._stacks: list[np.ndarray] = []

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Start n new episodes."""
        self._gen = torch.Generator().manual_seed(self.seed)
        self._task, self._stacks = torch.from_numpy(np.asarray(tasks)), []

    def ask(self, tasks: np.ndarray) -> None:
        """Ask for these tasks (n,) from the next frame on."""
        self._task = torch.from_numpy(np.asarray(tasks))

    @torch.no_grad()
    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """float32 (n, A); the first frame fills the stack."""
        look = self.policy.look
        newest = (images, join_vectors(vectors, look.vectors, np.arange(len(images))))
        if not self._stacks:
            self._stacks = [np.repeat(x[:, None], look.frames, 1) for x in newest]
        pairs = zip(self._stacks, newest, strict=True)
        self._stacks = [np.concatenate([stack[:, 1:], x[:, None]], 1) for stack, x in pairs]
        params = self.policy(*map(torch.from_numpy, self._stacks), self._task)
        return self.policy.space.sample(params, self._gen).numpy()


class RandomSession:
    """Uniform actions within the contract's limits, re-drawn every tick.

    Args:
        low, high: limits (A,).
        seed: decides everything.
        whole: bool (A,) which entries are keys or classes, see `whole`; default none.
    """

    def __init__(
        self, low: np.ndarray, high: np.ndarray, seed: int = 0, whole: np.ndarray | None = None
    ) -> None:
        self.low, self.high, self.seed = low, high, seed
        self.whole = np.zeros(len(low), bool) if whole is None else whole

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Start n new episodes."""
        self._n, self._rng = n, np.random.default_rng(self.seed)

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """float32 (n, A)."""
        drawn = self._rng.uniform(self.low, self.high + self.whole, (self._n, len(self.low)))
        return np.where(self.whole, np.minimum(np.floor(drawn), self.high), drawn).astype(np.float32)


def whole(contract: Contract) -> np.ndarray:
    """bool (A,): entries of an action that are keys (0 or 1) or classes and not measures."""
    return np.array([c.kind != "continuous" for c in contract.actions for _ in c.select])
