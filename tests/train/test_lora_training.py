"""LoRAs that are trained: what trains, what is saved, what is made of it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.generate.loras import open_loras, run_lora
from monarchrt.models.generate.runs import read_run
from monarchrt.models.lora import merged
from monarchrt.models.lora.layers import Adapter, LoRALinear, folded, layer_names, with_adapter
from monarchrt.models.wan import wan_config
from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.train.cli import main
from monarchrt.train.cli.roles import parse_roles
from monarchrt.train.config import ModelConfig, OptimizerConfig, TrainConfig, role_defaults, train_defaults
from monarchrt.train.export import run_model
from monarchrt.train.model import build_model
from monarchrt.train.networks import Networks
from monarchrt.train.objectives.registry import make_objective, settings_class
from monarchrt.train.sharding import Placement
from monarchrt.train.state import (
    SameAs,
    create_role,
    create_state,
    from_arrays,
    make_training,
    parameter_names,
    to_arrays,
)
from tests.parameters import flat
from tests.untyped import there, untyped

from .conftest import history

LORA = ["--lora-rank", "2", "--lora-alpha", "6", "--precision", "bf16", "--learning-rate", "1e-2", "--ema-decay", "0.5"]


def command(*words):
    return main([str(word) for word in words])


def about(folder, step):
    return json.loads((folder / "checkpoints" / str(step) / "about" / "metadata").read_text())


class TestLayers:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_layer(self, dtype):
        linear = nnx.Linear(5, 3, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        layer = LoRALinear(linear, rank=2, alpha=6.0, rngs=nnx.Rngs(1))
        x = jax.random.normal(jax.random.key(0), (4, 5))
        np.testing.assert_array_equal(layer(x), linear(x))  # B is zero
        assert layer.lora_a[...].dtype == layer.lora_b[...].dtype == jnp.float32
        assert 0.5 * 5**-0.5 < np.abs(layer.lora_a[...]).max() <= 5**-0.5
        layer.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 3))
        a, b, w = (np.asarray(v[...], np.float64) for v in (layer.lora_a, layer.lora_b, layer.kernel))
        wanted = np.asarray(x) @ (w + 3 * a @ b) + np.asarray(there(layer.bias)[...], np.float64)
        tolerance = 1e-6 if dtype == "float32" else 0.1
        np.testing.assert_allclose(np.asarray(layer(x), np.float64), wanted, atol=tolerance)
        assert layer(x).dtype == dtype

    def test_which(self):
        config = wan_config("tiny", num_layers=2)
        names = layer_names(config)
        assert len(names) == 10
        assert names["blocks.ffn.fc2"] == ["blocks.0.ffn.2", "blocks.1.ffn.2"]
        assert list(layer_names(config, ["blocks.*.q", "head"])) == [
            "head.proj",
            "blocks.self_attn.q",
            "blocks.cross_attn.q",
        ]
        with pytest.raises(ValueError, match="lora_layers has 'attn', which matches no layer; choices: text_embedding"):
            layer_names(config, ["attn"])

    def test_folded_is_what_a_file_merges(self, tmp_path):
        """And a model with a LoRA is not written as if it had none."""
        sizes = ("num_layers=2", "dim=24", "num_heads=2", "ffn_dim=32")
        model = build_model(ModelConfig(overrides=sizes, attention="dense"), channels=4, seed=0)
        before = flat(model)
        adapted = with_adapter(model, Adapter(rank=3, alpha=6.0, layers=("ffn", "time_projection")), rngs=nnx.Rngs(1))
        layer = untyped(adapted.blocks.ffn.fc1)
        layer.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 3, 32))
        found = flat(folded(adapted))
        a, b = (np.asarray(x[...]) for x in (layer.lora_a, layer.lora_b))
        np.testing.assert_allclose(
            found["blocks.ffn.fc1.kernel"], before["blocks.ffn.fc1.kernel"] + 2 * a @ b, atol=1e-6
        )
        assert {name for name in found if not np.array_equal(found[name], before[name])} == {"blocks.ffn.fc1.kernel"}
        assert flat(model).keys() == before.keys()
        with pytest.raises(ValueError, match=r"no names for: .*lora_a; .*; those of a LoRA are merged by .*folded"):
            save_checkpoint(adapted, tmp_path / "a")


@pytest.fixture(scope="module")
def trained(baseline, arguments, tmp_path_factory):
    """A LoRA of the run of the other tests: four steps."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert (
        command(*[*arguments, "--folder", folder, "--init-from", baseline, "--steps", "4", *LORA, "--eval-every", "9"])
        == 0
    )
    return folder


