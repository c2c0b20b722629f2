import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.wan import WanConfig, WanModel
from monarchrt.models.wan.checkpoints import mapping

SMALL = WanConfig(
    dim=48, ffn_dim=80, num_heads=2, num_layers=3, freq_dim=32, text_dim=20, text_len=7, in_channels=5, out_channels=6
)


def set_parameter(state, tensor, array):
    """Writes one checkpoint tensor into a flat state of numpy arrays."""
    ours = mapping.to_ours(array, tensor.layout)
    if tensor.layer is None:
        state[tensor.path] = ours
    else:
        state.setdefault(tensor.path, {})[tensor.layer] = ours


def model_from_torch(config, state_dict):
    """Our model with the parameters of a diffusers transformer, through the mapping table; every key must be used."""
    left, flat = dict(state_dict), {}
    for tensor in mapping.tensors(config):
        set_parameter(flat, tensor, left.pop(tensor.diffusers).numpy())
    assert not left, f"not in the mapping: {sorted(left)}"
    model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    values = dict(nnx.to_flat_state(state))
    assert set(values) == set(flat)
    for path, variable in values.items():
        array = flat[path]
        if isinstance(array, dict):
            array = np.stack([array[i] for i in range(config.num_layers)])
        assert array.shape == variable.shape, path
        values[path] = variable.replace(jnp.asarray(array))
    return nnx.merge(graph, nnx.from_flat_state(list(values.items())))


def diffusers_model(config, *, seed=0):
    """diffusers' transformer of the same sizes, every parameter random, none near zero in effect."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    i2v = config.model_type == "i2v"
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
        image_dim=config.image_dim if i2v else None,
        added_kv_proj_dim=config.dim if i2v else None,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.normal_(0, spread)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


@functools.cache
def random_model(config, seed=0):
    """A model with every parameter random: no zero head, no zero bias. Not to be changed in place."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        name = path[-1] if isinstance(path[-1], str) else path[-2]
        spread = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.2
        array = rng.standard_normal(leaf.shape) * spread + (1.0 if name == "scale" else 0.0)
        return leaf.replace(jnp.asarray(array, leaf.dtype))

    flat = [(path, draw(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def sample(config, *, grid=(6, 4, 6), batch=2, seed=0, text_rows=None, per_frame=False):
    """Random latents (by tokens), timesteps and text."""
    rng = np.random.default_rng(seed)
    size = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
    latents = rng.standard_normal((batch, *size, config.in_channels)).astype(np.float32)
    timesteps = rng.uniform(0, 1000, (batch, grid[0]) if per_frame else (batch,)).astype(np.float32)
    text = rng.standard_normal((batch, text_rows or config.text_len, config.text_dim)).astype(np.float32)
    return jnp.asarray(latents), jnp.asarray(timesteps), jnp.asarray(text)


class Helpers:
    SMALL = SMALL
    model_from_torch = staticmethod(model_from_torch)
    diffusers_model = staticmethod(diffusers_model)
    sample = staticmethod(sample)

    @staticmethod
    def model(config=SMALL, *, seed=0, **changes):
        return random_model(dataclasses.replace(config, **changes), seed)


@pytest.fixture(autouse=True)
def quick_compilation():
    """These models are compiled far longer than they run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def wan():
    return Helpers


@pytest.fixture(scope="session")
def small(wan):
    """Sizes of a small model of two layers."""
    return dataclasses.replace(wan.SMALL, num_layers=2)
