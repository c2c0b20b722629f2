"""Everything of this project but the library `monarch_jax`, under one name of its own.

`monarchrt.models` (Wan 2.1, samplers, generation), `monarchrt.train` (training and the command line),
`monarchrt.pallas_kernels` and `monarchrt.triton_kernels`. In a checkout these are links to the folders of the top
level; a wheel holds them here, so that they stand in nobody's way who has a `models` of their own.
"""
