"""Kinds of self-attention, one file each, behind the interface in `base`.

base        the interface: `Attention`, the `Context` of a call, `CacheShape`, `Density`
registry    the kinds by name
notation    `monarch(tile=(3,30,52))`: settings as text, parsed and printed
schedule    kinds made of kinds: by layer, sampling step, or block of frames
softmax     softmax attention over all keys, used by kinds and by the cross-attention
masked      softmax attention under a mask, and code shared by sparse kinds

README.md has a table of the kinds. Code outside of this folder does not depend on any kind by name.
"""
