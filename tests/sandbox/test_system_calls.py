"""The filter of system calls."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reward_server.sandbox import seccomp


def interpret(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """The filter's verdict, by a slow reading of the instructions' definitions in linux/filter.h."""
    data = {0: number, 4: architecture, 16: argument & 0xFFFFFFFF}
    accumulator, place = 0, 0
    while True:
        code, if_true, if_false, value = seccomp.struct.unpack_from("<HBBI", program, 8 * place)
        place += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            accumulator = data[value]
        elif code == 0x06:  # BPF_RET | BPF_K
            return value
        else:  # BPF_JMP | BPF_JEQ, BPF_JGE, BPF_JSET | BPF_K
            is_true = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            place += if_true if is_true else if_false


ALLOWED = 0x7FFF0000
EPERM, ENOSYS, EAFNOSUPPORT = 0x50000 | 1, 0x50000 | 38, 0x50000 | 97


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_is_listed_and_nothing_else(machine):
    column = list(seccomp.ARCHITECTURES).index(machine)
    program, architecture = seccomp.program(machine), seccomp.ARCHITECTURES[machine]
    refused = {numbers[column] for numbers in seccomp.REFUSED.values()} - {None}
    special = {seccomp.CLONE[machine], seccomp.SOCKET[machine]}
    for number in set(range(600)) - special:
        newer = number >= 424 and number not in seccomp.NEWER_ALLOWED.values()
        wanted = EPERM if number in refused else ENOSYS if newer else ALLOWED
        assert interpret(program, architecture, number) == wanted, number
    other = seccomp.ARCHITECTURES["aarch64" if machine == "x86_64" else "x86_64"]
    for wrong in (other, 0x40000003):  # i386
        assert interpret(program, wrong, 0) == 0x80000000
    assert interpret(program, architecture, 0x40000000) == 0x80000000


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_reads_arguments(machine):
    program, architecture = seccomp.program(machine), seccomp.ARCHITECTURES[machine]
    thread, fork = 0x3D0F00, 17
    verdicts = [interpret(program, architecture, seccomp.CLONE[machine], flags) for flags in (thread, fork)]
    assert verdicts == [ALLOWED, ALLOWED]
    for namespace in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert interpret(program, architecture, seccomp.CLONE[machine], namespace | fork) == EPERM
    for family, verdict in (
        (1, ALLOWED),
        (2, EAFNOSUPPORT),
        (10, EAFNOSUPPORT),
        (16, EAFNOSUPPORT),
        (17, EAFNOSUPPORT),
    ):
        assert interpret(program, architecture, seccomp.SOCKET[machine], family) == verdict


def test_the_filter_knows_its_machines():
    with pytest.raises(ValueError, match="no system call filter for riscv64 .only for x86_64 and aarch64"):
        seccomp.program("riscv64")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the numbers are compared with the C library's headers")
def test_the_numbers_are_those_of_the_headers():
    names = [name for name, numbers in seccomp.REFUSED.items() if None not in numbers]
    lines = "".join(f"\n{name} SYS_{name}" for name in [*names, "clone", "socket"])
    found = subprocess.run(
        ["gcc", "-E", "-P", "-"], input=f"#include <sys/syscall.h>{lines}", text=True, capture_output=True
    )
    column = list(seccomp.ARCHITECTURES).index(platform.machine())
    known = {**{name: seccomp.REFUSED[name][column] for name in names}}
    known |= {"clone": seccomp.CLONE[platform.machine()], "socket": seccomp.SOCKET[platform.machine()]}
    read = dict(line.split() for line in found.stdout.splitlines() if len(line.split()) == 2)
    assert {name: int(number) for name, number in read.items() if name in known} == known


GENERIC = Path("/usr/include/asm-generic/unistd.h")


@pytest.mark.skipif(not GENERIC.exists(), reason="the numbers are compared with the kernel's headers")
def test_the_numbers_of_aarch64_are_those_of_the_generic_table():
    table = {name: int(number) for name, number in re.findall(r"__NR(?:3264)?_(\w+)\s+(\d+)\n", GENERIC.read_text())}
    known = {name: numbers[1] for name, numbers in seccomp.REFUSED.items()}
    known |= {"clone": seccomp.CLONE["aarch64"], "socket": seccomp.SOCKET["aarch64"]}
    for name, number in known.items():
        assert table.get(name) == number, name
    newer = {name: number for name, number in table.items() if name in seccomp.NEWER_ALLOWED}
    assert newer and newer == {name: seccomp.NEWER_ALLOWED[name] for name in newer}
