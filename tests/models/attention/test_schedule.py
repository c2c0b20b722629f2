"""Kinds made of kinds: which is used where, over one cache, in one program; and how dense they are."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.attention.base import CacheShape, Context
from monarchrt.models.attention.blocks import attend_blocks
from monarchrt.models.attention.dense import DenseAttention
from monarchrt.models.attention.densities import density_of_network
from monarchrt.models.attention.monarch import MonarchAttention
from monarchrt.models.attention.notation import parse
from monarchrt.models.attention.schedule import FirstBlocks
from monarchrt.models.sampling import Rollout, Windows, autoregressive, windows
from monarchrt.models.sampling.rollout import call_network
from monarchrt.models.wan import WanModel
from monarchrt.models.wan.causal import cached_forward, init_cache
from tests.models import conftest as wan
from tests.untyped import programs, there

H, W = 4, 6
SIZE: dict[str, Any] = dict(height=2 * H, width=2 * W)
BLOCK = (3, H, W)
FINE, COARSE = "monarch(tile=(1,4,6))", "monarch(tile=(3,4,6))"


def qkv(frames, *, seed=0, heads=2, width=8):
    return jax.random.normal(jax.random.key(seed), (3, 2, frames * H * W, heads, width))


def filled(owner, frames, *, rolling=False):
    """A cache of `owner` after blocks of 3 frames, and all tokens that were written."""
    shape = CacheShape(batch=2, frames=9, height=H, width=W, heads=2, head_dim=8, dtype="float32", rolling=rolling)
    cache = owner.init_cache(shape)
    tokens = qkv(frames)
    for start in range(0, frames, 3):
        part = tokens[:, :, start * H * W : (start + 3) * H * W]
        cache = cache.append(part[1], part[2], frame=start)
    return cache, tokens


class TestStepsOfTheirOwn:
    """Samples and frames of queries that are at different steps, as in training on a sampler's states."""

    EARLY, LATE = parse("dense"), parse("sliding_tile(tile=(1,1,1), window=(1,1,3))")
    BOTH = parse(f"first_steps(1, {EARLY}, {LATE})")
    STEPS = jnp.asarray([[0, 0, 0, 2, 2, 2], [1, 1, 1, 0, 0, 0]])

    def compare(self, run, steps: Any = STEPS):
        """`run` of a kind and a context: what each frame gets is what the kind of its own step gives it."""
        steps = jnp.asarray(steps)
        both, early, late = jax.jit(
            lambda: (run(self.BOTH, Context(step=steps)), run(self.EARLY, Context()), run(self.LATE, Context()))
        )()
        first = np.repeat(np.asarray(steps).reshape(2, -1) < 1, early.shape[1] // (steps.size // 2), axis=1)
        assert np.abs(early - late).max() > 1e-3
        np.testing.assert_allclose(both, np.where(first[..., None, None], early, late), atol=1e-6)

    def test_of_each_sample(self):
        q, k, v = qkv(3)
        self.compare(lambda kind, context: kind(q, k, v, grid=BLOCK, context=context), steps=[3, 0])

    def test_of_each_frame_over_a_cache(self):
        cache, tokens = filled(self.LATE, 6)
        query = tokens[0][:, -3 * H * W :]
        self.compare(lambda kind, context: kind.attend_cache(cache, query, context=context), steps=self.STEPS[:, 1:4])

    def test_block_by_block(self):
        q, k, v = qkv(6)
        place: dict[str, Any] = dict(past=(k, v), grid=(6, H, W), sizes=[1, 5])
        self.compare(lambda kind, context: attend_blocks(kind, q, k, v, **place, context=context))

    def test_in_the_first_blocks_of_a_clip(self):
        """They are told their part of the steps, and of the inputs of a gate."""
        q, k, v = qkv(6)

        def run(kind, context):
            by_blocks = FirstBlocks(blocks=1, first=kind, after=self.EARLY)
            return by_blocks(q, k, v, grid=(6, H, W), causal_block=3, context=context)

        # after the first block all is dense, so only its frames tell the steps apart
        self.compare(run)

    def test_what_belongs_to_some_frames(self):
        inputs = jnp.arange(6 * H * W)[None, :, None]
        part = Context(step=self.STEPS, inputs=lambda: inputs).of_frames(2, 3, H * W)
        np.testing.assert_array_equal(there(part.inputs)(), inputs[:, 2 * H * W : 5 * H * W])
        np.testing.assert_array_equal(part.step, self.STEPS[:, 2:5])
        assert Context(step=4).of_frames(2, 3, H * W).step == 4


class TestOneCache:
    @pytest.mark.parametrize("rolling", [False, True])
    @pytest.mark.parametrize("reader", ["dense", FINE, "monarch(tile=(3,2,3))", "monarch(blocks='w,fh')"])
    @pytest.mark.parametrize("owner", [COARSE, "monarch(tile=(3,2,2), blocks='f,hw')"])
    def test_kinds_read_the_cache_of_another(self, owner, reader, rolling):
        owner, reader = parse(owner), parse(reader)
        frames = 12 if rolling else 6
        cache, tokens = filled(owner, frames, rolling=rolling)
        own, _ = filled(reader, frames, rolling=rolling)
        query = tokens[0][:, -3 * H * W :]
        assert reader.reads(cache)
        np.testing.assert_allclose(reader.attend_cache(cache, query), reader.attend_cache(own, query), atol=1e-5)

    def test_which_cannot(self):
        cache, _ = filled(parse(FINE), 3)
        assert not parse(COARSE).reads(cache)
        assert parse("dense").reads(cache)
        shape = CacheShape(batch=1, frames=6, height=H, width=W, heads=2, head_dim=8)
        odd = parse("first_steps(1, monarch(tile=(2,4,6)), monarch(tile=(3,4,6)))")
        with pytest.raises(ValueError, match="cannot share a cache; of tiled kinds, the frames of one tile must be"):
            odd.init_cache(shape)

    @pytest.mark.parametrize("text", [f"first_steps(1, {COARSE}, {FINE})", f"first_blocks(1, {FINE}, {COARSE})"])
    def test_the_coarser_one_makes_it(self, text):
        cache, _ = filled(parse(text), 3)
        assert cache.spec.tile_shape == BLOCK


class TestTurns:
    @pytest.mark.parametrize("name", ["step", "block"])
    @pytest.mark.parametrize("number", [0, 1, 2, 3])
    def test_the_number_picks(self, name, number):
        """Known or traced, without and with a cache."""
        first, after = parse("dense"), parse(COARSE)
        setting = parse(f"first_{name}s(2, dense, {COARSE})")
        turn = first if number < 2 else after
        query, key, value = qkv(3)
        expected = turn(query, key, value, grid=BLOCK)
        for given in (number, jnp.int32(number)):
            where = Context(**{name: given})
            out = jax.jit(lambda x, where=where: setting(*x, grid=BLOCK, context=where))((query, key, value))
            np.testing.assert_allclose(out, expected, atol=1e-6)
        cache, tokens = filled(setting, 6)
        query = tokens[0][:, -3 * H * W :]
        expected = turn.attend_cache(cache, query)
        traced = jax.jit(lambda n: setting.attend_cache(cache, query, context=Context(**{name: n})))
        np.testing.assert_allclose(traced(jnp.int32(number)), expected, atol=1e-6)
        assert np.abs(first.attend_cache(cache, query) - after.attend_cache(cache, query)).max() > 1e-2

    def test_without_steps_it_is_after(self):
        x = qkv(3)
        setting = parse(f"first_steps(2, dense, {COARSE})")
        np.testing.assert_array_equal(setting(*x, grid=BLOCK), parse(COARSE)(*x, grid=BLOCK))

    def test_without_blocks_it_is_refused(self):
        with pytest.raises(ValueError, match="the number of the block is not known; generate block by block, or set"):
            parse("first_blocks(1, dense, monarch)")(*qkv(3), grid=BLOCK)

    def test_the_first_blocks_of_a_clip_are_masked_as_in_the_whole_of_it(self):
        """Also by kinds whose mask depends on how long the clip is."""
        text, x, clip = "radial(keep=0.4, block=4)", qkv(6), dict(grid=(6, H, W), causal_block=1)
        both = parse(f"first_blocks(2, {text}, {text})")
        np.testing.assert_allclose(both(*x, **clip), parse(text)(*x, **clip), atol=1e-6)

    def test_a_clip_of_first_blocks_alone_computes_nothing_else(self, monkeypatch):
        monkeypatch.setattr(MonarchAttention, "attend_clip", lambda self, *x: pytest.fail("it is not asked for"))
        x, clip = qkv(2), dict(grid=(2, H, W), causal_block=1)
        all_early = parse(f"first_blocks(2, dense, {FINE})")
        np.testing.assert_array_equal(all_early(*x, **clip), DenseAttention()(*x, **clip))

    def test_layers_must_be_known(self):
        setting, x = parse(f"first_layers(1, dense, {COARSE})"), qkv(3)
        np.testing.assert_array_equal(
            setting(*x, grid=BLOCK, context=Context(layer=0)), DenseAttention()(*x, grid=BLOCK)
        )
        with pytest.raises(ValueError, match=r"layer=None is not static; call self.for_layer"):
            setting(*x, grid=BLOCK)


def roll_out(model, latents, times, cache, **options):
    step = nnx.jit(partial(cached_forward, **options))
    parts = []
    for number, start in enumerate(range(0, latents.shape[1], 3)):
        part = slice(start, start + 3)
        out, cache = step(model, latents[:, part], times[:, part], cache, block=jnp.int32(number))
        parts.append(out)
    return jnp.concatenate(parts, 1)


class TestNetwork:
    @pytest.mark.parametrize("in_place", [False, True])
    def test_whole_clip_equals_roll_out(self, in_place):
        """Dense for the first block's queries in both."""
        config = dataclasses.replace(wan.SMALL, attention=parse(f"first_blocks(1, dense, {COARSE})"), causal_block=3)
        model = wan.random_model(config)
        rng = np.random.default_rng(0)
        latents = rng.standard_normal((2, 9, 2 * H, 2 * W, 5)).astype(np.float32)
        times, text = jnp.full((2, 9), 300.0), jnp.asarray(rng.standard_normal((2, 7, 20)), jnp.float32)
        expected = nnx.jit(lambda m, *x: m(*x))(model, latents, times, text)
        out = roll_out(model, latents, times, init_cache(model, text, frames=9, **SIZE), in_place=in_place)
        np.testing.assert_allclose(out, expected, atol=1e-4)
        coarse = nnx.jit(lambda m, *x: m(*x))(model.with_attention(parse(COARSE)), latents, times, text)
        assert np.abs(coarse - expected)[:, :3].max() > 1e-3

    def test_the_cache_of_a_schedule_is_not_copied(self):
        """Both kinds read where the cache lies: temporary memory does not grow with the layers' caches."""

        def memory(layers):
            setting = parse(f"first_steps(1, dense, {COARSE})")
            config = dataclasses.replace(wan.SMALL, num_layers=layers, attention=setting)
            graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
            text = jnp.zeros((2, 7, 20))
            cache = jax.eval_shape(lambda state: init_cache(nnx.merge(graph, state), text, frames=60, **SIZE), state)
            latents, times = jnp.zeros((2, 3, 2 * H, 2 * W, 5)), jnp.zeros((2, 3))

            def run(state, latents, times, cache, frame, step):
                model = nnx.merge(graph, state)
                return cached_forward(model, latents, times, cache, frame=frame, step=step, in_place=True)

            lowered = jax.jit(run, donate_argnums=3).lower(state, latents, times, cache, jnp.int32(0), jnp.int32(0))
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.runs))
            analysis = there(lowered.compile().memory_analysis())
            assert analysis.alias_size_in_bytes >= size
            return analysis.temp_size_in_bytes, size

        (few, few_size), (many, many_size) = memory(2), memory(12)
        assert many - few < 0.2 * (many_size - few_size)


