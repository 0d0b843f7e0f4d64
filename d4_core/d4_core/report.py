"""The report of a run: one HTML page that needs nothing else, and its results as a table for the terminal.

A report shows whatever the run folder holds. What is missing reads "not run"; what cannot be read is named
among the notes. Nothing is computed from weights or data here, so a report can be rewritten anywhere.

From config.yaml come preset, scale, seed and the size of the data (episodes, frames, labelled_share);
machine, date and commit come from the card.md of the last phase.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from d4_core.arguments import PHASES
from d4_core.report_charts import curve_chart, horizon_chart, scatter_chart
from d4_core.stats import bootstrap_mean, paired_difference
from d4_datasets import whole
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

POLICIES = {
    "random": "random actions",
    "data": "what the logs did",
    "bc_scratch": "behaviour cloning without a world model",
    "wm_bc": "behaviour cloning on the world model",
    "imagination": "cloned on the world model, improved in imagination",
    "expert": "scripted, sees the true state",
}
_OTHERS = {  # shown where they were run
    "bc_early": "behaviour cloning without a world model, stopped when held-out commands are known best",
    "vpt": "behaviour cloning, also of actions that an inverse dynamics model guessed",
    "planner": "planning in the world model at every tick",
}
BASELINE, IMPROVED = "wm_bc", "imagination"

# what the loop writes about itself; shown in the table of costs instead of as curves
_COSTS = {
    "wait_s",
    "wait_share",
    "step_s_mean",
    "step_s_median",
    "wall_s",
    "cpu_s",
    "peak_rss_mb",
    "peak_gpu_mb",
}
_MOST_NAMED = 3  # failed gates in the verdict; all of them stand in the table

Interval = tuple[float, float, float]  # mean, low, high
Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # by name: steps, values


@dataclass(frozen=True)
class Result:
    """How a policy did: its return with a 95 % interval, and the share of successes (None: not recorded)."""

    policy: str
    episodes: int
    returns: Interval
    success: float | None


@dataclass
class _Run:
    """Content of a run folder. What is missing is empty."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    contract: Contract | None = None
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)  # config.json
    card: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    gates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    open_loop: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def has(self, phase: str) -> bool:
        """Whether there is any trace of the phase."""
        return any(phase in part for part in (self.phases, self.curves, self.gates))


def write_report(run: Path) -> Path:
    """Write <run>/report.html from what the run folder holds, and return its path.

    The page is one file without any reference to another: styles, charts, pictures and clips are inside.

    Raises:
        UserError: there is no such folder.
    """
    found = _load(run)
    package = resources.files("d4_core")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "duration": _duration, "json": _brief}
    template = environment.from_string((package / "report_template.html").read_text(encoding="utf-8"))
    style = Markup((package / "report_style.css").read_text(encoding="utf-8"))
    page = template.render(style=style, **_view(found))
    path = run / "report.html"
    whole.write(path, page)
    return path


def summary_table(run: Path) -> Table:
    """The results of a run for the terminal: policies, the gain of imagination, and the verdict.

    Raises:
        UserError: there is no such folder.
    """
    found = _load(run)
    caption = verdict(found.gates)[0]
    table = Table(title=f"Results of {run.resolve().name}", caption=caption, title_justify="left")
    table.add_column("policy")
    for name in ("mean return", "95 % interval", "success", "episodes"):
        table.add_column(name, justify="right")
    shown = _results(found)
    if shown is None:
        table.add_row("evaluation", "not run", style="dim")
        return table
    for row in shown["rows"]:
        if row["result"] is None:
            table.add_row(row["name"], "not run", style="dim")
            continue
        mean, low, high = row["numbers"]
        table.add_row(row["name"], mean, f"{low} to {high}", row["success"], str(row["result"].episodes))
    gain = shown["gain"]
    if gain:
        table.add_section()
        interval = f"{gain['low']} to {gain['high']}"
        table.add_row(f"{IMPROVED} - {BASELINE}", gain["mean"], interval, "", "paired", style="bold")
    return table


