"""The page of the Crafter experiment: milestones of every policy, in the form of the paper's tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_core.stats import Interval, crossed_mean, crossed_rate, few_mean, student, widest, wilson
from d4_sim.chains import STARTS, scaled
from d4_sim.crafter.milestones import LADDER, MILESTONES, crafter_score
from d4_sim.crafter.world import CHAIN, HORIZON
from d4_sim.evaluate import first_start
from d4_sim.stages import clock
from d4_sim.study_page import costs
from d4_sim.study_results import on_starts, read_json, rows_of, run_results
from d4_sim.tables import spread, table

if TYPE_CHECKING:
    from d4_sim.crafter.experiment import Args

# The columns of the paper's table, in its order; what frames them comes first and last.
COLUMNS = {
    "random": "random", "data": "data", "bc_scratch": "BC", "vpt": "VPT style", "wm_bc": "WM+BC",
    "imagination": "imagination RL", "expert": "expert",
}  # fmt: skip
EQUAL_STEPS = 60_000  # of both networks of the VPT style take the compute of a whole chain of `nano`
GIVEN = ("random", "data", "expert")  # the same whatever was trained
PAIRS = (("imagination", "wm_bc"), ("wm_bc", "bc_scratch"), ("wm_bc", "vpt"))


def reached(row: Mapping[str, Any], milestone: int) -> np.ndarray:
    """0 or 1 per episode: whether a milestone was reached."""
    return np.array([float(first[milestone] is not None) for first in row["first"]])


def success(chains: Mapping[str, Any], policy: str, milestone: int) -> Interval | None:
    """Per cent of the episodes that reach a milestone: the widest of the interval over seeds and episodes, a
    Wilson interval of the starts, and the t interval over seeds.
    """
    groups = [reached(row, milestone) for row in rows_of(chains, policy).values()]
    if not groups:
        return None
    return _per_cent(_rate(groups))


def _rate(groups: Sequence[np.ndarray]) -> Interval:
    """Share of ones in groups that share their starts, with the widest of the three intervals."""
    rate = crossed_rate(groups)
    if len(groups) > 1:
        rate = widest(rate, student([float(group.mean()) for group in groups]))
    return rate[0], max(0.0, rate[1]), min(1.0, rate[2])


def ticks(chains: Mapping[str, Any], policy: str, milestone: int) -> Interval | None:
    """Mean ticks to a milestone over the episodes that reach it, with an interval over these; None below half
    a per cent of them.
    """
    rows = list(rows_of(chains, policy).values())
    found = [first[milestone] for row in rows for first in row["first"] if first[milestone] is not None]
    count = sum(len(row["first"]) for row in rows)
    return few_mean(found) if found and len(found) >= 0.005 * count else None


def gain(chains: Mapping[str, Any], a: str, b: str, milestone: int) -> dict[str, Interval] | None:
    """Paired difference in per cent, over seeds and episodes and as a t interval of the seeds' means.

    Where nobody, or everybody, succeeds both are as wide as what the number of starts leaves possible.
    """
    first, second = rows_of(chains, a), rows_of(chains, b)
    gains = [
        100 * (reached(first[s], milestone) - reached(second[s], milestone)) for s in first if s in second
    ]
    if not gains:
        return None
    out = {"both": crossed_mean(gains)}
    if len(gains) > 1:
        out["student"] = student([float(g.mean()) for g in gains])
    if not any(g.any() for g in gains):
        left = 100 * wilson(0, min(map(len, gains)))[2]
        out = dict.fromkeys(out, (0.0, -left, left))
    return out


def collect(out: Path, world: str, seeds: int) -> dict[str, Any]:
    """Every number of the experiment as JSON values.

    Keys: `ladder` {seed: milestones.json}, `chains` {world: {seed: run}}, `stages` {name: seconds}.
    """
    runs = {str(s): out / f"seed-{s}" / "run" for s in range(seeds)}
    first = first_start(STARTS)
    ladder = {s: on_starts(run / "milestones.json", first) for s, run in runs.items()}
    tasks = {s: run_results(run, first) for s, run in runs.items()}
    done = read_json(out / "stages.json") or {}
    return {
        "ladder": {s: found for s, found in ladder.items() if found},
        "chains": {world: {s: found for s, found in tasks.items() if found}},
        "stages": {name: entry["seconds"] for name, entry in done.items() if entry["done"]},
        "runs": {},
    }


def milestones(chains: Mapping[str, Any]) -> Iterator[str]:
    """Success, then time, per milestone and policy."""
    shown = [p for p in COLUMNS if rows_of(chains, p)]
    order = [*CHAIN, *(m for m in MILESTONES if m not in CHAIN)]
    numbers = {m: MILESTONES.index(m) for m in order}
    yield "## Milestones: per cent of episodes\n"
    yield (
        f"Every episode is played with the ladder of prompts ({len(LADDER)} rungs); mean [the widest of "
        "three 95 % intervals: over seeds and episodes, a Wilson interval of the starts, and the t interval "
        "over seeds]. All seeds were trained on one recording and its labels, whose chance is in no "
        "interval. The last three are not asked for.\n"
    )
    cells = {(p, m): success(chains, p, i) for p in shown for m, i in numbers.items()}
    yield table(
        ["milestone", *_heads(shown, chains)],
        [[m, *(_percent(cells[p, m]) for p in shown)] for m in order],
    )
    yield "## Ticks to a milestone\n"
    yield "Mean over the episodes that reach it [95 % interval over these]; left out below 0.5 %.\n"
    times = {(p, m): ticks(chains, p, i) for p in shown for m, i in numbers.items()}
    yield table(
        ["milestone", *_heads(shown, chains)],
        [[m, *(_time(times[p, m]) for p in shown)] for m in order],
    )
    yield from achievements(chains, shown)
    yield "## Whole episodes\n"
    yield table(
        ["policy", "milestones per episode", "ticks", "deaths, per cent", "episodes"],
        [[COLUMNS[p], *_whole(list(rows_of(chains, p).values()))] for p in shown],
    )


def achievements(chains: Mapping[str, Any], shown: Sequence[str]) -> Iterator[str]:
    """All 22 achievements of the game, of which the milestones are 13, and the game's own score."""
    rows = {p: [row for row in rows_of(chains, p).values() if "achievements" in row] for p in shown}
    rows = {p: found for p, found in rows.items() if found}
    if not rows:
        return
    names = list(next(iter(rows.values()))[0]["achievements"])
    yield "## All 22 achievements: per cent of episodes\n"
    yield (
        "Also those that nobody is asked for. The score is that of Crafter's paper, exp(mean(ln(1 + s))) - 1 "
        f"over the 22 rates s in per cent, seed by seed; episodes end after {HORIZON} ticks here and after "
        "10000 there, so it compares with none published.\n"
    )
    cells = [
        [name, *(f"{100 * np.mean(_shares(found, name)):.0f}" for found in rows.values())] for name in names
    ]
    scores = {p: [crafter_score([_shares([row], n)[0] for n in names]) for row in rows[p]] for p in rows}
    cells.append(["**score**", *(_scores(found) for found in scores.values())])
    yield table(["achievement", *(COLUMNS[p] for p in rows)], cells)