class TestGeneration:
    """A schedule in a roll-out: the right kind in each block and step, and one program."""

    ROLLOUT = Rollout(steps=2, block=3)

    def generate(self, attention, frames=9):
        config = dataclasses.replace(wan.SMALL, attention=parse(attention), causal_block=3, out_channels=5)
        model = wan.random_model(dataclasses.replace(config, attention=DenseAttention())).with_attention(
            parse(attention)
        )
        text = jax.random.normal(jax.random.key(1), (1, 7, 20))
        size: dict[str, Any] = dict(frames=frames, key=jax.random.key(0), rollout=self.ROLLOUT, **SIZE)
        return [np.asarray(part) for part in autoregressive(model, text, **size)]

    @pytest.mark.parametrize("name", ["first_blocks", "first_steps"])
    def test_one_program_serves_all_blocks(self, name):
        dense, coarse = self.generate("dense"), self.generate(COARSE)
        before = programs(call_network)
        mixed = self.generate(f"{name}(1, dense, {COARSE})")
        assert programs(call_network) == before + 1
        assert len(mixed) == 3
        if name == "first_blocks":
            np.testing.assert_allclose(mixed[0], dense[0], atol=1e-4)
        else:
            assert np.abs(mixed[0] - dense[0]).max() > 1e-3
        assert np.abs(mixed[0] - coarse[0]).max() > 1e-3
        assert np.abs(mixed[1] - dense[1]).max() > 1e-3

    @pytest.mark.parametrize(("steps", "like"), [(0, COARSE), (2, f"first_blocks(9, dense, {COARSE})")])
    def test_the_first_steps_are_counted(self, steps, like):
        """None, or all but the call that rewrites the cache, which does not show in the block itself."""
        mixed, expected = self.generate(f"first_steps({steps}, dense, {COARSE})"), self.generate(like)
        np.testing.assert_allclose(mixed[0], expected[0], atol=1e-4)

    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_whole_clips(self, steps):
        """Samplers of whole clips say the step too."""

        def generate(attention):
            config = dataclasses.replace(wan.SMALL, out_channels=5)
            model = wan.random_model(config).with_attention(parse(attention))
            settings = Windows(sampler="euler", steps=3)
            size: dict[str, Any] = dict(frames=3, key=jax.random.key(0), settings=settings, **SIZE)
            return np.asarray(next(windows(model, jnp.ones((1, 7, 20)), **size)))

        mixed, dense, coarse = (generate(x) for x in (f"first_steps({steps}, dense, {COARSE})", "dense", COARSE))
        assert (np.abs(mixed - dense).max() < 1e-4) == (steps == 3)
        assert (np.abs(mixed - coarse).max() < 1e-4) == (steps == 0)


