"""The page of a study: every number of it as Markdown tables, with what holds and what does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from d4_core.stats import bootstrap_mean, crossed_mean, crossed_rate, student, widest
from d4_datasets import whole
from d4_datasets.errors import UserError, run_cli
from d4_sim.stages import clock
from d4_sim.study import (
    BASELINE_STEPS,
    IMPROVEMENT,
    POLICY_CHAINS,
    SEEDS,
)
from d4_sim.study_figures import figures
from d4_sim.study_results import (
    CLONED_DRIVES,
    LIKELIEST,
    PAIRS,
    collect,
    differences,
    gap_closed,
    merged,
    on_other_starts,
    policy_table,
    rows_of,
    with_derived,
)
from d4_sim.study_worlds import shortcut, sparse_labels
from d4_sim.tables import judged, spread, table, verdict

LONG = f", {BASELINE_STEPS} steps"
NAMES = {
    "random": "random", "data": "the logs themselves",
    CLONED_DRIVES: "the logs' episodes with 0.4 of the best return (what is cloned)",
    "bc_scratch": "cloned from scratch", "bc_early": "cloned from scratch, stopped early",
    "vpt": "VPT style (inverse dynamics, pseudo-labels, cloned)", "wm_bc": "cloned on the world model",
    "planner": "CEM planning in the world model", "imagination": "after imagination training",
    "expert": "expert", "wm_bc_argmax": "cloned on the world model, argmax",
    "imagination_argmax": "after imagination training, argmax",
    "bc_scratch_longer": f"cloned from scratch{LONG}", "vpt_longer": f"VPT style{LONG}",
    "bc_scratch_longer_argmax": f"cloned from scratch{LONG}, argmax",
    "vpt_longer_argmax": f"VPT style{LONG}, argmax",
}  # fmt: skip
FIRST_TICKS = ("imagined return of the first ticks", "real return of the same starts")


@dataclass(kw_only=True)
class Args:
    """Write the page of a study: <page>, and every number in <page without .md>/results.json."""

    out: Path
    """Folder of the study."""
    page: Path
    """Markdown file to write."""
    notes: Path | None = None
    """Markdown that comes first: what was measured where, and what to make of it."""
    also: tuple[Path, ...] = ()
    """results.json of parts that were done before or on another machine; what <out> has itself counts. Curves
    and films are those of <out> alone."""


def policies(
    heading: str, chains: Mapping[str, Any], unequal: Sequence[str] = (), planned: int = 0
) -> Iterator[str]:
    """Every policy of a world over its chains, of which so many are planned, or as many as there are.

    A claim that not all chains can tell of yet is open, and so is one of a single chain, and those against
    `unequal` policies.
    """
    rows = policy_table(chains)
    seeds = sorted(chains)
    planned = planned or len(seeds)
    count = f"{planned} full chain{'s' * (planned > 1)}"
    if len(seeds) < planned:
        count = f"{len(seeds)} of {planned} chains"
    yield f"{heading}, {count}\n"
    shown = [policy for policy in rows if not policy.endswith("argmax")]
    yield table(
        [
            "policy", "return [95 %, seeds and episodes]", "[t, seeds]", *(f"seed {s}" for s in seeds),
            "success", "episodes",
        ],
        [
            [
                NAMES[p], spread(rows[p]["mean"]), _t_cell(rows[p], seeds),
                *(f"{rows[p]['seeds'][s][0]:.2f}" if s in rows[p]["seeds"] else "-" for s in seeds),
                spread(rows[p]["success"]), rows[p]["episodes"],
            ]
            for p in shown
        ],
    )  # fmt: skip
    pairs = {
        what: {pair: found for pair in PAIRS if (found := differences(chains, *pair, what))}
        for what in ("return", "success")
    }
    yield "Paired differences in return on the same starts:\n"
    yield pair_table(pairs["return"], seeds)
    yield "The same in success:\n"
    yield pair_table(pairs["success"], seeds)
    for a, b in pairs["return"]:
        claim = f"{NAMES[a]} is better than {NAMES[b]}"
        done = len(pairs["return"][a, b]["seeds"])
        if done < max(planned, 2) or b in unequal:
            gain = pairs["return"][a, b]["both"][0]
            why = "with other compute" if b in unequal else _how_many(done, planned)
            yield f"- **open**: {claim} ({why}, {gain:+.2f})\n"
            continue
        for what, gains in pairs.items():
            ends = widest_ends(gains[a, b], "both")
            figure = f"from {ends[0]:+.2f} to {ends[1]:+.2f}"
            yield verdict(f"{claim} in {what}", judged(*ends), figure)
    yield from beyond_the_drives(rows, planned)
    yield from gap_claim(chains, planned)


def gap_claim(chains: Mapping[str, Any], planned: int) -> Iterator[str]:
    """Whether imagination goes a third of the way from the clone to the expert, where the expert is surely
    ahead: a share of nothing, or of less, says nothing.
    """
    closed, gap = gap_closed(chains), differences(chains, "expert", "wm_bc")
    if not closed or not gap or not len(closed["seeds"]) == planned > 1:
        return
    claim = "imagination closes a third of the gap to the expert, in the mean of the chains"
    if (low := widest_ends(gap, "both")[0]) <= 0:
        yield f"- **open**: {claim} (the expert is not surely ahead of the clone: lower end {low:+.2f})\n"
        return
    each = ", ".join(f"seed {s} {v:.3f}" for s, v in closed["seeds"].items())
    figure = f"{spread(closed['mean'])} over seeds and starts"
    if "student" in closed:
        figure += f", {spread(closed['student'])} as a t interval over seeds"
    yield verdict(claim, judged(*widest_ends(closed, "mean"), 1 / 3), f"{figure}; {each}")


def _how_many(done: int, planned: int) -> str:
    return "a single chain" if planned == 1 else f"{done} of {planned} chains"


def _t_cell(row: Mapping[str, Any], seeds: Sequence[str]) -> str:
    if len(row["seeds"]) < len(seeds):
        return f"{len(row['seeds'])} of {len(seeds)} chains"
    low, high = row.get("student", (0, 0, 0))[1:]
    return f"[{low:.2f}, {high:.2f}]" if low < high else "-"  # nothing is learned there, or in one chain only


def beyond_the_drives(rows: Mapping[str, Any], planned: int) -> Iterator[str]:
    """Whether the improved policy returns more than what was cloned did, which is other starts."""
    drives, improved = (rows.get(name, {}).get("seeds", {}) for name in (CLONED_DRIVES, "imagination"))
    gains = [improved[s][0] - drives[s][0] for s in improved if s in drives]
    if len(gains) == planned > 1:
        found = student(gains)
        claim = f"returns {NAMES['imagination']} are above those of the drives that were cloned"
        figure = f"{spread(found, sign=True)}, t over seeds; other starts"
        yield verdict(claim, judged(*found[1:]), figure)


def widest_ends(found: Mapping[str, Any], key: str) -> tuple[float, float]:
    """The ends that a claim is judged by: of the interval over seeds and starts and the t interval over
    seeds, the lower and the upper one."""
    _, low, high = widest(*(found[kind] for kind in (key, "student") if kind in found))
    return low, high


def pair_table(pairs: Mapping[tuple[str, str], Any], seeds: Sequence[str]) -> str:
    """Differences between policies, over seeds and by seed."""
    return table(
        ["difference", "over seeds and episodes", "t interval over seeds", *(f"seed {s}" for s in seeds)],
        [
            [
                f"{NAMES[a]} - {NAMES[b]}", spread(d["both"], sign=True),
                spread(d["student"], sign=True) if "student" in d else "one seed",
                *(spread(d["seeds"][s], sign=True) if s in d["seeds"] else "-" for s in seeds),
            ]
            for (a, b), d in pairs.items()
        ],
    )  # fmt: skip


def value_cells(row: Mapping[str, Any]) -> list[str]:
    """Mean value and real return of a row, what the time limit cut off the return, and their correlation.

    The critic means a task without end: an exact one exceeds the return by the last but one of them.
    """
    bins = row["value_calibration"]
    weights = [entry["count"] for entry in bins]
    value, real = (np.average([e[kind] for e in bins], weights=weights) for kind in ("predicted", "real"))
    numbers = (value, real, value * row["value_cut"])
    return [*(f"{x:.2f}" for x in numbers), f"{row['value_correlation']:.3f}"]


def first_ticks(row: Mapping[str, Any]) -> list[str]:
    """The cells under `FIRST_TICKS` of a policy's row."""
    ticks = row.get("first_ticks", {})
    return [f"{np.mean(ticks[kind]):.2f}" if kind in ticks else "-" for kind in ("imagined", "real")]


