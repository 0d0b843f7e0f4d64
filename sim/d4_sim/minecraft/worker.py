"""The process that a game or a world of this installation runs in: `python -m d4_sim.minecraft.worker`.

Arguments: the file descriptor of its end of the wire, "game" or "world", "module:function" that opens it, and
the options for that as JSON. MineRL runs in an interpreter of its own instead (`minerl_worker`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from d4_datasets import minecraft
from d4_datasets.errors import UserError, sentence
from d4_sim.minecraft import wire
from d4_sim.minecraft.game import Game, GameTrouble, View, named
from d4_sim.minecraft.wire import Wire
from d4_sim.world import Observation, World

Said = tuple[dict[str, Any], bytes]


class _Host(Protocol):
    """What plays behind the wire."""

    realtime: bool
    version: str

    def reset(self, seed: int) -> Said: ...

    def step(self, action: np.ndarray) -> Said: ...

    def close(self) -> None: ...


class GameHost:
    """A `Game` behind the wire; actions arrive as float64 [25] of `d4_datasets.minecraft`."""

    def __init__(self, game: Game) -> None:
        self._game, self.realtime, self.version = game, game.realtime, game.version

    def reset(self, seed: int) -> Said:
        """The first view."""
        return say_view(self._game.reset(seed))

    def step(self, action: np.ndarray) -> Said:
        """The next view."""
        return say_view(self._game.step(minecraft.to_env(action)))

    def close(self) -> None:
        """End the game."""
        self._game.close()


class WorldHost:
    """A `World` behind the wire; actions arrive as its rows."""

    realtime = False

    def __init__(self, world: World) -> None:
        self._world, self.version = world, getattr(world, "version", "")

    def reset(self, seed: int) -> Said:
        """The first observation."""
        observation = self._world.reset(seed, 0)
        return self._say(observation, np.zeros(len(self._world.tasks)), False)

    def step(self, action: np.ndarray) -> Said:
        """The next observation."""
        observation, rewards, terminal, truncated = self._world.step(action.astype(np.float32))
        return self._say(observation, rewards, bool(terminal or truncated))

    def _say(self, observation: Observation, rewards: np.ndarray, over: bool) -> Said:
        vectors = {name: [float(v) for v in values] for name, values in observation.vectors.items()}
        done = {self._world.tasks[k]: float(rewards[k]) for k in np.flatnonzero(np.asarray(rewards) > 0)}
        image = np.ascontiguousarray(observation.image)
        said = {"shape": list(image.shape), "vectors": vectors, "done": done, "over": over}
        if (counts := getattr(self._world, "achievements", None)) is not None:
            said["achievements"] = counts
        return said, image.tobytes()

    def close(self) -> None:
        """Nothing to end."""


def say_view(view: View) -> Said:
    """A view as the JSON and the data of a message."""
    said = {
        "shape": list(view.pov.shape), "items": _present(view.items), "stats": _present(view.stats),
        "gui": bool(view.gui), "pointer": view.pointer, "slot": view.slot, "over": bool(view.over),
        "late_ms": float(view.late_ms), "more": dict(view.more),
    }  # fmt: skip
    return said, np.ascontiguousarray(view.pov).tobytes()


def _present(counts: Mapping[str, int] | None) -> dict[str, int] | None:
    return None if counts is None else {name: int(count) for name, count in counts.items() if count}


def serve(line: Wire, host: _Host) -> None:
    """Answer until the benchmark closes or is gone; a game does not end because the benchmark waits."""
    line.send(wire.HELLO, {"realtime": host.realtime, "version": host.version})
    while True:
        kind, said, data = line.receive()
        if kind == wire.RESET:
            line.send(wire.VIEW, *host.reset(int(said["seed"])), limit_s=None)
        elif kind == wire.STEP:
            line.send(wire.VIEW, *host.step(np.frombuffer(data, "<f8")), limit_s=None)
        else:
            return


def fail(line: Wire, error: BaseException) -> None:
    """Tell the benchmark why there will be no answer."""
    text, is_theirs = sentence(error), isinstance(error, UserError)
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, GameTrouble):
        last = " ".join(str(error).split())
    with contextlib.suppress(OSError):  # nobody may be there to be told
        line.send(wire.FAILED, {"sentence": text or last, "user": is_theirs})


def main() -> None:
    """Open what the arguments name and serve it."""
    fd, kind, opens, options = sys.argv[1:5]
    line = Wire(socket.socket(fileno=int(fd)))
    host: _Host | None = None
    try:
        opened = named(opens)(**json.loads(options))
        host = GameHost(opened) if kind == "game" else WorldHost(opened)
        serve(line, host)
    except (EOFError, BrokenPipeError, ConnectionError):
        pass  # the benchmark is gone
    except Exception as error:
        traceback.print_exc()
        fail(line, error)
    finally:
        if host is not None:
            host.close()
        sys.stderr.flush()
        os._exit(0)  # threads of a game do not keep the process; the keeper ends what it started


if __name__ == "__main__":
    main()
