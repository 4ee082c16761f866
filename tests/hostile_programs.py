"""Programs that try to get out of the sandbox, to bring it down, or to lie about their result.

Of each: what it may end as. Those made by `tried` say HELD when everything they tried was refused by the system (an
OSError; a bug in the attack itself would be a crash), and ESCAPED when something was not.

@secret@, @folder@, @port@ and @socket@ stand for a file, a folder, a TCP port and an abstract Unix socket of the host,
@test@ for the process of the test, @home@ and @checkout@ for files there, and other @names@ for system call numbers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hostile:
    name: str
    source: str
    ends: tuple[str, ...]
    language: str = "python"
    says_held: bool = False
    exit_code: int | None = None


PRELUDE = """
import ctypes, os, resource, signal, socket, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    words = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    if libc.syscall(ctypes.c_long(number), *words) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""
ATTEMPT = """
try:
    {}
except OSError:
    pass
else:
    sys.exit("ESCAPED " + {!r})
"""


def tried(name: str, *attempts: str) -> Hostile:
    """Statements, each of which must be refused."""
    parts = [ATTEMPT.format("\n    ".join(attempt.splitlines()), attempt) for attempt in attempts]
    return Hostile(name, "\n".join([PRELUDE, *parts, "print('HELD')"]), ("ok",), says_held=True)


def held(name: str, source: str) -> Hostile:
    """A program that judges by itself whether it was held."""
    return Hostile(name, PRELUDE + source, ("ok",), says_held=True)


def ended(name: str, source: str, *ends: str, exit_code: int | None = None) -> Hostile:
    return Hostile(name, PRELUDE + source, ends, exit_code=exit_code)


def cpp(name: str, source: str, *ends: str) -> Hostile:
    return Hostile(name, source, ends, "cpp")


def reading(*paths: str) -> list[str]:
    return [f"print(open({path!r}).read())" for path in paths]


def writing(*paths: str, text: str = "1") -> list[str]:
    return [f"os.write(os.open({path!r}, os.O_WRONLY | os.O_CREAT), b{text!r})" for path in paths]


