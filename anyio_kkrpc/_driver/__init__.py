"""What both sides of a channel share: it drives the protocol's records over a transport, and gives
streams and callbacks to those who use them. It owns no task.
"""
