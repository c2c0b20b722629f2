"""LPIPS (Zhang et al. 2018, arXiv:1801.03924), version 0.1, from weight files that the user provides.

They are a network of torchvision, `alexnet-owt-*.pth` or `vgg16-*.pth`, which `torchvision.models` downloads, and the
linear layers from the package `lpips`, `lpips/weights/v0.1/alex.pth` or `vgg.pth`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile
from monarchrt.models.checkpoints.torch_pickle import TorchFile
from monarchrt.models.errors import UserError
from monarchrt.train.evaluation.metrics import check_same

MEAN, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS's ScalingLayer, for inputs in [-1, 1]
# layers of `features` of torchvision's networks: (number, stride, padding) of a convolution, (size, stride) of a
# max-pool, or "tap" for activations that LPIPS uses, after a ReLU
_ALEX = ((0, 4, 2), "tap", (3, 2), (3, 1, 2), "tap", (3, 2), (6, 1, 1), "tap", (8, 1, 1), "tap", (10, 1, 1), "tap")
_VGG = (
    *((0, 1, 1), (2, 1, 1), "tap", (2, 2), (5, 1, 1), (7, 1, 1), "tap", (2, 2), (10, 1, 1), (12, 1, 1), (14, 1, 1)),
    *("tap", (2, 2), (17, 1, 1), (19, 1, 1), (21, 1, 1), "tap", (2, 2), (24, 1, 1), (26, 1, 1), (28, 1, 1), "tap"),
)
NETWORKS = {"alex": _ALEX, "vgg": _VGG}
_SHAPES = {  # output channels, and side of the kernel, of each convolution
    "alex": ((64, 11), (192, 5), (384, 3), (256, 3), (256, 3)),
    "vgg": tuple((width, 3) for width, count in ((64, 2), (128, 2), (256, 3), (512, 6)) for _ in range(count)),
}
SMALLEST = {"alex": 31, "vgg": 16}  # least height and width in pixels, for a last layer of one pixel


class LPIPS(NamedTuple):
    """A network and its linear layers, called with a video and its reference.

    Attributes:
        network: Name of the network: alex or vgg.
        convolutions: (kernel [h, w, in, out], bias) by number in `features`.
        linear: Weights of the channels at each tap.
    """

    network: str
    convolutions: dict[int, tuple[np.ndarray, np.ndarray]]
    linear: list[np.ndarray]

    def __call__(self, video: UInt8[np.ndarray, "t h w 3"], reference: UInt8[np.ndarray, "t h w 3"]) -> np.ndarray:
        """The distance of each frame to the reference's, [T]; 0 for equal frames.

        Raises:
            UserError: If frames are too small for the network.
            ValueError: If the videos have different sizes or lengths.
        """
        check_same(video, reference)
        smallest, least = min(video.shape[1:3]), SMALLEST[self.network]
        if smallest < least:
            raise UserError(
                f"lpips: frames are {video.shape[1]} x {video.shape[2]}, but {self.network} needs at least {least} "
                f"pixels per side; leave --lpips out, or make larger videos"
            )
        weights = self.convolutions, self.linear
        pairs = zip(video, reference, strict=True)
        return np.array([float(_distance(self.network, *weights, a[None], b[None])) for a, b in pairs])


def read_lpips(network_file: Path, linear_file: Path) -> LPIPS:
    """Reads the two files; the shapes of arrays determine the network.

    Raises:
        UserError: If a file is missing, has other arrays, or the two do not belong together.
    """
    for path in (network_file, linear_file):
        if not path.is_file():
            raise UserError(
                f"lpips: {path} is not a file; give torchvision's alexnet or vgg16 weights, and the lpips package's "
                f"v0.1/alex.pth or v0.1/vgg.pth"
            )
    arrays, heads = read_arrays(network_file), read_arrays(linear_file)
    found = backbone(arrays)
    if found is None:
        raise UserError(
            f"lpips: {network_file} holds neither torchvision's alexnet nor its vgg16 (`features.0.weight`, ..., "
            f"with the shapes they have there)"
        )
    name, convolutions = found
    linear = [_head(heads, number, linear_file) for number in range(5)]
    widths = _tap_widths(NETWORKS[name], convolutions)
    if [len(weights) for weights in linear] != widths:
        raise UserError(
            f"lpips: {linear_file} has layers of {[len(x) for x in linear]} channels, and {network_file}, which is "
            f"{name}, needs {widths}; give the v0.1 file of {name}"
        )
    return LPIPS(name, convolutions, linear)


def backbone(arrays: dict[str, np.ndarray]) -> tuple[str, dict[int, tuple[np.ndarray, np.ndarray]]] | None:
    """Name in `NETWORKS` and convolutions (kernel [h, w, in, out], bias) of a file's arrays; None for other files."""
    for name, layers in NETWORKS.items():
        numbers = [int(layer[0]) for layer in layers if len(layer) == 3 and layer != "tap"]
        before, shapes = 3, {}
        for number, (width, side) in zip(numbers, _SHAPES[name], strict=True):
            shapes[f"features.{number}.weight"], shapes[f"features.{number}.bias"] = (
                (width, before, side, side),
                (width,),
            )
            before = width
        if all(key in arrays and arrays[key].shape == shape for key, shape in shapes.items()):
            return name, {
                number: (arrays[f"features.{number}.weight"].transpose(2, 3, 1, 0), arrays[f"features.{number}.bias"])
                for number in numbers
            }
    return None


