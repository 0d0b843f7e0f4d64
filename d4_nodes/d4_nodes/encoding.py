"""Pictures to latents, live: the newest picture to the tokenizer's server, its answer to whoever publishes.

One thread. The tokenizer reads a frame in the light of those before it, so this keeps the pictures of a
stream in order and tells the server when a new one begins: at an episode's start, after a gap that the
importer would split an episode at, after a reconnection. A picture that comes while the server is busy
replaces the one that waits.

Knows no ROS.
"""

from __future__ import annotations

import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.messages import decode, look
from d4_nodes.health import ERROR, OK, WARN, Finding
from d4_nodes.inbox import Sample, inbox_of
from d4_nodes.link import Encoded, TokenizerLink
from d4_nodes.report import Histogram
from d4_nodes.ticks import oldest
from d4_nodes.wire import WireError

_SOON = 0.75  # of a period: a picture that follows sooner is left out, training saw the contract's rate
_GRACE = 0.25  # of a period: so long a picture waits for vectors that were captured with it
_KNOCK_S, _LONGEST_WAIT_S = 0.2, 0.1
_SILENCE_S = 2.0  # a server that shows no life for so long is lost


def require_one_camera(contract: Contract) -> None:
    """Refuse a contract whose latents could not be published as those of one camera.

    Raises:
        UserError: it names several cameras, whose frames the tokenizer encodes together.
    """
    if len(contract.images) > 1:
        names = ", ".join(camera.name for camera in contract.images)
        raise UserError(
            f"contract {contract.name} names {len(contract.images)} cameras ({names}), and the tokenizer "
            "makes one set of latents of all of them: the tokenizer node serves robots with one camera"
        )


