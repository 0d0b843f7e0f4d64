"""Tasks, milestones, published figures, and the ladder's state machine by properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import minecraft
from d4_sim.minecraft.game import Rung
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
    assert [rung.count for rung in LADDER] == [
        10, 20, 1, 1, 4, 1, 1, 3, 4, 1, 1, 4, 1, 1, 3, 8, 4, 1, 1, 1, 3, 2, 1, 1, None,
    ]  # fmt: skip


def test_published_figures_cover_the_milestones() -> None:
    """What the paper prints: no minutes where at most 0.5 % succeed, success falls towards the diamond."""
    assert len(MILESTONES) == 12
    assert [column.name for column in PUBLISHED] == ["VPT (finetuned)", "BC", "VLA", "WM+BC", "Dreamer 4"]
    for column in PUBLISHED:
        assert tuple(column.success) == tuple(column.minutes) == tuple(MILESTONES)
        for name, share in column.success.items():
            assert column.minutes[name] is None or share > 0.5
            assert 0 <= share <= 100
    ours = PUBLISHED[-1]
    assert (ours.success["diamond"], ours.minutes["diamond"]) == (0.7, 20.7)
    assert (ours.success["iron_pickaxe"], PUBLISHED[3].success["iron_pickaxe"]) == (29.0, 16.9)


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


@given(rungs=ladders, happened=happenings)
def test_only_what_was_asked_for_counts(rungs, happened) -> None:
    """A ladder replayed by hand: per rung, the amounts of its own task since it was asked for."""
    ladder, position, done = Ladder(rungs), 0, 0.0
    for amounts in happened:
        ladder.step(amounts)
        done += amounts.get(rungs[position].task, 0)
        if done >= rungs[position].count and position + 1 < len(rungs):
            position, done = position + 1, 0.0
        assert (ladder.rung, ladder.done) == (position, done)
    assert ladder.finished == (position == len(rungs) - 1 and done >= rungs[-1].count)


@given(happened=happenings)
def test_a_rung_without_a_count_is_the_last(happened) -> None:
    ladder = Ladder([Rung(TASKS[0], None), Rung(TASKS[1], 1)])
    for amounts in happened:
        assert not ladder.step(amounts)
    assert (ladder.rung, ladder.finished) == (0, False)


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


def test_without_counters_the_inventory_tells() -> None:
    watch = Watch(("log", "planks"))
    watch.step(None, {})
    told = watch.step(None, {"birch_log": 2})
    assert (told.amounts, told.reached) == ({"mine_log": 2.0}, ("log",))


def test_amounts_and_events_agree() -> None:
    """One table of tasks for labels of recordings and for live games."""
    events, amounts = minecraft.Events(TASKS), minecraft.Events(TASKS)
    for counts in (
        stats(),
        stats(mine_block__stone=2),
        stats(mine_block__stone=2, use_item__stone_pickaxe=1),
    ):
        assert (events.step(counts, None) == (amounts.amounts(counts, None) > 0)).all()
