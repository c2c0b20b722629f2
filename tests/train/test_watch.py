"""Warnings of a training that collapses: none of a sound run, one of each kind, and the same after a resume."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.errors import UserError
from monarchrt.train.hooks import Failure, MetricsLog
from monarchrt.train.logs import Progress, RunLog, read_log
from monarchrt.train.objectives.dmd import DMDObjective
from monarchrt.train.objectives.self_forcing import SelfForcingObjective
from monarchrt.train.objectives.settings import DMDConfig, SelfForcingConfig
from monarchrt.train.watch import Check, Watch

SOUND = {"stripes": 1.0, "saturated": 0.004, "detail": 0.8, "motion": 0.3}
RUNS = {  # what the last quarter of a run comes to, and the words of the warning
    "stripes": (2.5, "step {}: the roughness of the last frames over that of the first (student/stripes) is"),
    "saturated": (0.08, "(student/saturated) is"),
    "detail": (0.05, "(student/detail) is"),
    "motion": (0.01, "comes to a standstill"),
}


def records(steps, *, seed=0, changes=(), critic=1.0):
    """A log as a run writes it, with noise; from step 300 on some figures move to others."""
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        share = min(1.0, max(0.0, (step - 300) / 100))
        place = rng.integers(5)
        levels = {f"critic/loss_at_{200 * n}": math.nan for n in range(5)}
        loss = (0.5 + 0.3 * place) * (1 + share * (critic - 1)) * rng.uniform(0.7, 1.3)
        record = levels | {f"critic/loss_at_{200 * place}": loss}
        if (step - 1) % 5 == 0:
            for name, value in SOUND.items():
                aim = dict(changes).get(name, value)
                record[f"student/{name}"] = ((1 - share) * value + share * aim) * rng.uniform(0.6, 1.4)
        yield step, record


def warnings(objective, found):
    watch = Watch(objective.checks())
    return [line for step, record in found for line in watch.add(step, record)]


@pytest.mark.parametrize("objective", [DMDObjective(DMDConfig()), SelfForcingObjective(SelfForcingConfig())])
def test_a_sound_run_is_not_warned_of(objective):
    assert [line for seed in range(2) for line in warnings(objective, records(600, seed=seed))] == []


@pytest.mark.parametrize("figure", RUNS)
def test_each_collapse_is_named_once_and_early(figure):
    value, words = RUNS[figure]
    (line,) = warnings(DMDObjective(DMDConfig()), records(600, changes={figure: value}))
    step = int(line.split(":")[0].removeprefix("step "))
    assert 300 < step <= 500
    assert words.format(step) in line
    assert f"student/{figure}" in line


def test_a_critic_that_cannot_keep_up():
    (line,) = warnings(DMDObjective(DMDConfig()), records(700, critic=2.5))
    assert "(critic/loss_at_*)" in line
    assert "cannot keep up" in line
    assert "--critic.learning-rate" in line
    # by noise level: drawing high ones only is no rise
    found = list(records(600))
    for _, record in found[400:]:
        for name in list(record):
            if name.startswith("critic/") and name != "critic/loss_at_800":
                record[name] = math.nan
    assert warnings(DMDObjective(DMDConfig()), found) == []


def test_a_resumed_run_warns_as_the_uninterrupted_one():
    found, checks = list(records(600, changes={"motion": 0.01})), DMDObjective(DMDConfig()).checks()
    whole = warnings(DMDObjective(DMDConfig()), found)
    for cut in (40, 350, 560):
        watch = Watch(checks)
        stored = [{"step": step} | {n: "nan" if math.isnan(v) else v for n, v in x.items()} for step, x in found[:cut]]
        watch.replay([*stored, {"step": cut, "critic/held_out_loss": 1.0, "note": "text"}])
        after = [line for step, record in found[cut:] for line in watch.add(step, record)]
        assert after == [line for line in whole if int(line.split(":")[0][5:]) > cut]


def test_it_is_said_again_after_it_was_well():
    check = Check(figure="a", what="a", means="b", above=2.0, window=1)
    watch = Watch([check])
    said = [bool(watch.add(0, {"a": value})) for value in (1.0, 3.0, 4.0, 1.0, 3.0, math.nan, 3.0)]
    assert said == [False, True, False, False, True, False, False]
    with pytest.raises(UserError, match="window is 0"):
        Check(figure="a", what="a", means="b", window=0)


def test_what_is_written_is_watched(tmp_path, capsys):
    """Under the names of the log, of the steps that are written; the person who trains reads it."""
    check = Check(figure="student/motion", what="motion", means="it stands still", below=0.5, window=1)
    failure = Failure.__new__(Failure)  # nothing fails
    with RunLog(tmp_path, step=-1) as log, Progress(9, quiet=True) as progress:
        watch = Watch([check])
        metrics = MetricsLog(log, progress, every=2, total=9, prefix=True, failure=failure, watch=watch)
        for step, motion in enumerate((1.0, 1.0, 0.1, 0.1, 1.0), start=1):
            scalars = {"loss": 1.0, "finite": True, "motion": motion}
            metrics.add(step, {"student": {name: jnp.asarray(x) for name, x in scalars.items()}})
        metrics.write(leave=0)
    assert [record["step"] for record in read_log(tmp_path)] == [2, 4]
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == ["warning: step 4: motion (student/motion) is 0.1, it was 1: it stands still"]
