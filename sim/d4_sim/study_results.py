"""What a study has found so far: its result files gathered, and the statistics over seeds."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d4_core.phases import AgentTraining
from d4_core.stats import (
    Interval,
    crossed_mean,
    crossed_rate,
    few_mean,
    nested_mean,
    paired_difference,
    rate_difference,
    resampled,
    student,
)
from d4_datasets.whole import read_json
from d4_sim.evaluate import ASIDE
from d4_sim.study import (
    CASCADE,
    FRESH,
    FRESH_LABELS,
    FRESH_SCALES,
    IMPROVEMENT,
    LABELS,
    LONGER,
    OWN_LOOK,
    POLICY_CHAINS,
    SEEDS,
    SHORTCUT,
    WORLDS,
)

CLONED_DRIVES = "cloned_drives"  # not a policy: the logs' episodes with enough return to be cloned
TABLE = ("random", "data", CLONED_DRIVES, "bc_scratch", "bc_scratch_longer", "bc_early", "vpt", "vpt_longer",
         "wm_bc", "planner", "imagination", "expert")  # fmt: skip
PAIRS = (
    ("imagination", "wm_bc"), ("imagination_argmax", "wm_bc_argmax"), ("wm_bc", "bc_scratch"),
    ("wm_bc", "bc_early"), ("wm_bc", "vpt"), ("wm_bc", "bc_scratch_longer"), ("wm_bc", "vpt_longer"),
    ("imagination", "bc_scratch"), ("imagination", "bc_early"), ("imagination", "vpt"),
    ("imagination", "bc_scratch_longer"), ("imagination", "vpt_longer"), ("planner", "imagination"),
    ("wm_bc_argmax", "vpt_longer_argmax"), ("imagination_argmax", "vpt_longer_argmax"),
)  # fmt: skip
LIKELIEST = ("bc_scratch_longer_argmax", "vpt_longer_argmax", "wm_bc_argmax", "imagination_argmax")


def collect(out: Path) -> dict[str, Any]:
    """Every number of a study folder as JSON values; what has not been run is left out.

    Keys: `chains` {world: {seed: run}}, `runs` {variant: run}, `ladder`, `stages` {name: seconds}; a run has
    policies, open_loop, gates and training.
    """
    variants = [f"improve-{name}" for name in (*(f"seed_{s}" for s in SEEDS[1:]), *IMPROVEMENT)]
    variants += (
        ["heads-agent_only"]
        + [f"shortcut_loss-{chain}" for chain in POLICY_CHAINS]
        + [f"shortcut-{name}" for name in SHORTCUT]
        + [f"cascade-{name}" for name in CASCADE]
    )
    variants += [f"labels-{share:g}" for share in LABELS] + [f"half-{share:g}" for share in LABELS[1:-1]]
    variants += [
        f"{kind}-{seed}-{share:g}" for kind in FRESH_SCALES for seed in FRESH for share in FRESH_LABELS
    ]
    variants += [f"looks-{k}" for k in ("none", "first", "both")]
    variants += [f"starts-{world}-{seed}" for world in WORLDS for seed in SEEDS]
    variants += [f"compute-{world}-{seed}" for world in WORLDS for seed in SEEDS] + ["compute-clone"]
    chains = {w: {str(s): run_results(out / f"{w}-{s}" / "run") for s in SEEDS} for w in WORLDS}
    done = read_json(out / "stages.json", dict)
    return {
        "chains": {w: {s: run for s, run in seeds.items() if run} for w, seeds in chains.items()},
        "runs": {name: run for name in variants if (run := run_results(out / name / "run"))},
        "ladder": read_json(out / "ladder.json", list) or None,
        "stages": {name: entry["seconds"] for name, entry in done.items() if entry["done"]},
    }


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of a study that was done in parts, on several machines or one after the other: of a chain, a
    run or a stage that several have, the first one counts, as a whole.
    """
    out: dict[str, Any] = {"chains": {w: {} for w in WORLDS}, "runs": {}, "ladder": None, "stages": {}}
    for part in parts:
        for world, chains in part["chains"].items():
            out["chains"][world] = dict(sorted((chains | out["chains"][world]).items()))
        out["runs"] = part["runs"] | out["runs"]
        out["stages"] = part["stages"] | out["stages"]
        out["ladder"] = out["ladder"] or part["ladder"]
    return out


