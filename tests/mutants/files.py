"""Faults of files that others wrote, LoRAs and weights, and of options that are given twice."""

from tests.mutants.fault import Fault

LORA_FILES = ("tests/models/lora/test_files.py",)
LORA = ("tests/train/test_lora_training.py",)
DATA = ("tests/train/test_data.py",)
NETWORKS = ("tests/train/test_networks.py",)
ALIKE = ("tests/models/processes/test_alike.py",)
DOCTOR = ("tests/train/test_doctor.py",)
REPEATED = ("tests/train/test_repeated_options.py",)

FILES = (
    Fault(
        "models/lora/reading.py",
        "np.float32(change.scale) * self._read(change.bias)",
        "self._read(change.bias)",
        LORA_FILES,
        "bias_of_a_pair",
    ),
    Fault("models/lora/alphas.py", "expression.match(name)", "expression.fullmatch(name[-8:])", LORA_FILES, "of_peft"),
    Fault("models/lora/alphas.py", 'if format != "musubi"', "if not format", LORA_FILES, "does_not_count"),
    Fault("models/lora/alphas.py", "if rank and pair.rank != rank", "if False", LORA_FILES, "does_not_count"),
    Fault("models/lora/alphas.py", "begun.lower().startswith", "begun.startswith", LORA_FILES, "peft_may_not"),
    Fault("models/processes/alike.py", "* number // (_BLOCKS - 1)", "* number // _BLOCKS", ALIKE, "large_file"),
    Fault("models/processes/alike.py", "digest.update(file.read())\n", "pass\n", DATA, "listing"),
    Fault(
        "models/processes/alike.py",
        'shards = set(read_json(path)["weight_map"].values())',
        "shards = set()",
        NETWORKS,
        "told_apart",
    ),
    Fault(
        "train/networks.py",
        "if name in self.trainings:\n                continue\n            now",
        "if name not in self.trainings:\n                continue\n            now",
        NETWORKS,
        "noted",
    ),
    Fault("train/cli/parsing.py", "groups[number + 1 :]", "groups[:number]", REPEATED, "are_joined"),
    Fault("train/cli/parsing.py", 'name != "lora" and len(groups) > 1', "False", REPEATED, "given_twice"),
    Fault("train/cli/doctor.py", " and not finding.optional", "", DOCTOR, "to_be_mended"),
    Fault("train/doctor.py", '"not installed" or _installed(PLUGIN)', '"not installed" or True', DOCTOR, "its_parts"),
    Fault("models/lora/layers.py", "pair * (owner.alpha / owner.rank)", "pair", LORA, "folded_is"),
)
