"""The reference against an independent PyTorch implementation, and the properties that define a Monarch map."""

import ast
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import BLOCKS, monarch_attention, monarch_attention_1d, monarch_factors
from tests.attention.suite import LAYOUTS, error, inputs, value_and_grads

torch = pytest.importorskip("torch")
from tests.attention.torch_monarch import torch_monarch  # noqa: E402

SETTINGS = {
    "one-step": dict(grid=(3, 3, 5), tile=(1, 3, 5)),
    "tied-frames": dict(grid=(4, 2, 3), tile=(2, 2, 3)),
    "small-tiles": dict(grid=(2, 4, 6), tile=(1, 2, 3)),
    "two-steps": dict(grid=(4, 2, 3), tile=(2, 2, 3), num_iters=2),
    "four-steps": dict(grid=(2, 3, 4), tile=(1, 3, 2), num_iters=4),
    "scale": dict(grid=(2, 3, 4), tile=(2, 3, 2), scale=0.8, num_iters=3),
    "causal": dict(grid=(6, 2, 3), tile=(1, 2, 3), causal_block=3),
    "causal-tied": dict(grid=(6, 2, 3), tile=(3, 2, 3), causal_block=3, num_iters=2),
    "cache": dict(grid=(2, 3, 4), tile=(2, 3, 4), key_frames=8, kv_frames=6),
    "causal-cache": dict(grid=(4, 3, 2), tile=(1, 3, 2), key_frames=8, kv_frames=6, causal_block=2),
    **{
        f"layout-{b}": dict(grid=(4, 4, 6), tile=(2, 2, 3), blocks=b, num_iters=1 + i % 2)
        for i, b in enumerate(LAYOUTS)
    },
}


@pytest.mark.parametrize(  # XLA is compared with the reference in its own tests
    ("name", "implementation"),
    [(x, "reference") for x in SETTINGS]
    + [pytest.param(x, "xla", marks=[pytest.mark.slow] * (x not in ("cache", "two-steps"))) for x in SETTINGS],
)
def test_equals_pytorch(x64, name, implementation):
    """Output and gradients in float64 against PyTorch's autograd, absolute error at most 1e-9."""
    options = dict(SETTINGS[name])
    key_frames = options.pop("key_frames", None)
    arrays = inputs(3, options["grid"], key_frames=key_frames, heads=2, dim=8, dtype=jnp.float64)
    found = value_and_grads(*arrays, implementation=implementation, **options)
    q, k, v, g = (torch.tensor(np.asarray(x), requires_grad=True) for x in arrays)
    out = torch_monarch(q, k, v, **options)
    out.backward(g.detach())
    for x, y in zip(found, (out, q.grad, k.grad, v.grad), strict=True):
        assert np.abs(np.asarray(x) - y.detach().numpy()).max() <= 1e-9


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_guard_is_pytorchs_too(x64, monkeypatch, implementation):
    """Sharp queries and three steps: some 1/c_R are beyond the guard's 1e4, as the output shows."""
    options: dict[str, Any] = dict(grid=(2, 3, 4), tile=(1, 3, 4), num_iters=3)
    q, k, v, _ = inputs(3, (2, 3, 4), heads=2, dim=8, dtype=jnp.float64)
    q = 30 * np.asarray(q)
    expected = torch_monarch(*(torch.tensor(np.asarray(x)) for x in (q, k, v)), **options).numpy()
    assert np.abs(attend(q, k, v, implementation=implementation, **options) - expected).max() <= 1e-9
    if implementation == "xla":
        return
    for guard in (1e3, 1e5):
        monkeypatch.setattr("monarch_jax.reference.MAX_FACTOR", guard)
        jax.clear_caches()
        other = attend(q, k, v, implementation="reference", **options)
        assert np.abs(other - expected).max() > 1e-6, "the guard does not count here"
    jax.clear_caches()