def with_derived(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The chains of a study; what was cloned and, as <name>_longer, longer trained baselines are policies of
    theirs, too.
    """
    out: dict[str, dict[str, Any]] = {}
    for world, chains in results["chains"].items():
        out[world] = {}
        for seed, run in chains.items():
            found = results["runs"].get(f"compute-{world}-{seed}", {}).get("policies", {})
            longer = {
                f"{name}_longer{mode}": found[name + mode]
                for name in LONGER for mode in ("", "_argmax") if name + mode in found
            }  # fmt: skip
            own = run.get("policies", {})
            drives = {CLONED_DRIVES: _relevant(own["data"])} if "data" in own else {}
            out[world][seed] = {**run, "policies": own | drives | longer}
    return out


def _relevant(row: Mapping[str, Any]) -> dict[str, Any]:
    """The logs without the episodes whose return is too low to be cloned."""
    returns = np.array(row["return"])
    enough = returns >= AgentTraining().relevant_return * returns.max()
    return {what: np.array(row[what])[enough].tolist() for what in ("return", "success")}


def on_other_starts(results: Mapping[str, Any], world: str) -> dict[str, Any]:
    """The chains of a world as they drove on other starts, by seed."""
    head = f"starts-{world}-"
    found = {name.removeprefix(head): run for name, run in results["runs"].items() if name.startswith(head)}
    return {seed: found[seed] for seed in sorted(found) if "policies" in found[seed]}


def run_results(run: Path, starts: tuple[int, int, str] | None = None) -> dict[str, Any]:
    """Results of one run folder; empty if there are none yet. `starts`: what `on_starts` takes, where results
    on others are to be left out.
    """
    path = run / "eval.json"
    evaluation = on_starts(path, *starts) if starts else read_json(path, dict)
    configs = {path.parent.name: read_json(path, dict) for path in sorted(run.glob("*/config.json"))}
    kept = ("wall_s", "cpu_s", "kl")
    found = {
        "policies": evaluation.get("policies"),
        "open_loop": read_json(run / "open_loop.json", dict),
        OWN_LOOK: read_json(run / f"{OWN_LOOK}.json", dict), "gates": read_json(run / "gates.json", dict),
        "training": {
            phase: {k: v for k, v in config["metrics"].items() if k in kept} | config.get("origin", {})
            for phase, config in configs.items()
        },
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def on_starts(path: Path, first: int, count: int, world: str) -> dict[str, Any]:
    """What a file of d4-eval, or one beside it, holds of so many starts of a world from this seed on; {} if
    none does. Of several it is the one with most policies.
    """
    starts = [first, first + count - 1]
    places = (path, *path.parent.glob(f"{glob.escape(path.stem)}{ASIDE}*{path.suffix}"))
    found = [each for place in places if (each := read_json(place, dict))]
    fitting = [
        each for each in found
        if each.get("seeds", starts) == starts and each.get("world", world).split("+")[0] == world
    ]  # fmt: skip
    return max(fitting, key=lambda each: len(each["policies"]), default={})


def rows_of(chains: Mapping[str, Any], policy: str) -> dict[str, dict[str, Any]]:
    """{seed: row of eval.json} of a policy over the chains that have it."""
    return {s: run["policies"][policy] for s, run in chains.items() if policy in run.get("policies", {})}


def over_seeds(policy: str, rows: Iterable[Mapping[str, Any]], what: str = "return") -> Interval:
    """Mean and interval over seeds and episodes of a policy's rows."""
    values = [row[what] for row in rows]
    if has_own_episodes(policy, values):
        return nested_mean(values)
    return crossed_rate(values) if what == "success" else crossed_mean(values)


def has_own_episodes(policy: str, values: Sequence[Any]) -> bool:
    """Whether a policy had other episodes in every chain, of which `values` are: the logs had, all others
    drive the same starts. In worlds with events the log mix is driven on these, too, in every chain alike.
    """
    return policy in ("data", CLONED_DRIVES) and any(not np.array_equal(v, values[0]) for v in values[1:])


def policy_table(chains: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return and success of every policy over the chains of one world.

    Values: `seeds` {seed: Interval over episodes}, `mean` and `success` Interval over seeds and episodes,
    `student` the t interval of the seeds' mean returns where there are several.
    """
    out = {}
    for policy in (*TABLE, *LIKELIEST):
        rows = rows_of(chains, policy)
        if rows:
            out[policy] = {
                "seeds": {s: few_mean(row["return"]) for s, row in rows.items()},
                "mean": over_seeds(policy, rows.values()),
                "success": over_seeds(policy, rows.values(), "success"),
                "episodes": min(len(row["return"]) for row in rows.values()),
            }
            if len(rows) > 1:
                out[policy]["student"] = student([float(np.mean(row["return"])) for row in rows.values()])
    return out


def differences(chains: Mapping[str, Any], a: str, b: str, what: str = "return") -> dict[str, Any] | None:
    """Paired difference a - b in return or success: per seed over episodes, and over seeds in two ways.

    `both` resamples seeds and starts; `student` is the t interval of the seeds' means, which does not trust a
    bootstrap of three values, but knows of no other starts. Claims are judged by the lower end of both.
    """
    first, second = rows_of(chains, a), rows_of(chains, b)
    shared = [s for s in first if s in second]
    if not shared:
        return None
    pairs = {s: _on_the_same_starts(first[s], second[s], what) for s in shared}
    gains = [np.subtract(*pair) for pair in pairs.values()]
    each = {s: paired_difference(*pair) for s, pair in pairs.items()}
    found = {"both": crossed_mean(gains)}
    if len(shared) > 1:
        found["student"] = student([float(g.mean()) for g in gains])
    if what == "success":
        each = {s: rate_difference(interval, len(pairs[s][0])) for s, interval in each.items()}
        found = {end: rate_difference(interval, min(map(len, gains))) for end, interval in found.items()}
    return {"seeds": each, **found}


def _on_the_same_starts(
    a: Mapping[str, Any], b: Mapping[str, Any], what: str
) -> tuple[list[float], list[float]]:
    """Both rows; a slow policy may have driven the first ones of the shared starts only."""
    count = min(len(a[what]), len(b[what]))
    return a[what][:count], b[what][:count]


def gap_closed(chains: Mapping[str, Any]) -> dict[str, Any] | None:
    """Share of the way from the clone to the optimum that imagination goes.

    `seeds` {seed: share}, `mean` Interval over seeds and starts, `student` t interval of the seeds' shares
    where there are several; None without all three policies.
    """
    kinds = [rows_of(chains, kind) for kind in ("wm_bc", "imagination", "expert")]
    shared = [s for s in kinds[0] if all(s in rows for rows in kinds)]
    if not shared:
        return None
    count = min(len(rows[s]["return"]) for rows in kinds for s in shared)
    clone, improved, best = (np.array([rows[s]["return"][:count] for s in shared]) for rows in kinds)

    def share(starts: np.ndarray) -> np.ndarray:
        """(..., seeds) under weights (..., starts)."""
        return (starts @ (improved - clone).T) / (starts @ (best - clone).T)

    plain = share(np.full(count, 1 / count))
    seeds, starts = resampled(len(shared), count)
    low, high = np.percentile((seeds * share(starts)).sum(1), [2.5, 97.5])
    each = dict(zip(shared, plain.tolist(), strict=True))
    out: dict[str, Any] = {"seeds": each, "mean": (float(plain.mean()), float(low), float(high))}
    if len(shared) > 1:
        out["student"] = student(plain)
    return out


def at_horizon(curves: Mapping[str, Any], kind: str, horizon: int, version: str = "model") -> float | None:
    """One number of an open-loop measurement, None where it was not measured."""
    if kind not in curves or horizon not in curves["horizons"]:
        return None
    return float(curves[kind][version][curves["horizons"].index(horizon)])


def recovered(values: Mapping[str, float], name: str, floor: str, ceiling: str) -> float:
    """Share of the gap from `floor` to `ceiling` that `name` has."""
    return (values[name] - values[floor]) / (values[ceiling] - values[floor])
