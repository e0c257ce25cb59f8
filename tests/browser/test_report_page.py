"""report.html as a reader meets it: in a browser, from a file, with mouse and keyboard, wide and narrow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page

from stepalign_report.comparison import compare, read_runs
from stepalign_report.critic_quality.summary import write_summary
from stepalign_report.page import write_page
from support.labelled import quality_summary
from support.page_runs import write_run

OpenPage = Callable[..., Page]
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!--<script>"


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.locator("#data").text_content() or "")


def shown(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def readout(page: Page) -> dict[str, list[str]]:
    """What the reading of the current token says: values by name, for the left and the right context."""
    names = ("advantage", "teacher", "kl", "student")
    return {name: page.locator(f".readout [data-value={name}]").all_inner_texts() for name in names}


def rollout_in_view(page: Page) -> dict[str, Any]:
    chosen = page.locator("input[name=rollout]:checked").get_attribute("value")
    with_tokens = [run for run in data_of(page)["runs"] if run["tokens"]]
    run = with_tokens[int(page.locator("#token-run").input_value()) if len(with_tokens) > 1 else 0]
    (row,) = [row for row in run["tokens"] if row["rollout_id"] == chosen]
    return row


def colour(token: Locator) -> str:
    return token.evaluate("node => getComputedStyle(node).backgroundColor")


def side(page: Page, index: int) -> Locator:
    return page.locator(".side").nth(index)


def token(page: Page, of_side: int, index: int) -> Locator:
    return side(page, of_side).locator(f".token[data-index='{index}']")


def test_the_page_draws_curve_tables_and_training_charts(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    assert page.locator("h1").inner_text() == "demo"
    curve = page.locator("#curves svg.chart")
    assert curve.locator(".series .line").is_visible() and curve.locator(".band").is_visible()
    assert curve.locator(".series .marker").count() == len(data_of(page)["curves"][0]["steps"])
    assert curve.locator(".selected").count() == 1
    assert page.locator("#training svg.chart").count() >= 8
    assert page.locator("#result table.results tbody tr").count() == 3
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0


def test_the_curve_shows_each_measure_and_reads_its_values_out(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    curve = data_of(page)["curves"][0]
    before = page.locator("#curves .series .line").get_attribute("d")
    page.locator("#curves input[value=trace]").check(force=True)
    assert page.locator("#curves .series .line").get_attribute("d") != before
    page.locator("#curves .readable").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    value = curve["trace"][2]
    said = page.locator("#curves .reading").inner_text()
    assert f"Step {curve['steps'][2]}" in said
    assert f"{value['value']:.1f} ({value['low']:.1f}–{value['high']:.1f})" in said
    assert page.locator("#curves .guide").count() == 1
    page.locator("#curves svg.chart").hover(position={"x": 500, "y": 100})
    assert f"Step {curve['steps'][2]}" not in page.locator("#curves .reading").inner_text()


def test_another_rollout_and_another_snapshot_change_the_tokens(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    seen = set()
    for index in (0, 1, 2):
        page.locator(".rollout").nth(index).click()
        row = rollout_in_view(page)
        texts = side(page, 0).locator(".token").all_inner_texts()
        assert [text.strip() for text in texts[:-1]] == [text.strip() for text in row["tokens"][:-1]]
        seen.add("".join(texts))
    assert len(seen) == 3
    page.locator("#token-step").select_option("100")
    assert rollout_in_view(page)["step"] == 100
    assert "".join(side(page, 0).locator(".token").all_inner_texts()) not in seen


def test_each_step_begins_a_line(single: Path, open_page: OpenPage) -> None:
    lines = side(open_page(single), 0).locator(".token-line")
    starts = [line.split()[0] for line in lines.all_inner_texts()]
    assert starts == [f"<step_{number}>" for number in range(1, len(starts))] + ["<answer>"]


def test_two_contexts_stand_side_by_side_in_different_colours(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    row = rollout_in_view(page)
    critique, reference = (row["contexts"][kind]["advantage"] for kind in ("critique", "reference"))
    prefix = range(row["first_error_token"])
    disturbed = min(prefix, key=lambda index: reference[index])
    assert reference[disturbed] < -1 < critique[disturbed]
    assert colour(token(page, 0, disturbed)) != colour(token(page, 1, disturbed))
    boxes = [side(page, index).bounding_box() for index in (0, 1)]
    assert boxes[0] and boxes[1] and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    page.locator("select.context").nth(1).select_option("critique")
    assert colour(token(page, 0, disturbed)) == colour(token(page, 1, disturbed))


def test_the_first_error_and_the_tokens_out_of_scope_are_marked(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    row = rollout_in_view(page)
    error = row["first_error_token"]
    marked = side(page, 0).locator(".token.first-error")
    assert marked.count() == 1 and marked.get_attribute("data-index") == str(error)
    assert "first error" in (marked.get_attribute("aria-label") or "")
    assert side(page, 0).locator(".flag").inner_text().startswith("first error")
    assert side(page, 0).locator(".token.outside").count() == len(row["tokens"]) - row["in_scope"]
    assert side(page, 0).locator("svg .ruler text").text_content() == "first error"
    assert colour(marked) != colour(token(page, 0, 0))


@pytest.mark.parametrize("index", [0, 7])
def test_hovering_a_token_shows_its_values(single: Path, open_page: OpenPage, index: int) -> None:
    page = open_page(single)
    row = rollout_in_view(page)
    token(page, 1, index).hover()
    contexts = [row["contexts"][kind] for kind in ("critique", "reference")]
    assert readout(page) == {
        "advantage": [shown(context["advantage"][index]) for context in contexts],
        "teacher": [shown(row["logprob"][index] + context["advantage"][index]) for context in contexts],
        "kl": [shown(context["kl"][index]) for context in contexts],
        "student": [shown(row["logprob"][index])],
    }
    assert page.locator(".readout .current").inner_text() == row["tokens"][index].strip()


def test_arrow_keys_move_between_tokens_and_lines(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    token(page, 0, 0).focus()

    def focused() -> str | None:
        return page.evaluate("document.activeElement.dataset.index")

    page.keyboard.press("ArrowRight")
    assert focused() == "1"
    page.keyboard.press("ArrowDown")
    assert focused() == "8"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert focused() == "0"
    page.keyboard.press("End")
    assert focused() == str(len(rollout_in_view(page)["tokens"]) - 1)
    assert page.locator(".readout .current").inner_text() == "⟨end⟩"
    assert page.locator(".side .token.active").count() == 2
    assert side(page, 0).locator(".token[tabindex='0']").count() == 1


def test_the_theme_follows_the_system_and_the_button(single: Path, open_page: OpenPage) -> None:
    def background(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = open_page(single), open_page(single, dark=True)
    assert background(light) != background(dark)
    # By what it does, and so without a state that would contradict its name.
    light.get_by_role("button", name="Use dark theme", exact=True).focus()
    light.keyboard.press("Enter")
    assert background(light) == background(dark)
    assert light.get_by_role("button", name="Use light theme", exact=True).is_visible()
    assert light.locator("#theme[aria-pressed]").count() == 0
    dark.get_by_role("button", name="Use light theme", exact=True).click()
    assert background(dark) != background(light)


def test_the_theme_button_follows_a_system_that_turns_dark(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    assert page.get_by_role("button", name="Use dark theme", exact=True).is_visible()
    page.emulate_media(color_scheme="dark")
    page.get_by_role("button", name="Use light theme", exact=True).wait_for()


def test_a_table_wider_than_a_phone_shows_where_it_goes_on(several: Path, open_page: OpenPage) -> None:
    page = open_page(several, width=360)
    region = page.get_by_role("region", name="Paired differences")
    frame = region.locator("xpath=..")

    def shown() -> list[str]:
        return [
            edge
            for edge in ("before", "after")
            if frame.evaluate(f"n => getComputedStyle(n, '::{edge}').opacity") == "1"
        ]

    assert frame.get_by_text("scroll it sideways").is_visible()
    assert shown() == ["after"]
    region.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("node => node.scrollLeft > 1", arg=region.element_handle())
    page.wait_for_function("node => node.classList.contains('more-left')", arg=frame.element_handle())
    assert shown()[0] == "before"
    region.evaluate("node => { node.scrollLeft = node.scrollWidth; }")
    page.wait_for_function("node => !node.classList.contains('more-right')", arg=frame.element_handle())
    assert shown() == ["before"]


def test_a_table_that_fits_says_nothing_of_scrolling(several: Path, open_page: OpenPage) -> None:
    page = open_page(several)
    region = page.get_by_role("region", name="Paired differences")
    assert region.get_attribute("tabindex") is None
    assert page.locator(".scroll-hint:visible").count() == 0
    assert page.locator(".more-left, .more-right").count() == 0


def test_seeds_do_not_read_as_their_number(tmp_path: Path, several: Path, open_page: OpenPage) -> None:
    folders = [write_run(tmp_path / arm, arm, 4, steps=10, tokens=False) for arm in ("stepalign", "refsol")]
    comparison = compare(read_runs(folders), resamples=50).as_json()
    one = open_page(write_page(tmp_path / "report.html", folders, comparison))
    assert one.locator("table.differences tbody td").last.inner_text() == "seed 4"
    assert one.locator("table.differences thead th").last.inner_text() == "Compared on"
    assert one.locator(".lead").inner_text() == "2 arms, seed 4."
    cells = open_page(several).locator("table.differences").first.locator("tbody td:last-child").all_inner_texts()
    assert set(cells) == {"seeds 0, 1"}


def test_every_section_is_in_the_navigation_of_a_phone(single: Path, open_page: OpenPage) -> None:
    page = open_page(single, width=360)
    nav = page.locator("nav")
    assert nav.evaluate("node => node.scrollWidth - node.clientWidth") == 0
    assert all(link.is_visible() for link in nav.locator("a").all())


def test_no_text_of_a_model_shows_the_page_in_another_order(tmp_path: Path, open_page: OpenPage) -> None:
    folder = write_run(tmp_path / "run", name="run")
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    for row in rows:
        row["tokens"][1] = " a\u202eb"
        row["tokens"][2] = " \u05d0"
        row["problem"] |= {"question": "q\u2067r", "answer": "\u05d0 1"}
        for context in row["contexts"].values():
            context["text"] = "c\x1b\u200fd"
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page(write_page(tmp_path / "report.html", [folder]))
    assert token(page, 0, 1).inner_text() == "a⟨U+202E⟩b"
    assert page.locator(".rollout .question").first.inner_text() == "q⟨U+2067⟩r"
    assert side(page, 0).locator("pre").text_content() == "c⟨U+001B⟩⟨U+200F⟩d"
    # A Hebrew token turns nothing around that stands beside it.
    left, right = (token(page, 0, index).bounding_box() for index in (2, 3))
    assert left and right and left["x"] < right["x"]
    assert token(page, 0, 2).evaluate("node => getComputedStyle(node).unicodeBidi") == "isolate"


@pytest.mark.parametrize("which", ["single", "several"])
def test_a_narrow_page_does_not_scroll_sideways(
    which: str, open_page: OpenPage, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(which), width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path, open_page: OpenPage) -> None:
    folder = write_run(tmp_path / "run", name=HOSTILE)
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    for row in rows:
        row["tokens"][1] = f" {HOSTILE}"
        row["problem"] |= {"question": HOSTILE, "answer": HOSTILE, "reference_solution": HOSTILE}
        for context in row["contexts"].values():
            context["text"] = HOSTILE
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page(write_page(tmp_path / "report.html", [folder]))
    assert page.locator("h1").inner_text() == HOSTILE
    assert token(page, 0, 1).inner_text() == HOSTILE
    assert page.locator(".rollout .question").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.title() == f"stepalign · {HOSTILE}"
    assert page.locator("body > script").count() == 2


def test_a_page_of_several_runs_lists_every_arm(several: Path, open_page: OpenPage) -> None:
    page = open_page(several)
    arms = ("stepalign_scoped", "refsol", "grpo")
    for place in ("#summary table", "#result table.results:not(.differences)", "#curves .reading", "#training .legend"):
        text = page.locator(place).inner_text()
        assert all(arm in text for arm in arms), place
    assert page.locator("#curves svg .end-label").all_text_contents() == list(arms)
    assert page.locator("#result table.results tr.row-seed").count() == 6
    (first, *_) = compare(read_runs(sorted(path.parent for path in several.parent.glob("*/report.json")))).pairs
    interval = first.differences["avg"].interval
    assert interval is not None
    shown = page.locator("table.differences").first.inner_text()
    assert f"{first.a} − {first.b}" in shown and f"+{interval.difference:.1f}" in shown
    assert "grad norm" in page.locator(".alarms").inner_text()
    assert "2 of these 6 runs have no token data" in page.locator("#tokens .notice").inner_text()
    page.locator("#token-run").select_option(label="grpo-1 (grpo, seed 1)")
    assert rollout_in_view(page)["in_scope"] == side(page, 0).locator(".token").count()


def test_everything_is_reached_by_the_keyboard(single: Path, open_page: OpenPage) -> None:
    page = open_page(single)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name = "document.activeElement.id || document.activeElement.className || document.activeElement.name"
        reached.add(page.evaluate(name))
    wanted = {"skip", "theme", "measure", "readable", "token-step", "token-clip", "rollout", "context"}
    assert wanted <= reached and any("token" in str(name) and "active" in str(name) for name in reached)


def test_a_critic_against_peoples_labels_has_a_page_of_its_own(critics: Path, open_page: OpenPage) -> None:
    page = open_page(critics)
    assert page.locator("nav a").all_inner_texts() == ["Critic"]
    assert page.locator("main > section").count() == 1 and page.locator("h1").inner_text() == "labelled.jsonl"
    found = data_of(page)["quality"]
    figures = page.get_by_role("region", name="Against people's labels", exact=True)
    for each, column in zip(found["critics"], (0, 1), strict=True):
        shown = figures.locator("tbody tr").first.locator("td").nth(column).locator(".value").inner_text()
        assert shown == f"{each['figures']['f1']['value']:.1f}"
    assert page.locator("#quality svg.chart .series .marker").count() == sum(
        bin["steps"] > 0 for bin in found["critics"][0]["figures"]["calibration"]["bins"]
    )
    difference = page.get_by_role("region", name="A beside B").locator("tbody tr").first
    assert difference.locator("[aria-label='apart from equal']").count() == 1
    assert f"+{found['comparison']['f1_difference']['value']:.1f}" in difference.inner_text()
    assert "wrote <b>this</b>" in page.get_by_role("region", name="A: by the solution's author").inner_text()


def test_the_page_of_a_run_shows_the_critic_that_was_measured_in_its_folder(
    tmp_path: Path, single: Path, open_page: OpenPage
) -> None:
    assert "Critic" not in open_page(single).locator("nav a").all_inner_texts()
    folder = write_run(tmp_path / "run", name="run")
    write_summary(folder / "critic_quality.json", quality_summary())
    page = open_page(write_page(folder / "report.html", [folder]))
    assert page.locator("h1").inner_text() == "run"
    assert page.get_by_role("region", name="Against people's labels", exact=True).is_visible()
    assert page.locator("nav a").count() == 6


def test_the_page_of_a_critic_fits_on_a_phone(critics: Path, open_page: OpenPage) -> None:
    page = open_page(critics, width=400)
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize(
    ("which", "width", "dark"),
    [
        ("single", 1280, False),
        ("single", 1280, True),
        ("several", 1280, False),
        ("single", 400, False),
        ("critics", 1280, False),
    ],
)
def test_screenshots(
    which: str, width: int, dark: bool, open_page: OpenPage, screenshots: Path, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(which), width=width, dark=dark)
    name = f"{which}-{width}-{'dark' if dark else 'light'}"
    page.screenshot(path=screenshots / f"{name}.png", full_page=True)
    part = "quality" if which == "critics" else "tokens"
    page.locator(f"#{part}").screenshot(path=screenshots / f"{name}-{part}.png")
    assert (screenshots / f"{name}-{part}.png").stat().st_size > 10_000
