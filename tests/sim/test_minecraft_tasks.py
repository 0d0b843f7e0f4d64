"""Tasks, milestones, published figures, and the ladder's state machine by properties."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_sim.minecraft.game import Rung
from d4_sim.minecraft.replay import read_recorded
from d4_sim.minecraft.tasks import LADDER, MILESTONES, PUBLISHED, TASKS, Ladder, Watch

names = st.sampled_from(TASKS[:4])
ladders = st.lists(st.builds(Rung, names, st.integers(1, 6)), min_size=1, max_size=6)
happenings = st.lists(st.dictionaries(names, st.integers(1, 9), max_size=3), max_size=40)


def test_the_ladder_is_the_papers() -> None:
    """25 prompts over the 20 tasks; coal and placing a furnace are trained and never asked for."""
    assert len(LADDER) == 25
    assert len(TASKS) == 20
    assert {rung.task for rung in LADDER} <= set(TASKS)
    assert set(TASKS) - {rung.task for rung in LADDER} == {
        "mine_coal", "place_furnace", "open_crafting_table", "open_furnace",
    }  # fmt: skip
    assert [(rung.task, rung.count) for rung in LADDER] == PROMPTS


PROMPTS = [
    ("mine_log", 10), ("craft_planks", 20), ("craft_crafting_table", 1), ("place_crafting_table", 1),
    ("craft_stick", 4), ("craft_wooden_pickaxe", 1), ("use_wooden_pickaxe", 1), ("mine_cobblestone", 3),
    ("craft_planks", 4), ("craft_crafting_table", 1), ("place_crafting_table", 1), ("craft_stick", 4),
    ("craft_stone_pickaxe", 1), ("use_stone_pickaxe", 1), ("mine_iron_ore", 3), ("mine_cobblestone", 8),
    ("craft_planks", 4), ("craft_crafting_table", 1), ("place_crafting_table", 1), ("craft_furnace", 1),
    ("craft_iron_ingot", 3), ("craft_stick", 2), ("craft_iron_pickaxe", 1), ("use_iron_pickaxe", 1),
    ("mine_diamond", None),
]  # fmt: skip


# What the game of MineRL v1.0 (Minecraft 1.16) counts, by task: family, then what is counted.
WOODS = ["oak", "spruce", "birch", "jungle", "acacia", "dark_oak"]
COUNTED = {
    "mine_log": ("mine_block", *(f"{wood}_log" for wood in WOODS)),
    "mine_cobblestone": ("mine_block", "stone", "cobblestone"),
    "mine_iron_ore": ("mine_block", "iron_ore"),
    "mine_coal": ("mine_block", "coal_ore"),
    "mine_diamond": ("mine_block", "diamond_ore"),
    "craft_planks": ("craft_item", *(f"{wood}_planks" for wood in WOODS)),
    "craft_stick": ("craft_item", "stick"),
    "craft_crafting_table": ("craft_item", "crafting_table"),
    "craft_furnace": ("craft_item", "furnace"),
    "craft_iron_ingot": ("craft_item", "iron_ingot"),
    "craft_wooden_pickaxe": ("craft_item", "wooden_pickaxe"),
    "craft_stone_pickaxe": ("craft_item", "stone_pickaxe"),
    "craft_iron_pickaxe": ("craft_item", "iron_pickaxe"),
    "open_crafting_table": ("custom", "interact_with_crafting_table"),
    "open_furnace": ("custom", "interact_with_furnace"),
    "place_crafting_table": ("use_item", "crafting_table"),
    "place_furnace": ("use_item", "furnace"),
    "use_wooden_pickaxe": ("use_item", "wooden_pickaxe"),
    "use_stone_pickaxe": ("use_item", "stone_pickaxe"),
    "use_iron_pickaxe": ("use_item", "iron_pickaxe"),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_told_by_the_games_own_counters_and_by_no_others(task: str) -> None:
    family, *things = COUNTED[task]
    before = {f"minecraft.{f}:minecraft.{thing}": 5 for f, *names in COUNTED.values() for thing in names}
    for thing in things:
        watch = Watch(())
        watch.step(before, {})
        key = f"minecraft.{family}:minecraft.{thing}"
        assert watch.step(before | {key: 7}, {}).amounts == {task: 2.0}


def test_published_figures_cover_the_milestones() -> None:
    """What the paper prints: no minutes where at most 0.5 % succeed, success falls towards the diamond."""
    assert len(MILESTONES) == 12
    assert [column.name for column in PUBLISHED] == ["VPT (finetuned)", "BC", "VLA", "WM+BC", "Dreamer 4"]
    for column in PUBLISHED:
        assert tuple(column.success) == tuple(column.minutes) == tuple(MILESTONES)
        for name, share in column.success.items():
            assert column.minutes[name] is None or share > 0.5
            assert 0 <= share <= 100


# Rows as the paper prints them: VPT (finetuned), BC, VLA, WM+BC, Dreamer 4; per cent, then minutes.
PRINTED = """
log             84.3 97.3 98.5 99.6 99.1   6.3  1.8  2.2  1.2  0.9
planks          65.3 95.7 98.3 99.6 98.9  14.2  4.3  3.4  2.1  2.0
crafting_table   4.7 93.5 97.2 99.1 98.5  27.5  9.5  7.2  4.6  4.4
stick           52.6 95.0 97.7 98.9 98.7  24.0  6.4  5.0  3.1  2.9
wooden_pickaxe   0.0 86.5 94.1 97.3 96.6   -   11.4  9.8  5.7  5.0
cobblestone      6.9 83.9 91.6 97.2 95.9   -   13.3 12.1  6.7  5.6
stone_pickaxe    0.0 53.8 76.7 89.4 90.1   -   15.8 14.5  8.9  6.7
iron_ore         0.1 26.5 46.3 62.9 66.7   -   20.9 23.5 14.3  9.9
furnace          0.0 16.2 42.4 51.1 58.1   -   24.5 24.7 16.1 11.0
iron_ingot       0.1  4.3 22.5 27.8 39.5   -   28.8 30.8 17.2 12.4
iron_pickaxe     0.0  0.6 11.2 16.9 29.0   -   29.1 31.1 17.0 13.3
diamond          0.0  0.0  0.0  0.0  0.7   -    -    -    -   20.7
"""


def test_published_figures_are_those_that_were_printed() -> None:
    """Every number, row by row."""
    rows = [line.split() for line in PRINTED.strip().splitlines()]
    assert [row[0] for row in rows] == list(MILESTONES)
    for name, *cells in rows:
        assert [c.success[name] for c in PUBLISHED] == [float(cell) for cell in cells[:5]]
        assert [c.minutes[name] for c in PUBLISHED] == [None if x == "-" else float(x) for x in cells[5:]]


@given(rungs=ladders, happened=happenings)
def test_rungs_are_climbed_one_by_one_and_never_down(rungs, happened) -> None:
    ladder, before = Ladder(rungs), 0
    for amounts in happened:
        task = ladder.task
        changed = ladder.step(amounts)
        assert before <= ladder.rung <= before + 1
        assert changed == (ladder.task != task)
        before = ladder.rung
    assert ladder.task == rungs[ladder.rung].task


@given(rungs=ladders, happened=happenings, others=happenings)
def test_only_what_was_asked_for_counts(rungs, happened, others) -> None:
    """Whatever else is done in a tick, also what later rungs will ask for, changes nothing, ever."""
    plain, busy = Ladder(rungs), Ladder(rungs)
    for tick, amounts in enumerate(happened):
        asked = {busy.task: amounts.get(busy.task, 0)}
        beside = others[tick] if tick < len(others) else {}
        assert plain.step(asked) == busy.step(beside | asked)
        assert (plain.rung, plain.done) == (busy.rung, busy.done)


@given(rungs=ladders)
def test_counts_are_reached_by_so_many_and_no_fewer(rungs) -> None:
    """One at a time: each rung but the last takes exactly its count; then the ladder stands on the last."""
    ladder, taken = Ladder(rungs), [0] * len(rungs)
    for _ in range(sum(rung.count for rung in rungs)):
        taken[ladder.rung] += 1
        ladder.step({ladder.task: 1})
    assert taken == [rung.count for rung in rungs]
    assert (ladder.rung, ladder.done) == (len(rungs) - 1, rungs[-1].count)


@given(happened=happenings)
def test_a_rung_without_a_count_is_the_last(happened) -> None:
    ladder = Ladder([Rung(TASKS[0], None), Rung(TASKS[1], 1)])
    for amounts in happened:
        assert not ladder.step(amounts)
    assert ladder.rung == 0


def test_too_much_at_once_is_not_saved_for_later() -> None:
    ladder = Ladder([Rung("mine_log", 3), Rung("mine_log", 3), Rung("craft_planks", None)])
    assert not ladder.step({"mine_log": 100})  # the same task is asked for again
    assert (ladder.rung, ladder.done) == (1, 0)
    assert ladder.step({"mine_log": 3})
    assert ladder.task == "craft_planks"


def test_a_ladder_needs_a_rung() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Ladder([])


def stats(**counts: int) -> dict[str, int]:
    return {f"minecraft.{key.replace('__', ':minecraft.')}": n for key, n in counts.items()}


def test_planks_come_four_at_a_time() -> None:
    """Counts of the ladder are items, not crafts: four planks of one craft are four."""
    watch = Watch(tuple(MILESTONES))
    assert watch.step(stats(), {}).amounts == {}
    told = watch.step(stats(craft_item__oak_planks=4), {"oak_planks": 4})
    assert told.amounts == {"craft_planks": 4.0}
    assert told.reached == ("planks",)


def test_what_was_there_from_the_start_is_told_by_the_first_inventory() -> None:
    """Behind a damaged first line, which has none, five diamonds were reached at the second tick."""
    watch = Watch(tuple(MILESTONES))
    assert watch.step(None, None).reached == ()
    assert watch.step(stats(), {"diamond": 5}).reached == ()
    assert watch.had == ("diamond",)
    assert watch.step(stats(), {"diamond": 5, "oak_log": 1}).reached == ("log",)


def test_a_milestone_is_in_the_inventory() -> None:
    """Ore that was broken with the wrong pickaxe is an event of mining, and no ore."""
    watch = Watch(tuple(MILESTONES))
    watch.step(stats(), {})
    told = watch.step(stats(mine_block__iron_ore=1), {})
    assert (told.amounts, told.reached) == ({"mine_iron_ore": 1.0}, ())
    assert watch.step(stats(mine_block__iron_ore=1), {"iron_ore": 1}).reached == ("iron_ore",)


def test_without_an_inventory_the_counter_counts() -> None:
    watch = Watch(("furnace", "log"))
    watch.step(stats(mine_block__oak_log=5), None)
    assert watch.step(stats(mine_block__oak_log=5, craft_item__furnace=1), None).reached == ("furnace",)


def test_what_was_there_from_the_start_is_not_reached() -> None:
    """A session's second part begins with what the first one gathered."""
    watch = Watch(("log", "diamond", "planks"))
    told = [
        watch.step(None, items)
        for items in ({"oak_log": 1, "diamond": 5}, {}, {"oak_log": 2, "oak_planks": 4})
    ]
    assert watch.had == ("log", "diamond")
    assert [t.reached for t in told] == [(), (), ("planks",)]


def test_without_counters_the_inventory_tells() -> None:
    watch = Watch(("log", "planks"))
    watch.step(None, {})
    told = watch.step(None, {"birch_log": 2})
    assert (told.amounts, told.reached) == ({"mine_log": 2.0}, ("log",))


def test_recorded_counters_of_a_played_game() -> None:
    """Four logs of a tree, in pieces of a real recording of Luanti: each is one event and one item."""
    recorded = read_recorded(Path(__file__).with_name("luanti_chops.jsonl"), "luanti")
    logs = [(tick, told.amounts) for tick, told in recorded.told if told.amounts]
    assert logs == [(tick, {"mine_log": 1.0}) for tick in (2, 7, 12, 16)]
    assert next(tick for tick, told in recorded.told if "log" in told.reached) == 2
