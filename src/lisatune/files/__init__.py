"""Anything that is read or written whole."""
