"""Samples: filtered, sorted, bounded, side by side; in the report, too."""

import asyncio
import json
import math

import numpy as np
from console.watched import HOSTILE, Page, console, events
from scored_groups import make_groups

from services.console import samples
from services.console.report import write
from services.contract import Score, Task
from services.queue import GroupQueue
from services.redis import connect


def test_samples_are_filtered_sorted_and_paged(run):
    groups = [
        group.model_copy(update={"task": Task(task_id="t", source=f"s{group.index % 3}", prompt=f"p{group.index}")})
        for group in make_groups(70, version=4)
    ]
    run.keep(groups)

    def mean(group):
        rewards = [score.reward for score in group.scores if score.reward is not None]
        return sum(rewards) / len(rewards) if rewards else None

    def listed(client, **query):
        page = Page(client.get("/console/samples", params=query).text)
        shown = " ".join(page.text.split())
        links = [
            found["href"] for tag, found in page.elements if (found.get("href") or "").startswith("/console/group")
        ]
        return shown, links

    order = [entry.decode() for entry, _ in run.redis.xrange(run.keys.samples)]
    by_entry = dict(zip(order, groups, strict=True))
    with console(run) as client:
        shown, links = listed(client)
        assert "70 of the 70 groups" in shown and "page 1 of 3" in shown
        assert [link.split("=")[1] for link in links] == order[::-1][: samples.PAGE]
        _, last = listed(client, page="3")
        assert len(last) == 70 - 2 * samples.PAGE
        for query, takes in {
            ("source", "s1"): lambda group: group.task.source == "s1",
            ("from", "0.5"): lambda group: mean(group) is not None and mean(group) >= 0.5,
            ("to", "0.3"): lambda group: mean(group) is not None and mean(group) <= 0.3,
            ("outcome", "timeout"): lambda group: any(
                part.outcome == "timeout" for score in group.scores for part in score.components.values()
            ),
            ("version", "4"): lambda group: True,
            ("version", "5"): lambda group: False,
        }.items():
            shown, _ = listed(client, **dict([query]))
            assert f"{sum(map(takes, groups))} of the 70 groups" in shown, query
        _, links = listed(client, sort="reward", source="s2")
        rewards = [mean(by_entry[link.split("=")[1]]) for link in links]
        known = [reward for reward in rewards if reward is not None]
        assert known == sorted(known, reverse=True) and rewards[: len(known)] == known
        for nonsense in ({"page": "x"}, {"page": "9" * 30}, {"sort": "?"}, {"from": "nan"}, {"entry": "\u0663"}):
            assert client.get("/console/samples", params=nonsense).status_code == 200
        for entry in ("", "1-1", "\u0663-1", "x", "9" * 30 + "-1", "- +"):
            assert client.get("/console/group", params={"entry": entry}).status_code == 404


def test_kept_groups_are_bounded_and_forgotten(run, redis_url):
    groups = make_groups(12)

    async def story():
        redis = connect(redis_url)
        queue, kept = GroupQueue(redis, run.name), samples.Samples(redis, run.name)
        for group in groups[:8]:
            await queue.keep(group, 5)
        first = await kept.page(samples.Choice(sort="oldest"))
        for group in groups[8:]:
            await queue.keep(group, 5)
        second = await kept.page(samples.Choice(sort="oldest"))
        newest = await kept.last(2)
        await redis.aclose()
        return first, second, newest

    first, second, newest = asyncio.run(story())
    assert [line.index for line in first.lines] == [3, 4, 5, 6, 7]
    assert [line.index for line in second.lines] == [7, 8, 9, 10, 11]
    assert [group.group_id for group in newest] == [group.group_id for group in groups[:-3:-1]]


