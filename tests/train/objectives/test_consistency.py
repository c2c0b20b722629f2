"""Consistency distillation: loss and gradient in float64 PyTorch, the average that is its target, and a run of it."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.errors import UserError
from monarchrt.models.generate.load import wan_defaults
from monarchrt.models.umt5 import save_embeddings
from monarchrt.models.wan.checkpoints import open_source, save_checkpoint
from monarchrt.train.cli import main
from monarchrt.train.config import OptimizerConfig, TrainConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives import consistency
from monarchrt.train.objectives.consistency import ConsistencyDraws, ConsistencyObjective
from monarchrt.train.objectives.dmd import DMDObjective
from monarchrt.train.objectives.settings import ConsistencyConfig, DMDConfig
from monarchrt.train.state import create_role, create_state, from_arrays, make_training, split_model, to_arrays
from monarchrt.train.step import make_error_fn, make_train_step

from ..conftest import history
from .networks import Small, assert_same, batch, gradient, published_mask, wan
from .plain_wan import PlainWan, mixed, tensor, torch

SHAPE = (2, 4, 4, 4, 2)


def shifted(u):
    return 5 * u / (1 + 4 * u)


GRID = [shifted(u) for u in (1.0, 0.75, 0.5, 0.25)]  # of four levels


@pytest.fixture(scope="module")
def negative(tmp_path_factory):
    """An embedding of one row, in a file as `generate --save-embeddings` writes it."""
    path = tmp_path_factory.mktemp("negative") / "negative.safetensors"
    rows = np.random.default_rng(3).standard_normal((1, 4), np.float32)
    save_embeddings(path, {"bad": rows})
    return path, rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "blocks", "layers", "conversion"),
    [
        ("monarch(tile=(1,1,2))", [2, 2], 1, "published"),  # tiles of one row are exact
        ("dense", None, 2, "clean"),
        ("dense", [1, 3], 2, "clean"),
    ],
)
def test_loss_and_gradient(attention, blocks, layers, conversion, negative):
    first = blocks is not None and blocks[0] != blocks[1]
    block = None if blocks is None else blocks[1]
    causal = {} if block is None else {"causal_block": block, "independent_first_frame": first}
    guided = {"negative": negative[0], "guidance": 2.5}
    settings = ConsistencyConfig(grid=6, block=block, independent_first_frame=first, conversion=conversion, **guided)
    objective = ConsistencyObjective(settings)
    student, average = (wan(seed, attention, num_layers=layers, **causal) for seed in (0, 1))
    teacher, examples = wan(2, num_layers=layers, **causal), batch(SHAPE)
    draws = objective.draws(jax.random.key(1), examples)["student"]._replace(level=jnp.array([4, 0]))
    others = {"student.average": average, "teacher": teacher}

    ours, grads = gradient(
        lambda model: objective.loss("student", {"student": model} | others, examples, draws)[0], student
    )()

    x, noise, text = (tensor(a) for a in (*examples[:1], draws.noise, examples.text))
    high, low = (tensor([shifted(u) for u in us]) for us in ((2 / 6, 1), (1 / 6, 5 / 6)))
    grid = tensor([shifted(n / 1000) for n in range(1, 1001)])

    def converted(sigma):
        return over(sigma if conversion == "clean" else grid[(grid[None] - sigma[:, None]).abs().argmin(1)])

    def flow(plain, noisy, sigma, text):
        told = (1000 * sigma)[:, None].expand(2, 4)
        if blocks is None:
            return plain(noisy, told, text)[0]
        both, told = torch.cat([x, noisy], 1), torch.cat([0 * told, told], 1)
        return plain(both, told, text, positions=np.tile(np.arange(4), 2), mask=published_mask(blocks))[0][:, 4:]

    def over(sigma):
        return sigma[:, None, None, None, None]

    plain, noised = PlainWan(student), mixed(x, noise, high[:, None].expand(2, 4))
    with torch.no_grad():
        of_text = flow(PlainWan(teacher), noised, high, text)
        of_negative = flow(PlainWan(teacher), noised, high, tensor(np.broadcast_to(negative[1], (2, 1, 4))))
        moved = noised - over(high - low) * (of_negative + 2.5 * (of_text - of_negative))
        target = moved - converted(low) * flow(PlainWan(average), moved, low, text)
    loss = ((noised - converted(high) * flow(plain, noised, high, text) - target) ** 2).mean()
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert_same(jax.tree.leaves(grads), plain.gradients(loss), 1e-5)


class Blocks(Small):
    """A network of blocks, as far as its settings say."""

    config = SimpleNamespace(causal_block=2, independent_first_frame=False)


def test_the_target_is_the_average_of_the_updates_before(negative, monkeypatch):
    """Two steps, the loss of the second by hand; a state that was written and read goes on alike."""

    def forced(network, noisy, timesteps, clean, text):  # `teacher_forced` has tests of its own
        return network(noisy - 0.5 * clean, timesteps, text)

    monkeypatch.setattr(consistency, "teacher_forced", forced)
    settings = ConsistencyConfig(grid=4, block=2, negative=negative[0], guidance=2.0)
    objective, examples = ConsistencyObjective(settings), batch(SHAPE)
    training = make_training(OptimizerConfig(learning_rate=0.1, ema_decay=0.75), updates=2)
    parts = {name: split_model(Blocks(seed)) for seed, name in enumerate(("student", "teacher"))}
    roles = {name: create_role(*parts[name][1:], training if name == "student" else None) for name in parts}
    graphs = {name: part[0] for name, part in parts.items()}
    teacher = jax.tree.map(np.array, parts["teacher"][1])  # a step overwrites its input
    state = create_state(roles, seed=0)
    step = make_train_step(objective, graphs, {"student": training}, configs={})

    def of(state, which="params"):
        return jax.tree.map(np.array, getattr(state.roles["student"], which))

    before = of(state)
    state, _ = step(state, {"student": examples}, due=("student",))
    after, average, kept = of(state), of(state, "average"), jax.tree.map(jnp.copy, to_arrays(state))
    for found, old, new in zip(*map(jax.tree.leaves, (average, before, after)), strict=True):
        np.testing.assert_allclose(found, 0.75 * old + 0.25 * new, rtol=1e-6)
    draws = objective.draws(jax.random.fold_in(state.rng, state.step), examples)["student"]
    state, metrics = step(state, {"student": examples}, due=("student",))

    x, text = examples
    high, low = (np.asarray(GRID)[np.asarray(draws.level) + n][:, None, None, None, None] for n in (0, 1))

    def flow(params, noisy, sigma, text=text):
        first, of_text, last = (np.asarray(params[name][...], np.float64) for name in ("first", "text", "last"))
        prompt = (text @ of_text).mean(1)[:, None, None, None]
        return np.tanh((noisy - 0.5 * x) @ first + prompt + sigma) @ last

    noised = (1 - high) * x + high * np.asarray(draws.noise)
    of_text, of_negative = (flow(teacher, noised, high, rows) for rows in (text, negative[1][None]))
    moved = noised - (high - low) * (2 * of_text - of_negative)
    target = moved - low * flow(average, moved, low)
    expected = np.mean(np.square(noised - high * flow(after, noised, high) - target))
    np.testing.assert_allclose(metrics["student"]["loss"], expected, rtol=1e-5)

    last = of(state, "average")
    again, _ = step(from_arrays(state, kept), {"student": examples}, due=("student",))
    jax.tree.map(np.testing.assert_array_equal, of(again, "average"), last)
    # held out, what is evaluated is the average, and its own target
    evaluated = {"student": (average, nnx.State({})), "teacher": (teacher, nnx.State({}))}
    measured = make_error_fn(objective, graphs)(evaluated, examples, {"student": draws})
    own = np.mean(np.square(noised - high * flow(average, noised, high) - target))
    np.testing.assert_allclose(measured["student"], own, rtol=1e-5)


class Linear:
    """A flow of so much of what is seen and told."""

    config = SimpleNamespace(causal_block=None, independent_first_frame=False)

    def __init__(self, share):
        self.share = share

    def __call__(self, x, timesteps, text):
        return self.share * x + timesteps[:, None, None, None, None] / 1000


@pytest.mark.parametrize("conversion", ["clean", "published"])
def test_what_is_made_of_a_flow(conversion):
    """By hand, with a shift of its own: published, the nearest of its 1000 levels, which may not be the level."""
    objective = ConsistencyObjective(ConsistencyConfig(grid=7, shift=3.0, conversion=conversion))
    examples, level = batch(SHAPE), np.array([2, 4])
    draws = ConsistencyDraws(jnp.asarray(level), jax.random.normal(jax.random.key(1), SHAPE))
    networks = {name: Linear(share) for name, share in (("student", 0.5), ("student.average", 0.25), ("teacher", 2.0))}
    ours, _ = objective.loss("student", networks, examples, draws)

    def of_shift(u):
        return 3 * u / (1 + 2 * u)

    grid = of_shift(np.arange(1, 1001) / 1000)
    high, low = (of_shift((7 - level - n) / 7) for n in (0, 1))
    to = {"clean": lambda sigma: sigma, "published": lambda sigma: grid[np.abs(grid[None] - sigma[:, None]).argmin(1)]}
    at = lambda sigma: sigma[:, None, None, None, None]  # noqa: E731
    end = lambda share, x, sigma: x - at(to[conversion](sigma)) * (share * x + at(sigma))  # noqa: E731
    noised = at(1 - high) * examples.latents + at(high) * np.asarray(draws.noise)
    moved = noised - at(high - low) * (2.0 * noised + at(high))
    expected = np.mean((end(0.5, noised, high) - end(0.25, moved, low)) ** 2)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert abs(at(to["published"](high)) - at(high)).max() > 1e-4  # it would show


def test_levels():
    objective = ConsistencyObjective(ConsistencyConfig())
    assert objective.sigmas.shape == (48,)
    np.testing.assert_allclose(objective.sigmas[[0, 12, 47]], [1, 5 * 0.75 / 4, 5 / 48 / (1 + 4 / 48)], rtol=1e-6)
    shape = jax.ShapeDtypeStruct((2000, 1, 1, 1, 1), jnp.float32)
    level = objective.draws(jax.random.key(0), Batch(shape, shape))["student"].level  # type: ignore[arg-type]
    assert set(np.asarray(level).tolist()) == set(range(47))  # the last has no level after it


def test_settings_of_the_published_training():
    settings, defaults = ConsistencyConfig(), ConsistencyConfig.roles["student"].defaults
    assert (settings.grid, settings.shift, settings.weight) == (48, 5.0, 1.0)
    assert ConsistencyConfig(negative=Path("a")).weight == 3.0
    assert (defaults["learning_rate"], defaults["beta1"], defaults["beta2"]) == (2e-6, 0.0, 0.999)
    assert OptimizerConfig().ema_decay == 0.99
    assert settings.generation.steps == (1000, 750, 500, 250)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"grid": 1}, "grid is 1; it must lie in 2...1000"),
        ({"guidance": 3.0}, "guidance is 3.0, but there is no embedding .* --negative"),
        ({"guidance": -1.0, "negative": Path("a")}, "guidance is -1.0"),
        ({"block": 0}, "block is 0"),
        ({"independent_first_frame": True}, "there are no blocks; give block"),
        ({"student_steps": (250, 500)}, "decreasing timesteps"),
        ({"shift": 0.0}, "shift is 0.0"),
    ],
)
def test_bad_settings(settings, word):
    with pytest.raises(UserError, match=word):
        ConsistencyConfig(**settings)


def test_negatives_that_are_none(tmp_path):
    """Each is said of the option that names the file."""
    path = tmp_path / "negative.safetensors"
    for embeddings, word in (
        (None, "does not exist"),
        ({"a": np.full((1, 4), np.nan, np.float32)}, "is NaN or infinite"),
        ({"a": np.ones((1, 4), np.float32), "b": np.ones((1, 4), np.float32)}, "has 2 embeddings"),
        ("text", "is not a file of text embeddings"),
    ):
        if isinstance(embeddings, str):
            path.write_text(embeddings)
        elif embeddings is not None:
            save_embeddings(path, embeddings)
        for objective in (
            ConsistencyObjective(ConsistencyConfig(negative=path)),
            DMDObjective(DMDConfig(negative=path)),
        ):
            with pytest.raises(UserError, match=f"^negative {re.escape(str(path))} {word}"):
                objective.texts()


def test_a_student_without_an_average_is_refused():
    with pytest.raises(UserError, match="ema_decay is None, but consistency learns from the moving average"):
        TrainConfig(objective=ConsistencyConfig(), optimizer=OptimizerConfig(ema_decay=None))


@pytest.mark.parametrize(
    ("block", "student", "teacher", "word"),
    [
        (2, {}, {"causal_block": 2}, "block is 2, but the network's causal_block is None; give --overrides causal"),
        (2, {"causal_block": 2}, {}, "network's causal_block is None; give --teacher.overrides causal_block=2"),
        (None, {}, {"causal_block": 2}, "block is None, but the network's causal_block is 2; give --block 2"),
    ],
)
def test_blocks_that_do_not_fit(block, student, teacher, word):
    objective, examples = ConsistencyObjective(ConsistencyConfig(block=block)), batch(SHAPE)
    draws = ConsistencyDraws(jnp.zeros(2, jnp.int32), jnp.zeros(SHAPE))
    plain = {"causal_block": None, "independent_first_frame": False}
    sizes = {"student": student, "student.average": student, "teacher": teacher}
    networks = {name: SimpleNamespace(config=SimpleNamespace(**(plain | own))) for name, own in sizes.items()}
    with pytest.raises(UserError, match=word):  # before any is called
        objective.loss("student", networks, examples, draws)


@pytest.mark.slow
def test_a_causal_student_is_distilled_and_resumed(tmp_path, capsys):
    """A run that was stopped and went on is the one that was not, bit for bit; its student knows steps and blocks."""
    for number in range(3):
        one = batch((1, *SHAPE[1:]), seed=number)
        arrays = {"latents": one.latents[0], "text": one.text[0]}
        write_arrays(tmp_path / "latents" / f"{number}.safetensors", arrays, metadata={})
    teacher = wan(7, causal_block=2)
    save_checkpoint(teacher, tmp_path / "teacher")
    sizes = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len", "causal_block")
    network = [f"{name}={getattr(teacher.config, name)}" for name in sizes]
    data = ["--latents", tmp_path / "latents", "--batch", "1", "--held-out", "0.4", "--checkpoint-every", "2"]
    arguments = ["train", "--objective", "consistency", *data, "--block", "2", "--grid", "6", "--learning-rate", "1e-2"]
    arguments += ["--teacher.init-from", tmp_path / "teacher", "--attention", "monarch(tile=(1,1,2))"]
    arguments += ["--overrides", *network, "--teacher.overrides", *network]

    def command(*words):
        assert main([str(word) for word in words]) == 0

    command(*arguments, "--steps", "4", "--folder", tmp_path / "whole")
    assert f"run: 4 steps of 1 samples from {tmp_path / 'teacher'}, seed 0" in capsys.readouterr().err  # as it starts
    command(*arguments, "--steps", "4", "--folder", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/4")
    command("train", "--folder", tmp_path / "stopped", "--resume")
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")

    def sums(name):
        return json.loads((tmp_path / name / "checkpoints/4/about/metadata").read_text())["arrays"]

    assert sums("stopped") == sums("whole")
    assert any(name.startswith("roles.student.average") for name in sums("whole"))
    command("convert", tmp_path / "whole", tmp_path / "made")
    made = open_source(tmp_path / "made")
    assert made.config.causal_block == 2
    assert wan_defaults(made).steps == (1000, 750, 500, 250)
