"""MineRL v1.0 behind the wire, in an interpreter of its own: `python minerl_worker.py FD wire.py OPTIONS`.

MineRL wants an old gym, so this file needs nothing of d4: Python 3.8, NumPy, MineRL. It is run as a file, by
whatever interpreter `--python` names. Options: {"env": name of a registered environment}.

`python minerl_worker.py --spaces` writes what the package says about spaces and actions as JSON, and
`--wire` the text that it would send for actions that it reads from standard input; neither needs the game.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

# The folder of this file holds modules of d4, which MineRL's must not be mistaken for.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in map(os.path.abspath, sys.path) if path != _HERE]

import numpy as np  # noqa: E402

ENV = "MineRLHumanSurvival-v0"  # what a person sees and may do; it does not end, the dead begin again
KEYS = (
    "attack", "use", "forward", "back", "left", "right", "jump", "sneak", "sprint", "drop", "swapHands",
    "pickItem", "inventory", "ESC", *(f"hotbar.{slot}" for slot in range(1, 10)),
)  # fmt: skip
# where the environment has the counters that recordings call minecraft.<family>:minecraft.<name>
FAMILIES = ("mine_block", "craft_item", "use_item")
POV = (360, 640, 3)  # height, width, colours
_DISPLAY_S = 20.0
_LEFT_BEHIND = ("saves", "logs", "crash-reports", "screenshots", "run")  # by games in the folder of the game


def to_env(action: Any) -> dict[str, Any]:
    """Float64 [25] as the environment's dictionary: a number a key, `camera` float32 [2], pitch and yaw."""
    out: dict[str, Any] = {key: int(action[column] > 0.5) for column, key in enumerate(KEYS)}
    out["camera"] = np.asarray(action[len(KEYS) :], np.float32)
    return out


def counters(seen: dict[str, Any]) -> dict[str, int] | None:
    """The counters of an observation that are not 0, by the names of recordings; None if it has none."""
    found: dict[str, int] = {}
    for family in FAMILIES:
        for name, count in seen.get(family, {}).items():
            if count > 0:
                found[f"minecraft.{family}:minecraft.{name}"] = int(count)
    for name, count in seen.get("full_stats", {}).items():
        if name.startswith("interact_with_") and count > 0:
            found[f"minecraft.custom:minecraft.{name}"] = int(count)
    return found if any(family in seen for family in FAMILIES) else None


def say(seen: dict[str, Any], over: bool, monitors: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """An observation as the JSON and the data of a message; the picture shows the pointer already."""
    pov = np.ascontiguousarray(seen["pov"], np.uint8)
    items = None
    if "inventory" in seen:
        held = seen["inventory"].items()
        items = {name: int(count) for name, count in held if count > 0 and name != "air"}
    place = seen.get("location_stats", {})
    more = {name: float(place[name]) for name in ("yaw", "pitch", "xpos", "ypos", "zpos") if name in place}
    said = {
        "shape": list(pov.shape), "items": items, "stats": counters(seen),
        "gui": bool(monitors.get("isGuiOpen")), "pointer": None, "slot": None, "over": bool(over),
        "late_ms": 0.0, "more": more,
    }  # fmt: skip
    return said, pov.tobytes()


def require_person(env: Any, name: str) -> None:
    """Check that an environment is played and seen as by a person: all keys, and the whole picture.

    Raises:
        SystemExit: it is not; the message says what is different.
    """
    keys, shape = set(env.action_space.spaces), tuple(env.observation_space.spaces["pov"].shape)
    odd = sorted(keys ^ {*KEYS, "camera"})
    if odd:
        raise SystemExit(
            f"{name} is not played with the 23 keys and the camera: it lacks, or has beside them, "
            f"{', '.join(odd)}; leave out --env"
        )
    if shape != POV:
        raise SystemExit(f"{name} shows pictures of {shape}, not of {POV}; leave out --env")


def hello(env: Any) -> dict[str, Any]:
    """What an environment tells and how long it lasts, for the first message."""
    seen = env.observation_space.spaces
    tells = [name for name in (*FAMILIES, "inventory") if name in seen]
    if "full_stats" in seen:
        tells.append("custom")  # as recordings call them
    spec = getattr(env, "spec", None)
    most = getattr(spec, "max_episode_steps", None)
    try:
        version = f"MineRL {importlib.metadata.version('minerl')}"
    except importlib.metadata.PackageNotFoundError:
        version = ""
    most = None if most is None else int(most)
    return {"realtime": False, "version": version, "tells": tells, "most_ticks": most}


def own_folder() -> str:
    """Have MineRL run its game in a folder of ours, and log beside it; returns that folder.

    In its package all games would write their worlds into one folder, without locks and under names that can
    be the same, and nobody would delete them. Ours is a temporary one, which the keeper removes.

    Raises:
        SystemExit: the game was not built.
    """
    from minerl.env.malmo import InstanceManager

    theirs = os.path.abspath(InstanceManager.MINECRAFT_DIR)
    if not os.path.isdir(theirs):
        raise SystemExit(f"MineRL was installed without its game, which is not in {theirs}")
    above = tempfile.mkdtemp(prefix="minerl-")  # MineRL means to delete the folder above the game's
    ours = os.path.join(above, "game")
    os.mkdir(ours)
    for name in set(os.listdir(theirs)) - set(_LEFT_BEHIND):
        source, here = os.path.join(theirs, name), os.path.join(ours, name)
        if os.path.isdir(source):
            os.symlink(source, here)
        else:
            shutil.copy2(source, here)  # options, which the game writes again
    InstanceManager.MINECRAFT_DIR = ours
    if "PYTHONPATH" in os.environ:  # or what MineRL starts would look for it elsewhere
        paths = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths)
    os.chdir(above)  # where MineRL logs
    return ours