def dense(q, k, v, scale=None):
    """Softmax attention, by NumPy."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


def attend(*arrays, **options):
    """`monarch_attention` as one program."""
    return np.asarray(jax.jit(functools.partial(monarch_attention, **options))(*arrays))


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize(
    "tile", [(1, 1, 1), *(pytest.param(x, marks=pytest.mark.slow) for x in ((1, 1, 4), (2, 3, 1)))]
)
def test_one_row_or_column_per_tile_is_dense(x64, tile, num_iters):
    """Blocks of size one leave nothing to approximate: b1 = 1 or b2 = 1 is softmax attention."""
    q, k, v, _ = inputs(0, (2, 3, 4), dim=8, dtype=jnp.float64)
    options: dict[str, Any] = dict(grid=(2, 3, 4), tile=tile, num_iters=num_iters)
    for implementation in ("reference", "xla"):
        out = attend(q, k, v, implementation=implementation, **options)
        # from the second step on the published guard on 1/c_R perturbs the scores by up to 1e-6 of themselves
        assert error(out, dense(q, k, v)) <= (1e-12 if num_iters == 1 else 1e-4)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    "options",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in ({}, {"num_iters": 3})), {"causal_block": 2}],
    ids=str,
)
def test_the_map_is_row_stochastic_and_gives_the_output(x64, blocks, options):
    """Rows of the implied map are non-negative, sum to 1, and applied to V give the attention's output."""
    grid, tile = (4, 2, 3), (2, 2, 3)
    q, k, v, _ = inputs(1, grid, heads=2, dim=8, dtype=jnp.float64)
    where: dict[str, Any] = dict(grid=grid, tile=tile, blocks=blocks, **options)
    attention = np.asarray(jax.jit(lambda q, k: monarch_factors(q, k, **where).attention)(q, k))
    assert (attention >= 0).all()
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-12)
    attend = jax.jit(functools.partial(monarch_attention, **where))
    assert error(np.einsum("bhnm,bmhd->bnhd", attention, v), attend(q, k, v)) <= 1e-12
    # the op itself, fed V = identity one slice of D columns at a time, gives the same map
    eye = np.broadcast_to(np.eye(24)[None, :, None], (2, 24, 2, 24))
    columns = [np.asarray(attend(q, k, eye[..., i : i + 8])) for i in (0, 8, 16)]
    assert error(np.concatenate(columns, -1).transpose(0, 2, 1, 3), attention) <= 1e-12


def test_the_factors_are_the_map():
    """map[(a,i,j),(c,k,l)] = L[a,j,i,(c,k)] R[a,c,k,j,l] (paper, Section 2.1)."""
    q, k, _, _ = inputs(2, (2, 2, 3), batch=1, heads=1, dim=8)

    @jax.jit
    def parts(q, k):
        factors = monarch_factors(q, k, grid=(2, 2, 3))
        return factors.left, factors.right, factors.attention

    left, right, attention = map(np.asarray, parts(q, k))
    a, i, j, c, row, col = 1, 0, 2, 0, 1, 1
    entry = attention[0, 0, a * 6 + i * 3 + j, c * 6 + row * 3 + col]
    expected = left[0, 0, a, j, i, c, row] * right[0, 0, a, c, row, j, col]
    np.testing.assert_allclose(entry, expected, rtol=1e-6)


def separable(grid, rows, seed=0):
    """q, k whose scores are g_rows(row of q, row of k) + g_cols(column of q, column of k), by one-hot features."""
    sizes = dict(zip("fhw", grid, strict=True))
    index = dict(zip("fhw", np.indices(grid).reshape(3, -1), strict=True))
    rng = np.random.default_rng(seed)
    queries, keys = [], []
    for dims in (rows, "".join(d for d in "fhw" if d not in rows)):
        flat = np.zeros(np.prod(grid), int)
        for d in dims:
            flat = flat * sizes[d] + index[d]
        one_hot = np.eye(flat.max() + 1)[flat]
        queries.append(one_hot @ (2 * rng.normal(size=(flat.max() + 1,) * 2)))
        keys.append(one_hot)
    q, k = (np.concatenate(x, -1)[None, :, None] for x in (queries, keys))
    return q, k


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("tile", [(4, 2, 3), (1, 2, 3), (2, 1, 3), (2, 2, 1)])
def test_aligned_layouts_reproduce_separable_scores(x64, blocks, tile):
    """Equation 1 with S = 0: exact already at T = 1, for every tile (Section B.1)."""
    grid = (4, 2, 3)
    q, k = separable(grid, blocks.split(",")[0])
    v = np.random.default_rng(1).normal(size=q.shape)
    out = attend(q, k, v, grid=grid, tile=tile, blocks=blocks, scale=1.0)
    assert error(out, dense(q, k, v, scale=1.0)) <= 1e-12


