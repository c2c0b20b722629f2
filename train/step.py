"""The compiled functions of a run: one training step, and the errors of the networks on held-out data."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

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
    """A compiled step: (state, batch of each role, roles to update) -> (state, metrics of each of these roles)."""

    def __call__(
        self, state: TrainState, batches: Mapping[str, Batch], due: Sequence[str]
    ) -> tuple[TrainState, dict[str, Metrics]]:
        """Takes a step; the buffers of the given state are donated."""
        ...

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Traces the step for arguments with the given shapes and shardings."""
        ...

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lowers the step for such arguments, to be compiled."""
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
    """Makes the compiled training step, with one program for each set of roles that it updates.

    The step's randomness is a function of the run's key and the step number only. Its input state is donated.

    Args:
        objective: Draws and losses.
        graphs: Structure of each role's network, from `monarchrt.train.state.split_model`.
        trainings: Optimizer of each role that trains, from `monarchrt.train.state.make_training`.
        configs: Configuration of each role's network, or None. On one GPU, layers of a network with a `WanConfig` may
            write the values for the backward pass directly into stacks, which takes less time (`may_write_stacks`).
        shardings: Shardings of the new state, from `monarchrt.train.sharding.Placement`; None leaves them to the
            compiler.
        ahead: Whether, on GPUs that share the weights, those of a layer are gathered while the previous one computes.

    Returns:
        (state, {role: batch}, due=(role, ...)) -> (state, {role: metrics}), where metrics are scalars: loss,
        grad_norm (before clipping), its parts by `gradient_norms`, learning_rate, finite (whether loss and gradient
        are), and those of the objective.

    Raises:
        ValueError: If `configs` names a network that there is not.
    """
    if unknown := sorted(set(configs) - set(graphs)):
        raise ValueError(f"configs has {unknown[0]!r}, but the networks are {', '.join(map(repr, graphs))}.")

    stacks = may_write_stacks(objective, configs, trainings, shardings)
    mesh: Any = None if shardings is None else _everywhere(shardings).mesh
    if mesh is None:
        options = training_options(stacks=stacks)
    else:
        ahead = ahead and may_gather_ahead(objective, trainings, mesh)
        devices, heads, fsdp = _shared_by(mesh)
        options = training_options(devices, heads=heads, fsdp=fsdp, ahead=ahead, stacks=stacks)
    # otherwise the compiler might change the state's shardings, and the next call would compile again
    places: dict[str, Any] = {} if shardings is None else {"out_shardings": (shardings, _everywhere(shardings))}
    step = _Step(objective, graphs, trainings, mesh_of(shardings), stacks)
    return compiled_by_all(
        jax.jit(step.step_fn, donate_argnums=0, static_argnames="due", compiler_options=options, **places)
    )


@dataclass(frozen=True, eq=False)  # JAX's caches want a hash, which mappings have not
class _Step:
    """The computation of a training step; the arguments are those of `make_train_step`."""

    objective: Objective
    graphs: Graphs
    trainings: Mapping[str, Training]
    mesh: AbstractMesh  # over which networks split their batch
    stacks: bool  # whether layers write their values for the backward pass into stacks

    def step_fn(
        self, state: TrainState, batches: Mapping[str, Batch], due: Sequence[str]
    ) -> tuple[TrainState, dict[str, Metrics]]:
        """Updates the roles that are due, one after the other, each with the networks that the ones before left."""
        key = jax.random.fold_in(state.rng, state.step)
        draws = self.objective.draws(key, Batch(*next(iter(batches.values()))))
        done, roles, metrics = state.step + 1, dict(state.roles), {}
        for role in due:
            roles[role], metrics[role] = self.update(role, roles, batches[role], draws[role], done)
        return TrainState(step=done, roles=roles, rng=state.rng), metrics

    def update(
        self, role: str, roles: Mapping[str, RoleState], batch: Batch, draws: Any, done: jax.Array
    ) -> tuple[RoleState, Metrics]:
        """One role's new state and its metrics; `done` counts steps, this one included."""
        own, training = roles[role], self.trainings[role]
        settings = training.settings
        loss_and_grads = functools.partial(self.loss_and_grads, role, roles)
        if settings.accumulation == 1:
            (loss, extra), grads = loss_and_grads(batch, draws)
        else:
            (loss, extra), grads = accumulate(loss_and_grads, (batch, draws), settings.accumulation)
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

    def loss_and_grads(self, role: str, roles: Mapping[str, RoleState], batch: Batch, draws: Any) -> Any:
        """((loss, metrics), gradient of the role's parameters) for a batch or a part of it."""

        def loss_of(params: Any, batch: Batch, draws: Any) -> tuple[jax.Array, Metrics]:
            networks = networks_of(self.objective, self.graphs, roles, {role: params})
            return self.objective.loss(role, networks, Batch(*batch), draws)

        with use_abstract_mesh(self.mesh), stacks_written(self.stacks):
            return jax.value_and_grad(loss_of, has_aux=True)(roles[role].params, batch, draws)


