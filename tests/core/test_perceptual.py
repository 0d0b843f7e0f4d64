"""LPIPS against a straightforward computation with layers written out by hand and random weights."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d4_core.perceptual import Perceptual, lpips_loss
from d4_datasets.errors import UserError

VGG = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
VGG_TAPS, ALEX_TAPS = (3, 8, 15, 22, 29), (1, 4, 7, 9, 11)
VGG_WIDTHS, ALEX_WIDTHS = (64, 128, 256, 512, 512), (64, 192, 384, 256, 256)


def vgg_features() -> nn.Sequential:
    """The layers of torchvision's vgg16().features, which give its keys."""
    layers: list[nn.Module] = []
    width = 3
    for item in VGG:
        if item == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()]
            width = item
    return nn.Sequential(*layers)


def alex_features() -> nn.Sequential:
    """The layers of torchvision's alexnet().features, without the last pooling, which LPIPS does not use."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def heads(widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(7)
    return {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1, generator=gen) for n, w in enumerate(widths)}


def states(net: nn.Module) -> dict[str, torch.Tensor]:
    return {f"features.{name}": value for name, value in net.state_dict().items()}


def by_hand(net: nn.Sequential, weights: dict, taps: tuple[int, ...], a, b) -> torch.Tensor:
    """LPIPS as its paper writes it."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, y = ((2 * image - 1 - shift) / scale for image in (a, b))
    total = torch.zeros(len(a))
    for number, layer in enumerate(net):
        x, y = layer(x), layer(y)
        if number in taps:
            unit_x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            unit_y = y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            weight = weights[f"lin{taps.index(number)}.model.1.weight"]
            total += (weight * (unit_x - unit_y) ** 2).sum(1).mean((1, 2))
    return total


@pytest.fixture(scope="module")
def alex(tmp_path_factory) -> tuple[Path, Path, nn.Sequential]:
    """AlexNet with random weights as .safetensors, heads as .pth."""
    torch.manual_seed(0)
    folder, net = tmp_path_factory.mktemp("alex"), alex_features()
    save_file(states(net), folder / "alex.safetensors")
    torch.save(heads(ALEX_WIDTHS), folder / "heads.pth")
    return folder / "alex.safetensors", folder / "heads.pth", net


def images(count: int = 2, height: int = 48, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    pair = torch.rand(2, count, 3, height, width, generator=gen)
    return pair[0], pair[1]


@torch.no_grad()
def test_alexnet_equals_the_computation_by_hand(alex):
    features, linear, net = alex
    lpips, (a, b) = Perceptual(features, linear), images()
    assert lpips.network == "alexnet"
    torch.testing.assert_close(lpips(a, b), by_hand(net, heads(ALEX_WIDTHS), ALEX_TAPS, a, b))
    assert lpips(a, b).shape == (2,)


@torch.no_grad()
def test_vgg16_equals_the_computation_by_hand(tmp_path):
    torch.manual_seed(0)
    net = vgg_features()
    torch.save(states(net) | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg.pth")
    save_file(heads(VGG_WIDTHS), tmp_path / "heads.safetensors")
    lpips, (a, b) = Perceptual(tmp_path / "vgg.pth", tmp_path / "heads.safetensors"), images(1, 32, 32)
    assert lpips.network == "vgg16"
    torch.testing.assert_close(lpips(a, b), by_hand(net, heads(VGG_WIDTHS), VGG_TAPS, a, b))


@torch.no_grad()
def test_is_zero_for_equal_images_symmetric_and_grows_with_the_difference(alex):
    lpips, (a, b) = Perceptual(*alex[:2]), images()
    assert lpips(a, a).abs().max() == 0
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    assert (lpips(a, a + 0.1 * (b - a)) < lpips(a, b)).all()


def test_gradient_flows_into_the_picture_and_stays_finite_where_relu_leaves_nothing(alex, tmp_path):
    features, linear, net = alex
    dead = states(net) | {"features.0.bias": torch.full((64,), -1e4)}
    save_file(dead, tmp_path / "dead.safetensors")
    for path in (features, tmp_path / "dead.safetensors"):
        a, b = images()
        a.requires_grad_()
        lpips = Perceptual(path, linear)
        lpips(a, b).sum().backward()
        assert a.grad.isfinite().all()
        assert bool(a.grad.any()) == (path == features)
    assert not list(lpips.parameters())
    assert not lpips.state_dict()


def test_records_the_checksums_of_both_files(alex):
    features, linear, _ = alex
    found = Perceptual(features, linear).sha256
    assert found == {
        "features": hashlib.sha256(features.read_bytes()).hexdigest(),
        "heads": hashlib.sha256(linear.read_bytes()).hexdigest(),
    }


def test_wrong_files_are_refused_in_one_sentence(alex, tmp_path):
    features, linear, _ = alex
    text, other, pickled = tmp_path / "notes.pth", tmp_path / "other.safetensors", tmp_path / "model.pth"
    text.write_text("no weights at all")
    save_file({"conv.weight": torch.zeros(2)}, other)
    torch.save({"model": {"features.0.weight": torch.zeros(2)}}, pickled)
    save_file(heads(VGG_WIDTHS), tmp_path / "vgg_heads.safetensors")
    for first, second, reason in (
        (tmp_path / "missing.pth", linear, "missing.pth"),
        (tmp_path / "missing.safetensors", linear, "missing.safetensors"),
        (text, linear, "no weights file"),
        (other, linear, "neither torchvision's vgg16"),
        (pickled, linear, "no state_dict"),
        (features, features, "no LPIPS heads for alexnet"),
        (features, tmp_path / "vgg_heads.safetensors", "belong to the network"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            Perceptual(first, second)
        assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_is_not_executed(tmp_path, alex):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("pwned").touch, ())

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="no weights file"):
        Perceptual(tmp_path / "evil.pth", alex[1])
    assert not (tmp_path / "pwned").exists()


def test_the_loss_compares_a_share_of_the_frames_of_each_camera(alex, make_tokenizer, tiny_shape):
    from d4_core.tokenizer import Camera

    tokenizer = make_tokenizer(cameras=(Camera(name="front", height=48, width=64),), patch=16)
    lpips, gen = Perceptual(*alex[:2]), torch.Generator().manual_seed(0)
    obs = {"front": torch.randint(0, 256, (2, 4, 48, 64, 3), dtype=torch.uint8, generator=gen)}
    exact = {"front": tokenizer.normalise("front", obs["front"])}
    assert lpips_loss(lpips, tokenizer, obs, exact, gen) < 1e-6  # the true pixels, standardised and back
    predicted = {"front": torch.zeros_like(exact["front"], requires_grad=True)}
    loss = lpips_loss(lpips, tokenizer, obs, predicted, torch.Generator().manual_seed(3), share=0.5)
    loss.backward()
    touched = predicted["front"].grad.flatten(0, 1).flatten(1).any(1)
    assert touched.sum() == 4
    pick = torch.randperm(8, generator=torch.Generator().manual_seed(3))[:4]
    assert touched[pick].all()
    made = tokenizer.to_pixels("front", predicted["front"].detach().flatten(0, 1)[pick]).movedim(-1, 1)
    real = obs["front"].flatten(0, 1)[pick].movedim(-1, 1).float() / 255
    torch.testing.assert_close(loss.detach(), lpips(made, real).mean())
