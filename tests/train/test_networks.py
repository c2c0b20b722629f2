"""What a run's networks begin with: files that several processes compare, and notes on how they are used."""

import dataclasses
from pathlib import Path

import pytest

from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.models.wan.checkpoints.settings import Trained
from monarchrt.train.config import ModelConfig, train_defaults
from monarchrt.train.networks import Networks
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import ConsistencyConfig, DMDConfig
from monarchrt.train.sharding import Placement

from .objectives.networks import wan

SIZES = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "text_len")


def opened(settings, teacher: Path, *more: str, attention="dense") -> Networks:
    """Those of a run from a teacher, after a look at their files."""
    network = wan(0).config
    overrides = (*(f"{name}={getattr(network, name)}" for name in SIZES), *more)
    config = train_defaults(type(settings))
    of_teacher = ModelConfig(overrides=overrides, attention=attention)
    roles = {
        name: dataclasses.replace(role, model=of_teacher, init_from=teacher if name == "teacher" else None)
        for name, role in config.roles.items()
    }
    model = ModelConfig(overrides=overrides, attention="monarch(tile=(1,1,2))")
    config = dataclasses.replace(config, objective=settings, model=model, roles=roles)
    placement = Placement(batch=1, accumulation=1)
    networks = Networks(config, make_objective(settings), channels=2, placement=placement, models={})
    networks.check_origins(resumed=False)
    return networks


def test_other_weights_of_the_same_name_are_told_apart(tmp_path):
    folders = [save_checkpoint(wan(seed), tmp_path / str(n) / "base") for n, seed in enumerate((1, 1, 2))]
    one, same, other = (opened(DMDConfig(), folder).listing for folder in folders)
    assert one == same != other
    shards = save_checkpoint(wan(1), tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list(shards.glob("*.safetensors"))) > 2
    before = opened(DMDConfig(), shards).listing
    last = max(shards.glob("*.safetensors"))
    content = bytearray(last.read_bytes())
    content[-2] ^= 1
    last.write_bytes(content)
    assert opened(DMDConfig(), shards).listing != before


@pytest.mark.parametrize(
    ("more", "attention", "said"),
    [
        ((), "dense", "attention dense over all frames"),
        (("causal_block=3",), "monarch(tile=(1,1,2))", "attention monarch(tile=(1,1,2)) in blocks of 3 frames"),
        (("causal_block=3", "independent_first_frame=true"), "dense",
         "attention dense in blocks of 3 frames, the first by itself"),
        (("causal_block=3",), "dense", None),
    ],
)  # fmt: skip
def test_a_teacher_that_is_used_otherwise_than_it_was_trained_is_noted(tmp_path, more, attention, said):
    """What trains may come to another attention; a teacher cannot."""
    trained = Trained(shift=5.0)
    base = save_checkpoint(wan(1, causal_block=3), tmp_path / "base", trained=trained)
    independent = "independent_first_frame=true" in more
    settings = ConsistencyConfig(block=3, independent_first_frame=independent) if more else DMDConfig()
    notes = opened(settings, base, *more, attention=attention).notes
    then = f"{base} was trained with attention dense in blocks of 3 frames"
    assert notes == ([] if said is None else [f"note: the teacher is not trained and uses {said}, but {then}"])
    unknown = save_checkpoint(wan(1, causal_block=3), tmp_path / "unknown")
    assert opened(settings, unknown, *more, attention=attention).notes == []
