"""The page: whole, self-contained, the same twice, and there for every partial or damaged run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from html_reader import Reader

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.report import build, svg
from internlm2_jax.report.curves import Level
from internlm2_jax.report.load import Run, Series
from internlm2_jax.report.page import OPTIONAL, SECTIONS, render
from internlm2_jax.report.training import _top


@pytest.fixture(scope="module")
def page(whole_run: Path) -> str:
    return build(whole_run).read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(page):
    reader = Reader(page)
    assert all(link.startswith("#") for _, link in reader.links), "links must stay in the page"
    assert not re.search(r"https?:|@import|<script|url\((?!#)|\bsrc=", page)
    missing = {link[1:] for _, link in reader.links} - set(reader.ids)
    assert not missing
    assert len(reader.ids) == len(set(reader.ids)), "ids of the plots must not meet"


def test_every_plot_says_what_it_shows_and_names_its_file(page):
    reader = Reader(page)
    plots = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert len(plots) > 25
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 20 for plot in plots)
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert all("Source: <code>" in figure for figure in figures)


def test_headlines_carry_the_numbers_of_the_files(page):
    summary = Reader(re.search(r'<section id="summary">.*?</section>', page, re.DOTALL)[0]).words
    for number in ("49 %", "3.2 / 3.9", "2.71", "3.6 below the 6.31", "0.861", "88 %",
                   "−0.21 → 1.8", "57 % → 68 %", "79 %",
                   "chance is 50 %", "14 min 36 s"):  # fmt: skip
        assert number in summary, number


def test_sections_show_what_the_files_say(page):
    words = Reader(page).words
    for text in ("near duplicate", "flattering opening", "3.1 × 10⁻¹²", "1,000,000",
                 "Great question!", "flips 79 % of the conflicting pairs", "unigram",
                 "pretrain.phases[3].steps = 21", "Long (T = 1,024)",
                 "patched"):  # fmt: skip
        assert text in words, text


def test_files_beyond_the_byte_budget_are_no_loss_of_cleaning(page):
    words = Reader(page).words
    assert "24,180 documents (131 MB) were read" in words
    assert "The byte budget let in 23,000 of the 90,000 files found." in words
    assert "Most documents were dropped for: near duplicate" in words


def test_text_of_a_run_is_never_markup(page):
    assert "&lt;without&gt;" in page and "<without>" not in page
    assert "<span> &lt;b&gt;</span>" in page
    assert "<!-- ===" not in page


def test_the_same_files_give_the_same_bytes(page, run_folder):
    again = build(run_folder).read_text(encoding="utf-8")
    assert again == page, "no date, path or chance may enter the page"


@pytest.mark.parametrize("keep", ["none", "corpus", "ppo_round1", "evaluate"])
def test_a_partial_run_renders_and_says_what_is_missing(run_folder, keep):
    for path in list(run_folder.iterdir()):
        if path.is_dir() and path.name != keep:
            shutil.rmtree(path)
    words = Reader(build(run_folder).read_text(encoding="utf-8")).words
    assert "Not run yet." in words
    assert "(not run yet)" in words
    assert ("of raw text survive" in words) == (keep == "corpus")


def test_an_empty_folder_renders(tmp_path):
    words = Reader(build(tmp_path).read_text(encoding="utf-8")).words
    assert words.count("Not run yet.") == len(SECTIONS) - len(OPTIONAL)
    assert "No stage has left a result yet." in words


def test_a_stage_that_still_runs_shows_what_it_logged(run_folder):
    for name in ("done.json", "result.json"):
        (run_folder / "pretrain" / name).unlink()
    section = re.search(r'<section id="pretrain">.*?</section>', render(Run(run_folder)), re.DOTALL)
    words = Reader(section[0]).words
    assert "Unfinished: still running, or stopped." in words
    assert "Training loss fell from" in words
    assert "Short" in words, "phases come from the log while there is no result"


def test_a_loss_that_never_reaches_the_unigram_line_stays_in_the_plot():
    """The axis is cut above that line only when the curves come down to it."""
    low, high = (Series(np.arange(2.0), np.array([9.0, end])) for end in (3.0, 7.0))
    assert _top([Level(6.0, "unigram")], [low]) == pytest.approx(6.6)
    assert _top([Level(6.0, "unigram")], [low, high]) is None
    assert _top([], [low]) is None


ALL_FILES = [
    "pipeline.json", "corpus/corpus/funnel.json", "corpus/corpus/samples.json",
    "tokenizer/result.json", "pretrain/metrics.jsonl", "pretrain/result.json",
    "sft/metrics.jsonl", "sft/result.json",
    "reward_model/metrics.jsonl", "reward_model/result.json", "ppo_round2/metrics.jsonl",
    "ppo_round1/result.json", "ppo_round2/samples.jsonl", "reward_patch/result.json",
    "instructions/result.json", "evaluate/result.json", "sft/done.json",
]  # fmt: skip


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_damaged_file_is_named_and_the_old_page_stays(run_folder, name, monkeypatch):
    monkeypatch.setattr(svg, "_svg", lambda draw, width, height, alt: "")  # reading is at stake
    (run_folder / "report.html").write_text("old")
    path = run_folder / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=re.escape(name)):
        build(run_folder)
    assert (run_folder / "report.html").read_text() == "old"
    assert not list(run_folder.glob("*.partial"))


@pytest.mark.parametrize("kind", ["result.json", "metrics.jsonl", "json"])
def test_empty_objects_are_files_without_numbers(run_folder, kind):
    """All results, then all curves, then everything but the curves."""
    for name in ALL_FILES:
        if name.endswith(kind):
            (run_folder / name).write_text("{}")
    Reader(build(run_folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pretrain/result.json", {"validation_loss": "low"}, "validation_loss is a str"),
        ("pretrain/result.json", {"phases": [1]}, "phases is a list"),
        ("corpus/corpus/funnel.json",
         {"stages": [{"dropped": {"short": 3}}]}, "dropped.short is a int"),
        ("evaluate/result.json", {"needle": {"scores": {"a": [["x"]]}}}, "a list of numbers"),
        ("evaluate/result.json",
         {"needle": {"lengths": [1], "depths": [0, 1], "scores": {"a": [[1]]}}}, "1 x 1, not 2"),
        ("evaluate/result.json", [1], "holds no JSON object"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_named_with_its_key(run_folder, name, value, said):
    files.write_json(run_folder / name, value)
    with pytest.raises(UserError, match=f"{name}.*{said}"):
        build(run_folder)


def test_numbers_that_are_null_leave_gaps_and_no_crash(run_folder):
    rows = [{"step": 1, "split": "train", "loss": None}, {"step": None}, {"split": "train"}]
    files.write_jsonl(run_folder / "pretrain" / "metrics.jsonl", rows)
    grid = {"lengths": [8], "depths": [0], "scores": {"a": [[None]]}}
    files.write_json(run_folder / "evaluate" / "result.json", {"needle": grid})
    scores = {"code": {"chosen": [None], "rejected": []}}
    files.write_json(run_folder / "reward_model" / "result.json", {"scores": scores})
    Reader(build(run_folder).read_text(encoding="utf-8"))


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        build(tmp_path / "nowhere")
