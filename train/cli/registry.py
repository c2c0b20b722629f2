"""The commands, as help lists them: COMMAND is the function COMMAND_command of the file COMMAND.py here."""

COMMANDS = {
    "train": "train or finetune a video model on a clip; resume a run",
    "demo": "the whole story in miniature on a CPU: dense, Monarch, finetuned",
    "generate": "make a video from a prompt, or with a run's network",
    "serve": "videos whose prompt changes while they are made, for browsers and programs",
    "bench": "how fast a checkpoint makes videos: `bench generate`, cold and steady, by stage",
    "encode": "clips and captions to the latents that finetuning takes",
    "pairs": "states of a teacher's solver, to distil a student on",
    "evaluate": "attention settings under the same weights: losses and videos; VBench",
    "inspect": "what a Wan checkpoint holds, and whether it is complete",
    "convert": "write a Wan checkpoint in another format",
    "doctor": "what runs on this machine, why, and how fast",
    "study": "attention maps against density, and which tile suits a checkpoint",
    "tune": "find the fastest settings of the Triton kernels on this GPU",
    "completion": "what bash, zsh and fish need to complete commands and options",
}
