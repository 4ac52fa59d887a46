"""One headless Chromium for all tests that look at pages: two at once would share an event loop, which Playwright refuses."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

MISSING = "the browser tests need Debian's chromium and the browser extra: apt-get install -y chromium, then make test-browser"
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Start the browser; without one the tests fail and say how to get it."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.fail(MISSING)
    path = shutil.which("chromium")
    if not path:
        pytest.fail(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()
