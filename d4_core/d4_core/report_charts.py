"""Charts of a report: inline SVG in the page's font and colours, so that it follows light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

_CURVE_POINTS = 300  # of a drawn curve; more only make the page heavier

# Drawn in stand-in colours that become CSS variables.
_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_COLORS = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05")
_THEME = {_INK: "var(--ink)", _MUTED: "var(--muted)", _LINE: "var(--line)"} | {
    color: f"var(--s{number})" for number, color in enumerate(_COLORS, 1)
}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "d4", "font.size": 9.5, "text.color": _INK, "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": _LINE, "grid.linewidth": 0.7, "xtick.color": _LINE, "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED, "ytick.labelcolor": _MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "legend.frameon": False, "legend.fontsize": 8.8,
}  # fmt: skip
_SERIES = {  # of open-loop charts: label, colour, line style, marker
    "model": ("world model", 0, "-", "o"),
    "copy_last": ("copy the last frame", 1, "--", "s"),
    "random": ("a random frame", 2, ":", "^"),
    "reconstruction": ("tokenizer alone (best possible)", 3, "-.", "D"),
}


def curve_chart(name: str, steps: np.ndarray, values: np.ndarray) -> Markup:
    """A metric over the steps of its phase ([n] each): faint as logged, strong smoothed.

    The axis is logarithmic where positive values span more than a factor of 30.
    """
    steps, values = _thin(steps), _thin(values)
    smooth = _smooth(values, len(values) // 20)
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.0, 2.35), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, values, color=_COLORS[0], alpha=0.28, linewidth=0.9)
        axes.plot(steps, smooth, color=_COLORS[0], linewidth=1.8, marker="o" if len(steps) == 1 else None)
        if values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(name)
        axes.set_xlabel("step")
        return _svg(figure, f"{name} over steps, from {smooth[0]:.3g} to {smooth[-1]:.3g}")


def horizon_chart(
    title: str, horizons: Sequence[int], series: Mapping[str, Sequence[float | None]]
) -> Markup:
    """Quality of prediction at each horizon (frames), one line per series; None leaves a gap."""
    ordered = [name for name in _SERIES if name in series] + [name for name in series if name not in _SERIES]
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in ordered:
            label, color, dash, marker = _SERIES.get(name, (name, 4, "-", "x"))
            look: Any = {"color": _COLORS[color], "linestyle": dash, "marker": marker, "markersize": 5}
            width = 2.4 if name == "model" else 1.5
            values = np.array(series[name], np.float64)  # None becomes NaN
            axes.plot(horizons[: len(values)], values, linewidth=width, label=label, **look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(horizons, [str(h) for h in horizons])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("frames ahead without seeing")
        axes.set_title(title)
        figure.legend(loc="outside lower left", ncols=2)
        return _svg(
            figure, f"{title}, for {', '.join(ordered)} at {', '.join(map(str, horizons))} frames ahead"
        )


def scatter_chart(real: Sequence[float], imagined: Sequence[float]) -> Markup:
    """Return of each imagined rollout against that of a real one from the same first frame."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.6), layout="constrained")
        axes = figure.subplots()
        ends = [min(*real, *imagined), max(*real, *imagined)]
        axes.plot(ends, ends, color=_MUTED, linewidth=1, linestyle="--", label="imagined equals real")
        axes.plot(real, imagined, "o", color=_COLORS[0], markersize=4.5, alpha=0.6, markeredgewidth=0)
        axes.set_title("Imagined against real return")
        axes.set_xlabel("real")
        axes.set_ylabel("imagined")
        figure.legend(loc="outside lower left")
        return _svg(figure, f"Imagined against real return of {len(real)} rollouts")


def _thin(values: np.ndarray) -> np.ndarray:
    """Means over equal blocks, at most `_CURVE_POINTS` of them."""
    edges = np.linspace(0, len(values), min(len(values), _CURVE_POINTS) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Moving mean over `half` neighbours on both sides; over fewer near the ends, to stay centred."""
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an element for HTML."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # its style sheet would apply to the whole page
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # group identifiers repeat from chart to chart; those of clip paths and markers are hashes in use
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    view = re.findall(r'viewBox="[^"]*"', text)[0]
    text = f'<svg {view} role="img" aria-label="{escape(label)}">' + text[text.index(">") + 1 :]
    for color, variable in _THEME.items():
        text = text.replace(color, variable)
    return Markup(text)
