"""The settings of a LoRA that a role trains. Does not import JAX."""

import math
from dataclasses import dataclass

from monarchrt.models.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Whether a network itself is trained, or a LoRA of it."""

    lora_rank: int | None = None
    """Train a LoRA of this rank, such as 32: two low-rank matrices for each of `lora_layers`. Everything else stays as
    loaded from `init_from`, in the dtype of `precision`, and is not saved in checkpoints. Default: train the network
    itself."""

    lora_alpha: float | None = None
    """The LoRA is scaled by alpha / rank. Default: the rank, a scale of 1."""

    lora_layers: tuple[str, ...] | None = None
    """Layers to adapt: parts of their names, such as self_attn or ffn.fc1, or patterns, such as "blocks.*.q". Default:
    self_attn cross_attn ffn, which are all layers of the blocks."""

    def __post_init__(self) -> None:
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_layers"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} is given, but there is no LoRA; give lora_rank too, for example 32")
            return
        if self.lora_rank < 1:
            raise UserError(f"lora_rank is {self.lora_rank}; it must be at least 1, for example 32")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"lora_alpha is {self.lora_alpha}; it must be positive and finite, for example 32")
        if self.lora_layers == ():
            raise UserError("lora_layers is empty; give parts of names, such as self_attn ffn, or leave it out")
