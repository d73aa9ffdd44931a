"""Names, options and errors of the runners; the runners themselves: tests/integration."""

from __future__ import annotations

import os
import socket

import pytest

from data_beam import runners
from data_beam.flink import cluster, distribution
from internlm2_jax.errors import UserError


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (None, "FnApiRunner"), ("DirectRunner", "DirectRunner"), ("direct", "DirectRunner"),
        ("apache_beam.runners.direct.DirectRunner", "DirectRunner"), ("Flink", "FlinkRunner"),
        ("flinkrunner", "FlinkRunner"), ("portable", "PortableRunner"), ("Prism", "Prism"),
    ],
)  # fmt: skip
def test_names(option, name):
    options = [f"--runner={option}"] if option else []
    assert runners.runner_name(options) == name
    assert runners.is_local(options) is (name in runners.LOCAL_RUNNERS)


@pytest.mark.parametrize(
    "option", [None, "DirectRunner", "direct", "FnApiRunner", "inprocessrunner"]
)
def test_local_runs_never_meet_prism(option):
    pipeline = runners.pipeline([f"--runner={option}"] if option else [])
    assert type(pipeline.runner).__name__ == "FnApiRunner"


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shrads=3"], "--shrads"),
        (["--direct_num_worker", "2"], "did you mean --direct_num_workers"),
        (["--runner=PortableRunner"], "--job_endpoint=HOST:PORT"),
        (["--runner=PortableRunner", "--job_endpoint=localhost:PORT"], "no job server answers"),
        (["--runner=PortableRunner", "--job_endpoint=localhost:x"], "no job server answers"),
        (["--runner=FlinkRunner", "--flink_master=localhost:PORT"], "no Flink cluster answers"),
        (["--runner=FlinkRunner", "--flink_master=http://localhost:PORT"], "localhost:PORT"),
        (["--runner=FlinkRunner", "--job_server_java_launcher=no-such-java"], "install Java 17"),
        (["--runner=Nope"], "Nope"),
    ],
)
def test_what_cannot_run_is_one_line_before_any_work(options, said, closed_port):
    options = [option.replace("PORT", str(closed_port)) for option in options]
    if "--flink_master" in str(options):
        options.append("--job_server_java_launcher=true")  # any program: it is not started
    with pytest.raises(UserError) as error:
        runners.pipeline(options)
    assert said.replace("PORT", str(closed_port)) in str(error.value) or said in str(error.value)
    assert "\n" not in str(error.value)


def test_dataflow_without_its_packages(monkeypatch):
    monkeypatch.setattr(runners.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'internlm2-jax\[dataflow\]'"):
        runners.pipeline(["--runner=DataflowRunner", "--project=some-project"])


def test_a_job_server_may_have_options_of_its_own(monkeypatch):
    monkeypatch.setattr(runners, "_connect", lambda *_: None)
    options = ["--runner=PortableRunner", "--job_endpoint=here:1", "--some_java_option=3"]
    first, second = runners.pipeline(options), runners.pipeline(options)
    names = [p.options.view_as(runners.GoogleCloudOptions).job_name for p in (first, second)]
    assert names[0] != names[1]  # each can be found, and cancelled, by its name


def _refuse(number: int) -> int:
    raise UserError(f"number {number} is refused; leave it out")


def test_a_user_error_comes_out_as_it_went_in(capfd):
    pipeline = runners.pipeline()
    pipeline | runners.beam.Create([7]) | "Refuse" >> runners.beam.Map(_refuse)
    with pytest.raises(UserError) as error:
        runners.run(pipeline)
    assert str(error.value) == "number 7 is refused; leave it out"
    assert "Traceback" not in capfd.readouterr().err


def test_no_java_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(distribution.Unavailable, match="install a JDK 17"):
        distribution.prepare(tmp_path / "cache")


@pytest.mark.parametrize("said", ['openjdk version "21.0.2"', 'java version "1.8.0_202"', "what"])
def test_java_that_flink_does_not_run_on(monkeypatch, tmp_path, said):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(distribution.Unavailable, match="does not run on"):
        distribution.find_java()


def test_a_cluster_that_does_not_come_up_tells_why(tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'ERROR no room for a heap'; exit 3\n")
    java.chmod(0o755)
    broken = distribution.Distribution(str(java), (), tmp_path / "job-server.jar")
    with pytest.raises(UserError, match=r"ended with status 3; .*no room for a heap"):
        cluster.Cluster.start(tmp_path / "cluster", broken)
    assert not os.path.exists(tmp_path / "cluster" / "tmp")
