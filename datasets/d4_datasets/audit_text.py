"""An audit on the terminal: tables where a person reads, plain aligned lines in a file or pipe."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from d4_datasets.checks.base import size_text

Found = dict[str, Any]  # an audit as plain data
Cells = tuple[list[str], list[list[str]]]  # header, rows

_EPISODES = 40  # listed on screen, all are in the JSON
_COLORS = {"OK": "green", "WARN": "yellow", "ERROR": "bold red"}


def show(found: Found) -> None:
    """Print an audit to stdout."""
    summary = found["summary"]
    line = f"{found['dataset']}: {summary['episodes']} episodes, {summary['frames']} frames"
    if not summary["frames"]:
        print(line)
        _print_verdicts(found["verdicts"])
        return
    print(f"{line}, {summary['hours']:.3g} h at {summary['rate_hz']:g} Hz, robot {summary['robot']}")
    _print_table(*episode_cells(found["episodes"], _EPISODES))
    if len(found["episodes"]) > _EPISODES:
        print(f"{_EPISODES} of {len(found['episodes'])} episodes, those with most findings; all: --json")
    for cells in (camera_cells(found), action_cells(found), task_cells(found), preset_cells(found)):
        if cells[1]:
            print()
            _print_table(*cells)
    print()
    _print_verdicts(found["verdicts"])


def episode_cells(rows: list[Found], most: int) -> Cells:
    """Of the `most` episodes with most findings."""

    def findings(row: Found) -> float:
        holes = row["unlabelled_run"] if row["labelled"] else 0
        return sum((row[key] for key in ("repeated", "stale", "dropped", "dark", "flat")), holes)

    worst = sorted(rows, key=findings, reverse=True)[:most]
    header = ["episode", "frames", "s", "labelled", "unlabelled run", "stale", "dropped", "gap s", "repeated"]
    header += ["longest", "dark", "flat", "end", "task", "return"]
    return header, [_episode(row) for row in sorted(worst, key=lambda row: row["episode"])]


def _episode(row: Found) -> list[str]:
    gap = "" if row["gap_s"] is None else f"{row['gap_s']:.1f}"
    return [
        str(row["episode"]), str(row["frames"]), f"{row['seconds']:.1f}",
        f"{row['labelled'] / row['frames']:.0%}",
        *(str(row[key]) for key in ("unlabelled_run", "stale", "dropped")), gap,
        *(str(row[key]) for key in ("repeated", "longest_repeat", "dark", "flat")),
        "terminal" if row["terminal"] else "", " ".join(row["tasks"]),
        " ".join(f"{value:.3g}" for value in row["returns"]),
    ]  # fmt: skip


def camera_cells(found: Found) -> Cells:
    """Cameras, and by how many frames each follows the commands."""
    header = ["camera", "distinct Hz", "repeated", "longest run", "frozen episodes", "dark", "overexposed"]
    header += ["one colour", "lag, frames", "confidence"]
    rows = []
    for name, c in found["cameras"].items():
        lag = found["lag"]["cameras"].get(name, {"frames": None})
        known = lag["frames"] is not None
        rows.append([
            name, f"{c['distinct_hz']:.1f}", f"{c['repeated']:.1%}", str(c["longest_repeat"]),
            str(c["frozen_episodes"]), *(f"{c[key]:.1%}" for key in ("dark", "bright", "flat")),
            f"{lag['frames']} ({lag['low']} to {lag['high']})" if known else "unknown",
            f"{lag['confidence']:.0%}" if known else "",
        ])  # fmt: skip
    return header, rows


def action_cells(found: Found) -> Cells:
    """Action components."""
    header = ["action", "min", "max", "mean", "std", "low", "high", "outside", "used", "at limit", "held"]
    rows = [
        [name, *(f"{a[key]:.4g}" for key in ("min", "max", "mean", "std", "low", "high")), str(a["outside"]),
         *(f"{a[key]:.0%}" for key in ("used", "at_limit", "held"))]
        for name, a in found["actions"].items()
    ]  # fmt: skip
    return header, rows


def task_cells(found: Found) -> Cells:
    """Tasks and what they pay."""
    header = ["task", "episodes", "frames", "episodes with reward", "frames that pay", "reward", "return"]
    rows = []
    for name, t in found["tasks"].items():
        paid = "min" in t
        rows.append([
            name, *(str(t[key]) for key in ("episodes", "frames", "rewarded_episodes")),
            f"{t['paid']:.1%}" if paid else "", f"{t['min']:.3g} to {t['max']:.3g}" if paid else "",
            f"{t['return_min']:.3g} to {t['return_max']:.3g}" if paid else "",
        ])  # fmt: skip
    return header, rows


def preset_cells(found: Found) -> Cells:
    """Presets, and what each takes to train on this machine."""
    header = ["preset", "parameters", "memory", "time here", "each frame", "disk", "of it latents"]
    header += ["checkpoints"]
    held = found["room"].get("disk_bytes", 0) + found["room"].get("cache_bytes", 0)
    rows = []
    for p in found["presets"]:
        if "reason" in p:
            rows.append([p["preset"], f"does not fit: {p['reason']}", *[""] * (len(header) - 2)])
            continue
        latents, saved = p["latents_bytes"], p["checkpoints_bytes"]
        rows.append([
            p["preset"], _count(p["parameters"]), size_text(p["train_bytes"]), time_text(p["total_seconds"]),
            f"{_count(p['seen'])} times", *map(size_text, (held + latents + saved, latents, saved)),
        ])  # fmt: skip
    return header, rows


def _count(value: float) -> str:
    """Three digits and a unit: 48.7 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def time_text(seconds: float) -> str:
    """Two digits and a unit: 12 min, 3.4 days."""
    for limit, unit in ((31_557_600, "years"), (86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{float(f'{seconds / limit:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


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


def _print_verdicts(verdicts: list[Found]) -> None:
    console = Console(highlight=False)
    for verdict in verdicts:
        lead = f"{verdict['level']:<5} {verdict['check']}: "
        hint = f" -> {verdict['hint']}" if verdict["hint"] else ""
        if console.is_terminal:
            console.print(lead, style=_COLORS[verdict["level"]], end="", markup=False)
            console.print(verdict["message"] + hint, markup=False)
        else:
            print(lead + verdict["message"] + hint)
