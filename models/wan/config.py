"""The configuration of a Wan 2.1 diffusion transformer: sizes, attention, numerical policy, and the presets."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from monarch_jax.checks import flag, one_of, positive, small, triple
from monarchrt.models.attention.base import Attention
from monarchrt.models.attention.blocks import block_sizes
from monarchrt.models.attention.registry import PER_LAYER, exact, kind_named
from monarchrt.models.presets import from_preset

MODEL_TYPES = ("t2v", "i2v")
REMAT = ("none", "full", "attention", "dots", "cheap")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# limits of sizes: far above practical values, below those that fail only after minutes; channels may be whole patches
_LARGEST = {
    "num_layers": 1000,
    **dict.fromkeys(("dim", "num_heads", "freq_dim", "text_dim", "text_len", "image_dim"), 2**17),
    "ffn_dim": 2**20,
    **dict.fromkeys(("in_channels", "out_channels"), 2**28),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes and policy of a Wan 2.1 DiT (Wan technical report, Section 4; the released `config.json` files).

    Examples:
        >>> wan_config("wan2.1-t2v-1.3b").head_dim
        128
        >>> from monarchrt.models.attention.notation import parse
        >>> print(wan_config("tiny", attention=parse("first_layers(1, dense, monarch)")).layer_attention[3])
        monarch

    Attributes:
        dim: Channels D of the residual stream.
        ffn_dim: Hidden channels of the feed-forward layers.
        num_heads: Attention heads n; D / n must be even.
        num_layers: Number of blocks.
        freq_dim: Width of the sinusoidal timestep embedding, even.
        text_dim: Width of the text encoder's output.
        text_len: Rows to which the text is zero-padded; the padding is attended to.
        patch_size: (frames, rows, columns) of latents per token.
        in_channels: Channels of the latents given to the model (36 for i2v: noisy, mask, conditioning).
        out_channels: Channels of the prediction.
        eps: Epsilon of every LayerNorm and RMSNorm.
        model_type: "t2v", or "i2v" (an image embedding and image keys and values in the cross-attention).
        image_dim: Width of the image encoder's output, for i2v.
        attention: Self-attention of the layers, a kind of `monarchrt.models.attention`: one setting for all, or one per
            layer.
        causal_block: Frames per block of a block-causal model; None is bidirectional.
        independent_first_frame: Whether the first frame of a block-causal model's clips is a block of its own.
        param_dtype: Dtype of newly created parameters.
        dtype: Dtype of the residual stream and the large matrix products. Timestep embedding, modulation, norms and
            head always compute in float32 or wider.
        remat: What the backward pass recomputes in each block: "none"; "full", everything, and large clips by groups
            of frames; "attention", everything but the outputs of attention kernels (Monarch and block-sparse; cuDNN's
            is recomputed); "dots", everything but products with weights; "cheap", norms, activations and rotary
            embedding, but not products with weights or the attention of kernels and cuDNN.
        unroll_layers: Whether to unroll the layers for whole clips rather than scan over them. A scan first zeroes its
            residuals and copies most of them; the unrolled program takes several times as long to compile. Generation
            with a cache has a separate `unroll_layers`.

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
    attention: Attention | tuple[Attention, ...] = dataclasses.field(default_factory=exact)
    causal_block: int | None = None
    independent_first_frame: bool = False
    param_dtype: str = "float32"
    dtype: str = "float32"
    remat: str = "none"
    unroll_layers: bool = False

    def __post_init__(self):
        for name, most in _LARGEST.items():
            positive(name, getattr(self, name), most=most)
        if self.causal_block is not None:
            positive("causal_block", self.causal_block)
        flag("independent_first_frame", self.independent_first_frame)
        flag("unroll_layers", self.unroll_layers)
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
        self._check_attention()

    def _check_attention(self) -> None:
        """Raises ValueError unless each layer has a setting that is valid for the causal blocks."""
        settings = tuple(self.attention) if isinstance(self.attention, Sequence) else (self.attention,)
        for setting in settings:
            if not isinstance(setting, Attention):
                raise ValueError(f"attention={setting!r} is not a kind of attention; see monarchrt.models.attention.")
        per_layer = kind_named(PER_LAYER)
        if isinstance(self.attention, Sequence):
            per_layer(settings=settings).check_layers(self.num_layers)  # type: ignore[call-arg]
            object.__setattr__(self, "attention", settings)
        else:
            self.attention.check_layers(self.num_layers)
            if isinstance(self.attention, per_layer):  # equal settings get one form
                object.__setattr__(self, "attention", self.attention.parts())
        for setting in set(self.layer_attention):
            setting.check(None, causal_block=self.causal_block)

    @property
    def head_dim(self) -> int:
        """Channels per attention head, d."""
        return self.dim // self.num_heads

    @property
    def patch_features(self) -> int:
        """Numbers in one patch of the output, pt*ph*pw*C."""
        return math.prod(self.patch_size) * self.out_channels

    @property
    def layer_attention(self) -> tuple[Attention, ...]:
        """The attention setting of each layer."""
        if isinstance(self.attention, tuple):
            return tuple(setting.for_layer(layer) for layer, setting in enumerate(self.attention))
        return tuple(self.attention.for_layer(layer) for layer in range(self.num_layers))

    @property
    def precise_dtype(self) -> jnp.dtype:
        """Dtype of values that must not be rounded to half precision: float32, or float64 in a float64 model."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def block_sizes(self, frames: int) -> list[int]:
        """Frames of tokens in each block of a clip; a single block if the model is not causal.

        Examples:
            >>> wan_config("tiny", causal_block=3, independent_first_frame=True).block_sizes(7)
            [1, 3, 3]

        Raises:
            ValueError: If the frames are not whole blocks.
        """
        if self.causal_block is None:
            return [frames]
        return block_sizes(frames, self.causal_block, independent_first_frame=self.independent_first_frame)

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


def wan_config(name: str, /, **overrides: Any) -> WanConfig:
    """A preset by name, with fields replaced.

    Examples:
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
