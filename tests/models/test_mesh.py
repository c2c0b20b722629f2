"""The notation of meshes, what it refuses, and what the rules make of it."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from monarchrt import triton_kernels
from monarchrt.models.attention.base import CacheShape
from monarchrt.models.attention.notation import parse
from monarchrt.models.compiling import GATHERED_AHEAD, TRAINING, gathers_ahead, training_options
from monarchrt.models.errors import UserError
from monarchrt.models.mesh import AXES, MeshShape, mesh_shape
from monarchrt.models.sharding import no_whole_weights, partition, weight_spec, whole
from monarchrt.models.wan.tokens import join_frames, joins_frames, pad_rope, padded
from tests.kernels.test_triton import missing
from tests.models.test_wan import equations


def abstract(**sizes: int) -> AbstractMesh:
    shape = MeshShape(**sizes)
    return AbstractMesh(shape.sizes(), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    ("text", "devices", "sizes"),
    [
        ("data=2,fsdp=4,heads=2", 16, (2, 4, 2)),
        ("heads=2, fsdp = 4", 8, (1, 4, 2)),  # in any order
        ("heads=3,data=-1", 12, (4, 1, 3)),
        ("data=1", 1, (1, 1, 1)),
    ],
)
def test_notation(text, devices, sizes):
    shape = MeshShape.parse(text, devices=devices)
    assert shape.sizes() == sizes
    assert MeshShape.parse(str(shape), devices=devices) == shape


def test_short_forms():
    assert mesh_shape(None, devices=4) == MeshShape(data=4)
    assert mesh_shape(None, devices=4, sharding="fsdp") == MeshShape(fsdp=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2", "mesh is data=2, which takes 2 devices, and there are 4; it could be data=4"),
        ("data=2,heads=4", "which takes 8 devices, and there are 4; it could be data=4, heads=4 or data=2,heads=2"),
        ("heads=3,data=-1", "takes a multiple of 3 devices, and there are 4; it could be"),
        ("data=-1,fsdp=-1", "only one axis may be -1"),
        ("data=2,rows=2", "which has an axis 'rows'; there are data"),
        ("data=2,data=2", "which has data twice; give it once"),
        ("data=0,fsdp=4", "it must be axes with their devices, for example data=2,fsdp=4"),
        ("data=-2", "it must be axes"),
        ("data=2.5", "it must be axes"),
        ("data", "it must be axes"),
        ("", "it must be axes"),
        ("data=4,", "it must be axes"),
        ("=4", "which has an axis ''"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UserError) as error:
        MeshShape.parse(text, devices=4)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_heads_must_divide():
    MeshShape(heads=6).check_heads(12)
    with pytest.raises(UserError, match="5 does not divide; heads could be 1 or 2 or 3 or 4 or 6 or 12"):
        MeshShape(heads=5).check_heads(12)


def test_batch_must_divide():
    MeshShape(data=2, fsdp=2, heads=3).check_batch(8, accumulation=2)
    with pytest.raises(UserError, match=r"batch is 6, which mesh data=2,heads=2 times accumulation 2 does not divide"):
        MeshShape(data=2, heads=2).check_batch(6, accumulation=2)
    with pytest.raises(UserError, match="batch is 2, which 4 devices do not divide; use a multiple of 4"):
        MeshShape(fsdp=4).check_batch(2)


def test_rules():
    """A logical axis is split by as many of its mesh axes as divide it; small arrays of the state are whole."""
    mesh = abstract(data=2, fsdp=4, heads=3)
    tokens = ("batch", None, "tokens", None)
    assert partition(mesh, (8, 5, 12, 96), tokens) == PartitionSpec(("data", "fsdp"), None, ("heads",), None)
    assert partition(mesh, (2, 5, 11, 96), tokens) == PartitionSpec(("data",), None, None, None)
    assert partition(mesh, (1, 5, 11, 96), tokens) == PartitionSpec(None, None, None, None)
    assert weight_spec(mesh, (30, 1536, 8960)) == PartitionSpec(None, None, "fsdp")
    assert weight_spec(mesh, (30, 1536, 8961)) == PartitionSpec(None, "fsdp")
    assert weight_spec(abstract(fsdp=40), (40, 7, 7)) == PartitionSpec()  # never the layers
    for shape in ((), (1536,), (30, 1536), (30, 6, 1536), (1, 2, 1536)):
        assert weight_spec(mesh, shape) == PartitionSpec(), shape


def test_tokens_that_are_added():
    """Each device has a multiple of 8, also where tokens do not divide; attention gets none of those that are added."""
    with use_abstract_mesh(abstract(data=2, heads=2)):
        assert [padded(tokens) for tokens in (1560, 1568, 7)] == [1568, 1568, 16]
        cos, sin = jax.eval_shape(pad_rope, (jnp.ones((3, 7, 4)), jnp.ones((3, 7, 4))))
        assert cos.shape == sin.shape == (3, 16, 4)
        assert joins_frames(jnp.ones(1))  # one timestep
        assert not joins_frames(jnp.ones((1, 3)))
    assert padded(7) == 7
    assert not joins_frames(jnp.ones(1))
    x = jnp.arange(24.0).reshape(1, 3, 4, 2)
    np.testing.assert_array_equal(join_frames(x), x.reshape(1, 1, 12, 2))
    np.testing.assert_array_equal(join_frames(x[0]), x.reshape(1, 12, 2))


def test_halves_are_copied_where_that_was_measured(monkeypatch):
    """Between two Hopper GPUs of one process, if the user has not said how."""

    def copied(heads: int, capability: str, processes: int = 1) -> bool:
        devices = [SimpleNamespace(compute_capability=capability, process_index=n % processes) for n in range(4)]
        options = training_options(devices, heads=heads)
        assert options.items() >= TRAINING.items()
        return options.get("xla_gpu_collective_permute_mode") == "COLLECTIVES_PEER_MEMORY"

    assert copied(2, "9.0")
    assert not any((copied(4, "9.0"), copied(1, "9.0"), copied(2, "8.9"), copied(2, "10.0"), copied(2, "9.0", 2)))
    assert training_options(jax.devices(), heads=2) == TRAINING
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_collective_permute_mode=COLLECTIVES_PRIVATE_MEMORY")
    assert not copied(2, "9.0")


def test_weights_are_gathered_a_layer_ahead_on_gpus(monkeypatch):
    """Where devices share them; what the user says of it stays."""

    def ahead(*, fsdp: int = 2, platform: str = "gpu", asked: bool = True, flags: str = "") -> set[str]:
        monkeypatch.setenv("XLA_FLAGS", flags)
        devices = [SimpleNamespace(platform=platform, process_index=0)] * fsdp
        options = training_options(devices, fsdp=fsdp, ahead=asked)
        assert gathers_ahead(devices, fsdp=fsdp) == (fsdp > 1 and platform == "gpu" and "_all_gather" not in flags)
        return set(options) - set(TRAINING)

    assert ahead() == ahead(flags="--xla_gpu_autotune_level=0") == set(GATHERED_AHEAD)
    assert ahead(fsdp=1) == ahead(platform="cpu") == ahead(asked=False) == set()
    for flag in ("--xla_gpu_enable_pipelined_all_gather=false", "--xla_gpu_pipeline_all_gather=off"):
        assert ahead(flags=flag) == set()
    one = ahead(flags="--xla_gpu_enable_while_loop_double_buffering=false")
    assert one == {"xla_gpu_pipeline_all_gather"}


def test_nothing_is_split_without_a_mesh():
    from monarchrt.models.sharding import constrain, on_each_device

    x = jax.numpy.ones((2, 3, 4, 5))
    assert constrain(x, "batch", None, "tokens", None) is x
    assert whole(x) is x
    assert on_each_device(lambda weights, x: x * weights, 2.0, (x,), (("batch", None, "tokens", None),)).sum() == 240


def test_what_is_known_is_checked_before_each_device_attends():
    """Outside of `jax.jit`, as on one device: inside of a device's part nothing is known."""
    attention, tokens = parse("monarch(tile=(3,4,8))"), jnp.ones((2, 96, 2, 8))
    shape = CacheShape(batch=2, frames=6, height=4, width=8, heads=2, head_dim=8, layers=2, dtype="float32")
    empty = attention.init_cache(shape)
    filled = empty.append(tokens, tokens, frame=0, layer=0)
    with use_abstract_mesh(abstract(heads=2)):
        with pytest.raises(ValueError, match="the cache holds none of the 3 frames"):
            attention.attend_cache(empty, tokens, layer=jnp.int32(0))
        with pytest.raises(ValueError, match="layer=7 is not from 0 to 1"):
            attention.attend_cache(filled, tokens, layer=jnp.int32(7))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_weights_are_no_residuals(capsys, dtype):
    """Also where they are rounded before they travel."""
    weights, x = jnp.ones((64, 96)), jnp.ones((4, 64), dtype)

    def loss(weights, x):
        return jnp.sin(x @ whole(weights, dtype=dtype).astype(dtype)).sum()

    with use_abstract_mesh(abstract(fsdp=2)):
        print_saved_residuals(jax.checkpoint(loss, policy=no_whole_weights), weights, x)
    kept = {line.partition("]")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("f32[64,96]")}
    assert kept == {" from the argument weights"}


