"""The guard between any policy and the robot: commands in, guarded commands out, and never silence.

One thread. A command is complete when every channel of the contract has come; it is checked and sent at once.
A channel that comes more rarely than the others is held, for two periods and no longer: then there is no
command. When nothing complete has come for 1.5 periods the safety action goes out, and again every period, so
that the robot never waits longer than two. What forbids every command (a stop, a stale camera) acts when it
is noticed, not when the next command comes. After silence or a doubt of the guard's (`DOUBTS`) a number of
good commands in a row must have come before they pass again: a policy that is late every other time, or a
camera that comes and goes, must not make the robot stop and go.

Knows no ROS: `send` is whatever moves the robot, `clock` dates observations, `pace` measures periods.
"""

from __future__ import annotations

import select
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from d4_datasets import fields
from d4_datasets.contract import Contract
from d4_nodes.codec import Topic
from d4_nodes.driver import Driver
from d4_nodes.guard import RULES, Guard, Verdict
from d4_nodes.health import ERROR, OK, WARN, Examiner, Finding, Thresholds
from d4_nodes.inbox import Inbox, Sample
from d4_nodes.report import Report

Clock = Callable[[], int]

_SILENCE = 1.5  # periods without a complete command until the safety action is sent
_HELD = 2.0  # periods for which a channel's last command counts
_GRACE = 0.5  # periods that a command waits for channels of its own
_APART = 0.75  # periods between two pictures that are compared, and two commands that count as two
_KEPT = 256  # commands that may wait for the thread


def read(topic: Topic, message: Any) -> np.ndarray:
    """What a message on a command topic wants, float64, entries in the order of the topic's channels.

    Raises:
        UserError: a field is not there.
    """
    return np.concatenate([fields.read(message, part.channel.select) for part in topic.parts])


