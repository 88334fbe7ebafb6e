"""The serving side of a channel: what is exposed, and the standing tasks that run it."""
