"""From a prompt to a video: settings, decoders, the pipeline, the live page. `monarchrt generate` is made of this.

Nothing is imported here, so that the command's help does not wait for JAX.
"""
