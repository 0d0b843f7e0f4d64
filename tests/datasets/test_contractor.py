"""VPT and BASALT recordings: every quirk of the data by name, and lines that hold anything."""

import json
import math

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minecraft_files import contract, grey, line, write_lines, write_recording, write_video

from d4_datasets import contractor, minecraft, sources
from d4_datasets.contractor import Player, read_lines
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset
from d4_datasets.minecraft import COLUMN


def play(lines, **options):
    player = Player(**options)
    return [player.step(line) for line in lines]


def down(action):
    """The names of what is not zero in an action."""
    return {name for name, column in COLUMN.items() if action[column]}


def fill(path, tmp_path, spec=None):
    folder = tmp_path / "part"
    folder.mkdir()
    return contractor.fill(path, spec or contract(), folder, ())


def frames_of(dataset, episode=0):
    return list(dataset.frames("pov", episode))


# ---- one quirk each ----


def test_camera_angles_are_not_cut_to_whole_degrees():
    (action,) = play([line(dx=2, dy=37.5)])
    assert action[COLUMN["pitch"]] == 5.625
    assert action[COLUMN["yaw"]] == pytest.approx(0.3)


def test_frames_without_any_action_are_kept(tmp_path):
    """Whoever leaves them out, as VPT did for cloning, breaks time."""
    path = write_recording(tmp_path, [line("w"), *[line()] * 5, line("a")])
    episodes, _ = fill(path, tmp_path)
    assert episodes[0].frames == 7
    assert episodes[0].action_mask.all()
    assert (episodes[0].action[1:6] == 0).all()


def test_the_wheel_shows_in_the_slot_only():
    actions = play([line(hotbar=h) for h in (4, 4, 5, 5, 0, 8)])
    assert [down(a) for a in actions] == [set(), set(), {"hotbar_6"}, set(), {"hotbar_1"}, {"hotbar_9"}]


def test_a_line_with_the_wheel_alone_is_an_action(tmp_path):
    """VPT's loader asked whether anything happened before it looked at the slot, and lost the change."""
    path = write_recording(tmp_path, [line(hotbar=0), line(hotbar=0), line(hotbar=3)])
    episodes, _ = fill(path, tmp_path)
    assert episodes[0].frames == 3
    assert [int(row.sum()) for row in episodes[0].action] == [0, 0, 1]


def test_slots_count_from_0_and_keys_from_1():
    assert down(play([line(hotbar=3), line(hotbar=0)])[1]) == {"hotbar_1"}
    assert down(play([line(hotbar=0), line(hotbar=8)])[1]) == {"hotbar_9"}
    assert down(play([line("1")])[0]) == {"hotbar_1"}


def test_a_session_that_was_cut_does_not_choose_a_slot_at_its_beginning():
    assert down(play([line(hotbar=4)])[0]) == set()


@pytest.mark.parametrize("slot", [None, "3", 9, -1, 2.0, True])
def test_a_slot_that_is_none_is_ignored(slot):
    """Recorders before 6.11 do not note it, and BASALT files may lack it."""
    actions = play([line(hotbar=1), line(hotbar=slot), line(hotbar=1), line(hotbar=2)])
    assert [down(action) for action in actions] == [set(), set(), set(), {"hotbar_3"}]


def test_attack_that_is_stuck_from_the_beginning_is_up():
    click = {"mouse_buttons": [0], "mouse_newButtons": [0]}
    held = {"mouse_buttons": [0, 1]}
    actions = play([line(**click), line(**held), line(**click), line(**held), line()])
    assert [down(a) for a in actions] == [set(), {"use"}, {"attack"}, {"attack", "use"}, set()]


def test_attack_that_begins_later_is_not_stuck():
    actions = play([line(), line(mouse_buttons=[0], mouse_newButtons=[0]), line(mouse_buttons=[0])])
    assert [down(a) for a in actions] == [set(), {"attack"}, {"attack"}]


