"""Kinds that leave keys out: masks, outputs and gradients against whole maps, and how dense they are."""

import dataclasses
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from monarchrt.models.attention.base import Context
from monarchrt.models.attention.masked import largest, masked_attention
from monarchrt.models.attention.notation import parse
from monarchrt.models.attention.radial import RadialAttention
from monarchrt.models.attention.sla import SLAttention
from monarchrt.models.attention.sliding_tile import SlidingTileAttention
from monarchrt.models.attention.svg import SVGAttention
from monarchrt.models.attention.svg2 import SVG2Attention, cluster_map, kmeans
from monarchrt.models.attention.top_k import TopKAttention
from monarchrt.models.attention.vsa import VSAttention
from tests.compiled import array_sizes
from tests.models.attention import oracles
from tests.untyped import there, untyped

GRID = (5, 3, 4)
LARGEST = 2**31 - 1
P480, P720 = (21, 30, 52), (21, 45, 80)
ROWS = (0, 3, 3, 11)
SIZES = untyped(types.SimpleNamespace(dim=6, num_heads=2, head_dim=4, dtype="float32", param_dtype="float32"))
# the setting, and the oracle of its mask
MASKS = {
    "top_k(keep=0.3)": partial(oracles.top_k, keep=0.3),
    "svg(keep=0.2, block=4, rows=(0,3,3,11))": partial(oracles.svg, keep=0.2, rows=ROWS, size=4),
    "radial(decay=0.5, block=5)": partial(oracles.radial, decay=0.5, size=5),
    "radial(decay=0.2, block=4)": partial(oracles.radial, decay=0.2, size=4),
    "sliding_tile(tile=(1,1,2), window=(3,1,1))": partial(
        oracles.sliding_tile, tile=(1, 1, 2), windows=[(3, 1, 1)] * 2
    ),
    "sliding_tile(tile=(1,3,1), window=((1,1,3),(4,1,2)))": partial(
        oracles.sliding_tile, tile=(1, 3, 1), windows=[(1, 1, 3), (4, 1, 2)]
    ),
}


@pytest.fixture(autouse=True)
def no_hidden_axes():
    with jax.numpy_rank_promotion("raise"):
        yield


def qkv(grid, *, seed=0, count=3, heads=2, width=4):
    return np.random.default_rng(seed).standard_normal((count, 2, int(np.prod(grid)), heads, width)).astype(np.float32)


def close(found, expected, atol=2e-6):
    np.testing.assert_allclose(found, np.asarray(expected), atol=atol)


def with_gradients(kind, x, weights, **options):
    """Output, and gradients of its product with the weights."""

    def loss(x):
        out = kind(*x, **options)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(x))
    return out, gradients


