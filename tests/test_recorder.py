"""A run's record: folder, files, checkpoints that are always whole, resume, signals, progress, pictures."""

import csv
import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from common import cli
from common import recorder as rec
from common.cli import ArgumentError, Interrupted, NotFiniteError, RunError, load_checkpoint
from common.recorder import Progress, Recorder, duration

CPU, ROOT = torch.device("cpu"), Path(__file__).parent.parent


@dataclass
class Args:
    seed: int = 1
    run_dir: str | None = None
    resume: str | None = None
    evaluate: str | None = None
    eval_every: int = 10
    eval_episodes: int = 2
    checkpoint_every: int = 25
    capture_video: bool = False
    quiet: bool = True
    track: bool = False
    wandb_project: str = "p"


@dataclass
class Nothing:
    pass


class Agent:
    """All kinds of things that a checkpoint holds."""

    STATE = ("network", "log_alpha", "optimizer", "tensors", "generator", "inner", "count", "words")

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.network, self.log_alpha = nn.Linear(3, 2), torch.randn((), requires_grad=True)
        self.optimizer = torch.optim.Adam([*self.network.parameters(), self.log_alpha], fused=True)
        self.tensors = {"masks": [torch.rand(2) < 0.5, torch.rand(3)], "scores": {0: {"actor": [torch.rand(2)]}}}
        self.generator, self.inner = torch.Generator().manual_seed(seed), None
        self.count, self.words = seed, ["word"] * seed

    def learn(self) -> None:
        (self.network(torch.rand(4, 3)).sum() + self.log_alpha).backward()
        self.optimizer.step()
        self.count += 1


