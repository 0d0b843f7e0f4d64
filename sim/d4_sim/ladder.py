"""``python -m d4_sim.ladder``: from a bandit to a learned world in four rungs, each a check that can fail.

When imagination training does not help on a robot, the lowest rung that breaks says where to look:

1. bandit: the policy loss on the heads alone; one state, no time.
2. last action: rollouts, returns and credit; the reward is a function of the action just taken.
3. oracle: a small world with a known optimum, dreamed without error; cloning, critic, discount, tasks, ends.
4. learned: the same world, but dynamics, reward and clone are learned from logs of mixed quality, most of
   them without actions. What separates it from a real chain is the tokenizer and the pictures.

The fifth rung, pixels, is `d4-demo`, whose last gate is the gain over the clone. Returns are measured in the
true world, never in a dream, and a rung passes if training closed enough of the gap between the policy it
started from and the optimum: 90 % where the optimum is one action per task, half of it with an exact dream
(the others mostly fall into the pit), a fifth with a learned one. Shapes: B worlds, F features of h.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from d4_core import threads
from d4_core.actions import ActionSpace
from d4_core.agent import Agent, Critic, Head
from d4_core.config import Preset, action_parts, preset
from d4_core.dynamics import Dynamics
from d4_core.imagination import Dream, pmpo_loss
from d4_core.loop import train
from d4_core.optim import OptimConfig
from d4_core.phase import Batch, Losses, Metrics, Phase, freeze
from d4_core.phases import (
    AgentPhase,
    AgentTraining,
    DynamicsPhase,
    ImaginationPhase,
    ImaginationTraining,
    relevant_episodes,
)
from d4_core.stats import paired_difference
from d4_core.transformer import TransformerConfig
from d4_datasets import whole
from d4_datasets.errors import UserError, run_cli
from d4_sim.square import CONTRACT, HORIZON, Square, StateLogs, record

EPISODES = 400  # of an evaluation
_EVAL_SEED = 1_000_000  # of their starts; recordings have other ones

NANO = preset("nano")
EXACT: Preset = replace(NANO, imagination_training=replace(NANO.imagination_training, reuse=1))
"""Rungs 1 to 3: `nano` with fresh rollouts for every update, which cost nothing where the dream is exact."""
TINY: Preset = replace(
    NANO, num_latents=2, latent_dim=8, num_tokens=2, registers=1, agent_tokens=2, leads=2, hidden=128,
    dynamics=TransformerConfig(dim=64, depth=4, heads=4, kv_heads=2, mlp_ratio=2.0, time_every=2, context=8),
    dynamics_training=replace(NANO.dynamics_training, steps=1000, length=8, long_length=16, batch=32),
    agent_training=replace(NANO.agent_training, steps=800, length=4, long_length=8),
    imagination_training=replace(
        NANO.imagination_training, settings=replace(NANO.imagination_training.settings, steps=2)
    ),
)  # fmt: skip
"""Rung 4: `nano` with a smaller transformer, for six numbers instead of pictures."""

NO_TOKENIZER: Any = nn.Identity()

# ---- worlds


class Echo(nn.Module):
    """State (B, 2) is the last action, and the reward says how close it came to the task's secret one."""

    features = 4
    secret = torch.tensor([[3 / 7, -5 / 7], [-4 / 7, 1 / 7]])  # on bin centres

    def __init__(self) -> None:
        super().__init__()
        self.space = ActionSpace(action_parts(CONTRACT))

    def reset(self, batch: int, gen: torch.Generator) -> Tensor:
        """Random last actions."""
        return 2 * torch.rand(batch, 2, generator=gen) - 1

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The action."""
        return action

    def observe(self, state: Tensor, task: Tensor) -> Tensor:
        """h (B, 4): the last action and the task."""
        return torch.cat([state, nn.functional.one_hot(task, 2)], 1)

    def reward(self, h: Tensor) -> Tensor:
        """exp(-(d / 0.4)^2) of the distance between last and secret action."""
        distance = (h[..., :2] - h[..., 2:] @ self.secret).norm(dim=-1)
        return (-(distance / 0.4).square()).exp()

    def proceed(self, h: Tensor) -> Tensor:
        """It never ends."""
        return torch.ones(h.shape[:-1])

    def best(self, state: Tensor, action: Tensor, known: Tensor, task: Tensor) -> Tensor:
        """Optimal commands (B, 2), an `Act`: the secret actions."""
        return self.secret[task]


class ExactDream(Dream):
    """The world itself behind the interface of a dream: tokens (B, 1, S) are the state, h its features."""

    def __init__(self, world: Any, agent: Agent, batch: int) -> None:
        self.dynamics, self.agent, self.batch, self.gen = world, agent, batch, None
        self._world, self._state = world, torch.zeros(0)

    def reset(self) -> None:
        """Nothing to forget: a state is complete."""

    def observe(
        self,
        clean_BNL: Tensor,
        prev_action: Tensor,
        labelled: Tensor,
        task: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Take over a state; returns h (B, F)."""
        self._state = clean_BNL[:, 0]
        return self._world.observe(self._state, task)

    def predict(self, prev_action: Tensor, labelled: Tensor, steps: int) -> Tensor:
        """The true next state (B, 1, S)."""
        return self._world.step(self._state, prev_action)[:, None]


