"""`monarchrt serve`: the command, from a checkpoint to a client."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import aiohttp
import pytest

from monarchrt.models.serve.bench import measured
from monarchrt.train.cli import compile_cache, main
from tests.untyped import there

SMALL = ["--height", "32", "--width", "64", "--steps", "2"]


def serve(*arguments):
    return main(["serve", *map(str, arguments)])


async def watch(url, prompts):
    """Frames of two blocks and of one with another prompt, and the events."""
    events, frames = [], 0
    async with aiohttp.ClientSession() as http, http.ws_connect(f"{url}session") as ws:
        await ws.receive()
        await ws.send_json({"type": "start", "prompt": prompts[0], "pace": False})
        async for message in ws:
            if message.type is aiohttp.WSMsgType.BINARY:
                frames += 1
                continue
            events.append(message.json())
            if (events[-1]["type"], events[-1].get("block")) == ("block", 1):
                await ws.send_json({"type": "prompt", "prompt": prompts[1]})
            if events[-1]["type"] == "prompt":
                await ws.send_json({"type": "stop"})
            if events[-1]["type"] == "ended":
                return events, frames
    raise AssertionError(f"closed after {events}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "wan", "run on devices", "wan on devices"])
def test_a_session(kind, baseline, causal_folder, wan_folder, environment, tmp_path):
    checkpoint = ["--checkpoint", baseline, "--steps", "1"]
    if kind.startswith("wan"):
        checkpoint = ["--checkpoint", causal_folder, "--components", wan_folder, *SMALL, "--window", "6"]
    if kind.endswith("devices"):
        checkpoint += ["--mesh", "heads=2", "--decoder-device", "2"]
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"
        environment = environment | {"XLA_FLAGS": flags}
    command = [sys.executable, "-m", "monarchrt", "serve", *map(str, checkpoint), "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        said = []
        for line in there(process.stderr):
            said.append(line)
            if found := re.search(r"ready after [\d.]+ s at (http://127\.0\.0\.1:\d+/)$", line.strip()):
                break
        else:
            raise AssertionError("".join(said))
        events, frames = asyncio.run(asyncio.wait_for(watch(found[1], ["a cat", "a dog"]), 120))
        process.send_signal(signal.SIGTERM)
        rest = there(process.stderr).read()
    assert process.returncode == 0, rest
    assert rest == "stopped; all sessions are ended\n"
    changed = next(event for event in events if event["type"] == "prompt")
    assert changed["block"] >= 2
    assert frames >= changed["frame"] - 3
    assert events[-1]["reason"] == "stopped"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no checkpoint was given; give --checkpoint, for example runs/demo/monarch after `monarchrt demo`"),
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached from other machines; give a --token that clients"),
        (["--token", "short"], "token has 5 characters; give at least 16"),
        (["--certificate", "none.pem"], "certificate none.pem is not a file"),
        (["--sessions", "0"], "sessions is 0; it must be at least 1"),
        (["--seconds", "nan"], "seconds is nan; it must be at least 1"),
        (["--port", "70000"], "port is 70000; it must be at most 65535"),
        (["--begin", "9", "-1"], "begin is (9, -1); give numbers of frames, such as 9 21, or 0 for none"),
        (["--ice-servers", "a.example"], "ice_servers has 'a.example'; give stun:HOST:PORT, turn:HOST:PORT or turns:"),
        (["--ice-servers", "turn:a"], "ice_servers has a TURN server; give --ice-username and --ice-credential too"),
        (["--ice-username", "u"], "ice_username has no effect without a TURN server"),
        (["--webrtc", "no", "--ice-servers", "stun:a"], "ice_servers is stun:a, but webrtc is no; leave one of them"),
        (["--prompt", "a cat"], "--prompt"),
        (["--decoder", "tiny"], "which has its own; leave it out"),
    ],
)
def test_bad_input_ends_in_one_line(baseline, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve(*(["--checkpoint", baseline, *options] if options else [])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [["--webrtc", "yes"], ["--ice-servers", "stun:a"]])
def test_webrtc_that_is_not_installed(baseline, options, capsys, monkeypatch):
    monkeypatch.setattr("monarchrt.models.serve.peers.installed", lambda: False)
    assert serve("--checkpoint", baseline, *options) == 2
    said = "error: WebRTC was asked for, but aiortc is not installed (pip install 'monarchrt[webrtc]')"
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken(baseline, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve("--checkpoint", baseline, "--port", port) == 2
    assert f"port {port} of 127.0.0.1 cannot be listened on" in capsys.readouterr().err


def test_no_folder_for_what_is_sent_and_saved(baseline, capsys, tmp_path, monkeypatch):
    """Found before anything is loaded."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert serve("--checkpoint", baseline, "--port", 0) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no folder can be created for uploads and saved videos (")
    assert said.endswith("; set TMPDIR to a writable folder\n")


