"""Distribution matching: the direction that makes samples of a student more likely to be a teacher's.

DMD2 (Yin et al. 2024, arXiv:2405.14867) as Self-Forcing (arXiv:2506.08009) and MonarchRT (arXiv:2602.12271, Section 5)
use it. A critic follows the student's own samples; where critic and teacher denoise a noised sample differently, the
student moves towards the teacher:

    x_t = (1 - sigma) x + sigma eps,   x_f, x_r = x_t - sigma' v, of the critic and of the guided teacher
    g = (x_f - x_r) / mean |x - x_r|,   the gradient of the student's loss with respect to x is g / numel
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Key

from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS, shifted
from monarchrt.train.objectives.base import Metrics
from monarchrt.train.objectives.flow import add_noise
from monarchrt.train.watch import Check

Velocity = Callable[[Array, Array, Array], Array]
BINS = 5  # of the noise level, for the critic's loss
SATURATED = 4.0  # latents beyond it are counted


class ScoreDraws(NamedTuple):
    """Where samples are compared: index of a time 0...999 for each sample, and noise."""

    time: Int[Array, "b"]
    noise: Float32[Array, "b f h w c"]


def draw_scores(key: Key[Array, ""], shape: tuple[int, ...]) -> ScoreDraws:
    """One time for each sample, uniform before the shift, and noise of the latents' shape."""
    time_key, noise_key = jax.random.split(key)
    time = jax.random.randint(time_key, shape[:1], 0, NUM_TRAIN_TIMESTEPS)
    return ScoreDraws(time, jax.random.normal(noise_key, shape, jnp.float32))


class Levels(NamedTuple):
    """Times [B] that networks are told, the noise levels that samples are mixed at, and those that turn v into x."""

    timesteps: Float32[Array, "b"]
    mixed: Float32[Array, "b"]
    converted: Float32[Array, "b"]


def levels_of(
    time: Int[Array, "b"], *, shift: float, low: float = 0.02, high: float = 0.98, conversion: str = "clean"
) -> Levels:
    """Times and noise levels of drawn indices.

    Args:
        time: 0...999.
        shift: Shift of the times.
        low: Least time, as a share of 1000.
        high: Largest time.
        conversion: "clean": sigma = t / 1000 throughout. "grid": the nearest level of the grid of 1000, shift 5.
            "published": samples are mixed at the nearest level of that grid, and v is turned into data with the nearest
            of the grid of shift 8, as the published code does.

    Returns:
        The levels, float32.

    Examples:
        >>> levels = levels_of(jnp.array([0, 500]), shift=5.0)
        >>> [round(t, 1) for t in levels.timesteps.tolist()]
        [20.0, 833.3]
    """
    u = jnp.asarray(time, jnp.float32) / NUM_TRAIN_TIMESTEPS
    t = jnp.clip(NUM_TRAIN_TIMESTEPS * shift * u / (1 + (shift - 1) * u), 1000 * low, 1000 * high)
    if conversion == "clean":
        sigma = t / NUM_TRAIN_TIMESTEPS
        return Levels(t, sigma, sigma)
    mixed = nearest_level(t, shift=5.0)
    return Levels(t, mixed, nearest_level(t, shift=8.0) if conversion == "published" else mixed)


def nearest_level(timesteps: Float32[Array, "*n"], *, shift: float) -> Float32[Array, "*n"]:
    """The level of the grid u = 1, 0.999, ... 0.001, shifted, whose time is nearest; the higher of two as near."""
    grid = shifted(np.arange(NUM_TRAIN_TIMESTEPS, 0, -1) / NUM_TRAIN_TIMESTEPS, shift).astype(np.float32)
    times = jnp.asarray(grid * NUM_TRAIN_TIMESTEPS).reshape(*[1] * timesteps.ndim, -1)
    index = jnp.argmin(jnp.abs(times - timesteps[..., None]), axis=-1)
    return jnp.asarray(grid)[index]


