"""The fixed-latency loop: frames in, guarded commands out, each at capture time plus `latency_ms`.

One thread. A frame that serves a tick is prepared and handed to the inference server at once; the command
goes out when its moment has come and not before. If the answer is not there by then, the plan of the last
good tick has a command for this very moment (lead n); it is sent, and the miss is counted. Too many misses in
a row, and every reason the guard may have, turn the command into the safety action; it takes a number of good
ticks in a row to come back. Deadlines are absolute; nothing is ever caught up: a command whose time is over
when the loop wakes up is not sent any more.

Knows no ROS: `send` is whatever moves the robot, `Clock` whatever dates its frames.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.messages import decode
from d4_nodes.driver import Driver
from d4_nodes.due import Due, Schedule
from d4_nodes.eyes import Eyes, NoSample
from d4_nodes.guard import Guard, Verdict
from d4_nodes.inbox import Inbox, Sample
from d4_nodes.link import Link, Reply
from d4_nodes.report import Report
from d4_nodes.ticks import Tick, Ticker
from d4_nodes.wire import WireError

_NEVER = -(10**9)  # a tick that is long ago
_SILENCE = 1.5  # periods without any command until the safety action is sent
_PROMISED = 2  # periods: the robot never waits longer
_NEAR_NS = 1_000_000_000  # an episode that starts so near to now was dated by the clock as it is now
_AT_ONCE = ("emergency_stop", "dead_man", "watchdog", "fault")  # act when they are noticed, not when due


class Clock(Protocol):
    """The clock that dates frames; ns."""

    def __call__(self) -> int:
        """Now."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How the loop behaves.

    Attributes: max_misses: so many misses in a row end in the safety action. recover_after: so many answers
        in a row must be in time before commands flow again. commands_per_tick: commands sent per tick,
        interpolated between this tick's and the next one's. forget_after: ticks without a request after which
        the server must forget the past: its frames no longer follow each other.
        early_ns: wakes so long before a deadline and spins, because the scheduler is not that precise; 0
        where the clock is another's, for which nothing must be held up. decision_ms: what a decision takes; a
        frame may come as late as leaves time for it. None: half the latency.
    """

    max_misses: int = 2
    recover_after: int = 5
    commands_per_tick: int = 1
    forget_after: int = 4
    longest_wait_s: float = 0.02
    early_ns: int = 300_000
    decision_ms: float | None = None


class Loop(Driver):
    """Runs ticks until `stop`.

    Args:
        contract: the robot.
        guard: asked about every command; shared with other threads under `lock`.
        inbox: where samples come in; streams by their names in the contract.
        send: moves the robot: (verdict, time of the loop's clock). Called under `lock`.
        connect: opens a link to the server; raises WireError.
        clock: dates the frames.
        report: collects measurements.
        log: told in one line what changed.
        decode: message of a camera to RGB uint8 (H, W, 3).
    """

    kind = "loop"

    def __init__(
        self,
        contract: Contract,
        guard: Guard,
        inbox: Inbox,
        send: Callable[[Verdict, int], None],
        connect: Callable[[], Link],
        clock: Clock,
        report: Report,
        config: LoopConfig = LoopConfig(),
        log: Callable[[str], None] = print,
        decode: Callable[[Any], np.ndarray] = decode,
    ) -> None:
        if contract.latency_ns >= contract.period_ns:
            raise UserError(
                f"latency_ms {contract.latency_ms:g} must be below the period, "
                f"{contract.period_ns / 1e6:g} ms: the next frame finds a frame's command in force"
            )
        super().__init__(contract, guard, inbox, send, clock, report)
        self.config = config
        self.task = 0
        self._connect, self._log = connect, log
        self.reward = 0.0
        self._eyes = Eyes(contract, inbox, self._see_again, decode)
        self._camera = contract.images[0].name
        self._others = tuple(name for name in self.inbox.names if name != self._camera)
        self._held = tuple(s.name for s in contract.observations if s.holds_for_ever)
        left = contract.latency_ns // 2
        if config.decision_ms is not None:
            # where decisions take too long (`allow_slow`), frames must still be given time to arrive
            left = max(left // 2, contract.latency_ns - round(1e6 * config.decision_ms))
        self._ticker = Ticker(contract.period_ns, left)
        self._grace_ns = min(left, contract.period_ns // 4)  # for what was captured with a picture
        self._patience_ns = 0  # ... until then
        self._link: Link | None = None
        self._knock: threading.Thread | None = None
        # a command counts until the next one's time; a simulator's clock may go in long steps
        count = config.commands_per_tick
        slot_ns = contract.period_ns // count if self.keeps_real_time else _PROMISED * contract.period_ns
        self._due = Schedule(contract, count, slot_ns)
        self._restart = self._jump = ""  # what other threads have seen
        self._sent_ns = clock()  # as `_spoke_ns`, by the loop's clock
        self._is_safe, self._recovered = False, 0
        self._forget_past()

    def _forget_past(self) -> None:
        """Back to the beginning of an episode; doubts stay."""
        self._due.clear()
        self._asked: tuple[Tick, int] | None = None  # at the server, and when it was handed over (monotonic)
        self._waits: Tick | None = None  # to be handed over once all that belongs to it is there, or ...
        self._good: tuple[Tick, np.ndarray] | None = None  # last answer: its tick and plan
        self._last_asked = _NEVER
        self._command: np.ndarray | None = None  # in force; None: unknown
        self._misses = 0

    # -- from other threads --

    def put(self, stream: str, stamp_ns: int, message: Any) -> None:
        """A message of a stream has come."""
        self.inbox.put(stream, Sample(stamp_ns, self._clock(), message))

    def begin(self, start_ns: int | None, task: int | None = None) -> None:
        """Begin an episode: the past is forgotten; tick 0 is at `start_ns`, or follows the next frame."""
        with self.lock:
            self.task = self.task if task is None else task
            self._start_ns, self._restart = start_ns, "a new episode begins"
        self.inbox.wake()

    def jumped(self, reason: str) -> None:
        """The clock has jumped: nothing of before can be compared with anything of now."""
        with self.lock:
            self._jump = reason
        self.inbox.wake()

    @property
    def is_connected(self) -> bool:
        """Whether there is a link to a server."""
        return self._link is not None

    @property
    def keeps_real_time(self) -> bool:
        """Whether its clock runs as fast as that of the robot."""
        return self.config.early_ns > 0

    def _rest_for(self, reason: str) -> None:
        self.guard.fault(reason)
        self._rest()

    # -- the loop's own thread --

    def run(self) -> None:
        """Go round until `stop`; then send the safety action, last of all."""
        self._start_ns = None
        self._jump_ns()
        with self.lock:
            self.guard.start(self._clock())
        try:
            while not self._stop.is_set():
                self._beat_ns = time.monotonic_ns()
                try:
                    self._round()
                except Exception as error:
                    self._log(f"the loop failed: {error!r}")
                    self._forget_past()
                    self._fail(f"the loop failed: {error!r}", "the loop failed")
                    self._rest_anyhow()
                    time.sleep(self.contract.period_ns / 4e9)  # an error that stays must not flood
        finally:
            self._rest_anyhow()
            self._is_over = self._stop.is_set()
            if self._link is not None:
                self._link.close()
                self._link = None

    def _round(self) -> None:
        self._look_at_clock()
        with self.lock:
            reason, self._stood_still = self._stood_still, ""
        if reason:
            self._due.clear()
            self._fail(reason, "the loop stood still")
        self._receive()
        self._tend_link()
        now = self._clock()
        self._leave_out(now)
        if self.state == "driving":
            with self.lock:
                if self.guard.forbids(now) in _AT_ONCE:
                    self._rest()
        due_ns = self._due.next_ns
        if due_ns is not None and now >= due_ns - self.config.early_ns:
            self._publish(self._due.pop())
            return
        tick = self._ticker.next(now)
        if tick is not None:
            self._begin_tick(tick)
            return
        self._hand_over()
        silent_until = self._silent_until()
        if silent_until is not None and not self._sent_ns <= now < silent_until:
            self._rest()  # no frames, no ticks: the robot still hears from us
        self._wait(now)

    def _leave_out(self, now: int) -> None:
        """Drop commands whose time is over, because we were held up: never catch up."""
        count, late_ns = self._due.leave_out(now)
        self.report.counts["commands left out"] += count
        if late_ns >= self._due.slot_ns:
            self._fail(f"a command was {late_ns / 1e6:.0f} ms late", "the loop was held up")

    def _silent_until(self) -> int | None:
        """When the robot must hear from us; None if a command is due before it has waited for two periods."""
        sent_ns = min(self._sent_ns, self._clock())  # it may be of a clock that was ahead
        due_ns = self._due.next_ns
        if due_ns is not None and due_ns <= sent_ns + _PROMISED * self.contract.period_ns:
            return None
        return sent_ns + round(_SILENCE * self.contract.period_ns)

    def _look_at_clock(self) -> None:
        if jump := self._jump_ns():
            self.jumped(f"the clock jumped by {jump / 1e9:.3f} s")
        with self.lock:
            jumped, reason = self._jump, self._jump or self._restart
            is_start, start_ns = bool(self._restart), self._start_ns
            self._jump = self._restart = ""
        if not reason:
            return
        self._log(reason)
        self.state = "waiting"
        self.report.reasons[reason.split(" by ")[0]] += 1
        if jumped:
            is_dated_now = start_ns is not None and abs(start_ns - self._clock()) < _NEAR_NS
            self._start_ns = start_ns if is_start and is_dated_now else None
            self._begin_clock(jumped)
        self._forget_keeping_request()
        self._ticker.begin(self._start_ns)
        if self._start_ns is not None:  # the frame of tick 0 mostly comes before the message that starts it
            for stamp_ns in self.inbox.since(
                self._camera, self._start_ns - (self._eyes.longest[self._camera] or 0)
            ):
                self._ticker.frame(stamp_ns)

    def _begin_clock(self, reason: str) -> None:
        """Nothing that was dated before the jump counts."""
        with self.lock:
            self.guard.begin(self._clock())
        self._is_safe, self._recovered = False, 0
        self._eyes.forget()
        self.inbox.clear(held=self._held)
        if self.keeps_real_time:  # in simulation that is how an episode begins
            self._fail(reason, "the clock was set")
        self._rest()

    def _forget_keeping_request(self) -> None:
        """Forget, but a request at the server is still there: its answer must be taken and ignored."""
        busy = self._link is not None and self._link.is_busy
        asked = self._asked
        self._forget_past()
        self._asked = asked if busy else None
        self._ignore = busy

    _ignore = False

    def _receive(self) -> None:
        for name, sample in self.inbox.drain():
            with self.lock:
                is_newest = self.guard.see(name, sample.stamp_ns, sample.arrival_ns)
            if not is_newest:  # nor is its stream any fresher for it, but its place may be before the newest
                is_overtaken = name != self._camera and self.inbox.is_overtaken(name, sample)
                self.report.counts["overtaken samples" if is_overtaken else "wrong stamps"] += 1
                if not is_overtaken:
                    continue
            self.inbox.keep(name, sample)
            if name == self._camera:
                self._ticker.frame(sample.stamp_ns)
                self.report.counts["frames"] += 1
                self.report.add("transport", sample.arrival_ns - sample.stamp_ns)

    # -- the server --

    def _tend_link(self) -> None:
        if self._link is None:
            if self._knock is None or not self._knock.is_alive():
                self._knock = threading.Thread(target=self._open, name="connect", daemon=True)
                self._knock.start()
            return
        try:
            if self._link.is_busy and (reply := self._link.poll()) is not None:
                self._answer(reply)
            with self.lock:
                age_ns = int(1e9 * self._link.heartbeat_age_s())
                self.guard.alive("inference server", self._clock() - age_ns)
        except WireError as error:
            self._lose(str(error))

    def _open(self) -> None:
        """Knock at the server's door, off the loop's thread."""
        try:
            link = self._connect()
        except WireError as error:
            with self.lock:
                self.guard.fault(str(error))
            time.sleep(0.2)
            return
        with self.lock:
            if self._stop.is_set():
                link.close()
                return
            self.guard.alive("inference server", self._clock())
            self._recovered = 0
            self._link = link
            self._last_asked = _NEVER
        self.inbox.wake()

    def _lose(self, reason: str) -> None:
        assert self._link is not None
        self._link.close()
        self._link, self._asked, self._waits, self._ignore = None, None, None, False
        self._fail(reason, "the server was lost")

    def _answer(self, reply: Reply) -> None:
        if self._ignore or self._asked is None:
            self._ignore, self._asked = False, None
            return
        (tick, began), self._asked = self._asked, None
        self.report.add("answer", time.monotonic_ns() - began)
        if not np.isfinite(reply.plan).all():
            self._last_asked = _NEVER  # its memory may hold it for as long as it looks back
        if reply.failure:
            self._fail(f"the inference server failed: {reply.failure}", "the server failed")
            return
        self.report.add("encode", reply.spans[0])
        self.report.add("plan", reply.spans[1])
        self.report.add("age", self._clock() - tick.stamp_ns)
        self._good, self.reward = (tick, reply.plan), reply.reward

    # -- a tick --

    def _begin_tick(self, tick: Tick) -> None:
        self.report.counts["ticks"] += 1
        if not tick.is_fresh:
            self.report.counts["ticks without a frame of their own"] += 1
        self._due.add(Due(tick.anchor_ns + self.contract.latency_ns, tick))
        if self._link is not None and (self._ignore or not self._link.is_busy):
            self._waits, self._patience_ns = tick, self._clock() + self._grace_ns
            self._hand_over()
        else:
            self.report.counts["ticks the server was not free for"] += self._link is not None

    def _hand_over(self) -> None:
        """Ask about the tick that waits, once the server is free and what was captured with it is there."""
        tick, link, now = self._waits, self._link, self._clock()
        if tick is None or link is None or link.is_busy:
            return
        is_awaited = any(self.inbox.is_on_its_way(name, tick.anchor_ns) for name in self._others)
        if is_awaited and now < self._patience_ns:
            return
        self._waits = None
        if now < tick.anchor_ns + self.contract.latency_ns:
            self._ask(tick)

    def _ask(self, tick: Tick) -> None:
        """Hand the observation of a tick to the server, which is free."""
        assert self._link is not None
        began = time.monotonic_ns()
        try:
            self._eyes.fill(self._link.cameras, self._link.vectors, tick)
        except NoSample:  # the guard says that it is stale; for the importer too an episode ends here
            self._last_asked = _NEVER
            return
        except UserError as error:
            self._fail(str(error), "an observation could not be used")
            return
        self.report.add("prepare", time.monotonic_ns() - began)
        forget = tick.number - self._last_asked > self.config.forget_after
        self.report.counts["times the past was forgotten"] += forget
        try:
            self._link.submit(self.task, forget, self._command)
        except WireError as error:
            self._lose(str(error))
            return
        self._asked, self._last_asked = (tick, began), tick.number

    def _fail(self, reason: str, kind: str) -> None:
        """Safety actions from now on, until enough answers in a row have come in time."""
        self.report.reasons[kind] += 1
        with self.lock:
            self.guard.fault(reason)
        self._is_safe, self._recovered = True, 0

    def _see_again(self, camera: str, is_same: bool) -> None:
        with self.lock:
            self.guard.look(camera, is_same)

    # -- a command --

    def _publish(self, due: Due) -> None:
        values = due.values if due.tick is None else self._decide(due)
        began = time.monotonic_ns()
        with self.lock:
            verdict = self.guard.check(values, max(due.time_ns, self._clock()))
            self.report.add("guard", time.monotonic_ns() - began)
            while (now := self._clock()) < due.time_ns:
                if self._restart or self._jump:
                    return
            if self._stood_still or now >= due.time_ns + self._due.slot_ns:  # held up since we looked
                self._due.add(due)  # to be left out, and said
                return
            began = time.monotonic_ns()
            self._hand_on(verdict, now)
            self.report.add("publish", time.monotonic_ns() - began)
        self._after(due, verdict, now)

    def _hand_on(self, verdict: Verdict, now: int) -> None:
        """Send; only what has been sent counts as sent."""
        self._send(verdict, now)
        self.guard.sent(now)
        self._sent_ns, self._spoke_ns = now, time.monotonic_ns()

    def _after(self, due: Due, verdict: Verdict, now: int) -> None:
        # what was not sent, or not sent whole, leaves open what the robot does
        self._command = verdict.values if verdict.send.all() else None
        if due.tick is not None:
            self.report.command(now)
            self.report.add("lateness", now - due.time_ns)
            if not verdict.is_safe:
                self.report.add("latency", now - due.tick.stamp_ns)
            self._conclude(verdict)

    def _conclude(self, verdict: Verdict) -> None:
        """Say what changed, and lose trust in what has just failed."""
        self.report.counts["safe"] += verdict.is_safe
        state = verdict.rules[0] if verdict.is_safe else "driving"
        if state == "no_command" and self.state == "waiting":
            return
        if state != self.state:
            self._log(f"safety action ({state}): {verdict.reason}" if verdict.is_safe else state)
        self.state = state
        if self._is_doubtful(verdict):
            if not self._is_safe:
                self._fail(verdict.reason, state)
            self._recovered = 0

    def _decide(self, due: Due) -> np.ndarray | None:
        """The command for a tick: its own answer, or the plan of the last good one for this moment."""
        assert due.tick is not None
        if self._link is not None and self._link.is_busy:
            self._tend_link()  # it may have come just now
        lead = self._lead(due.tick)
        if lead == 0:
            self._misses = 0
            self._recover(self._good is not None and bool(np.isfinite(self._good[1]).all()))
        else:
            self._misses += 1
            self._recovered = 0
            self.report.counts["missed"] += 1
            if self._misses >= self.config.max_misses and not self._is_safe:
                self._fail(f"{self._misses} answers in a row were not there in time", "answers too late")
        if lead is None or self._good is None:
            return None
        plan = self._good[1]
        self._due.add_between(due, plan[lead:])
        return plan[lead]

    def _lead(self, tick: Tick) -> int | None:
        """Which entry of the last plan is for this tick; None if there is none."""
        if self._good is None:
            return None
        lead = tick.number - self._good[0].number
        return lead if 0 <= lead < len(self._good[1]) else None

    def _recover(self, is_good: bool) -> None:
        """An answer came in time; whether it can be used as well."""
        self._recovered = self._recovered + 1 if is_good else 0
        if self._is_safe and self._recovered < self.config.recover_after:
            return
        self._is_safe = False
        with self.lock:
            self.guard.fault("")

    # -- waiting and resting --

    def _wait(self, now: int) -> None:
        due_ns, deadline = self._due.next_ns, self._ticker.deadline()
        times = [] if due_ns is None else [due_ns - self.config.early_ns]
        times += [] if deadline is None else [deadline]
        silent_until = self._silent_until()
        times += [] if silent_until is None else [silent_until]
        times += [] if self._waits is None else [self._patience_ns]
        left_s = min([(t - now) / 1e9 for t in times], default=1.0)
        files: list[Any] = [self.inbox]
        if self._link is not None and self._link.is_busy:
            files.append(self._link)
        select.select(files, [], [], min(max(left_s, 0.0), self.config.longest_wait_s))

    def _rest(self) -> None:
        """Send the safety action now."""
        with self.lock:
            now = self._clock()
            self._command = None  # what the robot does now is not what the model chose
            self._sent_ns = now  # also if it fails: not again at once
            verdict = self.guard.check(None, now)
            self._hand_on(verdict, now)
            self._conclude(verdict)

    def _rest_anyhow(self) -> None:
        """The same where nothing may end the loop: a failing middleware may work again at the next try."""
        try:
            self._rest()
        except Exception as error:
            self._log(f"the safety action could not be sent: {error!r}")