class TestMasked:
    def test_chunks_do_not_matter(self):
        """Whole, in chunks that do not divide the queries, one by one."""
        q, k, v = jnp.asarray(qkv((1, 3, 7)))
        mask = jnp.asarray(np.random.default_rng(1).random((2, 2, 21, 21)) < 0.3).at[:, :, 5].set(False)

        def run(x, rows):
            return masked_attention(*x, keep=lambda at, scores: mask[:, :, at], rows=rows)

        def both(rows):
            return jax.value_and_grad(lambda x: jnp.square(run(x, rows)).sum())((q, k, v))

        both = jax.jit(both, static_argnums=0)
        expected = both(512)
        for rows in (8, 1):
            jax.tree.map(close, both(rows), expected)
        assert np.isfinite(jax.tree.leaves(expected)[1]).all()
        np.testing.assert_array_equal(run((q, k, v), 8)[:, 5], 0.0)  # nothing is visible there

    @pytest.mark.parametrize("sharpness", [1, 16])
    def test_bfloat16_gradients_of_many_chunks(self, sharpness):
        """Those of keys and values are a sum over the chunks, which is not rounded chunk by chunk; nor are weights'."""
        x = jax.random.normal(jax.random.key(0), (4, 1, 512, 2, 16), jnp.bfloat16).at[0].multiply(sharpness)

        @partial(jax.jit, static_argnums=1)
        def gradients(x, rows):
            _, vjp = jax.vjp(partial(masked_attention, rows=rows), *x[:3])
            return vjp(x[3])

        for mine, exact in zip(gradients(x, 8), gradients(x.astype(jnp.float32), 512), strict=True):
            error = np.linalg.norm(np.asarray(mine, np.float32) - exact) / np.linalg.norm(exact)
            assert 1e-4 < error < 2.5e-3

    @pytest.mark.parametrize("text", ["top_k", "svg(block=16)", "radial(decay=0.1)", "vsa(gate=False)"])
    def test_memory_is_linear_in_queries(self, text):
        """Nothing in the program, backward included, has an entry for each pair of tokens."""
        grid = (16, 10, 20)
        x = jax.ShapeDtypeStruct((3, 1, 3200, 1, 8), jnp.float32)
        setting = parse(text)
        program = jax.make_jaxpr(jax.grad(lambda x: setting(*x, grid=grid).sum()))(x)
        # rows at a time, or three numbers to look each up in a table
        assert max(array_sizes(program.jaxpr)) <= 512 * 3200 * 3

    @pytest.mark.parametrize(
        ("text", "most"),
        [
            ("vsa(keep=1, gate=False, cube={0})", f"({LARGEST},{LARGEST},{LARGEST})"),
            ("sla(keep=1, linear=False, block={0})", LARGEST),
            ("radial(keep=0.9, block={0})", LARGEST),
            ("svg(keep=1, block={0})", LARGEST),
        ],
    )
    def test_a_block_larger_than_the_clip_holds_no_more(self, text, most):
        x = jax.ShapeDtypeStruct((3, 1, 60, 1, 8), jnp.float32)
        least = f"{GRID}" if "cube" in text else 60

        def largest_array(size):
            kind = parse(text.format(size))
            return max(array_sizes(jax.make_jaxpr(lambda x: kind(*x, grid=GRID))(x).jaxpr))

        assert largest_array(most) == largest_array(least)

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("svg(rows=100000)", "rows=100000 is too large; it should be at most 10000"),
            ("svg(seed=4294967296)", r"svg: seed=4294967296 does not lie in 0\.\.\.2\*\*32 - 1"),
            ("svg2(seed=-1)", "svg2: seed=-1 does not lie in"),
            ("svg2(iterations=1000000)", "iterations=1000000 is too large; it should be at most 10000"),
            *((f"{kind}(frames=4097)", "frames=4097 is too large") for kind in ("svg", "radial", "sliding_tile")),
        ],
    )
    def test_numbers_beyond_use(self, text, word):
        """Of which tables would fill the memory, or be none of 32 bits."""
        with pytest.raises(ValueError, match=word):
            parse(text)

    def test_the_largest_with_ties(self):
        """Exactly so many, of equal ones the first; signs of zero, infinities and negative numbers in order."""
        rng = np.random.default_rng(0)
        scores = rng.integers(-3, 4, (4, 50)).astype(np.float32) * 0.5
        scores[0, ::3] = -0.0
        scores[1, 7], scores[1, 9] = np.inf, -np.inf
        for count in (1, 2, 17, 49, 50):
            found = np.asarray(largest(jnp.asarray(scores), count))
            order = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
            expected = np.zeros_like(found)
            np.put_along_axis(expected, order, True, -1)
            np.testing.assert_array_equal(found, expected)

    def test_half_precision(self):
        x = qkv(GRID)
        attend = jax.jit(partial(parse("radial(decay=0.5, block=5)"), grid=GRID))
        expected, out = attend(*x), attend(*jnp.asarray(x, jnp.bfloat16))
        assert out.dtype == jnp.bfloat16
        close(out.astype(jnp.float32), expected, atol=0.03)


