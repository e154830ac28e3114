"""The command line: types that check arguments, presets, help in groups, stored runs, damaged files, exit codes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from common import cli
from common.cli import (
    ArgumentError,
    Fraction,
    Interrupted,
    NonNegativeInt,
    NotFiniteError,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from common.recorder import Recorder


@dataclass
class Args:
    seed: Seed = 1  # seed of everything random
    small: bool = False  # a first look
    size: Literal["base", "large"] = "base"  # a preset
    run_dir: str | None = None  # folder
    resume: str | None = None  # go on
    evaluate: str | None = None  # play
    episodes: NonNegativeInt = 10  # of --evaluate
    device: str = "cpu"  # where
    torch_threads: int = 1
    checkpoint_every: int = 100  # steps
    eval_every: int = 10  # steps
    capture_video: bool = False  # record
    quiet: bool = True  # print nothing
    track: bool = False  # mirror
    wandb_project: str = "p"  # project

    # --- SAC (CleanRL) ---

    lr: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--policy-lr",))] = 0.1  # step size # of Adam
    share: Fraction | None = None  # a share, or None
    steps: Annotated[PositiveInt | None, tyro.conf.arg(aliases=("--total-timesteps",))] = None  # length


PRESETS = {"small": {"lr": 0.5, "seed": 7}, "size large": {"lr": 0.7}}


def run_folder(path, **changes):
    """The folder of a run that was killed before its first step."""
    agent = dataclasses.make_dataclass("Agent", [("STATE", tuple, ("weight",)), ("weight", object, torch.ones(3))])()
    agent.weight.requires_grad_()
    recorder = Recorder(Args(run_dir=str(path), **changes), "test_cli", "name", ["a"], [(100, 10)], None)
    recorder.begin(agent, {"step": 0}, None, {"policy": 3})
    recorder.close()
    return path


# ------------------------------------------------------------------------------------------------------------ parsing


def test_presets_and_stored_arguments_are_defaults_and_what_is_typed_wins(tmp_path):
    def parse(*words):
        return cli.parse_args(Args, PRESETS, list(words))

    assert parse() == Args()
    assert parse("--small") == Args(small=True, lr=0.5, seed=7)
    assert parse("--small", "--lr", "0.1") == Args(small=True, lr=0.1, seed=7)  # typed, though it is the default
    assert parse("--size", "large") == parse("--size=large") == Args(size="large", lr=0.7)
    assert parse("--policy-lr", "3") == Args(lr=3)
    run_folder(tmp_path / "run", seed=5, lr=0.3)
    for words in (["--resume", str(tmp_path / "run")], [f"--resume={tmp_path / 'run'}"]):
        args = parse(*words)
        assert (args.seed, args.lr, args.resume) == (5, 0.3, str(tmp_path / "run"))
    with pytest.raises(ArgumentError, match="no readable run"):
        parse("--resume", str(tmp_path / "nothing"))


def test_python_is_an_interface_too(tmp_path):
    def prepared(args):
        return cli.prepare(args, "test_cli", PRESETS)[0]

    assert prepared(Args(small=True)) == Args(small=True, lr=0.5, seed=7)
    assert prepared(Args(small=True, lr=0.9)) == Args(small=True, lr=0.9, seed=7)
    assert prepared(Args(size="large")) == Args(size="large", lr=0.7)
    words = ["--small", "--lr", "0.1"]  # the command has settled it: a preset must not win afterwards
    assert prepared(cli.parse_args(Args, PRESETS, words)) == Args(small=True, lr=0.1, seed=7)
    run = str(run_folder(tmp_path / "run", seed=5, lr=0.3))
    args, checkpoint, device = cli.prepare(Args(resume=run), "test_cli", PRESETS)
    assert (args.seed, args.lr, args.resume, device.type) == (5, 0.3, run, "cpu")
    assert checkpoint["agent"]["weight"].tolist() == [1, 1, 1]
    with pytest.raises(ArgumentError, match=r"--lr 0\.2: contradicts the stored run, which has 0\.3"):
        prepared(Args(resume=run, lr=0.2))
    assert prepared(Args(resume=run, quiet=False, wandb_project="other")).wandb_project == "other"


def test_evaluate_takes_the_stored_arguments_and_its_own_options(tmp_path):
    run = str(run_folder(tmp_path / "run", seed=5, lr=0.3))
    args, checkpoint, _ = cli.prepare(Args(evaluate=run, episodes=2), "test_cli", PRESETS)
    assert (args.seed, args.lr, args.episodes, args.evaluate, checkpoint) == (5, 0.3, 2, run, None)
    typed, _, _ = cli.prepare(
        cli.parse_args(Args, PRESETS, ["--evaluate", run, "--episodes", "2"]), "test_cli", PRESETS
    )
    assert typed == args
    for words in (["--evaluate", run, "--seed", "8"], ["--seed", "8", f"--evaluate={run}"]):
        with pytest.raises(ArgumentError, match="--seed 8: contradicts the stored run, which has 5"):
            cli.prepare(cli.parse_args(Args, PRESETS, words), "test_cli", PRESETS)
    with pytest.raises(ArgumentError, match="--seed 8: contradicts the stored run, which has 5"):
        cli.prepare(Args(evaluate=run, seed=8), "test_cli", PRESETS)


def test_threads_are_those_of_the_machine_and_not_of_the_stored_run(tmp_path):
    run = str(run_folder(tmp_path / "run", torch_threads=10**6))
    for name in ("resume", "evaluate"):
        with pytest.raises(ArgumentError, match="--torch-threads 1000000: must be at most the number of cores"):
            cli.prepare(Args(**{name: run, "torch_threads": 10**6}), "test_cli", PRESETS)
        words = [f"--{name}", run, "--torch-threads", "1"]
        assert cli.prepare(cli.parse_args(Args, PRESETS, words), "test_cli", PRESETS)[0].torch_threads == 1
        cli.release()


@pytest.mark.parametrize("name", ["resume", "evaluate", "run_dir"])
@pytest.mark.parametrize("form", ["--{} ", "--{}="])
def test_a_variable_that_is_not_set_is_no_folder(name, form):
    option, equals, value = form.format(name.replace("_", "-")).partition("=")
    words = [option + "="] if equals else [option.strip(), value]
    with pytest.raises(ArgumentError, match=f"--{name.replace('_', '-')} : must be a folder"):
        cli.prepare(cli.parse_args(Args, PRESETS, words), "test_cli", PRESETS)


def test_help_has_groups_choices_defaults_and_presets(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda args: None, Args, PRESETS)
    out, err = capsys.readouterr()
    assert leaving.value.code == 0 and err == ""
    assert __doc__.splitlines()[0] in " ".join(re.sub("[│\n]", " ", out).split())
    own, sac = out.split("SAC (CleanRL)")
    assert "--wandb-project" in own and "--lr" not in own and "--lr" in sac
    assert "{base,large}" in own and "(default: base)" in own
    text = " ".join(re.sub("│", " ", sac).split())
    assert "step size # of Adam [--small: 0.5, --size large: 0.7] (default: 0.1)" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "abc"], "Error parsing --seed: invalid literal for int() with base 10: 'abc'"),
        (["--seed"], "Missing value for argument '--seed'"),
        (["--sed", "3"], "Unrecognized options: --sed, 3; Perhaps you meant: --seed INT"),
        (["--size", "huge"], "invalid choice 'huge' for argument '--size'. Expected one of ('base', 'large')"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_words_that_cannot_be_parsed_give_one_line_and_exit_2(words, expected, encoding, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(type(sys.stdout), "encoding", encoding, raising=False)
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda args: None, Args)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and out == ""
    assert re.fullmatch(r"error: .*\n", err) and not re.search("[─│]|---|--help", err)
    assert expected.replace(" ", "") in err.replace(" ", "")


def test_a_message_without_the_frame_we_know_is_shown_whole():
    assert cli.one_line("error:\n  a bad word\n") == "error: a bad word"


def test_a_run_draws_by_its_seed(tmp_path):
    for seed in (3, 4):
        cli.prepare(Args(seed=seed), "test_cli", PRESETS)
        assert torch.initial_seed() == seed


# ----------------------------------------------------------------------------------------------------------- checking


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(-(2**40), 2**40), st.floats(), st.none() | st.floats(), st.integers(-5, 5))
def test_a_value_passes_exactly_when_its_type_allows_it(seed, lr, share, episodes):
    allowed = 0 <= seed < 2**32 and 0 < lr < 3.4e38 and (share is None or 0 <= share <= 1) and episodes >= 0
    args = Args(seed=seed, lr=lr, share=share, episodes=episodes)
    if allowed:
        cli.check_types(args)
    else:
        with pytest.raises(ArgumentError, match=r"^--(seed|lr|share|episodes) \S+: must be [^\n]+$"):
            cli.check_types(args)


def test_what_is_allowed_is_said():
    for change, line in [
        ({"seed": -1}, "--seed -1: must be at least 0 and below 4294967296"),
        ({"lr": 0.0}, "--lr 0.0: must be above 0"),
        ({"share": 1.5}, "--share 1.5: must be at least 0 and at most 1"),
        ({"lr": float("inf")}, "--lr inf: must be a finite number"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"steps": 10**30}, f"--steps {10**30}: must be smaller in size"),
        ({"lr": 1e39}, "--lr 1e+39: must be smaller in size"),
        ({"seed": "abc"}, "--seed abc: must be of type int"),
        ({"seed": 1.0}, "--seed 1.0: must be of type int"),
        ({"seed": True}, "--seed True: must be of type int"),
        ({"small": 1}, "--small 1: must be of type bool"),
        ({"run_dir": 5}, "--run-dir 5: must be of type str"),
        ({"lr": None}, "--lr None: must be of type float"),
        ({"size": ["base"]}, "--size ['base']: must be one of base, large"),
        ({"size": "huge"}, "--size huge: must be one of base, large"),
    ]:
        with pytest.raises(ArgumentError) as error:
            cli.check_types(Args(**change))
        assert str(error.value) == line


def test_folders_that_make_no_sense_together_or_at_all_are_refused(tmp_path):
    run = str(run_folder(tmp_path / "run"))
    for change, line in [
        ({"resume": run, "evaluate": run}, f"--evaluate {run}: must be without --resume"),
        (
            {"resume": run, "run_dir": "other"},
            "--run-dir other: must be left out: a run goes on in the folder of --resume",
        ),
        ({"run_dir": "n\udce9w"}, "--run-dir n\udce9w: must be a name in UTF-8"),  # what Python makes of Latin-1
    ]:
        with pytest.raises(ArgumentError) as error:
            cli.prepare(Args(**change), "test_cli")
        assert str(error.value) == line
    moved = (tmp_path / "run").rename(tmp_path / "moved")  # whose config.json has the old name
    cli.prepare(cli.parse_args(Args, PRESETS, ["--resume", str(moved)]), "test_cli")


def test_compilation_needs_a_compiler(monkeypatch):
    compiled = dataclasses.make_dataclass("Args", [("compile", bool, True)], bases=(Args,))
    monkeypatch.setenv("CXX", "/nowhere/g++ -O2")
    with pytest.raises(ArgumentError, match=r"--compile: needs a C\+\+ compiler, and there is no /nowhere/g\+\+"):
        cli.prepare(compiled(), "test_cli")
    monkeypatch.setenv("CXX", f"{sys.executable} -O2")
    cli.prepare(compiled(), "test_cli")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ArgumentError, match="--device cuda: this PyTorch sees no CUDA device"):
        cli.prepare(Args(device="cuda"), "test_cli")


# -------------------------------------------------------------------------------------------------------- stored runs


def test_the_config_of_another_script_or_version_is_refused(tmp_path):
    path = run_folder(tmp_path / "run") / "config.json"
    stored = json.loads(path.read_text())
    assert stored["script"] == "test_cli" and stored["format"] == cli.FORMAT and stored["total_steps"] == 100
    for change, message in [
        ({"script": "other"}, r"the run of other\.py, not of test_cli\.py"),
        ({"args": stored["args"] | {"foreign": 1}}, r"\(it has foreign\)"),
        ({"format": None}, r"another version \(format 1; this version reads 2\)"),
        ({"format": 3}, r"another version \(format 3; this version reads 2\)"),
        ({"args": 5}, "no readable run here"),
    ]:
        path.write_text(json.dumps(stored | change))
        with pytest.raises(ArgumentError, match=message):
            cli.stored_args(str(tmp_path / "run"), Args)
    path.write_text("[]")
    with pytest.raises(ArgumentError, match="no readable run here"):
        cli.stored_args(str(tmp_path / "run"), Args)


SOUND = {"script": "script", "format": cli.FORMAT, "record": {}, "agent": {}, "at": {}, "random": {}}
DAMAGES = [
    "partial",
    "kind",
    "missing",
    "empty",
    "truncated",
    "garbage",
    "dots",
    "flipped",
    "foreign",
    "code",
    "list",
    "old",
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("mmap", [False, True])
def test_bad_checkpoints_give_one_line_with_the_file(tmp_path, damage, mmap):
    path, sound = tmp_path / "checkpoint.pt", SOUND | {"x": torch.randn(1000)}
    torch.save(sound, path)
    whole = path.read_bytes()
    assert torch.equal(cli.load_checkpoint(str(tmp_path), "script", mmap)["x"], sound["x"])
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(whole[:200] + bytes(b ^ 0xFF for b in whole[200:300]) + whole[300:])
    elif damage in ("foreign", "list", "code", "old", "partial", "kind"):
        wrong = {"foreign": sound | {"script": "other"}, "list": [1, 2], "code": sound | {"x": os.system}}
        wrong |= {"partial": {k: v for k, v in sound.items() if k != "at"}, "kind": sound | {"agent": [1]}}
        torch.save(wrong.get(damage, sound | {"format": 1}), path)
    else:
        damaged = {"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"hello world" * 50, "dots": b"...."}
        path.write_bytes(damaged[damage])
    words = {"missing": "no checkpoint here", "foreign": r"not a checkpoint of script\.py", "old": "of another version"}
    words |= {"partial": "damaged: it has no at", "kind": "damaged: it has no agent", "list": "not a checkpoint of"}
    message = words.get(damage, r"damaged or not a checkpoint \(\w+\)")
    with pytest.raises(ArgumentError, match=rf"checkpoint\.pt: {message}") as error:
        cli.load_checkpoint(str(tmp_path), "script", mmap)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "abc"}, "--lr abc: must be of type float"),
        ({"seed": 2.5}, "--seed 2.5: must be of type int"),
        ({"size": ["base"]}, r"--size \['base'\]: must be one of"),
        ({"share": 7}, "--share 7: must be at least 0 and at most 1"),
        ({"steps": -1}, "--steps -1: must be at least 1"),
        ({"quiet": "yes"}, "--quiet yes: must be of type bool"),
        ({"run_dir": {}}, "--run-dir {}: must be of type str"),
        ({"lr": None}, "--lr None: must be of type float"),
        ({"checkpoint_every": 1e400}, "--checkpoint-every inf: must be of type int"),
    ],
)
def test_stored_arguments_are_checked_as_typed_ones_are(tmp_path, change, message):
    path = run_folder(tmp_path / "run") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"args": config["args"] | change}))
    for name in ("resume", "evaluate"):
        with pytest.raises(ArgumentError, match=rf"^\S+config\.json: {message}[^\n]*$"):
            cli.prepare(Args(**{name: str(tmp_path / "run")}), "test_cli")
    with pytest.raises(ArgumentError, match=r"config\.json: --"):  # before the parser takes it for a default
        cli.parse_args(Args, PRESETS, ["--resume", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[1, 2]", "5", "null", "", "{", "\x00", '{"a": 1}}']
)
def test_a_text_that_holds_no_json_object_is_a_value_error(text, tmp_path):
    with pytest.raises(ValueError, match=r"."):
        cli.read_json(text)
    (run_folder(tmp_path / "run") / "config.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"run: no readable run here \(config\.json: \w+\)$"):
        cli.stored_args(str(tmp_path / "run"), Args)


@pytest.mark.parametrize("swapped", ["config.json", "checkpoint.pt"])
def test_files_of_two_runs_are_no_run(tmp_path, swapped):
    one, other = run_folder(tmp_path / "one", seed=5), run_folder(tmp_path / "other", seed=6, share=0.5)
    (one / swapped).write_bytes((other / swapped).read_bytes())
    values = "[56] and not [56]"
    with pytest.raises(
        ArgumentError, match=rf"checkpoint\.pt: not of the run of config\.json, which has --seed {values}$"
    ):
        cli.prepare(Args(resume=str(one)), "test_cli")
    with pytest.raises(ArgumentError, match=r"not of the run of config\.json"):
        cli.load_run(str(one), Args, "test_cli")
    cli.release()


def test_what_a_run_shows_may_differ_and_a_played_run_shows_nothing(tmp_path):
    run = str(run_folder(tmp_path / "run", quiet=True))
    cli.prepare(Args(resume=run, quiet=False, checkpoint_every=7), "test_cli")
    cli.release()
    args, _ = cli.load_run(run, Args, "test_cli")
    assert args.quiet and not args.capture_video


@pytest.mark.parametrize("error", [KeyError("actor"), RuntimeError("size\nmismatch"), TypeError("a"), IndexError("b")])
def test_a_policy_that_does_not_fit_is_one_line_with_the_file(error):
    @cli.loader
    def load(run_dir, task=0):
        raise error

    with pytest.raises(ArgumentError, match=rf"^a/checkpoint\.pt: does not fit \({type(error).__name__}: [^\n]+\)$"):
        load("a", task=1)


# ------------------------------------------------------------------------------------------------------------- memory


def built(width: int, rows: int) -> list:
    """A small agent: a hidden layer of two experts, an output, a replay buffer; 4 bytes a number."""
    weight = torch.nn.Parameter(torch.empty(2, 3, width))
    return [torch.nn.Linear(width, 5), weight, torch.zeros(rows, 7)]


@pytest.mark.parametrize(("width", "rows", "batch"), [(6, 100, 10), (50, 1, 1), (1, 1000, 1), (2, 3, 500)])
def test_memory_is_the_sum_of_what_is_asked_for(width, rows, batch, monkeypatch):
    networks = 4 * 4 * (5 * width + 5 + 2 * 3 * width)
    needed = networks + 4 * batch * (5 + 2 * width) + 4 * rows * 7
    monkeypatch.setattr(cli, "available_memory", lambda device: needed)
    torch.manual_seed(0)
    with cli.Memory(torch.device("cpu"), batch):
        layer, _, replay = built(width, rows)
    assert replay.device.type == "cpu" and not replay.any()
    torch.manual_seed(0)
    assert torch.equal(layer.weight, torch.nn.Linear(width, 5).weight), "nothing is drawn for the count"
    monkeypatch.setattr(cli, "available_memory", lambda device: needed - 1)
    message = r"^memory: needs at least .* GB for a batch, .*; \S+ GB are free \(cpu\)$"
    with pytest.raises(ArgumentError, match=message), cli.Memory(torch.device("cpu"), batch):
        built(width, rows)


@pytest.mark.parametrize("sizes", [(10**7, 10**7), (2**40, 2**30), (2**52, 2**52)])
def test_what_no_machine_holds_is_refused_before_it_is_asked_for(sizes):
    for make in (torch.nn.Linear, torch.zeros):
        with pytest.raises(ArgumentError, match=r"^memory: [^\n]+$"), cli.Memory(torch.device("cpu"), 1):
            make(*sizes)


def test_memory_that_cannot_be_measured_is_not_checked(monkeypatch):
    assert cli.available_memory(torch.device("cpu")) > 2**20
    monkeypatch.setattr(cli, "available_memory", lambda device: None)
    with cli.Memory(torch.device("cpu"), 2**50):
        torch.zeros(2, 3)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, mmap):
    path, generator = tmp_path / "checkpoint.pt", np.random.default_rng(0)
    sound = SOUND | {"x": torch.randn(300), "words": ["a"] * 20}
    torch.save(sound, path)
    whole, refused = path.read_bytes(), 0
    for bit in generator.integers(8 * len(whole), size=150):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            loaded = cli.load_checkpoint(str(tmp_path), "script", mmap)
        except ArgumentError:
            refused += 1
        else:
            assert torch.equal(loaded["x"], sound["x"]) and loaded["words"] == sound["words"]
    assert refused > 60, "the rest is padding and dates"


def test_a_folder_belongs_to_one_process(tmp_path):
    run = run_folder(tmp_path / "run")
    code = f"from common.cli import hold; hold({str(run)!r}); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, cwd=Path(__file__).parent.parent) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ArgumentError, match="run: another process is writing this run"):
            cli.prepare(Args(resume=str(run)), "test_cli")
        cli.prepare(Args(evaluate=str(run)), "test_cli")  # reading is free
        with pytest.raises(ArgumentError, match="another process"):
            (run / "checkpoint.pt").unlink()
            run_folder(run)
        other.kill()  # the system gives it back, whatever ends the process
    with pytest.raises(ArgumentError, match=r"checkpoint\.pt: no checkpoint here"):
        cli.prepare(Args(resume=str(run)), "test_cli")
    cli.release()


def test_load_run_gives_arguments_and_weights(tmp_path):
    args, checkpoint = cli.load_run(str(run_folder(tmp_path / "run", seed=3)), Args, "test_cli")
    assert args.seed == 3 and checkpoint["agent"]["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArgumentError("bad"), 2),
        (NotFiniteError("nan"), 1),
        (Interrupted(2, "stopped"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_and_one_line(monkeypatch, capsys, error, code):
    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as leaving:
        cli.run(main, Args)
    assert leaving.value.code == code
    assert capsys.readouterr().err.count("\n") == (not isinstance(error, KeyboardInterrupt))
