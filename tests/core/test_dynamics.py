"""World model: firewall, alignment inside a block, cached stepping, probes, and the paper's size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from d4_core.agent import Agent, AgentConfig
from d4_core.config import PRESETS, preset
from d4_core.dynamics import Dynamics
from d4_core.imagination import Dream
from d4_core.tokenizer import Tokenizer
from d4_datasets.contract import Contract

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
B, T, N, L = 2, 6, 3, 2


def clip(model: Dynamics, length: int = T, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    levels, finest = model.cfg.grid.levels, model.cfg.grid.finest
    return {
        "noisy_BTNL": torch.randn(B, length, N, L, generator=gen),
        "tau_index": torch.randint(0, levels, (B, length), generator=gen),
        "e": torch.randint(0, finest + 1, (B, length), generator=gen),
        "prev_action": 4 * torch.rand(B, length, 1, generator=gen) - 2,
        "labelled": torch.rand(B, length, generator=gen) < 0.7,
    }


def agent_tokens(length: int = T, seed: int = 1) -> Tensor:
    return torch.randn(B, length, 2, 16, generator=torch.Generator().manual_seed(seed))


# ---- gate 1


def test_gate_01_firewall_gradient_is_exactly_zero(make_dynamics) -> None:
    model, tokens = make_dynamics(), agent_tokens().requires_grad_()
    assert [layer.over_time for layer in model.transformer.layers] == [False, True, False, True]
    block = model(**clip(model), agent_BTGD=tokens)
    (grad,) = torch.autograd.grad(block.clean.pow(3).sum(), tokens, retain_graph=True)
    assert not grad.any()
    (grad,) = torch.autograd.grad(block.agent[:, -1].pow(3).sum(), tokens)
    assert (grad.abs().amax((0, 2, 3)) > 0).all()  # agent tokens do see themselves and their past


def test_gate_01_firewall_task_change_leaves_the_world_bitwise_equal(make_dynamics) -> None:
    model = make_dynamics()
    a, b = (model(**clip(model), agent_BTGD=agent_tokens(seed=s)) for s in (1, 2))
    huge = model(**clip(model), agent_BTGD=1e6 * agent_tokens())
    assert torch.equal(a.clean, b.clean)
    assert torch.equal(a.clean, huge.clean)
    assert (a.agent - b.agent).abs().max() > 1e-2
    alone = model(**clip(model))
    assert alone.agent is None
    torch.testing.assert_close(alone.clean, a.clean, **TOLERANCE)


def test_gate_01_firewall_no_world_parameter_feels_the_agent_through_the_world(make_dynamics) -> None:
    """In every layer: the state of a world slot does not depend on an agent slot."""
    model = make_dynamics()
    world, states = model.cfg.world_slots, []
    for layer in model.transformer.layers:
        layer.down.register_forward_hook(lambda m, i, out: states.append(out))
    tokens = agent_tokens().requires_grad_()
    model(**clip(model), agent_BTGD=tokens)
    assert len(states) == 4
    for state in states:
        (grad,) = torch.autograd.grad(state[:, :, :world].pow(3).sum(), tokens, retain_graph=True)
        assert not grad.any()


@torch.no_grad()
def test_gate_01_firewall_holds_in_cached_dreams(make_dynamics, make_agent) -> None:
    model = make_dynamics()
    agent = make_agent(model)
    known, frames = torch.ones(B, dtype=torch.bool), torch.randn(7, B, N, L)
    worlds, features = [], []
    for task in (0, 1):
        dream = Dream(model, agent, B, torch.Generator().manual_seed(0))
        for frame in frames:
            h = dream.observe(frame, torch.ones(B, 1), known, torch.full((B,), task))
            worlds.append(dream.predict(torch.ones(B, 1), known, 2))
        features.append(h)
    assert all(torch.equal(a, b) for a, b in zip(worlds[:7], worlds[7:], strict=True))
    assert not torch.equal(*features)


def test_gate_01_firewall_holds_where_heads_read_the_world(make_dynamics) -> None:
    """They see the frame's own tokens as it is predicted from, change nothing in it, and teach it nothing."""
    plain, model, tokens = make_dynamics(), make_dynamics(), agent_tokens().requires_grad_()
    model.cfg = replace(model.cfg, heads_read_world=True)
    before, block = plain(**clip(plain), agent_BTGD=tokens), model(**clip(model), agent_BTGD=tokens)
    assert block.agent.shape[2] == before.agent.shape[2] + model.cfg.num_tokens
    assert torch.equal(block.clean, before.clean)
    assert torch.equal(block.agent[:, :, :2], before.agent)
    world = block.agent[:, :, 2:]
    assert torch.equal(model.flow(world), block.clean)
    parameters = [p for p in model.parameters() if p.requires_grad]
    taught = torch.autograd.grad(world.pow(3).sum(), parameters, retain_graph=True, allow_unused=True)
    assert not any(g is not None and g.any() for g in taught)
    assert model(**clip(model)).agent is None
    other = model(**clip(model), agent_BTGD=tokens + 1)
    assert torch.equal(other.agent[:, :, 2:], world)  # the task is not in them


