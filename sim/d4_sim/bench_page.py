"""The page of a bench: every policy of every world over its seeds, in plain and in normalised scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_core.stats import Interval, crossed_mean, nested_mean, student, widest
from d4_datasets import whole
from d4_sim.chains import DISTURBED, STARTS, VERSIONS
from d4_sim.evaluate import first_start
from d4_sim.stages import Done, clock, read_done
from d4_sim.study_figures import film
from d4_sim.study_page import NAMES, costs, failed_gates, policies
from d4_sim.study_results import (
    TABLE,
    differences,
    has_own_episodes,
    on_starts,
    rows_of,
    run_results,
)
from d4_sim.suite.disturb import fitting, slug
from d4_sim.tables import spread, table

if TYPE_CHECKING:
    from d4_sim.bench import Size

FIRST = first_start(STARTS)
FILMED = ("imagination", "wm_bc")
ENDS = ("random", "expert")  # driven once per world
UNEQUAL = ("bc_scratch", "bc_early", "vpt")  # claims against them are not judged if they had less compute
_COMPUTE = {
    True: "with which each of them takes the training operations of a whole chain, counted at 64 x 64 pixels",
    False: "which is not the compute of a chain, so that claims against it are not judged: with more it may "
    "catch up with the clone on the world model (docs/results/learning.md)",
}


def collect(out: Path, worlds: tuple[str, ...], size: Size, done: Done) -> dict[str, Any]:
    """Every number of a bench of this size as JSON values; what has not been run is left out, and chains of
    which anything was made with other settings.

    Keys: `chains` {world: {seed: run}}, the reference's policies in every run, `stages` {name: seconds}, and
    `versions` of MuJoCo and d4 that it was made with, {name: versions}.
    """
    chains: dict[str, dict[str, Any]] = {}
    for world in worlds:
        starts = (FIRST, size.eval_episodes, world)
        path = out / "reference" / world / "eval.json"
        reference = {} if world in done.stale else on_starts(path, *starts).get("policies", {})
        folders = {
            str(s): out / f"{world}-{s}" / "run"
            for s in range(size.seeds) if f"{world}-{s}" not in done.stale
        }  # fmt: skip
        runs = {s: run_results(folder, starts) for s, folder in folders.items()}
        for s, run in runs.items():
            run["disturbed"] = disturbed(folders[s], world, size)
        chains[world] = {
            s: run | {
                "policies": reference | run["policies"],
                "is_done": f"{world}-{s}/policies" in done.seconds,
            }
            for s, run in runs.items() if "policies" in run
        }  # fmt: skip
    versions = whole.read_json(out / VERSIONS, dict)
    return {"chains": chains, "runs": {}, "stages": done.seconds, "versions": versions}


def disturbed(run: Path, world: str, size: Size) -> dict[str, Any]:
    """{what was done to the world: policies} of a run folder, as far as it was asked for."""
    named = {each: run / f"eval-{slug(each.split('+'))}.json" for each in fitting(world, size.disturb)}
    found = {each: on_starts(path, FIRST, size.eval_episodes, world) for each, path in named.items()}
    return {each: evaluation["policies"] for each, evaluation in found.items() if evaluation}


def normalised(chains: Mapping[str, Any], task: int | None = None) -> dict[str, Interval]:
    """Scores of all policies, where random is 0 and the expert is 1: mean and 95 % interval (`over_chains`).

    Args: task: count the episodes of this one alone.
    """
    groups = {policy: scores(chains, policy, task) for policy in TABLE}
    return {
        policy: over_chains(
            list(found.values()),
            nested_mean if has_own_episodes(policy, list(found.values())) else crossed_mean,
        )
        for policy, found in groups.items()
        if found and all(map(len, found.values()))
    }


def scores(chains: Mapping[str, Any], policy: str, task: int | None = None) -> dict[str, np.ndarray]:
    """{seed: scores} of a policy's episodes, each between the ends of its own task. On the shared starts
    tasks take turns: those that do not come to whole rounds are left out, so that every task counts the same;
    the logs have their own mix. Episodes of tasks that have no ends are in no score.

    Ends are means over their episodes; that they were measured, too, widens no interval.
    """
    out, between, count = {}, ends(chains), max(1, len(played(chains)))
    for seed, row in rows_of(chains, policy).items():
        returns, of = np.asarray(row["return"], float), np.asarray(row["task"])
        turns = np.arange(len(of)) % count
        rest = len(of) % count if np.array_equal(of, turns) else 0
        counted = np.arange(len(of)) < len(of) - rest if task is None else of == task
        counted &= np.isin(of, list(between))
        low, high = np.array([between[each] for each in of[counted]]).reshape(-1, 2).T
        out[seed] = (returns[counted] - low) / (high - low)
    return out


def ends(chains: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """{task: mean return of random play and of the expert}, of tasks in which the expert is better."""
    found = {
        task: [np.mean([_of_task(row, task) for row in rows_of(chains, end).values()] or [np.nan])
               for end in ENDS]
        for task in played(chains)
    }  # fmt: skip
    return {task: (float(low), float(high)) for task, (low, high) in found.items() if high > low}


def played(chains: Mapping[str, Any]) -> list[int]:
    """The tasks that the starts are of."""
    return sorted({task for row in rows_of(chains, ENDS[0]).values() for task in row["task"]})


def unscored(chains: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Which tasks are in no normalised score, if there are some."""
    if lacking := sorted(set(played(chains)) - set(ends(chains))):
        named = ", ".join(names[task] if task < len(names) else str(task) for task in lacking)
        yield (
            f"**Not normalised**: in {named} the expert drove no start, or no better than random; what was "
            "done there is in no score.\n"
        )


