"""Names of tensors without the prefixes of wrappers, trainers and other programs."""

import re
from collections.abc import Iterable
from pathlib import Path

from monarchrt.models.errors import printable

# torch.compile, FSDP and activation checkpointing insert these before any part of a name
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# DDP, trainers and ComfyUI put one or several of these before whole names
LEADING = re.compile(
    r"(?:(?:model|module|diffusion_model|generator_ema|generator|ema_model|ema|state_dict|transformer|dit|net|"
    r"text_encoders|text_encoder|umt5xxl|umt5|t5|first_stage_model|vae)\.)+"
)
# prefixes of the parts in ComfyUI's files of a whole pipeline
PARTS = (
    "model.diffusion_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "first_stage_model.",
    "vae.",
    "clip_vision.",
)
PREFERENCE = ("generator_ema", "ema", "ema_model", "generator", "model")


def strip_prefixes(names: Iterable[str], *, anchors: tuple[str, ...], where: Path) -> dict[str, str]:
    """Removes prefixes from the names of a file's tensors.

    Examples:
        >>> strip_prefixes(["module.model._orig_mod.a.w"], anchors=("a.w",), where=Path("x.pt"))
        {'a.w': 'module.model._orig_mod.a.w'}

    Args:
        names: Names in the file.
        anchors: Bare names, one of which every model has: any text before it is the prefix.
        where: The file, for messages.

    Returns:
        The name in the file by bare name, for one model: if there are two, the average (`ema`, `generator_ema`) rather
        than the generator. Tensors of other parts of a pipeline are left out.

    Raises:
        ValueError: If there are several models without such a preference, or two tensors have the same bare name.
    """
    unwrapped = {name: WRAPPERS.sub("", name) for name in names}
    prefixes = {
        name.removesuffix(anchor)
        for name in unwrapped.values()
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    }
    prefix = _choose(prefixes, where)
    others = tuple(other for other in prefixes if other != prefix and other)
    others += tuple(part for part in PARTS if prefix is not None and not prefix.startswith(part))
    bare: dict[str, str] = {}
    for name, short in unwrapped.items():
        if prefix is None:
            short = LEADING.sub("", short, count=1) if LEADING.match(short) else short
        elif short.startswith(prefix):
            short = short.removeprefix(prefix)
        elif short.startswith(others):
            continue
        if short in bare:
            raise ValueError(
                f"{where}: two tensors are {printable(short)}: {printable(bare[short])} and {printable(name)}; leave "
                f"one of them in the file."
            )
        bare[short] = name
    return bare


def _choose(prefixes: set[str], where: Path) -> str | None:
    """The prefix of the preferred model; None if no anchor was found."""
    if len(prefixes) < 2:
        return next(iter(prefixes), None)
    for wanted in PREFERENCE:
        if len(preferred := [prefix for prefix in prefixes if wanted in prefix.split(".")]) == 1:
            return preferred[0]
    named = ", ".join(sorted(repr(printable(prefix, 60)) for prefix in prefixes))
    raise ValueError(f"{where} holds several models, under the prefixes {named}; leave one of them in the file.")
