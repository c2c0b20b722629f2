"""`scheduler_config.json` of diffusers' pipelines, as their own classes write it and as it should not be."""

import json
import shutil

import pytest

from monarchrt.models.sampling import SAMPLERS
from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.models.wan.checkpoints.scheduler import scheduler_settings
from monarchrt.models.wan.checkpoints.source import open_source

# as the diffusers repository of Wan 2.1 has it, for 480p
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "thresholding": False,
    "use_flow_sigmas": True,
}


@pytest.fixture
def pipeline(wan, small, tmp_path):
    save_checkpoint(wan.model(small), tmp_path / "wan" / "transformer", format="diffusers")
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (tmp_path / "wan" / "scheduler").mkdir()
    (tmp_path / "wan" / "scheduler" / "scheduler_config.json").write_text(json.dumps(WAN))
    return tmp_path / "wan"


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_source_knows_its_scheduler(pipeline, part):
    found = open_source(pipeline / part).scheduler
    assert found is not None
    assert (found.sampler, found.shift) == ("unipc", 3.0)
    assert found.path == pipeline / "scheduler" / "scheduler_config.json"
    assert str(found) == "UniPCMultistepScheduler (unipc), shift 3"


def test_without_the_file_there_is_none(pipeline):
    shutil.rmtree(pipeline / "scheduler")
    assert open_source(pipeline).scheduler is None


@pytest.mark.parametrize(
    ("change", "sampler", "shift"),
    [
        ({"flow_shift": 5}, "unipc", 5.0),
        ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 8.0}, "dpm++", 8.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}, "euler", 7.0),
    ],
)
def test_classes(tmp_path, change, sampler, shift):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(WAN | change))
    found = scheduler_settings(tmp_path)
    assert found is not None
    assert (found.sampler, found.shift) == (sampler, shift)
    assert found.sampler in SAMPLERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, r"_class_name='DDIMScheduler' is not supported; choices: UniPC"),
        ({"_class_name": ["UniPCMultistepScheduler"]}, "is not supported"),
        ({"flow_shift": 0}, r"flow_shift=0 must be a positive number"),
        ({"flow_shift": "3"}, r"flow_shift='3' must be"),
        ({"flow_shift": None}, r"flow_shift=None must be"),
        ({"flow_shift": True}, r"flow_shift=True must be"),
        ({"prediction_type": "epsilon"}, r"prediction_type='epsilon' is not supported"),
        ({"use_flow_sigmas": False}, r"use_flow_sigmas=False is not supported"),
        ({"num_train_timesteps": 500}, r"num_train_timesteps=500 is not Wan's 1000"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(WAN | change))
    with pytest.raises(ValueError, match=message):
        scheduler_settings(tmp_path)


def test_as_diffusers_writes_it(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4)
    scheduler.save_pretrained(tmp_path)
    found = scheduler_settings(tmp_path)
    assert found is not None
    assert found.shift == 4.0
