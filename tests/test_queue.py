"""The queue against a real redis: dedupe, order, recovery, poison, fencing, deadlines."""

import asyncio
import uuid

import pytest
from prometheus_client import REGISTRY
from redis.exceptions import ConnectionError
from scored_groups import make_groups

from services import codec
from services.contract import ScoredGroup, Version
from services.queue import BATCH, Depth, Fenced, GroupQueue, Undone
from services.redis import DeadlineExceeded, connect


@pytest.fixture
async def redis(redis_url):
    async with connect(redis_url) as client:
        yield client


@pytest.fixture
def queue(redis, run_id) -> GroupQueue:
    return GroupQueue(redis, run_id, patience_seconds=10)


def ids(entries) -> list[str]:
    return [entry.group.group_id for entry in entries]


async def pushed(queue: GroupQueue, count: int, **options) -> list[str]:
    groups = make_groups(count, run=queue.run_id, **options)
    assert [await queue.push(group) for group in groups] == [True] * count
    return [group.group_id for group in groups]


async def state(queue: GroupQueue) -> tuple[int, int, int]:
    depth = await queue.depth()
    return depth.queued, depth.pending, depth.dead


async def test_what_is_pushed_is_pulled_in_order_and_unchanged(queue):
    groups = make_groups(5, run=queue.run_id)
    for group in groups:
        await queue.push(group)
    entries = await queue.pull(3, 5) + await queue.pull(2, 5)
    assert [entry.group for entry in entries] == [codec.unpack_as(ScoredGroup, codec.pack(group)) for group in groups]
    assert len({entry.entry_id for entry in entries}) == 5


async def test_a_group_is_pushed_once_whoever_pushes_it(queue, redis, run_id):
    (group,) = make_groups(1, run=run_id)
    other = GroupQueue(redis, run_id)
    answers = await asyncio.gather(*(q.push(group) for q in [queue, other] * 10))
    assert sorted(answers) == [False] * 19 + [True]
    assert await state(queue) == (1, 0, 0)
    assert await queue.seen() == {group.group_id}


async def test_a_group_stays_seen_after_it_was_acknowledged(queue):
    (group_id,) = await pushed(queue, 1)
    lineage = await queue.claim_lineage(0)
    await queue.ack([entry.entry_id for entry in await queue.pull(1, 5)], lineage)
    assert await queue.seen() == {group_id}
    assert not await queue.push(make_groups(1, run=queue.run_id)[0])
    assert await state(queue) == (0, 0, 0)


async def test_runs_do_not_see_each_other(queue, redis):
    await pushed(queue, 2)
    other = GroupQueue(redis, uuid.uuid4().hex)
    assert await other.seen() == set() and await state(other) == (0, 0, 0)
    with pytest.raises(DeadlineExceeded):
        await other.pull(1, 0.05)


async def test_a_buried_group_is_dead_and_never_pushed(queue):
    first, second = make_groups(2, run=queue.run_id)
    assert await queue.bury(first.group_id, first.index, "no reward server answered", codec.pack(first))
    assert not await queue.bury(first.group_id, first.index, "again")
    assert not await queue.push(first)
    assert await queue.push(second) and not await queue.bury(second.group_id, second.index, "too late")
    (dead,) = await queue.dead()
    assert (dead.group_id, dead.index, dead.reason) == (first.group_id, 0, "no reward server answered")
    assert codec.unpack_as(ScoredGroup, dead.payload).group_id == first.group_id
    assert await queue.seen() == {first.group_id, second.group_id}
    assert await state(queue) == (1, 0, 1)


async def test_recover_drops_the_consumed_and_brings_back_the_others_in_order(queue, redis, run_id):
    expected = await pushed(queue, 6)
    taken = await queue.pull(5, 5)
    consumed = {taken[0].entry_id, taken[2].entry_id, "1-1"}
    successor = GroupQueue(redis, run_id)
    await successor.claim_lineage(1)
    await successor.recover(consumed)
    assert await state(successor) == (1, 3, 0)
    assert ids(await successor.pull(4, 5)) == [expected[1], expected[3], expected[4], expected[5]]


