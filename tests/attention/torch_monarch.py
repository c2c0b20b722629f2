"""Tiled MonarchAttention in PyTorch, written from its definition and sharing nothing with the package.

Tokens are placed in tiles by an explicit loop over coordinates, tile pairs are looped over, and PyTorch differentiates.
"""

import torch


def tile_indices(grid, tile, blocks):
    """List over tiles of token indices [b1, b2]."""
    frames, height, width = grid
    n_f, n_h, n_w = tile
    rows, cols = blocks.split(",")
    size = {"f": n_f, "h": n_h, "w": n_w}
    tiles = {}
    for f in range(frames):
        for y in range(height):
            for x in range(width):
                inside = {"f": f % n_f, "h": y % n_h, "w": x % n_w}
                i = j = 0
                for d in rows:
                    i = i * size[d] + inside[d]
                for d in cols:
                    j = j * size[d] + inside[d]
                tiles.setdefault((f // n_f, y // n_h, x // n_w), {})[i, j] = (f * height + y) * width + x
    out = []
    for key in sorted(tiles):
        entries = tiles[key]
        b1, b2 = 1 + max(i for i, _ in entries), 1 + max(j for _, j in entries)
        out.append((key[0], torch.tensor([[entries[i, j] for j in range(b2)] for i in range(b1)])))
    return out


def torch_monarch(q, k, v, *, grid, tile, blocks="fh,w", num_iters=1, scale=None, causal_block=None, kv_frames=None):
    """q [B, Nq, H, D], k, v [B, Nk, H, D] -> [B, Nq, H, D]."""
    height, width = grid[1:]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    key_frames = k.shape[1] // (height * width) if kv_frames is None else kv_frames
    query_tiles = tile_indices(grid, tile, blocks)
    key_tiles = tile_indices((key_frames, height, width), tile, blocks)
    out = torch.zeros_like(q)
    for group, index in query_tiles:
        first_frame = key_frames - grid[0] + group * tile[0]
        seen = [
            idx
            for g, idx in key_tiles
            if causal_block is None or (g * tile[0]) // causal_block <= first_frame // causal_block
        ]
        qa = q[:, index]  # [B, i, j, H, D]
        keys, values = [k[:, idx] for idx in seen], [v[:, idx] for idx in seen]
        left = rights = None
        for _ in range(num_iters):
            rights, scores = [], []
            for c, kc in enumerate(keys):
                if left is None:
                    z = scale * torch.einsum("bkjhd,bklhd->bhkjl", qa, kc)
                else:
                    weight = left[c]  # [B, H, j, i, k]
                    mixed = torch.einsum("bhjik,bijhd->bhkjd", weight, qa)
                    total = weight.sum(3).transpose(2, 3)  # [B, H, k, j]
                    factor = torch.clamp(1 / (total + 1e-6), max=1e4)
                    z = scale * torch.einsum("bhkjd,bklhd->bhkjl", mixed, kc) * factor[..., None]
                right = torch.softmax(z, -1)
                alpha = torch.einsum("bhkjl,bklhd->bhjkd", right, kc)
                c_l = (right * torch.log_softmax(z, -1)).sum(-1).transpose(2, 3)  # [B, H, j, k]
                scores.append(scale * torch.einsum("bijhd,bhjkd->bhjik", qa, alpha) - c_l[:, :, :, None])
                rights.append(right)
            joint = torch.softmax(torch.cat(scores, -1), -1)
            left = joint.split([s.shape[-1] for s in scores], -1)
        assert left is not None
        assert rights is not None
        shares = [
            torch.einsum("bhjik,bhkjl,bklhd->bijhd", weight, right, vc)
            for weight, right, vc in zip(left, rights, values, strict=True)
        ]
        out[:, index.reshape(-1)] = torch.stack(shares).sum(0).flatten(1, 2)
    return out
