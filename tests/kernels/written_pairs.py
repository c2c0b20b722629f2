"""`triton_kernels.pairs.Pairs` written out in JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


def at_once(method):
    """The method as one program: one operation after another, compiling takes most of a test's time."""

    @functools.wraps(method)
    def run(self, *arrays, **sizes):
        return jax.jit(functools.partial(method, self, **sizes))(*arrays)

    return run


@dataclasses.dataclass(frozen=True)
class Written:
    """What is not seen holds NaN where the kernels may leave anything."""

    q: jax.Array
    k: jax.Array
    visible: jax.Array
    start: jax.Array
    scale: float
    heads: int
    tiles: int
    split: tuple[int, int, int, int]

    def places(self):
        """Item and row of each column of each tile [tiles, b2]."""
        _, full, tail, packed = self.split
        tile, j = jnp.arange(self.tiles)[:, None], jnp.arange(self.q.shape[3])[None]
        item = jnp.where(j < 64 * full, tile * full + j // 64, self.tiles * full + tile // packed)
        return item, jnp.where(j < 64 * full, j % 64, tile % packed * tail + j - 64 * full)

    def numbers(self, x):
        """[lanes, tiles, b2, pairs] of what lies by items."""
        return x[:, *self.places()][..., : self.pairs]

    def back(self, x, like):
        """The inverse of `numbers`, of what is seen."""
        item, row = self.places()
        x = jnp.where(self.seen()[None, :, None], x, jnp.nan)
        return jnp.full(like.shape, jnp.nan).at[:, item, row, : self.pairs].set(x)

    @property
    def pairs(self):
        """C*b1."""
        return self.k.shape[1] * self.k.shape[2]

    def seen(self, block=1):
        """[tiles, pairs], up to the next multiple of `block` pairs."""
        limit = jax.lax.dynamic_slice_in_dim(self.visible, self.start[1], self.tiles) * self.k.shape[2]
        return jnp.arange(self.pairs) < ((limit + block - 1) // block * block)[:, None]

    def rows(self, x, tiled):
        """[lanes, (tiles,) b1, b2, D] of the chunk's heads and, with `tiled`, query tiles."""
        x = jax.lax.dynamic_slice_in_dim(x, self.start[0], self.heads, 4).astype(jnp.float32)
        if tiled:
            x = jax.lax.dynamic_slice_in_dim(x, self.start[1], self.tiles, 1)
        return x.transpose(0, 4, 1, 2, 3, 5).reshape(-1, x.shape[1], *x.shape[2:4], x.shape[-1])

    def scores(self, alpha, c):
        """In units of log 2, [lanes, tiles, b2, b1, pairs]."""
        x = jnp.einsum("ztijd,ztnjd->ztjin", self.rows(self.q, True), self.flat(alpha)) * self.scale / jnp.log(2)
        return jnp.where(self.seen()[None, :, None, None], x - self.numbers(c)[..., None, :], -jnp.inf)

    def flat(self, x):
        """Vectors in float32, zero where not seen."""
        x = x.reshape(*x.shape[:4], -1).astype(jnp.float32)
        return jnp.where(self.seen()[None, :, :, None, None], x, 0)

    @at_once
    def refine(self, alpha, c, *, width):
        """See `Pairs`."""
        x = self.scores(alpha, c)
        lse = jax.nn.logsumexp(x * jnp.log(2), axis=-1) / jnp.log(2)
        p = jnp.exp2(x - lse[..., None])
        factor = jnp.minimum(1 / (p.sum(-2) + 1e-6), 1e4)
        u = jnp.einsum("ztjin,ztijd->ztnjd", p * factor[..., None, :], self.rows(self.q, True))
        u = jnp.where(self.seen()[None, :, :, None, None], u, jnp.nan).reshape(alpha.shape).astype(alpha.dtype)
        lse = jnp.pad(lse, ((0, 0),) * 3 + ((0, width - lse.shape[-1]),), constant_values=jnp.inf)
        return u, self.back(factor, c), jnp.stack([lse, jnp.full_like(lse, jnp.nan)], 3)

    @at_once
    def query(self, u, dz, factors):
        """See `Pairs`."""
        item, row = self.places()
        d_z = dz[:, item, :, :, row].astype(jnp.float32)  # tiles, b2, lanes, pairs, l
        d_z = jnp.moveaxis(d_z, 2, 0)[..., : self.k.shape[3]]
        k = self.rows(self.k, False).reshape(u.shape[0], self.pairs, self.k.shape[3], -1)
        seen = self.seen()[None, :, :, None, None]
        du = jnp.einsum("ztjnl,znld->ztnjd", jnp.where(seen.transpose(0, 1, 3, 2, 4), d_z, 0), jnp.nan_to_num(k))
        du = jnp.where(seen, du, jnp.where(self.seen(64)[None, :, :, None, None], 0, jnp.nan)).astype(u.dtype)
        product = jnp.einsum("ztnjd,ztnjd->ztjn", self.flat(du), self.flat(u))
        product = jnp.where(self.numbers(factors) < 1e4, product, 0)
        return du.reshape(u.shape), self.back(product, factors)

    @at_once
    def delta(self, alpha, du, c, factors, products, stats):
        """See `Pairs`."""
        rows = self.q.shape[2]
        p = jnp.exp2(self.scores(alpha, c) - stats[:, :, :, 0, :rows, None])
        d_p = jnp.einsum("ztijd,ztnjd->ztjin", self.rows(self.q, True), self.flat(du))
        d_p = (d_p - self.numbers(products)[..., None, :]) * self.numbers(factors)[..., None, :]
        delta = jnp.where(p > 0, p * d_p, 0).sum(-1) * self.scale
        return stats.at[:, :, :, 1].set(jnp.pad(delta, ((0, 0),) * 3 + ((0, stats.shape[-1] - rows),)))
