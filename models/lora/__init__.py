"""LoRAs of Wan transformers: changes W' = W + s (alpha / r) B A of weights, stored in separate files.

names.py      names of tensors in the three formats: diffusers (PEFT), ComfyUI (Wan's own names), Musubi
reading.py    reads a file as the changes of a checkpoint's tensors
merging.py    merges changes into an opened checkpoint or a model
writing.py    writes a file in any of the formats
report.py     describes a file
layers.py     layers with trainable pairs of matrices, and models with such layers
"""

from monarchrt.models.lora.merging import Scaled, merged, with_loras
from monarchrt.models.lora.reading import LoRA, open_lora
from monarchrt.models.lora.writing import Factors, write_lora

__all__ = ["Factors", "LoRA", "Scaled", "merged", "open_lora", "with_loras", "write_lora"]
