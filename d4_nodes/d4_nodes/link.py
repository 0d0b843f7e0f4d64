"""The robot's side of the inference server: submit a request, collect the reply, watch the heartbeat.

No torch, no waiting: every call returns at once except the handshake, which is bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d4_datasets.contract import Contract
from d4_nodes import memory, wire
from d4_nodes.memory import CAMERA, VECTOR, Field, Memory
from d4_nodes.wire import Kind, Message, WireError

_PATIENCE_S = 10.0  # an answer that takes longer never comes


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


class Encoded(NamedTuple):
    """Latents that the server made of request `sequence`.

    latents: float32 (tokens, channels) in (-1, 1). span: ns that encoding took. failure: why there are none;
    then they are empty.
    """

    sequence: int
    latents: np.ndarray
    span: int
    failure: str = ""


class _Connection:
    """What links to a policy and to a tokenizer share: handshake, requests, replies, heartbeat."""

    def __init__(
        self,
        path: Path,
        contract: Contract,
        kind: str,
        fields_of: Callable[[dict[str, Any]], tuple[Field, ...]],
        timeout_s: float,
    ) -> None:
        self._sock = wire.connect(path, timeout_s)
        try:
            self._shared, self.card = _handshake(self._sock, contract, kind, fields_of)
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        self.cameras = self._shared.observation(CAMERA)
        self.vectors = self._shared.observation(VECTOR)
        self.is_busy = False
        self._sequence, self._asked_s = 0, 0.0

    def fileno(self) -> int:
        """Readable when a reply has come or the server has gone."""
        return self._sock.fileno()

    def _send(self) -> int:
        """Hand over the request that lies in shared memory; returns its number."""
        self._sequence += 1
        wire.send(self._sock, Message(Kind.STEP, self._sequence))
        self.is_busy, self._asked_s = True, time.monotonic()
        return self._sequence

    def _take(self) -> Message | None:
        """DONE or FAILED for the request at the server, None while there is neither."""
        try:
            message, descriptor = wire.receive(self._sock)
        except BlockingIOError:
            if self.is_busy and time.monotonic() - self._asked_s > _PATIENCE_S:  # alive, and yet it hangs
                raise WireError(f"the inference server has not answered for {_PATIENCE_S:g} s") from None
            return None
        if descriptor is not None:
            os.close(descriptor)
        if message.kind not in (Kind.DONE, Kind.FAILED) or message.sequence != self._sequence:
            raise WireError(f"the server sent {message.kind.name} {message.sequence}: {message.text}")
        self.is_busy = False
        return message

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


class Link(_Connection):
    """A connection to an inference server that holds a policy.

    Attributes:
        card: what the server said about itself: checkpoint, weights, pid, leads, origin.
        cameras, vectors: arrays in shared memory by name, to be filled before `submit`.
        is_busy: a request is at the server; its memory must not be touched.

    Raises:
        WireError: nobody listens, the server refuses (with its reason), or it speaks another protocol.
    """

    def __init__(self, path: Path, contract: Contract, timeout_s: float = 5.0) -> None:
        def fields_of(card: dict[str, Any]) -> tuple[Field, ...]:
            return memory.layout(contract, _bounded(card, "leads", 1024))

        super().__init__(path, contract, "policy", fields_of, timeout_s)
        self.leads = int(self.card["leads"])
        self._nothing = np.zeros((0, contract.action_dim), np.float32)

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
        return self._send()

    def poll(self) -> Reply | None:
        """The reply if it has come, else None.

        Raises:
            WireError: the server has gone or breaks the protocol.
        """
        message = self._take()
        if message is None:
            return None
        if message.kind is Kind.FAILED:
            return Reply(message.sequence, self._nothing, 0.0, (0, 0), message.text or "it gave no reason")
        first, second = self._shared["spans"].tolist()
        plan, reward = self._shared["plan"].copy(), float(self._shared["reward"])
        return Reply(message.sequence, plan, reward, (first, second))


class TokenizerLink(_Connection):
    """A connection to an inference server that holds a tokenizer; attributes and errors as of `Link`.

    Attributes:
        weights: hash of the tokenizer's weights.
    """

    def __init__(self, path: Path, contract: Contract, timeout_s: float = 5.0) -> None:
        def fields_of(card: dict[str, Any]) -> tuple[Field, ...]:
            sizes = _bounded(card, "tokens", 4096), _bounded(card, "channels", 4096)
            return memory.latents_layout(contract, *sizes)

        super().__init__(path, contract, "tokenizer", fields_of, timeout_s)
        weights = self.card.get("weights")
        if not isinstance(weights, str) or not 1 <= len(weights) <= 64:
            self.close()
            raise WireError(f"the inference server names its weights {str(weights)[:80]!r}")
        self.weights = weights
        self._nothing = np.zeros((0, 0), np.float32)

    def submit(self, reset: bool) -> int:
        """Hand over the observation that lies in shared memory; returns the request's number.

        Args:
            reset: forget the past first.

        Raises:
            WireError: the server has gone.
        """
        assert not self.is_busy
        self._shared["reset"][...] = reset
        return self._send()

    def poll(self) -> Encoded | None:
        """The reply if it has come, else None.

        Raises:
            WireError: the server has gone or breaks the protocol.
        """
        message = self._take()
        if message is None:
            return None
        if message.kind is Kind.FAILED:
            return Encoded(message.sequence, self._nothing, 0, message.text or "it gave no reason")
        return Encoded(message.sequence, self._shared["latents"].copy(), int(self._shared["spans"][0]))


def _bounded(card: dict[str, Any], what: str, most: int) -> int:
    """A size that the server claims, if it is one; raises WireError if not."""
    value = card.get(what)
    if type(value) is not int or not 1 <= value <= most:
        raise WireError(f"the inference server answers with {str(value)[:80]} {what}, not 1 to {most}")
    return value


def _handshake(
    sock: socket.socket,
    contract: Contract,
    kind: str,
    fields_of: Callable[[dict[str, Any]], tuple[Field, ...]],
) -> tuple[Memory, dict[str, Any]]:
    """Say which robot this is and what it wants; returns the server's memory and its card."""
    told = json.dumps({"contract": contract.hash, "wants": kind})
    wire.send(sock, Message(Kind.HELLO, payload=told.encode()))
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
        theirs, fields = card.pop("fields", None), fields_of(card)
        if theirs != [[f.name, f.offset, f.dtype, list(f.shape)] for f in fields]:
            raise WireError("the inference server lays out its memory differently: it is of another version")
        given, descriptor = descriptor, None  # Memory owns it from here on
        return Memory(fields, given), card
    except ValueError as error:
        raise WireError(f"the inference server's memory does not fit: {error}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