class Relay(Driver):
    """Passes commands on until `stop`.

    Args:
        contract: the robot.
        guard: asked about every command; shared with other threads under `lock`.
        inbox: where observations come in; streams by their names in the contract.
        send: moves the robot: (verdict, time of `clock`). Called under `lock`.
        clock: dates observations, ns.
        report: collects measurements.
        log: told in one line what changed.
        pace: measures periods, ns: the simulation's clock; None: monotonic time.
        longest_wait_s: looks at the clocks so often even if nothing comes.
        recover_after: so many good commands in a row until they pass again; the last of them passes.
    """

    kind = "relay"

    def __init__(
        self,
        contract: Contract,
        guard: Guard,
        inbox: Inbox,
        send: Callable[[Verdict, int], None],
        clock: Clock,
        report: Report,
        log: Callable[[str], None] = print,
        pace: Clock | None = None,
        longest_wait_s: float = 0.02,
        recover_after: int = 5,
    ) -> None:
        super().__init__(contract, guard, inbox, send, clock, report)
        self._log, self._keeps_real_time = log, pace is None
        self._pace: Clock = pace or (lambda: time.monotonic_ns())
        self._longest_wait_s, self._recover_after = longest_wait_s, recover_after
        self._places: dict[str, list[int]] = {}  # topic: its entries in the action vector
        column = 0
        for channel in contract.actions:
            self._places.setdefault(channel.topic, []).extend(range(column, column + channel.dim))
            column += channel.dim
        self._came: deque[tuple[str, int, np.ndarray]] = deque(maxlen=_KEPT)
        self._forget()

    def _forget(self) -> None:
        """Nothing has come yet; the next command is awaited from now on."""
        self._came.clear()
        self._newest: dict[str, tuple[int, np.ndarray]] = {}  # topic: when it came, what it wants
        self._fresh: set[str] = set()  # topics that came since the last command was made of them
        self._since = 0  # when the first of them came
        self._owed, self._doubted = 0, ""  # good commands until they pass again, and why
        self._counted = self._pace() - self._periods(_APART)  # when the last of them came
        self._pictures: dict[str, Sample] = {}  # to be compared
        self._looked: dict[str, tuple[int, np.ndarray]] = {}  # stamp and bytes of the last one that was
        self._due = self._pace() + self._periods(_SILENCE)

    def _periods(self, count: float) -> int:
        return round(count * self.contract.period_ns)

    # -- from other threads --

    def command(self, topic: str, values: np.ndarray) -> None:
        """A message on a command topic of the contract: what it wants, as `read` gives it."""
        self._came.append((topic, self._pace(), values))
        self.inbox.wake()

    def put(self, stream: str, stamp_ns: int, picture: Any = None) -> None:
        """A message of an observed stream; `picture` is the message of a camera, to be compared."""
        self.inbox.put(stream, Sample(stamp_ns, self._clock(), picture))

    @property
    def keeps_real_time(self) -> bool:
        """Whether it measures periods by the monotonic clock."""
        return self._keeps_real_time

    def _rest_for(self, reason: str) -> None:
        self._pass_on(None, reason)

    # -- the relay's own thread --

    def run(self) -> None:
        """Go round until `stop`; then send the safety action, last of all."""
        with self.lock:
            self.guard.start(self._clock())
        self.begin()
        try:
            while not self._stop.is_set():
                self._beat_ns = time.monotonic_ns()
                try:
                    self.round()
                    self._wait()
                except Exception as error:
                    self._log(f"the relay failed: {error!r}")
                    self.report.reasons["the relay failed"] += 1
                    self._doubt(f"the relay failed: {error!r}")
                    self._rest_anyhow(f"the relay failed: {error!r}")
                    self._stop.wait(self.contract.period_ns / 4e9)  # a bug that stays must not fill the log
        finally:
            self._rest_anyhow("the relay has ended")
            self._is_over = self._stop.is_set()

    def _rest_anyhow(self, reason: str) -> None:
        """The safety action, where nothing may end the relay: failing middleware may work again next time."""
        try:
            self._pass_on(None, reason)
        except Exception as error:
            self._log(f"the safety action could not be sent: {error!r}")

    def begin(self) -> None:
        """Begin: streams count as fresh now, and a command is awaited."""
        self._jump_ns()
        with self.lock:
            self.guard.begin(self._clock())
        self._forget()

    def round(self) -> None:
        """Do what is to be done now."""
        self._look_at_clock()
        self._receive()
        now = self._pace()  # not before: what has just come is no command of the future
        with self.lock:
            is_forbidden = self.guard.forbids(self._clock())
            stood_still, self._stood_still = self._stood_still, ""
        if stood_still:
            self._doubt(stood_still)
        if self._is_complete(now):
            self._relay()
        elif is_forbidden and self.state == "driving":
            self._pass_on(None, "")
            self._due = now + self.contract.period_ns
        elif now >= self._due and not self._is_underway(now):
            self.report.counts["missed"] += 1
            if self._has_begun():
                self._doubt(self._why_not(now))
            self._pass_on(None, self._why_not(now))
            self._due += self.contract.period_ns * (1 + (now - self._due) // self.contract.period_ns)
        self._look()

    def _look_at_clock(self) -> None:
        if jump := self._jump_ns():
            self._log(f"the clock jumped by {jump / 1e9:.3f} s")
            self.report.reasons["the clock jumped"] += 1
            self.inbox.clear()
            self.begin()
            if self.keeps_real_time:  # in simulation that is how an episode begins
                self._doubt("the clock jumped")
            self._pass_on(None, "the clock jumped")

    def _receive(self) -> None:
        for name, sample in self.inbox.drain():
            with self.lock:
                if not self.guard.see(name, sample.stamp_ns, sample.arrival_ns):
                    self.report.counts["wrong stamps"] += 1
                    continue
            self.inbox.keep(name, sample._replace(message=None))  # a picture is compared once, then let go
            self.report.add("transport", sample.arrival_ns - sample.stamp_ns)
            if sample.message is not None:
                self._pictures[name] = sample
        while self._came:
            topic, time_ns, values = self._came.popleft()
            self._catch_up(time_ns)
            self._newest[topic] = (time_ns, values)
            self._since = self._since if self._fresh else time_ns
            self._fresh.add(topic)

    def _look(self) -> None:
        """Compare pictures with those before, byte by byte, when no command waits for it."""
        while self._pictures:
            name, sample = self._pictures.popitem()
            before = self._looked.get(name)
            if before is not None and sample.stamp_ns - before[0] < self._periods(_APART):
                continue
            data = np.frombuffer(sample.message.data, np.uint8)
            self._looked[name] = (sample.stamp_ns, data)
            with self.lock:
                self.guard.look(name, before is not None and np.array_equal(before[1], data))

    # -- a command --

    def _missing(self, now: int) -> list[str]:
        """Topics whose last command is too old, or never came."""
        oldest = now - self._periods(_HELD)
        return [t for t in self._places if t not in self._newest or self._newest[t][0] < oldest]

    def _has_begun(self) -> bool:
        """Whether every topic has come once: before the first command there is no doubt."""
        return len(self._newest) == len(self._places)

    def _catch_up(self, now: int) -> None:
        """What this thread would have done by the time `now` at which a message came, had it not been held
        up: silence is judged by when commands came, not by when they are seen."""
        made = self._made_at()
        if self._fresh and made <= now and not self._missing(made):  # newer ones have come; the last is sent
            if not all(np.isfinite(self._newest[topic][1]).all() for topic in self._fresh):
                self._doubt("a command was not finite")
            self._fresh = set()
            self._due = made + self._periods(_SILENCE)
        if now >= self._due and self._has_begun() and not self._is_underway(now):
            self._doubt(self._why_not(now))

    def _made_at(self) -> int:
        """When a command is made of what has come, if nothing else comes and nothing is too old by then."""
        if len(self._fresh) == len(self._places):
            return max(self._newest[topic][0] for topic in self._fresh)
        return self._since + self._periods(_GRACE)

    def _is_underway(self, now: int) -> bool:
        """Whether a command waits for channels of its own, which have time until `_GRACE` is over."""
        return bool(self._fresh) and not self._missing(now)

    def _is_complete(self, now: int) -> bool:
        """Whether a command is to be made of what has come."""
        return self._is_underway(now) and self._made_at() <= now

    def _why_not(self, now: int) -> str:
        """Why there is no command, for people."""
        missing = self._missing(now) or list(self._places)
        topic = missing[0]
        if topic not in self._newest:
            return f"no command has come for {topic}"
        return f"the last command for {topic} came {(now - self._newest[topic][0]) / 1e6:.0f} ms ago"

    def _relay(self) -> None:
        values = np.full(self.contract.action_dim, np.nan)
        for topic, columns in self._places.items():
            values[columns] = self._newest[topic][1]
        came, made = max(self._newest[topic][0] for topic in self._fresh), self._made_at()
        self._fresh = set()
        self._recover(values, made)
        self._pass_on(values, "")
        self._due = made + self._periods(_SILENCE)
        self.report.add("relay", self._pace() - came)

    def _doubt(self, reason: str) -> None:
        """From now on a number of good commands must come before one passes."""
        if self.guard.config.enabled:
            self._owed, self._doubted = self._recover_after, reason
            with self.lock:
                self.guard.fault("")  # it speaks of commands that come; until then other rules do

    def _recover(self, values: np.ndarray, made: int) -> None:
        """A command has come: while some are owed it counts if it is good and does not come in a burst; the
        last of them passes."""
        if not self._owed:
            return
        with self.lock:
            self.guard.fault("")
            if self.guard.forbids(self._clock()) or not np.isfinite(values).all():
                self._owed = self._recover_after
            elif made - self._counted >= self._periods(_APART):
                self._owed, self._counted = self._owed - 1, made
            if self._owed:
                self.guard.fault(f"{self._doubted}; {self._owed} good commands in a row are still missing")

    def _pass_on(self, values: np.ndarray | None, why: str) -> None:
        """Send a command as the guard allows, or the safety action if there is none and `why`."""
        with self.lock:
            if values is not None and self._stood_still:
                values, why = None, self._stood_still
            began, now = time.monotonic_ns(), self._clock()
            verdict = self.guard.check(values, now)
            if verdict.rules[:1] == ("no_command",) and why:
                verdict = replace(verdict, reason=why)
                self.guard.tally["no_command"].reason = why
            checked = time.monotonic_ns()
            self._send(verdict, now)
            self.guard.sent(now)
            self._spoke_ns = time.monotonic_ns()
            self.report.add("guard", checked - began)
            self.report.add("publish", time.monotonic_ns() - checked)
            self.report.command(now)
            self.report.counts["safe"] += verdict.is_safe
            state = verdict.rules[0] if verdict.is_safe else "driving"
            is_news, self.state = state != self.state, state
        if self._is_doubtful(verdict):
            self._doubt(verdict.reason)
        if is_news:
            self._log(f"safety action ({state}): {verdict.reason}" if verdict.is_safe else state)

    def _wait(self) -> None:
        """Until something comes, or is due."""
        now = self._pace()
        due = self._made_at() if self._is_underway(now) else self._due
        left_s = (due - now) / 1e9
        select.select([self.inbox], [], [], min(max(left_s, 0.0), self._longest_wait_s))


class RelayExaminer(Examiner):
    """Looks at a relay now and then: its commands, every stream, the guard."""

    def __init__(self, relay: Relay, thresholds: Thresholds) -> None:
        super().__init__(relay, thresholds)  # type: ignore[arg-type]  # streams and guard are as in a loop

    def look(self) -> list[Finding]:
        """All findings now."""
        return [finding for finding in super().look() if finding.name != "inference server"]

    def _server(self) -> Finding:
        return Finding("inference server", OK, "there is none", {})

    def _commands(self) -> Finding:
        relay, counts = self.loop, Counter(self.loop.report.counts)
        fresh = counts - self._counts
        self._counts = counts
        missed = fresh["missed"] / max(1, fresh["commands"])
        level, text = OK, relay.state
        if relay.state in RULES:
            level, text = ERROR, f"safety action ({relay.state}): {relay.guard.tally[relay.state].reason}"
        elif missed >= self.thresholds.missed_warn:
            level = ERROR if missed >= self.thresholds.missed_error else WARN
            text = f"{missed:.0%} of the commands did not come in time"
        values = {name: str(counts[name]) for name in ("commands", "missed", "safe")}
        values |= {"rate_hz": f"{relay.report.achieved_hz:.2f}"}
        spent = relay.report.stages["relay"]
        values |= {f"relay_p{q:g}_ms": f"{spent.quantile_ms(q / 100):.3f}" for q in (50, 99, 99.9)}
        return Finding("commands", level, text, values)
