"""Flink itself and Beam's job server for it, fetched once into a folder.

Flink comes as PyPI's `apache-flink-libraries`, the job server is built by Maven from Beam's runner
(`job_server.xml`). Both are pinned here; the job server's client is of the cluster's own version.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from internlm2_jax.errors import UserError
from internlm2_jax.files import whole_file, whole_folder

FLINK = "1.19.3"
# The newest runner whose artifacts are all published for a Flink that Beam's Python still knows;
# the protocol between them is stable, tests/integration/test_flink.py holds it to that.
BEAM_RUNNER = "2.62.0"
JAVA_VERSIONS = range(11, 18)  # what this Flink runs on
_LIBRARIES = ("flink-dist", "flink-connector-files", "log4j-")
_POM = Path(__file__).with_name("job_server.xml")
_STEP_SECONDS = 900


class Unavailable(UserError):
    """A program or a download that the cluster needs cannot be had on this machine."""


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Paths of what a cluster is started from."""

    java: str
    libraries: tuple[Path, ...]
    job_server: Path


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "internlm2_jax", "flink")


def prepare(cache: Path | None = None, job_server: Path | None = None) -> Distribution:
    """The distribution in `cache`, fetched if it is not there (about 400 MB, a minute).

    `job_server` is a jar to use instead of the built one, such as a published
    beam-runners-flink-X-job-server for the same Flink. Raises Unavailable.
    """
    java = find_java()
    cache = (cache or default_cache()).absolute()  # Maven's own folder is another
    cache.mkdir(parents=True, exist_ok=True)
    libraries = cache / f"flink-{FLINK}"
    if not libraries.is_dir():
        _fetch_flink(libraries)
    if job_server is None:
        job_server = cache / f"job-server-{BEAM_RUNNER}-flink-{FLINK}.jar"
        if not job_server.is_file():
            _build_job_server(job_server)
    elif not job_server.is_file():
        raise UserError(f"{job_server} is not a file; give the jar of a job server")
    return Distribution(java, tuple(sorted(libraries.glob("*.jar"))), job_server)


def find_java() -> str:
    """The Java launcher of JAVA_HOME, else of the PATH, when its version serves."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=os.path.join(home, "bin")) if home else shutil.which("java")
    mend = f"install a JDK {JAVA_VERSIONS[-1]} (Debian: openjdk-17-jdk-headless) or set JAVA_HOME"
    if java is None:
        raise Unavailable(f"Flink needs Java, and there is none on the PATH; {mend}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    match = re.search(r'version "(\d+)', said)
    if match is None or int(match[1]) not in JAVA_VERSIONS:
        version = match[1] if match else said.strip()[:80]
        raise Unavailable(f"Flink {FLINK} does not run on {java} (Java {version}); {mend}")
    return java


def _fetch_flink(target: Path) -> None:
    """The jars of a session cluster, out of the source distribution on PyPI."""
    package = "apache-flink-libraries"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _command(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
             "--no-deps", "--no-binary", package, "--dest", folder, f"{package}=={FLINK}"],
            f"download Flink ({package}=={FLINK} from PyPI)",
        )  # fmt: skip
        (archive,) = Path(folder).glob("*.tar.gz")
        with whole_folder(target) as jars, tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if path.parts[1:3] == ("deps", "lib") and path.name.startswith(_LIBRARIES):
                    content = tar.extractfile(member)
                    assert content is not None
                    with content, open(jars / path.name, "wb") as jar:
                        shutil.copyfileobj(content, jar, 1 << 20)


def _build_job_server(target: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise Unavailable(
            "building Beam's Flink job server needs Maven, and no mvn is on the PATH; install "
            "it (Debian: maven) or give a job server's jar"
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _command(
            [maven, "--quiet", "--batch-mode", f"--file={_POM}", f"-Doutput.folder={folder}",
             f"-Dbeam.version={BEAM_RUNNER}", f"-Dflink.version={FLINK}", "package"],
            "build Beam's Flink job server from Maven Central",
        )  # fmt: skip
        with whole_file(target) as path:
            shutil.move(Path(folder, "job-server.jar"), path)


def _command(command: Sequence[str], what: str) -> None:
    print(f"flink: {what} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_STEP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"cannot {what}: no end after {_STEP_SECONDS} s; try again") from error
    if done.returncode:
        lines = (done.stdout + done.stderr).replace("\x1b[0m", "").splitlines()
        told = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise Unavailable(f"cannot {what}: {told[0].strip()[:300]}; is the network reachable?")
