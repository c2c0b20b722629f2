"""Text embeddings for Wan's transformer, and files with saved ones."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, write_arrays
from monarchrt.models.errors import UserError
from monarchrt.models.umt5.encoder import UMT5Encoder
from monarchrt.models.umt5.tokenizer import Tokenizer

FORMAT = "monarchrt text embeddings"
MAX_ROWS = 100_000  # limit on the rows of an embedding; models use 512


@nnx.jit
def _encode(encoder: UMT5Encoder, ids: Array, mask: Array) -> Array:
    return jnp.where(mask[..., None], encoder(ids, mask), 0)


def encode_prompts(
    prompts: Sequence[str],
    *,
    encoder: UMT5Encoder,
    tokenizer: Tokenizer,
    length: int = 512,
    warn: Callable[[str], None] = warnings.warn,
    empty: bool = False,
) -> Iterator[np.ndarray]:
    """Encodes prompts; embeddings are zero past the end of each (as in Self-Forcing; Wan's truncation is equivalent).

    One compiled program computes them one at a time, and each is moved to the host, so that only one is on the device.

    Args:
        prompts: Texts.
        encoder: The encoder.
        tokenizer: Its tokenizer.
        length: Rows per prompt.
        warn: Called with a line for each prompt that is truncated.
        empty: Whether a prompt may be empty, as negative prompts may.

    Yields:
        [length, D] in the encoder's compute dtype, for each prompt.

    Raises:
        UserError: If a prompt is empty, or the tokenizer has ids that the encoder lacks; before anything is encoded.
    """
    ids, mask = tokenizer(prompts, length=length, warn=warn, empty=empty)
    if ids.max() >= encoder.config.vocab_size:
        raise UserError(
            f"the tokenizer gives id {ids.max()}; the encoder knows {encoder.config.vocab_size}: they do not belong "
            f"together"
        )
    for i in range(len(ids)):
        # a copy: on a CPU, a view would keep the array alive
        yield np.array(_encode(encoder, jnp.asarray(ids[i : i + 1]), jnp.asarray(mask[i : i + 1])))[0]


def save_embeddings(path: str | Path, embeddings: Mapping[str, Array | np.ndarray]) -> Path:
    """Writes embeddings of prompts to a safetensors file, without their trailing zero rows.

    Examples:
        >>> import tempfile
        >>> path = save_embeddings(tempfile.mkdtemp() + "/text.safetensors", {"a cat": np.ones((5, 4), np.float32)})
        >>> {prompt: array.shape for prompt, array in load_embeddings(path, length=8).items()}
        {'a cat': (8, 4)}

    Args:
        path: The file, replaced if it exists; parent folders are created.
        embeddings: Embedding [L, D] by prompt.

    Returns:
        The path.

    Raises:
        UserError: If there are none, one is not a float array [L, D], or the file cannot be written.
    """
    path = Path(path).expanduser()
    if not embeddings:
        raise UserError(f"no embeddings were given to write to {path}")
    arrays: dict[str, np.ndarray] = {}
    metadata = {"format": FORMAT}
    for i, (prompt, embedding) in enumerate(embeddings.items()):
        array = np.asarray(jax.device_get(embedding))
        if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(
                f"the embedding of {prompt!r} is {array.dtype}{list(array.shape)}; it must be floats [L, D]"
            )
        used = np.flatnonzero(array.any(axis=1))
        name = f"embedding.{i:04}"
        arrays[name] = array[: used[-1] + 1 if used.size else 1]
        metadata |= {f"{name}.prompt": prompt, f"{name}.rows": str(len(array))}
    write_arrays(path, arrays, metadata=metadata)
    return path


def load_embeddings(path: str | Path, *, length: int | None = None) -> dict[str, np.ndarray]:
    """Reads a file written by `save_embeddings`.

    Args:
        path: The file.
        length: Rows to which each embedding is zero-padded; None: the number of rows before saving, by default 512.

    Returns:
        Embedding [L, D] by prompt, in the saved order and dtype.

    Raises:
        UserError: If the file does not exist or is of another kind, or an embedding has more rows than `length`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"path={str(path)!r} is not a file of text embeddings; it does not exist")
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        raise UserError(f"{path} is not a file of text embeddings: {error}") from error
    if file.metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a file of text embeddings; make one with save_embeddings")
    embeddings = {}
    for name in sorted(file.infos, key=lambda name: (len(name), name)):
        array = file.read(name)
        try:
            prompt = file.metadata[f"{name}.prompt"]
            rows = int(file.metadata[f"{name}.rows"]) if length is None else length
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} does not name the prompt of {name}; encode it again") from error
        if array.ndim != 2:
            raise UserError(f"{path}: the embedding of {prompt[:40]!r} is {list(array.shape)}; it must be [L, D]")
        if len(array) > rows:
            raise UserError(f"{path}: the embedding of {prompt[:40]!r} has {len(array)} rows, more than {rows}")
        if rows > MAX_ROWS:
            raise UserError(f"{path}: the embedding of {prompt[:40]!r} should have {rows} rows, over {MAX_ROWS}")
        embeddings[prompt] = np.concatenate([array, np.zeros((rows - len(array), array.shape[1]), array.dtype)])
    return embeddings
