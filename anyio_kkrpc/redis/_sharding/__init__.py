"""Calls that have a key: claimed and kept by scripts, waited for here, finished by workers."""
