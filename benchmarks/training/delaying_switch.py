#!/usr/bin/env python3
"""A switch that hands each frame on after a fixed time: latency that needs no netem.

    delaying_switch.py MILLISECONDS PORT...        inside the namespace that has the ports

It learns which port an address is behind, as a bridge does, and asks for a real-time priority so
that workers who keep all cores busy do not delay it further. Frames stay as large as the kernel
hands them over (up to 64 KiB, before they are cut for the wire), so hardly any time goes into them.
"""

import contextlib
import os
import select
import socket
import sys
import time
from collections import deque

ANY_PROTOCOL, LARGEST = 3, 1 << 17
# From linux/if_packet.h and asm-generic/socket.h, which Python's socket module does not have.
SOL_PACKET, VNET_HEADER, IGNORE_OUTGOING = 263, 15, 23
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
VNET_HEADER_NBYTES = 10
BUFFER = 1 << 26


def main() -> None:
    delay, names = float(sys.argv[1]) / 1000, sys.argv[2:]
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ports = [opened(name) for name in names]
    behind: dict[bytes, socket.socket] = {}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    print("ready", flush=True)
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for port in select.select(ports, [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = port.recv(LARGEST)
                    due = time.monotonic() + delay
                    target, source = addresses(frame)
                    behind[source] = port
                    outs = [behind[target]] if target in behind else ports
                    waiting.extend((due, out, frame) for out in outs if out is not port)
        while waiting and waiting[0][0] <= time.monotonic():
            _, out, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # a full queue drops it, as ever
                out.send(frame)


def opened(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(SOL_PACKET, VNET_HEADER, 1)  # says how a large frame is to be cut
    port.setsockopt(SOL_PACKET, IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
    port.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    port.setblocking(False)
    port.bind((name, ANY_PROTOCOL))
    return port


def addresses(frame: bytes) -> tuple[bytes, bytes]:
    """(target, source)"""
    first = VNET_HEADER_NBYTES
    return frame[first : first + 6], frame[first + 6 : first + 12]


if __name__ == "__main__":
    main()
