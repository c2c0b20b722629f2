"""The networks of a run by role: their structure, optimizers and initial parameters."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from monarchrt.models.attention.notation import to_text
from monarchrt.models.checkpoints.checksums import checksums
from monarchrt.models.errors import NonFiniteError, UserError, user_input
from monarchrt.models.generate.run_arrays import run_config
from monarchrt.models.generate.runs import ABOUT, find_run
from monarchrt.models.lora.layers import LAYERS, Adapter, with_adapter
from monarchrt.models.processes.alike import listing, weight_files
from monarchrt.models.wan import WanConfig
from monarchrt.train.checkpointing import FOLDER_NAME, Checkpoints
from monarchrt.train.config import TrainConfig
from monarchrt.train.model import (
    build_model,
    check_pretrained,
    check_same_network,
    model_settings,
    pretrained_parameters,
)
from monarchrt.train.objectives.base import Objective
from monarchrt.train.run_folder import PARAMETERS
from monarchrt.train.sharding import Placement
from monarchrt.train.state import (
    Filter,
    RoleState,
    SameAs,
    Training,
    TrainState,
    all_finite,
    check_trainable,
    create_role,
    create_state,
    make_training,
    parameter_names,
    split_model,
    trainable_filter,
)


class Networks:
    """The networks of a run. They are set up with shapes alone, to find errors before anything is computed.

    Attributes:
        graphs: Structure of each network.
        trainings: Optimizer of each role that trains.
        configs: Configuration of each network, or None.
        template: Shapes and shardings of the state.

    Args:
        config: The settings.
        objective: The objective, which defines the roles.
        channels: Latent channels of the data.
        placement: Devices and shardings.
        models: Networks by role to start from instead of those of the config.

    Raises:
        UserError: If a setting is invalid, or the networks expect texts of different widths.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        *,
        channels: int,
        placement: Placement,
        models: Mapping[str, nnx.Module],
    ):
        self._config, self._channels, self._placement, self._models = config, channels, placement, models
        self._objective = objective
        self._sources: dict[str, Any] = {}  # opened and checked Wan checkpoints, by role
        self._files: dict[str, list[Path]] = {}  # files that identify the initial parameters, by role
        self._trained: dict[str, WanConfig] = {}  # configurations of earlier training, if stored, by role
        settings = objective.settings
        steps = range(1, config.run.steps + 1)
        updates = {name: sum(name in objective.due(step) for step in steps) for name in settings.training}
        self.trainings: dict[str, Training] = {
            name: make_training(config.trained(name), updates=updates[name]) for name in settings.training
        }
        self._bases = {name: models.get(name) or nnx.eval_shape(self._build(name)) for name in settings.roles}
        self._abstract = {name: self._adapted(name, model) for name, model in self._bases.items()}
        self.configs: dict[str, Any] = {name: getattr(model, "config", None) for name, model in self._abstract.items()}
        self._check_texts()
        parts = {name: split_model(model, self._trains(name)) for name, model in self._abstract.items()}
        self.graphs = {name: graph for name, (graph, _, _) in parts.items()}
        for name in self.trainings:
            patterns = config.trained(name).trainable
            what = "parameter" if self._keeps_frozen(name) else "parameter of the LoRA, which is all that trains"
            check_trainable(patterns, *parts[name][1:], option=config.option(name, "trainable"), what=what)
        self._owners = self._find_owners()

        def create(parts: Mapping[str, tuple[Any, Any]]) -> TrainState:
            roles = {
                name: create_role(params, self._shared(name, frozen), self.trainings.get(name))
                for name, (params, frozen) in parts.items()
            }
            return create_state(roles, seed=config.run.seed)

        shapes = jax.eval_shape(create, {name: (params, frozen) for name, (_, params, frozen) in parts.items()})
        self.template: TrainState = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            placement.shardings(shapes),
        )

    def check_origins(self, *, resumed: bool) -> None:
        """Checks that initial parameters exist and have the networks' sizes, without reading them.

        Args:
            resumed: Whether networks that train are read from a checkpoint of the run itself.

        Raises:
            UserError: If parameters are missing or have other sizes.
        """
        for name, role in self._config.objective.roles.items():
            origin = self._config.origin(name)
            if resumed and self._keeps_frozen(name):
                continue
            if origin is not None:
                with self._naming_option(name):
                    self._check_origin(origin, name)
            elif name not in self._models and not (role.random and self._keeps_frozen(name)):
                option = self._config.option(name, "init_from").replace("_", "-")
                lacks = "no weights" if not role.random else "no weights that a LoRA could change"
                raise UserError(f"the {name} has {lacks}; give --{option}, a run folder or a Wan checkpoint")

    @property
    def notes(self) -> list[str]:
        """Notes on networks that do not train and whose attention or blocks differ from those of their own training."""
        lines = []
        for name, before in self._trained.items():
            if name in self.trainings:
                continue
            now, then = _attends(self.configs[name]), _attends(before)
            if now != then:
                origin = self._config.origin(name)
                lines.append(f"note: the {name} is not trained and uses {now}, but {origin} was trained with {then}")
        return lines

    @property
    def listing(self) -> str:
        """A digest of samples of the files that the initial parameters are read from (`alike.listing`).

        Raises:
            OSError: If a file cannot be read.
        """
        found = {name: listing(files) for name, files in sorted(self._files.items())}
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def start(self) -> TrainState:
        """Makes the state at step 0, sharded from the start, so that no device needs memory for all of it."""
        seed = self._config.run.seed
        places = self._placement.shardings(self.template)
        bare = TrainState(step=places.step, roles={}, rng=places.rng)
        rest = jax.jit(lambda: create_state({}, seed=seed), out_shardings=bare)()
        made: dict[str, RoleState] = {}
        for name in sorted(self.graphs, key=lambda name: name in self._owners):  # those that share another's come last
            made[name] = self._role(name, made)
        return TrainState(step=rest.step, roles={name: made[name] for name in self.graphs}, rng=rest.rng)

    def check_finite(self, state: TrainState) -> None:
        """Checks that the initial parameters are finite.

        Raises:
            NonFiniteError: If a parameter is NaN or infinite; names it and its source.
        """
        several = len(state.roles) > 1
        for name, role in state.roles.items():
            if bool(all_finite((role.params, role.frozen))):
                continue
            parts = [part for part in (role.params, role.frozen) if not isinstance(part, SameAs)]
            named = ((key, leaf) for part in parts for key, leaf in _named(part))
            wrong = next(key for key, leaf in named if not bool(all_finite(leaf)))
            owner, origin = self._config.origin_role(name), self._config.origin(name)
            option = self._config.option(owner, "init_from").replace("_", "-")
            whose = f"a parameter of the {name}" if several else "a parameter"
            source = "" if origin is None else f" of {origin}"
            raise NonFiniteError(
                f"{whose} is not finite at step 0: {wrong}{source}", advice=f"give --{option} another network", step=0
            )

    def frozen(self) -> TrainState:
        """The template, with the parameters that checkpoints do not have: frozen networks and those under LoRAs."""
        template = self.template
        roles = {
            name: role
            if role.keeps_frozen or name in self._owners
            else dataclasses.replace(role, frozen=self._role(name, {}).frozen)
            for name, role in template.roles.items()
        }
        return TrainState(step=template.step, roles=roles, rng=template.rng)

    def digests(self, state: TrainState) -> dict[str, str]:
        """A digest of each network that was read and is not in checkpoints, which resuming compares."""
        return {
            f"{name}.{PARAMETERS}": _digest(role.frozen)
            for name, role in state.roles.items()
            if not role.keeps_frozen
            and name not in self._owners
            and (name in self._models or self._config.origin(name) is not None)
        }

    def _find_owners(self) -> dict[str, str]:
        """Roles that share another role's frozen variables, and that role: equal source, shapes and dtypes."""
        owners: dict[str, str] = {}
        held: dict[Any, str] = {}
        for name, model in self._bases.items():
            origin = self._config.origin(name)
            if origin is None or name in self._models or self._keeps_frozen(name):
                continue
            state = nnx.state(model)
            weights = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
            owner = held.setdefault((origin, *parameter_names(state), *weights), name)
            if owner != name:
                owners[name] = owner
        return owners

    def _shared(self, name: str, frozen: Any) -> Any:
        """The frozen variables of a role, or a reference to the role that owns them."""
        return SameAs(self._owners[name]) if name in self._owners else frozen

    def _keeps_frozen(self, name: str) -> bool:
        """Whether checkpoints contain the whole network: it trains, in full or in part, without a LoRA."""
        return name in self.trainings and self._config.trained(name).lora_rank is None

    def _adapted(self, name: str, model: Any) -> Any:
        """A network with the parameters that the objective adds, or with the layers of its LoRA."""
        own = self._objective.extension(name)
        rank = self._config.trained(name).lora_rank if name in self.trainings else None
        if own is None and rank is None:
            return model
        seed = (self._seed(name) + 2**31) % 2**32  # another one than that of the network's own parameters
        if rank is None:
            change: Callable[[Any], Any] = functools.partial(own, seed=seed)  # type: ignore[arg-type]
        elif own is not None:
            option = self._config.option(name, "lora_rank").replace("_", "-")
            raise UserError(
                f"the {name} trains a LoRA, but {self._config.objective.name} adds parameters to it that a LoRA would "
                f"leave as they are; leave out --{option}"
            )
        else:
            settings = self._config.trained(name)
            adapter = Adapter(rank=rank, alpha=settings.lora_alpha, layers=settings.lora_layers or LAYERS)

            def change(model: Any) -> Any:
                return with_adapter(model, adapter, rngs=nnx.Rngs(seed))

        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
        with self._config.naming_role(name), user_input():
            return nnx.eval_shape(change, model) if abstract else change(model)

    def _build(self, name: str) -> Callable[[], nnx.Module]:
        """A function that makes a network with random parameters, without a LoRA."""
        role = self._config.role(name)

        def build() -> nnx.Module:
            with self._config.naming_role(name):
                return build_model(
                    role.model,
                    channels=self._channels,
                    seed=self._seed(name),
                    precision=role.precision,
                    frozen=not self._keeps_frozen(name),
                )

        return build

    def _seed(self, name: str) -> int:
        objective = self._config.objective
        # the exported network gets the same seed as in a run with one network
        order = (objective.exported, *objective.further).index(name)
        return (self._config.run.seed + order) % 2**32

    def _trains(self, name: str) -> Filter:
        if name not in self.trainings:
            return lambda *_: False
        settings = self._config.trained(name)
        return trainable_filter(settings.trainable, nnx.Param if settings.lora_rank is None else nnx.LoRAParam)

    def _check_texts(self) -> None:
        exported = self._config.objective.exported
        wanted = getattr(self.configs[exported], "text_dim", None)
        for name, config in self.configs.items():
            width = getattr(config, "text_dim", wanted)
            if width != wanted:
                raise UserError(
                    f"the {name} takes text of width {width}, the {exported} of {wanted}; all networks of a run get "
                    f"the same text, so give them presets with the same text_dim"
                )

    @contextlib.contextmanager
    def _naming_option(self, name: str) -> Iterator[None]:
        """Names, in errors of a role's parameters, the option by which they were given."""
        config = self._config
        owner = config.origin_role(name)
        option, prefix = config.option(owner, "init_from"), f"init_from {config.origin(name)} "
        try:
            yield
        except UserError as error:
            if option == "init_from" or not str(error).startswith(prefix):
                raise
            also = "" if owner == name else f"(the {name} starts as it) "
            raise UserError(f"{option} {config.origin(name)} {also}{str(error).removeprefix(prefix)}") from error

    def _check_origin(self, origin: Path, name: str) -> None:
        if not (origin / FOLDER_NAME).is_dir():
            source = self._sources[name] = check_pretrained(origin, self.configs[name])
            self._files[name] = weight_files(source.file.path)
            if source.trained is not None:
                self._trained[name] = source.config
            return

        def check(saved: dict[str, Any], step: int) -> None:
            check_same_network(origin, saved, self._config.role(name).model)
            self._files[name] = [origin / FOLDER_NAME / str(step) / ABOUT]  # has a checksum of each array

        with Checkpoints(origin, read_only=True) as checkpoints:
            checkpoints.check_newest(check)
        with contextlib.suppress(UserError):  # the settings are only needed for a note
            if (run := find_run(origin)) is not None:
                self._trained[name] = run_config(run, channels=self._channels)

    def _role(self, name: str, made: Mapping[str, RoleState]) -> RoleState:
        """The state of one network at step 0; `made` has the role whose variables it shares."""
        places = self._placement.shardings(self.template.roles[name])
        create = functools.partial(create_role, training=self.trainings.get(name))
        trains, origin = self._trains(name), self._config.origin(name)
        if origin is None and name not in self._models:
            build = self._build(name)  # never under a LoRA
            return jax.jit(
                lambda: create(*split_model(self._adapted(name, build()), trains)[1:]), out_shardings=places
            )()
        model: Any = self._models.get(name)
        if name in self._owners:
            model = nnx.merge(split_model(self._bases[name])[0], made[self._owners[name]].frozen)
        elif origin is not None:
            with self._naming_option(name):
                model = self._load(name, origin)
        params, frozen = split_model(self._adapted(name, model), trains)[1:]
        frozen = self._shared(name, frozen)
        if origin is None:
            # a copy, since a step overwrites its input, and the caller may still use the model
            params, frozen = jax.tree.map(jnp.copy, (params, frozen))
        parts = jax.device_put((params, frozen), (places.params, places.frozen))
        return jax.jit(create, out_shardings=places, donate_argnums=(0, 1))(*parts)

    def _load(self, name: str, origin: Path) -> nnx.Module:
        """A network with parameters read from its source, without a LoRA."""
        graph, params, others = split_model(self._bases[name])
        if jax.tree.leaves(others) and name not in self._models:
            others = split_model(self._build(name)())[2]

        stored = None if self._keeps_frozen(name) else self._stored_dtype(name)

        def template(leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = leaf.dtype if stored is None else stored
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=self._placement.sharding(leaf.shape))

        if (origin / FOLDER_NAME).is_dir():
            with Checkpoints(origin, read_only=True) as checkpoints:
                parameters = checkpoints.restore_parameters(
                    jax.tree.map(template, params), fresh=lambda: split_model(self._build(name)())[1]
                )
            parameters = jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), parameters, params)
        else:
            parameters = pretrained_parameters(
                origin,
                self.configs[name],
                source=self._sources.pop(name, None),
                sharding=lambda _, shape: self._placement.sharding(shape),
            )
        return nnx.merge(graph, parameters, others)

    def _stored_dtype(self, name: str) -> Any:
        """The dtype of parameters in the checkpoints of a run with the network's settings."""
        return jnp.dtype(model_settings(self._config.role(name).model).param_dtype)


def _named(tree: Any) -> Iterator[tuple[str, jax.Array]]:
    """The arrays of a network, or of a part of it, with their names."""
    return zip(parameter_names(tree), jax.tree.leaves(tree), strict=True)


def _attends(config: WanConfig) -> str:
    """A network's attention and causal blocks, in words."""
    layers = config.layer_attention
    text = to_text(layers[0] if len(set(layers)) == 1 else layers)
    if config.causal_block is None:
        return f"attention {text} over all frames"
    apart = ", the first by itself" if config.independent_first_frame else ""
    return f"attention {text} in blocks of {config.causal_block} frames{apart}"


def _digest(frozen: Any) -> str:
    sums = jax.device_get(checksums(dict(_named(frozen))))
    return hashlib.sha256(json.dumps({name: int(sums[name]) for name in sorted(sums)}).encode()).hexdigest()[:16]
