"""A model whose layers are arrays of their own, for generation on a GPU.

A scan over stacked layers cuts each layer's weights out of the stack in every call: products cannot read them where
they lie. With arrays of their own nothing is copied; the program, of one layer after the other, is larger.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import WanModel
from monarchrt.models.wan.fused import joined_block
from monarchrt.models.wan.passes import Passes, check_passes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Parameters of a model, those of its layers apart. A pytree.

    Attributes:
        rest: Parameters outside of layers: the state of a model with no layers in its stacks.
        arrays: Arrays of each layer.
        structure: Tree structure of a layer's arrays.
    """

    rest: Any
    arrays: tuple[tuple[Any, ...], ...]
    structure: Any = dataclasses.field(metadata={"static": True})

    def each(self) -> list[Any]:
        """The state of each layer."""
        return [jax.tree.unflatten(self.structure, arrays) for arrays in self.arrays]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnrolledWan:
    """What `LiveRollout` takes instead of a model.

    Attributes:
        model: Without layers, for all checks.
        graph: Its structure, as of `nnx.split`.
        params: Parameters, in place of the other half of that split.
    """

    model: WanModel
    graph: nnx.GraphDef
    params: Layers

    @property
    def config(self) -> WanConfig:
        """Of the model that was unrolled, but for causal blocks: it makes one at a time."""
        return self.model.config


type Cut = dict[Any, tuple[Any, list[Any]]]


def unroll_layers(model: WanModel, *, cut: Cut | None = None, passes: Passes | None = None) -> UnrolledWan:
    """A model for generation block by block, with every layer's arrays copied out of the stack.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> unrolled = unroll_layers(WanModel(wan_config("tiny", num_layers=2), rngs=nnx.Rngs(0)))
        >>> len(unrolled.params.arrays)
        2

    Args:
        model: It is left as it is.
        cut: What was cut of other models with the same arrays, under other attention, and is cut here: they are shared.
        passes: What is between a layer's products: "triton", by kernels of few passes (half precision), with query, key
            and value as one product where weights are plain; "plain", the same as XLA does it; None: as in training.

    Returns:
        The unrolled one. It shares all other arrays.

    Raises:
        ValueError: If the kernels cannot take the network's rows.
    """
    check_passes(passes, model.config.dtype, model.config.dim)
    model = model.with_config(causal_block=None)  # blocks are seen one at a time
    stacked = nnx.split(model.blocks)[1]
    cut = {} if cut is None else cut

    def layer_of(number: int, x: Any) -> Any:
        if id(x) not in cut:
            layers = [_layer(x, n) for n in range(model.config.num_layers)]
            cut[id(x)] = x, layers  # with x itself, whose id is its own then
        return cut[id(x)][1][number]

    def joined(*arrays: Any) -> Any:
        if (key := tuple(map(id, arrays))) not in cut:
            cut[key] = arrays, [jnp.concatenate(arrays, axis=-1)]
        return cut[key][1][0]

    layers = [jax.tree.map(partial(layer_of, number), stacked) for number in range(model.config.num_layers)]
    empty = jax.tree.map(lambda x: x[:0], stacked)
    graph, rest = nnx.split(model)
    model = nnx.merge(graph, nnx.merge_state(rest, nnx.State({"blocks": empty})))
    if passes is not None:
        model.blocks.passes = passes
        block = nnx.split(model.blocks)[0]
        layers = [nnx.split(joined_block(nnx.merge(block, layer), joined))[1] for layer in layers]
        joined_block(model.blocks, joined)
    graph, rest = nnx.split(model)
    params = Layers(
        rest=rest,
        arrays=tuple(tuple(jax.tree.leaves(layer)) for layer in layers),
        structure=jax.tree.structure(layers[0]),
    )
    return UnrolledWan(model=model, graph=graph, params=params)


def _layer(x: Any, number: int) -> Any:
    """A layer's array of a stack, on a mesh split as the stack is."""
    if not isinstance(where := getattr(x, "sharding", None), NamedSharding):
        return x[number]
    return jax.device_put(x[number], NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])))


def merged(graph: nnx.GraphDef, params: Any) -> tuple[Any, list[Any] | None]:
    """The model, and the state of each layer if they are apart; what `cached_forward` and `init_cache` take."""
    if isinstance(params, Layers):
        return nnx.merge(graph, params.rest), params.each()
    return nnx.merge(graph, params), None


def over_layers(of_layer: Callable[[Any], Any], stacked: Any, layers: list[Any] | None) -> Any:
    """What a function makes of each layer's state, on a leading axis of layers; apart, where they are."""
    if layers is None:
        return jax.lax.scan(lambda _, layer: (None, of_layer(layer)), None, stacked)[1]
    return tuple(map(jax.jit(of_layer), layers))