def calibration(world: str, chains: Mapping[str, Any]) -> Iterator[str]:
    """What the heads say against what happened."""
    keys = ("reward_correlation", "reward_bias", "kl_to_cloned")
    rows = [
        [s, NAMES[p], *(f"{row[k]:.3f}" if row.get(k) is not None else "-" for k in keys)]
        for p in ("wm_bc", "imagination")
        for s, row in rows_of(chains, p).items()
    ]
    if not rows:
        return
    yield f"### {world}: the heads on real episodes\n"
    yield table(["seed", "policy", "reward correlation", "reward bias", "KL to the clone"], rows)
    values = [
        [s, *value_cells(row)] for s, row in rows_of(chains, "imagination").items() if "value_cut" in row
    ]
    if values:
        yield table(
            [
                "seed",
                "value",
                "discounted return to the end",
                "rest of the value beyond the end",
                "correlation",
            ],
            values,
        )
    both = [
        [s, NAMES[p], *first_ticks(row)]
        for p in ("wm_bc", "imagination")
        for s, row in rows_of(chains, p).items()
        if "first_ticks" in row
    ]
    if both:
        yield table(["seed", "policy", *FIRST_TICKS], both)
    shown = policy_table(chains)
    modes = [p for q in LIKELIEST if q in shown for p in (q.removesuffix("_argmax"), q) if p in shown]
    if modes:
        yield "Sampled against argmax deployment:\n"
        yield table(
            ["policy", "return", "success"],
            [[NAMES[p], spread(shown[p]["mean"]), spread(shown[p]["success"])] for p in modes],
        )


