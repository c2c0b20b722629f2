"""The registry of attention kinds by name. Does not import JAX, so that help is quick."""

import importlib
from typing import TYPE_CHECKING

from monarchrt.models.errors import printable

if TYPE_CHECKING:
    from monarchrt.models.attention.base import Attention

_PACKAGE = "monarchrt.models.attention"
_REGISTRY: dict[str, "str | type[Attention]"] = {
    "dense": f"{_PACKAGE}.dense:DenseAttention",
    "monarch": f"{_PACKAGE}.monarch:MonarchAttention",
    "top_k": f"{_PACKAGE}.top_k:TopKAttention",
    "radial": f"{_PACKAGE}.radial:RadialAttention",
    "svg": f"{_PACKAGE}.svg:SVGAttention",
    "svg2": f"{_PACKAGE}.svg2:SVG2Attention",
    "vsa": f"{_PACKAGE}.vsa:VSAttention",
    "sla": f"{_PACKAGE}.sla:SLAttention",
    "sliding_tile": f"{_PACKAGE}.sliding_tile:SlidingTileAttention",
    "first_layers": f"{_PACKAGE}.schedule:FirstLayers",
    "first_steps": f"{_PACKAGE}.schedule:FirstSteps",
    "first_blocks": f"{_PACKAGE}.schedule:FirstBlocks",
    "per_layer": f"{_PACKAGE}.schedule:PerLayer",
}
EXACT = "dense"  # the default for weights without a stored kind, and the reference in comparisons
PER_LAYER = "per_layer"  # the kind that has a setting for each layer
SHORT = "monarch"  # the kind whose fields are also options on the command line, such as --tile 3 30 52


def register[Kind: type](kind: Kind) -> Kind:
    """Registers a kind from outside of this package.

    Args:
        kind: A subclass of `Attention` with a name.

    Returns:
        The class, so that this can be used as a decorator.

    Raises:
        ValueError: If the name is taken by another class, or cannot be written in the notation.
    """
    name = kind.name
    if not name.isidentifier():
        raise ValueError(f"name={name!r} cannot be written in the notation; use letters, digits and underscores.")
    present = _REGISTRY.get(name)
    own = f"{kind.__module__}:{kind.__qualname__}"
    if present is not None and own not in (present, f"{kind_named(name).__module__}:{kind_named(name).__qualname__}"):
        raise ValueError(f"name={name!r} is taken by {kind_named(name).__qualname__}; choose another.")
    _REGISTRY[name] = kind
    return kind


def names() -> tuple[str, ...]:
    """The names of all kinds."""
    return tuple(_REGISTRY)


def kind_named(name: str) -> "type[Attention]":
    """The class of a kind, imported on first use.

    Examples:
        >>> kind_named("dense").__name__
        'DenseAttention'

    Raises:
        ValueError: If the name is unknown; the message lists all kinds.
    """
    if name not in _REGISTRY:
        raise ValueError(f"{printable(repr(name), 80)} is not a kind of attention; kinds: {', '.join(names())}.")
    row = _REGISTRY[name]
    if isinstance(row, str):
        module, _, attribute = row.partition(":")
        row = getattr(importlib.import_module(module), attribute)
        _REGISTRY[name] = row
    return row


def exact() -> "Attention":
    """The setting of exact attention, which keeps all entries."""
    return kind_named(EXACT)()
