"""Layers with a LoRA, y = x W + b + (alpha / r) x A B, of which only A and B are trained.

Files store A as [r, in] and B as [out, r]; here they are [in, r] and [r, out] like kernels, stacked over the blocks.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from monarchrt.models.lora.writing import Factors
from monarchrt.models.wan.checkpoints.mapping import tensors
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import WanModel
from monarchrt.models.wan.kinds import own_shapes

LAYERS = ("self_attn", "cross_attn", "ffn")  # the layers that all trainers adapt
DOWN, UP = "lora_a", "lora_b"  # names of the parameters


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Rank, alpha and layers of a LoRA.

    Attributes:
        rank: Rank r of the matrices.
        alpha: Numerator of the scale alpha / r; None: r.
        layers: Layers to adapt, as in `layer_names`.
    """

    rank: int
    alpha: float | None = None
    layers: tuple[str, ...] = LAYERS

    @property
    def strength(self) -> float:
        """Alpha, by default the rank."""
        return float(self.rank if self.alpha is None else self.alpha)


class LoRALinear(nnx.Linear):
    """A dense layer with a pair of matrices.

    Examples:
        >>> layer = LoRALinear(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rank=2, alpha=1.0, rngs=nnx.Rngs(1))
        >>> layer.lora_a.shape, layer.lora_b.shape, layer(jnp.ones((5, 4))).shape
        ((4, 2), (2, 3), (5, 3))

    Args:
        linear: The layer, whose parameters it shares; may be stacked over blocks.
        rank: Rank r.
        alpha: Numerator of the scale alpha / r.
        rngs: Random keys for A, which is uniform within 1/sqrt(in), as in PEFT; B is zero.
    """

    def __init__(self, linear: nnx.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        for name, value in vars(linear).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.rank, self.alpha = rank, alpha
        *stack, features, out = linear.kernel.shape
        bound = features**-0.5
        down = jax.random.uniform(rngs.params(), (*stack, features, rank), jnp.float32, -bound, bound)
        self.lora_a = nnx.LoRAParam(down)
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, out), jnp.float32))

    def __call__(self, inputs: Float[Array, "*batch I"], **options: Any) -> Float[Array, "*batch O"]:
        """x W + b + (alpha / r) x A B, computed in the layer's dtype."""
        out = super().__call__(inputs, **options)
        x, down, up = (array.astype(out.dtype) for array in (inputs, self.lora_a[...], self.lora_b[...]))
        change = jnp.matmul(jnp.matmul(x, down, precision=self.precision), up, precision=self.precision)
        return out + change * (self.alpha / self.rank)


def layer_names(config: WanConfig, wanted: Sequence[str] = LAYERS) -> dict[str, list[str]]:
    """Selects dense layers of a network by name.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> sorted(layer_names(wan_config("tiny", num_layers=1), ["ffn", "head"]))
        ['blocks.ffn.fc1', 'blocks.ffn.fc2', 'head.proj']

    Args:
        config: The network.
        wanted: Parts of names between dots, such as `self_attn`, `q` or `ffn.fc1`, or patterns of whole names.

    Returns:
        For each selected layer, by its name in the model, Wan's own names, one for each block.

    Raises:
        ValueError: If an entry matches no layer; the message lists all layers.
    """
    layers: dict[str, list[str]] = {}
    for tensor in tensors(config):
        if tensor.layout == "linear":
            layers.setdefault(".".join(tensor.path[:-1]), []).append(tensor.official.removesuffix(".weight"))

    def fits(name: str, part: str) -> bool:
        return f".{part}." in f".{name}." or fnmatch.fnmatchcase(name, part)

    for part in wanted:
        if not any(fits(name, part) for name in layers):
            raise ValueError(f"lora_layers has {part!r}, which matches no layer; choices: {', '.join(layers)}.")
    return {name: official for name, official in layers.items() if any(fits(name, part) for part in wanted)}


