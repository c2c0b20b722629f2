"""Sparse kinds by lists of blocks: the numbers of their exact forms, over clips, causal blocks and caches."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax.block_mask import BlockMask
from monarchrt.models.attention import listed as listed_kinds
from monarchrt.models.attention import svg2, top_k
from monarchrt.models.attention.base import Context
from monarchrt.models.attention.listed import Order
from monarchrt.models.attention.masked import Places
from monarchrt.models.attention.notation import parse
from tests.models.attention import oracles
from tests.models.attention.test_sparse import GRID, close, qkv, with_gradients
from tests.models.attention.test_sparse_cache import SHAPE, H, W, context_of, roll_out

KINDS = (
    "vsa(keep=0.3, cube=(2,2,3), gate=False)",  # cubes of many sizes
    "svg(keep=0.2, block=4, rows=(0,3,3,11))",
    "sla(keep=0.4, block=7)",
    "radial(decay=0.5, block=5)",
    "radial(rule='published', block=7)",
    "sliding_tile(tile=(1,1,2), window=(3,1,1))",
    "sliding_tile(tile=(5,3,1), window=((1,1,3),(4,1,2)))",
    "vsa(keep=0.5, cube=(1,3,4))",
)
CACHED = (
    "vsa(keep=0.3, cube=(3,2,4), gate=False)",
    "svg(keep=0.2, block=4, rows=6, frames=15)",
    "sla(keep=0.4, block=7)",
    "radial(decay=0.5, block=5)",
    "radial(rule='published', block=7)",
    "sliding_tile(tile=(1,2,2), window=(3,1,3))",
)


def both(text) -> Any:
    setting = parse(text)
    return tuple(dataclasses.replace(setting, implementation=name) for name in ("exact", "xla"))


def tokens_of(mask: BlockMask, queries: int, keys: int):
    """bool [B, H, Nq, Nk] of the lists for queries and of those for keys, token by token."""
    found = []
    for lists, mine, theirs, shape in (
        (mask.keys, mask.query_starts, mask.key_starts, (queries, keys)),
        (mask.queries, mask.key_starts, mask.query_starts, (keys, queries)),
    ):
        out = np.zeros((*lists.count.shape[:2], *shape), bool)
        for b, h, block in np.ndindex(*lists.count.shape):
            for entry in np.asarray(lists.entries[b, h, block, : lists.count[b, h, block]]):
                rows = slice(*mine[0, 0, block : block + 2])
                part = out[b, h, rows, slice(*theirs[0, 0, entry : entry + 2])]
                assert part.size, "a list has an empty block"
                assert not part.any(), "a list has a block twice"
                part[:] = True
        found.append(out)
    np.testing.assert_array_equal(found[0], found[1].swapaxes(2, 3))
    return found[0]


class TestLists:
    @pytest.mark.parametrize(
        ("text", "oracle", "options"),
        [
            ("radial(decay=0.5, block=5)", oracles.radial, dict(decay=0.5, size=5)),
            (
                "sliding_tile(tile=(1,1,2), window=(3,1,1))",
                oracles.sliding_tile,
                dict(tile=(1, 1, 2), windows=[(3, 1, 1)]),
            ),
            (
                "sliding_tile(tile=(5,3,1), window=((1,1,3),(4,1,2)))",
                oracles.sliding_tile,
                dict(tile=(5, 3, 1), windows=[(1, 1, 3), (4, 1, 2)]),
            ),
        ],
    )
    @pytest.mark.parametrize("frames", [slice(0, 5), slice(2, 4)])
    def test_are_the_mask(self, monkeypatch, text, oracle, options, frames):
        """Of a clip, and of a causal block that begins within a tile; nothing is computed."""
        setting: Any = parse(text)
        per_frame, made = GRID[1] * GRID[2], []

        def record(self, query, *args, blocks, **rest):
            made.append(blocks())
            return query

        monkeypatch.setattr(type(setting), "attend_kept", record)
        places = Places(
            grid=GRID, first=frames.start, frames=frames.stop - frames.start, key_frames=np.arange(frames.stop),
            seen=frames.stop,
        )  # fmt: skip
        rows, seen = slice(frames.start * per_frame, frames.stop * per_frame), slice(frames.stop * per_frame)
        x = jnp.zeros((1, places.frames * per_frame, 2, 4)), jnp.zeros((1, frames.stop * per_frame, 2, 4))
        setting.attend(x[0], x[1], x[1], places, Context())
        tokens = tokens_of(made[0].mask, x[0].shape[1], x[1].shape[1])
        for axis, order in ((2, made[0].queries), (3, made[0].keys)):
            if order is not None:
                tokens = np.take(tokens, order.back, axis)
        expected = oracle(None, None, None, GRID, None, **options)[..., rows, seen]
        np.testing.assert_array_equal(tokens, np.broadcast_to(expected, tokens.shape))

    def test_orders(self):
        order = Order.by(np.array([2, 0, 1, 0]))
        traced = Order.by(jnp.array([2, 0, 1, 0]))
        assert order.to.tolist() == traced.to.tolist() == [1, 3, 2, 0]
        x = jnp.arange(8.0).reshape(1, 4, 2, 1)
        close(order.apply(x)[0, :, 0, 0], [2.0, 6.0, 4.0, 0.0])
        close(order.undo(order.apply(x)), x)
        mixed = Order.either(jnp.array([[True, False]]), order, Order.by(np.arange(4)))
        close(mixed.apply(x)[0, :, :, 0], [[2.0, 1.0], [6.0, 3.0], [4.0, 5.0], [0.0, 7.0]])
        close(jax.grad(lambda x: (mixed.apply(x)[..., 0] * x[..., 0]).sum())(x), mixed.undo(x) + mixed.apply(x))


class TestNumbers:
    @pytest.mark.parametrize("block", [None, 2])
    @pytest.mark.parametrize("text", [KINDS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in KINDS[1:])])
    def test_as_the_exact_form(self, text, block):
        if block and "(5,3,1)" in text:
            text = text.replace("(5,3,1)", "(5,1,1)")  # a tile that causal blocks cut
        x, weights = qkv(GRID, seed=3), qkv(GRID, seed=4, count=1)[0]
        inputs = jnp.asarray(qkv(GRID, seed=9, count=1)[0].reshape(2, -1, 8)[..., :6])
        exact, listed = both(text)
        if block and "gate=False" in text:
            return  # the cached ones have it
        options = {"grid": GRID, "causal_block": block, "context": context_of(exact, inputs)}
        expected = with_gradients(exact, x, weights, **options)
        jax.tree.map(close, with_gradients(listed, x, weights, **options), expected)
        dense = parse("dense")(*jnp.asarray(x), grid=GRID, causal_block=block)
        assert np.abs(dense - expected[0]).max() > 1e-2

    @pytest.mark.parametrize("block", [None, pytest.param(2, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        "text",
        [
            "vsa(keep=0.3, cube=(2,2,3), gate=False)",  # a list for each sample and head
            "sliding_tile(tile=(1,1,2), window=((3,1,1),(1,1,3)))",  # for each head
            pytest.param("svg(keep=0.2, block=4, rows=(0,3,3,11))", marks=pytest.mark.slow),  # and an order for each
        ],
    )
    def test_heads_first(self, monkeypatch, text, block):
        """The numbers of tokens first: each head is a sample of one head."""
        x, weights = qkv(GRID, seed=3), qkv(GRID, seed=4, count=1)[0]
        setting, options, shapes = both(text)[1], {"grid": GRID, "causal_block": block}, []
        attend = listed_kinds.block_sparse_attention

        def record(query, *args, **rest):
            shapes.append(query.shape)
            return attend(query, *args, **rest)

        def tokens_first(self, query, key, value, *, implementation, stack=None):
            query, key, value = self.queries.apply(query), self.keys.apply(key), self.keys.apply(value)
            out = listed_kinds.block_sparse_attention(query, key, value, self.mask, implementation=implementation)
            return self.queries.undo(out)

        monkeypatch.setattr(listed_kinds, "block_sparse_attention", record)
        found = with_gradients(setting, x, weights, **options)
        half = len(shapes)
        monkeypatch.setattr(listed_kinds.Blocks, "attend", tokens_first)
        right = with_gradients(setting, x, weights, **options)
        for one, other in zip(*map(jax.tree.leaves, (found, right)), strict=True):
            np.testing.assert_array_equal(one, other)
        assert shapes[:half] == [(b * n, tokens, 1, d) for b, tokens, n, d in shapes[half:]]

    def test_a_block_longer_than_the_clip(self):
        """Takes the memory of what there is."""
        x = jnp.asarray(qkv(GRID, seed=3))
        setting = parse("sla(keep=1.0, block=2147483647, linear=False, implementation=xla)")
        close(setting(*x, grid=GRID), parse("dense")(*x, grid=GRID))

    @pytest.mark.slow
    @pytest.mark.parametrize("text", CACHED)
    def test_over_a_cache(self, text):
        exact, listed = both(text)
        x = jnp.asarray(qkv((9, H, W), seed=8))
        inputs = jnp.zeros((2, x.shape[2], 6))
        close(roll_out(listed, x, inputs, SHAPE), roll_out(exact, x, inputs, SHAPE))

    @pytest.mark.parametrize(("sizes", "block"), [([3, 3, 3], 3), ([2, 4, 1, 2], None)])
    @pytest.mark.parametrize("text", ["sliding_tile(tile=(3,2,3), window=((1,1,3),(3,3,1)))"])
    def test_over_a_cache_wherever_tiles_begin(self, text, sizes, block):
        """Blocks of whole tiles, which lie in the cache as they are; and others, which cut them."""
        x, shape, outputs = jnp.asarray(qkv((9, H, W), seed=8)), dataclasses.replace(SHAPE, block=block), []
        exact, listed = both(text)
        for setting in (exact, listed):
            cache, frame, parts = setting.init_cache(shape), 0, []
            assert setting.key_tile(cache) == (setting.tile if block else None)

            @jax.jit
            def step(cache, part, frame, setting=setting):
                cache = cache.append(part[1], part[2], frame=frame)
                return setting.attend_cache(cache, part[0]), cache

            for size in sizes:
                out, cache = step(cache, x[:, :, frame * H * W : (frame + size) * H * W], jnp.int32(frame))
                frame += size
                parts.append(np.asarray(out))
            outputs.append(np.concatenate(parts, 1))
        close(outputs[1], outputs[0])
        if block:
            close(outputs[1], exact(*x, grid=(9, H, W), causal_block=block))
        assert np.abs(outputs[0] - parse("dense")(*x, grid=(9, H, W), causal_block=3)).max() > 1e-2

    @pytest.mark.parametrize("cube", [(3, 2, 3), (3, 3, 4)])
    def test_cubes_that_divide_a_frame_lie_in_the_cache_as_they_are(self, cube):
        exact, listed = both(f"vsa(keep=0.3, cube={cube}, gate=False)")
        assert exact.key_tile(exact.init_cache(SHAPE)) == (cube if cube == (3, 2, 3) else None)
        x = jnp.asarray(qkv((9, H, W), seed=8))
        inputs = jnp.zeros((2, x.shape[2], 6))
        right = jax.jit(lambda x: exact(*x, grid=(9, H, W), causal_block=3))(x)
        for setting in (exact, listed):
            close(roll_out(setting, x, inputs, SHAPE), right)

    @pytest.mark.parametrize(
        "text",
        [
            "vsa(keep=0.3, cube=(3,2,3), gate=False)",
            *(pytest.param(x, marks=pytest.mark.slow) for x in (*CACHED, "sliding_tile(tile=(3,2,3), window=(3,1,1))")),
        ],
    )
    def test_layers_of_a_cache_are_read_where_they_lie(self, monkeypatch, text):
        """No layer is copied out of the stack, unless for gradients, which are the exact form's."""
        x, weights = jnp.asarray(qkv((6, H, W), seed=8))[:, :1], jnp.asarray(qkv((6, H, W), seed=4, count=1))[0, :1]
        shape, lengths = dataclasses.replace(SHAPE, batch=1, frames=6, layers=3, block=6), []
        attend = listed_kinds.block_sparse_attention

        def record(query, key, *args, **options):
            lengths.append(key.shape[1])
            return attend(query, key, *args, **options)

        monkeypatch.setattr(listed_kinds, "block_sparse_attention", record)

        def run(setting, x, layer):
            cache = setting.init_cache(shape)
            for n in range(3):
                cache = cache.append(x[1] + n % 2, x[2] * n, frame=0, layer=n)
            return setting.attend_cache(cache, x[0], layer=layer)

        def both_ways(setting):
            loss = jax.jit(jax.grad(lambda x: (run(setting, x, jnp.int32(1)) * weights).sum()))
            return jax.jit(lambda x: run(setting, x, jnp.int32(1)))(x), loss(x)

        exact, listed = both(text.replace("block=7)", "block=7, linear=False)") if text.startswith("sla") else text)
        jax.tree.map(close, both_ways(listed), both_ways(exact))
        apart = text.startswith("svg") or "(3,2,4)" in text  # whose keys are put in another order
        assert lengths[0] == x.shape[2] * (1 if apart else 3)
        assert lengths[-1] == x.shape[2]

    @pytest.mark.slow
    @pytest.mark.parametrize("text", [x for x in CACHED if "sliding" not in x and "published" not in x])
    def test_over_a_rolling_cache(self, text):
        exact, listed = both(text)
        x = jnp.asarray(qkv((15, H, W), seed=8))
        inputs, shape = jnp.zeros((2, x.shape[2], 6)), dataclasses.replace(SHAPE, rolling=True, sink_frames=3)
        close(roll_out(listed, x, inputs, shape), roll_out(exact, x, inputs, shape))


