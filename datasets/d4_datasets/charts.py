"""Small charts as inline SVG: bars and curves in the colours of the page that they stand in.

They need no script and no library: a page that holds them opens from a file. Colours are the CSS variables
--ink, --muted, --line, --s1 (data), --s2 (marked) and --s3 (marked less).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 320, 96
_TOP, _FOOT, _SIDE = 16, 16, 4  # room for text above and below, and at the sides
_NOTHING: Mapping[int, str] = {}


def _svg(parts: Sequence[str], label: str, width: int = _WIDTH) -> Markup:
    box, body = f"0 0 {width} {_HEIGHT}", "".join(parts)
    return Markup(f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{body}</svg>')


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="var({fill})"/>'


def bars(
    values: Sequence[float],
    ends: tuple[str, str],
    label: str,
    ticks: Sequence[str] = (),
    marked: Mapping[int, str] = _NOTHING,
    above: Sequence[str] = (),
) -> Markup:
    """A histogram. `ends` stand under its first and last bar, or `ticks` one under each; `marked` gives bars
    another colour; `above` are more elements. A value above 0 is always seen, however small.
    """
    most = max([*values, 1e-12])
    step = (_WIDTH - 2 * _SIDE) / max(len(values), 1)
    room = _HEIGHT - _TOP - _FOOT
    parts = [_rect(_SIDE, _HEIGHT - _FOOT, _WIDTH - 2 * _SIDE, 1, "--line")]
    for i, value in enumerate(values):
        high = max(room * value / most, 1.5) if value else 0.0
        color = marked.get(i, "--s1")
        parts.append(_rect(_SIDE + i * step + 0.5, _HEIGHT - _FOOT - high, max(step - 1, 0.5), high, color))
    base = _HEIGHT - 4
    if ticks:
        parts += [_text(_SIDE + (i + 0.5) * step, base, tick, "middle") for i, tick in enumerate(ticks)]
    else:
        parts += [_text(_SIDE, base, ends[0]), _text(_WIDTH - _SIDE, base, ends[1], "end")]
    return _svg([*parts, *above], label)


def curve(values: Sequence[float], label: str, low: float, high: float) -> Markup:
    """A curve over equal steps between `low` and `high`, which are written at its side."""
    width, left = 2 * _WIDTH, 44
    span = max(high - low, 1e-12)
    room, base = _HEIGHT - _TOP, _HEIGHT - _TOP / 2
    step = (width - left - _SIDE) / max(len(values) - 1, 1)
    at = [
        (left + i * step, base - room * (min(max(v, low), high) - low) / span) for i, v in enumerate(values)
    ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    parts = [_rect(left, base, width - left - _SIDE, 1, "--line")]
    parts.append(f'<polyline points="{points}" fill="none" stroke="var(--s1)" stroke-width="1.5"/>')
    parts += [_text(left - 6, base, f"{low:.3g}", "end"), _text(left - 6, _TOP, f"{high:.3g}", "end")]
    return _svg(parts, label, width)


def lag_chart(
    values: Mapping[int, float], found: int, interval: tuple[int, int], expected: int, label: str
) -> Markup:
    """Correlation by lag: the best one marked, its interval too but less, the expected one pointed at."""
    lags = sorted(values)
    step = (_WIDTH - 2 * _SIDE) / len(lags)
    above = [_text(_SIDE, 10, f"best {values[found]:.2f}")]
    if expected in lags:
        middle = _SIDE + (lags.index(expected) + 0.5) * step
        above.append(f'<path d="M{middle - 4:.1f} 3h8l-4 8z" fill="var(--ink)"/>')
        above.append(_text(middle + 8, 10, "expected"))
    marked = {lags.index(lag): "--s3" for lag in range(interval[0], interval[1] + 1)}
    marked[lags.index(found)] = "--s2"
    return bars([values[lag] for lag in lags], ("", ""), label, [str(lag) for lag in lags], marked, above)
