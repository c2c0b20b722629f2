"""A kind of attention with parameters of its own, which the tests alone know, through all that models go through."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.attention.notation import parse
from monarchrt.models.generate.config import from_stored
from monarchrt.models.media.writer import read_settings
from monarchrt.models.sampling import Rollout, autoregressive
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.causal import cached_forward, init_cache
from monarchrt.models.wan.checkpoints import convert_checkpoint, load_checkpoint
from monarchrt.train import cli
from monarchrt.train.export import run_model
from monarchrt.train.logs import read_log
from monarchrt.train.run_folder import read_config
from tests.models import conftest as wan
from tests.models.attention.gated import Gated
from tests.parameters import flat

NETWORK = ["--overrides", "num_layers=2", "dim=24", "num_heads=2", "ffn_dim=48", "causal_block=1"]
DATA = ["--frames", "3", "--height", "16", "--width", "32", "--patch", "4", "--gap", "1", "--held-out", "0.3"]
RUN = [
    "--batch",
    "2",
    "--eval-windows",
    "1",
    "--eval-timesteps",
    "2",
    "--checkpoint-every",
    "2",
    "--frames-per-level",
    "1",
]
GATED = ["--attention", "gated(strength=2.0)"]


def train(clip, folder, *options):
    return cli.main(["train", "--video", str(clip), *NETWORK, *DATA, *RUN, "--folder", str(folder), *options])


def own(model):
    return {name: leaf for name, leaf in flat(model).items() if ".kinds.gated." in name}


@pytest.fixture(scope="module")
def run(clip, tmp_path_factory):
    """A run of two steps that was resumed for two more."""
    folder = tmp_path_factory.mktemp("own") / "run"
    assert train(clip, folder, *GATED, "--steps", "2") == 0
    assert cli.main(["train", "--folder", str(folder), "--resume", "--steps", "4"]) == 0
    return folder


def trained(run):
    return run_model(run, read_config(run))


class TestTraining:
    def test_its_parameters_are_trained(self, run):
        parameters = own(trained(run))
        assert set(parameters) == {
            f"blocks.self_attn.kinds.gated.{name}" for name in ("scale", "linear.kernel", "linear.bias")
        }
        scale = parameters["blocks.self_attn.kinds.gated.scale"]
        assert scale.shape == (2, 2)  # layers, heads
        assert (np.abs(scale) > 1e-5).all()  # from zero
        assert json.loads((run / "config.json").read_text())["model"]["attention"] == "gated(strength=2.0)"

    def test_a_resume_repeats_the_uninterrupted_run(self, run, clip, tmp_path):
        assert train(clip, tmp_path / "whole", *GATED, "--steps", "4") == 0
        expected, found = trained(tmp_path / "whole"), trained(run)
        for name, leaf in flat(expected).items():
            np.testing.assert_array_equal(flat(found)[name], leaf, err_msg=name)
        losses = [[r["loss"] for r in read_log(x) if "loss" in r] for x in (run, tmp_path / "whole")]
        assert losses[0] == losses[1]

    def test_it_is_not_resumed_as_another(self, run, capsys):
        command = ["train", "--folder", str(run), "--resume", "--steps", "5"]
        assert cli.main([*command, "--attention", "gated(strength=3.0)"]) == 2
        assert "attention is gated(strength=3.0), but the checkpoint of step 4" in capsys.readouterr().err

    @pytest.mark.slow
    def test_a_dense_model_is_finetuned_with_it_and_back(self, run, clip, tmp_path):
        """Parameters of its own begin fresh where the origin has none, and are left behind where the run has none."""
        assert train(clip, tmp_path / "dense", "--attention", "dense", "--steps", "2") == 0
        start = ["--init-from", str(tmp_path / "dense"), "--steps", "2", "--learning-rate", "1e-9"]
        assert train(clip, tmp_path / "gated", *GATED, *start) == 0
        before, after = flat(trained(tmp_path / "dense")), flat(trained(tmp_path / "gated"))
        assert set(after) - set(before) == set(own(trained(run)))
        for name, leaf in before.items():
            np.testing.assert_allclose(after[name], leaf, atol=1e-6, err_msg=name)
        start = ["--init-from", str(run), "--steps", "2", "--learning-rate", "1e-9"]
        assert train(clip, tmp_path / "back", "--attention", "dense", *start) == 0
        assert not own(trained(tmp_path / "back"))


class TestCheckpoints:
    @pytest.mark.parametrize("format", ["official", "diffusers", "orbax"])
    def test_it_travels(self, run, tmp_path, capsys, format):
        assert cli.main(["convert", str(run), str(tmp_path / "a"), "--to", format]) == 0
        assert cli.main(["inspect", str(tmp_path / "a")]) == 0
        assert "gated(strength=2.0), causal_block=1" in capsys.readouterr().out
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to="official")
        expected = flat(trained(run))
        for name in "ab":
            loaded = load_checkpoint(tmp_path / name)
            assert loaded.config.attention == Gated(strength=2.0)
            found = flat(loaded)
            assert set(found) == set(expected)
            for key, leaf in expected.items():
                np.testing.assert_array_equal(found[key], leaf, err_msg=key)

    def test_another_attention_leaves_it_behind(self, run, tmp_path):
        assert cli.main(["convert", str(run), str(tmp_path / "a")]) == 0
        with pytest.raises(
            ValueError, match=r"was trained with gated\(strength=2.0\), causal_block=1; requested was dense"
        ):
            load_checkpoint(tmp_path / "a", attention=parse("dense"))
        dense = load_checkpoint(tmp_path / "a", attention=parse("dense"), override=True)
        assert not own(dense)
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to="official", attention=parse("dense"), override=True)
        assert flat(load_checkpoint(tmp_path / "b")).keys() == flat(dense).keys()
        again = load_checkpoint(tmp_path / "b", attention=Gated(), override=True)
        assert own(again).keys() == own(trained(run)).keys()


class TestGeneration:
    def test_the_command_line(self, run, tmp_path, capsys):
        out = tmp_path / "a.mp4"
        assert cli.main(["generate", "--checkpoint", str(run), "--out", str(out), "--steps", "1", "--quiet"]) == 0
        assert "attention: gated(strength=2.0), 66.7% of the map, 100.0% of what is visible" in capsys.readouterr().err
        mixed = "first_blocks(1, gated, gated(strength=2.0))"
        again = ["generate", "--from", str(out), "--attention", mixed, "--out", str(tmp_path / "b.mp4"), "--quiet"]
        assert cli.main([*again, "--checkpoint", str(run)]) == 0
        assert from_stored(read_settings(tmp_path / "b.mp4"), source=out).attention == mixed

    @pytest.mark.parametrize("in_place", [False, True])
    def test_its_cache_gives_the_numbers_of_the_whole_clip(self, in_place):
        model = wan.random_model(dataclasses.replace(wan.SMALL, attention=Gated(), causal_block=1))
        latents = jax.random.normal(jax.random.key(0), (1, 3, 4, 8, model.config.in_channels))
        times, text = jnp.full((1, 3), 300.0), jnp.ones((1, 1, model.config.text_dim))
        expected = nnx.jit(lambda m, *x: m(*x))(model, latents, times, text)
        step = nnx.jit(lambda m, x, t, cache: cached_forward(m, x, t, cache, in_place=in_place))
        cache, parts = init_cache(model, text, frames=3, height=4, width=8), []
        for frame in range(3):
            part = slice(frame, frame + 1)
            out, cache = step(model, latents[:, part], times[:, part], cache)
            parts.append(out)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, atol=1e-5)
        without = nnx.jit(lambda m, *x: m(*x))(model.with_attention(parse("dense")), latents, times, text)
        assert np.abs(without - expected).max() > 1e-2

    def test_a_converted_model(self, run, tmp_path):
        assert cli.main(["convert", str(run), str(tmp_path / "a")]) == 0
        first, second = [
            np.concatenate(
                [
                    np.asarray(part)
                    for part in autoregressive(
                        model,
                        jnp.zeros((1, 1, model.config.text_dim)),
                        frames=3,
                        height=4,
                        width=8,
                        key=jax.random.key(0),
                        rollout=Rollout(block=1, steps=2),
                    )
                ],
                axis=1,
            )
            for model in (trained(run), load_checkpoint(tmp_path / "a"))
        ]
        np.testing.assert_array_equal(first, second)


class TestSwapping:
    def test_parameters_follow_the_kind(self):
        config = wan_config("tiny", num_layers=2)
        model = WanModel(config, rngs=nnx.Rngs(0))
        gated = model.with_attention(Gated(), rngs=nnx.Rngs(7))
        shared = flat(model)
        assert flat(gated).keys() == shared.keys() | own(gated).keys()
        for name, leaf in shared.items():
            assert flat(gated)[name] is leaf or (flat(gated)[name] == leaf).all()
        for attention in (
            "gated(strength=3.0)",
            "first_layers(1, dense, gated)",
            "first_steps(1, gated, gated(strength=2))",
        ):
            kept = gated.with_attention(parse(attention))
            for name, leaf in own(gated).items():
                np.testing.assert_array_equal(own(kept)[name], leaf)
        assert not own(gated.with_attention(parse("dense")))
        fresh = gated.with_attention(parse("dense")).with_attention(Gated(), rngs=nnx.Rngs(8))
        name = "blocks.self_attn.kinds.gated.linear.kernel"
        assert np.abs(own(fresh)[name] - own(gated)[name]).max() > 1e-3
        assert gated.config.attention == Gated()
        assert own(gated)

    def test_all_else_begins_the_same(self):
        dense = WanModel(wan_config("tiny", num_layers=2), rngs=nnx.Rngs(0))
        gated = WanModel(wan_config("tiny", num_layers=2, attention=Gated()), rngs=nnx.Rngs(0))
        for name, leaf in flat(dense).items():
            np.testing.assert_array_equal(flat(gated)[name], leaf)

    def test_a_model_without_them_says_so(self):
        model = nnx.eval_shape(lambda: WanModel(wan_config("tiny", num_layers=1), rngs=nnx.Rngs(0)))
        abstract = model.with_attention(Gated())
        names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(abstract, nnx.Param))]
        assert "blocks.self_attn.kinds.gated.scale" in names
        with pytest.raises(
            ValueError, match=r"gated: the model has no parameters of its own for it; use model.with_att"
        ):
            Gated()(*jnp.ones((3, 1, 8, 2, 4)), grid=(2, 2, 2))