GRID = (21, 30, 52)
TILED = 1 / 90 + 1 / 52


class TestDensity:
    @pytest.mark.parametrize(
        ("text", "causal_block", "steps", "asked", "kept"),
        [
            ("dense", None, None, 1, 1),
            ("dense", 3, None, 1, 4 / 7),  # (1 + ... + 7) / 49
            ("monarch", None, None, 1 / 30 + 1 / 52, 1 / 30 + 1 / 52),
            ("monarch(tile=(3,30,52))", 3, None, TILED, TILED * 4 / 7),
            ("first_steps(1, dense, monarch(tile=(3,30,52)))", None, 4, 1 / 4 + TILED * 3 / 4, 1 / 4 + TILED * 3 / 4),
            ("first_steps(1, dense, monarch(tile=(3,30,52)))", None, None, TILED, TILED),
            ("first_steps(9, dense, monarch(tile=(3,30,52)))", None, 4, 1, 1),
            ("first_blocks(1, dense, monarch(tile=(3,30,52)))", 3, None, (1 + 27 * TILED) / 28, (1 + 27 * TILED) / 49),
            ("first_blocks(9, dense, monarch(tile=(3,30,52)))", 3, None, 1, 4 / 7),
            ("per_layer(dense, 3 * monarch(tile=(3,30,52)))", None, None, (1 + 3 * TILED) / 4, (1 + 3 * TILED) / 4),
        ],
    )
    def test_shares(self, text, causal_block, steps, asked, kept):
        found = parse(text).density(GRID, causal_block=causal_block, steps=steps)
        visible = kept if causal_block is None else kept * 7 / 4
        np.testing.assert_allclose(found, (asked, kept, visible), rtol=1e-9)

    def test_of_a_network(self):
        config = dataclasses.replace(wan.SMALL, attention=parse("first_layers(1, dense, monarch(tile=(3,30,52)))"))
        found = density_of_network(config.attention, config.num_layers, GRID)
        np.testing.assert_allclose(found, (TILED, TILED, TILED, (1 + 2 * TILED) / 3))
        # the first of four steps, the first of three layers and the first of seven blocks
        text = "first_layers(1, dense, first_steps(1, dense, first_blocks(1, dense, top_k(keep=0.1))))"
        after = (1 + 27 * 0.1) / 28  # of what is visible, with the first block
        found = density_of_network(parse(text), 3, GRID, causal_block=3, steps=4)
        warmed = (1 + 2 * (1 + 3 * after) / 4) / 3
        np.testing.assert_allclose(found, (0.1, 0.1 * 4 / 7, 0.1, warmed), rtol=1e-3)  # top-k counts whole keys
        assert str(found) == f"5.7% of the map, 10.0% of what is visible, {warmed:.1%} with the warm-up"
        apart = density_of_network((parse("dense"), parse("top_k(keep=0.1)")), 2, GRID)
        np.testing.assert_allclose(apart, (0.55, 0.55, 0.55, 0.55), rtol=1e-3)
        unknown = density_of_network(parse("first_layers(1, dense, svg2)"), 3, GRID)
        assert str(unknown) == "a part of the map that depends on the data"

    def test_a_tile_that_does_not_fit(self):
        with pytest.raises(ValueError, match="does not divide"):
            parse("monarch(tile=(2,30,52))").density(GRID)


@pytest.mark.parametrize("text", ["dense", "monarch", COARSE, "monarch(tile=(3,4,3), num_iters=2)"])
@pytest.mark.parametrize("causal_block", [None, 3])
def test_the_map_is_what_values_are_multiplied_with(text, causal_block):
    setting = parse(text)
    query, key, value = qkv(6)
    found = setting.attention_map(query, key, grid=(6, H, W), causal_block=causal_block)
    out = jnp.einsum("bnqk,bknd->bqnd", found, value)
    np.testing.assert_allclose(out, setting(query, key, value, grid=(6, H, W), causal_block=causal_block), atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_flops_are_the_librarys():
    import monarch_jax

    spec = monarch_jax.MonarchSpec(grid=(3, 30, 52), key_frames=21, tile=(3, 30, 52))
    for text, count in (("dense", monarch_jax.dense_flops), ("monarch(tile=(3,30,52))", monarch_jax.flops)):
        found = parse(text).flops((3, 30, 52), key_frames=21, heads=12, head_dim=128)
        assert found == count(spec, heads=12, head_dim=128)
    assert isinstance(parse("monarch"), MonarchAttention)
