"""The ranks of one training job: the process group, and bytes from rank 0 to the others."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from services.address import bound, listen
from services.recipe import RecipeError, Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size` ranks. `first` does what must be done once: queue, weights, records."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0's `payload`, on every rank. Waits as long as the group's timeout for rank 0."""
        if self.size == 1:
            assert payload is not None
            return payload
        length = torch.tensor([len(payload) if payload is not None else 0])
        dist.broadcast(length, src=0)
        if payload is not None:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0)
        else:
            data = torch.empty(int(length), dtype=torch.uint8)
        if int(length) == 0:
            return b""
        dist.broadcast(data, src=0)
        return data.numpy().tobytes()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(settings: Trainer) -> Iterator[Ranks]:
    """The process group that the launcher of ranks describes in the environment, or one of a single process.

    Raises RecipeError when `trainer.ranks` or `trainer.device` does not fit what is there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != settings.ranks:
        raise RecipeError(
            f"trainer.ranks: {settings.ranks}, but {size} process(es) were started; "
            f"`rlif train` starts as many where RANK is not set; or set trainer.ranks={size}"
        )
    cuda = torch.cuda.is_available() and settings.device != "cpu"
    if settings.device == "cuda" and not cuda:
        raise RecipeError("trainer.device: cuda, but torch sees no CUDA device; use cpu or auto")
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # The others wait in a collective while rank 0 waits for groups.
    timeout = timedelta(seconds=settings.batch_deadline_seconds + 600)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        rank = int(os.environ["RANK"])
        dist.init_process_group(backend, store=_store(rank, size, timeout), rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
    log.info("rank %d of %d on %s", ranks.rank, ranks.size, device)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Where the ranks find each other's addresses. Left to itself, rank 0 would listen on every interface."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank > 0:
        return dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
    listener = listen(bound(host), port)
    listener.listen(size)
    return dist.TCPStore(host, port, size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())
