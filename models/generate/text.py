"""Text embeddings, from the text encoder or from a file."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import NEGATIVE_PROMPT, GenerateConfig
from monarchrt.models.umt5 import Tokenizer, encode_prompts, load_embeddings, load_umt5, save_embeddings


def text_embeddings(
    config: GenerateConfig,
    *,
    encoder: Path | None,
    tokenizer: Path | None,
    guides: bool,
    width: int,
    rows: int,
    dtype: str = "bfloat16",
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> tuple[Float[Array, "1 L E"], Float[Array, "1 L E"] | None]:
    """Embeddings of the prompt and, with guidance, of the negative prompt.

    Args:
        config: The settings, with prompts or the file of embeddings.
        encoder: Weights of the text encoder; not needed with a file.
        tokenizer: Folder of the tokenizer; not needed with a file.
        guides: Whether the negative prompt is needed.
        width: Width of an embedding that the network needs.
        rows: Largest number of tokens; longer prompts are cut, with a note to `report`.
        dtype: Dtype of the encoder's computation.
        report: Called with lines of progress.

    Returns:
        Two embeddings [1, rows, width], zero past the end of the prompt; the second is None without guidance.

    Raises:
        UserError: If the prompt is empty or missing in the file, or an embedding has another width or is not finite.
    """
    prompts = [config.prompt or ""]
    if guides:
        prompts.append(NEGATIVE_PROMPT if config.negative_prompt is None else config.negative_prompt)
    if config.embeddings is not None:
        arrays = _read(config.embeddings, prompts, rows)
    elif encoder is None or tokenizer is None:
        raise UserError("there is no text encoder; give its folder with --components, or the file of embeddings")
    else:
        encoded = encode_texts(prompts, encoder=encoder, tokenizer=tokenizer, rows=rows, dtype=dtype, report=report)
        arrays = dict(encoded)
    for prompt, array in arrays.items():
        if array.shape[-1] != width:
            raise UserError(
                f"the text embedding of {prompt[:40]!r} is {array.shape[-1]} wide; the network takes {width}"
            )
        if not np.isfinite(np.asarray(array, np.float32)).all():
            where = config.embeddings or encoder
            raise UserError(f"the text embedding of {prompt[:40]!r} from {where} is NaN or infinite; check that file")
    if config.save_embeddings is not None:
        report(f"embeddings are saved in {save_embeddings(config.save_embeddings, arrays)}")
    batches = [jnp.asarray(array, jnp.float32)[None] for array in arrays.values()]
    return batches[0], batches[-1] if guides else None


def encode_texts(
    prompts: list[str],
    *,
    encoder: Path,
    tokenizer: Path,
    rows: int,
    dtype: str = "bfloat16",
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields embeddings of texts; the encoder is in memory only while this runs.

    Args:
        prompts: The texts.
        encoder: Weights of the text encoder.
        tokenizer: Folder of the tokenizer.
        rows: Largest number of tokens; longer texts are cut, with a note to `report`.
        dtype: Dtype of the encoder's computation.
        report: Called with lines of progress.

    Yields:
        Each text and its embedding, a host array [rows, width], zero past the end of the text.

    Raises:
        UserError: If a text is empty or the encoder cannot be read.
    """
    ours = Tokenizer.load(tokenizer)
    # an empty prompt is found before gigabytes are read; negative ones, which follow, may be empty
    ours(prompts[:1], length=rows, warn=lambda line: None)
    with user_input():
        model = load_umt5(encoder, dtype=dtype, param_dtype=dtype)
    yield from zip(
        prompts,
        encode_prompts(prompts, encoder=model, tokenizer=ours, length=rows, warn=report, empty=True),
        strict=True,
    )


