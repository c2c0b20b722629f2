"""The operation: check, choose a backend, tokens -> tiles -> backend -> tokens."""

import dataclasses
from collections.abc import Mapping, Set

import jax
import jax.numpy as jnp
from jax.core import Tracer

from monarch_jax import reference
from monarch_jax._typing import Array, Float, Int
from monarch_jax.backends import choose
from monarch_jax.checks import array, brief, flag, index, positive, softmax_scale
from monarch_jax.contract import Problem
from monarch_jax.intermediates import check_intermediates
from monarch_jax.partitioning import split_like, whole_tokens
from monarch_jax.reference import MonarchFactors
from monarch_jax.spec import MonarchSpec
from monarch_jax.tiles import tiles_to_tokens, tokens_to_tiles, visible_tiles


def monarch_attention(
    query: Float[Array, "B Nq H D"],
    key: Float[Array, "B Nk H D"],
    value: Float[Array, "B Nk H D"],
    *,
    grid: tuple[int, int, int],
    tile: tuple[int, int, int] | None = None,
    blocks: str = "fh,w",
    num_iters: int = 1,
    scale: float | None = None,
    causal_block: int | None = None,
    kv_frames: int | Int[Array, ""] | None = None,
    keep_intermediates: bool = False,
    intermediates: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Nq H D"]:
    """Tiled MonarchAttention over the tokens of a video (MonarchRT, arXiv 2602.12271, Section 4).

    The attention map is a Monarch matrix in every pair of a query tile and a key tile, found in `num_iters`
    refinement steps; one softmax runs over all key tiles jointly, so the rows of the map sum to 1. Softmaxes and sums
    are in float32 for bfloat16 and float16 inputs. Differentiable in query, key and value in reverse mode (`jax.grad`);
    memory is linear in the number of frames in both directions. `tile=(1, 1, 1)` is dense softmax attention,
    `tile=grid` the untiled MonarchAttention.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4 * 6 * 8, 3, 16))  # [B, F*h*w, H, D] each
        >>> monarch_attention(q, k, v, grid=(4, 6, 8), tile=(2, 6, 8)).shape
        (2, 192, 3, 16)

    Args:
        query: [B, F_q*h*w, H, D], tokens in (frame, height, width) order, RoPE applied. A JAX or NumPy array; NumPy's
            float64 becomes float32 unless `jax_enable_x64` is set.
        key: [B, F_k*h*w, H, D]. F_k follows from its length.
        value: [B, F_k*h*w, H, D].
        grid: (F_q, h, w) of the query tokens.
        tile: (n_f, n_h, n_w), the frames, rows and columns of a tile; each divides the grid's size along that axis, and
            n_f also F_k. Default: (1, h, w).
        blocks: Dimensions that form a tile's rows and columns, one of "fh,w" (default), "w,fh", "f,hw", "hw,f", "fw,h",
            "h,fw" (Section 4.1).
        num_iters: Refinement steps T; 1 is what finetuned models use (Section 4.3).
        scale: Softmax scale, a Python number (not traced) of magnitude at most 1e6; default D**-0.5.
        causal_block: Frames per block of a block-causal mask: a query sees its own block and earlier ones. The
            queries are the last F_q of the (valid) key frames. Default None: bidirectional.
        kv_frames: Number of leading key frames that are valid, a multiple of n_f: an integer, or an int32 scalar that
            may be traced, so that one compiled program serves a KV cache at any fill level. Traced values are not
            checked. Default None: all frames.
        keep_intermediates: Trades memory for time in differentiated calls: "mosaic" keeps alpha, Y and c_L from the
            forward pass instead of recomputing them, 4*D bytes for every tile column of queries, tile row of keys and
            head (4.3 GB per call for 81 frames of 480p with tile (1, h, w), a third of that with (3, h, w)). Useful
            when residuals do not accumulate, as in a checkpointed layer. The other implementations always recompute
            them; results are the same.
        intermediates: Precision to which alpha and Y are rounded between the two stages: None for the inputs' dtype, or
            "e4m3" for 8 bits with one scale per vector [D] (`monarch_jax.intermediates`), which halves the memory
            traffic that limits the kernels. The error is 3 to 9 times that of bfloat16, so this is meant for inference.
            "mosaic" stores 8 bits, on Hopper only; "reference" and "xla" compute the same numbers without a speedup;
            "triton" does not support it, so on other GPUs `implementation=None` selects "xla". Gradients are computed
            by XLA at the rounded alpha and Y.
        implementation: "reference" (the definition in einsums), "xla" (chunked over query tiles), "triton", "mosaic",
            or None: the first of `monarch_jax.backends.automatic()` that supports the call.

    Returns:
        [B, F_q*h*w, H, D] in the inputs' dtype.

    Raises:
        ValueError: If a shape, a dtype or an argument is invalid, or they are inconsistent.
        NotImplementedError: If the requested implementation does not support this call; the message says why.
    """
    query, key, value = _arrays(query, key, value)
    spec = _check(query, key, value, grid, tile, blocks, num_iters, causal_block)
    keep = flag("keep_intermediates", keep_intermediates)
    if kv_frames is not None:
        kv_frames = index("kv_frames", kv_frames)
        if not isinstance(kv_frames, Tracer):
            kept = _with_frames(spec, int(kv_frames))
            if isinstance(kv_frames, int):  # a static number: slice now instead of masking in the program
                spec, key, value, kv_frames = kept, key[:, : kept.key_tokens], value[:, : kept.key_tokens], None
    q, k, v = (tokens_to_tiles(x, spec) for x in whole_tokens(query, key, value))
    options = {"scale": scale, "keep": keep, "intermediates": intermediates, "implementation": implementation}
    out = tiles_to_tokens(attend_tiles(spec, q, k, v, kv_frames=kv_frames, **options), spec)
    return split_like(out, query)


def monarch_attention_1d(
    query: Float[Array, "B Nq H D"],
    key: Float[Array, "B Nk H D"],
    value: Float[Array, "B Nk H D"],
    *,
    block_sizes: tuple[int, int],
    num_iters: int = 1,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Nq H D"]:
    """MonarchAttention over a sequence with arbitrary block sizes (Yaras et al. 2025; MonarchRT, Section 2.1).

    Token n is in row n // b2 and column n % b2. With b1*b2 equal to the sequence this is the original, untiled form;
    when b1*b2 divides it, tiles are runs of b1*b2 tokens. On a video's tokens, block sizes that cut across
    (F, h, w) give the misaligned factorization of the paper's Figure 7.

    Examples:
        >>> import jax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 24, 2, 16))
        >>> monarch_attention_1d(q, k, v, block_sizes=(4, 6)).shape
        (1, 24, 2, 16)

    Args:
        query: [B, N_q, H, D].
        key: [B, N_k, H, D].
        value: [B, N_k, H, D].
        block_sizes: (b1, b2); b1*b2 divides N_q and N_k.
        num_iters: Refinement steps T.
        scale: Softmax scale; default D**-0.5.
        implementation: As in `monarch_attention`.

    Returns:
        [B, N_q, H, D] in the inputs' dtype.

    Raises:
        ValueError: If a shape, a dtype or an argument is invalid, or `block_sizes` do not divide the sequence.
        NotImplementedError: If the requested implementation does not support this call.
    """
    query, key, value = _arrays(query, key, value)
    try:
        if isinstance(block_sizes, Set | Mapping):
            raise TypeError("no order")
        b1, b2 = (positive("block_sizes", n) for n in block_sizes)
    except (TypeError, ValueError):
        raise ValueError(f"block_sizes={brief(block_sizes)} is not two positive integers (b1, b2).") from None
    for name, x in (("query", query), ("key", key)):
        if x.shape[1] % (b1 * b2) or not x.shape[1]:
            raise ValueError(
                f"block_sizes={b1, b2}: {b1 * b2} tokens per tile do not divide the {x.shape[1]} of {name}."
            )
    return monarch_attention(
        query,
        key,
        value,
        grid=(query.shape[1] // (b1 * b2), b1, b2),
        num_iters=num_iters,
        scale=scale,
        implementation=implementation,
    )


def monarch_factors(
    query: Float[Array, "B Nq H D"],
    key: Float[Array, "B Nk H D"],
    *,
    grid: tuple[int, int, int],
    tile: tuple[int, int, int] | None = None,
    blocks: str = "fh,w",
    num_iters: int = 1,
    scale: float | None = None,
    causal_block: int | None = None,
) -> MonarchFactors:
    """The factors L and R and the attention map they imply, for analysis of small inputs (Section 2.1, Figure 7).

    The map has B*H*N_q*N_k entries: a few thousand tokens at most.

    Examples:
        >>> import jax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 24, 2, 16))
        >>> attention = monarch_factors(q, k, grid=(2, 3, 4)).attention
        >>> attention.shape, round(float(attention.sum(-1).max()), 5)
        ((1, 2, 24, 24), 1.0)

    Args:
        query: [B, F_q*h*w, H, D].
        key: [B, F_k*h*w, H, D].
        grid: As in `monarch_attention`, like the remaining arguments.
        tile: (n_f, n_h, n_w).
        blocks: Layout.
        num_iters: Refinement steps T.
        scale: Softmax scale; default D**-0.5.
        causal_block: Frames per causal block.

    Returns:
        `MonarchFactors` with left, right and attention.

    Raises:
        ValueError: As `monarch_attention`.
    """
    query, key, _ = _arrays(query, key, key)
    spec = _check(query, key, key, grid, tile, blocks, num_iters, causal_block)
    q, k = (tokens_to_tiles(x, spec) for x in whole_tokens(query, key))
    problem = _problem(spec, query.shape[-1], scale, None)
    left, right = reference.factors(problem, q, k, visible_tiles(spec))
    entries = jnp.einsum("bhajick,bhackjl->bhaijckl", left, right)
    batch, heads = entries.shape[:2]
    rows = entries.reshape(batch * heads, *entries.shape[2:5], spec.key_tokens)
    rows = tiles_to_tokens(rows, spec)  # [B*H, N_q, N_k in tiled order]
    columns = rows.transpose(0, 2, 1).reshape(batch * heads, *entries.shape[5:], spec.query_tokens)
    attention = tiles_to_tokens(columns, spec).transpose(0, 2, 1)
    return MonarchFactors(left, right, attention.reshape(batch, heads, spec.query_tokens, spec.key_tokens))


def attend_tiles(
    spec: MonarchSpec,
    q: Float[Array, "B A b1 b2 H D"],
    k: Float[Array, "B C b1 b2 H D"],
    v: Float[Array, "B C b1 b2 H D"],
    *,
    kv_frames: int | Int[Array, ""] | None,
    scale: float | None,
    implementation: str | None,
    grad_tiles: int | None = None,
    keep: bool = False,
    intermediates: str | None = None,
) -> Float[Array, "B A b1 b2 H D"]:
    """`monarch_attention` of arrays that are already in tiles, as in a KV cache.

    Args:
        spec: The attention; shapes must match it and are not checked.
        q: [B, A, b1, b2, H, D], query tiles.
        k: [B, C, b1, b2, H, D], key tiles.
        v: As `k`.
        kv_frames: As in `monarch_attention`.
        scale: As in `monarch_attention`.
        implementation: As in `monarch_attention`.
        grad_tiles: As in `Problem`.
        keep: `keep_intermediates` of `monarch_attention`.
        intermediates: As in `monarch_attention`.

    Returns:
        [B, A, b1, b2, H, D] in the dtype of `q`.

    Raises:
        ValueError: If scale, intermediates or the implementation's name are invalid.
        NotImplementedError: If the requested implementation does not support this call.
    """
    check_intermediates(intermediates)
    changes = {"grad_tiles": grad_tiles, "keep": keep, "intermediates": intermediates}
    problem = dataclasses.replace(_problem(spec, q.shape[-1], scale, kv_frames), **changes)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)]
    return choose(implementation, problem, *shapes).attend(problem, q, k, v, visible_tiles(spec, kv_frames))


def _problem(spec: MonarchSpec, head_dim: int, scale: float | None, kv_frames) -> Problem:
    masked = kv_frames is not None or min(spec.visible_tiles()) < spec.key_tiles
    return Problem(scale=softmax_scale(scale, head_dim), num_iters=spec.num_iters, masked=masked)


def _with_frames(spec: MonarchSpec, frames: int) -> MonarchSpec:
    """The spec restricted to the leading `frames` of the keys; raises ValueError if they are not whole tiles."""
    n_f, total = spec.tile_shape[0], spec.total_key_frames
    if not 0 < frames <= total or frames % n_f:
        raise ValueError(
            f"kv_frames={frames} is not a multiple of the tile's {n_f} frames from {n_f} to {total}, the frames of key."
        )
    return dataclasses.replace(spec, key_frames=frames)


def _arrays(query, key, value) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = array("query", query), array("key", key), array("value", value)
    for name, x in {"query": query, "key": key, "value": value}.items():
        if x.ndim != 4 or any(n < 1 for n in (x.shape[0], *x.shape[2:])):
            raise ValueError(
                f"{name} has shape {x.shape}; it should be [batch, tokens, heads, head_dim], each at least 1."
            )
        if x.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {x.dtype.name}, query has {query.dtype.name}; cast them to one dtype.")
        for axis, what in ((0, "batch"), (2, "heads"), (3, "head_dim")):
            if x.shape[axis] != query.shape[axis]:
                raise ValueError(
                    f"{name} has {what} {x.shape[axis]} (shape {x.shape}), query has {query.shape[axis]} "
                    f"(shape {query.shape}); they should be equal."
                )
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}, key has {key.shape}; they should be equal.")
    return query, key, value


def _check(query, key, value, grid, tile, blocks, num_iters, causal_block) -> MonarchSpec:
    frames, height, width = spec_grid = MonarchSpec(grid=grid, tile=(1, 1, 1)).grid
    if query.shape[1] != frames * height * width:
        raise ValueError(
            f"query has {query.shape[1]} tokens, grid={spec_grid} has {frames}*{height}*{width} = "
            f"{frames * height * width}; pass the grid of the query tokens."
        )
    if key.shape[1] % (height * width) or not key.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} tokens, not a multiple of {height * width} = {height}*{width}, "
            f"the tokens of a frame in grid={spec_grid}."
        )
    return MonarchSpec(
        grid=spec_grid,
        key_frames=key.shape[1] // (height * width),
        tile=tile,
        blocks=blocks,
        num_iters=num_iters,
        causal_block=causal_block,
    )
