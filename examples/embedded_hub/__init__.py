"""A Hugging Face Hub on loopback, and the repositories that the tests and `make demo` serve from it."""

from __future__ import annotations

from .pipelines import write_tiny_flux
from .repos import T0PP_CONFIG, minilm_folder, write_tiny_t0pp
from .server import EmbeddedHub, LoggedRequest

__all__ = ["EmbeddedHub", "LoggedRequest", "T0PP_CONFIG", "minilm_folder", "write_tiny_flux", "write_tiny_t0pp"]
