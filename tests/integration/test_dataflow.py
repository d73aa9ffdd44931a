"""What Dataflow would be sent, checked without Dataflow: the graphs, the dry run, the package."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import graphs
import jobs
import pytest

from data_beam import runners

GOLDEN = jobs.ROOT / "tests" / "golden"
INGEST = 0  # the job that reads files is every recipe's first
RECIPES = [
    pytest.param(name, marks=[] if name == "web_text" else [pytest.mark.slow])
    for name in graphs.RECIPES
]


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, tmp_path_factory) -> tuple[str, list[graphs.Job]]:
    with graphs.recorded() as found:
        graphs.RECIPES[request.param](tmp_path_factory.mktemp(request.param))
    return request.param, found


def test_the_graph_is_the_golden_one(recipe):
    name, found = recipe
    assert graphs.text(found) == (GOLDEN / f"graph_{name}.txt").read_text()


def test_keys_have_deterministic_coders(recipe):
    seen = 0
    for job in recipe[1]:
        for name, coder in job.shuffled():
            seen += 1
            assert coder.is_kv_coder(), name
            assert coder.key_coder().is_deterministic(), name
    assert seen > 5


def test_functions_can_be_imported_by_workers(recipe):
    """A DoFn or lambda of __main__ would be pickled by value, with whatever it refers to."""
    functions = [pair for job in recipe[1] for pair in job.functions()]
    assert len(functions) > 10
    assert [name for name, pickled in functions if b"__main__" in pickled] == []
    assert max(len(pickled) for _, pickled in functions) < 100_000  # no list of files in them


def test_reading_is_not_fused_with_the_list_of_inputs(recipe):
    """Else one worker would do it all."""
    assert [list(job.fused_with_the_source()) for job in recipe[1]] == [[]] * len(recipe[1])


def test_documents_are_shuffled_once(recipe):
    assert [number for number, job in enumerate(recipe[1]) if job.documents_shuffled] == [INGEST]


# --- with Beam's Google Cloud packages --------------------------------------------------------

DATAFLOW = [
    "--runner=DataflowRunner", "--dry_run=True", "--no_auth", "--project=some-project",
    "--region=europe-west4", "--temp_location=gs://some-bucket/temp",
    "--staging_location=gs://some-bucket/staging",
    "--sdk_container_image=europe-west4-docker.pkg.dev/some-project/beam/workers:1",
    "--worker_machine_type=n2-standard-8", "--max_num_workers=64",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", graphs.RECIPES)
def test_dry_run(name, tmp_path, monkeypatch):
    """The runner overrides, checks and translates every job; then it is run here, for the next."""
    if importlib.util.find_spec("apitools") is None:
        pytest.skip("Beam's Google Cloud packages are absent: pip install '.[dataflow]'")
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner

    local_pipeline, dry = runners.pipeline, []

    def run(pipeline):
        assert isinstance(pipeline.runner, DataflowRunner)
        proto = pipeline.to_runner_api()
        dry.append((pipeline.run(), pipeline.runner.proto_pipeline))
        here = local_pipeline()
        return runners.beam.Pipeline.from_runner_api(proto, here.runner, here.options).run()

    monkeypatch.setattr(runners, "pipeline", lambda _=(): local_pipeline(DATAFLOW))
    with graphs.recorded(run) as found:
        graphs.RECIPES[name](tmp_path)
    assert len(dry) == len(found) > 3
    for (result, proto), job in zip(dry, found, strict=True):
        assert result.state == "DONE"
        images = {e.payload for e in proto.components.environments.values()}
        assert any(b"some-project/beam/workers:1" in payload for payload in images)
        sent = {t.unique_name for t in proto.components.transforms.values()}
        assert {step.unique_name for step in job.steps()} <= sent
        assert len(graphs.Job(proto).shuffles()) == len(job.shuffles())


# --- the package that workers install ---------------------------------------------------------


def test_the_container_recipe_fits_the_project():
    recipe = (jobs.ROOT / "containers" / "Dockerfile").read_text()
    pins = (jobs.ROOT / "requirements.txt").read_text()
    (beam,) = re.findall(r"^apache-beam==(\S+)", pins, re.MULTILINE)
    assert f"ARG BEAM={beam}\n" in recipe
    assert "--requirement requirements.txt" in recipe
    setup = configparser.ConfigParser()
    setup.read(jobs.ROOT / "setup.cfg")
    for line in setup["options.extras_require"]["data"].split():
        name = re.split(r"[<>=]", line)[0]
        assert re.search(f"^{name}==", pins, re.MULTILINE), name
    ignored = (jobs.ROOT / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.*)$", recipe, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (jobs.ROOT / name).exists()
            assert f"!{name}" in ignored
    assert "ENTRYPOINT" not in recipe  # the base image's own starts the worker


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(jobs.ROOT / name, source)
    for name in ("internlm2_jax", "data_beam"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(jobs.ROOT / name, source / name, ignore=ignored)
    files = {str(path.relative_to(source)) for path in source.glob("*/**/*") if path.is_file()}
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
         f"--wheel-dir={tmp_path}", str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    if "No matching distribution" in built.stderr:
        pytest.skip("no network: setuptools, which builds the wheel, cannot be downloaded")
    assert built.returncode == 0, built.stderr
    (wheel,) = Path(tmp_path).glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert files - packed == set()
