"""The console of a real run (`rlif up` on a tiny model) in a real headless Chromium: looked at, and obeyed."""

import asyncio
import re
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from browser import browsing, needs_browser
from faults.faulty_run import Run, write_recipe
from selenium.webdriver.support.ui import WebDriverWait

from services import codec
from services.console.report import write
from services.contract import ScoredGroup
from services.keys import Keys
from services.redis import connect_sync

pytestmark = [pytest.mark.slow, needs_browser, pytest.mark.timeout(400)]

AXE = (Path(__file__).parent.parent / "vendor" / "axe-core" / "axe.min.js").read_text()
ADMIN = "admin-of-the-test"
SECONDS = 60.0
SERIOUS = "return axe.run().then(found => found.violations.filter(one => ['serious', 'critical'].includes(one.impact)))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("chromium")) as found:
        found.driver.set_script_timeout(60)
        yield found


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("console")
    path = write_recipe(folder, tiny_model, "run", steps=100_000)
    tree = yaml.safe_load(path.read_text())
    tree["run"] |= {"name": "watched", "deterministic": False}
    path.write_text(yaml.safe_dump(tree))
    beside = folder / "earlier"
    beside.mkdir()
    (beside / "steps.jsonl").write_text('{"step": 1, "start": 0, "lineage": 0, "reward_mean": 3.0}\n')
    made = Run(path, folder / "run", env={"RLIF_ADMIN_TOKEN": ADMIN})
    try:
        made.wait_step(3)
        made.url = re.search(r"console (http://127\.0\.0\.1:\d+)/", made.log.read_text())[1]
        yield made
    finally:
        made.close()


def until(browser, told, what):
    WebDriverWait(browser.driver, SECONDS, 0.1).until(lambda _: told(), what)


def tile(browser, name):
    """At one moment: the panel is replaced while it is looked at."""
    script = "return [...document.querySelectorAll('#state .tiles > div')].map(e => e.innerText.split('\\n'))"
    return {lines[0]: lines[1] for lines in browser.run(script)}[name]


def is_sound(browser):
    """axe-core finds no serious fault, nothing sticks out, and nothing was complained about."""
    browser.run(AXE)
    found = browser.driver.execute_script(SERIOUS)
    assert not found, [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in found]
    assert browser.fits()
    assert browser.complaints() == []


@contextmanager
def token(browser, value):
    browser.type("#admin-token", value)
    yield
    browser.run("sessionStorage.clear()")


def test_curves_move_and_other_runs_are_laid_over(browser, run):
    browser.open(run.url)
    until(browser, lambda: browser.all("#charts figure canvas"), "charts")
    fields = [found.get_attribute("data-field") for found in browser.all("#charts figure")]
    assert fields[0] == "reward_mean" and {"components.self_certainty", "accuracy.exact_match", "entropy"} <= set(
        fields
    )
    assert {"completion_length", "clip_fraction"} <= set(fields)
    first = browser.one("[data-field=entropy] .plot").get_attribute("aria-label")
    step = int(tile(browser, "Step").split()[0])
    until(browser, lambda: int(tile(browser, "Step").split()[0]) > step, "the step rises by itself")
    label = lambda: browser.one("[data-field=entropy] .plot").get_attribute("aria-label")  # noqa: E731
    until(browser, lambda: label() != first, "curves move")
    names = browser.run("return [...document.querySelectorAll('#state tbody th')].map(e => e.innerText.split(' ')[0])")
    assert set(names) == {"reward", "rollout"}
    browser.click(".over summary")
    browser.click("[name=over][value=earlier]")
    runs = "return [...document.querySelectorAll('#legend li')].map(e => e.innerText)"
    until(browser, lambda: browser.run(runs) == ["watched", "earlier"], "both runs")
    assert browser.hosts() == {run.url.removeprefix("http://")}
    is_sound(browser)


def test_a_sample_opens_and_its_tokens_are_shaded(browser, run):
    browser.open(run.url + "/console/samples?sort=reward")
    is_sound(browser)
    with browser.new_page():
        browser.click("table a")
    assert len(browser.all("article")) == 4
    with browser.new_page():
        browser.click(".shading a")
    shades = {found.value_of_css_property("background-color") for found in browser.all(".token")}
    assert len(browser.all(".token")) > 8 and len(shades) > 2
    is_sound(browser)
    browser.open(browser.driver.current_url, width=390, dark=True)
    is_sound(browser)
    browser.click(".token")
    tip = "document.querySelector('.token').focus(); return !document.getElementById('tip').hidden"
    until(browser, lambda: browser.run(tip), "the token tells its values")
    is_sound(browser)


def test_a_wrong_token_is_refused(browser, run):
    browser.open(run.url + "/console/control")
    is_sound(browser)
    for wrong in ("", "wrong"):
        with token(browser, wrong):
            browser.one("[data-post='/v1/run/pause']").click()
            until(browser, lambda: "oken" in browser.one("#outcome").text, "it is refused")
        assert browser.one("#outcome").get_attribute("class") == "said fault"
    assert "wrong" not in browser.driver.current_url
    browser.complaints()  # Chromium notes the statuses


