"""The page of a study: every number of it as Markdown tables, with what holds and what does not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from d4_datasets.errors import UserError, run_cli
from d4_sim.stages import clock
from d4_sim.study import CASCADE, IMPROVEMENT, LABELS, SEEDS
from d4_sim.study_figures import figures
from d4_sim.study_results import (
    PAIRS,
    Interval,
    at_horizon,
    collect,
    differences,
    gap_closed,
    policy_table,
    recovered,
    rows_of,
)

NAMES = {
    "random": "random", "data": "the logs themselves", "bc_scratch": "cloned from scratch",
    "vpt": "VPT style (inverse dynamics, pseudo-labels, cloned)", "wm_bc": "cloned on the world model",
    "planner": "CEM planning in the world model", "imagination": "after imagination training",
    "expert": "scripted optimum", "wm_bc_argmax": "cloned on the world model, argmax",
    "imagination_argmax": "after imagination training, argmax",
}  # fmt: skip
FIRST_TICKS = ("imagined return of the first ticks", "real return of the same starts")
HORIZON = 8  # frames ahead, in the tables that show one horizon


@dataclass(kw_only=True)
class Args:
    """Write the page of a study: <page>, and every number in <page without .md>/results.json."""

    out: Path
    """Folder of the study."""
    page: Path
    """Markdown file to write."""
    notes: Path | None = None
    """Markdown that comes first: what was measured where, and what to make of it."""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def spread(value: Interval, digits: int = 2, sign: bool = False) -> str:
    """mean [low, high]."""
    mean, low, high = (f"{x:+.{digits}f}" if sign else f"{x:.{digits}f}" for x in value)
    return f"{mean} [{low}, {high}]"


def verdict(claim: str, holds: bool, figure: str) -> str:
    """One line that says whether a claim holds."""
    return f"- {'**holds**' if holds else '**does not hold**'}: {claim} ({figure})\n"


def policies(world: str, chains: Mapping[str, Any]) -> Iterator[str]:
    """Section 1: every policy of a world over its chains."""
    rows = policy_table(chains)
    seeds = sorted(chains)
    yield f"## {world}: policies in the simulator, {len(seeds)} full chains\n"
    shown = [policy for policy in rows if not policy.endswith("argmax")]
    yield table(
        ["policy", "return [95 %, seeds and episodes]", *(f"seed {s}" for s in seeds), "success", "episodes"],
        [
            [
                NAMES[p], spread(rows[p]["mean"]),
                *(f"{rows[p]['seeds'][s][0]:.2f}" if s in rows[p]["seeds"] else "-" for s in seeds),
                spread(rows[p]["success"]), rows[p]["episodes"],
            ]
            for p in shown
        ],
    )  # fmt: skip
    pairs = {pair: found for pair in PAIRS if (found := differences(chains, *pair))}
    yield "Paired differences on the same starts:\n"
    yield table(
        ["difference", "over seeds and episodes", "t interval over seeds", *(f"seed {s}" for s in seeds)],
        [
            [
                f"{NAMES[a]} - {NAMES[b]}", spread(d["nested"], sign=True),
                spread(d["student"], sign=True) if "student" in d else "one seed",
                *(spread(d["seeds"][s], sign=True) if s in d["seeds"] else "-" for s in seeds),
            ]
            for (a, b), d in pairs.items()
        ],
    )  # fmt: skip
    for (a, b), d in pairs.items():
        low = d["nested"][1]
        yield verdict(f"{NAMES[a]} is better than {NAMES[b]}", low > 0, f"interval begins at {low:+.2f}")
    closed = gap_closed(chains)
    if closed:
        share = float(np.mean(list(closed.values())))
        each = ", ".join(f"seed {s} {v:.2f}" for s, v in closed.items())
        yield verdict(
            "imagination closes a third of the gap to the optimum", share >= 1 / 3, f"{share:.2f}: {each}"
        )


def first_ticks(row: Mapping[str, Any]) -> list[str]:
    """The cells under `FIRST_TICKS` of a policy's row."""
    ticks = row.get("first_ticks", {})
    return [f"{np.mean(ticks[kind]):.2f}" if kind in ticks else "-" for kind in ("imagined", "real")]


