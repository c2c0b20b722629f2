"""Wan's transformer in float64 PyTorch, a second time and plainly: one attention with an explicit mask, and autograd.

Nothing of the package is used but the parameters. Frames carry their own time and position, so that a clip with its
clean copy in front, or a block after cached ones, is the same function with another mask or with given keys and values.
"""

import math

import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
torch.set_num_threads(1)


class PlainWan:
    """Parameters of a `WanModel` as float64 leaves that require gradients."""

    def __init__(self, model):
        self.config = model.config
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        self.leaves = {path: tensor(leaf[...]).requires_grad_() for path, leaf in flat}

    def gradients(self, loss):
        """By every parameter, as a list in the order of the model's leaves."""
        found = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        return [
            np.zeros(leaf.shape) if g is None else g.numpy()
            for g, leaf in zip(found, self.leaves.values(), strict=True)
        ]

    def _get(self, *path, layer=None):
        leaf = self.leaves[path]
        return leaf if layer is None else leaf[layer]

    def _linear(self, x, *path, layer=None):
        return x @ self._get(*path, "kernel", layer=layer) + self._get(*path, "bias", layer=layer)

    def _mlp(self, x, act, *path, layer=None):
        return self._linear(act(self._linear(x, *path, "fc1", layer=layer)), *path, "fc2", layer=layer)

    def _rms(self, x, *path, layer):
        normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config.eps)
        return normed * self._get(*path, "scale", layer=layer)

    def _norm(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.config.eps)

    def _rotated(self, x, frames, height, width):
        """x: [B, F*h*w, n, d], adjacent pairs turned by the angles of (frame, row, column)."""
        d = x.shape[-1]
        spatial = 2 * (d // 6)
        angles = []
        rows, columns = np.arange(height), np.arange(width)
        for places, size in ((frames, d - 2 * spatial), (rows, spatial), (columns, spatial)):
            angles.append(np.outer(places, 10000.0 ** (-np.arange(0, size, 2) / size)))
        table = np.concatenate(
            [
                np.broadcast_to(part, (len(frames), height, width, part.shape[-1]))
                for part in (angles[0][:, None, None], angles[1][None, :, None], angles[2][None, None])
            ],
            axis=-1,
        ).reshape(1, -1, 1, d // 2)
        cos, sin = tensor(np.cos(table)), tensor(np.sin(table))
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def __call__(self, latents, times, text, *, positions=None, mask=None, past=None):
        """Flow [B, F, H, W, C], and each layer's keys and values [B, tokens, n, d].

        Args:
            latents: [B, F, H, W, C].
            times: [B, F].
            text: [B, L, E].
            positions: Time index of each frame; by default 0, 1, ...
            mask: [F, F + past frames] of bools, which frame sees which; None: all. Past frames come first.
            past: For each layer keys and values that come before the clip's own.
        """
        c = self.config
        batch, frames, height, width, channels = latents.shape
        h, w = height // 2, width // 2
        positions = np.arange(frames) if positions is None else np.asarray(positions)
        patches = latents.reshape(batch, frames, h, 2, w, 2, channels).permute(0, 1, 2, 4, 3, 5, 6)
        kernel = self._get("patch_embedding", "kernel").reshape(-1, c.dim)
        x = patches.reshape(batch, frames, h * w, -1) @ kernel + self._get("patch_embedding", "bias")
        ladder = 10000.0 ** (-torch.arange(c.freq_dim // 2, dtype=torch.float64) / (c.freq_dim // 2))
        angles = times[..., None] * ladder
        time = self._mlp(torch.cat([angles.cos(), angles.sin()], -1), torch.nn.functional.silu, "time_embedding")
        modulation = self._linear(torch.nn.functional.silu(time), "time_projection").reshape(batch, frames, 6, c.dim)
        padded = torch.cat([text, text.new_zeros(batch, c.text_len - text.shape[1], text.shape[2])], 1)
        context = self._mlp(padded, gelu, "text_embedding")

        def split(a):
            return a.reshape(batch, -1, c.num_heads, c.head_dim)

        keep = None if mask is None else torch.tensor(np.kron(mask, np.ones((h * w, h * w))) > 0)
        written = []
        for layer in range(c.num_layers):
            table = modulation + self._get("blocks", "modulation", layer=layer)
            sh1, sc1, g1, sh2, sc2, g2 = (table[:, :, None, n] for n in range(6))
            a = self._norm(x) * (1 + sc1) + sh1
            at = ("blocks", "self_attn")
            q, k, v = (self._linear(a, *at, name, layer=layer) for name in "qkv")
            q, k = (self._rms(y, *at, f"norm_{name}", layer=layer) for name, y in (("q", q), ("k", k)))
            q, k, v = self._rotated(split(q), positions, h, w), self._rotated(split(k), positions, h, w), split(v)
            written.append((k, v))
            if past is not None:
                k, v = (torch.cat([old, new], 1) for old, new in zip(past[layer], (k, v), strict=True))
            x = x + self._linear(attend(q, k, v, keep).reshape(x.shape), *at, "o", layer=layer) * g1
            at = ("blocks", "cross_attn")
            y = self._norm(x) * self._get("blocks", "norm3", "scale", layer=layer)
            y = y + self._get("blocks", "norm3", "bias", layer=layer)
            q = split(self._rms(self._linear(y, *at, "q", layer=layer), *at, "norm_q", layer=layer))
            k = split(self._rms(self._linear(context, *at, "k", layer=layer), *at, "norm_k", layer=layer))
            v = split(self._linear(context, *at, "v", layer=layer))
            x = x + self._linear(attend(q, k, v, None).reshape(x.shape), *at, "o", layer=layer)
            y = self._norm(x) * (1 + sc2) + sh2
            x = x + self._mlp(y, gelu, "blocks", "ffn", layer=layer) * g2
        table = time[:, :, None] + self._get("head", "modulation")
        out = self._linear(self._norm(x) * (1 + table[:, :, None, 1]) + table[:, :, None, 0], "head", "proj")
        out = out.reshape(batch, frames, h, w, 2, 2, -1).permute(0, 1, 2, 4, 3, 5, 6)
        return out.reshape(batch, frames, height, width, -1), written


def attend(q, k, v, keep):
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(q.shape[-1])
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)


def gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def tensor(x):
    return torch.tensor(np.asarray(x, np.float64))


def mixed(x, noise, sigma):
    """At noise levels by frame."""
    sigma = sigma[..., None, None, None]
    return (1 - sigma) * x + sigma * noise
