"""Optimiser: golden schedule, grouping, weight average, and the stop on NaN."""

import pytest
import torch
from torch import Tensor, nn

from d4_core.optim import Ema, OptimConfig, Optimiser, lr_scale
from d4_datasets.errors import UserError


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"block": nn.Linear(4, 6), "embed": nn.Embedding(3, 4), "head": nn.Linear(6, 2)})


def group(name: str, p: nn.Parameter) -> str:
    if name.startswith("head"):
        return "heads"
    return "muon" if name == "block.weight" else "adamw"


def optimiser(net: nn.Module, config: OptimConfig | None = None, total: int = 100) -> Optimiser:
    return Optimiser("toy", net.named_parameters(), group, config or OptimConfig(), total)


def loss(net: nn.ModuleDict) -> Tensor:
    return net["head"](net["block"](net["embed"](torch.arange(3)))).square().mean()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.05),
        (9, 0.5),
        (19, 1.0),
        (500, 1.0),
        (699, 1.0),
        (700, 0.05 + 0.95 * 299 / 300),
        (850, 0.521833),
        (999, 0.05),
    ],
)
def test_golden_schedule(step: int, expected: float) -> None:
    assert lr_scale(step, 1000, OptimConfig()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("total", [1, 2, 7])
def test_schedule_of_tiny_runs_is_positive(total: int) -> None:
    assert all(0.0 < lr_scale(step, total, OptimConfig()) <= 1.0 for step in range(total))


def test_no_decay_when_its_fraction_is_zero() -> None:
    assert lr_scale(99, 100, OptimConfig(decay_fraction=0.0)) == 1.0


def test_grouping() -> None:
    net = model()
    muon, adamw = optimiser(net)._optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [p is net["block"].weight for g in muon.param_groups for p in g["params"]] == [True]
    found = {
        name: (g["peak_lr"], g["weight_decay"], g["betas"])
        for g in adamw.param_groups
        for p in g["params"]
        for name, q in net.named_parameters()
        if p is q
    }
    betas = (0.9, 0.95)
    assert found == {
        "block.bias": (1e-3, 0.0, betas),
        "embed.weight": (1e-3, 0.01, betas),
        "head.weight": (2e-3, 0.01, betas),
        "head.bias": (2e-3, 0.0, betas),
    }


def test_step_equals_torch_with_the_scheduled_rate_and_clipping() -> None:
    net, reference = model(), model()
    ours = optimiser(net, OptimConfig(clip=1e-3))
    muon = torch.optim.Muon([reference["block"].weight], lr=0.02 * 0.5, weight_decay=0.01)
    rest = [p for n, p in reference.named_parameters() if n == "embed.weight"]
    adamw = torch.optim.AdamW(rest, lr=1e-3 * 0.5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for m in (net, reference):
        loss(m).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e-3)
    assert ours.step(0, {"fit": loss(net)}) == norm.item()  # step 0 of 100: half-way through the warm-up
    muon.step()
    adamw.step()
    assert torch.equal(net["block"].weight, reference["block"].weight)
    assert torch.equal(net["embed"].weight, reference["embed"].weight)


def test_state_round_trip_is_exact() -> None:
    nets = model(), model()
    first, second = optimiser(nets[0]), optimiser(nets[1])
    loss(nets[0]).backward()
    first.step(0, {})
    nets[1].load_state_dict(nets[0].state_dict())
    second.load({key: value.clone() for key, value in first.state().items()})
    for net, opt in zip(nets, (first, second), strict=True):
        opt.zero_grad()
        loss(net).backward()
        opt.step(1, {})
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_nan_loss_stops_with_phase_step_and_term() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    opt = optimiser(net)
    bad = loss(net) * float("nan")
    bad.backward()
    with pytest.raises(UserError, match=r"toy step 7: loss 'fit' is nan; .* lower the learning rates"):
        opt.step(7, {"fit": bad, "size": torch.ones(())})
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_infinite_gradient_of_a_finite_loss_names_the_parameter() -> None:
    net = model()
    opt = optimiser(net)
    good = loss(net)
    good.backward()
    net["embed"].weight.grad[0, 0] = float("inf")
    with pytest.raises(
        UserError, match=r"gradient of 'embed.weight' is not finite though all losses \(fit\) are"
    ):
        opt.step(3, {"fit": good})


def test_ema_is_the_bias_corrected_average() -> None:
    p = nn.Parameter(torch.full((2,), 100.0))  # a start that a plain average would remember
    ema = Ema([("p", p)], 0.9)
    shadow = 0.0
    for step in range(5):
        with torch.no_grad():
            p.fill_(float(step))
        ema.update(step)
        shadow = 0.9 * shadow + 0.1 * step
        assert ema.state()["p"].tolist() == pytest.approx([shadow / (1 - 0.9 ** (step + 1))] * 2)


def test_the_average_is_put_in_the_place_of_the_parameters() -> None:
    p = nn.Parameter(torch.tensor([1.0]))
    ema = Ema([("p", p)], 0.5)
    ema.update(0)
    address = p.data_ptr()
    nn.init.constant_(p, 3.0)
    ema.copy_to_parameters()
    assert (p.item(), p.data_ptr()) == (1.0, address)
