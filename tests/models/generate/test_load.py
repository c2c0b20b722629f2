"""Where the parts of a checkpoint are looked for: beside it, in a folder, and in Hugging Face repositories."""

import shutil
from pathlib import Path

import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from monarchrt.models.checkpoints.hub import fetch
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import find_components, load_material, open_checkpoint, wan_defaults
from monarchrt.models.generate.plan import make_plan
from monarchrt.models.sampling import Rollout, Windows
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.models.wan.checkpoints.source import open_source
from tests.untyped import untyped

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")

OFFICIAL = (
    *("config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
    *("google/umt5-xxl/spiece.model", "google/umt5-xxl/tokenizer.json", "assets/picture.png"),
)
DIFFUSERS = (
    *("model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00002.safetensors"),
    *("text_encoder/model-00002-of-00002.safetensors", "tokenizer/tokenizer.json", "assets/picture.png"),
)
REPOSITORIES = {"wan/official": OFFICIAL, "wan/diffusers": DIFFUSERS, "someone/network-alone": OFFICIAL[:2]}


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the hub: the names of files that were fetched, by repository."""
    fetched: dict[str, list[str]] = {}
    monkeypatch.chdir(tmp_path)

    def download(name, *, revision, allow_patterns):
        if name not in REPOSITORIES:
            raise OSError("404: no such repository")
        chosen = huggingface_hub.utils.filter_repo_objects(REPOSITORIES[name], allow_patterns=allow_patterns)
        folder = tmp_path / "cache" / name
        for file in chosen:
            if not (folder / file).exists():
                fill(folder, [file])
                fetched.setdefault(name, []).append(file)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


def config(**given):
    return GenerateConfig(**untyped(dict(prompt="a cat") | given))


class TestHub:
    def test_official(self, hub, tmp_path):
        folder = fill(tmp_path / "cache" / "wan/official", OFFICIAL[:2])  # the network is there already
        found = find_components(config(checkpoint="wan/official"), folder)
        assert found.vae == folder / "Wan2.1_VAE.pth"
        assert found.text_encoder == folder / "models_t5_umt5-xxl-enc-bf16.pth"
        assert found.tokenizer == folder / "google/umt5-xxl"
        assert set(hub["wan/official"]) == set(OFFICIAL[2:-1])

    def test_diffusers(self, hub, tmp_path):
        folder = fill(tmp_path / "cache" / "wan/diffusers", DIFFUSERS[:3])
        found = find_components(config(checkpoint="wan/diffusers"), folder / "transformer")
        assert found == (folder / "vae", folder / "text_encoder", folder / "tokenizer")
        assert set(hub["wan/diffusers"]) == set(DIFFUSERS[3:-1])

    def test_only_what_is_needed_and_only_once(self, hub, tmp_path):
        folder = fill(tmp_path / "cache" / "wan/official", OFFICIAL[:2])
        alone = config(checkpoint="wan/official", embeddings=tmp_path / "cat.safetensors")
        assert find_components(alone, folder) == (folder / "Wan2.1_VAE.pth", None, None)
        assert hub == {"wan/official": ["Wan2.1_VAE.pth"]}
        find_components(config(checkpoint="wan/official"), folder)
        assert hub["wan/official"].count("Wan2.1_VAE.pth") == 1

    def test_the_parts_of_another_repository(self, hub, tmp_path):
        network = fill(tmp_path / "self-forcing", ["self_forcing_dmd.pt"]) / "self_forcing_dmd.pt"
        found = find_components(config(checkpoint=str(network), components=Path("wan/official")), network)
        assert found.vae == tmp_path / "cache/wan/official/Wan2.1_VAE.pth"
        assert "diffusion_pytorch_model.safetensors" not in hub["wan/official"]

    def test_what_is_beside_is_not_fetched(self, hub, tmp_path):
        folder = fill(tmp_path / "here", OFFICIAL)
        assert find_components(config(checkpoint=str(folder)), folder).vae == folder / "Wan2.1_VAE.pth"
        assert not hub

    def test_a_folder_comes_first(self, hub, tmp_path):
        folder, apart = fill(tmp_path / "here", OFFICIAL), fill(tmp_path / "apart", ["vae/config.json"])
        found = find_components(config(checkpoint=str(folder), components=apart), folder)
        assert (found.vae, found.tokenizer) == (apart / "vae", folder / "google/umt5-xxl")

    def test_errors(self, hub, tmp_path):
        folder = fill(tmp_path / "cache" / "someone/network-alone", OFFICIAL[:2])
        with pytest.raises(UserError, match=r"lacks: VAE .*; text encoder .* looked in someone/network-alone and "):
            find_components(config(checkpoint="someone/network-alone"), folder)
        with pytest.raises(UserError, match="'no/such' does not exist here and cannot be downloaded from the hub: 404"):
            find_components(config(checkpoint=str(folder), components=Path("no/such")), folder)
        with pytest.raises(UserError, match="components /no/such/folder is not a folder"):
            find_components(config(checkpoint=str(folder), components=Path("/no/such/folder")), folder)


def test_the_cache_serves_without_a_network(monkeypatch, tmp_path):
    """The real library, told to stay offline, with a cache as it writes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    storage = tmp_path / "hub" / "models--wan--official"
    folder = fill(storage / "snapshots" / "0123abcd", OFFICIAL)
    fill(storage, ["refs/main"])
    (storage / "refs/main").write_text("0123abcd")
    found = find_components(config(checkpoint="wan/official"), folder)
    assert found.vae == folder / "Wan2.1_VAE.pth"
    elsewhere = fill(tmp_path / "elsewhere", ["model.pt"])
    apart = config(checkpoint=str(elsewhere), components=Path("wan/official"))
    assert find_components(apart, elsewhere).text_encoder == folder / "models_t5_umt5-xxl-enc-bf16.pth"
    shutil.rmtree(storage)
    said = "does not exist here and cannot be downloaded from the hub: it cannot be reached"
    with pytest.raises(UserError, match=f"'wan/official' {said}") as caught:
        find_components(apart, elsewhere)
    assert "run folder" not in str(caught.value)
    (tmp_path / "mine").mkdir()
    for name in ("runs/few", "mine/few"):
        with pytest.raises(ValueError, match=f"'{name}' {said}.*[^.]; if it is a run folder, it is not here$"):
            fetch(name, ["*"])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "its owner grants access on its page there; ask for it, then log in"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private; log in"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.LocalEntryNotFoundError, "it cannot be reached, and the local cache does not have the files"),
    ],
)
def test_why_a_download_failed_is_said_in_short(monkeypatch, kind, said):
    def fail(*args, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=f"'no-such-owner/x' does not exist here and .* from the hub: {said}"):
        fetch("no-such-owner/x", ["*"])


