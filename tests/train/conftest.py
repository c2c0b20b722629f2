"""Small clips, a small network, and a run of the command line that several tests compare with."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks
from tests.clips import make_clip

ROOT = Path(__file__).parents[2]

# one layer, 2 x 4 tokens per frame: seconds to compile, milliseconds per step
NETWORK = ["--overrides", "num_layers=1", "dim=24", "num_heads=2", "ffn_dim=48"]
DATA = ["--frames", "3", "--height", "16", "--width", "32", "--patch", "4", "--gap", "1", "--held-out", "0.3"]
EVERY = [
    "--batch",
    "2",
    "--steps",
    "30",
    "--checkpoint-every",
    "4",
    "--eval-every",
    "6",
    "--eval-windows",
    "1",
    "--eval-timesteps",
    "2",
    "--keep",
    "3",
]


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def generate(*arguments) -> int:
    """Runs `monarchrt generate` in this process: the exit code."""
    from monarchrt.train.cli import main

    return main(["generate", *map(str, arguments)])


@pytest.fixture
def said(capsys):
    """() -> what was written to stderr since the last call."""
    return lambda: capsys.readouterr().err


@pytest.fixture(scope="session")
def environment(compiled) -> dict[str, str]:
    """The environment of a subprocess: on a CPU, compiled programs shared between the processes."""
    inherited = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}  # for interpreters only
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def arguments(clip) -> list[str]:
    """The training command that the tests share, less the run folder."""
    return ["train", "--video", str(clip), *NETWORK, *DATA, *EVERY]


@pytest.fixture(scope="session")
def start(environment):
    """Starts the command line in a process of its own, where all is imported already, or nothing."""

    def start(arguments, before: str = "pass", imported: bool = True, **variables: str):
        program = f"{before}; import sys; from monarchrt.train.cli import main; sys.exit(main(sys.argv[1:]))"
        arguments, environ = [*map(str, arguments)], environment | variables
        if imported:
            return forks.start(program, arguments, environment=environ)
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def run(start):
    """Runs the command line in a process of its own: (exit code, stderr)."""

    def run(arguments, **options: str) -> tuple[int, str]:
        process = start(arguments, **options)
        try:
            _, stderr = process.communicate(timeout=900)
        finally:
            process.kill()
        return process.returncode, stderr

    return run


@pytest.fixture(scope="session")
def baseline(shared, run, arguments) -> Path:
    """Run folder of the command, uninterrupted; made once however many test processes there are."""
    folder = shared / "baseline"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = shared / "baseline.part"
            code, stderr = run([*arguments, "--folder", unfinished])
            assert code == 0, stderr
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """A diffusers pipeline folder with network, VAE, text encoder and tokenizer; random weights."""
    from flax import nnx

    from monarchrt.models.wan import WanModel, wan_config
    from monarchrt.models.wan.checkpoints import save_checkpoint

    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("wan") / "tiny"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    model = WanModel(wan_config("tiny", num_layers=1, text_len=16), rngs=nnx.Rngs(0))
    kernel = model.head.proj.kernel
    kernel[...] = 0.1 * nnx.Rngs(1).normal(kernel.shape)
    save_checkpoint(model, folder / "transformer", format="diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1).save_pretrained(folder / "vae")
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).save_pretrained(folder / "text_encoder")
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "on", "wall", "dog"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def causal_folder(wan_folder, tmp_path_factory):
    """The same parts beside a causal network with a Monarch tile."""
    from flax import nnx

    from monarchrt.models.wan import MonarchAttention, WanModel, wan_config
    from monarchrt.models.wan.checkpoints import save_checkpoint

    folder = tmp_path_factory.mktemp("causal") / "self-forcing"
    attention = MonarchAttention(tile=(1, 2, 4))
    config = wan_config("tiny", num_layers=1, text_len=16, causal_block=3, attention=attention)
    model = WanModel(config, rngs=nnx.Rngs(0))
    model.head.proj.kernel[...] = 0.1 * nnx.Rngs(1).normal(model.head.proj.kernel.shape)
    return save_checkpoint(model, folder, few_step=True)


def history(folder: Path) -> list[dict]:
    """The log of a run without the wall-clock times, exactly as written."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


CAUSAL = dict(num_layers=1, dim=96, num_heads=2, ffn_dim=96, text_dim=64, text_len=8, freq_dim=64, causal_block=1)


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    """A causal network none of whose parameters is zero, its sizes `CAUSAL`; clips, and pairs of a solver."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from monarchrt.models.checkpoints.tensor_files import write_arrays
    from monarchrt.models.wan import WanModel, wan_config
    from monarchrt.models.wan.checkpoints import save_checkpoint
    from monarchrt.train.pair_folder import Made

    folder, rng = tmp_path_factory.mktemp("causal"), np.random.default_rng(0)
    graph, state = nnx.split(WanModel(wan_config("tiny", **CAUSAL), rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x + 0.1 * jnp.cos(1.7 * jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state)
    save_checkpoint(nnx.merge(graph, state), folder / "network")
    sigmas = tuple(5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25))
    made = Made(sigmas=sigmas, shift=5.0, steps=8, solver="euler", guidance=1.0, teacher="none", seed=0)
    for number in range(6):
        clip = {
            "latents": rng.standard_normal((3, 4, 8, 16)).astype(np.float32),
            "text": rng.standard_normal((8, 64)).astype(np.float32),
        }
        states = rng.standard_normal((4, 3, 4, 8, 16)).astype(np.float32)
        write_arrays(folder / f"clips/{number}.safetensors", clip, metadata={})
        write_arrays(folder / f"pairs/{number}.safetensors", clip | {"states": states}, metadata=made.to_header())
    return folder
