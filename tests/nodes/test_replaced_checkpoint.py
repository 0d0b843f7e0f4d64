"""A checkpoint that is replaced on disk: weights never run under the hash of others."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from untrained_run import PRESET

from d4_core import checkpoint, models
from d4_core.config import to_dict
from d4_core.models import CONTENTS, build, weights_hash
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes.bench import ServerProcess
from d4_nodes.link import Link
from d4_nodes.server import PolicyBrain, TokenizerBrain

ROBOT = Path(__file__).with_name("robot.yaml")


def train(run: Path, phase: str, seed: int) -> None:
    """A checkpoint whose weights are random to the last head."""
    torch.manual_seed(seed)
    contract = Contract.load(ROBOT)
    networks = build(PRESET, contract, phase).named(CONTENTS[phase])
    for network in networks.values():
        for weights in network.parameters():
            torch.nn.init.normal_(weights, std=0.3)
    checkpoint.save(
        run / phase, modules=networks,
        config={"phase": phase, "config": {"preset": to_dict(PRESET)}, "step": 1, "status": "done"},
        contract=contract, metrics={}, train_state={},
    )  # fmt: skip


@pytest.mark.parametrize(("phase", "brain"), [("imagination", PolicyBrain), ("tokenizer", TokenizerBrain)])
def test_a_checkpoint_replaced_while_it_is_read_is_refused(phase, brain, tmp_path, monkeypatch) -> None:
    """The old weights would run under the hash of the new ones."""
    train(tmp_path, phase, 0)
    load = models.load

    def slowly(*args, **options):
        loaded = load(*args, **options)
        train(tmp_path, phase, 1)
        return loaded

    monkeypatch.setattr(models, "load", slowly)
    with pytest.raises(UserError, match="was replaced while it was read"):
        brain(tmp_path, device="cpu")
    monkeypatch.undo()
    assert brain(tmp_path, device="cpu").card["weights"] == weights_hash(tmp_path / phase)


def plan(link: Link, rng: np.random.Generator) -> np.ndarray:
    """The answer to the first frame of an episode."""
    link.cameras["eye"][:] = rng.integers(0, 256, link.cameras["eye"].shape, np.uint8)
    link.submit(0, True, None)
    while (reply := link.poll()) is None:
        pass
    assert not reply.failure
    return reply.plan


def test_a_checkpoint_replaced_under_a_server_drives_only_after_a_restart(tmp_path) -> None:
    """What runs stays what it was, and is named so; what comes after a crash has another name."""
    run, path, contract = tmp_path / "run", tmp_path / "d4.sock", Contract.load(ROBOT)
    train(run, "imagination", 0)
    command = [sys.executable, "-m", "d4_nodes.server", str(run), "--socket", str(path), "--threads", "1"]
    with ServerProcess(command) as server:
        link = Link(path, contract)
        before, name = plan(link, np.random.default_rng(0)), link.card["weights"]
        train(run, "imagination", 1)
        assert weights_hash(run / "imagination") != name
        np.testing.assert_array_equal(plan(link, np.random.default_rng(0)), before)
        link.close()
        link = Link(path, contract)  # a robot that comes back meets the same policy
        assert link.card["weights"] == name
        np.testing.assert_array_equal(plan(link, np.random.default_rng(0)), before)
        link.close()
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with ServerProcess(command):
        link = Link(path, contract)
        assert link.card["weights"] == weights_hash(run / "imagination") != name
        assert np.abs(plan(link, np.random.default_rng(0)) - before).max() > 1e-3
        link.close()
