import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.generate.decoders import PatchDecoder
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.sampling import Rollout
from monarchrt.models.serve import Engine, Limits, Outbox, Sessions
from monarchrt.models.wan import WanModel, wan_config


def encode(prompts):
    """An embedding that differs for each text."""
    seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") for prompt in prompts]
    return [jnp.asarray(9 * np.random.default_rng(seed).standard_normal((1, 4, 32)), jnp.float32) for seed in seeds]


def pipeline():
    """One whose parameters are all random, so that the text matters."""
    config = wan_config("tiny", num_layers=1, in_channels=12, out_channels=12)
    graph, state = nnx.split(WanModel(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    values = [
        (path, leaf.replace(jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graph, nnx.from_flat_state(values))
    return VideoPipeline(model, PatchDecoder(PatchDCT(patch=2)))


@pytest.fixture(scope="session")
def engine():
    """Blocks of 3 frames of 8 x 16 pixels."""
    engine = Engine(
        pipeline(),
        rollout=Rollout(steps=1, window=6, sink_frames=3),
        height=4,
        width=8,
        encode=encode,
        fps=30.0,
        begins=(6,),
        attentions=("monarch(tile=(3,2,2))",),
        unroll=True,
    )
    engine.warm_up()
    return engine


class Clock:
    """Seconds that pass only if told to."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stage(engine, clock, tmp_path):
    """Sessions whose clock stands still, and whose frames are bytes as they are."""

    def stage(**limits):
        plain = lambda encode, frames, index, fps: frames.tobytes()  # noqa: E731
        return Sessions(engine, limits=Limits(**limits), clock=clock, folder=tmp_path, submit=plain)

    return stage


def drain(outbox):
    """Everything that waits: events, and (frame, block, picture)."""
    events, frames = [], []
    while (item := outbox.take()) is not None:
        if isinstance(item, bytes):
            frames.append((int.from_bytes(item[:4], "big"), int.from_bytes(item[4:8], "big"), item[8:]))
        else:
            events.append(item)
    return events, frames


class Client:
    """A session without a network."""

    def __init__(self, sessions, start, *, frames=1000, **more):
        self.sessions, self.outbox = sessions, Outbox(frames=frames)
        self.session = sessions.open(start, self.outbox, **more)

    def tell(self, message):
        self.sessions.tell(self.session, message)

    def run(self, turns=10**6):
        """Turns until there is nothing to do; the events and frames of them."""
        for _ in range(turns):
            if not self.sessions.turn():
                break
        self.sessions.finish()
        return drain(self.outbox)


@pytest.fixture
def client():
    return Client
