"""The guard: the last word on every command, independent of the model, usable in front of any policy.

It knows the contract and what it is told of the robot: when pictures came and whether they changed,
heartbeats, the emergency stop, the dead-man switch. From that it makes a verdict on each command: sent as it
is, sent within the limits, or replaced by each channel's safety action. Once the verdict has been carried
out, `sent` must say so: rates are limited from what was really sent, and `hold` holds that. It holds no clock
and starts no thread: times are nanoseconds of whatever clock its user lives by.

Rules, the first that holds decides:

    emergency_stop    latched: stays until `reset_stop`, whatever becomes of its cause
    dead_man          the switch is required and is not held, or its messages have stopped
    watchdog          a process that must show life has not done so in time
    stale             a stream is older than the contract's tolerance
    frozen            a camera has sent the same picture `frozen_frames` times more
    fault             a reason given by the caller (too many late answers, a lost server)
    no_command        there is nothing to send
    not_finite        the command holds NaN or infinity
    limit, slew       the command is sent, cut to `low`..`high`, or to `max_rate` from the last one

NumPy and the contract only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from d4_datasets.contract import Contract

RULES = (
    "emergency_stop", "dead_man", "watchdog", "stale", "frozen", "fault", "no_command", "not_finite", "limit",
    "slew",
)  # fmt: skip
# rules after which a number of good commands must come first: what came and went once may do so every time
DOUBTS = ("watchdog", "stale", "frozen", "not_finite")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What the guard watches.

    Attributes:
        enabled: False passes every finite command as it is; the emergency stop still works.
        frozen_frames: a camera that repeats a picture so often is frozen; 0 never.
        ahead_ms: a stamp so far ahead of the clock is wrong, and the sample does not count.
        watchdog_ms: oldest sign of life of a watched process; None: 1.5 periods.
        dead_man: commands pass only while the switch is held.
        dead_man_ms: the switch counts as released if its messages stop for so long.
        send: False is shadow mode: everything is computed and counted, nothing is to be sent.
    """

    enabled: bool = True
    frozen_frames: int = 2
    ahead_ms: float = 20.0
    watchdog_ms: float | None = None
    dead_man: bool = False
    dead_man_ms: float = 500.0
    send: bool = True


@dataclass
class Tally:
    """How often a rule acted, when first and last (ns of the user's clock), and what it said last."""

    count: int = 0
    first_ns: int = 0
    last_ns: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """What to do about one command.

    Attributes:
        values: float32 (A,) to send.
        send: bool (A,) which entries to send at all; entries of one channel are alike.
        is_safe: these are safety actions, not the policy's command.
        rules: those that acted, most important first.
        reason: of the first rule, for people.
    """

    values: np.ndarray
    send: np.ndarray
    is_safe: bool
    rules: tuple[str, ...] = ()
    reason: str = ""


@dataclass
class _Stream:
    stamp_ns: int = 0  # from which it ages
    newest_ns: int = 0  # of a sample; those before it do not count
    repeats: int = 0
    complaint: str = ""


