"""The sections of a study's page about world models: commands, looks, sampling steps, single changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d4_core.stats import bootstrap_mean, wilson
from d4_sim.study import CASCADE, FRESH, FRESH_LABELS, FRESH_SCALES, LABELS, OWN_LOOK
from d4_sim.study_results import at_horizon, differences, recovered
from d4_sim.tables import spread, table, verdict

HORIZON = 8  # frames ahead, in the tables that show one horizon
CHANGES = {
    "nano": "all of them with the shortcut loss, none changed",
    "velocity": "predicts velocities, loss on x",
    "velocity_loss": "predicts velocities, loss on them",
    "ramp": "loss grows with the signal level (ramp)",
    "one_time_layer": "one layer of attention over time instead of two",
    "no_registers": "no registers",
    "no_committed": "no frames at the signal level of the context",
    "noisy_context": "noisier context, signal level 0.75",
    "no_image_rows": "no clips taken as single pictures",
    "more_image_rows": "more clips taken as single pictures, 0.3",
    "one_length": "one length of clips",
    "labels_as_they_come": "clips with commands as they come, a fifth",
    "no_bootstrap": "no shortcut (bootstrap) loss",
}

_OPEN_LOOP = ["run", "K", f"PSNR, {HORIZON} frames ahead (dB)", "SSIM", "position error (m)"]


def quality(curves: Mapping[str, Any], version: str = "model") -> list[str]:
    """Cells of PSNR, SSIM and position error of an open-loop measurement at `HORIZON` frames."""
    values = [at_horizon(curves, kind, HORIZON, version) for kind in ("psnr", "ssim", "position")]
    return ["-" if v is None else f"{v:.{d}f}" for v, d in zip(values, (2, 3, 3), strict=True)]


def open_loop_rows(runs: Mapping[str, Any], names: Mapping[str, str]) -> list[list[str]]:
    """Rows under `_OPEN_LOOP`; the first one is what copying the last frame gives."""
    found = {name: curves for key, name in names.items() if (curves := by_steps(runs, key))}
    rows = [[name, steps, *quality(c)] for name, curves in found.items() for steps, c in curves.items()]
    if rows:
        first = next(iter(next(iter(found.values())).values()))
        rows.insert(0, ["the last real frame, copied", "-", *quality(first, "copy_last")])
    return rows


def by_steps(runs: Mapping[str, Any], key: str) -> dict[str, Any]:
    """{number of sampling steps: open-loop measurement} of a run."""
    found: dict[str, Any] = runs.get(key, {}).get("open_loop", {}).get("by_steps", {})
    return found


def psnr_of(runs: Mapping[str, Any], key: str, horizon: int = HORIZON) -> float | None:
    """PSNR of a run at `horizon` frames with its first number of sampling steps."""
    found = by_steps(runs, key)
    return at_horizon(next(iter(found.values())), "psnr", horizon) if found else None


def sparse_labels(results: Mapping[str, Any]) -> Iterator[str]:
    """How many commands are enough, and whether they carry over to another look."""
    runs = results["runs"]
    keys = {f"labels-{share:g}": f"{share:.0%} of the commands" for share in LABELS}
    yield from labelled(runs, "## Sparse commands (yard)\n", keys)
    yield from share_of_labels(runs)
    fresh = {
        f"{kind}-{seed}-{share:g}": f"seed {seed}, {scale:.0%} of the training, {share:.0%} of the commands"
        for seed in FRESH for kind, scale in FRESH_SCALES.items() for share in FRESH_LABELS
    }  # fmt: skip
    yield from labelled(runs, "### The same on fresh recordings, without the shortcut loss\n", fresh)
    half = {f"half-{share:g}": f"{share:.0%} of the commands" for share in LABELS[1:-1]}
    yield from labelled(runs, "### The same with every other clip of a batch from labelled drives\n", half)
    yield from another_look(runs)


def share_of_labels(runs: Mapping[str, Any]) -> Iterator[str]:
    """What a tenth of the commands recovers, frame by frame, on every recording."""
    places = {"labels": "the recording above"} | {f"fresh-{s}": f"a fresh one, seed {s}" for s in FRESH}
    places |= {f"full-{s}": f"a fresh one, seed {s}, all of the training" for s in FRESH}
    rows = []
    for place, name in places.items():
        shares = []
        for horizon in (1, 2, 4, 8, 16):
            found = {k: psnr_of(runs, f"{place}-{k}", horizon) for k in ("0", "0.1", "1")}
            values = {k: v for k, v in found.items() if v is not None}
            shares.append(recovered(values, "0.1", "0", "1") if len(values) == len(found) else None)
        if shares[3] is not None:
            rows.append((name, shares))
    if not rows:
        return
    yield "Share of the PSNR between none and all that 10 % of the commands recover, by frames ahead:\n"
    yield table(
        ["recording", "1", "2", "4", "8", "16"],
        [[name, *("-" if v is None else f"{v:.2f}" for v in shares)] for name, shares in rows],
    )
    for name, shares in rows:
        share = shares[3]
        assert share is not None
        claim = f"10 % of the commands recover 85 % of the PSNR between none and all, {HORIZON} frames ahead"
        yield verdict(f"{claim}, on {name}", share >= 0.85, f"{share:.2f}")


def labelled(runs: Mapping[str, Any], heading: str, keys: Mapping[str, str]) -> Iterator[str]:
    """World models and policies of runs that saw a share of the commands."""
    rows = open_loop_rows(runs, keys)
    if not rows:
        return
    yield heading
    yield table(_OPEN_LOOP, rows)
    driven = [(name, runs[k]["policies"]) for k, name in keys.items() if runs.get(k, {}).get("policies")]
    if driven:
        cells = [f"{kind}: {what}" for kind in ("cloned", "improved") for what in ("return", "success")]
        yield table(["run", *cells, "difference"], [[name, *driven_cells(p)] for name, p in driven])


def driven_cells(policies: Mapping[str, Any]) -> list[str]:
    """Return and success of the clone and the improved policy of one run, and their paired difference."""
    found = [policies.get(kind) for kind in ("wm_bc", "imagination")]
    cells = []
    for row in found:
        if row is None:
            cells += ["-", "-"]
        else:
            success = row["success"]
            cells += [spread(bootstrap_mean(row["return"])), spread(wilson(sum(success), len(success)))]
    change = differences({"0": {"policies": policies}}, "imagination", "wm_bc")
    return [*cells, spread(change["seeds"]["0"], sign=True) if change else "-"]


def another_look(runs: Mapping[str, Any]) -> Iterator[str]:
    """Commands in one look of the world, measured in the other and in their own."""
    looks = {"looks-none": "no commands", "looks-first": "commands in the first look only",
             "looks-both": "commands in both looks"}  # fmt: skip
    own = {key: {"open_loop": run.get(OWN_LOOK, {})} for key, run in runs.items() if key in looks}
    for title, found in (("the second look", runs), ("the first look", own)):
        rows = open_loop_rows(found, looks)
        if rows:
            yield f"### Two looks: video of both, measured in {title}\n"
            yield table(_OPEN_LOOP, rows)
            shares = [recovery(found, kind) for kind in ("psnr", "position")]
            if all(share is not None for share in shares):
                psnr, position = (f"{share:.0%}" for share in shares)
                yield f"Those of the first look recover {psnr} of the PSNR here, {position} of the error.\n"


def recovery(runs: Mapping[str, Any], kind: str) -> float | None:
    """Share of the gap between no commands and those of both looks that the first look's close."""
    values = {}
    for key in ("looks-none", "looks-first", "looks-both"):
        curves = next(iter(by_steps(runs, key).values()), None)
        value = at_horizon(curves, kind, HORIZON) if curves else None
        if value is None:
            return None
        values[key] = value
    return recovered(values, "looks-first", "looks-none", "looks-both")


def shortcut(results: Mapping[str, Any]) -> Iterator[str]:
    """Sampling steps, and one change at a time."""
    runs = results["runs"]
    names = {"shortcut-with": "with the shortcut loss", "shortcut-without": "without"}
    rates = [f"{c['frames_per_s']:.0f}" for key in names for c in by_steps(runs, key).values()]
    rows = open_loop_rows(runs, names)
    if rows:
        yield "## Shortcut forcing (yard, 64 levels)\n"
        yield table([*_OPEN_LOOP, "frames/s"], [[*r, v] for r, v in zip(rows, ["-", *rates], strict=True)])
        found = by_steps(runs, "shortcut-with")
        few, many = (at_horizon(found[k], "psnr", HORIZON) if k in found else None for k in ("4", "64"))
        if few is not None and many is not None:
            yield verdict(
                "K = 4 is within 5 % of K = 64", few >= 0.95 * many, f"PSNR {few:.2f} and {many:.2f} dB"
            )
    rows = open_loop_rows(runs, {f"cascade-{name}": CHANGES[name] for name in CASCADE})
    if rows:
        yield "## One change at a time, with the shortcut loss (yard, half of the training)\n"
        yield table(_OPEN_LOOP, rows)
