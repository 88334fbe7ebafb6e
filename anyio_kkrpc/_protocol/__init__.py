"""The protocol without I/O: records in, events out. It imports nothing of the package."""
