"""The page in a real browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

SCREENSHOT = Path(os.environ.get("EMBEDLIB_ARTIFACTS", "artifacts")) / "test-page.png"


@pytest.fixture
def browser_page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 1300})
    yield page
    page.close()


def test_sentences_become_a_heat_map_of_each_model(browser_page: Page, served_url: str) -> None:
    problems: list[str] = []
    browser_page.on("pageerror", lambda error: problems.append(str(error)))
    browser_page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    browser_page.goto(served_url)
    browser_page.get_by_label("Sentences, one a line").fill("the cat is small\ndie Katze ist klein\nالبيت هنا")
    browser_page.get_by_label("They are").select_option("query")
    browser_page.get_by_role("button", name="Compare").click()
    expect(browser_page.get_by_role("status")).to_have_text("3 sentences, 2 models.")
    for model in ("full", "compressed"):
        card = browser_page.locator(f"article[data-model={model}]")
        expect(card.locator("td")).to_have_count(9)
        expect(card.locator("td").first).to_have_text("1.00")
        expect(card.locator("li")).to_have_count(3)
        expect(card).to_contain_text("ms at the model")
    expect(browser_page.locator("#code")).to_contain_text(f'base_url="{served_url}/v1"')
    browser_page.get_by_role("tab", name="curl").click()
    expect(browser_page.locator("#code")).to_contain_text(f"curl {served_url}/v1/embeddings")
    SCREENSHOT.parent.mkdir(exist_ok=True)
    browser_page.screenshot(path=SCREENSHOT, full_page=True)
    assert not problems


def test_what_is_wrong_is_said_in_words(browser_page: Page, served_url: str) -> None:
    browser_page.goto(served_url)
    browser_page.get_by_label("Sentences, one a line").fill("")
    browser_page.get_by_role("button", name="Compare").click()
    expect(browser_page.get_by_role("status")).to_have_text("Type at least one sentence.")
    browser_page.get_by_label("Sentences, one a line").fill("x" * 3000)
    browser_page.get_by_role("button", name="Compare").click()
    expect(browser_page.get_by_role("status")).to_contain_text("3000 characters; expected at most 2000")