def improvement(results: Mapping[str, Any]) -> Iterator[str]:
    """Imagination seeds and settings on the networks of the first chain."""
    first = results["chains"].get("yard", {}).get("0", {})
    runs = {"seed 0 (the chain itself)": first}
    runs |= {f"seed {s}": results["runs"].get(f"improve-seed_{s}", {}) for s in SEEDS[1:]}
    runs |= {name: results["runs"].get(f"improve-{name}", {}) for name in IMPROVEMENT}
    clone = first.get("policies", {}).get("wm_bc")
    rows = []
    for name, run in runs.items():
        row = run.get("policies", {}).get("imagination")
        if row and clone:
            gain = differences({"0": {"policies": {"a": row, "b": clone}}}, "a", "b")
            assert gain is not None
            kl = row.get("kl_to_cloned")
            change, falls = spread(gain["seeds"]["0"], sign=True), f"{np.mean(row['fallen']):.2f}"
            mean = f"{np.mean(row['return']):.2f}"
            rows.append([name, mean, change, "-" if kl is None else f"{kl:.2f}", falls, *first_ticks(row)])
    if rows and clone:
        falls, mean = f"{np.mean(clone['fallen']):.2f}", f"{np.mean(clone['return']):.2f}"
        rows.insert(0, ["the clone, no steps", mean, "-", "0.00", falls, *first_ticks(clone)])
        yield "## Imagination training on one agent: seeds and settings (yard, chain 0)\n"
        header = ["run", "return", "paired difference to the clone", "KL to the clone, nats", "falls"]
        yield table([*header, *FIRST_TICKS], rows)
        yield from over_imagination_seeds(runs, clone)
    yield from other_networks(results)