async def test_what_a_dead_consumer_held_goes_to_the_next(queue, redis, run_id):
    expected = await pushed(queue, 3)
    first = await queue.pull(2, 5)
    await queue.begin(first)
    second = GroupQueue(redis, run_id)
    await second.recover(set())
    assert ids(await second.pull(3, 5)) == expected
    third = GroupQueue(redis, run_id)  # even without recover nothing is lost
    assert ids(await third.pull(3, 5)) == expected


async def test_recover_of_a_fresh_run_and_of_more_entries_than_one_command_takes(queue, redis, run_id):
    await queue.recover({"1-1"})
    assert await state(queue) == (0, 0, 0)
    (group,) = make_groups(1, size=1, run=run_id)
    for index in range(BATCH + 5):
        await queue.push(group.model_copy(update={"group_id": f"g{index}", "index": index}))
    taken = await queue.pull(BATCH + 5, 30)
    successor = GroupQueue(redis, run_id)
    await successor.claim_lineage(0)
    await successor.recover({entry.entry_id for entry in taken[:-3]})
    assert await state(successor) == (0, 3, 0)
    assert ids(await successor.pull(3, 5)) == [f"g{BATCH + n}" for n in (2, 3, 4)]


async def test_entries_whose_delivery_got_lost_come_first(queue, redis):
    """Redis handed them out, but the answer never arrived: to redis they are pending, to the consumer unknown."""
    expected = await pushed(queue, 4)
    first = await queue.pull(1, 5)
    await redis.xreadgroup("trainer", queue.consumer, {queue.keys.groups: ">"}, count=2)
    assert ids(first + await queue.pull(3, 5)) == expected


async def test_a_pull_that_was_cancelled_or_too_late_loses_nothing(queue):
    expected = await pushed(queue, 2)
    with pytest.raises(DeadlineExceeded, match=r"2 of 3 scored groups of run .* waited for the orchestrator"):
        await queue.pull(3, 1.0)
    pulling = asyncio.create_task(queue.pull(3, 30))
    await asyncio.sleep(0.2)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert ids(await queue.pull(2, 5)) == expected


async def test_pull_waits_for_what_is_pushed_meanwhile(queue):
    pulling = asyncio.create_task(queue.pull(2, 30))
    await asyncio.sleep(0.2)
    assert not pulling.done()
    expected = await pushed(queue, 2)
    assert ids(await pulling) == expected


@pytest.mark.parametrize(
    "payload", [b"", b"not msgpack", codec.pack({"group_id": "g"}), b"\x80\x04\x95pickle", codec.pack({"a": 1})[:-1]]
)
async def test_an_undecodable_entry_is_dead_lettered_at_once(queue, redis, payload):
    await redis.xadd(queue.keys.groups, {"id": "bad", "index": 7, "group": payload})
    (good,) = await pushed(queue, 1)
    assert ids(await queue.pull(1, 5)) == [good]
    (dead,) = await queue.dead()
    assert (dead.group_id, dead.index, dead.payload) == ("bad", 7, payload)
    assert dead.reason.startswith("not a scored group")
    assert await state(queue) == (0, 1, 1)
    assert "bad" in await queue.seen()


async def test_an_entry_of_foreign_fields_is_dead_lettered(queue, redis):
    await redis.xadd(queue.keys.groups, {"hello": "world", "index": "many"})
    with pytest.raises(DeadlineExceeded):
        await queue.pull(1, 0.1)
    assert [(dead.group_id, dead.index) for dead in await queue.dead()] == [("?", 0)]
    assert await state(queue) == (0, 0, 1)


