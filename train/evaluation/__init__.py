"""Comparison of attention settings with the same weights: losses, measures of videos and latents, and reports."""
