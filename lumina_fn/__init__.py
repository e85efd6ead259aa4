"""Lumina-mGPT 2.0 as pure functions over parameter trees."""

__version__ = "0.3.0"
