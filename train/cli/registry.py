"""The commands and their summaries. COMMAND is the function COMMAND_command of the module COMMAND in this package."""

COMMANDS = {
    "train": "train, finetune or distil a video model; resume a run",
    "demo": "compare dense, Monarch and finetuned attention at small scale on a CPU",
    "generate": "generate a video from a prompt, or with a run's network",
    "serve": "generate videos whose prompts can change meanwhile, for browsers and programs",
    "bench": "time video generation: `bench generate`, cold and steady, by stage",
    "encode": "encode clips and captions into latents for finetuning",
    "pairs": "save states of a teacher's solver, to distil a student from",
    "evaluate": "compare attention settings with the same weights: losses, videos, VBench",
    "inspect": "show what a Wan checkpoint, a LoRA or a run holds, and whether it is complete",
    "convert": "write a Wan checkpoint in another format",
    "doctor": "report what runs on this machine, why, and how fast",
    "study": "study attention maps against density, and find a tile for a checkpoint",
    "tune": "find the fastest settings of the Triton kernels on this GPU",
    "completion": "print the shell completion for bash, zsh or fish",
}