def test_agent_tokens_read_everything_in_their_block(make_dynamics) -> None:
    """An isolated agent token is blind to state and actions: no signal for any head."""
    model = make_dynamics()
    args = clip(model)
    args["noisy_BTNL"].requires_grad_()
    args["prev_action"].requires_grad_()
    args["labelled"][:] = True
    block = model(**args, agent_BTGD=agent_tokens())
    tokens, action = torch.autograd.grad(
        block.agent[:, 2].pow(3).sum(), [args["noisy_BTNL"], args["prev_action"]]
    )
    for grad in (tokens.flatten(2), action):
        assert (grad[:, :3].abs().amax((0, 2)) > 0).all()
        assert not grad[:, 3:].any()


# ---- gate 2
# Sums are of third powers: that of the squares of a normalised output is the same whatever went in.


def test_gate_02_block_t_reads_its_own_previous_action_and_no_later_one(make_dynamics) -> None:
    model = make_dynamics()
    args = clip(model)
    args["labelled"][:] = True
    args["prev_action"].requires_grad_()
    block = model(**args, agent_BTGD=agent_tokens())
    for t in range(T):
        for output in (block.clean, block.agent):
            (grad,) = torch.autograd.grad(output[:, t].pow(3).sum(), args["prev_action"], retain_graph=True)
            assert (grad[:, : t + 1].abs().amin((0, 2)) > 0).all()
            assert not grad[:, t + 1 :].any()


def test_gate_02_unlabelled_first_block_ignores_the_action_given(make_dynamics) -> None:
    model = make_dynamics()
    args = clip(model)
    args["labelled"][:, 0] = False
    expected = model(**args).clean
    for rubbish in (float("nan"), float("inf"), 1e30):
        args["prev_action"][:, 0] = rubbish
        assert torch.equal(model(**args).clean, expected)


# ---- gate 6


