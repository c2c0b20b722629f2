"""The network of a run folder, for `monarchrt generate` and `monarchrt convert`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monarchrt.models.errors import UserError
from monarchrt.train.config import TrainConfig
from monarchrt.train.run_folder import CONFIG_NAME, read_config

if TYPE_CHECKING:
    from monarchrt.models.generate.config import GenerateConfig
    from monarchrt.models.generate.load import Material
    from monarchrt.models.generate.plan import Defaults, Plan
    from monarchrt.models.wan import WanConfig, WanModel

# settings that a run folder has no use for, and why
NOT_OF_RUNS = {
    "components": "needs no other parts",
    "weights": "has one set of weights",
    "save_embeddings": "was trained without text",
    "guidance": "was trained without text",
}
SEEN = 0  # held-out window whose first frames a run's video begins with


def is_run(path: Path) -> bool:
    """Whether a path is a run folder that has been trained in.

    Example:
        >>> is_run(Path("nowhere"))
        False
    """
    from monarchrt.train.checkpointing import FOLDER_NAME

    return (path / CONFIG_NAME).is_file() and (path / FOLDER_NAME).is_dir()


def find_run(path: Path) -> TrainConfig | None:
    """The settings of a run folder; None if the path is something else.

    Args:
        path: Any path, existing or not.

    Returns:
        The settings.

    Raises:
        UserError: If config.json is damaged, or the folder holds run folders instead of being one; names them.
    """
    if is_run(path):
        return read_config(path)
    if path.is_dir() and (runs := [child for child in sorted(path.iterdir()) if is_run(child)]):
        raise UserError(f"checkpoint {path} holds runs; give one of them: {', '.join(map(str, runs))}")
    return None


def run_model(folder: Path, run: TrainConfig, *, precision: str = "fp32") -> "WanModel":
    """The network that a run exports, as in its newest checkpoint: the moving average, if there is one.

    The folder is only read, so a run that is still going on is not disturbed.

    Args:
        folder: The run folder.
        run: Its settings, of `read_config`.
        precision: "fp32" or "bf16", the compute type; parameters are fp32.

    Returns:
        The network, with the attention that it was trained with.

    Raises:
        UserError: If there is no checkpoint, it cannot be read, or it is of another network.
    """
    import jax
    from flax import nnx

    from monarchrt.models.wan import WanModel
    from monarchrt.train.checkpointing import Checkpoints
    from monarchrt.train.model import model_settings
    from monarchrt.train.state import split_model

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(folder, read_only=True) as checkpoints:
        kernel = checkpoints.shapes().get("patch_embedding.kernel", (None, None))
        # the data's channels, which the preset does not tell
        settings = model_settings(run.model, channels=kernel[-2], precision=precision)
        graph, params, others = split_model(nnx.eval_shape(lambda: WanModel(settings, rngs=nnx.Rngs(0))))
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params)
        params = checkpoints.restore_parameters(template)
    return nnx.merge(graph, params, others)


def run_defaults(run: TrainConfig) -> "Defaults":
    """How a run's network is sampled where nothing else is said: as it was trained."""
    from monarchrt.models.generate.plan import Defaults

    causal = run.model.override_values().get("causal_block") is not None
    trained = run.objective.generation
    forced = trained.level_per_frame
    return Defaults(
        mode="autoregressive" if causal else "windows" if forced else "bidirectional",
        frames=4 * run.data.frames + 1 if forced and not causal else run.data.frames,
        height=run.data.height,
        width=run.data.width,
        fps=8.0,
        sampler=trained.sampler,
        steps=trained.steps,
        shift=trained.shift,
        guidance=1.0,
        window=run.data.frames,
        distilled=trained.sampler == "few-step",
        causal=causal,
    )


@dataclass(frozen=True)
class RunCheckpoint:
    """A run folder as something to generate with: `monarchrt.models.generate.load.Opened`."""

    path: Path
    run: TrainConfig

    @property
    def sizes(self) -> "WanConfig":
        """Of the network."""
        from monarchrt.train.model import model_settings

        return model_settings(self.run.model, channels=self._decoder().channels)

    def network(self, config: "GenerateConfig", *, attention: Any = None) -> "WanModel":
        """The network."""
        model = run_model(self.path, self.run, precision="bf16" if config.precision == "bf16" else "fp32")
        return model if attention is None else model.with_attention(attention)

    def material(self, config: "GenerateConfig") -> "Material":
        """The network, its patch transform, an empty text, a held-out frame to begin with."""
        import jax.numpy as jnp

        from monarchrt.models.generate.load import Material, given_noise
        from monarchrt.models.generate.pipeline import VideoPipeline
        from monarchrt.models.generate.plan import make_plan

        for name, why in NOT_OF_RUNS.items():
            value = getattr(config, name)
            if value is not None and not (name == "guidance" and value == 1.0):  # a stored plan says 1.0
                raise UserError(
                    f"{name} is {value}, but checkpoint {self.path} is a run folder, which {why}; leave it out"
                )
        decoder, sizes = self._decoder(), self.sizes
        plan = make_plan(
            config, defaults=run_defaults(self.run), model=sizes, spatial=decoder.spatial, temporal=decoder.temporal
        )
        for note in plan.notes:
            _say(note)
        if config.prompt or config.negative_prompt or config.embeddings:
            _say(f"note: {self.path} was trained without text; the prompt does nothing")
        initial = _begin(plan, decoder, self.run)
        noise = given_noise(plan, decoder.channels, given=0 if initial is None else initial.shape[1])
        return Material(
            plan=plan,
            pipeline=VideoPipeline(self.network(config, attention=plan.attention), decoder),
            text=jnp.zeros((1, 1, sizes.text_dim)),
            initial=initial,
            noise=noise,
        )

    def _decoder(self) -> Any:
        from monarchrt.models.generate.decoders import PatchDecoder
        from monarchrt.models.media.latents import PatchDCT

        return PatchDecoder(PatchDCT(patch=self.run.data.patch, whitening=self.run.data.whitening))


def open_run(config: "GenerateConfig") -> RunCheckpoint | None:
    """Opens a run folder; None if it is none.

    Raises:
        UserError: If it is a folder of runs, damaged, or a run on latents, of which `convert` makes a model.
    """
    path = Path(config.checkpoint or "")
    run = find_run(path)
    if run is None:
        return None
    if run.data.latents is not None:
        raise UserError(
            f"checkpoint {path} is a run on precomputed latents; make a model of it with `monarchrt convert "
            f"{shlex.quote(str(path))} NEW`, and generate with --checkpoint NEW and, for its VAE and text encoder, "
            f"--components"
        )
    return RunCheckpoint(path, run)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _begin(plan: "Plan", decoder: Any, run: TrainConfig) -> Any:
    """Latents that a run's video begins with: of `condition`, or of the run's own held-out clip."""
    from monarchrt.models.generate.load import condition_latents
    from monarchrt.train.data import ClipWindows, open_source

    if plan.config.condition is not None:
        return condition_latents(plan, decoder)
    if plan.config.mode == "bidirectional":
        return None
    try:
        source = open_source(run.data)
    except UserError as error:
        _say(f"note: the run's clip cannot be read ({error}); the video begins with noise")
        return None
    size = (plan.config.height, plan.config.width)
    if not isinstance(source, ClipWindows) or size != (run.data.height, run.data.width):
        return None
    frames = source.held_out_window(SEEN)[: plan.first_block]
    if len(frames) < plan.first_block or plan.first_block >= plan.latents[0]:
        return None
    return decoder.encode(frames[None])
