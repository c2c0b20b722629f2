"""The attention settings that benchmarks compare: their short names, and the notation that each stands for.

What is not a short name is taken as notation, so that any kind can be timed: `--attention dense 'top_k(keep=0.1)'`.
The benchmarks themselves know no kind; they use a setting's own grid check, count of arithmetic and JSON.
"""

import argparse

from monarchrt.models.attention.base import Attention
from monarchrt.models.attention.notation import parse

# how: what --implementation and --keep-intermediates add, which change the program and not the numbers
NAMED = {
    "dense": "dense",
    "monarch 95%": "monarch(tile=(1,{rows},{columns}){how})",
    "monarch 97%": "monarch(tile=(3,{rows},{columns}){how})",
}
# what leaves keys out, by lists of blocks: at the densities of Tables 5 to 8, without warm-up and without gates
SPARSE = {
    "VSA 85%": "vsa(keep=0.15,gate=False{how})",
    "SVG 85%": "svg(keep=0.15{how})",
    "Radial 85%": "radial(keep=0.15{how})",
    "STA 85%": "sliding_tile(tile=(3,5,4),window=(3,3,9){how})",
    "SLA 85%": "sla(keep=0.15,linear=False{how})",
    "VSA 95%": "vsa(keep=0.05,gate=False{how})",
    "VSA 97%": "vsa(keep=0.03,gate=False{how})",
    "VSA 98%": "vsa(keep=0.02,gate=False{how})",
    "VSA 85%, published cubes": "vsa(keep=0.15,cube=(4,4,4),gate=False{how})",
    "SVG 80%": "svg(keep=0.2{how})",
    "Radial 90%": "radial(keep=0.1{how})",
    "STA 85%, 720p": "sliding_tile(tile=(3,5,4),window=(3,7,9){how})",  # the window above is 94% there
}
EXACT = "dense"  # what critics and teachers have
CHECKED = "monarch 95%"  # whose numbers are compared with those of XLA before anything is timed


def latent_shape(small: bool) -> tuple[int, int, int, int, int]:
    """Latents of one clip of 81 frames at 480x832, or of a small one for CPUs: [B, F, H, W, C]."""
    return (1, 6, 8, 16, 16) if small else (1, 21, 60, 104, 16)


def setting(
    name: str,
    rows: int,
    columns: int,
    *,
    implementation: str | None = None,
    keep: bool = False,
    intermediates: str | None = None,
) -> Attention:
    """The setting of that name.

    Args:
        name: A key of `NAMED`, or notation.
        rows: Rows of tokens of a frame.
        columns: Columns of tokens of a frame.
        implementation: Backend of a named setting that has a choice of them; None leaves it to the library.
        keep: Whether such a setting keeps intermediates for the backward pass.
        intermediates: What such a setting stores them in, "e4m3" or None.

    Returns:
        The setting.

    Raises:
        ValueError: If it is neither a name nor notation.
    """
    if name not in NAMED:
        return parse(name)
    how = f",implementation={implementation}" if implementation else ""
    how += ",keep_intermediates=True" if keep else ""
    how += f",intermediates={intermediates}" if intermediates else ""
    return parse(NAMED[name].format(rows=rows, columns=columns, how=how))


def sparse_setting(name: str, implementation: str | None = None) -> Attention:
    """The setting of a name in `SPARSE`, by an implementation; None leaves it to the kind."""
    return parse(SPARSE[name].format(how=f",implementation={implementation}" if implementation else ""))


def name_or_notation(text: str) -> str:
    """The type of an option of argparse."""
    if text not in NAMED:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{str(error).rstrip('.')}; or a name: {', '.join(NAMED)}") from None
    return text