def test_a_group_is_shown_side_by_side(run):
    (group,) = make_groups(1, seed=5)
    run.keep([group])
    run.redis.xadd(run.keys.samples, {"group": b"\xc1"})  # of another version, say
    entry = run.redis.xrange(run.keys.samples)[0][0].decode()
    with console(run) as client:
        page = Page(client.get("/console/group", params={"entry": entry}).text)
        shaded = client.get("/console/group", params={"entry": entry, "shade": "true"}).text
    text = " ".join(page.text.replace("\u2212", "-").split())
    squeezed = text.replace(" ", "")
    for completion, score in zip(group.completions, group.scores, strict=True):
        assert f"Endedby{completion.finish_reason}Tokens{len(completion.token_ids)}" in squeezed
        assert (f"{score.advantage:.3f}" if score.valid else "not valid") in text
        assert completion.text in text
    assert [tag for tag, _ in page.elements].count("article") == len(group.completions)
    assert "No reward server is known here" in shaded


def test_hostile_and_huge_text_stays_text(run):
    (group,) = make_groups(1)
    hostile = Score.failed("error", HOSTILE)
    named = {HOSTILE[:60]: hostile}
    scores = [score.model_copy(update={"components": named}) for score in group.scores]
    made = [one.model_copy(update={"text": HOSTILE + "x" * 10**6}) for one in group.completions]
    task = Task(task_id=HOSTILE, source=HOSTILE, prompt=HOSTILE + "y" * 10**6, reference={"answer": HOSTILE})
    update = {"completions": made, "scores": scores, "task": task, "spec_id": HOSTILE, "skipped": HOSTILE}
    run.keep([group.model_copy(update=update)])
    run.bury((3, HOSTILE + "z" * 10**6))
    run.status(orchestrator={"state": HOSTILE, "spec": HOSTILE, "guard": None})
    run.redis.hset(run.keys.verdicts, "v", json.dumps({"message": HOSTILE, "at": 1}))
    run.step(1, **{f"components.{HOSTILE}": 1.0})
    entry = run.redis.xrange(run.keys.samples)[0][0].decode()
    paths = ["/", "/console/samples", f"/console/group?entry={entry}", "/console/dead", "/console/control"]
    with console(run) as client:
        for path in paths:
            answer = client.get(path)
            page = Page(answer.text)
            assert answer.status_code == 200 and len(answer.content) < 400_000, path
            assert not [found for _, found in page.elements if "onerror" in found or found.get("src") == "x"], path
            scripts = [found for tag, found in page.elements if tag == "script"]
            assert all((found["src"] or "").startswith("/console/") for found in scripts), path
            assert "alert(1)" in page.text or path.endswith("control"), path
            policy = answer.headers["content-security-policy"]
            assert "unsafe" not in policy and "default-src 'none'" in policy and "http" not in policy
        name, state = next(events(client))
        assert not [tag for tag, _ in Page(state["html"]).elements if tag in ("script", "img")]


def test_the_report_is_one_file_that_asks_nobody(run, tmp_path):
    run_dir, other = tmp_path / "run", tmp_path / "other"
    for folder in (run_dir, other):
        folder.mkdir()
        rows = [run.step(step, entropy=math.sin(step), **{"components.<x>": 1.0}) for step in range(1, 6)]
        (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": {"name": run.name, "dir": str(run_dir)},
        "model": {"path": "unused"},
        "data": {"path": "x.jsonl", "fields": {"prompt": "p"}},
        "rewards": "length",
        "trainer": {"steps": 10, "groups_per_step": 1},
        "queue": {"url": run.url},
    }
    (run_dir / "recipe.yaml").write_text(json.dumps(recipe))
    (group,) = make_groups(1)
    run.keep([group.model_copy(update={"task": Task(task_id="t", prompt=HOSTILE)})])
    run.bury((3, HOSTILE))
    out = tmp_path / "out.html"
    asyncio.run(write(run_dir, out, [other]))
    text = out.read_text()
    page = Page(text)
    assert not [found for _, found in page.elements if found.get("src") or (found.get("href") or "#")[0] != "#"]
    assert "url(" not in text and "2 of 10" in " ".join(page.text.split()) and "answer 0" in page.text
    found = json.loads(text.split('id="found">')[1].split("</script>")[0])
    assert [one["name"] for one in found["runs"]] == [run.name, "other"]
    assert found["runs"][0]["curves"]["entropy"][0] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(found["runs"][1]["curves"]["entropy"][1], np.sin(np.arange(1, 6)))
    (policy,) = [found["content"] for _, found in page.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
