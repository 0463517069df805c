"""Runs the demo's page on this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from threading import Event
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradio import Blocks

LOOPBACK = "127.0.0.1"
MAX_UPLOAD = "20mb"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at this address or name."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check_address(host: str, port: int | None) -> None:
    """Check that a server can listen at an address.

    Raises:
        OSError: if it can't, in one line.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except OSError as error:
        name = f"--host {host}" if port is None else f"--host {host} --port {port}"
        raise OSError(f"{name} can't be used: {error.strerror or error}; give another") from error


def serve(app: Blocks, host: str = LOOPBACK, port: int | None = None) -> None:
    """Run a page until the process is stopped, and print its address.

    Args:
        app: as from `demo_app`.
        host: address that the server listens at. Others than the loopback's let other machines in.
        port: None: the first free one from 7860.

    Raises:
        OSError: for an address or a port that can't be used.
    """
    url = start(app, host, port)
    others = "" if is_loopback(host) else ", open to other machines"
    print(f"{url} (Ctrl-C stops it{others})", flush=True)
    try:
        Event().wait()
    finally:
        app.close(verbose=False)


def start(app: Blocks, host: str = LOOPBACK, port: int | None = None) -> str:
    """Run a page in another thread, without a tunnel, a history or links to other sites; its
    address."""
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it runs
        known = [os.environ[name]] if os.environ.get(name) else []
        os.environ[name] = ",".join([*known, LOOPBACK, "localhost", host])
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        inbrowser=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=["api"],
        max_file_size=MAX_UPLOAD,
        quiet=True,
    )
    return url
