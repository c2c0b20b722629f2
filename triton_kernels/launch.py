"""Executes a plan with jax-triton: one step after the other, each writing its share of the results in place."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import jax_triton
from jax import lax

from monarchrt.triton_kernels import (
    left,
    overlapped,
    pixels,
    refine,
    refine_backward,
    refine_pairs,
    right,
    rows,
    sparse,
    streamed,
)
from monarchrt.triton_kernels.plan import Launch, Plan
from monarchrt.triton_kernels.removal import keep_kernels

keep_kernels()
KERNELS = {
    "forward": overlapped.forward,
    "streamed": streamed.streamed,
    "right_forward": right.right_forward,
    "left_refine": refine.left_refine,
    "left_last": refine.left_last,
    "left_backward": left.left_backward,
    "right_backward": right.right_backward,
    "right_query": right.right_query,
    "right_further": refine_backward.right_further,
    "right_further_backward": refine_backward.right_further_backward,
    "right_further_query": refine_backward.right_further_query,
    "left_refine_backward": refine_backward.left_refine_backward,
    "refine_pairs": refine_pairs.refine_pairs,
    "query_pairs": refine_pairs.query_pairs,
    "delta_pairs": refine_pairs.delta_pairs,
    "sparse_forward": sparse.sparse_forward,
    "sparse_query_backward": sparse.sparse_query_backward,
    "sparse_key_backward": sparse.sparse_key_backward,
    "sparse_key_scores": sparse.sparse_key_scores,
    "sparse_query_product": sparse.sparse_query_product,
    "norm_rotate_write": rows.norm_rotate_write,
    "gated_norm": rows.gated_norm,
    "channel_norm": pixels.channel_norm,
    "doubled_norm": pixels.doubled_norm,
    "normed_taps": pixels.normed_taps,
}
# enable_fp_fusion: Triton's default up to 3.9. ptx_version: XLA assembles with the ptxas it finds, with jax[cuda13]
# CUDA 13.0's at the oldest, while Triton would write for its own, which may be newer
OPTIONS = {"enable_fp_fusion": True, "ptx_version": 90}
UNROLLED = 16  # at most so many steps of the forward pass without a loop, which costs small kernels of its own


def run(
    plan: Plan,
    operands: dict[str, jax.Array | float],
    scratch: dict[str, jax.ShapeDtypeStruct],
    results: dict[str, jax.ShapeDtypeStruct],
    start: dict[str, jax.Array],
    kept: tuple[str, ...],
    compute_capability: int,
) -> dict[str, jax.Array]:
    """The results of a plan.

    Args:
        plan: What to run.
        operands: Arrays that are only read, and scalars.
        scratch: Shapes and dtypes of what one step hands from kernel to kernel.
        results: Shapes and dtypes of the results.
        start: Results that must not start from anything.
        kept: Scratch that lives from step to step.
        compute_capability: Compiled for.

    Returns:
        The results by name.
    """
    # XLA may pull slices of operands and stores into slices of results (of a loop, or of stacked layers) into a fusion
    # with a kernel, and forgets in it that kernels change arrays in place (jaxlib 0.11): keep slices apart from them
    arrays = {name: x for name, x in operands.items() if isinstance(x, jax.Array)}
    operands = operands | lax.optimization_barrier(arrays)
    shapes = scratch | results
    carried = (*results, *kept)

    def body(step, state, launches) -> dict:
        arrays = dict(operands, step=step, **state)
        for launch in launches:
            arrays |= call(launch, arrays, shapes, compute_capability)
        return {name: arrays[name] for name in carried}

    if len(plan.steps) <= UNROLLED and set(kept) >= set(scratch):  # a step needs the one before: no more memory at once
        state = start
        for n, step in enumerate(plan.steps):
            state = body(jnp.asarray(step, jnp.int32), state, plan.launches_of(n))
        return lax.optimization_barrier({name: state[name] for name in results})
    steps = jnp.asarray(plan.steps, jnp.int32)
    last = len(plan.steps) - 1
    first = body(steps[0], start, plan.launches_of(0))

    def turn(n, state, kind: int = 1) -> dict:
        # XLA unrolls a loop of one turn: the barrier keeps the scratch of two steps from living at once
        step, state = lax.optimization_barrier((steps[n], state))
        return body(step, state, plan.launches_of(kind))

    same = plan.launches_of(last) == plan.launches_of(1)
    state = lax.fori_loop(1, last + 1 if same else last, turn, first)
    if not same:
        state = turn(last, state, last)
    return lax.optimization_barrier({name: state[name] for name in results})


def call(launch: Launch, arrays: dict, shapes: dict, compute_capability: int) -> dict[str, jax.Array]:
    """What one launch writes, by name; `arrays` may hold more than it reads, `shapes` those of what it creates.

    Args:
        launch: The kernel, its grid and its constants.
        arrays: Operands by name; it may hold more than the kernel reads.
        shapes: Shapes and dtypes of what the kernel creates, by name.
        compute_capability: Architecture to compile for, such as 90.

    Returns:
        The arrays that the kernel writes, by name.

    Raises:
        ValueError: If the kernel's operands are not in the order in which jax-triton hands out buffers.
    """
    array = {name: launch.arrays.get(name, name) for name in parameters(launch.kernel)}
    names = [name for name in array if array[name] in arrays]
    held = [name for name in array if array[name] not in arrays or isinstance(arrays[array[name]], jax.Array)]
    created = [name not in names for name in held]
    if created != sorted(created):
        raise ValueError(f"{launch.kernel} has arrays after those that it creates; buffers come in another order.")
    # arrays that the kernel creates come before those that it changes: jax-triton hands out buffers in this order
    writes = sorted((x for x in array if x in launch.writes), key=lambda x: x in names)
    aliases = {names.index(name): n for n, name in enumerate(writes) if name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="input_output_aliases is deprecated")
        out = jax_triton.triton_call(
            kernel=KERNELS[launch.kernel],
            out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (shapes[array[name]] for name in writes)],
            grid=launch.grid,
            name=f"monarch_{launch.kernel}",
            num_warps=launch.warps,
            num_stages=launch.stages,
            compute_capability=compute_capability,
            backend_options=OPTIONS | ({"maxnreg": launch.registers} if launch.registers else {}),
            input_output_aliases=aliases,
            **{name: arrays[array[name]] for name in names},
            **launch.constants,
        )
    varying = frozenset().union(*(_axes(x) for x in arrays.values() if isinstance(x, jax.Array)))
    return {array[name]: _varying(x, varying) for name, x in zip(writes, out, strict=True)}


def _axes(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def _varying(x: jax.Array, axes: frozenset) -> jax.Array:
    """Marks a kernel's result as different on every device along the axes of `shard_map` that its operands vary on."""
    missing = tuple(axes - _axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


@functools.cache
def parameters(kernel: str) -> tuple[str, ...]:
    """Operands of a kernel in order: its parameters without the constants, which are in capitals."""
    return tuple(name for name in inspect.signature(KERNELS[kernel].fn).parameters if not name.isupper())