@pytest.mark.parametrize(("options", "asked"), [((), "auto"), (("--priority", "normal"), "normal")])
def test_the_priority_of_a_server_and_of_what_is_timed(options, asked, baseline, monkeypatch):
    done = []
    engine = SimpleNamespace(check_memory=lambda _: None, warm_up=lambda: None)
    serving = "monarchrt.models.serve"
    monkeypatch.setattr(f"{serving}.priority.set_priority", lambda priority, _: done.append(priority))
    monkeypatch.setattr(f"{serving}.load.load_engine", lambda *_, **__: engine)
    monkeypatch.setattr(f"{serving}.server.Server", lambda *_, **__: SimpleNamespace(url=""))
    monkeypatch.setattr(f"{serving}.server.run_server", lambda _: done.append("serves"))
    monkeypatch.setattr(f"{serving}.bench.take_samples", lambda *_, **__: done.append("times"))
    monkeypatch.setattr(f"{serving}.bench.summarize", lambda *_, **__: {"cold": {}})
    assert serve("--checkpoint", baseline, "--port", "0", *options) == 0
    assert main(["bench", "generate", "--checkpoint", str(baseline), "--json", *options]) == 0
    assert done == [asked, "serves", asked, "times"]


class TestBench:
    @pytest.mark.slow
    def test_a_run(self, baseline, capsys):
        assert main(["bench", "generate", "--checkpoint", str(baseline), "--steps", "1", "--count", "4", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["steady"]["compiled"] == 0
        assert "paced" not in found
        assert found["cold"]["load"] > 0
        options = ["--checkpoint", str(baseline), "--steps", "1", "--count", "4", "--paced"]
        assert main(["bench", "generate", *options]) == 0
        said = capsys.readouterr().out
        assert "blocks in time, stalled" in said
        assert "paced     at 16 frames/s: network p50 " in said

    @pytest.mark.slow
    def test_random_weights(self, capsys):
        options = ["--preset", "tiny", "--height", "32", "--width", "64", "--steps", "1", "--count", "4", "--json"]
        assert main(["bench", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["weights"], found["height"], found["width"]) == ("random, tiny", 32, 64)

    def test_one_that_is_stopped_prints_what_it_has(self, capsys, monkeypatch):
        """Before the first times, in the stream and in the stages; as an engine, one that only the command sees."""

        def take(engine, samples, *, blocks, pace):
            samples.text, samples.cold[:] = 0.5, [1.5, 2.0]
            if engine == "in the stream":
                samples.arrivals[:], samples.frames[:] = [0.25, 0.5, 0.75], [1, 12, 12]
            signal.raise_signal(signal.SIGINT)

        def summarize(engine, samples, *, fps):
            shown = {"device": "a card", "versions": {"jax": "1"}, "attention": "dense", "height": 8, "width": 8}
            return shown | measured(samples, fps=fps) | {"formats": ["jpeg"], "memory": {"host_peak": 2**30}}

        monkeypatch.setattr("monarchrt.models.serve.bench.take_samples", take)
        monkeypatch.setattr("monarchrt.models.serve.bench.summarize", summarize)
        for where, blocks in (("in the first video", 0), ("in the stream", 3)):
            monkeypatch.setattr("monarchrt.models.serve.load.random_engine", lambda config, where=where, **_: where)
            assert main(["bench", "--preset", "tiny"]) == 130
            out, err = capsys.readouterr()
            assert f"stopped   after {blocks} of 28 blocks of the stream: not all is measured\n" in out
            assert "first frames 2.00 s later" in out
            assert ("block     p50 250.0," in out) == (blocks == 3) == ("play      at 16 frames/s" in out)
            assert err.endswith("stopped\n")
            assert main(["bench", "--preset", "tiny", "--json"]) == 130
            found = json.loads(capsys.readouterr().out)
            assert (found["stopped"], found["blocks"]) == (True, blocks)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "there is no GPU, and networks of true size would take hours; give --checkpoint"),
            (["train"], "bench 'train' is unknown; give generate: monarchrt bench generate"),
            (["generate"], "runs/demo/monarch after `monarchrt demo`, or --preset tiny"),
            (["--preset", "huge"], "preset='huge' is unknown"),
            (["--preset", "tiny", "--checkpoint", "runs/x"], "the checkpoint defines the sizes; give one of the two"),
            (["--preset", "tiny", "--lora", "x.safetensors"], "but weights are random here; leave it out"),
            (["--preset", "tiny", "--decoder", "x.pth"], "decoder is x.pth, but weights are random here"),
            (["--preset", "tiny", "--mesh", "data=2"], "mesh is data=2, which takes 2 devices, and there is 1"),
            (["--preset", "tiny", "--decoder-device", "1"], "decoder_device is 1, but there is 1 device"),
            (["generate", "--count", "1"], "count is 1; it must be at least 4"),
            (["generate", "--rate", "nan"], "rate is nan; it must lie in [0.1, 1000]"),
        ],
    )
    def test_bad_input(self, options, message, capsys):
        assert main(["bench", *options]) == 2
        assert message in capsys.readouterr().err


