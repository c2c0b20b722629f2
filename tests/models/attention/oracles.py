"""Sparse attention from the formulas, over whole maps in NumPy and PyTorch, float64; nothing of the package is used."""

from decimal import ROUND_CEILING, Decimal

import numpy as np
import torch


def places(grid):
    """Frame, row, column of each token."""
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)


def causal(grid, block):
    """Which keys each query may see, [N, N]."""
    if block is None:
        return np.ones((np.prod(grid),) * 2, bool)
    number = places(grid)[:, 0] // block
    return number[None] <= number[:, None]


def blocks_of(grid, block):
    """Rows of each causal block, as slices."""
    frames, tokens = grid[0], grid[1] * grid[2]
    step = block or frames
    return [slice(start * tokens, min(start + step, frames) * tokens) for start in range(0, frames, step)]


def scores_of(q, k):
    return np.einsum("bqnd,bknd->bnqk", q, k, dtype=np.float64) / np.sqrt(q.shape[-1])


def attention(q, k, v, mask):
    """Tensors [B, N, n, d], a mask that broadcasts to [B, n, N, N]."""
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~torch.as_tensor(mask), float("-inf"))
    return torch.einsum("bnqk,bknd->bqnd", torch.softmax(scores, -1), v)


def top_k(q, k, v, grid, block, *, keep):
    scores, seen = scores_of(q, k), causal(grid, block)
    mask = np.zeros(scores.shape, bool)
    for row in range(scores.shape[2]):
        among = np.flatnonzero(seen[row])
        count = int((Decimal(str(keep)) * len(among)).to_integral_value(ROUND_CEILING))
        order = np.argsort(-scores[:, :, row][..., among].astype(np.float32), axis=-1, kind="stable")[..., :count]
        np.put_along_axis(mask[:, :, row], among[order], True, -1)
    return mask


