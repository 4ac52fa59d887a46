"""What the browser tests do to pages: open, fill in, keep a screenshot."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
SCREENSHOTS = ROOT / "screenshots"
LIKE_A_USER_WHO_WAS_HERE_BEFORE = """
localStorage.setItem('color-scheme', '"light"');
localStorage.setItem('prefect-show-promotional-content', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
PATIENCE_SECONDS = 2400  # for two short runs on a machine that does other things too
PAGE_MILLISECONDS = 180_000  # likewise for what a page shows
LAMBDAS = (0.7, 0.3)  # of the run that the form starts, and of the one it is compared with

Keep = Callable[[str], None]


def open_page(chromium: Any) -> Any:
    """Return a wide, light page whose first-visit dialogues are closed."""
    context = chromium.new_context(color_scheme="light", viewport={"width": 1600, "height": 1000})
    context.add_init_script(LIKE_A_USER_WHO_WAS_HERE_BEFORE)
    context.set_default_timeout(PAGE_MILLISECONDS)
    return context.new_page()


@contextmanager
def show_file(chromium: Any, path: Path, *, scheme: str, width: int) -> Iterator[Any]:
    """Give a page of one file with every chart drawn; in the end it must have said and fetched nothing, and fit the screen."""
    said: list[str] = []
    asked: list[str] = []
    context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 1000})
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('.chart')].every((c) => c.querySelector('svg.main-svg'))")
    yield page
    wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    context.close()
    assert said == [] and asked == [path.as_uri()]
    assert not wide


def list_charts(page: Any) -> set[str]:
    """Return the names of the charts of a page."""
    return set(page.locator(".chart").evaluate_all("nodes => nodes.map((node) => node.dataset.chart)"))


def save(page: Any, name: str) -> None:
    """Keep what the page shows, once it has come to rest."""
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def find_field(page: Any, title: str) -> Any:
    """Return the part of Prefect's form that holds the field of a title, its label, description and input."""
    label = f"[normalize-space()='{title}' or normalize-space()='{title} (Optional)']"
    return page.locator(
        f"xpath=//span[contains(@class, 'schema-form-property__label')]{label}"
        "/ancestor::div[contains(concat(' ', @class, ' '), ' schema-form-property ')][1]"
    )


def open_form(page: Any, stack: Settings, deployment: str) -> None:
    """Open the form of a deployment as a user does: its page, Run, Custom run."""
    page.goto(f"{stack.prefect_ui_url}/deployments/deployment/{deployment}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    find_field(page, "Checkpoint cadence").locator("input").wait_for()  # the last one


def press(page: Any, button: Any, path: str) -> Any:
    """Press a button and return the JSON with which the server answers the request to `path` that it sends.

    Prefect on SQLite now and then answers 503, "database is locked": a user is told so and presses again.
    """
    for _ in range(5):
        with page.expect_response(lambda answer: path in answer.url) as answered:
            button.click()
        if answered.value.status != 503:
            break
        page.wait_for_timeout(3000)
    assert answered.value.ok, f"{answered.value.status} {answered.value.url}: {answered.value.text()[:2000]}"
    return answered.value.json() if answered.value.status != 204 else None
