"""Archives, pickles, headers and JSON with wrong numbers: refused in one line, with little memory,
before data is read."""

import json
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from monarchrt.models.checkpoints.json_files import MAX_BYTES, parse_json, read_json
from monarchrt.models.checkpoints.plain_pickle import UnsafePickleError, read_pickle
from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, ShardedSafetensors, write_arrays
from monarchrt.models.checkpoints.torch_pickle import TorchFile
from monarchrt.models.errors import printable

LINEAR = np.arange(12, dtype=np.float32)
# what torch.save writes for {"w": tensor of shape (3, 4)}, spelled out; %d stand for numbers that a file may lie about
PICKLE = (
    b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ%stQK%sK%sK%s\x86K%sK%s\x86\x89ccollections\nOrderedDict\n)RtRs."
)


def torch_pickle(*, numel=12, offset=0, shape=(3, 4), strides=(4, 1)):
    single = [bytes([number]) for number in (offset, *shape, *strides)]
    return PICKLE % (struct.pack("<i", numel), *single)


def archive(path, entries, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def good(path, data=LINEAR, **numbers):
    return archive(path, {"a/data.pkl": torch_pickle(**numbers), "a/data/0": data.tobytes(), "a/version": b"3\n"})


def patched(path, old, new, *, last=False):
    data = path.read_bytes()
    at = data.rfind(old) if last else data.find(old)
    assert at >= 0
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    return path


def test_the_pickle_spelled_out_is_torchs(tmp_path):
    file = TorchFile(good(tmp_path / "a.pt"))
    np.testing.assert_array_equal(file.read("w"), LINEAR.reshape(3, 4))
    torch = pytest.importorskip("torch")
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=False)["w"], torch.from_numpy(LINEAR).reshape(3, 4))


@pytest.mark.parametrize(
    "numbers",
    [
        {"offset": 1},
        {"shape": (4, 4)},
        {"shape": (3, 5), "strides": (4, 1)},
        {"strides": (5, 1)},
        {"shape": (3, 200), "strides": (0, 0)},
        {"shape": (13, 1), "strides": (0, 0)},
    ],
)
def test_a_tensor_past_its_storage(tmp_path, numbers):
    """By one number, or by repeating those that are there."""
    with pytest.raises(UnsafePickleError, match="a tensor lies outside its storage"):
        TorchFile(good(tmp_path / "a.pt", **numbers))


@pytest.mark.parametrize("numel", [11, 13, 2**31 - 1])
def test_a_storage_of_another_size_than_its_entry(tmp_path, numel):
    with pytest.raises(ValueError, match=r"outside its storage|w has 48 bytes of \d+"):
        TorchFile(good(tmp_path / "a.pt", numel=numel))


def test_compressed_entries_are_not_unpacked(tmp_path):
    """A thousand times the file's size would be read."""
    entries = {"a/data.pkl": torch_pickle() + bytes(50_000_000), "a/data/0": LINEAR.tobytes()}
    path = archive(tmp_path / "a.pt", entries, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"'a/data.pkl' is compressed; torch writes uncompressed ones"):
        TorchFile(path)


def test_a_directory_that_says_another_size_than_the_entry(tmp_path):
    path = good(tmp_path / "a.pt")
    sizes = struct.pack("<2L", 48, 48)
    with pytest.raises(ValueError, match=r"'a/data/0' has another size than in its directory"):
        TorchFile(patched(path, sizes, struct.pack("<2L", 44, 44), last=True))
    path = good(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"'a/data/0' is compressed|is of another size"):
        TorchFile(patched(path, sizes, struct.pack("<2L", 48, 2**31), last=True))


def test_entries_that_lie_on_one_another(tmp_path):
    """The directory gives the second entry the place of the first, under the same name: the bytes would count twice."""
    one = {"a/data.pkl": torch_pickle(), "a/data/0": LINEAR.tobytes(), "a/data/1": LINEAR.tobytes()}
    path = archive(tmp_path / "a.pt", one)
    with zipfile.ZipFile(path) as file:
        first, second = file.getinfo("a/data/0").header_offset, file.getinfo("a/data/1").header_offset
    patched(path, b"a/data/1", b"a/data/0")
    patched(path, b"a/data/1", b"a/data/0", last=True)
    patched(path, struct.pack("<L", second) + b"a/data/0", struct.pack("<L", first) + b"a/data/0")
    with pytest.raises(ValueError, match=r"'a/data/0' overlaps another"):
        TorchFile(path)


