"""Hopper (sm_90a): TMA, wgmma, clusters, warp-specialised persistent blocks. Another architecture gets its own folder.

config.py           sizes of every kernel, and which fit
tuning.py           sizes measured on a card, which come first
forward.py          which kernels the forward pass runs, for one chunk of heads and query tiles after another
backward.py         the same of the backward pass
right.py            stage 1
left.py             stage 2; a few rows more than a multiple of 64: left_tail.py
fused.py            both stages in one; what Pallas lacks for it: cluster.py, cluster_store.py, in words of ptx.py
left_backward*.py   back through L; what both kernels share: left_backward_items.py
right_backward*.py  back through R; what both kernels share: right_backward_items.py
query.py            the queries' gradient
roles.py            roles of kernels and their launch, persistent blocks, items
shared.py           tiles in shared memory, sums, stores
"""
