"""Memory of a command with all the processes that it started, together."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Memory:
    """Of several processes, in MiB."""

    pss: float = 0.0
    """A page that n processes share counts 1/n for each, so once in the sum."""
    own: float = 0.0
    """The same without the pages of mapped files, which the system can drop and read again."""

    def peak(self, other: Memory) -> Memory:
        """The larger of each figure."""
        return Memory(max(self.pss, other.pss), max(self.own, other.own))


def memory_of(pid: int) -> Memory:
    """What a process and all that descend from it take now; nothing of those that have ended. Linux only."""
    pss = files = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            # a process that ends meanwhile has a file that cannot be read
            with suppress(OSError):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
                kib = {name: int(size) for name, size, _ in map(str.split, lines)}
                pss += kib["Pss:"]
                files += kib["Pss_File:"]
    return Memory(pss / 1024, (pss - files) / 1024)