EXHAUSTING = [
    ended("fork bomb", "while True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    ended("fork bomb that gives up", "while True: os.fork()", "crash", "timeout"),
    cpp("fork bomb in C++", "#include <unistd.h>\nint main() { for (;;) fork(); }", "timeout"),
    ended(
        "thread bomb",
        "import threading\ncount = 0\ntry:\n    while count < 500:\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); count += 1\n"
        "except RuntimeError: os._exit(7)",
        "crash",
        exit_code=7,
    ),
    ended("memory", "x = []\nwhile True: x.append(bytearray(10**6))", "crash", "memory"),
    ended(
        "shared memory",
        "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2**20)); x[-1].write(b'x' * 2**20)",
        "crash",
        "memory",
    ),
    ended(
        "memory of many children",
        "for _ in range(10):\n    if os.fork() == 0: x = b'x' * 50_000_000; time.sleep(9)\ntime.sleep(9)",
        "memory",
    ),
    cpp(
        "malloc",
        "#include <cstdlib>\n#include <cstring>\nint main() { for (;;) memset(malloc(1 << 20), 1, 1 << 20); }",
        "crash",
        "memory",
    ),
    tried("one big file", "with open('/tmp/big', 'wb') as file:\n    for _ in range(64): file.write(b'x' * 2**20)"),
    tried("many big files", "for i in range(64): open(f'/tmp/{i}', 'wb').write(b'x' * 2**20)"),
    tried("files in /dev/shm", "for i in range(64): open(f'/dev/shm/{i}', 'wb').write(b'x' * 2**20)"),
    ended("empty files", "for i in range(10**7): open(f'/tmp/{i}', 'w').close()", "output"),
    tried("memory in no file system", "syscall(@memfd_create@, b'x', 0)", "syscall(@shmget@, 0, 2**20, 0o1600)"),
    ended("flood of stdout", "while True: print('x' * 1000)", "output"),
    ended("flood of stdout without newline", "while True: sys.stdout.write('x' * 1000)", "output"),
    ended("flood of stderr", "while True: os.write(2, b'x' * 1000)", "output"),
    ended("flood of stdout by children", "os.fork(); os.fork()\nwhile True: os.write(1, b'x' * 100)", "output"),
    ended("endless loop", "while True: pass", "timeout"),
    cpp("endless loop in C++", "int main() { for (volatile int x = 0;;) x = x + 1; }", "timeout"),
    ended("endless computing in C code", "(10 ** 10**7) ** 100", "timeout", "crash", "memory"),
    ended("endless loops of many processes", "os.fork(); os.fork()\nwhile True: pass", "timeout"),
    ended("sleep", "time.sleep(1000)", "timeout"),
    ended("waiting for what never comes", "r, w = os.pipe()\nos.read(r, 1)", "timeout"),
    cpp(
        "stack overflow",
        "int f(int n) { volatile char x[4096]; x[0] = n; return f(n + 1) + x[0]; }\nint main() { return f(0); }",
        "crash",
    ),
    ended(
        "recursion", "sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)", "crash", "memory", "timeout"
    ),
]

OUTLIVING = [
    ended("sleeping children", "for _ in range(5):\n    if os.fork() == 0: time.sleep(1000)", "ok"),
    ended(
        "daemon",
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)\nprint('gone')",
        "ok",
    ),
    ended(
        "ignoring every signal",
        "for s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "os.fork()\nwhile True: time.sleep(1)",
        "timeout",
    ),
    ended("closed descriptors", "os.closerange(0, 256)\ntime.sleep(1000)", "timeout"),
    ended(
        "tree of zombies",
        "for _ in range(5):\n    if os.fork() == 0:\n        if os.fork() == 0: time.sleep(0.1)\n        os._exit(0)\n"
        "time.sleep(1000)",
        "timeout",
    ),
    ended("stopped", "os.fork()\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
]

MEDDLING = [
    held("signals to all", "try: os.kill(-1, 9)\nexcept ProcessLookupError: pass\nprint('HELD')"),
    held(
        "signals to the parent",
        "for s in (1, 2, 3, 9, 15, 19): os.kill(os.getppid(), s); os.kill(1, s)\ntime.sleep(0.1); print('HELD')",
    ),
    tried("signals to the host", "os.kill(@test@, 9)", "os.kill(-@test@, 9)"),
    tried("ptrace", "syscall(@ptrace@, 16, 1, 0, 0)", "syscall(@ptrace@, 0, 0, 0, 0)"),
    tried(
        "memory of others",
        "b = ctypes.create_string_buffer(8)\npair = struct.pack('PP', ctypes.addressof(b), 8)\n"
        "syscall(@process_vm_readv@, os.getpid(), pair, 1, pair, 1, 0)",
        "syscall(@kcmp@, 1, os.getpid(), 0, 0, 0)",
        "syscall(@perf_event_open@, bytes(128), 0, -1, -1, 0)",
    ),
    tried("priority", "os.nice(-5)", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))"),
    held(
        "raised limits",
        "for limit in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):\n"
        "    try: resource.setrlimit(limit, (-1, -1)); sys.exit('ESCAPED')\n    except (ValueError, OSError): pass\n"
        "print('HELD')",
    ),
]

CALLING_OUT = [
    tried("TCP to the reward server", "socket.create_connection(('127.0.0.1', @port@), 1)"),
    tried("UDP", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @port@))"),
    tried("IPv6", "socket.create_connection(('::1', @port@), 1)"),
    tried("names", "socket.getaddrinfo('example.com', 80)"),
    tried("listening", "socket.create_server(('127.0.0.1', 0))"),
    tried(
        "raw, packet, netlink and VM sockets",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
        "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    ),
    tried("abstract Unix socket of the host", "socket.socket(socket.AF_UNIX).connect('\\0@socket@')"),
    tried("Unix sockets in folders of the host", "socket.socket(socket.AF_UNIX).connect('/run/docker.sock')"),
]