async def test_what_crashes_the_trainer_each_time_is_dead_lettered_whole(redis, run_id):
    poison, good = await pushed(GroupQueue(redis, run_id), 2)
    for crash in range(3):
        trainer = GroupQueue(redis, run_id, max_deliveries=3)
        await trainer.claim_lineage(0)
        await trainer.recover(set())
        entries = await trainer.pull(1, 5)
        assert ids(entries) == [poison], f"crash {crash}"
        await trainer.begin(entries)
    trainer = GroupQueue(redis, run_id, max_deliveries=3)
    await trainer.recover(set())
    assert ids(await trainer.pull(1, 5)) == [good]
    (dead,) = await trainer.dead()
    assert dead.reason == "training was begun 3 times and never finished"
    assert codec.unpack_as(ScoredGroup, dead.payload).group_id == dead.group_id == poison
    assert await redis.hlen(trainer.keys.attempts) == 0


async def test_finished_steps_and_mere_deliveries_do_not_count_as_crashes(redis, run_id):
    expected = await pushed(GroupQueue(redis, run_id), 1)
    for _ in range(5):
        trainer = GroupQueue(redis, run_id, max_deliveries=2)
        await trainer.recover(set())
        entries = await trainer.pull(1, 5)
        assert ids(entries) == expected
        await trainer.begin(entries)
        await trainer.finish(entries)
        undone = GroupQueue(redis, run_id, max_deliveries=2)
        assert ids(await undone.pull(1, 5)) == expected


async def test_a_repeated_begin_counts_once(queue, redis, monkeypatch):
    """Redis took the command but its answer got lost: it is sent again."""
    await pushed(queue, 1)
    entries = await queue.pull(1, 5)
    send, lost = queue._script, []

    async def lossy(*arguments):
        await send(*arguments)
        if not lost:
            lost.append(True)
            raise ConnectionError("the answer got lost")

    monkeypatch.setattr(queue, "_script", lossy)
    await queue.begin(entries)
    assert lost and (await redis.hget(queue.keys.attempts, entries[0].entry_id)).startswith(b"1:")


async def test_lineages_rise(queue, redis, run_id):
    assert await queue.claim_lineage(0) == 0
    assert await GroupQueue(redis, run_id).claim_lineage(0) == 1
    assert await GroupQueue(redis, run_id).claim_lineage(7) == 7
    assert await GroupQueue(redis, run_id).claim_lineage(3) == 8
    claims = await asyncio.gather(*(GroupQueue(redis, run_id).claim_lineage(0) for _ in range(10)))
    assert sorted(claims) == list(range(9, 19))


async def test_an_outlived_trainer_is_fenced_from_everything(queue, redis, run_id):
    expected = await pushed(queue, 4)
    lineage = await queue.claim_lineage(0)
    entries = await queue.pull(2, 5)
    successor = GroupQueue(redis, run_id)
    await successor.claim_lineage(0)
    for call in (
        lambda: queue.ack([entry.entry_id for entry in entries], lineage),
        lambda: queue.begin(entries),
        lambda: queue.finish(entries),
        lambda: queue.pull(2, 5),
        lambda: queue.recover({entries[0].entry_id}),
    ):
        with pytest.raises(Fenced, match="lineage 0 is outlived, 1 is the current one"):
            await call()
    await successor.recover(set())
    assert ids(await successor.pull(4, 5)) == expected


async def test_an_outlived_trainer_that_waits_is_fenced_and_steals_nothing(queue, redis, run_id):
    await queue.claim_lineage(0)
    waiting = asyncio.create_task(queue.pull(2, 30))
    await asyncio.sleep(0.2)
    successor = GroupQueue(redis, run_id)
    await successor.claim_lineage(0)
    await successor.recover(set())
    expected = await pushed(successor, 2)  # the blocked read of the old one may well get the first of them
    assert ids(await successor.pull(2, 10)) and set(await successor.seen()) == set(expected)
    with pytest.raises(Fenced):
        await waiting
    assert await state(successor) == (0, 2, 0)


async def test_a_redis_that_lost_the_run_is_noticed(queue, redis):
    lineage = await queue.claim_lineage(0)
    await redis.delete(queue.keys.lineage)
    with pytest.raises(Fenced, match="redis lost the run's data"):
        await queue.ack(["1-1"], lineage)


