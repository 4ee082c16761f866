"""Where a process listens."""

import socket

from services.startup import StartupError


def bound(host: str) -> str:
    """The address to listen on: the node's own where it is given as a number. A name may stand for loopback in the
    node's own /etc/hosts, where nobody else would reach it."""
    is_number = ":" in host or host.replace(".", "").isdigit()
    return host if is_number else "0.0.0.0"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket (port 0: any free one). Raises StartupError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return made


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
