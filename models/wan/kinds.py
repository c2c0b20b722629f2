"""Parameters of attention kinds in a Wan model, which are in its blocks, stacked over layers."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from monarchrt.models.attention.base import Attention, leaves
from monarchrt.models.wan.config import WanConfig

PLACE = "kinds"  # attribute of a block's self-attention that holds the modules by the kind's name
type Path = tuple[str, ...]


def modules_of(block: Any) -> dict[str, Any]:
    """The modules of attention kinds in a block, by name of the kind."""
    own = getattr(block.self_attn, PLACE, None)
    return {} if own is None else dict(own.items())


def make_modules(config: WanConfig, rngs: nnx.Rngs) -> nnx.Dict | None:
    """Creates the modules of all kinds in the attention of `config`, an `nnx.Dict` stacked over layers, or None.

    All settings of a kind share one module, as in `first_steps(1, kind(...), kind(...))`.

    Raises:
        ValueError: If two settings of a kind need parameters of different shapes.
    """
    settings = list(dict.fromkeys(leaf for layer in config.layer_attention for leaf in leaves(layer)))
    if not any(_shapes(setting, config) for setting in settings):
        return None
    owners: dict[str, Attention] = {}
    for setting in settings:
        shapes = _shapes(setting, config)
        if setting.name in owners and _shapes(owners[setting.name], config) != shapes:
            raise ValueError(
                f"attention: {owners[setting.name]} and {setting} need parameters of different shapes, and a model "
                f"has one set of them for {setting.name}."
            )
        if shapes:
            owners.setdefault(setting.name, setting)

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Any:
        return nnx.Dict({name: setting.init(config, rngs=rngs) for name, setting in owners.items()})

    return stack(rngs)


def own_shapes(config: WanConfig) -> dict[Path, tuple[int, ...]]:
    """Shapes of the parameters of attention kinds, stacked over layers, by path in the model; allocates nothing."""
    shapes = {}
    for layer in config.layer_attention:
        for leaf in leaves(layer):
            for path, shape in _shapes(leaf, config).items():
                shapes["blocks", "self_attn", PLACE, leaf.name, *path] = (config.num_layers, *shape)
    return shapes


def _shapes(setting: Attention, config: WanConfig) -> dict[Path, tuple[int, ...]]:
    return _shapes_of(setting, dataclasses.replace(config, attention=setting, num_layers=1, causal_block=None))


@functools.lru_cache(maxsize=256)
def _shapes_of(setting: Attention, config: WanConfig) -> dict[Path, tuple[int, ...]]:
    """Shapes of the parameters of one layer."""
    module = nnx.eval_shape(lambda: setting.init(config, rngs=nnx.Rngs(0)) or nnx.Dict())
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {tuple(map(str, path)): leaf.shape for path, leaf in flat}


def with_modules(model: Any, config: WanConfig, rngs: nnx.Rngs | None) -> None:
    """Gives a model the modules that the attention of `config` needs, in place.

    Modules that it has are kept if their shapes match; others are initialised; those of other kinds are removed.

    Args:
        model: The model, whose blocks are changed.
        config: Configuration with the new attention.
        rngs: Random keys for initialisation; None: seed 0.
    """
    attention = model.blocks.self_attn
    present = modules_of(model.blocks)
    wanted = own_shapes(config)
    if not present and not wanted:
        return
    have = {
        ("blocks", "self_attn", PLACE, *map(str, path)): leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.state(nnx.Dict(present), nnx.Param))
    }
    names = {path[3] for path in wanted}

    def of(shapes: dict[Path, tuple[int, ...]], name: str) -> dict[Path, tuple[int, ...]]:
        return {path: shape for path, shape in shapes.items() if path[3] == name}

    fitting = {name for name in names if of(have, name) == of(wanted, name)}
    kept = {name: module for name, module in present.items() if name in fitting}
    if fitting != names:
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
        if abstract:
            fresh = nnx.eval_shape(lambda: make_modules(config, nnx.Rngs(0)))
        else:
            fresh = make_modules(config, nnx.Rngs(0) if rngs is None else rngs)
        kept |= {name: module for name, module in (fresh or {}).items() if name not in fitting}
    if hasattr(attention, PLACE):
        delattr(attention, PLACE)
    if kept:
        setattr(attention, PLACE, nnx.Dict(kept))
