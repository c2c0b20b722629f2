"""A source that reads Self-Forcing's LMDBs of latents and captions.

Keys are `latents_shape`, numbers separated by spaces, and for each row i `latents_{i}_data`, float16 [F, C, h, w] in C
order, and `prompts_{i}_data`, UTF-8. Rows may have a leading axis of states, of which the last is the clean clip. The
LMDB may be split into shards, one in each subfolder of a folder.
"""

import hashlib
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monarch_jax.checks import brief
from monarchrt.models.errors import UserError
from monarchrt.models.media.windows import held_out_count
from monarchrt.train.data import Batch, ReadsParts, example_order, likeness
from monarchrt.train.data_settings import DataConfig
from monarchrt.train.texts import CHANNELS, Embeddings

_FILE = "data.mdb"
_PEEK = 4096  # bytes at each end of a row that are part of the fingerprint
# reads all keys, and the first and last byte of each value
_WALK = """
import sys, lmdb
with lmdb.open(sys.argv[1], readonly=True, lock=False, readahead=False, subdir=sys.argv[2] == "folder") as file:
    with file.begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            bytes(key), value[:1].tobytes(), value[-1:].tobytes()
"""


def shards(path: Path) -> list[Path]:
    """The LMDBs at a path: an .mdb file, a folder with data.mdb, or a folder of such folders; [] if there are none.

    Examples:
        >>> shards(Path("nowhere"))
        []
    """
    if path.is_file():
        return [path] if path.suffix == ".mdb" else []
    if (path / _FILE).is_file():
        return [path]
    return sorted(child for child in path.iterdir() if (child / _FILE).is_file()) if path.is_dir() else []


