"""The page of the Crafter experiment: milestones of every policy, in the form of the paper's tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_core.stats import (
    Interval,
    crossed_mean,
    crossed_rate,
    few_mean,
    rate_difference,
    resampled,
    student,
    widest,
    within,
)
from d4_datasets import whole
from d4_sim.chains import scaled
from d4_sim.crafter.milestones import LADDER, MILESTONES, crafter_score
from d4_sim.crafter.world import CHAIN, HORIZON
from d4_sim.evaluate import first_start
from d4_sim.stages import Done, clock, read_done
from d4_sim.study_page import costs
from d4_sim.study_results import on_starts, rows_of, run_results
from d4_sim.tables import spread, table

if TYPE_CHECKING:
    from d4_sim.crafter.experiment import Args

# The columns of the paper's table, in its order; what frames them comes first and last.
COLUMNS = {
    "random": "random", "data": "data", "bc_scratch": "BC", "bc_early": "BC, early", "vpt": "VPT style",
    "wm_bc": "WM+BC", "imagination": "imagination RL", "expert": "expert",
}  # fmt: skip
# What trains for each policy, for its cost.
_TRAINS = {
    "bc_scratch": ("bc_scratch",), "bc_early": ("bc_early",), "vpt": ("vpt_idm", "vpt"),
    "wm_bc": ("tokenizer", "dynamics", "agent"),
    "imagination": ("tokenizer", "dynamics", "agent", "imagination"),
}  # fmt: skip
STARTS = 21  # seed of d4-eval's starts, on which nothing was decided here
EQUAL_STEPS = 60_000  # of both networks of the VPT style take the compute of a whole chain of `nano`
GIVEN = ("random", "data", "expert")  # the same whatever was trained
PAIRS = (
    ("imagination", "wm_bc"), ("wm_bc", "bc_scratch"), ("wm_bc", "bc_early"), ("wm_bc", "vpt"),
    ("imagination", "bc_early"), ("imagination", "vpt"),
)  # fmt: skip


def reached(row: Mapping[str, Any], milestone: int) -> np.ndarray:
    """0 or 1 per episode: whether a milestone was reached."""
    return np.array([float(first[milestone] is not None) for first in row["first"]])


def steps(row: Mapping[str, Any]) -> np.ndarray:
    """How many of the steps to the diamond an episode reaches."""
    return np.sum([reached(row, MILESTONES.index(step)) for step in CHAIN], 0)


def success(chains: Mapping[str, Any], policy: str, milestone: int) -> Interval | None:
    """Per cent of the episodes that reach a milestone: the widest of the interval over seeds and episodes, a
    Wilson interval of the starts, and the t interval over seeds.
    """
    groups = [reached(row, milestone) for row in rows_of(chains, policy).values()]
    if not groups:
        return None
    return _per_cent(_rate(groups))


def _over_seeds(groups: Sequence[Sequence[float] | np.ndarray]) -> Interval:
    """Mean of groups that share their starts, with the wider of the interval over seeds and episodes and the
    t interval over seeds.
    """
    found = crossed_mean(groups)
    return widest(found, student([float(np.mean(g)) for g in groups])) if len(groups) > 1 else found


def _rate(groups: Sequence[np.ndarray]) -> Interval:
    """Share of ones in groups that share their starts, with the widest of the three intervals."""
    rate = crossed_rate(groups)
    if len(groups) > 1:
        rate = widest(rate, student([float(group.mean()) for group in groups]))
    return within(rate, 0.0, 1.0)


def ticks(chains: Mapping[str, Any], policy: str, milestone: int) -> Interval | None:
    """Mean ticks to a milestone over the episodes that reach it, None if none does: with the widest of the
    interval over seeds and starts, one over these episodes, and the t interval over seeds.
    """
    rows = [[first[milestone] for first in row["first"]] for row in rows_of(chains, policy).values()]
    groups = [[float(tick) for tick in row if tick is not None] for row in rows]
    if not any(groups):
        return None
    found = few_mean([tick for group in groups for tick in group])
    if len(rows) > 1:
        known = np.array([[tick is not None for tick in row] for row in rows], float)
        late = np.array([[tick or 0 for tick in row] for row in rows], float)
        seeds, starts = resampled(*known.shape)
        count, total = (((seeds @ part) * starts).sum(1) for part in (known, late))
        means = (total[count > 0] / count[count > 0]).round(6)  # equal ticks have no interval
        low, high = np.percentile(means, [2.5, 97.5]).tolist()
        found = widest(found, (found[0], low, high))
        if len(own := [float(np.mean(group)) for group in groups if group]) > 1:
            found = widest(found, student(own))
    return within(found, 0.0, HORIZON)


def gain(chains: Mapping[str, Any], a: str, b: str, milestone: int) -> Interval | None:
    """Paired difference in percentage points: the widest of the interval over seeds and episodes, the t
    interval over seeds, and what the number of starts leaves possible (`rate_difference`).
    """
    first, second = rows_of(chains, a), rows_of(chains, b)
    gains = [reached(first[s], milestone) - reached(second[s], milestone) for s in first if s in second]
    return _per_cent(rate_difference(_over_seeds(gains), min(map(len, gains)))) if gains else None


def collect(out: Path, args: Args, done: Done) -> dict[str, Any]:
    """Every number of the experiment as JSON values, without chains of which anything was made with other
    settings.

    Keys: `ladder` {seed: milestones.json}, `chains` {world: {seed: run}}, `stages` {name: seconds}, and
    `labelled`, pieces of the recording with known commands and all of them.
    """
    seeds, world = [s for s in range(args.seeds) if f"seed-{s}" not in done.stale], args.world
    runs = {str(s): out / f"seed-{s}" / "run" for s in seeds}
    starts = (first_start(STARTS), args.eval_episodes, world)
    ladder = {s: on_starts(run / "milestones.json", *starts) for s, run in runs.items()}
    tasks = {s: run_results(run, starts) for s, run in runs.items()}
    pieces = whole.read_json(out / "data" / "dataset" / "meta" / "d4.json", dict).get("episodes", [])
    return {
        "labelled": [sum(bool(piece["labelled"]) for piece in pieces), len(pieces)],
        "ladder": {s: found for s, found in ladder.items() if found},
        "chains": {world: {s: found for s, found in tasks.items() if found}},
        "stages": done.seconds,
        "runs": {},
    }


def milestones(chains: Mapping[str, Any]) -> Iterator[str]:
    """Success, then time, per milestone and policy."""
    shown = [p for p in COLUMNS if rows_of(chains, p)]
    order = [*CHAIN, *(m for m in MILESTONES if m not in CHAIN)]
    numbers = {m: MILESTONES.index(m) for m in order}
    yield "## Milestones: per cent of episodes\n"
    yield (
        f"What was trained is asked for one thing after the other, by the ladder of prompts ({len(LADDER)} "
        "rungs); random play knows of none, those who made the logs follow a task of their own each, as in "
        "the recording, and the expert goes for the diamond. Mean [the widest of three 95 % intervals: over "
        "seeds and episodes, a Wilson interval of the starts, and the t interval over seeds]. All seeds were "
        "trained on one recording and its labels, whose chance is in no interval. The last three are not "
        "asked for.\n"
    )
    cells = {(p, m): success(chains, p, i) for p in shown for m, i in numbers.items()}
    yield table(
        ["milestone", *_heads(shown, chains)],
        [[m, *(_percent(cells[p, m]) for p in shown)] for m in order],
    )
    yield "## Ticks to a milestone\n"
    yield (
        "Mean over the episodes that reach it [the widest of three 95 % intervals: over seeds and starts, "
        "over these episodes, and the t interval over seeds].\n"
    )
    times = {(p, m): ticks(chains, p, i) for p in shown for m, i in numbers.items()}
    yield table(
        ["milestone", *_heads(shown, chains)],
        [[m, *(_time(times[p, m]) for p in shown)] for m in order],
    )
    yield from achievements(chains, shown)
    yield "## Whole episodes\n"
    yield (
        "[the wider of two 95 % intervals: over seeds and episodes, and the t interval over seeds]. The "
        f"{len(MILESTONES)} milestones are the {len(CHAIN)} steps to the diamond and three that nobody is "
        "asked for, which random play reaches as well.\n"
    )
    yield table(
        [
            "policy",
            f"steps, of {len(CHAIN)}",
            f"milestones, of {len(MILESTONES)}",
            "ticks",
            "deaths, per cent",
            "episodes",
        ],
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
        [name, *(f"{100 * np.mean(_shares(found, name)):.1f}" for found in rows.values())] for name in names
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
    return "-" if value is None else spread(value, 0)


def _per_cent(share: Interval) -> Interval:
    mean, low, high = (100 * x for x in share)
    return mean, low, high


def _percent(value: Interval | None) -> str:
    return "-" if value is None else spread(value, 1)


def _whole(rows: list[Mapping[str, Any]]) -> list[str]:
    return [
        spread(_over_seeds([steps(row) for row in rows])),
        spread(_over_seeds([row["return"] for row in rows])),
        f"{np.mean([t for row in rows for t in row['ticks']]):.0f}",
        f"{100 * np.mean([f for row in rows for f in row['fallen']]):.1f}",
        " + ".join(str(len(row["first"])) for row in rows),
    ]


def differences(chains: Mapping[str, Any]) -> Iterator[str]:
    """Paired differences on the same starts, per milestone."""
    pairs = [pair for pair in PAIRS if all(rows_of(chains, p) for p in pair)]
    if not pairs:
        return
    yield "## Paired differences, percentage points\n"
    yield (
        "Same starts; mean [the widest of three 95 % intervals: over seeds and episodes, the t interval over "
        "seeds, and what so many starts leave possible where none of them makes a difference].\n"
    )
    rows = [[m, *(_gain(gain(chains, *pair, MILESTONES.index(m))) for pair in pairs)] for m in CHAIN]
    heads = [f"{COLUMNS[a]} - {COLUMNS[b]}" for a, b in pairs]
    yield table(["milestone", *heads], rows)
    yield f"### Paired differences, steps of {len(CHAIN)}\n"
    yield "[the wider of two 95 % intervals: over seeds and episodes, and the t interval over seeds]\n"
    yield table(heads, [[_more_steps(chains, *pair) for pair in pairs]])


def _more_steps(chains: Mapping[str, Any], a: str, b: str) -> str:
    first, second = rows_of(chains, a), rows_of(chains, b)
    gains = [steps(first[s]) - steps(second[s]) for s in first if s in second]
    return spread(_over_seeds(gains), sign=True) if gains else "-"


def _gain(found: Interval | None) -> str:
    return "-" if found is None else spread(found, 1, sign=True)


def single_tasks(chains: Mapping[str, Any]) -> Iterator[str]:
    """Episodes with one prompt from beginning to end, and what the heads said."""
    shown = [p for p in COLUMNS if rows_of(chains, p)]
    if not shown:
        return
    counts = np.bincount(next(iter(rows_of(chains, shown[0]).values()))["task"], minlength=len(MILESTONES))
    yield "## One prompt for the whole episode: per cent that do it\n"
    yield (
        f"Of {counts.min()} to {counts.max()} starts per task and seed; mean [the widest of three 95 % "
        "intervals: over seeds and episodes, a Wilson interval of the starts, and the t interval over "
        "seeds].\n"
    )
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


def clones(chains: Mapping[str, Any]) -> Iterator[str]:
    """What those without a world model know of commands that they were trained on, and of held-out ones."""
    rows = [(s, p, row["clone"]) for p in _TRAINS for s, row in rows_of(chains, p).items() if "clone" in row]
    found = [
        [s, COLUMNS[p], clone["steps"], *_known(clone["train"]), *_known(clone["held_out"])]
        for s, p, clone in rows
    ]
    if found:
        yield "### Clones without a world model, on known commands\n"
        yield (
            "Of pieces in which a task's event happened, every task counting alike. The early one has the "
            "length of training after which it is least surprised by held-out commands.\n"
        )
        header = ["trained on: nats", "right, per cent", "held out: nats", "right, per cent"]
        yield table(["seed", "policy", "steps", *header], found)


def _known(error: Mapping[str, Any]) -> list[str]:
    return [f"{error['nats']:.2f}", f"{100 * error['accuracy']:.0f}"] if error.get("frames") else ["-", "-"]


def compute(chains: Mapping[str, Any]) -> Iterator[str]:
    """What the training of each policy cost in time of processors, whatever else they did meanwhile."""
    rows = []
    for policy, phases in _TRAINS.items():
        each = [run.get("training", {}) for run in chains.values()]
        cells = [
            f"{sum(run[phase]['cpu_s'] for phase in phases):.0f}" if all(p in run for p in phases) else "-"
            for run in each
        ]
        rows.append([COLUMNS[policy], *cells])
    if any(cell != "-" for row in rows for cell in row[1:]):
        yield "### Training of each policy, seconds of processors\n"
        yield "The early one's are those of the length that was chosen, not of the others.\n"
        yield table(["policy", *(f"seed {s}" for s in chains)], rows)


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


def _about(results: Mapping[str, Any], args: Args) -> str:
    """What was run."""
    steps, (known, pieces) = args.scratch_steps, results["labelled"]
    equal = args.preset == "nano" and steps >= EQUAL_STEPS
    share = f" ({known} of {pieces} pieces, {known / pieces:.1%})" if pieces else ""
    return (
        f"World `{args.world}`; {args.episodes} recorded episodes, commands kept in {args.labelled:.0%} of "
        f"the bags{share}; networks `{args.preset}` set as docs/crafter.md says, training x {args.scale:g}; "
        f"BC {scaled(2 * steps, args.scale)} steps and both networks of the VPT style "
        f"{scaled(steps, args.scale)}, "
        + ("the operations of a whole chain or more" if equal else "with other compute than a chain has")
        + f"; {args.eval_episodes} shared starts, on which nothing was decided; "
        f"{clock(sum(results['stages'].values()))} of work in all.\n"
    )


def write_page(out: Path, args: Args, keys: Mapping[str, str]) -> Path | None:
    """Write <out>/page.md and <out>/results.json; None if there are no results yet.

    Args: keys: of the planned stages.
    """
    results = collect(out, args, read_done(out, keys))
    tasks = results["chains"][args.world]
    if not results["ladder"] and not tasks:
        return None
    missing = sum(f"seed-{s}/milestones" not in results["stages"] for s in range(args.seeds))
    parts = ["# Crafter, offline: the way to the diamond\n", _about(results, args)]
    if missing:
        parts.append(f"**Not complete**: milestones of {missing} of {args.seeds} seeds are missing.\n")
    if results["ladder"]:
        parts += [*milestones(results["ladder"]), *differences(results["ladder"])]
    parts += [*single_tasks(tasks), *clones(tasks), *pseudo_labels(tasks), *gates(tasks)]
    parts += [*costs(results), *compute(tasks)]
    for path, content in ((out / "page.md", "\n".join(parts)), (out / "results.json", json.dumps(results))):
        whole.write(path, content)
    return out / "page.md"
