"""Two real processes with two CPU devices each: a run, one that dies, one that is stopped, and what is refused."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import tensorstore as ts

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.lora.writing import Factors, write_lora
from monarchrt.models.umt5 import save_embeddings
from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.train.logs import read_log
from tests.train.objectives.networks import wan

from .conftest import CAUSAL

pytestmark = pytest.mark.slow

NETWORK = ["--overrides", "num_layers=1", "dim=96", "num_heads=2", "ffn_dim=96"]
DATA = ["--frames", "3", "--height", "16", "--width", "32", "--patch", "4", "--gap", "1", "--held-out", "0.3"]
EVERY = ["--batch", "2", "--eval-every", "3", "--eval-windows", "1", "--eval-timesteps", "2", "--keep", "9"]
MESH = ["--mesh", "data=1,fsdp=2,heads=2"]
ENDS_WITHIN = 75  # seconds after another process has died


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Job:
    """Processes of one run, their output in files."""

    def __init__(
        self,
        folder: Path,
        commands: list[list[str]],
        environment: dict[str, str],
        begun_in: list[Path] | None = None,
        file_sizes: list[int | None] | None = None,
        programs: list[list[str]] | None = None,
    ):
        self.outputs = [folder / f"{number}.txt" for number in range(len(commands))]
        self.processes = []
        none = [None] * len(commands)
        programs = programs or [["-m", "monarchrt"]] * len(commands)
        others = begun_in or none, file_sizes or none, programs
        for command, path, cwd, size, program in zip(commands, self.outputs, *others, strict=True):
            limit = [] if size is None else ["prlimit", f"--fsize={size}"]
            with path.open("wb") as file:
                arguments = [*limit, sys.executable, *program, *command]
                self.processes.append(subprocess.Popen(arguments, stdout=file, stderr=file, env=environment, cwd=cwd))

    def wait(self, seconds: float = 600) -> list[int]:
        limit = time.monotonic() + seconds
        return [process.wait(timeout=max(1, limit - time.monotonic())) for process in self.processes]

    def lines(self, number: int) -> list[str]:
        """What a process said, without Gloo's greetings, of which threads may write one into another."""
        text = self.outputs[number].read_text(errors="replace")
        return [line for line in text.splitlines() if not re.search(r"\[Gloo\]|connected peer ranks", line)]


@pytest.fixture
def start(tmp_path, environment, clip):
    """Starts two processes of a run, or one with as many devices."""
    jobs: list[Job] = []

    def run(
        options: list[str],
        *,
        processes: int = 2,
        differing: list[list[str]] | None = None,
        devices: int = 4,
        command: list[str] | None = None,
        begun_in: list[Path] | None = None,
        file_sizes: list[int | None] | None = None,
        programs: list[list[str]] | None = None,
    ) -> Job:
        devices = devices // max(processes, 1)
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        command = [*(command or ["train", "--video", str(clip), *NETWORK, *DATA, *EVERY]), *options]
        commands = [command]
        if processes:
            port = free_port()
            place = ["--coordinator", f"localhost:{port}", "--processes", str(processes), "--process"]
            commands = [[*command, *place, str(number)] for number in range(processes)]
        for own, more in zip(commands, differing or [], strict=False):
            own += more
        folder = tmp_path / f"job{len(jobs)}"
        folder.mkdir()
        jobs.append(Job(folder, commands, environment | {"XLA_FLAGS": flags}, begun_in, file_sizes, programs))
        return jobs[-1]

    yield run
    for job in jobs:
        for process in job.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def numbers(folder: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(folder)]


def until(condition, job: Job, seconds: float = 400) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in job.processes), [job.lines(n) for n in (0, 1)]
        assert time.monotonic() < limit
        time.sleep(0.2)


