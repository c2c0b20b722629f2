"""The losses of distribution matching: the student's gradient from critic and teacher, and the critic's flow loss.

DMD2 (Yin et al. 2024, arXiv:2405.14867) as Self-Forcing (arXiv:2506.08009) and MonarchRT (arXiv:2602.12271, Section 5)
use it. The critic learns to denoise the student's samples. Where critic and teacher denoise a noised sample
differently, the student moves towards the teacher:

    x_t = (1 - sigma) x + sigma eps;   x_f, x_r = x_t - sigma' v, with v of the critic and of the guided teacher
    g = (x_f - x_r) / mean |x - x_r|;   the gradient of the student's loss with respect to x is g / numel
"""

from collections.abc import Callable
from typing import NamedTuple

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
BINS = 5  # bins of the timestep in which losses are logged
SATURATED = 4.0  # absolute value beyond which a latent counts as saturated


class ScoreDraws(NamedTuple):
    """Draws of a comparison: index 0...999 of each sample's time, and noise."""

    time: Int[Array, "b"]
    noise: Float32[Array, "b f h w c"]


def draw_scores(key: Key[Array, ""], shape: tuple[int, ...]) -> ScoreDraws:
    """Draws a time for each sample, uniform before the shift, and noise of the latents' shape."""
    time_key, noise_key = jax.random.split(key)
    time = jax.random.randint(time_key, shape[:1], 0, NUM_TRAIN_TIMESTEPS)
    return ScoreDraws(time, jax.random.normal(noise_key, shape, jnp.float32))


class Levels(NamedTuple):
    """Timesteps for the networks, noise levels at which samples are mixed, and levels that convert v to x; all [B]."""

    timesteps: Float32[Array, "b"]
    mixed: Float32[Array, "b"]
    converted: Float32[Array, "b"]


def levels_of(
    time: Int[Array, "b"], *, shift: float, low: float = 0.02, high: float = 0.98, conversion: str = "clean"
) -> Levels:
    """Timesteps and noise levels of drawn times.

    Args:
        time: Indices 0...999.
        shift: Timestep shift.
        low: Smallest timestep, as a fraction of 1000.
        high: Largest timestep, as a fraction of 1000.
        conversion: "clean": sigma = t / 1000 for mixing and conversion. "grid": the nearest level of the grid of 1000
            with shift 5 for both. "published", as in the published code: that level for mixing, and the nearest level
            of the grid with shift 8 for conversion.

    Returns:
        Timesteps and levels, float32.

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
    """The level whose timestep is nearest, of the shifted grid u = 1, 0.999, ... 0.001; the higher one in a tie."""
    grid = shifted(np.arange(NUM_TRAIN_TIMESTEPS, 0, -1) / NUM_TRAIN_TIMESTEPS, shift).astype(np.float32)
    times = jnp.asarray(grid * NUM_TRAIN_TIMESTEPS).reshape(*[1] * timesteps.ndim, -1)
    index = jnp.argmin(jnp.abs(times - timesteps[..., None]), axis=-1)
    return jnp.asarray(grid)[index]


def detached[Network](network: Network) -> Network:
    """The network with stopped gradients of its parameters."""
    graph, state = nnx.split(network)
    return nnx.merge(graph, jax.tree.map(lax.stop_gradient, state))


def to_data(x: Float[Array, "b f h w c"], flow: Float[Array, "b f h w c"], sigma: Float[Array, "b"]) -> Array:
    """Converts a flow prediction at noise level sigma to clean data: x - sigma v, float32."""
    return x.astype(jnp.float32) - over(sigma, x) * flow.astype(jnp.float32)


def over(per_sample: Float[Array, "b"], x: Array) -> Array:
    """Reshapes values per sample to be broadcast over x."""
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
    """The gradient direction g of distribution matching; samples become more likely under the teacher along -g.

    Args:
        x: The student's samples; no gradient flows into them.
        text: Embeddings of their prompts.
        negative: Embeddings of the negative prompt; None for a teacher without guidance.
        critic: Flow prediction of the critic.
        teacher: Flow prediction of the teacher.
        guidance: Weight w of the teacher's guidance: x_c + w (x_c - x_u).
        levels: Timesteps and noise levels, from `levels_of`.
        noise: Unit Gaussian noise.

    Returns:
        g, float32, in the shape of x, and scalars to log. Values of g that are not finite are replaced by 0; `replaced`
        is their fraction.
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
    """The student's loss: half the mean of g^2, with gradient g / numel with respect to x.

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
    """The unweighted flow loss of the critic on the student's samples.

    Args:
        x: The student's samples; no gradient flows into them.
        text: Embeddings of their prompts.
        critic: Flow prediction of the critic.
        levels: Timesteps and noise levels, from `levels_of`.
        noise: Unit Gaussian noise.

    Returns:
        Mean of (v - (eps - x))^2, where v is the prediction, scaled by converted / mixed levels; and its means in bins
        of the timestep, NaN for bins without a sample.
    """
    x = lax.stop_gradient(x.astype(jnp.float32))
    predicted = critic(add_noise(x, noise, levels.mixed), levels.timesteps, text).astype(jnp.float32)
    predicted = predicted * over(levels.converted / levels.mixed, x)
    errors = jnp.mean(jnp.square(predicted - (noise - x)), axis=tuple(range(1, x.ndim)))
    return jnp.mean(errors), in_bins(errors, levels.timesteps)


def in_bins(errors: Float[Array, "b"], timesteps: Float[Array, "b"]) -> Metrics:
    """Means of errors in bins of the timestep; NaN for bins without a sample.

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
    """Statistics of samples in which collapses show first.

    Args:
        x: Samples.
        block: Number of first and of last frames that are compared; None for a quarter of all, at least one.

    Returns:
        `sample_std`, the standard deviation of all latents; `detail`, the mean standard deviation within frames (0 is a
        solid color); `drift`, the standard deviation of the last frames minus that of the first; `stripes`, the
        roughness of the last frames relative to that of the first; `motion`, the mean absolute difference of
        neighboring frames; `saturated`, the fraction of latents beyond 4.
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
    """Root mean square of differences of neighboring latents within frames, relative to that from the frames' means."""
    neighbours = [jnp.square(jnp.diff(x, axis=axis)) for axis in (2, 3) if x.shape[axis] > 1]
    if not neighbours:
        return jnp.ones(())
    whole = jnp.mean(jnp.square(x - jnp.mean(x, axis=(2, 3), keepdims=True)))
    return jnp.sqrt(sum(map(jnp.mean, neighbours)) / jnp.maximum(whole, 1e-12))


def collapse_checks() -> tuple[Check, ...]:
    """Checks for the known ways in which distribution matching collapses, each of the figure that shows it first."""
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
