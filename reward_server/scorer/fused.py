"""The fused CPU pass of `fused.cpp`: compiled once a machine with g++, cached, called through ctypes.

It needs AVX-512 or AVX2, and a compiler. Without either, `available` is false and the torch operators of `sums` do the
same work, slower. ctypes lets go of the GIL, so servers stay responsive meanwhile.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from reward_server.scorer.metrics import Wanted
from reward_server.scorer.sums import Sums

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("fused.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared"]
BUILDS = {
    "AVX512": ["-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    "AVX2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
}
"""Further flags, by what PyTorch calls the processor."""
COMPILE_SECONDS = 300
TILE_BYTES = {"AVX512": 512 * 1024, "AVX2": 256 * 1024}
"""Size of a transposed weight tile: with its logits it should lie in one core's L2 cache (1 to 2 MB; 0.5 MB)."""


def available(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `sums` can take these: CPU tensors of one dtype, width a multiple of 32; the processor, a compiler."""
    if hidden.device.type != "cpu" or hidden.dtype != weight.dtype or weight.shape[1] % 32:
        return False
    if not weight.is_contiguous() or hidden.dtype not in (torch.float32, torch.bfloat16):
        return False
    return _library() is not None


class _Job(ctypes.Structure):
    """`Job` of fused.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "width")),
        *((name, ctypes.c_void_p) for name in ("scale", "top", "total", "slope", "square", "largest")),
        *((name, ctypes.c_int64) for name in ("k", "tile", "threads")),
    ]


def sums(hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, wanted: Wanted) -> Sums:
    """The sums over the logits `scale[t] * hidden[t] @ weight.T`.

    hidden [T, H], weight [V, H]; scale float32 [T], positive.
    """
    library, capability = _library(), torch.backends.cpu.get_cpu_capability()
    assert library is not None
    rows, width = hidden.shape
    run = library.rlif_head_float32
    if weight.dtype == torch.bfloat16:
        has_units = bool(library.rlif_supports_bfloat16())
        run = library.rlif_head_bfloat16 if has_units else library.rlif_head_widened
        hidden = hidden if has_units else hidden.float()
    hidden, scale = hidden.contiguous(), scale.contiguous()
    top, total, slope, square = (torch.empty(rows, dtype=torch.float64) for _ in range(4))
    largest = torch.empty(rows, min(wanted.top_k, weight.shape[0]), dtype=torch.float32)
    job = _Job(
        hidden=hidden.data_ptr(),
        weight=weight.data_ptr(),
        rows=rows,
        vocab=weight.shape[0],
        width=width,
        scale=scale.data_ptr(),
        top=top.data_ptr(),
        total=total.data_ptr(),
        slope=slope.data_ptr(),
        square=square.data_ptr() if wanted.varentropy else None,
        largest=largest.data_ptr(),
        k=largest.shape[1],
        tile=min(512, max(128, TILE_BYTES[capability] // (width * hidden.element_size()) // 16 * 16)),
        threads=torch.get_num_threads(),
    )
    run(ctypes.byref(job))
    return Sums(
        top,
        total,
        slope,
        square if wanted.varentropy else None,
        largest=largest.double() * scale.double()[:, None] if wanted.top_k else None,
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in BUILDS:
        log.info("fused LM head: off, this processor has neither AVX-512 nor AVX2")
        return None
    if compiler is None:
        log.warning("fused LM head: off, no g++ on PATH; scoring works but is slower")
        return None
    torch_folder = Path(torch.__file__).parent
    command = [compiler, *FLAGS, *BUILDS[capability], f"-I{torch_folder / 'include'}", str(SOURCE)]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    identity = "\0".join([torch.__version__, _processor(), *command, *link]).encode() + SOURCE.read_bytes()
    library = _cache_folder() / f"fused-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not library.exists():
        # Compiled beside its place and renamed: a killed compile leaves no lock and no half-written library.
        scratch = library.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run(
            [*command, "-o", str(scratch), *link], capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
        if done.returncode:
            log.warning("fused LM head: off, scoring is slower; the compiler said: %s", done.stderr[-2000:])
            return None
        os.replace(scratch, library)
    return ctypes.CDLL(str(library))


def _processor() -> str:
    """What `-march=native` looks at: a cache folder may be shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = root / "rlif"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="rlif-"))
