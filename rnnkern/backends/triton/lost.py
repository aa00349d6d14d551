"""Programs that waited in vain, reported without waiting for them: by the next call on their device.

A kernel whose program gives up sets a flag on the device. It is copied to the host behind every launch, and looked at
before the next one if the copy has ended by then. While a CUDA graph is recorded nothing can be looked at; what happens
when it is replayed, the next call outside of it finds.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Flag:
    def __init__(self, device: torch.device) -> None:
        self.there = torch.zeros(1, dtype=torch.int32, device=device)
        self.here, self.copied = self.there, None
        if device.type == "cuda":
            self.here, self.copied = torch.zeros(1, dtype=torch.int32, pin_memory=True), torch.cuda.Event()

    def copy(self) -> None:
        if self.copied is not None:
            self.here.copy_(self.there, non_blocking=True)
            self.copied.record()

    def is_set(self) -> bool:
        return (self.copied is None or self.copied.query()) and bool(self.here.item())

    def clear(self) -> None:
        self.there.zero_()
        self.here.zero_()


class Lost:
    """The flags of all devices."""

    def __init__(self) -> None:
        self.flags: dict[torch.device, Flag] = {}
        self.lock = threading.Lock()

    def flag(self, device: torch.device) -> Tensor:
        """What a kernel on that device sets to 1."""
        if device not in self.flags and _recording(device):
            raise RuntimeError(
                "the first scan with driver=persistent or gluon on a device cannot be recorded in a CUDA graph: run"
                " the model once before"
            )
        with self.lock:
            if device not in self.flags:
                self.flags[device] = Flag(device)
            return self.flags[device].there

    def check(self, device: torch.device) -> None:
        """
        Raises:
            RuntimeError: an earlier launch lost a partner.
        """
        flag = self.flags.get(device)
        if flag is None or _recording(device):
            return
        with self.lock:
            if not flag.is_set():
                return
            flag.clear()
        raise RuntimeError(
            f"an earlier scan on {device} gave up waiting for programs of its own launch, and its results are NaN: the"
            " device did not run all of them at once. Without driver=persistent or gluon in RNNKERN_TRITON_CONFIG none"
            " waits"
        )

    def watch(self, device: torch.device) -> None:
        """To be called behind every launch that was given the flag."""
        if not _recording(device):
            with self.lock:
                self.flags[device].copy()


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


LOST = Lost()
