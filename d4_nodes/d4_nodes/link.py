"""The robot's side of the inference server: submit a request, collect the reply, watch the heartbeat.

No torch, no waiting: every call returns at once except the handshake, which is bounded.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d4_datasets.contract import Contract
from d4_nodes import memory, wire
from d4_nodes.memory import CAMERA, VECTOR, Memory
from d4_nodes.wire import Kind, Message, WireError


class Reply(NamedTuple):
    """What the server decided at request `sequence`.

    plan: float32 (L, A) commands for the frame and the L - 1 after it. reward: expected reward of the frame.
    spans: ns that the session and the plan took. failure: why there is no plan; then the plan is empty.
    """

    sequence: int
    plan: np.ndarray
    reward: float
    spans: tuple[int, int]
    failure: str = ""


class Link:
    """A connection to an inference server.

    Attributes:
        card: what the server said about itself: checkpoint, weights, pid, leads, origin.
        cameras, vectors: arrays in shared memory by name, to be filled before `submit`.
        is_busy: a request is at the server; its memory must not be touched.

    Raises:
        WireError: nobody listens, the server refuses (with its reason), or it speaks another protocol.
    """

    def __init__(self, path: Path, contract: Contract, timeout_s: float = 5.0) -> None:
        self._sock = wire.connect(path, timeout_s)
        try:
            self._shared, self.card = _handshake(self._sock, contract)
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        self.cameras = self._shared.observation(CAMERA)
        self.vectors = self._shared.observation(VECTOR)
        self.is_busy = False
        self.leads = int(self.card["leads"])
        self._sequence = 0
        self._nothing = np.zeros((0, contract.action_dim), np.float32)

    def fileno(self) -> int:
        """Readable when a reply has come or the server has gone."""
        return self._sock.fileno()

    def submit(self, task: int, reset: bool, previous: np.ndarray | None) -> int:
        """Hand over the observation that lies in shared memory; returns the request's number.

        Args:
            task: index of the contract's task.
            reset: forget the past first.
            previous: (A,) command in force since the last frame, None if it is unknown.

        Raises:
            WireError: the server has gone.
        """
        assert not self.is_busy
        shared = self._shared
        shared["task"][...], shared["reset"][...] = task, reset
        shared["previous_known"][...] = previous is not None
        if previous is not None:
            shared["previous"][:] = previous
        self._sequence += 1
        wire.send(self._sock, Message(Kind.STEP, self._sequence))
        self.is_busy = True
        return self._sequence

    def poll(self) -> Reply | None:
        """The reply if it has come, else None.

        Raises:
            WireError: the server has gone or breaks the protocol.
        """
        try:
            message, descriptor = wire.receive(self._sock)
        except BlockingIOError:
            return None
        if descriptor is not None:
            os.close(descriptor)
        if message.kind not in (Kind.DONE, Kind.FAILED) or message.sequence != self._sequence:
            raise WireError(f"the server sent {message.kind.name} {message.sequence}: {message.text}")
        self.is_busy = False
        if message.kind is Kind.FAILED:
            return Reply(message.sequence, self._nothing, 0.0, (0, 0), message.text or "it gave no reason")
        first, second = self._shared["spans"].tolist()
        plan, reward = self._shared["plan"].copy(), float(self._shared["reward"])
        return Reply(message.sequence, plan, reward, (first, second))

    def heartbeat_age_s(self) -> float:
        """Seconds since the server last showed life."""
        return (time.monotonic_ns() - int(self._shared["heartbeat"])) / 1e9

    def close(self) -> None:
        """Say goodbye, if anyone listens, and let go of the memory."""
        with contextlib.suppress(WireError):
            wire.send(self._sock, Message(Kind.BYE))
        self._sock.close()
        self.cameras, self.vectors = {}, {}
        self._shared.close()


def _handshake(sock: socket.socket, contract: Contract) -> tuple[Memory, dict[str, Any]]:
    wire.send(sock, Message(Kind.HELLO, payload=f'{{"contract": "{contract.hash}"}}'.encode()))
    try:
        message, descriptor = wire.receive(sock)
    except TimeoutError as error:
        raise WireError("the inference server does not answer") from error
    try:
        if message.kind is Kind.REFUSED:
            raise WireError(f"the inference server refuses: {message.text}")
        if message.kind is not Kind.WELCOME or descriptor is None:
            raise WireError(f"the inference server answered {message.kind.name}")
        card = message.json()
        leads, theirs = card.get("leads"), card.pop("fields", None)
        if type(leads) is not int or not 1 <= leads <= 1024:
            raise WireError(f"the inference server plans {leads!r} frames ahead")
        fields = memory.layout(contract, leads)
        if theirs != [[f.name, f.offset, f.dtype, list(f.shape)] for f in fields]:
            raise WireError("the inference server lays out its memory differently: it is of another version")
        given, descriptor = descriptor, None  # Memory owns it from here on
        return Memory(fields, given), card
    except ValueError as error:
        raise WireError(f"the inference server's memory does not fit: {error}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