class TestAgainstMaps:
    @pytest.mark.parametrize("block", [None, 2])
    @pytest.mark.parametrize("text", MASKS)
    def test_outputs_and_gradients(self, text, block):
        x = qkv(GRID, seed=3)
        mask = MASKS[text](*x.astype(np.float64), GRID, block)
        assert not mask.all()
        assert mask.any(-1).all()
        tensors = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in x]
        weights = qkv(GRID, seed=4, count=1)[0]
        expected = oracles.attention(*tensors, mask=mask)
        (expected * torch.as_tensor(weights)).sum().backward()
        out, gradients = with_gradients(parse(text), x, weights, grid=GRID, causal_block=block)
        close(out, expected.detach())
        for found, tensor in zip(gradients, tensors, strict=True):
            close(found, tensor.grad, atol=5e-6)

    @pytest.mark.parametrize("text", list(MASKS)[1:3])
    def test_map(self, text):
        """SVG's choice of heads depends on values: with unit vectors it is still one for the whole map."""
        x = qkv(GRID, seed=3)
        found = jax.jit(partial(parse(text).attention_map, grid=GRID))(*x[:2])
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
        units = np.broadcast_to(np.eye(60)[None, :, None], (2, 60, 2, 60))
        mask = MASKS[text](*x[:2].astype(np.float64), units.copy(), GRID, None)
        np.testing.assert_array_equal(np.asarray(found) > 0, np.broadcast_to(mask, found.shape))

    def test_both_orders_were_taken(self):
        """By the heads of the comparison above, so that it sees both."""
        x = qkv(GRID, seed=3).astype(np.float64)
        mask = MASKS["svg(keep=0.2, block=4, rows=(0,3,3,11))"](*x, GRID, None)
        assert len({row.tobytes() for row in mask.reshape(4, -1)}) == 2

    def test_svg_draws_the_same_rows_in_every_call(self):
        x = jnp.asarray(qkv((9, 4, 6)))
        setting = untyped(parse("svg(keep=0.1, block=8, rows=5)"))
        found = jax.jit(partial(setting, grid=(9, 4, 6)))(*x)
        np.testing.assert_array_equal(found, jax.jit(partial(setting, grid=(9, 4, 6)))(*x))
        rows = setting.profile_rows(216)
        assert rows.shape == (5,)
        assert int(rows.max()) < 216
        assert int(untyped(parse("svg(rows=50, drawn_from=4)")).profile_rows(216).max()) < 4
        given = dataclasses.replace(setting, rows=tuple(map(int, rows)))
        np.testing.assert_array_equal(found, jax.jit(partial(given, grid=(9, 4, 6)))(*x))


