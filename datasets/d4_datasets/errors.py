"""How every command of this project fails: one sentence on stderr and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

LONGEST = 1500
"""Characters of a sentence: names that a damaged file brings have no end of their own."""


class UserError(Exception):
    """Something the user can put right. The message is one sentence: what is wrong, where, what to do."""


def sentence(error: BaseException) -> str | None:
    """The one-sentence form of `error`, or None if it is a bug that deserves its traceback."""
    text = _said(error)
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 503]}...{text[-500:]}"  # what to do stands at the end


def _said(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if type(error).__module__ == "pyarrow.lib":  # by name: what runs on the robot must not import pyarrow
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"a Parquet file of the dataset is damaged ({first}): restore it or ingest again"
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename is not None else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"disk full{where}: free some space and run the same command again"
        if error.errno == errno.EFBIG:
            return f"a file would become too large{where}: raise the limit (ulimit -f) and run it again"
        if error.errno == errno.EIO:
            return f"the disk fails{where}: {os.strerror(error.errno)}"
        if error.filename is not None:
            return f"cannot use {error.filename}: {os.strerror(error.errno)}"
    return None


def run_cli(fn: Callable[[], Any]) -> None:
    """Run `fn`, the body of a command, and turn its failure into an exit code.

    A `UserError`, a full disk or an unusable path prints `error: <sentence>` to stderr and exits 2; Ctrl-C
    exits 130; a closed output pipe exits 141, as a program killed by SIGPIPE would. An int returned by `fn`
    is the exit code. Anything else is a bug and keeps its traceback.
    """
    try:
        code = fn()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain; give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        text = sentence(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    if isinstance(code, int) and code != 0:
        raise SystemExit(code)