class LatentLMDB(ReadsParts):
    """Latents of an LMDB, transposed to [F, h, w, C], with embeddings of their captions.

    Args:
        path: A path at which `shards` finds LMDBs.
        config: Settings of the data, of which `held_out`, `components`, `text_cache` and `rows` are used.
        unread: Width of zero embeddings to use instead of encoding the captions, as in `Embeddings`.

    Raises:
        UserError: If an LMDB cannot be opened or is damaged, a row is missing or has another size, or the channels are
            not the second axis.
    """

    def __init__(self, path: Path, config: DataConfig, *, unread: int | None = None):
        self._path = path
        self._shards = [_Shard(shard) for shard in shards(path)]
        first = self._shards[0]
        for shard in self._shards:
            if shard.row != first.row:
                raise UserError(f"latents {shard.path} has rows {shard.row}, but {first.path} has {first.row}")
        self._rows = [(shard, number) for shard in self._shards for number in range(shard.count)]
        if len(self._rows) < 2:
            raise UserError(f"latents {path} has {len(self._rows)} rows; at least 2 are needed")
        _check_channels(path, first.latents(0))
        count = held_out_count(len(self._rows), config.held_out)
        self.train_rows, self.held_out_rows = self._rows[:-count], self._rows[-count:]
        self._captions = {row: row[0].caption(row[1]) for row in self._rows}
        self._embeddings = Embeddings(list(self._captions.values()), config, beside=path, unread=unread)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (F, h, w, C) of one example."""
        frames, channels, height, width = self._shards[0].row[-4:]
        return (frames, height, width, channels)

    @property
    def held_out(self) -> int:
        """Number of held-out examples, which are the last rows."""
        return len(self.held_out_rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all captions and of both ends of every row, since all rows together are hundreds of GB."""
        digest = hashlib.sha256(repr(self._shards[0].row).encode())
        for shard, number in self._rows:
            digest.update(self._captions[shard, number].encode())
            digest.update(shard.ends(number))
        return digest.hexdigest()

    def train_part(self, step: int, batch: int, seed: int, rows: range) -> Batch:
        """The examples at `rows` of a step's batch; others are not read."""
        order = example_order(step, batch, seed, len(self.train_rows), rows)
        return self._load([self.train_rows[index] for index, _ in order])

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out examples."""
        return self._load([self.held_out_rows[index] for index in indices])

    def _load(self, rows: Sequence[tuple["_Shard", int]]) -> Batch:
        latents = np.stack([shard.latents(number) for shard, number in rows]).astype(np.float32)
        if not np.isfinite(latents).all():
            bad = next(number for shard, number in rows if not np.isfinite(shard.latents(number)).all())
            raise UserError(f"latents {self._path} has NaN or infinite numbers in row {bad}; make it again")
        text = self._embeddings.of([self._captions[row] for row in rows])
        return Batch(np.ascontiguousarray(np.moveaxis(latents, 2, -1)), text)


class _Shard:
    """An LMDB, opened for reading."""

    def __init__(self, path: Path):
        self.path = path
        try:
            import lmdb
        except ImportError as error:
            raise UserError(f"latents {path} is an LMDB, which needs a library: pip install lmdb") from error
        try:
            self._file = lmdb.open(str(path), readonly=True, lock=False, readahead=False, subdir=path.is_dir())
            pages, entries = self._file.info()["last_pgno"] + 1, self._file.stat()["entries"]
            whole = pages * self._file.stat()["psize"]
        except lmdb.Error as error:
            raise UserError(f"latents {path} cannot be opened as an LMDB: {error}") from error
        size = (path / _FILE if path.is_dir() else path).stat().st_size
        if size < whole:
            raise UserError(f"latents {path} is cut off: {size} bytes of {whole}; copy or download it again")
        _check_pages(path)
        shape = self._get("latents_shape")
        try:
            self.count, *row = map(int, bytes(shape).decode().split())
        except ValueError as error:
            raise UserError(f"latents {path} has no shape in latents_shape: {bytes(shape)[:60]!r}") from error
        self.row = tuple(row)
        if len(row) not in (4, 5) or min(self.count, *row) < 1:
            raise UserError(
                f"latents {path} has rows of shape {self.row}; they must be [F, C, h, w], or states of that, as "
                f"Self-Forcing's are"
            )
        if 2 * self.count > entries:
            raise UserError(
                f"latents {path} says {brief(self.count)} rows, but has {entries} entries, two for each row; it is cut "
                f"off"
            )

    def __hash__(self) -> int:
        return id(self)

    def _get(self, key: str) -> Any:
        with self._file.begin(buffers=False) as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise UserError(
                f"latents {self.path} has no {key}; it is not an LMDB of Self-Forcing latents, or it is cut off"
            )
        return value

    def _row(self, number: int) -> bytes:
        data, expected = self._get(f"latents_{number}_data"), 2 * math.prod(self.row)
        if len(data) != expected:
            raise UserError(
                f"latents {self.path} has {len(data)} bytes in row {number}; float16 of {self.row} are {expected}"
            )
        return data

    def latents(self, number: int) -> np.ndarray:
        """Reads the clean clip of a row, float16 [F, C, h, w]."""
        array = np.frombuffer(self._row(number), np.float16).reshape(self.row)
        return array[-1] if array.ndim == 5 else array

    def ends(self, number: int) -> bytes:
        """Reads the first and last bytes of a row."""
        data = self._row(number)
        return data[:_PEEK] + data[-_PEEK:]

    def caption(self, number: int) -> str:
        """Reads the caption of a row."""
        data = bytes(self._get(f"prompts_{number}_data"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"latents {self.path} has a caption in row {number} that is not UTF-8") from error


def _check_pages(path: Path) -> None:
    """Reads through an LMDB in a separate process: the library does not validate offsets, and a wrong one can crash it.

    Raises:
        UserError: If that process crashed, or found the file damaged.
    """
    kind = "folder" if path.is_dir() else "file"
    walk = subprocess.run([sys.executable, "-c", _WALK, str(path), kind], capture_output=True, text=True, check=False)
    if walk.returncode < 0:
        found = f"reading it ends with {signal.Signals(-walk.returncode).name}, as pages lie past its end"
        raise UserError(f"latents {path} is damaged ({found}); copy or download it again")
    if walk.returncode:
        lines = walk.stderr.strip().splitlines() or [""]
        raise UserError(f"latents {path} is damaged ({lines[-1]}); copy or download it again")


def _check_channels(path: Path, row: np.ndarray) -> None:
    """Raises UserError unless the second axis is that of the channels."""
    frames, channels, *size = row.shape
    alike = [likeness(row.astype(np.float32), axis) for axis in range(4)]
    # neighbors along height or width are correlated, neighboring channels are not
    turned = channels != CHANNELS and CHANNELS in (frames, *size)
    if turned or alike[1] > 0.5 > 2 * max(abs(alike[2]), abs(alike[3])):
        raise UserError(
            f"latents {path} has clips {row.shape}, which are not [F, C, h, w] with {CHANNELS} channels; write them in "
            f"that order, as Self-Forcing's are"
        )
