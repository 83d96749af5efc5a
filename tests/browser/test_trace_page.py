"""The page of a trace, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from mara_deploy.commands import inspect, run
from mara_deploy.see.reader import read_trace
from mara_deploy.see.trace_page import trace_page
from tests import traces
from tests.export.conftest import agent, agent_file, bundle, checkpoint, reference, traced

__all__ = ["agent", "agent_file", "bundle", "checkpoint", "reference", "traced"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    answers = read_trace(traces.write(tmp_path / "t.jsonl", traces.aligned_and_plain()))
    (tmp_path / "page.html").write_text(trace_page(answers, "t.jsonl"), encoding="utf-8")
    return (tmp_path / "page.html").as_uri()


def tokens(driver, side: int = 0) -> list:
    return driver.find_elements(By.CSS_SELECTOR, ".side")[side].find_elements(By.CSS_SELECTOR, ".t")


def detail(driver) -> str:
    return driver.find_element(By.CSS_SELECTOR, ".detail").text


def test_keys_move_between_tokens_and_show_their_candidates(browser, url) -> None:
    driver = browser.open(url)
    assert [len(tokens(driver, side)) for side in (0, 1)] == [5, 2]
    tokens(driver)[0].click()
    assert "Token 1 of 5" in detail(driver)
    driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    shown = detail(driver)
    assert "Token 2 of 5" in shown
    assert "rank 3 was accepted" in shown
    for part in ("50.0 %", "30.0 %", "20.0 %", "−1.00", "3.00", "2.00"):  # probabilities, sums, margins of each agent
        assert part in shown
    driver.switch_to.active_element.send_keys(Keys.END)
    assert "Token 5 of 5" in detail(driver)
    driver.switch_to.active_element.send_keys(Keys.HOME)
    assert "Token 1 of 5" in detail(driver)
    assert browser.complaints() == []


def test_texts_are_shown_as_they_are(browser, url) -> None:
    driver = browser.open(url)
    assert tokens(driver)[2].text.strip() == "<script>alert(1)</script>"
    assert "Why <b>bold</b>?" in driver.find_element(By.CSS_SELECTOR, ".prompt").text
    labels = [each.get_attribute("aria-label") for each in tokens(driver)]
    assert ["changed" in label for label in labels] == [False, True, False, False, False]
    assert ["forced" in label for label in labels] == [False, False, True, False, False]
    assert ["drafted" in label for label in labels] == [False, False, False, True, False]
    assert "The answers part at token 2" in driver.find_element(By.CSS_SELECTOR, ".parting").text
    ranks = driver.find_element(By.CSS_SELECTOR, ".ranks").text
    assert [line for line in ranks.splitlines() if line.startswith(("rank", "all"))] == [
        "rank 1 2 50 %", "rank 3 1 25 %", "all rejected 1 25 %",
    ]  # fmt: skip


def test_a_filter_shows_some_kinds_and_keys_skip_the_others(browser, url) -> None:
    driver = browser.open(url)
    buttons = driver.find_elements(By.CSS_SELECTOR, ".legend button")
    forced = next(button for button in buttons if "forced" in button.text)
    forced.click()
    tokens(driver)[0].send_keys(Keys.ARROW_RIGHT)
    assert "Token 3 of 5" in detail(driver)
    assert [button.get_attribute("aria-pressed") for button in buttons].count("true") == 1
    assert forced.get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(browser, url, scheme) -> None:
    driver = browser.open(url, "phone", scheme)
    assert browser.width() <= 390
    tokens(driver)[1].click()
    assert browser.width() <= 390
    assert "Token 2 of 5" in detail(driver)
    if scheme == "dark":
        browser.picture("trace-phone")


def test_an_answer_of_the_demo(browser, bundle, tmp_path) -> None:
    """`SCREENSHOTS=docs/guide/pictures` makes the documentation's pictures."""
    path, out = tmp_path / "door.jsonl", tmp_path / "door.html"
    ask = ["--prompt", "How do I oil a squeaky door?", "--trace", str(path), "--beside-plain", "--threads", "1"]
    assert run.main([str(bundle("demo")), *ask]) == 0
    assert inspect.main([str(path), "--html", str(out)]) == 0
    driver = browser.open(out.as_uri())
    aligned, plain = (len(tokens(driver, side)) for side in (0, 1))
    changed = next(each for each in tokens(driver) if "changed" in each.get_attribute("aria-label"))
    changed.click()
    assert "was rejected" in detail(driver)
    browser.picture("trace")
    read = read_trace(path)
    assert [len(answer.tokens) for answer in read] == [aligned, plain]
    browser.open(out.as_uri(), "desktop", "dark")
    assert browser.complaints() == []


def test_ten_thousand_tokens_stay_usable(browser, tmp_path) -> None:
    lines = [
        traces.facts(),
        *(traces.token([f" w{i % 90}", " no", " or"], [1.0, None, None], 1) for i in range(10_000)),
    ]
    answers = read_trace(traces.write(tmp_path / "t.jsonl", lines))
    (tmp_path / "page.html").write_text(trace_page(answers, "t.jsonl"), encoding="utf-8")
    driver = browser.open((tmp_path / "page.html").as_uri())
    assert len(tokens(driver)) == 10_000
    tokens(driver)[0].click()
    driver.switch_to.active_element.send_keys(Keys.END)
    assert "Token 10000 of 10000" in detail(driver)
