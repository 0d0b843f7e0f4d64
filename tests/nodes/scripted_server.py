"""An inference server whose answers follow a script: the fault that a file names, in a process of its own.

Usage: scripted_server.py CONTRACT SOCKET FAULT_FILE [WEIGHTS]
"""

import sys
import time
from pathlib import Path

import numpy as np

from d4_datasets.contract import Contract
from d4_nodes import memory
from d4_nodes.memory import Memory
from d4_nodes.server import serve

LEADS = 4


class Scripted:
    """Plans count up: lead n of request k of an episode is (k + n) / 1000 in every component."""

    def __init__(self, contract: Contract, faults: Path, weights: str = "w0") -> None:
        self.kind, self.contract, self._faults = "policy", contract, faults
        self.fields = memory.layout(contract, LEADS)
        self.card = {"checkpoint": "scripted", "leads": LEADS, "weights": weights}
        self._count = 0

    def decide(self, shared: Memory) -> None:
        fault = self._faults.read_text() if self._faults.exists() else ""
        self._count = 0 if shared["reset"] else self._count + 1
        plan = np.arange(self._count, self._count + LEADS)[:, None] / 1000
        shared["plan"][:] = np.broadcast_to(plan, shared["plan"].shape)
        if fault == "nan":
            shared["plan"][:, 0] = np.nan
        elif fault == "nan now and then":
            shared["plan"][:, 0] += np.nan if self._count % 2 else 0.0
        elif fault == "huge":
            shared["plan"][:] = 1e9
        elif fault == "raise":
            raise RuntimeError("scripted")
        elif fault.startswith("sleep"):
            time.sleep(float(fault.split()[1]))


if __name__ == "__main__":
    serve(Scripted(Contract.load(sys.argv[1]), Path(sys.argv[3]), *sys.argv[4:]), Path(sys.argv[2]))
