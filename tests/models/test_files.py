"""Files that grow, and files that nobody meant to be there."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from monarchrt.models.checkpoints.reading import find_weights, weights_file
from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.errors import UserError
from monarchrt.models.files import (
    growing,
    is_litter,
    listed,
    new_folder,
    remove_abandoned,
    temporary_folder,
    unfinished,
)
from monarchrt.train.config import DataConfig, RunConfig, TrainConfig
from monarchrt.train.run_folder import claim_folder

APPLE_DOUBLE = b"\0\5\26\7\0\2\0\0Mac OS X        " + bytes(4072)  # what macOS leaves on exFAT, SMB and NFS
LITTER = [
    "._cat.mp4",
    ".DS_Store",
    "Thumbs.db",
    "THUMBS.DB",
    "desktop.ini",
    "~$cat.txt",
    "cat.mp4.part",
    "cat.mp4.1234.part",
    "cat.mp4.crdownload",
    "cat.safetensors.tmp",
    "cat.txt~",
    ".cat.txt.swp",
    ".cat.mp4.icloud",
    "cat.mp4:Zone.Identifier",
    "lost+found",
]


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class TestLitter:
    @pytest.mark.parametrize("name", LITTER)
    def test_is_told_by_its_name(self, name, tmp_path):
        (tmp_path / name).write_bytes(APPLE_DOUBLE)
        assert is_litter(tmp_path / name)
        assert listed(tmp_path) == []

    @pytest.mark.parametrize("name", ["cat.mp4", "_cat.mp4", "part.mp4", "a~b.txt", "Icon.png", "a.part.mp4"])
    def test_other_names_stay(self, name):
        assert not is_litter(Path(name))

    def test_beside_weights(self, tmp_path):
        """A disk that a Mac has written to has a `._` file beside each."""
        for n in (1, 2):
            write_arrays(tmp_path / f"model-{n}-of-2.safetensors", {f"t{n}": np.zeros(2, np.float32)}, metadata={})
        index = tmp_path / "model.safetensors.index.json"
        index.write_text("{}")
        (tmp_path / f"._{index.name}").write_bytes(APPLE_DOUBLE)
        assert weights_file(tmp_path, preferred=()) == index
        index.unlink()
        (tmp_path / "model-2-of-2.safetensors").unlink()
        (tmp_path / "._model-1-of-2.safetensors").write_bytes(APPLE_DOUBLE)
        assert weights_file(tmp_path, preferred=()).name == "model-1-of-2.safetensors"

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_beside_a_part_of_a_pipeline(self, tmp_path, suffix):
        for name in ("Wan2.1_VAE", "._Wan2.1_VAE"):
            (tmp_path / (name + suffix)).write_bytes(APPLE_DOUBLE)
        found = find_weights(tmp_path, official="Wan2.1_VAE.pth", pattern="*VAE*", folder="vae")
        assert found.name == "Wan2.1_VAE" + suffix

    def test_a_folder_with_litter_alone_is_empty_for_a_run(self, tmp_path):
        config = TrainConfig(data=DataConfig(video=Path("a.mp4")), run=RunConfig(folder=tmp_path))
        for name in (".DS_Store", "._config.json", "Thumbs.db"):
            (tmp_path / name).write_bytes(APPLE_DOUBLE)
        claim_folder(config)
        (tmp_path / "config.part").touch()
        with pytest.raises(UserError, match="already holds a run"):
            claim_folder(config)


class TestAbandoned:
    def test_what_a_killed_process_left_goes(self, tmp_path):
        left = tmp_path / f"cat.mp4.{gone()}.part"
        left.touch()
        others = [tmp_path / f"dog.mp4.{gone()}.part", tmp_path / "cat.mp4.part", tmp_path / "cat.mp4.x.part"]
        for other in others:
            other.touch()
        assert remove_abandoned(tmp_path, name="cat.mp4") == [left]
        assert sorted(tmp_path.iterdir()) == sorted(others)
        assert remove_abandoned(tmp_path) == others[:1]
        assert remove_abandoned(tmp_path / "nowhere") == []

    def test_one_of_a_running_process_stays(self, tmp_path):
        parts = [tmp_path / f"cat.mp4.{number}.part" for number in (1, os.getppid(), os.getpid())]
        for part in parts:
            part.touch()
        assert remove_abandoned(tmp_path) == []
        assert len(list(tmp_path.iterdir())) == 3

    def test_one_that_another_machine_or_container_writes_stays(self, tmp_path, monkeypatch):
        """Its number says nothing here; its lock does."""
        number = gone()
        monkeypatch.setattr(os, "getpid", lambda: number)
        with growing(tmp_path / "cat.mp4") as part:
            assert part == unfinished(tmp_path / "cat.mp4")
            assert remove_abandoned(tmp_path) == []
            assert part.exists()
        assert not part.exists()

    def test_a_link_stays(self, tmp_path):
        (tmp_path / f"cat.mp4.{gone()}.part").symlink_to(tmp_path / "elsewhere")
        assert remove_abandoned(tmp_path) == []

    def test_writing_the_same_file_again_removes_it(self, tmp_path):
        (tmp_path / f"a.safetensors.{gone()}.part").touch()
        write_arrays(tmp_path / "a.safetensors", {"x": np.zeros(2, np.float32)}, metadata={})
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


class TestFolders:
    """`NAME.partial-PROCESS`, as a conversion grows."""

    def test_what_a_killed_process_left_goes_when_the_same_folder_is_made_again(self, tmp_path):
        left, other = tmp_path / f"made.partial-{gone()}", tmp_path / f"another.partial-{gone()}"
        for folder in (left, other):
            folder.mkdir()
            (folder / "weights").write_bytes(bytes(9))
        assert is_litter(left)
        with new_folder(tmp_path / "made") as folder:
            assert not left.exists()
            (folder / "weights").write_bytes(b"x")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, "made"])
        assert remove_abandoned(tmp_path) == [other]

    def test_one_of_a_running_process_or_of_another_machine_stays(self, tmp_path, monkeypatch):
        running = tmp_path / f"made.partial-{os.getppid()}"
        running.mkdir()
        (tmp_path / f"made.partial-{gone()}").write_bytes(b"a file")
        number = gone()
        monkeypatch.setattr(os, "getpid", lambda: number)
        with new_folder(tmp_path / "made") as folder:
            assert folder.name == f"made.partial-{number}"
            assert remove_abandoned(tmp_path) == []
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_link_is_not_followed(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / f"made.partial-{gone()}").symlink_to(tmp_path / "mine")
        assert remove_abandoned(tmp_path) == []

    def test_a_killed_conversion(self, tmp_path):
        """SIGKILL in the middle, and again: the second leaves nothing but the folder."""
        program = (
            "import os, pathlib, signal, sys\n"
            "from monarchrt.models.files import new_folder\n"
            "with new_folder(sys.argv[1]) as folder:\n"
            "    (folder / 'weights').write_bytes(bytes(99))\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        root = str(Path(__file__).parents[2])
        environ = os.environ | {"PYTHONPATH": root}
        killed = subprocess.run([sys.executable, "-c", program, tmp_path / "made"], env=environ, check=False)
        assert killed.returncode == -9
        assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["made.partial"]
        with new_folder(tmp_path / "made") as folder:
            (folder / "weights").touch()
        assert [path.name for path in tmp_path.iterdir()] == ["made"]


class TestTemporary:
    def test_is_removed_at_the_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with temporary_folder() as folder:
            (folder / "a").mkdir()
            (folder / "a" / "b").touch()
            assert list(tmp_path.iterdir()) == [folder]
        assert list(tmp_path.iterdir()) == []

    def test_those_of_killed_processes_are_removed_at_the_next_start(self, tmp_path, monkeypatch):
        """And no others: of running processes, by other names, files, and one that somebody holds a lock on."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        left = f"monarchrt-abcd_123.{gone()}"
        stay = [f"monarchrt-abcd1234.{os.getppid()}", f"monarchrt-x.{gone()}", "monarchrt-abcd1234", f"a.{gone()}"]
        for name in (left, *stay):
            (tmp_path / name).mkdir()
            (tmp_path / name / "video.mp4").touch()
        (tmp_path / f"monarchrt-abcd1235.{gone()}").touch()
        (tmp_path / f"monarchrt-abcd1236.{gone()}").symlink_to(tmp_path / stay[0])
        before = set(tmp_path.iterdir())
        number = gone()
        with monkeypatch.context() as other:  # another machine's or container's
            other.setattr(os, "getpid", lambda: number)
            held = temporary_folder()
            folder = held.__enter__()
        with temporary_folder():
            pass
        assert set(tmp_path.iterdir()) == before - {tmp_path / left} | {folder}
        held.__exit__(None, None, None)

    def test_those_of_other_users_stay(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        (tmp_path / f"monarchrt-abcd1234.{gone()}").mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with temporary_folder():
            pass
        assert len(list(tmp_path.iterdir())) == 1
