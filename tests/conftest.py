"""Runs before anything is imported: shapes and dtypes in annotations are checked in every test."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from jaxtyping import install_import_hook

PACKAGES = ("monarch_jax", "pallas_kernels", "triton_kernels", "models", "train")
_hook = install_import_hook(PACKAGES, "beartype.beartype")