def _heads(shown: Sequence[str], chains: Mapping[str, Any]) -> list[str]:
    """Names of columns; they say of how many seeds a trained policy is if that is not all."""
    counts = {p: len(rows_of(chains, p)) for p in shown}
    return [
        COLUMNS[p] + (f" ({n} of {len(chains)} seeds)" if p not in GIVEN and n < len(chains) else "")
        for p, n in counts.items()
    ]


def _shares(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Share of the episodes with an achievement, row by row."""
    return [float(np.mean(np.array(row["achievements"][name]) > 0)) for row in rows]


def _scores(found: Sequence[float]) -> str:
    each = ", ".join(f"{score:.1f}" for score in found)
    return f"{np.mean(found):.1f} ({each})" if len(found) > 1 else each


def _time(value: Interval | None) -> str:
    return "-" if value is None else spread((value[0], max(0.0, value[1]), value[2]), 0)


def _per_cent(share: Interval) -> Interval:
    mean, low, high = (100 * x for x in share)
    return mean, low, high


def _percent(value: Interval | None) -> str:
    return "-" if value is None else spread(value, 0)


def _whole(rows: list[Mapping[str, Any]]) -> list[str]:
    return [
        spread(crossed_mean([row["return"] for row in rows])),
        f"{np.mean([t for row in rows for t in row['ticks']]):.0f}",
        f"{100 * np.mean([f for row in rows for f in row['fallen']]):.0f}",
        " + ".join(str(len(row["first"])) for row in rows),
    ]


def differences(chains: Mapping[str, Any]) -> Iterator[str]:
    """Paired differences on the same starts, per milestone."""
    pairs = [pair for pair in PAIRS if all(rows_of(chains, p) for p in pair)]
    if not pairs:
        return
    yield "## Paired differences, percentage points\n"
    yield "Same starts; interval over seeds and episodes, then the t interval of the seeds' means.\n"
    rows = []
    for m in CHAIN:
        found = [gain(chains, *pair, MILESTONES.index(m)) for pair in pairs]
        rows.append([m, *(_gain(f) for f in found)])
    yield table(["milestone", *(f"{COLUMNS[a]} - {COLUMNS[b]}" for a, b in pairs)], rows)


def _gain(found: Mapping[str, Interval] | None) -> str:
    if found is None:
        return "-"
    more = f"; {spread(found['student'], 0, sign=True)}" if "student" in found else ""
    return spread(found["both"], 0, sign=True) + more


def single_tasks(chains: Mapping[str, Any]) -> Iterator[str]:
    """Episodes with one prompt from beginning to end, and what the heads said."""
    shown = [p for p in COLUMNS if rows_of(chains, p)]
    if not shown:
        return
    yield "## One prompt for the whole episode: per cent that do it\n"
    rows = []
    for i, name in enumerate(MILESTONES):
        cells = []
        for p in shown:
            groups = [
                np.asarray(row["success"], float)[np.asarray(row["task"]) == i]
                for row in rows_of(chains, p).values()
            ]
            cells.append(_percent(_per_cent(_rate(groups))) if all(map(len, groups)) else "-")
        rows.append([name, *cells])
    yield table(["task", *_heads(shown, chains)], rows)
    keys = ("reward_correlation", "value_correlation", "kl_to_cloned")
    heads = [
        [s, COLUMNS[p], *(f"{row[k]:.3f}" if row.get(k) is not None else "-" for k in keys)]
        for p in ("wm_bc", "imagination")
        for s, row in rows_of(chains, p).items()
    ]
    if heads:
        yield "### The heads on real episodes\n"
        header = ["seed", "policy", "reward correlation", "value correlation", "KL to the clone"]
        yield table(header, heads)


def pseudo_labels(chains: Mapping[str, Any]) -> Iterator[str]:
    """How good the labels were that VPT's policy was cloned from."""
    found = {s: row["idm"] for s, row in rows_of(chains, "vpt").items() if row.get("idm", {}).get("frames")}
    if found:
        yield "### Pseudo-labels of the VPT style, on held-out known commands\n"
        cells = [[s, f"{100 * i['accuracy']:.0f}", f"{i['nats']:.2f}", i["frames"]] for s, i in found.items()]
        yield table(["seed", "right, per cent", "surprise, nats", "frames"], cells)


def gates(runs: Mapping[str, Any]) -> Iterator[str]:
    """Every gate of every seed."""
    rows: dict[str, dict[str, str]] = {}
    for s, run in runs.items():
        for phase, found in run.get("gates", {}).items():
            for gate in found:
                mark = "" if gate["ok"] else " (failed)"
                rows.setdefault(f"{phase}: {gate['name']}", {})[s] = f"{gate['value']:.3g}{mark}"
    if rows:
        yield "## Gates\n"
        yield table(
            ["gate", *(f"seed {s}" for s in runs)],
            [[name, *(row.get(s, "-") for s in runs)] for name, row in rows.items()],
        )


def write_page(out: Path, args: Args) -> Path | None:
    """Write <out>/page.md and <out>/results.json; None if there are no results yet."""
    results = collect(out, args.world, args.seeds)
    tasks = results["chains"][args.world]
    if not results["ladder"] and not tasks:
        return None
    steps = args.scratch_steps
    equal = args.preset == "nano" and steps >= EQUAL_STEPS
    compute = "each with the compute of a chain" if equal else "with other compute than a chain has"
    about = (
        f"World `{args.world}`; {args.episodes} recorded episodes, commands kept in {args.labelled:.0%} of "
        f"the bags; networks `{args.preset}` set as docs/crafter.md says, training x {args.scale:g}; BC "
        f"{scaled(2 * steps, args.scale)} steps and both networks of the VPT style "
        f"{scaled(steps, args.scale)}, {compute}; {args.eval_episodes} shared starts, on which nothing was "
        f"decided; {clock(sum(results['stages'].values()))} of work so far.\n"
    )
    missing = sum(f"seed-{s}/milestones" not in results["stages"] for s in range(args.seeds))
    parts = ["# Crafter, offline: the way to the diamond\n", about]
    if missing:
        parts.append(f"**Not complete**: milestones of {missing} of {args.seeds} seeds are missing.\n")
    if results["ladder"]:
        parts += [*milestones(results["ladder"]), *differences(results["ladder"])]
    parts += [*single_tasks(tasks), *pseudo_labels(tasks), *gates(tasks), *costs(results)]
    for path, content in ((out / "page.md", "\n".join(parts)), (out / "results.json", json.dumps(results))):
        aside = path.with_name(f".tmp-{path.name}")
        aside.write_text(content)
        os.replace(aside, path)
    return out / "page.md"