class TestClusters:
    @pytest.mark.parametrize("rounds", [1, 3, 50])
    def test_kmeans(self, rounds):
        """Clusters that never have members or lose all of them keep their centroid."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, 3, 70, 4)).astype(np.float32)
        start = x[:, :, rng.integers(0, 70, 8)].copy()
        start[:, :, 1] = start[:, :, 0]  # ties go to the first, so that this one is empty
        start[0, 0, 2] = 100.0
        there = np.arange(70) < 60
        found = kmeans(jnp.asarray(x), jnp.asarray(start), jnp.asarray(there), iterations=rounds)
        found = jax.tree.map(np.asarray, found)
        for batch in range(2):
            # rounds end for all heads of a sample together
            for head in range(3):
                used, centres = x[batch, head, :60].astype(np.float64), start[batch, head].astype(np.float64)
                labels, centres, sizes = oracles.kmeans(used, centres, rounds=rounds)
                np.testing.assert_array_equal(found.labels[batch, head, :60], labels)
                np.testing.assert_array_equal(found.sizes[batch, head], sizes)
                close(found.centroids[batch, head], centres, atol=1e-5)
        assert found.sizes[0, 0, 2] == 0
        assert (found.centroids[0, 0, 2] == 100.0).all()

    def test_a_cluster_loses_its_members(self):
        """On a line: the one in the middle gives all to its neighbours, stays, and has no weight in the map."""
        points = np.array([0.0, 1.0, 1.2, 4.8, 5.0, 6.0])
        start = np.array([1.1, 3.0, 4.9])
        first = oracles.kmeans(points[:, None], start[:, None], rounds=1)[2]
        points = np.append(points, 2.4)
        labels, centres, sizes = oracles.kmeans(points[:, None], np.array([[2.0], [3.05], [5.0]]), rounds=20)
        found = kmeans(
            jnp.asarray(points, jnp.float32)[None, None, :, None],
            jnp.array([2.0, 3.05, 5.0])[None, None, :, None],
            jnp.ones(7, bool),
            iterations=20,
        )
        assert first[1] == 0
        np.testing.assert_array_equal(found.labels[0, 0], labels)
        close(found.centroids[0, 0], centres)
        np.testing.assert_array_equal(found.sizes[0, 0], sizes)

    @pytest.mark.parametrize(("top_p", "min_keep"), [(0.5, 0.0), (0.9, 0.3), (1e-6, 0.0), (0.3, 1.0)])
    def test_map(self, top_p, min_keep):
        rng = np.random.default_rng(1)
        query, key = rng.standard_normal((6, 4)) * 2, rng.standard_normal((10, 4)) * 2
        sizes = rng.integers(0, 5, 10)
        sizes[[2, 7]] = 0
        expected = oracles.cluster_map(query, key, sizes, top_p=top_p, least=int(min_keep * 10))
        given = (jnp.asarray(x, jnp.float32)[None, None] for x in (query, key))
        found = cluster_map(*given, sizes=jnp.asarray(sizes, jnp.int32)[None, None], top_p=top_p, min_keep=min_keep)
        np.testing.assert_array_equal(found[0, 0], expected)
        assert expected.sum(1).min() == max(1, int(min_keep * 10))

    @pytest.mark.parametrize("block", [None, 2])
    def test_attention_and_what_it_keeps(self, block):
        """A query sees a key if its cluster keeps the key's; with all clusters it is dense."""
        grid, x = (4, 3, 4), jnp.asarray(qkv((4, 3, 4)))
        setting = SVG2Attention(query_clusters=4, key_clusters=7, top_p=0.5, min_keep=0.2)
        found = np.asarray(jax.jit(partial(setting.attention_map, grid=grid, causal_block=block))(x[0], x[1]))
        scores = np.where(oracles.causal(grid, block), oracles.scores_of(x[0], x[1]), -np.inf)
        kept = found > 0
        weights = np.where(kept, np.exp(scores), 0)
        close(found, weights / weights.sum(-1, keepdims=True))
        measured = setting.measure(*x[:2], grid=grid, causal_block=block)
        assert measured.kept == pytest.approx(kept.mean(), abs=1e-6)
        assert measured.visible == pytest.approx(kept.mean() / oracles.causal(grid, block).mean(), abs=1e-6)
        assert 0 < kept.mean() < 0.9 * oracles.causal(grid, block).mean()
        for rows in (slice(0, 24), slice(24, 48)) if block else (slice(0, 48),):
            for head in kept[:, :, rows].reshape(4, -1, 48):
                assert len({row.tobytes() for row in head}) <= 4  # as many as clusters of queries
        everything = dataclasses.replace(setting, top_p=1.0)
        found, dense = (
            jax.jit(partial(kind, grid=grid, causal_block=block))(*x) for kind in (everything, parse("dense"))
        )
        close(found, dense)

    @pytest.mark.parametrize("block", [None, pytest.param(2, marks=pytest.mark.slow)])
    def test_outputs_and_gradients(self, block):
        """Against PyTorch over the mask of clusters that NumPy finds, from the tokens that are drawn to begin at."""
        grid, clusters = (4, 3, 4), {"query": 4, "key": 7}
        setting = SVG2Attention(query_clusters=4, key_clusters=7, top_p=0.5, min_keep=0.2, iterations=6, seed=3)
        x = qkv(grid, seed=8)
        starts = dict(zip(clusters, jax.random.split(jax.random.key(3)), strict=True))
        mask = np.zeros((2, 2, 48, 48), bool)
        for rows in oracles.blocks_of(grid, block):
            tokens = {"query": x[0][:, rows], "key": x[1][:, : rows.stop]}
            drawn = {}
            for name, part in tokens.items():
                uniform = np.asarray(jax.random.uniform(starts[name], (clusters[name],)))
                drawn[name] = np.minimum((uniform * part.shape[1]).astype(int), part.shape[1] - 1)
            for sample, head in np.ndindex(2, 2):
                found = {}
                for name, part in tokens.items():
                    points = part[sample, :, head].astype(np.float64)
                    found[name] = oracles.kmeans(points, points[drawn[name]], rounds=6)
                (of_query, queries, _), (of_key, keys, sizes) = found["query"], found["key"]
                kept = oracles.cluster_map(queries, keys, sizes, top_p=0.5, least=1)  # 0.2 of 7
                mask[sample, head, rows, : rows.stop] = kept[of_query][:, of_key]
        assert 0.05 < mask.mean() < 0.6
        tensors = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in x]
        weights = qkv(grid, seed=9, count=1)[0]
        expected = oracles.attention(*tensors, mask=mask)
        (expected * torch.as_tensor(weights)).sum().backward()
        out, gradients = with_gradients(setting, x, weights, grid=grid, causal_block=block)
        close(out, expected.detach())
        for mine, tensor in zip(gradients, tensors, strict=True):
            close(mine, tensor.grad, atol=5e-6)

    def test_its_density_is_said_to_depend_on_the_data(self):
        assert str(parse("svg2").density(P480)) == "a part of the map that depends on the data"


