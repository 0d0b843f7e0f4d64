"""Keys, camera, events and pointer of Minecraft."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from minecraft_files import EXAMPLES, contract

from d4_datasets import minecraft
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.minecraft import COLUMN, KEYS, Events

CENTRES = [0, 0.6154, 1.6095, 3.2154, 5.8095, 10]
EDGES = [0.271, 1.0531, 2.3166, 4.3577, 7.6547]
degrees = st.floats(-1000, 1000)


# ---- camera ----


def test_the_camera_has_the_centres_of_vpt():
    expected = [-c for c in CENTRES[:0:-1]] + CENTRES
    np.testing.assert_allclose(minecraft.to_degrees(np.arange(11)), expected, atol=5e-5)
    assert minecraft.to_bins(0.0) == 5
    assert minecraft.to_degrees(5) == 0


@pytest.mark.parametrize(("number", "edge"), list(enumerate(EDGES)))
def test_the_camera_has_the_edges_of_vpt(number, edge):
    exact = float(minecraft.to_degrees(5.5 + number))
    assert exact == pytest.approx(edge, abs=5e-5)
    for sign in (1, -1):
        assert minecraft.to_bins(sign * (exact - 1e-9)) == 5 + sign * number
        assert minecraft.to_bins(sign * (exact + 1e-9)) == 5 + sign * (number + 1)


def test_every_bin_and_class_survives_the_way_there_and_back():
    np.testing.assert_array_equal(minecraft.to_bins(minecraft.to_degrees(np.arange(11))), np.arange(11))
    classes = np.arange(minecraft.CAMERA_CLASSES)
    turns = minecraft.from_class(classes)
    assert turns.shape == (121, 2)
    np.testing.assert_array_equal(minecraft.to_class(turns), classes)
    assert minecraft.to_class(np.zeros(2)) == 60  # no movement: the middle
    assert minecraft.to_class(np.array([-10.0, 10.0])) == 10  # pitch counts elevenfold


def test_the_camera_over_its_whole_range():
    angles = np.linspace(-180, 180, 72_001)
    bins = minecraft.to_bins(angles)
    assert (np.diff(bins) >= 0).all()
    assert set(bins) == set(range(11))
    inside = np.abs(angles) <= minecraft.CAMERA_LIMIT
    error = np.abs(minecraft.to_degrees(bins) - angles)[inside]
    assert error.max() == pytest.approx(2.345, abs=0.01)
    assert (bins[angles >= 10] == 10).all()
    assert (bins[angles <= -10] == 0).all()
    np.testing.assert_array_equal(bins, 10 - bins[::-1])


@given(degrees)
def test_a_bin_is_the_one_with_the_nearest_centre_on_the_curve(angle):
    def curve(x):
        return np.sign(x) * np.log1p(np.abs(x)) / np.log(11) * 10  # mu = maxval = 10

    distance = np.abs(curve(minecraft.to_degrees(np.arange(11))) - curve(np.clip(angle, -10, 10)))
    assert distance[minecraft.to_bins(angle)] <= distance.min() + 1e-9


def test_angles_are_no_whole_degrees():
    """VPT's loader put them into an array of integers: 5.625 became 5, and below 1 nothing moved."""
    assert minecraft.camera_degrees(dx=2, dy=37.5) == (5.625, pytest.approx(0.3))


def test_absurd_angles_are_bounded_after_scaling():
    """VPT's guard stands in the branch where nothing moved, and never acts."""
    assert minecraft.camera_degrees(dx=1e6, dy=-1e6) == (-180, 180)
    assert minecraft.camera_degrees(dx=1500, dy=0) == (0, 180)
    assert minecraft.camera_degrees(dx=1500, dy=0, scale=0.5) == (0, 112.5)


# ---- actions ----


@given(st.lists(st.booleans(), min_size=23, max_size=23), degrees, degrees)
def test_actions_survive_the_way_to_the_environment_and_back(keys, pitch, yaw):
    action = np.array([*map(float, keys), np.float32(pitch), np.float32(yaw)])
    env = minecraft.to_env(action)
    assert len(env) == 24
    assert env["camera"].dtype == np.float32
    np.testing.assert_array_equal(minecraft.from_env(env), action)


