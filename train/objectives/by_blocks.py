"""The gradient of a clip that was generated block by block, as a sum of gradients of single blocks.

If no gradient flows from a block into earlier ones, the gradient of the clip is the sum over blocks of each block's own
gradient, given the past that it was generated from. Only the inputs of each block are stored during generation, so that
the backward pass needs the memory of one block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float32, Int

from monarchrt.models.attention.blocks import over_blocks

type Number = Int[Array, ""]

Block = Callable[[Any, Any, Any, Any, Number, Number, int], Array]
"""(parameters, shared, past, inputs, index of the block, its first frame, its frames) -> block [B, frames, h, w, C]."""

Following = Callable[[Any, Any, Any, Any, Number, Number, int], Any]
"""(the same arguments) -> the past of the next block."""


def sum_over_blocks(
    made: Float32[Array, "b f h w c"],
    params: Any,
    past: Any,
    inputs: Any,
    *,
    share: Callable[[Any, Any], Any],
    block: Block,
    following: Following,
    sizes: Sequence[int],
    first: tuple[Any, Any] = (0, 0),
    read: Callable[[Any], Any] | None = None,
) -> Float32[Array, "b f h w c"]:
    """Makes a generated clip differentiable with respect to the parameters, block by block.

    Examples:
        >>> ones = jnp.ones((1, 4, 1, 1, 1))
        >>> def total(scale):
        ...     clip = sum_over_blocks(
        ...         ones, scale, jnp.float32(1), (),
        ...         share=lambda scale, inputs: 2 * scale,
        ...         block=lambda scale, twice, past, inputs, number, frame, size: twice * past * ones[:, :size],
        ...         following=lambda scale, twice, past, *where: past + 1,
        ...         sizes=[2, 2],
        ...     )
        ...     return jnp.sum(clip)
        >>> float(jax.grad(total)(jnp.float32(5)))  # 2 frames times 2 times a past of 1, then of 2
        12.0

    Args:
        made: The clip.
        params: A tree of arrays; gradients are computed only for the leaves with respect to which is differentiated.
        past: The past of the first block that contributes to the gradient.
        inputs: Other inputs of the blocks, a tree of arrays; they get no gradient.
        share: (params, inputs) -> values shared by all blocks, which are computed, and differentiated, once.
        block: Computes a block again.
        following: Computes the past of the next block; no gradient flows through it.
        sizes: Frames of each block that contributes to the gradient.
        first: Index of the first of these blocks, and of its first frame; may be traced.
        read: params -> the same tree in the dtypes in which blocks read it, computed once; None for their own dtypes. A
            block's gradient has these dtypes; the sum has those of `params`.

    Returns:
        `made`.
    """

    @jax.custom_vjp
    def value(leaves: list[Array], made: Array, past: Any, inputs: Any, first: Any) -> Array:
        return made

    structure = jax.tree.structure(params)

    def join(moving: list[Any], fixed: list[Any]) -> Any:
        return structure.unflatten([b if a is None else a for a, b in zip(moving, fixed, strict=True)])

    def forward(leaves: list[Any], made: Any, past: Any, inputs: Any, first: Any) -> tuple[Array, Any]:
        moving = [leaf.value if leaf.perturbed else None for leaf in leaves]
        fixed = [None if leaf.perturbed else leaf.value for leaf in leaves]
        return made.value, (moving, fixed, jax.tree.map(lambda leaf: leaf.value, (past, inputs, first)))

    def backward(kept: Any, cotangent: Any) -> tuple[Any, ...]:
        moving, fixed, (past, inputs, (skipped, before)) = kept
        if isinstance(cotangent, SymbolicZero):
            return None, None, None, None, None
        zero = jax.tree.map(jnp.zeros_like, moving)
        if read is not None:
            rounded = jax.tree.leaves(read(join(moving, fixed)))
            moving = [None if leaf is None else own for leaf, own in zip(moving, rounded, strict=True)]
            fixed = [None if leaf is None else own for leaf, own in zip(fixed, rounded, strict=True)]
        shared, pull_shared = jax.vjp(lambda moving: share(join(moving, fixed), inputs), moving)

        def step(carry: Any, number: Array, frame: Array, size: int) -> tuple[Any, None]:
            past, total = carry
            number, frame = number + skipped, frame + before

            def own(shared: Any, moving: Any) -> Array:
                return block(join(moving, fixed), shared, past, inputs, number, frame, size)

            gradient = jax.vjp(own, shared, moving)[1](lax.dynamic_slice_in_dim(cotangent, frame, size, 1))
            past = following(join(moving, fixed), shared, past, inputs, number, frame, size)
            return (past, jax.tree.map(jnp.add, total, gradient)), None

        zero = (jax.tree.map(jnp.zeros_like, shared), zero)
        of_shared, of_moving = over_blocks(step, (past, zero), sizes)[0][1]
        return jax.tree.map(jnp.add, of_moving, pull_shared(of_shared)[0]), None, None, None, None

    value.defvjp(forward, backward, symbolic_zeros=True)
    return value(jax.tree.leaves(params), made, past, inputs, jax.tree.map(jnp.int32, first))
