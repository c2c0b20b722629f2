"""`monarchrt train`: train or finetune a network, or go on with a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from monarchrt.models.errors import UserError
from monarchrt.train.cli.parsing import parse
from monarchrt.train.config import TrainConfig
from monarchrt.train.interrupt import finish_first
from monarchrt.train.run_folder import claim_folder, read_config

_TRAIN = """Train a Wan-shaped video diffusion transformer, with dense or Monarch attention, on windows of a clip.

monarchrt train --video clip.mp4 --folder runs/dense --attention dense --steps 500

monarchrt train --video clip.mp4 --folder runs/monarch --init-from runs/dense --tile 1 4 7 --steps 200

monarchrt train --folder runs/monarch --resume --steps 400"""


def _parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Parses the options of `monarchrt train`; with --resume, those not given come from the folder's config.json."""
    default = TrainConfig()
    folder = _folder_to_resume(arguments)
    if folder is not None:
        default = read_config(folder) or default
    return parse(TrainConfig, arguments, prog="monarchrt train", default=default, description=_TRAIN)


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
        if config.run.resume and read_config(config.run.folder) is None:
            raise UserError(
                f"folder {config.run.folder} holds no run to resume; give that of one, or begin one there with "
                f"--video CLIP.mp4 or --latents FOLDER"
            )
        raise UserError("neither video nor latents was given; give --video CLIP.mp4 or --latents FOLDER")

    with finish_first():
        from monarchrt.train.loop import train

    result = train(config)
    print(
        f"step {int(result.state.step)}: held-out loss {result.held_out_loss:.4f}; everything is in {result.folder}",
        file=sys.stderr,
    )
    return 0
