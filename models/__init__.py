"""Video models that use the attention."""
