"""What a Wan 2.1 diffusion transformer is: sizes, attention of each layer, numerical policy, and the presets."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from monarch_jax.checks import one_of, positive, small, triple
from monarch_jax.spec import MonarchSpec
from monarchrt.models.presets import from_preset

MODEL_TYPES = ("t2v", "i2v")
REMAT = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DENSE_IMPLEMENTATIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseAttention:
    """Softmax attention over all tokens.

    Attributes:
        implementation: "xla", "cudnn" (half precision on an NVIDIA GPU only), or None: cuDNN where it can run.
    """

    implementation: str | None = None

    def __post_init__(self):
        if self.implementation is not None:
            one_of("implementation", self.implementation, DENSE_IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchAttention:
    """Tiled Monarch attention (MonarchRT paper, Section 4); has no parameters of its own.

    Attributes:
        tile: (n_f, n_h, n_w) in tokens, or None: one tile per frame, (1, h, w).
        blocks: Which dimensions form the rows and columns of a tile, as `monarch_jax.MonarchSpec.blocks`.
        num_iters: Refinement steps T.
        implementation: Backend of `monarch_jax.monarch_attention`; None picks.
        keep_intermediates: As in `monarch_jax.monarch_attention`; with `remat="full"` one block's are kept at a time.
    """

    tile: tuple[int, int, int] | None = None
    blocks: str = "fh,w"
    num_iters: int = 1
    implementation: str | None = None
    keep_intermediates: bool = False

    def __post_init__(self):
        if self.tile is not None:
            object.__setattr__(self, "tile", triple("tile", self.tile, "(n_f, n_h, n_w)"))
        # On a grid that the tile divides, so that what is wrong on any grid is found here.
        MonarchSpec(grid=self.tile or (1, 1, 1), tile=self.tile, blocks=self.blocks, num_iters=self.num_iters)

    def spec(self, grid: tuple[int, int, int], *, causal_block: int | None = None) -> MonarchSpec:
        """The attention on `grid` (frames, rows, columns of tokens); raises ValueError if the tile does not fit."""
        return MonarchSpec(
            grid=grid, tile=self.tile, blocks=self.blocks, num_iters=self.num_iters, causal_block=causal_block
        )


type Attention = DenseAttention | MonarchAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes and policy of a Wan 2.1 DiT (Wan technical report, Section 4; the released `config.json` files).

    Example:
        >>> wan_config("wan2.1-t2v-1.3b").head_dim
        128
        >>> wan_config("tiny", attention=MonarchAttention(tile=(3, 4, 4))).layer_attention[0].tile
        (3, 4, 4)

    Attributes:
        dim: Width D of the residual stream.
        ffn_dim: Hidden width of the feed-forward layers.
        num_heads: Attention heads n; D / n must be even.
        num_layers: Blocks.
        freq_dim: Width of the sinusoidal timestep embedding, even.
        text_dim: Width of the text encoder's output.
        text_len: Rows that the text is zero-padded to; the padding is attended to.
        patch_size: (frames, rows, columns) of latents per token.
        in_channels: Channels of the latents given to the model (36 for i2v: noisy, mask, conditioning).
        out_channels: Channels of the prediction.
        eps: Of every LayerNorm and RMSNorm.
        model_type: "t2v", or "i2v" (an image embedding and image keys and values in the cross-attention).
        image_dim: Width of the image encoder's output, for i2v.
        attention: Self-attention of the layers: one setting for all, or one per layer.
        causal_block: Frames per block of a block-causal model; None is bidirectional.
        param_dtype: Dtype that parameters are created in.
        dtype: Dtype of the residual stream and the large matrix products. Timestep embedding, modulation, norms and
            head compute in float32 at least, whatever it is.
        remat: What the backward pass recomputes in each block: "none"; "full", everything, and large clips by groups
            of frames; "dots", everything but the products with weights.

    Raises:
        ValueError: If a size or a name is invalid.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    eps: float = 1e-6
    model_type: str = "t2v"
    image_dim: int = 1280
    attention: DenseAttention | MonarchAttention | tuple[DenseAttention | MonarchAttention, ...] = DenseAttention()
    causal_block: int | None = None
    param_dtype: str = "float32"
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        for name in (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "freq_dim",
            "text_dim",
            "text_len",
            "in_channels",
            "out_channels",
            "image_dim",
        ):
            positive(name, getattr(self, name))
        if self.causal_block is not None:
            positive("causal_block", self.causal_block)
        object.__setattr__(self, "patch_size", triple("patch_size", self.patch_size, "(frames, rows, columns)"))
        small("eps", self.eps)
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}.")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"dim={self.dim} over num_heads={self.num_heads} gives heads of {self.head_dim} channels; "
                f"the 3-D rotary embedding needs an even number of at least 6."
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} is not even.")
        one_of("model_type", self.model_type, MODEL_TYPES)
        one_of("remat", self.remat, REMAT)
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name)).name
            one_of(name, dtype, DTYPES)
            object.__setattr__(self, name, dtype)
        if isinstance(self.attention, Sequence):
            object.__setattr__(self, "attention", tuple(self.attention))
            if len(self.attention) != self.num_layers:
                raise ValueError(
                    f"attention has {len(self.attention)} settings for num_layers={self.num_layers}; "
                    f"give one setting, or one per layer."
                )
        for setting in set(self.layer_attention):
            if not isinstance(setting, DenseAttention | MonarchAttention):
                raise ValueError(f"attention={setting!r} is neither a DenseAttention nor a MonarchAttention.")
            if self.causal_block is not None and isinstance(setting, MonarchAttention):
                n_f = setting.tile[0] if setting.tile else 1
                if self.causal_block % n_f:
                    raise ValueError(
                        f"causal_block={self.causal_block} frames is not a multiple of the {n_f} frames of "
                        f"tile={setting.tile}; a tile must lie in one block."
                    )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, d."""
        return self.dim // self.num_heads

    @property
    def patch_features(self) -> int:
        """Numbers in one patch of the output, pt*ph*pw*C."""
        return math.prod(self.patch_size) * self.out_channels

    @property
    def layer_attention(self) -> tuple[DenseAttention | MonarchAttention, ...]:
        """The attention setting of each layer."""
        if isinstance(self.attention, tuple):
            return self.attention
        return (self.attention,) * self.num_layers

    @property
    def precise_dtype(self) -> jnp.dtype:
        """Dtype of what must not be rounded to half precision: float32, or float64 in a float64 model."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens (F, h, w) of latents of the given size.

        Raises:
            ValueError: If the patch does not divide a size.
        """
        for name, size, patch in zip(
            ("frames", "height", "width"), (frames, height, width), self.patch_size, strict=True
        ):
            if size % patch or size < 1:
                below, above = size // patch * patch, (size // patch + 1) * patch
                nearest = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"latents: {name}={size} is not a multiple of the patch's {patch} (patch_size={self.patch_size}); "
                    f"the nearest that are: {nearest}."
                )
        pt, ph, pw = self.patch_size
        return frames // pt, height // ph, width // pw


PRESETS: dict[str, WanConfig] = {
    "tiny": WanConfig(dim=96, ffn_dim=256, num_heads=4, num_layers=4, freq_dim=64, text_dim=32, text_len=8),
    "wan2.1-t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan2.1-i2v-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_channels=36, model_type="i2v"),
}


def wan_config(name: str, /, **overrides) -> WanConfig:
    """A preset by name, with fields replaced.

    Example:
        >>> wan_config("wan2.1-t2v-1.3b", dtype="bfloat16", remat="full").num_layers
        30

    Args:
        name: One of `PRESETS`.
        **overrides: Fields of `WanConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: If the preset or a field is unknown, or a value is invalid.
    """
    return from_preset(PRESETS, name, overrides)