def with_adapter(model: WanModel, adapter: Adapter, *, rngs: nnx.Rngs) -> WanModel:
    """Adds a pair of matrices to the selected layers; the output of the model does not change until they are trained.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny"), rngs=nnx.Rngs(0))
        >>> adapted = with_adapter(model, Adapter(rank=4, layers=("q",)), rngs=nnx.Rngs(1))
        >>> adapted.blocks.self_attn.q.lora_a.shape
        (4, 96, 4)

    Args:
        model: The model; it does not change.
        adapter: Rank, alpha and layers.
        rngs: Random keys for A.

    Returns:
        A new model with the same arrays; the parameters of the pairs are `nnx.LoRAParam`, in float32.

    Raises:
        ValueError: If a layer does not exist, the rank is larger than a layer, or the attention has parameters of its
            own.
    """
    if own := own_shapes(model.config):
        raise ValueError(
            f"lora_rank is {adapter.rank}, but attention {next(iter(own))[3]} has parameters of its own, which "
            f"LoRA files cannot store; train the network itself, or with another attention."
        )
    graph, state = nnx.split(model)
    adapted = nnx.merge(graph, state)
    for name in layer_names(model.config, adapter.layers):
        *parents, leaf = name.split(".")
        owner: Any = adapted
        for parent in parents:
            owner = getattr(owner, parent)
        linear = getattr(owner, leaf)
        smaller = min(linear.in_features, linear.out_features)
        if adapter.rank > smaller:
            raise ValueError(f"lora_rank is {adapter.rank}, larger than {name} of {smaller}; give {smaller} or less.")
        setattr(owner, leaf, LoRALinear(linear, rank=adapter.rank, alpha=adapter.strength, rngs=rngs))
    return adapted


def folded(model: WanModel) -> WanModel:
    """Merges the pairs of matrices of a model into its layers, which become plain dense layers again.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny"), rngs=nnx.Rngs(0))
        >>> adapted = with_adapter(model, Adapter(rank=4), rngs=nnx.Rngs(1))
        >>> hasattr(folded(adapted).blocks.self_attn.q, "lora_a")
        False

    Args:
        model: The model; it does not change.

    Returns:
        A new model; W + (alpha / r) A B is computed in float32 and rounded to the dtype of W.
    """
    plain = nnx.eval_shape(lambda: WanModel(model.config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(plain)
    values = {tuple(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model))}
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        value = values[tuple(map(str, path))][...]
        owner: Any = model
        for name in path[:-1]:
            owner = getattr(owner, str(name))
        if isinstance(owner, LoRALinear) and path[-1] == "kernel":
            pair = jnp.matmul(owner.lora_a[...], owner.lora_b[...], precision="highest")
            value = (value.astype(jnp.float32) + pair * (owner.alpha / owner.rank)).astype(value.dtype)
        filled.append((path, leaf.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def factors_of(arrays: dict[str, np.ndarray], config: WanConfig, *, alpha: float | None) -> dict[str, Factors]:
    """The matrices of each layer by Wan's own name, in the layout of files.

    Args:
        arrays: Parameters by name, such as `blocks.self_attn.q.lora_a`, stacked over blocks; others are ignored.
        config: The network.
        alpha: Alpha of all layers; None: their rank.

    Returns:
        The matrices.

    Raises:
        ValueError: If one matrix of a pair is missing.
    """
    factors: dict[str, Factors] = {}
    for name, officials in layer_names(config, ["*"]).items():
        down, up = arrays.get(f"{name}.{DOWN}"), arrays.get(f"{name}.{UP}")
        if down is None and up is None:
            continue
        if down is None or up is None:
            raise ValueError(f"{name} has {UP if down is None else DOWN} alone, half of a pair.")
        stacked = np.ndim(down) == 3
        for layer, official in enumerate(officials):
            a, b = (x[layer] if stacked else x for x in (down, up))
            rank = a.shape[-1]
            factors[official] = Factors(
                np.ascontiguousarray(np.asarray(a, np.float32).T),
                np.ascontiguousarray(np.asarray(b, np.float32).T),
                float(rank if alpha is None else alpha),
            )
    return factors
