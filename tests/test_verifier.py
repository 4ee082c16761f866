"""The verifier pool and math_verify against hostile answers: real processes, real kills."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest
import pytest_asyncio

from reward_server.reward import Context
from reward_server.rewards import math_verify, patterns
from reward_server.rewards.math_verify import MathParams, heavy
from reward_server.workers import Limits, Turn, WorkerPool
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Reference, Task

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module")]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
QUICK = Limits(quantum_seconds=0.2, full_seconds=0.4, full_wall_seconds=3, grace_seconds=0.5, slow_wait_seconds=120)

HOSTILE = [
    "9^9^9^9",
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{10^{10^{10}}}",
    "\\boxed{(10^9)!}",
    "\\boxed{" + "\\frac{1}{" * 30 + "2" + "}" * 30 + "}",
    "\\boxed{" + "{" * 200 + "1" + "}" * 200 + "}",
    "\\boxed{" + "(" * 60 + "1" + ")" * 60 + "}",
    "\\boxed{(x+1)^{5000}}",
    "\\boxed{\\sum_{k=1}^{10^9} \\frac{1}{k^2}}",
    "\\boxed{\\prod_{k=1}^{10^9} k}",
    "\\boxed{\\binom{10^9}{10^8}}",
]


def group_of(texts: list[str], answer: str = "4") -> RewardGroup:
    task = Task(task_id="t", prompt="p", reference=Reference(answer=answer))
    return RewardGroup(group_id="g", task=task, completions=[CompletionText(text=text) for text in texts])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool():
    made = WorkerPool(1, QUICK, [math_verify.WARM_UP])
    made.start()
    yield made
    await made.stop()


def context(pool: WorkerPool, seconds: float = 120) -> Context:
    return Context(pool, time.monotonic() + seconds, Turn())


async def judge(pool: WorkerPool, texts: list[str], answer: str = "4", **params) -> list:
    return await math_verify.score(group_of(texts, answer), MathParams(**params), context(pool))


async def test_verdicts(pool):
    cases = [
        ("4", "so \\boxed{4}.", "correct"),
        ("4", "The answer is 4", "correct"),
        ("\\frac{1}{2}", "\\boxed{0.5}", "correct"),
        ("(1, 2]", "$x \\in (1,2]$, thus $\\boxed{(1, 2]}$", "correct"),
        ("180\\text{ miles}", "\\boxed{180}", "correct"),
        ("4", "$\\boxed{3}$, no: $\\boxed{4}$", "correct"),
        ("4", "\\boxed{4}. I repeat: \\boxed{4}", "correct"),
        ("3, 4", "\\boxed{3} and \\boxed{4}", "correct"),
        ("4", "\\boxed{3} or \\boxed{4}", "wrong"),
        ("4", "it is 4, no, \\boxed{5}", "wrong"),
        ("4", "I do not know.", "no_answer"),
        ("4", "", "no_answer"),
        ("The proof is trivial \\boxed{4}", "\\boxed{4}", "correct"),
        ("$4$", "\\boxed{4}", "correct"),
        ("\\$5.50", "\\boxed{5.5}", "correct"),
        ("a + b + c", "\\boxed{c + b + a}", "correct"),
        ("a + b + c", "\\boxed{a + c}", "wrong"),
        ("30^\\circ.", "\\boxed{30^\\circ}", "correct"),
        ("7\\text{ hours}.", "\\boxed{7\\text{ hours}.}", "correct"),
        ("-\\frac{5}{3}", "\\boxed{-\\frac{5}{3}.}", "correct"),
        ("4", "\\boxed{}", "no_answer"),
        ("4", "\\boxed{\\frac{1}{0}}", "wrong"),
        ("\\frac{1}{0}", "\\boxed{4}", "unparsable"),
        ("}{", "\\boxed{4}", "unparsable"),
    ]
    found = await asyncio.gather(*(judge(pool, [text], answer) for answer, text, _ in cases))
    assert [(case, str(scores[0].outcome)) for case, scores in zip(cases, found, strict=True)] == [
        (case, case[2]) for case in cases
    ]
    values = {"correct": 1.0, "wrong": 0.0, "no_answer": 0.0, "unparsable": None}
    assert all(scores[0].value == values[case[2]] for case, scores in zip(cases, found, strict=True))


async def test_anchored_wants_a_box_or_an_announcement(pool):
    loose = await judge(pool, ["we need 4"])
    strict = await judge(pool, ["we need 4", "\\boxed{4}", "The answer is $4$."], anchored=True)
    assert loose[0].outcome == Outcome.correct
    assert [score.outcome for score in strict] == [Outcome.no_answer, Outcome.correct, Outcome.correct]


async def test_only_the_end_of_a_long_completion_is_read(pool):
    texts = ["\\boxed{5} " + "and so on " * 5000 + "\\boxed{4}", "\\boxed{4} " + "rambling " * 5000]
    scores = await judge(pool, texts, anchored=True)
    assert [score.outcome for score in scores] == [Outcome.correct, Outcome.no_answer]


async def test_over_long_reference_is_unusable(pool):
    (score,) = await judge(pool, ["\\boxed{4}"], answer="4" * 5000)
    assert score.outcome == Outcome.unparsable and "5000" in score.detail


async def test_hostile_answers_never_become_numbers_nor_hold_up_good_ones(pool):
    await judge(pool, ["\\boxed{4}"])
    hostile = asyncio.create_task(judge(pool, HOSTILE))
    await asyncio.sleep(0.2)
    good = await judge(pool, ["\\boxed{4}"] * 5)
    assert not hostile.done()
    assert [score.outcome for score in good] == [Outcome.correct] * 5
    scores = await hostile
    assert [(text[:30], score.value) for text, score in zip(HOSTILE, scores, strict=True)] == [
        (text[:30], None) for text in HOSTILE
    ]
    assert {score.outcome for score in scores} <= {Outcome.timeout, Outcome.error}
    assert all(score.detail for score in scores)


async def test_heavy_is_a_guess_about_cost():
    assert not any(heavy(text) for text in ["\\boxed{4}", "\\boxed{\\frac{3}{4}}", "x^2 + y^2 = 1", "Great! It is 12."])
    assert all(heavy(text) for text in HOSTILE)
    assert all(heavy(text) for text in ["((9^{99})^{99})^{99}", "((((9^9)^9)^9)^9)^9", "(a+b+c+d)^{98}"])
    assert all(heavy(text) for text in ["\\boxed{9^{9^9}}", "(10^9)!", "\\sum_{k=1}^{9} k", "9^9^9^9", "((((((1))))))"])


# ---- the pool, with checks that misbehave --------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def rough(monkeypatch):
    """A pool whose processes can import `misbehaving`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    made = WorkerPool(1, Limits(0.3, 1.0, 0.8, 2.0, grace_seconds=0.3, queue=3), [("misbehaving:child_pid", {})])
    made.start()
    yield made
    await made.stop()


