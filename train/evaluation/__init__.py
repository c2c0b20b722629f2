"""Comparing attention kinds under the same weights: videos, latents and losses; measures and their report."""
