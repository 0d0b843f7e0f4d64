"""What the loop asks of interpreter and system."""

from __future__ import annotations

import gc
import os
import weakref

from d4_nodes.realtime import prepare_thread, quiet_interpreter, sweep


class Knot:
    """Garbage that counting references does not free."""

    def __init__(self) -> None:
        self.itself = self


def test_a_quiet_interpreter_collects_only_when_it_is_told_to() -> None:
    with quiet_interpreter():
        assert not gc.isenabled()
        knots = [weakref.ref(Knot()) for _ in range(2000)]  # more than make a collection by itself
        assert all(knot() is not None for knot in knots)
        sweep()
        assert all(knot() is None for knot in knots)
    assert gc.isenabled()


def test_who_asks_for_a_core_that_there_is_not_is_told_which_there_are() -> None:
    [line] = prepare_thread(cores=(4001, 4000))
    there = ", ".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    assert line.startswith("cannot run on cores 4000, 4001 alone (Invalid argument): choose from ")
    assert f"choose from {there}, which this process may use of the machine's {os.cpu_count()};" in line
