"""The pipelines on a real Flink cluster: a job manager, two task managers, Beam's job server.

    python -m pytest tests/integration/test_flink.py -m flink

Needs Java 11 to 17, and at its first run Maven and a network (400 MB, kept in .cache/flink).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest

from data_beam.flink import rest

pytestmark = [pytest.mark.flink, pytest.mark.slow, pytest.mark.timeout(1500)]
SECONDS = 900


@pytest.fixture(autouse=True)
def two_task_managers(request):
    """Every test finds the cluster whole, with nothing left running."""
    yield
    if "cluster" in request.fixturenames:
        running = request.getfixturevalue("cluster")
        for job, state in running.jobs().items():
            if state not in rest.ENDED:
                rest.cancel(running.master, job)
        running.supervise()
        while len(running.task_managers()) < running.sizes.task_managers:
            running.start_task_manager()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Real pages with copies, near-copies, broken records and one long text; real sources."""
    folder = tmp_path_factory.mktemp("input")
    pages = jobs.write_pages(folder / "pages", 3_000_000)
    long = "\n\n".join(record["text"] for record in jobs.documents(12_000_000, seed=9))
    (pages / "long.txt").write_text(long)
    return {jobs.web_text: pages, jobs.corpus: pages, jobs.code: jobs.write_sources(folder / "src")}


@pytest.fixture(scope="module")
def local(inputs, tmp_path_factory):
    """What a job leaves when it runs in one process."""
    known: dict[str, dict[str, bytes]] = {}

    def contents(job) -> dict[str, bytes]:
        if job.__name__ not in known:
            output = tmp_path_factory.mktemp("local") / job.__name__
            jobs.run(job(inputs.get(job), output), timeout=SECONDS)
            known[job.__name__] = jobs.contents(output)
            assert known[job.__name__]
        return known[job.__name__]

    return contents


def same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize("job", [jobs.shapes, jobs.corpus, jobs.web_text, jobs.code])
def test_the_bytes_are_those_of_a_local_run(job, cluster, inputs, local, tmp_path):
    jobs.run(job(inputs.get(job), tmp_path / "out"), cluster.options(), SECONDS)
    same(jobs.contents(tmp_path / "out"), local(job))


def kill_in_the_middle(cluster, process: subprocess.Popen, kills: int) -> list[str]:
    """Kills a task manager when a job has finished steps and running ones, in `kills` different
    jobs, and puts another in its place; returns the jobs."""
    before, hit = set(cluster.jobs()), []
    while process.poll() is None and len(hit) < kills:
        time.sleep(0.05)
        for job, state in cluster.jobs().items():
            if state != "RUNNING" or job in before or job in hit:
                continue
            steps = set(cluster.vertices(job).values())
            if {"FINISHED", "RUNNING"} <= steps:
                cluster.kill_task_manager()
                hit.append(job)
                time.sleep(2)
                cluster.start_task_manager()
                break
    return hit


@pytest.mark.parametrize(
    ("job", "options", "kills"),
    [
        pytest.param(jobs.shapes, ["--seconds=40"], 1, id="shapes"),
        pytest.param(jobs.web_text, [], 3, id="web_text"),
        pytest.param(jobs.code, [], 2, id="code"),
    ],
)
def test_a_killed_task_manager_changes_nothing(
    job, options, kills, cluster, inputs, local, tmp_path
):
    command = job(inputs.get(job), tmp_path / "out")
    process = jobs.start(command, [*options, *cluster.options()])
    hit = kill_in_the_middle(cluster, process, kills)
    jobs.finish(process, SECONDS)
    assert len(hit) == kills
    again = {id: cluster.attempts(id) for id in hit}
    assert any(max(steps.values()) > 1 for steps in again.values())  # something was lost
    assert any(min(steps.values()) == 1 for steps in again.values())  # and not all was repeated
    same(jobs.contents(tmp_path / "out"), local(job))


def test_a_user_error_in_a_worker_is_one_line(cluster, tmp_path):
    process = jobs.start(jobs.shapes(tmp_path, tmp_path / "out"), ["--fail", *cluster.options()])
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert output.splitlines()[-1] == "error: number 1001 is refused; leave it out"
    assert "Traceback" not in output


def test_ctrl_c_cancels_the_job(cluster, tmp_path):
    before = set(cluster.jobs())
    command = jobs.shapes(tmp_path, tmp_path / "out")
    process = jobs.start(command, ["--seconds=600", *cluster.options()])

    def running() -> bool:
        new = cluster.jobs().keys() - before
        return any("RUNNING" in cluster.vertices(job).values() for job in new)

    wait_until(running)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "interrupted, cancelling the job" in output
    (job,) = cluster.jobs().keys() - before
    wait_until(lambda: cluster.jobs()[job] == "CANCELED")


def test_flink_runner_starts_the_job_server_itself(cluster, local, tmp_path):
    """As a user with a cluster and no job server does."""
    kept = ("--environment", "--execution", "--parallelism", "--flink_master")
    options = [option for option in cluster.options() if option.startswith(kept)]
    jar = f"--flink_job_server_jar={cluster.distribution.job_server}"
    command = jobs.shapes(tmp_path, tmp_path / "out")
    jobs.run(command, ["--runner=FlinkRunner", jar, *options], SECONDS)
    same(jobs.contents(tmp_path / "out"), local(jobs.shapes))


def test_everything_dies_with_the_process_that_started_it(flink_installed, tmp_path):
    command = [sys.executable, "-m", "data_beam.flink", f"--folder={tmp_path}"]
    command.append(f"--cache={jobs.ROOT / '.cache' / 'flink'}")
    process = subprocess.Popen(command, cwd=jobs.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "logs in" in process.stdout.readline()
    children = java_below(tmp_path)
    assert len(children) == 4  # job manager, two task managers, job server
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not java_below(tmp_path), 30)


def java_below(folder: Path) -> list[int]:
    """Processes whose command names `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"java" in command.split(b"\0")[0] and os.fsencode(folder) in command:
            found.append(int(entry.name))
    return found


def wait_until(true, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)
