"""Ports for processes of tests that run side by side."""

import itertools
import os
import socket

_tries = itertools.count()


def unused_port() -> int:
    """A free port below those that the system hands out by itself, so that nobody takes it before it is used."""
    while True:
        port = 20_000 + (os.getpid() * 13 + next(_tries)) % 12_000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
