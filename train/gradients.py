"""Norms of a gradient by groups of layers."""

from typing import Any

import jax
import jax.numpy as jnp

from monarchrt.train.objectives.base import Metrics

_GROUPS = {"text_embedding": "text", "self_attn": "self_attn", "cross_attn": "cross_attn", "ffn": "ffn", "head": "head"}
_OTHER = "other"


def gradient_norms(gradient: Any) -> Metrics:
    """L2 norms of the gradients of text embedding, attentions, feed-forward layers, head, and all other parameters.

    Args:
        gradient: The gradient before clipping, a tree of arrays with the structure of the parameters.

    Returns:
        `grad_norm_GROUP` for each group in the network; empty if there is only one.

    Examples:
        >>> gradient = {"blocks": {"ffn": jnp.array([3.0, 4.0])}, "head": {"bias": jnp.array([2.0])}}
        >>> {name: float(norm) for name, norm in gradient_norms(gradient).items()}
        {'grad_norm_ffn': 5.0, 'grad_norm_head': 2.0}
    """
    squares: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        group = next((_GROUPS[name] for name in names if name in _GROUPS), _OTHER)
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    if len(squares) < 2:
        return {}
    return {f"grad_norm_{group}": jnp.sqrt(squares[group]) for group in (*_GROUPS.values(), _OTHER) if group in squares}