class ExactAgent(Agent):
    """Heads whose reward and continuation are the world's own; only the policy is learned."""

    def __init__(self, cfg: Preset, world: Any) -> None:
        super().__init__(
            replace(cfg.agent_config(CONTRACT), leads=1, world_tokens=0), world.space, world.features, 1
        )
        self._world = [world]  # in a list: the world is no part of the agent's weights

    def predict_reward(self, h: Tensor) -> Tensor:
        """True reward (..)."""
        return self._world[0].reward(h)

    def predict_continue(self, h: Tensor) -> Tensor:
        """True continuation (..)."""
        return self._world[0].proceed(h)


class ExactImagination(ImaginationPhase):
    """The imagination phase on the true world."""

    def __init__(self, cfg: ImaginationTraining, agent: ExactAgent, world: Any, logs: StateLogs) -> None:
        everything = np.arange(len(logs.episode_start))
        super().__init__(cfg, agent, world, NO_TOKENIZER, logs, logs.state[:, None], everything)
        self._dream = ExactDream(world, agent, cfg.batch)


class ClonePhase(Phase):
    """Cloning as in agent finetuning: the labelled frames of episodes that did a task, under that task."""

    name = "clone"

    def __init__(self, cfg: AgentTraining, agent: ExactAgent, world: Square, logs: StateLogs) -> None:
        super().__init__(cfg.steps, {"policy": 1.0})
        self.cfg, self.agent, self.world, self.logs = cfg, agent, world, logs
        everything = np.arange(len(logs.episode_start))
        good = [relevant_episodes(logs, everything, q, cfg.relevant_return) for q in range(2)]
        self.frames = [np.flatnonzero(np.isin(logs.episode_index, g) & logs.action_mask) for g in good]

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """Single frames (B, 1, ..) of both tasks."""
        half = self.cfg.batch
        index = np.concatenate([rng.choice(frames, half) for frames in self.frames])
        task = torch.arange(2).repeat_interleave(half)
        h = self.world.observe(torch.from_numpy(self.logs.state[index]), task)
        return {"h": h[:, None], "action": torch.from_numpy(self.logs.action[index])[:, None]}

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Nats of the drivers' actions."""
        params = self.agent.policy.first(batch["h"])
        return {"policy": -self.agent.space.log_prob(params, batch["action"]).mean()}, {}

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The policy head."""
        return self.agent.policy.named_parameters(prefix="policy")

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """The policy head."""
        return {"policy": self.agent.policy}


# ---- evaluation

Act = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Commands (B, 2) from state, last command, whether there was one, and task."""


