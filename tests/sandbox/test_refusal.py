"""Where a machine cannot isolate, one line says so and nothing is run. Needs no sandbox."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.sandbox import Jail, Limits, Program, run_many, seccomp
from internlm2_jax.sandbox.session import Session, require


@pytest.fixture
def put_first(tmp_path, monkeypatch):
    """Puts a program of the test's own before all others on the path."""

    def put(name: str, script: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin:/usr/sbin:/sbin")
        monkeypatch.setattr("internlm2_jax.sandbox.jail.SEARCH", f"{tmp_path}:/usr/bin:/bin")

    tmp_path.chmod(0o755)
    return put


def test_no_bubblewrap(tmp_path, monkeypatch):
    monkeypatch.setattr("internlm2_jax.sandbox.jail.SEARCH", str(tmp_path))
    with pytest.raises(UserError, match="bwrap is not installed: apt install bubblewrap"):
        run_many([Program("1")])


def test_no_seccomp(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    seccomp.program.cache_clear()
    try:
        with pytest.raises(UserError, match="apt install libseccomp2"):
            seccomp.program()
    finally:
        seccomp.program.cache_clear()


@pytest.mark.parametrize(
    "script",
    [
        "echo 'bwrap: No permissions to create new namespace' >&2; exit 1",
        "exit 0",
        # runs what it is given, without any isolation
        'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    ],
    ids=["no namespaces", "nothing at all", "no isolation"],
)
def test_a_bubblewrap_that_does_not_isolate(put_first, monkeypatch, script):
    pytest.importorskip("pyseccomp")
    put_first("bwrap", script)
    ran = []
    monkeypatch.setattr(Session, "run", lambda *a, **k: ran.append(1))
    jail = Jail(Limits(startup=20.0))
    with pytest.raises(UserError, match="cannot isolate untrusted code, so none is run"):
        run_many([Program("1")], jail=jail)
    with pytest.raises(UserError, match="cannot isolate"):
        require(jail)
    assert not ran


def test_a_report_that_is_not_what_was_asked_for_is_refused():
    from internlm2_jax.sandbox.jail import SandboxError

    jail = Jail()
    good = {
        "seccomp": 2, "no_new_privileges": 1, "capabilities": 0, "bounding": 0,
        "interfaces": ["lo"], "processes": [1, 2], "root": ["usr", "tmp", "proc", "dev"],
        "uid": 1000,
        "rlimits": {name: [v, v] for name, v in jail.limits.rlimits().items()},
    }  # fmt: skip
    jail.check(good)
    for name, bad in {
        "seccomp": 0, "no_new_privileges": 0, "capabilities": 1, "bounding": 2**21,
        "interfaces": ["lo", "eth0"], "processes": list(range(40)), "root": ["usr", "etc"],
        "uid": 0,
        "rlimits": {**good["rlimits"], "NPROC": [-1, -1]},
    }.items():  # fmt: skip
        with pytest.raises(SandboxError, match="is not in force"):
            jail.check({**good, name: bad})


def test_an_interpreter_that_is_not_there():
    pytest.importorskip("pyseccomp")
    if not Path("/usr/bin/bwrap").exists():
        pytest.skip("bubblewrap is not installed")
    with pytest.raises(UserError, match="does not exist"):
        Jail(packages=(Path("/nowhere"),)).start()
