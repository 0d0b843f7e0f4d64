"""A game or a world in a process of its own: started, asked, watched, and ended with all that it started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets.errors import UserError
from d4_sim.minecraft import keeper, wire
from d4_sim.minecraft.game import Engine
from d4_sim.minecraft.keeper import BY_SIGNAL
from d4_sim.minecraft.wire import Wire, WireError

_GRACE_S = 3.0  # for an orderly end
_REST_S = 5.0  # for the rest of an answer that has begun
_KEEPER_S = 15.0  # for the keeper to kill what is left
_LARGEST_SIDE = 4096


class Lost(Exception):
    """An environment hangs or died. The message says how, without a dot."""


@dataclass(frozen=True)
class Seen:
    """What arrived at a tick.

    Attributes:
        image: uint8 [H, W, 3].
        said: everything else, JSON: of a game `items`, `stats`, `gui`, `pointer`, `slot`, `over`, `late_ms`,
            `more` as in `View`; of a world `vectors`, `done` (amounts by task), `over`, and `achievements`
            (counts since the episode began, of more than its tasks) where it has such.
    """

    image: np.ndarray
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether the episode ended by itself."""
        return bool(self.said.get("over"))


class Environment:
    """One process that plays one episode after the other.

    It starts at once, and nothing waits for that; every answer is waited for with `receive`, whose `deadline`
    says until when it is worth waiting. Nothing blocks beyond that.

    Args:
        engine: what to open.
        options: for its `opens`, or for the script: `python` is the interpreter.
        log: file that takes what the process prints.

    Attributes:
        realtime: whether the game goes on between two steps; known once it is ready, as what follows.
        version: what plays, with its version; empty if it does not say.
        tells: the families of counters that it has ("mine_block", ...), and "inventory"; None if it does not
            say, and then it has what its tasks need.
        most_ticks: after which it ends every episode, None if it does not.
    """

    def __init__(self, engine: Engine, options: Mapping[str, Any], log: Path) -> None:
        self.engine, self.log = engine, log
        self.realtime, self.version = False, ""
        self.tells: frozenset[str] | None = None
        self.most_ticks: int | None = None
        mine, its = socket.socketpair()
        self._life, life = os.pipe()[::-1]  # the keeper reads its end until this process is gone
        command = [sys.executable, keeper.__file__, str(its.fileno()), str(life)]
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("ab") as file:
                self._keeper = subprocess.Popen(
                    [*command, *_command(engine, options, its.fileno())],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=(its.fileno(), life),
                    start_new_session=True, env=_surroundings(),
                )  # fmt: skip
        finally:
            its.close()
            os.close(life)
        self._wire: Wire | None = Wire(mine)
        self._wait(engine.start_s)

    def _wait(self, patience_s: float) -> None:
        self._patience_s, self.deadline = patience_s, time.monotonic() + patience_s

    def fileno(self) -> int:
        """For select: readable when an answer, or the end, has come."""
        assert self._wire is not None
        return self._wire.fileno()

    def has_answered(self) -> bool:
        """Take what is there without waiting for more: whether `receive` returns or raises at once."""
        assert self._wire is not None
        return self._wire.has_arrived()

    def reset(self, seed: int) -> None:
        """Ask for an episode. Raises Lost."""
        self._send(wire.RESET, {"seed": seed}, b"", self.engine.start_s)

    def step(self, action: np.ndarray) -> None:
        """Ask for a tick with these numbers. Raises Lost."""
        self._send(wire.STEP, {}, np.asarray(action, "<f8").tobytes(), self.engine.step_s)

    def _send(self, kind: int, said: dict[str, Any], data: bytes, patience_s: float) -> None:
        assert self._wire is not None
        try:
            self._wire.send(kind, said, data, patience_s)
        except OSError:
            raise Lost(self._how_it_ended()) from None
        self._wait(patience_s)

    def receive(self) -> Seen | None:
        """The answer to what was asked, or None for the word that the process is ready for a first question.

        Raises:
            Lost: it hangs, died, or failed.
            UserError: it says that the user can put something right.
        """
        assert self._wire is not None
        left = self.deadline - time.monotonic()
        # of an answer that has begun: it may be the benchmark itself that was stopped meanwhile
        left = max(left, _REST_S if self._wire.has_begun else 0.001)
        try:
            kind, said, data = self._wire.receive(left)
        except TimeoutError:
            raise Lost(f"no answer within {self._patience_s:g} s") from None
        except (EOFError, OSError):
            raise Lost(self._how_it_ended()) from None
        except WireError as error:
            raise Lost(str(error)) from None
        if kind == wire.FAILED:
            text = str(said.get("sentence"))
            if said.get("user"):
                raise UserError(text)
            raise Lost(text.rstrip("."))
        if kind == wire.HELLO:
            self.realtime, self.version = bool(said.get("realtime")), str(said.get("version", ""))
            self.tells = frozenset(said["tells"]) if "tells" in said else None
            self.most_ticks = said.get("most_ticks")
            return None
        return Seen(_picture(said, data), said)

    def _how_it_ended(self) -> str:
        try:
            code = self._keeper.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return "it closed the connection"
        if code < 0 or code > BY_SIGNAL:
            number = -code if code < 0 else code - BY_SIGNAL
            return f"its process was killed by signal {number} (9 often means that memory ran out)"
        return f"its process ended with code {code}"

    def close(self, grace_s: float = _GRACE_S) -> None:
        """End the process, in order if it listens, and everything that it started; twice is no mistake."""
        if self._wire is None:
            return
        line, self._wire = self._wire, None
        try:
            if grace_s > 0 and self._keeper.poll() is None:
                line.send(wire.CLOSE, limit_s=grace_s)
                self._keeper.wait(grace_s)
        except (OSError, subprocess.TimeoutExpired):
            pass  # then the hard way
        finally:
            line.close()
            os.close(self._life)
            self._end_keeper()

    def _end_keeper(self) -> None:
        try:
            self._keeper.wait(_KEEPER_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


def _command(engine: Engine, options: Mapping[str, Any], fd: int) -> list[str]:
    if engine.script is not None:
        rest = {key: value for key, value in options.items() if key != "python"}
        python = str(options.get("python") or sys.executable)
        return [python, str(engine.script), str(fd), wire.__file__, json.dumps(rest)]
    arguments = [str(fd), engine.kind, engine.opens, json.dumps(dict(options))]
    return [sys.executable, "-m", "d4_sim.minecraft.worker", *arguments]


def _surroundings() -> dict[str, str]:
    """The environment variables of a game's process: its arrays are small, and it shares the machine."""
    return {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def _picture(said: Mapping[str, Any], data: bytes) -> np.ndarray:
    shape = said.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and shape[2] == 3
        and all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in shape)
        and shape[0] * shape[1] * 3 == len(data)
    ):
        raise Lost(f"it sent a picture of {len(data)} bytes that is not {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()  # what arrives cannot be written to
