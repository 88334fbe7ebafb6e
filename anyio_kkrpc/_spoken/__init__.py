"""How peers are spoken to, message by message: in this library's way, or in kkrpc's own two."""
