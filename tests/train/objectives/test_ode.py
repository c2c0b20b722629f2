"""Pairs of a teacher's solver, and the regression of a student of few steps on them."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, write_arrays
from monarchrt.models.errors import UserError
from monarchrt.models.sampling import sampler_table
from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from monarchrt.train.data import Batch, LatentFolder
from monarchrt.train.loop import train
from monarchrt.train.objectives.ode import ODEDraws, ODEObjective
from monarchrt.train.objectives.settings import ODEConfig
from monarchrt.train.pair_folder import Made, PairFolder
from monarchrt.train.pairs import PairsConfig, make_pairs, trajectory
from tests.untyped import untyped

from .networks import assert_same, batch, gradient, wan
from .plain_wan import PlainWan, tensor

STEPS = (1000, 500)
SIGMAS = [1.0, 5 * 0.5 / (1 + 4 * 0.5), 0.0]  # shift 5, by hand


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_checkpoint(wan(7), tmp_path_factory.mktemp("teacher") / "wan")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three examples that sizes and texts are taken of."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        one = batch((1, 4, 4, 4, 2), seed=number)
        arrays = {"latents": one.latents[0], "text": one.text[0]}
        write_arrays(folder / f"{number}.safetensors", arrays, metadata={})
    return folder


@pytest.fixture(scope="module")
def settings(teacher, texts, tmp_path_factory):
    return PairsConfig(
        checkpoint=str(teacher), latents=texts, out=tmp_path_factory.mktemp("pairs") / "pairs", student_steps=STEPS,
        steps=4, batch=2, store="fp32", precision="fp32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(settings):
    lines = []
    make_pairs(settings, report=lines.append)
    return settings.out, lines


def test_pairs_are_the_states_of_euler_steps(pairs, teacher, texts):
    """The second example in float64 PyTorch, from its own noise."""
    file = SafetensorsFile(pairs[0] / "000001.safetensors")
    states, end, text = (file.read(name) for name in ("states", "latents", "text"))
    np.testing.assert_array_equal(text, SafetensorsFile(texts / "1.safetensors").read("text"))
    plain, x = PlainWan(wan(7)), tensor(states[:1])
    levels = [5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    for n in range(4):
        if n == 2:
            np.testing.assert_allclose(states[1], x[0].detach(), atol=1e-4)
        flow, _ = plain(x, tensor(np.full((1, 4), 1000 * levels[n])), tensor(text[None]))
        x = (x + (levels[n + 1] - levels[n]) * flow).detach()
    np.testing.assert_allclose(end, x[0], atol=1e-4)


def test_what_was_stopped_goes_on(pairs, settings):
    folder, lines = pairs
    assert len(lines) == 2
    first, second = (folder / f"00000{n}.safetensors" for n in (1, 2))
    before = {path: path.read_bytes() for path in (first, second)}
    first.unlink()
    lines = []
    make_pairs(settings, report=lines.append)
    assert "2 of 3 examples are in" in lines[0]
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(UserError, match=r"already exists, made with .*shift 5.0 \(now 8.0\); give another --out"):
        make_pairs(dataclasses.replace(settings, shift=8.0, count=1))


def test_pairs_serve_as_latents_too(pairs):
    source = LatentFolder(pairs[0], DataConfig(latents=pairs[0]))
    assert source.latent_shape == (4, 4, 4, 2)
    folder = PairFolder(pairs[0], DataConfig(latents=pairs[0]))
    assert folder.latent_shape == (4, 4, 4, 2)
    stacked = folder.held_out_batch([0]).latents
    assert stacked.shape == (1, 12, 4, 4, 2)
    np.testing.assert_array_equal(stacked[:, 8:], source.held_out_batch([0]).latents)


def test_pairs_are_made_alike_but_for_their_seed(tmp_path):
    made = Made(sigmas=(1.0,), shift=5.0, steps=4, solver="euler", guidance=1.0, teacher="wan", seed=0)
    arrays = {"states": np.zeros((1, 2, 2, 2, 1), np.float32), "latents": np.zeros((2, 2, 2, 1), np.float32)}
    for changes, says in (({"seed": 1}, None), ({"guidance": 3.0}, "guidance=3.0"), ({"teacher": "other"}, "'other'")):
        folder = tmp_path / next(iter(changes))
        for number, own in enumerate((made, made, dataclasses.replace(made, **untyped(changes)))):
            header = own.to_header()
            write_arrays(
                folder / f"{number}.safetensors", arrays | {"text": np.zeros((1, 1), np.float32)}, metadata=header
            )
        config = DataConfig(latents=folder, held_out=0.4)
        if says is None:
            assert PairFolder(folder, config).made == made
        else:
            with pytest.raises(UserError, match=f"2.safetensors was made with other settings than .*{says}"):
                PairFolder(folder, config)


def test_states_are_kept_in_passing():
    """For a solver of second order too: where it stands before the step."""
    flow = lambda x, t: x * t / 1000 + 1.0  # noqa: E731
    table, x = sampler_table("dpm++", steps=6, shift=3.0), jnp.full((1, 1, 1, 1, 1), 2.0)
    states, end = trajectory(flow, x, table, stored=(0, 2, 5))
    whole = [trajectory(flow, x, table, stored=(n,))[0] for n in (0, 2, 5)]
    np.testing.assert_array_equal(states, jnp.concatenate(whole))
    assert float(states[0].squeeze()) == 2.0
    assert len({float(x) for x in (*states.ravel(), *end.ravel())}) == 4


@pytest.mark.parametrize(
    ("block", "layers", "drawn"),
    [
        (2, 1, [[0, 0, 2, 2], [1, 1, 0, 0]]),
        pytest.param(None, 2, [[1, 1, 1, 1], [0, 0, 0, 0]], marks=pytest.mark.slow),
        pytest.param(2, 2, [[2, 2, 2, 2], [2, 2, 1, 1]], marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_of_a_student(block, layers, drawn):
    """In float64 PyTorch: one mean over the frames that are not at the end."""
    objective = ODEObjective(ODEConfig(student_steps=STEPS, block=block))
    student, examples = wan(0, num_layers=layers, causal_block=block), batch((2, 12, 4, 4, 2))
    draws = ODEDraws(jnp.asarray(drawn))
    ours, grads = gradient(lambda model: objective.loss("student", {"student": model}, examples, draws)[0], student)()
    plain, number = PlainWan(student), np.repeat([0, 1], 2)
    states = tensor(examples.latents).reshape(2, 3, 4, 4, 4, 2)
    state = np.asarray(drawn)
    seen = tensor([[np.asarray(states[b, state[b, f], f]) for f in range(4)] for b in range(2)])
    sigma = tensor(np.asarray(SIGMAS)[state])
    mask = number[None] <= number[:, None] if block else None
    flow, _ = plain(seen, 1000 * sigma, tensor(examples.text), mask=mask)
    data = seen - sigma[..., None, None, None] * flow
    loss = ((data - states[:, -1]) ** 2)[state < 2].mean()
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert_same(jax.tree.leaves(grads), plain.gradients(loss), 1e-5)


def test_which_states_are_drawn():
    shape = jax.ShapeDtypeStruct((200, 7 * 3, 2, 2, 1), jnp.float32)
    settings = {"student_steps": STEPS}

    def states(**more):
        objective = ODEObjective(ODEConfig(**settings, **more))
        return np.asarray(objective.draws(jax.random.key(0), Batch(shape, shape))["student"].state)  # type: ignore

    whole, blocks = states(), states(block=3, independent_first_frame=True)
    assert set(whole.ravel()) == {0, 1}
    assert (whole == whole[:, :1]).all()
    assert set(blocks.ravel()) == {0, 1, 2}
    assert (blocks[:, 1:4] == blocks[:, 1:2]).all()
    assert (blocks[:, 0] != blocks[:, 1]).mean() > 0.5
    with pytest.raises(UserError, match="not 3 k, whole blocks"):
        states(block=3)


def test_another_shift_is_refused(pairs):
    config = DataConfig(latents=pairs[0])
    with pytest.raises(UserError, match=r"made at shift 5, .* 1 0.8333, .* shift 8 are at 1 0.8889; give --shift 5"):
        ODEObjective(ODEConfig(student_steps=STEPS, shift=8.0)).open_source(config)
    with pytest.raises(UserError, match="give the --student-steps of the pairs"):
        ODEObjective(ODEConfig()).open_source(config)


def test_data_that_are_no_pairs(texts):
    for config, word in (
        (DataConfig(latents=texts), "has no states of a solver; make pairs with `monarchrt pairs`"),
        (DataConfig(video=texts / "clip.mp4"), "give --latents PAIRS"),
    ):
        with pytest.raises(UserError, match=word):
            ODEObjective(ODEConfig(student_steps=STEPS)).open_source(config)
    objective, examples = ODEObjective(ODEConfig(student_steps=STEPS)), batch((1, 4, 4, 4, 2))
    with pytest.raises(UserError, match="latents have 4 frames, which are not 3 states of a clip"):
        objective.draws(jax.random.key(0), examples)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"checkpoint": None}, "no checkpoint was given"),
        ({"latents": None}, "no texts were given; give --latents FOLDER"),
        ({"guidance": 6.0}, "guidance is 6.0, but there is no embedding"),
        ({"guidance": -1.0, "negative": Path("bad")}, r"guidance is -1.0; it must be at least 0, for example 6.0"),
        ({"guidance": math.nan, "negative": Path("bad")}, "guidance is nan; it must be at least 0"),
        ({"guidance": math.inf, "negative": Path("bad")}, "guidance is inf; it must be at least 0"),
        ({"seed": -1}, r"seed is -1; it must lie in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, "seed is 4294967296; it must lie in"),
        ({"student_steps": (1000, 700)}, "steps is 4, and 700 of student_steps is none of them; give --steps 10"),
        ({"student_steps": (500, 1000)}, "student_steps is 500 1000; give decreasing timesteps"),
        ({"batch": 0}, "batch is 0"),
        ({"shift": 0.0}, "shift is 0.0"),
    ],
)
def test_bad_pairs(settings, changes, word):
    with pytest.raises(UserError, match=word):
        make_pairs(dataclasses.replace(settings, **changes))


def test_a_teacher_that_does_not_fit(settings, tmp_path):
    for width, channels, word in ((8, 2, "text is of width 8, but the teacher"), (4, 3, "has 3 channels, but the")):
        one = batch((1, 4, 4, 4, channels), width=width)
        for number in range(2):
            arrays = {"latents": one.latents[0], "text": one.text[0]}
            write_arrays(tmp_path / str(width) / f"{number}.safetensors", arrays, metadata={})
        with pytest.raises(UserError, match=word):
            make_pairs(dataclasses.replace(settings, latents=tmp_path / str(width), out=tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_texts_that_are_not_finite(settings, tmp_path):
    """They are said to be, not the teacher that makes nothing of them."""
    for number in range(2):
        one = batch((1, 4, 4, 4, 2))
        text = np.where(number == 1, np.nan, one.text[0])
        write_arrays(tmp_path / f"{number}.safetensors", {"latents": one.latents[0], "text": text}, metadata={})
    with pytest.raises(UserError, match=r"1\.safetensors has text that is NaN or infinite; encode it again"):
        make_pairs(dataclasses.replace(settings, latents=tmp_path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_fit():
    for settings, network, word in (
        ({}, {"causal_block": 2}, "block is None, but the network's causal_block is 2; give --block 2"),
        ({"block": 2}, {}, "block is 2, but the network's causal_block is None; give --overrides causal_block=2"),
    ):
        objective, examples = ODEObjective(ODEConfig(student_steps=STEPS, **untyped(settings))), batch((1, 12, 4, 4, 2))
        draws = objective.draws(jax.random.key(0), examples)["student"]
        model = nnx.eval_shape(lambda network=network: wan(0, **network))
        with pytest.raises(UserError, match=word):
            objective.loss("student", {"student": model}, examples, draws)


@pytest.mark.slow
def test_a_student_is_trained_on_pairs(pairs, tmp_path):
    """By a run, and it comes nearer to the ends of the trajectories."""
    student = nnx.eval_shape(lambda: wan(0))
    overrides = {name: getattr(student.config, name) for name in ("dim", "num_heads", "ffn_dim", "num_layers")}
    overrides |= {name: getattr(student.config, name) for name in ("freq_dim", "text_dim", "text_len")}
    config = TrainConfig(
        data=DataConfig(latents=pairs[0], held_out=0.3),
        objective=ODEConfig(student_steps=STEPS),
        optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=None),
        run=RunConfig(folder=tmp_path / "run", steps=40, batch=2, eval_every=40),
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, overrides=tuple(f"{k}={v}" for k, v in overrides.items()), attention="dense"
        ),
    )
    losses = []
    train(config, quiet=True, after_step=lambda step, state: losses.append(step))
    from monarchrt.train.logs import read_log

    log = [record["loss"] for record in read_log(tmp_path / "run") if "loss" in record]
    assert np.mean(log[-5:]) < 0.8 * np.mean(log[:5])