class Player:
    """One MineRL environment."""

    def __init__(self, name: str) -> None:
        import gym
        import minerl  # noqa: F401 - registers its environments

        self._folder = ""  # of the game, once it is needed
        try:
            self.env = gym.make(name)
        except Exception as error:
            raise SystemExit(f"MineRL makes no environment {name}: {error}".splitlines()[0]) from None
        require_person(self.env, name)
        self._display: subprocess.Popen | None = None
        if not os.environ.get("DISPLAY"):
            self._start_display()

    def _start_display(self) -> None:
        """A display of our own: the game draws into a window, which needs one."""
        if shutil.which("Xvfb") is None:
            raise SystemExit("there is no display for Minecraft: set DISPLAY, or apt-get install xvfb")
        mine, its = os.pipe()
        self._display = subprocess.Popen(
            ["Xvfb", "-displayfd", str(its), "-screen", "0", "1024x768x24", "-nolisten", "tcp"],
            pass_fds=(its,),
        )
        os.close(its)
        number, deadline = b"", time.monotonic() + _DISPLAY_S
        while select.select([mine], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(mine, 16)
            number += part
            if not part or number.endswith(b"\n"):
                break
        if not number.endswith(b"\n"):
            raise SystemExit("Xvfb does not start: see the log beside the results")
        os.environ["DISPLAY"] = ":" + number.decode().strip()

    def reset(self, seed: int) -> tuple[dict[str, Any], bytes]:
        """An episode in the world of this seed."""
        self._folder = self._folder or own_folder()
        old = self._worlds()
        # Forgotten by every reset, so it has to be said each time. Seeding the spaces, too, takes seconds.
        self.env.unwrapped.seed(seed, seed_spaces=False)
        seen = self.env.reset()
        self._forget(old)
        return say(seen, False, {})

    def _worlds(self) -> set[str]:
        return set(glob.glob(os.path.join(self._folder, "saves", "*")))

    def _forget(self, old: set[str]) -> None:
        """Delete the worlds of earlier episodes, and free what was logged: every counter at every tick. Files
        that are open keep their length, and no blocks.
        """
        if self._worlds() - old:
            for world in old:
                shutil.rmtree(world, ignore_errors=True)
        for folder in (os.path.dirname(self._folder), self._folder):
            for path in glob.glob(os.path.join(folder, "logs", "*.log")):
                os.truncate(path, 0)

    def step(self, action: Any) -> tuple[dict[str, Any], bytes]:
        """The next tick; MineRL says in `info` that it lost the game and made its observation up."""
        seen, _, over, info = self.env.step(to_env(action))
        if "error" in info:
            raise RuntimeError(f"MineRL lost the game: {info['error']}")
        return say(seen, over, info)

    def close(self) -> None:
        """End the game."""
        self.env.close()
        if self._display is not None:
            self._display.kill()


def serve(line: Any, wire: Any, player: Player) -> None:
    """Answer until the benchmark closes or is gone."""
    send(line, wire.HELLO, hello(player.env))
    while True:
        try:
            kind, said, data = line.receive()
        except _CUT as error:
            raise Gone from error
        if kind == wire.RESET:
            send(line, wire.VIEW, *player.reset(int(said["seed"])))
        elif kind == wire.STEP:
            send(line, wire.VIEW, *player.step(np.frombuffer(data, "<f8")))
        else:
            return


_CUT = (EOFError, BrokenPipeError, ConnectionResetError)  # MineRL raises the same of its game


class Gone(Exception):
    """The benchmark, whom nothing can be told any more."""


def send(line: Any, *message: Any) -> None:
    """Answer, however long nobody listens: games do not end because the benchmark waits. Raises Gone."""
    try:
        line.send(*message, limit_s=None)
    except _CUT as error:
        raise Gone from error


def spaces() -> dict[str, Any]:
    """What the package says, as JSON: kind, limits and type of every part of the spaces."""
    import gym
    import minerl  # noqa: F401

    env = gym.make(ENV)
    actions: dict[str, Any] = {}
    for key, space in env.action_space.spaces.items():
        if hasattr(space, "n"):
            actions[key] = {"n": int(space.n)}
        else:
            limits = float(space.low.min()), float(space.high.max())
            actions[key] = {"shape": list(space.shape), "limits": limits, "dtype": str(space.dtype)}
    seen = env.observation_space.spaces
    known = {name: sorted(seen[name].spaces) for name in (*FAMILIES, "inventory", "full_stats")}
    return {"actions": actions, "pov": list(seen["pov"].shape), "known": known}


def wire_texts(rows: list[list[float]]) -> list[dict[str, Any]]:
    """For each row [25]: whether the dictionary is contained in the space, and the text for the game."""
    import gym
    import minerl  # noqa: F401

    env = gym.make(ENV)
    inner, out = env.unwrapped, []
    for row in rows:
        action = to_env(np.array(row))
        text = inner._process_action(inner.task.agent_names[0], action)
        out.append({"contained": bool(env.action_space.contains(action)), "text": text})
    return out


def main() -> None:
    """Serve, or answer a question about the package."""
    if sys.argv[1] == "--spaces":
        print(json.dumps(spaces()))
        return
    if sys.argv[1] == "--wire":
        print(json.dumps(wire_texts(json.load(sys.stdin))))
        return
    spec = importlib.util.spec_from_file_location("d4_wire", sys.argv[2])
    assert spec is not None
    assert spec.loader is not None
    wire = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wire)
    line = wire.Wire(socket.socket(fileno=int(sys.argv[1])))
    player: Player | None = None
    try:
        player = Player(json.loads(sys.argv[3]).get("env") or ENV)
        serve(line, wire, player)
    except Gone:
        pass
    except (ImportError, SystemExit) as error:
        text = (
            str(error)
            if isinstance(error, SystemExit)
            else f"{sys.executable} cannot import MineRL ({error})"
        )
        _tell(line, wire, text, True)
    except Exception as error:
        traceback.print_exc()
        lines = [text for text in str(error).splitlines() if text.strip()]  # MineRL says it last
        _tell(line, wire, f"{type(error).__name__}: {lines[-1].strip() if lines else ''}", False)
    finally:
        try:
            if player is not None:  # after all was told: a game that hangs may hang here, too
                player.close()
        finally:
            sys.stderr.flush()
            os._exit(0)  # the keeper ends what MineRL started


def _tell(line: Any, wire: Any, text: str, user: bool) -> None:
    with contextlib.suppress(OSError):
        line.send(wire.FAILED, {"sentence": text, "user": user})


if __name__ == "__main__":
    main()
