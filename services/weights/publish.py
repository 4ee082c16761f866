"""The trainer's side: write a version's files, make them durable, and only then let redis name it the newest."""

import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self, TypeVar

import torch
from prometheus_client import Counter, Gauge
from redis import Redis

from services.contract import Adapter, TensorEntry, Version, WeightVersion
from services.recipe import Recipe
from services.redis import insist_sync
from services.weights import adapter as adapters
from services.weights import delta, disk, pointer
from services.weights.mirror import Mirror, own_folder
from services.weights.seconds import SECONDS
from services.weights.store import MANIFEST, Folder, store_at

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PUBLISHED = Gauge("rlif_weight_published_version", "Newest version this trainer published", ["run"])
BYTES = Counter("rlif_weight_published_bytes_total", "Bytes of published weights, whole (disk) or not", ["transport"])


class Superseded(Exception):
    """Redis names this version or a newer one: this trainer is outlived, or repeats itself."""


class Publisher:
    """Publishes the versions of one run as folders `<lineage>-<version>` in `place` (services.weights.store) and keeps
    the `keep` newest, with the versions that those are made from.

    Used by one process (rank 0). `patience_seconds` is how long it outlasts a redis or a bucket that is away. With
    `snapshot_every` only one version in so many is whole, the first among them; the others are deltas to the version
    before, for which the publisher keeps a copy of the weights in `mirror_dir` (none: the system's temporary folder).
    Raises ValueError: `keep` below 1.
    """

    def __init__(
        self,
        redis: Redis,
        run_id: str,
        place: Path | str,
        keep: int = 3,
        patience_seconds: float = 300.0,
        snapshot_every: int = 1,
        mirror_dir: Path | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep {keep}: at least the newest version has to stay")
        self.redis, self.run_id, self.keep, self.patience_seconds = redis, run_id, keep, patience_seconds
        self.snapshot_every = snapshot_every
        self._mirror = Mirror(mirror_dir, f"{run_id}-trainer") if snapshot_every > 1 else None
        self._base: WeightVersion | None = None
        self._since_snapshot = 0
        self.store = store_at(place, patience_seconds)
        if isinstance(self.store, Folder):
            self.directory = self.store.directory
            self.directory.mkdir(parents=True, exist_ok=True)
        else:
            self.directory, _ = own_folder(self, mirror_dir, f"{run_id}-drafts")
        self._remove_drafts()
        self._clean()

    @classmethod
    def of(cls, recipe: Recipe, redis: Redis) -> Self:
        """The recipe's. Raises OSError."""
        chosen = recipe.weights
        every = chosen.snapshot_every if chosen.transport == "delta" else 1
        return cls(
            redis,
            recipe.run.name,
            recipe.weights_dir,
            chosen.keep,
            snapshot_every=every,
            mirror_dir=chosen.mirror_dir,
        )

    def publish(
        self,
        version: Version,
        tensors: Iterable[tuple[str, torch.Tensor]],
        config_dir: Path | None = None,
        adapter: Adapter | None = None,
    ) -> WeightVersion:
        """Publish (name, tensor) pairs, which are consumed as they are written, as `version`.

        `config_dir` is a Hugging Face folder whose configuration and tokenizer files make the published folder a
        loadable model. With an `adapter`, the tensors are A and B of its layers, and all that is published. Raises
        Superseded (before anything is written, or when it became so meanwhile), OSError from the disk, and
        services.redis.DeadlineExceeded.
        """
        started = time.monotonic()
        self._check_newer(version)
        name = f"{version.lineage}-{version.version}"
        draft = self.directory / f"{name}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        self.store.remove(name)  # of a publication that never reached the pointer
        draft.mkdir()
        base, self._base = self._base, None  # again when the mirror is known to be this version
        if self._since_snapshot + 1 >= self.snapshot_every:
            base = None
        if adapter is None:
            manifest = self._write(draft, tensors, config_dir, version, base)
        else:
            manifest = disk.write_tensors(draft, tensors, stem=adapters.STEM)
        weights = WeightVersion(
            run_id=self.run_id,
            lineage=version.lineage,
            version=version.version,
            transport="adapter" if adapter else "delta" if base else "disk",
            location=self.store.location(name),
            manifest=manifest,
            created_at=time.time(),
            base=base.id if base else None,
            adapter=adapter,
        )
        (draft / MANIFEST).write_text(weights.model_dump_json(indent=1))
        disk.sync(draft / MANIFEST)
        size = sum(file.stat().st_size for file in draft.iterdir() if file.name != MANIFEST)
        self.store.keep(draft, name)
        written = time.monotonic()
        if not self._insist(lambda: pointer.advance(self.redis, weights), f"publish weights {version}"):
            self.store.remove(name)
            raise Superseded(
                f"run {self.run_id}: weights {version} are outdated, a newer version was published meanwhile"
            )
        ended = time.monotonic()
        if adapter is None:
            self._base, self._since_snapshot = weights, self._since_snapshot + 1 if base else 0
        self._clean()
        BYTES.labels(weights.transport).inc(size)
        PUBLISHED.labels(self.run_id).set(version.version)
        SECONDS.labels("trainer", "write").observe(written - started)
        SECONDS.labels("trainer", "announce").observe(ended - written)
        log.info("run %s: published weights %s in %.2f s", self.run_id, version, ended - started)
        return weights

    def close(self) -> None:
        """After the last version."""

    def _write(
        self,
        draft: Path,
        tensors: Iterable[tuple[str, torch.Tensor]],
        config_dir: Path | None,
        version: Version,
        base: WeightVersion | None,
    ) -> list[TensorEntry]:
        """The version's files without its manifest, which is returned."""
        if base is not None:
            assert self._mirror is not None
            return delta.write(draft, tensors, self._mirror.tensors(), base.manifest)
        manifest = disk.write_tensors(draft, tensors)
        if config_dir is not None:
            disk.copy_config(Path(config_dir), draft, manifest)
        if self._mirror is not None:
            self._mirror.fill(draft, version)
        return manifest

    def _insist(self, call: Callable[[], Result], what: str) -> Result:
        return insist_sync(call, f"run {self.run_id}: {what}", self.patience_seconds)

    def _check_newer(self, version: Version) -> None:
        newest = self._insist(lambda: pointer.newest_version_sync(self.redis, self.run_id), "read the newest version")
        if newest is not None and newest >= version:
            raise Superseded(f"run {self.run_id}: weights {version} are not newer than {newest}, published before")

    def _remove_drafts(self) -> None:
        """What an earlier trainer began and never finished."""
        for draft in self.directory.glob("*-*.tmp"):
            log.info("run %s: removing %s, which was never finished", self.run_id, draft.name)
            shutil.rmtree(draft, ignore_errors=True)
        for version, files in self.store.versions():
            if MANIFEST not in files:
                log.info("run %s: removing weights %s, which were never finished", self.run_id, version)
                self.store.remove(f"{version.lineage}-{version.version}")

    def _clean(self) -> None:
        """Delete all but the newest versions and those that they are made from."""
        versions = self.store.versions()
        kept = max(0, len(versions) - self.keep)
        while kept and delta.INDEX in versions[kept][1]:
            kept -= 1
        for version, _ in versions[:kept]:
            self.store.remove(f"{version.lineage}-{version.version}")
