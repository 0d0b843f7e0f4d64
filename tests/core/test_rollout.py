"""Pictures and clips of a run: which frames they show, what is dreamed in them, what captions claim."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
import toy_run

from d4_core import rollout
from d4_core.imagination import Rollout
from d4_core.models import load
from d4_core.open_loop import CONTEXT, continued
from d4_core.rollout import Panel, RolloutArgs, decode_clips, encode_clips, pick_clips
from d4_datasets.errors import UserError
from d4_datasets.pictures import GREEN, GREY, ORANGE
from d4_datasets.windows import Windows

HORIZON = 3
MEDIA = {
    "tokenizer": {"reconstruction.png"},
    "dynamics": {"open_loop.png", "open_loop.mp4"},
    "agent": {"dream_left.png", "dream_left.mp4", "dream_right.png", "dream_right.mp4"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rollout") / "data"
    toy_run.write_dataset(root)
    return root


@pytest.fixture(scope="module")
def logs(dataset) -> Windows:
    return Windows(dataset)


@pytest.fixture(scope="module")
def run(dataset, logs) -> Path:
    folder = dataset.parent / "run"
    for phase in ("tokenizer", "dynamics", "agent"):
        toy_run.write_checkpoint(folder, phase, logs.contract)
    return folder


def args(run: Path, dataset: Path, **changes) -> RolloutArgs:
    return RolloutArgs(
        **{"run": run, "dataset": dataset, "clips": 2, "horizon": HORIZON, "device": "cpu", **changes}
    )


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_shows_everything_that_the_run_has_reached(run, dataset):
    captions = rollout.rollout(args(run, dataset))
    assert set(captions) == set().union(*MEDIA.values())
    assert {p.name for p in (run / "media").iterdir()} == {*captions, "captions.json"}
    for name in captions:
        if name.endswith(".png"):
            assert cv2.imread(str(run / "media" / name)) is not None
    hold = rollout._HOLD
    assert len(frames_of(run / "media" / "open_loop.mp4")) == CONTEXT + HORIZON + hold
    assert len(frames_of(run / "media" / "dream_left.mp4")) == CONTEXT + 3 * HORIZON + hold


def test_captions_say_where_the_frames_come_from_and_keep_what_others_wrote(run, dataset, logs):
    (run / "media").mkdir(exist_ok=True)
    (run / "media" / "captions.json").write_text(json.dumps({"other.png": "mine"}))
    captions = rollout.rollout(args(run, dataset, seed=5))
    assert json.loads((run / "media" / "captions.json").read_text()) == {"other.png": "mine"} | captions
    held_out = {str(e) for e in logs.split()[1]}
    for caption in captions.values():
        assert "seed 5" in caption
        assert "step 7" in caption
        named = caption.split("held-out episode")[1].lstrip("s").split(".")[0].split(";")[0]
        assert {word.strip() for word in named.split(",")} <= held_out
    assert "K = 2" in captions["open_loop.png"]
    assert "not on the robot" in captions["dream_left.mp4"]


def test_the_same_seed_gives_the_same_files_and_another_seed_others(run, dataset):
    def content(seed: int) -> dict[str, bytes]:
        names = rollout.rollout(args(run, dataset, seed=seed, phase="dynamics"))
        return {name: (run / "media" / name).read_bytes() for name in names}

    first = content(0)
    assert content(0) == first
    assert content(1) != first


def test_one_phase_alone(run, dataset, tmp_path):
    models = toy_run.write_checkpoint(tmp_path / "run", "imagination", load(run / "agent").contract)
    assert models.policy is not None
    captions = rollout.rollout(args(tmp_path / "run", dataset, phase="imagination"))
    assert set(captions) == MEDIA["agent"]
    assert "imagination-trained policy" in captions["dream_left.png"]
    assert set(rollout.rollout(args(run, dataset, phase="tokenizer"))) == MEDIA["tokenizer"]


def test_clips_come_from_held_out_episodes_and_fit_into_them(logs):
    footage = pick_clips(logs, 5, 8, seed=0)
    assert footage.held_out
    assert footage.frames.shape == (5, 8)
    assert set(footage.episodes) == set(logs.split()[1])
    assert (logs.episode_index[footage.frames] == footage.episodes[:, None]).all()
    assert (np.diff(footage.frames, axis=1) == 1).all()
    labelled = pick_clips(logs, 5, 8, seed=0, labelled=True)
    assert logs.labelled[labelled.episodes].all()
    starts = pick_clips(logs, 2, 8, seed=0, start=True)
    assert set(starts.frames[:, 0]) == set(logs.episode_start[starts.episodes])


def test_several_clips_of_one_episode_are_spread_over_it(tmp_path):
    toy_run.write_dataset(tmp_path / "data", (40,))
    logs = Windows(tmp_path / "data")
    footage = pick_clips(logs, 4, 8, seed=0)
    assert not footage.held_out
    assert "TRAINING" in str(footage)
    assert footage.frames.max() < 40
    quarters = np.arange(5) * 33 / 4
    begin = np.sort(footage.frames[:, 0])
    assert (np.floor(quarters[:-1]) <= begin).all()
    assert (begin < quarters[1:]).all()


def test_clips_are_encoded_with_their_past_and_decoded_frame_by_frame(run, logs):
    tokenizer = load(run / "dynamics").tokenizer
    footage = pick_clips(logs, 3, 6, seed=0)
    tokens = encode_clips(tokenizer, logs, footage)
    for row, episode in enumerate(footage.episodes):
        whole = np.arange(
            logs.episode_start[episode], logs.episode_start[episode] + logs.episode_length[episode]
        )
        with torch.no_grad():
            z = tokenizer.encode({"cam": torch.from_numpy(np.array(logs.images["cam"][whole]))[None]})[0]
        expected = tokenizer.pack(z)[footage.frames[row] - whole[0]]
        torch.testing.assert_close(tokens[row], expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        patches = tokenizer.decode(tokenizer.unpack(tokens))["cam"]
        expected = (tokenizer.to_pixels("cam", patches).clamp(0, 1) * 255).round()
    made = torch.from_numpy(decode_clips(tokenizer, tokens, "cam")).float()
    assert (made - expected).abs().max() <= 1


def test_open_loop_mirrors_only_what_comes_after_the_context(run, logs):
    models = load(run / "dynamics")
    footage = pick_clips(logs, 2, CONTEXT + HORIZON, seed=0, labelled=True)
    tokens = encode_clips(models.tokenizer, logs, footage)
    seen: list[torch.Tensor] = []
    embed = models.dynamics.encode_action.forward

    def spy(action, labelled):
        seen.append(action.clone())
        return embed(action, labelled)

    models.dynamics.encode_action.forward = spy
    go_on = partial(continued, models.dynamics, logs, footage.frames, tokens, seed=0, steps=2)
    out = {mirror: go_on(mirror=mirror) for mirror in (False, True)}
    half = len(seen) // 2
    for dreamed in out.values():
        assert not torch.allclose(dreamed, tokens[:, CONTEXT:])
    assert not torch.equal(out[True], out[False])
    low, high = (torch.from_numpy(x) for x in (logs.contract.action_low, logs.contract.action_high))
    for number, (plain, mirrored) in enumerate(zip(seen[:half], seen[half:], strict=True)):
        expected = plain if number < CONTEXT else low + high - plain
        torch.testing.assert_close(mirrored, expected)


def test_unlabelled_clips_are_not_mirrored(tmp_path):
    toy = toy_run.write_dataset(tmp_path / "data", (12, 12, 12, 12))
    toy_run.write_checkpoint(tmp_path / "run", "dynamics", toy)
    logs = Windows(tmp_path / "data")
    logs.labelled = np.zeros_like(logs.labelled)
    models = load(tmp_path / "run" / "dynamics")
    _, told = rollout.show_open_loop(models, logs, args(tmp_path / "run", tmp_path / "data"))
    assert "unknown" in told
    assert "mirrored" not in told


def test_a_robot_without_tasks_and_rewards_dreams_under_its_own_name(tmp_path):
    toy = toy_run.write_dataset(tmp_path / "data", tasks=None, reward=None)
    toy_run.write_checkpoint(tmp_path / "run", "agent", toy)
    captions = rollout.rollout(args(tmp_path / "run", tmp_path / "data"))
    assert set(captions) == {"dream_toy.png", "dream_toy.mp4"}
    assert "no reward to predict" in captions["dream_toy.png"]


def test_frames_after_the_predicted_end_are_grey():
    proceed = torch.tensor([[0.9, 0.2, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]])
    run = Rollout(*(torch.zeros(0) for _ in range(3)), proceed, torch.zeros(0))
    assert rollout._alive(run) == [[True, True, False, False], [True] * 4]


def test_a_panel_shows_picture_colour_and_reward_bar():
    images = np.full((3, 64, 64, 3), 90, np.uint8)
    meter = np.array([np.nan, 2.0, -1.0])
    out = rollout._panel(Panel("x", images, [GREEN, ORANGE, GREY], meter, scale=2.0, texts=["", "+0.5", ""]))
    assert out.shape[1:3] == (24 + 256 + 8 + 18 + 18 + rollout._GAP, 256 + rollout._GAP)
    assert (out[:, 24:280, :256] == 90).all()
    assert [tuple(out[t, 282, 10]) for t in range(3)] == [GREEN, ORANGE, GREY]
    row = 24 + 256 + 8 + 18 + 9
    assert not (out[0, row, 60:] != 255).any()
    assert (out[1, row, 60:256] == GREEN).all()
    assert (out[2, row, 60:158] == ORANGE).all()
    assert (out[2, row, 160:256] == 255).all()


def test_what_cannot_be_shown_is_one_sentence(run, dataset, tmp_path):
    toy_run.write_dataset(tmp_path / "other", rate_hz=20)
    for changes, reason in (
        ({"run": tmp_path}, "there is no checkpoint"),
        ({"phase": "imagination"}, "train the phase 'imagination' first"),
        ({"clips": 0}, "at least 1"),
        ({"horizon": 30}, "lower --horizon"),
        ({"dataset": tmp_path / "other"}, "contract"),
        ({"dataset": tmp_path}, "not a d4 dataset"),
    ):
        with pytest.raises(UserError, match=reason):
            rollout.rollout(args(**{"run": run, "dataset": dataset, **changes}))


def test_the_command_prints_files_and_captions(run, dataset, monkeypatch, capsys):
    line = [str(run), "--dataset", str(dataset), "--phase", "tokenizer", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["d4-rollout", *line])
    rollout.main()
    out = capsys.readouterr().out
    assert "reconstruction.png" in out
    assert "PSNR" in out
    assert "data:image/png" in (run / "report.html").read_text()
