"""A policy's step as something that is recorded once and repeated: it must do what the step does each time.

Without a GPU a recording of the step's operations stands in for a CUDA graph: like one it repeats them on the
addresses of the first time, and runs no Python.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import toy_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d4_core import captured
from d4_core import session as session_module
from d4_core.actions import ActionPart, ActionSpace
from d4_core.captured import Port
from d4_core.models import Models, load
from d4_core.session import PolicySession, observe

WORLDS, FRAMES = 2, 10  # more frames than the context window of 4
ALIVE = np.ones(WORLDS, bool)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    run = tmp_path_factory.mktemp("captured")
    toy_run.write_checkpoint(run, "imagination", toy_run.contract())
    return awake(load(run / "imagination"))


def awake(models: Models) -> Models:
    """Networks with opinions: as initialised they would do the same everywhere."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (models.tokenizer, models.dynamics, models.agent, models.policy):
            for name, p in network.named_parameters():
                if name.endswith(("out.weight", "down.weight")):
                    p.copy_(torch.randn(p.shape, generator=gen) * 0.5)
    return models


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (FRAMES, WORLDS, 16, 24, 3), dtype=np.uint8)


Said = list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def drive(session: PolicySession, pictures: np.ndarray) -> Said:
    """Everything a session says in three episodes with tasks that change and commands that are corrected."""
    said: Said = []
    for episode in range(3):
        session.reset(WORLDS, np.array([episode % 2, 1]))
        for k, frame in enumerate(pictures):
            if k == 4:
                session.ask(np.array([1, episode % 2]))
            if k % 3 == 2:
                session.correct(np.full((WORLDS, session._action.shape[1]), 0.1 * k, np.float32), ALIVE)
            action = session.act(np.roll(frame, episode, 0), {}, ALIVE)
            reward = session.predicted_reward.cpu().numpy().copy()
            said.append((action, session.plan(), session.features.cpu().numpy().copy(), reward))
    return said


def same(a: Said, b: Said) -> bool:
    pairs = (pair for one, two in zip(a, b, strict=True) for pair in zip(one, two, strict=True))
    return all(np.array_equal(x, y) for x, y in pairs)


class Straight(PolicySession):
    """The step written down without buffers: what is seen goes in, numbers are drawn where they are used."""

    @torch.no_grad()
    def act(self, images, vectors, alive) -> np.ndarray:
        tokenizer, space = self.models.tokenizer, self.models.dynamics.space
        obs = observe(tokenizer, images, vectors, self.device)
        tokens = tokenizer.pack(tokenizer.encode_step(obs, self.cache))
        self.features = self.dream.observe(tokens, self._action, self._known, self._task)
        params = self.head.first(self.features)
        self._action.copy_(space.mode(params) if self.argmax else space.sample(params, self.gen))
        self._known.fill_(True)
        self.predicted_reward.copy_(self.models.agent.predict_reward(self.features))
        return self._action.cpu().numpy().copy()


@pytest.mark.parametrize("argmax", [False, True])
def test_the_step_through_buffers_is_the_step(models, pictures, argmax) -> None:
    """Bit for bit, random numbers included."""
    sessions = [kind(models, WORLDS, 5, argmax=argmax) for kind in (PolicySession, Straight)]
    buffered, straight = (drive(session, pictures) for session in sessions)
    assert same(buffered, straight)
    assert len({action.tobytes() for action, *_ in straight}) > 3


def test_actions_of_every_kind_take_the_chances_that_they_name() -> None:
    parts = (
        ActionPart(kind="continuous", size=2, low=(-1.0, -2.0), high=(1.0, 2.0)),
        ActionPart(kind="binary", size=3),
        ActionPart(kind="categorical", classes=4),
    )
    space = ActionSpace(parts)
    params = torch.randn(5, space.num_params)
    gen = torch.Generator().manual_seed(1)
    drawn = [torch.rand(5, *shape, generator=gen) for shape in space.chances()]
    assert torch.equal(space.sample(params, uniform=drawn), space.sample(params, gen.manual_seed(1)))


# ---- recorded and repeated


