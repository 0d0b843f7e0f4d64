"""A display of our own to play on: Xvfb, its pictures, its keyboard and its mouse.

Nothing listens on the network and nothing lies in /tmp: the server has an abstract socket only, and no lock.
Pictures are read from the server's mapped memory, while it is told to serve nobody else, so that none is half
of one and half of the next.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets.errors import UserError
from d4_sim import children
from d4_sim.minecraft.game import VIEW

_START_S = 30.0
_TRIES = 8
_NUMBERS = range(200, 10_000)  # of displays; a desktop's are small
_SOCKETS = Path("/tmp/.X11-unix")
_HEADER = struct.Struct(">25I")  # of an X window dump
_ARROW = 68  # in the X server's own font of cursors


def xlib() -> Any:
    """The package python-xlib. Raises UserError if it is not installed."""
    try:
        import Xlib.display
        import Xlib.ext.xtest
        import Xlib.XK
    except ImportError:
        raise UserError(
            "keyboard and mouse need python-xlib: pip install 'python-xlib>=0.33,<0.34'"
        ) from None
    return Xlib


def is_taken(number: int) -> bool:
    """Whether a display of this number leaves traces, wherever it runs.

    One whose socket is a file may belong to another machine's name space, such as a host's desktop: ours
    would start beside it, and clients would go to that one.
    """
    return (_SOCKETS / f"X{number}").exists() or Path(f"/tmp/.X{number}-lock").exists()


class Screen:
    """An X server without a monitor, and a player's hands and eyes on it.

    Args:
        folder: for the picture memory and the log; belongs to whoever made it.
        number: of the display; one that is free without it.

    Attributes:
        number: of the display.

    Raises:
        UserError: Xvfb or python-xlib is not installed, the display is taken, or the server does not start.
    """

    def __init__(self, folder: Path, number: int | None = None) -> None:
        self._lib = xlib()
        program = shutil.which("Xvfb")
        if program is None:
            raise UserError("Xvfb is not installed: apt-get install --no-install-recommends xvfb")
        self._folder, self._program = folder, program
        self._server: subprocess.Popen | None = None
        self._display: Any = None
        self._memory: mmap.mmap | None = None
        self._pixels: np.ndarray | None = None
        try:
            self.number = self._start(number)
            self._connect()
        except BaseException:
            self.close()
            raise

    # ---- the server ----

    def _start(self, number: int | None) -> int:
        if number is not None:
            if is_taken(number) or not self._serve(number):
                raise UserError(
                    f"display :{number} is taken: choose another number, or leave --set display=... out"
                )
            return number
        for _ in range(_TRIES):
            drawn = random.SystemRandom().choice(_NUMBERS)
            if not is_taken(drawn) and self._serve(drawn):
                return drawn
        raise UserError(f"Xvfb does not start: {self._reason()}")

    def _serve(self, number: int) -> bool:
        """Start the server; False if the number is taken.

        Raises:
            UserError: it does not start for another reason.
        """
        mine, its = os.pipe()
        height, width = VIEW
        try:
            self._server = children.start(
                [self._program, f":{number}", "-displayfd", str(its), "-screen", "0", f"{width}x{height}x24",
                 "-fbdir", str(self._folder), "-nolisten", "tcp", "-nolisten", "unix", "-nolock", "-noreset",
                 "-r", "+extension", "GLX"],
                {"PATH": os.environ.get("PATH", "")}, self._log, (its,),
            )  # fmt: skip
            os.close(its)
            its = -1
            return self._is_ready(mine)
        finally:
            os.close(mine)
            if its >= 0:
                os.close(its)

    def _is_ready(self, pipe: int) -> bool:
        assert self._server is not None
        said, deadline = b"", time.monotonic() + _START_S
        while not said.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise UserError(f"Xvfb does not start within {_START_S:g} s: {self._reason()}")
            part = os.read(pipe, 64)
            if not part:  # it has ended
                children.end(self._server)
                self._server = None
                reason = self._reason()
                if "already" in reason or "listening sockets" in reason or "in use" in reason:
                    return False
                raise UserError(f"Xvfb does not start: {reason}")
            said += part
        return True

    @property
    def _log(self) -> Path:
        return self._folder / "xvfb.log"

    def _reason(self) -> str:
        """What the server complained of last."""
        try:
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        except OSError:
            lines = []
        found = [line for line in lines if line and line not in ("(EE)", "Fatal server error:")]
        return " ".join(found[-3:]).replace("(EE)", "").strip() or "it says nothing"

    def _connect(self) -> None:
        self._display = self._lib.display.Display(f":{self.number}")
        for name in ("XTEST", "XFIXES"):
            if not self._display.has_extension(name):
                raise UserError(f"this Xvfb has no {name}: install the one of your distribution")
        self._display.xfixes_query_version()
        self._root = self._display.screen().root
        with (self._folder / "Xvfb_screen0").open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        header = _HEADER.unpack_from(self._memory)
        start, width, height, line, colours = header[0], header[4], header[5], header[12], header[19]
        if (height, width) != VIEW or header[11] != 32:
            raise UserError(
                f"Xvfb shows {width}x{height} at {header[11]} bits, not {VIEW[1]}x{VIEW[0]} at 32"
            )
        pixels = np.frombuffer(self._memory, np.uint8, height * line, start + 12 * colours)
        self._pixels = pixels.reshape(height, line // 4, 4)[:, :width]
        font = self._display.open_font("cursor")
        black, white = (0, 0, 0), (65535, 65535, 65535)
        self._root.change_attributes(cursor=font.create_glyph_cursor(font, _ARROW, _ARROW + 1, white, black))

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._server is not None and self._server.poll() is None

    def close(self) -> None:
        """End the server; twice is no mistake."""
        display, self._display, self._pixels = self._display, None, None
        if display is not None:
            with contextlib.suppress(Exception):  # it may be gone
                display.close()
        children.end(self._server)
        self._server = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    # ---- eyes ----

    def look(self) -> tuple[np.ndarray, bool]:
        """The picture, uint8 [360, 640, 3] RGB, and whether it shows the pointer: then a window is open."""
        assert self._pixels is not None
        self._display.grab_server()
        try:
            cursor = self._display.xfixes_get_cursor_image(self._root)  # its answer says that the grab holds
            picture = np.ascontiguousarray(self._pixels[..., 2::-1])
        finally:
            self._display.ungrab_server()
            self._display.flush()
        return picture, any(pixel >> 24 for pixel in cursor.cursor_image)

    # ---- hands ----

    def focus(self) -> bool:
        """Give the keyboard to the window that fills the screen; False if there is none yet."""
        x = self._lib.X
        for window in self._root.query_tree().children:
            geometry, attributes = window.get_geometry(), window.get_attributes()
            if (geometry.height, geometry.width) == VIEW and attributes.map_state == x.IsViewable:
                window.set_input_focus(x.RevertToParent, x.CurrentTime)
                self._display.sync()
                return True
        return False

    def key(self, symbol: str, down: bool) -> None:
        """Press or lift a key by X11's name for it."""
        code = self._display.keysym_to_keycode(self._lib.XK.string_to_keysym(symbol))
        self._fake(self._lib.X.KeyPress if down else self._lib.X.KeyRelease, code)

    def button(self, number: int, down: bool) -> None:
        """Press or lift a button of the mouse; 1 is the left one."""
        self._fake(self._lib.X.ButtonPress if down else self._lib.X.ButtonRelease, number)

    def move(self, right: int, down: int) -> None:
        """Move the mouse, in pixels."""
        self._lib.ext.xtest.fake_input(self._display, self._lib.X.MotionNotify, True, x=right, y=down)

    def is_centred(self) -> bool:
        """Whether the pointer is in the middle."""
        found = self._root.query_pointer()
        return (found.root_y, found.root_x) == (VIEW[0] // 2, VIEW[1] // 2)

    def _fake(self, kind: int, detail: int) -> None:
        self._lib.ext.xtest.fake_input(self._display, kind, detail)

    def sync(self) -> None:
        """Wait until the server has taken what was done."""
        self._display.sync()
