"""Lumina-mGPT 2.0 as pure functions over parameter trees."""

from lumina_fn import starting

__version__ = "0.3.0"

starting.begin()
starting.keep_compiled_code()