def test_the_pointer_is_put_into_frames_with_an_open_window_only(tmp_path):
    lines = [line(), line(isGuiOpen=True, mouse_x=400, mouse_y=200), line()]
    path = write_recording(tmp_path, lines, size=(360, 640))
    ingest([path], contract(size=(360, 640)), tmp_path / "out")
    frames = frames_of(Dataset(tmp_path / "out"))
    bright = [np.argwhere(frame.max(-1) > 230) for frame in frames]
    assert len(bright[0]) == len(bright[2]) == 0
    assert len(bright[1]) > 20
    assert (bright[1].min(0) >= [100, 200]).all()
    assert (bright[1].max(0) < [116, 216]).all()


def test_a_pointer_outside_the_picture_is_told(tmp_path):
    path = write_recording(tmp_path, [line(isGuiOpen=True, mouse_x=2000.0)] * 3)
    _, warnings = fill(path, tmp_path)
    assert any("in 3 frames with an open window the pointer is outside" in text for text in warnings)


@pytest.mark.parametrize(
    ("version", "scale"),
    [
        ("5.7", 0.5),
        ("5.8", 0.5),
        ("6.7", 2),
        ("6.8", 2),
        ("6.9", 2),
        ("6.10", 1),
        ("7.6", 1),
        ("10.0", 1),
        ("x", 1),
    ],
)
def test_the_mouse_in_windows_counts_by_recorder(tmp_path, version, scale):
    """VPT's loader has the table and never uses it."""
    recorder = contractor.version_of(tmp_path / "data" / version / "some.jsonl")
    still, moved = play([line(dx=10, dy=-20), line(dx=10, dy=-20, isGuiOpen=True)], version=recorder)
    assert [still[COLUMN[name]] for name in ("pitch", "yaw")] == [-3, 1.5]
    assert [moved[COLUMN[name]] for name in ("pitch", "yaw")] == [-3 * scale, 1.5 * scale]


def test_esc_is_a_key_of_its_own_where_the_contract_has_it():
    assert [down(a) for a in play([line("escape"), line("escape", isGuiOpen=True)])] == [{"ESC"}, {"ESC"}]


def test_esc_closes_windows_as_the_inventory_key_where_the_contract_lacks_it(tmp_path):
    spec = contract().to_dict()["actions"]
    spec[0]["select"] = [name for name in spec[0]["select"] if name != "ESC"]
    path = write_recording(tmp_path, [line("escape"), line("escape w", isGuiOpen=True), line()])
    episodes, _ = fill(path, tmp_path, contract(actions=spec))
    names = contract(actions=spec).action_names
    rows = [{names[k] for k in np.flatnonzero(row)} for row in episodes[0].action]
    assert rows == [set(), {"keys.forward", "keys.inventory"}, set()]


def test_esc_ends_an_episode_of_basalt(tmp_path):
    """Where it opens the menu to quit; not where it closes a window, and not while it is held after that."""
    end = {"terminal": {"topic": "/minecraft/esc", "type": "std_msgs/msg/Bool", "select": "data"}}
    lines = [line(), line("escape", isGuiOpen=True), line("escape"), line(), line("escape"), line()]
    episodes, _ = fill(write_recording(tmp_path, lines), tmp_path, contract(episode=end))
    assert len(episodes) == 1
    assert episodes[0].is_terminal.tolist() == [False] * 4 + [True]


def test_absurd_angles_are_clipped_and_told(tmp_path):
    path = write_recording(tmp_path, [line(), line(dx=1e7), line(dx=-100), line(dx=66)])
    episodes, warnings = fill(path, tmp_path)
    yaw = contract().action_names.index("camera.yaw")
    np.testing.assert_allclose(episodes[0].action[:, yaw], [0, 10, -10, 9.9])
    assert any("2 of 4 rows of camera beyond the contract's limits clipped" in text for text in warnings)


def test_people_who_turn_fast_now_and_then_are_not_reported(tmp_path):
    path = write_recording(tmp_path, [line(dx=100 if k == 3 else 5) for k in range(10)])
    episodes, warnings = fill(path, tmp_path)
    assert episodes[0].action.max() == 10
    assert warnings == []