def detached(network: Any) -> Any:
    """The network with parameters that nothing is differentiated by."""
    graph, state = nnx.split(network)
    return nnx.merge(graph, jax.tree.map(lax.stop_gradient, state))


def to_data(x: Float[Array, "b f h w c"], flow: Float[Array, "b f h w c"], sigma: Float[Array, "b"]) -> Array:
    """The data that a flow prediction means: x - sigma v, float32."""
    return x.astype(jnp.float32) - over(sigma, x) * flow.astype(jnp.float32)


def over(per_sample: Float[Array, "b"], x: Array) -> Array:
    """A number for each sample, shaped to multiply x with."""
    return per_sample.reshape(-1, *[1] * (x.ndim - 1))


def matching_gradient(
    x: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    negative: Float[Array, "b m d"] | None,
    *,
    critic: Velocity,
    teacher: Velocity,
    guidance: float,
    levels: Levels,
    noise: Float[Array, "b f h w c"],
) -> tuple[Float32[Array, "b f h w c"], Metrics]:
    """The direction g in which samples become less likely to the teacher, and what to log of it.

    Args:
        x: The student's samples; nothing is differentiated by them.
        text: Embeddings of their prompts.
        negative: Embeddings of the negative prompt; None: the teacher is not guided.
        critic: Flow prediction of the student's samples.
        teacher: Flow prediction of the data.
        guidance: Weight w of the teacher's guidance: x_c + w (x_c - x_u).
        levels: Of `levels_of`.
        noise: Unit Gaussian noise.

    Returns:
        g, float32, of x's shape; and scalars. What is not finite in g is set to zero and counted.
    """
    x = lax.stop_gradient(x.astype(jnp.float32))
    mixed = add_noise(x, noise, levels.mixed)

    def data_of(velocity: Velocity, text: Array) -> Array:
        return to_data(mixed, velocity(mixed, levels.timesteps, text), levels.converted)

    fake, real = data_of(critic, text), data_of(teacher, text)
    if negative is not None:
        real = real + guidance * (real - data_of(teacher, negative))
    fake, real = lax.stop_gradient((fake, real))
    axes = tuple(range(1, x.ndim))
    normalizer = jnp.mean(jnp.abs(x - real), axis=axes)
    g = (fake - real) / over(normalizer, x)
    finite = jnp.isfinite(g)
    g = jnp.where(finite, g, 0.0)
    return g, {
        "mean_abs_g": jnp.mean(jnp.abs(g)),
        "mean_abs_difference": jnp.mean(jnp.abs(fake - real)),
        "least_normalizer": jnp.min(normalizer),
        "replaced": jnp.mean(~finite),
    }


def matching_loss(x: Float[Array, "b f h w c"], g: Float[Array, "b f h w c"]) -> Float32[Array, ""]:
    """Half the mean of g^2, whose gradient with respect to x is g / numel.

    Examples:
        >>> x, g = jnp.ones((1, 1, 1, 1, 4)), jnp.full((1, 1, 1, 1, 4), 2.0)
        >>> float(matching_loss(x, g)), jax.grad(matching_loss)(x, g).ravel().tolist()
        (2.0, [0.5, 0.5, 0.5, 0.5])
    """
    x = x.astype(jnp.float32)
    return 0.5 * jnp.mean(jnp.square(x - lax.stop_gradient(x - g)))


def critic_loss(
    x: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    *,
    critic: Velocity,
    levels: Levels,
    noise: Float[Array, "b f h w c"],
) -> tuple[Float32[Array, ""], Metrics]:
    """The flow loss of the critic on the student's samples, with no weights, and its mean in bins of the time.

    Returns:
        mean (v - (eps - x))^2, where v is the prediction, scaled by sigma'/sigma if the two differ; bins without a
        sample are NaN.
    """
    x = lax.stop_gradient(x.astype(jnp.float32))
    predicted = critic(add_noise(x, noise, levels.mixed), levels.timesteps, text).astype(jnp.float32)
    predicted = predicted * over(levels.converted / levels.mixed, x)
    errors = jnp.mean(jnp.square(predicted - (noise - x)), axis=tuple(range(1, x.ndim)))
    return jnp.mean(errors), in_bins(errors, levels.timesteps)