def test_a_run_that_loses_a_process_goes_on_and_ends_as_that_of_one_process(start, environment, tmp_path):
    """The log is that of one process with four devices; a checkpoint is the same on one, two and four devices."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    options = [*MESH, "--steps", "10", "--checkpoint-every", "2", "--sample-every", "3"]
    one = start([*options, "--folder", str(whole)], processes=0)
    assert one.wait() == [0], one.lines(0)

    job = start([*options, "--folder", str(split), "--steps", "6"])
    assert job.wait() == [0, 0], [job.lines(n) for n in (0, 1)]
    assert not job.lines(1)  # the first writes
    assert "everything is in" in job.lines(0)[-1]

    lost = start([*options, "--folder", str(split), "--steps", "4000", "--resume"])
    until(lambda: (split / "checkpoints" / "8").is_dir(), lost)
    lost.processes[1].kill()
    began = time.monotonic()
    assert lost.processes[0].wait(timeout=ENDS_WITHIN + 25) == 1
    assert time.monotonic() - began < ENDS_WITHIN
    said = [line for line in lost.lines(0) if line.startswith("error: ")]
    assert said == [
        "error: process 1 of 2 has given no sign of life for 30 s; this one ends too, continue with --resume"
    ], lost.lines(0)

    for step in (split / "checkpoints").iterdir():  # as if it had been lost at step 8
        if step.name.isdigit() and int(step.name) > 8:
            shutil.rmtree(step)
    again = start([*options, "--folder", str(split), "--resume"])
    assert again.wait() == [0, 0], [again.lines(n) for n in (0, 1)]
    found, expected = numbers(split), numbers(whole)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, right in zip(found, expected, strict=True):
        assert row.keys() == right.keys()
        for name, value in right.items():
            np.testing.assert_allclose(row[name], value, rtol=2e-5, err_msg=f"{name} at {right['step']}")
    assert sorted(path.name for path in (split / "samples").iterdir()) == [f"step_{step:06d}.mp4" for step in (3, 6, 9)]

    stored = split / "checkpoints" / "10" / "state"
    about = json.loads((split / "checkpoints" / "10" / "about" / "metadata").read_text())["arrays"]
    for devices, mesh in ((1, "data=1"), (2, "heads=2"), (4, "fsdp=2,heads=2")):
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        process = subprocess.run(
            [sys.executable, "-c", RESTORED, str(split), mesh], capture_output=True, text=True, check=False,
            env=environment | {"XLA_FLAGS": flags},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout.splitlines()[-1]) == {name: raw(stored, name) for name in about}


RESTORED = """
import dataclasses, hashlib, json, sys
from pathlib import Path
import numpy as np
from monarchrt.train.loop import train
from monarchrt.train.run_folder import read_config
from monarchrt.train.state import to_arrays
config = read_config(Path(sys.argv[1]))
run = dataclasses.replace(config.run, folder=Path(sys.argv[1]), mesh=sys.argv[2], resume=True)
state = train(dataclasses.replace(config, run=run), quiet=True).state
print(json.dumps({name: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for name, x in to_arrays(state).items()}))
"""


def raw(folder: Path, name: str) -> str:
    """The digest of an array as it is in the file."""
    base = {"driver": "file", "path": f"{folder}/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    return hashlib.sha256(np.ascontiguousarray(ts.open(spec, open=True).result().read().result()).tobytes()).hexdigest()


def test_two_processes_stream_a_video_by_heads(start, tmp_path):
    """Of a checkpoint that two processes wrote; frames are those of one process with as many devices."""
    folder = tmp_path / "run"
    trained = start([*MESH, "--steps", "1", "--folder", str(folder)])
    assert trained.wait() == [0, 0], [trained.lines(n) for n in (0, 1)]
    command = ["generate", "--checkpoint", str(folder), "--mode", "autoregressive", "--frames", "6", "--steps", "2"]
    found = {}
    for name, processes in (("one", 0), ("two", 2)):
        out = tmp_path / f"{name}.mkv"
        job = start(["--mesh", "heads=2", "--out", str(out)], processes=processes, devices=2, command=command)
        assert set(job.wait()) == {0}, [job.lines(n) for n in range(len(job.processes))]
        assert not any(job.lines(n) for n in range(1, len(job.processes)))
        with av.open(str(out), mode="r") as container:
            found[name] = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(found["one"]) == 6
    np.testing.assert_array_equal(found["two"], found["one"])
    for command in (["inspect", str(folder)], ["convert", str(folder), str(tmp_path / "model")]):
        job = start([], processes=0, command=command)
        assert job.wait() == [0], job.lines(0)


def test_a_video_begins_with_what_the_first_process_reads(start, tmp_path):
    """Noise, where the same name is another file elsewhere."""
    folder = tmp_path / "run"
    trained = start([*MESH, "--steps", "1", "--folder", str(folder)])
    assert trained.wait() == [0, 0], [trained.lines(n) for n in (0, 1)]
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        noise = np.random.default_rng(number).standard_normal((6, 4, 8, 48)).astype(np.float32)
        write_arrays(tmp_path / str(number) / "noise.safetensors", {"noise": noise}, metadata={})
    command = ["generate", "--checkpoint", str(folder), "--mode", "autoregressive", "--frames", "6", "--steps", "2"]
    command += ["--mesh", "heads=2"]
    found: dict[str, np.ndarray] = {}
    for name, places in (("one", ["0"]), ("two", ["0", "1"]), ("other", ["1"])):
        job = start(
            ["--condition", "none", "--noise", "noise.safetensors", "--out", str(tmp_path / f"{name}.mkv")],
            processes=len(places) if len(places) > 1 else 0,
            devices=2,
            command=command,
            begun_in=[tmp_path / place for place in places],
        )
        assert set(job.wait()) == {0}, [job.lines(n) for n in range(len(job.processes))]
        with av.open(str(tmp_path / f"{name}.mkv"), mode="r") as container:
            found[name] = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    np.testing.assert_array_equal(found["two"], found["one"])
    for part in (slice(0, 8), slice(8, 16)):  # rows that either process has the tokens of
        assert np.abs(found["other"].astype(int) - found["one"])[:, 10 * part.start : 10 * part.stop].max() > 50


def test_a_folder_that_is_not_shared(start, tmp_path):
    """Another one for each process, of the same name: not there, with other checkpoints, a copy; then begun anew."""
    whole = start([*MESH, "--steps", "1", "--folder", str(tmp_path / "0" / "run")], processes=0)
    assert whole.wait() == [0], whole.lines(0)
    (tmp_path / "1").mkdir()
    places = [tmp_path / "0", tmp_path / "1"]
    again = [*MESH, "--steps", "2", "--folder", "run", "--resume"]
    seen = "process 1: folder run is not that of process 0: checkpoints are none here and [0, 1] there; give a --folder"
    not_shared = "process 1: folder run is not that of process 0; give a --folder on a file system that all"
    for left, message in (((), seen), (("0",), seen.replace("none", "[0]")), (("0", "1"), not_shared)):
        shutil.rmtree(tmp_path / "1" / "run", ignore_errors=True)
        if left:
            shutil.copytree(tmp_path / "0" / "run", tmp_path / "1" / "run")
        for step in {"0", "1"} - set(left) if left else ():
            shutil.rmtree(tmp_path / "1" / "run" / "checkpoints" / step)
        job = start(again, begun_in=places)
        assert job.wait(200) == [2, 2], [job.lines(n)[-3:] for n in (0, 1)]
        assert all(message in job.lines(n)[-1] for n in (0, 1)), job.lines(0)[-1]
        assert sorted(path.name for path in (tmp_path / "0" / "run" / "checkpoints").iterdir()) == ["0", "1"]
        assert not list((tmp_path / "0" / "run").glob("shared*"))
    job = start([*MESH, "--steps", "1", "--folder", "new"], begun_in=places)
    assert job.wait(200) == [2, 2], [job.lines(n)[-3:] for n in (0, 1)]
    assert all(not_shared.replace("run", "new") in job.lines(n)[-1] for n in (0, 1))


READ_ONLY = """
import os, runpy, subprocess, sys
folder = sys.argv[sys.argv.index("--folder") + 1]
os.unshare(os.CLONE_NEWNS)
for words in (["--make-rprivate", "/"], ["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
    subprocess.run(["mount", *words], check=True)
runpy.run_module("monarchrt", run_name="__main__")
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0,
    reason="no namespace of mounts may be made",
)
def test_a_folder_that_one_may_only_read(start, tmp_path):
    """As a file system that is mounted so on one machine: known before a step is taken."""
    folder = tmp_path / "run"
    begun = start([*MESH, "--steps", "1", "--folder", str(folder)], processes=0)
    assert begun.wait() == [0], begun.lines(0)
    again = [*MESH, "--steps", "2", "--folder", str(folder), "--resume"]
    job = start(again, programs=[["-m", "monarchrt"], ["-c", READ_ONLY]])
    assert job.wait(200) == [2, 2], [job.lines(n)[-3:] for n in (0, 1)]
    assert all(f"process 1: folder {folder} may not be written to" in job.lines(n)[-1] for n in (0, 1))
    assert not (folder / "checkpoints" / "2").exists()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
def test_one_that_has_no_room_for_its_part_of_a_checkpoint(start, tmp_path):
    """It ends, and the other, which would wait for it, is told why; then the run goes on."""
    options = [*MESH, "--checkpoint-every", "2", "--folder", str(tmp_path / "run")]
    begun = start([*options, "--steps", "2"])
    assert begun.wait() == [0, 0], [begun.lines(n) for n in (0, 1)]
    for poor in (1, 0):
        sizes = [50_000 if number == poor else None for number in (0, 1)]
        job = start([*options, "--steps", "4000", "--resume"], file_sizes=sizes)
        assert job.wait(200) == [2 if number == poor else 1 for number in (0, 1)]
        reason = (
            f"cannot write {tmp_path}/run/checkpoints: a file size limit was reached; the checkpoint of step 2 is kept"
        )
        assert job.lines(poor)[-1] == f"error: {reason}; free some space and use --resume"
        assert job.lines(1 - poor)[-1].startswith(f"error: process {poor} of 2 has ended: {reason}")
    again = start([*options, "--steps", "4", "--resume"])
    assert again.wait() == [0, 0], [again.lines(n) for n in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "2", "4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_asked_to_stop_stops_all_at_the_same_step(start, tmp_path, number):
    folder = tmp_path / "run"
    options = [*MESH, "--steps", "4000", "--checkpoint-every", "1000", "--folder", str(folder)]
    job = start(options)
    until(lambda: len(read_log(folder)) > 3 if (folder / "log.jsonl").exists() else False, job)
    os.kill(job.processes[1].pid, number)
    assert job.wait(120) == [128 + number] * 2, [job.lines(n) for n in (0, 1)]
    last = {job.lines(n)[-1] for n in (0, 1)}
    assert len(last) == 1
    assert "and saved; continue with" in last.pop()
    step = max(row["step"] for row in read_log(folder))
    assert (folder / "checkpoints" / str(step)).is_dir()


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        ([[], ["--learning-rate", "2e-3"]], "learning_rate is 0.001 in process 0 and 0.002 in process 1; start all"),
        ([["--mesh", "data=3"]] * 2, "mesh is data=3, which takes 3 devices, and there are 4; it could be data=4"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(start, tmp_path, differing, message):
    job = start([*MESH, "--steps", "2", "--folder", str(tmp_path / "run")], differing=differing)
    assert job.wait(200) == [2, 2]
    for number in (0, 1):
        [line] = job.lines(number)
        assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("files", "value"), [(3, 1), (4, 2)])
def test_a_process_that_sees_other_files(start, tmp_path, files, value):
    """Under the same path, as on machines that do not share it: known before anything is compiled."""
    sizes = dict(num_layers=1, dim=24, num_heads=2, ffn_dim=16, text_dim=4, text_len=2, freq_dim=16)
    for process, count, last in ((0, 4, 1), (1, files, value)):
        for number in range(count):
            latents = np.full((3, 4, 8, 16), last if number == count - 1 else 1, np.float32)
            arrays = {"latents": latents, "text": np.ones((2, 4), np.float32)}
            write_arrays(tmp_path / str(process) / "latents" / f"{number}.safetensors", arrays, metadata={})
    network = ["--overrides", *(f"{name}={value}" for name, value in sizes.items()), "--attention", "dense"]
    command = ["train", "--latents", "latents", *network, "--held-out", "0.3", "--batch", "2", "--steps", "2"]
    options = [*MESH, "--folder", str(tmp_path / "run")]
    job = start(options, command=command, begun_in=[tmp_path / "0", tmp_path / "1"])
    assert job.wait(200) == [2, 2]
    for number in (0, 1):
        assert "process 1: its data are not those of process 0" in job.lines(number)[-1]


def test_captions_of_an_lmdb(start, wan_folder, tmp_path):
    """The first process encodes them, all read them; the log is that of one process."""
    lmdb = pytest.importorskip("lmdb")
    clips = np.random.default_rng(0).standard_normal((6, 2, 16, 4, 8)).astype(np.float16)
    with lmdb.open(str(tmp_path / "data"), map_size=2**24) as file, file.begin(write=True) as transaction:
        for number, clip in enumerate(clips):
            transaction.put(f"latents_{number}_data".encode(), clip.tobytes())
            transaction.put(f"prompts_{number}_data".encode(), f"a cat on {number}".encode())
        transaction.put(b"latents_shape", " ".join(map(str, clips.shape)).encode())
    sizes = dict(num_layers=1, dim=24, num_heads=2, ffn_dim=16, text_dim=32, text_len=16, freq_dim=16)
    network = ["--overrides", *(f"{name}={value}" for name, value in sizes.items()), "--attention", "dense"]
    data = ["--latents", str(tmp_path / "data"), "--components", str(wan_folder), "--held-out", "0.3", "--batch", "2"]
    command = ["train", *data, "--rows", "16", *network, "--steps", "3", *MESH]
    for name, processes in (("split", 2), ("whole", 0)):
        texts = ["--text-cache", str(tmp_path / f"{name}.texts"), "--folder", str(tmp_path / name)]
        job = start(texts, processes=processes, command=command)
        assert set(job.wait()) == {0}, [job.lines(n) for n in range(len(job.processes))]
        assert any("6 texts of" in line for line in job.lines(0))
        assert not any(job.lines(n) for n in range(1, len(job.processes)))
        assert len(list((tmp_path / f"{name}.texts").iterdir())) == 6
    found, expected = numbers(tmp_path / "split"), numbers(tmp_path / "whole")
    for row, right in zip(found, expected, strict=True):
        assert row == pytest.approx(right, rel=2e-5)
    places = [tmp_path / "0", tmp_path / "1"]
    for place in places:
        shutil.copytree(wan_folder, place / "parts")
        shutil.copytree(tmp_path / "split.texts", place / "kept.texts")
    kept = min((places[1] / "kept.texts").iterdir())  # as if another machine had kept another embedding
    kept.write_bytes(kept.read_bytes()[:-4] + b"\0\0\0\0")
    job = start(["--text-cache", "kept.texts", "--folder", str(tmp_path / "kept")], command=command, begun_in=places)
    assert job.wait(200) == [2, 2]
    for number in (0, 1):
        assert "process 1: its kept text embeddings are not those of process 0" in job.lines(number)[-1]
    weights = places[1] / "parts" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    command[command.index("--components") + 1] = "parts"
    texts = ["--text-cache", str(tmp_path / "other.texts"), "--folder", str(tmp_path / "other")]
    job = start(texts, command=command, begun_in=places)
    assert job.wait(200) == [2, 2]
    for number in (0, 1):
        assert "process 1: its text encoders are not those of process 0" in job.lines(number)[-1]
    assert not (tmp_path / "other.texts").exists()


LATE = """
import runpy, time
from monarchrt.train.networks import Networks
start = Networks.start
Networks.start = lambda self: (time.sleep(40), start(self))[1]
runpy.run_module("monarchrt", run_name="__main__")
"""


def test_one_that_reads_weights_for_longer(start, tmp_path):
    """The other waits for it: the first collective of CPUs would not, for more than 30 seconds."""
    options = [*MESH, "--steps", "1", "--folder", str(tmp_path / "run")]
    job = start(options, programs=[["-m", "monarchrt"], ["-c", LATE]])
    assert job.wait(300) == [0, 0], [job.lines(n) for n in (0, 1)]


LATE_STEP = """
import runpy, time
from jax._src.interpreters import pxla
compiled = pxla.MeshComputation.compile
def late(self, *arguments, **options):
    time.sleep(40 if "step_fn" in self._name and self._executable is None else 0)
    return compiled(self, *arguments, **options)
pxla.MeshComputation.compile = late
runpy.run_module("monarchrt", run_name="__main__")
"""


def test_one_that_compiles_for_longer(start, tmp_path):
    """As on a machine that has kept no programs: the other waits for it before the first collective between them.

    That is the step's on this mesh; processes that do not meet within 30 seconds then end in an error of Gloo's.
    """
    options = ["--mesh", "data=2,heads=2", "--steps", "2", "--folder", str(tmp_path / "run")]
    job = start(options, programs=[["-m", "monarchrt"], ["-c", LATE_STEP]])
    assert job.wait(300) == [0, 0], [job.lines(n) for n in (0, 1)]
    assert len(read_log(tmp_path / "run")) > 2


@pytest.mark.parametrize("differs", ["weights", "embeddings of the negative prompt"])
def test_a_process_that_reads_other_files(start, tmp_path, differs):
    teacher = wan(7)
    sizes = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len")
    network = [f"{name}={getattr(teacher.config, name)}" for name in sizes]
    for process in (0, 1):
        folder, other = tmp_path / str(process), process if differs == "weights" else 0
        save_checkpoint(wan(7 + other), folder / "teacher")
        text = np.full((2, 4), 1 + process, np.float32)
        save_embeddings(folder / "negative.safetensors", {"": text})
        for number in range(3):
            arrays = {"latents": np.ones((2, 4, 8, 2), np.float32), "text": np.ones((2, 4), np.float32)}
            write_arrays(folder / "latents" / f"{number}.safetensors", arrays, metadata={})
    command = ["train", "--objective", "consistency", "--latents", "latents", "--held-out", "0.3", "--batch", "2"]
    command += ["--negative", "negative.safetensors", "--teacher.init-from", "teacher", "--attention", "dense"]
    command += ["--overrides", *network, "--teacher.overrides", *network, "--steps", "2"]
    options = [*MESH, "--folder", str(tmp_path / "run")]
    job = start(options, command=command, begun_in=[tmp_path / "0", tmp_path / "1"])
    assert job.wait(200) == [2, 2]
    for number in (0, 1):
        assert f"process 1: its {differs} are not those of process 0" in job.lines(number)[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("differs", "what"),
    [("base", "weights"), ("style", "weights"), ("other", "weights to compare with")],
)
def test_a_video_of_processes_that_read_other_weights(start, tmp_path, differs, what):
    for process in (0, 1):
        seeds = {name: process if name == differs else 0 for name in ("base", "style", "other")}
        base = wan(seeds["base"])
        folder = save_checkpoint(base, tmp_path / str(process) / "base")
        save_checkpoint(wan(7 + seeds["other"]), tmp_path / str(process) / "other")
        factors = Factors(np.full((2, 24), 1 + seeds["style"], np.float32), np.ones((24, 2), np.float32), alpha=2.0)
        write_lora(folder.parent / "style.safetensors", {"blocks.0.self_attn.q": factors})
    command = ["generate", "--checkpoint", "base", "--lora", "style.safetensors", "--prompt", "a cat"]
    options = ["--mesh", "heads=2", "--out", str(tmp_path / "a.mp4"), *["--compare", "other"] * (differs == "other")]
    job = start(options, command=command, devices=2, begun_in=[tmp_path / "0", tmp_path / "1"])
    assert job.wait(200) == [2, 2]
    for number in (0, 1):
        assert f"process 1: its {what} are not those of process 0" in job.lines(number)[-1]
    assert not (tmp_path / "a.mp4").exists()


def test_a_distillation_that_loses_a_process_goes_on_elsewhere(start, causal, tmp_path):
    """On one device, then on four of one process, then by two again; its log is that of one process throughout."""
    roles = ("student", "critic", "teacher")
    sizes = {role: [f"{k}={v}" for k, v in CAUSAL.items() if role == "student" or "block" not in k] for role in roles}
    command = ["train", "--objective", "self-forcing", "--latents", str(causal / "clips"), "--held-out", "0.34"]
    command += ["--batch", "2", "--block", "1", "--student-every", "2", "--checkpoint-every", "2", "--keep", "9"]
    command += ["--student.learning-rate", "1e-3", "--critic.learning-rate", "1e-3"]
    for role, words in sizes.items():
        command += [f"--{role}.overrides", *words]
    for role in ("student", "teacher"):
        command += [f"--{role}.init-from", str(causal / "network")]
    whole, parts = (["--folder", str(tmp_path / name)] for name in ("whole", "parts"))
    one = start([*whole, *MESH, "--steps", "8"], processes=0, command=command)
    assert one.wait() == [0], one.lines(0)
    lost = start([*parts, *MESH, "--steps", "4000"], command=command)
    until(lambda: (tmp_path / "parts" / "checkpoints" / "2").is_dir(), lost)
    lost.processes[1].kill()
    assert lost.processes[0].wait(timeout=ENDS_WITHIN + 25) == 1
    for step in (tmp_path / "parts" / "checkpoints").iterdir():  # as if it had been lost at step 2
        if step.name.isdigit() and int(step.name) > 2:
            shutil.rmtree(step)
    for steps, processes, devices, mesh in (
        (4, 0, 1, "data=1"),
        (6, 0, 4, "data=2,heads=2"),
        (8, 2, 4, "fsdp=2,heads=2"),
    ):
        again = ["--steps", str(steps), "--resume", "--mesh", mesh]
        job = start([*parts, *again], processes=processes, devices=devices, command=command)
        assert set(job.wait()) == {0}, [job.lines(n) for n in range(len(job.processes))]
    found, expected = ({(row["step"], *sorted(row)): row for row in numbers(tmp_path / x)} for x in ("parts", "whole"))
    assert [key[0] for key in expected if "student/loss" in key] == [1, 3, 5, 7]
    for key, right in expected.items():
        for name, value in right.items():
            np.testing.assert_allclose(
                float(found[key][name]), float(value), rtol=1e-4, atol=1e-7, err_msg=f"{name} at {key[0]}"
            )


def test_a_port_that_is_taken(start, tmp_path):
    with socket.create_server(("", 0)) as taken:
        place = ["--coordinator", f"localhost:{taken.getsockname()[1]}", "--processes", "2", "--process", "0"]
        job = start([*place, "--steps", "2", "--folder", str(tmp_path / "run")], processes=0)
        assert job.wait(100) == [2]
    [line] = job.lines(0)
    assert "cannot listen at port" in line
    assert "Address already in use" in line


def test_a_video_of_processes_that_read_other_runs(start, tmp_path):
    """Run folders of other weights: all are told."""
    train = ["--steps", "1", "--folder"]
    for n in (0, 1):
        job = start([*train, str(tmp_path / str(n) / "run"), "--seed", str(n)], processes=0, devices=1)
        assert job.wait() == [0], job.lines(0)
    command = ["generate", "--checkpoint", "run", "--mode", "autoregressive", "--frames", "6", "--steps", "2"]
    options = ["--mesh", "heads=2", "--condition", "none", "--out", str(tmp_path / "a.mkv")]
    job = start(options, command=command, devices=2, begun_in=[tmp_path / "0", tmp_path / "1"])
    assert job.wait(200) == [2, 2], [job.lines(n)[-4:] for n in (0, 1)]
    for number in (0, 1):
        assert "process 1: its weights are not those of process 0" in job.lines(number)[-1]


@pytest.mark.parametrize("differs", ["weights", "settings"])
def test_a_video_of_processes_that_read_other_loras_of_runs(start, tmp_path, differs):
    """Run folders that trained one: of another seed, or the same with another scale in its settings."""
    save_checkpoint(wan(7), tmp_path / "base")
    for number in range(3):
        arrays = {"latents": np.ones((2, 4, 8, 2), np.float32), "text": np.ones((2, 4), np.float32)}
        write_arrays(tmp_path / "latents" / f"{number}.safetensors", arrays, metadata={})
    sizes = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len")
    network = [f"{name}={getattr(wan(7).config, name)}" for name in sizes]
    command = ["train", "--latents", str(tmp_path / "latents"), "--held-out", "0.3", "--batch", "2", "--steps", "1"]
    command += ["--init-from", str(tmp_path / "base"), "--lora-rank", "2", "--attention", "dense"]
    command += ["--overrides", *network]
    for number in (0, 1):
        seed = ["--seed", str(number if differs == "weights" else 0)]
        job = start([*seed, "--folder", str(tmp_path / str(number) / "lora")], processes=0, devices=1, command=command)
        assert job.wait() == [0], job.lines(0)
    if differs == "settings":
        settings = tmp_path / "1" / "lora" / "config.json"
        values = json.loads(settings.read_text())
        values["optimizer"]["lora_alpha"] = 7.0
        settings.write_text(json.dumps(values))
    command = ["generate", "--checkpoint", str(tmp_path / "base"), "--lora", "lora", "--prompt", "a cat"]
    options = ["--mesh", "heads=2", "--out", str(tmp_path / "a.mp4")]
    job = start(options, command=command, devices=2, begun_in=[tmp_path / "0", tmp_path / "1"])
    assert job.wait(200) == [2, 2], [job.lines(n)[-4:] for n in (0, 1)]
    for number in (0, 1):
        assert f"process 1: its {differs} are not those of process 0" in job.lines(number)[-1]
    assert not (tmp_path / "a.mp4").exists()
