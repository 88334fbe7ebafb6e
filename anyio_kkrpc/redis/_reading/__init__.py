"""The way in: what is read becomes envelopes, once each, where there is room for them."""