def in_bins(errors: Float[Array, "b"], timesteps: Float[Array, "b"]) -> Metrics:
    """Means of errors in bins of the time; bins without a sample are NaN.

    Examples:
        >>> {name: float(mean) for name, mean in in_bins(jnp.array([1.0, 3.0]), jnp.array([10.0, 190.0])).items()}
        {'loss_at_0': 2.0, 'loss_at_200': nan, 'loss_at_400': nan, 'loss_at_600': nan, 'loss_at_800': nan}
    """
    place = jnp.clip((timesteps / NUM_TRAIN_TIMESTEPS * BINS).astype(jnp.int32), 0, BINS - 1)
    return {
        f"loss_at_{low * 1000 // BINS}": jnp.sum(jnp.where(place == low, errors, 0.0)) / jnp.sum(place == low)
        for low in range(BINS)
    }


def sample_metrics(x: Float[Array, "b f h w c"], *, block: int | None = None) -> Metrics:
    """What collapses show first: spread, detail, drift and stripes towards the last frames, motion, saturation.

    Args:
        x: Samples.
        block: Frames that are compared at either end; None: a quarter of them, at least one.

    Returns:
        std of all latents; mean std within frames (0 is a solid colour); std of the last frames less that of the first;
        how many times rougher the last frames are; mean |difference of neighbouring frames|; share of latents beyond 4.
    """
    x = lax.stop_gradient(x.astype(jnp.float32))
    count = block or max(1, x.shape[1] // 4)
    first, last = x[:, :count], x[:, -count:]
    motion = jnp.mean(jnp.abs(x[:, 1:] - x[:, :-1])) if x.shape[1] > 1 else jnp.zeros(())
    return {
        "sample_std": jnp.std(x),
        "detail": jnp.mean(jnp.std(x, axis=(2, 3))),
        "drift": jnp.std(last) - jnp.std(first),
        "stripes": _roughness(last) / jnp.maximum(_roughness(first), 1e-6),
        "motion": motion,
        "saturated": jnp.mean(jnp.abs(x) > SATURATED),
    }


def _roughness(x: Float32[Array, "b f h w c"]) -> Float32[Array, ""]:
    """Root mean square of differences of neighbours within frames, over that of differences from the frame's mean."""
    neighbours = [jnp.square(jnp.diff(x, axis=axis)) for axis in (2, 3) if x.shape[axis] > 1]
    if not neighbours:
        return jnp.ones(())
    whole = jnp.mean(jnp.square(x - jnp.mean(x, axis=(2, 3), keepdims=True)))
    return jnp.sqrt(sum(map(jnp.mean, neighbours)) / jnp.maximum(whole, 1e-12))


def collapse_checks() -> tuple[Check, ...]:
    """The known ways in which distribution matching collapses, each with the figure that shows it first."""
    return (
        Check(
            figure="critic/loss_at_*",
            what="the critic's loss, a mean over noise levels,",
            means="the critic cannot keep up with the student; raise --critic.learning-rate or --student-every, or "
            "lower --student.learning-rate",
            above=1.3,
            reference="lowest",
            window=50,
        ),
        Check(
            figure="student/stripes",
            what="the roughness of the last frames over that of the first",
            means="a grid or stripes grow from the end of the clips; take an earlier checkpoint, and a critic that is "
            "updated more often (--student-every)",
            above=1.5,
        ),
        Check(
            figure="student/saturated",
            what="the share of saturated latents",
            means="colours are saturated; stop here or earlier, or lower --guidance",
            above=3.0,
            least=0.01,
        ),
        Check(
            figure="student/detail",
            what="the spread within frames",
            means="frames turn into a solid colour; lower --student.learning-rate, and take an earlier checkpoint",
            below=0.5,
        ),
        Check(
            figure="student/motion",
            what="the difference of neighbouring frames",
            means="the video comes to a standstill; lower --student.learning-rate, or raise --student-every",
            below=0.5,
        ),
    )
