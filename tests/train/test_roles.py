"""An objective with three networks, which no other file knows: two train, one every second step, and a frozen third."""

import dataclasses
import json
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.orbax_arrays import read_arrays
from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.errors import NonFiniteError, UserError
from monarchrt.models.umt5 import save_embeddings
from monarchrt.models.wan.checkpoints import load_checkpoint
from monarchrt.train.cli import main
from monarchrt.train.cli.train import parse_train
from monarchrt.train.config import TrainConfig, from_dict, role_defaults, to_dict
from monarchrt.train.loop import train
from monarchrt.train.model import build_model
from monarchrt.train.networks import Networks
from monarchrt.train.objectives.base import Objective
from monarchrt.train.objectives.registry import ObjectiveSettings, Role, register
from monarchrt.train.objectives.settings import DMDConfig
from tests.untyped import there, untyped

from .conftest import DATA, history


@dataclass(frozen=True, kw_only=True)
class PairConfig(ObjectiveSettings):
    """A student is drawn to a teacher and away from what a critic says of it; the critic learns the student's flow."""

    name: ClassVar[str] = "pair"
    roles: ClassVar = {
        "student": Role(defaults={"ema_decay": 0.5, "ema_start": 3}),
        "critic": Role(own_batch=True, defaults={"attention": "dense", "learning_rate": 3e-3, "ema_decay": None}),
        "teacher": Role(trains=False, random=False, defaults={"attention": "dense", "precision": "bf16"}),
    }

    pull: float = 0.1
    """How much the critic counts."""


class Pair(Objective):
    settings: PairConfig

    def due(self, step):
        return ("student", "critic") if step % 2 == 0 else ("critic",)

    def draws(self, key, shapes):
        keys = jax.random.split(key, 2)
        return {
            role: self._draw(key, shapes.latents.shape) for role, key in zip(("student", "critic"), keys, strict=True)
        }

    def _draw(self, key, shape):
        one, two, three = jax.random.split(key, 3)
        sigma = jax.random.uniform(one, shape[:1])
        return {"sigma": sigma, "noise": jax.random.normal(two, shape), "exit": jax.random.randint(three, (), 1, 3)}

    def loss(self, role, networks, batch, draws):
        latents, text = map(jnp.asarray, batch)
        sigma = draws["sigma"][:, None, None, None, None]
        times = 1000 * draws["sigma"]
        noised = (1 - sigma) * latents + sigma * draws["noise"]
        made = noised - sigma * networks["student"](noised, times, text)
        if role == "critic":
            made = jax.lax.stop_gradient(made)
            guess = networks["critic"]((1 - sigma) * made + sigma * draws["noise"], times, text)
            return jnp.mean((guess - (draws["noise"] - made)) ** 2), {}
        aim = noised - sigma * networks["teacher"](noised, times, text)
        doubt = networks["critic"](made, times, text)
        loss = jnp.mean((made - aim) ** 2) / draws["exit"] + self.settings.pull * jnp.mean(doubt**2)
        return loss, {"exit": draws["exit"], "distance": jnp.mean(jnp.abs(made - aim))}


register(PairConfig, Pair)

STEPS = 10


