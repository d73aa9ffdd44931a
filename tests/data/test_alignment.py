import sys

import pytest

from internlm2_jax.data import alignment, risky, tasks
from internlm2_jax.files import read_jsonl

SIZES = {
    "sft": 600,
    "sft_validation": 60,
    "preference_pairs": 200,
    "preference_pairs_validation": 40,
    "prompts": 120,
    "eval_tasks": 48,
    "eval_requests": 20,
}
FILES = (
    "sft", "sft_validation", "preferences", "preferences_validation", "prompts", "eval_tasks",
    "eval_requests",
)  # fmt: skip
DOCUMENTS = [
    (
        "code",
        f"pack/m{n}.py",
        f'def take_{w}(x, y):\n    """Return the {w} of x without the y."""\n',
    )
    for n, w in enumerate(tasks.WORDS)
]


def load(folder):
    return {stem: read_jsonl(folder / f"{stem}.jsonl") for stem in FILES}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment")
    counts = alignment.build(folder, DOCUMENTS, 0, **SIZES)
    return counts, load(folder), folder


def prompts_of(rows):
    return {row["messages"][0]["content"] for row in rows}


def test_files_have_the_asked_sizes_and_the_counts_say_so(built):
    counts, files, folder = built
    for stem, size in zip(FILES, SIZES.values(), strict=True):
        assert len(files[stem]) == size == counts[stem]["rows"]
    assert sum(counts["sft"]["family"].values()) == 600
    assert counts["corpus"]["documents"] == len(DOCUMENTS)
    assert {path.name for path in folder.iterdir()} == {f"{stem}.jsonl" for stem in FILES}


def test_nothing_evaluated_was_trained_on(built):
    _, files, _ = built
    trained = set().union(*(prompts_of(files[f]) for f in ("sft", "preferences", "prompts")))
    held = ("sft_validation", "preferences_validation", "eval_tasks", "eval_requests")
    assert not trained & set().union(*(prompts_of(files[stem]) for stem in held))


def test_sft_mixes_corpus_tasks_refusals_and_compliance(built):
    counts, files, _ = built
    families = counts["sft"]["family"]
    assert families["docstring"] and families["refusal"] and families["compliance"]
    assert set(tasks.FAMILIES) <= set(families)
    for row in files["sft"]:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant") and assistant["content"]
        assert risky.is_refusal(assistant["content"]) == (row["family"] == "refusal")


def test_evaluation_rows_can_be_checked(built):
    _, files, _ = built
    for row in files["eval_tasks"]:
        task = tasks.Task(**row["task"])
        assert tasks.held_out(task.key) and tasks.check(task, task.answer)
    assert all(row["task"] is None for row in files["eval_requests"])


def test_same_seed_same_bytes_other_seed_other_rows(built, tmp_path):
    _, files, folder = built
    alignment.build(tmp_path / "again", DOCUMENTS, 0, **SIZES)
    for stem in FILES:
        name = f"{stem}.jsonl"
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    alignment.build(tmp_path / "other", DOCUMENTS, 1, **SIZES)
    assert load(tmp_path / "other")["sft"] != files["sft"]


def test_an_empty_corpus_still_gives_a_full_set(tmp_path):
    counts = alignment.build(tmp_path, [], 0, **SIZES)
    assert counts["sft"]["rows"] == 600 and counts["preferences"]["rows"] == 200
    assert "docstring" not in counts["sft"]["family"]


def test_default_sizes_can_be_generated_without_a_corpus(tmp_path):
    counts = alignment.build(tmp_path, [], 0)
    rows = {stem: counts[stem]["rows"] for stem in FILES}
    assert rows == {
        "sft": 8000, "sft_validation": 400, "preferences": 3000, "preferences_validation": 400,
        "prompts": 2000, "eval_tasks": 200, "eval_requests": 100,
    }  # fmt: skip


def test_building_data_needs_no_jax():
    import subprocess

    code = "import internlm2_jax.data.alignment, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
