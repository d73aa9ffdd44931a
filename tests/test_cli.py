"""What a person can get wrong on the command line: one line each, and status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm2_jax import cli

DEMO = str(Path(__file__).parents[1] / "experiments" / "demo" / "pipeline.py")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `internlm2 ARGS` in an empty folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["internlm2", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def assert_one_line(result: tuple[int, str, str], *expected: str) -> None:
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(lines) == 1
    assert "Traceback" not in err
    for part in expected:
        assert part in lines[0]


def test_missing_experiment(command):
    assert_one_line(command("run", "nowhere.py"), "no experiment file nowhere.py")


def test_misspelt_override(command, tmp_path):
    result = command("run", DEMO, "--set", "sft.stpes=3")
    assert_one_line(result, "sft has no field 'stpes'", "did you mean 'steps'")
    assert list(tmp_path.iterdir()) == []


def test_unknown_stage(command):
    assert_one_line(
        command("run", DEMO, "--only", "sfd"), "no stage 'sfd'", "the stages are: corpus"
    )


def test_unknown_preset(command):
    result = command("run", DEMO, "--set", "pretrain.model.name=internlm2_8b")
    assert_one_line(result, "no model preset 'internlm2_8b'", "did you mean 'internlm2_")


def test_missing_corpus_folder(command):
    assert_one_line(command("run", DEMO, "--corpus", "not-here"), "not-here")


def test_corpus_without_usable_text(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.bin").write_bytes(b"\0\1\2" * 100)
    assert_one_line(command("run", DEMO, "--corpus", "mine"), "mine")
    # What could not be read is there to be looked at; a corpus is not.
    assert list(tmp_path.rglob("dead_letters/part-*"))
    assert not list(tmp_path.rglob("done.json"))
    assert not list(tmp_path.rglob("documents/manifest.json"))


def test_report_of_nothing(command):
    assert_one_line(command("report", "nowhere"), "nowhere")


def test_generate_from_a_folder_without_a_model(command, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line(command("generate", "empty", "hello"), "empty")


def test_unknown_option_shows_usage(command):
    status, _, err = command("run", DEMO, "--sed", "3")
    assert status == 2
    assert "No such option" in err


def test_dry_run_prints_settings_and_writes_nothing(command, tmp_path):
    status, out, _ = command("run", DEMO, "--seed", "3", "--dry-run")
    assert status == 0
    assert "sft.seed = 3" in out
    assert list(tmp_path.iterdir()) == []


def test_diff_of_two_run_folders(command, tmp_path):
    from internlm2_jax import config

    for seed in (1, 2):
        config.save(config.load(DEMO, [f"seed={seed}"]), tmp_path / str(seed))
    status, out, _ = command("diff", "1", "2")
    assert status == 0
    assert "sft.seed: 1 -> 2" in out
    assert "sft.steps" not in out


@pytest.mark.parametrize(
    "given, name",
    [
        ([], "demo"),
        (["seed=1"], "demo,seed-1"),
    ],
)
def test_run_folder_names(given, name):
    assert cli.default_run_name("demo", given) == name


def test_different_overrides_never_share_a_folder():
    names = {
        cli.default_run_name("demo", [a])
        for a in ("seed=1", "sft.steps=1", "ppo_round1.steps=1", "corpus='/a/x'", "corpus='/b/x'")
    }
    assert len(names) == 5


def test_convert_goes_both_ways(command, tmp_path):
    """Hugging Face -> stage -> Hugging Face, InternLM2's layout and Llama's."""
    import jax
    from safetensors.numpy import load_file

    from internlm2_jax.models import convert
    from internlm2_jax.models.build import build
    from internlm2_jax.models.config import preset

    cfg = preset("tiny")
    params = build(cfg).init(jax.random.key(0))
    convert.save_hf(tmp_path / "hf", cfg, params, "float32")
    assert command("convert", "hf", "base")[0] == 0
    assert (tmp_path / "base" / "model.json").is_file()
    assert command("convert", "base", "back")[0] == 0
    original = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == original
    assert command("convert", "hf", "llama", "--layout", "llama", "--dtype", "bfloat16")[0] == 0
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    assert "model.layers.1.self_attn.k_proj.weight" in tensors
    assert {str(value.dtype) for value in tensors.values()} == {"bfloat16"}
    assert_one_line(command("convert", "hf", "back"), "back exists and is not an empty folder")
    assert_one_line(command("convert", "hf", "x", "--dtype", "bfloat16"), "stage keeps float32")
    assert_one_line(command("convert", "absent", "x"), "absent is not a folder")


def test_plan_of_a_pod_that_does_not_exist(command):
    result = command("plan", DEMO, "--topology", "v5p:3x4x4")
    assert_one_line(result, "'v5p:3x4x4' does not exist", "the nearest is v5p:4x4x4")


def test_overrides_from_a_file(command, tmp_path):
    (tmp_path / "best").write_text("# found by a search\nsft.steps=7\n\n")
    status, out, _ = command("run", DEMO, "--overrides", "best", "--dry-run")
    assert status == 0
    assert "sft.steps = 7" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "5"], "--profile '5' is not of the form FIRST:STOP"),
        (["--num-processes", "2"], "or give --coordinator, --num-processes and --process-id"),
    ],
)
def test_train_flags(command, flags, message, tmp_path):
    assert_one_line(command("train", DEMO, *flags), message)
    assert list(tmp_path.iterdir()) == []


def test_train_takes_what_run_takes(command):
    status, out, _ = command("train", DEMO, "--seed", "3", "--dry-run")
    assert status == 0
    assert "sft.seed = 3" in out


def test_a_preempted_run_ends_with_75(command, monkeypatch):
    from internlm2_jax.errors import Preempted

    def stops(**given):
        raise Preempted("pretrain: told to stop after step 3 of 9; all is saved")

    monkeypatch.setattr(cli, "_run", stops)
    status, _, err = command("train", DEMO)
    assert status == 75
    assert err == "stopped: pretrain: told to stop after step 3 of 9; all is saved\n"
