"""Texts of a run: a source that reads prompts from a file, and text embeddings, encoded once and stored in files."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from monarchrt.models.errors import UserError
from monarchrt.models.files import decoded
from monarchrt.models.media.windows import held_out_count
from monarchrt.train.data import Batch, ReadsParts, example_order
from monarchrt.train.data_settings import DataConfig

CHANNELS = 16  # latent channels of Wan 2.1's VAE
_DAY = 86400.0  # seconds for which other processes wait until texts are encoded
_GLANCE = 2**16  # bytes up to which processes compare whole files of embeddings, not just samples
TEMPORAL, SPATIAL = 4, 8  # frames per latent frame after the first, and pixels per latent along height and width


def read_prompts(path: Path) -> list[str]:
    """Reads the non-empty lines of a text file.

    Raises:
        UserError: If the file cannot be read, is neither UTF-8 nor UTF-16 with a byte order mark, or has no prompt.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts {path} cannot be read: {error.strerror or error}") from error
    lines = [line.strip() for line in decoded(data, name=f"prompts {path}").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"prompts {path} has no prompt; write one on each line")
    return prompts


class Embeddings:
    """Embeddings of texts, encoded when constructed, and stored in one file per text.

    Args:
        texts: All texts.
        config: Settings of the data, of which `components`, `text_cache` and `rows` are used.
        beside: File or folder of the texts, next to which embeddings are stored without `text_cache`.
        report: Called with lines of progress.
        unread: Width of zero embeddings to use instead of encoding the texts; None to encode them.

    Raises:
        UserError: If the text encoder or the tokenizer is missing.
    """

    def __init__(
        self,
        texts: Sequence[str],
        config: DataConfig,
        *,
        beside: Path,
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
        unread: int | None = None,
    ):
        self._rows, self._unread = config.rows, unread
        self._files: dict[str, Path] = {}
        if unread is not None:
            return
        import jax

        from monarchrt.models.generate.config import GenerateConfig
        from monarchrt.models.generate.load import find_components
        from monarchrt.models.generate.text import encode_once
        from monarchrt.models.processes.agreement import is_first_process, run_in_first
        from monarchrt.models.processes.alike import check_same, digest_of, listing, samples, weight_files

        if config.components is None:
            raise UserError(
                f"{beside} has texts to encode, but there is no text encoder; give --components, for example "
                f"Wan-AI/Wan2.1-T2V-1.3B"
            )
        parts = find_components(GenerateConfig(components=config.components), config.components)
        encoder, tokenizer = parts.text_encoder, parts.tokenizer
        if encoder is None or tokenizer is None:
            raise UserError(f"components {config.components} has no text encoder or tokenizer")
        folder = config.text_cache or beside.with_name(f"{beside.name}.texts")
        different = list(dict.fromkeys(texts))
        check_same("text encoders", lambda: listing([*weight_files(encoder), *weight_files(tokenizer)]))

        def encode(report: Callable[[str], None]) -> None:
            report(f"{len(different)} texts of {beside}; missing embeddings are computed and stored in {folder}")
            self._files = encode_once(
                different, folder, encoder=encoder, tokenizer=tokenizer, rows=config.rows,
                dtype="bfloat16" if jax.default_backend() == "gpu" else "float32", report=report,
            )  # fmt: skip

        run_in_first("texts", lambda: encode(report), seconds=_DAY)
        if not is_first_process():  # finds them encoded, unless this process has another folder
            encode(lambda line: None)
        kept = list(self._files.values())
        check_same("kept text embeddings", lambda: digest_of(samples(kept, whole=_GLANCE, block=_GLANCE // 8)))

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """Reads embeddings of texts: [n, rows, D], float32, zero after the end of each text."""
        from monarchrt.models.umt5 import load_embeddings

        if self._unread is not None:
            return np.zeros((len(texts), self._rows, self._unread), np.float32)
        embeddings = (load_embeddings(self._files[text], length=self._rows)[text] for text in texts)
        return np.stack([np.asarray(array, np.float32) for array in embeddings])


class PromptFile(ReadsParts):
    """Prompts without clips; latents are zero, with the shape of the clips to generate.

    Args:
        config: Settings of the data, of which `prompts`, the size of a video, `held_out` and those of texts are used.
        unread: Width of zero embeddings to use instead of encoding the prompts, as for `Embeddings`.

    Raises:
        UserError: If the file cannot be used, or has fewer than two different prompts.
    """

    def __init__(self, config: DataConfig, *, unread: int | None = None):
        path = config.prompts or Path()
        self._prompts = read_prompts(path)
        if len(set(self._prompts)) < 2:
            raise UserError(f"prompts {path} has one prompt; at least 2 are needed, as some are held out")
        self._shape = (1 + (config.frames - 1) // TEMPORAL, config.height // SPATIAL, config.width // SPATIAL, CHANNELS)
        self._rows = config.rows
        count = held_out_count(len(self._prompts), config.held_out)
        self.train_prompts, self.held_out_prompts = self._prompts[:-count], self._prompts[-count:]
        self._embeddings = Embeddings(self._prompts, config, beside=path, unread=unread)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (F, h, w, C) of a clip."""
        return self._shape

    @property
    def held_out(self) -> int:
        """Number of held-out prompts, which are the last ones in the file."""
        return len(self.held_out_prompts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the prompts in their order, the shape of latents and the rows of embeddings."""
        return hashlib.sha256(repr((self._prompts, self._shape, self._rows)).encode()).hexdigest()

    def train_part(self, step: int, batch: int, seed: int, rows: range) -> Batch:
        """The prompts at `rows` of a step's batch."""
        order = example_order(step, batch, seed, len(self.train_prompts), rows)
        return self._load([self.train_prompts[index] for index, _ in order])

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out prompts."""
        return self._load([self.held_out_prompts[index] for index in indices])

    def _load(self, prompts: list[str]) -> Batch:
        return Batch(np.zeros((len(prompts), *self._shape), np.float32), self._embeddings.of(prompts))
