"""Objectives of causal students on a mesh, by the command line: their logs are those of one device."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.train.logs import read_log
from monarchrt.train.pair_folder import Made

pytestmark = pytest.mark.slow

SIZES = dict(num_layers=1, dim=96, num_heads=2, ffn_dim=96, text_dim=64, text_len=8, freq_dim=64, causal_block=1)
NETWORK = [f"{name}={value}" for name, value in SIZES.items()]
SIGMAS = tuple(5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal network none of whose parameters is zero, clips, and pairs of a solver."""
    folder, rng = tmp_path_factory.mktemp("causal"), np.random.default_rng(0)
    graph, state = nnx.split(WanModel(wan_config("tiny", **SIZES), rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x + 0.1 * jnp.cos(1.7 * jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state)
    save_checkpoint(nnx.merge(graph, state), folder / "network")
    made = Made(sigmas=SIGMAS, shift=5.0, steps=8, solver="euler", guidance=1.0, teacher="none", seed=0)
    for number in range(6):
        clip = {
            "latents": rng.standard_normal((3, 4, 8, 16)).astype(np.float32),
            "text": rng.standard_normal((8, 64)).astype(np.float32),
        }
        states = rng.standard_normal((4, 3, 4, 8, 16)).astype(np.float32)
        write_arrays(folder / f"clips/{number}.safetensors", clip, metadata={})
        write_arrays(folder / f"pairs/{number}.safetensors", clip | {"states": states}, metadata=made.to_header())
    return folder


@pytest.mark.parametrize(
    ("objective", "data", "options"),
    [
        ("teacher-forcing", "clips", ["--frames-per-level", "1", "--overrides", *NETWORK]),
        ("ode", "pairs", ["--block", "1", "--overrides", *NETWORK]),
        (
            "consistency",
            "clips",
            ["--block", "1", "--grid", "6", "--attention", "monarch(tile=(1,1,2))"]
            + [word for role in ("student", "teacher") for word in (f"--{role}.overrides", *NETWORK)],
        ),
    ],
)
def test_a_mesh_has_the_log_of_one_device(folder, run, tmp_path, objective, data, options):
    """Gathered weights and tokens exchanged for heads; the second step is of parameters that have changed."""
    roles = ("student.", "teacher.") if objective == "consistency" else ("",)
    begun = [word for role in roles for word in (f"--{role}init-from", folder / "network")]
    learns = "--student.learning-rate" if objective == "consistency" else "--learning-rate"
    command = ["train", "--objective", objective, "--latents", folder / data, "--held-out", "0.34", "--batch", "2"]
    found = {}
    for mesh, devices in (("data=1", 1), ("fsdp=2,heads=2", 4)):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        places = ["--mesh", mesh, "--steps", "2", "--folder", tmp_path / mesh, learns, "1e-3"]
        code, stderr = run([*command, *begun, *options, *places], XLA_FLAGS=flags)
        assert code == 0, stderr
        rows = read_log(tmp_path / mesh)  # a level that no sample had has no loss, "nan"
        found[mesh] = [{name: float(x) for name, x in row.items() if name != "seconds"} for row in rows]
    one, split = found.values()
    assert len(one) >= 3
    losses = [value for row in one for name, value in row.items() if name.endswith("loss")]
    assert losses
    assert all(losses)
    for row, right in zip(split, one, strict=True):
        assert row == pytest.approx(right, rel=2e-5, nan_ok=True)