@pytest.mark.parametrize("format", ["official", "diffusers", "orbax"])
@pytest.mark.parametrize(
    ("block", "few_step", "settings"),
    [
        (None, False, Windows(sampler="unipc", steps=50, guidance=5.0)),
        (3, False, Rollout(sampler="unipc", steps=50, guidance=5.0)),  # causal, and finetuned as a diffusion model
        (3, True, Rollout(sampler="few-step", steps=4)),
        (None, True, Rollout(sampler="few-step", steps=4)),  # Self-Forcing's file does not say that it is causal
    ],
)
def test_causal_is_block_by_block_and_distilled_is_few_step(tmp_path, format, block, few_step, settings):
    model = WanModel(wan_config("tiny", num_layers=1, causal_block=block), rngs=nnx.Rngs(0))
    source = open_source(save_checkpoint(model, tmp_path / "made", format=format, few_step=few_step))
    assert make_plan(GenerateConfig(), defaults=wan_defaults(source), model=source.config).settings == settings


def test_heads_that_a_file_does_not_tell(tmp_path):
    """Either option says them, to the file that is compared with, too; a folder knows its own."""
    model = WanModel(wan_config("tiny", dim=24, num_heads=2, ffn_dim=16, num_layers=1, text_len=512), rngs=nnx.Rngs(0))
    folder = save_checkpoint(model, tmp_path / "folder", format="official")
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)  # without the header that says them
    with pytest.raises(UserError, match=r"give num_heads or head_dim, or store it: .* --num-heads N"):
        open_checkpoint(config(checkpoint=str(bare)))
    for heads in ({"num_heads": 2}, {"head_dim": 12}):
        assert open_checkpoint(config(checkpoint=str(bare), **heads)).sizes.num_heads == 2
        for other in (bare, folder):
            with pytest.raises(UserError, match="checkpoint lacks: VAE"):  # found out after all networks were opened
                load_material(config(checkpoint=str(bare), compare=str(other), frames=5, height=32, width=32, **heads))
