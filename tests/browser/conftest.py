"""A real browser: Chromium with its driver, from the system's packages. Without one, these tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run", "--force-device-scale-factor=1",
)  # fmt: skip


class Browser:
    """A browser, and pictures of what it shows."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, size: str = "desktop", scheme: str = "light") -> Any:
        """Open a page at a size, in a colour scheme; returns the driver."""
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(url)
        return self.driver

    def width(self) -> int:
        """Of the whole page, in pixels."""
        return int(self.driver.execute_script("return document.documentElement.scrollWidth"))

    def complaints(self) -> list[str]:
        """What the page's scripts and its policy have reported."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def picture(self, name: str) -> None:
        """Save a picture for the documentation, where SCREENSHOTS names a folder."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Skips where there is no Chromium with its driver."""
    program, service = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or service is None:
        pytest.skip("no Chromium here: install the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in OPTIONS:
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=Service(service))
    yield Browser(driver)
    driver.quit()
