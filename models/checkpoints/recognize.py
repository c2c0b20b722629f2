"""Recognition of files that are not the expected checkpoint, by first bytes and by names of tensors, for errors."""

import re
from collections.abc import Iterable
from pathlib import Path

from monarchrt.models.errors import printable

SUPPORTED = (
    "supported are Wan 2.1 text-to-video and image-to-video, and what is trained from them, as safetensors "
    "(official, diffusers' or ComfyUI's; fp8 too), torch .pt or Orbax"
)
# first bytes of a file
STARTS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file (quantized for llama.cpp and ComfyUI-GGUF)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch it with git lfs pull"),
    (b"<!DOCTYPE", "a web page that was saved instead of the file; download it again"),
    (b"<!doctype", "a web page that was saved instead of the file; download it again"),
    (b"<html", "a web page that was saved instead of the file; download it again"),
    (b"<?xml", "XML, perhaps a server's message; download it again"),
    (b"\0\5\x16\7", "what macOS leaves beside a file (AppleDouble), not the file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x08\x03\x12", "an ONNX model"),
    *((bytes([8, version, 18]), "an ONNX model") for version in range(4, 20)),
)
# patterns of tensor names, tried in order, and the kind of file that they indicate
QUANTIZED: tuple[tuple[str, str], ...] = (
    (r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.", "a model quantized with bitsandbytes"),
    (r"\.(wscales|wtscale|smooth_factor(_orig)?)$", "a model quantized for nunchaku (SVDQuant, int4 or fp4)"),
    (r"\.(qweight|qzeros)$", "a model quantized to int4 (GPTQ or AWQ)"),
    (r"\.weight_scale_2$", "a model quantized to nvfp4"),
)
LORA: tuple[tuple[str, str], ...] = (
    (
        r"(^|[._])lora_(A|B|up|down|mid|unet|te\d*)([._]|$)|\.lora\.|_lora\.|\.lora_layer\.|\.alpha$|\.diff(_[bm])?$|"
        r"\.(lokr|hada)_w\d|\.(oft_blocks|oft_diag|dora_scale|lora_magnitude_vector)",
        "a LoRA or a patch for a model, not a model",
    ),
)
RELATIVES: tuple[tuple[str, str], ...] = (
    (r"^vace_(blocks|patch_embedding)\.", "Wan VACE"),
    (r"^(casual_audio_encoder|audio_injector|cond_encoder|frame_packer|trainable_cond_mask)\b", "Wan 2.2 S2V"),
    (r"^(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.", "Wan 2.2 Animate"),
    (r"^control_adapter\.", "Wan Fun Camera"),
    (r"^ref_conv\.", "Wan Fun Control"),
    (r"^audio_proj\.audio_proj_glob|\.audio_cross_attn_wrapper\.", "HuMo, made from Wan 2.1"),
    (r"\.audio_cross_attn\.|^audio_proj\.", "MultiTalk or another Wan model with audio"),
    (r"\.(cam_encoder|projector)\.(weight|bias)$", "ReCamMaster, made from Wan 2.1"),
    (r"^fps_(embedding|projection)\b", "SkyReels V2 with an input for the frame rate, made from Wan 2.1"),
    (r"^img_emb\.emb_pos$|\.image_embedder\.pos_embed$", "Wan 2.1 FLF2V (first and last frame)"),
    (r"^(dwpose_embedding|patch_embedding_\w+|add_conv_in|control_conv_in)\b", "a Wan model with a control input"),
    (r"\.to_gate_compress\.", "a Wan model with the gates of video sparse attention (VSA)"),
)
OTHERS: tuple[tuple[str, str], ...] = (
    (r"^blocks\.\d+\.(self_attn|attn1)\.|^condition_embedder\.", "a Wan transformer"),
    (r"^encoder\.downsamples\.\d+\.downsamples\.|^decoder\.upsamples\.\d+\.upsamples\.", "the VAE of Wan 2.2 TI2V-5B"),
    (r"^(encoder\.downsamples|decoder\.upsamples|encoder\.conv1|decoder\.conv1)\.", "a Wan VAE"),
    (r"^(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_in|down|up|mid)\b", "an autoencoder (VAE)"),
    (r"^encoder\.block\.\d+\.layer\.|^shared\.weight$", "a T5 text encoder"),
    (r"^blocks\.\d+\.pos_embedding\.|^token_embedding\.weight$", "a umT5 text encoder"),
    (r"^(vision_model|text_model)\.|^visual\.(transformer|blocks|trunk|conv1)\b|^textual\.", "a CLIP encoder"),
    (r"^audio_model\.|^video_model\.", "Ovi or another model of video and audio"),
    (r"^(patchify_proj|adaln_single|caption_projection)\.", "LTX-Video"),
    (r"^txt_in\.individual_token_refiner|^context_embedder\.(token_refiner|time_text_embed)", "HunyuanVideo"),
    (r"^double_blocks\.|^single_transformer_blocks\.|^single_blocks\.", "Flux or HunyuanVideo"),
    (r"^patch_embed\.text_proj\.|^transformer_blocks\.\d+\.norm1\.linear", "CogVideoX or a transformer like it"),
    (r"^joint_(transformer_)?blocks\.", "Stable Diffusion 3"),
    (r"^(input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)\.", "a U-Net of Stable Diffusion"),
    (r"^transformer_blocks\.", "another diffusion transformer"),
    (r"^(layers|h|embed_tokens|wte|lm_head|decoder\.layers)\.", "a language model"),
    (r"\.?(exp_avg|exp_avg_sq|momentum_buffer)$", "the state of an optimizer"),
)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def foreign_start(path: Path) -> str | None:
    """Describes a file by its first bytes, if it is known not to be readable weights.

    Args:
        path: The file.

    Returns:
        A description, or None.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "empty; copy or download it again"
    if not any(start) and len(start) == 512:
        return "not downloaded to the end: it begins with zeros; download it again"
    if start[4:8] == b"ftyp":
        return "a video"
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    return next((what for begin, what in STARTS if start.startswith(begin)), None)


def shard_of(path: Path) -> str | None:
    """The name of the index of a file that is one of several shards; None for other files."""
    shard = _SHARD.search(path.name)
    return None if shard is None or shard[2] == "00001" else f"{path.name[: shard.start()]}.safetensors.index.json"


def refuse(names: Iterable[str], where: Path, wanted: str) -> ValueError:
    """The error for a file that is not `wanted`, such as "a Wan VAE"; it names the kind of the file if recognised."""
    names = list(names)
    kind = what_has(names, QUANTIZED, LORA, OTHERS)
    what, examples = ("", names) if kind is None else (f" but {kind[0]}", kind[1])
    shown = "; ".join(printable(name, 80) for name in examples[:3]) + ("; ..." if len(examples) > 3 else "")
    return ValueError(f"{where} is not {wanted}{what}: it holds {shown}.")


def what_has(names: Iterable[str], *tables: tuple[tuple[str, str], ...]) -> tuple[str, list[str]] | None:
    """The description in the first row of the tables that any of the names match, and those names; else None.

    Examples:
        >>> what_has(["vace_blocks.0.before_proj.weight"], RELATIVES)
        ('Wan VACE', ['vace_blocks.0.before_proj.weight'])
    """
    names = list(names)
    for table in tables:
        for pattern, what in table:
            if matching := [name for name in names if re.search(pattern, name)]:
                return what, matching
    return None
