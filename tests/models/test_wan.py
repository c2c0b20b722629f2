import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.wan import (
    DenseAttention,
    MonarchAttention,
    WanModel,
    count_parameters,
    layers,
    wan_config,
)
from monarchrt.models.wan.layers import sinusoid
from monarchrt.models.wan.rope import axis_widths, frequencies, rope_table, rotate
from tests.untyped import there


def call(model, *inputs):
    return nnx.jit(lambda model, *inputs: model(*inputs))(model, *inputs)


def equations(jaxpr, name):
    """All equations of a primitive, those of inner programs included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value, name)


def to_torch(latents, timesteps, text):
    torch = pytest.importorskip("torch")
    latents, timesteps, text = (torch.from_numpy(np.array(x)) for x in (latents, timesteps, text))
    return latents.permute(0, 4, 1, 2, 3), timesteps, text


class TestDiffusers:
    """Random weights through the mapping table; diffusers 0.42."""

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"num_heads": 3},  # head_dim 16: rotary widths 8, 4, 4
            {"patch_size": (2, 2, 1), "eps": 1e-5},
        ],
    )
    def test_t2v(self, wan, changes):
        torch = pytest.importorskip("torch")
        config = dataclasses.replace(wan.SMALL, **changes)
        reference = wan.diffusers_model(config)
        inputs = wan.sample(config)
        latents, timesteps, text = to_torch(*inputs)
        with torch.no_grad():
            expected = reference(latents, timesteps, text).sample.permute(0, 2, 3, 4, 1).numpy()
        assert expected.std() > 0.3
        out = call(wan.model_from_torch(config, reference.state_dict()), *inputs)
        np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)

    def test_timestep_per_frame(self, wan):
        torch = pytest.importorskip("torch")
        reference = wan.diffusers_model(wan.SMALL)
        inputs = wan.sample(wan.SMALL, per_frame=True)
        latents, timesteps, text = to_torch(*inputs)
        with torch.no_grad():
            per_token = timesteps.repeat_interleave(4 * 6, dim=1)
            expected = reference(latents, per_token, text).sample.permute(0, 2, 3, 4, 1).numpy()
        out = call(wan.model_from_torch(wan.SMALL, reference.state_dict()), *inputs)
        np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)

    def test_text_is_padded_and_padding_is_attended(self, wan):
        """diffusers is given the zero rows; we add them."""
        torch = pytest.importorskip("torch")
        reference = wan.diffusers_model(wan.SMALL)
        latents, timesteps, text = wan.sample(wan.SMALL, text_rows=3)
        padded = jnp.pad(text, ((0, 0), (0, 4), (0, 0)))
        with torch.no_grad():
            expected = reference(*to_torch(latents, timesteps, padded)).sample.permute(0, 2, 3, 4, 1).numpy()
            unpadded = reference(*to_torch(latents, timesteps, text)).sample.permute(0, 2, 3, 4, 1).numpy()
        out = call(wan.model_from_torch(wan.SMALL, reference.state_dict()), latents, timesteps, text)
        np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)
        assert np.abs(unpadded - expected).max() > 1e-2

    def test_i2v(self, wan):
        torch = pytest.importorskip("torch")
        # diffusers takes the last 512 rows as the text
        config = dataclasses.replace(wan.SMALL, model_type="i2v", image_dim=24, text_len=512, in_channels=36)
        reference = wan.diffusers_model(config)
        inputs = wan.sample(config, grid=(2, 3, 4))
        image = np.random.default_rng(1).standard_normal((2, 5, 24)).astype(np.float32)
        with torch.no_grad():
            expected = reference(*to_torch(*inputs), torch.from_numpy(image)).sample.permute(0, 2, 3, 4, 1).numpy()
        out = call(wan.model_from_torch(config, reference.state_dict()), *inputs, jnp.asarray(image))
        np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)

    def test_bfloat16_is_near_float32(self, wan):
        reference = wan.diffusers_model(wan.SMALL)
        inputs = wan.sample(wan.SMALL)
        exact = call(wan.model_from_torch(wan.SMALL, reference.state_dict()), *inputs)
        half = dataclasses.replace(wan.SMALL, dtype="bfloat16")
        out = call(wan.model_from_torch(half, reference.state_dict()), *inputs)
        assert out.dtype == jnp.float32
        error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 2e-2


class TestNumbers:
    def test_small_numbers_are_normalised_as_in_torch(self):
        """Of the size of a thousandth, so that what is added to their mean square counts."""
        functional = pytest.importorskip("torch").nn.functional
        config = wan_config("tiny", model_type="i2v", in_channels=36, image_dim=24)
        rng = np.random.default_rng(0)
        x = 1e-3 * rng.standard_normal((5, config.dim)).astype(np.float32)
        to_torch = functional.torch.from_numpy
        expected = functional.rms_norm(to_torch(x), (config.dim,), eps=1e-6)
        norm = layers.RMSNorm(config, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)
        block = layers.WanBlock(config, rngs=nnx.Rngs(0))
        image = layers.ImageEmbedding(config, rngs=nnx.Rngs(0))
        for norm, eps in ((block.norm1, 1e-6), (block.norm2, 1e-6), (block.norm3, 1e-6), (image.norm2, 1e-5)):
            expected = functional.layer_norm(to_torch(x), (config.dim,), eps=eps)
            np.testing.assert_allclose(norm(x), expected, rtol=1e-3, atol=1e-4)

    def test_what_is_float32_is_not_rounded_on_a_gpu(self, wan):
        """By default a GPU multiplies float32 with ten bits (TF32)."""
        config = dataclasses.replace(wan.SMALL, dtype="bfloat16")
        model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        jaxpr = jax.make_jaxpr(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *wan.sample(config))
        dots = [eqn for eqn in equations(jaxpr, "dot_general") if eqn.invars[0].aval.dtype == jnp.float32]
        highest = (jax.lax.Precision.HIGHEST,) * 2
        assert sum(eqn.params["precision"] == highest for eqn in dots) == 4  # timestep: MLP, projection; head

    @pytest.mark.parametrize(
        ("t", "values"),
        [
            (1000.0, (0.562379, 0.789615, 0.994232, 0.826880, 0.613603, 0.107254)),
            (937.5, (0.262302, 0.580487, 0.994930, 0.964986, -0.814269, 0.100574)),
            (2500 / 3, (-0.688585, -0.879158, 0.995993, -0.725155, 0.476530, 0.089431)),
            (625.0, (-0.984387, -0.915967, 0.997745, 0.176016, -0.401253, 0.067113)),
            (0.0, (1, 1, 1, 0, 0, 0)),
        ],
    )
    def test_sinusoid_golden(self, t, values):
        out = jax.jit(sinusoid, static_argnums=1)(jnp.array([t]), 256)[0]
        # 2500/3 itself is rounded to float32, by up to 3e-5
        tolerance = 4e-5 if t == 2500 / 3 else 1e-6
        np.testing.assert_allclose(out[jnp.array([0, 1, 127, 128, 129, 255])], values, atol=tolerance)

    def test_sinusoid_against_float64(self):
        t = np.random.default_rng(0).uniform(0, 1000, 500).astype(np.float32)
        angles = np.outer(t.astype(np.float64), 10000.0 ** (-np.arange(128) / 128))
        expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        out = jax.jit(sinusoid, static_argnums=1)(jnp.asarray(t), 256)
        np.testing.assert_allclose(out, expected, atol=5e-7)

    def test_rope_ladders(self):
        assert axis_widths(128) == (44, 42, 42)
        assert axis_widths(24) == (8, 8, 8)
        np.testing.assert_allclose(frequencies(44)[[0, 1, -1]], [1, 0.6579332, 1.5199111e-4], rtol=1e-7)
        np.testing.assert_allclose(frequencies(42)[[0, 1, -1]], [1, 0.6449467, 1.5505158e-4], rtol=1e-7)

    def test_rope_start_frame(self):
        whole = rope_table((9, 2, 3), 24)
        traced = jax.jit(lambda start: rope_table((3, 2, 3), 24, start_frame=start))(jnp.int32(6))
        for full, static, dynamic in zip(whole, rope_table((3, 2, 3), 24, start_frame=6), traced, strict=True):
            np.testing.assert_array_equal(static, full[6:])
            np.testing.assert_allclose(dynamic, full[6:], atol=1e-7)

    def test_rope_scores_depend_on_differences(self):
        query, key = jax.random.normal(jax.random.key(0), (2, 1, 3, 6, 1, 24))

        def scores(start):
            table = rope_table((3, 2, 3), 24, start_frame=start)
            q, k = rotate(query, *table), rotate(key, *table)
            return jnp.einsum("bfsnd,bgtnd->bfsgt", q, k)

        np.testing.assert_allclose(scores(0), scores(700), atol=2e-5)

    def test_rope_table_ends(self):
        with pytest.raises(ValueError, match=r"frames: position 1024 .*1024 positions"):
            rope_table((3, 2, 3), 24, start_frame=1022)
        cos, sin = jax.jit(lambda start: rope_table((3, 2, 3), 24, start_frame=start))(jnp.int32(1022))
        assert np.isnan(cos[:, :, :4]).all()
        assert np.isnan(sin[:, :, :4]).all()

    @pytest.mark.parametrize(
        ("preset", "count"),
        [
            ("wan2.1-t2v-1.3b", 1_418_996_800),
            ("wan2.1-t2v-14b", 14_288_491_584),
            ("wan2.1-i2v-14b", 16_394_878_784),
        ],
    )
    def test_parameter_count(self, preset, count):
        assert count_parameters(wan_config(preset)) == count

    def test_initial_head_is_zero(self):
        config = wan_config("tiny")
        model = nnx.jit(lambda: WanModel(config, rngs=nnx.Rngs(0)))()
        out = call(model, jnp.ones((1, 1, 4, 4, 16)), jnp.array([3.0]), jnp.ones((1, 1, 32)))
        assert not out.any()
        assert count_parameters(model) == count_parameters(config)
        kernel = model.blocks.ffn.fc1.kernel[...]
        assert not np.array_equal(kernel[0], kernel[1])  # layers are drawn apart


class TestLayers:
    @pytest.mark.parametrize("attention", [pytest.param(DenseAttention(), marks=pytest.mark.slow), MonarchAttention()])
    def test_depth_does_not_grow_the_program(self, wan, attention):
        def size(layers):
            config = dataclasses.replace(wan.SMALL, num_layers=layers, attention=attention, remat="full")
            model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))
            graph, state = nnx.split(model)
            loss = lambda state, *inputs: nnx.merge(graph, state)(*inputs).sum()  # noqa: E731
            text = str(jax.make_jaxpr(jax.grad(loss))(state, *wan.sample(config)))
            return len(text.split())

        assert size(3) == size(30)

    @pytest.mark.slow
    @pytest.mark.parametrize("remat", ["full", "attention", "dots", "cheap"])
    def test_remat_changes_nothing(self, wan, remat):
        inputs = wan.sample(wan.SMALL)
        grads = {}
        for setting in ("none", remat):
            model = wan.model(remat=setting)
            loss, grad = nnx.jit(nnx.value_and_grad(lambda m: jnp.mean(m(*inputs) ** 2)))(model)
            assert jnp.isfinite(loss)
            grads[setting] = jax.tree.leaves(grad)
        for a, b in zip(*grads.values(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    @pytest.mark.parametrize(("remat", "runs"), [("full", 3), ("attention", 2)])  # one of XLA's own gradient
    def test_what_kernels_attend_may_be_kept(self, wan, monkeypatch, remat, runs):
        """Then it is not computed once more in the backward pass, also where the rest goes by groups of frames."""
        monkeypatch.setattr(layers, "HIDDEN_BYTES", 2**12)
        inputs = wan.sample(wan.SMALL)
        model = wan.model(remat=remat, attention=MonarchAttention(implementation="xla"))
        graph, state = nnx.split(model)
        step = jax.jit(jax.grad(lambda state: jnp.mean(nnx.merge(graph, state)(*inputs) ** 2)))
        assert step.lower(state).as_text().count("call @_forward") == runs

    @pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "cheap"])
    def test_unrolled_layers_change_nothing(self, wan, remat):
        """Layers of two kinds of attention: the same loss and gradients, without a loop."""
        inputs = wan.sample(wan.SMALL)
        attention = (DenseAttention(), *[MonarchAttention()] * (wan.SMALL.num_layers - 1))
        found = []
        for unrolled in (False, True):
            model = wan.model(remat=remat, attention=attention, unroll_layers=unrolled)
            graph, state = nnx.split(model)
            step = jax.jit(jax.value_and_grad(lambda state: jnp.mean(nnx.merge(graph, state)(*inputs) ** 2)))  # noqa: B023
            traced = step.trace(state)
            loops = [eqn for eqn in equations(traced.jaxpr, "scan") if eqn.params["length"] >= len(attention) - 1]
            assert bool(loops) is not unrolled
            found.append(step(state))
        (loss, grads), (again, others) = found
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=1e-5)

    @pytest.mark.parametrize(
        ("attention", "groups", "per_frame"),
        [
            pytest.param(DenseAttention(), 6, False, marks=pytest.mark.slow),
            pytest.param(MonarchAttention(tile=(3, 2, 6)), 2, True, marks=pytest.mark.slow),
        ],
    )
    def test_groups_of_frames_change_nothing(self, wan, monkeypatch, attention, groups, per_frame):
        """What follows the self-attention, by groups of frames as at true size: same loss, same gradients."""
        inputs = wan.sample(wan.SMALL, per_frame=per_frame)
        tokens = inputs[0].size // (4 * wan.SMALL.in_channels)
        model = wan.model(remat="full", attention=attention)

        def value_and_grad(groups):
            monkeypatch.setattr(layers, "HIDDEN_BYTES", tokens * wan.SMALL.ffn_dim * 4 // groups)
            graph, state = nnx.split(model)
            step = jax.jit(jax.value_and_grad(lambda state: jnp.mean(nnx.merge(graph, state)(*inputs) ** 2)))
            traced = step.trace(state)
            return {eqn.params["length"] for eqn in equations(traced.jaxpr, "scan")}, *step(state)

        scans, loss, grad = value_and_grad(1)
        again_scans, again, again_grad = value_and_grad(groups)
        assert again_scans - scans == {groups}
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(again_grad), jax.tree.leaves(grad), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    def test_gates_in_weights(self, wan, monkeypatch):
        """One clip of one timestep, by groups: the feed-forward's last product is not done again, others but once."""
        model, inputs = wan.model(num_layers=2, remat="full"), wan.sample(wan.SMALL, batch=1)
        graph, state = nnx.split(model)
        found = []
        for hidden_bytes in (2**30, 1):
            monkeypatch.setattr(layers, "HIDDEN_BYTES", hidden_bytes)
            step = jax.jit(jax.value_and_grad(lambda state: jnp.mean(nnx.merge(graph, state)(*inputs) ** 2)))
            dots = [
                [eqn.invars[0].aval.shape[axis] for axis in eqn.params["dimension_numbers"][0][0]]
                for eqn in equations(step.trace(state).jaxpr, "dot_general")
            ]
            found.append(([dots.count([width]) for width in (wan.SMALL.ffn_dim, wan.SMALL.dim)], *step(state)))
        (products, loss, grad), (fewer, again, others) = found
        assert fewer == [2, products[1]]
        assert products[0] == 3  # the last product of two passes, and the first one's gradient
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(grad), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("batch", [1, 2])
    def test_groups_of_frames_in_bfloat16(self, wan, monkeypatch, batch):
        """Gradients summed over groups are as near to float32's as those at once; one clip has gates in weights."""
        inputs = wan.sample(wan.SMALL, batch=batch)

        def gradient(hidden_bytes, dtype):
            monkeypatch.setattr(layers, "HIDDEN_BYTES", hidden_bytes)
            model = wan.model(remat="full", dtype=dtype, param_dtype=dtype)
            grad = jax.tree.leaves(nnx.jit(nnx.grad(lambda m: jnp.mean(m(*inputs) ** 2)))(model))
            return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in grad])

        exact = gradient(2**30, "float32")
        at_once, by_groups = (np.linalg.norm(gradient(size, "bfloat16") - exact) for size in (2**30, 1))
        assert at_once != by_groups
        assert by_groups < 1.25 * at_once < 0.1 * np.linalg.norm(exact)

    @pytest.mark.slow
    def test_groups_of_frames_save_memory(self, monkeypatch):
        """The compiled gradient of a wide feed-forward needs much less memory by groups than at once."""
        config = dataclasses.replace(wan_config("tiny"), dim=96, ffn_dim=3072, num_layers=2, remat="full")
        graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
        shapes = (1, 8, 16, 16, 16), (1,), (1, 8, 32)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        hidden = 8 * 8 * 8 * config.ffn_dim * 4

        def temporaries(hidden_bytes):
            monkeypatch.setattr(layers, "HIDDEN_BYTES", hidden_bytes)
            loss = lambda state, *inputs: jnp.mean(nnx.merge(graph, state)(*inputs) ** 2)  # noqa: E731
            return there(jax.jit(jax.grad(loss)).lower(state, *inputs).compile().memory_analysis()).temp_size_in_bytes

        assert temporaries(hidden) - temporaries(hidden / 8) > 1.5 * hidden

    @pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
    def test_gradients_reach_everything(self, wan, dtype):
        model = wan.model(dtype=dtype, attention=MonarchAttention(tile=(3, 2, 6)))
        inputs = wan.sample(wan.SMALL)
        grad = nnx.jit(nnx.grad(lambda m: jnp.mean(m(*inputs) ** 2)))(model)
        for path, leaf in nnx.to_flat_state(grad):
            value = leaf[...]
            assert np.isfinite(value).all(), path
            assert np.abs(value).max() > 0 or path[-2:] == ("k", "bias"), path  # softmax ignores a shift of keys

    def test_model_float64(self, wan):
        with jax.enable_x64(True):
            model = wan.model(dtype="float64", param_dtype="float64")
            assert model.blocks.ffn.fc1.kernel.dtype == np.float64
            latents, timesteps, text = wan.sample(wan.SMALL)
            out = call(model, latents.astype(jnp.float64), timesteps, text)
        assert out.dtype == np.float64

    def test_layers_are_scanned_like_a_loop(self, wan):
        model, inputs = wan.model(), wan.sample(wan.SMALL)
        per_layer = tuple(DenseAttention(implementation=name) for name in ("xla", None, "xla"))
        loop = model.with_attention(per_layer)  # three runs of one layer
        np.testing.assert_allclose(call(loop, *inputs), call(model, *inputs), atol=1e-5)


