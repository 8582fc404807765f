"""The report is one safe file: model text stays text, every metric has a chart, missing pieces are fine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_intuitor.observability import write_report
from megatron_intuitor.observability.charts import running_mean
from megatron_intuitor.observability.curves import sections
from megatron_intuitor.observability.record import load_run
from megatron_intuitor.observability.text import visible
from tests.unit.observability.fake_run import HOSTILE

VOID = {"meta", "br", "img", "input", "link", "hr"}
VECTOR = {"path", "rect", "use", "circle", "line"}


class Page(HTMLParser):
    """Tags, texts by class, charts and scripts of a page; checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.figures: list[dict] = []
        self._stack: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._stack, f"unclosed: {self._stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(values["id"])
        if tag == "figure":
            self.figures.append({"hover": json.loads(values["data-hover"]), "paths": 0, "text": ""})
        if tag == "path" and self.figures:
            self.figures[-1]["paths"] += 1
        if tag not in VOID:
            self._stack.append((tag, values.get("class") or values.get("id") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._stack, f"</{tag}> closes nothing"
        assert self._stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self._stack:
            return
        tag, name = self._stack[-1]
        self.texts.setdefault(name or tag, []).append(data)
        if any(open_tag == "figcaption" for open_tag, _ in self._stack):
            self.figures[-1]["text"] += data


def parse(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def report(run_folder: Path) -> tuple[str, Page]:
    return parse(run_folder)


def test_report_shows_the_whole_run(report: tuple[str, Page]) -> None:
    _, page = report
    titles = [figure["text"] for figure in page.figures]
    for wanted in ("Accuracy, held out", "Reward: self certainty", "Reward: accuracy", "Self-certainty", "Entropy",
                   "Divergence", "Response length", "Loss", "Gradient norm", "Flat groups", "Importance weight",
                   "Trainer against engine",
                   "Seconds per step by phase", "time/update/forward_s", "surprise/<b>unknown</b>"):  # fmt: skip
        assert sum(wanted in title for title in titles) >= 1, wanted
    assert all(figure["paths"] >= 2 for figure in page.figures)
    assert page.tags.count("svg") == page.tags.count("figure") == len(titles)
    assert "finished" in page.texts["state done"]
    assert page.texts["value"][:3] == ["98.0%", "85.0%", "96.0%"]
    assert "model" in page.texts["summary"]
    assert any("samples_per_prompt: 8" in part for part in page.texts["pre"])


def test_hover_data_are_the_logged_values(report: tuple[str, Page]) -> None:
    _, page = report
    accuracy = next(figure["hover"] for figure in page.figures if "Accuracy, held out" in figure["text"])
    assert accuracy["steps"] == [0, 5, 10]
    assert accuracy["shown"][0] == ["68.0%", "83.0%", "98.0%"]
    gradient = next(figure for figure in page.figures if "Gradient norm" in figure["text"])
    assert gradient["hover"]["shown"][0][2] == "n/a"
    assert page.texts["flag"] == ["1 not finite"]


def test_every_metric_is_drawn(run_folder: Path) -> None:
    run = load_run(run_folder)
    drawn = [tuple(s.values) for section in sections(run) for chart in section.charts for s in chart.series]
    for name in run.metric_names:
        if not name.endswith("std_in_group") and name != "time/step_s":  # the band, and the height of the stack
            copies = [values for values in drawn if np.array_equal(values, run.series(name)[1], equal_nan=True)]
            assert copies, name
    stack = next(chart for section in sections(run) for chart in section.charts if chart.stacked)
    assert [series.label for series in stack.series] == ["rollout", "score", "update", "other"]
    assert np.allclose(np.sum([series.values for series in stack.series], axis=0), 2.5)


def test_model_text_stays_text(report: tuple[str, Page]) -> None:
    text, page = report
    assert visible(HOSTILE) in page.texts["response"]
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_only_the_own_script_may_run_and_nothing_is_loaded(report: tuple[str, Page]) -> None:
    text, page = report
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#"), (name, value)
    assert "url(http" not in text
    assert len(page.ids) == len(set(page.ids))


def test_charts_take_their_colours_from_the_page(report: tuple[str, Page]) -> None:
    text, _ = report
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert svgs
    for svg in svgs:
        assert not re.findall(r"#[0-9a-f]{6}", re.sub(r'(href="|url\()#\w+', "", svg))
        assert "var(--c0)" in svg


@pytest.mark.parametrize("keep", ["metrics.jsonl", "samples.jsonl", "summary.json"])
def test_missing_pieces(run_folder: Path, tmp_path: Path, keep: str) -> None:
    (tmp_path / keep).write_bytes((run_folder / keep).read_bytes())
    _, page = parse(tmp_path)
    assert ("figure" in page.tags) == (keep == "metrics.jsonl")
    assert ("article" in page.tags) == (keep == "samples.jsonl")
    assert ("state done" in page.texts) == (keep == "summary.json")
    if keep == "metrics.jsonl":  # a run that was killed: first and last evaluation stand in
        assert page.texts["value"][:1] == ["98.0%"]


def test_one_step_without_evaluation_and_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "weight_version": 1, "policy/kl": 0.1, "time/rollout_s": 1.0, "policy/entropy": null}\n'
        '{"step": 2, "wei'
    )
    _, page = parse(tmp_path)
    assert [figure["hover"]["steps"] for figure in page.figures] == [[1], [1], [1]]
    assert page.texts["flag"] == ["1 not finite"]


def test_broken_or_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "weight_version": 1}\n')
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        write_report(tmp_path)


def test_many_samples_are_thinned_evenly(tmp_path: Path) -> None:
    rows = [{"step": step, "response": f"r{step}.{i}", "rewards": {}} for step in range(1, 301) for i in range(2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, page = parse(tmp_path)
    shown = [int(text.split(".")[0][1:]) for text in page.texts["response"]]
    assert len(shown) == 180
    assert [sum(low < step <= low + 100 for step in shown) for low in (0, 100, 200)] == [60, 60, 60]
    assert page.texts["stage"] == ["early"] * 60 + ["middle"] * 60 + ["late"] * 60


def test_running_mean_against_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=80)
    values[[3, 40, 79]] = np.nan
    expected = [np.nanmean(values[max(0, i - 3) : i + 4]) if np.isfinite(values[i]) else np.nan for i in range(80)]
    np.testing.assert_allclose(running_mean(values, 7), expected, rtol=1e-12)