def verdict(gates: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, str]:
    """One sentence on which gates passed and failed, and its kind: "ok", "failed" or "unknown"."""
    judged = [phase for phase in PHASES if gates.get(phase)]
    entries = [(phase, gate) for phase in judged for gate in gates[phase]]
    if not entries:
        return "No gate was evaluated, so nothing is known about this run.", "unknown"
    failed = [
        f"{phase} {gate.get('name')} ({_number(gate.get('value'))}, needs {_limit(gate)})"
        for phase, gate in entries
        if not gate.get("ok")
    ]
    open_ends = [phase for phase in PHASES if phase not in judged]
    rest = f"; not evaluated: {', '.join(open_ends)}" if open_ends else ""
    count = f"all {len(entries)} gates" if len(entries) > 1 else "the only gate"
    if not failed:
        text = f"{count} passed ({', '.join(judged)}){rest}."
        return text[0].upper() + text[1:], "ok" if not open_ends else "unknown"
    named = ", ".join(failed[:_MOST_NAMED])
    if len(failed) > _MOST_NAMED:
        named += f" and {len(failed) - _MOST_NAMED} more"
    return f"{len(failed)} of {len(entries)} gates failed: {named}{rest}.", "failed"


def results(evaluation: Mapping[str, Any]) -> dict[str, Result]:
    """Results of the policies in eval.json that were run, by name."""
    found = {}
    for name in _policy_names(evaluation):
        entry = evaluation.get("policies", {}).get(name) or {}
        returns, success = entry.get("return"), entry.get("success")
        if returns:
            share = float(np.mean(success)) if success else None
            found[name] = Result(name, len(returns), bootstrap_mean(returns), share)
    return found


def improvement(evaluation: Mapping[str, Any]) -> Interval | None:
    """Return of imagination - wm_bc per episode, with its interval; None unless the episodes are the same."""
    policies = evaluation.get("policies", {})
    improved, baseline = ((policies.get(name) or {}).get("return") or [] for name in (IMPROVED, BASELINE))
    return paired_difference(improved, baseline) if len(improved) == len(baseline) > 0 else None


def _policy_names(evaluation: Mapping[str, Any]) -> list[str]:
    return [*POLICIES, *(name for name in evaluation.get("policies", {}) if name not in POLICIES)]


def _described(name: str) -> str:
    kind = name.removesuffix("_argmax")
    text = (POLICIES | _OTHERS).get(kind, "")
    return f"{text}; likeliest actions" if text and kind != name else text


# ---- reading the run folder


def _load(path: Path) -> _Run:
    if not path.is_dir():
        raise UserError(f"there is no run folder {path}: give the folder that d4-train wrote to")
    run = _Run(path)
    run.config = _read(run, "config.yaml", dict)
    run.gates = {phase: gates for phase, gates in _read(run, "gates.json", dict).items() if gates}
    run.evaluation = _read(run, "eval.json", dict)
    run.open_loop = _read(run, "media/open_loop.json", dict)
    run.captions = _read(run, "media/captions.json", dict)
    run.notes = _read(run, "notes.json", list)
    run.curves = _curves(path / "metrics.jsonl")
    others = [name for name in run.curves if name not in PHASES]  # baselines train with the same loop
    for phase in (*others, *PHASES):
        config = _read(run, f"{phase}/config.json", dict)
        if config:
            run.phases[phase] = config
            run.card |= _card(path / phase / "card.md")
    run.contract = _contract(run)
    return run


def _read(run: _Run, name: str, kind: type) -> Any:
    """Content of a JSON or YAML file; empty if it is missing or, which is then a problem to tell, broken."""
    path = run.path / name
    if not path.exists():
        return kind()
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        value = None
    if isinstance(value, kind):
        return value
    run.problems.append(f"{name} could not be read and is left out.")
    return kind()


def _contract(run: _Run) -> Contract | None:
    for path in (run.path / "contract.yaml", *(run.path / phase / "contract.yaml" for phase in run.phases)):
        if path.exists():
            try:
                return Contract.load(path)
            except UserError as error:
                run.problems.append(f"{error}.")
    return None


def _card(path: Path) -> dict[str, str]:
    """The facts of a card.md: its rows of two cells."""
    if not path.exists():
        return {}
    return dict(re.findall(r"^\| ([\w ]+) \| (.+) \|$", path.read_text(encoding="utf-8"), re.MULTILINE))


