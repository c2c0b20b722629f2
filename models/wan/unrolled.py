"""A model whose layers have separate arrays, for generation on a GPU.

A scan over stacked layers copies each layer's weights out of the stack in every call, since products cannot read them
in place. Separate arrays need no copies; the unrolled program is larger.
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
    """Parameters of a model with separate arrays for each layer. A pytree.

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
    """An unrolled model, which `LiveRollout` takes instead of a `WanModel`.

    Attributes:
        model: The model without layers, for checks.
        graph: Graph of the model, from `nnx.split`.
        params: Parameters, instead of the state from `nnx.split`.
    """

    model: WanModel
    graph: nnx.GraphDef
    params: Layers

    @property
    def config(self) -> WanConfig:
        """The configuration of the model that was unrolled, with `causal_block=None`: it sees one block at a time."""
        return self.model.config


type Cut = dict[Any, tuple[Any, list[Any]]]


def unroll_layers(model: WanModel, *, cut: Cut | None = None, passes: Passes | None = None) -> UnrolledWan:
    """Copies the arrays of every layer out of the stack, for generation block by block.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> unrolled = unroll_layers(WanModel(wan_config("tiny", num_layers=2), rngs=nnx.Rngs(0)))
        >>> len(unrolled.params.arrays)
        2

    Args:
        model: The model; it does not change.
        cut: Arrays of layers by stacked array, which are reused and added to, so that models with the same arrays and
            different attention share them.
        passes: Computation between a layer's products: "triton", by fused kernels (half precision), with query, key and
            value as one product if their weights are plain; "plain", the same in XLA; None: as in training.

    Returns:
        The unrolled model, which shares all other arrays.

    Raises:
        ValueError: If the kernels do not support the network's dtype or width.
    """
    check_passes(passes, model.config.dtype, model.config.dim)
    model = model.with_config(causal_block=None)  # it sees one block at a time
    stacked = nnx.split(model.blocks)[1]
    cut = {} if cut is None else cut

    def layer_of(number: int, x: Any) -> Any:
        if id(x) not in cut:
            layers = [_layer(x, n) for n in range(model.config.num_layers)]
            cut[id(x)] = x, layers  # keeps x alive, so that its id is not reused
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
    """A layer's array from a stack, split like the stack if that is on a mesh."""
    if not isinstance(where := getattr(x, "sharding", None), NamedSharding):
        return x[number]
    return jax.device_put(x[number], NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])))


def merged(graph: nnx.GraphDef, params: Any) -> tuple[Any, list[Any] | None]:
    """The model, and the states of its layers if they are unrolled, for `cached_forward` and `init_cache`."""
    if isinstance(params, Layers):
        return nnx.merge(graph, params.rest), params.each()
    return nnx.merge(graph, params), None


def over_layers(of_layer: Callable[[Any], Any], stacked: Any, layers: list[Any] | None) -> Any:
    """Applies a function to each layer's state: results are stacked, or a tuple for unrolled layers."""
    if layers is None:
        return jax.lax.scan(lambda _, layer: (None, of_layer(layer)), None, stacked)[1]
    return tuple(map(jax.jit(of_layer), layers))
