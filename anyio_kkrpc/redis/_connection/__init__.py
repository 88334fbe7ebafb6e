"""A server and a socket: addresses, login, connections that are made again. It knows no stream."""
