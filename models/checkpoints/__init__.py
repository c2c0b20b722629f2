"""What reading checkpoints has in common: tensor files, torch's pickles, and filling a model tensor by tensor."""