class Tape(TorchDispatchMode):
    """Operations as they were carried out, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def repeat(self) -> None:
        for func, args, kwargs, out in self.done:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out), strict=True):
                if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def record(work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """As `capture`."""
    work()
    with Tape() as tape:
        result = work()

    def replay() -> torch.Tensor:
        with torch.no_grad():
            tape.repeat()
        return result

    return replay


def as_if_on_a_gpu(models: Models, monkeypatch, capture) -> PolicySession:
    session = PolicySession(models, WORLDS, 5)
    session.device = torch.device("cuda")
    monkeypatch.setattr(session_module, "capture", capture)
    return session


def test_the_step_repeated_from_a_recording_is_the_step(models, pictures, monkeypatch) -> None:
    session = as_if_on_a_gpu(models, monkeypatch, record)
    assert session.accelerate() == "a CUDA graph"
    assert session._step != session._compute
    assert same(drive(session, pictures), drive(PolicySession(models, WORLDS, 5), pictures))


def test_the_step_waits_for_nothing_and_draws_nothing(models, pictures) -> None:
    """What a graph cannot hold: values looked at on the host, sizes that depend on values, random numbers."""
    session = PolicySession(models, WORLDS)
    drive(session, pictures)
    with Tape() as tape:
        session._compute()
        session._foresee()
    names = {func.name().split("::")[1].split(".")[0] for func, *_ in tape.done}
    assert len(names) > 10
    assert not names & {
        "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique",
        "_unique2", "repeat_interleave", "multinomial", "rand", "rand_like", "randn", "randn_like", "randint",
        "normal_", "uniform_", "bernoulli", "bernoulli_", "exponential_", "dropout", "native_dropout",
    }  # fmt: skip
    bool_masks = [
        args for func, args, *_ in tape.done
        if func.name().startswith(("aten::index.", "aten::index_put"))
        and any(t is not None and t.dtype == torch.bool for t in args[1])
    ]  # fmt: skip
    assert not bool_masks


def refuses(work, device):
    raise RuntimeError("operation not permitted when stream is capturing\nand much more")


def forgets(work, device):
    """A graph that missed that inputs change."""
    result = work().clone()
    return lambda: result


@pytest.mark.parametrize(
    ("capture", "reason"),
    [(refuses, "could not be captured (operation not permitted when stream is capturing)"),
     (forgets, "its actions were off by up to")],
)  # fmt: skip
def test_without_a_graph_the_plain_step_runs_and_is_named(
    models, pictures, monkeypatch, capture, reason
) -> None:
    session = as_if_on_a_gpu(models, monkeypatch, capture)
    said = session.accelerate()
    assert said.startswith("plain, without a CUDA graph: ")
    assert reason in said
    assert "\n" not in said
    assert same(drive(session, pictures), drive(PolicySession(models, WORLDS, 5), pictures))


def test_on_a_cpu_nothing_is_captured(models) -> None:
    assert PolicySession(models, WORLDS).accelerate() == "plain, on a CPU"


def test_a_port_takes_only_what_fits() -> None:
    port = Port((1, 2), torch.float32, torch.device("cpu"))
    port.put(np.array([[1, 2]], np.float32))
    assert port.tensor.tolist() == [[1, 2]]
    for wrong in (np.zeros((2, 2), np.float32), np.zeros((1, 2), np.uint8), np.zeros(2, np.float32)):
        with pytest.raises(ValueError, match="is expected"):
            port.put(wrong)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("argmax", [False, True])
def test_a_cuda_graph_does_what_the_plain_step_does(tmp_path, pictures, argmax) -> None:
    """Over many steps, resets, changed tasks and corrected commands."""
    toy_run.write_checkpoint(tmp_path, "imagination", toy_run.contract())
    models = awake(load(tmp_path / "imagination", device=torch.device("cuda")))
    graphed, plain = (PolicySession(models, WORLDS, 5, argmax=argmax) for _ in range(2))
    assert graphed.accelerate() == "a CUDA graph"
    assert graphed._step != graphed._compute
    for _ in range(10):
        pairs = zip(drive(graphed, pictures), drive(plain, pictures), strict=True)
        for one, two in pairs:
            for a, b in zip(one, two, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_looks_at_a_value_is_not_captured() -> None:
    value = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError):
        captured.capture(lambda: value + value.sum().item(), torch.device("cuda"))
