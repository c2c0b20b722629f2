"""Layers of the autoencoder: causal convolutions with explicit state, residual blocks, resampling.

Arrays are channels last, [B, T, H, W, C]. A layer that looks back in time takes its past, the last frames of its
earlier input, and returns the new one with its output; at the beginning of a clip the past is zeros. The result does
not depend on the pieces in which a clip is processed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from monarchrt.models.broadcasting import along_last
from monarchrt.models.vae.causal import (
    Implementation,
    by_kernel,
    causal_convolution,
    channel_norm,
    doubled,
    doubled_norm_silu,
    norm_by_kernel,
    norm_silu,
    normed_taps,
    norms,
    plain_norm_silu,
)

type Video = Float[Array, "_ _ _ _ _"]  # [B, T, H, W, C]
type Past = Any  # a pytree of arrays [B, frames, H, W, C]
# (rows before, after), (columns before, after)
type Padding = tuple[tuple[int, int], tuple[int, int]]
TORCH_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default for convolutions


class Conv(nnx.Module):
    """Convolution over time, rows and columns that pads rows and columns but not time.

    Causal 3x3x3 convolutions can use a kernel for Hopper, see `WanVAE`. Others are 2-D convolutions (or matrix
    products, if the kernel has one row and column) over frames, with the kernel's steps in time concatenated in the
    channels: on NVIDIA GPUs, XLA uses the channels-last layout of the tensor cores for 2-D convolutions in half
    precision, but not for 3-D ones.

    Args:
        features: Input channels.
        out: Output channels.
        kernel: Size in time, rows, columns.
        strides: Stride in time, and in rows and columns.
        padding: Padding of rows and columns; None keeps their number.
        use_bias: Whether it has a bias.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
        rngs: Random keys for the parameters.
    """

    def __init__(
        self,
        features: int,
        out: int,
        kernel: tuple[int, int, int],
        *,
        strides: tuple[int, int] = (1, 1),
        padding: Padding | None = None,
        use_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.strides = jnp.dtype(dtype), strides
        self.implementation: Implementation | None = None  # set by `WanVAE`
        rows, columns = kernel[1] // 2, kernel[2] // 2
        self.padding = padding or ((rows, rows), (columns, columns))
        self.kernel = nnx.Param(TORCH_INIT(rngs.params(), (*kernel, features, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out,), param_dtype)) if use_bias else None

    @property
    def past_frames(self) -> int:
        """Number of past frames that an output depends on."""
        return self.kernel.shape[0] - 1

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T_out H_out W_out D"]:
        """Convolves `x`, which includes the past; T_out = (T - kernel) / stride + 1."""
        x, step = x.astype(self.dtype), self.strides[0]
        frames = (x.shape[1] - self.past_frames - 1) // step + 1
        taps = [x[:, k : k + (frames - 1) * step + 1 : step] for k in range(self.past_frames + 1)]
        return self._convolve(jnp.concatenate(taps, axis=-1), None)

    def _convolve(self, x: Array, added: Array | None, *, steps: int = 0) -> Array:
        """The convolution of frames with the inputs of all steps in time concatenated, [B, T, H, W, kernel * C].

        `added` is added to the result. With `steps`, only this many of the kernel's last steps are used.
        """
        kernel, stride = self.kernel[-steps:].astype(self.dtype), self.strides[1]
        kernel = rearrange(kernel, "t h w i o -> h w (t i) o")
        planes, strides = rearrange(x, "b t h w c -> (b t) h w c"), (stride, stride)
        bias = jnp.zeros(kernel.shape[-1], self.dtype) if self.bias is None else self.bias[...].astype(self.dtype)
        if (*kernel.shape[:2], stride) == (1, 1, 1):
            y = planes @ kernel[0, 0]
            y = y + along_last(bias, y)
        else:
            # tensor cores need multiples of eight channels: pixels are padded with zeros
            spare, more = (-n % 8 if self.dtype.itemsize == 2 else 0 for n in kernel.shape[2:])
            planes = jnp.pad(planes, ((0, 0), (0, 0), (0, 0), (0, spare)))
            kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, spare), (0, more)))
            y = jax.lax.conv_general_dilated(
                planes, kernel, strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = (y + along_last(jnp.pad(bias, (0, more)), y))[..., : len(bias)]
        if added is not None:  # in the same axes, so that cuDNN fuses it with the convolution
            y = y + rearrange(added.astype(self.dtype), "b t h w c -> (b t) h w c")
        return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])

    def empty_past(self, batch: int, height: int, width: int) -> Float[Array, "B P H W C"]:
        """The past at the beginning of a clip: zeros."""
        return jnp.zeros((batch, self.past_frames, height, width, self.kernel.shape[3]), self.dtype)

    def after(
        self,
        past: Float[Array, "B P H W C"],
        x: Float[Array, "B T H W C"],
        *,
        added: Video | None = None,
        first: bool = False,
    ) -> tuple[Video, Past]:
        """Convolves `x` as the continuation of `past`, plus `added`; other arguments are as in `after_normed`.

        Returns:
            As many frames as `x` has, and the new past.
        """
        (y, _), latest = self.after_normed(past, x, None, added=added, first=first)
        return y, latest

    def after_normed(
        self,
        past: Float[Array, "B P H W C"],
        x: Float[Array, "B T H W C"],
        norm: "ChannelNorm | None",
        *,
        before: "ChannelNorm | None" = None,
        added: Video | None = None,
        both: bool = True,
        first: bool = False,
    ) -> tuple[tuple[Video, Video | None], Past]:
        """Convolves `x` as the continuation of `past`, and applies a norm and SiLU if the kernel can fuse them.

        Args:
            past: From `empty_past` or an earlier call.
            x: Frames.
            norm: The norm to apply to the result.
            before: The norm to apply to `x` with SiLU before the convolution; None if `x` is normalised already.
            added: Frames to add to the convolution.
            both: Whether the result before `norm` is needed; otherwise the first result may be the normalised one.
            first: Whether `x` is the single first frame of a clip: its past is zeros, so only a third of the kernel is
                used.

        Returns:
            The result, its norm and SiLU, or None if the caller has to compute them; and the new past.
        """
        x, (count, frames) = x.astype(self.dtype), (past.shape[1], x.shape[1])
        kernel = self.bias is not None and by_kernel(self.implementation, x, self.kernel.shape)
        if before is not None:
            frame = jax.ShapeDtypeStruct(x.shape[2:], x.dtype)
            if not first and not kernel and count == 2 and norm_by_kernel(before.implementation, frame):
                taps, latest = normed_taps(past, x, before.gamma[...])
                return (self._convolve(taps, added), None), latest
            x = before(x, silu=True)
        latest = jnp.concatenate([past, x[:, -count:]], axis=1)[:, -count:]
        if first:
            y = self._convolve(x, added, steps=1)
        elif kernel and self.bias is not None:
            whole = norm is not None and norms(self.implementation, x, self.kernel.shape)
            ys = causal_convolution(
                past,
                x,
                self.kernel[...].astype(self.dtype),
                self.bias[...],
                added=None if added is None else added.astype(self.dtype),
                gamma=norm.gamma[...] if norm is not None and whole else None,
                both=both and whole,
            )
            if whole:
                return (ys[0], ys[-1]), latest
            (y,) = ys
        else:
            # each tap is concatenated separately: concatenating past and frames first would be one more pass
            taps = [
                jnp.concatenate([past[:, k : k + frames], x[:, : max(0, frames - count + k)]], axis=1)
                for k in range(count + 1)
            ]
            y = self._convolve(jnp.concatenate(taps, axis=-1), added)
        return (y, None), latest


class FoldedConv(Conv):
    """A causal 3x3x3 convolution to few channels that can read every frame once.

    With `implementation="mosaic"`, or by default where this was measured to be faster, its three steps in time are
    channels of one 3x3 convolution over frames. Every frame is then read once instead of three times, and the past
    consists of the contributions of two frames to later ones. Results are sums in float32 or wider of three numbers
    that were rounded to the dtype.
    """

    def folds(self, height: int, width: int) -> bool:
        """Whether the steps in time are folded into channels for frames of this size."""
        *_, features, out = self.kernel.shape
        frame = jax.ShapeDtypeStruct((1, 1, height, width, features), self.dtype)
        return self.implementation == "mosaic" or by_kernel(self.implementation, frame, (1, 3, 3, features, 3 * out))

    def empty_past(self, batch: int, height: int, width: int) -> Float[Array, "B 2 H W _"]:
        """The past at the beginning of a clip: zeros."""
        if not self.folds(height, width):
            return super().empty_past(batch, height, width)
        return jnp.zeros((batch, self.past_frames, height, width, 3 * self.kernel.shape[4]), self.dtype)

    def after(
        self,
        past: Float[Array, "B 2 H W _"],
        x: Float[Array, "B T H W C"],
        *,
        added: Video | None = None,
        first: bool = False,
    ) -> tuple[Float[Array, "B T H W D"], Past]:
        """As `Conv.after`; with folded steps, `added` is not supported and `first` has no effect."""
        if not self.folds(*x.shape[2:4]):
            return super().after(past, x, added=added, first=first)
        out, x = self.kernel.shape[4], x.astype(self.dtype)
        kernel = rearrange(self.kernel[...].astype(self.dtype), "t h w c d -> 1 h w c (t d)")
        bias = jnp.zeros(out, self.dtype) if self.bias is None else self.bias[...].astype(self.dtype)
        bias = jnp.pad(bias, (2 * out, 0))  # with the last step
        if by_kernel(self.implementation, x, kernel.shape):
            (parts,) = causal_convolution(None, x, kernel, bias)
        else:
            more = -len(bias) % 8 if self.dtype.itemsize == 2 else 0  # padding, as in `Conv`
            planes = rearrange(x, "b t h w c -> (b t) h w c")
            parts = jax.lax.conv_general_dilated(
                planes,
                jnp.pad(kernel[0], ((0, 0), (0, 0), (0, 0), (0, more))),
                (1, 1),
                self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            parts = (parts + along_last(jnp.pad(bias, (0, more)), parts))[..., : len(bias)]
            parts = rearrange(parts, "(b t) h w d -> b t h w d", b=len(x))
        joined = jnp.concatenate([past, parts], axis=1)
        precise = jnp.promote_types(self.dtype, jnp.float32)
        steps = [joined[:, k : k + x.shape[1], ..., k * out : (k + 1) * out].astype(precise) for k in range(3)]
        return steps[0] + steps[1] + steps[2], joined[:, -2:]


class ChannelNorm(nnx.Module):
    """x / |x| over channels, times sqrt(C) and a weight; computed in float32 or wider."""

    def __init__(self, features: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.implementation: Implementation | None = None  # set by `WanVAE`
        self.gamma = nnx.Param(nnx.initializers.ones(rngs.params(), (features,), param_dtype))

    def __call__(self, x: Float[Array, "*batch C"], *, silu: bool = False) -> Float[Array, "*batch C"]:
        """Normalises and, if `silu`, applies SiLU; keeps the dtype."""
        # reshaped to two axes: with five, XLA's search for GPU tile sizes takes a minute
        rows = x.reshape(-1, x.shape[-1])
        if not silu:
            made = channel_norm(rows, self.gamma[...])
        elif norm_by_kernel(self.implementation, rows):
            made = norm_silu(rows, self.gamma[...])
        else:
            made = plain_norm_silu(rows, self.gamma[...])
        return made.reshape(x.shape)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, added to the input."""

    def __init__(self, features: int, out: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = ChannelNorm(features, param_dtype=param_dtype, rngs=rngs)
        self.conv1 = Conv(features, out, (3, 3, 3), **options)
        self.norm2 = ChannelNorm(out, param_dtype=param_dtype, rngs=rngs)
        self.conv2 = Conv(out, out, (3, 3, 3), **options)
        if features != out:
            self.shortcut = Conv(features, out, (1, 1, 1), **options)

    def empty_past(self, batch: int, height: int, width: int) -> Past:
        """The past at the beginning of a clip."""
        return self.conv1.empty_past(batch, height, width), self.conv2.empty_past(batch, height, width)

    def __call__(
        self,
        x: Video,
        past: Past,
        *,
        first: bool,
        normed: Video | None = None,
        norm: ChannelNorm | None = None,
        both: bool = True,
    ) -> tuple[tuple[Video, Video | None], Past]:
        """Computes the block, and applies the next block's norm and SiLU if the kernel can fuse them.

        Args:
            x: Frames.
            past: Pasts of both convolutions.
            first: Whether `x` is the single first frame of a clip.
            normed: `x` after `norm1` and SiLU, if it was computed before.
            norm: Norm of the next block.
            both: Whether the result before `norm` is needed; otherwise the first result may be the normalised one.

        Returns:
            The result, its norm and SiLU, or None if the caller has to compute them; and the new past.
        """
        start, before = (x, self.norm1) if normed is None else (normed, None)
        (y, normed), past1 = self.conv1.after_normed(past[0], start, self.norm2, before=before, both=False, first=first)
        start, before = (y, self.norm2) if normed is None else (normed, None)
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        ys, past2 = self.conv2.after_normed(past[1], start, norm, before=before, added=shortcut, both=both, first=first)
        return ys, (past1, past2)


class FrameAttention(nnx.Module):
    """Single-head attention among the positions of each frame."""

    def __init__(self, features: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = ChannelNorm(features, param_dtype=param_dtype, rngs=rngs)
        self.to_qkv = Conv(features, 3 * features, (1, 1, 1), **options)
        self.proj = Conv(features, features, (1, 1, 1), **options)

    def empty_past(self, batch: int, height: int, width: int) -> Past:
        """No past: attention is within a frame."""
        return ()

    def __call__(self, x: Video, past: Past, *, first: bool) -> tuple[Video, Past]:
        """The frames and the unchanged past."""
        qkv = rearrange(self.to_qkv(self.norm(x)), "b t h w c -> (b t) (h w) 1 c")
        out = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1))
        b, t, h, w, _ = x.shape
        return x + self.proj(rearrange(out, "(b t) (h w) 1 c -> b t h w c", b=b, t=t, h=h, w=w)), past