@pytest.mark.parametrize(("topic", "is_mixed"), [("/minecraft/pov", True), ("/minecraft/pov_linear", False)])
def test_pictures_are_made_smaller_as_the_contract_says(tmp_path, topic, is_mixed):
    """VPT's networks want linear interpolation, which from 4 columns takes the middle two."""
    path = write_recording(tmp_path, [line(), line()])
    stripes = np.full((36, 64, 3), 128, np.uint8)
    stripes[:, 0::4] = 255

    with av.open(str(path.with_suffix(".mp4")), "w") as container:
        stream = container.add_stream("libx264rgb", rate=20, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 36, 64, "rgb24"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stripes, format="rgb24")))
        container.mux(stream.encode())
    camera = contract(size=(9, 16)).to_dict()["observations"][0] | {"topic": topic}
    ingest([path], contract(observations=[camera]), tmp_path / "out")
    level = int(frames_of(Dataset(tmp_path / "out"))[0][4, 8, 0])
    assert (level > 140) is is_mixed


@pytest.mark.parametrize(("lines", "frames"), [(6, 4), (4, 6)])
def test_more_lines_than_frames_or_fewer_are_cut_and_told(tmp_path, lines, frames):
    path = write_recording(tmp_path, [line(dx=k) for k in range(lines)], frames)
    episodes, warnings = fill(path, tmp_path)
    assert episodes[0].frames == 4
    assert f"{lines} lines for {frames} frames; the first 4 are used" in warnings[0]


def test_parts_of_a_session_with_one_missing_are_not_joined(tmp_path):
    for number in (0, 2):
        lines = [line(hotbar=number, stats={"minecraft.mine_block:minecraft.stone": 5 * number})] * 3
        write_recording(tmp_path, lines, name=f"alias-id-20220315-12{number}000")
    summary = ingest([tmp_path / "8.0"], contract(), tmp_path / "out")
    assert summary.episodes == 2
    for episode in range(2):
        columns = Dataset(tmp_path / "out").columns(episode)
        assert columns["is_first"].tolist() == [True, False, False]
        assert not columns["reward"].any()
        assert not columns["action"].any()


def test_lines_without_a_video_are_left_out_and_told(tmp_path):
    whole = write_recording(tmp_path, [line()] * 3)
    alone = whole.with_name("missing-id-20220315-130000.jsonl")
    write_lines(alone, [line()] * 3)
    whole.with_name("setter-74ae-20220315-122354-options.json").write_text("{}")
    summary = ingest([tmp_path], contract(), tmp_path / "out")
    assert summary.episodes == 1
    assert any(
        f"{alone} has no missing-id-20220315-130000.mp4 beside it" in text for text in summary.warnings
    )


@pytest.mark.parametrize(
    ("version", "is_told"), [("6.9", True), ("6.12", True), ("6.13", False), ("10.0", False)]
)
def test_recorders_that_do_not_note_sprinting_are_named(tmp_path, version, is_told):
    path = write_recording(tmp_path, [line()] * 2, version=version)
    _, warnings = fill(path, tmp_path)
    assert any("did not note sprint and swapHands" in text for text in warnings) is is_told


def test_a_mouse_or_keyboard_that_was_not_recorded_is_unknown(tmp_path):
    """Not "nothing pressed", which is an action; and the action before is not held."""
    lines = [line("w"), line("w", mouse=None), line("w", keyboard=None), line("w")]
    episodes, warnings = fill(write_recording(tmp_path, lines), tmp_path)
    assert episodes[0].action_mask.tolist() == [True, False, False, True]
    assert "2 lines (the first is number 2) do not say" in warnings[0]


# ---- what was accomplished ----


def test_events_arrive_with_the_frame_that_shows_them(tmp_path):
    log = {"minecraft.mine_block:minecraft.oak_log": 1}
    stats = [{}, {}, log, log, log | {"minecraft.craft_item:minecraft.oak_planks": 4}]
    episodes, warnings = fill(write_recording(tmp_path, [line(stats=s) for s in stats]), tmp_path)
    names = contract().task_names
    assert [(int(k), names[q]) for k, q in np.argwhere(episodes[0].reward)] == [
        (2, "mine_log"),
        (4, "craft_planks"),
    ]
    assert episodes[0].reward.max() == 1
    assert warnings == []


