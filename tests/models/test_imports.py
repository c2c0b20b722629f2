"""What the text encoder and the autoencoder need at run time."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "sentencepiece"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from monarchrt.models.umt5 import clean_text, load_umt5, umt5_config
from monarchrt.models.vae import load_vae, vae_config
import tokenizers
for load in (load_umt5, load_vae):
    try:
        load("nowhere")
    except ValueError as error:
        print(error)
print(clean_text("a &amp; b"))
"""


def test_no_torch():
    root = Path(__file__).parents[2]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'nowhere' does not exist") == 2
    assert done.stdout.endswith("a & b\n")
