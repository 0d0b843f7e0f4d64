"""What the presets of d4-train take on this machine, as d4_core counts and measures it.

It is asked in a process of its own, which works while the audit reads: nothing here knows torch.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

_MODULE = "d4_core.estimate"
_MOST_S = 600.0


class Presets:
    """Asks as a context manager is entered; `answer` waits. Whatever happens no process is left."""

    def __init__(self, datasets: Sequence[str]) -> None:
        self._words = [sys.executable, "-m", _MODULE, *datasets]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if importlib.util.find_spec(_MODULE.partition(".")[0]) is not None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._words, stdout=pipe, stderr=pipe, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def answer(self) -> tuple[list[dict[str, Any]], str]:
        """(a preset each, see `d4_core.estimate.facts`; why there are none or not all, "" if there are)."""
        if self._process is None:
            return [], "d4_core is not installed"
        try:
            out, told = self._process.communicate(timeout=_MOST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, told = self._process.communicate()
            told = f"measuring took more than {_MOST_S / 60:g} min"
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line[-1] == "}"]
        reason = told.strip().splitlines()[-1] if told.strip() else "the process was killed"
        return found, reason.removeprefix("error: ") if self._process.returncode else ""
