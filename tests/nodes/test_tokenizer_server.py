"""The inference server as a tokenizer: the latents of a stream are those that training computes."""

import json
import os
import select
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from d4_core import checkpoint
from d4_core.config import Preset, to_dict
from d4_core.data import encode_episodes
from d4_core.models import CONTENTS, build, load, weights_hash
from d4_core.transformer import TransformerConfig
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes import memory, wire
from d4_nodes.bench import ServerProcess
from d4_nodes.link import Link, TokenizerLink
from d4_nodes.memory import Memory
from d4_nodes.server import TokenizerBrain
from d4_nodes.wire import Kind, Message, WireError

SHAPE = TransformerConfig(dim=16, depth=4, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=2, context=4)
PRESET = Preset(patch=4, num_latents=4, latent_dim=6, num_tokens=2, tokenizer=SHAPE, dynamics=SHAPE)
FRAMES = 11  # more than the attention windows hold
ROBOT = Path(__file__).with_name("robot.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with an untrained tokenizer for the test robot."""
    folder, contract = tmp_path_factory.mktemp("run"), Contract.load(ROBOT)
    torch.manual_seed(0)
    checkpoint.save(
        folder / "tokenizer", modules=build(PRESET, contract, "tokenizer").named(CONTENTS["tokenizer"]),
        config={"phase": "tokenizer", "config": {"preset": to_dict(PRESET)}, "step": 1, "status": "done"},
        contract=contract, metrics={}, train_state={},
    )  # fmt: skip
    return folder


class Log:
    """Two episodes as training reads them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.images = {"eye": rng.integers(0, 256, (2 * FRAMES, 8, 12, 3), np.uint8)}
        self.vectors = {"joints": rng.normal(size=(2 * FRAMES, 2)).astype(np.float32)}
        self.episode_start, self.episode_length = np.array([0, FRAMES]), np.array([FRAMES, FRAMES])


def stream(brain: TokenizerBrain, log: Log, resets: set[int]) -> np.ndarray:
    shared = Memory(brain.fields)
    out = []
    for t, picture in enumerate(log.images["eye"]):
        shared["camera.eye"][:], shared["vector.joints"][:] = picture, log.vectors["joints"][t]
        shared["reset"][...] = t in resets
        brain.decide(shared)
        out.append(shared["latents"].copy())
    shared.close()
    return np.stack(out)


def test_a_stream_has_the_latents_of_training(run, rng) -> None:
    log, brain = Log(rng), TokenizerBrain(run, device="cpu")
    wanted = encode_episodes(load(run / "tokenizer").tokenizer, log, np.arange(2))  # type: ignore[arg-type]
    np.testing.assert_allclose(stream(brain, log, {0, FRAMES}), np.concatenate(wanted), atol=1e-5)
    # the past matters: an episode that is not begun anew has other latents
    unbroken = stream(brain, log, {0})
    assert np.abs(unbroken[FRAMES] - wanted[1][0].numpy()).max() > 1e-3


def test_the_command_serves_a_tokenizer_and_nothing_else(run, tmp_path, rng) -> None:
    path, log, contract = tmp_path / "d4.sock", Log(rng), Contract.load(ROBOT)
    command = [sys.executable, "-m", "d4_nodes.server", str(run), "--tokenizer", "--socket", str(path)]
    with ServerProcess([*command, "--threads", "1", "--device", "cpu"]):
        with pytest.raises(WireError, match="refuses: this server holds a tokenizer, not a policy"):
            Link(path, contract)
        with pytest.raises(WireError, match="another contract"):
            TokenizerLink(path, replace(contract, rate_hz=21.0))
        link = TokenizerLink(path, contract)
        assert link.weights == weights_hash(run / "tokenizer")
        link.cameras["eye"][:], link.vectors["joints"][:] = log.images["eye"][0], log.vectors["joints"][0]
        number = link.submit(reset=True)
        select.select([link], [], [], 5.0)
        reply = link.poll()
        assert reply is not None
        link.close()
    wanted = encode_episodes(load(run / "tokenizer").tokenizer, log, np.arange(1))[0]  # type: ignore[arg-type]
    assert reply.sequence == number
    assert reply.span > 0
    np.testing.assert_allclose(reply.latents, wanted[0], atol=1e-5)


def test_a_tokenizer_node_is_refused_by_a_policy(rig_server, contract) -> None:
    with pytest.raises(WireError, match="refuses: this server holds a policy, not a tokenizer"):
        TokenizerLink(rig_server.socket, contract)


def test_folders_without_a_tokenizer_are_one_sentence(run, tmp_path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer checkpoint"):
        TokenizerBrain(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"phase": "agent"}))
    with pytest.raises(UserError, match="phase agent: give the run folder"):
        TokenizerBrain(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "d4_nodes.server", "--tokenizer", str(tmp_path / "nowhere")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


CLAIMS = {
    "tokens": [None, 0, -1, 2.0, True, 4097, 10**30, "4", [4]],
    "channels": [None, 0, 4097, "6"],
    "weights": [None, 7, "", "f" * 65],
    "fields": [None, [], [["heartbeat", 0, "int64", []]]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in CLAIMS.items() for value in values], ids=str
)
def test_what_a_server_claims_is_bounded(key, value, contract, tmp_path) -> None:
    fields = memory.latents_layout(contract, 4, 6)
    card = {"weights": "abc", "tokens": 4, "channels": 6, "fields": fields, key: value}
    with pytest.raises(WireError):
        _connect_to(card, fields, contract, tmp_path)


def test_an_honest_claim_is_taken(contract, tmp_path) -> None:
    fields = memory.latents_layout(contract, 4, 6)
    card = {"weights": "abc", "tokens": 4, "channels": 6, "fields": fields}
    link = _connect_to(card, fields, contract, tmp_path)
    assert link.weights == "abc"
    link.close()


def _connect_to(card, fields, contract, folder) -> TokenizerLink:
    """A link to a server that says `card`."""
    path, shared = folder / "d4.sock", Memory(fields)
    listener = wire.listen(path)

    def welcome() -> None:
        sock, _ = listener.accept()
        wire.receive(sock)
        wire.send(sock, Message(Kind.WELCOME, payload=json.dumps(card).encode()), os.dup(shared.descriptor))
        sock.recv(1)

    thread = threading.Thread(target=welcome, daemon=True)
    thread.start()
    try:
        return TokenizerLink(path, contract)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
