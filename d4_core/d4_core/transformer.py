"""Block-causal space/time transformer shared by tokenizer and dynamics (paper section 3.4).

Shape suffixes: B batch, T frames, S slots (tokens of one frame), D width, H query heads, K key/value heads,
G = H / K query heads per key/value head, E head width, C context (frames held by the cache).

A layer is a *space* layer (tokens of one frame see each other) or a *time* layer (each slot sees its own
past); every ``time_every``-th layer is a time layer. Time attention is a causal sliding window of ``context``
frames, so a ring buffer of ``context`` frames reproduces it exactly (see `KVCache`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NEG_INF = float("-inf")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of one transformer.

    Attributes:
        dim: model width D.
        depth: number of layers; a multiple of `time_every`.
        heads: query heads H.
        kv_heads: key/value heads K (grouped-query attention; equal to `heads` switches it off).
        mlp_ratio: SwiGLU hidden width divided by `dim`.
        time_every: every n-th layer attends over time instead of space.
        context: frames that a time layer sees, the current one included (C).
        soft_cap: attention logits are soft-capped to +-soft_cap by tanh; 0 switches it off.
        rope_theta: base of the rotary frequencies.
        recompute: keep only the input of each layer for the backward pass and run the layer again there: a
            third more operations for a small part of the memory. Results are the same.
    """

    dim: int = 512
    depth: int = 8
    heads: int = 8
    kv_heads: int = 2
    mlp_ratio: float = 4.0
    time_every: int = 4
    context: int = 32
    soft_cap: float = 50.0
    rope_theta: float = 1e4
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.depth % self.time_every:
            raise ValueError(f"depth {self.depth} must be a multiple of time_every {self.time_every}")
        if self.heads % self.kv_heads or self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"dim {self.dim}, heads {self.heads}, kv_heads {self.kv_heads} do not divide evenly"
            )

    @property
    def head_dim(self) -> int:
        """Width E of one attention head."""
        return self.dim // self.heads


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale.

    Written out, because passes over memory are what it costs: forward is a norm reduction with a float32
    sum and two scalings, and `_Normalise` has the backward pass. On a CPU the library takes three to four
    times as long.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D)."""
        if torch.is_grad_enabled():
            return _Normalise.apply(x, self.scale)  # type: ignore[no-any-return, no-untyped-call]
        if x.is_cuda:
            return x * (_factor(x) * self.scale).to(x.dtype)
        return x * _factor(x).to(x.dtype) * self.scale.to(x.dtype)


def _factor(x: Tensor) -> Tensor:
    """1 / root mean square (..., 1) of (..., D), in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x.shape[-1] ** 0.5 / norm.clamp_min(1e-6)