class Upsample(nnx.Module):
    """Doubles rows and columns and halves channels; if `temporal`, first doubles all frames but the first."""

    def __init__(self, features: int, *, temporal: bool, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv = Conv(features, features // 2, (1, 3, 3), **options)
        if temporal:
            self.time_conv = Conv(features, 2 * features, (3, 1, 1), **options)

    def empty_past(self, batch: int, height: int, width: int) -> Past:
        """The past before the second frame; the first frame is not part of it."""
        return self.time_conv.empty_past(batch, height, width) if hasattr(self, "time_conv") else ()

    def __call__(
        self, x: Video, past: Past, *, first: bool, norm: ChannelNorm | None = None
    ) -> tuple[tuple[Video, Video | None], Past]:
        """Computes the upsampled frames, and the next block's norm and SiLU.

        Args:
            x: Frames.
            past: Past of the convolution in time.
            first: Whether `x` is the single first frame of a clip.
            norm: Norm of the next block, if it begins with a norm and SiLU.

        Returns:
            The result, its norm and SiLU if `norm` is given, else None; and the new past.
        """
        if hasattr(self, "time_conv") and not first:
            y, past = self.time_conv.after(past, x)
            x = rearrange(y, "b t h w (two c) -> b (t two) h w c", two=2)
        four = self._convolve_doubled(x)
        made = jax.ShapeDtypeStruct((4 * math.prod(x.shape[:4]), four.shape[-1] // 4), four.dtype)
        if norm is not None and norm_by_kernel(norm.implementation, made):
            frames, normed = doubled_norm_silu(four, norm.gamma[...])
        else:
            frames = doubled(four)
            normed = None if norm is None else norm(frames, silu=True)
        shape = (*x.shape[:2], *frames.shape[1:])
        return (frames.reshape(shape), None if normed is None else normed.reshape(shape)), past

    def _convolve_doubled(self, x: Video) -> Float[Array, "N h w abC"]:
        """`self.conv` of `x` with every row and column repeated, in the form of `doubled`, with 4 of 9 products.

        The 3x3 pixels around a pixel of the enlarged frame come from at most 2x2 pixels of `x`: rows h - 1 and h for
        the first of two copies, h and h + 1 for the second. For each of the four combinations, the result is thus a 2x2
        convolution whose weights are sums of those of the 3x3 kernel.
        """
        steps = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [copy, step of 2, step of 3]
        kernel = self.conv.kernel[0]
        precise = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        summed = jnp.einsum("aik,bjl,klcd->ijcabd", steps.astype(precise.dtype), steps.astype(precise.dtype), precise)
        planes = rearrange(x.astype(self.conv.dtype), "b t h w c -> (b t) h w c")
        summed = rearrange(summed, "i j c a b d -> i j c (a b d)").astype(planes.dtype)
        y = jax.lax.conv_general_dilated(
            planes, summed, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if self.conv.bias is not None:
            y = y + along_last(jnp.tile(self.conv.bias[...].astype(y.dtype), 4), y)
        return y


class Downsample(nnx.Module):
    """Halves rows and columns; if `temporal`, then halves the frames, except for the first one."""

    def __init__(self, features: int, *, temporal: bool, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv = Conv(features, features, (1, 3, 3), strides=(1, 2), padding=((0, 1), (0, 1)), **options)
        if temporal:
            self.time_conv = Conv(features, features, (3, 1, 1), strides=(2, 1), **options)

    def empty_past(self, batch: int, height: int, width: int) -> Past:
        """The past, one frame of zeros; the first frame replaces it."""
        if not hasattr(self, "time_conv"):
            return ()
        return self.time_conv.empty_past(batch, height // 2, width // 2)[:, :1]

    def __call__(self, x: Video, past: Past, *, first: bool) -> tuple[Video, Past]:
        """The downsampled frames and the new past; `first` if `x` is the single first frame of a clip."""
        x = self.conv(x)
        if not hasattr(self, "time_conv"):
            return x, past
        if first:
            return x, x
        joined = jnp.concatenate([past, x], axis=1)
        return self.time_conv(joined), x[:, -1:]
