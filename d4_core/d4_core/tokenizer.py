"""Causal masked-autoencoder tokenizer (paper section 3.1).

Every frame becomes ``num_latents`` tokens of ``latent_dim`` numbers in (-1, 1), packed for the dynamics model
into ``num_tokens`` tokens. Inside a frame, encoder latents read every modality and modalities read only
themselves; decoder queries read the latents and never the other way round, so nothing reaches the picture but
through the latents. Cameras and proprioceptive vectors are modalities under the same rule.

Shape suffixes: B batch, T frames, P patches of one camera, N latents, L latent channels, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from d4_core.transformer import NEG_INF, KVCache, Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One image modality; sizes in pixels, multiples of the patch size."""

    name: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Vector:
    """One proprioceptive modality of `size` numbers, standardised by statistics kept in the tokenizer."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Shape of the tokenizer.

    Attributes:
        cameras, vectors: the modalities of the contract.
        patch: patch side in pixels.
        num_latents, latent_dim: bottleneck N x L (paper: 512 x 16).
        num_tokens: packed tokens for the dynamics model (paper: 256); divides num_latents.
        mask_max: each frame hides a share p ~ U(0, mask_max) of its patches in training (paper: 0.9).
        motion_weight: extra loss weight of pixels that differ from the dataset's mean image, relative to the
            squared difference; 0 (the paper) weighs all pixels alike.
        transformer: shape of the encoder, and of the decoder.
    """

    cameras: tuple[Camera, ...]
    vectors: tuple[Vector, ...] = ()
    patch: int = 16
    num_latents: int = 16
    latent_dim: int = 8
    num_tokens: int = 8
    mask_max: float = 0.9
    motion_weight: float = 0.0
    transformer: TransformerConfig = TransformerConfig()

    @property
    def token_dim(self) -> int:
        """Channels of one packed token."""
        return self.num_latents * self.latent_dim // self.num_tokens


