"""Lines that carry buckets from the trainer (rank 0) to vLLM's workers: NCCL between GPUs, IPC within one GPU.

Where there is no GPU, gloo stands in for NCCL, and a mapped file for a GPU's memory; everything above a line is the
same. All ranks of a line call the same methods in the same order. Nothing is pickled: NCCL's unique id travels in the
call, and a handle of shared memory is a message with named fields.
"""

import base64
import time
from datetime import timedelta
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

import torch
from torch.distributed import BroadcastOptions, TCPStore
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from services.contract import Wire
from services.weights.meeting import LineKind

LOOPBACK = "127.0.0.1"
"""IPC stays within a machine, and so does what stands in for NCCL."""
LOOK_SECONDS = 0.001


class Line(Protocol):
    def broadcast(self, buffer: torch.Tensor) -> None:
        """Rank 0's bytes (uint8 [n], n alike on all ranks) into everybody's `buffer`, in order on the current stream.

        Raises RuntimeError when the line is broken, TimeoutError.
        """

    def close(self) -> None:
        """From any thread: who waits in `broadcast` is to come back."""


class Rendezvous:
    """Where a new line is opened, made by rank 0: `text` travels in the call."""

    def __init__(self, kind: LineKind, seconds: float):
        self.kind, self.seconds = kind, seconds
        self.store: TCPStore | None = None
        if kind == "nccl":
            from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

            self.text = base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()
        else:
            self.store = TCPStore(LOOPBACK, 0, None, True, timedelta(seconds=seconds), wait_for_workers=False)
            self.text = f"{LOOPBACK}:{self.store.port}"

    def open(self, size: int, device: torch.device, capacity: int) -> Line:
        """Rank 0's end. `capacity`: bytes of the largest bucket."""
        return _open(self.kind, self.text, self.store, 0, size, device, self.seconds, capacity)


def open_line(
    kind: LineKind, rendezvous: str, rank: int, size: int, device: torch.device, seconds: float, capacity: int
) -> Line:
    """The end of another rank than 0. Raises RuntimeError: the others are not there, or cannot be reached."""
    store = None
    if kind != "nccl":
        host, _, port = rendezvous.rpartition(":")
        store = TCPStore(host, int(port), None, False, timedelta(seconds=seconds), wait_for_workers=False)
    return _open(kind, rendezvous, store, rank, size, device, seconds, capacity)


def _open(
    kind: LineKind,
    rendezvous: str,
    store: TCPStore | None,
    rank: int,
    size: int,
    device: torch.device,
    seconds: float,
    capacity: int,
) -> Line:
    if store is None:
        return NcclLine(base64.b64decode(rendezvous), rank, size, device)
    if kind == "gloo":
        return GlooLine(store, rank, size, seconds)
    return IpcLine(store, rank, size, device, seconds, capacity)


class NcclLine:
    """vLLM's own communicator: it depends on no process group, and can be aborted."""

    def __init__(self, unique_id: bytes, rank: int, size: int, device: torch.device):
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        self._communicator = uid_init_process_group(unique_id, rank, size, device)

    def broadcast(self, buffer: torch.Tensor) -> None:
        self._communicator.broadcast(buffer, src=0, stream=torch.cuda.current_stream())

    def close(self) -> None:
        self._communicator.destroy()


class GlooLine:
    def __init__(self, store: TCPStore, rank: int, size: int, seconds: float):
        # Untyped: torch's stubs know little of it.
        gloo: Any = torch.distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=seconds)
        self._group = gloo(store, rank, size, options)

    def broadcast(self, buffer: torch.Tensor) -> None:
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([buffer], options).wait()

    def close(self) -> None:
        # Who waits comes back at the group's own deadline: gloo knows no other end. What goes with it are connections.
        self._group = None


class Handle(Wire):
    """Shared memory of `size` bytes: a `file` that is mapped, or memory of the GPU `gpu` (its UUID), with what torch
    finds it by: CUDA's handles of the allocation and of an event, and the reference counter (bytes in base64)."""

    size: int
    file: str = ""
    gpu: str = ""
    memory: str = ""
    memory_size: int = 0
    memory_offset: int = 0
    counter: str = ""
    counter_offset: int = 0
    event: str = ""
    event_sync: bool = False


class IpcLine:
    """One buffer that all ranks map: rank 0 fills it, the others copy it and say so, and it is filled again."""

    def __init__(self, store: TCPStore, rank: int, size: int, device: torch.device, seconds: float, capacity: int):
        self._store, self._rank, self._size, self._seconds = store, rank, size, seconds
        self._count, self._closed = 0, False
        if rank == 0:
            self._file = NamedTemporaryFile(prefix="rlif-ipc-") if device.type == "cpu" else None
            self._shared, handle = _share(device, capacity, self._file.name if self._file else "")
            store.set("handle", handle.model_dump_json())
        else:
            self._shared = _mapped(device, Handle.model_validate_json(store.get("handle")))

    def broadcast(self, buffer: torch.Tensor) -> None:
        self._count += 1
        part, written, read = self._shared[: len(buffer)], f"written-{self._count}", f"read-{self._count}"
        if self._rank == 0:
            part.copy_(buffer)
            _finish(buffer.device)
            self._store.set(written, "")
            self._wait(lambda: self._store.add(read, 0) == self._size - 1, f"{self._size - 1} readers")
            for key in (written, read):
                self._store.delete_key(key)
        else:
            self._wait(lambda: self._store.check([written]), "the trainer")
            buffer.copy_(part)
            _finish(buffer.device)
            self._store.add(read, 1)

    def _wait(self, is_over: Any, whom: str) -> None:
        ends = time.monotonic() + self._seconds
        while not is_over():
            if self._closed:
                raise RuntimeError("the line was closed")
            if time.monotonic() > ends:
                raise TimeoutError(f"waited {self._seconds:g} s for {whom} of bucket {self._count}")
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        self._closed = True


def _share(device: torch.device, capacity: int, file: str) -> tuple[torch.Tensor, Handle]:
    if file:
        shared = torch.from_file(file, shared=True, size=capacity, dtype=torch.uint8)
        return shared, Handle(size=capacity, file=file)
    shared = torch.empty(capacity, dtype=torch.uint8, device=device)
    _, arguments = reduce_tensor(shared)
    _, memory, memory_size, memory_offset, _, counter, counter_offset, event, event_sync = arguments[6:]
    return shared, Handle(
        size=capacity,
        gpu=str(torch.cuda.get_device_properties(device).uuid),
        memory=base64.b64encode(memory).decode(),
        memory_size=memory_size,
        memory_offset=memory_offset,
        counter=base64.b64encode(counter).decode(),
        counter_offset=counter_offset,
        event=base64.b64encode(event).decode(),
        event_sync=event_sync,
    )


def _mapped(device: torch.device, handle: Handle) -> torch.Tensor:
    """Raises RuntimeError: the memory is another GPU's."""
    if handle.file:
        return torch.from_file(handle.file, shared=True, size=handle.size, dtype=torch.uint8)
    own = str(torch.cuda.get_device_properties(device).uuid)
    if own != handle.gpu:
        raise RuntimeError(f"weights.transport: ipc: this engine is on the GPU {own}, the trainer on {handle.gpu}")
    return rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size([handle.size]),
        (1,),
        0,
        torch.storage.TypedStorage,
        torch.uint8,
        device.index,
        base64.b64decode(handle.memory),
        handle.memory_size,
        handle.memory_offset,
        False,
        base64.b64decode(handle.counter),
        handle.counter_offset,
        base64.b64decode(handle.event),
        handle.event_sync,
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
