"""Shortest ways over Crafter's map."""

from __future__ import annotations

import heapq

import numpy as np

Cell = tuple[int, int]

MOVES: tuple[tuple[str, Cell], ...] = (
    ("move_left", (-1, 0)),
    ("move_right", (1, 0)),
    ("move_up", (0, -1)),
    ("move_down", (0, 1)),
)


def add(cell: Cell, step: Cell) -> Cell:
    """The cell one step further."""
    return cell[0] + step[0], cell[1] + step[1]


def route(start: Cell, cost: np.ndarray, goal: np.ndarray, most: float = np.inf) -> list[Cell]:
    """The cheapest way from `start` to a goal, as the cells after `start`.

    Args:
        start: where the way begins, inside the map; it counts as no goal.
        cost: [X, Y] of entering a cell, above 0; infinite where nobody can go.
        goal: bool [X, Y]; entering one costs 1, whatever `cost` says of it.
        most: what the way may cost.

    Returns:
        Neighbouring cells up to the goal; empty if there is no way. Equal maps give equal ways.
    """
    (width, height), inf = cost.shape, float("inf")
    # A frame of cells that nobody enters saves asking whether a neighbour is inside.
    price = np.full((width + 2, height + 2), inf)
    price[1:-1, 1:-1] = np.where(goal, 1.0, cost)
    at, row = (start[0] + 1) * (height + 2) + start[1] + 1, height + 2
    prices: list[float] = price.ravel().tolist()
    goals = set(((np.argwhere(goal) + 1) @ [row, 1]).tolist()) - {at}
    best, before, queue = {at: 0.0}, {at: at}, [(0.0, at)]
    while queue:
        spent, cell = heapq.heappop(queue)
        if cell in goals:
            return _walk(before, cell, at, row)
        if spent > best[cell]:
            continue
        for near in (cell - row, cell + row, cell - 1, cell + 1):
            total = spent + prices[near]
            if total <= most and total < best.get(near, inf):
                best[near], before[near] = total, cell
                heapq.heappush(queue, (total, near))
    return []


def _walk(before: dict[int, int], end: int, start: int, row: int) -> list[Cell]:
    way = [end]
    while before[way[-1]] != start:
        way.append(before[way[-1]])
    return [(cell // row - 1, cell % row - 1) for cell in reversed(way)]
