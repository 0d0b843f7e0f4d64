"""Results of a benchmark on disk, a line an episode, and the table that they make."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d4_core import checkpoint
from d4_core.stats import few_mean, wilson, within
from d4_datasets import whole
from d4_datasets.errors import UserError
from d4_datasets.locks import held, is_held
from d4_sim.minecraft.game import Engine, Rung
from d4_sim.minecraft.tasks import LADDER, PUBLISHED, PUBLISHED_ENV, PUBLISHED_MINUTES, SOURCE

FORMAT = 2  # 1 counted only ticks that were seen
_ABOUT, _TABLE, _NUMBERS = "benchmark.json", "table.md", "results.json"


class Results:
    """The folder of a benchmark: what is measured (benchmark.json), and a line for every finished episode.

    A line is added in one write, so that a kill leaves it whole or not at all; a torn one, after a crash of
    the machine, is dropped and its episode played again.

    Args:
        out: the folder.
        about: what is measured; a folder with episodes holds one such measurement.
        part: (i, n) if this process plays every n-th episode only, the i-th of each n, from 0.

    Raises:
        UserError: the folder holds another measurement, or is damaged.
    """

    def __init__(self, out: Path, about: Mapping[str, Any], part: tuple[int, int] = (0, 1)) -> None:
        self.out, self.about = out, {"format": FORMAT, **about}
        out.mkdir(parents=True, exist_ok=True)
        name = "episodes.jsonl" if part[1] == 1 else f"episodes-{part[0] + 1}of{part[1]}.jsonl"
        self._file, self._folder = out / name, out / ".benchmark.lock"
        with held(self._folder):
            self._settle()

    @property
    def identity(self) -> str:
        """Short, of what is measured."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:6]

    def _settle(self) -> None:
        """Note what is measured, where nobody has measured anything else or is about to; with the folder."""
        path, own = self.out / _ABOUT, self._lock(self._file)
        playing = [lock for lock in self.out.glob(".episodes*.lock") if is_held(lock)]
        has_any = any(file.stat().st_size for file in self.out.glob("episodes*.jsonl"))
        if path.exists() and (has_any or playing):
            found = _load(path)
            if found != json.loads(json.dumps(self.about)):
                odd = sorted(k for k in {*found, *self.about} if found.get(k) != self.about.get(k))
                raise UserError(
                    f"{path} is of another measurement ({', '.join(odd)} differ): choose another --out, or "
                    "repeat its options"
                )
        else:
            if not path.exists() and (has_any or (self.out / _TABLE).exists()):
                raise UserError(
                    f"{self.out} holds results, and no {_ABOUT} that says of what: choose another --out"
                )
            whole.write(path, json.dumps(self.about, indent=1) + "\n")
        if own not in playing:
            self._mend()

    def _mend(self) -> None:
        """Drop a torn last line."""
        if self._file.exists() and (text := self._file.read_bytes()) and not text.endswith(b"\n"):
            whole.write(self._file, text[: text.rfind(b"\n") + 1].decode())

    def add(self, result: Mapping[str, Any]) -> None:
        """Keep a finished episode, on disk when this returns."""
        line = (json.dumps(result) + "\n").encode()
        fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(fd, line) != len(line):
                raise UserError(f"disk full ({self._file}): free some space and run the same command again")
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold this part of the folder against a second process that would play the same episodes."""
        busy = f"another d4-minecraft benchmark plays into {self._file}: wait for it to end"
        with ExitStack() as stack:
            with held(self._folder):  # or another one's look at this lock would be taken for its holder
                self._require_same_parts()
                stack.enter_context(held(self._lock(self._file), busy))
                self._settle()  # another part may have begun something else in between
            yield

    def _require_same_parts(self) -> None:
        """With other parts, too, episodes would be played twice; with the folder."""
        own = self._file.stem.partition("of")[2]
        for lock in self.out.glob(".episodes*.lock"):
            if lock.stem.partition("of")[2] != own and is_held(lock):
                raise UserError(
                    f"another d4-minecraft benchmark plays {lock.stem[1:]} in {self.out}, which may be the "
                    "same episodes: wait for it to end, or give all of them the same n of --part i/n"
                )

    @staticmethod
    def _lock(file: Path) -> Path:
        return file.with_name(f".{file.stem}.lock")

    def episodes(self) -> list[dict[str, Any]]:
        """All finished episodes, of all parts, by number."""
        return read_episodes(self.out)


def read_episodes(out: Path) -> list[dict[str, Any]]:
    """The finished episodes of a folder by number; where one was played twice, the first that began counts.

    Raises:
        UserError: a line is damaged.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(out.glob("episodes*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                continue  # torn, or being written
            try:
                result = json.loads(line)
                # TypeError, ValueError or KeyError if it is no result of an episode
                dict(result["reached"]), int(result["ticks"])
                known = found.setdefault(int(result["episode"]), result)
                if never_began(known) and not never_began(result):
                    found[int(result["episode"])] = result
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}: line {number} is damaged; delete this line, its episode is played again"
                ) from None
    return [found[number] for number in sorted(found)]


