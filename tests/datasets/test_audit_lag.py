"""The lag from command to picture: planted ones are found within a frame, and none is made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import RECORDINGS, needs

from d4_datasets.audit import audit
from d4_datasets.checks import lag as lags
from d4_datasets.checks.lag import Lag, Stretch, affine_flow, estimate
from d4_datasets.contract import Contract
from d4_datasets.ingest import ingest
from d4_datasets.scan import Scan
from d4_datasets.windows import Windows

ROOT = Path(__file__).parents[2]
CAR = "donkeycar/full_compressed_mcap"
ROBOT = Contract.from_dict(planted.spec())


@pytest.mark.parametrize(
    ("lag", "level"), [(-3, "WARN"), (-2, "WARN"), (-1, "WARN"), (0, "OK"), (1, "OK"), (2, "OK"), (3, "WARN")]
)
def test_a_planted_lag_is_found(tmp_path: Path, lag: int, level: str) -> None:
    made = [planted.episode(lag=lag, seed=seed) for seed in range(3)]
    result = audit(synthetic.write(tmp_path / "toy", made, planted.spec()))
    found = result.lag["cameras"]["cam"]
    assert (found["frames"], found["low"], found["high"]) == (lag, lag, lag)
    assert found["confidence"] > 0.9
    (verdict,) = (v for v in result.verdicts if v.check == "lag")
    assert verdict.level == level
    plural = "" if abs(lag) == 1 else "s"
    count = f"{abs(lag)} frame{plural} ({100 * abs(lag)} ms)"
    said = f"moves {count} before its commands" if lag < 0 else f"shows commands after {count}"
    assert f"camera cam {said} (90% interval {lag} to {lag}" in verdict.message


@settings(deadline=None, max_examples=15)
@given(st.integers(-3, 3), st.floats(0, 0.9), st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 3.0]))
def test_a_lag_is_found_within_a_frame_whatever_the_driver(
    lag: int, smooth: float, seed: int, response: float
) -> None:
    """Signed motion that follows the command after `lag` frames, in noise as strong as itself."""
    stretches = _stretches(lag, smooth, seed, response)
    found = estimate(stretches, lags.lags_of(ROBOT), ROBOT)
    assert not isinstance(found, str)
    assert abs(found.frames - lag) <= 1
    assert found.low <= found.frames <= found.high


def _stretches(lag: int, smooth: float, seed: int, gain: float, count: int = 12) -> list[Stretch]:
    rng, out = np.random.default_rng(seed), []
    shifts = lags.lags_of(ROBOT)
    for number in range(count):
        action = planted.commands(160, seed + number, smooth)
        t = np.arange(20, 140)
        motion = np.concatenate([gain * action[t - lag], rng.normal(size=(len(t), 5))], 1)
        motion[:, :2] += 0.4 * gain * rng.normal(size=(len(t), 2))
        out.append(Stretch(motion, np.stack([action[t - k] for k in shifts])))
    return out


@settings(deadline=None, max_examples=15)
@given(st.floats(0, 0.95), st.integers(0, 2**31))
def test_a_lag_is_not_made_up_from_noise(smooth: float, seed: int) -> None:
    """Pictures that move as slowly varying as the commands, but by themselves."""
    stretches = _stretches(0, smooth, seed, 1.0)
    others = _stretches(0, smooth, seed + 1000, 1.0)
    mixed = [Stretch(s.motion, o.action) for s, o in zip(stretches, others, strict=True)]
    found = estimate(mixed, lags.lags_of(ROBOT), ROBOT)
    assert isinstance(found, str)
    assert "does not follow the commands" in found


def test_why_a_lag_is_unknown_is_said(tmp_path: Path) -> None:
    def reason(*made: synthetic.Episode) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        result = audit(synthetic.write(folder, list(made), planted.spec()))
        (verdict,) = (v for v in result.verdicts if v.check == "lag")
        assert verdict.level == "OK"
        assert result.lag["cameras"]["cam"]["frames"] is None
        return str(result.lag["cameras"]["cam"]["reason"])

    assert "frames have known actions all around them, 200 are needed" in reason(planted.episode(60))
    hidden = planted.episode(60)
    hidden.mask[:] = False
    assert reason(hidden) == "no frame has a known action"
    still = planted.episode(300)
    still.action[:] = 0.5
    assert reason(still) == "the commands never change"
    frozen = planted.episode(300)
    frozen.images[:] = frozen.images[0]
    assert reason(frozen) == "the picture never changes"
    other = planted.episode(300)
    other.action = planted.commands(300, seed=5)
    assert "does not follow the commands" in reason(other)


def test_holes_in_the_labels_do_not_move_the_lag(tmp_path: Path) -> None:
    made = [planted.episode(200, lag=1, seed=seed) for seed in range(3)]
    for number, episode in enumerate(made):
        episode.mask[70 + 10 * number : 90] = False
        episode.action[~episode.mask] = 0
    result = audit(synthetic.write(tmp_path / "toy", made, planted.spec()))
    assert result.lag["cameras"]["cam"]["frames"] == 1


def test_a_lag_of_classes_is_found(tmp_path: Path) -> None:
    """Class 0 stands, 1 pans left, 2 right: no line through the classes would say so."""
    raw = planted.spec()
    base = {**raw["actions"][0], "select": ["linear.y"], "low": [-1], "high": [1], "units": ["m/s"]}
    keys_of = {"topic": "/keys", "type": "std_msgs/msg/Int64", "select": ["data"], "align": base["align"]}
    raw["actions"] = [
        {**keys_of, "name": "keys", "kind": "categorical", "classes": 3, "safety": "hold"},
        base,
    ]
    made = []
    for seed in range(3):
        keys = np.random.default_rng(seed).integers(0, 3, 120)
        motion = np.stack([np.array([0.0, -0.8, 0.8])[keys], np.zeros(120)], 1).astype(np.float32)
        episode = planted.episode(120)
        episode.images = planted.pan(motion, 2, seed)
        episode.action = np.stack([keys, np.random.default_rng(seed + 9).uniform(-1, 1, 120)], 1).astype(
            np.float32
        )
        made.append(episode)
    result = audit(synthetic.write(tmp_path / "toy", made, raw))
    assert result.lag["cameras"]["cam"]["frames"] == 2


@pytest.mark.parametrize(("shift_ms", "lag"), [(200, 2), (-200, -2), (0, 0)])
def test_wrong_stamps_in_a_bag_show_as_a_lag(tmp_path: Path, shift_ms: int, lag: int) -> None:
    bag = planted.Bag()
    bag.stamps += shift_ms * planted.MS
    bag.write(tmp_path / "bag")
    ingest([tmp_path / "bag"], planted.contract(), tmp_path / "data")
    found = audit(tmp_path / "data").lag["cameras"]["cam"]
    assert found["frames"] == lag


def test_the_lag_that_the_latency_makes() -> None:
    def wanted(latency_ms: float, rate_hz: float) -> int:
        return lags.expected(Contract.from_dict(planted.spec(latency_ms=latency_ms, rate_hz=rate_hz)))

    assert [wanted(40, 10), wanted(60, 10), wanted(150, 10), wanted(10, 20), wanted(100, 30)] == [
        0,
        1,
        2,
        0,
        3,
    ]


def test_the_sample_is_bounded_and_spread_over_the_dataset() -> None:
    lengths = np.full(1000, 300)
    lag = Lag(ROBOT, ["cam"], lengths, lengths)
    wanted = sum(len(begins) for begins in lag._spans.values())
    assert 20_000 / 128 <= wanted <= 2 * 20_000 / 128
    assert np.ptp(list(lag._spans)) > 900
    one = Lag(ROBOT, ["cam"], np.array([10**7]), np.array([10**7]))
    assert len(one._spans[0]) < 200
    assert max(one._spans[0]) > 9 * 10**6


def test_flow_has_the_sign_and_the_size_of_a_pan() -> None:
    x = np.linspace(0, 4 * np.pi, 64)
    wall = 100 + 50 * np.sin(x)[None] * np.cos(np.linspace(0, 6, 32))[:, None]
    moved = np.stack([np.roll(wall, k, 1) for k in range(4)]).astype(np.float32)
    flow = affine_flow(moved)
    np.testing.assert_allclose(flow[:, 0], 1.0, atol=0.1)
    np.testing.assert_allclose(flow[:, 3], 0.0, atol=0.1)


def test_two_cameras_that_show_different_moments_are_told() -> None:
    camera = {"low": 0, "high": 0, "confidence": 1.0, "correlation": 0.9, "curve": {}, "used": 900}
    table = {"expected": 0, "cameras": {"left": {**camera, "frames": 0},
                                        "right": {**camera, "frames": 2, "low": 2, "high": 2}}}  # fmt: skip
    messages = [v.message for v in lags.verdicts(table, 10) if v.level == "WARN"]
    assert messages == ["camera right is behind camera left by about 2 frames (200 ms)"]


@needs(CAR)
def test_a_lag_planted_in_a_real_drive_is_found(tmp_path: Path) -> None:
    """The driven car answers after four frames; shifting its labels shifts that by as many."""
    ingest(
        [RECORDINGS / CAR], Contract.load(ROOT / "docs" / "examples" / "donkeycar.yaml"), tmp_path / "data"
    )
    windows = Windows(tmp_path / "data")
    action, found = np.asarray(windows.action).copy(), {}
    for shift in (-3, 0, 3):
        scan = Scan(windows, [], 20)
        windows.action = np.roll(action, -shift, 0)
        scan.run()
        (estimated,) = scan.lag.estimates().values()
        assert not isinstance(estimated, str)
        assert estimated.confidence > 0.9
        found[shift] = estimated.frames
    assert abs(found[0] - 4) <= 1
    assert abs(found[3] - found[0] - 3) <= 1
    assert abs(found[-3] - found[0] + 3) <= 1