class TestAttention:
    def test_swap_keeps_parameters(self, wan):
        model, inputs = wan.model(), wan.sample(wan.SMALL)
        monarch = model.with_attention(MonarchAttention(tile=(1, 1, 1)))
        a, b = dict(nnx.to_flat_state(nnx.state(model))), dict(nnx.to_flat_state(nnx.state(monarch)))
        assert a.keys() == b.keys()
        assert all(a[path][...] is b[path][...] for path in a)
        assert model.config.attention == DenseAttention()
        dense = call(model, *inputs)
        np.testing.assert_allclose(call(monarch, *inputs), dense, atol=1e-4)
        tiled = call(model.with_attention(MonarchAttention(tile=(3, 4, 6))), *inputs)
        assert np.abs(tiled - dense).max() > 1e-2

    def test_per_layer(self, wan):
        model, inputs = wan.model(), wan.sample(wan.SMALL)
        tiled = MonarchAttention(tile=(3, 4, 6))
        exact = MonarchAttention(tile=(1, 1, 1))
        first_dense = call(model.with_attention((DenseAttention(), tiled, tiled)), *inputs)
        np.testing.assert_allclose(call(model.with_attention((exact, tiled, tiled)), *inputs), first_dense, atol=1e-4)
        assert np.abs(call(model.with_attention(tiled), *inputs) - first_dense).max() > 1e-3

    def test_attention_inputs(self, wan):
        model, inputs = wan.model(), wan.sample(wan.SMALL)
        grid = (6, 4, 6)
        query, key, value, got = jax.jit(lambda *x: model.attention_inputs(*x, layer=2))(*inputs)
        assert got == grid
        assert query.shape == key.shape == value.shape == (2, 144, 2, 24)

        # The last block with what these give in place of its self-attention ends in the model's own output.
        @nnx.jit
        def rebuilt(model):
            out = jax.nn.dot_product_attention(query, key, value)
            tokens, context = model.embed_latents(*inputs[:2]), model.embed_context(inputs[2])
            x = model.run_blocks(tokens, context, grid, layers=2)
            graph, state = nnx.split(model.blocks)
            block = nnx.merge(graph, jax.tree.map(lambda a: a[2], state))
            keys_values = block.cross_attn.keys_values(*context)
            rope = rope_table(grid, model.config.head_dim)
            x = block(x, tokens.time_projection, rope, keys_values, lambda *_: out)
            return model.unpatchify(model.head(x, tokens.time), grid)

        np.testing.assert_allclose(rebuilt(model), call(model, *inputs), atol=1e-4)

    def test_block_causal_dense_is_a_mask(self, wan):
        """Frames of later blocks do not reach earlier ones; the first block alone is a bidirectional model."""
        model = wan.model(causal_block=3)
        latents, timesteps, text = wan.sample(wan.SMALL, per_frame=True)
        out = call(model, latents, timesteps, text)
        changed = call(model, latents.at[:, 3:].add(1.0), timesteps, text)
        np.testing.assert_allclose(changed[:, :3], out[:, :3], atol=1e-5)
        assert np.abs(changed[:, 3:] - out[:, 3:]).max() > 1e-2
        bidirectional = model.with_config(causal_block=None)
        first = call(bidirectional, latents[:, :3], timesteps[:, :3], text)
        np.testing.assert_allclose(first, out[:, :3], atol=1e-5)
        assert np.abs(call(bidirectional, latents, timesteps, text) - out).max() > 1e-2

    @pytest.mark.parametrize("tile", [(1, 1, 1), (3, 1, 1)])
    def test_block_causal_monarch_equals_dense(self, wan, tile):
        # one row and one column, or one column: exact only for (1, 1, 1)
        inputs = wan.sample(wan.SMALL, per_frame=True)
        dense = call(wan.model(causal_block=3), *inputs)
        monarch = call(wan.model(causal_block=3, attention=MonarchAttention(tile=tile)), *inputs)
        if tile == (1, 1, 1):
            np.testing.assert_allclose(monarch, dense, atol=1e-4)
        else:
            assert np.isfinite(monarch).all()


