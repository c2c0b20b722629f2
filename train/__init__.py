"""Training: data, objective, loop, checkpoints and the `monarchrt` command line."""
