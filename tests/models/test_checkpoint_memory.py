"""Reading, writing and converting checkpoints need no more memory than they say."""

import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import pytest

from monarchrt.models.checkpoints.tensor_files import TensorInfo, write_safetensors
from monarchrt.models.wan import wan_config
from monarchrt.models.wan.checkpoints import load_checkpoint, save_checkpoint
from monarchrt.models.wan.checkpoints.mapping import checkpoint_shape, tensors
from monarchrt.models.wan.checkpoints.settings import config_to_json, dump_json
from monarchrt.models.wan.dit import count_parameters
from tests.models.test_checkpoints import WEIGHTS, assert_same, run_python

# Of this process alone: ru_maxrss would begin at the peak of the process that started it.
PEAK = """
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def numbers(code):
    """What code that may call `peak` prints."""
    return [int(word) for word in run_python(PEAK + textwrap.dedent(code)).split()]


@pytest.fixture
def large(wan, small):
    """A model of 204 MB in float32, of which the largest parameter has 57, and its size."""
    model = wan.model(dataclasses.replace(small, dim=384, ffn_dim=2048, num_heads=16, num_layers=18))
    size = 4 * count_parameters(model)
    assert 200e6 < size < 210e6
    return model, size


@needs_proc
@pytest.mark.slow
def test_orbax_is_read_tensor_by_tensor(wan, small, large, tmp_path):
    """204 MB in float32 are loaded as bfloat16 in their 102 MB and half of that; a whole restore would take 204 more.

    What goes beyond is a tensor, JAX's programs and what the allocator keeps. A conversion holds one tensor.
    """
    model, size = large
    save_checkpoint(wan.model(small), tmp_path / "warm", format="orbax")
    save_checkpoint(model, tmp_path / "orbax", format="orbax")
    code = f"""
        from monarchrt.models.wan.checkpoints import convert_checkpoint, load_checkpoint

        folder = {str(tmp_path)!r}
        convert_checkpoint(folder + "/warm", folder + "/converted", to="diffusers")
        before = peak()
        convert_checkpoint(folder + "/orbax", folder + "/diffusers", to="diffusers")
        print(peak() - before)
        load_checkpoint(folder + "/warm", param_dtype="bfloat16")
        before = peak()
        load_checkpoint(folder + "/orbax", param_dtype="bfloat16")
        print(peak() - before)
    """
    converting, loading = numbers(code)
    assert converting < size / 4, converting / size
    assert size / 4 < loading < size * 3 / 4, loading / size
    assert_same(load_checkpoint(tmp_path / "diffusers", config=model.config), model)


@needs_proc
@pytest.mark.slow
def test_orbax_is_written_parameter_by_parameter(wan, small, large, tmp_path):
    """A conversion to Orbax needs its 204 MB, a copy of the largest parameter, 57 MB, and not one of all of them."""
    model, size = large
    save_checkpoint(wan.model(small), tmp_path / "warm", format="diffusers")
    save_checkpoint(model, tmp_path / "diffusers", format="diffusers")
    code = f"""
        from monarchrt.models.wan.checkpoints import convert_checkpoint

        folder = {str(tmp_path)!r}
        convert_checkpoint(folder + "/warm", folder + "/warm orbax", to="orbax")
        before = peak()
        convert_checkpoint(folder + "/diffusers", folder + "/orbax", to="orbax")
        print(peak() - before)
    """
    (used,) = numbers(code)
    assert size < used < size * 1.75, used / size
    assert_same(load_checkpoint(tmp_path / "orbax"), model)


@needs_proc
@pytest.mark.slow
def test_true_size_in_bounded_memory(tmp_path):
    """A 1.3B checkpoint in float32 (5.7 GB on disk) is loaded as bfloat16 in at most its 2.8 GB plus 1 GB."""
    config = wan_config("wan2.1-t2v-1.3b")
    infos = {t.official: TensorInfo(checkpoint_shape(config, t), np.dtype(np.float32)) for t in tensors(config)}
    rng = np.random.default_rng(0)
    folder = tmp_path / "wan"
    folder.mkdir()
    (folder / "config.json").write_text(dump_json(config_to_json(config, "official")))

    def draw(name):
        return rng.standard_normal(infos[name].shape, dtype=np.float32)

    for _ in write_safetensors(folder / WEIGHTS, infos, draw, metadata={"format": "pt"}):
        pass
    assert (folder / WEIGHTS).stat().st_size > 5_675_987_200
    code = f"""
        import ml_dtypes, numpy as np, jax
        from flax import nnx
        from monarchrt.models.wan.checkpoints import load_checkpoint
        from monarchrt.models.wan.checkpoints.save import ModelFile
        from monarchrt.models.checkpoints.tensor_files import SafetensorsFile

        jax.numpy.zeros(1).block_until_ready()
        before = peak()
        model = load_checkpoint({str(folder)!r}, param_dtype="bfloat16", dtype="bfloat16")
        used = peak() - before
        file, ours = SafetensorsFile({str(folder / WEIGHTS)!r}), ModelFile(model)
        for name in list(file.infos)[::50]:
            assert (ours.read(name) == file.read(name).astype(ml_dtypes.bfloat16)).all(), name
        print(used - 2 * 1_418_996_800)
    """
    (beyond,) = numbers(code)
    assert beyond < 1e9, f"{beyond / 1e9:.2f} GB beyond the parameters"
