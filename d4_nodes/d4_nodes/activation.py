"""Before the robot moves: warm the server up on real shapes, measure, and compare with the contract."""

from __future__ import annotations

import functools
import select
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.messages import look, resize
from d4_nodes.link import Link
from d4_nodes.report import Histogram
from d4_nodes.wire import WireError

_UNCOUNTED = 5  # first requests, which pay for what comes first
_PATIENCE_S = 10.0


class Measured(NamedTuple):
    """What a decision takes, from a received frame to an answer, and what is left for it; ms."""

    p50: float
    p99: float
    budget: float

    @property
    def fits(self) -> bool:
        """Whether the contract's latency can be kept."""
        return self.p99 <= self.budget


def sources(
    contract: Contract, messages: Mapping[str, Any], decode: Callable[[Any], np.ndarray]
) -> dict[str, Callable[[], np.ndarray]]:
    """For `measure`, how the loop makes pictures of messages: by camera, as far as there are any."""
    return {
        camera.name: functools.partial(look, messages[camera.name], camera.size, camera.depth_m, decode)
        for camera in contract.images
        if camera.name in messages and camera.size is not None
    }


def measure(
    link: Link,
    contract: Contract,
    pictures: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
    transport_ms: float = 0.0,
    count: int = 100,
) -> Measured:
    """Time `count` requests with real pictures, at full speed.

    Args: link: to the server; its session is left at the beginning of an episode. pictures: how a picture of
        a camera is made RGB uint8 (H, W, 3), which is timed, too; a camera without has noise of the
        contract's size. transport_ms: what a picture needs to arrive, which is not left for the decision.

    Raises:
        WireError: the server has gone, fails, or takes longer than 10 s.
    """
    rng = np.random.default_rng(0)
    times = Histogram()
    noise = {name: rng.integers(0, 256, target.shape, np.uint8) for name, target in link.cameras.items()}
    makes = {name: pictures.get(name, functools.partial(np.copy, noise[name])) for name in noise}
    previous = np.clip(np.zeros(contract.action_dim, np.float32), contract.action_low, contract.action_high)
    for number in range(count + _UNCOUNTED):
        began = time.monotonic_ns()
        for name, target in link.cameras.items():
            target[...] = resize(makes[name](), target.shape[:2])
        link.submit(0, number == 0, previous)
        wait(link)
        if number >= _UNCOUNTED:
            times.add(time.monotonic_ns() - began)
    return Measured(times.quantile_ms(0.5), times.quantile_ms(0.99), contract.latency_ms - transport_ms)


def wait(link: Link, timeout_s: float = _PATIENCE_S) -> None:
    """Wait for the answer to a request and drop it; raises WireError if it does not come or is a failure."""
    until = time.monotonic() + timeout_s
    while (reply := link.poll()) is None:
        left = until - time.monotonic()
        if left <= 0:
            raise WireError(f"the inference server has not answered for {timeout_s:g} s")
        select.select([link], [], [], left)
    if reply.failure:
        raise WireError(f"the inference server failed: {reply.failure}")


def require(measured: Measured, allow_slow: bool) -> str:
    """One line that says what was measured.

    Raises:
        UserError: the contract's latency cannot be kept, by how much, and `allow_slow` was not given.
    """
    text = (
        f"a decision takes {measured.p50:.1f} ms (median), {measured.p99:.1f} ms (p99); the contract leaves "
        f"{measured.budget:.1f} ms"
    )
    if measured.fits:
        return text
    if not allow_slow:
        raise UserError(
            f"{text}, {measured.p99 - measured.budget:.1f} ms too few: raise latency_ms and train again with "
            "it, use a faster machine or a smaller preset, or accept misses with allow_slow"
        )
    return f"{text}: too slow, going on because of allow_slow; commands that come too late are replaced"
