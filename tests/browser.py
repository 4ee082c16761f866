"""A real headless Chromium, and the few things that tests say to it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.common.exceptions import (  # noqa: E402
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
]  # fmt: skip


class Browser:
    """A driver, and the few things that tests say to it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url, width=1280, height=900, dark=False, script=True):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        self.driver.get(url)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def type(self, selector, text):
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def press(self, *keys):
        """To whatever has the focus; several are held together."""
        actions = webdriver.ActionChains(self.driver)
        for key in keys[:-1]:
            actions.key_down(key)
        actions.send_keys(keys[-1])
        for key in keys[:-1]:
            actions.key_up(key)
        actions.perform()

    def send(self, button="#score"):
        with self.new_page():
            self.click(button)

    def click(self, selector):
        """Again while the page moves, or the element is replaced."""

        def clicked(_):
            self.one(selector).click()
            return True

        moving = (ElementClickInterceptedException, ElementNotInteractableException, StaleElementReferenceException)
        WebDriverWait(self.driver, 30, ignored_exceptions=moving).until(clicked)

    @contextmanager
    def new_page(self):
        """Until the page that comes is there whole, its scripts done."""
        before = self.one("html")
        yield
        WebDriverWait(self.driver, 30).until(lambda _: self.one("html") != before)
        WebDriverWait(self.driver, 30).until(lambda _: self.run("return document.readyState") == "complete")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def tip(self, token, beside):
        """What a token says of itself under the pointer, which comes from `beside`: again while the page moves."""

        def point(driver):
            webdriver.ActionChains(driver).move_to_element(beside).move_to_element(token).perform()
            tip = self.one("#tip")
            return tip if tip.is_displayed() else None

        return WebDriverWait(self.driver, 30).until(point)

    def focus(self):
        return self.run("const e = document.activeElement; return e.id || e.value || e.textContent.trim()")

    def fits(self):
        return self.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def hosts(self):
        """Whom the pages asked since the last call."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.add(httpx.URL(message["params"]["request"]["url"]))
        return {asked.netloc.decode() for asked in found if asked.scheme in ("http", "https", "ws", "wss")}


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """`folder` is Chromium's own, for its profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # selenium would ask the internet for a driver
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
