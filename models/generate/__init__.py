"""From a prompt to a video: settings, plan, pipeline, decoders and live page of `monarchrt generate`.

Imports nothing, so that the command's help need not wait for JAX.
"""
