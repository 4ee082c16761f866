"""rlif's weight-transfer engine in vLLM's workers: buckets of a broadcast, loaded as vLLM loads a checkpoint."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from services.contract import TensorEntry
from services.weights import buckets
from services.weights.lines import Line, open_line
from services.weights.meeting import LineKind


@dataclass(kw_only=True)
class LineInfo(WeightTransferInitInfo):
    """A line to open (see lines.open_line); this engine's workers have its ranks from `first_rank` on."""

    kind: LineKind
    rendezvous: str
    first_rank: int
    size: int
    seconds: float
    capacity: int


@dataclass(kw_only=True)
class BucketsInfo(WeightTransferUpdateInfo):
    """What comes along the line: the manifest's names, dtypes and shapes, in buckets of at most `bucket_bytes`, whose
    words add up to `sums`."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    bucket_bytes: int
    sums: list[int]


class BroadcastEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL engine (its layerwise reload at start and finish), but for the line and what travels on it."""

    init_info_cls: type[Any] = LineInfo
    update_info_cls: type[Any] = BucketsInfo

    def __init__(self, config: WeightTransferConfig, vllm_config: Any, device: torch.device, model: torch.nn.Module):
        super().__init__(config, vllm_config, device, model)
        self.line: Line | None = None

    def init_transfer_engine(self, init_info: Any) -> None:
        """Raises RuntimeError: the line does not open."""
        self.shutdown()
        parallel = self.parallel_config
        own = parallel.data_parallel_index * parallel.world_size + parallel.rank
        info: LineInfo = init_info
        rank = info.first_rank + own
        self.line = open_line(info.kind, info.rendezvous, rank, info.size, self.device, info.seconds, info.capacity)

    def receive_weights(self, update_info: Any) -> None:
        """Raises RuntimeError: the line broke, or a bucket is not what was sent. The model is then a mixture."""
        info: BucketsInfo = update_info
        if self.line is None:
            raise RuntimeError("no line was opened for a broadcast of weights")
        tensors = zip(info.names, info.dtypes, info.shapes, strict=True)
        manifest = [TensorEntry(name=n, dtype=d, shape=s, file="", checksum="") for n, d, s in tensors]
        model = cast(Any, self.model)
        with disable_mtp_completeness_check():
            for some in buckets.received(self.line.broadcast, manifest, info.bucket_bytes, info.sums, self.device):
                # Buffers of their own: vLLM keeps these tensors until their layer is complete.
                model.load_weights(some)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def shutdown(self) -> None:
        if self.line is not None:
            self.line.close()
        self.line = None
