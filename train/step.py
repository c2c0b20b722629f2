"""The compiled functions of a run: one training step, and the errors of the networks on held-out data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

from monarchrt.models.compiling import gathers_ahead, training_options
from monarchrt.models.processes.programs import compiled_by_all
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.stacks import STACKED, stacks_written
from monarchrt.train.data import Batch
from monarchrt.train.gradients import gradient_norms
from monarchrt.train.objectives.base import Metrics, Objective, average_of
from monarchrt.train.state import RoleState, Training, TrainState, frozen_of, update_ema

Graphs = Mapping[str, nnx.GraphDef]


@runtime_checkable
class StepFn(Protocol):
    """A compiled step: state, batch of each role, roles that are due -> state, metrics of each of these roles."""

    def __call__(
        self, state: TrainState, batches: Mapping[str, Batch], due: Sequence[str]
    ) -> tuple[TrainState, dict[str, Metrics]]:
        """Takes a step; the state that is given is used up."""
        ...

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Traces it for arrays of the shapes and places given."""
        ...

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The program for such arrays, to be compiled and looked at."""
        ...


ErrorFn = Callable[..., Mapping[str, jax.Array]]


def make_train_step(
    objective: Objective,
    graphs: Graphs,
    trainings: Mapping[str, Training],
    *,
    configs: Mapping[str, Any],
    shardings: TrainState | None = None,
    ahead: bool = True,
) -> StepFn:
    """Makes the compiled training step, a program for each set of roles that it updates.

    The step's randomness is a function of the run's key and the step number only. Its input state is donated.

    Args:
        objective: Draws and losses.
        graphs: Structure of each role's network, from `monarchrt.train.state.split_model`.
        trainings: How each role that trains does so, from `monarchrt.train.state.make_training`.
        configs: Configuration of each role's network, where it has one. On one GPU, layers of a `WanConfig` may write
            what they keep for the backward pass right into stacks, which takes less time (`may_write_stacks`).
        shardings: Where the new state lives, from `monarchrt.train.sharding.Placement`; None leaves it to the compiler.
        ahead: Whether a layer's weights are gathered while the one before computes, on GPUs that share them.

    Returns:
        (state, {role: batch}, due=(role, ...)) -> (state, {role: metrics}), where metrics are scalars: loss,
        grad_norm (before clipping), its parts by `gradient_norms`, learning_rate, finite (loss and gradient are),
        and what the objective adds.
    """

    def update(role: str, roles: dict[str, RoleState], batch: Batch, draws: Any, done: Any) -> tuple[RoleState, Any]:
        own, training = roles[role], trainings[role]
        settings = training.settings

        def loss_of(params: Any, batch: Batch, draws: Any) -> tuple[jax.Array, Metrics]:
            networks = networks_of(objective, graphs, roles, {role: params})
            return objective.loss(role, networks, Batch(*batch), draws)

        def loss_and_grads(batch: Batch, draws: Any) -> Any:
            with use_abstract_mesh(mesh_of(shardings)), stacks_written(stacks):
                return jax.value_and_grad(loss_of, has_aux=True)(own.params, batch, draws)

        if settings.accumulation == 1:
            (loss, extra), grads = loss_and_grads(batch, draws)
        else:
            (loss, extra), grads = _accumulate(loss_and_grads, (batch, draws), settings.accumulation)
        grad_norm = optax.tree.norm(grads)
        changes, optimizer = training.optimizer.update(grads, own.optimizer, own.params)
        params = optax.apply_updates(own.params, changes)
        metrics = (
            extra
            | gradient_norms(grads)
            | {
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": jnp.asarray(training.rate(own.updates), jnp.float32),
                "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
            }
        )
        new = replace(
            own,
            params=params,
            optimizer=optimizer,
            average=update_ema(own.average, params, done, settings),
            updates=own.updates + 1,
        )
        return new, metrics

    def step_fn(
        state: TrainState, batches: Mapping[str, Batch], due: Sequence[str]
    ) -> tuple[TrainState, dict[str, Metrics]]:
        key = jax.random.fold_in(state.rng, state.step)
        draws = objective.draws(key, Batch(*next(iter(batches.values()))))
        done, roles, metrics = state.step + 1, dict(state.roles), {}
        for role in due:
            roles[role], metrics[role] = update(role, roles, batches[role], draws[role], done)
        return TrainState(step=done, roles=roles, rng=state.rng), metrics

    # without shardings the compiler might move the state, and the next call would compile again
    places: dict[str, Any] = {} if shardings is None else {"out_shardings": (shardings, _everywhere(shardings))}
    stacks = may_write_stacks(objective, configs, trainings, shardings)
    options = training_options(stacks=stacks)
    if shardings is not None:
        mesh: Any = _everywhere(shardings).mesh
        ahead = ahead and may_gather_ahead(objective, trainings, mesh)
        devices, heads, fsdp = _shared_by(mesh)
        options = training_options(devices, heads=heads, fsdp=fsdp, ahead=ahead, stacks=stacks)
    return compiled_by_all(
        jax.jit(step_fn, donate_argnums=0, static_argnames="due", compiler_options=options, **places)
    )


def networks_of(
    objective: Objective, graphs: Graphs, roles: Mapping[str, RoleState], params: Mapping[str, Any]
) -> dict[str, Any]:
    """The networks that a loss sees.

    Args:
        objective: Says whose averages are among them.
        graphs: Structure of each role's network.
        roles: Their state.
        params: Parameters by role that are not those of the state.
    """
    networks = {
        name: nnx.merge(graphs[name], params.get(name, role.params), frozen_of(roles, name))
        for name, role in roles.items()
    }
    averages = {
        average_of(name): nnx.merge(graphs[name], roles[name].average, frozen_of(roles, name))
        for name in _averaged(objective)
    }
    return networks | averages


def _averaged(objective: Objective) -> list[str]:
    """The roles whose moving averages the losses see."""
    return [name for name, role in objective.settings.roles.items() if role.averaged]


def _accumulate(loss_and_grads: Callable, batch: tuple, parts: int) -> Any:
    """Mean loss, metrics and gradient over `parts` equal slices of the batch, one after the other."""

    # sample i goes to part i mod parts, so that a batch spread over devices stays spread
    def split(x: jax.Array) -> jax.Array:
        shared = x.ndim == 0  # a scalar is the same for all parts
        return jnp.broadcast_to(x, parts) if shared else x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    slices = jax.tree.map(split, batch)
    shapes = jax.eval_shape(loss_and_grads, *jax.tree.map(lambda x: x[0], slices))
    (loss, _), grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        (loss, extra), grads = loss_and_grads(*part)
        return jax.tree.map(jnp.add, total, (loss, grads)), extra

    total, extra = jax.lax.scan(add, (loss, grads), slices)
    loss, grads = jax.tree.map(lambda leaf: leaf / parts, total)
    # NaN: that part has nothing to say of it, such as no sample of a noise level
    return (loss, jax.tree.map(lambda leaf: jnp.nanmean(leaf, axis=0), extra)), grads


def mesh_of(shardings: TrainState | None) -> AbstractMesh:
    """The devices that the network is told to split its batch over; none without shardings."""
    return AbstractMesh((), ()) if shardings is None else jax.tree.leaves(shardings)[0].mesh.abstract_mesh


def _everywhere(shardings: TrainState) -> NamedSharding:
    return NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())


def _shared_by(mesh: Any) -> tuple[list[Any], int, int]:
    """The devices of a mesh, and how many share heads and weights."""
    return list(mesh.devices.flat), mesh.shape.get("heads", 1), mesh.shape.get("fsdp", 1)


def may_gather_ahead(objective: Objective, trainings: Mapping[str, Training], mesh: Any) -> bool:
    """Whether a step's weights can be gathered a layer ahead: on GPUs that share them, if layers are its only loops.

    What XLA does to the loops over layers it would do to those over parts of a batch or blocks of a roll-out too: two
    turns in one, which takes memory, and twice as long to compile.

    Args:
        objective: Its losses.
        trainings: How each role that trains does so.
        mesh: Mesh of the devices.
    """
    devices, _, fsdp = _shared_by(mesh)
    whole = all(training.settings.accumulation == 1 for training in trainings.values())
    return whole and not objective.rolls_out and gathers_ahead(devices, fsdp=fsdp)


def may_write_stacks(
    objective: Objective,
    configs: Mapping[str, Any],
    trainings: Mapping[str, Training],
    shardings: TrainState | None,
) -> bool:
    """Whether what layers keep can be written right into stacks: on one GPU, if such layers are a step's only loops.

    Args:
        objective: Its losses.
        configs: Configuration of each role's network, where it has one.
        trainings: How each role that trains does so.
        shardings: Where the state lives.
    """
    mesh: Any = None if shardings is None else _everywhere(shardings).mesh
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    if objective.rolls_out or [device.platform in ("gpu", "cuda") for device in devices] != [True]:
        return False
    for role, training in trainings.items():
        config = configs.get(role)
        if training.settings.accumulation > 1 or not isinstance(config, WanConfig):
            return False
        if config.remat != STACKED or config.unroll_layers:
            return False
    return True


def make_error_fn(objective: Objective, graphs: Graphs, *, shardings: TrainState | None = None) -> ErrorFn:
    """Makes the compiled errors of the networks, with their evaluated parameters, at given draws.

    Args:
        objective: Its `held_out_errors`.
        graphs: Structure of each role's network.
        shardings: Where the state lives, as in `make_train_step`.

    Returns:
        ({role: (evaluated parameters, other variables)}, batch, draws) -> {role: errors}.
    """

    def errors(networks: Mapping[str, tuple[Any, Any]], batch: Batch, draws: Any) -> Mapping[str, jax.Array]:
        merged = {name: nnx.merge(graphs[name], *parts) for name, parts in networks.items()}
        merged |= {average_of(name): merged[name] for name in _averaged(objective)}  # is what is evaluated
        with use_abstract_mesh(mesh_of(shardings)):
            return objective.held_out_errors(merged, Batch(*batch), draws)

    # on every device, as each process looks at all of them
    return compiled_by_all(jax.jit(errors, out_shardings=None if shardings is None else _everywhere(shardings)))
