"""An audit as one HTML page that needs nothing else: findings first, then pictures, histograms and curves."""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from d4_datasets.audit_pictures import faults, sheet
from d4_datasets.audit_text import action_cells, camera_cells, episode_cells, preset_cells, task_cells
from d4_datasets.charts import bars, curve, lag_chart
from d4_datasets.checks.base import size_text
from d4_datasets.pictures import png_bytes
from d4_datasets.windows import Windows

Found = dict[str, Any]  # an audit as plain data
Chart = dict[str, Any]  # title, picture, note

_ORDER = ("ERROR", "WARN", "OK")
_EPISODES = 100  # rows of the table
_BINS = 30
_TRAINING = (
    "What each preset takes on the machine of this audit, right within a factor of two; gates come on top. "
    "Disk is the dataset, its frame cache, latents and checkpoints"
)
_SATURATED = 0.05  # share of the frames at a limit from which its bars are marked


def page(found: Found, windows: Windows | None) -> str:
    """The page of an audit (as plain data); `windows` gives the pictures, None for an empty dataset."""
    package = resources.files("d4_datasets")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((package / "audit_page.html").read_text(encoding="utf-8"))
    style = Markup((package / "audit_page.css").read_text(encoding="utf-8"))
    kind, sentence = _verdict(found["verdicts"])
    pictures = windows is not None and windows.images
    fault = faults(windows, found["cameras"]) if windows is not None and pictures else None
    return template.render(
        style=style, found=found, title=found["summary"].get("robot", "an empty dataset"), kind=kind,
        sentence=sentence, verdicts=sorted(found["verdicts"], key=lambda v: _ORDER.index(v["level"])),
        tiles=_tiles(found) if windows is not None else [],
        sheet=_image(sheet(windows, found["episodes"])) if windows is not None and pictures else None,
        faults=None if fault is None else _image(fault),
        sections=_sections(found) if windows is not None else [],
    )  # fmt: skip


