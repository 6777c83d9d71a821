"""The communicators of an algorithm, made to carry device memory."""

from __future__ import annotations

from typing import Any

from ..messages.device.channel import Channel
from ..messages.device.comm import DeviceComm
from ..trace.comm import TracedComm


def attach(attention: Any, xp: Any, mode: str = "auto") -> None:
    """Let the communicators of an algorithm carry device memory; all ranks call it together."""
    if hasattr(attention, "channel"):
        return
    channel = attention.channel = Channel(_untraced(attention.comm), xp, mode)  # what it finds out is no traffic
    carriers: dict[int, DeviceComm] = {}  # one for each communicator, as it numbers its messages
    for name, comm in list(vars(attention).items()):
        bare = _untraced(comm)
        if not hasattr(bare, "Isend") or isinstance(bare, DeviceComm):
            continue
        if id(bare) not in carriers:
            carriers[id(bare)] = DeviceComm(bare, channel)
        if comm is bare:
            setattr(attention, name, carriers[id(bare)])
        else:  # a TracedComm stays outermost, and sees each message once
            comm.comm = carriers[id(bare)]


def _untraced(comm: Any) -> Any:
    return comm.comm if isinstance(comm, TracedComm) else comm
