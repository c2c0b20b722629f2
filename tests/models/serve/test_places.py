"""Sessions on several devices: the decoder on one of its own, the network on a mesh."""

import os
from functools import partial

import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.serve.load import load_engine, random_engine
from tests import forks

PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.decoders import TinyDecoder
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.places import find_places
from monarchrt.models.sampling import Rollout
from monarchrt.models.serve import Engine, Limits, Sessions
from monarchrt.models.serve.messages import Prompt, Seek, Start, Stop
from monarchrt.models.vae import TinyVAE
from monarchrt.models.vae.tiny import TinyVAEConfig
from monarchrt.models.wan import WanModel, wan_config
from tests.compiled import compiled_here
from tests.models.serve.conftest import Client, encode

BEGIN = np.arange(9 * 32 * 64 * 3, dtype=np.uint32).reshape(9, 32, 64, 3).astype(np.uint8)

def filled(make, scale):
    '''A module of random numbers, bound to the first device as those of a run's checkpoint are.'''
    graph, state = nnx.split(nnx.eval_shape(make))
    rng, first = np.random.default_rng(0), jax.devices()[0]
    draw = lambda x: jax.device_put((scale * rng.standard_normal(x.shape)).astype(x.dtype), first)
    return nnx.merge(graph, jax.tree.map(draw, state))

wan = wan_config("tiny", dim=96, ffn_dim=128, num_heads=4, num_layers=int(sys.argv[1]))
tiny = TinyVAEConfig(encoder=4, decoder=(8, 4, 4, 4), blocks=1)
model, vae = filled(lambda: WanModel(wan, rngs=nnx.Rngs(0)), 0.1), filled(lambda: TinyVAE(tiny, rngs=nnx.Rngs(0)), 0.3)

def engine_on(unroll=False, **places):
    where = find_places(GenerateConfig(**places), heads=4)
    decoder = TinyDecoder(vae, device=where.decoder)
    return where, Engine(
        VideoPipeline(where.moved(model), decoder, mesh=where.mesh),
        rollout=Rollout(steps=1, window=6, sink_frames=3), height=4, width=8, encode=encode, begins=(9,), unroll=unroll,
    )

def watched(engine):
    '''What a client sees of a session that begins with a clip, is told another prompt and goes back.'''
    sessions = Sessions(engine, limits=Limits(), submit=lambda encode, frames, index, fps: frames.tobytes())
    client = Client(sessions, Start(prompt="a cat", pace=False, seed=1), begin=BEGIN)
    seen = client.run(turns=4)[1]
    for message in (Prompt(prompt="a dog"), Seek(block=2), Stop()):
        client.tell(message)
        events, frames = client.run(turns=3)
        assert not [event for event in events if event["type"] == "error" or event.get("reason") == "error"], events
        seen += frames
    return [(frame, block) for frame, block, _ in seen], np.stack([np.frombuffer(x, np.uint8) for *_, x in seen])

def in_a_thread(engine):
    '''`watched`, in a thread that compiles nothing.'''
    def run():
        with compiled_here() as events:
            seen = watched(engine)
        assert not events, events
        return seen
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()

_, engine = engine_on()
numbers, right = watched(engine)
assert len({block for _, block in numbers}) >= 6 and right.std() > 1, (numbers, right.std())
whole = engine.held_on(2)
assert list(whole) == jax.devices()[:1] and (one := whole[jax.devices()[0]]) == engine.held(2)
for options in sys.argv[2:]:
    places = {name: int(value) if value.isdigit() else value
              for name, _, value in (word.partition(":") for word in options.split("/"))}
    where, engine = engine_on(**places)
    engine.check_memory(4)
    engine.warm_up()
    found, frames = in_a_thread(engine)
    assert found == numbers
    assert np.abs(frames.astype(int) - right).max() <= (0 if where.mesh is None else 1)
    shown, finite, _ = engine.decode(engine.video(engine.embed("a", None), 0).generate(), engine.start_decoder())
    assert shown.devices() == finite.devices() == {where.decoder} and finite
    held, own = engine.held_on(2), jax.devices()[:1] if where.mesh is None else list(where.mesh.devices.flat)
    assert set(held) == {*own, where.decoder}
    if where.mesh is None:
        assert sum(sum(of_device) for of_device in held.values()) == sum(one)
        assert held[where.decoder][0] < held[own[0]][0]
    elif where.mesh.shape["fsdp"] > 1:
        assert held[own[0]][0] < 0.8 * one[0]
        if "unroll" in places:
            weights = jax.tree.leaves(next(iter(engine.networks.values())).params.arrays)
            assert any(x.sharding.shard_shape(x.shape) != x.shape for x in weights)
    if where.mesh is not None:  # keys and values, found and foreseen
        video = engine.video(engine.embed("a", None), 0)
        video.generate()
        found = sum(x.addressable_shards[-1].data.nbytes for x in jax.tree.leaves(video._cache))
        assert 0.8 * video.held <= found <= video.held <= one[1] / where.mesh.shape["heads"], (found, video.held, one)
    print(options, "right", flush=True)
print("all right")
"""


def on_devices(*arguments: str, count: int) -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    process = forks.start(PROGRAM, arguments, environment=os.environ | {"XLA_FLAGS": flags})
    said, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]
    assert said.splitlines()[-1] == "all right"


def test_a_decoder_of_its_own():
    on_devices("1", "decoder_device:1", count=2)


def test_one_process_serves(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    for make in (load_engine, partial(random_engine, preset="tiny")):
        with pytest.raises(UserError, match="there are 2 processes, but sessions run in one process"):
            make(GenerateConfig(checkpoint="nowhere", mesh="heads=2"), report=print)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (3, ["mesh:heads=2/decoder_device:2", "mesh:heads=2/decoder_device:0"]),
        (4, ["mesh:heads=4", "mesh:fsdp=4", "mesh:fsdp=2,heads=2/unroll:1"]),
    ],
)
def test_every_way_to_share_the_work(count, options):
    on_devices("2", *options, count=count)