class TestChoice:
    def test_names(self):
        with pytest.raises(ValueError, match="implementation='cudnn' is unknown"):
            parse("vsa(implementation=cudnn)")
        assert parse("radial(implementation=triton)").stored() == parse("radial")

    def test_what_cannot_run_says_why(self):
        x = jnp.zeros((1, 8, 1, 256))
        with pytest.raises(NotImplementedError, match="implementation='triton' cannot run this call: head_dim 256"):
            parse("radial(decay=0.5, block=4, implementation=triton)")(x, x, x, grid=(2, 2, 2))

    @pytest.mark.parametrize("text", ["radial(decay=0.5, block=4)", "svg2(query_clusters=2, key_clusters=4)", "top_k"])
    def test_an_exact_form_on_a_gpu_is_said(self, monkeypatch, text):
        """What saves nothing there, for its kind or for its sizes; nothing is said of a CPU."""
        x, setting = jnp.zeros((1, 8, 1, 256)), parse(text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            setting(x, x, x, grid=(2, 2, 2))
        for module in (listed_kinds, svg2, top_k):
            monkeypatch.setattr(module, "on_cuda", lambda **_: True)
        reason = "head_dim 256 is above 128" if "radial" in text else "its clusters|each query keeps"
        with pytest.warns(UserWarning, match=f"{setting.name} runs in its exact form, .* or more: ({reason})"):
            setting(x, x, x, grid=(2, 2, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            setting.attention_map(x, x, grid=(2, 2, 2))
