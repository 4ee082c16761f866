"""The reward server's page in a real headless Chromium: pointed at, typed into, gone through by keyboard, looked at."""

import httpx
import pytest
from browser import browsing, needs_browser
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from served import served

from reward_server.app import Settings, create
from services.access import HttpSettings
from services.pages.shading import number

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def url(tiny_model):
    with served(create(Settings(model=str(tiny_model), default_spec="intuitor"))) as url:
        yield url


def test_click_type_and_read(browser, url):
    browser.open(url)
    browser.type("#prompt", "2+2?")
    browser.type("#answer", "4")
    browser.type("#completion-0", "four\n4")
    browser.type("#completion-1", "5")
    browser.one("button[value=add]").click()
    assert browser.focus() == "completion-2"
    browser.one("#completion-2").send_keys("<b>4</b>")
    browser.one("button[value=remove-1]").click()
    assert [field.get_attribute("value") for field in browser.all("#completions textarea")] == ["four\n4", "<b>4</b>"]
    assert [label.text for label in browser.all("#completions label")] == ["Completion 1", "Completion 2"]
    Select(browser.one("#spec")).select_by_value("self_certainty")
    browser.send()
    assert browser.driver.title.startswith("2 completions scored")
    assert browser.one("#status").get_attribute("textContent") == "2 completions scored"
    assert browser.focus() == "outcome"

    items = [
        {"messages": [{"role": "user", "content": "2+2?"}], "completion": text} for text in ("four\n4", "<b>4</b>")
    ]
    body = {"items": items, "metrics": ["self_certainty", "token_entropy", "mean_logprob"], "per_token": True}
    first, second = httpx.post(f"{url}/v1/score", json=body, timeout=60).json()["results"]
    assert [token.text for token in browser.all("#tokens-2 .token")] == list("<b>4</b>")
    assert browser.all("#tokens-1 .token")[4].text.startswith("↵")
    assert number(first["scores"]["self_certainty"]) in browser.one("#results table").text
    for metric, selector in [("self_certainty", "Self-certainty"), ("token_entropy", "Entropy")]:
        beside, token = browser.all("#tokens-2 .token")[:2]
        tip = browser.tip(token, beside)
        assert tip.text.startswith("2: “b”") and f"{selector} {number(second['per_token'][metric][1])}" in tip.text

    certainties = first["per_token"]["self_certainty"] + second["per_token"]["self_certainty"]
    shades = {}
    for metric in ("self_certainty", "token_entropy", "mean_logprob"):
        browser.one(f"[name=shading][value={metric}]").click()
        shades[metric] = [token.value_of_css_property("background-color") for token in browser.all(".token")]
        assert len([legend for legend in browser.all(".legend") if legend.is_displayed()]) == 1
    assert len({tuple(found) for found in shades.values()}) == 3
    assert len(set(shades["self_certainty"])) > 3
    surest, least_sure = certainties.index(max(certainties)), certainties.index(min(certainties))
    assert shades["self_certainty"][surest] == "rgba(0, 0, 0, 0)"
    assert shades["self_certainty"][least_sure] == "rgba(217, 111, 30, 1)"
    browser.click(".commands summary")
    assert "/v1/rewards" in browser.one("#command-1").text
    assert browser.complaints() == []
    assert browser.hosts() == {url.removeprefix("http://")}
    browser.send()
    assert browser.one("[name=shading][value=mean_logprob]").is_selected()