def _of_task(row: Mapping[str, Any], task: int) -> float:
    """Mean return of a row's episodes of a task; not a number without any."""
    own = np.asarray(row["return"], float)[np.asarray(row["task"]) == task]
    return float(own.mean()) if len(own) else float("nan")


def over_chains(groups: Sequence[np.ndarray], mean: Callable[..., Interval]) -> Interval:
    """Mean over chains and episodes, with the wider of `mean`'s interval and the t interval over chains."""
    found = mean(groups)
    return widest(found, student([float(g.mean()) for g in groups])) if len(groups) > 1 else found


def summary(results: Mapping[str, Any], seeds: int) -> Iterator[str]:
    """One table of all worlds in normalised scores; so many seeds are planned."""
    found = {world: normalised(chains) for world, chains in results["chains"].items() if chains}
    found = {world: each for world, each in found.items() if each}
    if not found:
        return
    yield "## Normalised scores\n"
    yield (
        "0 is random, 1 is the expert of the world, in every task by itself; mean [the wider of two 95 % "
        "intervals: over seeds and episodes, and the t interval over seeds]. Both ends were measured, too, "
        "which widens no interval.\n"
    )
    rows = []
    for policy in TABLE:
        cells = [_score(each, policy, results["chains"][world], seeds) for world, each in found.items()]
        if any(cell != "-" for cell in cells):
            rows.append([NAMES[policy], *cells])
    yield table(["policy", *found], rows)


def _score(found: Mapping[str, Interval], policy: str, chains: Mapping[str, Any], seeds: int) -> str:
    """A cell; it says of how many chains it is if that is not all."""
    if policy not in found:
        return "-"
    count = seeds if policy in ENDS else len(rows_of(chains, policy))
    return spread(found[policy]) + (f", {count} of {seeds} chains" if count < seeds else "")


def tasks(world: str, chains: Mapping[str, Any], names: list[str], seeds: int) -> Iterator[str]:
    """One agent, several tasks: normalised scores of each."""
    by_task = {i: found for i in range(len(names)) if (found := normalised(chains, i))}
    if len(names) < 2 or not by_task:
        return
    yield f"### {world}: one agent, chosen by task\n"
    shown = [p for p in TABLE if any(p in found for found in by_task.values())]
    rows = []
    for policy in shown:
        cells = [NAMES[policy]]
        for i, found in by_task.items():
            by_seed = [f"{own.mean():.2f}" for own in scores(chains, policy, i).values() if len(own)]
            seeded = f" ({', '.join(by_seed)})" if len(by_seed) > 1 and policy not in ENDS else ""
            cells.append(_score(found, policy, chains, seeds) + seeded)
        rows.append(cells)
    yield table(["policy, normalised (seeds)", *(names[i] for i in by_task)], rows)


def doubts(chains: Mapping[str, Any]) -> Iterator[str]:
    """Of chains whose tokenizer or dynamics failed a gate: what is claimed of a world model there."""
    failed = {
        s: [gate["name"] for phase in ("tokenizer", "dynamics") for gate in run["gates"].get(phase, [])
            if not gate["ok"]]
        for s, run in chains.items() if "gates" in run
    }  # fmt: skip
    named = [f"seed {s}: {'; '.join(names)}" for s, names in failed.items() if names]
    if named:
        yield (
            f"**World models that failed gates** are behind {len(named)} of these {len(chains)} chains "
            f"({'. '.join(named)}).\n"
        )


def robustness(world: str, chains: Mapping[str, Any], seeds: int) -> Iterator[str]:
    """What becomes of the policies when commands come late and pictures are bad."""
    kinds = list(dict.fromkeys(kind for run in chains.values() for kind in run["disturbed"]))
    rows = []
    for kind in kinds:
        cells = []
        for policy in DISTURBED:
            pair = {
                s: {"policies": {"a": run["disturbed"][kind][policy], "b": run["policies"][policy]}}
                for s, run in chains.items()
                if policy in run["disturbed"].get(kind, {}) and policy in run["policies"]
            }
            change = differences(pair, "a", "b")
            means = [float(np.mean(p["policies"]["a"]["return"])) for p in pair.values()]
            if not change:
                cells += ["-", "-"]
                continue
            wide = widest(*(change[end] for end in ("both", "student") if end in change))
            few = f", {len(pair)} of {seeds} chains" if len(pair) < seeds else ""
            cells += [f"{np.mean(means):.2f}", spread(wide, sign=True) + few]
        rows.append([f"`{kind}`", *cells])
    if not rows:
        return
    yield f"### {world}: late commands and bad pictures\n"
    yield (
        "Return, and the paired change against the same starts undisturbed [the wider of two 95 % intervals: "
        "over seeds and episodes, and the t interval over seeds]:\n"
    )
    header = [text for p in DISTURBED for text in (NAMES[p], "change")]
    yield table(["disturbance", *header], rows)


