"""Does the sandbox hold on this machine? A script inside says what it could do, and one program a language runs."""

import os
import time
from typing import TYPE_CHECKING

from reward_server.sandbox.confined import SetupFailed
from reward_server.sandbox.provider import Case, Limits, Program

if TYPE_CHECKING:
    from reward_server.sandbox.bubblewrap import Bubblewrap

LIMITS = Limits(wall_seconds=30, processes=16)
SECONDS = 60.0
SCRIPT = """
echo uid=$(id -u)
while read -r name value; do
    case $name in CapEff:|CapBnd:|NoNewPrivs:|Seccomp:) echo "$name=$value" ;; esac
done < /proc/self/status
for name in user pid net ipc mnt uts; do echo "namespace=$(readlink /proc/self/ns/$name)"; done
(: > /written) 2> /dev/null && echo root=writable
(: > /usr/bin/written) 2> /dev/null && echo root=writable
unshare --user true 2> /dev/null && echo namespaces=new
for handle in /proc/self/fd/*; do [ -h "$handle" ] && echo "handle=${handle##*/}"; done
i=0
while [ $i -lt 64 ]; do
    sleep 10 &
    echo forked=$i
    i=$((i + 1))
done
"""
HANDLES = {"handle=0", "handle=1", "handle=2"}
HELD = HANDLES | {"uid=65534", "CapEff:=0000000000000000", "CapBnd:=0000000000000000", "NoNewPrivs:=1", "Seccomp:=2"}
FAULTS = {
    "uid": "programs do not run as nobody",
    "CapEff:": "programs have capabilities",
    "CapBnd:": "programs can have capabilities",
    "NoNewPrivs:": "programs can gain privileges",
    "Seccomp:": "the system call filter is not in force",
    "root": "programs can write outside their folder",
    "namespaces": "programs can make namespaces",
    "handle": "programs have other descriptors than stdin, stdout and stderr",
}
HELLO = {
    "python": "import sys\nprint(sys.stdin.read())\n",
    "cpp": "#include <cstdio>\nint main() { int c; while ((c = getchar()) != EOF) putchar(c); }\n",
}


async def fault(sandbox: "Bubblewrap") -> str | None:
    """Why the sandbox must not be used; none when it holds."""
    # As a server may have inherited it: a descriptor that children inherit unless whoever starts them closes it.
    planted = os.open("/", os.O_RDONLY)
    try:
        os.set_inheritable(planted, True)
        done = await sandbox.confine(["sh", "-c", SCRIPT], LIMITS)
    except SetupFailed as error:
        return str(error)
    finally:
        os.close(planted)
    said = done.stdout.decode(errors="replace").split("\n")
    ours = {f"namespace={os.readlink(f'/proc/self/ns/{name}')}" for name in ("user", "pid", "net", "ipc", "mnt", "uts")}
    if shared := ours & set(said):
        return f"programs share a namespace with the server ({', '.join(sorted(shared)).replace('namespace=', '')})"
    facts = [line for line in said if line and not line.startswith(("forked=", "namespace="))]
    if missing := HELD - set(facts):
        return FAULTS[sorted(missing)[0].partition("=")[0]]
    if more := set(facts) - HELD:
        return FAULTS[sorted(more)[0].partition("=")[0]]
    if sum(line.startswith("forked=") for line in said) > LIMITS.processes:
        return "the number of processes is not limited (this needs Linux 5.14 or newer)"
    for language in sorted(sandbox.languages):
        program = Program.model_validate({"language": language, "source": HELLO[language]})
        (result,) = await sandbox.run(program, [Case(stdin="hello")], LIMITS, time.monotonic() + SECONDS)
        if result.status != "ok" or result.stdout.strip() != "hello":
            said_last = (result.detail or result.stderr.strip())[-200:]
            return f"a {language} program does not run: {result.status} {said_last}"
    return None