def test_an_entry_past_the_end(tmp_path):
    path = good(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as file:
        offset = struct.pack("<L", file.getinfo("a/data/0").header_offset) + b"a/data/0"
    with pytest.raises(ValueError, match=r"'a/data/0' lies past its end"):
        TorchFile(patched(path, offset, struct.pack("<L", 2**31) + b"a/data/0"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (struct.pack("<2H", 3, 3), struct.pack("<2H", 4, 4), "directory"),
        (struct.pack("<2H", 3, 3), struct.pack("<2H", 1, 1), "its directory has other bytes"),
        (struct.pack("<2H", 3, 3), struct.pack("<2H", 0xFFFF, 0xFFFF), "its directory states 65535 entries"),
    ],
)
def test_an_end_that_counts_wrong(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        TorchFile(patched(good(tmp_path / "a.pt"), old, new, last=True))


def test_zip64(tmp_path):
    """Sizes in the extra fields are read, and those that lie are refused."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        for name, data in {"a/data.pkl": torch_pickle(), "a/data/0": LINEAR.tobytes()}.items():
            with file.open(name, "w", force_zip64=True) as entry:
                entry.write(data)
    np.testing.assert_array_equal(TorchFile(tmp_path / "a.pt").read("w"), LINEAR.reshape(3, 4))
    patched(tmp_path / "a.pt", struct.pack("<2Q", 48, 48), struct.pack("<2Q", 2**40, 2**40))
    with pytest.raises(ValueError, match="has another size than in its directory"):
        TorchFile(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "damaged|expected|has no end|its pickle"),
        (b"\x80\x02]r" + struct.pack("<L", 2**32 - 1) + b"0N.", None),
        (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", "not enough data"),
        (b"\x80\x02}(Nq\x00" + b"h\x00h\x00\x86q\x00" * 200 + b"Nu.", "has a key that is a tuple"),
        (b"\x80\x02cbuiltins\neval\n.", "it asks for builtins.eval"),
        (b"\x80\x02X\x01\x00\x00\x00a)\x81.", "it makes an object by NEWOBJ"),
        (b"\x80\x02(K\x01K\x02", "exhausted before seeing STOP"),
        (b"\x80\x02u.", "its pickle is damaged"),
        (b"", "end|exhausted"),
    ],
)
def test_pickles_that_announce_more_than_they_have(data, message):
    if message is None:
        assert read_pickle(data, build={}, storage=print) is None
        return
    with pytest.raises(ValueError, match=message):
        read_pickle(data, build={}, storage=print)


def test_plain_objects_as_pickle_reads_them():
    content = {"a": [1, -2, 2**70, 1.5, None, True], "b": {"c": ("x", b"y", ()), 3: "é"}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(content if protocol > 2 else {"a": content["a"]}, protocol=protocol)
        assert read_pickle(data, build={}, storage=print) == pickle.loads(data)


HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]}}, "claims bytes 16 to 32"),
        ({"b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, "claims bytes 0 to 16"),
        ({"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, "those before end at 16"),
        ({"b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}}, "those before end at 16"),
        ({"b": {"dtype": "F32", "shape": [2**40], "data_offsets": [16, 16 + 2**42]}}, "is truncated"),
        ({"b": {"dtype": "F32", "shape": [2**40], "data_offsets": [16, 32]}}, "its shape .* needs"),
        ({"b": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [16, 16]}}, "is too large"),
        ({"b": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [16, 20]}}, "9 axes"),
        ({"b": {"dtype": "F32", "shape": [-1], "data_offsets": [16, 12]}}, "an invalid number"),
        ({"b": {"dtype": "F32", "shape": [True], "data_offsets": [16, 20]}}, "an invalid number"),
        ({"b": {"dtype": "F32", "shape": [1.0], "data_offsets": [16, 20]}}, "an invalid number"),
        ({"b": {"dtype": "F32", "shape": [1], "data_offsets": [16]}}, "lacks dtype, shape or data_offsets"),
        ({"b": {"dtype": "F32", "shape": 1, "data_offsets": [16, 20]}}, "lacks dtype, shape or data_offsets"),
        ({"b": []}, "lacks dtype, shape or data_offsets"),
        ({"b": {"dtype": "F4", "shape": [1], "data_offsets": [16, 20]}}, "has dtype F4; these can be read: F64, F32"),
        ({"__metadata__": {"a": 1}}, "metadata is not an object of strings"),
    ],
)
def test_safetensors_headers(tmp_path, change, message):
    text = json.dumps(HEADER | change).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(path)


def test_safetensors_lengths(tmp_path):
    path = tmp_path / "a.safetensors"
    for length, message in ((2**63, "is not a safetensors"), (MAX_BYTES + 1, "is not a"), (10**6, "is truncated")):
        path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))
        with pytest.raises(ValueError, match=message):
            SafetensorsFile(path)
    text = json.dumps(HEADER).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(20))
    with pytest.raises(ValueError, match="its header describes"):
        SafetensorsFile(path)


@pytest.mark.parametrize("shard", ["../b.safetensors", "/etc/passwd", "x/../b.safetensors", "..", "", "a\0b", "..\\b"])
def test_an_index_names_files_of_its_own_folder(tmp_path, shard):
    write_arrays(tmp_path / "b.safetensors", {"w": LINEAR}, metadata={})
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.parent.mkdir()
    write_arrays(index.parent / "b.safetensors", {"w": LINEAR}, metadata={})
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ValueError, match="which is not a file in the same folder"):
        ShardedSafetensors(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        (b"[" * 100_000, "is nested too deeply|is not JSON"),
        (b'{"a":' * 100_000, "is nested too deeply|is not JSON"),
        (b"[" + b"[]," * 1_000_001 + b"1]", "more than 1000000 objects"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[]", "is not an object of settings"),
        (b"1", "is not an object"),
        (b"", "is not JSON"),
        (b"null", "is not an object"),
    ],
)
def test_json(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"config\.json .*({message})"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_of_windows_editors(tmp_path, encoding):
    (tmp_path / "config.json").write_bytes('{"a": "é"}'.encode(encoding))
    assert read_json(tmp_path / "config.json") == {"a": "é"}


def test_json_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="at most 16777216 are read"):
        read_json(tmp_path / "config.json")


def test_names_do_not_steer_the_terminal():
    assert printable("a\x1b]0;b\x07\n\udc80") == r"a\x1b]0;b\x07\n\udc80"
    assert len(printable("x" * 10**6)) == 200
    with pytest.raises(ValueError, match=r"the key 'a.x1b' is there twice"):
        parse_json('{"a\\u001b": 1, "a\\u001b": 2}', "it")


def test_memory_stays_small(tmp_path):
    """Each of these would take gigabytes if its numbers were believed."""
    huge = {"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    text = json.dumps(huge).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    good(tmp_path / "b.pt", numel=2**31 - 1)
    archive(tmp_path / "c.pt", {"a/data.pkl": b"\x80\x02]r" + struct.pack("<L", 2**32 - 1) + b"0N."})
    archive(tmp_path / "d.pt", {"a/data.pkl": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED)
    code = """
import resource, sys
from pathlib import Path
from monarchrt.models.checkpoints.reading import open_tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        open_tensors(path)
    except ValueError:
        continue
    raise SystemExit(f"{path} was read")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
raise SystemExit(f"{grown} kB" if grown > 50_000 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def damaged(data, chance):
    """A copy that is cut, or has bytes or four-byte numbers changed."""
    data = bytearray(data)
    kind = chance.randrange(4)
    if kind == 0:
        return bytes(data[: chance.randrange(len(data))])
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(data))
        if kind == 1:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[at] = chance.randrange(256)
        else:
            number = chance.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, chance.randrange(2**32)])
            data[at : at + 4] = struct.pack("<L", number)
    return bytes(data)


