"""One stream's names and facts: keys, scripts, rights, Redis' clock and version."""
