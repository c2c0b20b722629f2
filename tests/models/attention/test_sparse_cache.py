"""Kinds that leave keys out: over a cache, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from monarchrt.models.attention.base import CacheShape, Context
from monarchrt.models.attention.notation import parse, to_text
from tests.models.attention import oracles
from tests.models.attention.test_sparse import P480, SIZES, close, no_hidden_axes, qkv  # noqa: F401

ALL = (  # of each file one or more, for what needs no oracle
    "top_k(keep=0.3)",
    "svg(keep=0.2, block=4, rows=6, frames=9)",
    "svg2(query_clusters=5, key_clusters=9, top_p=0.6, min_keep=0.2, iterations=4)",
    "radial(decay=0.5, block=5)",
    "radial(keep=0.6, block=4)",
    "radial(rule='published', block=7)",
    "sliding_tile(tile=(1,2,2), window=(3,1,3))",
    "vsa(keep=0.3, cube=(3,2,4), gate=False)",
    "vsa(keep=0.3, cube=(1,3,2))",
    "sla(keep=0.4, block=7)",
)

H, W = 4, 6
SHAPE = CacheShape(batch=2, frames=9, height=H, width=W, heads=2, head_dim=4, dtype="float32")


def context_of(setting, inputs):
    layer = setting.init(SIZES, rngs=nnx.Rngs(0))
    if layer is None:
        return Context()
    layer.bias[...] = jnp.linspace(-1.0, 1.0, layer.bias.shape[0])
    return Context(inputs=lambda: inputs, modules={setting.name: layer})


def one_block(setting):
    """A compiled function of a cache, a block's queries, keys and values, its inputs and its frame."""

    def step(cache, block, inputs, frame):
        cache = cache.append(block[1], block[2], frame=frame)
        return setting.attend_cache(cache, block[0], context=context_of(setting, inputs)), cache

    return jax.jit(step)


