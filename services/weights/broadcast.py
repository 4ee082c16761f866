"""The trainer's side of weights that are broadcast: most versions are memory that servers come for, some are files.

One version in `snapshot_every` is a folder as with the other transports, and so are the first one of every trainer
process and the last one that it leaves behind: what starts while no trainer lives takes the newest of those. A version
that a server could not be sent becomes files, too.
"""

import importlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from redis import Redis

from services.contract import Adapter, TensorEntry, Version, WeightVersion
from services.recipe import Recipe, RecipeError
from services.weights import buckets, disk, pointer
from services.weights.publish import BYTES, PUBLISHED, Publisher, Superseded
from services.weights.seconds import SECONDS
from services.weights.sender import Load, Sender

log = logging.getLogger(__name__)


def publisher(recipe: Recipe, redis: Redis, device: torch.device) -> Publisher:
    """The recipe's, of a trainer whose rank 0 is on `device`. Raises OSError, RecipeError."""
    chosen = recipe.weights
    if chosen.transport != "nccl" and chosen.transport != "ipc":
        return Publisher.of(recipe, redis)
    if device.type != "cuda":
        raise RecipeError(
            f"weights.transport: {chosen.transport} needs GPUs, and the trainer is on the CPU; use disk or delta"
        )
    if chosen.transport == "nccl":
        try:  # now, not in the midst of the first broadcast
            importlib.import_module("vllm.distributed.weight_transfer.nccl_common")
        except ImportError as error:
            raise RecipeError(
                f"weights.transport: nccl needs vLLM where the trainer runs, too (rlif[vllm-gpu]): {error}"
            ) from error
    sender = Sender(redis, recipe.run.name, chosen.transport, device, chosen.broadcast_seconds)
    return Broadcaster(
        sender, chosen.transport, recipe.weights_dir, keep=chosen.keep, snapshot_every=chosen.snapshot_every
    )


class Broadcaster(Publisher):
    """Publishes versions of `transport` through `sender`, and every `snapshot_every`-th as a Publisher does.

    Used by one process (rank 0); `close` it after the last version.
    """

    def __init__(
        self,
        sender: Sender,
        transport: str,
        place: Path | str,
        keep: int = 3,
        patience_seconds: float = 300.0,
        snapshot_every: int = 20,
        bucket_bytes: int = buckets.BUCKET_BYTES,
    ):
        super().__init__(sender.redis, sender.run_id, place, keep, patience_seconds)
        self.sender, self.transport, self.bucket_bytes = sender, transport, bucket_bytes
        self.sender.as_files = self._for_those_left_out
        self._every = snapshot_every
        self._newest: WeightVersion | None = None
        self._whole: WeightVersion | None = None
        self._since_whole = 0
        self._staging: Staging | None = None
        self._config_dir: Path | None = None
        self._again = False

    def publish(
        self,
        version: Version,
        tensors: Iterable[tuple[str, torch.Tensor]],
        config_dir: Path | None = None,
        adapter: Adapter | None = None,
    ) -> WeightVersion:
        """As Publisher.publish, but for adapters, which a recipe may not broadcast. Between whole versions the tensors
        are copied and offered, and none of them is a file.

        Raises ValueError: they are not those of the version before (names, dtypes, shapes).
        """
        self._config_dir = config_dir
        if self._whole is None or self._since_whole + 1 >= self._every:
            return self._publish_whole(version, tensors)
        started = time.monotonic()
        self._withdraw(another_comes=True)
        self._check_newer(version)
        if self._staging is None:
            self._staging = Staging(self._whole.manifest, self.bucket_bytes, self.sender.device.type == "cuda")
        self._staging.fill(tensors)
        weights = WeightVersion(
            run_id=self.run_id,
            lineage=version.lineage,
            version=version.version,
            transport=self.transport,
            location=self.store.location(f"{version.lineage}-{version.version}"),
            manifest=self._staging.manifest,
            created_at=time.time(),
            base=self._whole.id,
        )
        staged = time.monotonic()
        self._insist(lambda: self.sender.renew(self.sender.seconds), f"offer weights {version}")
        if not self._insist(lambda: pointer.advance(self.redis, weights), f"publish weights {version}"):
            raise Superseded(f"run {self.run_id}: weights {version} are outdated, a newer version was published")
        # Only now: who is called looks up in redis what to.
        load = Load(version, self._staging.buffers, self.bucket_bytes)
        self._newest, self._since_whole = weights, self._since_whole + 1
        self.sender.send(load)
        ended = time.monotonic()
        BYTES.labels(self.transport).inc(sum(map(len, load.buffers)))
        PUBLISHED.labels(self.run_id).set(version.version)
        SECONDS.labels("trainer", "stage").observe(staged - started)
        SECONDS.labels("trainer", "announce").observe(ended - staged)
        log.info("run %s: offers weights %s after %.2f s", self.run_id, version, ended - started)
        return weights

    def close(self) -> None:
        """Leave the newest version behind as files. Raises what `publish` does."""
        try:
            self._withdraw()
            self._publish_again()
        finally:
            self.sender.close()

    def _for_those_left_out(self) -> None:
        """In the sender's thread, while the trainer's own waits in `_withdraw` if it has another version."""
        try:
            self._publish_again()
        except Superseded as error:
            log.warning("%s", error)

    def _publish_again(self) -> None:
        """The newest version as files, unless it is."""
        newest = self._newest
        if newest is None or newest.base is None or self._staging is None:
            return
        self._again = True
        try:
            self._publish_files(newest.id, self._staging.tensors().items())
        finally:
            self._again = False

    def _publish_whole(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightVersion:
        self._withdraw()
        return self._publish_files(version, tensors)

    def _publish_files(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightVersion:
        self._newest = self._whole = super().publish(version, tensors, self._config_dir)
        self._since_whole = 0
        return self._whole

    def _withdraw(self, another_comes: bool = False) -> None:
        self._insist(lambda: self.sender.withdraw(another_comes), "withdraw weights")

    def _check_newer(self, version: Version) -> None:
        if not self._again:  # then it is the newest, now as files
            super()._check_newer(version)


class Staging:
    """A version's tensors in memory of their own, bucket by bucket; pinned where a GPU is to read it."""

    def __init__(self, manifest: list[TensorEntry], bucket_bytes: int, pinned: bool):
        self.manifest = [entry.model_copy(update={"file": "", "checksum": ""}) for entry in manifest]
        self._plan = buckets.plan(manifest, bucket_bytes)
        # Zeros: what lies between the tensors is sent, too.
        self.buffers = [torch.zeros(bucket.size, dtype=torch.uint8, pin_memory=pinned) for bucket in self._plan]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views by name, in the manifest's order."""
        pairs = zip(self._plan, self.buffers, strict=True)
        return {name: view for bucket, buffer in pairs for name, view in buckets.views(bucket, buffer)}

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raises ValueError: they are not the manifest's (names, dtypes, shapes)."""
        missing = self.tensors()
        for name, tensor in tensors:
            place = missing.pop(name, None)
            found = (disk.dtype_name(tensor), list(tensor.shape))
            if place is None or found != (disk.dtype_name(place), list(place.shape)):
                raise ValueError(f"tensor {name} {found} is not one of those published before, or was given twice")
            place.copy_(tensor)
        if missing:
            raise ValueError(f"tensor {min(missing)} was not given")
