"""The embedding of the negative prompt, for a teacher that is guided."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NEGATIVE_PROMPT
from monarchrt.models.umt5 import load_embeddings


def negative_embedding(path: Path) -> Float32[np.ndarray, "m d"]:
    """Reads it from a file of embeddings: that of Wan's negative prompt, or the only one.

    Raises:
        UserError: If the file cannot be read, it is not clear which of its embeddings it is, or it is not finite.
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
        raise UserError(f"negative {path} is NaN or infinite; make it anew with generate --save-embeddings")
    return embedding
