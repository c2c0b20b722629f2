"""Reading, writing, inspection and conversion of Wan checkpoints: official, diffusers, torch `.pt`, Orbax."""

from monarchrt.models.checkpoints.torch_pickle import UnsafePickleError
from monarchrt.models.wan.checkpoints.convert import (
    CheckpointInfo,
    ConvertOptions,
    InspectOptions,
    convert_checkpoint,
    inspect_checkpoint,
)
from monarchrt.models.wan.checkpoints.load import load_checkpoint, load_source
from monarchrt.models.wan.checkpoints.save import save_checkpoint
from monarchrt.models.wan.checkpoints.source import open_source

__all__ = [
    "CheckpointInfo",
    "ConvertOptions",
    "InspectOptions",
    "UnsafePickleError",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_source",
    "open_source",
    "save_checkpoint",
]