def networks_of(
    objective: Objective, graphs: Graphs, roles: Mapping[str, RoleState], params: Mapping[str, Any]
) -> dict[str, Any]:
    """The networks for a loss.

    Args:
        objective: Defines the roles whose moving averages are included.
        graphs: Structure of each role's network.
        roles: State of each role.
        params: Parameters by role to use instead of those in the state.
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
    """The roles whose moving averages the losses use."""
    return [name for name, role in objective.settings.roles.items() if role.averaged]


def accumulate(loss_and_grads: Callable, batch: tuple, parts: int) -> Any:
    """Mean loss, metrics and gradient over `parts` equal slices of the batch, computed one after the other."""

    # sample i goes to part i mod parts, so that every part is spread over the devices as the batch is
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
    # NaN means that a part has no value, for example no sample at a noise level
    return (loss, jax.tree.map(lambda leaf: jnp.nanmean(leaf, axis=0), extra)), grads


def mesh_of(shardings: TrainState | None) -> AbstractMesh:
    """The mesh over which networks split their batch; empty without shardings."""
    return AbstractMesh((), ()) if shardings is None else jax.tree.leaves(shardings)[0].mesh.abstract_mesh


def _everywhere(shardings: TrainState) -> NamedSharding:
    return NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())


def _shared_by(mesh: Any) -> tuple[list[Any], int, int]:
    """The devices of a mesh, and the sizes of its axes heads and fsdp."""
    return list(mesh.devices.flat), mesh.shape.get("heads", 1), mesh.shape.get("fsdp", 1)


def may_gather_ahead(objective: Objective, trainings: Mapping[str, Training], mesh: Mesh | AbstractMesh) -> bool:
    """Whether a step can gather weights a layer ahead: on GPUs that share them, if its only loops are over layers.

    XLA unrolls these loops by two. It would do the same to loops over parts of a batch or blocks of a roll-out, which
    takes memory and doubles the compile time.

    Args:
        objective: The objective.
        trainings: Optimizer of each role that trains.
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
    """Whether layers can write their values for the backward pass directly into stacks.

    They can on one GPU, if the step's only loops are over layers of a `WanConfig` with `remat="cheap"`.

    Args:
        objective: The objective.
        configs: Configuration of each role's network, or None.
        trainings: Optimizer of each role that trains.
        shardings: Shardings of the state; None for a single device.
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
    """Makes the compiled function of held-out errors.

    Args:
        objective: Defines the errors, in `held_out_errors`.
        graphs: Structure of each role's network.
        shardings: Shardings of the state, as in `make_train_step`.

    Returns:
        ({role: (evaluated parameters, other variables)}, batch, draws) -> {role: errors}.
    """

    def errors(networks: Mapping[str, tuple[Any, Any]], batch: Batch, draws: Any) -> Mapping[str, jax.Array]:
        merged = {name: nnx.merge(graphs[name], *parts) for name, parts in networks.items()}
        merged |= {average_of(name): merged[name] for name in _averaged(objective)}  # the average is evaluated
        with use_abstract_mesh(mesh_of(shardings)):
            return objective.held_out_errors(merged, Batch(*batch), draws)

    # replicated, since every process reads all errors
    return compiled_by_all(jax.jit(errors, out_shardings=None if shardings is None else _everywhere(shardings)))