def test_the_environment_has_the_keys_of_minerl():
    env = minecraft.to_env(np.zeros(minecraft.SIZE))
    names = (
        "ESC attack back camera drop forward hotbar.1 hotbar.2 hotbar.3 hotbar.4 hotbar.5 hotbar.6 hotbar.7 "
        "hotbar.8 hotbar.9 inventory jump left pickItem right sneak sprint swapHands use"
    )
    assert " ".join(sorted(env)) == names


def test_a_channel_selects_by_name_in_any_order():
    actions = np.arange(minecraft.SIZE, dtype=float)[None]
    keys, camera = contract().actions
    np.testing.assert_array_equal(minecraft.channel_values(keys, actions)[0], np.arange(23))
    np.testing.assert_array_equal(minecraft.channel_values(camera, actions)[0], [23, 24])
    spec = contract().to_dict()["actions"]
    spec[0]["select"] = ["hotbar_9", "attack"]
    spec[1]["select"] = ["yaw", "pitch"]
    keys, camera = contract(actions=spec).actions
    np.testing.assert_array_equal(minecraft.channel_values(keys, actions)[0], [22, 0])
    np.testing.assert_array_equal(minecraft.channel_values(camera, actions)[0], [24, 23])


def test_the_camera_as_one_of_121_classes():
    spec = contract().to_dict()["actions"][1]
    for key in ("low", "high", "units"):
        del spec[key]
    spec |= {"select": ["foveated"], "kind": "categorical", "classes": 121}
    camera = contract(actions=[spec]).actions[0]
    actions = np.zeros((2, minecraft.SIZE))
    actions[1, COLUMN["pitch"]] = 10
    np.testing.assert_array_equal(minecraft.channel_values(camera, actions), [[60], [115]])
    with pytest.raises(UserError, match="121 classes, not 11"):
        minecraft.channel_values(contract(actions=[spec | {"classes": 11}]).actions[0], actions)


@pytest.mark.parametrize(
    ("channel", "change", "message"),
    [
        (0, {"select": ["walk"]}, "has no 'walk'"),
        (0, {"select": ["pitch"]}, "has no 'pitch'"),
        (1, {"select": ["attack", "yaw"]}, "has no 'attack'"),
        (0, {"kind": "categorical", "classes": 2}, "is binary"),
        (1, {"kind": "binary", "low": None, "high": None}, "is continuous"),
    ],
)
def test_a_channel_that_asks_for_something_else_is_refused(channel, change, message):
    spec = {key: value for key, value in (contract().to_dict()["actions"][channel] | change).items() if value}
    with pytest.raises(UserError, match=message):
        minecraft.channel_values(contract(actions=[spec]).actions[0], np.zeros((1, minecraft.SIZE)))


def test_the_example_contract_has_the_papers_actions_and_tasks():
    """23 binary keys and 121 classes of the camera; it had the camera in degrees."""
    spec = Contract.load(EXAMPLES / "minecraft.yaml")
    keys, camera = spec.actions
    assert keys.select == KEYS
    assert (len(KEYS), keys.kind, camera.kind, camera.classes) == (23, "binary", "categorical", 121)
    assert set(spec.task_names) == set(minecraft.TASKS)
    assert len(spec.task_names) == 20


# ---- events ----