class Tokenizer(nn.Module):
    """Encoder and decoder with their embeddings and the dataset statistics that they need at run time."""

    latent_mean: Tensor
    latent_std: Tensor
    encoder_bias: Tensor
    decoder_bias: Tensor

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        dim = cfg.transformer.dim
        self.encoder = Transformer(cfg.transformer, time_slots=cfg.num_latents)
        self.decoder = Transformer(cfg.transformer, time_slots=cfg.num_latents)
        self.latents = nn.Parameter(0.5 * torch.randn(cfg.num_latents, dim))
        self.slots = nn.Parameter(0.5 * torch.randn(cfg.num_latents, dim))
        self.to_latent = nn.Linear(dim, cfg.latent_dim)
        self.from_latent = nn.Linear(cfg.latent_dim, dim)
        self.embed, self.unembed = nn.ModuleDict(), nn.ModuleDict()
        self.positions, self.queries, self.hidden = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, count, size in self._modalities():
            embed, unembed = nn.Linear(size, dim), nn.Linear(dim, size)
            self.embed[name], self.unembed[name] = embed, unembed
            self.positions[name] = nn.Parameter(0.5 * torch.randn(count, dim))
            self.queries[name] = nn.Parameter(0.5 * torch.randn(count, dim))
            self.hidden[name] = nn.Parameter(0.5 * torch.randn(dim))
            nn.init.zeros_(unembed.weight)  # the untrained decoder predicts the mean image
        for cam in cfg.cameras:
            self.register_buffer(f"mean_{cam.name}", torch.zeros(cam.height, cam.width, 3))
            self.register_buffer(f"std_{cam.name}", torch.ones(()))
        for vec in cfg.vectors:
            self.register_buffer(f"mean_{vec.name}", torch.zeros(vec.size))
            self.register_buffer(f"std_{vec.name}", torch.ones(vec.size))
        self.register_buffer("latent_mean", torch.zeros(cfg.num_tokens, cfg.token_dim))
        self.register_buffer("latent_std", torch.ones(cfg.num_tokens, cfg.token_dim))
        self.register_buffer("encoder_bias", self._mask(latents_read_all=True), persistent=False)
        self.register_buffer("decoder_bias", self._mask(latents_read_all=False), persistent=False)

    # -- layout ----------------------------------------------------------------------------------------------

    def _modalities(self) -> list[tuple[str, int, int]]:
        """(name, tokens, numbers per token) of every modality, in slot order behind the latents."""
        p = self.cfg.patch
        cams = [(c.name, (c.height // p) * (c.width // p), 3 * p * p) for c in self.cfg.cameras]
        return cams + [(v.name, 1, v.size) for v in self.cfg.vectors]

    def _mask(self, latents_read_all: bool) -> Tensor:
        """(S, S) additive mask of paper section 3.1; encoder if `latents_read_all`, else decoder."""
        n = self.cfg.num_latents
        counts = [n] + [count for _, count, _ in self._modalities()]
        group = torch.repeat_interleave(
            torch.arange(len(counts)), torch.tensor(counts), output_size=sum(counts)
        )
        allowed = group[:, None] == group[None, :]
        if latents_read_all:
            allowed[:n] = True
        else:
            allowed[:, :n] = True
        return torch.where(allowed, 0.0, NEG_INF)

    # -- statistics ------------------------------------------------------------------------------------------

    def set_statistics(self, mean: dict[str, Tensor], std: dict[str, Tensor]) -> None:
        """Store mean image (H, W, 3; in [0, 1]) and spread of each camera, mean and spread of each vector."""
        for name in mean:
            getattr(self, f"mean_{name}").copy_(mean[name])
            getattr(self, f"std_{name}").copy_(std[name].clamp_min(1e-3))

    def normalise(self, name: str, value: Tensor) -> Tensor:
        """Pixels uint8 (.., H, W, 3) or a vector (.., size) to standardised tokens (.., P, numbers)."""
        mean, std = getattr(self, f"mean_{name}"), getattr(self, f"std_{name}")
        if value.dtype == torch.uint8:
            p = self.cfg.patch
            x = (value.float() / 255.0 - mean) / std
            return rearrange(x, "... (y p) (x q) c -> ... (y x) (p q c)", p=p, q=p)
        return ((value - mean) / std)[..., None, :]

    def to_pixels(self, name: str, tokens: Tensor) -> Tensor:
        """Standardised patches (.., P, 3 p^2) to pixels (.., H, W, 3), float, [0, 1] up to an error."""
        cam = next(c for c in self.cfg.cameras if c.name == name)
        p = self.cfg.patch
        x = rearrange(tokens, "... (y x) (p q c) -> ... (y p) (x q) c", y=cam.height // p, p=p, q=p)
        return x * getattr(self, f"std_{name}") + getattr(self, f"mean_{name}")

    # -- clips -----------------------------------------------------------------------------------------------

    def embed_frames(
        self, obs: dict[str, Tensor], gen: torch.Generator | None = None, masking: float = 1.0
    ) -> Tensor:
        """(B, T, S, D) encoder input; with a generator, patches are hidden as in masked autoencoders.

        `masking` scales the share of hidden patches.
        """
        most = self.cfg.mask_max * masking
        parts = []
        for name, _, _ in self._modalities():
            tokens = self.embed[name](self.normalise(name, obs[name]))  # (B, T, P, D)
            if gen is not None:
                # one masking share per frame; every modality token is hidden independently
                share = torch.rand(*tokens.shape[:2], 1, 1, generator=gen) * most
                hide = torch.rand(*tokens.shape[:3], 1, generator=gen) < share
                tokens = torch.where(hide.to(tokens.device), self.hidden[name].to(tokens.dtype), tokens)
            parts.append(tokens + self.positions[name])
        latents = self.latents.expand(*parts[0].shape[:2], -1, -1).to(parts[0].dtype)
        return torch.cat([latents, *parts], dim=2)

    def bottleneck(self, x_BTSD: Tensor) -> Tensor:
        """Encoder output to latents (B, T, N, L) in (-1, 1)."""
        return torch.tanh(self.to_latent(x_BTSD[:, :, : self.cfg.num_latents]).float())

    def encode(
        self, obs: dict[str, Tensor], gen: torch.Generator | None = None, masking: float = 1.0
    ) -> Tensor:
        """Observations {name: (B, T, ...)} to latents (B, T, N, L).

        A generator masks patches (training), a share of them scaled by `masking`.
        """
        return self.bottleneck(self.encoder(self.embed_frames(obs, gen, masking), self.encoder_bias))

    def decoder_input(self, latents_BTNL: Tensor) -> Tensor:
        """(B, T, S, D) decoder input: latents and one learned query per token to reconstruct."""
        x = self.from_latent(latents_BTNL) + self.slots
        queries = [
            self.queries[name].expand(*x.shape[:2], -1, -1).to(x.dtype) for name, _, _ in self._modalities()
        ]
        return torch.cat([x, *queries], dim=2)

    def read_out(self, x_BTSD: Tensor) -> dict[str, Tensor]:
        """Decoder output to standardised tokens {name: (B, T, P, numbers)}."""
        out, first = {}, self.cfg.num_latents
        for name, count, _ in self._modalities():
            out[name] = self.unembed[name](x_BTSD[:, :, first : first + count]).float()
            first += count
        return out

    def decode(self, latents_BTNL: Tensor) -> dict[str, Tensor]:
        """Latents to standardised tokens {name: (B, T, P, numbers)}; `to_pixels` makes pictures of them."""
        return self.read_out(self.decoder(self.decoder_input(latents_BTNL), self.decoder_bias))

    # -- one frame at a time ---------------------------------------------------------------------------------

    def new_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> KVCache:
        """Cache for `encode_step` or `decode_step` (one each: they must not share)."""
        return KVCache(self.cfg.transformer, batch, self.cfg.num_latents, self.latents.device, dtype)

    def encode_step(self, obs: dict[str, Tensor], cache: KVCache) -> Tensor:
        """One frame {name: (B, ...)} to latents (B, N, L); equals `encode` of the clip at its last frame."""
        x = self.embed_frames({k: v[:, None] for k, v in obs.items()})
        y = self.encoder.step(x, cache, self.encoder.begin(cache), self.encoder_bias)
        cache.advance()
        return self.bottleneck(y)[:, 0]

    def decode_step(self, latents_BNL: Tensor, cache: KVCache) -> dict[str, Tensor]:
        """One frame of latents to standardised tokens {name: (B, P, numbers)}."""
        x = self.decoder_input(latents_BNL[:, None])
        y = self.decoder.step(x, cache, self.decoder.begin(cache), self.decoder_bias)
        cache.advance()
        return {k: v[:, 0] for k, v in self.read_out(y).items()}

    # -- packing for the dynamics model ----------------------------------------------------------------------

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (.., N, L) to standardised dynamics tokens (.., Nz, Dz).

        Neighbouring latents are concatenated (paper: 512 x 16 to 256 x 32) and each channel is standardised
        over the dataset: raw tanh latents have spreads of 0.1-0.2, so unit noise would swamp them and skew
        the signal levels.
        """
        z = latents.unflatten(-2, (self.cfg.num_tokens, -1)).flatten(-2)
        return (z - self.latent_mean) / self.latent_std

    def unpack(self, tokens: Tensor) -> Tensor:
        """Inverse of `pack`, clamped to the range that tanh can produce."""
        z = (tokens * self.latent_std + self.latent_mean).clamp(-1, 1)
        return z.unflatten(-1, (-1, self.cfg.latent_dim)).flatten(-3, -2)


def reconstruction_loss(tokenizer: Tokenizer, obs: dict[str, Tensor], predicted: dict[str, Tensor]) -> Tensor:
    """Mean squared error over all tokens of all modalities, hidden ones and visible ones alike.

    Scoring hidden patches only would leave the latents no reason to carry what the encoder can see.
    """
    total = torch.zeros((), device=next(iter(predicted.values())).device)
    for name, value in predicted.items():
        target = tokenizer.normalise(name, obs[name])
        error = (value - target).square()
        if tokenizer.cfg.motion_weight and obs[name].dtype == torch.uint8:
            weight = 1 + tokenizer.cfg.motion_weight * target.square().clamp(max=4.0)
            error = error * (weight / weight.mean())
        total = total + error.mean()
    return total / len(predicted)