@missing("triton", "jax_triton")
@pytest.mark.parametrize("setting", ["monarch(tile=(3,4,8))", "sliding_tile(tile=(3,2,4),window=(1,1,3))"])
@pytest.mark.parametrize("mesh", [{"heads": 2}, {"data": 2}, {"data": 3}], ids=str)  # the last divides nothing
def test_programs_hold_no_address(setting, mesh):
    """Each device calls a kernel with its part; else the program would differ in each process, and none find it."""
    attention = dataclasses.replace(parse(setting), implementation="triton")
    shape = CacheShape(batch=2, frames=6, height=4, width=8, heads=2, head_dim=64, layers=2)

    def clip(*arrays):
        return jax.grad(lambda q, k, v: attention(q, k, v, grid=(6, 4, 8)).sum(), argnums=(0, 1, 2))(*arrays)

    def block(cache, query, layer):
        cache = cache.append(query, query, frame=0, layer=layer)
        return attention.attend_cache(cache, query, layer=layer)

    def split_by_a_callback(fn, *arrays):
        """Calls that the compiler is to split; what lies in a `shard_map` is a device's own."""
        program, name = jax.jit(fn).trace(*arrays).jaxpr, "custom_partitioning"
        own = [call for part in equations(program, "shard_map") for call in equations(part.params["jaxpr"], name)]
        return len(list(equations(program, name))) - len(own)

    tokens = jnp.ones((2, 192, 2, 64), jnp.bfloat16)
    programs = (clip, tokens, tokens, tokens), (block, attention.init_cache(shape), tokens[:, :96], jnp.int32(0))
    with triton_kernels.compile_for(90):
        assert all(split_by_a_callback(*program) for program in programs)  # without a mesh: a user's own, say
        with use_abstract_mesh(abstract(**mesh)):
            assert [split_by_a_callback(*program) for program in programs] == [0, 0]