def svg(q, k, v, grid, block, *, keep, rows, size):
    """Published order of things: masks of the whole clip in each order, permuted back; heads by the smaller error."""
    frames, tokens = grid[0], grid[1] * grid[2]
    total = frames * tokens
    number = np.arange(total)
    to_place = number.reshape(frames, tokens).T.ravel()  # tokens in position-major order
    width = size * int(np.ceil(total * (1 - np.sqrt(1 - keep)) / size))
    band = (np.abs(number[:, None] - number) <= width) | (number < tokens)
    near = np.abs(number[:, None] // size - number // size) < 2 * tokens // size
    profile = near | (number < tokens)

    def back(mask):
        out = np.empty_like(mask)
        out[np.ix_(to_place, to_place)] = mask
        return out

    masks, profiles = (band, back(band)), (profile, back(profile))
    seen, chosen = causal(grid, block), np.zeros((q.shape[0], q.shape[2], total, total), bool)
    for part in blocks_of(grid, block):
        drawn = part.start + np.array(rows)
        queries = torch.as_tensor(q[:, drawn])
        dense = attention(queries, torch.as_tensor(k), torch.as_tensor(v), seen[drawn])
        errors = []
        for mask in profiles:
            out = attention(queries, torch.as_tensor(k), torch.as_tensor(v), (mask & seen)[drawn])
            errors.append(((out - dense) ** 2).mean((1, 3)).numpy())
        temporal = errors[1] < errors[0]
        chosen[:, :, part] = np.where(temporal[..., None, None], masks[1][part], masks[0][part])
    return chosen & seen


def radial(q, k, v, grid, block, *, decay, size):
    """The general rule, entry by entry."""
    frames, tokens = grid[0], grid[1] * grid[2]
    long = 2 ** int(tokens).bit_length()
    out = np.zeros((frames * tokens,) * 2, bool)
    place = np.arange(tokens)
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            reach = decay * long / 2 ** d.bit_length()
            pair = np.abs(place[:, None] - place) <= max(size, reach)
            if reach < size and d % int(size / reach):
                pair[:] = False
            full = np.zeros_like(pair)
            for r in range(0, tokens, size):
                for c in range(0, tokens, size):
                    part = pair[r : r + size, c : c + size]
                    shares = part.mean(0)
                    if (shares > 0).any():
                        full[r : r + size, c : c + size] = (shares > 1 / 3).sum() / (shares > 0).sum() > 0.6
            if j == 0 or d == 0:
                full[:] = True
            out[i * tokens : (i + 1) * tokens, j * tokens : (j + 1) * tokens] = full
    return out & causal(grid, block)


def sliding_tile(q, k, v, grid, block, *, tile, windows):
    at = places(grid) // np.array(tile)
    tiles = np.array(grid) // np.array(tile)
    masks = []
    for window in windows:
        mask = np.ones((len(at),) * 2, bool)
        for axis in range(3):
            half = window[axis] // 2
            centre = torch.as_tensor(at[:, axis]).clamp(half, int(tiles[axis]) - 1 - half).numpy()
            mask &= np.abs(centre[:, None] - at[:, axis]) <= half
        masks.append(mask)
    return np.stack(masks) & causal(grid, block)


def cubes_of(grid, cube):
    """Number of each token's cube, and a matrix of means [cubes, N]."""
    count = [-(-size // side) for size, side in zip(grid, cube, strict=True)]
    of = np.asarray(np.ravel_multi_index(tuple((places(grid) // np.array(cube)).T), count))
    member = (of == np.arange(np.prod(count))[:, None]).astype(np.float64)
    return of, member / member.sum(1, keepdims=True)


def vsa(q, k, v, gate, grid, block, *, keep, cube):
    """Output for tensors; the choice is made by a stable sort."""
    of, mean = cubes_of(grid, cube)
    mean, outputs = torch.as_tensor(mean), []
    qc, kc, vc = (torch.einsum("cn,bnhd->bchd", mean, x) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", qc, kc) / q.shape[-1] ** 0.5
    cube_frame = np.zeros(len(mean), int)
    cube_frame[of] = places(grid)[:, 0]  # any of its frames tells the causal block
    for part in blocks_of(grid, block):
        seen = np.arange(len(of)) < part.stop
        there = np.unique(of[seen])
        count = int((Decimal(str(keep)) * len(there)).to_integral_value(ROUND_CEILING))
        mine = np.unique(of[part])
        chosen = np.zeros((*scores.shape[:2], len(mean), len(mean)), bool)
        found = scores.detach().numpy()[:, :, mine][..., there]
        order = np.argsort(-found, axis=-1, kind="stable")[..., :count]
        sub = np.zeros(found.shape, bool)
        np.put_along_axis(sub, order, True, -1)
        chosen[np.ix_(range(chosen.shape[0]), range(chosen.shape[1]), mine, there)] = sub
        mask = chosen[:, :, of[part]][..., of] & seen
        fine = attention(q[:, part], k, v, mask)
        coarse_mask = np.isin(np.arange(len(mean)), there)
        coarse = attention(qc, kc, vc, coarse_mask[None].repeat(len(mean), 0))
        outputs.append(fine + gate[:, part] * coarse[:, of[part]])
    return torch.cat(outputs, 1)


def sla(q, k, v, kernel, bias, grid, block, *, keep, size):
    """Output for tensors, block of frames by block of frames."""
    outputs = []
    for part in blocks_of(grid, block):
        queries, keys, values = q[:, part], k[:, : part.stop], v[:, : part.stop]
        pool = [torch.stack([x.mean(1) for x in t.split(size, 1)], 1) for t in (queries, keys - keys.mean(1, True))]
        scores = torch.einsum("bqhd,bkhd->bhqk", *pool).detach().numpy()
        count = int(Decimal(str(keep)) * scores.shape[-1])
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, np.argsort(-scores, axis=-1, kind="stable")[..., :count], True, -1)
        mask = chosen.repeat(size, 2).repeat(size, 3)[:, :, : queries.shape[1], : keys.shape[1]]
        sparse = attention(queries, keys, values, mask)
        phi_q, phi_k = torch.softmax(queries, -1), torch.softmax(keys, -1)
        products = torch.einsum("bqhd,bkhd->bhqk", phi_q, phi_k)
        linear = torch.einsum("bhqk,bkhd->bqhd", products / (1e-5 + products.sum(-1, keepdim=True)), values)
        outputs.append(sparse + linear @ kernel + bias)
    return torch.cat(outputs, 1)


def kmeans(x, centroids, *, rounds, tolerance=1e-4):
    """One head, float64: labels, centroids, sizes, as published leaves them."""
    for _ in range(rounds):
        labels = ((x[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
        moved = centroids.copy()
        for c in range(len(centroids)):
            if (labels == c).any():
                moved[c] = x[labels == c].mean(0)
        sizes = np.bincount(labels, minlength=len(centroids))
        if np.linalg.norm(moved - centroids, axis=1).max() < tolerance:
            break
        centroids = moved
    return labels, centroids, sizes


def cluster_map(query, key, sizes, *, top_p, least):
    """One head: clusters kept, going down the sorted shares."""
    kept = np.zeros((len(query), len(key)), bool)
    for i, centre in enumerate(query):
        weights = sizes * np.exp(key @ centre / np.sqrt(len(centre)))
        shares, total = weights / weights.sum(), 0.0
        for rank, j in enumerate(np.argsort(-shares, kind="stable")):
            if total <= top_p or rank < least:
                kept[i, j] = True
            total += shares[j]
    return kept
