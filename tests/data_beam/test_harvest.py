"""What this machine gives: both sources, enough of them, no file in two roles."""

import pytest

from data_beam.io import harvest


@pytest.fixture(scope="module")
def listed():
    return harvest.list_machine()


def test_a_machine_without_documentation_still_gives_both_sources(listed, monkeypatch):
    bare = [file for file in listed if file.root not in ("man", "doc")]
    chosen = harvest.select_machine(bare, 6_000_000, seed=0)
    size = {s: sum(f.size for f in chosen if f.source == s) for s in ("code", "text")}
    assert 2_500_000 < size["code"] < 3_500_000
    assert 2_500_000 < size["text"] < 3_500_000


def test_no_file_is_both_code_and_docstrings(listed):
    chosen = harvest.select_machine(listed, 4_000_000, seed=0)
    names = [(file.root, file.path) for file in chosen]
    assert len(set(names)) == len(names)
    assert any(file.kind == "docstrings" for file in chosen)
    assert not any("/tests/" in path or ("licen" in path.lower() and path.endswith(".txt"))
                   for _, path in names)  # fmt: skip


def test_the_choice_does_not_depend_on_the_order_of_listing(listed):
    assert harvest.select_machine(listed[::-1], 2_000_000, 3) == harvest.select_machine(
        listed, 2_000_000, 3
    )


def test_missing_documentation_folders_are_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(harvest, "MAN", tmp_path / "no-man")
    monkeypatch.setattr(harvest, "DOC", tmp_path / "no-doc")
    roots = {file.root for file in harvest.list_machine()}
    assert roots and not roots & {"man", "doc"}