def test_misaligned_layouts_do_not(x64):
    """Figure 7: blocks that cut across (h, w) lose what aligned ones keep."""
    grid = (2, 3, 4)
    q, k = map(jnp.asarray, separable(grid, "fh"))
    v = jnp.asarray(np.random.default_rng(1).normal(size=q.shape))
    expected = dense(q, k, v, scale=1.0)
    assert error(monarch_attention_1d(q, k, v, block_sizes=(6, 4), scale=1.0), expected) <= 1e-12
    assert error(monarch_attention_1d(q, k, v, block_sizes=(3, 8), scale=1.0), expected) > 0.05


def test_1d_is_the_untiled_form(x64):
    """tile = grid with fh,w is the 1-D form with block sizes (F*h, w); runs of b1*b2 tokens are its tiles."""
    q, k, v, _ = inputs(4, (4, 2, 3), dim=8, dtype=jnp.float64)
    one = jax.jit(functools.partial(monarch_attention_1d, block_sizes=(8, 3), num_iters=2))(q, k, v)
    assert error(one, monarch_attention(q, k, v, grid=(4, 2, 3), tile=(4, 2, 3), num_iters=2)) <= 1e-12
    tiled = jax.jit(functools.partial(monarch_attention_1d, block_sizes=(2, 3)))(q, k, v)
    assert error(tiled, monarch_attention(q, k, v, grid=(4, 2, 3))) <= 1e-12


def test_more_steps_fit_better(x64):
    """Refinement approaches dense attention on smooth scores: T = 4 is closer than T = 1."""
    grid = (3, 4, 5)
    q, k, v, _ = inputs(5, grid, dim=8, dtype=jnp.float64, sharpness=0.3)
    found = [error(attend(q, k, v, grid=grid, num_iters=t), dense(q, k, v)) for t in (1, 4)]
    assert found[1] < found[0]


def test_order_of_batch_heads_and_key_tiles_does_not_matter(x64):
    """Permuting any of them permutes the output, or leaves it."""
    grid = (3, 2, 4)
    q, k, v, _ = map(np.asarray, inputs(6, grid, dim=8, dtype=jnp.float64))
    out = attend(q, k, v, grid=grid)
    flipped = attend(*(x[::-1, :, ::-1] for x in (q, k, v)), grid=grid)
    assert error(flipped[::-1, :, ::-1], out) <= 1e-12
    order = np.array([2, 0, 1])
    k2, v2 = (x.reshape(2, 3, 8, 3, 8)[:, order].reshape(x.shape) for x in (k, v))
    assert error(attend(q, k2, v2, grid=grid), out) <= 1e-12


def test_query_tiles_are_independent(x64):
    """The first frame's output does not change when other frames' queries do."""
    grid = (3, 2, 4)
    q, k, v, _ = map(np.asarray, inputs(7, grid, dim=8, dtype=jnp.float64))
    out = attend(q, k, v, grid=grid, num_iters=2)
    changed = attend(np.concatenate([q[:, :8], -3 * q[:, 8:]], 1), k, v, grid=grid, num_iters=2)
    assert error(changed[:, :8], out[:, :8]) <= 1e-12
    assert error(changed[:, 8:], out[:, 8:]) > 0.1


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize(("reduce", "grid"), [((1, 1, 1), (3, 4, 6)), ((3, 1, 1), (3, 4, 6)), ((1, 2, 3), (2, 4, 6))])
def test_equals_the_published_functions(x64, published, reduce, grid, num_iters):
    """The published slow path, its functions taken out of a file that cannot be imported without a GPU."""
    path = pathlib.Path(published) / "wan" / "modules" / "monarch_attn.py"
    tree = ast.parse(path.read_text())
    wanted = ("_get_rearrange_fns", "monarch_attn_slow")
    body: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    from einops import rearrange

    scope = {"torch": torch, "rearrange": rearrange}
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    f_tied, h_reduce, w_reduce = reduce
    arrays = inputs(8, grid, dim=8, dtype=jnp.float64)[:3]
    q, k, v = (torch.tensor(np.asarray(x)) for x in arrays)
    to_tiles, to_tokens = scope["_get_rearrange_fns"](q, f_tied, h_reduce, w_reduce, *grid[1:])
    out = to_tokens(scope["monarch_attn_slow"](to_tiles(q), to_tiles(k), to_tiles(v), 8**-0.5, num_iters))
    tile = (f_tied, grid[1] // h_reduce, grid[2] // w_reduce)
    found = attend(*arrays, grid=grid, tile=tile, num_iters=num_iters)
    assert error(found, out.numpy()) <= 2e-5  # its softmax is in float32 and its first step has the guard