class TestBadInput:
    def test_unknown_preset(self):
        message = r"preset='wan2.1-t2v-1.3' is unknown; did you mean 'wan2.1-t2v-1.3b'\?.*'tiny'"
        with pytest.raises(ValueError, match=message):
            wan_config("wan2.1-t2v-1.3")

    def test_unknown_field(self):
        with pytest.raises(ValueError, match=r"'num_head' is not a field of WanConfig; did you mean 'num_heads'\?"):
            wan_config("tiny", num_head=3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_heads": 5}, "dim=96 is not a multiple of num_heads=5"),
            ({"num_heads": 32}, "heads of 3 channels"),
            ({"num_layers": 0}, "num_layers=0 is not a positive integer"),
            ({"model_type": "t2i"}, "model_type='t2i' is unknown"),
            ({"dtype": "int8"}, "dtype='int8' is unknown"),
            ({"remat": "some"}, "remat='some' is unknown"),
            ({"attention": (DenseAttention(),) * 3}, "3 settings for num_layers=4"),
            ({"causal_block": 3, "attention": MonarchAttention(tile=(2, 1, 1))}, "causal_block=3 .* 2 frames"),
        ],
    )
    def test_config(self, changes, message):
        with pytest.raises(ValueError, match=message):
            wan_config("tiny", **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tile": (0, 1, 1)}, r"tile\[0\]=0 is not a positive integer"),
            ({"blocks": "hf,w"}, "blocks='hf,w'"),
            ({"num_iters": 0}, "num_iters=0"),
        ],
    )
    def test_monarch_setting(self, changes, message):
        with pytest.raises(ValueError, match=message):
            MonarchAttention(**changes)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((1, 3, 5, 8, 16), (1,), (1, 4, 32)), r"height=5 is not a multiple of the patch's 2 .* 4 or 6"),
            (((1, 3, 8, 7, 16), (1,), (1, 4, 32)), r"width=7 .* 6 or 8"),
            (((1, 3, 8, 8, 12), (1,), (1, 4, 32)), "12 channels .* takes 16"),
            (((1, 3, 8, 8, 16), (1,), (1, 9, 32)), "text has 9 rows, the model takes at most 8"),
            (((1, 3, 8, 8, 16), (1,), (1, 8, 31)), r"text has shape \(1, 8, 31\)"),
            (((1, 3, 8, 8, 16), (1, 2), (1, 8, 32)), r"timesteps have shape \(1, 2\)"),
            (((1, 4, 8, 8, 16), (1,), (1, 8, 32)), r"tile=\(3, 4, 4\): 3 does not divide the 4 frames"),
        ],
    )
    def test_inputs(self, shapes, message):
        config = wan_config("tiny", attention=MonarchAttention(tile=(3, 4, 4)))
        model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))  # no arrays: nothing can be computed
        with pytest.raises(ValueError, match=message):
            model(*(jnp.zeros(shape) for shape in shapes))

    def test_image_and_model_type(self, wan):
        inputs = wan.sample(wan.SMALL)
        with pytest.raises(ValueError, match="image was given to a t2v model"):
            wan.model()(*inputs, jnp.zeros((2, 3, 1280)))
        with pytest.raises(ValueError, match="image is None; an i2v model"):
            wan.model(model_type="i2v", image_dim=8)(*inputs)

    def test_cudnn_needs_half_precision(self, wan):
        with pytest.raises(ValueError, match="implementation='cudnn' needs bfloat16 or float16"):
            wan.model(attention=DenseAttention(implementation="cudnn"))(*wan.sample(wan.SMALL))

    def test_with_config_refuses_sizes(self, wan):
        with pytest.raises(ValueError, match="'dim' cannot be changed on a built model"):
            wan.model().with_config(dim=64)


def test_config_is_hashable():
    config = wan_config("tiny", attention=(MonarchAttention(),) * 4)
    assert hash(config) == hash(dataclasses.replace(config))
    assert config == wan_config("tiny", attention=(MonarchAttention(),) * 4)
