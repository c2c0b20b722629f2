"""`monarchrt study map`, `mass` and `tiles`: studies of attention maps, and of the best tile for a checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

from monarchrt.models.errors import UserError
from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.tables import print_table, say
from monarchrt.train.interrupt import finish_first
from monarchrt.train.studies.config import MapConfig, MassConfig, TilesConfig

_USAGE = """usage: monarchrt study {map,mass,tiles} ...

  map    error of the attention map against density: top-k, low rank, Monarch by tile and refinement steps
  mass   fraction of the keys that hold 95% of the attention, by block of the roll-out
  tiles  error of outputs and videos against time, by tile, and the commands that use the best tiles

`monarchrt study map --help` lists its options; likewise the others."""

_MAP = """Error of the attention map against density, on maps of the paper's equation 1 and of a checkpoint.

monarchrt study map --checkpoint runs/demo/dense --out study

monarchrt study map --checkpoint Wan-AI/Wan2.1-T2V-1.3B --latents latents --layers 10 20 --heads 0 5 --crop 3 30 52"""
_MASS = """Fraction of the keys that hold a given fraction of the attention, by block of the roll-out of a video.

monarchrt study mass --checkpoint runs/demo/dense --out study"""
_TILES = """Error of the layers' outputs and of a sampled video against time, per tile and layout.

monarchrt study tiles --checkpoint runs/demo/dense --steps 1 2 --out study"""


def study_command(arguments: Sequence[str]) -> int:
    """`monarchrt study KIND`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    kind, *rest = arguments
    if kind not in _KINDS:
        raise UserError(f"study {kind!r} is unknown; choose from {', '.join(_KINDS)}")
    config_class, description, run = _KINDS[kind]
    config = parse(config_class, rest, prog=f"monarchrt study {kind}", description=description)
    was_there = config.out.exists()
    try:
        run(config)
    except UserError:  # a study that could not start leaves no empty folder
        if not was_there and config.out.is_dir() and not any(config.out.iterdir()):
            config.out.rmdir()
        raise
    return 0


def _map(config: MapConfig) -> None:
    with finish_first():
        from monarchrt.train.studies.maps import FILES, study_map, table

    result = study_map(config)
    print_table(["method", "nearest to 10%", "error"], table(result))
    say(f"{config.out}: {', '.join(FILES)}")


def _mass(config: MassConfig) -> None:
    with finish_first():
        from monarchrt.train.studies.mass import FILES, study_mass

    result = study_mass(config)
    rows = [(label, *(f"{value:.1%}" for value in values)) for label, values in result["shares"].items()]
    blocks = [f"block {n}" for n in result["blocks"]]
    print_table([f"keys for {config.mass:.0%}", *blocks], [*rows, ("mean", *(f"{x:.1%}" for x in result["mean"]))])
    say(f"{config.out}: {', '.join(FILES)}")


def _tiles(config: TilesConfig) -> None:
    with finish_first():
        from monarchrt.train.studies.tiles import FILES, study_tiles

    result = study_tiles(config)
    rows = []
    for point in result["points"]:
        psnr = "" if point.get("psnr") is None else f"{point['psnr']:.1f} dB"
        mark = "*" * point["front"] + "+" * point.get("video_front", False)
        shown = (mark, point["label"], f"{point['density']:.1%}", f"{point['time']:.3g}", f"{point['error']:.3f}", psnr)
        rows.append(shown)
    print_table(["", "tile", "density", "time", "error", "video"], rows)
    for point in result["points"]:
        if "no_video" in point:
            say(f"{point['label']}: no video: {point['no_video']}")
    filmed = any("video_front" in point for point in result["points"])
    also = "; +: likewise for time and PSNR of the videos" if filmed else ""
    say(f"time: {result['unit']}; *: on the Pareto front of time and error{also}. To generate videos with these tiles:")
    for point in result["points"]:
        if point["front"] or point.get("video_front"):
            say(f"  {point['command']}")
    say(f"{config.out}: {', '.join(FILES)}")


_KINDS: dict[str, tuple[type, str, Callable[[Any], None]]] = {
    "map": (MapConfig, _MAP, _map),
    "mass": (MassConfig, _MASS, _mass),
    "tiles": (TilesConfig, _TILES, _tiles),
}