async def test_a_redis_that_lost_its_data_learns_what_was_trained(queue, run_id):
    first = make_groups(4, size=1, run=run_id)
    await queue.claim_lineage(3)
    trained = [group.group_id for group in first[:3]]
    assert await queue.recall(trained) == 3
    assert await queue.recall(trained) == 0
    assert not await queue.push(first[0]) and await queue.push(first[3])
    assert await queue.seen() == {group.group_id for group in first}


async def test_a_redis_of_yesterday_brings_nothing_twice(queue, redis, run_id):
    """Its stream holds groups, queued and pending, that a newer checkpoint holds already."""
    expected = await pushed(queue, 6)
    await queue.pull(2, 5)
    successor = GroupQueue(redis, run_id)
    lineage = await successor.claim_lineage(1)
    assert await successor.recall([expected[0], expected[3], "trained and forgotten"]) == 1
    await successor.recover(set())
    entries = await successor.pull(4, 5)
    assert ids(entries) == [expected[1], expected[2], expected[4], expected[5]]
    assert await state(successor) == (0, 4, 0)
    await successor.ack([entry.entry_id for entry in entries], lineage)
    assert await redis.xlen(queue.keys.groups) == 0


async def test_ack_is_for_good_and_may_be_repeated(queue, redis, run_id):
    await pushed(queue, 3)
    lineage = await queue.claim_lineage(0)
    entries = await queue.pull(2, 5)
    await queue.begin(entries)
    done = [entry.entry_id for entry in entries]
    await queue.ack(done, lineage)
    await queue.ack(done, lineage)
    assert await redis.xlen(queue.keys.groups) == 1 and await redis.hlen(queue.keys.attempts) == 0
    successor = GroupQueue(redis, run_id)
    await successor.recover(set())
    assert await state(successor) == (1, 0, 0)


async def test_depth_counts_states_and_age(queue, redis):
    assert await queue.depth() == Depth(0, 0, 0, 0.0)
    await redis.xadd(queue.keys.groups, {"group": b""}, id="1-1")  # made in 1970
    await pushed(queue, 3)
    assert (await queue.depth()).oldest_age_seconds > 1e9
    await queue.pull(1, 5)
    depth = await queue.depth()
    assert (depth.queued, depth.pending, depth.dead) == (2, 1, 1)
    assert 0 <= depth.oldest_age_seconds < 600
    for name, value in (("queued", 2), ("pending", 1), ("dead", 1)):
        assert REGISTRY.get_sample_value("rlif_queue_groups", {"run": queue.run_id, "state": name}) == value
    assert REGISTRY.get_sample_value("rlif_queue_dead_lettered_total", {"run": queue.run_id}) == 1


async def test_a_group_that_does_not_fit_the_wire_is_refused_before_redis(queue):
    (group,) = make_groups(1, run=queue.run_id)
    group.prompt_token_ids = [2**31]
    with pytest.raises(ValueError, match="32 bits"):
        await queue.push(group)
    assert await queue.seen() == set()


# ---- going back ------------------------------------------------------------------------------------------------


def made_by(group, lineage: int):
    made = [c.model_copy(update={"weight_version": Version(lineage=lineage)}) for c in group.completions]
    return group.model_copy(update={"completions": made})


async def test_what_a_roll_back_undoes_is_made_again(queue, redis, run_id):
    groups = make_groups(8, size=1, run=run_id)
    ids_ = [group.group_id for group in groups]
    lineage = await queue.claim_lineage(0)
    for group in groups[:6]:
        await queue.push(group)
    await queue.bury(ids_[7], 7, "refused")
    trained = await queue.pull(4, 5)
    await queue.begin(trained)
    await queue.ack([entry.entry_id for entry in trained[:3]], lineage)
    # Two were trained before the checkpoint that is gone back to, two after; two lie in the queue.
    await queue.claim_lineage(0)
    for _ in range(2):  # cut off and done again
        await queue.undo([*ids_[2:4], ids_[7]])
    assert await queue.recall(ids_[:2]) == 0
    await queue.recover(set())
    assert await state(queue) == (0, 0, 1)
    assert await queue.seen() == {*ids_[:2], ids_[7]}
    with pytest.raises(Undone, match=r"index 2\) was made by lineage 0, since undone"):
        await queue.push(groups[2])
    assert not await queue.push(made_by(groups[1], 1))
    for group in groups[2:6]:
        assert await GroupQueue(redis, run_id).push(made_by(group, 1))
    assert ids(await queue.pull(4, 5)) == ids_[2:6]