class TestVSA:
    def gated(self, setting, x, seed=5):
        """A context whose gate is that of a linear layer, not zero, and the gate."""
        rng = np.random.default_rng(seed)
        inputs = rng.standard_normal((2, x.shape[2], 6)).astype(np.float32)
        layer = untyped(setting.init(SIZES, rngs=nnx.Rngs(0)))
        assert not np.asarray(layer.kernel[...]).any()
        assert not np.asarray(layer.bias[...]).any()
        layer.kernel[...] = rng.standard_normal((6, 8)).astype(np.float32)
        layer.bias[...] = rng.standard_normal(8).astype(np.float32)
        gate = inputs @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        return Context(inputs=lambda: jnp.asarray(inputs), modules={"vsa": layer}), gate.reshape(x.shape[1:])

    @pytest.mark.parametrize(
        ("grid", "cube", "block"),
        [
            ((6, 4, 4), (3, 2, 4), None),
            ((6, 4, 4), (3, 2, 4), 3),
            ((5, 3, 5), (2, 2, 4), None),
            ((5, 3, 5), (2, 2, 4), 2),
        ],
    )
    def test_outputs_and_gradients(self, grid, cube, block):
        """Both branches, cubes whole and partial; gradients by q, k, v and the gate's weights."""
        x, weights = qkv(grid, seed=6), qkv(grid, seed=7, count=1)[0]
        setting = VSAttention(keep=0.4, cube=cube)
        context, gate = self.gated(setting, x)
        tensors = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in (*x, gate)]
        expected = oracles.vsa(*tensors, grid=grid, block=block, keep=0.4, cube=cube)
        (expected * torch.as_tensor(weights)).sum().backward()
        graph, state = nnx.split(context.modules["vsa"])

        def loss(x, state):
            where = dataclasses.replace(context, modules={"vsa": nnx.merge(graph, state)})
            out = setting(*x, grid=grid, causal_block=block, context=where)
            return (out * weights).sum(), out

        (_, out), (by_x, by_gate) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, state)
        close(out, expected.detach())
        for found, tensor in zip(by_x, tensors[:3], strict=True):
            close(found, tensor.grad, atol=1e-5)
        by_bias = there(tensors[3].grad).sum((0, 1)).reshape(-1)
        close(by_gate["bias"][...], by_bias, atol=2e-5)
        inputs = torch.as_tensor(np.asarray(there(context.inputs)()), dtype=torch.float64)
        by_kernel = torch.einsum("bni,bno->io", inputs, there(tensors[3].grad).flatten(2))
        close(by_gate["kernel"][...], by_kernel, atol=5e-5)

    def test_equal_scores_choose_the_first(self):
        """Keys that are all the same: the first k cubes."""
        grid = (2, 4, 4)
        x = qkv(grid)
        x[1] = x[1, :, :1]
        setting = VSAttention(keep=0.5, cube=(1, 2, 2), gate=False)
        kept = np.asarray(jax.jit(partial(setting.attention_map, grid=grid))(*x[:2])) > 0
        of, _ = oracles.cubes_of(grid, (1, 2, 2))
        np.testing.assert_array_equal(kept, np.broadcast_to(of < 4, kept.shape))

    def test_it_begins_as_its_fine_branch(self):
        grid, x = (3, 4, 4), jnp.asarray(qkv((3, 4, 4)))
        setting = VSAttention(keep=0.3, cube=(3, 2, 2))
        context = Context(inputs=lambda: jnp.ones((2, 48, 6)), modules={"vsa": setting.init(SIZES, rngs=nnx.Rngs(0))})
        fine = dataclasses.replace(setting, gate=False)
        assert fine.init(SIZES, rngs=nnx.Rngs(0)) is None
        np.testing.assert_array_equal(setting(*x, grid=grid, context=context), fine(*x, grid=grid))

    @pytest.mark.parametrize(
        ("grid", "cube", "cubes", "counts"),
        [
            (P480, (4, 4, 4), 624, {0.2: 125, 0.15: 94, 0.1: 63, 0.05: 32, 0.03: 19}),
            (P720, (4, 4, 4), 1440, {0.2: 288, 0.15: 216, 0.1: 144, 0.05: 72, 0.03: 44}),
            (P480, (3, 5, 4), 546, {0.15: 82, 0.1: 55}),
            (P720, (3, 5, 4), 1260, {0.15: 189, 0.1: 126}),
        ],
    )
    def test_counts(self, grid, cube, cubes, counts):
        """Whole numbers; in floats ceil((1 - 0.85) * 1440) is 217 and that of 1260 is 190."""
        setting = VSAttention(cube=cube)
        assert np.prod(setting.cubes(grid)) == cubes
        for keep, count in counts.items():
            setting = VSAttention(cube=cube, keep=keep)
            assert setting.cubes_kept(cubes) == count
            assert setting.density(grid).kept == pytest.approx(count / cubes)


