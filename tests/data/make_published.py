"""Runs published functions of sparse attention on a CPU and keeps what they give, in `published_KIND.npz` beside this.

    TRITON_INTERPRET=1 python -O -m tests.data.make_published KIND CHECKOUT

CHECKOUT is the published repository at the commit that `published.md` names. Nothing of it is here: it is imported,
with stand-ins for what needs a GPU. Triton's kernels run in its interpreter; -O lets their wrappers take CPU tensors.
"""

import argparse
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton

from tests.data import published_inputs as inputs

HERE = Path(__file__).parent


def stand_in(*names: str) -> None:
    """Modules, and those above them, of which every attribute is a mock."""
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module: Any = types.ModuleType(".".join(parts[:end]))
            module.__path__ = []
            module.__getattr__ = lambda attribute: mock.MagicMock()
            sys.modules.setdefault(module.__name__, module)


def package(name: str, folder: Path) -> None:
    """A package without its __init__."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def on_a_cpu() -> None:
    """No tuning, no compilation, no card."""
    untuned: Any = triton
    untuned.autotune = lambda configs, **_: triton.heuristics(
        {name: lambda _, value=value: value for name, value in configs[0].kwargs.items()}
    )
    cuda: Any = torch.Tensor
    cuda.cuda = lambda self, *_, **__: self
    memory: Any = torch.cuda
    memory.memory_allocated = lambda: 0
    whole: Any = torch
    whole.compile = lambda function=None, **_: function if function is not None else lambda f: f


def bits(mask: Any) -> np.ndarray:
    return np.packbits(np.asarray(mask, bool), axis=-1)


def radial(checkout: Path) -> dict[str, np.ndarray]:
    stand_in("flashinfer", "matplotlib.pyplot", "sparse_sageattn", "sageattention", "spas_sage_attn")
    sys.path.insert(0, str(checkout))
    make = importlib.import_module("radial_attn.attn_mask").gen_log_mask_shrinked
    out, query = {}, torch.zeros(1)
    for frames, tokens, decay, block in (
        (20, 384, 1.0, 128),  # whole blocks
        (20, 384, 0.2, 128),
        (20, 384, 1.0, 64),
        (35, 128, 0.5, 128),  # most distances are thinned out
        (17, 200, 1.0, 128),  # blocks run on across frames, and the last is a part
        (17, 200, 3.0, 128),
        (50, 96, 1.0, 128),  # a frame of less than a block, whose neighbours are left out too
        (21, 1560, 0.2, 128),
        (21, 1560, 1.0, 128),
        (21, 3600, 0.2, 128),
        (21, 3600, 1.0, 128),
    ):
        total = frames * tokens
        length = -(-total // block) * block
        mask = make(
            query, length, total, frames, block_size=block, sparse_type="radial", decay_factor=decay, model_type="wan"
        )
        out[f"{frames} {tokens} {decay} {block}"] = bits(mask)
    return out


def svg(checkout: Path) -> dict[str, np.ndarray]:
    stand_in("flashinfer", "cuvs.cluster.kmeans", "loguru", "termcolor", "diffusers.models.attention_processor")
    stand_in("diffusers.models.embeddings", "diffusers.models.normalization")
    sys.path.insert(0, str(checkout))
    attention: Any = importlib.import_module("svg.models.wan.attention")
    utils: Any = importlib.import_module("svg.models.wan.utils")
    out = {}
    shares = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.9)
    for name, frames, tokens in (("480p", 21, 1560), ("720p", 21, 3600), ("small", 6, 130)):
        widths, total = [], frames * tokens
        for share in shares:
            mod = utils.generate_temporal_head_mask_mod(
                0, 0, frames, tokens, utils.sparsity_to_width(share, 0, frames, tokens)
            )
            row = mod(0, 0, torch.tensor(total - 1), torch.arange(tokens, total))
            widths.append(int(row.sum()) - 1)
        out[f"widths {name}"] = np.array(widths)
    out["shares"] = np.array(shares)
    total, rows = 21 * 3600, torch.tensor(inputs.SVG_ROWS)
    for share in inputs.SVG_LARGE:
        mod = utils.generate_temporal_head_mask_mod(0, 0, 21, 3600, utils.sparsity_to_width(share, 0, 21, 3600))
        out[f"band 720p {share}"] = bits(mod(0, 0, rows[:, None], torch.arange(total)[None]))
    frames, tokens, keep = 6, 130, 0.3
    total = frames * tokens
    mod = utils.generate_temporal_head_mask_mod(0, 0, frames, tokens, utils.sparsity_to_width(keep, 0, frames, tokens))
    number = torch.arange(total)
    out["band"] = bits(mod(0, 0, number[:, None], number[None]))
    processor = attention.WanAttn_SVGAttn_Processor2_0(layer_idx=0)
    processor.context_length, processor.num_frame, processor.frame_size = 0, frames, tokens
    processor.num_sampled_rows, processor.sample_mse_max_row, processor.first_times_fp = 64, 700, 1000
    masks = [utils.get_attention_mask(name, 700, 0, frames, tokens) for name in ("spatial", "temporal")]
    processor.attention_masks = masks
    out |= {f"profile {name}": bits(mask) for name, mask in zip(("spatial", "temporal"), masks, strict=True)}
    processor.block_mask = utils.create_block_mask_cached(mod, None, None, total, total, device="cpu")
    q, k, v = map(torch.tensor, inputs.svg())
    torch.manual_seed(0)
    out["rows"] = torch.randint(low=0, high=700, size=(64,)).numpy()  # as it will draw them
    torch.manual_seed(0)
    out["errors"] = processor.sample_mse(q, k, v).numpy()
    torch.manual_seed(0)
    units = torch.eye(total).expand(1, 4, total, total)
    out["errors of the map"] = processor.sample_mse(q, k, units).numpy()
    order = torch.zeros(1, 4, total, 16)
    order[..., 0] = number  # where the temporal heads' tokens go
    placed = [torch.zeros_like(order) for _ in range(3)]
    attention.wan_sparse_head_placement(
        order, order, order, *placed, torch.ones(1, 4, dtype=torch.int64), 0, frames, tokens
    )
    out["order"] = placed[0][0, 0, :, 0].numpy().astype(np.int64)
    torch.manual_seed(0)
    with torch.no_grad():
        out["output"] = processor.attention_core_logic(q, k, v, [0])[:, :, ::6].numpy()
    return out


def with_float32(module: Any) -> None:
    """A module of kernels in which bfloat16 means float32, so that they round nothing in between."""

    class Language(types.ModuleType):
        bfloat16 = module.tl.float32
        whole = module.tl

        def __getattr__(self, name: str) -> Any:
            return getattr(self.whole, name)

    def counted(*ends: Any) -> Any:
        """Numbers as a compiled kernel has them."""
        return (language.full((), number, language.int32) for number in range(*map(int, ends)))

    language: Any = module.tl
    module.interpreted = language  # the interpreter looks for it among the globals
    module.tl, module.range = Language("language"), counted


def vsa(checkout: Path) -> dict[str, np.ndarray]:
    for name, folder in (
        ("fastvideo", "fastvideo"),
        ("fastvideo.attention", "fastvideo/attention"),
        ("fastvideo.attention.backends", "fastvideo/attention/backends"),
        ("fastvideo_kernel", "fastvideo-kernel/python/fastvideo_kernel"),
        ("fastvideo_kernel.triton_kernels", "fastvideo-kernel/python/fastvideo_kernel/triton_kernels"),
    ):
        package(name, checkout / folder)
    stand_in("fastvideo.distributed", "fastvideo.logger", "fastvideo_kernel.triton_kernels.st_attn_triton")
    ops: Any = importlib.import_module("fastvideo_kernel.ops")
    kernels: Any = importlib.import_module("fastvideo_kernel.triton_kernels.block_sparse_attn_triton")
    listed: Any = importlib.import_module("fastvideo_kernel.triton_kernels.index").map_to_index
    with_float32(kernels)
    sys.modules["fastvideo_kernel"].__dict__["video_sparse_attn"] = ops.video_sparse_attn
    backend: Any = importlib.import_module("fastvideo.attention.backends.video_sparse_attn")
    masks = []

    class Sparse(torch.autograd.Function):
        """The kernels, which the published operator calls for tensors on a card."""

        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, sizes: Any) -> Any:
            masks.append(mask.numpy())
            lists, sizes = listed(mask), sizes.int()
            out, lse = kernels.triton_block_sparse_attn_forward(q, k, v, *lists, sizes)
            ctx.save_for_backward(q, k, v, out, lse, *lists, *listed(mask.transpose(2, 3).contiguous()), sizes)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            by = kernels.triton_block_sparse_attn_backward(gradients[0].contiguous(), *ctx.saved_tensors)
            return *by, None, None

    ops.block_sparse_attn = lambda *tensors: (Sparse.apply(*tensors), None)
    build = backend.VideoSparseAttentionMetadataBuilder().build
    attend = backend.VideoSparseAttentionImpl(2, 16, False, 0.25)
    out: dict[str, np.ndarray] = {}
    for name, ties in (("", False), ("ties ", True)):
        place = build(0, inputs.VSA_GRID, (1, 1, 1), VSA_sparsity=0.6, device=torch.device("cpu"), cache_tile_buf=False)
        *given, weights = (torch.tensor(x, requires_grad=not ties) for x in inputs.vsa(ties=ties))
        tiled = [attend.preprocess_qkv(x, place) for x in given]
        found = attend.postprocess_output(attend.forward(*tiled, place), place)
        out[f"{name}mask"] = masks[-1][0]
        out[f"{name}output"] = found.detach().numpy()[:, ::3]
        if not ties:
            gradients = torch.autograd.grad((found * weights).sum(), given)
            for label, gradient in zip(("query", "key", "value", "gate"), gradients, strict=True):
                out[label] = gradient.numpy()[:, ::3]
    out["sizes"] = place.variable_block_sizes.numpy()
    large = build(0, inputs.VSA_LARGE, (1, 1, 1), VSA_sparsity=0.6, device=torch.device("cpu"), cache_tile_buf=False)
    out["sizes 720p"] = large.variable_block_sizes.numpy().astype(np.uint8)
    out["counts"] = np.array(
        [[backend.compute_topk(1 - keep, count) for count in inputs.VSA_CUBES] for keep in inputs.VSA_SHARES]
    )
    return out


def sliding_tile(checkout: Path) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(checkout / "fastvideo-kernel/tests"))
    make = importlib.import_module("support_flex_sta").generate_sta_mask
    package("fastvideo_kernel", checkout / "fastvideo-kernel/python/fastvideo_kernel")
    order = importlib.import_module("fastvideo_kernel.vsa_utils").get_tile_partition_indices
    out = {}
    for name, (grid, tile, window) in inputs.TILES.items():
        number = torch.arange(0, int(np.prod(grid)), 1 if name.startswith("tokens") else int(np.prod(tile)))
        mask = make(grid, window, tile, 0)(0, 0, number[:, None], number[None]).numpy()
        if name.startswith("tokens"):  # numbered by tiles, to be by tokens
            to = order(grid, tile, torch.device("cpu")).numpy()
            back = np.zeros_like(mask)
            back[np.ix_(to, to)] = mask
            mask = back
        out[name] = bits(mask)
    return out


def sla(checkout: Path) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(checkout))
    core: Any = importlib.import_module("sparse_linear_attention.core")
    layer = core.SparseLinearAttention(16, 0.5)
    layer.dtype = torch.float32
    *given, kernel, bias, weights = (torch.tensor(x, requires_grad=True) for x in inputs.sla())
    layer.proj_l.weight.data, layer.proj_l.bias.data = kernel.detach().T.contiguous(), bias.detach()
    found = layer(*given)
    out = {"map": core.get_block_map(*given[:2], topk_ratio=0.5)[0].numpy()[0].astype(bool)}
    out["output"] = found.detach().numpy()[:, :, ::3]
    gradients = torch.autograd.grad((found * weights).sum(), (*given, layer.proj_l.weight, layer.proj_l.bias))
    for label, gradient in zip(("query", "key", "value", "kernel", "bias"), gradients, strict=True):
        out[label] = gradient.numpy()[:, :, ::3] if gradient.ndim == 4 else gradient.numpy().T
    return out


def svg2(checkout: Path) -> dict[str, np.ndarray]:
    stand_in("flashinfer", "cuvs.cluster.kmeans")
    sys.path.insert(0, str(checkout))
    from_tokens: Any = importlib.import_module("svg.kmeans_utils")
    out: dict[str, np.ndarray] = {}
    for name, (tokens, first) in inputs.clusters().items():
        for rounds in (1, 3, 50):
            found = from_tokens.batch_kmeans_Euclid(
                torch.tensor(tokens), first.shape[1], max_iters=rounds, init_centroids=torch.tensor(first)
            )
            labels, centroids, sizes = (x.numpy() for x in found[:3])
            out |= {f"{name} {rounds} labels": labels.astype(np.uint8), f"{name} {rounds} centroids": centroids}
            out |= {f"{name} {rounds} sizes": sizes}
    q, k, v, weights = (torch.tensor(x, requires_grad=True) for x in inputs.svg2())
    of = []
    for x, drawn in zip((q, k), inputs.DRAWN, strict=True):
        x = x.detach()[0]
        first = x[:, list(drawn)]
        of.append(from_tokens.batch_kmeans_Euclid(x, len(drawn), max_iters=inputs.ROUNDS, init_centroids=first))
    (of_query, queries, query_sizes), (of_key, keys, key_sizes) = ([x[None] for x in found[:3]] for found in of)
    for top_p, least in inputs.SHARES:
        kept = from_tokens.identify_dynamic_map(queries, keys, query_sizes, key_sizes, top_p, least)
        out[f"map {top_p} {least}"] = kept.numpy()
    kept = from_tokens.identify_dynamic_map(queries, keys, query_sizes, key_sizes, *inputs.SHARES[0])
    by_query, order = from_tokens.permute_tensor_by_labels(q, of_query, 2)
    by_key, by_value = (from_tokens.permute_tensor_by_labels(x, of_key, 2)[0] for x in (k, v))
    found = from_tokens.dynamic_block_sparse_fwd_torch(by_query, by_key, by_value, kept, query_sizes, key_sizes)
    found = from_tokens.apply_inverse_permutation(found, order, 2)
    out |= {"of query": of_query.numpy(), "of key": of_key.numpy(), "key sizes": key_sizes.numpy()}
    out["density"] = from_tokens.density_calculation(kept, query_sizes, key_sizes).numpy()
    out["output"] = found.detach().numpy()[:, :, ::3]
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for label, gradient in zip(("query", "key", "value"), gradients, strict=True):
        out[label] = gradient.numpy()[:, :, ::3]
    return out


KINDS = {"radial": radial, "svg": svg, "vsa": vsa, "sliding_tile": sliding_tile, "sla": sla, "svg2": svg2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("checkout", type=Path)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1" or __debug__:
        parser.error("needs TRITON_INTERPRET=1 and python -O.")
    on_a_cpu()
    torch.manual_seed(0)
    arrays: dict[str, Any] = KINDS[args.kind](args.checkout)
    np.savez_compressed(HERE / f"published_{args.kind}.npz", **arrays)
    print({name: (array.shape, str(array.dtype)) for name, array in arrays.items()})


if __name__ == "__main__":
    main()
