"""File kinds by their first bytes, and whether the end of a file is missing."""

import struct
from pathlib import Path
from typing import BinaryIO

# brands of pictures in the container format of videos
_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis", b"crx ")
_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"udta", b"meta", b"sidx", b"styp",
          b"mfra", b"pnot", b"prfl")  # fmt: skip
_ASF_HEADER = bytes.fromhex("3026b275")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


def still_brand(path: Path) -> str | None:
    """The brand of a HEIF picture (HEIC, AVIF) or a raw photo; None for anything else."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[8:12].decode().strip() if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS else None


def missing_bytes(path: Path) -> int:
    """Number of bytes missing at a file's end, by its own headers; 0 if these do not say.

    Headers of MP4 and related formats, Matroska and WebM, AVI, WebP and WMV state sizes; MPEG transport streams consist
    of whole packets.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _BOXES:
            end = _last_box_end(file, size)
        elif head[:4] == b"RIFF":
            end = _last_riff_end(file, size)
        elif head[:4] == _EBML.to_bytes(4):
            end = _segment_end(file)
        elif head[:4] == _ASF_HEADER:
            end = _asf_end(file)
        elif packet := _transport_packet(file):
            end = -(-size // packet) * packet
        else:
            end = 0
    return max(0, end - size)


def _last_box_end(file: BinaryIO, size: int) -> int:
    """End of the last top-level box, ISO/IEC 14496-12: four bytes size, four bytes type."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8))
        if length < 8 or kind not in _BOXES:  # 0: to the end of the file
            return position
        position += length
    return position


def _last_riff_end(file: BinaryIO, size: int) -> int:
    """End of the last RIFF part of an AVI (which has several beyond 1 GB) or a WebP."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length in (0, 2**32 - 1):  # the size was not known when it was written
            return position
        position += 8 + length
    return position


def _asf_end(file: BinaryIO) -> int:
    """Size by the file properties of a WMV; 0 if there are none."""
    file.seek(0)
    _, there, rest = file.read(8192).partition(_ASF_PROPERTIES)
    return int.from_bytes(rest[24:32], "little") if there and len(rest) >= 32 else 0


def _transport_packet(file: BinaryIO) -> int:
    """Bytes of a packet of an MPEG transport stream, 188 or, from camcorders, 192; 0 for other files."""
    file.seek(0)
    head = file.read(5 * 192)
    for size, first in ((188, 0), (192, 4)):
        if len(head) > 4 * size + first and all(head[first + n * size] == 0x47 for n in range(5)):
            return size
    return 0


def _segment_end(file: BinaryIO) -> int:
    """End of a Matroska file's segment; 0 if it does not say."""
    file.seek(4)
    header = _variable_integer(file)
    if header is None:
        return 0
    file.seek(header, 1)
    if int.from_bytes(file.read(4)) != _SEGMENT:
        return 0
    length = _variable_integer(file)
    return 0 if length is None else file.tell() + length


def _variable_integer(file: BinaryIO) -> int | None:
    """Reads an EBML integer, RFC 8794: leading zeros give its length; all ones mean unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1)) - (1 << 7 * length)
    return None if value == (1 << 7 * length) - 1 else value
