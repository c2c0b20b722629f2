"""Reading and writing Wan checkpoints."""
