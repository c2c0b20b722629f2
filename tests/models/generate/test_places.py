"""A video on several devices: a mesh for the network, a device of its own for the decoder."""

import jax
import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.places import find_places
from tests.devices import on_devices
from tests.models.attention.test_split_arrays import BY_LISTS

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from monarchrt.models.attention.notation import parse
from monarchrt.models.collectives import collectives
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.decoders import PatchDecoder, WanDecoder
from monarchrt.models.generate.material import unrolled_if_asked
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.places import find_places
from monarchrt.models.generate.plan import Defaults, make_plan
from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.sampling.rollout import begin_block, call_network, start_cache
from monarchrt.models.vae import WanVAE, vae_config
from monarchrt.models.wan import WanModel, wan_config
mode, attention, *asked = sys.argv[1:]
vae = mode.endswith("+vae")
mode = mode.removesuffix("+vae")
config = wan_config("tiny", dim=96, ffn_dim=192, num_heads=4, num_layers=2, in_channels=16 if vae else 12,
                    out_channels=16 if vae else 12, attention=parse(attention))
model = WanModel(config, rngs=nnx.Rngs(0))
graph, params = nnx.split(model)
params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
model = nnx.merge(graph, params)
text = jnp.ones((1, 3, config.text_dim))
def video(**places):
    size = dict(height=64, width=128, frames=21) if vae else dict(height=16, width=24, frames=6)
    settings = GenerateConfig(seed=1, steps=2, quiet=True, zoom=1, **size, **places)
    scale = dict(spatial=8, temporal=4) if vae else dict(spatial=2, temporal=1)
    defaults = Defaults(mode=mode, sampler="euler", guidance=1.0)
    plan = make_plan(settings, defaults=defaults, model=model.config, **scale)
    where = find_places(settings, heads=4)
    decoder = (
        WanDecoder(WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0)), device=where.decoder)
        if vae else PatchDecoder(PatchDCT(patch=2), device=where.decoder)
    )
    network = unrolled_if_asked(where.moved(model), settings)
    pipeline = VideoPipeline(network, decoder, mesh=where.mesh)
    kept = []
    frames = np.concatenate(list(pipeline(text, plan=plan, keep=kept)))
    return frames, np.concatenate([np.asarray(part) for part in kept], axis=1), where, plan
right, latents, _, plan = video()
# 24 tokens of a frame, or 72 of a block: on 2 and on 4 devices some are added
for options in asked:
    places = {name: int(value) if value.isdigit() else value
              for name, _, value in (word.partition(":") for word in options.split("/"))}
    frames, found, where, _ = video(**places)
    np.testing.assert_allclose(found, latents, atol=2e-4, rtol=1e-3)
    assert np.abs(frames.astype(int) - right).max() <= 1
    if where.mesh is None:
        continue
    if mode == "autoregressive":  # caches live where their heads are, and never move
        with jax.set_mesh(where.mesh):
            graph, params = nnx.split(where.moved(model))
            rollout, (count, height, width) = plan.settings, plan.latents
            cache = start_cache(graph, params, text, frames=count, height=height, width=width, rollout=rollout)
            parts = [x.addressable_shards[0].data.shape[-2] for x in jax.tree.leaves(cache.runs)]
            assert parts and set(parts) == {4 // where.mesh.shape["heads"]}, parts
            key, frame = jax.random.key(0), jnp.zeros(2, jnp.int32)
            state = begin_block(key, frame, shape=(1, rollout.block, height, width, config.out_channels))
            lowered = call_network.lower(graph, params, cache, state, np.int32(0), key, frame, rollout=rollout)
            program = lowered.compile()
        block = (height // 2) * (width // 2) * rollout.block * config.dim * 4  # bytes of the tokens of a block
        found = collectives(program.as_text())
        if where.mesh.shape["fsdp"] == 1:  # query, key and value, and the output, of 2 layers; no cache
            ways = ["all-to-all", "collective-permute"]  # two devices send each other halves
            way = ways.pop(where.mesh.shape["heads"] == 2)
            assert sum(item.times for item in found if item.kind == way) == 2 * 2, found
            assert not any(item.kind in ways for item in found), found  # nor are rows filled up
            assert all(item.bytes <= (3 if item.kind == way else 1) * block for item in found), found
        assert program.memory_analysis().alias_size_in_bytes > 0  # the cache is written in place
    print(options, "right", flush=True)
print("all right")
"""


def make_videos(*arguments: str, count: int = 4) -> None:
    assert on_devices(PROGRAM, *arguments, count=count).splitlines()[-1] == "all right"


def test_blocks_by_heads_and_a_decoder_of_its_own():
    make_videos("autoregressive", "dense", "mesh:heads=2/decoder_device:2", count=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "attention"),
    [
        ("autoregressive", "monarch(tile=(1,4,6))"),
        ("autoregressive", "first_steps(1, dense, monarch)"),
        ("bidirectional", "monarch(tile=(3,4,6))"),
        ("autoregressive+vae", "dense"),
    ],
)
def test_every_way_to_share_the_work(mode, attention):
    make_videos(
        mode,
        attention,
        "mesh:heads=4",
        "mesh:fsdp=2,heads=2",
        "mesh:fsdp=4",
        "decoder_device:1",
        "decoder_device:0",
        *["mesh:fsdp=2,heads=2/unroll_layers:yes"] * (mode == "autoregressive"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["autoregressive", "bidirectional"])
@pytest.mark.parametrize("attention", ["top_k(keep=0.3)", "vsa(keep=0.3, cube=(3,2,3))", *BY_LISTS])
def test_kinds_that_leave_keys_out(mode, attention):
    make_videos(mode, attention, "mesh:fsdp=2,heads=2")


def test_one_device_is_left_alone():
    places = find_places(GenerateConfig(), heads=12)
    assert places.mesh is None
    assert places.decoder is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "heads=2"}, "mesh is heads=2, which takes 2 devices, and there is 1; it could be data=1"),
        ({"decoder_device": 3}, "decoder_device is 3, but there is 1 device, counted from 0; leave it out"),
    ],
)
def test_devices_that_are_not_there(settings, message):
    assert len(jax.devices()) == 1
    with pytest.raises(UserError) as error:
        find_places(GenerateConfig(**settings), heads=12)
    assert str(error.value) == message


def test_the_decoders_own_device_is_counted(monkeypatch):
    class Device:
        process_index = 0

    devices = [Device() for _ in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError) as error:
        find_places(GenerateConfig(mesh="heads=2", decoder_device=3), heads=12)
    assert "there are 3; it could be heads=3, since decoder_device 3 is not part of the mesh" in str(error.value)
    with pytest.raises(UserError, match=r"there are 4; it could be heads=4$"):
        find_places(GenerateConfig(mesh="heads=2"), heads=12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "rows=2"}, "mesh is 'rows=2', which has an axis 'rows'"),
        ({"decoder_device": -1}, "decoder_device is -1; it must be at least 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        GenerateConfig(**settings)


@pytest.mark.parametrize("shape", ["data=2,heads=2", "data=4"])
def test_one_video_is_no_batch(shape):
    from monarchrt.models.mesh import MeshShape

    with pytest.raises(UserError, match=r"one video is made at a time, which data=\d cannot split; use heads"):
        MeshShape.parse(shape, devices=4).check_one_clip()
