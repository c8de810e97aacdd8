"""Weights that are on a device together, and what becomes of each when the last block that uses it is left."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from .autograd import Onload
from .prefetch import Ahead, Sent
from .residency import Residency, State, state_of, version_of
from .ring import Slot, address_of, span_bytes
from .transfer import Transfer

if TYPE_CHECKING:
    from .executor import Scope

COMPARED_BYTES = 64 * 1024
"""Weights on the CPU up to this size are compared with what arrived: larger ones would cost what it costs to read them.
"""


@dataclass(eq=False, slots=True)
class Item:
    """One weight of a fetch."""

    tensor: torch.Tensor
    residency: Residency
    swaps: bool
    """The tensor's own data is what arrived; otherwise a stand-in is handed to whoever reads the weight by name."""
    leaf: torch.Tensor | None = None
    """A view of the weight at home, for a stand-in whose gradient is the weight's."""
    arrived: torch.Tensor | None = None
    version: int = 0
    """Of what is used, when it arrived."""
    state: State | None = None
    """The weight's from when it appears on, if nobody touches it."""
    stand_in: torch.Tensor | None = None
    before: torch.Tensor | None = None
    """Of a small weight, what arrived: a write through `.data` leaves no other trace."""

    def appear(self) -> None:
        """Let what arrived be used."""
        assert self.arrived is not None
        if self.arrived.device.type == "cpu" and span_bytes(self.arrived) <= COMPARED_BYTES:
            self.before = self.arrived.clone()
        if self.swaps:
            self.tensor.data = self.arrived
            self.state = self.state or state_of(self.tensor)
            self.version = self.state[1]
        elif self.leaf is None:
            self.stand_in = self.arrived.data  # with a version of its own: those of a slot's views count together

    def is_untouched(self) -> bool:
        """Whether that is certain at a glance: the weight itself came, and no kernel writes to it uncounted."""
        certain = self.state is not None and self.before is None and type(self.tensor) is nn.Parameter
        return certain and self.state == state_of(self.tensor)

    def handed_out(self) -> torch.Tensor:
        if self.swaps:
            return self.tensor
        if self.stand_in is None:
            self.stand_in, self.leaf = Onload.apply(self.leaf, self.arrived), None
        assert self.stand_in is not None
        return self.stand_in

    def is_written(self) -> bool:
        """Whether what was used was written to."""
        used = self.tensor if self.swaps else self.stand_in
        if used is None or self.arrived is None:
            return False
        if version_of(used) != self.version:
            return True
        if isinstance(self.tensor, nn.Parameter):
            return self.before is not None and not _same_bytes(self.before, self.arrived)
        home = self.residency.home  # kernels update running statistics without counting it as a write
        return home is not self.arrived and not torch.equal(home, self.arrived.to(home.device))


@dataclass(eq=False)
class Fetch:
    """Weights that are on a device together. Ends when the last scope that uses them is left."""

    device: torch.device
    brought_by: Scope
    items: list[Item] = field(default_factory=list)
    pinned: list[torch.Tensor] = field(default_factory=list)
    """Weights that are used where they rest, and must not be taken elsewhere meanwhile."""
    transfers: list[Transfer] = field(default_factory=list)
    users: set[Scope] = field(default_factory=set)
    shared: bool = False
    """Whether there were several at once."""
    ready: threading.Event = field(default_factory=threading.Event)
    failed: bool = False

    @property
    def slots(self) -> list[Slot]:
        return [transfer.slot for transfer in self.transfers]

    def take_over(self, sent: Sent, ahead: Ahead) -> torch.Tensor:
        """Use a weight that was sent ahead: its transfer is this fetch's to release."""
        if sent.transfer not in self.transfers:
            self.transfers.append(sent.transfer)
            ahead.used.append(sent.transfer)
        return sent.data

    def item_of(self, tensor: torch.Tensor) -> Item | None:
        return next((item for item in self.items if item.tensor is tensor), None)

    def arrived(self) -> bool:
        """Wait until another thread has brought the weights; whether it could."""
        self.ready.wait()
        for slot in self.slots:
            slot.joined()
        return not self.failed

    def find(self, data: torch.Tensor) -> Item | None:
        """The weight that `data`, somewhere in this fetch's slots, is a view of."""
        if not any(slot.covers(data) for slot in self.slots):
            return None
        address = address_of(data)
        for item in self.items:
            if item.arrived is not None and 0 <= address - address_of(item.arrived) < span_bytes(item.arrived):
                return item
        return None


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_contiguous() and other.is_contiguous():  # as numbers, NaN would differ from itself
        one, other = one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)
    return torch.equal(one, other)