@torch.no_grad()
def real_returns(world: Any, act: Act) -> np.ndarray:
    """Returns (EPISODES,) in the true world, always from the same starts; tasks take turns."""
    state = world.reset(EPISODES, torch.Generator().manual_seed(_EVAL_SEED))
    task, total = torch.arange(EPISODES) % 2, torch.zeros(EPISODES)
    action, known = torch.zeros(EPISODES, 2), torch.zeros(EPISODES, dtype=torch.bool)
    for _ in range(HORIZON):
        action, known = act(state, action, known, task), torch.ones_like(known)
        state = world.step(state, action)
        total += world.reward(world.observe(state, task))
    return total.numpy()


def as_tokens(state: Tensor) -> Tensor:
    """The tokens (B, 1, S) of an exact dream."""
    return state[:, None]


def streamed(dream: Dream, policy: Head, encode: Callable[[Tensor], Tensor], seed: int) -> Act:
    """A policy head as commands, fed frame by frame by the engine that imagination and robots use."""
    dream.reset()
    dream.gen = torch.Generator().manual_seed(seed)

    def act(state: Tensor, action: Tensor, known: Tensor, task: Tensor) -> Tensor:
        h = dream.observe(encode(state), action, known, task)
        return dream.dynamics.space.sample(policy.first(h), dream.gen)

    return act


# ---- rungs


@dataclass(frozen=True, kw_only=True)
class Result:
    """One rung with one seed; returns are means over episodes in the true world.

    Attributes:
        rung, seed: which.
        start: return before imagination training (of the clone, or of the uniform policy).
        after: return after it.
        optimum: the best there is.
        low: lower end of the 95 % interval of the paired difference after - start.
        required: share of the gap that must be closed.
        seconds: wall clock of everything, recording included.
    """

    rung: str
    seed: int
    start: float
    after: float
    optimum: float
    low: float
    required: float
    seconds: float = 0.0

    @property
    def closed(self) -> float:
        """Share of the gap between start and optimum that training closed."""
        return (self.after - self.start) / (self.optimum - self.start)

    @property
    def passed(self) -> bool:
        """Enough of the gap is closed, and not by luck."""
        return self.closed >= self.required and self.low > 0


def scaled(cfg: Preset, scale: float) -> Preset:
    """A preset with `scale` times the training steps."""

    def less(training: Any) -> Any:
        return replace(training, steps=max(8, round(scale * training.steps)))

    names = ("dynamics_training", "agent_training", "imagination_training")
    return replace(cfg, **{name: less(getattr(cfg, name)) for name in names})


