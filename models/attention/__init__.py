"""Attention kinds: what a block's self-attention can be, one file each, behind the protocol in `base`.

base        the protocol: `Attention`, the `Context` that it is given, `CacheShape`, `Density`
registry    the row of each kind
notation    `monarch(tile=(3,30,52))`: settings as text, parsed and printed
schedule    kinds made of kinds: by layer, sampling step, or block of frames
softmax     softmax attention over all keys, which kinds and the cross-attention call
masked      softmax attention under a mask, and what kinds share that leave keys out

README.md has a table of them. Every other file in the folder is a kind. Nothing outside of it knows one by name.
"""