SPYING = [
    ended(
        "environment",
        "print(dict(os.environ))\nfor pid in ('self', '1', str(os.getppid())):\n"
        "    try: print(open(f'/proc/{pid}/environ').read(), open(f'/proc/{pid}/cmdline').read())\n"
        "    except OSError: pass",
        "ok",
    ),
    tried("files of the host", *reading("/etc/shadow", "/etc/passwd", "/etc/hostname", "@secret@")),
    tried("files of the home and of the project", *reading("@home@", "@checkout@")),
    tried("folders of the host", *(f"print(os.listdir('{path}'))" for path in ("/root", "/home", "@folder@", "/run"))),
    tried(
        "folders of the kernel",
        "print(os.listdir('/sys'))",
        "print(open(os.path.join('/proc/1/root', 'etc/passwd')).read())",
    ),
    tried(
        "detours to files of the host",
        *reading(*(f"/proc/{pid}/{way}@secret@" for pid in ("1", "self") for way in ("root", "cwd/..", "root/.."))),
    ),
    tried("symlink", "os.symlink('@secret@', '/tmp/link')\nprint(open('/tmp/link').read())"),
    tried("symlink to a folder", "os.symlink('@folder@', '/tmp/out')\nopen('/tmp/out/written', 'w').write('x')"),
    tried("hard link", "os.link('/usr/bin/env', '/tmp/env')", "os.link('@secret@', '/tmp/secret')"),
    tried("writing to the system", *writing("/written", "/usr/bin/env", "/usr/lib/written", "/etc/passwd", "/dev/x")),
    tried("writing to the host", *writing("@secret@", "@folder@/written"), "os.mkdir('@folder@/made')"),
    tried(
        "its own program", *writing("/program/main.py"), "os.chmod('/program', 0o777)", "os.remove('/program/main.py')"
    ),
    tried(
        "writing to the kernel",
        *writing("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger"),
        *writing("/proc/sys/vm/drop_caches", "/proc/self/uid_map", "/proc/self/gid_map", text="0 0 1"),
    ),
    held(
        "processes of the host",
        "pids = [int(name) for name in os.listdir('/proc') if name.isdigit()]\n"
        "print('HELD' if max(pids) < 20 else f'ESCAPED {pids}')",
    ),
    tried(
        "devices",
        *(f"os.open('/dev/{name}', os.O_RDWR)" for name in ("mem", "kmsg", "sda", "vda", "tty", "fuse", "kvm")),
    ),
    tried(
        "device nodes",
        "os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))\nopen('/tmp/disk', 'rb')",
        "os.mknod('/tmp/memory', 0o20666, os.makedev(1, 1))\nopen('/tmp/memory', 'rb')",
    ),
    tried(
        "watching the host",
        "fd = libc.inotify_init()\nif libc.inotify_add_watch(fd, b'@folder@', 0xfff) < 0: raise OSError",
    ),
]