async def run(pool, name, payload=None, seconds=60.0, **options):
    return await pool.check(f"misbehaving:{name}", payload or {}, time.monotonic() + seconds, Turn(), **options)


async def test_quantum_then_the_slow_lane_gives_full_time(rough):
    rough.limits = Limits(0.3, 60, 0.8, 60, slow_wait_seconds=60)
    fast = (await run(rough, "child_pid")).result["pid"]
    slow = (await run(rough, "child_pid", heavy=True)).result["pid"]
    verdict = await run(rough, "toil", {"seconds": 0.5})
    assert verdict.status == "ok" and verdict.result["pid"] == slow != fast
    verdict = await run(rough, "toil", {"seconds": 30})
    assert verdict.status == "timeout" and "0.8 s of work" in verdict.detail


async def test_waiting_is_bounded_too(rough):
    verdict = await run(rough, "doze", {"seconds": 30})
    assert verdict.status == "timeout" and "2 s in all" in verdict.detail


async def test_a_check_takes_as_long_as_it_likes_in_wall_time_within_reason(rough):
    assert (await run(rough, "doze", {"seconds": 0.6})).status == "ok"


async def test_hard_limit_kills_what_swallows_the_alarm(rough):
    pid = (await run(rough, "child_pid", heavy=True)).result["pid"]
    verdict = await run(rough, "spin", {"seconds": 30}, heavy=True)
    assert verdict.status == "timeout" and verdict.seconds < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert (await run(rough, "child_pid", heavy=True)).result["pid"] != pid


async def test_a_dying_process_is_an_error_and_is_replaced(rough):
    verdict = await run(rough, "die")
    assert verdict.status == "error" and "exit code 3" in verdict.detail
    assert (await run(rough, "child_pid")).status == "ok"


async def test_memory_is_limited(rough):
    verdict = await run(rough, "devour")
    assert verdict.status == "error" and "MemoryError" in verdict.detail


async def test_prints_do_not_break_the_frames(rough):
    assert (await run(rough, "chatter")).result == {"said": True}