class Guard:
    """Verdicts on the commands of one robot, and a tally of the rules that acted.

    Not safe for several threads by itself: whoever shares one holds a lock.
    """

    def __init__(self, contract: Contract, config: GuardConfig = GuardConfig()) -> None:
        self.contract, self.config = contract, config
        self.tally: dict[str, Tally] = {rule: Tally() for rule in RULES}
        self._low, self._high = _limits(contract)
        self._rate = _per_component(contract)
        self._whole = np.repeat([c.kind != "continuous" for c in contract.actions], _dims(contract))
        self._holds = np.repeat([c.safety == "hold" for c in contract.actions], _dims(contract))
        self._silent = np.repeat([c.safety == "none" for c in contract.actions], _dims(contract))
        self._tolerance = {
            s.name: s.align.tolerance_ns
            for s in contract.observations
            if s.role == "input" and s.align.tolerance_ns is not None
        }
        self._stop = ""
        self._fault = ""
        self._switch = (False, 0)
        self._life: dict[str, int] = {}
        self._streams: dict[str, _Stream] = {}
        self._last = np.full(len(self._low), np.nan)  # what was sent last; NaN: nothing that is still known
        self._chosen = (self._last, np.zeros(len(self._low), bool))  # by the last `check`, and which entries
        self._last_ns = 0

    # -- what it is told --

    def start(self, now_ns: int) -> None:
        """A run begins: whoever moved the robot before, what was last sent to it is not known any more."""
        self._last = np.full_like(self._last, np.nan)
        self.begin(now_ns)

    def begin(self, now_ns: int) -> None:
        """The clock begins anew: streams count as fresh now; a stop stays, and so does what was last sent."""
        self._streams = {name: _Stream(now_ns) for name in self._tolerance}
        self._last_ns, self._fault = now_ns, ""
        self._life = dict.fromkeys(self._life, now_ns)

    def see(self, stream: str, stamp_ns: int, now_ns: int) -> bool:
        """A sample of a stream came, captured at `stamp_ns`; False if that cannot be true."""
        seen = self._streams.setdefault(stream, _Stream())
        ahead = (stamp_ns - now_ns) / 1e6
        if ahead > self.config.ahead_ms:
            seen.complaint = f"; a stamp was {ahead:.0f} ms ahead of the clock"
        elif stamp_ns < seen.newest_ns:
            seen.complaint = f"; a stamp went back by {(seen.newest_ns - stamp_ns) / 1e6:.0f} ms"
        else:
            seen.stamp_ns = seen.newest_ns = stamp_ns
            seen.complaint = ""
        return not seen.complaint

    def look(self, camera: str, is_same: bool) -> None:
        """A picture was looked at; `is_same`: it equals the one before in every byte."""
        seen = self._streams.setdefault(camera, _Stream())
        seen.repeats = seen.repeats + 1 if is_same else 0

    def alive(self, process: str, now_ns: int) -> None:
        """A process that is watched from now on has shown life."""
        self._life[process] = now_ns

    def switch(self, is_held: bool, now_ns: int) -> None:
        """The dead-man switch was seen."""
        self._switch = (is_held, now_ns)

    def stop(self, reason: str) -> None:
        """Emergency stop; stays until `reset_stop`."""
        self._stop = self._stop or reason or "emergency stop"

    def reset_stop(self) -> None:
        """Release the emergency stop."""
        self._stop = ""

    @property
    def is_stopped(self) -> bool:
        """Whether the emergency stop is latched."""
        return bool(self._stop)

    def fault(self, reason: str) -> None:
        """Safety actions from now on for a reason of the caller's; an empty one ends it."""
        self._fault = reason

    def sent(self, now_ns: int) -> None:
        """What `check` decided last has been carried out (in shadow mode: would have been)."""
        values, send = self._chosen
        self._last, self._last_ns = np.where(send, values, self._last), now_ns

    # -- what it decides --

    def check(self, command: np.ndarray | None, now_ns: int) -> Verdict:
        """The verdict on a command (A,) in contract units, None if there is none."""
        rule, reason = self._forbids(now_ns)
        if not rule and command is None:
            rule, reason = "no_command", "there is no command"
        if not rule and not np.isfinite(command).all():  # type: ignore[arg-type]
            rule, reason = "not_finite", f"the command is {np.array2string(np.asarray(command), precision=3)}"
        if rule:
            self._note(rule, reason, now_ns)
            return self._safety(rule, reason)
        assert command is not None
        values, rules = np.asarray(command, np.float64), list[str]()
        if self.config.enabled:
            values, rules = self._bound(values, now_ns)
        for name in rules:
            self._note(name, f"the command was {np.array2string(np.asarray(command), precision=3)}", now_ns)
        return self._verdict(values, np.ones(len(values), bool), False, tuple(rules), "")

    def forbids(self, now_ns: int) -> str:
        """The rule by which no command may pass now, whatever it holds; empty if one may."""
        return self._forbids(now_ns)[0]

    def _forbids(self, now_ns: int) -> tuple[str, str]:
        """The rule that forbids any command now, and why; empty if none does."""
        if self._stop:
            return "emergency_stop", self._stop
        if not self.config.enabled:
            return ("fault", self._fault) if self._fault else ("", "")
        if self.config.dead_man:
            is_held, seen_ns = self._switch
            if not is_held:
                return "dead_man", "the dead-man switch is not held"
            if abs(now_ns - seen_ns) > self.config.dead_man_ms * 1e6:  # also where the clock was set back
                return "dead_man", f"the dead-man switch was last seen {(now_ns - seen_ns) / 1e6:.0f} ms ago"
        for process, seen_ns in self._life.items():
            if now_ns - seen_ns > self._longest_silence_ns():
                text = f"the {process} has shown no life for {(now_ns - seen_ns) / 1e6:.0f} ms"
                return "watchdog", f"{text}; {self._fault}" if self._fault else text
        for name, seen in self._streams.items():
            tolerance = self._tolerance.get(name)
            if tolerance is not None and now_ns - seen.stamp_ns > tolerance:
                age = (now_ns - seen.stamp_ns) / 1e6
                text = f"{name} is {age:.0f} ms old, the contract allows {tolerance / 1e6:.0f} ms"
                return "stale", text + seen.complaint
            if 0 < self.config.frozen_frames <= seen.repeats:
                return "frozen", f"{name} has sent the same picture {seen.repeats + 1} times"
        return ("fault", self._fault) if self._fault else ("", "")

    def _longest_silence_ns(self) -> float:
        wanted = self.config.watchdog_ms
        return 1.5 * self.contract.period_ns if wanted is None else wanted * 1e6

    def _bound(self, values: np.ndarray, now_ns: int) -> tuple[np.ndarray, list[str]]:
        """The command within limits and rates, and the rules that changed it."""
        rules = []
        bounded = np.clip(np.where(self._whole, np.round(values), values), self._low, self._high)
        if (np.abs(bounded - values) > 1e-6 * (self._high - self._low)).any():
            rules.append("limit")
        limited = np.isfinite(self._rate) & np.isfinite(self._last)
        step = self._rate[limited] * max(0, now_ns - self._last_ns) / 1e9
        slewed = bounded.copy()
        slewed[limited] = np.clip(bounded[limited], self._last[limited] - step, self._last[limited] + step)
        if (np.abs(slewed - bounded) > 1e-6 * (self._high - self._low)).any():
            rules.append("slew")
        return slewed, rules

    def _safety(self, rule: str, reason: str) -> Verdict:
        """Each channel's safety action, not slewed: a stop is a stop, how to brake is the robot's."""
        is_known = np.isfinite(self._last)
        held = np.clip(np.where(is_known, self._last, 0.0), self._low, self._high)
        # zeros are zeros: within limits that leave zero out they would be the slowest drive, not a stop
        values = np.where(self._holds, held, 0.0)
        return self._verdict(values, ~self._silent & ~(self._holds & ~is_known), True, (rule,), reason)

    def _verdict(
        self, values: np.ndarray, send: np.ndarray, is_safe: bool, rules: tuple[str, ...], reason: str
    ) -> Verdict:
        self._chosen = (values, send)
        return Verdict(values.astype(np.float32), send & self.config.send, is_safe, rules, reason)

    def _note(self, rule: str, reason: str, now_ns: int) -> None:
        tally = self.tally[rule]
        tally.first_ns = tally.first_ns or now_ns
        tally.count, tally.last_ns, tally.reason = tally.count + 1, now_ns, reason


def _dims(contract: Contract) -> list[int]:
    return [channel.dim for channel in contract.actions]


def _limits(contract: Contract) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of every action component that is no more than the contract allows once it is
    a float32, as a command is: 0.1 would become 0.10000000149."""
    low, high = contract.action_low.copy(), contract.action_high.copy()
    column = 0
    for channel in contract.actions:
        if channel.kind == "continuous":
            for k in range(channel.dim):
                low[column + k] = _inward(channel.low[k], np.inf)
                high[column + k] = _inward(channel.high[k], -np.inf)
        column += channel.dim
    return low.astype(np.float64), high.astype(np.float64)


def _inward(limit: float, inside: float) -> np.float32:
    """The float32 next to a limit that does not lie beyond it, seen from `inside`."""
    near = np.float32(limit)
    is_beyond = float(near) < limit if inside > 0 else float(near) > limit
    return np.nextafter(near, np.float32(inside)) if is_beyond else near


def _per_component(contract: Contract) -> np.ndarray:
    """`max_rate` of every action component, units/s; infinite where the contract names none."""
    rates = [channel.max_rate or (np.inf,) * channel.dim for channel in contract.actions]
    return np.array([rate for entry in rates for rate in entry])