def calibration(world: str, chains: Mapping[str, Any]) -> Iterator[str]:
    """Section 4: what the heads say against what happened."""
    header = [
        "seed",
        "policy",
        "reward correlation",
        "reward bias",
        "value correlation",
        "value bias",
        "KL to the clone",
    ]
    keys = ("reward_correlation", "reward_bias", "value_correlation", "value_bias", "kl_to_cloned")
    rows = [
        [s, NAMES[p], *(f"{row[k]:.3f}" if row.get(k) is not None else "-" for k in keys)]
        for p in ("wm_bc", "imagination")
        for s, row in rows_of(chains, p).items()
    ]
    if not rows:
        return
    yield f"### {world}: the heads on real episodes\n"
    yield table(header, rows)
    both = [
        [s, NAMES[p], *first_ticks(row)]
        for p in ("wm_bc", "imagination")
        for s, row in rows_of(chains, p).items()
        if "first_ticks" in row
    ]
    if both:
        yield table(["seed", "policy", *FIRST_TICKS], both)
    shown = policy_table(chains)
    modes = [p for p in ("wm_bc", "wm_bc_argmax", "imagination", "imagination_argmax") if p in shown]
    if len(modes) == 4:
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
    narrow = results["runs"].get("heads-agent_only", {}).get("policies")
    if narrow and clone:
        yield "Heads that read the agent tokens alone, on the same world model:\n"
        kinds = ("wm_bc", "imagination")
        pairs = [(NAMES[k], narrow[k]["return"], first["policies"][k]["return"]) for k in kinds]
        means = [[name, f"{np.mean(a):.2f}", f"{np.mean(b):.2f}"] for name, a, b in pairs]
        yield table(["policy", "agent tokens alone", "and the frame's own tokens"], means)


def open_loop_rows(runs: Mapping[str, Any], names: Mapping[str, str]) -> list[list[str]]:
    """name, PSNR, SSIM and position error of open-loop runs at `HORIZON` frames."""
    rows = []
    for key, name in names.items():
        for steps, curves in runs.get(key, {}).get("open_loop", {}).get("by_steps", {}).items():
            kinds = ("psnr", "ssim", "position")
            values = [at_horizon(curves, kind, HORIZON) for kind in kinds]
            cells = ["-" if v is None else f"{v:.{d}f}" for v, d in zip(values, (2, 3, 3), strict=True)]
            rows.append([name, steps, *cells, f"{curves['frames_per_s']:.0f}"])
    return rows


_OPEN_LOOP = ["run", "K", f"PSNR, {HORIZON} frames ahead (dB)", "SSIM", "position error (m)", "frames/s"]


def psnr_of(runs: Mapping[str, Any], key: str) -> float | None:
    """PSNR of a run at `HORIZON` frames with its first number of sampling steps."""
    by_steps = runs.get(key, {}).get("open_loop", {}).get("by_steps", {})
    return at_horizon(next(iter(by_steps.values())), "psnr", HORIZON) if by_steps else None


def sparse_labels(results: Mapping[str, Any]) -> Iterator[str]:
    """Section 2: how many commands are enough, and whether they carry over to another look."""
    runs = results["runs"]
    keys = {f"labels-{share:g}": f"{share:.0%} of the commands" for share in LABELS}
    yield from labelled(runs, "## Sparse commands (yard)\n", keys)
    values = {k: v for k in keys if (v := psnr_of(runs, k)) is not None}
    if {"labels-0", "labels-0.1", "labels-1"} <= values.keys():
        share = recovered(values, "labels-0.1", "labels-0", "labels-1")
        claim = "10 % of the commands recover 85 % of the PSNR between none and all"
        yield verdict(claim, share >= 0.85, f"{share:.2f}")
    half = {f"half-{share:g}": f"{share:.0%} of the commands" for share in LABELS[1:-1]}
    yield from labelled(runs, "### The same with every other clip of a batch from labelled drives\n", half)
    yield from another_look(runs)


