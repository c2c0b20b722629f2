"""`monarchrt encode`: encodes clips and captions into latents and embeddings for finetuning."""

from collections.abc import Sequence

from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.tables import say

_ENCODE = """Encode captioned clips with Wan's VAE and text encoder, once, for `monarchrt train --latents`.

monarchrt encode --clips clips --components Wan-AI/Wan2.1-T2V-1.3B --out latents"""


def encode_command(arguments: Sequence[str]) -> int:
    """`monarchrt encode --clips FOLDER --components WAN --out FOLDER`."""
    from monarchrt.models.generate.encode import EncodeConfig, encode_clips

    options = parse(EncodeConfig, arguments, prog="monarchrt encode", description=_ENCODE)
    files = encode_clips(options)
    say(f"{len(files)} clips are in {options.out}")
    return 0
