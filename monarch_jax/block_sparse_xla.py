"""The definition of block-sparse attention in plain JAX, which is also the implementation "xla"."""

import jax
import jax.numpy as jnp
from jax import lax

from monarch_jax._typing import Array, Float
from monarch_jax.block_mask import BlockMask
from monarch_jax.contract import SparseProblem, accumulator_dtype


def attend(
    problem: SparseProblem,
    query: Float[Array, "B Nq H D"],
    key: Float[Array, "B Nk H D"],
    value: Float[Array, "B Nk H D"],
    mask: BlockMask,
) -> Float[Array, "B Nq H D"]:
    """One block of queries at a time, differentiated by JAX.

    Args:
        problem: The scale; the rest is read from the mask.
        query: [B, Nq, H, D], tokens in the order of the mask's blocks.
        key: [B, Nk, H, D], likewise; what no list has may be NaN.
        value: [B, Nk, H, D], likewise.
        mask: The keys that each query sees.

    Returns:
        [B, Nq, H, D] in the queries' dtype; zero for a query that sees no key.
    """
    batch, tokens, heads, _ = query.shape
    dtype = accumulator_dtype(query.dtype)
    lead = (batch, heads)
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))  # [B, H, N, D]
    k, v = (x.astype(dtype) for x in (k, v))  # so that their gradients are summed over blocks of queries as such
    starts, begins = (jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in (mask.query_starts, mask.key_starts))
    lists = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape[2:])), mask.keys)
    pick = jax.vmap(jax.vmap(lambda x, at: x[at]))  # [B, H, N, ...] at [B, H, n]

    def place_of(places, at):
        return pick(jnp.broadcast_to(places, (*lead, places.shape[-1])), at)

    @jax.checkpoint
    def block(number: Array) -> Array:
        rows = starts[..., number][..., None] + jnp.arange(mask.rows)[None, None]  # [B, H, rows]
        rows = jnp.minimum(rows, tokens - 1)
        entries = lists.entries[:, :, number]  # [B, H, L]
        first, last = pick(begins, entries), pick(begins, entries + 1)
        columns = first[..., None] + jnp.arange(mask.columns)[None, None, None]  # [B, H, L, columns]
        listed = jnp.arange(entries.shape[-1])[None, None]
        there = (columns < last[..., None]) & (listed < lists.count[:, :, number][..., None])[..., None]
        columns = jnp.minimum(columns, key.shape[1] - 1).reshape(*lead, -1)
        seen = there.reshape(*lead, 1, -1)
        # what is not listed may be NaN, and 0 * NaN is NaN
        keys, values = (jnp.where(jnp.swapaxes(seen, -1, -2), pick(x, columns), 0) for x in (k, v))
        if mask.width is not None:
            mine, theirs = (
                place_of(mask.query_places, rows)[..., None],
                place_of(mask.key_places, columns)[..., None, :],
            )
            near = (jnp.abs(mine - theirs) <= mask.width) | (theirs < mask.sink)
            whole = (listed < lists.whole[:, :, number][..., None])[..., None]
            seen &= near | jnp.broadcast_to(whole, there.shape).reshape(*lead, 1, -1)
        keys = keys.astype(key.dtype)
        scores = jnp.einsum("bhqd,bhkd->bhqk", pick(q, rows), keys, preferred_element_type=dtype)
        scores = jnp.where(seen, scores * problem.scale, -jnp.inf)
        top = lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))  # 0 where a row sees nothing
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, values)  # 16 bits would round the gradient of the weights
        return (out / jnp.where(total == 0.0, 1.0, total)).astype(query.dtype)

    out = lax.map(block, jnp.arange(starts.shape[-1] - 1))  # [Qb, B, H, rows, D]
    at = jnp.arange(tokens)
    of = jax.vmap(jax.vmap(lambda edges: jnp.searchsorted(edges, at, side="right") - 1))(starts)
    of = jnp.minimum(of, starts.shape[-1] - 2)
    flat = jnp.moveaxis(out, 0, 2).reshape(*lead, -1, out.shape[-1])
    picked = pick(flat, of * mask.rows + at[None, None] - pick(starts, of))
    return jnp.moveaxis(picked, 1, 2)
