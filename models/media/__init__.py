"""Frames and files: reading and writing videos, and a fixed transform between pixels and latents."""
