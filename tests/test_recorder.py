"""A run's record: folder, files, resume rules, checkpoints that are always whole, signals, exit codes."""

import csv
import dataclasses
import json
import os
import re
import signal
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import recorder as rec
from common.recorder import ArgumentError, Interrupted, NotFiniteError, Recorder


@dataclass
class Args:
    seed: int = 1
    lr: float = 0.1
    small: bool = False
    run_dir: str | None = None
    resume: str | None = None
    quiet: bool = True
    track: bool = False
    wandb_project: str = "p"


RESULT = {"episode_return": 1.5, "success": 0.5, "length": 200.0}


def new_recorder(run_dir, checkpoint=None, **changes) -> Recorder:
    return Recorder(Args(run_dir=str(run_dir), **changes), "script", "name", ["a", "b"], 100, checkpoint)


def read_csv(run_dir) -> list[dict]:
    with open(run_dir / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_every_file(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    for step in (10, 20):
        recorder.log(step, {"plasticity/actor/dormant_ratio": torch.tensor(0.25), "losses/q": 1.0})
        recorder.log(step, {"sparsity/critic/density": 0.5, "sparsity/critic/layer1": 0.5})
        recorder.evaluation(step, 0, 0, 5, RESULT)
    recorder.evaluation(20, 0, 1, 5, RESULT | {"success": 1.0})
    recorder.save(20, {"weights": torch.ones(3)})
    results = recorder.finish(20, {"final_success": 0.75}, {"policy": 3})
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results["tasks"][1] == {"index": 1, "name": "b", "final_return": 1.5, "final_success": 1.0}
    assert [row["global_step"] for row in read_csv(run_dir)] == ["10", "20", "20"]
    assert list(read_csv(run_dir)[0]) == [
        *("global_step", "phase", "task_index", "task", "episodes", "episode_return", "success", "episode_length")
    ]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["lr"] == 0.1 and "torch" in config["versions"] and "git_commit" in config
    assert (run_dir / "summary.png").read_bytes().startswith(b"\x89PNG")
    expected = {"dormant_ratio": {"actor": [[10, 0.25], [20, 0.25]]}, "density": {"critic": [[10, 0.5], [20, 0.5]]}}
    assert recorder.curves == expected
    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert [e.value for e in events.Scalars("eval/success/a")] == [0.5, 0.5]
    assert [e.step for e in events.Scalars("losses/q")] == [10, 20]
    assert not list(run_dir.glob("*.tmp"))


def test_an_environment_without_success_leaves_the_column_empty(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.evaluation(10, 0, 0, 5, RESULT | {"success": None})
    results = recorder.finish(10, {}, {})
    assert read_csv(tmp_path / "run")[0]["success"] == "" and results["tasks"][0]["final_success"] is None


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    first = new_recorder(run_dir)
    first.evaluation(10, 0, 0, 5, RESULT)
    first.log(10, {"losses/q": 1.0})
    first.save(10, {"x": 1})
    first.evaluation(20, 0, 0, 5, RESULT)
    first.log(20, {"losses/q": 2.0})
    first.close()
    checkpoint = rec.load_checkpoint(str(run_dir), "script")
    second = new_recorder(run_dir, checkpoint, resume=str(run_dir))
    assert [row["global_step"] for row in read_csv(run_dir)] == ["10"]
    assert second.seconds >= checkpoint["record"]["seconds"]
    second.log(20, {"losses/q": 3.0})
    second.close()
    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("losses/q")] == [(10, 1.0), (20, 3.0)]


def test_a_folder_that_holds_a_run_is_refused_and_resume_is_named(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.close()
    new_recorder(tmp_path / "run").close()  # killed before its first checkpoint: there is nothing to go on from
    recorder.save(0, {})
    with pytest.raises(ArgumentError, match="--resume"):
        new_recorder(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()  # of a finished run, to save space
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(ArgumentError, match="holds a run"):
        new_recorder(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file" / "run", tmp_path / ("long" * 100)):
        with pytest.raises(ArgumentError, match="cannot be written"):
            new_recorder(run_dir)


def test_contradicting_resume_arguments_name_both_values_and_output_options_are_free(tmp_path):
    run_dir = tmp_path / "run"
    recorder = new_recorder(run_dir)
    recorder.save(0, {})
    recorder.close()
    checkpoint = rec.load_checkpoint(str(run_dir), "script")
    with pytest.raises(ArgumentError, match=r"--lr 0\.2.*0\.1"):
        new_recorder(run_dir, checkpoint, resume=str(run_dir), lr=0.2)
    new_recorder(run_dir, checkpoint, resume=str(run_dir), quiet=True, wandb_project="other").close()


def test_command_line_presets_and_stored_arguments_are_defaults(tmp_path):
    presets = {"small": {"lr": 0.5, "seed": 7}}
    parse = rec.parse_args
    assert parse(Args, presets, []) == Args()
    assert parse(Args, presets, ["--small"]) == Args(small=True, lr=0.5, seed=7)
    assert parse(Args, presets, ["--small", "--lr", "0.9"]) == Args(small=True, lr=0.9, seed=7)
    new_recorder(tmp_path / "run", seed=5, lr=0.3).close()
    for words in (["--resume", str(tmp_path / "run")], [f"--resume={tmp_path / 'run'}"]):
        args = parse(Args, presets, words)
        assert (args.seed, args.lr, args.resume) == (5, 0.3, str(tmp_path / "run"))
    with pytest.raises(ArgumentError, match="no readable run"):
        parse(Args, presets, ["--resume", str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "abc"], "Error parsing --seed: invalid literal for int() with base 10: 'abc'"),
        (["--seed"], "Missing value for argument '--seed'"),
        (["--sed", "3"], "Unrecognized options: --sed, 3; Perhaps you meant: --seed INT"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_words_that_cannot_be_parsed_give_one_line_and_exit_2(words, expected, encoding, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(type(sys.stdout), "encoding", encoding, raising=False)
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    with pytest.raises(SystemExit) as leaving:
        rec.run(lambda args: None, Args)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and out == ""
    assert re.fullmatch(rf"error: .*{re.escape(expected)}.*\n", err) and not re.search("[─│]|---|--help", err)


def test_a_message_without_the_frame_we_know_is_shown_whole():
    assert rec.one_line("error:\n  a bad word\n") == "error: a bad word"


def test_help_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as leaving:
        rec.run(lambda args: None, Args)
    out, err = capsys.readouterr()
    assert leaving.value.code == 0 and "--wandb-project" in out and err == ""


def test_another_scripts_run_is_refused(tmp_path):
    new_recorder(tmp_path / "run").close()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["args"]["foreign"] = 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match=r"another script.*foreign"):
        rec.stored_args(str(tmp_path / "run"), Args)


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "truncated", "garbage", "dots", "flipped", "foreign", "code", "list"]
)
def test_bad_checkpoints_give_one_line_with_the_file(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    torch.save({"script": "script", "x": torch.randn(1000)}, path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(whole[:200] + bytes(b ^ 0xFF for b in whole[200:300]) + whole[300:])
    elif damage == "foreign":
        torch.save({"script": "other"}, path)
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "code":
        torch.save({"script": "script", "x": os.system}, path)
    else:
        damaged = {"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"hello world" * 50, "dots": b"...."}
        path.write_bytes(damaged[damage])
    with pytest.raises(ArgumentError, match=r"checkpoint\.pt: .*checkpoint") as error:
        rec.load_checkpoint(str(tmp_path), "script")
    assert "\n" not in str(error.value)


def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    recorder = new_recorder(tmp_path / "run")
    recorder.save(10, {"x": torch.ones(10)})

    def dies(state, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        recorder.save(20, {"x": torch.zeros(10)})
    recorder.close()
    checkpoint = rec.load_checkpoint(str(tmp_path / "run"), "script")
    assert checkpoint["record"]["global_step"] == 10 and torch.equal(checkpoint["x"], torch.ones(10))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_the_second_is_not_held_back(tmp_path, signum):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    recorder = new_recorder(tmp_path / "run")
    assert not recorder.stopped
    os.kill(os.getpid(), signum)
    assert recorder.stopped
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    with pytest.raises(Interrupted, match=r"script\.py --resume") as interrupt:
        recorder.leave()
    assert interrupt.value.exit_code == 128 + signum


@pytest.mark.parametrize(
    ("error", "code"),
    [(ArgumentError("bad"), 2), (NotFiniteError("nan"), 1), (Interrupted(2, "stopped"), 130)],
)
def test_exit_codes_and_one_line(monkeypatch, capsys, error, code):
    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as leaving:
        rec.run(main, Args)
    assert leaving.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_finished_results_are_printed_again(tmp_path, capsys):
    recorder = new_recorder(tmp_path / "run")
    args = Args(resume=str(tmp_path / "run"), run_dir=str(tmp_path / "run"))
    assert rec.finished_results(args) is None
    recorder.evaluation(10, 0, 0, 5, RESULT)
    results = recorder.finish(10, {"final_success": 0.5}, {})
    assert rec.finished_results(args) == results and capsys.readouterr().out == ""
    rec.finished_results(dataclasses.replace(args, quiet=False))
    assert "final_success" in capsys.readouterr().out
    with pytest.raises(ArgumentError, match=r"--lr 0\.7.*0\.1"):
        rec.finished_results(dataclasses.replace(args, lr=0.7))


def test_wandb_is_needed_only_with_track(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ArgumentError, match="pip install wandb"):
        new_recorder(tmp_path / "run", track=True)
    assert not (tmp_path / "run").exists()


def test_a_value_that_is_not_finite_names_itself_the_step_and_the_last_good_checkpoint(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.require_finite("loss", torch.ones(3), 5)
    recorder.require_finite("action", np.zeros(2), 5)
    with pytest.raises(NotFiniteError, match=r"loss is not finite at step 7; .*checkpoint\.pt"):
        recorder.require_finite("loss", torch.tensor([0.0, float("inf")]), 7)


def test_random_state_goes_on_where_it_was():
    cpu = torch.device("cpu")
    state = rec.random_state(cpu)
    drawn = torch.rand(3)
    rec.set_random_state(state, cpu)
    assert torch.equal(torch.rand(3), drawn)