class Encoding:
    """Encodes the camera of a contract until `stop`; vectors of role input go with every picture.

    Args:
        contract: the robot, with one camera.
        publish: given the picture's message, latents float32 (tokens, channels), hash of the weights; called
            from the thread of `run`.
        connect: opens a link to the server; raises WireError.
        clock: dates the frames, ns.
        complain: told in one sentence what is wrong; may be called often.
        decode: message of a camera to RGB uint8 (H, W, 3).

    Attributes:
        counts: pictures that came, and what became of them.
        answer, age: durations from request to answer, and from capture to publication.
    """

    def __init__(
        self,
        contract: Contract,
        publish: Callable[[Any, np.ndarray, str], None],
        connect: Callable[[], TokenizerLink],
        clock: Callable[[], int],
        complain: Callable[[str], None],
        decode: Callable[[Any], np.ndarray] = decode,
    ) -> None:
        require_one_camera(contract)
        self.contract, self._camera = contract, contract.images[0]
        self.inbox, self.counts = inbox_of(contract), Counter[str]()
        self.answer, self.age = Histogram(), Histogram()
        self._publish, self._connect, self._clock = publish, connect, clock
        self._complain, self._decode = complain, decode
        self._oldest_ns = oldest(self._camera.align, contract.period_ns) or contract.period_ns
        self._link: TokenizerLink | None = None
        self._lost = "not connected yet"
        self._knocked = -1e9
        self._waits: Sample | None = None  # newest picture, to be handed over
        self._came = 0.0  # when it came (monotonic)
        self._asked: tuple[Sample, int] | None = None  # at the server, and since when (monotonic)
        self._last: Sample | None = None  # handed over last
        self._newest: Sample | None = None  # came last, whether it is used or not
        self._begin_ns: int | None = None  # an episode has begun there, which is news
        self._start_ns = -1  # when the episode at hand began; what was captured until then has no past
        self._tick_ns: int | None = None  # time of a tick, from which all others follow
        self._is_new = True  # the next picture begins a stream
        self._stop = threading.Event()

    # -- from other threads --

    def put(self, stream: str, stamp_ns: int, message: Any) -> None:
        """A message of a stream has come; of a vector, its numbers."""
        self.inbox.put(stream, Sample(stamp_ns, self._clock(), message))

    def begin(self, start_ns: int) -> None:
        """An episode begins: its first frame is the newest one captured until now, as for the importer."""
        self._begin_ns = start_ns
        self.inbox.wake()

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()
        self.inbox.wake()

    # -- the own thread --

    def run(self) -> None:
        """Go round until `stop`."""
        try:
            while not self._stop.is_set():
                try:
                    self._round()
                except WireError as error:
                    self._lose(str(error))
                except Exception as error:
                    self._lose(f"encoding failed: {error!r}")
        finally:
            self._lose("stopped", is_news=False)

    def _round(self) -> None:
        self._receive()
        if self._link is None and time.monotonic() - self._knocked > _KNOCK_S:
            self._knocked = time.monotonic()
            self._link, self._is_new = self._connect(), True
        link, patience = self._link, _LONGEST_WAIT_S
        if link is not None:
            if (reply := link.poll()) is not None:
                self._take(reply, link.weights)
            silence = min(link.heartbeat_age_s(), time.monotonic() - self._knocked)  # a first beat may be due
            if silence > _SILENCE_S:
                raise WireError(f"the inference server has shown no life for {silence:.1f} s")
            if self._waits is not None and not link.is_busy:
                patience = min(patience, self._patience_s(self._waits))
                if patience <= 0:
                    sample, self._waits, patience = self._waits, None, _LONGEST_WAIT_S
                    self._ask(link, sample)
        wake: list[Any] = [self.inbox] if link is None else [self.inbox, link]
        select.select(wake, [], [], patience)

    def _patience_s(self, sample: Sample) -> float:
        """Seconds that a picture waits for vectors that were captured with it."""
        vectors = self.contract.vectors("input")
        if not any(self.inbox.is_on_its_way(v.name, sample.stamp_ns) for v in vectors):
            return 0.0
        return self._came + _GRACE * self.contract.period_ns / 1e9 - time.monotonic()

    def _receive(self) -> None:
        for name, sample in self.inbox.drain():
            if name != self._camera.name:
                self.inbox.keep(name, sample)
                continue
            self.counts["pictures"] += 1
            self._newest = sample
            if self._follows(sample):
                self.counts["overtaken"] += self._waits is not None
                self._waits, self._came = sample, time.monotonic()
            else:
                self.counts["left out"] += 1
        start, self._begin_ns = self._begin_ns, None
        if start is None:
            return
        self._start_ns = self._tick_ns = start
        newest = self._newest
        if newest is not None and newest.stamp_ns >= start - self._oldest_ns:
            self._waits = (
                newest  # if it was encoded already, then in the light of the past; the later one counts
            )

    def _follows(self, sample: Sample) -> bool:
        """Whether a picture is the next of its stream or begins another; not if it is too soon or too old."""
        for before, least in ((self._last, _SOON * self.contract.period_ns), (self._waits, 1)):
            if before is not None and -self._long_ago_ns < sample.stamp_ns - before.stamp_ns < least:
                return False
        return True

    @property
    def _long_ago_ns(self) -> int:
        """A picture that was captured so long before the last one is of a clock that was set back."""
        return self._oldest_ns + self.contract.period_ns

    def _is_split(self, before_ns: int, stamp_ns: int) -> bool:
        """Whether between two pictures there is a tick for which the first is too old: the importer ends an
        episode there. Without start events its ticks follow from the first picture of the recording; that
        is taken to be captured at the moment in the camera's period at which ours was.
        """
        assert self._tick_ns is not None
        last_ns = stamp_ns - 1 - (stamp_ns - 1 - self._tick_ns) % self.contract.period_ns
        return stamp_ns < before_ns or last_ns - before_ns > self._oldest_ns

    def _ask(self, link: TokenizerLink, sample: Sample) -> None:
        """Hand a picture to the server, which is free."""
        began = time.monotonic_ns()
        try:
            picture = link.cameras[self._camera.name]
            picture[...] = look(sample.message, picture.shape[:2], self._camera.depth_m, self._decode)
            for name, target in link.vectors.items():
                target[...] = self._vector(name, sample.stamp_ns)
        except (UserError, ValueError, TypeError, AttributeError, cv2.error) as error:
            self.counts["dropped"] += 1
            self._complain(f"{self._camera.topic}: {error}: dropped")
            return
        if self._tick_ns is None:
            self._tick_ns = sample.stamp_ns + self.contract.period_ns // 2
        is_split = self._last is None or self._is_split(self._last.stamp_ns, sample.stamp_ns)
        is_new = self._is_new or sample.stamp_ns <= self._start_ns or is_split
        link.submit(is_new)
        self._is_new = False
        self.counts["streams"] += is_new
        self._asked, self._last = (sample, began), sample

    def _vector(self, name: str, stamp_ns: int) -> np.ndarray:
        stream = next(v for v in self.contract.vectors("input") if v.name == name)
        sample, tolerance = self.inbox.at(name, stamp_ns), stream.align.tolerance_ns
        if sample is None or (tolerance is not None and stamp_ns - sample.stamp_ns > tolerance):
            raise UserError(f"a picture has no sample of {stream.topic} that belongs to it")
        return sample.message

    def _take(self, reply: Encoded, weights: str) -> None:
        assert self._asked is not None
        (sample, began), self._asked = self._asked, None
        self.answer.add(time.monotonic_ns() - began)
        if reply.failure:
            self.counts["failed"] += 1
            self._is_new = True  # nobody knows what the server remembers
            self._complain(f"the inference server failed: {reply.failure}: a picture is dropped")
            return
        self._publish(sample.message, reply.latents, weights)
        self.counts["encoded"] += 1
        self.age.add(self._clock() - sample.stamp_ns)

    def _lose(self, reason: str, is_news: bool = True) -> None:
        if self._link is not None:
            self._link.close()
        self._link, self._asked, self._lost, self._is_new = None, None, reason, True
        if is_news:
            self._complain(reason)

    # -- what it says --

    @property
    def is_connected(self) -> bool:
        """Whether there is a link to a server."""
        return self._link is not None

    def server(self) -> Finding:
        """How the server is, for /diagnostics."""
        link, values = (
            self._link,
            {f"answer_p{q}_ms": f"{self.answer.quantile_ms(q / 100):.2f}" for q in (50, 99)},
        )
        if link is None:
            return Finding("inference server", ERROR, self._lost, values)
        values |= {str(k): str(v) for k, v in link.card.items() if isinstance(v, (str, int, float))}
        if self.answer.count and self.answer.quantile_ms(0.5) * 1e6 > self.contract.period_ns:
            return Finding("inference server", WARN, "slower than the contract's rate", values)
        return Finding("inference server", OK, "answers", values)

    def camera(self, seconds: float, before: Counter[str], rate_warn: float) -> Finding:
        """How the camera's stream was in the last seconds, since the counts `before`."""
        fresh = Counter(self.counts) - before
        rate = fresh["encoded"] / max(1e-9, seconds)
        values = {name: str(count) for name, count in sorted(self.counts.items())}
        values |= {"topic": self._camera.topic, "rate_hz": f"{rate:.2f}"}
        values |= {f"age_p{q}_ms": f"{self.age.quantile_ms(q / 100):.2f}" for q in (50, 99)}
        name, asked = self._camera.name, self.contract.rate_hz
        if not fresh["pictures"]:
            return Finding(name, ERROR, "nothing has come", values)
        if fresh["dropped"] or fresh["failed"]:
            count = fresh["dropped"] + fresh["failed"]
            return Finding(name, WARN, f"{count} of {fresh['pictures']} pictures dropped", values)
        if rate < rate_warn * asked:
            return Finding(name, WARN, f"{rate:.1f} Hz of latents, the contract has {asked:g} Hz", values)
        return Finding(name, OK, f"{rate:.1f} Hz of latents", values)