async def test_deadline_bounds_the_wait(rough):
    await run(rough, "child_pid")
    verdict = await run(rough, "doze", {"seconds": 20}, seconds=0.2)
    assert verdict.status == "timeout" and verdict.seconds < 5 and "deadline" in verdict.detail


async def test_full_queue_says_so(rough):
    await run(rough, "child_pid")
    waiting = [asyncio.create_task(run(rough, "doze", {"seconds": 5}, seconds=2)) for _ in range(6)]
    verdicts = await asyncio.gather(*waiting)
    assert {verdict.status for verdict in verdicts} == {"timeout", "error"}
    assert any("queue is full" in verdict.detail for verdict in verdicts if verdict.status == "error")


async def test_callers_take_turns(rough):
    await run(rough, "child_pid")
    order = []
    deadline = time.monotonic() + 60

    async def ask(name, turn):
        await rough.check("misbehaving:doze", {"seconds": 0.02}, deadline, turn)
        order.append(name)

    rough.limits = Limits(quantum_seconds=5, quantum_wall_seconds=30)
    big, small = Turn(), Turn()
    many = [asyncio.create_task(ask("big", big)) for _ in range(20)]
    await asyncio.sleep(0)
    await asyncio.gather(*many, ask("small", small))
    assert order.index("small") < 5


async def test_a_caller_whose_checks_run_over_loses_the_fast_lane(rough):
    rough.limits = Limits(0.3, 20, 0.6, 20, slow_wait_seconds=120)
    await run(rough, "child_pid")
    hostile, deadline = Turn(), time.monotonic() + 120
    bad = [asyncio.create_task(rough.check("misbehaving:toil", {"seconds": 60}, deadline, hostile)) for _ in range(8)]
    while not hostile.overruns:
        await asyncio.sleep(0.01)
    kept = (await run(rough, "child_pid")).result["pid"]
    for overruns in (2, 3):
        while hostile.overruns < overruns:
            await asyncio.sleep(0.01)
        assert (await run(rough, "child_pid")).result["pid"] == kept  # no check of the other's was tried there
    for task in bad:
        task.cancel()


async def test_heavy_checks_of_others_do_not_wait_for_all_that_ran_over(rough):
    rough.limits = Limits(0.3, 20, 0.6, 20, slow_wait_seconds=120)
    hostile, deadline = Turn(), time.monotonic() + 120
    bad = [asyncio.create_task(rough.check("misbehaving:toil", {"seconds": 60}, deadline, hostile)) for _ in range(8)]
    while hostile.overruns < 2:
        await asyncio.sleep(0.01)
    assert (await run(rough, "child_pid", heavy=True)).status == "ok"
    assert sum(task.done() for task in bad) <= 3
    for task in bad:
        task.cancel()


async def test_a_caller_gets_the_fast_lane_back(rough):
    rough.limits = Limits(0.3, 20, 0.6, 20, slow_wait_seconds=120)
    await run(rough, "child_pid")
    turn, deadline = Turn(), time.monotonic() + 120
    assert (await rough.check("misbehaving:toil", {"seconds": 60}, deadline, turn)).status == "timeout"
    assert turn.is_costly
    checks = (rough.check("misbehaving:child_pid", {}, deadline, turn) for _ in range(30))
    pids = [(await check).result["pid"] for check in checks]
    fast = (await run(rough, "child_pid")).result["pid"]
    assert pids[0] != fast and pids[-1] == fast and not turn.is_costly


async def test_stop_leaves_no_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pool = WorkerPool(1)
    pool.start()
    pid = (await run(pool, "child_pid")).result["pid"]
    await pool.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_catastrophic_pattern_times_out(pool):
    verdict = await patterns.match("(a+)+b", "a" * 60, "fullmatch", context(pool))
    assert verdict.status == "timeout"


@pytest.mark.skipif(not (DATA / "math_train.jsonl").exists(), reason="no MATH data here")
async def test_real_gold_answers_verify_against_themselves():
    with (DATA / "math_train.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines][::50]
    calm = WorkerPool(1, Limits(), [math_verify.WARM_UP])
    try:
        found = await asyncio.gather(
            *(judge(calm, [f"So the answer is $\\boxed{{{row['answer']}}}$."], row["answer"]) for row in rows)
        )
    finally:
        await calm.stop()
    missed = {row["answer"]: scores[0] for row, scores in zip(rows, found, strict=True) if scores[0].value != 1.0}
    assert len(rows) >= 150 and not missed
