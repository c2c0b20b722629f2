"""Arrays that Orbax wrote, read without Orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from monarchrt.models.checkpoints import orbax_arrays
from monarchrt.models.checkpoints.orbax_arrays import open_arrays, read_arrays

ARRAYS = {
    "params.kernel": np.arange(48, dtype=np.float32).reshape(6, 8),
    "params.bias": np.arange(8, dtype=jnp.bfloat16),
    "step": np.asarray(7, np.int32),
}


def shapes(**changes):
    structs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in ARRAYS.items()}
    return structs | {name.replace("_", "."): struct for name, struct in changes.items()}


@pytest.fixture(params=[True, False], ids=["ocdbt", "files"])
def folder(request, tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=request.param)) as checkpointer:
        checkpointer.save(tmp_path / "state", args=ocp.args.PyTreeSave(jax.tree.map(jnp.asarray, ARRAYS)))
    return tmp_path / "state"


@pytest.mark.parametrize("at_a_time", [1, 2**32])
def test_what_was_saved_is_read(folder, monkeypatch, at_a_time):
    monkeypatch.setattr(orbax_arrays, "BYTES_AT_A_TIME", at_a_time)
    found = read_arrays(folder, shapes())
    assert list(found) == list(ARRAYS)
    for name, array in found.items():
        assert array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(np.asarray(array), ARRAYS[name])


def test_it_lies_where_it_is_wanted(folder):
    mesh = jax.make_mesh((1,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    kernel = jax.ShapeDtypeStruct((6, 8), jnp.float32, sharding=sharding)
    found = read_arrays(folder, {"params.kernel": kernel})["params.kernel"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, ARRAYS["params.kernel"])


@pytest.mark.parametrize("shape", [(6, 9), (48,)])
def test_another_shape(folder, shape):
    with pytest.raises(ValueError, match=r"state has another params.kernel: shape \(6, 8\) and float32, not \("):
        read_arrays(folder, shapes(params_kernel=jax.ShapeDtypeStruct(shape, jnp.float32)))


def test_another_dtype(folder):
    with pytest.raises(ValueError, match=r"another params.bias: shape \(8,\) and bfloat16, not \(8,\) and float32"):
        read_arrays(folder, shapes(params_bias=jax.ShapeDtypeStruct((8,), jnp.float32)))


def test_an_array_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"state is damaged: params\.scale cannot be read: "):
        open_arrays(folder, ["params.kernel", "params.scale"])


def test_a_folder_that_orbax_did_not_write(folder):
    (folder / "_METADATA").write_text("{}")
    with pytest.raises(ValueError, match="state is not a folder that Orbax wrote"):
        read_arrays(folder, shapes())