CLIMBING = [
    tried("root by setuid", "os.setuid(0)", "os.setgid(0)", "os.setresuid(0, 0, 0)", "os.setgroups([0])"),
    held(
        "setuid programs",
        "done = subprocess.run(['su', '-c', 'id -u'], stdin=subprocess.DEVNULL, capture_output=True, text=True)\n"
        "print('ESCAPED' if done.returncode == 0 or done.stdout else 'HELD')",
    ),
    held(
        "a setuid program of its own",
        "import shutil\nshutil.copy('/usr/bin/id', '/tmp/id'); os.chmod('/tmp/id', 0o6755)\n"
        "print('HELD' if subprocess.check_output(['/tmp/id', '-u']).strip() == b'65534' else 'ESCAPED')",
    ),
    tried("mount", "syscall(@mount@, b'none', b'/tmp', b'tmpfs', 0, b'')", "syscall(@umount2@, b'/proc', 2)"),
    tried("namespaces", *(f"syscall(@unshare@, {flag})" for flag in (0x10000000, 0x20000, 0x40000000))),
    tried("namespaces by clone", "syscall(@clone@, 0x10000011, 0, 0, 0, 0)", "syscall(435, bytes(88), 88)"),
    tried("namespaces of others", "syscall(@setns@, os.open('/proc/1/ns/net', os.O_RDONLY), 0)"),
    tried("chroot", "os.chroot('/tmp')", "syscall(@pivot_root@, b'/tmp', b'/tmp')"),
    tried("file handles", "syscall(@name_to_handle_at@, -100, b'/', bytes(256), bytes(8), 0)"),
    tried("keys", "syscall(@keyctl@, 0, -3, 1)", "syscall(@add_key@, b'user', b'x', b'x', 1, -3)"),
    tried("bpf", "syscall(@bpf@, 0, bytes(128), 128)"),
    tried("io_uring", "syscall(425, 4, bytes(120))"),
    tried("userfaultfd", "syscall(@userfaultfd@, 1)", "syscall(@userfaultfd@, 0)"),
    tried(
        "modules and reboot", "syscall(@init_module@, b'', 0, b'')", "syscall(@reboot@, 0xfee1dead, 672274793, 0, 0)"
    ),
    tried("clock and name", "time.clock_settime(0, 0)", "syscall(@sethostname@, b'x', 1)"),
]

LYING = [
    ended(
        "a forged report",
        "for fd in range(3, 256):\n    try: os.write(fd, b'{\"exit-code\": 0}\\n')\n    except OSError: pass\n"
        "for fd in os.listdir('/proc/1/fd'):\n"
        "    try: os.write(os.open(f'/proc/1/fd/{fd}', os.O_WRONLY | os.O_NONBLOCK), b'\\1' * 8)\n"
        "    except OSError: pass\nos._exit(3)",
        "crash",
        exit_code=3,
    ),
    tried("changed input", "os.write(0, b'x')", "os.write(os.open('/proc/self/fd/0', os.O_WRONLY), b'x')"),
    ended("abort", "os.abort()", "crash", exit_code=134),
    ended("killed by itself", "os.kill(os.getpid(), 9)", "crash", exit_code=137),
    ended("bytes that are no text", "os.write(1, bytes(range(256)))", "ok"),
    ended("calls by another table", "libc.syscall(ctypes.c_long(0x40000000 + 39))", "crash", exit_code=159),
]

COMPILING = [
    cpp(
        "templates without end",
        "template <int n> struct A { static const int v = A<n + 1>::v + A<n + 2>::v; };\n"
        "int main() { return A<0>::v; }",
        "compile",
    ),
    cpp("including the endless", '#include "/dev/zero"\nint main() {}', "compile"),
    cpp("including itself", "#include __FILE__\n#include __FILE__\nint main() {}", "compile"),
    cpp("including files of the host", '#include "/etc/shadow"\n#include "@secret@"\nint main() {}', "compile"),
    cpp("assembling files of the host", 'asm(".incbin \\"@secret@\\"");\nint main() {}', "compile"),
    cpp("a huge binary", "int x[1 << 28] = {1};\nint main() { return x[5]; }", "compile"),
    cpp(
        "words without end",
        "#define A(x) x x x x x x x x x x x x x x x x\n#define B(x) A(A(A(x)))\n#define C(x) B(B(B(x)))\n"
        "int main() { C(C(1;)) }",
        "compile",
    ),
]

PROGRAMS = [*EXHAUSTING, *OUTLIVING, *MEDDLING, *CALLING_OUT, *SPYING, *CLIMBING, *LYING, *COMPILING]