def over_imagination_seeds(runs: Mapping[str, Any], clone: Mapping[str, Any]) -> Iterator[str]:
    """Mean gain of the seeds of imagination on one agent; the first ones of `runs` are these."""
    seeds = [run.get("policies", {}).get("imagination") for run in list(runs.values())[: len(SEEDS)]]
    gains = [np.subtract(row["return"], clone["return"]) for row in seeds if row]
    if len(gains) > 1:
        over = spread(crossed_mean(gains), sign=True)
        t = spread(student([float(gain.mean()) for gain in gains]), sign=True)
        yield f"Over these {len(gains)} seeds: {over} over seeds and starts, {t} as a t interval.\n"


def other_networks(results: Mapping[str, Any]) -> Iterator[str]:
    """Both policies of a chain on changed networks, against the same starts on its own."""
    arms = [("heads-agent_only", "yard-0", "heads that read the agent tokens alone, same world model")]
    for chain in POLICY_CHAINS:
        arms.append((f"shortcut_loss-{chain}", chain, "world model with the shortcut loss, same tokenizer"))
    rows = []
    for key, chain, name in arms:
        world, seed = chain.rsplit("-", 1)
        own = results["chains"].get(world, {}).get(seed, {}).get("policies", {})
        made = results["runs"].get(key, {}).get("policies", {})
        for kind in ("wm_bc", "imagination"):
            if kind not in made or kind not in own:
                continue
            change = differences({"0": {"policies": {"a": made[kind], "b": own[kind]}}}, "a", "b")
            assert change is not None
            cells = [f"{np.mean(made[kind][what]):.2f}" for what in ("return", "success", "fallen")]
            rows.append([name, chain, NAMES[kind], *cells, spread(change["seeds"]["0"], sign=True)])
    if rows:
        yield "Other networks, and the paired difference to the chain's own:\n"
        header = ["change", "chain", "policy", "return", "success", "falls", "difference"]
        yield table(header, rows)


def ladder(results: Mapping[str, Any]) -> Iterator[str]:
    """The rungs below pixels."""
    found = results.get("ladder")
    if found:
        yield "## The ladder\n"
        header = ["rung", "seed", "start", "after imagination", "optimum", "gap closed", "s", ""]
        keys = ("start", "after", "optimum", "closed", "seconds")
        yield table(header, [
            [row["rung"], row["seed"], *(f"{row[k]:.2f}" for k in keys), "ok" if row["passed"] else "FAILED"]
            for row in found
        ])  # fmt: skip


def failed_gates(results: Mapping[str, Any]) -> Iterator[str]:
    """What stopped nothing and must be known."""
    chains = {f"{world}-{s}": run for world, c in results["chains"].items() for s, run in c.items()}
    named = {name: run["gates"] for name, run in (chains | results["runs"]).items() if "gates" in run}
    if not named:
        return
    failed = [
        [name, phase, gate["name"], f"{gate['value']:.3g}", f"{gate['op']} {gate['limit']:g}"]
        for name, gates in named.items()
        for phase, found in gates.items()
        for gate in found
        if not gate["ok"]
    ]
    count = len({row[0] for row in failed})
    yield "## Gates that failed\n"
    yield f"{count} of {len(named)} runs failed one; training goes on whatever gates say.\n"
    if failed:
        yield table(["run", "phase", "gate", "value", "must be"], failed)


