"""What a dispatched model has moved, and how long it waited for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields


@dataclass
class Traffic:
    """What was moved for one block, or for all of them."""

    bytes_read: int = 0
    """From disk."""
    bytes_copied: int = 0
    """Between host and devices."""
    seconds_stalled: float = 0.0
    """That a thread waited for weights, of those that this machine's threads read or stage. What one stream of a device
    waits for another is not in it: nobody looks at that clock."""
    hits: int = 0
    """How often all of a block's weights were under way, or there, when it was called."""
    misses: int = 0
    """How often they were not."""

    @property
    def fetches(self) -> int:
        """How often a block's weights had to come."""
        return self.hits + self.misses


@dataclass
class Stats(Traffic):
    """Of a model as a whole, since it was loaded or since `reset`; `blocks` has the same by block."""

    blocks: dict[str, Traffic] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, block: str, read: int, copied: int, stalled: float = 0.0, hits: int = 0, misses: int = 0) -> None:
        """Count what came for `block`."""
        with self._lock:
            of_block = self.blocks.get(block) or self.blocks.setdefault(block, Traffic())
            for traffic in (self, of_block):
                traffic.bytes_read += read
                traffic.bytes_copied += copied
                traffic.seconds_stalled += stalled
                traffic.hits += hits
                traffic.misses += misses

    def reset(self) -> None:
        """Count from zero again."""
        with self._lock:
            self.blocks.clear()
            for each in fields(Traffic):
                setattr(self, each.name, each.default)

    def after_fork(self) -> None:
        """In a child: whoever held the lock lives on in the parent only."""
        self._lock = threading.Lock()
