"""Messages between the ranks of a job: bytes, which their receivers parse as JSON or as tensors, and never unpickle.

Every message is signed with the secret of the job (see `rendezvous`), so that a process that took a rank's place, or
reached one of its connections, is not believed. Tensors that are summed or gathered otherwise are not signed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gpc_dist.errors import MachineError

_HEADER = struct.Struct("<Q32s32s")


class _Header(NamedTuple):
    """What a message begins with, so that its size is known to be right before there is memory for it."""

    size: int
    digest: bytes
    """SHA-256 of the message."""
    signature: bytes


class Messages:
    """Sends bytes between ranks. Every rank must make the same calls in the same order.

    Args:
        device: of the process group's tensors.
        key: what messages are signed with.
    """

    def __init__(self, rank: int, size: int, device: torch.device, key: bytes):
        self._rank, self._size, self._device, self._key = rank, size, device, key
        self._count = 0
        """Number of calls; no message is taken for that of another call."""

    def gather(self, message: bytes) -> list[bytes] | None:
        """The message of every rank, on rank 0; None elsewhere.

        Raises:
            MachineError: one is not a message of that rank.
        """
        self._count += 1
        packed = [self._tensor(bytes(_HEADER.size)) for _ in range(self._size)]
        dist.all_gather(packed, self._tensor(self._header(message)))
        headers = [self._checked_header(rank, header) for rank, header in enumerate(packed)]
        longest = max(header.size for header in headers)
        own = self._tensor(message.ljust(longest, b"\0"))
        parts = [torch.empty_like(own) for _ in headers] if self._rank == 0 else None
        dist.gather(own, parts)
        if parts is None:
            return None
        return [
            _checked_message(rank, part[: header.size], header)
            for rank, (part, header) in enumerate(zip(parts, headers, strict=True))
        ]

    def broadcast(self, message: bytes) -> bytes:
        """The message of rank 0; those of the others are not used.

        Raises:
            MachineError: it is not a message of rank 0.
        """
        self._count += 1
        main = self._rank == 0
        packed = self._tensor(self._header(message) if main else bytes(_HEADER.size))
        dist.broadcast(packed, src=0)
        header = self._checked_header(0, packed)
        whole = self._tensor(message if main else bytes(header.size))
        dist.broadcast(whole, src=0)
        return _checked_message(0, whole, header)

    def _header(self, message: bytes) -> bytes:
        digest = hashlib.sha256(message).digest()
        return _HEADER.pack(len(message), digest, self._signature(self._rank, len(message), digest))

    def _checked_header(self, rank: int, packed: Tensor) -> _Header:
        header = _Header(*_HEADER.unpack(_bytes(packed)))
        if not hmac.compare_digest(header.signature, self._signature(rank, header.size, header.digest)):
            raise _foreign(rank)
        return header

    def _signature(self, rank: int, size: int, digest: bytes) -> bytes:
        return hmac.digest(self._key, struct.pack("<QQQ", self._count, rank, size) + digest, "sha256")

    def _tensor(self, message: bytes) -> Tensor:
        return torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self._device)


def _checked_message(rank: int, received: Tensor, header: _Header) -> bytes:
    message = _bytes(received)
    if hashlib.sha256(message).digest() != header.digest:
        raise _foreign(rank)
    return message


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _foreign(rank: int) -> MachineError:
    return MachineError(
        f"what came as a message of rank {rank} does not have the signature of this job: another process is in its "
        "place, or not all ranks have the same GPC_DIST_SECRET in their environment"
    )
