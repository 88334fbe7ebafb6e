"""The way out: envelopes become commands, are written in order, and settled once."""
