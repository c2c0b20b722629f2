"""What the subcommands do with their arguments."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from train.config import TrainConfig
from train.errors import UserError
from train.run_folder import claim_folder, read_config


def _parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Parses the options of `monarchrt train`; with --resume, those not given come from the folder's config.json."""
    default = TrainConfig()
    folder = _folder_to_resume(arguments)
    if folder is not None:
        default = read_config(folder) or default
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        prog="monarchrt train",
        args=list(arguments),
        default=default,
        description=_TRAIN,
    )


_TRAIN = """Train a Wan-shaped video diffusion transformer, with dense or Monarch attention, on windows of a clip.

monarchrt train --video clip.mp4 --folder runs/dense --attention dense --steps 500

monarchrt train --video clip.mp4 --folder runs/monarch --init-from runs/dense --tile 1 4 7 --steps 200

monarchrt train --folder runs/monarch --resume --steps 400"""


def _folder_to_resume(arguments: Sequence[str]) -> Path | None:
    if "--resume" not in arguments:
        return None
    for position, argument in enumerate(arguments):
        if argument == "--folder" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
        if argument.startswith("--folder="):
            return Path(argument.partition("=")[2])
    return TrainConfig().run.folder


def train_command(arguments: Sequence[str]) -> int:
    """`monarchrt train`."""
    config = _parse_train(arguments)
    claim_folder(config)  # before JAX is loaded
    if config.data.video is None and config.data.latents is None:
        raise UserError("neither video nor latents was given; give --video CLIP.mp4 or --latents FOLDER")

    from train.loop import train

    result = train(config)
    print(
        f"step {int(result.state.step)}: held-out loss {result.held_out_loss:.4f}; everything is in {result.folder}",
        file=sys.stderr,
    )
    return 0


def demo_command(arguments: Sequence[str]) -> int:
    """`monarchrt demo`."""
    from train.demo import DemoConfig, run_demo

    config = tyro.cli(tyro.conf.OmitArgPrefixes[DemoConfig], prog="monarchrt demo", args=list(arguments))
    run_demo(config)
    return 0