class TestSLA:
    @pytest.mark.parametrize("block", [None, 2])
    def test_outputs_and_gradients(self, block):
        """Blocks that do not divide the tokens; gradients by q, k, v and the projection's weights."""
        x, weights = qkv(GRID, seed=12), qkv(GRID, seed=13, count=1)[0]
        setting = SLAttention(keep=0.5, block=8)
        layer = untyped(setting.init(SIZES, rngs=nnx.Rngs(0)))
        assert not np.asarray(layer.kernel[...]).any()
        rng = np.random.default_rng(14)
        kernel, bias = rng.standard_normal((4, 4)).astype(np.float32), rng.standard_normal(4).astype(np.float32)
        layer.kernel[...], layer.bias[...] = jnp.asarray(kernel), jnp.asarray(bias)
        tensors = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in (*x, kernel, bias)]
        expected = oracles.sla(*tensors, grid=GRID, block=block, keep=0.5, size=8)
        (expected * torch.as_tensor(weights)).sum().backward()
        graph, state = nnx.split(layer)

        def loss(x, state):
            where = Context(modules={"sla": nnx.merge(graph, state)})
            out = setting(*x, grid=GRID, causal_block=block, context=where)
            return (out * weights).sum(), out

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, out), (by_x, by_layer) = run(jnp.asarray(x), state)
        close(out, expected.detach())
        for found, tensor in zip((*by_x, by_layer["kernel"][...], by_layer["bias"][...]), tensors, strict=True):
            close(found, tensor.grad, atol=2e-5)
        without = dataclasses.replace(setting, linear=False)
        sparse = jax.jit(partial(without, grid=GRID, causal_block=block))(*x)
        assert np.abs(sparse - out).max() > 0.1

    def test_density(self):
        """480p: 511 full blocks and one of 56 tokens; 15% of 512, rounded down."""
        setting = SLAttention(keep=0.15)
        assert setting.blocks_kept(512) == 76
        assert setting.density(P480).kept == pytest.approx(76 / 512)