class TestRun:
    def test_only_the_matrices_train_and_are_saved(self, trained, baseline):
        assert about(trained, 0)["arrays"].keys() == about(trained, 4)["arrays"].keys()
        parts = {"params", "average", "optimizer.1.0.mu", "optimizer.1.0.nu"}
        kept = [name for name in about(trained, 4)["arrays"] if name.endswith((".lora_a", ".lora_b"))]
        assert len(kept) == len(parts) * 20
        assert {name.removeprefix("roles.student.").split(".blocks.")[0] for name in kept} == parts
        others = set(about(trained, 4)["arrays"]) - set(kept)
        assert all(about(trained, 4)["arrays"][name]["shape"] in ([], [2]) for name in others)  # counters, the key
        assert (
            about(trained, 4)["identity"]["student.parameters"] == about(trained, 0)["identity"]["student.parameters"]
        )

    @pytest.mark.slow
    def test_resumed_bit_for_bit(self, trained, baseline, arguments, tmp_path):
        folder = tmp_path / "run"
        assert command(*arguments, "--folder", folder, "--init-from", baseline, "--steps", "2", *LORA) == 0
        assert command("train", "--folder", folder, "--resume", "--steps", "4") == 0
        assert about(folder, 4)["arrays"] == about(trained, 4)["arrays"]  # checksums
        steps = [record for record in history(trained) if "loss" in record]
        assert [record for record in history(folder) if "loss" in record] == steps

    def test_exports(self, trained, baseline, tmp_path, capsys):
        base = run_model(baseline)
        lora = run_lora(read_run(trained))
        assert set(lora.ranks.values()) == {2}
        assert set(lora.alphas.values()) == {6.0}
        wanted = flat(merged(base, open_loras([str(trained)], report=pytest.fail)))
        assert np.abs(wanted["blocks.ffn.fc1.kernel"] - flat(base)["blocks.ffn.fc1.kernel"]).max() > 1e-4
        for to in ("official", "diffusers", "musubi"):
            file = tmp_path / f"{to}.safetensors"
            assert command("convert", trained, file, "--to", to) == 0
            found = flat(merged(base, open_loras([str(file)], report=pytest.fail)))
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
        assert command("inspect", trained) == 0
        assert "trains a LoRA of rank 2, alpha 6" in capsys.readouterr().out

    def test_is_no_network(self, trained, tmp_path, capsys):
        for words, message in (
            (["generate", "--checkpoint", trained, "--out", tmp_path / "a.mp4"], f"NETWORK --lora {trained}`"),
            (["convert", trained, tmp_path / "a.safetensors", "--to", "orbax"], "choose from official, diffusers"),
        ):
            assert command(*words) == 2
            assert message in capsys.readouterr().err

    def test_what_does_not_fit(self, trained, baseline, arguments, tmp_path, capsys):
        new = [*arguments, "--folder", tmp_path / "run"]
        resume = ["train", "--folder", trained, "--resume", "--steps", "6"]
        for words, message in (
            ([*new, "--lora-rank", "2"], "the student has no weights that a LoRA could change; give --init-from"),
            ([*new, "--lora-alpha", "2"], "lora_alpha is given, but there is no LoRA; give lora_rank too"),
            ([*new, "--lora-rank", "0"], "lora_rank is 0; it must be at least 1"),
            (
                [*new, "--init-from", baseline, "--lora-rank", "25"],
                "lora_rank is 25, larger than blocks.self_attn.q of 24",
            ),
            ([*new, "--init-from", baseline, "--lora-rank", "2", "--lora-layers", "up"], "lora_layers has 'up'"),
            (
                [*new, "--init-from", baseline, "--lora-rank", "2", "--attention", "sla"],
                "sla has parameters of its own",
            ),
            ([*new, "--init-from", baseline, *LORA, "--trainable", "head.proj.kernel"], "no parameter of the LoRA"),
            ([*resume, "--lora-rank", "3"], "cannot resume: lora_rank is 3, but the checkpoint of step 4"),
        ):
            assert command(*words) == 2, words
            error = capsys.readouterr().err.splitlines()[-1]
            assert message in error
            assert error.startswith("error: ")


