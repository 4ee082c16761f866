"""Programs, run in a sandbox."""

import time

from reward_server.sandbox.provider import Case, CaseResult, Limits, Program

DOUBLE = {
    "python": "print(2 * int(input()))",
    "cpp": "#include <iostream>\nint main() { long x; std::cin >> x; std::cout << 2 * x << std::endl; }",
}
SLOW = "import time\nword = input()\nif word == 'slow': time.sleep(100)\nif word == 'bad': 1 / 0\nprint(word)"


async def run(sandbox, source, *stdins, language="python", seconds=60.0, **limits) -> list[CaseResult]:
    program = Program(language=language, source=source)
    cases = [Case(stdin=stdin) for stdin in stdins or ("",)]
    return await sandbox.run(program, cases, Limits(**limits), time.monotonic() + seconds)


def told(results):
    return [(result.status, result.stdout.strip()) for result in results]
