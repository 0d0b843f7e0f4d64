"""The game itself: where it is installed, how it is set up, started, and why it ended."""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from d4_datasets.errors import UserError
from d4_datasets.minecraft import DEGREES_PER_COUNT, RATE_HZ
from d4_sim import children
from d4_sim.minecraft.game import VIEW

PROGRAMS = ("minetest", "luanti")
GAME = "minetest"
PLAYER = "agent"  # "singleplayer" is refused
MOD = Path(__file__).with_name("mod")
ROOM = "d4_room"
FOV = 70.0  # degrees from top to bottom, as in recordings
# Degrees that a pixel turns by are the setting times this, which is 1 at 72 degrees.
SENSITIVITY = DEGREES_PER_COUNT / (math.tan(math.radians(FOV / 2)) * 1.3763819)
_INSTALL = "apt-get install --no-install-recommends minetest xvfb"
_ASK_S = 30.0
_WILD_SEED = 7  # a world with woods and little water in its middle


def find_program() -> str:
    """The game's program. Raises UserError if it is not installed."""
    for name in PROGRAMS:
        found = shutil.which(name) or shutil.which(name, path="/usr/games:/usr/local/games")
        if found:
            return found
    raise UserError(f"Luanti is not installed: {_INSTALL}")


def version(program: str) -> str:
    """What a program says of itself, such as `Minetest 5.6.1 (Linux)`; empty if it says nothing."""
    try:
        return next(iter(_said(program, "--version").stdout.splitlines()), "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def require_game(program: str) -> None:
    """Check that the program brings Minetest Game, which newer ones do not.

    Raises:
        UserError: it does not.
    """
    try:
        said = _said(program, "--gameid", "list")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{program} does not start ({error}): {_INSTALL}") from None
    if GAME not in (said.stdout + said.stderr).split():
        raise UserError(
            f"{program} has no game {GAME!r}: install the package minetest-game, or minetest-data"
        )


def _said(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *words], capture_output=True, encoding="utf-8", errors="replace", timeout=_ASK_S,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How the game is drawn.

    Attributes:
        fps: pictures a second, at most; more are newer when they are taken, and cost more.
        view_range: nodes that can be seen.
    """

    fps: int = 30
    view_range: int = 40


def settings(look: Look, wild: bool) -> str:
    """The game's settings file: what a recording of contractors looks like, and nothing that listens."""
    height, width = VIEW
    values = {
        "screen_w": width, "screen_h": height, "fullscreen": "false", "autosave_screensize": "false",
        "video_driver": "opengl", "vsync": "false", "fps_max": look.fps, "fps_max_unfocused": look.fps,
        "pause_on_lost_focus": "false", "viewing_range": look.view_range, "fov": FOV,
        "enable_shaders": "false", "enable_clouds": "false", "enable_minimap": "false",
        "hud_scaling": 0.7, "gui_scaling": 1.0, "font_size": 12, "language": "en",
        "enable_sound": "false", "enable_joysticks": "false", "mouse_sensitivity": f"{SENSITIVITY:.6f}",
        "invert_mouse": "false", "keymap_forward": "KEY_KEY_W", "keymap_backward": "KEY_KEY_S",
        "keymap_left": "KEY_KEY_A", "keymap_right": "KEY_KEY_D", "keymap_jump": "KEY_SPACE",
        "keymap_sneak": "KEY_LSHIFT", "keymap_aux1": "KEY_LCONTROL", "keymap_inventory": "KEY_KEY_E",
        "keymap_drop": "KEY_KEY_Q",
        "bind_address": "127.0.0.1", "server_announce": "false", "max_users": 1, "enable_rollback": "false",
        "enable_remote_media_server": "false", "update_information_url": "",
        "enable_damage": "false", "creative_mode": "false", "give_initial_stuff": "false",
        "dedicated_server_step": 1 / RATE_HZ, "time_speed": 0, "world_start_time": 12000,
        "fixed_map_seed": _WILD_SEED, "mg_name": "v7" if wild else "flat",
        "mg_flags": "caves,nodungeons,light,decorations,biomes,ores" if wild
        else "nocaves,nodungeons,light,decorations,biomes,noores",
        "server_map_save_interval": 3600,
    }  # fmt: skip
    return "".join(f"{name} = {value}\n" for name, value in values.items())


_WORLD = f"""gameid = {GAME}
world_name = d4
backend = dummy
player_backend = dummy
auth_backend = sqlite3
mod_storage_backend = dummy
load_mod_{ROOM} = true
"""


class House:
    """The game with its world, in a folder.

    Args:
        folder: for everything that it writes; belongs to whoever made it.
        display: number of the X display to draw on.

    Raises:
        UserError: the game is not installed.
    """

    def __init__(self, folder: Path, display: int, look: Look, wild: bool) -> None:
        program = find_program()
        require_game(program)
        self.world = folder / "world"
        self._log = folder / "luanti.log"
        home = folder / "home"
        home.mkdir()
        shutil.copytree(MOD, self.world / "worldmods")
        (self.world / "world.mt").write_text(_WORLD)
        (folder / "minetest.conf").write_text(settings(look, wild))
        self._process: subprocess.Popen | None = children.start(
            [program, "--go", "--config", str(folder / "minetest.conf"), "--world", str(self.world),
             "--gameid", GAME, "--name", PLAYER, "--port", str(free_port()), "--color", "never"],
            _surroundings(home, display), self._log,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether the game runs."""
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """How the game ended and what it complained of."""
        code = None if self._process is None else self._process.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        return f"({how}; {self.complaint() or 'it says nothing'})"

    def complaint(self) -> str:
        """The last error that the game reported, empty if it did not."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        found = [line for line in lines if "ERROR" in line or "Error" in line or "terminate" in line]
        return re.sub(r"^.*?ERROR\[\w+\]: *", "", found[-1]).strip()[:300] if found else ""

    def log(self) -> str:
        """What the game printed last."""
        try:
            return self._log.read_text(errors="replace")[-4000:]
        except OSError:
            return ""

    def close(self) -> None:
        """End the game; twice is no mistake."""
        children.end(self._process)


def free_port() -> int:
    """A UDP port that nobody uses at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _surroundings(home: Path, display: int) -> dict[str, str]:
    """The game's environment variables: a home of its own, so that a player's own game is left alone."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return kept | {
        "DISPLAY": f":{display}", "HOME": str(home), "MINETEST_USER_PATH": str(home), "LANG": "C.UTF-8",
        "LIBGL_ALWAYS_SOFTWARE": "1", "MESA_SHADER_CACHE_DISABLE": "true",
    }  # fmt: skip