class TestRoles:
    def networks(self, objective, origins, loras, precision="fp32"):
        """Shapes alone: nothing is computed or read."""
        settings = settings_class(objective)()
        defaults = train_defaults(settings_class(objective))
        model = ModelConfig(overrides=("num_layers=1", "dim=24", "num_heads=2", "ffn_dim=16"), attention="dense")
        roles = {}
        for name in settings.roles:
            role = role_defaults(settings, name)
            values = {"model": model, "init_from": origins.get(name), "precision": precision}
            if role.optimizer is not None:
                values["optimizer"] = OptimizerConfig(lora_rank=loras.get(name))
            roles[name] = type(role)(**untyped({"optimizer": None} | values))
        student = roles.pop("student")
        run = type(defaults.run)(init_from=student.init_from, precision=untyped(precision), batch=1)
        config = TrainConfig(
            objective=settings, model=model, optimizer=student.optimizer, roles=roles, run=run
        )  # fmt: skip
        placement = Placement(batch=1, accumulation=1)
        made = Networks(config, make_objective(settings), channels=4, placement=placement, models={})
        return made.template.roles

    def test_one_network_under_all(self):
        roles = self.networks("dmd", {"teacher": Path("base")}, {"student": 4, "critic": 2}, precision="bf16")
        assert {name: type(role.frozen) is SameAs for name, role in roles.items()} == {
            **{"student": False, "critic": True, "teacher": True}
        }
        assert {leaf.dtype.name for leaf in jax.tree.leaves(roles["student"].frozen)} == {"bfloat16"}
        for name in ("student", "critic"):
            assert all(".lora_" in param for param in parameter_names(roles[name].params))
            assert {leaf.dtype.name for leaf in jax.tree.leaves(roles[name].params)} == {"float32"}

    def test_what_differs_is_held_apart(self):
        roles = self.networks("self-forcing", {"teacher": Path("a"), "critic": Path("b")}, {"student": 4, "critic": 2})
        shared = {name: role.frozen for name, role in roles.items() if isinstance(role.frozen, SameAs)}
        assert shared == {"teacher": SameAs("student")}
        roles = self.networks("dmd", {"teacher": Path("a")}, {"student": 4})
        shared = {name: role.frozen for name, role in roles.items() if isinstance(role.frozen, SameAs)}
        assert shared == {"teacher": SameAs("student")}
        assert jax.tree.leaves(roles["critic"].params)[0].dtype == jnp.float32

    def test_what_is_saved(self):
        """What stands under a LoRA is not, and is the template's again."""
        kept, left = {"a": jnp.ones(2)}, {"b": jnp.zeros(3)}
        training = make_training(OptimizerConfig(lora_rank=1), updates=1)
        state = create_state({"student": create_role(kept, left, training)}, seed=0)
        arrays = to_arrays(state)
        assert not any("frozen" in name for name in arrays)
        again = from_arrays(jax.eval_shape(lambda: state), arrays)
        assert again.roles["student"].frozen["b"].shape == (3,)
        np.testing.assert_array_equal(from_arrays(state, arrays).roles["student"].params["a"], kept["a"])
        plain = create_state({"student": create_role(kept, left, make_training(OptimizerConfig(), updates=1))}, seed=0)
        assert any("frozen" in name for name in to_arrays(plain))

    def test_options(self):
        config = parse_roles(
            [
                "--objective",
                "dmd",
                "--student.lora-rank",
                "4",
                "--critic.lora.rank",
                "2",
                "--critic.lora.layers",
                "q",
                "v",
            ],
            default=TrainConfig(),
        )
        assert (config.optimizer.lora_rank, config.trained("critic").lora_rank) == (4, 2)
        assert config.trained("critic").lora_layers == ("q", "v")
        with pytest.raises(
            UserError, match=r"--lora-rank is an option of each role of dmd; give --student.lora-rank or"
        ):
            parse_roles(["--objective", "dmd", "--lora-rank", "4"], default=TrainConfig())

    @pytest.mark.slow
    @pytest.mark.parametrize("objective", ["dmd", "self-forcing"])
    def test_distillation(self, baseline, arguments, tmp_path, objective):
        """Three networks on the weights of one, resumed; the same as with a copy of them for each."""
        import shutil

        for name in ("a", "b"):
            shutil.copytree(baseline, tmp_path / name)
        overrides = arguments[arguments.index("--overrides") + 1 : arguments.index("--frames")]
        rest = arguments[arguments.index("--frames") :]
        given = [
            "--objective",
            objective,
            *arguments[1:3],
            *rest,
            "--student.lora-rank",
            "2",
            "--critic.lora-rank",
            "3",
        ]
        given += ["--student.attention", "dense", "--student.learning-rate", "1e-2", "--critic.learning-rate", "1e-2"]
        given += [] if objective == "dmd" else ["--block", "1"]
        for role in ("student", "critic", "teacher"):
            given += [f"--{role}.overrides", *overrides]
        one = ["--student.init-from", baseline, "--critic.init-from", baseline, "--teacher.init-from", baseline]
        apart = [
            "--student.init-from",
            tmp_path / "a",
            "--critic.init-from",
            tmp_path / "b",
            "--teacher.init-from",
            baseline,
        ]
        assert command("train", *given, *one, "--folder", tmp_path / "one", "--steps", "6") == 0
        assert command("train", *given, *apart, "--folder", tmp_path / "apart", "--steps", "6") == 0
        assert command("train", *given, *one, "--folder", tmp_path / "resumed", "--steps", "4") == 0
        assert command("train", "--folder", tmp_path / "resumed", "--resume", "--steps", "6") == 0
        arrays = {name: about(tmp_path / name, 6)["arrays"] for name in ("one", "apart", "resumed")}
        assert arrays["one"] == arrays["resumed"]
        assert arrays["one"] == arrays["apart"]
