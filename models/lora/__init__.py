"""LoRAs of Wan transformers: changes W' = W + s (alpha / r) B A of weights, in files of their own.

names.py      what the three formats call tensors: diffusers (PEFT), ComfyUI (Wan's own names), Musubi
reading.py    a file to the change of each tensor of a checkpoint
merging.py    changes into an opened checkpoint or a model
writing.py    to a file of any of the formats
report.py     what a file is, in lines
layers.py     layers with a pair of matrices that trains, and a model with such layers
"""

from monarchrt.models.lora.merging import Scaled, merged, with_loras
from monarchrt.models.lora.reading import LoRA, open_lora
from monarchrt.models.lora.writing import Factors, write_lora

__all__ = ["Factors", "LoRA", "Scaled", "merged", "open_lora", "with_loras", "write_lora"]
