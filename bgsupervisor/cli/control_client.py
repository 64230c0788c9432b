"""Requests of a command to the living supervisor, over its control socket."""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

from bgsupervisor.ipc import messages
from bgsupervisor.ipc.channel import Channel
from bgsupervisor.ipc.sockets import connect
from bgsupervisor.system.processes import start_ticks

if TYPE_CHECKING:
    from bgsupervisor.clock import Clock
    from bgsupervisor.ipc.statedir import StateDir

__all__ = ["ask_to_reload", "await_reload"]


def ask_to_reload(state_dir: StateDir, *, force: bool) -> Channel:
    """Ask the living supervisor to load code and configuration anew; the answer comes over the channel.

    Raises:
        OSError: No supervisor listens, or this user may not ask.
    """
    channel = Channel(connect(state_dir.path, state_dir.control.name, socket.SOCK_STREAM))
    ref = messages.ProcessRef(os.getpid(), start_ticks(os.getpid()) or 0)
    channel.send(messages.CallerHello(version=messages.PROTOCOL_VERSION, ref=ref))
    channel.send(messages.Reload(force))
    return channel


def await_reload(channel: Channel, *, timeout_s: float, clock: Clock) -> messages.Reloaded | None:
    """Wait for the answer, at most *timeout_s*; None if there is none by then or the supervisor has left.

    Raises:
        WireError: The supervisor is of another version.
    """
    deadline = clock.monotonic() + timeout_s
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while not channel.closed and (left := deadline - clock.monotonic()) > 0:
        poll.poll(left * 1000)
        for message in channel.receive():
            if isinstance(message, messages.Reloaded):
                return message
    return None