class TextEncoder:
    """Encodes prompts; the encoder is in memory while this object lives.

    Args:
        encoder: Weights of the text encoder.
        tokenizer: Folder of the tokenizer.
        rows: Largest number of tokens; longer texts are cut, with a note to `report`.
        dtype: Dtype of the encoder's computation.
        report: Called with notes.

    Raises:
        UserError: If the encoder cannot be read.
    """

    def __init__(
        self,
        encoder: Path,
        tokenizer: Path,
        *,
        rows: int,
        dtype: str = "bfloat16",
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ):
        self._tokenizer, self._rows, self._report = Tokenizer.load(tokenizer), rows, report
        with user_input():
            self._encoder = load_umt5(encoder, dtype=dtype, param_dtype=dtype)

    def __call__(self, prompts: Sequence[str]) -> list[Float[Array, "1 L E"]]:
        """The embedding of each prompt, float32, zero past its end."""
        embeddings = encode_prompts(
            prompts, encoder=self._encoder, tokenizer=self._tokenizer, length=self._rows, warn=self._report, empty=True
        )
        return [jnp.asarray(array, jnp.float32)[None] for array in embeddings]


class StoredTexts:
    """Embeddings from a file; other prompts are refused."""

    def __init__(self, path: Path, *, rows: int):
        self._path, self._stored = path, load_embeddings(path, length=rows)

    @property
    def prompts(self) -> list[str]:
        """The prompts in the file."""
        return list(self._stored)

    def __call__(self, prompts: Sequence[str]) -> list[Float[Array, "1 L E"]]:
        """The embedding of each prompt, float32, zero past its end.

        Raises:
            UserError: If the file lacks a prompt; names some that it has.
        """
        for prompt in prompts:
            if prompt not in self._stored:
                known = ", ".join(repr(name[:40]) for name in list(self._stored)[:8])
                raise UserError(f"embeddings {self._path} has no {prompt[:40]!r}; it has {known}")
        return [jnp.asarray(self._stored[prompt], jnp.float32)[None] for prompt in prompts]


def encode_once(
    texts: Sequence[str],
    folder: Path,
    *,
    encoder: Path,
    tokenizer: Path,
    rows: int,
    dtype: str,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Path]:
    """Writes a file with the embedding of each text; existing files of an earlier run are kept.

    Args:
        texts: The texts.
        folder: Folder of the files; their names depend on text, encoder, rows and dtype.
        encoder: As in `encode_texts`.
        tokenizer: As in `encode_texts`.
        rows: As in `encode_texts`.
        dtype: As in `encode_texts`.
        report: As in `encode_texts`.

    Returns:
        The file of each text, readable by `load_embeddings`.

    Raises:
        UserError: If an embedding is not finite or the encoder cannot be read.
    """
    made_by = [str(encoder.absolute()), str(tokenizer.absolute()), rows, dtype]
    files = {}
    for text in texts:
        key = hashlib.sha256(json.dumps([text, *made_by]).encode()).hexdigest()
        files[text] = folder / f"{key}.safetensors"
    todo = [text for text, file in files.items() if not file.exists()]
    if todo:
        encoded = encode_texts(todo, encoder=encoder, tokenizer=tokenizer, rows=rows, dtype=dtype, report=report)
        for text, embedding in encoded:
            if not np.isfinite(np.asarray(embedding, np.float32)).all():
                raise UserError(
                    f"caption {text[:60]!r} produces text embeddings that are NaN or infinite; check the text "
                    f"encoder's weights, or use precision fp32"
                )
            save_embeddings(files[text], {text: embedding})
    return files


def _read(path: Path, prompts: list[str], rows: int) -> dict[str, Any]:
    """Reads embeddings of prompts from a file; of its first prompt, if none is given."""
    stored = load_embeddings(path, length=rows)
    prompt, *negative = prompts
    if not prompt:
        prompt = next(text for text in stored if text not in negative or len(stored) == 1)
    for text in (prompt, *negative):
        if text not in stored:
            known = ", ".join(repr(name[:40]) for name in stored)
            raise UserError(f"embeddings {path} has no {text[:40]!r}; it has {known}")
    return {text: stored[text] for text in (prompt, *negative)}