def test_files_stripped_of_what_was_accomplished_say_so(tmp_path):
    bare = line()
    for name in ("stats", "inventory", "hotbar", "isGuiInventory"):
        del bare[name]
    episodes, warnings = fill(write_recording(tmp_path, [bare] * 3), tmp_path)
    assert not episodes[0].reward.any()
    assert "does not tell what was accomplished" in warnings[0]


# ---- end to end ----


def test_frames_and_actions_of_a_line_stay_together(tmp_path):
    count = 12
    path = write_recording(tmp_path, [line("w" if k % 3 == 0 else "", dx=k) for k in range(count)])
    summary = ingest([path], contract(), tmp_path / "out")
    assert (summary.episodes, summary.frames, summary.labelled) == (1, count, count)
    dataset = Dataset(tmp_path / "out")
    action, names = dataset.columns(0)["action"], contract().action_names
    np.testing.assert_allclose(action[:, names.index("camera.yaw")], 0.15 * np.arange(count), rtol=1e-6)
    np.testing.assert_array_equal(action[:, names.index("keys.forward")], np.arange(count) % 3 == 0)
    for number, frame in enumerate(frames_of(dataset)):
        assert frame.shape == (18, 32, 3)
        assert abs(float(frame.mean()) - grey(number)) < 4


def test_a_session_is_cut_into_the_contracts_pieces(tmp_path):
    path = write_recording(tmp_path, [line(dx=k) for k in range(10)])
    episodes, _ = fill(path, tmp_path, contract(episode={"max_s": 0.25}))
    assert [episode.frames for episode in episodes] == [5, 5]
    yaw = contract().action_names.index("camera.yaw")
    np.testing.assert_allclose(np.concatenate([e.action[:, yaw] for e in episodes]), 0.15 * np.arange(10))


def test_recordings_in_a_list_are_left_out(tmp_path):
    for name in ("one", "two", "three"):
        write_recording(tmp_path / "data", [line()] * 2, name=name)
    (tmp_path / "skip.txt").write_text("one\n\n two.jsonl \n")
    assert ingest([tmp_path / "data"], contract(), tmp_path / "a", skip=tmp_path / "skip.txt").episodes == 1
    (tmp_path / "skip").mkdir()
    (tmp_path / "skip" / "three").touch()
    assert ingest([tmp_path / "data"], contract(), tmp_path / "b", skip=tmp_path / "skip").episodes == 2
    with pytest.raises(UserError, match=r"one\S* is to be left out and is in the dataset already"):
        ingest([tmp_path / "data"], contract(), tmp_path / "b", skip=tmp_path / "skip.txt")
    assert len(Dataset(tmp_path / "b").episodes) == 2
    with pytest.raises(UserError, match="cannot read the list of recordings to leave out"):
        ingest([tmp_path / "data"], contract(), tmp_path / "c", skip=tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": 10}, "recorded at 20 Hz and contract minecraft says 10"),
        ({"reward": {"topic": "/reward", "type": "std_msgs/msg/Float64"}}, "has no /reward"),
        ({"episode": {"start": {"topic": "/minecraft/esc", "type": "std_msgs/msg/Bool"}}}, "episode.start"),
        ({"tasks": None}, "no task 'minecraft'"),
    ],
)
def test_a_contract_that_asks_for_more_is_refused(tmp_path, changes, message):
    path = write_recording(tmp_path, [line()] * 2)
    with pytest.raises(UserError, match=message):
        fill(path, tmp_path, contract(**changes))


@pytest.mark.parametrize("damage", [b"", b"no video at all" * 100])
def test_a_damaged_video_is_named(tmp_path, damage):
    path = write_recording(tmp_path, [line()] * 3)
    path.with_suffix(".mp4").write_bytes(damage)
    with pytest.raises(UserError, match=r"\.mp4 cannot be decoded .* --skip"):
        fill(path, tmp_path)