def test_by_keyboard_alone(browser, url):
    browser.open(url)
    order = []
    while not order or (order[-1] != "Reward specs on this server" and len(order) < 40):
        browser.press(Keys.TAB)
        order.append(browser.focus())
    assert order == [
        "API", "chat", "prompt", "answer", "remove-0", "completion-0", "remove-1", "completion-1", "add", "spec",
        "What each is made of", "More", "score", "Reward specs on this server",
    ]  # fmt: skip
    browser.one("#completion-0").click()
    with browser.new_page():
        browser.press(Keys.CONTROL, Keys.ENTER)
    assert browser.focus() == "outcome"
    while "token" not in (browser.driver.switch_to.active_element.get_attribute("class") or ""):
        browser.press(Keys.TAB)
    first, second, last = browser.all("#tokens-1 .token")[0], browser.all("#tokens-1 .token")[1], None
    assert browser.driver.switch_to.active_element == first and browser.one("#tip").text.startswith("1: ")
    browser.press(Keys.ARROW_RIGHT)
    assert browser.driver.switch_to.active_element == second and browser.one("#tip").text.startswith("2: ")
    assert second.value_of_css_property("outline-style") == "solid"
    assert browser.one("#status").get_attribute("textContent") == second.get_attribute("data-tip")  # read out
    browser.press(Keys.END)
    last = browser.all("#tokens-1 .token")[-1]
    assert browser.driver.switch_to.active_element == last
    browser.press(Keys.ESCAPE)
    assert not browser.one("#tip").is_displayed()
    browser.press(Keys.TAB)  # one stop a completion, not one a token
    assert browser.focus() == "Values as a table"
    browser.press(Keys.ENTER)
    assert browser.one("#tokens-1 table").is_displayed()


def test_an_error_takes_the_focus_and_leads_to_its_field(browser, url):
    browser.open(url)
    browser.click(".more summary")
    browser.type("#temperature", "-1")
    with browser.new_page():
        browser.press(Keys.ENTER)
    assert browser.focus() == "outcome" and "(got '-1')" in browser.one(".problems").text
    browser.click(".problems a")
    assert browser.focus() == "temperature"
    browser.complaints()  # Chromium notes the status 422


def test_looks(browser, url):
    """On a phone and a desktop, light and dark: nothing sticks out, and nothing is asked of another host."""
    grounds = {}
    for width, dark in [(1280, False), (1280, True), (390, False), (390, True)]:
        browser.open(url, width=width, dark=dark)
        browser.run(
            "document.querySelectorAll('textarea:not(#task)').forEach(e => e.value = 'W'.repeat(300) + ' and more')"
        )
        assert browser.fits()
        browser.send()
        browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert browser.fits(), (width, dark)
        beside, token = browser.all(".token")[39:41]
        browser.run("arguments[0].scrollIntoView({block: 'center'})", token)
        tip = browser.tip(token, beside)
        assert tip.rect["x"] >= 0 and tip.rect["x"] + tip.rect["width"] <= width
        grounds[width, dark] = browser.one("body").value_of_css_property("background-color")
    assert grounds[1280, False] == grounds[390, False] != grounds[1280, True] == grounds[390, True]
    assert browser.complaints() == []
    assert browser.hosts() == {url.removeprefix("http://")}


def test_without_script(browser, url):
    browser.open(url, script=False)
    try:
        browser.type("#prompt", "2+2?")
        with browser.new_page():
            browser.one("button[value=add]").click()
        browser.type("#completion-2", "third")
        with browser.new_page():
            browser.one("#answer").send_keys(Keys.ENTER)
        assert [row.text for row in browser.all("#results tbody th a")] == ["1", "2", "3"]
        assert browser.all("#tokens-3 .token")[0].get_attribute("title").startswith("1: “t”")
        assert not [found for found in browser.all(".only-script") if found.is_displayed()]

        def shades():
            return [token.value_of_css_property("background-color") for token in browser.all("#results .token")]

        before = shades()
        browser.one("[name=shading][value=mean_logprob]").click()
        WebDriverWait(browser.driver, 10).until(lambda _: shades() != before)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_signing_in_and_out(browser):
    with served(create(Settings(http=HttpSettings(api_token="user-token")))) as url:
        browser.open(url)
        browser.type("#token", "wrong")
        browser.send("button.primary")
        assert "not the one this server knows" in browser.one("[role=alert]").text
        browser.type("#token", "user-token")
        browser.send("button.primary")
        Select(browser.one("#spec")).select_by_value("exact_match")
        browser.type("#completion-0", "105")
        browser.send()
        assert "+0.707" in browser.one("#results table").text
        assert browser.run("return document.cookie") == ""
        browser.send("[name=end]")
        assert browser.all("#token")
        browser.complaints()  # Chromium notes the status 401
