"""Interactive dynamics model (paper sections 3.2-3.4).

One frame's block is ``[spatial tokens | (tau, d) token | action tokens | registers | agent tokens]``. Block t
carries the action a_{t-1} that led into frame t, so that policy outputs of block t cannot see the action they
predict. Agent tokens read everything in their block and their own past; nothing reads them, so the predicted
world depends on actions and never on the task.

Shape suffixes: B batch, T frames, N spatial tokens, L token channels, S slots, G agent tokens, D width, A
action size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d4_core.actions import ActionEncoder, ActionPart, ActionSpace
from d4_core.shortcut import Grid
from d4_core.transformer import NEG_INF, Frame, KVCache, Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    """Shape of the dynamics model.

    Attributes:
        num_tokens, token_dim: packed tokenizer tokens of one frame (N, L).
        actions: parts of the action vector.
        action_bins: bins per continuous action dimension of the policy.
        action_tokens: S_a.
        registers: learned tokens without input; they improve temporal consistency.
        agent_tokens: tokens that carry the task and whose outputs the heads read (G).
        grid: signal levels.
        shortcut: step sizes beyond the finest are trained (bootstrap loss), and sampling in few steps names
            them; without it every step is called the finest, because an untrained size costs quality.
        heads_read_world: the heads read a frame's spatial tokens, too, not its agent tokens alone (paper).
        predict_velocity: the flow head predicts the velocity, clean - noise, instead of clean tokens (paper).
        transformer: shape of the stack; its `context` is the paper's C.
    """

    num_tokens: int
    token_dim: int
    actions: tuple[ActionPart, ...]
    action_bins: int = 15
    action_tokens: int = 1
    registers: int = 4
    agent_tokens: int = 4
    grid: Grid = Grid()
    shortcut: bool = True
    heads_read_world: bool = False
    predict_velocity: bool = False
    transformer: TransformerConfig = TransformerConfig()

    @property
    def world_slots(self) -> int:
        """Slots of one block without the agent tokens."""
        return self.num_tokens + 1 + self.action_tokens + self.registers


@dataclass
class Block:
    """Predicted clean tokens (B, T, N, L), and what the heads read, (B, T, G, D) or (.., G + N, D)."""

    clean: Tensor
    agent: Tensor | None


class Dynamics(nn.Module):
    """The world model: embeddings, transformer and flow head."""

    bias: Tensor

    def __init__(self, cfg: DynamicsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        dim, grid = cfg.transformer.dim, cfg.grid
        self.space = ActionSpace(cfg.actions, cfg.action_bins)
        self.encode_action = ActionEncoder(self.space, dim, cfg.action_tokens)
        self.embed = nn.Linear(cfg.token_dim, dim)
        self.slots = nn.Parameter(0.5 * torch.randn(cfg.world_slots, dim))
        self.embed_signal = nn.Embedding(grid.levels, dim // 2)
        self.embed_step = nn.Embedding(grid.finest + 1, dim // 2)
        self.transformer = Transformer(cfg.transformer)
        self.flow = nn.Linear(dim, cfg.token_dim)
        nn.init.zeros_(self.flow.weight)  # the untrained model predicts the mean of the standardised tokens
        self.register_buffer("bias", self._mask(), persistent=False)

    def _mask(self) -> Tensor:
        """(S, S) additive mask: agent slots come last, read everything and are read by agent slots only."""
        world, total = self.cfg.world_slots, self.cfg.world_slots + self.cfg.agent_tokens
        allowed = torch.ones(total, total, dtype=torch.bool)
        allowed[:world, world:] = False
        return torch.where(allowed, 0.0, NEG_INF)

    def embed_block(
        self,
        noisy_BTNL: Tensor,
        tau_index: Tensor,
        e: Tensor,
        prev_action: Tensor,
        labelled: Tensor,
        agent_BTGD: Tensor | None,
    ) -> Tensor:
        """Token embeddings (B, T, S, D) of noisy frames; see `forward` for the arguments."""
        spatial = self.embed(noisy_BTNL)
        level = torch.cat([self.embed_signal(tau_index), self.embed_step(e)], -1)[:, :, None]
        action = self.encode_action(prev_action, labelled)
        registers = torch.zeros(*level.shape[:2], self.cfg.registers, level.shape[-1], device=level.device)
        parts = [spatial, level.to(spatial.dtype), action.to(spatial.dtype), registers.to(spatial.dtype)]
        block = torch.cat(parts, dim=2) + self.slots
        return block if agent_BTGD is None else torch.cat([block, agent_BTGD.to(block.dtype)], dim=2)

    def _read(self, x_BTSD: Tensor, noisy_BTNL: Tensor, tau_index: Tensor) -> Block:
        agent = x_BTSD[:, :, self.cfg.world_slots :]
        if self.cfg.heads_read_world and agent.shape[2]:
            # detached: what the world is like is learned by predicting it, not from the heads
            agent = torch.cat([agent, x_BTSD[:, :, : self.cfg.num_tokens].detach()], 2)
        # the flow head works in float32: bfloat16 rounding shows in rollouts
        with torch.autocast(x_BTSD.device.type, enabled=False):
            clean = self.flow(x_BTSD[:, :, : self.cfg.num_tokens].float())
            if self.cfg.predict_velocity:
                clean = noisy_BTNL + (1 - self.cfg.grid.tau(tau_index))[..., None, None] * clean
        return Block(clean, agent if agent.shape[2] else None)

    def _space_bias(self, slots: int) -> Tensor | None:
        return self.bias if slots > self.cfg.world_slots else None

    def forward(
        self,
        noisy_BTNL: Tensor,
        tau_index: Tensor,
        e: Tensor,
        prev_action: Tensor,
        labelled: Tensor,
        agent_BTGD: Tensor | None = None,
        image_rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Block:
        """Predict the clean tokens of every frame of a clip.

        Args:
            noisy_BTNL: tokens corrupted to `tau_index`.
            tau_index, e: (B, T) int64 signal index and step-size exponent.
            prev_action: (B, T, A) action that led into each frame, in contract units.
            labelled: (B, T) bool; False where that action is unknown, and at the first frame of an episode.
            agent_BTGD: agent-token inputs, or None to run the world alone.
            image_rows: (B,) bool rows treated as separate images.
            cache: filled for continuing the clip with `step`.
        """
        x = self.embed_block(noisy_BTNL, tau_index, e, prev_action, labelled, agent_BTGD)
        bias = self._space_bias(x.shape[2])
        y = self.transformer(x, bias, image_rows=image_rows, cache=cache)
        return self._read(y, noisy_BTNL, tau_index)

    def new_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> KVCache:
        """Cache for `step` with room for the agent tokens."""
        slots = self.cfg.world_slots + self.cfg.agent_tokens
        return KVCache(self.cfg.transformer, batch, slots, self.slots.device, dtype)

    def begin(self, cache: KVCache) -> Frame:
        """Start work on the cache's current frame."""
        return self.transformer.begin(cache)

    def step(
        self,
        noisy_BNL: Tensor,
        tau_index: Tensor,
        e: Tensor,
        prev_action: Tensor,
        labelled: Tensor,
        cache: KVCache,
        frame: Frame,
        agent_BGD: Tensor | None = None,
    ) -> Block:
        """`forward` for one new frame (all arguments without the T axis) against the cache.

        The frame becomes history when the caller advances the cache after the committing pass.
        """
        agent = None if agent_BGD is None else agent_BGD[:, None]
        x = self.embed_block(
            noisy_BNL[:, None], tau_index[:, None], e[:, None], prev_action[:, None], labelled[:, None], agent
        )
        y = self.transformer.step(x, cache, frame, self._space_bias(x.shape[2]), slots=slice(0, x.shape[2]))
        return self._read(y, noisy_BNL[:, None], tau_index[:, None])