def films(out: Path, world: str, seeds: list[str], folder: Path, link: str) -> Iterator[str]:
    """Copies the films of a world's first chain and of its expert; yields Markdown that shows them."""
    found = [(policy, out / f"{world}-{s}" / "run" / "media") for s in seeds[:1] for policy in FILMED]
    for policy, media in [*found, ("expert", out / "reference" / world / "media")]:
        title = f"{NAMES[policy].capitalize()}, best and worst episodes"
        yield from film(media, f"real_{policy}", title, f"{world}-{policy}", folder, link)


def page(out: Path, worlds: tuple[str, ...], size: Size, done: Done) -> tuple[str, dict[str, Any]]:
    """The page as text, and the numbers behind it; pictures go to <out>/page."""
    results = collect(out, worlds, size, done)
    about = _about(results, worlds, size, done.missing)
    parts = [f"# Bench: {', '.join(worlds)}\n", about, *summary(results, size.seeds)]
    for world, chains in results["chains"].items():
        if not chains:
            continue
        parts += policies(f"## {world}", chains, () if size.is_equal else UNEQUAL, size.seeds)
        reference = whole.read_json(out / "reference" / world / "eval.json", dict)
        parts += doubts(chains)
        names = reference.get("task_names", [])
        parts += [*unscored(chains, names), *tasks(world, chains, names, size.seeds)]
        parts += robustness(world, chains, size.seeds)
        parts += films(out, world, sorted(chains), out / "page", "page")
    parts += [*failed_gates(results), *costs(results)]
    return "\n".join(parts), results


def _about(results: Mapping[str, Any], worlds: tuple[str, ...], size: Size, stages: Sequence[str]) -> str:
    """What was run, and what is missing; `stages` are not done."""
    done = {world: sum(run["is_done"] for run in results["chains"][world].values()) for world in worlds}
    steps = max(1, round(size.scratch_steps * size.scale))
    lines = [
        f"{size.seeds} chain{'s' * (size.seeds > 1)} per world, {size.frames} recorded frames each, commands "
        f"kept in {size.labelled:.0%} of the bags, in one at least; networks `{size.model}`, training x "
        f"{size.scale:g}; "
        f"{size.eval_episodes} shared starts per policy and chain, of which the expert drives "
        f"{size.expert_episodes} (once per world) and the planner in the world model "
        f"{size.planner_episodes}. Without a world model, both networks of the VPT style train for {steps} "
        f"steps and the one from scratch for {2 * steps}, {_COMPUTE[size.is_equal]}; the early one stops, "
        f"at {2 * steps // 8} at the latest, when held-out commands are known best. "
        f"{clock(sum(results['stages'].values()))} of work in all. The expert is a "
        "script, or a planner on the true simulator, and no optimum. Claims are judged by the wider "
        "of two intervals, over seeds and episodes and the t interval over seeds, since one that resamples a "
        "few seeds is too narrow. That there are many of them corrects none.\n"
    ]
    for name, versions in results["versions"].items():
        several = "**Several versions**: worlds may have changed. " if len(versions) > 1 else ""
        lines.append(f"{several}{name} {', '.join(versions)}.\n")
    missing = [f"{world} ({done[world]} of {size.seeds})" for world in worlds if done[world] < size.seeds]
    kinds = Counter(name.rpartition("/")[2] for name in stages)
    if rest := [f"{count} x {kind}" for kind, count in kinds.items() if kind != "tidy"]:
        lines.append(f"**Not complete**: of the stages are left {', '.join(rest)}.\n")
    if missing:
        lines.append(f"**Not complete**: chains of {', '.join(missing)}.\n")
    return "\n".join(lines)


def write_page(out: Path, worlds: tuple[str, ...], size: Size, keys: Mapping[str, str]) -> Path | None:
    """Write <out>/page.md and <out>/page/results.json; None if there are no results yet.

    Args: keys: of the planned stages.
    """
    text, results = page(out, worlds, size, read_done(out, keys))
    if not any(results["chains"].values()):
        return None
    (out / "page").mkdir(exist_ok=True)
    for path, content in ((out / "page.md", text), (out / "page" / "results.json", json.dumps(results))):
        whole.write(path, content)
    return out / "page.md"