def read_arrays(path: Path, option: str = "lpips") -> dict[str, np.ndarray]:
    """Reads all arrays of a PyTorch or safetensors file as float32.

    Args:
        path: The file.
        option: Name of the option, for messages.

    Raises:
        UserError: If the file cannot be read, or an array is not finite.
    """
    try:
        file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
        arrays = {name: np.asarray(file.read(name), np.float32) for name in file.infos}
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{option}: {' '.join(str(error).split())}") from error
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{option}: {path} is damaged: {name} has numbers that are not finite")
    return arrays


def _head(heads: dict[str, np.ndarray], number: int, path: Path) -> np.ndarray:
    for name in (f"lin{number}.model.1.weight", f"lins.{number}.model.1.weight"):
        if name in heads:
            return heads[name].reshape(-1)
    raise UserError(f"lpips: {path} has no lin{number}.model.1.weight; give the lpips package's v0.1 file")


def _tap_widths(layers: tuple, convolutions: dict[int, tuple[np.ndarray, np.ndarray]]) -> list[int]:
    widths, width = [], 3
    for layer in layers:
        if layer == "tap":
            widths.append(width)
        elif len(layer) == 3:
            width = convolutions[layer[0]][0].shape[-1]
    return widths


def taps(x: Float[Array, "1 h w 3"], network: str, convolutions: dict) -> list[Array]:
    """Activations of one of `NETWORKS` at its taps."""
    found = []
    for layer in NETWORKS[network]:
        if layer == "tap":
            found.append(x)
        elif len(layer) == 3:
            number, stride, padding = (int(part) for part in layer)
            kernel, bias = convolutions[number]
            x = lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                [(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision="highest",
            )
            x = jax.nn.relu(x + bias[None, None, None])
        else:
            size, stride = (int(part) for part in layer)
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), "VALID")
    return found


@jax.jit
def _unit(x: Array) -> Array:
    return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)) + 1e-10)


def _row(channels: Any) -> Array:
    return jnp.asarray(channels, jnp.float32)[None, None, None]


def _distance(
    network: str, convolutions: dict, linear: list[np.ndarray], ours: np.ndarray, theirs: np.ndarray
) -> Array:
    """Sum over taps of the spatial mean of the weighted squared difference of normalized features."""
    both = []
    for frame in (ours, theirs):
        pixels = jnp.asarray(frame, jnp.float32) / 127.5 - 1
        both.append(_compiled(network)((pixels - _row(MEAN)) / _row(SCALE), convolutions))
    total = jnp.zeros(())
    for a, b, weights in zip(*both, linear, strict=True):
        total += (jnp.square(_unit(a) - _unit(b)) * _row(weights)).sum(-1).mean()
    return total


def _compiled(network: str):
    return _FEATURES[network]


_FEATURES = {name: jax.jit(lambda x, convolutions, name=name: taps(x, name, convolutions)) for name in NETWORKS}