def _fit(phase: Phase, seed: int, optim: OptimConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(phase, Path(folder), seed=seed, optim=optim, contract=CONTRACT, config={}, progress=False)


def _climb(
    name: str, required: float, seed: int, world: Any, phase: Any, optim: OptimConfig, dream: Dream,
    encode: Callable[[Tensor], Tensor] = as_tokens,
) -> Result:  # fmt: skip
    """Train `phase`, which has a prior and a policy, and compare the two in the true world."""
    _fit(phase, seed, optim)
    start, after = (
        real_returns(world, streamed(dream, head, encode, seed)) for head in (phase.prior, phase.policy)
    )
    return Result(
        rung=name, seed=seed, start=float(start.mean()), after=float(after.mean()),
        optimum=float(real_returns(world, world.best).mean()), low=paired_difference(after, start)[1],
        required=required,
    )  # fmt: skip


class BanditPhase(Phase):
    """Imagination training without time: the rows of a batch are single draws, rewarded at once."""

    name = "bandit"

    def __init__(self, cfg: ImaginationTraining, agent: ExactAgent, world: Echo) -> None:
        super().__init__(cfg.steps, {"policy": 1.0, "value": 1.0})
        self.cfg, self.world, self.period = cfg, world, cfg.reuse
        self.policy, self.critic = agent.policy, Critic(agent.cfg, world.features)
        self.prior = freeze(copy.deepcopy(agent.policy))
        task = torch.arange(cfg.batch * cfg.settings.horizon) % 2
        self.h = world.observe(torch.zeros(len(task), 2), task)

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """Nothing: there is one state."""
        return {}

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Policy and value loss, put together as imagination training does."""
        h, space, cfg = self.h, self.world.space, self.cfg.settings
        if step % self.period == 0:
            self.action = space.sample(self.policy.first(h), gen)
        reward, params = self.world.reward(torch.cat([self.action, h[:, 2:]], 1)), self.policy.first(h)
        advantage, log_prob = reward - self.critic(h).detach(), space.log_prob(params, self.action)
        policy = pmpo_loss(log_prob, advantage, torch.ones(len(h)), cfg.alpha, cfg.drop_smallest)
        policy = policy + cfg.beta * space.kl(params, self.prior.first(h)).mean()
        warm = 0.0 if step < cfg.warmup * self.cfg.steps else 1.0
        return {"policy": warm * policy, "value": -self.critic.log_prob(h, reward).mean()}, {}

    def total(self, losses: Losses) -> Tensor:
        """Policy loss as it is, value loss normalised."""
        return losses["policy"] + super().total({"value": losses["value"]})

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """Policy and critic."""
        return {"policy": self.policy, "critic": self.critic}


def bandit(seed: int, cfg: Preset = EXACT) -> Result:
    """Rung 1: 225 arms for each of two tasks; PMPO, critic and KL as in imagination training."""
    torch.manual_seed(seed)
    world, training = Echo(), cfg.imagination_training
    agent = ExactAgent(cfg, world)
    phase, dream = BanditPhase(training, agent, world), ExactDream(world, agent, EPISODES)
    return _climb(
        "bandit", 0.9, seed, world, phase, cfg.optim.imagination, dream,
        lambda state: torch.zeros_like(state)[:, None],
    )  # fmt: skip


def last_action(seed: int, cfg: Preset = EXACT) -> Result:
    """Rung 2: the phase itself on a world whose reward is the last action, from a uniform policy.

    Without discount only the action that caused a reward can get its credit, so an index that is off by one
    learns nothing.
    """
    torch.manual_seed(seed)
    world, training = Echo(), cfg.imagination_training
    training = replace(training, settings=replace(training.settings, discount=0.0))
    state = world.reset(8 * 256, torch.Generator().manual_seed(seed)).numpy()
    logs = StateLogs(  # only contexts are taken from them
        state=state, action=state, action_mask=np.ones(len(state), bool), reward=np.zeros_like(state),
        is_terminal=np.zeros(len(state), bool), episode_length=np.full(256, 8),
    )  # fmt: skip
    agent = ExactAgent(cfg, world)
    phase, dream = ExactImagination(training, agent, world, logs), ExactDream(world, agent, EPISODES)
    return _climb("last action", 0.9, seed, world, phase, cfg.optim.imagination, dream)


def oracle(seed: int, cfg: Preset = EXACT) -> Result:
    """Rung 3: clone drivers of mixed quality, then improve the clone in dreams that are the world itself."""
    torch.manual_seed(seed)
    world, logs = Square(), record(3000, seed)
    agent = ExactAgent(cfg, world)
    _fit(ClonePhase(cfg.agent_training, agent, world, logs), seed, cfg.optim.agent)
    phase = ExactImagination(cfg.imagination_training, agent, world, logs)
    dream = ExactDream(world, agent, EPISODES)
    return _climb("oracle", 0.5, seed, world, phase, cfg.optim.imagination, dream)


def learned(seed: int, cfg: Preset = TINY) -> Result:
    """Rung 4: dynamics, reward and clone are learned from logs, on a random projection of the state.

    The phases are those of a real run; nothing here knows the world but the recording and the evaluation.
    """
    torch.manual_seed(seed)
    logs = record(3000, seed)
    encode = projection(logs, cfg, seed)
    dynamics = Dynamics(cfg.dynamics_config(CONTRACT))
    agent = Agent(cfg.agent_config(CONTRACT), dynamics.space, cfg.dynamics.dim, cfg.agent_tokens)
    latents = encode(torch.from_numpy(logs.state)).numpy()
    data = (dynamics, NO_TOKENIZER, logs, latents, np.arange(len(logs.episode_start)))
    _fit(DynamicsPhase(cfg.dynamics_training, *data), seed, cfg.optim.dynamics)
    _fit(AgentPhase(cfg.agent_training, agent, *data), seed, cfg.optim.agent)
    phase, dream = ImaginationPhase(cfg.imagination_training, agent, *data), Dream(dynamics, agent, EPISODES)
    return _climb("learned", 0.2, seed, Square(), phase, cfg.optim.imagination, dream, encode)


def projection(logs: StateLogs, cfg: Preset, seed: int) -> Callable[[Tensor], Tensor]:
    """A fixed random map from states (B, 7) to tokens (B, N, L), every channel of unit spread.

    Every token mixes all places, as those of a tokenizer do; whether the point is alive can only be told from
    where it is.
    """
    width = cfg.num_latents * cfg.latent_dim
    matrix = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    matrix = matrix / (torch.from_numpy(logs.state[:, :6]) @ matrix).std(0)
    return lambda state: (state[:, :6] @ matrix).unflatten(1, (cfg.num_tokens, -1))


# ---- command

RUNGS: dict[str, Callable[[int, Preset], Result]] = {
    "bandit": bandit, "last action": last_action, "oracle": oracle, "learned": learned,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args:
    """Climb the ladder: four checks of imagination training, from a bandit to a learned world."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Every rung is climbed once with each."""
    out: Path | None = None
    """JSON file with every number."""
    scale: float = 1.0
    """Multiplies the training steps; the thresholds are meant for 1."""


def climb(args: Args) -> list[Result]:
    """All rungs with all seeds, printed as they come."""
    print(f"{'rung':12s} {'seed':>4s} {'start':>7s} {'after':>7s} {'optimum':>7s} {'closed':>7s} {'s':>5s}")
    results = []
    for name, rung in RUNGS.items():
        for seed in args.seeds:
            cfg = scaled(TINY if name == "learned" else EXACT, args.scale)
            began = time.perf_counter()
            r = rung(seed, cfg)
            r = replace(r, seconds=time.perf_counter() - began)
            verdict = "ok" if r.passed else f"FAILED: {r.required:.0%} must be closed, interval above 0"
            numbers = f"{r.start:7.2f} {r.after:7.2f} {r.optimum:7.2f} {r.closed:7.0%} {r.seconds:5.0f}"
            print(f"{name:12s} {seed:4d} {numbers} {verdict}", flush=True)
            results.append(r)
    return results


def write(results: list[Result], out: Path) -> None:
    """All numbers as JSON."""
    rows = [dataclasses.asdict(r) | {"closed": r.closed, "passed": r.passed} for r in results]
    out.parent.mkdir(parents=True, exist_ok=True)
    whole.write(out, json.dumps(rows, indent=1) + "\n")


def _main() -> int:
    args = tyro.cli(Args, prog="python -m d4_sim.ladder")
    if args.scale <= 0 or not args.seeds or min(args.seeds) < 0:
        raise UserError("--scale must be positive and --seeds one or more numbers from 0")
    threads.configure(1)  # for models this small a second thread costs more than it brings
    results = climb(args)
    if args.out is not None:
        write(results, args.out)
    broken = next((r for r in results if not r.passed), None)
    if broken is None:
        return 0
    text = f"the ladder breaks at {broken.rung!r} (seed {broken.seed}): {broken.closed:.0%} of the gap closed"
    print(text, file=sys.stderr)
    return 1


def main() -> None:
    """Entry point with one-sentence errors."""
    run_cli(_main)


if __name__ == "__main__":
    main()
