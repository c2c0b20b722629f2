"""`monarchrt generate`: a video from a Wan checkpoint, or from a run folder of `train` or `demo`."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig, from_stored
from monarchrt.train.cli.parsing import parse
from monarchrt.train.export import find_run, run_model
from monarchrt.train.interrupt import finish_first

if TYPE_CHECKING:
    from monarchrt.models.generate.pipeline import VideoPipeline
    from monarchrt.models.generate.plan import Defaults, Plan
    from monarchrt.train.config import TrainConfig

_GENERATE = """Make a video: frames are written, and shown with --stream, as they come.

monarchrt generate --checkpoint Wan2.1-T2V-1.3B --prompt "a cat on a wall" --out cat.mp4

monarchrt generate --checkpoint self_forcing_dmd.pt --components Wan2.1-T2V-1.3B --prompt "a cat" --tile 3 30 52

monarchrt generate --checkpoint runs/demo/monarch --out demo.mp4 --stream

monarchrt generate --from cat.mp4 --out again.mp4"""
# settings that a run folder has no use for, and why
NOT_OF_RUNS = {
    "components": "needs no other parts",
    "weights": "has one set of weights",
    "save_embeddings": "was trained without text",
    "guidance": "was trained without text",
}
SEEN = 0  # held-out window whose first frames a run's video begins with


class Material(NamedTuple):
    """Everything that a video is made of."""

    plan: "Plan"
    pipeline: "VideoPipeline"
    text: Any
    negative: Any
    initial: Any


def generate_command(arguments: Sequence[str]) -> int:
    """`monarchrt generate`."""
    given = _option(arguments, "--from")
    default = GenerateConfig()
    if given is not None:
        source = Path(given)
        from monarchrt.models.media.writer import read_settings

        default = from_stored(read_settings(source), source=source)
        if _option(arguments, "--attention") and not _option(arguments, "--tile"):  # another attention has its own
            own = {name: getattr(GenerateConfig(), name) for name in ("tile", "blocks", "num_iters", "implementation")}
            default = dataclasses.replace(default, attention="stored", **own)
    config = parse(GenerateConfig, arguments, prog="monarchrt generate", default=default, description=_GENERATE)
    if config.checkpoint is None:
        raise UserError(
            "no checkpoint was given; give --checkpoint, for example runs/demo/monarch after `monarchrt demo`"
        )
    with finish_first():
        from monarchrt.models.generate.make import check_outputs, make_video

    check_outputs(config)
    material = load_material(config)
    plan, pipeline, text, negative, initial = material
    result = make_video(pipeline, text, plan=plan, negative=negative, initial=initial)
    rate = result.frames / result.seconds
    _say(
        f"{result.path}: {result.frames} frames in {result.seconds:.1f} s ({rate:.1f} frames/s), the first after "
        f"{result.first_frame:.1f} s, compilation included"
    )
    if result.fidelity is not None:
        psnr, ssim = result.fidelity
        _say(f"{result.comparison}: next to dense attention; PSNR {psnr:.2f} dB, SSIM {ssim:.4f}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _option(arguments: Sequence[str], name: str) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def load_material(config: GenerateConfig) -> Material:
    """Loads what the settings name: of a run folder, or of a Wan checkpoint.

    Args:
        config: The settings.

    Returns:
        Plan, pipeline, embeddings and the latents that the video begins with.

    Raises:
        UserError: If something is missing, or a setting does not fit; before any weights are read where possible.
    """
    path = Path(config.checkpoint or "")
    run = find_run(path)
    if run is not None:
        return _load_run(config, path, run)
    from monarchrt.models.generate.load import load_wan

    return Material(*load_wan(config))


def run_defaults(run: "TrainConfig") -> "Defaults":
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
    )


def _load_run(config: GenerateConfig, path: Path, run: "TrainConfig") -> Material:
    """A run folder: its network, its patch transform, an empty text, a held-out frame to begin with."""
    import jax.numpy as jnp

    from monarchrt.models.generate.decoders import PatchDecoder
    from monarchrt.models.generate.pipeline import VideoPipeline
    from monarchrt.models.generate.plan import make_plan
    from monarchrt.models.media.latents import PatchDCT
    from monarchrt.train.model import model_settings

    if run.data.latents is not None:
        raise UserError(
            f"checkpoint {path} is a run on precomputed latents; make a model of it with `monarchrt convert "
            f"{shlex.quote(str(path))} NEW`, and generate with --checkpoint NEW and, for its VAE and text encoder, "
            f"--components"
        )
    for name, why in NOT_OF_RUNS.items():
        value = getattr(config, name)
        if value is not None and not (name == "guidance" and value == 1.0):  # a stored plan says 1.0
            raise UserError(f"{name} is {value}, but checkpoint {path} is a run folder, which {why}; leave it out")
    decoder = PatchDecoder(PatchDCT(patch=run.data.patch, whitening=run.data.whitening))
    precision = "bf16" if config.precision == "bf16" else "fp32"
    wan = model_settings(run.model, channels=decoder.channels, precision=precision)
    plan = make_plan(config, defaults=run_defaults(run), model=wan, spatial=decoder.spatial, temporal=decoder.temporal)
    if config.prompt or config.negative_prompt or config.embeddings:
        _say(f"note: {path} was trained without text; the prompt does nothing")
    initial = _begin(plan, decoder, run)
    model = run_model(path, run, precision=precision).with_attention(plan.attention)
    text = jnp.zeros((1, 1, wan.text_dim))
    return Material(plan, VideoPipeline(model, decoder), text, None, initial)


def _begin(plan: "Plan", decoder: Any, run: "TrainConfig") -> Any:
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
