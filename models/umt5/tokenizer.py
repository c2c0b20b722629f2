"""Tokenization of prompts as in Wan: cleaned text, an end token, 512 ids."""

import html
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from monarchrt.models.errors import UserError

END, PAD = "</s>", "<pad>"
SUBFOLDERS = ("tokenizer", "google/umt5-xxl")


def clean_text(text: str) -> str:
    """Cleans a prompt as Wan does: repairs Unicode, resolves HTML entities twice, and collapses white space.

    Examples:
        >>> clean_text("  a &amp;amp; b \\n caf\\u00c3\\u00a9 ")
        'a & b caf\\xe9'

    Args:
        text: A prompt.

    Returns:
        The cleaned prompt.

    Raises:
        UserError: If the package ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError:
        raise UserError("cleaning a prompt needs the package ftfy; pip install ftfy") from None
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class Tokenizer:
    """The umT5 tokenizer, from a `tokenizer.json`.

    Examples:
        >>> tokenizer = Tokenizer.load("Wan2.1-T2V-1.3B/google/umt5-xxl")  # doctest: +SKIP
        >>> ids, mask = tokenizer(["a cat on a wall"])  # doctest: +SKIP

    Args:
        inner: A `tokenizers.Tokenizer` with the tokens </s> and <pad>.
        where: Name of its file, for messages.
    """

    def __init__(self, inner: Any, *, where: str = "the tokenizer"):
        self.inner = inner
        inner.no_padding()
        inner.no_truncation()
        numbers = {token: inner.token_to_id(token) for token in (END, PAD)}
        missing = [token for token, number in numbers.items() if number is None]
        if missing:
            raise UserError(f"{where} lacks the token {missing[0]}; it is not umT5's")
        self.end: int = numbers[END]
        self.pad: int = numbers[PAD]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads the `tokenizer.json` in a folder, its `tokenizer/` or its `google/umt5-xxl/`; or the file itself.

        Args:
            folder: The folder, or the file.

        Returns:
            The tokenizer.

        Raises:
            UserError: If there is no such file, it cannot be read, or the package tokenizers is not installed.
        """
        path = Path(folder).expanduser()
        folders = [path, *(path / name for name in SUBFOLDERS)]
        files = [path] if path.is_file() else [at / "tokenizer.json" for at in folders]
        file = next((file for file in files if file.is_file()), None)
        if file is None or file.suffix != ".json":
            sentencepiece = [at / "spiece.model" for at in folders if (at / "spiece.model").is_file()]
            if sentencepiece or path.name == "spiece.model":
                at = (sentencepiece[0] if sentencepiece else path).parent
                raise UserError(
                    f"{at} has only spiece.model, which is not supported; make the tokenizer.json beside it with "
                    f'transformers and sentencepiece installed: python -c "import transformers; '
                    f"transformers.AutoTokenizer.from_pretrained('{at}').save_pretrained('{at}')\""
                )
            raise UserError(f"{path} has no tokenizer.json, nor has its {' or '.join(SUBFOLDERS)}")
        try:
            import tokenizers
        except ImportError:
            raise UserError("reading a tokenizer.json needs the package tokenizers; pip install tokenizers") from None
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{file} cannot be read: {error}") from error
        return cls(inner, where=str(file))

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        length: int = 512,
        warn: Callable[[str], None] = warnings.warn,
        empty: bool = False,
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Cleans, tokenizes, appends the end token, and pads or cuts to `length`.

        Args:
            prompts: Texts.
            length: Ids per prompt, at least 2.
            warn: Called with a line for each prompt that is cut.
            empty: Whether a prompt may be empty, and then is the end token alone.

        Returns:
            Ids [B, length], and a mask that is False for padding.

        Raises:
            UserError: If there is no prompt, or one is empty.
        """
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"prompts={prompts!r} is not a sequence of texts; give at least one, as ['a cat']")
        if length < 2:
            raise UserError(f"length={length} has no room for a token and the end token; umT5 has 512 here")
        ids = np.full((len(prompts), length), self.pad, np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for row, prompt in enumerate(prompts):
            text = clean_text(prompt)
            if not text and not empty:
                raise UserError(
                    f"prompt {prompt!r} is empty; describe what the video shows, for example 'a cat on a wall'"
                )
            tokens = list(self.inner.encode(text).ids)
            if tokens[-1:] == [self.end]:
                tokens.pop()
            if len(tokens) > length - 1:
                start = text if len(text) <= 40 else text[:40] + "..."
                warn(f"the prompt {start!r} has {len(tokens) + 1} tokens and is cut to {length}")
            tokens = [*tokens[: length - 1], self.end]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return ids, mask
