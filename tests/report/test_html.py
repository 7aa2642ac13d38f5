"""The page stands alone, escapes what it shows, and draws what it is given."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser

import pytest

from entropy_kernels.report import html, plots, reading
from entropy_kernels.stats import Estimate

from . import builder


class Page(HTMLParser):
    """Collects tags, attributes that make a browser fetch, ids, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(result) -> str:
    return html.render(result.report, result.tables)


@pytest.fixture
def without_pictures(monkeypatch):
    """For tests of tables and text: pictures take most of the time."""
    monkeypatch.setattr(html, "_plots", lambda *_: {})


@pytest.fixture(scope="module")
def text():
    return render(builder.result())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_fetched(text, page):
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "http" not in text and "//" not in text.replace("</", "")


def test_tokens_prompts_and_settings_are_escaped(text, without_pictures):
    result = builder.result()
    result.report["config"]["model"] = "<img src=x onerror=alert(1)>"
    result.report["definitions"]["entropy"] = "a < b & c"
    planted = render(result)
    assert "<script" not in text and "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert "<b>Answer" not in text and "&lt;b&gt;Answer" in text
    assert "<img" not in planted and "&lt;img src=x" in planted and "a &lt; b &amp; c" in planted
    assert "&amp;amp;" in text  # the token "&amp;" is shown as it is, not as "&"


def test_ids_are_unique_and_references_resolve(text, page):
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)


def test_pictures_take_the_colours_of_the_page(text):
    drawn = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawn) == 5
    for picture in drawn:
        assert not re.findall(r"#10000\d", picture)
        assert not any(colour in picture for colour in plots._VARIABLES)
    assert all(f"var(--{name})" in text and f"--{name}:" in text for name in plots._VARIABLES.values())


def test_headline(page):
    assert (
        "At the checkpoint's learning rate 5×10⁻⁵ entropy falls by 0.001114 ± 0.000056 nats per token."
        in page.text
    )
    assert "η* = 6.05×10⁻⁴ [5.2×10⁻⁴, 7.1×10⁻⁴]" in page.text


def test_every_change_and_check_is_listed(page):
    for change in builder.result().report["changes"]:
        assert html.leaf(change["eta"])[:3] in page.text
    for check in reading.checks(builder.result().report):
        assert check.name in page.text
    assert "warning" in page.text


def test_a_report_with_the_least_there_can_be():
    full = builder.result().report
    change = {
        "eta": 1e-5,
        "linear": full["changes"][0]["linear"],
        "true_direct": full["changes"][0]["true_direct"],
    }
    page = Page(html.render({"changes": [change]}, {}))
    assert page.tags.count("figure") == 2
    assert "At the largest learning rate measured, 10⁻⁵, entropy falls by" in page.text


def test_undefined_numbers_are_called_so():
    result = builder.result()
    report = copy.deepcopy(result.report)
    nan = Estimate(value=math.nan, stderr=math.nan, n=64, unit="nats/token", method="undefined")
    for change in report["changes"]:
        change |= {"true_direct": nan, "true_integrated": nan, "z_linear": math.nan}
    report["sanity"] = {"z_mean_weight": math.nan}
    page = Page(html.render(report, result.tables))
    assert "entropy was not measured." in page.text
    assert "undefined" in page.text and not re.search(r"\bnan\b", page.text)


def test_direct_values_below_the_floor_are_grey(without_pictures):
    result = builder.result()
    result.report["sanity"]["noise_floor"]["difference"] = builder.estimate(0.0, 1e-5)
    lost = sum(abs(change["true_direct"].value) < 1e-5 for change in result.report["changes"])
    assert 0 < lost < len(result.report["changes"])
    assert render(result).count('class="n faint"') == lost


def test_context_of_a_token_stays_in_its_sequence():
    result = builder.result()
    tokens = result.tables["tokens_e"]
    shares = reading.Shares(share=builder.np.array([0.5, 0.5]), row=builder.np.array([32, 31]))
    first, last = html._top_tokens(shares, tokens, builder.estimate(-1.0, 0.1))
    assert first.before == "" and first.after
    assert last.after == "" and last.before
