"""Base class of objectives with a guided teacher, and the embedding of its negative prompt."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NEGATIVE_PROMPT
from monarchrt.models.umt5 import load_embeddings
from monarchrt.train.objectives.base import Objective
from monarchrt.train.objectives.settings import GuidedSettings


class GuidedObjective(Objective):
    """Base class of objectives with a guided teacher."""

    settings: GuidedSettings

    @cached_property
    def negative(self) -> Float32[np.ndarray, "m d"] | None:
        """Embedding of the negative prompt; None if the teacher is not guided.

        Raises:
            UserError: If the file is not usable (see `negative_embedding`).
        """
        path, unguided = self.settings.negative, self.settings.weight == self.settings.unguided
        return None if path is None or unguided else negative_embedding(path)

    def texts(self) -> Mapping[str, np.ndarray]:
        """The negative prompt's embedding, if the teacher is guided."""
        return {} if self.negative is None else {f"negative {self.settings.negative}": self.negative}


def negative_embedding(path: Path) -> Float32[np.ndarray, "m d"]:
    """Reads the embedding of a negative prompt from a file: that of Wan's negative prompt, or the only one there.

    Args:
        path: File as `generate --save-embeddings` writes it.

    Returns:
        The embedding, float32.

    Raises:
        UserError: If the file cannot be read, has no embedding or several without Wan's negative prompt, or if the
            embedding is not finite.
    """
    if not path.expanduser().is_file():
        raise UserError(f"negative {path} does not exist; give a file of generate --save-embeddings")
    try:
        embeddings = load_embeddings(path)
    except UserError as error:
        raise UserError(f"negative {error}") from error
    if len(embeddings) > 1 and NEGATIVE_PROMPT not in embeddings:
        raise UserError(f"negative {path} has {len(embeddings)} embeddings; give a file of the negative prompt alone")
    if not embeddings:
        raise UserError(f"negative {path} has no embedding; give a file of generate --save-embeddings")
    embedding = np.asarray(embeddings.get(NEGATIVE_PROMPT, next(iter(embeddings.values()))), np.float32)
    if not np.isfinite(embedding).all():
        raise UserError(f"negative {path} is NaN or infinite; make it again with generate --save-embeddings")
    return embedding
