"""The training state, one pytree: the networks by role, each with its optimizer state and moving average."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Int

from monarchrt.models.checkpoints.checksums import checksums as checksums  # an earlier place of this name
from monarchrt.models.errors import UserError
from monarchrt.train.config import OptimizerConfig

Params = nnx.State
"""Parameters as `flax.nnx.split` returns them."""

Filter = Any
"""A filter for `flax.nnx.split` that selects the trained variables: a type, or a function of path and variable."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class SameAs:
    """A reference to the frozen variables of another role, which are in memory once."""

    role: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RoleState:
    """The state of one network.

    Attributes:
        params: The trained parameters.
        frozen: The network's other variables, which do not change, or `SameAs`.
        optimizer: Optax state; None if the network does not train.
        average: Moving average of `params`, or None.
        updates: Number of optimizer updates, an int32 scalar; None if the network does not train.
        keeps_frozen: Whether `frozen` is saved in checkpoints; if not, resuming reads it again from its source.
    """

    # not typed as arrays, since trees of shapes and of shardings have this structure too
    params: Any
    frozen: Any
    optimizer: Any = None
    average: Any = None
    updates: Any = None
    keeps_frozen: bool = field(default=True, metadata={"static": True})

    @property
    def evaluated(self) -> Any:
        """The parameters for evaluation and sampling: the moving average, if there is one."""
        return self.params if self.average is None else self.average

    @property
    def trains(self) -> bool:
        """Whether steps may update the network; otherwise it is not saved in checkpoints."""
        return self.updates is not None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes, or needs unchanged.

    Attributes:
        step: Number of completed steps, an int32 scalar.
        roles: State of the networks by role.
        rng: Random key of the run; the step after n completed ones uses `fold_in(rng, n)`.
    """

    step: Any
    roles: dict[str, RoleState]
    rng: Any

    def frozen(self, name: str) -> Any:
        """The frozen variables of a role, its own or those that it shares (see `SameAs`)."""
        return frozen_of(self.roles, name)


def frozen_of(roles: Mapping[str, RoleState], name: str) -> Any:
    """The frozen variables of a role, its own or those that it shares (see `SameAs`)."""
    frozen = roles[name].frozen
    return roles[frozen.role].frozen if isinstance(frozen, SameAs) else frozen


def trainable_filter(names: Sequence[str], kind: type = nnx.Param) -> Filter:
    """The filter for `OptimizerConfig.trainable`: variables of one type, all or by pattern.

    Examples:
        >>> graph, params, frozen = split_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), trainable_filter(["bias"]))
        >>> parameter_names(params), parameter_names(frozen)
        (['bias'], ['kernel'])

    Args:
        names: "all" alone, or patterns of parameter names.
        kind: Type of the variables, such as `nnx.LoRAParam` for the parameters of a LoRA only.
    """
    if tuple(names) == ("all",):
        return kind  # with its subclasses: nnx.Param includes nnx.LoRAParam

    def matches(path: tuple, variable: Any) -> bool:
        name = ".".join(map(str, path))
        return issubclass(getattr(variable, "type", type(variable)), kind) and any(
            fnmatch.fnmatchcase(name, pattern) for pattern in names
        )

    return matches


def split_model(model: nnx.Module, trains: Filter = nnx.Param) -> tuple[nnx.GraphDef, Any, Any]:
    """Splits a network into its structure, its trained parameters, and its other variables."""
    graph, params, frozen = nnx.split(model, trains, ...)
    return graph, params, frozen


def parameter_names(tree: Any) -> list[str]:
    """Names of the arrays of a network, or of a part of it, such as `head.proj.kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [_name(path) for path, _ in leaves]


def check_trainable(names: Sequence[str], params: Any, frozen: Any, *, option: str, what: str = "parameter") -> None:
    """Checks that every pattern of `OptimizerConfig.trainable` matches a trained parameter.

    Args:
        names: "all" alone, or patterns of parameter names.
        params: The trained parameters.
        frozen: The network's other variables.
        option: Name of the setting, for the message.
        what: Name of a trained parameter, for the message.

    Raises:
        UserError: If a pattern matches none.
    """
    trained, others = parameter_names(params), parameter_names(frozen)
    for pattern in () if tuple(names) == ("all",) else names:
        if not fnmatch.filter(trained, pattern):
            known = ", ".join(sorted({name.split(".")[0] for name in trained + others}))
            raise UserError(f"{option} is {pattern!r}, which fits no {what}; give all, or patterns below {known}")


def as_velocity(graph: nnx.GraphDef, params: Any, frozen: Any) -> Callable[..., Any]:
    """Merges a network that was split, to be called with latents, timesteps and text."""
    return nnx.merge(graph, params, frozen)  # type: ignore[return-value]


def learning_rate_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0: linear warm-up, then constant or decaying to 0.

    Args:
        config: Peak, warm-up and shape of the schedule.
        steps: Update at which a decaying schedule reaches 0, unless `decay_steps` is set.

    Returns:
        A function from the update's index to its learning rate.

    Examples:
        >>> rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup=4), steps=10)
        >>> [float(rate(step)) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    peak, end = config.learning_rate, config.decay_steps or steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(1, end - config.warmup)),
        "linear": lambda: optax.linear_schedule(peak, 0.0, max(1, end - config.warmup)),
    }[config.schedule]()
    if config.warmup == 0:
        return after
    # the first update already has a rate above 0: (n+1)/warmup * peak
    rise = optax.linear_schedule(peak / config.warmup, peak, max(1, config.warmup - 1))
    return optax.join_schedules([rise, after], [config.warmup])


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; weight decay only on kernels and on the matrices of a LoRA.

    Args:
        config: The optimizer's settings.
        steps: Number of updates in the run, for a decaying schedule.

    Returns:
        The Optax transformation.
    """

    def kernels(params: Any) -> Any:
        def is_matrix(path: tuple, _: Any) -> bool:
            return any(part in jax.tree_util.keystr(path) for part in ("kernel", "lora_a", "lora_b"))

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    adamw = optax.adamw(
        learning_rate_schedule(config, steps=steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=kernels,
    )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, adamw)


class Training(NamedTuple):
    """The optimizer of a role, the learning rate of each of its updates, and the settings of both."""

    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    settings: OptimizerConfig


def make_training(config: OptimizerConfig, *, updates: int) -> Training:
    """Makes the optimizer and the learning-rate schedule of a role.

    Args:
        config: The optimizer's settings.
        updates: Number of the role's updates in the whole run, for a decaying learning rate.
    """
    return Training(make_optimizer(config, steps=updates), learning_rate_schedule(config, steps=updates), config)


def create_role(params: Any, frozen: Any, training: Training | None) -> RoleState:
    """The state of a network before the first step.

    Args:
        params: The trained parameters.
        frozen: The network's other variables; checkpoints of a LoRA do not contain them.
        training: Its optimizer, from `make_training`; None if it does not train.
    """
    if training is None:
        return RoleState(params=params, frozen=frozen, keeps_frozen=False)
    average = training.settings.ema_decay is not None
    return RoleState(
        params=params,
        frozen=frozen,
        optimizer=training.optimizer.init(params),
        # a copy: the step donates its input, and one buffer cannot be donated twice
        average=jax.tree.map(jnp.copy, params) if average else None,
        updates=jnp.zeros((), jnp.int32),
        keeps_frozen=training.settings.lora_rank is None,
    )


def create_state(roles: Mapping[str, RoleState], *, seed: int) -> TrainState:
    """The state before the first step.

    Args:
        roles: States of the networks, from `create_role`.
        seed: Seed of the random draws.
    """
    return TrainState(step=jnp.zeros((), jnp.int32), roles=dict(roles), rng=jax.random.key(seed))


def update_ema[Tree](ema: Tree, params: Tree, step: Int[Array, ""], config: OptimizerConfig) -> Tree:
    """Updates the moving average of parameters.

    Args:
        ema: The average before the step; None if there is none.
        params: The parameters after the step.
        step: Number of the step, counted from 1.
        config: Settings of the optimizer, of which `ema_decay` and `ema_start` are used.

    Returns:
        A copy of the parameters up to step `ema_start`, and then decay * ema + (1 - decay) * params.
    """
    if ema is None or config.ema_decay is None:
        return ema
    decay = jnp.where(step <= config.ema_start, 0.0, config.ema_decay)
    return jax.tree.map(lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), ema, params)


def to_arrays(state: TrainState) -> dict[str, Any]:
    """Flattens a state to arrays under readable names, such as `roles.student.params.head.proj.kernel`.

    A checkpoint depends only on these names, not on classes of Flax or Optax. Networks that do not train are left out,
    and so is the network under a LoRA. A state of `jax.ShapeDtypeStruct` is flattened to these.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(_trained(state))
    return {_name(path): _key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves}


def from_arrays(template: TrainState, arrays: dict[str, Array]) -> TrainState:
    """Puts arrays from `to_arrays` back into a state of the template's structure; the rest is the template's."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(_trained(template))
    values = [
        jax.random.wrap_key_data(arrays[_name(path)]) if _is_key(leaf) else arrays[_name(path)] for path, leaf in leaves
    ]
    state = jax.tree_util.tree_unflatten(structure, values)
    roles = {
        name: role if role.keeps_frozen else replace(role, frozen=template.roles[name].frozen)
        for name, role in state.roles.items()
    }
    return TrainState(step=state.step, roles=template.roles | roles, rng=state.rng)


def _trained(state: TrainState) -> TrainState:
    """The part of a state that checkpoints contain."""
    roles = {
        name: role if role.keeps_frozen else replace(role, frozen=None)
        for name, role in state.roles.items()
        if role.trains
    }
    return TrainState(step=state.step, roles=roles, rng=state.rng)


def _name(path: tuple) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value").replace("/", "_")


def _key_data(key: Any) -> Any:
    if not isinstance(key, jax.ShapeDtypeStruct):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point number in the tree is finite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats])) if floats else jnp.array(True)