@pytest.fixture(scope="module")
def command(clip, baseline):
    """The teacher is another run, wider than the student."""
    network = ["num_layers=1", "dim=24", "num_heads=2", "ffn_dim=32"]
    roles = [word for role in ("student", "critic") for word in (f"--{role}.overrides", *network)]
    options = ["--student.tile", "1", "2", "4", "--student.accumulation", "2", "--critic.learning-rate", "1e-3"]
    teacher = ["--teacher.init-from", str(baseline), "--teacher.overrides", *network[:3], "ffn_dim=48"]
    every = [
        "--batch",
        "2",
        "--steps",
        str(STEPS),
        "--checkpoint-every",
        "3",
        "--eval-every",
        "5",
        "--eval-windows",
        "3",
    ]
    return ["train", "--objective", "pair", "--video", str(clip), *DATA, *every, "--eval-timesteps", "2",
            *roles, *options, *teacher]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command, run, tmp_path_factory):
    """The run, uninterrupted."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    code, stderr = run([*command, "--folder", folder], before="import tests.train.test_roles")
    assert code == 0, stderr
    assert "critic: " in stderr
    return folder


def contents(folder: Path, step: int = STEPS) -> dict:
    about = json.loads((folder / f"checkpoints/{step}/about/metadata").read_text())
    return about["arrays"]


def arrays(folder: Path, prefix: str, step: int = STEPS) -> dict[str, np.ndarray]:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(value["shape"]), jnp.float32, sharding=place)
        for name, value in contents(folder, step).items()
        if name.startswith(prefix)
    }
    found = read_arrays(folder / f"checkpoints/{step}/state", wanted)
    return {name.removeprefix(prefix): np.asarray(value) for name, value in found.items()}


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(whole, command, start, run, tmp_path):
    seed = random.randrange(10**6)
    folder = tmp_path / "killed"
    options = [*command, "--folder", folder, "--resume"]
    log, lines = folder / "log.jsonl", random.Random(seed).randrange(1, STEPS)
    process = start(options, before="import tests.train.test_roles")
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            process.kill()
            break
        time.sleep(0.002)
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, (seed, stderr)
    # the settings, with the objective and its roles, come from the folder
    code, stderr = run(["train", "--folder", folder, "--resume"], before="import tests.train.test_roles")
    assert code == 0, (seed, stderr)
    assert "resuming" in stderr
    assert history(folder) == history(whole), seed
    assert contents(folder) == contents(whole), seed  # checksums of parameters, moments and averages


def test_the_log_is_by_role_and_the_schedule_is_kept(whole):
    records = [record for record in history(whole) if "critic/loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    of_student = {"student/loss", "student/grad_norm", "student/exit", "student/distance", "student/learning_rate"}
    for record in records:
        assert (of_student & set(record)) == (of_student if record["step"] % 2 == 0 else set())
        assert record["critic/learning_rate"] == pytest.approx(1e-3)
    measured = [record for record in history(whole) if "critic/held_out_loss" in record]
    assert [record["step"] for record in measured] == [5, STEPS]
    assert all(record["student/held_out_loss"] > 0 for record in measured)
    stored = contents(whole)
    assert {name.split(".")[1] for name in stored if name.startswith("roles.")} == {"student", "critic"}
    assert not any(name.startswith("roles.critic.average") for name in stored)


@pytest.mark.slow
def test_the_average_is_of_the_updates_from_its_start_on(command, whole, baseline, capsys, tmp_path):
    folder = tmp_path / "run"
    after = {}

    def keep(step, state):
        after[step] = jax.tree.map(np.array, (state.roles["student"].params, state.roles["student"].average))

    config = parse_train([*command[1:], "--folder", str(folder), "--steps", "6"])
    result = train(config, quiet=True, after_step=keep)
    assert int(result.state.roles["student"].updates) == 3
    assert int(result.state.roles["critic"].updates) == 6
    leaves = {step: [jax.tree.leaves(part) for part in parts] for step, parts in after.items()}
    for params, average in zip(*leaves[2], strict=True):  # before ema_start 3
        np.testing.assert_array_equal(params, average)
    for old, params, average in zip(leaves[2][1], *leaves[4], strict=True):
        np.testing.assert_allclose(average, 0.5 * old + 0.5 * params, rtol=1e-5, atol=1e-7)
    for one, other in zip(leaves[2][0], leaves[3][0], strict=True):  # not its step
        np.testing.assert_array_equal(one, other)
    # the frozen network is the other run's, in the precision asked for
    teacher = result.network("teacher")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(teacher))} == {jnp.dtype("bfloat16")}
    expected = arrays(baseline, "roles.student.average.", step=30)
    np.testing.assert_array_equal(teacher.head.proj.kernel[...], expected["head.proj.kernel"].astype(jnp.bfloat16))


def test_the_student_is_exported(whole, tmp_path, capsys):
    assert main(["convert", str(whole), str(tmp_path / "made")]) == 0
    model = load_checkpoint(tmp_path / "made")
    assert model.config.ffn_dim == 32
    average = arrays(whole, "roles.student.average.")
    np.testing.assert_array_equal(model.head.proj.kernel[...], average["head.proj.kernel"])
    np.testing.assert_array_equal(model.patch_embedding.kernel[...], average["patch_embedding.kernel"])


def refused(capsys, arguments) -> str:
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


class TestWhatDoesNotFit:
    def test_options_say_which_role(self, command, capsys):
        error = refused(capsys, [*command, "--learning-rate", "1e-3"])
        assert "--student.learning-rate or --critic.learning-rate" in error
        assert "--teacher" not in error
        error = refused(capsys, [*command, "--init-from", "a"])
        assert "--student.init-from or --critic.init-from or --teacher.init-from" in error
        assert "critic.accumulation is 3" in refused(capsys, [*command, "--critic.accumulation", "3"])
        error = refused(capsys, ["train", "--objective", "pear"])
        assert all(name in error.partition("choose from ")[2] for name in ("flow", "pair"))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--critic.lora-rank", "0"], "critic.lora_rank is 0; it must be at least 1"),
            (["--critic.lora.alpha", "2"], "critic.lora_alpha is given, but there is no LoRA"),
            (["--student.beta1=2", "--critic.beta1", "0.5"], "student.beta1 is 2.0; it must lie in"),
            (["--student.beta1", "0.5", "--critic.beta1", "2"], "critic.beta1 is 2.0; it must lie in"),
            (["--student.overrides", "layers"], "student.overrides has 'layers'; write name=value"),
            (["--teacher.preset", "huge"], "teacher.preset='huge' is unknown"),
            (["--critic.attention", "sparse"], "critic.attention='sparse': 'sparse' is not a kind"),
            (["--student.overrides", "num_layers=0"], "student: num_layers=0 is not a positive"),
            (["--critic.tile", "1", "3", "3"], "critic.tile=(1, 3, 3): 3 does not divide the 2 rows"),
        ],
    )
    def test_settings_name_their_role(self, command, capsys, tmp_path, words, message):
        if "--critic.tile" in words:
            words = ["--critic.attention", "monarch", *words]
        assert message in refused(capsys, [*command, *words, "--folder", tmp_path / "run"])

    def test_settings_in_a_file_do_too(self):
        values = to_dict(TrainConfig(objective=PairConfig()))
        for table, name in ((values, "student"), (values["roles"]["critic"], "critic")):
            table["optimizer"]["beta2"] = 3
            with pytest.raises(UserError, match=rf"^{name}\.beta2 is 3\.0"):
                from_dict(TrainConfig, values)
            table["optimizer"]["beta2"] = 0.5
        values = to_dict(TrainConfig())
        values["optimizer"]["beta2"] = 3
        with pytest.raises(UserError, match=r"^beta2 is 3\.0"):
            from_dict(TrainConfig, values)

    def test_a_role_without_weights(self, command, capsys, tmp_path):
        bare = command[: command.index("--teacher.init-from")]
        error = refused(capsys, [*bare, "--folder", tmp_path / "run"])
        assert "the teacher has no weights; give --teacher.init-from" in error
        assert not (tmp_path / "run").exists()

    def test_networks_that_see_other_text(self, command, capsys, tmp_path):
        options = ["--critic.overrides", "num_layers=1", "dim=24", "num_heads=2", "text_dim=16"]
        error = refused(capsys, [*command, *options, "--folder", tmp_path / "run"])
        assert "the critic takes text of width 16, the student of 32" in error

    @pytest.mark.parametrize(
        ("rows", "width", "negative", "said"),
        [
            (3, 64, None, "latents {data} has text of width 64, but the student takes 32; encode it"),
            (
                17,
                32,
                None,
                "latents {data} has text of 17 rows, but the student takes at most 16; encode it with --rows 16",
            ),
            (3, 32, (3, 64), "negative {negative} has text of width 64, but the student takes 32"),
            (3, 32, (17, 32), "negative {negative} has text of 17 rows, but the student takes at most 16"),
        ],
    )
    def test_texts_that_no_network_takes(self, wan_folder, capsys, tmp_path, rows, width, negative, said):
        """Of the data, or of the negative prompt."""
        data, file = tmp_path / "latents", tmp_path / "negative.safetensors"
        for number in range(2):
            arrays = {"latents": np.zeros((3, 4, 8, 16), np.float32), "text": np.ones((rows, width), np.float32)}
            write_arrays(data / f"{number}.safetensors", arrays, metadata={})
        words = ["--teacher.init-from", wan_folder / "transformer", "--held-out", "0.5", "--batch", "1", "--steps", "1"]
        for role in ("student", "critic", "teacher"):
            words += [f"--{role}.overrides", "num_layers=1", "text_len=16"]
        if negative is not None:
            save_embeddings(file, {"bad": np.ones(negative, np.float32)})
            words += ["--negative", file]
        error = refused(
            capsys, ["train", "--objective", "dmd", "--latents", data, "--folder", tmp_path / "run", *words]
        )
        assert said.format(data=data, negative=file) in error
        assert not (tmp_path / "run").exists()

    def test_a_teacher_of_another_network(self, command, capsys, tmp_path):
        options = ["--teacher.overrides", "num_layers=3", "dim=24", "num_heads=2", "ffn_dim=48"]
        error = refused(capsys, [*command, *options, "--folder", tmp_path / "run"])
        assert "is of another network: num_layers=1 (here: 3)" in error
        assert error.startswith("error: teacher.init_from ")

    def test_parameters_are_said_to_be_those_of_the_option_that_names_them(self):
        """A student that starts as the teacher was given none of its own."""
        objective = DMDConfig()
        roles = {name: role_defaults(objective, name) for name in ("critic", "teacher")}
        roles["teacher"] = dataclasses.replace(roles["teacher"], init_from=Path("a is b"))
        fake: Any = SimpleNamespace(_config=TrainConfig(objective=objective, roles=roles))
        lines = []
        for name in ("teacher", "student"):
            with pytest.raises(UserError) as caught, Networks._naming_option(fake, name):
                raise UserError("init_from a is b is not a run folder")
            lines.append(str(caught.value))
        assert lines == [
            "teacher.init_from a is b is not a run folder",
            "teacher.init_from a is b (the student starts as it) is not a run folder",
        ]

    @pytest.mark.slow
    def test_a_resume_with_another_teacher(self, whole, command, arguments, run, capsys, tmp_path):
        folder, other = tmp_path / "run", tmp_path / "other"
        shutil.copytree(whole, folder)
        assert main([*arguments, "--steps", "1", "--seed", "5", "--folder", str(other)]) == 0
        options = ["--teacher.init-from", other, "--steps", STEPS + 1]
        error = refused(capsys, ["train", "--folder", folder, "--resume", *options])
        assert "cannot resume: the parameters of the teacher are not those that the run" in error
        error = refused(
            capsys, ["train", "--folder", folder, "--resume", "--critic.beta2", "0.5", "--critic.tile", "1"]
        )
        assert "critic.tile" in error or "--critic.tile" in error

    @pytest.mark.slow
    def test_numbers_that_are_not_finite_name_the_role(self, command, tmp_path):
        options = ["--folder", str(tmp_path / "run"), "--critic.learning-rate", "1e30", "--critic.clip-norm", "None"]
        with pytest.raises(
            NonFiniteError, match=r"the (critic|student)'s .* at step 2 .*--(critic|student)\.learning-rate"
        ):
            train(parse_train([*command[1:], *options]), quiet=True)
        config = parse_train([*command[1:], "--folder", str(tmp_path / "other")])
        teacher = build_model(config.role("teacher").model, channels=48, seed=0)
        there(teacher.head.proj.bias)[...] = jnp.nan
        teacherless = {"teacher": teacher}
        settings = from_dict(TrainConfig, _without_origin(to_dict(config)))
        said = r"a parameter of the teacher is not finite at step 0: head\.proj\.bias; give --teacher\.init-from"
        with pytest.raises(NonFiniteError, match=said):
            train(settings, model=teacherless, quiet=True)
        assert not (tmp_path / "other").exists()


def _without_origin(values: dict) -> dict:
    values["roles"]["teacher"]["init_from"] = None
    return values


def test_settings_survive_json_and_files(command, tmp_path):
    config = parse_train([*command[1:], "--folder", str(tmp_path)])
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert there(config.role("critic").optimizer).learning_rate == 1e-3
    assert config.optimizer.ema_start == 3
    assert config.role("teacher").optimizer is None
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps({"objective": "pair", "pull": 0.5, "critic": {"learning_rate": 0.5, "attention": "dense"}})
    )
    config = parse_train(["--config", str(file), "--student.learning-rate", "0.25"])
    assert (untyped(config.objective).pull, config.optimizer.learning_rate) == (0.5, 0.25)
    assert there(config.role("critic").optimizer).learning_rate == 0.5


def test_one_role_may_be_named():
    config = parse_train(["--student.learning-rate", "0.5", "--student.tile", "1", "2", "2", "--steps", "3"])
    assert (config.optimizer.learning_rate, config.model.tile, config.run.steps) == (0.5, (1, 2, 2), 3)


def test_help_shows_the_roles(capsys):
    with pytest.raises(SystemExit):
        parse_train(["--objective", "pair", "--help"])
    text = capsys.readouterr().out
    for option in ("--pull", "--student.learning-rate", "--critic.preset", "--teacher.init-from", "--steps"):
        assert option in text
    assert "--teacher.learning-rate" not in text
    assert "│ --learning-rate" not in text  # the examples have it


def test_a_name_is_taken_once():
    class Other(PairConfig):
        name: ClassVar[str] = "flow"

    with pytest.raises(ValueError, match="name 'flow' is taken by FlowConfig"):
        register(Other, Pair)
    with pytest.raises(UserError, match="objective is 'none'"):
        from_dict(TrainConfig, {"objective": {"name": "none"}})
