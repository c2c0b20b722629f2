"""Forward and backward on arrays of tiles: configs, plan, launch."""

import jax
import jax.numpy as jnp

from monarchrt.triton_kernels import launch, plan
from monarchrt.triton_kernels.config import Configs, Target, configs, target
from monarchrt.triton_kernels.plan import Shape


def forward(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, *, num_iters: int = 1
) -> tuple[jax.Array, jax.Array]:
    """out [B, A, b1, b2, H, D] and lse float32 [B, A, b1, b2, H]; shapes as in `triton_kernels.forward`.

    Args:
        scale: Softmax scale.
        q: Queries [B, A, b1, b2, H, D].
        k: Keys [B, C, b1, b2, H, D].
        v: Values, like the keys.
        visible: Key tiles that each query tile sees, int32 [A].
        num_iters: Refinement steps.

    Returns:
        The output, like the queries, and the log-sum-exp of the last step.
    """
    shape, where = _shape(q, k), target()
    chosen, precision = _configs(shape, where), _precision(q)
    todo = (
        plan.forward(shape, chosen, precision) if num_iters == 1 else plan.refined(shape, chosen, precision, num_iters)
    )
    results = {"out": q, "lse": jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)}
    operands = {"visible": _clip(visible, k), "q": q, "k": k, "v": v, "scale": scale}
    scratch = _scratch(shape, todo, q, backward=False)
    start = {}
    if todo.stream:
        start = {"counters": jnp.zeros(plan.counters(shape, todo.stream), jnp.int32)}
        results["counters"] = start["counters"]
    kept = ("mid", "stats")
    arrays = launch.run(todo, operands, scratch, _structs(results), start, kept, where.compute_capability)
    return arrays["out"], arrays["lse"]


def backward(
    scale: float,
    grad_tiles: int | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    visible: jax.Array,
    *,
    num_iters: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv; lse of the last step and delta = <d_out, out> are float32 [B, A, b1, b2, H].

    Args:
        scale: Softmax scale.
        grad_tiles: Newest key tiles that get gradients; None: all.
        q: Queries [B, A, b1, b2, H, D].
        k: Keys [B, C, b1, b2, H, D].
        v: Values, like the keys.
        d_out: Cotangent of the output, like the queries.
        lse: Log-sum-exp of the last step.
        delta: Sums over channels of the output times its cotangent.
        visible: Key tiles that each query tile sees, int32 [A].
        num_iters: Refinement steps.

    Returns:
        Gradients of queries, keys and values.
    """
    shape, where = _shape(q, k), target()
    chosen, precision = _configs(shape, where), _precision(q)
    if num_iters == 1:
        todo = plan.backward(shape, chosen, precision, grad_tiles)
    else:
        todo = plan.refined_backward(shape, chosen, precision, grad_tiles, num_iters)
    visible = _clip(visible, k)
    first_tile = jnp.zeros((), jnp.int32)
    if grad_tiles is not None:
        first_tile = jnp.max(visible) - jnp.int32(min(grad_tiles, k.shape[1]))
    dtype = jnp.float32 if todo.summed else k.dtype
    key_grad = jax.ShapeDtypeStruct(k.shape, dtype)
    start = {}
    if todo.summed or grad_tiles is not None:  # what no program writes, or what all add to
        start = {name: jnp.zeros(k.shape, dtype) for name in ("dk", "dv")}
    operands = {
        "visible": visible,
        "first_tile": first_tile.reshape(1),
        "q": q,
        "k": k,
        "v": v,
        "d_out": d_out,
        "lse": lse,
        "delta": delta,
        "scale": scale,
    }
    results = _structs({"dq": q, "dk": key_grad, "dv": key_grad})
    scratch = _scratch(shape, todo, q, backward=True)
    arrays = launch.run(todo, operands, scratch, results, start, (), where.compute_capability)
    return arrays["dq"], arrays["dk"].astype(k.dtype), arrays["dv"].astype(k.dtype)


def _shape(q: jax.Array, k: jax.Array) -> Shape:
    batch, query_tiles, b1, b2, heads, dim = q.shape
    return Shape(
        batch=batch,
        query_tiles=query_tiles,
        key_tiles=k.shape[1],
        b1=b1,
        b2=b2,
        heads=heads,
        dim=dim,
        itemsize=q.dtype.itemsize,
    )


def _configs(shape: Shape, where: Target) -> Configs:
    few = shape.query_tiles < shape.key_tiles
    return configs(where, b1=shape.b1, b2=shape.b2, dim=shape.dim, itemsize=shape.itemsize, few=few)


def _precision(q: jax.Array) -> str:
    return "tf32x3" if q.dtype == jnp.float32 else "ieee"


def _clip(visible: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.minimum(visible.astype(jnp.int32), k.shape[1])


def _scratch(shape: Shape, todo: plan.Plan, q: jax.Array, *, backward: bool) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = plan.scratch_shapes(shape, todo, backward=backward)
    return {
        name: jax.ShapeDtypeStruct(size, q.dtype if name.startswith("mid") else jnp.float32)
        for name, size in shapes.items()
    }


def _structs(arrays: dict) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
