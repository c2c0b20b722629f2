"""Common code for reading checkpoints: tensor files, torch's pickles, and filling a model tensor by tensor."""
