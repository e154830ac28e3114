"""What holds for all five scripts: the commands of README and pages, their shape, their vocabulary."""

import ast
import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import mtppo_minigrid
import numpy as np
import pytest

import mst_rigl
import nbsp
import neuroplastic_expansion
import sparse_mtrl_gmp_set
import ssde
from common import cli, plot, sweep
from common.cli import ArgumentError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "tests/benchmarks/results").glob("*.md"))]
SCRIPTS = {script.__name__: script for script in (ssde, nbsp, neuroplastic_expansion, mst_rigl, sparse_mtrl_gmp_set)}


class Accepted(Exception):
    """The arguments passed every check."""


def commands(page: Path, tmp_path: Path) -> list[list[str]]:
    """The words of every call of python in a page's code, loops and variables expanded by a shell."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    shell = "python() { local IFS=$'\\t'; echo \"$*\"; }\n" + "\n".join(blocks)
    run = subprocess.run(["/bin/bash", "-ec", shell], capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""})
    assert run.returncode == 0 and not run.stderr, f"{page.name}: {run.stderr}"
    return [line.split("\t") for line in run.stdout.splitlines()]


def accepts(script, words: list[str], monkeypatch) -> None:
    """The command passes the checks that `main` makes before it builds anything."""

    def build(*args, **kwargs):
        raise Accepted

    monkeypatch.setattr(script, "Agent", build)
    monkeypatch.setattr(script, "env_sizes", lambda *args: (39, 4))
    monkeypatch.setattr(cli, "available_memory", lambda device: None)  # a page may name a larger machine
    with pytest.raises(Accepted):
        script.main(cli.parse_args(script.Args, script.PRESETS, words))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_readme_and_pages_are_accepted(name, tmp_path, monkeypatch):
    found = [words[1:] for page in PAGES for words in commands(page, tmp_path) if words[0] == f"{name}.py"]
    assert len(found) > 10
    for words in found:
        if {"--resume", "--evaluate", "--reference"} & set(words):  # of a run that is not here
            known = {cli.flag(field.name) for field in dataclasses.fields(SCRIPTS[name].Args)}
            assert {word for word in words if word.startswith("--")} <= known
        else:
            accepts(SCRIPTS[name], words, monkeypatch)


def test_the_sweeps_plots_and_transplants_of_readme_and_pages_are_accepted(tmp_path, monkeypatch):
    transplant, runs, plots = "tests/transplants/mtppo_minigrid.py", [], 0
    for words in (words for page in PAGES for words in commands(page, tmp_path)):
        if words[:2] == ["-m", "common.sweep"]:
            args = cli.parse_args(sweep.Args, {}, words[2:])
            runs += sweep.plan(list(args.commands), args.seeds).values()
        elif words[:2] == ["-m", "common.plot"]:
            cli.parse_args(plot.Args, {}, words[2:])
            plots += 1
        elif words[0] == transplant:
            runs.append(words)
    assert plots > 10 and {"nbsp.py", transplant} <= {script for script, *_ in runs}
    for script, *words in runs:
        if script == transplant:
            mtppo_minigrid.parse_args(words)
        else:
            accepts(SCRIPTS[script.removesuffix(".py")], words, monkeypatch)


def test_every_file_that_a_page_names_is_there():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_may_go_on_on_another_device(name):
    args = SCRIPTS[name].Args
    cli.refuse_contradictions(args(device="cpu"), dataclasses.asdict(args(device="cuda")))
    with pytest.raises(ArgumentError, match="--seed 2: contradicts the stored run, which has 3"):
        cli.refuse_contradictions(args(seed=2), dataclasses.asdict(args(seed=3)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_has_a_line_of_help_and_a_default(name):
    helps, headings = cli.comments(SCRIPTS[name].Args)
    assert all(helps.values()) and len(headings) >= 3
    SCRIPTS[name].Args()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_libraries_and_common_only_and_main_is_one_screen_and_a_half(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert not modules & set(SCRIPTS)
    [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert main.end_lineno - main.lineno < 100


def test_flags_of_one_name_have_one_meaning_and_old_dialects_are_gone():
    replaced = {"task_cycle", "width", "depth", "policy_noise", "topology_end", "prune_end", "dormant_tau", "sparsify"}
    for name, script in SCRIPTS.items():
        fields = {field.name for field in dataclasses.fields(script.Args)}
        assert not fields & replaced and not {field for field in fields if field.endswith("_interval")}, name
        assert {"seed", "resume", "evaluate", "episodes", "run_dir", "device", "quick", "capture_video"} <= fields, name


LARGE = {  # what each script refuses before it makes a folder: more than a machine holds, or can build in seconds
    "ssde": [
        "--hidden-dim 300000",
        "--method finetune --critic-hidden-dim 300000",
        "--batch-size 9000000000",
        "--hidden-layers 101",
    ],
    "nbsp": ["--hidden-dim 300000", "--previous-buffer-size 90000000000", "--cycles 1000000000000"],
    "neuroplastic_expansion": [
        "--env-id Hopper-v5 --hidden-dim 300000",
        "--env-id Hopper-v5 --buffer-size 90000000000 --steps-per-task 90000000000",
        "--env-id Hopper-v5 --batch-size 9000000000000",
        "--task-seq Hopper-v5 --cycles 1001",
    ],
    "mst_rigl": [f"--env-id Hopper-v5 {words}" for words in ("--width-scale 9e9", "--buffer-size 90000000000")]
    + ["--depth-scale 1000000000000", "--env-id Hopper-v5 --batch-size 9000000000000"],
    "sparse_mtrl_gmp_set": ["--hidden-dim 300000", "--arch moe --experts 9000000000", "--batch-per-task 9000000000"],
}


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, cases in LARGE.items() for words in cases])
def test_what_is_too_large_is_one_line_and_leaves_no_folder(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words.split(), "--run-dir", str(tmp_path / "run")])
    monkeypatch.setattr(cli, "available_memory", lambda device: 256 * 2**30)  # of a large machine
    with pytest.raises(SystemExit) as leaving:
        cli.run(SCRIPTS[name].main, SCRIPTS[name].Args, SCRIPTS[name].PRESETS)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and out == "" and not (tmp_path / "run").exists()
    assert re.fullmatch(r"error: (memory: [^\n]+|--\S+ \d+: must be at least 1 and at most \d+)\n", err), err


@pytest.mark.parametrize("name", ["neuroplastic_expansion", "mst_rigl"])
def test_environment_arguments_and_step_limit_hold_in_training_and_evaluation(name, tmp_path, monkeypatch):
    script, made, true_make = SCRIPTS[name], [], gym.make

    def make(env_id, **options):
        made.append((options["max_episode_steps"], options.get("reset_noise_scale")))
        return true_make(env_id, **options)

    monkeypatch.setattr(gym, "make", make)
    tiny = {"learning_starts": 60, "eval_every": 60, "eval_episodes": 1, "batch_size": 4, "quiet": True}
    tiny |= {"hidden_dim": 8, "steps_per_task": 90} if name == "neuroplastic_expansion" else {"total_steps": 90}
    tiny |= {} if name == "neuroplastic_expansion" else {"width_scale": 1 / 64, "target_update_every": 2}
    tiny |= {"method": "td3"} if name == "neuroplastic_expansion" else {"preset": "mrq"}
    tiny |= {"env_id": " inverteddoublependulum-V5", "max_episode_steps": 9, "env_kwargs": '{"reset_noise_scale": 0}'}
    run_dir = str(tmp_path / "run")
    script.main(script.Args(**tiny, run_dir=run_dir))
    with open(tmp_path / "run/evaluations.csv", newline="") as file:
        lengths = {float(row["episode_length"]) for row in csv.DictReader(file)}
    trained = len(made)
    assert trained == 4 and max(lengths) <= 9  # sizes, training, two evaluations
    policy = script.load_policy(run_dir)
    assert policy(np.zeros(9)).shape == (1,)
    script.main(script.Args(evaluate=run_dir, episodes=1, quiet=True))
    script.main(script.Args(resume=run_dir, quiet=True))
    assert len(made) > trained + 1 and set(made) == {(9, 0)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_presets_name_fields(name):
    fields = {field.name for field in dataclasses.fields(SCRIPTS[name].Args)}
    assert all(set(values) <= fields for values in SCRIPTS[name].PRESETS.values())
    assert "quick" in SCRIPTS[name].PRESETS


def test_the_benchmarks_memory_is_that_of_a_process_of_its_own():
    """The greatest size that `getrusage` tells is at least that of the process which started it."""
    ballast = np.ones(110_000_000)  # 0.9 GB
    line = [sys.executable, "tests/benchmarks/update_speed.py", "--scripts", "neuroplastic_expansion"]
    line += ["--memory-of", "neuroplastic_expansion:TD3"]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 200 < float(shown) < ballast.nbytes / 1e6 - 200
