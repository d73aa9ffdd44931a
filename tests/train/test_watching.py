"""What a person sees of a run: speed, event files, a profiler window, samples, block norms."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import time
import types

import jax
import numpy as np
import pytest
from test_faults import batch, run

from internlm2_jax import chips, files
from internlm2_jax.errors import UserError
from internlm2_jax.train import session, sinks, speed, step
from internlm2_jax.train.session import Session


def test_speed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "peak_flops", lambda: 1e6)

    def slow(number, skipped):
        time.sleep(0.02)
        return batch(number)

    run(tmp_path, batch=slow, work=lambda step: speed.Work(100, 500.0), log_every=5)
    rows = files.read_jsonl(tmp_path / "speed.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for row in rows:
        assert 0.02 < row["seconds"] < 1
        assert 0.5 < row["data_wait"] <= 1
        assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"])
        assert row["mfu"] == pytest.approx(500 / row["seconds"] / 1e6)
        assert "memory_bytes" not in row  # a CPU does not say
    clocked = {"seconds", "time", "data_wait", "tokens_per_second", "mfu"}
    assert not clocked & files.read_jsonl(tmp_path / "metrics.jsonl")[0].keys()


def test_peaks(monkeypatch):
    assert speed.peak_flops() > 1e8  # a CPU is measured
    assert chips.of_device("NVIDIA H100 80GB HBM3").flops == 989.4e12
    assert chips.of_device("TPU v5 lite").name == "v5e"
    assert chips.of_device("NVIDIA H100 PCIe") is None  # another peak, which the table lacks


def test_a_pod_by_the_table_and_the_fullest_device(monkeypatch):
    """What the libraries of TPUs and GPUs tell, told here by stand-ins for four devices."""
    used = [3, 9, 1, 4]
    pod = [
        types.SimpleNamespace(
            platform="tpu",
            device_kind="TPU v5p",
            memory_stats=lambda n=n: {"bytes_in_use": n, "peak_bytes_in_use": 2 * n, "other": 0},
        )
        for n in used
    ]
    monkeypatch.setattr(speed.jax, "devices", lambda: pod)
    monkeypatch.setattr(speed.jax, "local_devices", lambda: pod)
    assert speed.peak_flops() == 4 * chips.CHIPS["v5p"].flops
    assert speed.memory() == {"memory_bytes": 9, "memory_peak_bytes": 18}
    pod[0].memory_stats = lambda: {"bytes_in_use": 10}  # one that has no count of the most
    assert speed.memory() == {"memory_bytes": 10}
    pod[0].device_kind = "a chip of tomorrow"
    assert speed.peak_flops() is None


def events(folder):
    """(step, tag, value) of TensorBoard event files, whose records are length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard(tmp_path):
    with session.use(Session(tensorboard=True)):
        run(tmp_path, log_every=10)
    found = events(tmp_path / "tensorboard")
    rows = {r["step"]: r for r in files.read_jsonl(tmp_path / "metrics.jsonl")}
    losses = {step: value for step, tag, value in found if tag == "train/loss"}
    assert losses == {s: np.float32(rows[s]["loss"]) for s in (10, 20)}
    assert {tag for _, tag, _ in found} >= {"speed/seconds", "speed/data_wait"}


def test_scalars():
    row = {"loss": np.float32(1), "phase": "x", "norms": {"layers": np.array([1.0, 2.0])}}
    assert sinks.scalars(row, "train") == {
        "train/loss": 1.0, "train/norms/layers/000": 1.0, "train/norms/layers/001": 2.0,
    }  # fmt: skip


def test_wandb_gets_the_same(tmp_path, monkeypatch):
    logged, ended = [], []
    fake = types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row)), finish=lambda: ended.append(1)
    )
    module = types.ModuleType("wandb")
    module.init = lambda **given: fake
    monkeypatch.setitem(sys.modules, "wandb", module)
    with session.use(Session(wandb="project")):
        run(tmp_path, log_every=10)
    assert [step for step, row in logged if "train/loss" in row] == [10, 20]
    assert ended == [1]


@pytest.mark.parametrize("asked", [Session(wandb="project"), Session(tensorboard=True)])
def test_a_writer_that_is_not_installed(tmp_path, monkeypatch, asked):
    for name in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="which is not installed; pip install"), session.use(asked):
        run(tmp_path)


def test_profile(tmp_path):
    with session.use(Session(profile=(3, 5))):
        run(tmp_path, steps=8)
    [trace] = (tmp_path / "profile").rglob("*.trace.json.gz")
    traced = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    numbers = [e["args"]["step_num"] for e in traced if "step_num" in e.get("args", {})]
    assert sorted({int(n) for n in numbers}) == [3, 4]


def test_a_window_that_no_step_is_in_is_said(tmp_path, capsys):
    with session.use(Session(profile=(9, 11))):
        run(tmp_path, steps=8)
    assert "traces nothing: steps 9 to 10 are not among 1 to 8" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("text", ["5", "5:5", "0:3", "a:b", "7:5"])
def test_bad_windows(text):
    with pytest.raises(UserError, match="not of the form FIRST:STOP"):
        session.parse_window(text)


def test_samples_at_an_interval(tmp_path):
    run(tmp_path, sample=lambda done, state: [{"text": f"after {done}"}], sample_every=8)
    rows = files.read_jsonl(tmp_path / "samples.jsonl")
    assert rows == [{"step": s, "text": f"after {s}"} for s in (8, 16, 20)]


def test_block_norms():
    rng = np.random.default_rng(0)
    layers = {"a": rng.normal(size=(3, 4, 5)), "b": rng.normal(size=(3, 2))}
    tree = {"layers": layers, "head": {"weight": rng.normal(size=(5, 6))}}
    norms = jax.device_get(step.block_norms(tree))
    expected = [
        np.sqrt((layers["a"][i] ** 2).sum() + (layers["b"][i] ** 2).sum()) for i in range(3)
    ]
    np.testing.assert_allclose(norms["layers"], expected, rtol=1e-5)
    np.testing.assert_allclose(norms["head"], np.linalg.norm(tree["head"]["weight"]), rtol=1e-5)