class Task(gym.Env):
    """Three steps of reward 1; success where it is told to."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, success: bool | None = True):
        self.success = success

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        info = {} if self.success is None else {"success": float(self.success)}
        return np.zeros(2, np.float32), 1.0, False, self.steps == 3, info


@pytest.fixture(autouse=True)
def closed_afterwards():
    """What a test leaves open would give its handlers of signals to the next one."""
    yield
    while rec.OPEN:
        rec.OPEN.pop().close()


def new_recorder(run_dir, checkpoint=None, phases=((100, 10),), **changes) -> Recorder:
    return Recorder(Args(run_dir=str(run_dir), **changes), "script", "name", ["a", "b"], list(phases), checkpoint)


def evaluate(recorder: Recorder, step: int, indices=(0,), success=True) -> bool:
    def make(task, *, seed, render_mode):
        return Task(success)

    return recorder.evaluate(step, 0, indices, lambda index: lambda obs: np.zeros(1), make, stream=2)


def read_csv(run_dir) -> list[dict]:
    with open(run_dir / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_events(run_dir) -> EventAccumulator:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events


# ---------------------------------------------------------------------------------------------------------- the files


def test_a_run_leaves_every_file(tmp_path):
    run_dir = tmp_path / "run"
    recorder = new_recorder(run_dir)
    recorder.begin(Agent(1), {}, None, {"policy": 3})
    for step in (10, 20):
        recorder.log(step, {"plasticity/actor/dormant_ratio_0.025": torch.tensor(0.25), "method/score": torch.rand(5)})
        recorder.log(step, {"sparsity/critic/density": 0.5, "sparsity/critic/layer1": 0.5})
        recorder.losses(step, {"q": torch.tensor(1.0)})
        recorder.episode(step, "a", True, 7.0, 10, success=1.0)
        assert evaluate(recorder, step, indices=(0, 1) if step == 20 else (0,))
    results = recorder.finish(20, {"final_success": 0.75}, {"policy": 3})
    assert results.pop("run_dir") == str(run_dir)
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results["tasks"][1] == {"index": 1, "name": "b", "final_return": 3.0, "final_success": 1.0}
    assert {"script", "seed", "global_step", "wall_seconds", "steps_per_second", "metrics", "parameters"} < set(results)
    rows = read_csv(run_dir)
    assert [(row["global_step"], row["task"], row["episode_length"]) for row in rows] == [
        *(("10", "a", "3.0"), ("20", "a", "3.0"), ("20", "b", "3.0"))
    ]
    assert list(rows[0]) == [
        *("global_step", "phase", "task_index", "task", "episodes", "episode_return", "success", "episode_length")
    ]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["eval_every"] == 10 and "torch" in config["versions"] and "git_commit" in config
    assert config["script"] == "script" and config["format"] == 2 and config["total_steps"] == 100
    assert (run_dir / "summary.png").read_bytes().startswith(b"\x89PNG")
    curve = [[10, 0.25], [20, 0.25]]
    assert recorder.curves == {"dormant_ratio_0.025": {"actor": curve}, "density": {"critic": [[10, 0.5], [20, 0.5]]}}
    events = read_events(run_dir)
    assert [e.value for e in events.Scalars("eval/success/a")] == [1.0, 1.0]
    assert [e.step for e in events.Scalars("losses/q")] == [10, 20]
    assert [e.value for e in events.Scalars("charts/episodic_length")] == [10, 10]
    assert {"charts/episodic_return", "charts/episodic_success", "charts/SPS"} <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["method/score"]
    assert not list(run_dir.glob("*.tmp"))


def test_an_environment_without_success_leaves_the_column_empty(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    evaluate(recorder, 10, success=None)
    results = recorder.finish(10, {}, {})
    assert read_csv(tmp_path / "run")[0]["success"] == "" and results["tasks"][0]["final_success"] is None
    assert "eval/success/a" not in read_events(tmp_path / "run").Tags()["scalars"]


def test_an_episode_that_the_phase_cut_short_is_not_logged(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.episode(5, "a", False, 7.0, 5)
    recorder.episode(8, "a", True, 9.0, 3)
    recorder.close()
    assert [(e.step, e.value) for e in read_events(tmp_path / "run").Scalars("charts/episodic_return")] == [(8, 9.0)]


def test_a_folder_that_holds_a_run_is_refused_and_resume_is_named(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.close()
    new_recorder(tmp_path / "run").close()  # killed before its first checkpoint: there is nothing to go on from
    recorder.save(0, Agent(1), {})
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


def test_names_are_unique_and_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label = ",".join(["button-press-topdown-wall-v3", "dmc/dog-run"] * 20)
    runs = [Recorder(Args(seed=2**32 - 1), "neuroplastic_expansion", label, ["a"], [(9, 0)], None) for _ in range(5)]
    for recorder in runs:
        recorder.close()
    names = {recorder.run_dir.name for recorder in runs}
    assert len(names) == 5 and all(len(name) < 100 and re.fullmatch(r"[\w.+-]+", name) for name in names)


class Wandb:
    """Stands in for Weights & Biases."""

    def __init__(self, logged_in=True):
        self.logged_in, self.calls, self.id = logged_in, [], "own-id"

    def login(self, prompt):
        assert not prompt, "nobody may be there to answer"
        return self.logged_in

    def init(self, **options):
        self.calls.append(options)
        self.id = options.get("id", self.id)
        return self

    def finish(self):
        self.calls.append("finish")


def test_wandb_is_needed_only_with_track_and_so_is_a_login(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for module, message in ((None, "pip install wandb"), (Wandb(logged_in=False), "no login: run `wandb login`")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(ArgumentError, match=message):
            new_recorder(tmp_path / "run", track=True)
        assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    new_recorder(tmp_path / "run", track=True).close()


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_each_is_finished(tmp_path, monkeypatch):
    run_dir, first, second = tmp_path / "run", Wandb(), Wandb()
    monkeypatch.setitem(sys.modules, "wandb", first)
    recorder = new_recorder(run_dir, track=True)
    recorder.save(5, Agent(1), {})
    recorder.close()
    monkeypatch.setitem(sys.modules, "wandb", second)
    new_recorder(run_dir, load_checkpoint(str(run_dir), "script"), resume=str(run_dir), track=True).close()
    assert "id" not in first.calls[0] and first.calls[1:] == ["finish"] == second.calls[1:]
    assert (second.calls[0]["id"], second.calls[0]["resume"]) == ("own-id", "allow")
    assert second.calls[0]["sync_tensorboard"] and second.calls[0]["name"] == "run"


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_state_goes_through_a_file_and_back_in_place(tmp_path):
    first, second = Agent(1), Agent(2)
    first.inner, second.inner = Agent(3), Agent(4)
    for agent in (first, first.inner, second):
        agent.learn()
    torch.save(rec.state_of(first), tmp_path / "file")
    held = {name: id(getattr(second, name)) for name in ("network", "log_alpha", "optimizer", "inner")}
    second.tensors["scores"] = {}  # made anew: the checkpoint has keys that a new agent lacks
    rec.restored(second, torch.load(tmp_path / "file", weights_only=True), CPU)
    assert held == {name: id(getattr(second, name)) for name in held}
    for one, other in ((first, second), (first.inner, second.inner)):
        one.learn()
        torch.manual_seed(0)
        one.learn()
        other.learn()
        torch.manual_seed(0)
        other.learn()
    for one, other in ((first, second), (first.inner, second.inner)):
        assert one.count == other.count and one.words == other.words
        assert torch.equal(one.tensors["masks"][0], other.tensors["masks"][0])
        assert torch.equal(one.tensors["scores"][0]["actor"][0], other.tensors["scores"][0]["actor"][0])
        assert torch.rand(1, generator=one.generator) == torch.rand(1, generator=other.generator)
    pairs = list(rec.weights_of(first.network)), list(rec.weights_of(second.network))
    assert len(pairs[0]) == 2 and [name for name, _ in pairs[0]] == [".weight", ".bias"]


def test_what_a_learned_agent_does_next_is_the_same_after_a_checkpoint(tmp_path):
    first, second = Agent(1), Agent(2)
    first.learn()
    torch.save(rec.state_of(first), tmp_path / "file")
    rec.restored(second, torch.load(tmp_path / "file", weights_only=True), CPU)
    for agent in (first, second):
        torch.manual_seed(0)
        agent.optimizer.zero_grad()
        agent.learn()
    assert torch.equal(first.network.weight, second.network.weight) and torch.equal(first.log_alpha, second.log_alpha)


def changed(state: dict, path: tuple, value) -> dict:
    """`state` with another value at the end of the path; `del`: without it."""
    place = state
    for key in path[:-1]:
        place = place[key]
    if value == "del":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("network", "weight"), torch.zeros(2, 4), r"state\.network: RuntimeError: .*size mismatch for weight"),
        (("network", "weight"), "del", r"state\.network: RuntimeError: .*Missing key.*weight"),
        (("network",), [1], r"state\.network: TypeError"),
        (("log_alpha",), torch.zeros(2), r"state\.log_alpha: ValueError: \(2,\) torch.float32 instead of \(\)"),
        (("log_alpha",), torch.zeros((), dtype=torch.int64), r"state\.log_alpha: ValueError: \(\) torch.int64"),
        (("log_alpha",), 0.5, r"state\.log_alpha: float instead of Tensor"),
        (("tensors", "masks", 1), torch.zeros(4), r"state\.tensors\.masks\.1: ValueError: \(4,\)"),
        (("tensors", "masks"), {}, r"state\.tensors\.masks: dict instead of list"),
        (("tensors", "scores"), "del", r"state\.tensors: has no scores"),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3), r"state\.optimizer: ValueError: exp_avg \(3,\) of a"),
        (("optimizer", "param_groups"), [], r"state\.optimizer: ValueError"),
        (("optimizer", "state"), "del", r"state\.optimizer: has no state"),
        (("generator",), torch.zeros(3), r"state\.generator: \w+Error"),
        (("count",), "many", r"state\.count: str instead of int"),
        (("words",), None, r"state\.words: NoneType instead of list"),
        (("inner",), "del", r"state: KeyError: 'inner'"),
    ],
)
def test_a_state_that_does_not_fit_names_the_place(path, value, message):
    agent = Agent(1)
    agent.learn()
    with pytest.raises(rec.StateError, match=rf"^{message}[^\n]*$"):
        rec.restored(Agent(2), changed(rec.state_of(agent), path, value), CPU)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("agent", "log_alpha"), torch.zeros(2), r"does not fit: state\.log_alpha"),
        (("record", "rows", 0, "task"), "del", r"does not fit: record\.rows: has no task"),
        (("record", "rows"), [5], r"does not fit: record\.rows: "),
        (("record", "curves"), [], r"does not fit: record\.curves: list instead of dict"),
        (("record", "seconds"), "long", r"does not fit: record\.seconds: str"),
        (("record", "events"), "del", r"does not fit: record: has no events"),
        (("random", "cpu"), torch.zeros(5, dtype=torch.uint8), r"does not fit: random: "),
        (("random", "cuda"), "del", r"does not fit: random: "),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_with_the_file(path, value, message, tmp_path):
    run_dir = tmp_path / "run"
    recorder = new_recorder(run_dir)
    evaluate(recorder, 10)
    recorder.save(10, Agent(1), {"step": 10})
    recorder.close()
    checkpoint = changed(load_checkpoint(str(run_dir), "script"), path, value)

    @rec.recorded
    def main(args):
        agent = rec.restored(Agent(2), checkpoint["agent"], CPU)
        new_recorder(run_dir, checkpoint, resume=args.resume).begin(agent, {}, checkpoint, {})

    with pytest.raises(ArgumentError, match=rf"^{re.escape(str(run_dir))}/checkpoint\.pt: {message}[^\n]*$"):
        main(Args(resume=str(run_dir)))
    assert rec.OPEN == [] and cli.HELD == []


RESULTS_DAMAGE = {
    "not json": b"{'a'",
    "no text": b"\xff\xfe{}",
    "brackets": b"[" * 100_000,
    "a list": b"[]",
    "another script": {"script": "other"},
    "another seed": {"seed": 2},
    "a number": {"metrics": 5},
    "no tasks": {"tasks": None},
    "a task without a return": {"tasks": [{"index": 0, "name": "a", "final_success": None}]},
    "a success in words": {"tasks": [{"index": 0, "name": "a", "final_return": 1.0, "final_success": "yes"}]},
    "a task that is none": {"tasks": ["a"]},
}


@pytest.mark.parametrize("damage", RESULTS_DAMAGE)
def test_results_that_are_damaged_are_one_line(damage, tmp_path):
    run_dir, agent = tmp_path / "run", Agent(1)
    recorder = new_recorder(run_dir)
    evaluate(recorder, 10)
    recorder.save(10, agent, {"step": 10})
    results, path = recorder.finish(10, {"score": 0.5}, {}), run_dir / "results.json"
    new = RESULTS_DAMAGE[damage]
    path.write_bytes(new if isinstance(new, bytes) else json.dumps(json.loads(path.read_text()) | new).encode())
    with pytest.raises(ArgumentError, match=r"results\.json: damaged, or not of this run \([^\n]+--resume without"):
        new_recorder(run_dir, load_checkpoint(str(run_dir), "script"), resume=str(run_dir))
    cli.release()
    path.unlink()  # as the line says
    again = new_recorder(run_dir, load_checkpoint(str(run_dir), "script"), resume=str(run_dir))
    assert again.finish(10, {"score": 0.5}, {})["tasks"] == results["tasks"] and path.is_file()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    run_dir, agent = tmp_path / "run", Agent(1)
    first = new_recorder(run_dir)
    first.begin(agent, {"step": 0}, None, {})
    evaluate(first, 10)
    first.losses(10, {"q": torch.tensor(1.0)})
    first.save(10, agent, {"step": 10})
    drawn = torch.rand(3)
    evaluate(first, 20)
    first.losses(20, {"q": torch.tensor(2.0)})
    first.close()
    checkpoint = load_checkpoint(str(run_dir), "script")
    second = new_recorder(run_dir, checkpoint, resume=str(run_dir))
    second.begin(agent, checkpoint["at"], checkpoint, {})
    assert [row["global_step"] for row in read_csv(run_dir)] == ["10"] and checkpoint["at"] == {"step": 10}
    assert second.seconds >= checkpoint["record"]["seconds"]
    assert torch.equal(torch.rand(3), drawn), "random numbers go on where they were"
    second.losses(20, {"q": torch.tensor(3.0)})
    second.close()
    assert [(e.step, e.value) for e in read_events(run_dir).Scalars("losses/q")] == [(10, 1.0), (20, 3.0)]


def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    recorder, agent = new_recorder(tmp_path / "run"), Agent(1)
    recorder.save(10, agent, {})

    def dies(state, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        recorder.save(20, agent, {})
    recorder.close()
    checkpoint = load_checkpoint(str(tmp_path / "run"), "script")
    assert checkpoint["record"]["global_step"] == 10 and checkpoint["agent"]["count"] == 1


def test_a_checkpoint_is_due_by_steps_or_by_a_signal(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.save(0, Agent(1), {})
    assert [step for step in range(60) if recorder.checkpoint_due(step)] == list(range(25, 60))
    recorder.save(30, Agent(1), {})
    assert not recorder.checkpoint_due(54) and recorder.checkpoint_due(55)
    recorder.args.checkpoint_every = 0
    assert not recorder.checkpoint_due(10**6)
    recorder.stop_signal = signal.SIGTERM
    assert recorder.checkpoint_due(31)
    recorder.close()


def test_a_value_that_is_not_finite_names_itself_the_step_and_the_last_good_checkpoint(tmp_path):
    recorder, agent = new_recorder(tmp_path / "run"), Agent(1)
    recorder.require_finite("loss", torch.ones(3), 5)
    recorder.require_finite("action", np.zeros(2), 5)
    recorder.save(5, agent, {})
    with pytest.raises(NotFiniteError, match=r"^loss is not finite at step 7$"):
        recorder.require_finite("loss", torch.tensor([0.0, float("inf")]), 7)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    agent.learn()
    moment = agent.optimizer.state[agent.network.bias]["exp_avg_sq"]
    everything = [(agent.network.bias, r"network\.bias"), (agent.log_alpha, "log_alpha")]
    everything += [
        (moment, r"optimizer\.state\.1\.exp_avg_sq"),
        (agent.tensors["scores"][0]["actor"][0], "scores.0.actor.0"),
    ]
    for tensor, name in everything:
        before_it = tensor.detach().clone()
        tensor.data.view(-1)[-1] = float("nan")
        with pytest.raises(NotFiniteError, match=f"{name} is not finite at step 8"):
            recorder.save(8, agent, {})
        tensor.data.copy_(before_it)
    recorder.close()
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


# --------------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_is_due_at_multiples_of_a_phase_and_at_its_end(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    due = []
    for start, steps in ((0, 35), (35, 12)):
        for step in [*range(0, steps, 4), steps]:
            if recorder.evaluation_due(start + step, start, ended=step == steps):
                due.append((start, step))
                recorder.rows.append({"global_step": start + step})
    assert due == [(0, 12), (0, 20), (0, 32), (0, 35), (35, 12)]
    recorder.close()


def test_an_evaluation_that_a_signal_cuts_short_records_nothing(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.stop_signal = signal.SIGTERM
    assert not evaluate(recorder, 10) and recorder.rows == [] and read_csv(tmp_path / "run") == []
    recorder.close()


def test_videos_are_of_each_tasks_first_episode_in_a_folder_of_their_own(tmp_path, monkeypatch, capsys):
    filmed, modes = [], []
    monkeypatch.setattr(rec, "record_video", lambda env, folder: filmed.append(folder) or env)
    monkeypatch.setattr(rec, "check_drawing", lambda *_: None)

    def make(task, *, seed, render_mode):
        modes.append(render_mode)
        return Task()

    def policy_of(index):
        return lambda obs: np.zeros(1)

    for capture_video in (True, False):
        recorder = new_recorder(tmp_path / f"{capture_video}", capture_video=capture_video)
        recorder.evaluate(10, 0, (0, 1), policy_of, make, stream=2)
    args = Args(capture_video=True)
    args.evaluate, args.episodes = str(tmp_path / "stored"), 1
    rec.evaluate_stored(args, ["dmc/a"], [0], policy_of, make, 2)
    videos = [tmp_path / "True" / "videos" / "step-10" / name for name in ("0-a", "1-b")]
    assert filmed == [*videos, tmp_path / "stored" / "videos" / "evaluate" / "0-dmc-a"]
    assert modes == ["rgb_array"] * 2 + [None] * 2 + ["rgb_array"]


def test_a_task_that_comes_twice_starts_alike_and_has_curves_of_its_own(tmp_path):
    recorder = Recorder(Args(run_dir=str(tmp_path / "run")), "script", "name", ["a", "b", "a"], [(100, 0)], None)
    seeds = []

    class Seeded(Task):
        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            return super().reset()

    recorder.evaluate(10, 0, range(3), lambda index: lambda obs: np.zeros(1), lambda task, **_: Seeded(), stream=2)
    recorder.close()
    assert seeds[:2] == seeds[4:] and len(set(seeds)) == 4
    assert {"eval/success/0-a", "eval/success/b", "eval/success/2-a"} <= set(
        read_events(tmp_path / "run").Tags()["scalars"]
    )


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("signum", rec.SIGNALS)
def test_a_signal_asks_to_stop_and_the_second_is_not_held_back(tmp_path, signum):
    handlers = {s: signal.getsignal(s) for s in rec.SIGNALS}
    run_dir = tmp_path / "a run"
    recorder = new_recorder(run_dir, resume=None)
    assert not recorder.stopped
    recorder.leave()
    os.kill(os.getpid(), signum)
    assert recorder.stopped
    for again in (signal.SIGHUP, signal.SIGUSR1):  # a terminal that closes sends two
        os.kill(os.getpid(), again)
    assert all(signal.getsignal(s) == handlers[s] for s in (signal.SIGINT, signal.SIGTERM)), "they end at once"
    with pytest.raises(Interrupted) as interrupt:
        recorder.leave()
    assert interrupt.value.exit_code == 128 + signum
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    command = str(interrupt.value).partition("go on with: ")[2]
    assert shlex.split(command) == ["python", "script.py", "--resume", str(run_dir)], "it can be pasted"


def test_a_signal_is_obeyed_where_nobody_reads_what_it_prints(tmp_path):
    """`2>&1 | tee log`, whose tee ends by the same Ctrl-C."""
    code = script_of(f"""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    recorder = t.new_recorder({str(tmp_path / "run")!r}, quiet=False)
    os.kill(os.getpid(), signal.SIGINT)
    recorder.save(5, t.Agent(1), {{}})
    recorder.leave()
