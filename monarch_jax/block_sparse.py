"""Block-sparse attention: each block of queries attends to the blocks of keys in its list.

All sparse kinds of attention reduce to this once they have chosen keys: tokens in blocks, a list of key blocks per head
and query block and, for bands that cut through blocks, a predicate on tokens. One set of kernels serves them all.
`block_mask` has the lists, `block_sparse_xla` the definition; an implementation is a row of `_REGISTRY`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from monarch_jax import block_sparse_xla
from monarch_jax._typing import Array, Float
from monarch_jax.block_mask import BlockLists, BlockMask, apart, block_mask, is_even, kernel_sides
from monarch_jax.checks import array, brief, is_one_of, softmax_scale
from monarch_jax.contract import SAVED, Side, SparseProblem, SparseResiduals, vary_alike
from monarch_jax.devices import on_cuda
from monarch_jax.partitioning import anywhere, left_to_the_compiler

__all__ = ["IMPLEMENTATIONS", "BlockLists", "BlockMask", "block_mask", "block_sparse_attention", "choose"]

LEAST_SCALE = 1e-8  # kernels take scores that are masked for -1e30 before they are scaled

Attend = Callable[[SparseProblem, Array, Array, Array, BlockMask], Array]
Forward = Callable[[SparseProblem, Array, Array, Array, Side, Side], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class _Implementation:
    """One way to compute the operation.

    Attributes:
        supports: (problem, or None if the mask is not known, query, key) -> why it cannot run a call, or None.
        preferred: (problem or None, query) -> whether it is faster than the rows below it in `_REGISTRY`.
        attend: (problem, query, key, value, mask) -> output, differentiable.
    """

    supports: Callable[[SparseProblem | None, Any, Any], str | None]
    preferred: Callable[[SparseProblem | None, Any], bool]
    attend: Attend


@functools.cache  # the same functions in every call, so that JAX reuses what it has traced
def _mosaic() -> _Implementation:
    """The Mosaic kernel; its gradients are those of the Triton kernels, from the same residuals."""
    from monarchrt.pallas_kernels import block_sparse as mosaic
    from monarchrt.triton_kernels import block_sparse as triton

    def supports(problem: SparseProblem | None, query: Any, key: Any) -> str | None:
        reason = "nothing is known of the mask." if problem is None else mosaic.supports(problem, query, key)
        return reason or triton.supports(query, key)

    def preferred(problem: SparseProblem | None, query: Any) -> bool:
        return problem is not None and mosaic.preferred(problem, query)

    def forward(problem, q, k, v, of_queries, of_keys):
        del of_keys
        return mosaic.forward(problem, q, k, v, of_queries)

    return _Implementation(supports, preferred, _by_kernels(forward))


@functools.cache
def _triton() -> _Implementation:
    from monarchrt.triton_kernels import block_sparse as triton

    return _Implementation(
        lambda problem, query, key: triton.supports(query, key),
        lambda problem, query: True,
        _by_kernels(triton.forward),
    )


@functools.cache
def _xla() -> _Implementation:
    return _Implementation(lambda problem, query, key: None, lambda problem, query: True, block_sparse_xla.attend)


# in the order in which they are tried for implementation=None, with the least compute capability of the NVIDIA GPUs on
# which they are; None: anywhere
_REGISTRY: dict[str, tuple[int | None, Callable[[], _Implementation]]] = {
    "mosaic": (9, _mosaic),
    "triton": (8, _triton),
    "xla": (None, _xla),
}
IMPLEMENTATIONS = tuple(_REGISTRY)


def block_sparse_attention(
    query: Float[Array, "B Nq H D"],
    key: Float[Array, "B Nk H D"],
    value: Float[Array, "B Nk H D"],
    mask: BlockMask,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Nq H D"]:
    """Softmax attention of each block of queries to the blocks of keys in its list.

    Sparse attention such as SVG, Radial, STA, VSA and SLA reduces to this once it has chosen keys (MonarchRT compares
    with these in Section 5). Softmax and sums are in float32 for half precision. Differentiable in query, key and value
    in reverse mode; the mask has no gradient. Memory is linear in the number of tokens.

    Examples:
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
        >>> diagonal = block_mask(np.eye(2, dtype=bool)[None, None], query_starts=[0, 4, 8], key_starts=[0, 4, 8])
        >>> block_sparse_attention(q, k, v, diagonal).shape
        (1, 8, 2, 16)

    Args:
        query: [B, Nq, H, D], tokens in the order of the mask's blocks.
        key: [B, Nk, H, D], likewise.
        value: [B, Nk, H, D], in the order of `key`.
        mask: The keys that each query sees, made by `block_mask`.
        scale: Softmax scale from 1e-8, below which kernels would not tell hidden keys from others, to 1e6; default
            D**-0.5.
        implementation: "mosaic" (a kernel for Hopper GPUs and masks that are `even`; its gradients are those of
            "triton"), "triton" (kernels for NVIDIA GPUs from Ampere on), "xla" (the definition, block by block), or
            None: the fastest that supports the call on the default device.

    Returns:
        [B, Nq, H, D] in the inputs' dtype; zero for a query that sees no key.

    Raises:
        ValueError: If a shape, a dtype or an argument is invalid, or the mask is for other shapes.
        NotImplementedError: If the requested implementation does not support this call; the message says why.
    """
    query, key, value = (array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    _check(query, key, value, mask)
    factor = softmax_scale(scale, query.shape[-1])
    if factor <= 0:
        raise ValueError(f"scale={brief(scale)} is not a number above 0; leave it out for head_dim ** -0.5.")
    if factor < LEAST_SCALE:
        raise ValueError(
            f"scale={brief(scale)} is too small; use at least {LEAST_SCALE:g}, or multiply query by the rest."
        )
    chosen = choose(implementation, query, key, mask)
    run = functools.partial(_made(chosen).attend, _problem(mask, factor))
    given, with_arrays = apart(mask)

    def attend(query: Array, key: Array, value: Array, given: list[Array]) -> Array:
        return run(query, key, value, with_arrays(given))

    return left_to_the_compiler(attend, (query, key, value), given)


def choose(implementation: str | None, query: Any, key: Any, mask: BlockMask | None = None) -> str:
    """Selects the implementation of a call: the named one, or the fastest that supports the call; else "xla".

    Args:
        implementation: One of `IMPLEMENTATIONS`, or None.
        query: Has the shape [B, Nq, H, D] and the dtype of the queries.
        key: Has the shape [B, Nk, H, D] and the dtype of the keys.
        mask: The mask of the call; None if it is not known.

    Returns:
        The name of the implementation.

    Raises:
        ValueError: If the name is unknown.
        NotImplementedError: If the named one does not support the call; the message says why.
    """
    if implementation is not None and not is_one_of(implementation, IMPLEMENTATIONS):
        raise ValueError(f"implementation={brief(implementation)} is not None or one of {', '.join(IMPLEMENTATIONS)}.")
    query, key = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key))
    problem = None if mask is None else _problem(mask)
    if implementation is None:
        rows = ((name, make()) for name, (capability, make) in _REGISTRY.items() if _runs_on(capability))
        return next(
            name for name, row in rows if row.preferred(problem, query) and not row.supports(problem, query, key)
        )
    if reason := _made(implementation).supports(problem, query, key):
        raise NotImplementedError(f"implementation={implementation!r} cannot run this call: {reason}")
    return implementation


def _made(name: str) -> _Implementation:
    return _REGISTRY[name][1]()


def _runs_on(capability: int | None) -> bool:
    """Whether JAX runs by default where a row of `_REGISTRY` is a default."""
    return capability is None or on_cuda(capability=capability)


def _problem(mask: BlockMask, scale: float = 1.0) -> SparseProblem:
    """The static part of a call."""
    return SparseProblem(
        scale=scale, rows=mask.rows, columns=mask.columns, width=mask.width, sink=mask.sink, even=mask.even
    )


def _check(query: Array, key: Array, value: Array, mask: BlockMask) -> None:
    """Raises ValueError if shapes or dtypes are inconsistent."""
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask is a {type(mask).__name__}; it should be a BlockMask, made by block_mask.")
    for name, x in {"query": query, "key": key, "value": value}.items():
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; it should be [B, tokens, H, D], each at least 1.")
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype.name}, query {query.dtype.name}; use one dtype for all three.")
    batch, _, heads, dim = query.shape
    for name, x in {"key": key, "value": value}.items():
        if x.shape != (batch, key.shape[1], heads, dim):
            raise ValueError(f"{name} has shape {x.shape}; with query {query.shape} it should be [B, Nk, H, D].")
    for name, x, tokens in (("query_starts", mask.query_starts, query), ("key_starts", mask.key_starts, key)):
        ends = x[..., -1] if isinstance(x, np.ndarray) else np.asarray(tokens.shape[1])
        wrong = ends[(ends > tokens.shape[1]) | ((name == "query_starts") & (ends != tokens.shape[1]))]
        if wrong.size:
            raise ValueError(f"the mask's {name} end with {wrong[0]}; there are {tokens.shape[1]} tokens.")
    for name, x, size in (
        ("query_starts", mask.query_starts, mask.rows),
        ("key_starts", mask.key_starts, mask.columns),
    ):
        if mask.even and (mask.width is not None or (isinstance(x, np.ndarray) and not is_even(x, size))):
            raise ValueError(f"the mask says even=True, but it has a band, or blocks of {name} hold fewer than {size}.")
    for x in jax.tree.leaves(mask):
        if x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
            raise ValueError(
                f"the mask is for {x.shape[:2]} samples and heads; the call has {(batch, heads)}, or use 1."
            )
    for name, x, tokens in (("query_places", mask.query_places, query), ("key_places", mask.key_places, key)):
        if x is not None and x.shape[-1] != tokens.shape[1]:
            raise ValueError(f"the mask's {name} has {x.shape[-1]} places; there are {tokens.shape[1]} tokens.")


def _by_kernels(forward: Forward) -> Attend:
    """`block_sparse_attention` by kernels, with rules for vmap and for several devices, and Triton's gradients."""
    op = _differentiable(forward)

    def attend(problem: SparseProblem, query: Array, key: Array, value: Array, mask: BlockMask) -> Array:
        queries, keys = kernel_sides(mask, batch=query.shape[0], heads=query.shape[2])
        flat = vary_alike(query, key, value, *queries, *keys)
        return op(problem, *flat[:3], Side(*flat[3:9]), Side(*flat[9:]))

    return attend


