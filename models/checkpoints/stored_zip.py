"""Zip archives of uncompressed entries, as written by `torch.save`, with all offsets and sizes checked before use.

Python's own reader trusts the archive: an entry of a few MB may unpack to any size, and the directory may list the same
bytes many times. Here an entry is a range of bytes in the file, and ranges do not overlap.
"""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

MAX_ENTRIES = 100_000
MAX_DIRECTORY = 64 * 2**20  # bytes; the record of an entry has about 60 to 100
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_RECORD = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MASK = 0xFFFFFFFF
ENCRYPTED, SIZES_FOLLOW, UTF8 = 1, 8, 0x800


class StoredEntry(NamedTuple):
    """The position of an entry in its archive: `size` bytes from `start` on, with the CRC-32 `crc`."""

    name: str
    start: int
    size: int
    crc: int


class _Record(NamedTuple):
    """A record of the directory; `offset` is the position of the entry's local header."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int

    @property
    def text(self) -> str:
        return self.name.decode("utf-8" if self.flags & UTF8 else "cp437")


def read_directory(path: Path) -> dict[str, StoredEntry]:
    """Reads the directory of an archive, without the content of its entries.

    Args:
        path: The file.

    Returns:
        The entries by name, in the order of the directory.

    Raises:
        ValueError: If it is not a zip archive or is truncated, entries are compressed, encrypted or overlap, or the
            directory and the entries' own headers disagree.
    """
    try:
        with path.open("rb") as file:
            records, end = _records(file)
            entries = [_entry(file, record, end) for record in records]
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"its directory cannot be read: {error}") from error
    reached = 0
    for record, entry in sorted(zip(records, entries, strict=True), key=lambda pair: pair[0].offset):
        if record.offset < reached:
            raise ValueError(f"its entry {entry.name[:80]!r} overlaps another")
        reached = entry.start + entry.size
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) != len(entries):
        raise ValueError("it has two entries of one name")
    return by_name


def read_entry(path: Path, entry: StoredEntry) -> np.ndarray:
    """Reads the bytes of an entry, uint8 [size], and verifies the checksum.

    Raises:
        ValueError: If the file is too short, or the checksum does not match.
    """
    with path.open("rb") as file:
        file.seek(entry.start)
        data = np.fromfile(file, np.uint8, entry.size)
    if data.size != entry.size:
        raise ValueError(f"it ends after {data.size} of {entry.size} bytes")
    if zlib.crc32(data.data) != entry.crc:
        raise ValueError("Bad CRC-32, its bytes have changed")
    return data


def _records(file: BinaryIO) -> tuple[list[_Record], int]:
    """The records of the directory, and its position."""
    count, size, offset, end = _find_directory(file)
    if offset + size != end:
        raise ValueError("its directory is not at the stated offset")
    if count > MAX_ENTRIES or size > MAX_DIRECTORY or count * _RECORD.size > size:
        raise ValueError(f"its directory states {count} entries in {size} bytes")
    file.seek(offset)
    data, at, records = file.read(size), 0, []
    for _ in range(count):
        fields = _RECORD.unpack_from(data, at)
        signature, _, _, flags, method, _, _, crc, packed, full, name, extra, comment, disk, _, _, where = fields
        at += _RECORD.size
        if signature != b"PK\1\2" or at + name + extra + comment > size:
            raise ValueError("its directory is damaged")
        text = data[at : at + name]
        full, packed, where = _wide(data[at + name : at + name + extra], full, packed, where)
        at += name + extra + comment
        if flags & ENCRYPTED or disk:
            raise ValueError(f"its entry {text[:80]!r} is encrypted, or in another file")
        if method or full != packed:
            raise ValueError(f"its entry {text[:80]!r} is compressed; torch writes uncompressed ones: zip it with -0")
        records.append(_Record(text, flags, crc, full, where))
    if at != size:
        raise ValueError("its directory has other bytes than its entries need")
    return records, offset


def _find_directory(file: BinaryIO) -> tuple[int, int, int, int]:
    """Number of entries, size and offset of the directory according to the end record, and the latter's position."""
    total = file.seek(0, 2)
    tail_at = max(0, total - _END.size - 0xFFFF)
    file.seek(tail_at)
    tail = file.read()
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < _END.size:
        raise ValueError("it is truncated, it has no end")
    _, disk, first, here, count, size, offset, comment = _END.unpack_from(tail, place)
    if disk or first or here != count or place + _END.size + comment != len(tail):
        raise ValueError("its end is damaged, or it is one of several files")
    end = tail_at + place
    if end < _LOCATOR64.size:
        return count, size, offset, end
    file.seek(end - _LOCATOR64.size)
    signature, disk, wide_at, disks = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
    if signature != b"PK\6\7":
        return count, size, offset, end
    if disk or disks > 1 or wide_at + _END64.size > end:
        raise ValueError("its zip64 end is damaged")
    file.seek(wide_at)
    signature, length, _, _, disk, first, here, wide_count, wide_size, wide_offset = _END64.unpack(
        file.read(_END64.size)
    )
    if signature != b"PK\6\6" or disk or first or here != wide_count or wide_at + 12 + length > end:
        raise ValueError("its zip64 end is damaged")
    for narrow, limit, wide in ((count, 0xFFFF, wide_count), (size, _MASK, wide_size), (offset, _MASK, wide_offset)):
        if narrow not in (limit, wide):
            raise ValueError("its end and its zip64 end disagree")
    return wide_count, wide_size, wide_offset, wide_at


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Sizes and offset, where those that do not fit in 32 bits come from the extra field of zip64."""
    at = 0
    values: list[int] = []
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = [value for (value,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            break
        at += 4 + length
    if sum(field == _MASK for field in fields) > len(values):
        raise ValueError("its directory lacks sizes of zip64")
    rest = iter(values)
    return [next(rest) if field == _MASK else field for field in fields]


def _entry(file: BinaryIO, record: _Record, directory: int) -> StoredEntry:
    """The position of an entry's bytes, according to its own header."""
    name = record.text
    if record.offset + _LOCAL.size > directory:
        raise ValueError(f"its entry {name[:80]!r} lies past its end")
    file.seek(record.offset)
    fields = _LOCAL.unpack(file.read(_LOCAL.size))
    signature, _, flags, method, _, _, crc, packed, full, name_length, extra_length = fields
    own_name, extra = file.read(name_length), file.read(extra_length)
    if signature != b"PK\3\4" or own_name != record.name or method or (flags ^ record.flags) & SIZES_FOLLOW:
        raise ValueError(f"its entry {name[:80]!r} does not match its directory")
    if not flags & SIZES_FOLLOW:
        full, packed = _wide(extra, full, packed)
        if (full, packed, crc) != (record.size, record.size, record.crc):
            raise ValueError(f"its entry {name[:80]!r} has another size than in its directory")
    start = record.offset + _LOCAL.size + name_length + extra_length
    if start + record.size > directory:
        raise ValueError(f"its entry {name[:80]!r} lies past its end")
    return StoredEntry(name, start, record.size, record.crc)
