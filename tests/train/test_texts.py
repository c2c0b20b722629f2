"""Prompts without clips, and Self-Forcing's LMDB of latents and captions, as data of a run."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.umt5 import load_embeddings
from monarchrt.train.cli import main
from monarchrt.train.config import DataConfig, TrainConfig
from monarchrt.train.latent_lmdb import LatentLMDB
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import DMDConfig, FlowConfig, SelfForcingConfig
from monarchrt.train.run_folder import identity
from monarchrt.train.sources import open_source
from monarchrt.train.texts import PromptFile, read_prompts

lmdb = pytest.importorskip("lmdb")

PROMPTS = ["a cat on a wall", "a dog", "a wall on a dog", "a cat on a cat", "on a wall"]
SIZE: dict[str, Any] = {"frames": 5, "height": 32, "width": 64, "rows": 16}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\ufeff" + "\r\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(prompts, wan_folder):
    return DataConfig(prompts=prompts, components=wan_folder, held_out=0.4, **SIZE)


def test_a_prompt_on_each_line(config, prompts, wan_folder, capsys):
    """Each is encoded once, also for another run; batches have zeros for latents, and each prompt's own embedding."""
    source = open_source(config)
    assert isinstance(source, PromptFile)
    assert (source.train_prompts, source.held_out_prompts) == (PROMPTS[:3], PROMPTS[3:])
    assert source.latent_shape == (2, 4, 8, 16)
    files = sorted((prompts.parent / "prompts.txt.texts").iterdir())
    kept = {text: array for path in files for text, array in load_embeddings(path, length=16).items()}
    assert kept.keys() == set(PROMPTS)
    batch = source.held_out_batch([1, 0])
    assert batch.latents.shape == (2, 2, 4, 8, 16)
    assert not batch.latents.any()
    np.testing.assert_array_equal(batch.text, [kept[PROMPTS[4]], kept[PROMPTS[3]]])
    assert np.abs(batch.text[0] - batch.text[1]).max() > 1e-3
    seen = np.concatenate([source.train_batch(step, 1, seed=0).text for step in range(3)])
    assert {text.tobytes() for text in seen} == {np.asarray(kept[text], np.float32).tobytes() for text in PROMPTS[:3]}
    times = {path: path.stat().st_mtime_ns for path in files}
    again = open_source(config)
    assert {path: path.stat().st_mtime_ns for path in files} == times
    assert again.fingerprint == source.fingerprint
    assert "5 texts of" in capsys.readouterr().err
    for changes in ({"height": 16}, {"rows": 20}):
        other = dataclasses.replace(config, **changes, text_cache=prompts.parent / "elsewhere")
        assert PromptFile(other).fingerprint != source.fingerprint
    where = dataclasses.replace(config, prompts=prompts.parent / "moved.txt")
    assert identity(TrainConfig(data=where), fingerprint="") == identity(TrainConfig(data=config), fingerprint="")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no prompt; write one on each line"),
        (b" \n\t\r\n", "has no prompt"),
        (b"a cat\nun caf\xe9\n", r"is not UTF-8 \(byte 13 is 0xe9\), probably cp1252"),
        ("a cat".encode("utf-16-le"), "is not UTF-8 .*, probably utf-16-le"),
        (b"PK\x03\x04\n\x00\x00", r"is not UTF-8 \(it has bytes of 0\)"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_prompts(path)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_as_editors_write_them(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes("eine Kätzin\r\n\r\na dog\r\n".encode(encoding))
    assert read_prompts(path) == ["eine Kätzin", "a dog"]


def test_what_prompts_do_not_go_with(prompts, tmp_path):
    for changes, said in (
        ({"frames": 4}, "with prompts they must be 1 [+] 4 k and multiples of 16, for example 5 32 64"),
        ({"width": 60}, "for example 5 32 64"),
        ({"latents": tmp_path}, "both prompts and latents were given"),
        ({"video": tmp_path}, "both prompts and video were given"),
        ({"rows": 0}, "rows is 0"),
        ({"fps": 16.0}, "fps is 16.0, which is for videos, but prompts have none; leave fps out"),
        ({"patch": 16}, "patch is 16, which is for videos"),
        ({"flip": True}, "flip is True, which is for videos"),
    ):
        with pytest.raises(UserError, match=said):
            DataConfig(**{"prompts": prompts, **SIZE, **changes})
    with pytest.raises(UserError, match="components is wan, which is for texts, but a video has none"):
        DataConfig(components=Path("wan"))
    with pytest.raises(UserError, match="there is no text encoder; give --components"):
        PromptFile(DataConfig(prompts=prompts, **SIZE))
    one = tmp_path / "one.txt"
    one.write_text("a cat\na cat\n")
    with pytest.raises(UserError, match="has one prompt; at least 2 are needed"):
        PromptFile(DataConfig(prompts=one, **SIZE))


def test_only_objectives_without_clips_take_prompts(config):
    with pytest.raises(UserError, match="texts without clips, which objective flow learns from"):
        make_objective(FlowConfig()).open_source(config)
    for settings in (DMDConfig(), SelfForcingConfig()):
        assert isinstance(make_objective(settings).open_source(config), PromptFile)


def write(path, rows, captions, *, shape=None, subdir=True, dtype=np.float16):
    """As the published script does."""
    with lmdb.open(str(path), map_size=2**24, subdir=subdir) as file, file.begin(write=True) as transaction:
        for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
            transaction.put(f"latents_{number}_data".encode(), np.ascontiguousarray(row, dtype).tobytes())
            transaction.put(f"prompts_{number}_data".encode(), caption.encode())
        whole = shape or (len(rows), *rows[0].shape)
        transaction.put(b"latents_shape", " ".join(map(str, whole)).encode())


def smooth(count, shape, seed=0):
    """Clips [F, C, h, w] whose channels have nothing to do with each other, and whose neighbouring pixels are alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, *shape[:2], shape[2] // 4, shape[3] // 4))
    return np.kron(coarse, np.ones((1, 1, 1, 4, 4))) + 0.1 * rng.standard_normal((count, *shape))


@pytest.fixture
def captions(wan_folder, tmp_path):
    return {"components": wan_folder, "rows": 16, "held_out": 0.3, "text_cache": tmp_path / "texts"}


@pytest.mark.parametrize("form", ["folder", "file", "shards", "states"])
def test_an_lmdb(tmp_path, captions, form):
    """Rows are turned to channels last; of states the last is the clean clip; shards follow each other."""
    clips, path = smooth(4, (2, 16, 4, 8)), tmp_path / ("data.mdb" if form == "file" else "data")
    if form == "states":
        noisy = np.random.default_rng(1).standard_normal((4, 2, 2, 16, 4, 8))
        write(path, np.concatenate([noisy, clips[:, None]], axis=1), PROMPTS[:4])
    elif form == "shards":
        path.mkdir()
        write(path / "0", clips[:1], PROMPTS[:1])
        write(path / "1", clips[1:], PROMPTS[1:4])
    else:
        write(path, clips, PROMPTS[:4], subdir=form == "folder")
    source = open_source(DataConfig(latents=path, **captions))
    assert isinstance(source, LatentLMDB)
    assert source.latent_shape == (2, 4, 8, 16)
    assert source.held_out == 1
    batch = source.held_out_batch([0])
    np.testing.assert_array_equal(batch.latents[0], np.asarray(clips[3], np.float16).transpose(0, 2, 3, 1))
    (kept,) = [load_embeddings(p, length=16)[PROMPTS[3]] for p in (tmp_path / "texts").iterdir()
               if PROMPTS[3] in load_embeddings(p)]  # fmt: skip
    np.testing.assert_array_equal(batch.text[0], kept)
    seen = {source.train_batch(step, 1, seed=0).latents.tobytes() for step in range(3)}
    assert seen == {
        np.asarray(clip, np.float16).transpose(0, 2, 3, 1).astype(np.float32).tobytes() for clip in clips[:3]
    }


def test_lmdbs_that_are_not_of_latents(tmp_path, captions):
    clips = smooth(3, (2, 16, 4, 8))
    infinite = clips.copy()
    infinite[2, 0, 0, 0, 0] = np.inf
    cases = {
        "turned": (clips.transpose(0, 1, 3, 4, 2), {}, r"clips \(2, 4, 8, 16\), which are not \[F, C, h, w\]"),
        "frames": (clips.transpose(0, 2, 1, 3, 4), {}, r"clips \(16, 2, 4, 8\), which are not \[F, C, h, w\]"),
        "float32": (clips, {"dtype": np.float32}, "has 4096 bytes in row 0; float16 of .* are 2048"),
        "short": (
            clips,
            {"shape": (5, 2, 16, 4, 8)},
            "says 5 rows, but has 7 entries, two for each row; it is cut off",
        ),
        "endless": (clips, {"shape": (10**3000, 2, 16, 4, 8)}, r"says 1000+\.\.\. rows, but has 7 entries"),
        "wide": (
            clips,
            {"shape": (3, 2**32, 16, 2**32, 8)},
            "has 2048 bytes in row 0; float16 of .* are 47223664828696",
        ),
        "flat": (clips, {"shape": (3, 1024)}, r"has rows of shape \(1024,\); they must be \[F, C, h, w\]"),
        "words": (clips, {"shape": ("three",)}, "has no shape in latents_shape: b'three'"),
        "one": (clips[:1], {}, "has 1 rows; at least 2 are needed"),
    }
    for name, (rows, options, said) in cases.items():
        write(tmp_path / name, rows, PROMPTS[: len(rows)], **options)
        with pytest.raises(UserError, match=said):
            open_source(DataConfig(latents=tmp_path / name, **captions))
    write(tmp_path / "infinite", infinite, PROMPTS[:3])
    with pytest.raises(UserError, match="NaN or infinite numbers in row 2"):
        open_source(DataConfig(latents=tmp_path / "infinite", **captions)).held_out_batch([0])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="cannot be opened as an LMDB"):
        open_source(DataConfig(latents=broken, **captions))


@pytest.mark.parametrize("fault", ["cut", "page", "size"])
def test_a_damaged_lmdb_does_not_kill(tmp_path, captions, fault):
    """The library reads where the file says, past its end too, which ends the process."""
    path = tmp_path / "data.mdb"
    write(path, smooth(3, (2, 16, 4, 8)), PROMPTS[:3], subdir=False)
    data, page = bytearray(path.read_bytes()), 4096
    if fault == "cut":
        del data[-page:]
    root = next(at for at in range(2 * page, len(data), page) if struct.unpack_from("<H", data, at + 10)[0] & 2)
    node = root + struct.unpack_from("<H", data, root + 16)[0]  # of the first key, with its size and then its value
    if fault == "page":
        data[root + 16 : root + 24] = b"\xf0\xff" * 4
    if fault == "size":
        data[node : node + 4] = struct.pack("<L", 2**31)
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"data.mdb is (cut off: \d+ bytes of \d+|damaged \(.*\)); copy or download it ag"
    ):
        open_source(DataConfig(latents=path, **captions))


@pytest.mark.slow
def test_a_student_is_distilled_on_prompts(prompts, wan_folder, tmp_path, capsys):
    """From the command; `inspect` and `generate` know that there are no clips."""
    arguments = [
        "train",
        "--objective",
        "dmd",
        "--prompts",
        str(prompts),
        "--components",
        str(wan_folder),
        "--rows",
        "16",
    ]
    arguments += [
        "--frames",
        "5",
        "--height",
        "32",
        "--width",
        "64",
        "--steps",
        "1",
        "--batch",
        "1",
        "--held-out",
        "0.4",
    ]
    arguments += ["--teacher.init-from", str(wan_folder / "transformer"), "--student.attention", "dense"]
    for role in ("student", "critic", "teacher"):
        arguments += [f"--{role}.overrides", "num_layers=1", "text_len=16"]
    folder = tmp_path / "run"
    assert main([*arguments, "--folder", str(folder), "--text-cache", str(tmp_path / "texts")]) == 0
    assert len(list((tmp_path / "texts").iterdir())) == len(PROMPTS)
    assert json.loads((folder / "config.json").read_text())["generation"]["latents"] == [2, 4, 8]
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    assert "2 x 2 x 4" in (said := capsys.readouterr().out)
    assert str(prompts) in said
    assert main(["generate", "--checkpoint", str(folder), "--out", str(tmp_path / "a.mp4")]) == 2
    assert "make a model of it with `monarchrt convert" in capsys.readouterr().err
    assert main(["train", "--folder", str(folder), "--resume", "--steps", "2"]) == 0
    assert main(["convert", str(folder), str(tmp_path / "made")]) == 0
