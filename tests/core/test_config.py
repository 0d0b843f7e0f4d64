"""Presets: what a contract adds to them, overriding, saving, and which changes leave earlier work alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import toy_run

from d4_core.config import PHASES, PRESETS, Preset, action_parts, from_dict, override, preset, to_dict
from d4_core.imagination import Dream, ImaginationConfig
from d4_core.models import build
from d4_core.phases import ImaginationTraining
from d4_core.shortcut import Grid
from d4_datasets.errors import UserError

ALIGN = {"strategy": "hold", "timeline": "receive", "tolerance_ms": 150}


def vector(name: str, role: str, fields: list[str]) -> dict:
    return {
        "name": name, "topic": f"/{name}", "type": "geometry_msgs/msg/PoseStamped", "select": fields,
        "role": role, "align": ALIGN,
    }  # fmt: skip


def camera(name: str, size: list[int]) -> dict:
    return {
        "name": name, "topic": f"/{name}", "type": "sensor_msgs/msg/Image", "size": size, "align": ALIGN,
    }  # fmt: skip


# ---- saving


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_being_saved(name: str) -> None:
    assert from_dict(Preset, to_dict(PRESETS[name])) == PRESETS[name]
    assert preset(name) is PRESETS[name]


def test_every_field_survives_being_saved() -> None:
    """Of a preset in which no field of any depth has its default."""

    def change(node):
        if dataclasses.is_dataclass(node):
            return dataclasses.replace(
                node, **{f.name: change(getattr(node, f.name)) for f in dataclasses.fields(node)}
            )
        if isinstance(node, tuple):
            return tuple(change(x) for x in node)
        if isinstance(node, bool | str):
            return not node if isinstance(node, bool) else f"{node}x"
        return node * 2 if isinstance(node, int) else node / 2 + 0.125

    odd = change(Preset())
    assert from_dict(Preset, to_dict(odd)) == odd
    assert from_dict(ImaginationTraining | None, None) is None
    some = ImaginationTraining(settings=ImaginationConfig(contexts=(2,)))
    assert from_dict(ImaginationTraining | None, to_dict(some)) == some


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="no preset 'huge': choose one of nano, small, base, large, paper"):
        preset("huge")


# ---- overriding


def test_override_reaches_every_depth_and_leaves_the_rest() -> None:
    old = PRESETS["nano"]
    new = override(old, ["agent_training.dynamics.ramp=true", "patch=8", "optim.agent.lr=1"])
    assert new.agent_training.dynamics.ramp is True
    assert (new.patch, new.optim.agent.lr) == (8, 1.0)
    assert isinstance(new.optim.agent.lr, float)
    back = override(
        new,
        ["agent_training.dynamics.ramp=false", f"patch={old.patch}", f"optim.agent.lr={old.optim.agent.lr}"],
    )
    assert back == old
    settings = override(old, ["imagination_training.settings.contexts=[2, 3]"]).imagination_training.settings
    assert settings.contexts == (2, 3)
    files = override(old, ["tokenizer_training.lpips_features=/a/vgg16.pth"]).tokenizer_training
    assert files.lpips_features == "/a/vgg16.pth"
    assert override(old, []) is old


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("depth=3", "there is no 'depth'; there is "),
        ("dynamics.deep=3", "there is no 'deep'; there is "),
        ("patch.x=3", "there is no 'x'; what is before it is a plain value"),
        ("patch=large", "expected int, got 'large'"),
        ("patch=8.5", "expected int, got 8.5"),
        ("patch=true", "expected int, got True"),
        ("patch", "expected int, got None"),
        ("dynamics_training.ramp=1", "expected bool, got 1"),
        ("dynamics_training.ramp=yes", "expected bool, got 'yes'"),
        ("dynamics=3", "positional"),
        ("reward_range=3", "not iterable"),
        ("grid.levels=12", "power of two"),
        ("num_latents=12", "num_latents 12 is not a multiple of num_tokens 8"),
        ("dynamics.kv_heads=3", "do not divide evenly"),
    ],
)  # fmt: skip
def test_an_override_that_does_not_fit_is_one_sentence(setting: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        override(PRESETS["nano"], ["hidden=64", setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert why in str(caught.value)


def test_settings_that_only_fit_together_are_checked_together() -> None:
    for settings in (["num_latents=12", "num_tokens=12"], ["num_tokens=12", "num_latents=12"]):
        assert override(PRESETS["nano"], settings).num_tokens == 12
    with pytest.raises(UserError, match=r"^--set num_latents=12 num_tokens=9: num_latents 12 is"):
        override(PRESETS["nano"], ["hidden=64", "num_latents=12", "num_tokens=9"])
    with pytest.raises(UserError, match=r"^--set dynamics\.depth=7: depth 7 must be a multiple"):
        override(PRESETS["nano"], ["num_latents=12", "dynamics.depth=7", "num_tokens=12"])
    with pytest.raises(UserError, match=r"^--set patch=x: expected int"):
        override(PRESETS["nano"], ["num_latents=12", "num_tokens=12", "patch=x"])
    assert override(PRESETS["nano"], ["patch=8", "patch=4"]).patch == 4


# ---- which changes undo which phases


@pytest.mark.parametrize("phase", PHASES)
def test_training_settings_of_later_phases_do_not_matter(phase: str) -> None:
    """A checkpoint is kept if `up_to` its phase is unchanged: tuning phase 3 must not retrain phase 1."""
    plain, mine = PRESETS["nano"], PHASES.index(phase)
    for number, name in enumerate(PHASES):
        for setting in (f"{name}_training.steps=7777", f"optim.{name}.lr=0.5"):
            changed = override(plain, [setting])
            same = changed.up_to(phase) == plain.up_to(phase)
            assert same == (number > mine), setting
    assert override(plain, ["patch=8"]).up_to(phase) != plain.up_to(phase)
    assert override(plain, ["dynamics.recompute=true"]).up_to(phase) == plain.up_to(phase)
    assert from_dict(Preset, PRESETS["small"].up_to("imagination")) == PRESETS["small"]
    assert from_dict(Preset, plain.up_to(phase)).dynamics == plain.dynamics


def test_no_preset_lets_the_agent_phase_forget_the_step_sizes() -> None:
    """`nano` has none to forget unless `--set dynamics_training.bootstrap_rows` trains them."""
    for cfg in PRESETS.values():
        assert cfg.agent_training.dynamics.bootstrap_warmup == 0.0
        assert cfg.agent_training.dynamics.bootstrap_rows > 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name: str) -> None:
    cfg = PRESETS[name]
    assert cfg.num_latents % cfg.num_tokens == 0
    assert cfg.grid.levels % cfg.imagination_training.settings.steps == 0
    assert max(cfg.imagination_training.settings.contexts) <= cfg.dynamics.context
    assert cfg.imagination_training.steps % cfg.imagination_training.reuse == 0
    assert (
        cfg.dynamics_training.long_length >= cfg.dynamics.context
    )  # what a session looks back over is trained


# ---- contracts


def test_shapes_come_from_the_contract() -> None:
    robot = toy_run.contract(
        observations=[
            camera("front", [16, 24]), camera("wrist", [8, 8]),
            vector("arm", "input", ["pose.position.x", "pose.position.y", "pose.position.z"]),
            vector("truth", "probe", ["pose.position.x"]),
        ]
    )  # fmt: skip
    cfg = dataclasses.replace(PRESETS["nano"], patch=8)
    tokenizer = cfg.tokenizer_config(robot)
    assert [(c.name, c.height, c.width) for c in tokenizer.cameras] == [("front", 16, 24), ("wrist", 8, 8)]
    assert [(v.name, v.size) for v in tokenizer.vectors] == [
        ("arm", 3)
    ]  # a probe is never shown to the model
    dynamics = cfg.dynamics_config(robot)
    assert dynamics.num_tokens * dynamics.token_dim == tokenizer.num_latents * tokenizer.latent_dim
    assert (dynamics.num_tokens, dynamics.token_dim) == (tokenizer.num_tokens, tokenizer.token_dim)
    assert cfg.agent_config(robot).num_tasks == 2
    assert cfg.agent_config(toy_run.contract(tasks=None, reward=None)).num_tasks == 1


def test_a_picture_that_does_not_divide_into_patches_names_camera_and_sizes() -> None:
    with pytest.raises(
        UserError, match="camera 'cam' is 16x24, not a multiple of the preset's 16 px patches"
    ):
        PRESETS["nano"].tokenizer_config(toy_run.contract())


def test_action_parts_follow_the_order_of_the_contract() -> None:
    twist = {"topic": "/cmd", "type": "geometry_msgs/msg/Twist", "safety": "hold", "align": ALIGN}
    robot = toy_run.contract(
        actions=[
            {**twist, "name": "grip", "kind": "binary", "select": ["linear.z"]},
            {**twist, "name": "base", "select": ["linear.x", "angular.z"], "low": [-1, -2], "high": [1, 2]},
            {**twist, "name": "gear", "kind": "categorical", "classes": 4, "select": ["linear.y"]},
        ]
    )
    grip, base, gear = action_parts(robot)
    assert (grip.kind, grip.size) == ("binary", 1)
    assert (base.kind, base.size, base.low, base.high) == ("continuous", 2, (-1, -2), (1, 2))
    assert (gear.kind, gear.size, gear.classes) == ("categorical", 1, 4)


def test_a_grid_refuses_a_context_level_that_was_never_trained() -> None:
    with pytest.raises(ValueError, match="must round below 1"):
        Grid(levels=8, context_signal=0.99)


def test_heads_are_as_wide_as_what_they_read() -> None:
    for reads in (False, True):
        cfg = dataclasses.replace(toy_run.PRESET, heads_read_world=reads)
        models = build(cfg, toy_run.contract(), "imagination")
        read = cfg.agent_tokens + (cfg.num_tokens if reads else 0)
        assert models.critic.head.inputs == models.agent.policy.inputs == cfg.dynamics.dim * read
        dream = Dream(models.dynamics.eval(), models.agent, 3)
        task, known = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
        tokens = torch.zeros(3, cfg.num_tokens, models.dynamics.cfg.token_dim)
        h = dream.observe(tokens, torch.zeros(3, 2), known, task)
        assert h.shape == (3, models.agent.policy.inputs)
