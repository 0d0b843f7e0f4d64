"""What the loop asks of interpreter and system."""

from __future__ import annotations

import gc
import weakref

from d4_nodes.realtime import quiet_interpreter, sweep


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
