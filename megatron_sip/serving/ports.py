"""Loopback ports that the operating system picks."""

from __future__ import annotations

import socket


def reserve_port(port: int = 0) -> socket.socket:
    """A bound socket that keeps a free loopback port from others until it is closed.

    Args:   port: a certain one; 0: any.
    Raises: OSError if it is taken.

    It does not listen, so a server that sets SO_REUSEADDR (vLLM and Python's do) can bind the port.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind(("127.0.0.1", port))
    except OSError:
        reserved.close()
        raise
    return reserved


def free_port() -> int:
    """A loopback port that is free now; `reserve_port` also keeps it free."""
    with reserve_port() as reserved:
        return reserved.getsockname()[1]