async def test_groups_that_only_a_lost_checkpoint_held_are_told_from_those_that_come_again(queue, redis, run_id):
    groups = make_groups(8, size=1, run=run_id)
    ids_ = [group.group_id for group in groups]
    lineage = await queue.claim_lineage(0)
    for group in groups[:6]:
        await queue.push(group)
    await queue.bury(ids_[6], 6, "refused")
    await queue.leave_out(ids_[7], 7)
    entries = await queue.pull(5, 5)
    await queue.ack([entry.entry_id for entry in entries[:4]], lineage)
    # The checkpoint that held all four is gone, an earlier one holds the first two; the fifth was trained since.
    successor = GroupQueue(redis, run_id)
    await successor.claim_lineage(1)
    assert await successor.lost([ids_[4], *ids_[5:], "never made"]) == []
    assert sorted(await successor.lost(ids_[2:])) == sorted(ids_[2:4])
    await successor.recall(ids_[2:4])  # a redis that lost its data was once told of them
    assert sorted(await successor.lost(ids_[2:])) == sorted(ids_[2:4])
    with pytest.raises(Fenced):
        await queue.lost(ids_)
    await successor.undo(ids_[2:5])
    assert await successor.lost(ids_[2:]) == []
    assert await successor.seen() == {*ids_[:2], *ids_[6:]}


async def test_what_cuts_an_undoing_off_leaves_a_trace_of_it(queue, run_id, monkeypatch):
    """Whoever is restored then finds the groups lost again, or nothing left to do: an order half made is no order."""
    groups = make_groups(4, size=1, run=run_id)
    lineage = await queue.claim_lineage(0)
    for group in groups:
        await queue.push(group)
    ids_ = [group.group_id for group in groups]
    await queue.ack([entry.entry_id for entry in await queue.pull(2, 5)], lineage)
    real = queue._run
    for cut in range(3):
        calls = iter(range(9))

        async def until_it_is_cut(*args, cut=cut, calls=calls):
            if next(calls) >= cut:
                raise DeadlineExceeded("cut off")
            return await real(*args)

        monkeypatch.setattr(queue, "_run", until_it_is_cut)
        with pytest.raises(DeadlineExceeded):
            await queue.undo(ids_[:2])
        monkeypatch.setattr(queue, "_run", real)
        assert sorted(await queue.lost(ids_[:2])) == sorted(ids_[:2])
    await queue.undo(ids_[:2])
    assert await queue.seen() == set() and await state(queue) == (0, 0, 0)


async def test_only_the_newest_trainer_undoes(queue, redis, run_id):
    await pushed(queue, 2)
    await queue.claim_lineage(0)
    await GroupQueue(redis, run_id).claim_lineage(0)
    with pytest.raises(Fenced):
        await queue.undo([])
    assert await state(queue) == (2, 0, 0)


async def test_a_group_left_out_is_remembered_and_no_dead_letter(queue, run_id):
    first, second = make_groups(2, size=1, run=run_id)
    assert await queue.leave_out(first.group_id, 5) and not await queue.leave_out(first.group_id, 5)
    assert not await queue.push(first) and await queue.push(second)
    assert not await queue.leave_out(second.group_id, 6)
    depth = await queue.depth()
    assert (depth.queued, depth.dead, depth.left_out) == (1, 0, 1) and await queue.left_out() == [5]
