"""The world model: latents of a chunk in, their velocity out, steered by actions and cameras."""

from dataclasses import dataclass, field
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decmem.errors import UserError
from decmem.memory import (
    Bank,
    MemoryConfig,
    MemoryName,
    Plan,
    PositionConfig,
    Recall,
    TokenLayout,
)
from decmem.memory.bank import bytes_per_latent
from decmem.memory.coding import heads_first
from decmem.memory.position import Position, make_position
from decmem.model.block import Block
from decmem.model.conditioning import (
    RAY_FEATURES,
    ActionFusion,
    Conditions,
    TimeEmbedding,
    camera_centres,
    patch_rays,
    relative_to,
)
from decmem.model.linear import JointScales, Linear, Projection, ScaledNorm
from decmem.ops.fp8 import FP8, check_fp8
from decmem.ops.norm import add_norm, scaled_norm


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; everything about it that weights depend on.

    Args:
        size: frame height and width in pixels. codec_stride, latent_channels: of the codec.
        patch: latent cells per token and direction. blocks: rows and columns of blocks.
        width, layers, ffn_multiple, time_width: of the network; heads = width / head dimension.
        memory: which memory, with `reading` and `position` as its settings.
        chunk: latents generated together. chunk_sizes: sizes trained with, mixed.
        actions: columns of an action.
        rays, patch_position: input features that tell a token its ray, its place in the frame.
        qk_norm: normalise queries and keys per head.
    """

    size: tuple[int, int] = (128, 192)
    codec_stride: int = 8
    latent_channels: int = 32
    patch: int = 2
    blocks: tuple[int, int] = (2, 3)
    width: int = 384
    layers: int = 8
    ffn_multiple: int = 4
    time_width: int = 128
    memory: MemoryName = "decoupled"
    reading: MemoryConfig = field(default_factory=MemoryConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    chunk: int = 4
    chunk_sizes: tuple[int, ...] = (4,)
    actions: int = 6
    rays: bool = True
    patch_position: bool = True
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.width % self.position.head_dim:
            raise UserError(
                "width",
                f"{self.width} is not a multiple of the head dimension {self.position.head_dim}",
                "Choose width = heads * (camera + space + time channels)",
            )
        step = self.codec_stride * self.patch
        if self.size[0] % step or self.size[1] % step:
            raise UserError(
                "size", f"{self.size} is not a multiple of {step} pixels", "Choose one that is"
            )

    @property
    def heads(self) -> int:
        return self.width // self.position.head_dim

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size[0] // self.codec_stride, self.size[1] // self.codec_stride

    @property
    def layout(self) -> TokenLayout:
        h, w = self.latent_size
        return TokenLayout((h // self.patch, w // self.patch), self.blocks)


@dataclass(frozen=True)
class Context:
    """What stays the same over the denoising steps of a chunk.

    Attributes:
        features: (B, T, tokens, width) added to the tokens. position: rotations of the latents.
        key_time: index of every pool latent.
    """

    features: Float[Tensor, "B T tokens width"]
    position: Position
    key_time: Tensor


class WorldModel(nn.Module):
    """Latent diffusion transformer with memory (section 3, appendix A.2).

    With `recompute` set, gradients are found block by block: what a block computed on its way is
    computed again, and only what passes between blocks is kept.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.layout = config.layout
        # Computed now: Dynamo cannot enter a cached property on Python 3.11.
        _ = self.layout.valid, self.layout.packing
        width = config.width
        self.patchify = Linear(config.latent_channels * config.patch**2, width)
        self.time = TimeEmbedding(config.time_width)
        self.action = ActionFusion(config.actions, width)
        self.rays = Linear(RAY_FEATURES, width, bias=False) if config.rays else None
        self.place = (
            nn.Parameter(torch.zeros(self.layout.tokens, width)) if config.patch_position else None
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.time_width,
                config.ffn_multiple,
                config.memory,
                config.reading,
                config.position,
                self.layout,
                config.qk_norm,
            )
            for _ in range(config.layers)
        )
        self.head_norm = ScaledNorm(width, config.time_width)
        self.head = Linear(width, config.latent_channels * config.patch**2)
        self._joint: JointScales | None = None

    def compile_blocks(self) -> None:
        """Compiles the blocks for training on a GPU, one graph for all of them."""
        # All blocks share one code object: every shape it meets counts against the limit.
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def hold_weights(self, dtype: torch.dtype, gemm_dtype: torch.dtype | None = None) -> None:
        """Keeps the weights that activations of `dtype` meet in `dtype`, for inference: rounded
        once instead of in every pass, with the same outcome. What meets fp32 stays fp32.

        What the norms' scales are computed from is joined besides, for one product a pass.

        With a `gemm_dtype` of fp8 the blocks' projections (attention, feed-forward) are products of
        8-bit numbers (`decmem.ops.fp8`): another outcome, and no way back.

        Raises:
            UserError: for another `gemm_dtype`, and where the GPU has no such products.
        """
        if gemm_dtype is not None:
            check_fp8(gemm_dtype, self.head.weight.device)
        norms: list[ScaledNorm] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in block.projections():
                if gemm_dtype is not None and isinstance(linear, Projection):
                    linear.hold_fp8()
                elif linear.weight.dtype != FP8:
                    linear.to(dtype)
            norms += block.norms()
        self.patchify.to(dtype)
        self.head.to(dtype)
        self._joint = JointScales([*norms, self.head_norm])

    def new_bank(
        self,
        anchor: Float[Tensor, "B 3"],
        dtype: torch.dtype = torch.float32,
        room: int = 64,
        limit: int | None = None,
    ) -> Bank:
        """An empty bank for as many worlds as there are anchors, on the model's device.

        Raises:
            UserError: as `Bank`.
        """
        return Bank(
            self.config.layers,
            self.config.heads,
            self.config.position,
            self.layout,
            len(anchor),
            anchor,
            dtype,
            self.head.weight.device,
            room,
            limit,
        )

    def bytes_per_latent(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that a latent of one world takes in a bank of this dtype."""
        config = self.config
        heads, head_dim = config.heads, config.position.head_dim
        return bytes_per_latent(config.layers, heads, head_dim, self.layout, dtype)

    def context(
        self,
        conditions: Conditions,
        bank: Bank | None = None,
        steered: Bool[Tensor, "B"] | None = None,
        streams: int = 1,
    ) -> Context:
        """Features and rotations of these latents.

        Cameras are taken relative to the bank's anchor, or to the middle of the clip in training.
        `steered` False drops a sample's actions (their embedding becomes zero), for guidance.
        `streams` repeats the latents: [clean | noisy ...] share cameras and actions.
        """
        if bank is None:
            middle = conditions.cameras[:, conditions.cameras.shape[1] // 2]
            anchor = camera_centres(middle)
            key_time = conditions.time.repeat(streams)
        else:
            anchor = bank.anchor
            key_time = torch.cat((bank.time.to(conditions.time.device), conditions.time))
        cameras = relative_to(conditions.cameras, anchor.to(conditions.cameras.device))
        device = conditions.actions.device
        coordinates = self.layout.coordinates_on(device)
        position = make_position(
            self.config.position,
            cameras.float().repeat(1, streams, 1, 1),
            conditions.lens.repeat(1, streams, 1),
            conditions.time.repeat(streams),
            coordinates,
            self.layout.grid,
        )
        action = self.action(conditions.actions)
        if steered is not None:
            action = torch.where(steered[:, None, None], action, 0.0)
        features = action[:, :, None]
        if self.rays is not None:
            tokens = self.layout.token_coordinates_on(device)
            rays = patch_rays(conditions.world_to_camera, conditions.lens, tokens, self.layout.grid)
            features = features + self.rays(rays)
        if self.place is not None:
            features = features + self.layout.arrange(self.place)
        return Context(features.repeat(1, streams, 1, 1), position, key_time)

    def forward(
        self,
        latents: Float[Tensor, "B T C h w"],
        t: Float[Tensor, "B T"],
        context: Context,
        plan: Plan,
        bank: Bank | None = None,
        recall: Recall | None = None,
        depths: list[Float[Tensor, "B T tokens 2"]] | None = None,
    ) -> Float[Tensor, "B predicted C h w"]:
        """Velocity of the latents from `plan.predicted` on, fp32.

        With a bank, every layer stages its keys and values behind the history; nothing is
        committed here. Where the plan predicts nothing, staging is all that is done.
        `depths` receives every layer's estimate (`SurfaceDepth`), to learn from.
        """
        p = self.config.patch
        dtype = latents.dtype
        recall = recall or Recall()
        patches = rearrange(latents, "b t c (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        x = self.layout.arrange(self.patchify(patches)) + context.features.to(dtype)
        time = self.time(t)
        scales = self._scales(time)
        in_slots = x[:, :, :1].expand(-1, -1, self.layout.S, -1)
        queries = heads_first(in_slots, self.config.position.head_dim)
        plan.prepare(self.layout.M, queries, self.layout.counts)
        # A write pass predicts nothing: of the last layer its keys and values are enough.
        writes = bank is not None and plan.predicted == latents.shape[1]
        more: Tensor | None = None  # what is still to be added to the tokens
        for i, block in enumerate(self.blocks[:-1] if writes else self.blocks):
            layer = None if bank is None else bank.layers[i]
            known = None if scales is None else scales[3 * i : 3 * i + 3]
            given = x, time, context.position, plan, context.key_time, layer, recall, known, more
            if self.recompute and bank is None and torch.is_grad_enabled():
                x, more, seen = checkpoint(
                    block, *given, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, more, seen = block(*given)
            if depths is not None and seen is not None:
                depths.append(seen)
        if bank is not None and writes:
            last = cast("Block", self.blocks[-1])
            position, key_time = context.position, context.key_time
            known = None if scales is None else scales[-4:-1]
            last.remember(x, time, position, plan, key_time, bank.layers[-1], recall, known, more)
            return latents.new_empty(latents[:, :0].shape, dtype=torch.float32)
        last_scale = self.head_norm.scale_at(time) if scales is None else scales[-1]
        x, last_scale = x[:, plan.predicted :], last_scale[:, plan.predicted :]
        if more is None:
            x = scaled_norm(x, last_scale)
        else:
            _, x = add_norm(x, more[:, plan.predicted :], last_scale)
        velocity = self.layout.restore(self.head(x))
        h = self.layout.grid[0]
        return rearrange(velocity, "b t (h w) (c p q) -> b t c (h p) (w q)", h=h, p=p, q=p).float()

    def _scales(self, time: Float[Tensor, "B T time"]) -> Float[Tensor, "norms B T width"] | None:
        """Scales of all norms where their parameters are joined; else each norm finds its own."""
        joint = self._joint
        return (
            None if joint is None or torch.is_grad_enabled() or not joint.serve else joint.at(time)
        )
