"""Policies as sessions: observations in, actions out, frame by frame, for one robot or a batch of worlds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from d4_core.agent import Head
from d4_core.baselines import ScratchPolicy, join_vectors
from d4_core.captured import Port, capture
from d4_core.imagination import Dream
from d4_core.models import Models
from d4_core.tokenizer import Tokenizer
from d4_datasets.contract import Contract

_TRIAL = 6  # frames by which captured and plain steps are compared; half of them with every task
_CLOSE = 1e-3  # of features and rewards, which are of the order of 1; actions are the same or another bin


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


class Trial(NamedTuple):
    """What a session said frame by frame: actions and plans in contract units, features, rewards."""

    actions: list[np.ndarray]
    plans: list[np.ndarray]
    features: list[np.ndarray]
    rewards: list[np.ndarray]

    def differs(self, other: Trial) -> str:
        """Where another session says something else, in words; empty if nowhere."""
        for what, mine, theirs in zip(self._fields, self, other, strict=True):
            most = max(float(np.abs(a - b).max()) for a, b in zip(mine, theirs, strict=True))
            if not most <= (0 if what in ("actions", "plans") else _CLOSE):  # NaN is not
                return f"its {what} were off by up to {most:.3g}"
        return ""


class PolicySession:
    """The world-model policy: tokenizer, one dynamics pass and the policy head per frame.

    All shapes are fixed by the batch size; caches are allocated once and a reset only forgets. A frame's cost
    does not depend on how many came before. What comes from outside and all random numbers lie in buffers
    that stay where they are before the networks begin, so that a GPU can run them as a graph (`accelerate`).

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
        cfg, space = models.tokenizer.cfg, models.dynamics.space
        self.features = torch.zeros(batch, models.agent.policy.inputs, device=self.device)  # h of the frame
        self.predicted_reward = torch.zeros(batch, device=self.device)
        self._action = torch.zeros(batch, space.size, device=self.device)
        self._known = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self._task = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._ports = {
            camera.name: Port((batch, camera.height, camera.width, 3), torch.uint8, self.device)
            for camera in cfg.cameras
        } | {vector.name: Port((batch, vector.size), torch.float32, self.device) for vector in cfg.vectors}
        self._context_noise = torch.zeros(batch, cfg.num_tokens, cfg.token_dim, device=self.device)
        shapes = [] if argmax else space.chances()
        self._uniform = [torch.zeros(batch, *shape, device=self.device) for shape in shapes]
        self._alive = np.ones(batch, bool)
        self._step, self._look_ahead = self._compute, self._foresee

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
        self._put(images, vectors)
        self._alive = alive
        self._draw()
        return self._step().cpu().numpy().copy()  # the next frame overwrites the buffer

    def _put(self, images: np.ndarray | dict[str, np.ndarray], vectors: dict[str, np.ndarray]) -> None:
        """What is seen of the frame, to where `_compute` expects it."""
        cfg = self.models.tokenizer.cfg
        if not isinstance(images, dict):
            images = {cfg.cameras[0].name: images}
        for camera in cfg.cameras:
            self._ports[camera.name].put(images[camera.name])
        for vector in cfg.vectors:
            self._ports[vector.name].put(np.asarray(vectors[vector.name], np.float32))

    def _draw(self) -> None:
        """The random numbers of the frame."""
        self._context_noise.normal_(generator=self.gen)
        for numbers in self._uniform:
            numbers.uniform_(generator=self.gen)

    @torch.no_grad()
    def _compute(self) -> torch.Tensor:
        """The frame through the networks, from buffers to buffers: nothing here looks at a value, draws a
        number or waits for the device. Returns the action (n, A).
        """
        tokenizer = self.models.tokenizer
        obs = {name: port.tensor for name, port in self._ports.items()}
        tokens = tokenizer.pack(tokenizer.encode_step(obs, self.cache))
        h = self.dream.observe(tokens, self._action, self._known, self._task, self._context_noise)
        self.features.copy_(h)
        self._action.copy_(self._choose(h, self._alive))
        self._known.fill_(True)
        self.predicted_reward.copy_(self.models.agent.predict_reward(h))
        return self._action

    def _choose(self, h: torch.Tensor, alive: np.ndarray) -> torch.Tensor:
        """Actions (n, A) at features h (n, F)."""
        params, space = self.head.first(h), self.models.dynamics.space
        return space.mode(params) if self.argmax else space.sample(params, uniform=self._uniform)

    @torch.no_grad()
    def _foresee(self) -> torch.Tensor:
        """The plan (n, L, A) of the frame, under the same rules."""
        plan = self.models.dynamics.space.mode(self.head(self.features))
        plan[:, 0] = self._action
        return plan

    def accelerate(self) -> str:
        """Capture the step as CUDA graphs if it runs on a GPU; forgets all frames.

        The graphs must do what the plain step does with the same frames and seed; if they do not, or cannot
        be captured, the plain step stays. Returns what it is in one sentence.
        """
        if self.device.type != "cuda":
            return "plain, on a CPU"
        plain = self._trial()
        try:
            self._step = capture(self._compute, self.device)
            self._look_ahead = capture(self._foresee, self.device)
            off = plain.differs(self._trial())
        except Exception as error:  # whatever torch or the driver says: the plain step is there
            off = f"it could not be captured ({(str(error).strip() or repr(error)).splitlines()[0]})"
        if off:
            self._step, self._look_ahead = self._compute, self._foresee
        self.reset(self.batch, np.zeros(self.batch, np.int64))
        return f"plain, without a CUDA graph: {off}" if off else "a CUDA graph"

    def _trial(self) -> Trial:
        """What the session says of made-up frames: two episodes, and two tasks where there are two."""
        rng, shapes = np.random.default_rng(0), {k: tuple(p.tensor.shape) for k, p in self._ports.items()}
        tasks, said = len(self.models.agent.task), Trial([], [], [], [])
        for number in range(2 * _TRIAL):
            task = np.full(self.batch, number // (_TRIAL // 2) % min(2, tasks))
            self.reset(self.batch, task) if number % _TRIAL == 0 else self.ask(task)
            images = {
                c.name: rng.integers(0, 256, shapes[c.name], np.uint8)
                for c in self.models.tokenizer.cfg.cameras
            }
            vectors = {v.name: rng.normal(size=shapes[v.name]) for v in self.models.tokenizer.cfg.vectors}
            said.actions.append(self.act(images, vectors, np.ones(self.batch, bool)))
            said.plans.append(self.plan())
            said.features.append(self.features.cpu().numpy().copy())
            said.rewards.append(self.predicted_reward.cpu().numpy().copy())
        return said

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
        return self._look_ahead().cpu().numpy().copy()


class ScratchSession:
    """A cloned policy without a world model as a session."""

    def __init__(self, policy: ScratchPolicy, seed: int = 0, argmax: bool = False) -> None:
        self.policy, self.seed, self.argmax = policy, seed, argmax
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
        space = self.policy.space
        return (space.mode(params) if self.argmax else space.sample(params, self._gen)).numpy()


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

    def ask(self, tasks: np.ndarray) -> None:
        """Whatever is asked for, it does anything."""

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """float32 (n, A)."""
        drawn = self._rng.uniform(self.low, self.high + self.whole, (self._n, len(self.low)))
        return np.where(self.whole, np.minimum(np.floor(drawn), self.high), drawn).astype(np.float32)


def whole(contract: Contract) -> np.ndarray:
    """bool (A,): entries of an action that are keys (0 or 1) or classes and not measures."""
    return np.array([c.kind != "continuous" for c in contract.actions for _ in c.select])