@pytest.mark.parametrize("kind", ["pt", "safetensors", "json"])
def test_whatever_is_damaged_is_refused_or_read_rightly(tmp_path, kind):
    """Deterministic: cuts and changed bytes end in one line, or in the tensors that the bytes say."""
    chance = random.Random(0)
    if kind == "pt":
        path, opened = good(tmp_path / "a.pt"), TorchFile
    elif kind == "safetensors":
        path, opened = tmp_path / "a.safetensors", SafetensorsFile
        write_arrays(path, {"w": LINEAR.reshape(3, 4), "b": LINEAR}, metadata={"format": "pt"})
    else:
        path, opened = tmp_path / "config.json", read_json
        path.write_text(
            json.dumps({"_class_name": "WanModel", "dim": 1536, "eps": 1e-06, "list": [[1, 2], {"a": None}]})
        )
    original = path.read_bytes()
    refused = 0
    for _ in range(1500):
        path.write_bytes(damaged(original, chance))
        try:
            file = opened(path)
            if not isinstance(file, dict):
                for name, info in file.infos.items():
                    assert file.read(name).shape == info.shape
        except ValueError as error:
            refused += 1
            message = str(error)
            assert str(path) in message
            assert len(message) < 1000
            assert message.isprintable()
    assert refused > 100