def compute(results: Mapping[str, Any]) -> Iterator[str]:
    """What training cost that led to each policy of the first chain, and what more of it gives."""
    first = results["chains"].get("yard", {}).get("0", {})
    longer, clone = (results["runs"].get(f"compute-{key}", {}) for key in ("yard-0", "clone"))
    world = ("tokenizer", "dynamics")
    arms = [
        ("bc_scratch", first, ("bc_scratch",), ""),
        ("bc_scratch", longer, ("bc_scratch",), LONG),
        ("vpt", first, ("vpt_idm", "vpt"), ""),
        ("vpt", longer, ("vpt_idm", "vpt"), LONG),
        ("wm_bc", first, (*world, "agent"), ""),
        ("wm_bc", clone, (*world, "agent"), ", as long as with imagination"),
        ("imagination", first, (*world, "agent", "imagination"), ""),
    ]  # fmt: skip
    rows = []
    for policy, run, phases, what in arms:
        row = run.get("policies", {}).get(policy)
        training = run.get("training", {})
        if row and all(phase in training for phase in phases):
            seconds = sum(training[phase]["cpu_s"] for phase in phases)
            cells = [spread(bootstrap_mean(row["return"])), spread(crossed_rate([row["success"]]))]
            rows.append([NAMES[policy] + what, f"{seconds:.0f}", *cells])
    if longer or clone:
        yield "## Compute (yard, chain 0)\n"
        yield table(["policy", "training, CPU s", "return", "success"], rows)


def costs(results: Mapping[str, Any]) -> Iterator[str]:
    """Where and by which code the networks were trained; seconds of every stage."""
    stages = results["stages"]
    yield "## Cost\n"
    runs = [run for chains in results["chains"].values() for run in chains.values()] + [
        *results["runs"].values()
    ]
    made = [origin for run in runs for origin in run.get("training", {}).values() if "commit" in origin]
    if made:
        dates = sorted(origin["date"][:10] for origin in made)
        commits = sorted({str(origin["commit"]) for origin in made})
        machines = sorted({origin["machine"] for origin in made})
        yield f"Machine: {'; '.join(machines)}. {dates[0]} to {dates[-1]}. Commits: {', '.join(commits)}.\n"
    rows = [[name, clock(s)] for name, s in stages.items()]
    yield table(["stage", "time"], [*rows, ["**all**", clock(sum(stages.values()))]])


def short(results: Mapping[str, Any]) -> str:
    """The numbers as JSON with six digits each."""
    return json.dumps(json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}")))


def write(out: Path, notes: str, also: Sequence[Path] = ()) -> tuple[str, dict[str, Any]]:
    """The page as text, and the numbers behind it."""
    results = merged([collect(out), *map(_part, also)])
    if not any(results["chains"].values()):
        raise UserError(f"{out} holds no results of a study yet: run d4-demo --study learning first")
    parts = [notes]
    for world, chains in with_derived(results).items():
        if chains:
            parts += policies(f"## {world}: policies in the simulator", chains)
        if others := on_other_starts(results, world):
            parts += policies(f"### {world}: other starts, on which nothing was decided", others)
    parts += compute(results)
    parts += improvement(results)
    parts += sparse_labels(results)
    parts += shortcut(results)
    parts.append("## Calibration\n")
    for world, chains in with_derived(results).items():
        parts += calibration(world, chains)
    parts += [*ladder(results), *failed_gates(results), *costs(results)]
    return "\n".join(parts), results


def _part(path: Path) -> dict[str, Any]:
    """The numbers of another page.

    Raises:
        UserError: there are none.
    """
    try:
        part: dict[str, Any] = json.loads(path.read_text())
        found = [*(part[key] for key in ("chains", "runs", "stages")), *part["chains"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no results.json of a study ({error!r})") from None
    if not all(isinstance(each, dict) for each in found):
        raise UserError(f"{path} is no results.json of a study: chains, runs and stages are objects in one")
    return {"ladder": None, **part}


def _main() -> None:
    args = tyro.cli(Args, prog="python -m d4_sim.study_page")
    text, results = write(args.out, args.notes.read_text() if args.notes else "", args.also)
    folder = args.page.with_suffix("")
    text = "\n".join([text, *figures(args.out, folder, folder.name)])
    for path, content in ((args.page, text), (folder / "results.json", short(results))):
        whole.write(path, content)
    print(f"{args.page} and {folder / 'results.json'}")


def main() -> None:
    """Entry point of ``python -m d4_sim.study_page``."""
    run_cli(_main)


if __name__ == "__main__":
    main()