class _Normalise(torch.autograd.Function):
    """y = u s with u = x / rms(x), and dx = (dy s - u <dy s, u> / D) / rms(x) in as few passes over memory as
    there can be: this was a third of a training step when autograd put it together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        factor, scale = _factor(x).to(x.dtype), scale.to(x.dtype)
        unit = x * factor
        ctx.save_for_backward(unit, factor, scale)
        return unit * scale

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        unit, factor, scale = ctx.saved_tensors
        product = (dy * unit).reshape(-1, unit.shape[-1])  # (rows, D)
        along = torch.mv(product, scale).view_as(factor) / unit.shape[-1]
        dx = (dy * scale).addcmul_(unit, along, value=-1).mul_(factor)
        return dx, product.sum(0, dtype=torch.float32)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (P, E/2) float32 of the rotary angles of frames ``positions`` (P,).

    Angles are formed in float64, so that a session that has run for weeks (10^7 frames) still rotates
    exactly.
    """
    num = head_dim // 2
    freqs = theta ** (-torch.arange(num, device=positions.device, dtype=torch.float64) / num)
    angles = positions.double()[:, None] * freqs
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (..., P, E) by a rotary table whose rows belong to axis -2."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class KVCache:
    """Keys and values of the last C frames for every time layer, in preallocated ring buffers.

    The slot at ``position % C`` belongs to the frame being worked on: it is overwritten by every pass over
    that frame (denoising passes, then the commit pass) and becomes history when `advance` moves on. Nothing
    is allocated per step and the cost does not depend on how long the session has been running.
    """

    def __init__(
        self, cfg: TransformerConfig, batch: int, slots: int, device: torch.device | str, dtype: torch.dtype
    ):
        layers = cfg.depth // cfg.time_every
        shape = (layers, batch, slots, cfg.kv_heads, cfg.context, cfg.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.context = cfg.context
        self._ages = torch.arange(cfg.context, device=device)

    def reset(self) -> None:
        """Forget everything; keeps the memory."""
        self.position.zero_()

    def advance(self) -> None:
        """Make the current frame history."""
        self.position += 1

    def take(self, source: KVCache, rows: Tensor) -> None:
        """Become copies of the streams `rows` (B,) of another cache, in place: one state, many futures."""
        torch.index_select(source.keys, 1, rows, out=self.keys)
        torch.index_select(source.values, 1, rows, out=self.values)
        self.position.copy_(source.position)

    def write(self, layer: int, slots: slice, key: Tensor, value: Tensor) -> None:
        """Store (B, S, K, 1, E) keys and values of the current frame."""
        slot = (self.position % self.context).reshape(1)
        self.keys[layer][:, slots].index_copy_(3, slot, key.to(self.keys.dtype))
        self.values[layer][:, slots].index_copy_(3, slot, value.to(self.values.dtype))

    def bias(self) -> Tensor:
        """(1, C) additive mask: 0 for slots that hold a frame of the current window, -inf for empty ones."""
        filled = self._ages <= self.position  # before the first wrap only slots 0..position are filled
        return torch.where(filled, 0.0, NEG_INF)[None]


class Attention(nn.Module):
    """Grouped-query attention with QK-norm and logit soft-capping.

    Matrix products are written out instead of calling a fused kernel: soft-capping does not fit the fused
    ones, and at the short lengths of factorised attention (tens of tokens) the plain product is faster on
    CPU.
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.head_dim
        self.qkv = nn.Linear(cfg.dim, (cfg.heads + 2 * cfg.kv_heads) * width, bias=False)
        self.out = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)

    def project(self, x_BTSD: Tensor, over_time: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (.., H, P, E), keys and values (.., K, P, E); P is the attended axis: S, or T over time."""
        cfg = self.cfg
        qkv = self.qkv(x_BTSD).unflatten(-1, (-1, cfg.head_dim))  # (B, T, S, H+2K, E)
        q, k, v = qkv.split([cfg.heads, cfg.kv_heads, cfg.kv_heads], dim=3)
        order = (0, 2, 3, 1, 4) if over_time else (0, 1, 3, 2, 4)
        return self.norm_q(q).permute(order), self.norm_k(k).permute(order), v.permute(order)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax attention of q (X, Y, H, P, E) over k, v (X, Y, K, N, E), additive bias (.., P, N)."""
        cfg = self.cfg
        q = q.unflatten(2, (cfg.kv_heads, -1)).flatten(3, 4)  # (X, Y, K, G*P, E)
        logits = (q * cfg.head_dim**-0.5) @ k.transpose(-1, -2)
        if cfg.soft_cap:
            logits = cfg.soft_cap * torch.tanh(logits / cfg.soft_cap)
        logits = logits.unflatten(3, (cfg.heads // cfg.kv_heads, -1))  # (X, Y, K, G, P, N)
        if bias is not None:
            logits = logits + bias
        weights = logits.float().softmax(-1).to(v.dtype).flatten(3, 4)
        return (weights @ v).unflatten(3, (cfg.heads // cfg.kv_heads, -1)).flatten(2, 3)  # (X, Y, H, P, E)

    def forward_space(self, x_BTSD: Tensor, bias_SS: Tensor | None) -> Tensor:
        """Attention among the slots of each frame."""
        q, k, v = self.project(x_BTSD, over_time=False)  # (B, T, H, S, E)
        y = self.attend(q, k, v, bias_SS)
        return self.out(y.transpose(2, 3).flatten(3))

    def forward_time(
        self, x_BTSD: Tensor, bias: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of each slot over its own past; returns output, rotated keys and values."""
        q, k, v = self.project(x_BTSD, over_time=True)  # (B, S, H, T, E)
        q, k = rotate(q, table), rotate(k, table)
        y = self.attend(q, k, v, bias)
        return self.out(y.permute(0, 3, 1, 2, 4).flatten(3)), k, v

    def forward_step(self, x_B1SD: Tensor, layer: int, slots: slice, cache: KVCache, frame: Frame) -> Tensor:
        """`forward_time` for one new frame against the cache."""
        q, k, v = self.project(x_B1SD, over_time=True)  # (B, S, H, 1, E)
        q, k = rotate(q, frame.table), rotate(k, frame.table)
        cache.write(layer, slots, k, v)
        y = self.attend(
            q, cache.keys[layer][:, slots].to(q.dtype), cache.values[layer][:, slots].to(q.dtype), frame.bias
        )
        return self.out(y.permute(0, 3, 1, 2, 4).flatten(3))


@dataclass(frozen=True)
class Frame:
    """What every time layer needs to know about the frame being worked on: cache mask and rotary table."""

    bias: Tensor
    table: tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Pre-norm residual layer: attention over space or time, then SwiGLU."""

    def __init__(self, cfg: TransformerConfig, over_time: bool) -> None:
        super().__init__()
        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.over_time = over_time
        self.norm_attention, self.norm_mlp = RMSNorm(cfg.dim), RMSNorm(cfg.dim)
        self.attention = Attention(cfg)
        self.up = nn.Linear(cfg.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, cfg.dim, bias=False)

    def forward(
        self,
        x_BTSD: Tensor,
        space_bias: Tensor | None,
        bias: Tensor,
        table: tuple[Tensor, Tensor],
        time_slots: int | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Whole clips; also keys and values (B, S, K, T, E) if this is a time layer."""
        normed = self.norm_attention(x_BTSD)
        if not self.over_time:
            return self.mlp(x_BTSD + self.attention.forward_space(normed, space_bias)), None
        y, key, value = self.attention.forward_time(normed[:, :, :time_slots], bias, table)
        return self.mlp(add(x_BTSD, y)), (key, value)

    def mlp(self, x: Tensor) -> Tensor:
        """Residual SwiGLU."""
        gate, value = self.up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Residual sum (B, T, S, D); y may cover only the leading slots of x."""
    return x + F.pad(y, (0, 0, 0, x.shape[2] - y.shape[2])) if y.shape[2] < x.shape[2] else x + y


class Transformer(nn.Module):
    """The stack of layers. Callers own embeddings, masks and heads.

    Only the first ``time_slots`` slots take part in time attention (0: all of them); the others pass through.
    """

    def __init__(self, cfg: TransformerConfig, time_slots: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.time_slots = time_slots or None
        self.layers = nn.ModuleList(Layer(cfg, (i + 1) % cfg.time_every == 0) for i in range(cfg.depth))
        self.norm = RMSNorm(cfg.dim)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # residual branches start small, so that depth does not change the initial scale
                is_branch_end = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 if is_branch_end else cfg.dim**-0.5)

    def forward(
        self,
        x_BTSD: Tensor,
        space_bias: Tensor | None = None,
        image_rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run whole clips.

        Args:
            x_BTSD: token embeddings of T frames that start at time 0 of the window.
            space_bias: (S, S) additive mask of the space layers.
            image_rows: (B,) bool; True rows are treated as T separate images (diagonal time mask).
            cache: filled with the last C frames, positioned after frame T-1 (prefill), if given.

        Returns:
            (B, T, S, D) normalised outputs.
        """
        length = x_BTSD.shape[1]
        frames = torch.arange(length, device=x_BTSD.device)
        bias = time_bias(length, self.cfg.context, image_rows, x_BTSD.device)
        table = rotary_tables(frames, self.cfg.head_dim, self.cfg.rope_theta)
        x, time_layer = x_BTSD, 0
        again = self.cfg.recompute and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (x, space_bias, bias, table, self.time_slots)
            if again:
                x, past = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, past = layer(*inputs)
            if past is not None:
                if cache is not None:
                    _prefill(cache, time_layer, *past)
                time_layer += 1
        if cache is not None:
            cache.position.fill_(length)
        return self.norm(x)

    def begin(self, cache: KVCache) -> Frame:
        """Mask and rotary table of the cache's current frame; one call serves all passes over that frame."""
        table = rotary_tables(cache.position.reshape(1), self.cfg.head_dim, self.cfg.rope_theta)
        return Frame(cache.bias(), table)

    def step(
        self,
        x_B1SD: Tensor,
        cache: KVCache,
        frame: Frame,
        space_bias: Tensor | None = None,
        slots: slice = slice(None),
    ) -> Tensor:
        """Run one new frame against the cache; ``slots`` are the cache slots of the S tokens given.

        The caller advances the cache after the pass that commits the frame.
        """
        x, time_layer = x_B1SD, 0
        for layer in self.layers:
            normed = layer.norm_attention(x)
            if layer.over_time:
                y = layer.attention.forward_step(
                    normed[:, :, : self.time_slots], time_layer, slots, cache, frame
                )
                time_layer += 1
            else:
                y = layer.attention.forward_space(normed, space_bias)
            x = layer.mlp(add(x, y))
        return self.norm(x)


def time_bias(length: int, context: int, image_rows: Tensor | None, device: torch.device) -> Tensor:
    """Causal sliding-window mask, (T, T), or (B, 1, 1, 1, T, T) when some rows are separate images."""
    t = torch.arange(length, device=device)
    age = t[:, None] - t[None, :]
    window = (age >= 0) & (age < context)
    if image_rows is not None:
        window = torch.where(image_rows[:, None, None], age == 0, window)[:, None, None, None]
    return torch.where(window, 0.0, NEG_INF)


def _prefill(cache: KVCache, layer: int, key: Tensor, value: Tensor) -> None:
    """Copy the last C frames of (B, S, K, T, E) into their ring slots."""
    length = key.shape[3]
    first = max(0, length - cache.context)
    slots = torch.arange(first, length, device=key.device) % cache.context
    size = key.shape[1]
    cache.keys[layer][:, :size].index_copy_(3, slots, key[:, :, :, first:].to(cache.keys.dtype))
    cache.values[layer][:, :size].index_copy_(3, slots, value[:, :, :, first:].to(cache.values.dtype))
