"""A scripted inference server that counts what it reads.

Usage: counting_server.py CONTRACT SOCKET COUNT_FILE. The file holds three int64: messages read, those of them
that were malformed, and files open at the last one. A connection that only ends is no message.
"""

import os
import socket
import sys
from pathlib import Path

import numpy as np
from scripted_server import Scripted

from d4_datasets.contract import Contract
from d4_nodes import wire
from d4_nodes.server import serve
from d4_nodes.wire import Message, WireError

count = np.memmap(sys.argv[3], np.int64, "r+")
receive = wire.receive


def counting(sock: socket.socket) -> tuple[Message, int | None]:
    """The same, counted."""
    count[2] = len(os.listdir("/proc/self/fd"))
    try:
        result = receive(sock)
    except WireError as error:
        is_message = "closed" not in str(error) and "gone" not in str(error)
        count[:2] += is_message
        raise
    count[0] += 1
    return result


if __name__ == "__main__":
    wire.receive = counting
    serve(Scripted(Contract.load(sys.argv[1]), Path(sys.argv[3] + ".fault")), Path(sys.argv[2]))
