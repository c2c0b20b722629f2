"""`monarchrt generate`: a video from a Wan checkpoint, or from a run folder of `train` or `demo`."""

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monarchrt.models.attention.notation import to_text
from monarchrt.models.attention.registry import EXACT, SHORT
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import (
    DECODERS,
    NAMES_FILES,
    NO_CONDITION,
    NO_LORA,
    STORED,
    GenerateConfig,
    from_stored,
)
from monarchrt.models.processes.joining import joined
from monarchrt.models.processes.place import Place, find_place
from monarchrt.train.cli.parsing import last_value, parse
from monarchrt.train.cli.tables import say
from monarchrt.train.interrupt import finish_first

_GENERATE = """Generate a video. Frames are written, and with --stream shown, as they are generated.

monarchrt generate --checkpoint Wan-AI/Wan2.1-T2V-1.3B --prompt "a cat on a wall" --out cat.mp4

monarchrt generate --checkpoint self_forcing_dmd.pt --components Wan-AI/Wan2.1-T2V-1.3B --prompt "a cat" --tile 3 30 52

monarchrt generate --checkpoint Wan-AI/Wan2.1-T2V-1.3B --lora style.safetensors:0.8 fast.safetensors --prompt "a cat"

monarchrt generate --checkpoint runs/demo/monarch --out demo.mp4 --stream

monarchrt generate --from cat.mp4 --trust --out again.mp4"""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(GenerateConfig):
    """Generate a video from a prompt with a Wan 2.1 checkpoint or a run of `monarchrt train` or `monarchrt demo`."""

    from_: Path | None = None
    """`--from VIDEO.mp4`: take all settings that are not given from a video made by this command."""

    trust: bool = False
    """With --from: also read the checkpoint and other files that the video names; otherwise they must be given."""

    coordinator: str | None = None
    """For one video by several processes, each with its own devices of --mesh: address of process 0 and a free port.
    With --mesh, this and the next two are found automatically under Slurm's srun and Open MPI's mpirun."""

    processes: int | None = None
    """Number of processes; requires coordinator. 1 without it: a separate video, even under a job manager."""

    process: int | None = None
    """Number of this process, from 0; requires coordinator. The first one writes the video."""

    def place(self) -> Place | None:
        """This process's place among several; None for a single process."""
        given = self.coordinator, self.processes, self.process
        return find_place(*given, environment={} if self.mesh is None else os.environ)


def generate_command(arguments: Sequence[str]) -> int:
    """`monarchrt generate`."""
    config, options = _parse(arguments)
    if config.checkpoint is None:
        raise UserError(
            "no checkpoint was given; give --checkpoint, for example runs/demo/monarch after `monarchrt demo`"
        )
    place = options.place()
    with joined(place, identity={field.name: getattr(config, field.name) for field in dataclasses.fields(config)}):
        if place is None or place.process == 0:
            return _generate(config, options.from_)
        # the other processes compute the same video, and write it to a temporary folder
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            unread = dict.fromkeys(("save_embeddings", "save_latents", "save_noise"))
            out = Path(folder) / f"{config.out.stem.replace('%', '')}.mp4"
            return _generate(dataclasses.replace(config, out=out, stream=False, quiet=True, **unread), None)


def _generate(config: GenerateConfig, source: Path | None) -> int:
    with finish_first():
        from monarchrt.models.generate.load import load_material
        from monarchrt.models.generate.make import check_outputs, make_video

    check_outputs(config, also_read={} if source is None else {"from": source})
    material = load_material(config)
    say(f"attention: {to_text(material.plan.attention)}, {material.plan.density}")
    result = make_video(material.pipeline, material.text, reference=material.reference, **material.options())
    rate = result.frames / result.seconds
    say(
        f"{result.path}: {result.frames} frames in {result.seconds:.1f} s ({rate:.1f} frames/s), the first after "
        f"{result.first_frame:.1f} s, compilation included"
    )
    if result.fidelity is not None:
        psnr, ssim = result.fidelity
        numbers = f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"
        if config.compare is not None:
            say(f"{result.comparison}: next to {config.compare}; {numbers}")
        else:
            say(
                f"{result.comparison}: next to {EXACT} attention; {numbers}. Both are the same weights: if they were "
                f"finetuned with Monarch attention, --compare CHECKPOINT says what it loses against a dense model"
            )
    return 0


def _parse(arguments: Sequence[str]) -> tuple[GenerateConfig, GenerateOptions]:
    """The settings of the video, and all options of the command."""
    given = last_value(arguments, "--from")
    default = GenerateOptions()
    named: dict[str, Any] = {}
    if given is not None:
        from monarchrt.models.media.writer import read_settings

        stored = from_stored(read_settings(Path(given)), source=Path(given))
        given_names = ((name, getattr(stored, name)) for name in NAMES_FILES)
        named = {name: value for name, value in given_names if value not in _NO_FILES.get(name, (None,))}
        values: dict[str, Any] = {field.name: getattr(stored, field.name) for field in dataclasses.fields(stored)}
        if last_value(arguments, "--attention") and not last_value(arguments, "--tile"):  # has its own settings
            own = ("tile", "blocks", "num_iters", "implementation")
            values |= {name: getattr(default, name) for name in own} | {"attention": STORED}
        elif last_value(arguments, "--tile") and stored.attention != SHORT:
            values["attention"] = STORED  # the tile replaces the video's attention
        values |= {name: getattr(default, name) for name in named}
        default = GenerateOptions(**values)
    options = parse(GenerateOptions, arguments, prog="monarchrt generate", default=default, description=_GENERATE)
    if options.trust and options.from_ is None:
        raise UserError("trust goes with --from VIDEO.mp4; leave it out")
    missing = {name: value for name, value in named.items() if getattr(options, name) in (None, ())}
    if missing:
        listed = ", ".join(f"{name} {_written(value)!a}" for name, value in missing.items())
        if not options.trust:
            typed = ", ".join(f"--{name}" for name in missing)
            raise UserError(
                f"{given} names {listed}; what a video names is read only if you say so: add --trust if you trust it, "
                f"or give {typed} yourself"
            )
        say(f"as {given} says: {listed}")
        options = dataclasses.replace(options, **missing)
    config: dict[str, Any] = {field.name: getattr(options, field.name) for field in dataclasses.fields(GenerateConfig)}
    return GenerateConfig(**config), options


# values that name no file, for the settings for which these are not just None
_NO_FILES: dict[str, tuple[Any, ...]] = {
    "lora": ((), NO_LORA),
    "decoder": (None, *DECODERS),
    "condition": (None, NO_CONDITION),
}


def _written(value: Any) -> str:
    """A setting as it is given on the command line."""
    return " ".join(value) if isinstance(value, tuple) else str(value)