def test_a_recording_without_lines_is_left_out_and_one_without_actions_refused(tmp_path):
    path = write_recording(tmp_path, [line()] * 3)
    path.write_text("")
    assert fill(path, tmp_path)[0] == []
    write_lines(path, ["nonsense", "{}", "[]"])
    with pytest.raises(UserError, match="none of its 3 lines says what mouse and keyboard did"):
        contractor.fill(path, contract(), tmp_path, ())


def test_other_files_are_not_taken(tmp_path):
    write_lines(tmp_path / "episodes.jsonl", [{"episode_index": 0}])
    write_video(tmp_path / "episodes.mp4", 2)
    assert not contractor.takes(tmp_path / "episodes.jsonl")
    assert not contractor.takes(tmp_path)
    assert not contractor.takes(tmp_path / "absent.jsonl")
    path = write_recording(tmp_path, [line()])
    assert [one.path for one in sources.find(tmp_path, "contractor")] == [path]
    assert path.with_suffix(".mp4") not in [
        one.path for one in sources.find(tmp_path)
    ]  # it belongs to the lines


# ---- lines that hold anything ----

junk = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from([1e308, -1e308, math.nan, math.inf, 10**400, "key.keyboard.w", 0, 1, 2]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
mouse = st.dictionaries(st.sampled_from(["x", "y", "dx", "dy", "buttons", "newButtons"]), junk)
fields = st.dictionaries(
    st.sampled_from(["mouse", "keyboard", "isGuiOpen", "hotbar", "stats", "inventory"]),
    st.one_of(junk, mouse, st.fixed_dictionaries({"keys": junk})),
)


def is_sane(action):
    keys, turns = action[: len(minecraft.KEYS)], action[len(minecraft.KEYS) :]
    return set(keys) <= {0, 1} and bool((np.abs(turns) <= 180).all())


@given(st.lists(fields, min_size=1, max_size=6))
@settings(max_examples=50)
def test_lines_of_any_content_give_a_sane_action_or_none(changes):
    player, events = Player(), minecraft.Events(list(minecraft.TASKS))
    for change in changes:
        action = player.step(line() | change)
        assert action is None or is_sane(action)
        stats, items = contractor.counters(change)
        assert events.step(stats, items).shape == (20,)
        if player.pointer is not None:
            assert minecraft.draw_pointer(np.zeros((36, 64, 3), np.uint8), *player.pointer) in (True, False)


@given(st.integers(0, 400), st.binary(max_size=6))
@settings(max_examples=60)
def test_lines_that_were_cut_anywhere_are_unknown_or_whole(cut, tail):
    text = json.dumps(line("w", dx=3)).encode()
    parsed = contractor._object(text[:cut] + tail)
    action = Player().step(parsed)
    assert action is None or is_sane(action)
    if cut < len(text) and not tail:
        assert action is None


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", "[]", '"text"', "{", '{"a":', "\x00", "NaN", "[" * 100_000, '{"n": ' + "9" * 5000 + "}",
     '{"mouse": {"dx": NaN}}', '{"mouse": 5, "keyboard": []}'],
)  # fmt: skip
def test_a_broken_line_costs_its_own_frame_only(tmp_path, text):
    path = tmp_path / "a.jsonl"
    write_lines(path, [line("w"), text or "{}", line("a")])
    actions = play(list(read_lines(path)))
    assert [None if a is None else down(a) for a in actions] == [{"forward"}, None, {"left"}]


def test_text_that_is_no_utf8_and_lines_without_end_are_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(contractor, "_LONGEST_LINE", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"a": 1}\n\n  \n\xff\xfe{"a": 2}\n' + b"x" * 1000 + b'\n{"a": 3}\n' + b"y" * 64 + b"\n" + b"z" * 300
    )
    assert list(read_lines(path)) == [{"a": 1}, None, None, {"a": 3}, None, None]


@pytest.mark.parametrize("count", [10**400, -(10**400), 1e300, math.inf, math.nan])
def test_counts_beyond_reason_are_none(count):
    action = Player().step(json.loads(json.dumps(line(dx=1))) | {"mouse": line(dx=count)["mouse"]})
    assert action is None