def versions(episodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """{version of the game: episodes that were played in it}, of those that say it."""
    return dict(Counter(each["version"] for each in episodes if each.get("version")))


def never_began(result: Mapping[str, Any]) -> bool:
    """Whether an episode counts as one without milestones because its environment did not begin it."""
    return bool(result.get("cut")) and result.get("ticks") == 0


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise UserError(
                f"{path} has format {found['format']}, this version reads {FORMAT}: choose another --out"
            )
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: choose another --out") from None
    return dict(found)


# ---- numbers ----


@dataclass(frozen=True)
class Row:
    """A milestone: episodes that reached it, and how long those took, in minutes or (worlds) ticks.

    Attributes:
        success: share, low, high: a Wilson interval of 95 %, which none or all of few episodes widen, too.
        time: mean, low, high over the episodes that reached it (`few_mean`); None if none did.
    """

    milestone: str
    reached: int
    success: tuple[float, float, float]
    time: tuple[float, float, float] | None


def _many(episodes: int) -> str:
    return f"{episodes} episode{'s' * (episodes != 1)}"


def rows(engine: Engine, episodes: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The milestones of an engine over episodes."""
    per_unit = 60 * engine.rate_hz if engine.kind == "game" else 1.0
    out = []
    for name in engine.milestones:
        times = [e["reached"][name] / per_unit for e in episodes if name in e["reached"]]
        most = max((e["ticks"] for e in episodes), default=0) / per_unit
        time = within(few_mean(times), 0.0, most) if times else None
        out.append(Row(name, len(times), wilson(len(times), len(episodes)), time))
    return out


# ---- the table ----


def table(
    engine: Engine, about: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]], asked: int = 0
) -> str:
    """The results as Markdown, beside the published ones where game and protocol are the same.

    Args:
        asked: episodes that were asked for, if these may be fewer.

    Raises:
        UserError: there is no finished episode.
    """
    if not episodes:
        raise UserError("there is no finished episode to make a table of")
    found = rows(engine, episodes)
    unit = "minutes" if engine.kind == "game" else "ticks"
    others = PUBLISHED if is_comparable(engine, about) else ()
    lines = [
        f"# {engine.title}: {_many(len(episodes))} of {about['policy']}\n",
        *([_PARTIAL.format(missing=asked - len(episodes), asked=asked)] if asked > len(episodes) else ()),
        _protocol(engine, about, episodes),
        "Success in per cent of the episodes [95 %]:\n",
        _markdown(
            ["milestone", "this policy", *(column.name for column in others)],
            [
                [
                    r.milestone.replace("_", " "),
                    _percent(r),
                    *(f"{c.success[r.milestone]:.1f}" for c in others),
                ]
                for r in found
            ],
        ),
        f"{unit.capitalize()} until then, over the episodes that got there [95 %]:\n",
        _markdown(
            ["milestone", "this policy", *(column.name for column in others)],
            [
                [r.milestone.replace("_", " "), _time(r), *(_minutes(c.minutes[r.milestone]) for c in others)]
                for r in found
            ],
        ),
    ]
    if shares := achievements(episodes):
        lines += _achievements(shares)
    where = checkpoint.origin()
    commit = f", commit {where['commit']}" if where["commit"] else ""
    lines.append(f"Written {where['date']} on {where['machine']}{commit}, seed {about['seed']}.\n")
    alone = _OTHER_PROTOCOL if engine.published else _NOT_MINECRAFT.format(title=engine.title)
    lines.append(f"Published columns: {SOURCE}.\n" if others else alone)
    return "\n".join(lines)


def achievements(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the episodes with each achievement of a world that has more of them than tasks."""
    told = [e["achievements"] for e in episodes if "achievements" in e]
    names = told[0] if told else ()
    return {name: sum(each.get(name, 0) > 0 for each in told) / len(episodes) for name in names}


def _achievements(shares: Mapping[str, float]) -> list[str]:
    from d4_sim.crafter.milestones import crafter_score

    cells = [[name.replace("_", " "), f"{100 * share:.1f}"] for name, share in shares.items()]
    score = crafter_score(list(shares.values()))
    return [
        f"All {len(shares)} achievements of the game, in per cent of the episodes; its score, "
        f"exp(mean(ln(1 + s))) - 1 over these rates s, is {score:.1f}:\n",
        _markdown(["achievement", "this policy"], cells),
    ]


def ladder_key(rungs: Sequence[Rung]) -> str:
    """The same for the same prompts."""
    text = json.dumps([[rung.task, rung.count] for rung in rungs])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_comparable(engine: Engine, about: Mapping[str, Any]) -> bool:
    """Whether a measurement is by the protocol of the published figures: game, environment, hour, ladder."""
    return (
        engine.published
        and about["minutes"] == PUBLISHED_MINUTES
        and about.get("ladder") == ladder_key(LADDER)
        and about.get("options", {}).get("env", PUBLISHED_ENV) == PUBLISHED_ENV
    )


_PARTIAL = (
    "**Not complete**: {missing} of {asked} episodes are missing. Long ones are more likely to be among "
    "them, so that shares and times may be off; the same command plays them.\n"
)
_OTHER_PROTOCOL = (
    f"Published figures are of {PUBLISHED_MINUTES} minutes with the ladder of {len(LADDER)} prompts in "
    f"{PUBLISHED_ENV}: these compare with none of them.\n"
)
_NOT_MINECRAFT = "{title} is another game than Minecraft: these figures compare with no published ones.\n"


def _protocol(engine: Engine, about: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]) -> str:
    minutes = f"{about['minutes']:g} minutes" if engine.kind == "game" else f"{about['ticks']} ticks"
    repeated = sum(int(e.get("crashes", 0)) for e in episodes)
    counted = sum(bool(e.get("cut")) for e in episodes)
    text = f"Episodes of at most {minutes}, empty inventory, sampled actions, prompts: {about['prompts']}. "
    if given := about.get("options"):
        text += f"Options of the game: {', '.join(f'{name} = {value}' for name, value in given.items())}. "
    if found := versions(episodes):
        text += f"Played in {', '.join(_played(*each, of=len(found)) for each in found.items())}. "
    if repeated or counted:
        text += (
            f"Environments hung or died {repeated} times; such an episode was played again from its "
            f"beginning, and {counted} of them count as they stood when that had happened too often. "
        )
    took = _latency(episodes)
    if "policy_ms" in took:
        median, most, _ = took["policy_ms"]
        text += f"Deciding took {median:.1f} ms (median), {most:.1f} ms (95 %), averaged over the episodes. "
    if "late_ms" in took and took["late_ms"][2] > 0:
        text += _realtime(took, sum(int(e.get("ticks", 0)) for e in episodes))
    return text.rstrip() + "\n"


def _played(version: str, episodes: int, of: int) -> str:
    return f"{version} ({_many(episodes)})" if of > 1 else version


def _realtime(took: Mapping[str, Any], ticks: int) -> str:
    """How late views and actions were in a game that waits for nobody."""
    told = "{:.1f} ms after its tick (median), {:.1f} ms (95 %), at most {:.0f} ms"
    text = "The game runs in real time: a view was taken " + told.format(*took["late_ms"])
    if "action_ms" in took:
        text += ", and the action on it was handed to the game " + told.format(*took["action_ms"])
    return text + f"; {took['missed']} of {ticks} ticks passed unseen. "


def _latency(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and 95th percentile in ms, averaged over the episodes, and the maximum; ticks missed in all."""
    out: dict[str, Any] = {"missed": sum(int(e.get("missed", 0)) for e in episodes)}
    for name in ("policy_ms", "late_ms", "action_ms"):
        found = [e[name] for e in episodes if e.get(name)]
        if found:
            median, most = (round(sum(each[k] for each in found) / len(found), 2) for k in (0, 1))
            out[name] = [median, most, max(each[2] for each in found)]
    return out


def _percent(row: Row) -> str:
    share, low, high = (100 * x for x in row.success)
    return f"{share:.1f} [{low:.1f}, {high:.1f}]"


def _time(row: Row) -> str:
    if row.time is None:
        return "-"
    if row.reached == 1:
        return f"{row.time[0]:.1f} (one episode)"
    mean, low, high = row.time
    return f"{mean:.1f} [{max(0.0, low):.1f}, {high:.1f}]"


def _minutes(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned for the eye, too."""
    widths = [max(len(row[k]) for row in [header, *cells]) for k in range(len(header))]
    lines = [header, ["-" * width for width in widths], *cells]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded) + "\n"


def write_table(out: Path, engine: Engine, about: Mapping[str, Any], asked: int = 0) -> str:
    """Write table.md and results.json of a folder; returns the table.

    Args:
        asked: episodes that were asked for, if the folder may hold fewer.

    Raises:
        UserError: there is no finished episode.
    """
    episodes = read_episodes(out)
    text = table(engine, about, episodes, asked)
    numbers = {
        "engine": engine.name, "title": engine.title, "episodes": len(episodes),
        "asked": max(asked, len(episodes)), "about": dict(about),
        "origin": checkpoint.origin(), "latency": _latency(episodes),
        "milestones": {
            r.milestone: {"reached": r.reached, "success": r.success, "time": r.time}
            for r in rows(engine, episodes)
        },
    }  # fmt: skip
    if shares := achievements(episodes):
        numbers["achievements"] = shares
    whole.write(out / _TABLE, text)
    whole.write(out / _NUMBERS, json.dumps(numbers, indent=1) + "\n")
    return text