def _differentiable(kernel: Forward) -> Any:
    """The kernels, differentiable, under vmap and on split operands."""
    from monarchrt.triton_kernels import block_sparse as triton

    queries, keys = ("bnhd", "bmhd", "bmhd"), ("bh1", "bh11", "bh11", "bh1", "bh1", "bh1")

    def forward(problem, q, k, v, of_queries, of_keys):
        def fn(q, k, v, *lists):
            return kernel(problem, q, k, v, Side(*lists[:6]), Side(*lists[6:]))

        return anywhere(fn, (*queries, *keys, *keys), ("bnhd", "bhn"))(q, k, v, *of_queries, *of_keys)

    def attend(problem, q, k, v, of_queries, of_keys):
        return forward(problem, q, k, v, of_queries, of_keys)[0]

    def fwd(problem, q, k, v, of_queries, of_keys):
        out, lse = (checkpoint_name(x, SAVED) for x in forward(problem, q, k, v, of_queries, of_keys))
        return out, SparseResiduals(q, k, v, out, lse, of_queries, of_keys)

    def bwd(problem, r, d_out):
        def fn(q, k, v, out, d_out, lse, *lists):
            return triton.vjp(problem, SparseResiduals(q, k, v, out, lse, Side(*lists[:6]), Side(*lists[6:])), d_out)

        axes = (*queries, "bnhd", "bnhd", "bhn", *keys, *keys)
        return *anywhere(fn, axes, queries)(r.q, r.k, r.v, r.out, d_out, r.lse, *r.queries, *r.keys), None, None

    op = jax.custom_vjp(attend, nondiff_argnums=(0,))
    op.defvjp(fwd, bwd)
    return op
