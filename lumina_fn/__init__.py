"""Lumina-mGPT 2.0 as pure functions over parameter trees."""

from lumina_fn.process import startup

__version__ = "0.3.0"

startup.begin()
startup.keep_compiled_code()
