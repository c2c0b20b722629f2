"""A loop over layers that writes what it keeps into stacks: values and gradients of a scan."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from monarchrt.models.attention.notation import parse
from monarchrt.models.lora.layers import Adapter, with_adapter
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.kept import cheap
from monarchrt.models.wan.stacks import stacks_written, through_stacks


def layers(x, stacked, scale, *, through, policy=None):
    """Layers whose kept values are a product and two sums."""

    def body(x, layer):
        weights, number = layer
        product = x @ weights["w"]
        summed, moved = (checkpoint_name(y + weights["b"][None, None], "product") for y in (product, x))
        return x + jnp.tanh(summed) * jnp.sin(product) * jnp.cos(moved) * scale.mean() * (1 + number), None

    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return through(body, x, stacked)


def scanned(body, x, stacked):
    return jax.lax.scan(body, x, stacked)[0]


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    weights = {"w": 0.2 * jax.random.normal(keys[0], (3, 4, 4)), "b": jax.random.normal(keys[1], (3, 4))}
    return jax.random.normal(keys[2], (2, 5, 4)), (weights, jnp.arange(3)), jax.random.normal(keys[3], (6,))


@pytest.mark.parametrize("policy", [None, cheap, jax.checkpoint_policies.everything_saveable])
def test_values_and_gradients_are_the_scans(arrays, policy):
    x, (weights, numbers), scale = arrays

    def loss(x, weights, scale, through):
        return (layers(x, (weights, numbers), scale, through=through, policy=policy) ** 2).sum()

    of = jax.value_and_grad(loss, argnums=(0, 1, 2))
    mine, right = (jax.jit(partial(of, through=through))(x, weights, scale) for through in (through_stacks, scanned))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), mine, right)
    np.testing.assert_allclose(loss(x, weights, scale, through_stacks), right[0], rtol=1e-5)  # with no gradient


def test_what_is_kept_is_written_where_it_is_made(arrays):
    """A product is read from its stack, behind a barrier; sums, which XLA has no product write, are not."""
    x, (weights, numbers), scale = arrays

    def loss(x):
        return layers(x, (weights, numbers), scale, through=through_stacks, policy=cheap).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert len(set(re.findall(r"(\w+):f32\[3,10,4\] = empty", text))) == 4  # stacks of x, the product, two sums
    assert text.count("optimization_barrier") == 1


@pytest.mark.parametrize(
    "inside",
    [
        lambda loss, numbers: jax.jit(loss)(numbers[0]),
        lambda loss, numbers: jax.checkpoint(loss)(numbers[0]),
        lambda loss, numbers: jax.vmap(loss)(numbers).sum(),
        lambda loss, numbers: jax.lax.scan(lambda total, step: (total + loss(step), None), 0.0, numbers)[0],
    ],
    ids=["jit", "checkpoint", "vmap", "scan"],
)
def test_layers_may_close_over_numbers_and_masks(arrays, inside):
    """Such as steps, which `jax.closure_convert` leaves where they are; in any function that has a gradient."""
    x, (weights, _), _ = arrays

    def gradients(through):
        def loss(x, step):
            mask = jnp.arange(5) < step

            def body(x, layer):
                return x + jnp.where(mask[:, None], jnp.tanh(x @ layer), x * step), None

            return (through(jax.checkpoint(body, prevent_cse=False), x, weights["w"]) ** 2).sum()

        return jax.grad(lambda x: inside(partial(loss, x), jnp.asarray([2, 3])))(x)

    np.testing.assert_allclose(gradients(through_stacks), gradients(scanned), rtol=1e-5)


def same_gradients(config, *, batch=1, times=(), image=False, adapter=None):
    """Checks those of a network by stacks and by the scan: of its parameters, or a LoRA's, and of its inputs."""
    model = WanModel(config, rngs=nnx.Rngs(0))
    trains = nnx.Param if adapter is None else nnx.LoRAParam
    model = model if adapter is None else with_adapter(model, adapter, rngs=nnx.Rngs(1))
    graph, params, frozen = nnx.split(model, trains, ...)
    params, frozen = jax.tree.map(
        lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), (params, frozen)
    )
    draw = np.random.default_rng(0)
    latents = jnp.asarray(draw.normal(size=(batch, 3, 4, 8, config.in_channels)), jnp.float32)
    text = jnp.asarray(draw.normal(size=(batch, 5, config.text_dim)), jnp.float32)
    seen = jnp.asarray(draw.normal(size=(batch, 257, config.image_dim)), jnp.float32) if image else None

    def loss(params, latents, text):
        flow = nnx.merge(graph, params, frozen)(latents, jnp.full((batch, *times), 500.0), text, seen)
        return (flow * latents[..., : config.out_channels]).sum()

    def gradients(stacks):
        with stacks_written(stacks):
            return jax.jit(jax.grad(lambda *arrays: loss(*arrays), argnums=(0, 1, 2)))(params, latents, text)

    mine, right = map(gradients, (True, False))
    assert float(max(jnp.abs(x).max() for x in jax.tree.leaves(right[0]))) > 1e-3
    for x, y in zip(*map(jax.tree.leaves, (mine, right)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(("batch", "times"), [(1, ()), (2, (3,))])  # gates in weights, and not
def test_a_network_has_the_gradients_of_the_scan(batch, times):
    config = wan_config("tiny", num_layers=2, remat="cheap", attention=parse("monarch(tile=(3,2,4))"))
    same_gradients(config, batch=batch, times=times)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "sizes", "given"),
    [
        ("monarch(tile=(3,2,4))", {"num_layers": 1}, {}),
        ("monarch(tile=(3,2,4))", {}, {"adapter": Adapter(rank=2)}),
        ("monarch(tile=(3,2,4))", {"model_type": "i2v", "in_channels": 36, "image_dim": 24}, {"image": True}),
        ("monarch(tile=(1,2,4))", {"causal_block": 1}, {"times": (3,)}),
        ("first_layers(1, dense, top_k(keep=0.5))", {}, {}),
        ("vsa(keep=0.5)", {}, {"batch": 2}),
    ],
    ids=["one layer", "LoRA", "image", "causal", "two runs of layers", "own parameters"],
)
def test_so_have_others(attention, sizes, given):
    same_gradients(wan_config("tiny", **{"num_layers": 2} | sizes, remat="cheap", attention=parse(attention)), **given)
