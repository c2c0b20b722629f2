"""The compiled functions of a run: one training step, and the error of the network on held-out data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, use_abstract_mesh

from monarchrt.train.config import ObjectiveConfig, OptimizerConfig
from monarchrt.train.objective import draw_noise, flow_errors, flow_loss
from monarchrt.train.state import TrainState, as_velocity, learning_rate_schedule, update_ema

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
ErrorFn = Callable[..., jax.Array]


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    objective: ObjectiveConfig,
    settings: OptimizerConfig,
    steps: int,
    shardings: TrainState | None = None,
) -> StepFn:
    """Makes the compiled training step.

    The step's randomness is a function of the run's key and the step number only. Its input state is donated.

    Args:
        graph: Structure of the network, from `monarchrt.train.state.split_model`.
        optimizer: From `monarchrt.train.state.make_optimizer`.
        objective: The loss.
        settings: Accumulation and moving average; the learning rate, for the metrics.
        steps: Length of the run, for a decaying learning rate.
        shardings: Where the new state lives, from `monarchrt.train.sharding.Placement`; None leaves it to the compiler.

    Returns:
        (state, latents [B, F, h, w, C], text [B, L, D]) -> (state, metrics), where metrics are scalars: loss,
        grad_norm (before clipping), learning_rate and finite (loss and gradient are).
    """
    rate = learning_rate_schedule(settings, steps=steps)

    def loss_and_grads(params: Any, fixed: Any, latents, text, level, noise):
        def loss_of(params):
            velocity = as_velocity(graph, params, fixed)
            return flow_loss(velocity, latents, text, level=level, noise=noise, config=objective)

        with use_abstract_mesh(_mesh(shardings)):
            return jax.value_and_grad(loss_of)(params)

    def step_fn(state: TrainState, latents: jax.Array, text: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        batch = (latents, text, *draw_noise(key, latents.shape, objective))
        if settings.accumulation == 1:
            loss, grads = loss_and_grads(state.params, state.fixed, *batch)
        else:
            loss, grads = _accumulate(
                lambda *part: loss_and_grads(state.params, state.fixed, *part), batch, settings.accumulation
            )
        grad_norm = optax.tree.norm(grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        new = TrainState(
            step=done,
            params=params,
            fixed=state.fixed,
            optimizer=optimizer_state,
            ema=update_ema(state.ema, params, done, settings),
            rng=state.rng,
        )
        return new, metrics

    # without shardings the compiler might move the state, and the next call would compile again
    if shardings is None:
        return jax.jit(step_fn, donate_argnums=0)
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))


def _accumulate(loss_and_grads: Callable, batch: tuple, parts: int) -> tuple[jax.Array, Any]:
    """Mean loss and gradient over `parts` equal slices of the batch, one after the other."""
    # sample i goes to part i mod parts, so that a batch spread over devices stays spread
    slices = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(loss_and_grads, *jax.tree.map(lambda x: x[0], slices))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, loss_and_grads(*part)), None

    total, _ = jax.lax.scan(add, zero, slices)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def _mesh(shardings: TrainState | None) -> AbstractMesh:
    """The devices that the network is told to split its batch over; none without shardings."""
    return AbstractMesh((), ()) if shardings is None else jax.tree.leaves(shardings)[0].mesh.abstract_mesh


def make_error_fn(graph: nnx.GraphDef, *, objective: ObjectiveConfig, shardings: TrainState | None = None) -> ErrorFn:
    """Makes the compiled error of the network at given noise.

    Args:
        graph: Structure of the network.
        objective: Sets the scale of the timesteps.
        shardings: Where the state lives, as in `make_train_step`.

    Returns:
        (params, fixed, latents, text, noise, sigma [B]) -> squared error of the flow of each sample, float32 [B].
    """

    @jax.jit
    def errors(params: Any, fixed: Any, latents, text, noise, sigma):
        velocity = as_velocity(graph, params, fixed)
        with use_abstract_mesh(_mesh(shardings)):
            return flow_errors(velocity, latents, text, noise, sigma, num_train_timesteps=objective.num_train_timesteps)

    return errors