def test_pause_stops_admission(browser, run):
    browser.open(run.url + "/console/control")
    browser.type("#admin-token", ADMIN)
    browser.one("[data-post='/v1/run/pause']").click()
    until(browser, lambda: browser.one("#outcome").text.startswith("Paused"), "it is paused")

    def status():
        return httpx.get(run.url + "/v1/status").json()

    until(browser, lambda: status()["state"] == "paused" and status()["groups_in_flight"] == 0, "all is finished")

    def counts():
        return status()["groups_pushed"], run.last_step()

    def is_still():
        """Nothing was made or trained for a while: a step under way may take its time."""
        before = counts()
        time.sleep(2)
        return counts() == before

    until(browser, is_still, "what was made is trained, and nothing more")
    _, step = counts()
    values_are_those_of_the_api(run)
    browser.open(run.url)
    assert "Paused" in browser.one(".headline").text
    browser.open(run.url + "/console/control")
    assert browser.one("#admin-token").get_attribute("value") == ADMIN  # of this tab
    browser.one("[data-post='/v1/run/resume']").click()
    until(browser, lambda: browser.one("#outcome").text == "Resumed", "it goes on")
    run.wait_step(step + 2)


def values_are_those_of_the_api(run):
    """While the weights stay as they are."""
    entry = re.search(r"entry=([0-9-]+)", httpx.get(run.url + "/console/samples").text)[1]
    page = httpx.get(run.url + "/console/group", params={"entry": entry, "shade": "true"}, timeout=60).text
    recipe = yaml.safe_load((run.dir / "recipe.yaml").read_text())
    with connect_sync(recipe["queue"]["url"]) as redis:
        (_, fields), *_ = redis.xrange(Keys("watched").samples, entry, entry)
    group = codec.unpack_as(ScoredGroup, fields[b"group"])
    items = [
        {"prompt_token_ids": group.prompt_token_ids, "completion_token_ids": made.token_ids}
        for made in group.completions
    ]
    body = {"items": items, "metrics": ["self_certainty"], "per_token": True}
    answer = httpx.post(recipe["scorer"]["urls"][0] + "/v1/score", json=body, timeout=60).json()
    values = [f"{value:.3f}" for one in answer["results"] for value in one["per_token"].get("self_certainty", [])]
    assert re.findall(r"Self-certainty ([\d.]+)\n", page) == values and len(values) > 4


def test_a_spec_is_previewed_and_then_applied(browser, run):
    browser.open(run.url + "/console/control")
    browser.type("#admin-token", ADMIN)
    before = browser.one("#spec").get_attribute("value")
    assert '"self_certainty"' in before
    assert not browser.one("#apply").is_enabled()
    browser.type("#spec", '{"rewards": [{"name": "nobody"}]}')
    browser.one("#preview").click()
    until(browser, lambda: "nobody" in browser.one("#spec-fault").text, "the field is named")
    browser.complaints()
    browser.type("#spec", '{"rewards": [{"name": "self_certainty", "weight": -1.0}, {"name": "exact_match"}]}')
    browser.one("#preview").click()
    until(browser, lambda: browser.all("#previewed .tiles"), "the preview")
    text = browser.one("#previewed").text
    assert re.search(r"\u22121\.00\s+correlation", text) and re.search(r"last \d+ groups", text)
    is_sound(browser)
    browser.one("#spec").send_keys(" ")
    assert not browser.one("#apply").is_enabled()  # only what was previewed is applied
    browser.one("#preview").click()
    until(browser, lambda: browser.one("#apply").is_enabled(), "the preview")
    browser.one("#apply").click()
    until(browser, lambda: "The next groups are scored by version 2" in browser.one("#outcome").text, "applied")
    spec_id = re.search(r"\(([0-9a-f]{16})\)", browser.one("#outcome").text)[1]

    def newest():
        browser.open(run.url + "/console/samples")
        with browser.new_page():
            browser.click("table a")
        return browser.one("code").text

    until(browser, lambda: newest() == spec_id, "groups are scored by it")


@pytest.mark.parametrize("path", ["/", "/console/samples", "/console/control", "/console/dead"])
def test_looks(browser, run, path):
    grounds = {}
    for width, dark in [(1280, True), (390, False), (390, True)]:
        browser.open(run.url + path, width=width, dark=dark)
        is_sound(browser)
        grounds[width, dark] = browser.one("body").value_of_css_property("background-color")
    assert grounds[1280, True] == grounds[390, True] != grounds[390, False]


def test_stop_ends_the_run_with_a_checkpoint_and_a_report_can_be_mailed(browser, run, tmp_path):
    browser.open(run.url + "/console/control")
    browser.type("#admin-token", ADMIN)
    browser.run("window.confirm = () => true")
    browser.one("[data-post='/v1/run/stop']").click()
    until(browser, lambda: "the trainer was last heard of" in browser.one("#outcome").text, "what is known is said")
    assert run.finish(SECONDS) == 1, run.screen()
    assert "stopped from the console" in run.log.read_text()
    last = run.last_step()
    assert (run.dir / "checkpoints").is_dir() and any(
        path.name.endswith(f"-{last}") for path in (run.dir / "checkpoints").iterdir()
    )
    asyncio.run(write(run.dir, tmp_path / "report.html"))  # the run's private redis is started for it
    for width, dark in [(1280, False), (390, True)]:
        browser.open((tmp_path / "report.html").as_uri(), width=width, dark=dark)
        until(browser, lambda: browser.all("#charts figure canvas"), "charts")
        assert "Stopped, with a checkpoint" in browser.one(".headline").text
        browser.click(".sample summary")
        is_sound(browser)
    browser.hosts()
    browser.driver.refresh()
    assert browser.hosts() == set()
