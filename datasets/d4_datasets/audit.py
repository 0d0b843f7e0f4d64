"""`d4-audit`: what is in a dataset, and whether training on it would be wrong.

One pass over the data, an episode at a time, collects counts; checks turn the counts into verdicts. An ERROR
means a model trained on this would have learned something false (exit code 1); a WARN names what a person
should look at.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from d4_datasets.errors import UserError, run_cli
from d4_datasets.pictures import GREEN, GREY, ORANGE, Color, Strip, contact_sheet, write_png
from d4_datasets.scan import EpisodeRow, Scan, estimate_lag
from d4_datasets.windows import NoFrames, Windows, cache_bytes

_TERMINAL_ROWS = 40  # episodes listed on screen, all are in the JSON
_SHEET_ROWS, _SHEET_FRAMES = 16, 10
_SHORT = 16  # frames; shorter episodes mostly pad the windows they are in


@dataclass(frozen=True)
class Verdict:
    """One line of judgement: level is OK, WARN or ERROR; `hint` says what to do about it."""

    level: str
    check: str
    message: str
    hint: str = ""


@dataclass
class Audit:
    """The result of an audit; `to_dict` is the JSON file."""

    dataset: str
    summary: dict[str, Any] = field(default_factory=dict)
    cameras: dict[str, dict[str, float]] = field(default_factory=dict)
    actions: dict[str, dict[str, Any]] = field(default_factory=dict)
    lag: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    nonfinite: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[EpisodeRow] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if training on this dataset would be wrong, else 0."""
        return int(any(verdict.level == "ERROR" for verdict in self.verdicts))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without NaN."""
        return {"format": 1, **asdict(self), "exit_code": self.exit_code}


def audit(root: Path, cache: Path | None = None) -> Audit:
    """Look through the dataset at `root` (building its frame cache if needed) and judge it.

    Raises:
        UserError: `root` is no dataset, or files of it are missing or broken.
    """
    result = Audit(str(root))
    try:
        windows = Windows(root, cache, strict=False)
    except NoFrames:
        result.summary = {"episodes": 0, "frames": 0}
        hint = "ingest a recording into it (d4-ingest); if it was, the camera topic or its tolerance is wrong"
        result.verdicts.append(_error("frames", "the dataset holds no frames", hint))
        return result
    meta = json.loads((windows.root / "meta" / "d4.json").read_text())
    info = json.loads((windows.root / "meta" / "info.json").read_text())
    scan = Scan(windows, meta.get("episodes", []))
    scan.run()
    _fill(result, windows, scan, info)
    result.verdicts.extend(_verdicts(result, windows, meta))
    return result


# ---- what was counted, in sections


def _fill(result: Audit, windows: Windows, scan: Scan, info: dict[str, Any]) -> None:
    """Turn the counts of the pass into the sections of the result."""
    contract, frames = windows.contract, windows.num_frames
    mask = np.asarray(windows.action_mask)
    files = (path for part in ("meta", "data", "videos") for path in (windows.root / part).rglob("*.*"))
    result.summary = {
        "robot": contract.name, "contract_hash": contract.hash,
        "episodes": len(scan.rows), "frames": frames, "hours": frames / contract.rate_hz / 3600,
        "rate_hz": contract.rate_hz, "video_rate_hz": float(info["fps"]),
        "labelled_frames": float(mask.mean()), "labelled_episodes": float(windows.labelled.mean()),
        "median_episode_frames": float(np.median(windows.episode_length)),
        "disk_bytes": sum(path.stat().st_size for path in files),
        "cache_bytes": cache_bytes(contract, frames) if windows.images else 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }  # fmt: skip
    result.cameras = {
        name: {
            "repeated": c["repeated"] / max(c["pairs"], 1), "pairs": c["pairs"],
            "longest_repeat": c["longest"], "dark": c["dark"] / frames,
        }
        for name, c in scan.camera.items()
    }  # fmt: skip
    result.actions = scan.actions.table()
    lag = estimate_lag(scan.motion)
    expected = int(contract.latency_ms * contract.rate_hz // 1000)
    result.lag = {"frames": None, "expected": expected}
    if lag is not None:
        result.lag |= {"frames": lag[0], "correlation": lag[1][lag[0]], "curve": lag[1]}
    returns = np.array([row.returns for row in scan.rows])
    result.tasks = {
        name: {
            "episodes": int(scan.task_episodes[i]), "frames": int(scan.task_frames[i]),
            "rewarded_episodes": int((returns[:, i] != 0).sum()) if i < returns.shape[1] else 0,
        }
        for i, name in enumerate(contract.task_names)
    }  # fmt: skip
    result.summary["unknown_task_frames"] = scan.unknown_tasks
    result.nonfinite = [
        {"column": column, "episode": episode, "frames": count}
        for (column, episode), count in windows.nonfinite.items()
    ]
    result.episodes = scan.rows


# ---- judgement


def _ok(check: str, message: str) -> Verdict:
    return Verdict("OK", check, message)


def _warn(check: str, message: str, hint: str) -> Verdict:
    return Verdict("WARN", check, message, hint)


def _error(check: str, message: str, hint: str) -> Verdict:
    return Verdict("ERROR", check, message, hint)


def _verdicts(result: Audit, windows: Windows, meta: dict[str, Any]) -> Iterator[Verdict]:
    """All checks, each with one line or more."""
    yield from _check_numbers(result, windows, meta)
    yield from _check_labels(result)
    yield from _check_actions(result)
    yield from _check_cameras(result)
    yield from _check_episodes(result)
    yield from _check_lag(result)
    yield from _check_tasks(result, windows)
    yield from _check_size(result)


def _check_numbers(result: Audit, windows: Windows, meta: dict[str, Any]) -> Iterator[Verdict]:
    summary, contract = result.summary, windows.contract
    for bad in result.nonfinite:
        text = (
            f"column {bad['column']} is NaN or infinite in {bad['frames']} frames of episode {bad['episode']}"
        )
        yield _error("numbers", text, "repair or leave out the recording it came from and ingest again")
    if not result.nonfinite:
        yield _ok("numbers", "no NaN or infinite values")
    if abs(summary["video_rate_hz"] - contract.rate_hz) > 1e-3:
        text = f"the dataset runs at {summary['video_rate_hz']:g} Hz, its contract at {contract.rate_hz:g} Hz"
        yield _error("rate", text, "ingest again with this contract: every time constant would be wrong")
    else:
        yield _ok("rate", f"{contract.rate_hz:g} Hz, as the contract says")
    if meta.get("contract_hash") != contract.hash:
        text = "the contract in meta/d4.json was changed after the data were written"
        yield _error("contract", text, "ingest again with the contract you mean")


def _check_labels(result: Audit) -> Iterator[Verdict]:
    share, episodes = result.summary["labelled_frames"], result.summary["labelled_episodes"]
    if share == 0:
        text = "no frame has a known action: tokenizer and dynamics can train, the agent phase cannot"
        yield _warn("labels", text, "add labelled recordings, or check the action topic and its tolerance")
    else:
        yield _ok("labels", f"actions known in {share:.1%} of the frames, {episodes:.1%} of the episodes")


def _check_actions(result: Audit) -> Iterator[Verdict]:
    actions = result.actions
    if not actions:
        return
    outside = {name: a for name, a in actions.items() if a["outside"]}
    for name, a in outside.items():
        text = (
            f"{name} is outside its contract in {a['outside']} frames: {a['min']:.4g} to {a['max']:.4g}, "
            f"allowed {a['low']:.4g} to {a['high']:.4g}"
        )
        yield _error("actions", text, "check units and field path, or widen low/high, and ingest again")
    constant = [name for name, a in actions.items() if a["constant"]]
    if len(constant) == len(actions):
        text = "all actions are constant: nothing can be learned from them"
        yield _error("actions", text, "check the field paths under actions/select in the contract")
    elif constant:
        text = f"{', '.join(constant)} never changes"
        yield _warn("actions", text, "leave it out of the contract if the robot does not use it")
    elif not outside:
        yield _ok("actions", "all within the contract, all used")
    for name, a in actions.items():
        used = (a["max"] - a["min"]) / (a["high"] - a["low"])
        if not a["constant"] and used < 0.05:
            text = f"{name} uses {used:.1%} of its range"
            yield _warn("actions", text, "check its units; or narrow low/high to what the robot does")
        if a["over_max_rate"] > 0.01:
            text = f"{name} changes faster than max_rate in {a['over_max_rate']:.1%} of the steps"
            yield _warn("actions", text, "raise max_rate, or the guard will slow the policy down")


def _check_cameras(result: Audit) -> Iterator[Verdict]:
    rate = result.summary["rate_hz"]
    for name, c in result.cameras.items():
        if c["pairs"] and c["repeated"] == 1.0:
            text = f"camera {name} is frozen: in every episode all frames are the same"
            yield _error("camera", text, "check the camera topic and its driver, and record again")
        elif c["repeated"] > 0.2 and c["longest_repeat"] <= max(rate / 2, 3):
            text = f"camera {name} repeats {c['repeated']:.1%} of its frames: it delivers about "
            text += f"{rate * (1 - c['repeated']):.1f} Hz, the contract asks for {rate:g}"
            yield _warn("camera", text, "lower rate_hz in the contract, or use a faster camera")
        elif c["longest_repeat"] > 2 * rate or c["repeated"] > 0.2:
            text = f"camera {name}: {c['repeated']:.1%} of the frames repeat the one before, longest run "
            text += f"{c['longest_repeat']} frames ({c['longest_repeat'] / rate:.1f} s)"
            yield _warn("camera", text, "either nothing moved or the camera stalled: look at the sheet")
        else:
            yield _ok("camera", f"camera {name}: {c['repeated']:.1%} of the frames repeat the one before")
        if c["dark"] > 0.05:
            text = f"camera {name}: {c['dark']:.1%} of the frames are dark"
            yield _warn("camera", text, "check exposure and lens cap, or leave these recordings out")


def _check_episodes(result: Audit) -> Iterator[Verdict]:
    rows = result.episodes
    copies = [row for row in rows if row.copy_of is not None]
    if copies:
        first = copies[0]
        text = f"{len(copies)} episodes are copies, first: episode {first.episode} equals {first.copy_of}"
        yield _warn("episodes", text, "ingest every recording once: copies leak into the holdout")
    short = sum(row.frames < _SHORT for row in rows)
    if short > len(rows) / 2:
        text = f"{short} of {len(rows)} episodes have fewer than {_SHORT} frames"
        yield _warn(
            "episodes", text, "gaps split episodes: raise the camera's tolerance_ms, or fix the drops"
        )
    stale, dropped = sum(row.stale for row in rows), sum(row.dropped for row in rows)
    share = stale / result.summary["frames"]
    gaps = sum((row.gap_s or 0) > 0 for row in rows)
    text = f"{len(rows)} episodes; {share:.1%} stale frames, {dropped} dropped ticks, {gaps} follow a gap"
    if share > 0.2:
        yield _warn("episodes", text, "the camera is slower than rate_hz or irregular: see the table")
    else:
        yield _ok("episodes", text)


def _check_lag(result: Audit) -> Iterator[Verdict]:
    lag, period = result.lag, 1000 / result.summary["rate_hz"]
    if lag["frames"] is None or lag["correlation"] < 0.3:
        if result.actions:
            yield _ok("lag", "the delay from action to picture cannot be measured from these data")
        return
    frames, expected = lag["frames"], lag["expected"]
    text = f"the picture follows the action by {frames} frames (about {frames * period:.0f} ms, correlation "
    text += f"{lag['correlation']:.2f}); the contract's latency makes {expected}"
    clear = lag["correlation"] - lag["curve"][expected] > 0.1 if expected in lag["curve"] else True
    if clear and frames < expected:
        yield _warn("lag", text, "labels come late: check the actions' timeline and latency_ms")
    elif clear and frames > expected + 2:
        yield _warn("lag", text, "labels come early, or the robot is slow: check timeline and latency_ms")
    else:
        yield _ok("lag", text)


def _check_tasks(result: Audit, windows: Windows) -> Iterator[Verdict]:
    width, names = windows.reward.shape[1], list(result.tasks)
    if width != len(names):
        text = f"reward has {width} columns, the contract names {len(names)} tasks"
        yield _error("tasks", text, "write the dataset again with this contract")
    if result.summary["unknown_task_frames"]:
        text = f"{result.summary['unknown_task_frames']} frames have a task the contract does not name"
        yield _error("tasks", text, "complete tasks/names in the contract and ingest again")
    missing = [name for name in names if not result.tasks[name]["frames"]]
    unpaid = [name for name in names if not result.tasks[name]["rewarded_episodes"]]
    if missing:
        yield _warn(
            "tasks", f"no frames of {', '.join(missing)}", "record it, or take it out of the contract"
        )
    if unpaid:
        text = f"no reward in any episode for {', '.join(unpaid)}: imitation works, imagination does not"
        yield _warn("tasks", text, "name the reward topic in the contract, or record successes")
    if not missing and not unpaid:
        yield _ok("tasks", f"{len(names)} tasks, all recorded and rewarded")


def _check_size(result: Audit) -> Iterator[Verdict]:
    summary = result.summary
    cache, memory = summary["cache_bytes"], summary["memory_bytes"]
    text = f"{_size(summary['disk_bytes'])} on disk, frame cache {_size(cache)} more (mapped, not loaded)"
    if cache > memory:
        text += f", and this machine has {_size(memory)} of memory"
        yield _warn(
            "size", text, "put the cache on a fast local disk (--cache); batches will be read from it"
        )
    else:
        yield _ok("size", text)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# ---- what a person sees


def print_audit(result: Audit) -> None:
    """Print the audit to stdout: tables on a terminal, plain aligned lines elsewhere."""
    summary = result.summary
    line = f"{result.dataset}: {summary['episodes']} episodes, {summary['frames']} frames"
    if summary["frames"]:
        line += f", {summary['hours']:.3g} h at {summary['rate_hz']:g} Hz, robot {summary['robot']}"
        print(line)
        _print_table(*_episode_table(result))
        if len(result.episodes) > _TERMINAL_ROWS:
            print(
                f"{_TERMINAL_ROWS} of {len(result.episodes)} episodes, those with most findings; all: --json"
            )
        if result.actions:
            _print_table(*_action_table(result))
        _print_table(*_task_table(result))
    else:
        print(line)
    _print_verdicts(result.verdicts)


def _episode_table(result: Audit) -> tuple[list[str], list[list[str]]]:
    def findings(row: EpisodeRow) -> int:
        return row.repeated + row.stale + row.dropped + row.dark

    worst = sorted(result.episodes, key=findings, reverse=True)[:_TERMINAL_ROWS]
    header = ["episode", "frames", "s", "labelled", "stale", "dropped", "gap s", "repeated"]
    header += ["longest", "dark", "end", "task", "return"]
    rows = [_episode_cells(row) for row in sorted(worst, key=lambda row: row.episode)]
    return header, rows


def _episode_cells(row: EpisodeRow) -> list[str]:
    return [
        str(row.episode), str(row.frames), f"{row.seconds:.1f}", f"{row.labelled / row.frames:.0%}",
        str(row.stale), str(row.dropped), "" if row.gap_s is None else f"{row.gap_s:.1f}", str(row.repeated),
        str(row.longest_repeat), str(row.dark), "terminal" if row.terminal else "", " ".join(row.tasks),
        " ".join(f"{value:.3g}" for value in row.returns),
    ]  # fmt: skip


def _action_table(result: Audit) -> tuple[list[str], list[list[str]]]:
    header = ["action", "min", "max", "mean", "std", "low", "high", "outside", "at limit"]
    keys = ("min", "max", "mean", "std", "low", "high")
    rows = [
        [name, *(f"{a[key]:.4g}" for key in keys), str(a["outside"]), f"{a['at_limit']:.0%}"]
        for name, a in result.actions.items()
    ]
    return header, rows


def _task_table(result: Audit) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, *(str(task[key]) for key in ("episodes", "frames", "rewarded_episodes"))]
        for name, task in result.tasks.items()
    ]
    return ["task", "episodes", "frames", "episodes with reward"], rows


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    if sys.stdout.isatty():
        table = Table(*header, box=None, header_style="bold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_verdicts(verdicts: list[Verdict]) -> None:
    colors = {"OK": "green", "WARN": "yellow", "ERROR": "bold red"}
    console = Console(highlight=False)
    for verdict in verdicts:
        lead = f"{verdict.level:<5} {verdict.check}: "
        hint = f" -> {verdict.hint}" if verdict.hint else ""
        if console.is_terminal:
            console.print(lead, style=colors[verdict.level], end="", markup=False)
            console.print(verdict.message + hint, markup=False)
        else:
            print(lead + verdict.message + hint)


def sheet(windows: Windows, rows: list[EpisodeRow]) -> np.ndarray:
    """Draw the contact sheet, uint8 [H, W, 3]: episodes as rows, frames across, a bar telling what is known
    of each."""
    contract = windows.contract
    shown = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SHEET_ROWS)).round().astype(int))
    strips = []
    for number in shown:
        row = rows[number]
        frames = np.unique(np.linspace(0, row.frames - 1, min(row.frames, _SHEET_FRAMES)).round().astype(int))
        for camera, images in windows.images.items():
            caption = [f"episode {row.episode}", f"{row.frames} frames, {row.seconds:.1f} s",
                       f"labelled {row.labelled / row.frames:.0%}", ", ".join(row.tasks)]  # fmt: skip
            if any(row.returns):
                caption.append("return " + " ".join(f"{value:.3g}" for value in row.returns))
            if len(windows.images) > 1:
                caption.insert(1, camera)
            index = int(windows.episode_start[number]) + frames
            bars = [_bar_color(windows, images, int(i)) for i in index]
            notes = [f"{frame / contract.rate_hz:.1f} s" for frame in frames]
            strips.append(Strip(np.asarray(images[index]), "\n".join(caption), notes, bars))
    title = f"{windows.root.name}: robot {contract.name}, {len(rows)} episodes, {windows.num_frames} frames"
    if len(shown) < len(rows):
        title += f" ({len(shown)} episodes shown)"
    legend = [("action known", GREEN), ("action unknown", GREY), ("same picture as the frame before", ORANGE)]
    return contact_sheet(strips, title, legend)


def _bar_color(windows: Windows, images: np.ndarray, frame: int) -> Color:
    first = windows.episode_start[windows.episode_index[frame]] == frame
    if not first and np.array_equal(images[frame], images[frame - 1]):
        return ORANGE
    return GREEN if windows.action_mask[frame] else GREY


# ---- command


@dataclass(frozen=True)
class Args:
    """Look through a dataset before training on it: what is in it, what is missing, what is wrong.

    Exit code 0: train on it. 1: training would be wrong, the ERROR lines say why. 2: the command was wrong.
    """

    dataset: Annotated[Path, tyro.conf.Positional]
    """Dataset folder, as d4-ingest wrote it."""
    json: Path | None = None
    """Write everything that was found to this JSON file."""
    sheet: Path | None = None
    """Write a contact sheet to this PNG file: episodes as rows, frames across."""
    cache: Path | None = None
    """Folder of the frame cache (default: <dataset>/cache); training uses the same one."""


def _run(args: Args) -> int:
    for path in (args.json, args.sheet):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    result = audit(args.dataset, args.cache)
    print_audit(result)
    if args.json is not None:
        aside = args.json.with_name(f".tmp-{args.json.name}")
        aside.write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
        os.replace(aside, args.json)
        print(f"written: {args.json}")
    if args.sheet is not None and result.episodes:
        write_png(args.sheet, sheet(Windows(args.dataset, args.cache, strict=False), result.episodes))
        print(f"written: {args.sheet}")
    return result.exit_code


def main() -> None:
    """Entry point of `d4-audit`."""
    run_cli(lambda: _run(tyro.cli(Args, prog="d4-audit")))


if __name__ == "__main__":
    main()