class TestDensity:
    def test_radial_as_published(self):
        """The floor at 480p, where blocks of 128 do not divide a frame; and with the causal mask."""
        found = RadialAttention(rule="published").density(P480)
        assert found.kept == pytest.approx(0.338, abs=5e-4)
        assert RadialAttention(rule="published", decay=0.0).density(P480).kept == pytest.approx(0.338, abs=5e-4)
        found = RadialAttention(rule="published").density(P480, causal_block=3)
        assert (round(found.kept, 3), round(found.visible, 3)) == (0.247, 0.432)

    @pytest.mark.parametrize(
        ("grid", "decay", "kept"),
        [
            ((21, 45, 80), 1.0, 0.396),
            ((21, 45, 80), 0.0, 0.251),
            ((18, 48, 80), 0.5, 0.339),
            ((18, 48, 80), 0.2, 0.287),
            (P480, 1.0, 0.444),
            (P480, 0.5, 0.362),
        ],
    )
    def test_published_blocks(self, grid, decay, kept):
        """Shares that the published function gives, of blocks."""
        setting = RadialAttention(rule="published", decay=decay)
        assert setting.density(grid).kept == pytest.approx(kept, abs=7e-4)

    @pytest.mark.parametrize("size", [4, 5])
    def test_published_blocks_lie_on_the_clip(self, size):
        """Whether they divide a frame of 12 tokens or not: equal scores show what is kept."""
        setting = RadialAttention(rule="published", decay=0.1, block=size)
        query, value = jnp.zeros((1, 60, 1, 60)), jnp.eye(60)[None, :, None]
        kept = np.asarray(setting(query, query, value, grid=GRID))[0, :, 0] > 0
        blocks = kept[::size, ::size]
        np.testing.assert_array_equal(kept, blocks.repeat(size, 0).repeat(size, 1))
        assert kept.mean() < 1
        assert setting.density(GRID).kept == pytest.approx(kept.mean())

    @pytest.mark.parametrize(
        ("grid", "shares"),
        [
            (P480, {0.5: 0.286, 0.2: 0.186, 0.1: 0.149, 0.06: 0.132, 0.02: 0.093}),
            (P720, {0.2: 0.161, 0.1: 0.134, 0.05: 0.118, 0.02: 0.107, 0.01: 0.093}),
        ],
    )
    def test_radial(self, grid, shares):
        for decay, kept in shares.items():
            assert round(RadialAttention(decay=decay).density(grid).kept, 3) == kept

    @pytest.mark.parametrize("grid", [P480, P720])
    @pytest.mark.parametrize("keep", [0.15, 0.1, 0.5])
    def test_radial_finds_the_decay(self, grid, keep):
        """No more than was asked for, and a little more decay keeps more."""
        setting = RadialAttention(keep=keep)
        found, decay = setting.density(grid), setting.decay_for(grid)
        assert found.asked == keep
        assert 0.9 * keep < found.kept <= keep
        assert RadialAttention(decay=decay + 1e-3).density(grid).kept > keep

    def test_radial_causal(self):
        found = RadialAttention(decay=0.1).density(P480, causal_block=3)
        assert (round(found.kept, 3), round(found.visible, 3)) == (0.125, 0.219)

    @pytest.mark.parametrize(
        ("grid", "keep", "width", "kept"),
        [
            (P480, 0.15, 2560, 0.193),
            (P720, 0.15, 6016, 0.196),
            (P480, 0.10, 1792, 0.150),
            (P720, 0.10, 3968, 0.146),
            (P480, 0.05, 896, 0.099),
            (P720, 0.05, 1920, 0.0957),
        ],
    )
    def test_svg(self, grid, keep, width, kept):
        setting = SVGAttention(keep=keep)
        assert setting.half_width(grid) == width
        assert setting.density(grid).kept == pytest.approx(kept, abs=6e-4)
        assert setting.density(grid).asked == keep

    def test_svg_causal(self):
        spatial, temporal = SVGAttention(keep=0.15).kept_by_order(P480, causal_block=3)
        assert (round(spatial, 3), round(temporal, 3)) == (0.175, 0.110)
        spatial, temporal = SVGAttention(keep=0.1).kept_by_order(P480, causal_block=3)
        assert (round(spatial, 3), round(temporal, 3)) == (0.141, 0.086)

    def test_svg_width_is_exact(self):
        """sqrt(1 - 0.36) is 0.8, so that a fifth of 1000 tokens is four blocks of 50 and no more."""
        assert SVGAttention(keep=0.36, block=50).half_width((10, 10, 10)) == 200
        assert SVGAttention(keep=1.0).half_width(P480) == 32768

    @pytest.mark.parametrize(
        ("grid", "window", "kept"),
        [
            (P480, (3, 3, 9), 0.148),
            (P480, (3, 3, 7), 0.115),
            (P480, (3, 3, 5), 0.082),
            (P720, (3, 7, 9), 0.150),
            (P720, (5, 5, 5), 0.099),
        ],
    )
    def test_sliding_tile(self, grid, window, kept):
        assert round(SlidingTileAttention(window=window).density(grid).kept, 3) == kept

    def test_top_k(self):
        """Exact counts: 0.15 of 75,600 is 11,340."""
        assert TopKAttention(keep=0.15).density(P480).kept == 4914 / 32760
        assert TopKAttention(keep=0.15).density(P720).kept == 11340 / 75600
        found = TopKAttention(keep=0.1).density(P480, causal_block=3)
        assert found.visible == pytest.approx(0.1)
        assert found.kept == pytest.approx(0.1 * 4 / 7)

    @pytest.mark.parametrize("block", [None, 2, 3])
    @pytest.mark.parametrize("text", MASKS)
    def test_it_is_what_the_mask_keeps(self, text, block):
        x = qkv(GRID, seed=3).astype(np.float64)
        found = parse(text).density(GRID, causal_block=block)
        if text.startswith("svg"):
            kept = untyped(parse(text)).kept_by_order(GRID, causal_block=block)
            masks = MASKS[text](*x, GRID, block).reshape(4, 60, 60)
            if block is None:
                assert {round(share, 9) for share in kept} >= {round(mask.mean(), 9) for mask in masks}
            assert found.kept == pytest.approx(np.mean(kept))
            return
        mask = MASKS[text](*x, GRID, block)
        assert found.kept == pytest.approx(mask.mean())
        assert found.visible == pytest.approx(mask.mean() / oracles.causal(GRID, block).mean())

    def test_warm_up_is_counted(self):
        plain, warm = parse("top_k(keep=0.15)"), parse("first_steps(1, dense, top_k(keep=0.15))")
        assert warm.density(P480, steps=4).kept == pytest.approx((1 + 3 * plain.density(P480).kept) / 4)

    @pytest.mark.parametrize("text", ["radial(keep=0.2)", "radial(rule=published)", "svg(keep=0.15)", "sliding_tile"])
    def test_the_first_blocks_are_those_of_the_whole_clip(self, text):
        """Masks for 21 frames, not for the first 6."""
        plain = parse(text).density(P480, causal_block=3)
        both = parse(f"first_blocks(2, {text}, {text})").density(P480, causal_block=3)
        assert both == pytest.approx(plain)
        warm = parse(f"first_blocks(2, dense, {text})").density(P480, causal_block=3)
        assert plain.kept < warm.kept < plain.kept + (9 + 18) / 441

    def test_what_the_data_decides_counts_as_dense(self):
        sizes = {"heads": 2, "head_dim": 8}
        setting = parse("first_steps(1, dense, svg2)")
        assert setting.flops(P480, **sizes) == parse("dense").flops(P480, **sizes)
