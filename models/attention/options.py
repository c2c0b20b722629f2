"""Mixin for configurations that have an attention and separate options for some of its fields, as `--tile 3 30 52`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from monarchrt.models.attention.notation import split_options, with_options
from monarchrt.models.errors import UserError


class AttentionOptions:
    """Methods of a frozen dataclass that has a field `attention` and a field for each of `attention_fields`.

    Examples:
        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Settings(AttentionOptions):
        ...     attention_fields = {"num_iters": int}
        ...     attention: str = "monarch"
        ...     num_iters: int = 1
        >>> Settings(num_iters=2).attention_text()
        'monarch(num_iters=2)'

    Attributes:
        attention_fields: Fields of the attention that are options, and the type of each.
    """

    attention_fields: ClassVar[Mapping[str, type]]
    attention: str

    def attention_options(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {name: getattr(self, name) for name in self.attention_fields if self._differs(name)}

    def attention_text(self) -> str:
        """The attention in its notation, options included."""
        return with_options(self.attention, self.attention_options())

    def plain_options(self) -> dict[str, Any]:
        """The defaults of the options, which are stored beside `attention_text`."""
        return {name: getattr(type(self), name) for name in self.attention_fields}

    def normalize_attention(self) -> None:
        """Brings equal settings to one form: the name of the kind and its options, if these can express it.

        Raises:
            UserError: If the attention cannot be parsed, or the options do not apply to it.
        """
        try:
            attention, options = split_options(self.attention, self.attention_options(), self.attention_fields)
        except ValueError as error:
            raise UserError(str(error)) from error
        for name, value in {"attention": attention, **options}.items():
            object.__setattr__(self, name, value)  # called in __post_init__ of frozen dataclasses

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != getattr(type(self), name)
