"""Reading of the tiny autoencoder's published files, `taew2_1.pth` or `taew2_1.safetensors`, and others of the kind."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from monarchrt.models.checkpoints.reading import (
    BareFile,
    Entry,
    Layout,
    Progress,
    load_part,
    open_tensors,
    stored_dtype,
)
from monarchrt.models.checkpoints.recognize import refuse
from monarchrt.models.checkpoints.tensor_files import TensorFile, TensorInfo
from monarchrt.models.vae.tiny import RGB, TinyVAE, TinyVAEConfig

TINY_FILES = ("taew2_1.safetensors", "taew2_1.pth")
LEVELS, BLOCKS = 3, 3
# index of the first level in the published file, which also numbers layers without parameters
ENCODER_LEVEL, DECODER_LEVEL = 2 + BLOCKS, 3 + BLOCKS
ANCHOR = "decoder.1.weight"


def tiny_entries() -> list[Entry]:
    """Every tensor of the published file.

    Examples:
        >>> entries = tiny_entries()
        >>> len(entries), entries[0].names["official"]
        (128, 'encoder.0.weight')
    """
    leaves: tuple[tuple[str, str, Layout], ...] = (("kernel", "weight", "conv2d"), ("bias", "bias", "vector"))
    return [
        Entry((*ours.split("."), leaf), None, {"official": f"{theirs}.{name}"}, layout)
        for ours, theirs, biased in _layers()
        for leaf, name, layout in leaves[: 1 + biased]
    ]


def _layers() -> Iterator[tuple[str, str, bool]]:
    """Our name of a convolution, the published one, and whether it has a bias."""
    yield "conv_in", "encoder.0", True
    for level in range(LEVELS):
        at = 2 + level * ENCODER_LEVEL
        yield f"down.{level}.pool", f"encoder.{at}.conv", False
        yield f"down.{level}.shrink", f"encoder.{at + 1}", False
        yield from _blocks(f"down.{level}", "encoder.{}", at + 2)
    yield "to_latents", f"encoder.{2 + LEVELS * ENCODER_LEVEL}", True
    yield "from_latents", "decoder.1", True
    for level in range(LEVELS):
        at = 3 + level * DECODER_LEVEL
        yield from _blocks(f"up.{level}", "decoder.{}", at)
        yield f"up.{level}.grow", f"decoder.{at + BLOCKS + 1}.conv", False
        yield f"up.{level}.out", f"decoder.{at + BLOCKS + 2}", False
    yield "conv_out", f"decoder.{4 + LEVELS * DECODER_LEVEL}", True


def _blocks(ours: str, theirs: str, first: int) -> Iterator[tuple[str, str, bool]]:
    for block in range(BLOCKS):
        for conv in range(3):
            yield f"{ours}.blocks.{block}.conv{conv + 1}", f"{theirs.format(first + block)}.conv.{2 * conv}", True


def load_tiny_vae(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> TinyVAE:
    """Loads a tiny autoencoder, whose sizes follow from the tensors.

    Examples:
        >>> vae = load_tiny_vae("taew2_1.pth", dtype="bfloat16")  # doctest: +SKIP

    Args:
        path: `taew2_1.pth`, `taew2_1.safetensors`, another file of this kind, or a folder with one of the first two.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters; None keeps the file's (float32 if it is mixed).
        progress: Called after each tensor with its name, bytes read so far, and bytes in total.

    Returns:
        The autoencoder.

    Raises:
        ValueError: If there is no such file, it lacks tensors or has others, or is another model.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in TINY_FILES if (path / name).is_file()]
        if not files:
            raise ValueError(f"{path} has none of {', '.join(TINY_FILES)}; give the file itself.")
        path = files[0]
    file = BareFile(open_tensors(path), anchors=(ANCHOR,))
    config = tiny_config(file, where=path)
    param_dtype = param_dtype or stored_dtype(file)
    return load_part(
        file,
        tiny_entries(),
        lambda: TinyVAE(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype),
        naming="official",
        what="a tiny autoencoder",
        dtype=param_dtype,
        sharding=None,
        progress=progress,
    )


def tiny_config(file: TensorFile, *, where: Path) -> TinyVAEConfig:
    """The configuration, read from the shapes of tensors.

    Raises:
        ValueError: If they belong to another kind of model, or to a tiny autoencoder that groups pixels.
    """
    entries = {".".join(entry.path): entry.names["official"] for entry in tiny_entries()}
    shapes = _shapes(file.infos)
    if ANCHOR not in shapes or "encoder.0.weight" not in shapes or entries["up.0.grow.kernel"] not in shapes:
        raise refuse(file.infos, where, "a tiny autoencoder (TAEHV)")

    def of(name: str) -> tuple[int, ...]:
        shape = shapes.get(theirs := entries[f"{name}.kernel"], ())
        if len(shape) != 4:
            raise ValueError(f"{where} lacks {theirs}, or it has shape {list(shape)}, which is not a convolution's.")
        return shape

    pixels = of("conv_in")[1]
    if pixels != RGB:
        raise ValueError(
            f"{where} takes pixels in groups ({pixels} channels), as other models' tiny autoencoders do; "
            f"Wan 2.1's is taew2_1, with {RGB}."
        )
    return TinyVAEConfig(
        z_dim=of("from_latents")[1],
        encoder=of("conv_in")[0],
        decoder=(of("from_latents")[0], *(of(f"up.{level}.out")[0] for level in range(LEVELS))),
        downsample=tuple(of(f"down.{level}.pool")[1] // of(f"down.{level}.pool")[0] for level in range(LEVELS)),
        upsample=tuple(of(f"up.{level}.grow")[0] // of(f"up.{level}.grow")[1] for level in range(LEVELS)),
    )


def _shapes(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(info.shape) for name, info in infos.items()}