""")
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=writer, preexec_fn=default_sigint)
    os.close(writer)
    assert run.returncode == 130
    assert load_checkpoint(str(tmp_path / "run"), "script")["record"]["global_step"] == 5


def script_of(body: str) -> str:
    """A script whose `main`, as those of the five, is recorded and run by the command line; `t` is this file."""
    return f"""
import os, resource, signal, sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_recorder as t

@t.rec.recorded
def main(args):{body}

t.cli.run(main, t.Nothing)
"""


def default_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_signal_does_not_wait_for_an_endless_episode(tmp_path, monkeypatch):
    monkeypatch.setattr(rec, "PATIENCE", 0.2)
    handlers = {s: signal.getsignal(s) for s in (*rec.SIGNALS, signal.SIGALRM)}
    recorder = new_recorder(tmp_path / "run")
    recorder.save(5, Agent(1), {})
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(
        Interrupted, match=r"^interrupted within an episode, step 5 is saved; go on with: python"
    ) as raised:
        time.sleep(10)
    assert raised.value.exit_code == 128 + signal.SIGTERM
    assert {s: signal.getsignal(s) for s in handlers} == handlers


def test_a_signal_that_was_obeyed_waits_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(rec, "PATIENCE", 0.2)
    recorder = new_recorder(tmp_path / "run")
    os.kill(os.getpid(), signal.SIGTERM)
    recorder.save(5, Agent(1), {})
    time.sleep(0.5)
    with pytest.raises(Interrupted, match=r"^interrupted; go on with"):
        recorder.leave()
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_sighup_stays_ignored_where_it_was(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    recorder = new_recorder(tmp_path / "run")
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    recorder.close()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device"),
            r"^No space left on device: \S*run; last good checkpoint: \S*run/checkpoint.pt, of",
        ),
        (OSError("ffmpeg failed"), r"^OSError: ffmpeg failed: \S*run; last good checkpoint: \S*run/checkpoint.pt, of"),
        (
            NotFiniteError("loss is not finite at step 7"),
            r"^loss is not finite at step 7; last good checkpoint: .*, of step 5; go on",
        ),
        (ZeroDivisionError("a fault"), "^a fault$"),
    ],
)
def test_whatever_ends_main_signals_and_folder_are_given_back(tmp_path, error, message):
    handlers, hook = {s: signal.getsignal(s) for s in rec.SIGNALS}, threading.excepthook

    @rec.recorded
    def main(args):
        recorder = new_recorder(tmp_path / "run")
        recorder.save(5, Agent(1), {})
        assert {s: signal.getsignal(s) for s in handlers} != handlers
        raise error

    expected = RunError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match=message) as raised:
        main(None)
    assert "\n" not in str(raised.value)
    assert {s: signal.getsignal(s) for s in handlers} == handlers and threading.excepthook is hook
    assert rec.OPEN == [] and cli.HELD == []


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_file(tmp_path):
    code = script_of(f"""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    recorder, agent = t.new_recorder({str(tmp_path / "run")!r}), t.Agent(1)
    recorder.save(5, agent, {{}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a disk that is full: errno in place of a write
    agent.tensors["masks"][1] = torch.zeros(1_000_000)
    recorder.losses(6, {{"q": torch.tensor(1.0)}})
    recorder.save(6, agent, {{}})
""")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert re.match(r"stopped: .*; last good checkpoint: .*checkpoint\.pt, of step 5; go on with: python", run.stderr)
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert load_checkpoint(str(tmp_path / "run"), "script")["record"]["global_step"] == 5


@pytest.mark.parametrize("begun", [False, True])
def test_a_disk_that_is_full_before_the_first_checkpoint_is_one_line(tmp_path, monkeypatch, begun):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    @rec.recorded
    def main(args):
        recorder = new_recorder(tmp_path / "run")
        recorder.begin(Agent(1), {}, None, {})

    monkeypatch.setattr(rec.torch if begun else rec.Recorder, "save" if begun else "_write_rows", full)
    with pytest.raises(RunError, match=r"^No space left on device: .*; there is no checkpoint yet$"):
        main(Args())
    assert rec.OPEN == [] and cli.HELD == [] and not list((tmp_path / "run").glob("*.tmp"))


def test_a_disk_that_is_full_at_a_resume_leaves_the_checkpoint_that_is_there(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    recorder.save(5, Agent(1), {})
    rec.OPEN.pop().close()  # that was another process

    @rec.recorded
    def main(args):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(RunError, match=f"^No space left on device: {checkpoint.parent}; last good.*: {checkpoint}$"):
        main(Args(resume=str(tmp_path / "run")))


def test_closed_and_full_outputs_cost_nothing(tmp_path, monkeypatch):
    class Full:
        encoding = "ascii"

        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = isatty = lambda self: False

    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed, None):  # None: closed by the shell
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("sys.stderr", stream)
        rec.say("a line")
        progress = Progress([(1000, 0)], 0, None, quiet=False)
        progress.line = (0, -1e9)
        progress.move(10, {})
        progress.close()
        rec.print_results({"tasks": [], "metrics": {}, "global_step": 1, "steps_per_second": 1.0}, tmp_path)
    monkeypatch.undo()


@pytest.mark.parametrize("clock_back", [False, True])
def test_tensorboard_has_each_point_once(tmp_path, monkeypatch, clock_back):
    """The stop came between an evaluation's rows and the checkpoint, and after points at the checkpoint's own step."""
    run_dir, agent = tmp_path / "run", Agent(1)
    first = new_recorder(run_dir)
    first.begin(agent, {}, None, {})
    evaluate(first, 10)
    first.save(10, agent, {})
    first.losses(10, {"q": torch.tensor(7.0)})
    evaluate(first, 20)
    first.writer.flush()  # and is killed
    now = time.time()
    if clock_back:
        monkeypatch.setattr(time, "time", lambda: now - 10_000)
    second = new_recorder(run_dir, load_checkpoint(str(run_dir), "script"), resume=str(run_dir))
    second.losses(10, {"q": torch.tensor(8.0)})
    evaluate(second, 20)
    second.save(20, agent, {})
    second.close()
    first.close()
    events = read_events(run_dir)
    assert sorted(e.step for e in events.Scalars("eval/success/a")) == [10, 20]
    assert [(e.step, e.value) for e in events.Scalars("losses/q")] == [(10, 8.0)]


def test_a_finished_run_that_is_resumed_prints_its_results_again(tmp_path, capsys):
    run_dir, agent = tmp_path / "run", Agent(1)
    recorder = new_recorder(run_dir)
    evaluate(recorder, 10)
    recorder.save(10, agent, {})
    results = recorder.finish(10, {"final_success": 0.5}, {})
    again = new_recorder(run_dir, load_checkpoint(str(run_dir), "script"), resume=str(run_dir), quiet=False)
    assert capsys.readouterr().out == ""
    assert again.finish(10, {"final_success": 0.7}, {}) == results
    assert re.search(r"final_success +0\.5000", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------- progress

phase_lists = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(phase_lists, st.integers(0, 150))
def test_steps_left_of_either_kind_are_counted_one_by_one(phases, step):
    kinds = ["warm-up" if i < warm_up else "learning" for steps, warm_up in phases for i in range(steps)]
    left = Progress(phases, 0, None, quiet=True).left(step)
    assert left == {kind: kinds[step:].count(kind) for kind in ("warm-up", "learning")}


def test_the_time_to_go_knows_that_warm_up_is_cheap(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress([(1000, 200), (1000, 200)], 0, None, quiet=True)
    assert progress.plan() == "2,000 steps, 1,600 of them with updates; time to go: when learning has begun"

    def move(step, seconds):
        clock[0] += seconds
        progress.move(step, {})

    move(100, 10.0)  # 0.1 s a step
    assert progress.remaining() is None
    move(300, 90.0)  # both kinds: of no use
    move(310, 100.0)  # a first update that does the work of many
    assert progress.remaining() is None
    move(400, 20.0)  # 120 s for 100 steps
    assert progress.remaining() is None
    move(401, 1.0)
    per_step = 121 / 101
    assert progress.remaining() == pytest.approx(599 * per_step + 200 * 0.1 + 800 * per_step)
    resumed = Progress([(1000, 200), (1000, 200)], 401, progress.pace, quiet=True)
    assert resumed.remaining() == progress.remaining() and resumed.plan().endswith("time to go: about 28 min")
    move(401, 50.0)  # work between two steps counts for the next one
    move(501, 10.0)
    assert progress.pace["learning"] == [201, 181.0]


def test_a_run_that_ends_before_learning_has_a_pace_says_nothing_of_it(capsys):
    """All its updates come in the episode that also ends the warm-up."""
    progress = Progress([(200, 50)], 0, None, quiet=False)
    progress.move(200, {})
    assert progress.remaining() == 0 and "a step that learns" not in capsys.readouterr().out


def test_a_phase_that_ends_early_shortens_the_run(tmp_path):
    recorder = new_recorder(tmp_path / "run", phases=[(1000, 200)] * 4)
    progress = recorder.progress_line
    recorder.progress(300)
    assert progress.left(300) == {"warm-up": 600, "learning": 3100}
    recorder.phase_ended(0, 300)
    assert progress.left(300) == {"warm-up": 600, "learning": 2400}
    assert progress.total == progress.bar.total == 3300
    recorder.progress(400)
    recorder.phase_ended(1, 100)  # within its warm-up
    assert progress.left(400) == {"warm-up": 400, "learning": 1600} and progress.total == 2400
    recorder.close()


def test_many_steps_that_learn_can_be_trusted_after_seconds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress([(10_000, 0)], 0, None, quiet=True)
    for step, known in ((400, False), (600, True)):
        clock[0] = step / 80
        progress.move(step, {})
        assert (progress.remaining() is not None) == known
    assert progress.remaining() == pytest.approx(9400 / 80)


def test_where_there_is_no_terminal_a_line_comes_at_most_once_a_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress([(1000, 0)], 0, None, quiet=False)
    for step in range(10, 110, 10):
        clock[0] += 25
        progress.move(step, {"task": "reach", "return": "5"})
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "step 30 of 1,000: 0.4 steps/s, task reach, return 5",
        "step 60 of 1,000: 0.4 steps/s, task reach, return 5, to go 39 min",
        "step 90 of 1,000: 0.4 steps/s, task reach, return 5, to go 38 min",
    ]
    assert out == "2500.0 ms a step that learns: about 40 min to go\n"


def test_quiet_says_nothing(tmp_path, capsys):
    recorder = new_recorder(tmp_path / "run")
    recorder.begin(Agent(1), {}, None, {"policy": 3})
    recorder.episode(5, "a", True, 7.0, 5)
    evaluate(recorder, 10)
    recorder.finish(10, {}, {})
    assert capsys.readouterr() == ("", "")


def test_the_first_lines_name_folder_device_sizes_and_length(tmp_path, capsys):
    recorder = new_recorder(tmp_path / "run", quiet=False)
    recorder.begin(Agent(1), {}, None, {"actor": 1234, "critic": 56, "task_policies": [3]})
    recorder.close()
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'run'}  on cpu  parameters: actor 1,234, critic 56",
        "100 steps, 90 of them with updates; time to go: when learning has begun",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.4, "3 s"), (89, "89 s"), (91, "2 min"), (7000, "117 min"), (7300, "2 h 2 min"), (200000, "2 d 7 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_final_table_has_the_headline_metrics_in_one_column(tmp_path, capsys):
    tasks = [{"index": 0, "name": "a", "final_return": 12.34, "final_success": 0.5}]
    metrics = {"forgetting": 0.25, "steps": 7, "plasticity/actor/srank": 3, "per_task": [1, 2], "n" * 40: 1.0}
    rec.print_results({"tasks": tasks, "metrics": metrics, "global_step": 9, "steps_per_second": 3.0}, tmp_path)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0].split() == ["0", "a", "12.3", "0.50"]
    assert [line.split() for line in lines[1:4]] == [["forgetting", "0.2500"], ["steps", "7"], ["n" * 40, "1.0000"]]
    assert {len(line) for line in lines[1:4]} == {52} and lines[4] == f"9 steps, 3.0 a second. The run: {tmp_path}"


def test_seconds_speed_and_checkpoints_go_on_over_every_resume(tmp_path, monkeypatch):
    clock, run_dir, agent = [1000.0], tmp_path / "run", Agent(1)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for step, resume in ((30, {}), (60, {"resume": str(run_dir)}), (90, {"resume": str(run_dir)})):
        checkpoint = load_checkpoint(str(run_dir), "script") if resume else None
        recorder = new_recorder(run_dir, checkpoint, **resume)
        assert not recorder.checkpoint_due(step - 10) and recorder.checkpoint_due(step - 5)  # 25 after the last one
        clock[0] += 10
        recorder.losses(step, {})
        recorder.save(step, agent, {})
        results = recorder.finish(step, {}, {})
        (run_dir / "results.json").unlink()
    assert (results["wall_seconds"], results["steps_per_second"]) == (30, 3)
    assert [e.value for e in read_events(run_dir).Scalars("charts/SPS")] == [3, 3, 3]  # of each process


def test_the_curves_of_evaluations_have_their_values(tmp_path, monkeypatch):
    result = {"episode_return": 7.0, "success": 0.5, "length": 3.0}
    results = {0: result, 1: result | {"success": 1.0}}
    monkeypatch.setattr(rec, "evaluate_tasks", lambda *_: results)
    recorder = new_recorder(tmp_path / "run")
    evaluate(recorder, 10)
    recorder.episode(15, "a", True, 7.0, 5, success=0.25)  # a share of the tasks that are learned together
    recorder.close()
    events, names = read_events(tmp_path / "run"), ("return/a", "success/a", "success/b", "mean_success")
    assert [events.Scalars(f"eval/{name}")[0].value for name in names] == [7, 0.5, 1, 0.75]
    assert events.Scalars("charts/episodic_success")[0].value == 0.25
    assert {row["episodes"] for row in read_csv(tmp_path / "run")} == {"2"}


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_last(tmp_path, monkeypatch):
    calls, true_replace, true_sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("sync") or true_sync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or true_replace(*paths))
    new_recorder(tmp_path / "run").save(0, Agent(1), {})
    assert calls == ["sync", "replace"]


def test_a_new_run_holds_its_folder(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    code = f"from common.cli import hold; hold({str(tmp_path / 'run')!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another process is writing this run" in run.stderr
    recorder.close()


def test_events_that_were_lost_with_the_machine_are_not_made_up(tmp_path):
    """A file of TensorBoard's that is shorter than the checkpoint says is not filled up with zeros."""
    recorder = new_recorder(tmp_path / "run")
    recorder.save(10, Agent(1), {})
    recorder.close()
    [path] = (tmp_path / "run").glob(rec.EVENTS)
    os.truncate(path, 20)
    checkpoint = load_checkpoint(str(tmp_path / "run"), "script")
    new_recorder(tmp_path / "run", checkpoint, resume=str(tmp_path / "run"))
    assert path.stat().st_size == 20


def test_a_run_that_was_left_by_a_signal_has_no_alarm_any_more(tmp_path):
    recorder = new_recorder(tmp_path / "run")
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    with pytest.raises(Interrupted):
        recorder.leave()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


# ----------------------------------------------------------------------------------------------------------- pictures


def test_the_picture_is_drawn_at_evaluations_and_one_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    recorder = new_recorder(tmp_path / "run", quiet=False)
    evaluate(recorder, 10)
    recorder.episode(15, "a", True, 7.0, 5)
    assert not (tmp_path / "run" / "summary.png").exists(), "not within seconds of the last one"
    monkeypatch.setattr(rec, "PICTURE_SECONDS", 0.0)
    evaluate(recorder, 20)
    recorder.episode(25, "a", True, 7.0, 5)
    assert (tmp_path / "run" / "summary.png").read_bytes().startswith(b"\x89PNG")

    def fails(*args):
        raise ValueError("no font")

    monkeypatch.setattr(rec, "draw_summary", fails)
    recorder.finish(30, {}, {})
    assert "warning: summary.png could not be drawn (ValueError: no font)" in capsys.readouterr().out
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize(("phases", "lines"), [(1, 3), (2, 2)])
def test_tasks_that_are_learned_together_have_a_line_for_their_mean(tmp_path, monkeypatch, phases, lines):
    from matplotlib.axes import Axes

    labels, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: labels.append(kw["label"]) or plot(self, *args, **kw))
    recorder = new_recorder(tmp_path / "run", phases=[(100, 10)] * phases)
    evaluate(recorder, 10, (0, 1))  # the first of two phases is not all of them
    recorder._draw()
    assert labels == ["0 a", "1 b", "mean"][:lines]


def test_random_state_goes_on_where_it_was():
    state = rec.random_state()
    drawn = torch.rand(3)
    rec.set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)


def test_the_line_of_the_mean_has_the_mean_at_each_evaluation(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, true_plot = {}, Axes.plot

    def watched(axes, *values, **style):
        lines[style["label"]] = values
        return true_plot(axes, *values, **style)

    monkeypatch.setattr(Axes, "plot", watched)
    recorder = new_recorder(tmp_path / "run")
    for step, success in ((10, True), (20, False)):
        evaluate(recorder, step, (0, 1), success)
    recorder._draw()
    assert lines["mean"] == ([10, 20], [1.0, 0.0])
