"""Jobs through Beam's job API, as a remote runner gets them: pickled, staged, decoded, watched."""

from __future__ import annotations

import re
import signal
import time

import jobs
import pytest
import shapes
from apache_beam.runners.portability.local_job_service import LocalJobServicer

from data_beam import runners
from internlm2_jax.errors import UserError


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """Options that send a job to a job server; its workers come back to the process that asked."""
    server = LocalJobServicer(str(tmp_path_factory.mktemp("staging")))
    port = server.start_grpc_server(0)
    yield [
        "--runner=PortableRunner",
        f"--job_endpoint=localhost:{port}",
        "--environment_type=LOOPBACK",
    ]
    server.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return run(tmp_path_factory.mktemp("local"), [])


def run(folder, options, fail: bool = False) -> dict[str, bytes]:
    pipeline = runners.pipeline(options)
    shapes.build(pipeline, str(folder), 0.0, fail)
    runners.run(pipeline)
    return jobs.contents(folder)


def test_every_shape_and_progress(endpoint, local, tmp_path, capfd, caplog):
    assert run(tmp_path, endpoint) == local
    told = capfd.readouterr().err
    assert re.search(r"^PortableRunner: DONE, \d+m\d\ds$", told, re.MULTILINE)
    assert "nparseable" not in told + caplog.text  # of options that the job server knows


def test_a_user_error_comes_out_as_it_went_in(endpoint, tmp_path, caplog):
    with pytest.raises(UserError) as error:
        run(tmp_path, endpoint, fail=True)
    assert str(error.value) == "number 1001 is refused; leave it out"


@pytest.mark.slow
def test_ctrl_c_cancels(endpoint, tmp_path):
    process = jobs.start(jobs.shapes(tmp_path, tmp_path), ["--seconds=600", *endpoint])
    assert process.stdout is not None
    for line in process.stdout:
        if "PortableRunner: RUNNING" in line:
            break
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert "interrupted, cancelling the job" in output
    assert process.returncode != 0
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_worker_processes(local, tmp_path):
    several = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    jobs.run(jobs.shapes(tmp_path, tmp_path), several)
    assert jobs.contents(tmp_path) == local
