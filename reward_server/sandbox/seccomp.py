"""The filter of system calls that programs run under: a classic BPF program for x86-64 and aarch64.

Calls that administer a machine, reach into other processes, or hold memory that no limit counts are refused with EPERM.
Calls newer than this list are answered ENOSYS, as by an older kernel, unless they are known to be harmless; `clone3`,
whose arguments a filter cannot read, is among those, and C libraries then use `clone`. A call by another architecture's
table (32-bit, x32) ends the process: its numbers would mean something else here.
"""

import errno
import platform
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h."""

REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "perf_event_open": (298, 241),
    # namespaces and mounts
    "setns": (308, 268),
    "unshare": (272, 97),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    # the kernel and its machine
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "userfaultfd": (323, 282),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, None),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
    # memory that outlives a process or is in no file system, so that no limit counts it
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "io_setup": (206, 0),
    "splice": (275, 76),
    "tee": (276, 77),
    "vmsplice": (278, 75),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "mbind": (237, 235),
    "remap_file_pages": (216, 234),
}
"""Numbers on x86-64 and aarch64; none where the call does not exist."""

CLONE = {"x86_64": 56, "aarch64": 220}
SOCKET = {"x86_64": 41, "aarch64": 198}
NEWER = 424
"""From this number on all architectures share one table."""
NEWER_ALLOWED = {"close_range": 436, "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449, "fchmodat2": 452}
X32 = 0x40000000
NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWTIME | NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET of linux/sched.h."""
AF_UNIX = 1

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data (both architectures are little-endian)."""
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _refuse(number: int, error: int) -> bytes:
    return _instruction(JUMP_EQUAL, number, 0, 1) + _instruction(RETURN, ERROR | error)


def program(machine: str | None = None) -> bytes:
    """An array of struct sock_filter, as bubblewrap's --seccomp reads it.

    Raises ValueError: no filter is known for the machine (as `platform.machine()` names it; none: this one).
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"there is no system call filter for {machine} (only for {' and '.join(ARCHITECTURES)})")
    column = list(ARCHITECTURES).index(machine)
    numbers = [entry[column] for entry in REFUSED.values()]
    allow = _instruction(RETURN, ALLOW)
    return b"".join(
        [
            _instruction(LOAD, ARCHITECTURE),
            _instruction(JUMP_EQUAL, ARCHITECTURES[machine], 1, 0),
            _instruction(RETURN, KILL),
            _instruction(LOAD, NUMBER),
            _instruction(JUMP_AT_LEAST, X32, 0, 1),
            _instruction(RETURN, KILL),
            *[_instruction(JUMP_EQUAL, number, 0, 1) + allow for number in NEWER_ALLOWED.values()],
            _instruction(JUMP_AT_LEAST, NEWER, 0, 1),
            _instruction(RETURN, ERROR | errno.ENOSYS),
            *[_refuse(number, errno.EPERM) for number in numbers if number is not None],
            _instruction(JUMP_EQUAL, CLONE[machine], 0, 4),
            _instruction(LOAD, FIRST_ARGUMENT),
            _instruction(JUMP_ANY_BIT, NEW_NAMESPACES, 0, 1),
            _instruction(RETURN, ERROR | errno.EPERM),
            allow,
            _instruction(JUMP_EQUAL, SOCKET[machine], 0, 3),
            _instruction(LOAD, FIRST_ARGUMENT),
            _instruction(JUMP_EQUAL, AF_UNIX, 1, 0),
            _instruction(RETURN, ERROR | errno.EAFNOSUPPORT),
            allow,
        ]
    )
