"""Costs are counted before anything is allocated, and a preset that cannot fit is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from d4_core import memory
from d4_core.config import PRESETS, override
from d4_core.loop import computes_reduced
from d4_core.memory import activation_bytes, available_bytes, costs, require_memory
from d4_core.models import build
from d4_core.transformer import Transformer, TransformerConfig
from d4_datasets.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def robot():
    return toy_run.contract()


def test_parameters_are_those_of_the_real_networks(robot) -> None:
    models = build(toy_run.PRESET, robot)
    found = costs(toy_run.PRESET, robot)
    for name in ("tokenizer", "dynamics", "agent"):
        assert found[name].parameters == sum(p.numel() for p in getattr(models, name).parameters())


def test_flops_agree_with_a_count_of_the_matrix_products(robot) -> None:
    """Of one frame in the middle of a session; the embeddings are left out, the transformer is the cost."""
    cfg = override(toy_run.PRESET, ["dynamics.dim=64", "dynamics.depth=4", "dynamics.context=8"])
    dynamics = build(cfg, robot).dynamics
    frames = cfg.dynamics.context
    shape = (1, frames, cfg.num_tokens, dynamics.cfg.token_dim)
    index, known = torch.zeros(1, frames, dtype=torch.int64), torch.ones(1, frames, dtype=torch.bool)
    agent = torch.zeros(1, frames, cfg.agent_tokens, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dynamics(torch.zeros(shape), index, index, torch.zeros(1, frames, 2), known, agent)
    assert costs(cfg, robot)["dynamics"].flops == pytest.approx(counter.get_total_flops() / frames, rel=0.15)


def test_memory_grows_with_batch_and_model(robot) -> None:
    small = costs(toy_run.PRESET, robot)
    batch = costs(override(toy_run.PRESET, ["dynamics_training.batch=64"]), robot)
    model = costs(override(toy_run.PRESET, ["dynamics.dim=64"]), robot)
    assert batch["dynamics"].train_bytes > 3 * small["dynamics"].train_bytes
    assert batch["tokenizer"] == small["tokenizer"]
    assert batch["dynamics"].flops == small["dynamics"].flops
    assert model["dynamics"].train_bytes > small["dynamics"].train_bytes
    assert small["agent"].train_bytes > small["dynamics"].train_bytes  # it trains both


def kept_bytes(cfg: TransformerConfig, frames: int, slots: int, reduced: bool) -> int:
    """Distinct memory that autograd holds on to after a forward pass, weights left out."""
    network, held = Transformer(cfg), {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address comes twice
        return t.detach()  # an operation that holds its own result would never be let go

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        network(torch.randn(1, frames, slots, cfg.dim, requires_grad=True))
    return sum(storage.nbytes() for at, storage in held.items() if at not in weights)


class Peak(TorchDispatchMode):
    """Most bytes of tensors that were alive at a time, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self._now, self.most, self._alive = 0, 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (at := t.untyped_storage()._cdata) not in self._alive:
                size = t.untyped_storage().nbytes()
                self._alive.add(at)
                self._now += size
                self.most = max(self.most, self._now)
                weakref.finalize(t.untyped_storage(), self._gone, at, size)
        return out

    def _gone(self, at: int, size: int) -> None:
        self._alive.discard(at)
        self._now -= size


SHAPES = [(4, 2.0, 20, 32), (4, 4.0, 30, 32), (2, 4.0, 150, 8), (8, 4.0, 20, 64)]


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("heads", "mlp_ratio", "slots", "frames"), SHAPES)
def test_activations_are_those_that_autograd_keeps(
    heads: int, mlp_ratio: float, slots: int, frames: int, reduced: bool
) -> None:
    shape = {"dim": 128, "depth": 4, "heads": heads, "kv_heads": 1, "mlp_ratio": mlp_ratio, "context": frames}
    plain, deep = TransformerConfig(**shape), TransformerConfig(**shape | {"depth": 8})
    for again in (False, True):
        counted = [
            activation_bytes(replace(cfg, recompute=again), slots, 1, frames, reduced=reduced)
            for cfg in (plain, deep)
        ]
        four = counted[1] - counted[0]  # layers, without what one works with
        found = [kept_bytes(replace(cfg, recompute=again), frames, slots, reduced) for cfg in (plain, deep)]
        assert found[1] - found[0] == pytest.approx(four, rel=0.15)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_the_peak_of_a_step_is_what_was_counted(again: bool, reduced: bool) -> None:
    """Of many tokens, so that gradients of the weights, which are counted elsewhere, hardly matter."""
    cfg = TransformerConfig(dim=128, depth=8, heads=4, kv_heads=1, context=16, recompute=again)
    network, x = Transformer(cfg), torch.randn(1, 32, 100, 128, requires_grad=True)
    with Peak() as peak, torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        network(x).float().square().mean().backward()
    counted = activation_bytes(cfg, 100, 1, 32, reduced=reduced)
    assert 0.6 * counted < peak.most < 1.05 * counted


def test_the_longest_clip_counts_on_a_gpu_that_has_only_one(robot) -> None:
    cfg = override(toy_run.PRESET, ["dynamics_training.batch=4", "dynamics_training.long_length=64"])
    longer = override(cfg, ["dynamics_training.long_length=128"])
    grown = [costs(c, robot, ranks=4)["dynamics"].train_bytes for c in (cfg, longer)]
    assert grown[1] > grown[0]


@pytest.mark.parametrize("phase", ["tokenizer", "dynamics", "agent", "imagination"])
def test_a_preset_that_does_not_fit_is_refused_with_both_numbers(robot, monkeypatch, phase: str) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2.5 * 2**30)
    require_memory(toy_run.PRESET, robot, phase, CPU)
    sentence = (
        rf"{phase} of this preset needs about \d+\.\d GiB but 2\.5 GiB are free on cpu: choose a preset"
    )
    with pytest.raises(UserError, match=sentence):
        require_memory(override(PRESETS["paper"], ["patch=8"]), robot, phase, CPU)


def test_layers_run_again_are_proposed_to_whom_it_helps(robot, monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1e6)
    for phase, name in (("tokenizer", "tokenizer"), ("dynamics", "dynamics"), ("agent", "dynamics")):
        with pytest.raises(UserError, match=rf"or {name}\.recompute=true, which costs time, with --set$"):
            require_memory(replace(PRESETS["base"], patch=8), robot, phase, CPU)
        with pytest.raises(UserError, match=r"smaller batches or shorter clips with --set$"):
            require_memory(replace(PRESETS["large"], patch=8), robot, phase, CPU)


def test_free_memory_is_that_of_the_device(monkeypatch) -> None:
    total = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemTotal"))
    assert 0 < available_bytes(CPU) <= float(total.split()[1]) * 1024
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 80))
    assert available_bytes(torch.device("cuda")) == 7.0


def test_processes_on_a_cpu_share_its_memory(robot, monkeypatch) -> None:
    cost = {n: costs(toy_run.PRESET, robot, n, computes_reduced(CPU)) for n in (1, 2)}
    needed = {n: found["dynamics"].train_bytes for n, found in cost.items()}
    assert needed[1] > needed[2] > needed[1] / 2  # a rank has its part of the batch, and all of the weights
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2.01 * needed[2])
    require_memory(toy_run.PRESET, robot, "dynamics", CPU, ranks=2)
    require_memory(toy_run.PRESET, robot, "dynamics", torch.device("cuda"), ranks=8)  # each has its own
    with pytest.raises(UserError, match="dynamics of this preset needs"):
        require_memory(toy_run.PRESET, robot, "dynamics", CPU, ranks=8)  # as many weights
