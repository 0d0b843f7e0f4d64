"""LPIPS, the perceptual distance of the tokenizer's loss, from weights that the user brings.

Two files are needed and neither can be shipped: the convolutions of VGG16 or AlexNet (torchvision) trained on
ImageNet, and the linear heads of LPIPS. Without them the tokenizer is trained on squared error.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from d4_core.tokenizer import Tokenizer
from d4_datasets.digest import sha256
from d4_datasets.errors import UserError

# (index in torchvision's `features`, stride, padding, pooling before it: kernel size or 0)
_ALEX = ((0, 4, 2, 0), (3, 1, 2, 3), (6, 1, 1, 3), (8, 1, 1, 0), (10, 1, 1, 0))
_VGG = tuple(
    (index, 1, 1, 2 if index in (5, 10, 17, 24) else 0)
    for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
)
# network: its layers, the convolutions whose activations are compared, and the shape of the first weight
_NETWORKS = {
    "alexnet": (_ALEX, (0, 3, 6, 8, 10), (64, 3, 11, 11)),
    "vgg16": (_VGG, (2, 7, 14, 21, 28), (64, 3, 3, 3)),
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_HEAD = re.compile(r"lins?\.?(\d)\.(?:model\.\d\.)?weight")


class Perceptual(nn.Module):
    """LPIPS v0.1: distance of two images in the activations of a trained network, which stays as it is.

    Args:
        features: state_dict of torchvision's vgg16 or alexnet, .safetensors or .pth.
        heads: the linear heads of LPIPS for the same network (lin0 .. lin4), .safetensors or .pth.

    Attributes:
        network: "vgg16" or "alexnet", recognised by its weights.
        sha256: checksum of either file, to be recorded with what they trained.

    Raises:
        UserError: a file is missing, unreadable, or not what it should be.
    """

    def __init__(self, features: Path, heads: Path) -> None:
        super().__init__()
        state = _load(features)
        self.network = _recognise(state, features)
        self._layers, self._taps, _ = _NETWORKS[self.network]
        for index, *_ in self._layers:
            for kind in ("weight", "bias"):
                self._keep(f"{kind}_{index}", state[f"features.{index}.{kind}"])
        for tap, weight in zip(self._taps, self._read_heads(heads), strict=True):
            self._keep(f"head_{tap}", weight)
        self._keep("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self._keep("scale", torch.tensor(_SCALE).view(3, 1, 1))
        self.sha256 = {"features": sha256(features), "heads": sha256(heads)}

    def _keep(self, name: str, value: Tensor) -> None:
        # not persistent: hundreds of megabytes of a public network do not belong into checkpoints
        self.register_buffer(name, value.float(), persistent=False)

    def _read_heads(self, path: Path) -> list[Tensor]:
        found = {int(m[1]): v for k, v in _load(path).items() if (m := _HEAD.fullmatch(k))}
        wanted = [getattr(self, f"weight_{tap}").shape[0] for tap in self._taps]
        sizes = [found[n].numel() if n in found else 0 for n in range(len(wanted))]
        if sizes != wanted:
            raise UserError(
                f"{path} holds no LPIPS heads for {self.network} (lin0 .. lin4 with {wanted} weights; it has "
                f"{sizes}): give the heads that belong to the network"
            )
        return [found[n].flatten() for n in range(len(wanted))]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance (B,) of images (B, 3, H, W) in [0, 1]; differentiable in both."""
        total = torch.zeros(len(a), device=a.device)
        for tap, x, y in zip(self._taps, self._activations(a), self._activations(b), strict=True):
            # normalize, not x / x.norm(): its gradient is finite where a ReLU has left nothing but zeros
            difference = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)).square()
            head = getattr(self, f"head_{tap}")
            total = total + torch.einsum("bchw,c->bhw", difference, head).mean((1, 2))
        return total

    def _activations(self, image: Tensor) -> list[Tensor]:
        x = (image.float() * 2 - 1 - self.shift) / self.scale
        out = []
        for index, stride, padding, pool in self._layers:
            if pool:
                x = F.max_pool2d(x, pool, 2)
            weight, bias = getattr(self, f"weight_{index}"), getattr(self, f"bias_{index}")
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            if index in self._taps:
                out.append(x)
        return out


def lpips_loss(
    perceptual: Perceptual,
    tokenizer: Tokenizer,
    obs: dict[str, Tensor],
    predicted: dict[str, Tensor],
    gen: torch.Generator,
    share: float = 0.5,
) -> Tensor:
    """Mean perceptual distance between reconstructed and real frames, over the cameras.

    Args:
        perceptual: the distance.
        tokenizer: turns standardised patches into pixels.
        obs: real frames {camera: (B, T, H, W, 3) uint8}; other modalities are ignored.
        predicted: standardised patches {camera: (B, T, P, numbers)} of the decoder.
        gen: draws the frames that are compared.
        share: share of the frames that are compared, at least one: most of a step's time goes into this loss.
    """
    total = torch.zeros((), device=next(iter(predicted.values())).device)
    for camera in tokenizer.cfg.cameras:
        real, patches = obs[camera.name].flatten(0, 1), predicted[camera.name].flatten(0, 1)
        count = max(1, round(share * len(real)))
        pick = torch.randperm(len(real), generator=gen)[:count].to(real.device)
        made = tokenizer.to_pixels(camera.name, patches[pick])
        pair = [x.movedim(-1, 1) for x in (made, real[pick].float() / 255)]
        total = total + perceptual(*pair).mean()
    return total / len(tokenizer.cfg.cameras)


def _load(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or a state_dict saved by torch (nothing in it is executed)."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is no weights file, neither .safetensors nor a state_dict of torch: {reason}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the LPIPS weights {path}: {error.strerror or error}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is no state_dict; save one with torch.save(model.state_dict(), path)")
    return state


def _recognise(state: dict[str, Tensor], path: Path) -> str:
    for name, (layers, _, first) in _NETWORKS.items():
        keys = [f"features.{index}.{kind}" for index, *_ in layers for kind in ("weight", "bias")]
        if all(key in state for key in keys) and tuple(state[keys[0]].shape) == first:
            return name
    raise UserError(
        f"{path} holds neither torchvision's vgg16 nor its alexnet: save one with "
        "torch.save(torchvision.models.vgg16(weights='IMAGENET1K_V1').state_dict(), path)"
    )
