"""`d4-minecraft check`: what an engine needs on this machine, what of it is missing, and how to get it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from d4_core.memory import available_bytes
from d4_datasets.errors import UserError

_ASK_S = 60.0
_GIB = 2**30
_MEMORY_GIB = 4  # that one Minecraft takes

# MineRL looks for the game it was built with in its package, and nowhere else
_ASK_MINERL = """
import glob, importlib.metadata as m, os, minerl
root = os.path.dirname(minerl.__file__)
try:
    version = m.version('minerl')
except m.PackageNotFoundError:
    version = 'version unknown'
built = bool(glob.glob(os.path.join(root, 'MCP-Reborn', 'build', 'libs', '*.jar')))
human = os.path.exists(os.path.join(root, 'herobraine', 'env_specs', 'human_survival_specs.py'))
print('D4', version, int(human), int(built))
"""


@dataclass(frozen=True)
class Found:
    """One line: what is needed, what is there, and, where it is missing, how to get it."""

    name: str
    value: str
    missing: str = ""


def ask(*command: str) -> str:
    """What a command prints, both streams; empty if it is not there, fails, or does not end."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return "" if done.returncode else done.stdout + done.stderr


def java(builds: bool = True) -> Found:
    """Minecraft 1.16.5 and the tools of MineRL want Java 8, no newer one: on PATH to run the game, and where
    it is yet to be built in JAVA_HOME, too, if that is set.
    """
    how = "apt-get install openjdk-8-jdk where there is one, or a JDK 8 of adoptium.net"
    how += ", first on PATH and in JAVA_HOME"
    home = os.environ.get("JAVA_HOME") if builds else None
    programs = {"on PATH": "java"} | ({"in JAVA_HOME": str(Path(home) / "bin" / "java")} if home else {})
    version = "-"
    for where, program in programs.items():
        match = re.search(r'version "([^"]+)"', ask(program, "-version"))
        version = match[1] if match else "-"
        if match is None:
            return Found("Java 8", version, f"there is no Java {where}: {how}")
        if not version.startswith("1.8."):
            why = f"this is Java {version} {where}, which the game does not run with"
            return Found("Java 8", version, f"{why}: {how}")
    return Found("Java 8", version)


def mine_rl(python: str) -> list[Found]:
    """MineRL v1.0 in its interpreter, and whether the game was built with it."""
    how = (
        "make a virtual environment of its own (docs/minecraft.md has the commands), and give its "
        "interpreter as --python"
    )
    if not python:
        return [Found("MineRL v1.0", "-", f"--python names no interpreter: {how}")]
    answer = re.search(r"D4 (.*) (\d) (\d)\s*$", ask(python, "-W", "ignore", "-c", _ASK_MINERL), re.MULTILINE)
    if answer is None:
        why = "cannot import minerl" if shutil.which(python) else "is no program"
        return [Found("MineRL v1.0", "-", f"{python} {why}: {how}")]
    version, human, built = answer.groups()
    if human == "0":
        return [Found("MineRL v1.0", version, f"this MineRL has no HumanSurvival, it is not v1.0: {how}")]
    game = Found("Minecraft 1.16.5", "built with MineRL")
    if built == "0":
        game = Found(
            "Minecraft 1.16.5", "-", "this MineRL was unpacked, not built: pip install its repository, with "
            "Java 8 and a connection to the internet, which fetches the game and builds it",
        )  # fmt: skip
    return [Found("MineRL v1.0", version), game]


def minecraft(python: str) -> list[Found]:
    """MineRL with its game, and the Java to run or to build it."""
    found = mine_rl(python)
    return [java(builds=any(each.missing for each in found)), *found]


def display() -> Found:
    """A window to draw into: a screen, or one without a monitor."""
    shown = os.environ.get("DISPLAY")
    if shown:
        return Found("display", shown)
    if shutil.which("Xvfb"):
        return Found("display", "none; Xvfb is started for each game")
    return Found("display", "-", "set DISPLAY, or apt-get install xvfb (draws on the CPU, slower than a GPU)")


def gpu() -> Found:
    """Not needed, but a policy of some size and the game both want one."""
    import torch

    names = ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").strip().splitlines()
    if not names:
        return Found(
            "GPU", "none: the game draws on the CPU, and policies of `base` and larger decide there far "
            "slower than 20 times a second; with an NVIDIA card, install its driver (Debian: apt-get install "
            "nvidia-driver) until nvidia-smi names it",
        )  # fmt: skip
    if not torch.cuda.is_available():
        return Found(
            "GPU", f"{', '.join(names)}, which this torch cannot use: {sys.executable} -m pip install "
            "--force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",
        )  # fmt: skip
    return Found("GPU", f"{', '.join(names)}; for the policy: under Xvfb the game draws on the CPU")


def memory() -> Found:
    """Memory for games."""
    import torch

    free = available_bytes(torch.device("cpu")) / _GIB
    room = int(free // _MEMORY_GIB)
    what = f"{free:.1f} GiB free, enough for {room} games at a time"
    return Found("memory", what, "" if room else f"a game takes {_MEMORY_GIB} GiB: close something")


def luanti() -> Found:
    """Debian's package of the game, with Minetest Game."""
    from d4_sim.luanti import house

    try:
        program = house.find_program()
        house.require_game(program)
    except UserError as error:
        return Found("Luanti", "-", str(error))
    return Found("Luanti", house.version(program) or program)


def xvfb() -> Found:
    """A display without a monitor, which Luanti always gets: keyboard and mouse are the game's own there."""
    program = shutil.which("Xvfb")
    if program is None:
        return Found("Xvfb", "-", "apt-get install --no-install-recommends xvfb")
    return Found("Xvfb", program)


def package(module: str, name: str) -> Found:
    """A package of this interpreter."""
    if find_spec(module) is None:
        return Found(name, "-", f"{sys.executable} -m pip install {name}")
    return Found(name, "yes")


def needs(python: str) -> dict[str, list[Callable[[], list[Found]]]]:
    """What each engine needs, by its name."""
    luantis = [lambda: [luanti()], lambda: [package("Xlib", "python-xlib")], lambda: [xvfb()]]
    crafters = [lambda: [package("crafter", "crafter")]]
    return {
        "minerl": [lambda: minecraft(python), lambda: [display()], lambda: [memory()], lambda: [gpu()]],
        "luanti": luantis, "luanti_wild": luantis, "crafter": crafters, "crafter_peaceful": crafters,
    }  # fmt: skip


def check(engine: str, python: str) -> list[Found]:
    """What an engine needs here."""
    return [found for each in needs(python)[engine] for found in each()]


def require_minerl(python: str) -> None:
    """Check what Minecraft does not start without, before an hour of waiting for it.

    Raises:
        UserError: the first thing that is missing, and how to get it.
    """
    own_java, *game = minecraft(python)
    for found in (*game, own_java, display()):
        if found.missing:
            raise UserError(f"{found.name}: {found.missing}")
