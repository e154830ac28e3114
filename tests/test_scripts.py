"""What holds for all five scripts: the README's commands, videos where nothing can draw, resuming on another device."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

import mst_rigl
import nbsp
import neuroplastic_expansion
import sparse_mtrl_gmp_set
import ssde
from common.recorder import ArgumentError, parse_args, refuse_contradictions

README = Path(__file__).parent.parent / "README.md"
SCRIPTS = {script.__name__: script for script in (ssde, nbsp, neuroplastic_expansion, mst_rigl, sparse_mtrl_gmp_set)}


def readme_commands(tmp_path: Path) -> list[list[str]]:
    """The words of every call of python in the README's code, loops and variables expanded by a shell."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    shell = "python() { local IFS=$'\\t'; echo \"$*\"; }\n" + "\n".join(blocks)
    run = subprocess.run(["/bin/bash", "-ec", shell], capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""})
    assert run.returncode == 0 and not run.stderr, run.stderr
    return [line.split("\t") for line in run.stdout.splitlines()]


def checked(script, words: list[str]):
    """The arguments as `main` checks them before it builds anything."""
    presets = script.PRESETS if script is mst_rigl else {"quick": script.QUICK}
    args = parse_args(script.Args, presets, words)
    args = script.fill_in(args) if script is mst_rigl else args
    script.check_args(args)
    return args


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_the_readme_are_accepted(name, tmp_path):
    commands = [words[1:] for words in readme_commands(tmp_path) if words[0] == f"{name}.py"]
    assert len(commands) > 10
    for words in commands:
        if words[0] == "--resume":  # of a run that is not here
            assert len(words) == 2
            continue
        checked(SCRIPTS[name], words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_video_is_refused_where_nothing_can_draw(name, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert checked(SCRIPTS[name], ["--capture-video"]).capture_video
    monkeypatch.setenv("MUJOCO_GL", "disable")
    assert not checked(SCRIPTS[name], []).capture_video
    with pytest.raises(ArgumentError, match="--capture-video True: must be off"):
        checked(SCRIPTS[name], ["--capture-video"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_may_go_on_on_another_device(name):
    args = SCRIPTS[name].Args
    refuse_contradictions(args(device="cpu"), dataclasses.asdict(args(device="cuda")))
    with pytest.raises(ArgumentError, match="--seed 2: contradicts the resumed run, which has 3"):
        refuse_contradictions(args(seed=2), dataclasses.asdict(args(seed=3)))