def _verdict(verdicts: list[Found]) -> tuple[str, str]:
    """(level, sentence) of the whole."""
    count = {level: sum(v["level"] == level for v in verdicts) for level in _ORDER}
    if count["ERROR"]:
        return "ERROR", f"Training on this would be wrong: {_count(count['ERROR'], 'error')}."
    if count["WARN"]:
        return "WARN", f"Nothing forbids training; {_count(count['WARN'], 'warning')} to look at first."
    return "OK", "Nothing was found that would spoil training."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _image(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()


def _tiles(found: Found) -> list[tuple[str, str, str]]:
    """The headline numbers: what, value, how it is meant."""
    summary, times, room = found["summary"], found["times"], found["room"]
    seconds = 3600 * summary["hours"]
    length = f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"
    length = f"{summary['hours']:.3g} h" if seconds >= 7200 else length
    return [
        ("Recorded", length, f"{summary['frames']:,} frames, {_count(summary['episodes'], 'episode')}"),
        ("Rate", f"{times['achieved_hz']:.3g} Hz", f"reached, {times['rate_hz']:g} Hz claimed"),
        ("Labelled", f"{found['labels']['frames']:.0%}", "of the frames have a known action"),
        ("Recordings", str(summary["recordings"]), f"{times['gaps']} gaps within them"),
        ("Disk", size_text(room["disk_bytes"] + room["cache_bytes"]), "with the frame cache"),
    ]  # fmt: skip


def _sections(found: Found) -> list[Found]:
    """Everything below the pictures."""
    sections = [
        _section("Cameras", _camera_charts(found), camera_cells(found), "Cameras"),
        _section("From command to picture", _lag_charts(found), text=_lag_text(found)),
        _section("Commands", _action_charts(found), action_cells(found), "Shares are of the labelled frames"),
        _section("Tasks and rewards", _return_charts(found), task_cells(found), "Tasks"),
        _section("Along the dataset", _along_charts(found), text="From first to last frame.", layout="wide"),
        _section("Training", [], preset_cells(found), _TRAINING),
        _section("Episodes", _episode_charts(found), episode_cells(found["episodes"], _EPISODES),
                 f"The {min(_EPISODES, len(found['episodes']))} with most findings"),
    ]  # fmt: skip
    return [section for section in sections if section["charts"] or section["cells"] or section["text"]]


def _section(
    title: str,
    charts: list[Chart],
    cells: Any = None,
    caption: str = "",
    text: str = "",
    layout: str = "panels",
) -> Found:
    shown = cells if cells and cells[1] else None
    return {
        "title": title,
        "charts": charts,
        "cells": shown,
        "caption": caption,
        "text": text,
        "layout": layout,
    }


def _chart(title: str, picture: Markup, note: str = "") -> Chart:
    return {"title": title, "picture": picture, "note": note}


def _camera_charts(found: Found) -> list[Chart]:
    return [
        _chart(f"{name}: brightness of its frames",
               bars(c["brightness_histogram"], ("dark", "bright"), f"brightness of {name}"))
        for name, c in found["cameras"].items()
    ]  # fmt: skip


def _lag_charts(found: Found) -> list[Chart]:
    expected, charts = found["lag"]["expected"], []
    for name, c in found["lag"]["cameras"].items():
        if c["frames"] is None:
            continue
        values = {int(lag): value for lag, value in c["curve"].items()}
        picture = lag_chart(
            values, c["frames"], (c["low"], c["high"]), expected, f"correlation by lag of {name}"
        )
        note = f"best: {c['frames']}, 90% interval {c['low']} to {c['high']}, from {c['used']:,} frames"
        charts.append(_chart(f"{name}: correlation by lag in frames", picture, note))
    return charts


def _lag_text(found: Found) -> str:
    """What the charts mean, and why one may be missing."""
    text = (
        "How well the motion of the picture is predicted from the command given so many frames before. "
        "A best lag below the expected one means that pictures move before their commands: stamps are wrong."
    )
    missing = [
        f"{name}: {c['reason']}." for name, c in found["lag"]["cameras"].items() if c["frames"] is None
    ]
    return " ".join([text] * (len(missing) < len(found["lag"]["cameras"])) + missing)


def _action_charts(found: Found) -> list[Chart]:
    charts = []
    for name, a in found["actions"].items():
        values = a["histogram"]
        saturated = a["at_limit"] > _SATURATED and not a["discrete"]
        marked = dict.fromkeys((0, len(values) - 1), "--s2") if saturated else {}
        ticks = [str(i) for i in range(len(values))] if a["discrete"] and len(values) <= 16 else []
        picture = bars(values, (f"{a['low']:g}", f"{a['high']:g}"), f"histogram of {name}", ticks, marked)
        note = f"uses {a['used']:.0%} of its range, at a limit in {a['at_limit']:.0%} of the frames"
        charts.append(_chart(name, picture, note))
    return charts


def _return_charts(found: Found) -> list[Chart]:
    charts = []
    for i, (name, t) in enumerate(found["tasks"].items()):
        returns = [row["returns"][i] for row in found["episodes"] if i < len(row["returns"])]
        if t["rewarded_episodes"]:
            charts.append(
                _chart(f"{name}: return of the episodes", _histogram(returns, f"returns of {name}"))
            )
    return charts


def _episode_charts(found: Found) -> list[Chart]:
    seconds = [row["seconds"] for row in found["episodes"]]
    charts = [_chart("Length of the episodes, s", _histogram(seconds, "length of the episodes"))]
    shares = [row["labelled"] / row["frames"] for row in found["episodes"]]
    counts, _ = np.histogram(shares, 10, (0, 1))
    charts.append(
        _chart("Labelled share of the episodes", bars(counts.tolist(), ("0", "1"), "labelled shares"))
    )
    hours = found["times"]["hours_utc"]
    if any(hours):
        picture = bars(hours, ("0 h", "23 h"), "frames by hour of the day")
        charts.append(
            _chart("Time of day, UTC", picture, f"{found['times']['first']} to {found['times']['last']}")
        )
    return charts


def _histogram(values: list[float], label: str) -> Markup:
    counts, edges = np.histogram(values, _BINS)
    return bars(counts.tolist(), (f"{edges[0]:.3g}", f"{edges[-1]:.3g}"), label)


def _along_charts(found: Found) -> list[Chart]:
    """Labels, brightness and motion over the dataset."""
    charts = []
    for name, values in found["along"].items():
        what, _, camera = name.partition("/")
        high = {"labels": 1.0, "brightness": 255.0}.get(what, max([*values, 1e-6]))
        title = f"{camera}: {what}" if camera else "labelled share"
        charts.append(_chart(title, curve(values, title, 0.0, high)))
    return charts
