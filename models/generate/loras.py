"""The LoRAs that a video is made with, of files and of run folders that trained one."""

from collections.abc import Callable

from monarchrt.models.generate.config import NO_LORA, GenerateConfig
from monarchrt.models.lora.merging import Scaled, open_loras


def given_loras(config: GenerateConfig, *, report: Callable[[str], None]) -> tuple[Scaled, ...]:
    """What `--lora` names, opened.

    Args:
        config: The settings.
        report: Takes a line for each LoRA, and one if it does not say its alpha.

    Returns:
        The LoRAs with their strengths.

    Raises:
        ValueError: If one cannot be read, or is for another family of models.
    """
    if config.lora == NO_LORA:
        return ()
    opened = open_loras(config.lora, warn=report)
    for lora, scale in opened:
        report(f"lora {lora.path}: {lora.summary}, strength {scale:g}")
    return opened
