"""The collectives of hpccl. `Comm.solo()` is a world of one and needs no process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from hpccl.dist.grouping import filled

__all__ = ["Comm"]

_BUCKET = 1 << 23  # elements in one flat buffer
# Its newer name: torch warns of the older one where there are both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Comm:
    """A rank's view of its world. Methods that communicate are collective: all ranks call them, in the same order."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)  # longest wait for another rank

    @classmethod
    def solo(cls, device: torch.device | str = "cpu") -> Comm:
        """A world of one."""
        return cls(rank=0, size=1, device=torch.device(device))

    @property
    def leader(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks; neighbours of one dtype share a message."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self.device)
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def reduce_(self, tensor: Tensor, *, owner: int) -> None:
        """Replace `tensor` (contiguous) by its sum over ranks on rank `owner`; on other ranks it is undefined."""
        if self.size == 1:
            return
        sent = tensor.to(self.device)
        dist.reduce(sent, dst=owner)
        if sent is not tensor:
            tensor.copy_(sent)

    @torch.no_grad()
    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate along the first dimension in rank order; lengths may differ between ranks."""
        if self.size == 1:
            return tensor
        lengths = torch.empty(self.size, dtype=torch.int64, device=self.device)
        _all_gather(lengths, torch.tensor([tensor.shape[0]], device=self.device))
        counts: list[int] = lengths.tolist()
        most = max(counts)
        if most == 0:
            return tensor
        sent = tensor.detach().to(self.device).contiguous()
        if len(sent) < most:
            sent = torch.cat([sent, sent.new_zeros((most - len(sent), *sent.shape[1:]))])
        found = sent.new_empty((self.size * most, *sent.shape[1:]))
        _all_gather(found, sent)
        if min(counts) < most:
            found = torch.cat([found[rank * most : rank * most + count] for rank, count in enumerate(counts)])
        return found.to(tensor.device)

    def exchange(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """Send rows to other ranks and return the received ones, in rank order.

        tensor: [rows, ...], the first counts[0] for rank 0, the next counts[1] for rank 1, ...
        """
        assert sum(counts) == len(tensor), "every row goes somewhere"
        if self.size == 1:
            return tensor
        sent = torch.tensor(counts, device=self.device)
        coming = torch.empty_like(sent)
        dist.all_to_all_single(coming, sent)
        received = coming.tolist()
        rows = tensor.to(self.device).contiguous()
        found = rows.new_empty((sum(received), *tensor.shape[1:]))
        dist.all_to_all_single(found, rows, received, list(counts))
        return found.to(tensor.device)

    def broadcast_(self, tensors: Sequence[Tensor], *, source: int = 0) -> None:
        """Replace each tensor by the one of rank `source`."""
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, src=source)
            tensor.copy_(sent)

    def broadcast_text(self, text: str | None, *, source: int = 0) -> str:
        """Return the text of rank `source`; that of other ranks is ignored."""
        if self.size == 1:
            assert text is not None, "a world of one has nobody else to ask"
            return text
        mine = bytearray((text or "").encode()) if self.rank == source else bytearray()
        sent = torch.zeros(self.max(len(mine)), dtype=torch.uint8)
        if mine:
            sent.copy_(torch.frombuffer(mine, dtype=torch.uint8))
        self.broadcast_([sent], source=source)
        return bytes(sent.tolist()).decode()

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return self.max(int(flag)) > 0

    def max(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor([number], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def share(self, count: int) -> range:
        """Return this rank's contiguous part of `count` items; sizes differ by at most one, without padding."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def parts(self, count: int, size: int) -> list[range]:
        """Split this rank's share of `count` items into parts of at most `size`; all ranks have equally many parts.

        If there are fewer items than ranks, a part may be empty.
        """
        share = self.share(count)
        largest = -(-count // self.size)
        number = -(-largest // size)
        return [
            range(share.start + k * len(share) // number, share.start + (k + 1) * len(share) // number)
            for k in range(number)
        ]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    for _, alike in groupby(tensors, lambda tensor: tensor.dtype):
        yield from filled(alike, Tensor.numel, _BUCKET)
