"""Processes of a pool that end with the process that began it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection


def follow_parent() -> None:
    """End this process as soon as its parent is gone, however that died: its pool would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a process of a pool

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