def _curves(path: Path) -> dict[str, Curves]:
    """metrics.jsonl by phase; a last line that a kill cut short is skipped."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
            phase, step, _ = entry.pop("phase"), entry.pop("step"), entry.pop("time", None)
        except (ValueError, KeyError, AttributeError):
            continue
        for name, value in entry.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(phase, {}).setdefault(name, []).append((step, value))
    return {
        phase: {name: (np.array(p)[:, 0], np.array(p)[:, 1]) for name, p in named.items()}
        for phase, named in points.items()
    }


# ---- what the template shows


def _view(run: _Run) -> dict[str, Any]:
    sentence, kind = verdict(run.gates)
    table = _results(run)
    return {
        "name": run.path.resolve().name,
        "title": run.contract.name if run.contract else run.path.resolve().name,
        "verdict": sentence, "verdict_kind": kind,
        "tiles": _tiles(run, table), "phases": [_phase(run, phase) for phase in PHASES],
        "others": [_phase(run, name) for name in run.curves if name not in PHASES], "facts": _facts(run),
        "contract": run.contract, "results": table, "tasks": _tasks(run), "charts": _charts(run),
        "strips": _media(run, "*.png", "image/png"), "videos": _media(run, "*.mp4", "video/mp4"),
        "notes": [*map(str, run.notes), *run.problems],
    }  # fmt: skip


def _facts(run: _Run) -> list[tuple[str, str]]:
    config, seeds = run.config, run.evaluation.get("seeds")
    scale = config.get("scale", 1)
    found = {
        "Data": _data(run),
        "Machine": run.card.get("machine"),
        "Date": run.card.get("date"),
        "Commit": run.card.get("commit"),
        "Preset": config.get("preset") if scale == 1 else f"{config.get('preset')}, steps x {_number(scale)}",
        "Training seed": config.get("seed"),
        "Evaluation seeds": f"{seeds[0]} to {seeds[-1]}" if seeds else None,
    }
    return [(name, "not recorded" if value is None else str(value)) for name, value in found.items()]


def _data(run: _Run) -> str | None:
    frames = run.config.get("frames")
    if not frames:
        return None
    time = f"{_duration(frames / run.contract.rate_hz)}, " if run.contract else ""
    return (
        f"{_number(run.config.get('episodes'))} episodes, {_number(frames)} frames, {time}"
        f"{_share(run.config.get('labelled_share'))} of the frames with known actions"
    )


def _tiles(run: _Run, table: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """The headline numbers: what, value, how it is meant."""
    gates = [gate for phase in PHASES for gate in run.gates.get(phase, [])]
    rows = {row["name"]: row for row in table["rows"]} if table else {}
    trained = [run.phases[phase] for phase in PHASES if phase in run.phases]
    wall = sum(config.get("metrics", {}).get("wall_s", 0.0) for config in trained)
    tiles = []
    if table and table["gain"]:
        gain = table["gain"]
        meaning = f"return per episode, {gain['low']} to {gain['high']}"
        tiles.append(("Gain from imagination", gain["mean"], meaning))
    if rows and rows[IMPROVED]["result"]:
        meaning = f"after imagination; the logs: {rows['data']['success']}"
        tiles.append(("Success", rows[IMPROVED]["success"], meaning))
    if gates:
        passed = sum(bool(gate.get("ok")) for gate in gates)
        tiles.append(("Gates", f"{passed} / {len(gates)}", "passed"))
    if wall:
        tiles.append(("Training", _duration(wall), f"wall time of {len(trained)} of {len(PHASES)} phases"))
    return tiles


def _phase(run: _Run, name: str) -> dict[str, Any]:
    """One phase: its state, gates, costs and curves."""
    config, curves = run.phases.get(name, {}), run.curves.get(name, {})
    costs = {key: values[-1] for key, (_, values) in curves.items()} | config.get("metrics", {})
    step, total = config.get("step"), config.get("total_steps")
    if not run.has(name):
        state = "not run"
    elif config.get("status") == "done":
        state = "done"
    else:
        state = f"stopped at step {_number(step)} of {_number(total)}" if config else "not finished"
    gates = [{**gate, "text": _limit(gate), **_explanation(gate)} for gate in run.gates.get(name, [])]
    return {
        "name": name, "state": state, "gates": gates, "failed": sum(not gate.get("ok") for gate in gates),
        "steps": step, "costs": costs,
        "panels": [
            curve_chart(key, *curves[key])
            for key in sorted(curves, key=lambda key: key == "frames_per_s")  # throughput last
            if key not in _COSTS
        ],
    }  # fmt: skip


def _explanation(gate: Mapping[str, Any]) -> dict[str, Any]:
    """The hint of a gate that failed, and its details, among them the hint of one that passed."""
    hint, detail = gate.get("hint") or "", gate.get("detail") or {}
    if gate.get("ok") and hint:
        return {"hint": "", "detail": {**detail, "if it fails": hint}}
    return {"hint": hint, "detail": detail}


def _results(run: _Run) -> dict[str, Any] | None:
    """Rows of the result table with positions (percent) on a common axis."""
    known = results(run.evaluation)
    if not known:
        return None
    ends = [edge for result in known.values() for edge in result.returns]
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(min(0.0, *ends), max(0.0, *ends))
    low, high = ticks[0], max(0.0, ticks[-2], *ends)  # the last tick may lie far beyond the last interval
    span = high - low
    digits = int(np.clip(2 - math.floor(math.log10(span)), 0, 4))
    rows = []
    for name in _policy_names(run.evaluation):
        result = known.get(name)
        rows.append({
            "name": name, "text": _described(name), "result": result,
            "numbers": [f"{v:.{digits}f}" for v in result.returns] if result else [],
            "at": [100 * (v - low) / span for v in result.returns] if result else [],
            "success": _share(result.success) if result else "not run",
        })  # fmt: skip
    gain = improvement(run.evaluation)
    return {
        "rows": rows, "ticks": [(f"{t:g}", 100 * (t - low) / span) for t in ticks if t <= high],
        "gain": gain and _gain(gain, digits),
        "baseline": BASELINE, "improved": IMPROVED,
    }  # fmt: skip


def _gain(gain: Interval, digits: int) -> dict[str, str]:
    mean, low, high = (f"{v:+.{digits}f}" for v in gain)
    if gain[1] > 0:
        meaning, kind = "imagination training made the policy better", "ok"
    elif gain[2] < 0:
        meaning, kind = "imagination training made the policy worse", "failed"
    else:
        meaning, kind = "no difference can be told from zero", "unknown"
    return {"mean": mean, "low": low, "high": high, "meaning": meaning, "kind": kind}


def _tasks(run: _Run) -> dict[str, Any] | None:
    """Success per task (rows) and policy (columns); None where no policy noted the task of its episodes."""
    names = run.evaluation.get("task_names", [])
    shares: dict[str, list[float | None]] = {}
    for policy in results(run.evaluation):
        entry = run.evaluation["policies"][policy]
        if entry.get("task") and entry.get("success"):
            task, success = np.array(entry["task"]), np.array(entry["success"], np.float64)
            shares[policy] = [
                float(success[task == q].mean()) if q in task else None for q in range(len(names))
            ]
    if not shares or len(names) < 2:
        return None
    rows = [
        (name, [(share[q], _share(share[q])) for share in shares.values()]) for q, name in enumerate(names)
    ]
    return {"policies": list(shares), "rows": rows}


def _media(run: _Run, pattern: str, kind: str) -> list[dict[str, str]]:
    found = []
    for path in sorted((run.path / "media").glob(pattern)):
        caption = str(run.captions.get(path.name, path.stem.replace("_", " ").replace("-", " ")))
        data = base64.b64encode(path.read_bytes()).decode()
        found.append({"name": path.name, "caption": caption, "url": f"data:{kind};base64,{data}"})
    return found


def _charts(run: _Run) -> list[Markup]:
    """How far the world model holds: against the horizon, and its returns against the real ones."""
    pairs = run.evaluation.get("policies", {}).get("imagination", {}).get("first_ticks")
    return _open_loop(run) + ([scatter_chart(pairs["real"], pairs["imagined"])] if pairs else [])


def _open_loop(run: _Run) -> list[Markup]:
    """Open-loop error and PSNR, each beside its baselines."""
    horizons = run.open_loop.get("horizons")
    probe = run.open_loop.get("probe", "position")
    units = (
        {u for v in run.contract.vectors("probe") if v.name == probe for u in v.units}
        if run.contract
        else set()
    )
    unit = f" ({units.pop()})" if len(units) == 1 else ""
    quantities = {
        "position": f"Error of {probe}{unit}, lower is better",
        "psnr": "PSNR (dB), higher is better",
    }
    return [
        horizon_chart(title, horizons, run.open_loop[key])
        for key, title in quantities.items()
        if horizons and run.open_loop.get(key)
    ]


# ---- numbers as text


def _number(value: Any) -> str:
    """Three significant digits, thousands separated; n/a for what is not a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "n/a"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f}\u00a0%"  # not to be broken over two lines


def _limit(gate: Mapping[str, Any]) -> str:
    return f"{gate.get('op', '')} {_number(gate.get('limit'))}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _brief(value: Any) -> str:
    """A JSON value with rounded numbers, on one line."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_brief(v)}" for key, v in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    return str(value)