def roll_out(setting, x, inputs, shape, *, step=None):
    """Block after block over a cache, in one program."""
    step, cache, outputs = step or one_block(setting), setting.init_cache(shape), []
    x, inputs = np.asarray(x), np.asarray(inputs)
    for at in range(0, x.shape[2], 3 * H * W):
        rows = slice(at, at + 3 * H * W)
        frame = jnp.int32(at // (H * W))
        _, cache = step(cache, x[:, :, rows] + 1.0, inputs[:, rows], frame)  # a noisier one first, as denoising does
        out, cache = step(cache, x[:, :, rows], inputs[:, rows], frame)
        outputs.append(np.asarray(out))
    return np.concatenate(outputs, 1)


class TestCache:
    @pytest.mark.parametrize("text", ALL)
    def test_whole_clip_equals_blocks_over_a_cache(self, text):
        setting, grid = parse(text), (9, H, W)
        x = jnp.asarray(qkv(grid, seed=8))
        inputs = jnp.asarray(qkv(grid, seed=9, count=1)[0].reshape(2, -1, 8)[..., :6])

        @jax.jit
        def attend(x, inputs):
            return setting(*x, grid=grid, causal_block=3, context=context_of(setting, inputs))

        whole = np.asarray(attend(x, inputs))
        close(roll_out(setting, x, inputs, SHAPE), whole)
        dense = np.asarray(jax.jit(lambda x: parse("dense")(*x, grid=grid, causal_block=3))(x))
        assert np.abs(dense - whole)[:, 3 * H * W :].max() > 1e-2

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(text, marks=() if text.startswith(("vsa", "svg(")) else pytest.mark.slow)
            for text in ALL
            if "sliding" not in text and "published" not in text
        ],
    )
    def test_a_rolling_cache_sees_its_frames(self, text):
        """The last block sees the sink and what is kept, wherever it lies: as a mask over time says."""
        setting, frames = parse(text), 15
        x = qkv((frames, H, W), seed=10)
        inputs = qkv((frames, H, W), seed=11, count=1)[0].reshape(2, -1, 8)[..., :6]
        shape, step = dataclasses.replace(SHAPE, rolling=True, sink_frames=3), one_block(setting)
        out = roll_out(setting, x, inputs, shape, step=step)[:, -3 * H * W :]
        assert np.isfinite(out).all()
        # what was evicted is of no matter, and what is there is
        tokens = 3 * H * W
        for block, matters in ((0, True), (1, False), (2, False), (3, True)):
            changed = x.copy()
            changed[1:, :, block * tokens : (block + 1) * tokens] += 2.0
            moved = np.abs(roll_out(setting, changed, inputs, shape, step=step)[:, -tokens:] - out).max()
            assert (moved > 1e-4) == matters, block

    def test_rolled_frames_keep_their_distances(self):
        """Radial over a rolled cache is the rule of the true frames: without sinks, as a clip of the last frames."""
        setting, frames = parse("radial(decay=0.5, block=5)"), 15
        x = qkv((frames, H, W), seed=10)
        shape = dataclasses.replace(SHAPE, rolling=True)
        out = roll_out(setting, x, x[0, :, :, 0], shape)[:, -3 * H * W :]
        mask = oracles.radial(None, None, None, (10, H, W), None, decay=0.5, size=5)[
            H * W :, H * W :
        ]  # none of them is frame 0
        tensors = [torch.as_tensor(np.asarray(part, np.float64)) for part in x[:, :, -9 * H * W :]]
        close(out, oracles.attention(*tensors, mask=mask)[:, -3 * H * W :])

    def test_a_block_without_a_place_gives_nan(self):
        setting = parse("top_k(keep=0.5)")
        x = jnp.asarray(qkv((3, H, W)))

        def run(frame):
            return setting.attend_cache(setting.init_cache(SHAPE).append(x[1], x[2], frame=frame), x[0])

        run = jax.jit(run)
        assert np.isnan(run(jnp.int32(6))).all()
        assert np.isfinite(run(jnp.int32(0))).all()

    def test_they_share_a_cache_with_dense_and_monarch(self):
        for text in ALL:
            for other in ("dense", "monarch(tile=(1,4,6))", "monarch(tile=(3,4,6))"):
                parse(f"first_steps(1, {other}, {text})").init_cache(SHAPE)


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("top_k(keep=0)", r"top_k: keep=0 is not a number above 0 and at most 1"),
            ("top_k(keep=1.5)", r"top_k: keep=1.5 is not"),
            ("vsa(keep=0)", r"vsa: keep=0 is not"),
            ("vsa(cube=(3,5))", r"cube"),
            ("vsa(cube=(3,0,4))", r"cube"),
            ("vsa(gate=1)", r"gate=1"),
            ("svg(keep=-0.1)", r"svg: keep=-0.1 is not"),
            ("svg(rows=0)", r"rows=0"),
            ("svg(rows=(1,-2))", r"svg: rows=\(1, -2\)"),
            ("svg2(top_p=0)", r"svg2: top_p=0 is not"),
            ("svg2(min_keep=2)", r"svg2: min_keep=2 is not a number from 0 to 1"),
            ("svg2(iterations=0)", r"iterations=0"),
            ("sla(block=0)", r"block=0"),
            ("radial(keep=0.1, decay=0.2)", r"radial: keep=0.1 and decay=0.2 are both given; leave one out"),
            ("radial(decay=-1)", r"radial: decay=-1 is not a number from 0 on"),
            ("radial(rule=other)", r"rule='other'"),
            ("sliding_tile(window=(3,3))", r"window"),
            ("sliding_tile(window=3)", r"window"),
        ],
    )
    def test_settings(self, text, message):
        with pytest.raises(ValueError, match=message) as error:
            parse(text)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "grid", "block", "message"),
        [
            ("radial(rule=published, keep=0.15)", P480, None, r"keep=0.15 is out .* 0.3379, or rule='general', which"),
            ("radial(keep=0.09)", P480, None, r"keep=0.09 is out of reach .* the least is 0.0930"),
            ("radial(decay=0.1, frames=20)", P480, None, r"frames=20 is less than the 21 of the grid"),
            ("sla(keep=0.01)", (9, 4, 6), 3, r"sla: keep=0.01 of 2 blocks keeps no block; the least is 0.5000"),
            ("vsa(cube=(4,4,4))", P480, 3, r"cube=\(4, 4, 4\) does not lie in one causal block of 3 frames.* be 1, 3"),
            ("sliding_tile(tile=(4,4,4))", P480, None, r"does not divide the grid .*1, 3, 7, 21 frames; 1, 2, 3, 5, 6"),
            ("svg2", (9, 4, 6), 3, r"svg2: query_clusters=200 is more than the tokens of a call; use at most 72"),
            ("top_k(keep=0.001)", (9, 4, 6), 3, r"top_k: keep=0.001 is out of reach of 216 keys; the least is 0.00463"),
            (
                "vsa(keep=0.02, cube=(3,2,3))",
                (9, 4, 6),
                3,
                r"of 12 cubes of \(3, 2, 3\); the least is 0.08333, or",
            ),
            ("svg", (9, 4, 6), 3, r"keep=0.25 is out of reach of a band of 128 of 216 tokens; the least is 0.834, or"),
            (
                "svg(block=8, rows=(80,))",
                (9, 4, 6),
                3,
                r"rows=\(80,\) has one past the 72 queries of a call; use 0 to 71",
            ),
        ],
    )
    def test_grids(self, text, grid, block, message):
        for ask in (parse(text).check, parse(text).density):
            with pytest.raises(ValueError, match=message) as error:
                ask(grid, causal_block=block)
            assert "\n" not in str(error.value)

    def test_calls(self):
        x = jnp.asarray(qkv((3, H, W)))
        with pytest.raises(ValueError, match=r"query has 72 tokens; grid=\(3, 4, 7\) has 84"):
            parse("top_k")(*x, grid=(3, 4, 7))
        with pytest.raises(ValueError, match="3 windows are not one, or one for each of 2 heads"):
            parse("sliding_tile(tile=(1,1,1), window=((1,1,1),(1,1,1),(1,1,1)))")(*x, grid=(3, H, W))
        with pytest.raises(ValueError, match="the model has no parameters of its own for it"):
            parse("vsa(keep=0.5)")(*x, grid=(3, H, W))
        rolling = dataclasses.replace(SHAPE, rolling=True)
        for text in ("sliding_tile(tile=(1,1,1))", "radial(rule=published)"):
            with pytest.raises(ValueError, match="rolling cache"):
                parse(text).init_cache(rolling)
        with pytest.raises(ValueError, match=r"a cache of 9 frames does not hold whole cubes \(2, 2, 2\)"):
            parse("vsa(cube=(2,2,2))").init_cache(SHAPE)

    @pytest.mark.parametrize("text", ALL)
    def test_notation(self, text):
        assert parse(to_text(parse(text))) == parse(text)
