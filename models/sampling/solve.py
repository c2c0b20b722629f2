"""Running a sampler: pure functions over pytrees of latents, for use under `jit`."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from monarchrt.models.attention.base import Steps
from monarchrt.models.sampling.tables import SamplerTable

type Flow = Callable[..., Any]
"""(latents, timestep as a float32 scalar) -> flow, noise minus data, with the structure of the latents; some also take
the index of the step as a third argument."""


class SolverState(NamedTuple):
    """The state of a solver: x, the last corrected x, and the last two predictions of the data."""

    x: Any
    corrected: Any
    data: Any
    older: Any

    @classmethod
    def init(cls, noise: Any) -> "SolverState":
        """The state before the first step."""
        zeros = jax.tree.map(jnp.zeros_like, noise)
        return cls(noise, zeros, zeros, zeros)


class Rows(NamedTuple):
    """A `SamplerTable` in float32 on the device, or one row of it."""

    sigmas: Array
    timesteps: Array
    correct: Array
    predict: Array


def rows(table: SamplerTable) -> Rows:
    """The table as arrays to scan over."""
    return Rows(*(jnp.asarray(column, jnp.float32) for column in table))


def _combine(weights: Array, *trees: Any) -> Any:
    def combine(*leaves: Array) -> Array:
        total = sum(weight * leaf.astype(jnp.float32) for weight, leaf in zip(weights, leaves, strict=True))
        return jnp.asarray(total, leaves[0].dtype)

    return jax.tree.map(combine, *trees)


def solver_step(state: SolverState, row: Rows, flow: Any, noise: Any = None) -> SolverState:
    """One step, given the flow at `state.x`.

    Args:
        state: The state before the step.
        row: One row of the table, from `rows`.
        flow: The network's prediction, with the structure of `state.x`.
        noise: Fresh unit Gaussian noise, for stochastic samplers.

    Returns:
        The state after the step, with `x` at the next noise level.
    """
    x, corrected, data, older = state
    predicted = jax.tree.map(lambda x, v: (x.astype(jnp.float32) - row.sigmas * v).astype(x.dtype), x, flow)
    corrected = _combine(row.correct, x, corrected, predicted, data, older)
    terms = (corrected, predicted, data)
    following = _combine(row.predict, *terms, noise) if noise is not None else _combine(row.predict[:3], *terms)
    return SolverState(following, corrected, predicted, data)


def sample(
    flow: Flow,
    noise: Any,
    table: SamplerTable,
    *,
    key: Key[Array, ""] | None = None,
    fresh: Any = None,
    numbered: bool = False,
) -> Any:
    """Runs a sampler from noise to data in one `lax.scan`, so that the network is traced once.

    Examples:
        >>> from monarchrt.models.sampling import sampler_table
        >>> to_three = lambda x, t: jax.tree.map(lambda x: (x - 3.0) / (t / 1000), x)  # the flow if all data is 3
        >>> float(sample(to_three, jnp.array(0.7), sampler_table("euler", steps=5)))
        3.0

    Args:
        flow: The network with its text, as returned by `guided` or `keep_context`.
        noise: Unit Gaussian noise, an array or a pytree of arrays.
        table: The sampler, for example `sampler_table("unipc", steps=50, shift=8.0)`.
        key: Key for the fresh noise of a stochastic sampler.
        fresh: This noise itself, with the structure of `noise` and a leading axis of steps, instead of a key.
        numbered: Whether the flow takes the index of the step as a third argument.

    Returns:
        Latents with the structure and dtype of `noise`.

    Raises:
        ValueError: If the sampler is stochastic and neither key nor noise is given.
    """
    if table.stochastic and key is None and fresh is None:
        raise ValueError("key is None, but this sampler adds fresh noise at each step; give a jax.random.key.")
    draw = None
    if key is not None and fresh is None and table.stochastic:
        draw = fresh_noise(key, noise)

    def step(state: SolverState, xs: tuple) -> tuple[SolverState, None]:
        row, number, added = xs
        where = (number,) if numbered else ()
        added = added if draw is None else draw(number)
        return solver_step(state, row, flow(state.x, row.timesteps, *where), added), None

    return jax.lax.scan(step, SolverState.init(noise), (rows(table), jnp.arange(table.steps), fresh))[0].x


def fresh_noise(key: Key[Array, ""], like: Any) -> Callable[[Array | int], Any]:
    """A function from the index of a step to the noise that it adds, with the structure of `like`."""
    leaves, structure = jax.tree.flatten(like)

    def draw(number: Array | int) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, number), len(leaves))
        drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        # a barrier, so that fusion with its use does not change the rounding
        return jax.lax.optimization_barrier(jax.tree.unflatten(structure, drawn))

    return draw


def guided(
    model: Callable[..., Array],
    text: Float[Array, "B L E"],
    negative: Float[Array, "B M E"] | None = None,
    *,
    guidance: float = 1.0,
) -> Flow:
    """The flow of a network with text, by classifier-free guidance if there is a negative text.

    v = v_negative + g (v_text - v_negative) (Ho and Salimans 2022, arXiv:2207.12598), both in one batch of 2B.

    Examples:
        >>> model = lambda x, t, text: text[..., None] + 0 * x
        >>> flow = guided(model, jnp.full((1, 1, 1), 2.0), jnp.ones((1, 1, 1)), guidance=5.0)
        >>> float(flow(jnp.zeros((1, 1, 1, 1)), jnp.float32(0))[0, 0, 0, 0])
        6.0

    Args:
        model: (latents [B, ...], timesteps [B], text) -> flow.
        text: Embedding of the prompt.
        negative: Embedding of the negative prompt; None: no guidance.
        guidance: g; 1 is no guidance.

    Returns:
        (latents, timestep) -> flow, with the index of the step as an optional third argument; see `flow_at`.
    """
    both = None if negative is None or guidance == 1.0 else paired(text, negative)

    def flow(x: Array, t: Array, number: Any = None) -> Array:
        if both is None:
            return flow_at(model, x, jnp.broadcast_to(t, x.shape[:1]), text, step=number)
        pair = flow_at(model, paired(x, x), jnp.broadcast_to(t, (2 * x.shape[0],)), both, step=number)
        return unpair(pair, guidance)

    return flow


def flow_at(model: Callable[..., Array], x: Array, timesteps: Array, text: Array, *, step: Steps) -> Array:
    """The flow of a network at a step of a sampler, on whose index the attention may depend.

    Examples:
        >>> x, t, text = jnp.ones((1, 1)), jnp.full(1, 500.0), jnp.zeros((1, 2, 3))
        >>> flow_at(lambda x, t, text, step=None: x + step, x, t, text, step=2)
        Array([[3.]], dtype=float32)
        >>> flow_at(lambda x, t, text: x, x, t, text, step=2)
        Array([[1.]], dtype=float32)

    Args:
        model: (latents, timesteps, text) -> flow; called with the index as `step` if it has this argument.
        x: Latents, [B, ...].
        timesteps: [B], or [B, frames].
        text: Embedding of the prompt.
        step: Index of the call within the sampler, which may be traced, or one per sample or frame; None without a
            sampler.

    Returns:
        The flow.
    """
    takes_step = step is not None and "step" in inspect.signature(model).parameters
    return model(x, timesteps, text, **({"step": step} if takes_step else {}))


def paired(text: Array, negative: Array) -> Array:
    """Concatenates both texts along the batch, the conditional first; the shorter is padded with zero rows.

    Examples:
        >>> paired(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 3))).shape
        (2, 4, 3)
    """
    length = max(text.shape[1], negative.shape[1])
    pad = [[(0, 0), (0, length - part.shape[1]), *[(0, 0)] * (part.ndim - 2)] for part in (text, negative)]
    return jnp.concatenate([jnp.pad(text, pad[0]), jnp.pad(negative, pad[1])])


def unpair(flow: Array, guidance: float) -> Array:
    """The guided flow from the flow of a `paired` batch; see `guided`."""
    conditional, unconditional = jnp.split(flow, 2)
    return unconditional + guidance * (conditional - unconditional)


def keep_context(
    model: Callable[..., Array], context: Float[Array, "B K H W C"], *, timestep: float = 0.0
) -> Callable[..., Array]:
    """A network that sees new frames after given ones, for networks trained with a noise level per frame.

    The context is clean (diffusion forcing, Chen et al. 2024, arXiv:2407.01392).

    Examples:
        >>> model = lambda x, t, text: x * t[:, :, None, None, None]
        >>> continued = keep_context(model, jnp.ones((1, 1, 2, 2, 3)))
        >>> continued(jnp.ones((1, 3, 2, 2, 3)), jnp.array([7.0]), jnp.zeros((1, 2, 3))).shape
        (1, 3, 2, 2, 3)

    Args:
        model: (latents [B, F, H, W, C], timesteps [B, F], text) -> flow.
        context: Finished latents at the start, with the batch size or, for guidance, half of it.
        timestep: Timestep given to the network for the context.

    Returns:
        (latents of the new frames, timesteps [B], text, step=None) -> their flow.
    """

    def continued(x: Array, t: Array, text: Any, *, step: Any = None) -> Array:
        first = jnp.tile(context, (x.shape[0] // context.shape[0], 1, 1, 1, 1))
        kept, new = first.shape[1], x.shape[:2]
        times = jnp.concatenate([jnp.full(first.shape[:2], timestep), jnp.broadcast_to(t[:, None], new)], axis=1)
        return flow_at(model, jnp.concatenate([first, x], axis=1), times, text, step=step)[:, kept:]

    return continued
