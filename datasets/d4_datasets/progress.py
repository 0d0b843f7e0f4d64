"""How far an ingest is. Who works on a recording notes now and then which share of its pictures is done, in a
small file beside them; who waits for all adds up, so that one large recording shows progress, too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_FILE = ".progress-"
NOTE_EVERY_S = 1.0
_SAY_EVERY_S = 5.0


def note(folder: Path, what: str, share: float) -> None:
    """Note that of the recording made in `folder` this share (0 to 1) is done by `what`; the shares of
    all add up.
    """
    (folder / f"{_FILE}{what}").write_text(f"{share:.4f}")


def noted(folder: Path) -> float:
    """The share that was noted in a folder, 0 if none was."""
    total = 0.0
    for path in folder.glob(f"{_FILE}*"):
        try:
            total += float(path.read_text())
        except (OSError, ValueError):  # it is being written, or gone
            continue
    return min(total, 1.0)


class Shown:
    """Progress in bytes of recordings, and time left, on stderr: a bar on a terminal, else a line every few
    seconds.

    Args: sizes: bytes of every recording, by the folder in which it is made.
    """

    def __init__(self, sizes: Mapping[Path, int]) -> None:
        self._left, self._total = dict(sizes), max(1, sum(sizes.values()))
        self._frames, self._finished = 0, 0
        self._began = time.monotonic()
        self._over = threading.Event()
        self._bar: Progress | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("reading", total=self._total)
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def finish(self, folder: Path, frames: int) -> None:
        """One recording is done; all together have given so many frames."""
        self._finished += self._left.pop(folder, 0)
        self._frames = frames

    def done(self) -> float:
        """Bytes of recordings, those counted in part that are worked on."""
        parts = list(self._left.items())
        return self._finished + sum(size * noted(folder) for folder, size in parts)

    def _watch(self) -> None:
        while not self._over.wait(NOTE_EVERY_S if self._bar is not None else _SAY_EVERY_S):
            done = self.done()
            if self._bar is not None:
                told = f"{self._frames} frames" if self._frames else "reading"
                self._bar.update(self._bar.task_ids[0], completed=done, description=told)
            elif 0 < done < self._total:
                left = (time.monotonic() - self._began) * (self._total - done) / done
                line = f"{100 * done / self._total:.0f}%, {self._frames} frames, {left:.0f} s left"
                print(line, file=sys.stderr, flush=True)
