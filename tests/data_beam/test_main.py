"""The command line: a run with Beam options, one-line errors; and what is never imported."""

import subprocess
import sys
from pathlib import Path

from raw_folder import write_folder

ROOT = Path(__file__).parents[2]


def data_beam(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data_beam", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_corpus_with_beam_options(tmp_path):
    folder = write_folder(tmp_path / "raw")
    done = data_beam("corpus", "--input", folder, "--output", tmp_path / "c",
                     "--runner=DirectRunner", "--job_name=small")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "near_duplicate 1" in done.stdout and "exact_dedup" in done.stdout
    assert "ingest: 67/67 files" in done.stderr or "files" in done.stderr
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr


def test_errors_are_one_line_and_status_2(tmp_path):
    failed = data_beam("corpus", "--input", tmp_path / "none", "--output", tmp_path / "c")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    failed = data_beam("tokenize", "--input", tmp_path, "--output", tmp_path / "c")
    assert failed.returncode == 2 and "--tokenizer" in failed.stderr
    (tmp_path / "a.txt").write_text("x")
    failed = data_beam("web_text", "--input", tmp_path / "a.txt", "--output", tmp_path / "c",
                       "--treshold=0.8")  # fmt: skip
    assert failed.returncode == 2 and failed.stderr.endswith("; did you mean --threshold?\n")


def test_jobs_import_neither_jax_nor_tensorflow():
    code = (
        "import sys, data_beam.__main__, data_beam.cache, data_beam.pipelines.corpus\n"
        "data_beam.cache.load_tokenizer\n"
        "import internlm2_jax.data.tokenizer\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'jax', 'jaxlib', 'flax', "
        "'tensorflow', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