@torch.no_grad()
@pytest.mark.parametrize("prefill", [0, 1, 4, 7])
def test_gate_06_prefill_and_steps_equal_one_clip_past_eviction(make_dynamics, prefill: int) -> None:
    model, length = make_dynamics(), 13
    args, tokens = clip(model, length), agent_tokens(length)
    whole = model(**args, agent_BTGD=tokens)
    cache = model.new_cache(B)
    if prefill:
        head = model(
            **{k: v[:, :prefill] for k, v in args.items()}, agent_BTGD=tokens[:, :prefill], cache=cache
        )
        torch.testing.assert_close(head.clean, whole.clean[:, :prefill], **TOLERANCE)
    for t in range(prefill, length):
        frame = model.begin(cache)
        inputs = {k.replace("BTNL", "BNL"): v[:, t] for k, v in args.items()}
        unfinished = inputs | {"noisy_BNL": torch.randn(B, N, L), "tau_index": inputs["tau_index"] * 0}
        model.step(**unfinished, cache=cache, frame=frame)  # a denoising pass carries no agent tokens
        block = model.step(**inputs, cache=cache, frame=frame, agent_BGD=tokens[:, t])
        cache.advance()
        torch.testing.assert_close(block.clean[:, 0], whole.clean[:, t], **TOLERANCE)
        torch.testing.assert_close(block.agent[:, 0], whole.agent[:, t], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
def test_gate_06_dreaming_with_context_noise_equals_the_uncached_model(
    make_dynamics, make_agent, steps: int
) -> None:
    """The same noise fed to both: history enters corrupted, is labelled so, and stays as it was committed."""
    model = make_dynamics()
    agent, grid, length = make_agent(model), model.cfg.grid, 7  # context 4
    dream = Dream(model, agent, B, torch.Generator().manual_seed(5))
    gen = torch.Generator().manual_seed(5)
    clean, action = torch.randn(B, length, N, L), torch.rand(B, length, 1)
    labelled, task = torch.rand(B, length) < 0.7, torch.tensor([0, 1])
    tau = grid.context_index / grid.levels
    noisy = torch.empty(B, 0, N, L)
    tokens = agent.tokens(task)[:, None]

    def uncached(last: Tensor, index: int, e: int):
        t = noisy.shape[1] + 1
        levels, steps_ = torch.full((B, t), grid.context_index), torch.full((B, t), grid.finest)
        levels[:, -1], steps_[:, -1] = index, e
        frames = torch.cat([noisy, last[:, None]], 1)
        return model(frames, levels, steps_, action[:, :t], labelled[:, :t], tokens.expand(-1, t, -1, -1))

    for t in range(length):
        dreamed = dream.predict(action[:, t], labelled[:, t], steps)
        z = torch.randn(B, N, L, generator=gen)
        for k in range(steps):
            x = uncached(z, k * grid.levels // steps, steps.bit_length() - 1).clean[:, -1]
            z = z + (x - z) / (1 - k / steps) / steps
        torch.testing.assert_close(dreamed, z, rtol=1e-4, atol=1e-4)
        h = dream.observe(clean[:, t], action[:, t], labelled[:, t], task)
        last = (1 - tau) * torch.randn(B, N, L, generator=gen) + tau * clean[:, t]
        expected = agent.readout(uncached(last, grid.context_index, grid.finest).agent[:, -1])
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)
        noisy = torch.cat([noisy, last[:, None]], 1)


@torch.no_grad()
def test_context_noise_is_on_and_follows_the_seed(make_dynamics, make_agent) -> None:
    """A cache that stores clean history would switch the corruption off without a word."""
    model = make_dynamics()
    agent, known = make_agent(model), torch.ones(B, dtype=torch.bool)
    frames, outputs = torch.randn(4, B, N, L), []
    for seed in (0, 0, 1):
        dream = Dream(model, agent, B, torch.Generator().manual_seed(seed))
        for frame in frames:
            h = dream.observe(frame, torch.zeros(B, 1), known, torch.zeros(B, dtype=torch.int64))
        outputs.append(h)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# ---- probes


def test_slot_permutation_probe(make_dynamics) -> None:
    """A world model without slot embeddings cannot tell its tokens apart."""
    model, order = make_dynamics(), [1, 2, 0]
    args = clip(model)
    a = model(**args).clean
    b = model(**(args | {"noisy_BTNL": args["noisy_BTNL"][:, :, order]})).clean
    assert (a[:, :, order] - b).abs().max() > 0.05 * a.std()
    assert (a - b).abs().max() > 0.05 * a.std()


def test_registers_are_learned_tokens_of_their_own(make_dynamics) -> None:
    model = make_dynamics(registers=2)
    args = clip(model)
    (grad,) = torch.autograd.grad(model(**args).clean.pow(3).sum(), model.slots)
    assert grad.shape[0] == N + 1 + 1 + 2
    assert (grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", ["tau_index", "e"])
def test_level_and_step_size_matter(make_dynamics, name: str) -> None:
    model = make_dynamics()
    args = clip(model)
    other = args | {name: (args[name] + 1) % (model.cfg.grid.finest + 1)}
    assert (model(**args).clean - model(**other).clean).abs().max() > 1e-2


def test_image_rows_have_no_past(make_dynamics) -> None:
    model = make_dynamics()
    args, rows = clip(model), torch.tensor([True, False])
    y = model(**args, image_rows=rows).clean
    frames = [model(**{k: v[:, t : t + 1] for k, v in args.items()}).clean for t in range(T)]
    torch.testing.assert_close(y[0], torch.cat(frames, 1)[0], **TOLERANCE)
    torch.testing.assert_close(y[1], model(**args).clean[1], **TOLERANCE)


def test_the_untrained_model_predicts_the_mean(make_dynamics) -> None:
    model = make_dynamics(awake=False)
    clean = model(**clip(model)).clean
    assert torch.equal(clean, model.flow.bias.expand_as(clean))


def test_a_predicted_velocity_leads_from_the_noisy_tokens_to_the_clean_ones(make_dynamics) -> None:
    plain, model = make_dynamics(), make_dynamics()
    model.cfg = replace(model.cfg, predict_velocity=True)
    args = clip(model)
    left = 1 - args["tau_index"] / model.cfg.grid.levels
    velocity = plain(**args).clean
    expected = args["noisy_BTNL"] + left[..., None, None] * velocity
    torch.testing.assert_close(model(**args).clean, expected, **TOLERANCE)
    cache = model.new_cache(B)
    now = {"noisy_BNL": args["noisy_BTNL"][:, 0]} | {
        name: args[name][:, 0] for name in ("tau_index", "e", "prev_action", "labelled")
    }
    streamed = model.step(**now, cache=cache, frame=model.begin(cache)).clean
    torch.testing.assert_close(streamed[:, 0], expected[:, 0], **TOLERANCE)


def test_gradients_reach_every_parameter(make_dynamics) -> None:
    model = make_dynamics()
    args = clip(model, 16)
    args["labelled"][:] = True
    block = model(**args, agent_BTGD=agent_tokens(16))
    (block.clean.pow(3).sum() + block.agent.pow(3).sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- presets


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_paper_preset_has_the_papers_size() -> None:
    """400 M + 1.6 B, built without memory: 384x640 pictures, 23 keys and a 121-way mouse."""
    align = {"strategy": "hold", "timeline": "receive", "tolerance_ms": 250}
    view = {"name": "view", "topic": "/view", "type": "sensor_msgs/msg/Image"}
    keys = {"name": "keys", "topic": "/keys", "type": "std_msgs/msg/UInt8MultiArray", "kind": "binary"}
    mouse = {
        "name": "mouse",
        "topic": "/mouse",
        "type": "std_msgs/msg/Int64",
        "kind": "categorical",
        "classes": 121,
    }
    contract = Contract.from_dict(
        {
            "name": "blocks",
            "rate_hz": 20,
            "latency_ms": 0,
            "observations": [
                view | {"size": [384, 640], "align": align}
            ],
            "actions": [
                keys | {"select": [f"data[{i}]" for i in range(23)], "safety": "zeros", "align": align},
                mouse | {"select": ["data"], "safety": "none", "align": align},
            ],
            "tasks": {
                "topic": "/task", "type": "std_msgs/msg/String", "select": "data",
                "names": [f"task{i}" for i in range(20)],
            },
        }
    )  # fmt: skip
    paper = preset("paper")
    with torch.device("meta"):
        tokenizer = Tokenizer(paper.tokenizer_config(contract))
        dynamics = Dynamics(paper.dynamics_config(contract))
        cfg: AgentConfig = paper.agent_config(contract)
        Agent(cfg, dynamics.space, dynamics.cfg.transformer.dim, dynamics.cfg.agent_tokens)
    assert size(tokenizer) == pytest.approx(400e6, rel=0.1)
    assert size(dynamics) == pytest.approx(1.6e9, rel=0.1)
    assert (dynamics.cfg.num_tokens, dynamics.cfg.token_dim, dynamics.space.num_params) == (256, 32, 23 + 121)
    assert (dynamics.cfg.transformer.context, cfg.leads) == (192, 8)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_gate_05_presets_sample_with_trained_step_sizes(name: str) -> None:
    """A step size whose row was never trained costs quality without a word."""
    chosen = preset(name)
    settings = chosen.imagination_training.settings
    assert chosen.grid.levels % settings.steps == 0
    assert max(settings.contexts) <= chosen.dynamics.context


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_train_on_clips_that_fill_the_attention_window(name: str) -> None:
    """Else a session that runs on looks back over distances that no clip ever had."""
    chosen = preset(name)
    assert chosen.dynamics.context < chosen.dynamics_training.long_length
    assert chosen.tokenizer.context <= chosen.tokenizer_training.length
    assert chosen.dynamics.context <= chosen.agent_training.long_length
    assert chosen.agent_training.length <= chosen.agent_training.long_length
    assert chosen.agent_training.long_share > 0


def test_the_flow_head_works_in_float32_under_autocast(make_dynamics) -> None:
    """bfloat16 keeps three digits: rounded predictions drift visibly over a rollout."""
    model = make_dynamics()
    gen = torch.Generator().manual_seed(0)
    args = (
        torch.randn(2, 3, 3, 2, generator=gen), torch.zeros(2, 3, dtype=torch.int64),
        torch.full((2, 3), 3), torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool),
    )  # fmt: skip
    inputs = []
    model.flow.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        clean = model(*args).clean
    assert clean.dtype == inputs[0].dtype == torch.float32
    assert not torch.equal(clean, clean.bfloat16().float())
    torch.testing.assert_close(clean, nn.functional.linear(inputs[0], model.flow.weight, model.flow.bias))