class TestPrograms:
    """Where compiled programs are kept."""

    def test_in_the_users_cache_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(compile_cache, "LEAST_FREE", 0)
        environment = {"XDG_CACHE_HOME": str(tmp_path)}
        compile_cache.keep_programs(environment)
        assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "monarchrt" / "programs")
        assert (tmp_path / "monarchrt" / "programs").is_dir()
        assert compile_cache.programs_folder({}).parts[-3:] == (".cache", "monarchrt", "programs")

    def test_not_where_the_user_says_otherwise(self, tmp_path):
        for said in ({"JAX_COMPILATION_CACHE_DIR": ""}, {"MONARCHRT_NO_PROGRAM_CACHE": "1"}):
            environment = {"XDG_CACHE_HOME": str(tmp_path)} | said
            compile_cache.keep_programs(environment)
            assert environment == {"XDG_CACHE_HOME": str(tmp_path)} | said
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
        compile_cache.keep_programs(environment)
        assert environment == {"XDG_CACHE_HOME": str(tmp_path / "file")}

    def test_an_almost_full_disk(self, tmp_path, monkeypatch):
        """Nothing is kept; what a full one left empty is removed, but for what is being written."""
        folder = compile_cache.programs_folder({"XDG_CACHE_HOME": str(tmp_path)})
        folder.mkdir(parents=True)
        for name, age in (("a-cache", 100.0), ("b-cache", 0.0), ("c-atime", 100.0)):
            (folder / name).touch()
            os.utime(folder / name, (time.time() - age, time.time() - age))
        (folder / "d-cache").write_bytes(b"program")
        os.utime(folder / "d-cache", (0, 0))
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**29))
        environment = {"XDG_CACHE_HOME": str(tmp_path)}
        compile_cache.keep_programs(environment)
        assert environment == {"XDG_CACHE_HOME": str(tmp_path)}
        assert sorted(os.listdir(folder)) == ["b-cache", "c-atime", "d-cache"]

    def test_a_program_that_another_command_removes(self, tmp_path):
        """Between the listing of the folder and the look at the file, as a link to nothing is."""
        (tmp_path / "a-cache").symlink_to(tmp_path / "gone")
        (tmp_path / "b-cache").touch()
        os.utime(tmp_path / "b-cache", (0, 0))
        compile_cache.remove_empty(tmp_path)
        assert os.listdir(tmp_path) == ["a-cache"]

    @pytest.mark.slow
    def test_a_second_process_compiles_nothing(self, tmp_path, environment):
        """The command's own process is told, JAX keeps its programs there, and reads them."""
        script = (
            "from monarchrt.train.cli import compile_cache; compile_cache.keep_programs()\n"
            "import jax, jax.numpy as jnp\n"
            "heard = []\n"
            "jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))\n"
            "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
            "jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(3))\n"
            "print(heard.count('/jax/compilation_cache/cache_hits'))"
        )
        own = {k: v for k, v in environment.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        hits = [
            int(subprocess.run([sys.executable, "-c", script], env=own | {"XDG_CACHE_HOME": str(tmp_path)},
                               capture_output=True, text=True, check=True).stdout)
            for _ in range(2)
        ]  # fmt: skip
        assert hits[0] == 0 < hits[1]