STATS = {
    "mine_log": "minecraft.mine_block:minecraft.birch_log",
    "mine_cobblestone": "minecraft.mine_block:minecraft.stone",
    "mine_iron_ore": "minecraft.mine_block:minecraft.iron_ore",
    "mine_coal": "minecraft.mine_block:minecraft.coal_ore",
    "mine_diamond": "minecraft.mine_block:minecraft.diamond_ore",
    "craft_planks": "minecraft.craft_item:minecraft.dark_oak_planks",
    "craft_stick": "minecraft.craft_item:minecraft.stick",
    "craft_crafting_table": "minecraft.craft_item:minecraft.crafting_table",
    "craft_furnace": "minecraft.craft_item:minecraft.furnace",
    "craft_iron_ingot": "minecraft.craft_item:minecraft.iron_ingot",
    "craft_wooden_pickaxe": "minecraft.craft_item:minecraft.wooden_pickaxe",
    "craft_stone_pickaxe": "minecraft.craft_item:minecraft.stone_pickaxe",
    "craft_iron_pickaxe": "minecraft.craft_item:minecraft.iron_pickaxe",
    "open_crafting_table": "minecraft.custom:minecraft.interact_with_crafting_table",
    "open_furnace": "minecraft.custom:minecraft.interact_with_furnace",
    "place_crafting_table": "minecraft.use_item:minecraft.crafting_table",
    "place_furnace": "minecraft.use_item:minecraft.furnace",
    "use_wooden_pickaxe": "minecraft.use_item:minecraft.wooden_pickaxe",
    "use_stone_pickaxe": "minecraft.use_item:minecraft.stone_pickaxe",
    "use_iron_pickaxe": "minecraft.use_item:minecraft.iron_pickaxe",
}


def test_every_task_has_its_counter_and_no_other():
    assert STATS.keys() == minecraft.TASKS.keys()
    names = list(minecraft.TASKS)
    for name, stat in STATS.items():
        events = Events(names)
        events.step({}, None)
        assert [names[k] for k in np.flatnonzero(events.step({stat: 1}, None))] == [name]


def test_counters_of_the_world_before_are_no_events():
    """A segment begins anywhere in a session; its first line has all that was done until then."""
    events = Events(["mine_log"])
    log = STATS["mine_log"]
    assert [bool(events.step({log: count}, None)[0]) for count in (7, 7, 8, 8, 11)] == [
        False, False, True, False, True,
    ]  # fmt: skip


def test_a_counter_that_starts_again_is_no_event():
    events = Events(["mine_log"])
    log = STATS["mine_log"]
    steps = [{log: 5}, {}, {log: 1}, None, {log: 1}, {log: 2}]
    assert [bool(events.step(stats, None)[0]) for stats in steps] == [False, False, True, False, False, True]


def test_items_that_lie_under_the_pointer_are_not_made_again():
    """Without counters the inventory tells; what is picked up in a window leaves it and comes back."""
    events = Events(["craft_planks", "place_furnace"])
    counts = [0, 4, 0, 4, 8, 2, 8]
    found = [events.step(None, {"oak_planks": count, "furnace": count}) for count in counts]
    assert [bool(row[0]) for row in found] == [False, True, False, False, True, False, False]
    assert not np.any([row[1] for row in found])


anything = st.none() | st.text() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(list(STATS.values())), anything))
def test_counters_may_hold_anything(stats):
    events = Events(list(minecraft.TASKS))
    assert not events.step(stats, None).any()
    assert not events.step(stats, None).any()


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(UserError, match="no task 'mine_gold' in Minecraft recordings"):
        Events(["mine_gold"])


# ---- the pointer ----


def test_the_pointer_is_drawn_with_its_tip_at_its_place():
    picture = np.full((360, 640, 3), 100, np.uint8)
    assert minecraft.draw_pointer(picture, 400, 200)  # of 1280 x 720
    changed = np.argwhere((picture != 100).any(-1))
    assert changed.min(0).tolist() == [100, 201] or changed.min(0).tolist() == [100, 200]
    assert changed.max(0)[0] < 116
    assert changed.max(0)[1] < 216
    assert (picture == 255).all(-1).sum() > 20  # white inside
    assert (picture < 50).all(-1).sum() > 20  # dark rim: it is seen on white, too


@pytest.mark.parametrize(("x", "y", "seen"), [
    (0, 0, True), (1279, 719, True), (1270, 10, True), (-1, 5, False), (1281, 5, False), (5, 721, False),
])  # fmt: skip
def test_the_pointer_at_and_beyond_the_edges(x, y, seen):
    picture = np.full((360, 640, 3), 100, np.uint8)
    assert minecraft.draw_pointer(picture, x, y) is seen
    if not seen:
        assert (picture == 100).all()