def labelled(runs: Mapping[str, Any], heading: str, keys: Mapping[str, str]) -> Iterator[str]:
    """World models and policies of runs that saw a share of the commands."""
    rows = open_loop_rows(runs, keys)
    if not rows:
        return
    yield heading
    yield table(_OPEN_LOOP, rows)
    driven = [(name, runs[k]["policies"]) for k, name in keys.items() if runs.get(k, {}).get("policies")]
    yield table(
        ["run", "cloned: return", "cloned: success", "improved: return", "improved: success"],
        [
            [name, *(f"{np.mean(p[kind][what]):.2f}" if kind in p else "-"
                     for kind in ("wm_bc", "imagination") for what in ("return", "success"))]
            for name, p in driven
        ],
    )  # fmt: skip


def another_look(runs: Mapping[str, Any]) -> Iterator[str]:
    """Commands in one look of the world, measured in the other."""
    looks = {"looks-none": "no commands", "looks-first": "commands in the other look only",
             "looks-both": "commands in both looks"}  # fmt: skip
    rows = open_loop_rows(runs, looks)
    if rows:
        yield "### Another look: video of the second, measured there\n"
        yield table(_OPEN_LOOP, rows)
        values = {k: v for k in looks if (v := psnr_of(runs, k)) is not None}
        if len(values) == 3:
            share = recovered(values, "looks-first", "looks-none", "looks-both")
            yield f"Recovered in the second look: {share:.0%} of the PSNR (paper: 76 %).\n"


def shortcut(results: Mapping[str, Any]) -> Iterator[str]:
    """Section 3: sampling steps, and one change at a time."""
    runs = results["runs"]
    names = {"shortcut-with": "with the shortcut loss", "shortcut-without": "without"}
    rows = open_loop_rows(runs, names)
    if rows:
        yield "## Shortcut forcing (yard, 64 levels)\n"
        yield table(_OPEN_LOOP, rows)
        by_steps = runs.get("shortcut-with", {}).get("open_loop", {}).get("by_steps", {})
        few, many = (at_horizon(by_steps[k], "psnr", HORIZON) if k in by_steps else None for k in ("4", "64"))
        if few is not None and many is not None:
            yield verdict(
                "K = 4 is within 5 % of K = 64", few >= 0.95 * many, f"PSNR {few:.2f} and {many:.2f} dB"
            )
    rows = open_loop_rows(runs, {f"cascade-{name}": name for name in CASCADE})
    if rows:
        yield "## One change at a time (yard, half of the training)\n"
        yield table(_OPEN_LOOP, rows)


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


def write(out: Path, notes: str) -> tuple[str, dict[str, Any]]:
    """The page as text, and the numbers behind it."""
    results = collect(out)
    if not any(results["chains"].values()):
        raise UserError(f"{out} holds no results of a study yet: run d4-demo --study learning first")
    parts = [notes]
    for world, chains in results["chains"].items():
        if chains:
            parts += policies(world, chains)
    parts += improvement(results)
    parts += sparse_labels(results)
    parts += shortcut(results)
    parts.append("## Calibration\n")
    for world, chains in results["chains"].items():
        parts += calibration(world, chains)
    parts += [*ladder(results), *costs(results)]
    return "\n".join(parts), results


def _main() -> None:
    args = tyro.cli(Args, prog="python -m d4_sim.study_page")
    text, results = write(args.out, args.notes.read_text() if args.notes else "")
    folder = args.page.with_suffix("")
    text = "\n".join([text, *figures(args.out, folder, folder.name)])
    for path, content in ((args.page, text), (folder / "results.json", json.dumps(results))):
        aside = path.with_name(f".tmp-{path.name}")
        aside.write_text(content)
        os.replace(aside, path)
    print(f"{args.page} and {folder / 'results.json'}")


def main() -> None:
    """Entry point of ``python -m d4_sim.study_page``."""
    run_cli(_main)


if __name__ == "__main__":
    main()
