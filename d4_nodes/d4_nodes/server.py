"""``d4-serve``: the inference server, which holds the policy or the tokenizer and answers one robot.

It never listens beyond this host: a Unix socket that only this user can reach carries control messages
(`d4_nodes.wire`), shared memory without a name carries frames and actions (`d4_nodes.memory`). Shapes are
fixed and caches allocated once; a reset only forgets.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import tyro

from d4_core import threads
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError, run_cli
from d4_nodes import memory, wire
from d4_nodes.memory import CAMERA, VECTOR, Field, Memory
from d4_nodes.wire import Kind, Message, WireError

if TYPE_CHECKING:
    from d4_core.models import Models

HEARTBEAT_S = 0.01
_LONGEST_MS = 1000.0  # of an answer's delay
_MOST_GUESTS = 32  # connections at a time; one of them is served


@dataclass(kw_only=True)
class ServeArgs:
    """Serve a policy, or a tokenizer alone, to one robot on this host until SIGTERM."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of an agent or imagination checkpoint, or a run folder: its latest of the two."""
    tokenizer: bool = False
    """Serve the tokenizer of a run folder (or of a tokenizer checkpoint): pictures in, latents out."""
    socket: Path | None = None
    """Where to listen; default: d4-<contract name>.sock in the user's runtime folder, for a tokenizer
    d4-<contract name>-tokenizer.sock."""
    seed: int = 0
    """Decides context noise and action samples, anew in every episode, and jitter."""
    argmax: bool = False
    """Take the likeliest action instead of a sample."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """Compute threads; default: the free cores."""
    delay_ms: float = 0.0
    """Answer so much later, which only a measurement wants."""
    jitter_ms: float = 0.0
    """Standard deviation of that; it never gets below 0."""


class Brain(Protocol):
    """What a server serves over shared memory.

    Attributes:
        kind: "policy" or "tokenizer"; a robot that wants the other is refused.
        contract: the robot it was trained for.
        fields: where request and reply lie.
        card: what the robot's process is told about it (JSON values), with the sizes of a reply.
    """

    kind: str
    contract: Contract
    fields: tuple[Field, ...]
    card: dict[str, Any]

    def decide(self, shared: Memory) -> None:
        """Answer the request in shared memory: fill the fields of the reply."""


class PolicyBrain:
    """The world-model policy of a checkpoint folder as a brain.

    Attributes:
        leads: number of frames L that a plan covers.

    The card's `step` says whether frames run as a CUDA graph, and if not, why.
    """

    kind = "policy"

    def __init__(self, folder: Path, seed: int = 0, argmax: bool = False, device: str = "auto") -> None:
        from d4_core.session import PolicySession

        models, origins = _load(_acting(folder), device)
        self.contract = models.contract
        self.session = PolicySession(models, 1, seed, argmax=argmax)
        self.leads = models.acting.leads
        self.fields = memory.layout(self.contract, self.leads)
        self.card = {
            **origins, "seed": seed, "argmax": argmax, "device": str(self.session.device),
            "leads": self.leads, "step": self.session.accelerate(),
        }  # fmt: skip
        self._begin(0)

    def _begin(self, task: int) -> None:
        self._task = np.array([task])
        self._alive = np.ones(1, bool)
        self.session.reset(1, self._task)

    def decide(self, shared: Memory) -> None:
        """One frame through the session."""
        task = int(shared["task"])
        if shared["reset"] or task != self._task[0]:
            self._begin(task)
        else:
            self.session.correct(shared["previous"][None], shared["previous_known"][None] != 0)
        began = time.perf_counter_ns()
        images = {name: image[None] for name, image in shared.observation(CAMERA).items()}
        vectors = {name: vector[None] for name, vector in shared.observation(VECTOR).items()}
        self.session.act(images, vectors, self._alive)
        middle = time.perf_counter_ns()
        shared["plan"][:] = self.session.plan()[0]
        shared["reward"][...] = self.session.predicted_reward[0].item()
        shared["spans"][:] = middle - began, time.perf_counter_ns() - middle


class TokenizerBrain:
    """The tokenizer of a run as a brain: frames of one stream to latents, each in the light of those before.

    The latents are those that `d4_core.data.encode_episodes` computes for the same frames, and that a policy
    session sees: one cache, forgotten at a reset.
    """

    kind = "tokenizer"

    def __init__(self, folder: Path, device: str = "auto") -> None:
        models, origins = _load(_encoding(folder), device)
        self.contract, self.tokenizer = models.contract, models.tokenizer
        self._cache = self.tokenizer.new_cache(1)
        cfg = self.tokenizer.cfg
        self.fields = memory.latents_layout(self.contract, cfg.num_latents, cfg.latent_dim)
        self.card = {
            **origins, "device": str(self.tokenizer.latents.device),
            "tokens": cfg.num_latents, "channels": cfg.latent_dim,
        }  # fmt: skip

    def decide(self, shared: Memory) -> None:
        """One frame through the encoder."""
        import torch

        from d4_core.session import observe

        began = time.perf_counter_ns()
        if shared["reset"]:
            self._cache.reset()
        images = {name: image[None] for name, image in shared.observation(CAMERA).items()}
        vectors = {name: vector[None] for name, vector in shared.observation(VECTOR).items()}
        with torch.no_grad():
            seen = observe(self.tokenizer, images, vectors, self.tokenizer.latents.device)
            shared["latents"][:] = self.tokenizer.encode_step(seen, self._cache)[0].cpu().numpy()
        shared["spans"][:] = time.perf_counter_ns() - began


class Delayed:
    """A brain that answers later, to see what becomes of the robot.

    Args:
        delay_ms, jitter_ms: mean and standard deviation; an answer is never early. `seed` decides them.

    Raises:
        UserError: either is negative or more than a second.
    """

    def __init__(self, brain: Brain, delay_ms: float, jitter_ms: float, seed: int = 0) -> None:
        for name, value in (("delay_ms", delay_ms), ("jitter_ms", jitter_ms)):
            if not 0 <= value <= _LONGEST_MS:
                raise UserError(f"{name} is {value:g}: give 0 to {_LONGEST_MS:g} ms")
        self.kind, self.contract, self.fields = brain.kind, brain.contract, brain.fields
        self.card = {**brain.card, "delay_ms": delay_ms, "jitter_ms": jitter_ms}
        self._brain, self._delay_ms, self._jitter_ms = brain, delay_ms, jitter_ms
        self._rng = np.random.default_rng(seed)

    def decide(self, shared: Memory) -> None:
        """Answer, and rest before it is told."""
        self._brain.decide(shared)
        time.sleep(max(0.0, self._delay_ms + self._jitter_ms * self._rng.standard_normal()) / 1e3)


def _load(folder: Path, device: str) -> tuple[Models, dict[str, Any]]:
    """Networks of a checkpoint folder, and what a card says of these very weights: folder, hash, origin.

    Raises:
        UserError: there is no checkpoint, or another took its place while it was read: the robot, which
            refuses weights by their hash, would be told that of others than those that drive it.
    """
    from d4_core import checkpoint
    from d4_core.models import load, weights_hash
    from d4_core.pipeline import pick_device

    weights = weights_hash(folder)
    models = load(folder, device=pick_device(device))
    origin = checkpoint.load_config(folder).get("origin", {})
    if weights_hash(folder) != weights:
        raise UserError(f"the checkpoint {folder} was replaced while it was read: start the server again")
    return models, {"checkpoint": str(folder.resolve()), "weights": weights, "origin": origin}


def _encoding(folder: Path) -> Path:
    """The tokenizer checkpoint: `folder` itself, or that of a run folder. Those of later phases hold a
    tokenizer too, but other weights beside it: their hash would not be the tokenizer's.
    """
    if (folder / "tokenizer" / "config.json").exists():
        return folder / "tokenizer"
    if (folder / "config.json").exists():
        phase = json.loads((folder / "config.json").read_text()).get("phase")
        if phase == "tokenizer":
            return folder
        raise UserError(f"{folder} is a checkpoint of phase {phase}: give the run folder, or its tokenizer")
    raise UserError(f"{folder} holds no tokenizer checkpoint: train one with d4-train")


def _acting(folder: Path) -> Path:
    """The checkpoint to act with: `folder` itself, or the latest phase of a run folder that has a policy."""
    for phase in ("imagination", "agent"):
        if (folder / phase / "config.json").exists():
            return folder / phase
    if (folder / "config.json").exists():
        phase = json.loads((folder / "config.json").read_text()).get("phase")
        if phase not in ("imagination", "agent"):
            raise UserError(
                f"{folder} is a checkpoint of phase {phase}, without a policy: train the phase agent"
            )
        return folder
    raise UserError(f"{folder} holds no agent or imagination checkpoint: train one with d4-train")


class Server:
    """Serves a brain on a socket, one client at a time.

    Raises:
        UserError: another server listens there, or the socket cannot be made.
    """

    def __init__(self, brain: Brain, path: Path) -> None:
        self.brain, self.path = brain, path
        self.shared = Memory(brain.fields)
        try:
            self._listener = wire.listen(path)
        except OSError as error:
            raise UserError(f"cannot listen on {path}: {error.strerror or error}") from error
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._client: socket.socket | None = None
        self._wake, self._stop = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def stop(self) -> None:
        """Make `run` return after the request at hand; may be called from a signal handler."""
        os.write(self._stop, b"x")

    def run(self) -> None:
        """Answer until `stop`."""
        self._heart.start()
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj == self._wake:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._serve(key.fileobj)  # type: ignore[arg-type]
        finally:
            self._close()

    def warm_up(self, count: int = 20) -> list[float]:
        """Seconds that each of `count` frames took after one that is not counted: first calls are slow."""
        seconds = []
        self.shared["reset"][...] = 1
        for _ in range(count + 1):
            began = time.perf_counter()
            self.brain.decide(self.shared)
            seconds.append(time.perf_counter() - began)
            self.shared["reset"][...] = 0
        return seconds[1:]

    def _beat(self) -> None:
        beat = self.shared["heartbeat"]
        while not self._ended.wait(HEARTBEAT_S):
            beat[...] = time.monotonic_ns()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if len(self._selector.get_map()) >= _MOST_GUESTS:
            sock.close()  # of open files there is an end
            return
        sock.setblocking(False)  # whoever does not read or write must not hold up the others
        self._selector.register(sock, selectors.EVENT_READ)
        if why := wire.stranger(sock):
            self._refuse(sock, why)

    def _serve(self, sock: socket.socket) -> None:
        """Handle one message; a client that sends nonsense is told why and cut off."""
        try:
            message, descriptor = wire.receive(sock)
            if descriptor is not None:
                os.close(descriptor)
            if message.kind is Kind.HELLO:
                self._welcome(sock, message)
            elif message.kind is Kind.STEP and sock is self._client:
                wire.send(sock, self._step(message.sequence))
            elif message.kind is Kind.BYE:
                self._drop(sock)
            else:
                raise WireError(f"{message.kind.name} was not expected")
        except BlockingIOError:
            return
        except WireError as error:
            self._refuse(sock, str(error))

    def _welcome(self, sock: socket.socket, message: Message) -> None:
        told = message.json()
        theirs, ours = told.get("contract"), self.brain.contract.hash
        wants = told.get("wants", "policy")
        if self._client is not None:
            self._refuse(sock, "another robot is connected to this server; start one server for each")
        elif wants != self.brain.kind:
            self._refuse(sock, f"this server holds a {self.brain.kind}, not a {str(wants)[:40]}")
        elif theirs != ours:
            name = self.brain.contract.name
            self._refuse(sock, f"the checkpoint was trained on another contract ({name}, {ours[:12]})")
        else:
            card = {**self.brain.card, "pid": os.getpid(), "fields": self.shared.fields}
            wire.send(sock, Message(Kind.WELCOME, payload=json.dumps(card).encode()), self.shared.descriptor)
            self._client = sock

    def _step(self, sequence: int) -> Message:
        try:
            self.brain.decide(self.shared)
        except Exception as error:
            print(f"d4-serve: request {sequence} failed: {error!r}", file=sys.stderr, flush=True)
            return Message(
                Kind.FAILED, sequence, f"{type(error).__name__}: {error}".encode()[: wire.MAX_PAYLOAD]
            )
        return Message(Kind.DONE, sequence)

    def _refuse(self, sock: socket.socket, why: str) -> None:
        with contextlib.suppress(WireError):  # gone already
            wire.send(sock, Message(Kind.REFUSED, payload=why.encode()[: wire.MAX_PAYLOAD]))
        self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        if sock is self._client:
            self._client = None
        sock.close()

    def _close(self) -> None:
        self._ended.set()
        self._heart.join()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self.path.unlink(missing_ok=True)
        self.shared.close()


def serve(brain: Brain, path: Path) -> None:
    """Warm up, say so on standard output, and answer until SIGTERM or SIGINT."""
    server = Server(brain, path)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    seconds = sorted(server.warm_up())
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a tick is a pause; nothing here makes cycles
    sys.setswitchinterval(0.0005)  # the heartbeat needs the interpreter soon, and briefly
    ready = {"ready": str(path), "median_ms": round(1e3 * seconds[len(seconds) // 2], 2),
             "slowest_ms": round(1e3 * seconds[-1], 2), **brain.card}  # fmt: skip
    print(json.dumps(ready), flush=True)
    if "step" in brain.card:
        print(f"d4-serve: step: {brain.card['step']}", file=sys.stderr, flush=True)
    server.run()


def main() -> None:
    """Entry point of ``d4-serve``."""
    run_cli(_main)


def _main() -> int:
    args = tyro.cli(ServeArgs, prog="d4-serve")
    threads.configure(args.threads)
    brain: Brain
    if args.tokenizer:
        brain = TokenizerBrain(args.checkpoint, args.device)
        name = f"{brain.contract.name}-tokenizer"
    else:
        brain = PolicyBrain(args.checkpoint, args.seed, args.argmax, args.device)
        name = brain.contract.name
    if args.delay_ms or args.jitter_ms:
        brain = Delayed(brain, args.delay_ms, args.jitter_ms, args.seed)
    serve(brain, args.socket or wire.default_socket(name))
    return 0


if __name__ == "__main__":
    main()
