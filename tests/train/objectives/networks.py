"""Networks, data and comparisons that the tests of the objectives share; small, as compiling is what takes time."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monarchrt.models.attention.notation import parse
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.train.data import Batch


class Small(nnx.Module):
    """Latents, time and text to a flow, not linear in parameters, for what does not depend on the network."""

    def __init__(self, seed, channels=2, text_dim=4):
        keys = jax.random.split(jax.random.key(seed), 3)
        self.first = nnx.Param(jax.random.normal(keys[0], (channels, 5)))
        self.text = nnx.Param(jax.random.normal(keys[1], (text_dim, 5)))
        self.last = nnx.Param(jax.random.normal(keys[2], (5, channels)))

    def __call__(self, latents, timesteps, text):
        time = timesteps.reshape(*timesteps.shape, *[1] * (5 - timesteps.ndim)) / 1000
        prompt = (text @ self.text[...]).mean(1)[:, None, None, None]
        return jnp.tanh(latents @ self.first[...] + prompt + time) @ self.last[...]


def wan(seed, attention="dense", *, head=0.2, **changes):
    """One layer of two heads over two channels. The head is not zero, as it would be: no gradient would pass it."""
    sizes = dict(dim=24, num_heads=2, ffn_dim=16, num_layers=1, freq_dim=16, text_dim=4, text_len=2)
    config = wan_config("tiny", in_channels=2, out_channels=2, attention=parse(attention), **(sizes | changes))
    model = WanModel(config, rngs=nnx.Rngs(seed))
    kernel = model.head.proj.kernel
    kernel[...] = head * jax.random.normal(jax.random.key(seed + 100), kernel.shape)
    return model


def batch(shape, *, rows=2, width=4, seed=5):
    """Latents of a shape [B, F, H, W, C], with text."""
    rng = np.random.default_rng(seed)
    return Batch(*(rng.standard_normal(size, np.float32) for size in (shape, (shape[0], rows, width))))


def published_mask(blocks):
    """[2F, 2F]: clean frames see clean blocks up to theirs; noisy ones clean blocks before theirs, and their own."""
    number = np.repeat(np.arange(len(blocks)), blocks)
    before, same = number[None] < number[:, None], number[None] == number[:, None]
    return np.block([[before | same, np.zeros_like(same)], [before, same]])


def gradient(loss, model, *, jit=True, has_aux=False):
    """(further arguments) -> a loss (model, *further arguments) and its gradient by the model's parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    run = jax.value_and_grad(lambda params, *args: loss(nnx.merge(graph, params, rest), *args), has_aux=has_aux)
    run = jax.jit(run) if jit else run
    return lambda *args: run(params, *args)


def assert_same(ours, theirs, tolerance):
    """That two trees agree, each leaf relative to its norm and to a thousandth of the whole's."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    whole = np.sqrt(sum(float(np.sum(np.square(b))) for _, b in pairs))
    assert whole > 0
    for a, b in pairs:
        assert np.linalg.norm(np.asarray(a - b)) <= tolerance * (np.linalg.norm(np.asarray(b)) + 1e-3 * whole)
