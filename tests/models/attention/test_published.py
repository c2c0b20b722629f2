"""Masks, choices, outputs and gradients against arrays that published functions gave, see `tests/data/published.md`."""

import dataclasses
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.attention.base import Context
from monarchrt.models.attention.masked import Places
from monarchrt.models.attention.radial import RadialAttention, block_table
from monarchrt.models.attention.sla import SLAttention
from monarchrt.models.attention.sliding_tile import SlidingTileAttention, near_tiles
from monarchrt.models.attention.svg import SVGAttention
from monarchrt.models.attention.svg2 import SVG2Attention, kmeans
from monarchrt.models.attention.vsa import VSAttention
from tests.data import published_inputs as inputs

DATA = pathlib.Path(inputs.__file__).parent


def published(kind):
    with np.load(DATA / f"published_{kind}.npz") as arrays:
        return dict(arrays)


def unpacked(bits, count):
    return np.unpackbits(bits, axis=-1, count=count).astype(bool)


def tokens_first(x):
    """[B, n, N, d], as published, to [B, N, n, d]."""
    return jnp.asarray(x).swapaxes(1, 2)


LISTED = pytest.mark.parametrize("implementation", ["exact", "xla"])  # masks, and lists of blocks


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


class TestRadial:
    arrays = published("radial")

    @pytest.mark.parametrize("name", [name for name in arrays if name.endswith(" 128")])
    def test_masks(self, name):
        """Blocks of 128. Where the clip ends within one, the published function is given a longer sequence, as it
        breaks off otherwise; it takes the rest for a text that sees all and is seen: what is in the last row and column
        is not of the rule, and ours is the rule there too."""
        frames, tokens, decay = (kind(part) for kind, part in zip((int, int, float), name.split()[:3], strict=True))
        count = -(-frames * tokens // 128)
        whole = frames * tokens // 128
        expected = unpacked(self.arrays[name], count)
        found = block_table("published", 128, decay, frames, tokens)
        np.testing.assert_array_equal(found[:whole, :whole], expected[:whole, :whole])
        assert expected[whole:].all()
        assert found.shape == expected.shape
        assert 0.05 < expected.mean() < 0.7

    @LISTED
    def test_outputs(self, implementation):
        """Means of values, where all scores are equal, over what the mask keeps; without the last, cut block."""
        frames, tokens, name = 17, 200, "17 200 3.0 128"
        blocks = unpacked(self.arrays[name], 27)
        of = np.arange(frames * tokens) // 128
        values = np.random.default_rng(0).standard_normal((frames * tokens, 8)).astype(np.float32)
        mask = blocks[of][:, of]
        mask[:, of == 26] = False
        setting = RadialAttention(rule="published", decay=3.0, implementation=implementation)
        zeros = jnp.zeros((1, frames * tokens, 1, 8))
        # the values of the last block, and a channel that counts it, to take it out again
        last = np.where(of == 26, 1.0, 0.0)[:, None]
        given = np.concatenate([np.where(last, 0.0, values)[:, :7], last], 1)
        attend = jax.jit(partial(setting, grid=(frames, 10, 20)))
        found = np.asarray(attend(zeros, zeros, given[None, :, None]))[0, :, 0]
        rows = of < 26
        close((found[:, :7] / (1 - found[:, 7:]))[rows], ((mask @ given[:, :7]) / mask.sum(1, keepdims=True))[rows])

    def test_blocks_of_64(self):
        """Published, the share of distances that is left out is that of blocks of 128 whatever the block; here it is
        the block's, so that every band of at least a block stays. What both keep is the same."""
        frames, tokens = 20, 384
        expected = unpacked(self.arrays["20 384 1.0 64"], frames * tokens // 64)
        found = block_table("published", 64, 1.0, frames, tokens)
        of = np.arange(len(found)) // (tokens // 64)
        distance = np.abs(of[:, None] - of)
        both = (distance < 4) | (of == 0)[None] | ((distance < 8) & (distance % 2 == 0))
        np.testing.assert_array_equal(found[both], expected[both])
        halved = (distance >= 4) & (distance < 8) & (distance % 2 == 1) & (of > 0)[None]
        assert found[halved].any()
        assert not expected[halved].any()


class TestSVG:
    arrays = published("svg")
    grid, keep = (6, 10, 13), 0.3
    names = ("spatial", "temporal")

    def setting(self, **options):
        return SVGAttention(keep=self.keep, rows=tuple(map(int, self.arrays["rows"])), **options)

    def band(self):
        """The mask in each order, by tokens."""
        band, order = unpacked(self.arrays["band"], 780), self.arrays["order"]
        back = np.zeros_like(band)
        back[np.ix_(order, order)] = band
        return band, back

    @pytest.mark.parametrize(("name", "grid"), [("480p", (21, 30, 52)), ("720p", (21, 45, 80)), ("small", grid)])
    def test_widths(self, name, grid):
        found = [SVGAttention(keep=float(share)).half_width(grid) for share in self.arrays["shares"]]
        np.testing.assert_array_equal(found, self.arrays[f"widths {name}"])

    @pytest.mark.parametrize("share", inputs.SVG_LARGE)
    def test_masks_of_720p(self, share, monkeypatch):
        """Some rows of each order, published in the order of a head; the temporal sink ends within a frame."""
        grid, rows = (21, 45, 80), np.array(inputs.SVG_ROWS)
        order = np.arange(75600).reshape(21, 3600).T.ravel()  # the token at each place of the temporal order
        found: list = []
        monkeypatch.setattr(
            SVGAttention, "attend_kept", lambda self, query, *_, keep, blocks: found.append(keep) or query
        )
        monkeypatch.setattr(SVGAttention, "temporal_heads", lambda *_: jnp.array([[False, True]]))
        x = jnp.zeros((1, 75600, 2, 1))
        SVGAttention(keep=share)(x, x, x, grid=grid)
        expected = unpacked(self.arrays[f"band 720p {share}"], 75600)
        np.testing.assert_array_equal(found[0](jnp.asarray(rows), None)[0, 0], expected)
        np.testing.assert_array_equal(found[0](jnp.asarray(order[rows]), None)[0, 1][:, order], expected)

    def test_masks_of_the_profile(self):
        """The sink of the temporal one is the first 21 and 2/3 places of all frames: it ends within one."""
        frames = self.grid[0]
        places = Places(grid=self.grid, first=0, frames=frames, key_frames=np.arange(frames), seen=frames)
        masks = [np.asarray(mask) for mask in SVGAttention().profile_masks(jnp.arange(700), places)]
        for name, found in zip(self.names, masks, strict=True):
            np.testing.assert_array_equal(found, unpacked(self.arrays[f"profile {name}"], 780))
        sink = masks[1].all(0).reshape(6, 130)
        assert sink.sum(1).tolist() == [22] * 4 + [21] * 2

    def test_choices_and_masks(self):
        """Of a map the values are unit vectors, which chooses by itself."""
        q, k = map(tokens_first, inputs.svg()[:2])
        expected = self.arrays["errors of the map"].argmin(0)[0]
        assert set(expected) == {0, 1}
        found = np.asarray(jax.jit(partial(self.setting().attention_map, grid=self.grid))(q, k))[0] > 0
        for head, choice in enumerate(expected):
            np.testing.assert_array_equal(found[head], self.band()[choice])

    @LISTED
    def test_outputs(self, implementation):
        """With a head of each order, and one whose errors are equal, 0: it is spatial."""
        errors = self.arrays["errors"][:, 0]
        assert errors[0, 0] < errors[1, 0]
        assert errors[1, 1] < errors[0, 1]
        assert (errors[:, 3] == 0).all()
        setting = self.setting(implementation=implementation)
        found = jax.jit(partial(setting, grid=self.grid))(*map(tokens_first, inputs.svg()))
        close(found[:, ::6].swapaxes(1, 2), self.arrays["output"])


class TestSlidingTile:
    arrays = published("sliding_tile")

    @pytest.mark.parametrize("name", inputs.TILES)
    def test_masks(self, name):
        """Even windows and ones wider than the grid included; by tokens, or by tiles where those are many."""
        grid, tile, window = inputs.TILES[name]
        setting = SlidingTileAttention(tile=tile, window=window)
        if name.startswith("tokens"):
            x = jnp.asarray(inputs.normal(2, 1, int(np.prod(grid)), 1, 4, seed=0))
            found = np.asarray(jax.jit(partial(setting.attention_map, grid=grid))(*x))[0, 0] > 0
        else:
            tiles = [size // side for size, side in zip(grid, tile, strict=True)]
            near = [near_tiles(n, np.array([side // 2]))[0] for n, side in zip(tiles, window, strict=True)]
            found = np.kron(np.kron(near[0], near[1]), near[2])
        expected = unpacked(self.arrays[name], len(found))
        np.testing.assert_array_equal(found, expected)
        assert setting.density(grid).kept == pytest.approx(expected.mean())


class TestSLA:
    arrays = published("sla")

    @LISTED
    def test_outputs_and_gradients(self, implementation):
        """Blocks of 64, the last of 8 tokens. Published in bfloat16; made in float32."""
        *x, kernel, bias, weights = inputs.sla()
        setting = SLAttention(keep=0.5, implementation=implementation)

        def loss(x, kernel, bias):
            context = Context(modules={"sla": lambda linear: linear @ kernel + bias[None, None, None]})
            out = setting(*map(tokens_first, x), grid=(2, 10, 10), context=context).swapaxes(1, 2)
            return (out * weights).sum(), out

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, out), (by_x, by_kernel, by_bias) = run(x, kernel, bias)
        close(out[:, :, ::3], self.arrays["output"])
        for name, found in zip(("query", "key", "value"), by_x, strict=True):
            close(found[:, :, ::3], self.arrays[name])
        close(by_kernel, self.arrays["kernel"])
        close(by_bias, self.arrays["bias"])

    def test_map(self):
        q, k = map(tokens_first, inputs.sla()[:2])
        setting = SLAttention(keep=0.5, linear=False)
        found = np.asarray(jax.jit(partial(setting.attention_map, grid=(2, 10, 10)))(q, k))[0] > 0
        of = np.arange(200) // 64
        np.testing.assert_array_equal(found, self.arrays["map"][:, of][:, :, of])


class TestSVG2:
    arrays = published("svg2")

    @pytest.mark.parametrize("rounds", [1, 3, 50])
    @pytest.mark.parametrize("name", ["drawn", "line"])
    def test_kmeans(self, name, rounds):
        """Labels, centroids and sizes, whether the limit ends it or it converges."""
        tokens, first = inputs.clusters()[name]
        found = kmeans(
            jnp.asarray(tokens)[None], jnp.asarray(first)[None], jnp.ones(tokens.shape[1], bool), iterations=rounds
        )
        for field in ("labels", "sizes"):
            np.testing.assert_array_equal(getattr(found, field)[0], self.arrays[f"{name} {rounds} {field}"])
        close(found.centroids[0], self.arrays[f"{name} {rounds} centroids"])

    def test_clusters_lose_all_members(self):
        """That the comparison above has them: one that had some and keeps its last mean, and one that never did."""
        sizes = [self.arrays[f"line {rounds} sizes"][0].tolist() for rounds in (1, 50)]
        assert sizes == [[3, 2, 3], [4, 0, 4]]
        assert self.arrays["line 50 centroids"][0, 1, 0] == 3
        assert self.arrays["drawn 1 sizes"][:, 4].tolist() == [0, 0]
        assert self.arrays["drawn 50 sizes"][0, 6] == 0
        assert (self.arrays["drawn 50 centroids"][0, 6] == 100).all()

    @pytest.fixture
    def drawn(self, monkeypatch):
        """The tokens that centroids begin at, instead of those that are drawn."""

        def uniform(key, shape):
            return (jnp.array(next(d for d in inputs.DRAWN if (len(d),) == shape)) + 0.5) / 128

        monkeypatch.setattr(jax.random, "uniform", uniform)

    @pytest.mark.parametrize("share", inputs.SHARES)
    def test_maps(self, drawn, share):
        setting = SVG2Attention(
            query_clusters=5, key_clusters=9, iterations=inputs.ROUNDS, top_p=share[0], min_keep=share[1]
        )
        q, k = map(tokens_first, inputs.svg2()[:2])
        places = Places(grid=(2, 8, 8), first=0, frames=2, key_frames=np.arange(2), seen=2)
        of_query, of_key, kept = setting.clusters(q, k, places)
        np.testing.assert_array_equal(of_query, self.arrays["of query"])
        np.testing.assert_array_equal(of_key, self.arrays["of key"])
        np.testing.assert_array_equal(kept, self.arrays[f"map {share[0]} {share[1]}"])
        assert self.arrays["key sizes"].min() == 0  # an empty cluster has no weight

    def test_outputs_and_gradients(self, drawn):
        (top_p, least), (*x, weights) = inputs.SHARES[0], inputs.svg2()
        setting = SVG2Attention(query_clusters=5, key_clusters=9, iterations=inputs.ROUNDS, top_p=top_p, min_keep=least)

        def loss(x):
            out = setting(*map(tokens_first, x), grid=(2, 8, 8)).swapaxes(1, 2)
            return (out * weights).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
        close(out[:, :, ::3], self.arrays["output"])
        for name, found in zip(("query", "key", "value"), gradients, strict=True):
            close(found[:, :, ::3], self.arrays[name])
        measured = setting.measure(*map(tokens_first, x[:2]), grid=(2, 8, 8))
        assert measured.kept == pytest.approx(float(self.arrays["density"].mean()), abs=1e-5)


class TestVSA:
    arrays = published("vsa")
    setting = VSAttention(keep=0.4, cube=(4, 4, 4))

    def test_cubes(self):
        """Tokens of each, 2 to 64, and how many are kept: rounded up, published in floats, so that of some shares that
        are whole numbers it keeps one more than they are; here the share is the decimal number that it is written as.
        """
        np.testing.assert_array_equal(np.bincount(self.setting.cube_of(inputs.VSA_GRID)), self.arrays["sizes"])
        np.testing.assert_array_equal(np.bincount(self.setting.cube_of(inputs.VSA_LARGE)), self.arrays["sizes 720p"])
        more = []
        for keep, counts in zip(inputs.VSA_SHARES, self.arrays["counts"], strict=True):
            for cubes, count in zip(inputs.VSA_CUBES, counts, strict=True):
                found = VSAttention(keep=keep).cubes_kept(cubes)
                if count != found:
                    more.append((keep, cubes))
                    assert found == count - 1 == round(keep * cubes)
                    assert round(100 * keep) * cubes % 100 == 0
        assert more == [(0.15, 1260), (0.15, 1440), (0.05, 1260), (0.05, 1440)]

    @LISTED
    def test_outputs_and_gradients(self, implementation):
        """Both branches; published, the fine one rounds probabilities to bfloat16, which is float32 here."""
        *x, gate, weights = inputs.vsa(ties=False)
        setting = dataclasses.replace(self.setting, implementation=implementation)

        def loss(x, gate):
            context = Context(inputs=lambda: gate.reshape(1, -1, 32), modules={"vsa": lambda inputs: inputs})
            out = setting(*x, grid=inputs.VSA_GRID, context=context)
            return (out * weights).sum(), out

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, out), (by_x, by_gate) = run(x, jnp.asarray(gate))
        close(out[:, ::3], self.arrays["output"])
        for name, found in zip(("query", "key", "value", "gate"), (*by_x, by_gate), strict=True):
            close(found[:, ::3], self.arrays[name])

    def choice(self, *, ties):
        """Which cubes the tokens of each cube keep, [2, 12, 12]."""
        x = inputs.vsa(ties=ties)[:2]
        setting = dataclasses.replace(self.setting, gate=False)
        kept = np.asarray(jax.jit(partial(setting.attention_map, grid=inputs.VSA_GRID))(*x))[0] > 0
        of = self.setting.cube_of(inputs.VSA_GRID)
        first = np.unique(of, return_index=True)[1]
        found = kept[:, first][:, :, first]
        np.testing.assert_array_equal(kept, found[:, of][:, :, of])
        return found

    def test_choices(self):
        np.testing.assert_array_equal(self.choice(ties=False), self.arrays["mask"])

    def test_equal_scores(self):
        """Of cubes with equal scores the first, and 5 in all. Published, the search for the smallest that is kept can
        end at the float below it, and then all that are equal to it are kept, 8 in all; so it is in the first head."""
        found, expected = self.choice(ties=True), self.arrays["ties mask"]
        np.testing.assert_array_equal(found[1], expected[1])
        assert (found.sum(-1) == 5).all()
        assert (expected[0].sum(-1) == 8).all()
        scores = np.einsum("bqnd,bknd->bnqk", *inputs.vsa(ties=True)[:2])[0]  # of tokens, as of their cubes' means
        first = np.unique(self.setting.cube_of(inputs.VSA_GRID), return_index=True)[1]
        for row, kept, mine in zip(scores[0][first][:, first], expected[0], found[0], strict=True):
            assert (row[kept].min() > row[~kept]).all()
            least = row == row[kept].min()
            np.testing.assert_array_equal(
                mine, (kept & ~least) | (least & (least.cumsum() <= 5 - (kept & ~least).sum()))
            )

    def test_outputs_of_equal_scores(self):
        """In the head whose choice is the same."""
        *x, gate, _ = inputs.vsa(ties=True)
        context = Context(inputs=lambda: jnp.asarray(gate.reshape(1, -1, 32)), modules={"vsa": lambda inputs: inputs})
        out = jax.jit(partial(self.setting, grid=inputs.VSA_GRID, context=context))(*x)
        close(out[:, ::3, 1], self.arrays["ties output"][:, :, 1])
