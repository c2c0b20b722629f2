"""The umT5 text encoder in Flax NNX, its tokenizer, and files of saved embeddings."""

from monarchrt.models.umt5.checkpoint import load_umt5
from monarchrt.models.umt5.config import PRESETS, UMT5Config, umt5_config
from monarchrt.models.umt5.encoder import UMT5Encoder
from monarchrt.models.umt5.text import encode_prompts, load_embeddings, save_embeddings
from monarchrt.models.umt5.tokenizer import Tokenizer, clean_text

__all__ = [
    "PRESETS",
    "Tokenizer",
    "UMT5Config",
    "UMT5Encoder",
    "clean_text",
    "encode_prompts",
    "load_embeddings",
    "load_umt5",
    "save_embeddings",
    "umt5_config",
]
