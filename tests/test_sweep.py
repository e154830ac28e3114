"""common/sweep.py with a script that takes seconds; Ray itself in one test, a real script in another."""

import _thread
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import uuid
from pathlib import Path

import pytest

from common import cli, sweep
from common.cli import ArgumentError

ROOT = Path(__file__).resolve().parents[1]
TOKEN, LIMIT = ".shared-token", 120  # seconds that anything here may take on a busy machine

# Like ours: a checkpoint at each step, SIGTERM ends it at the next one with exit code 143. `pids`: how it was called.
FAKE = """
import argparse, json, os, signal, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--run-dir", "--resume"):
    parser.add_argument(name, type=Path)
for name, default in {"--seed": 0, "--steps": 4, "--pace": 0.01, "--mode": "plain", "--beta": 0.3}.items():
    parser.add_argument(name, type=type(default), default=default)
parser.add_argument("--quiet", action="store_true")
args, stop = parser.parse_args(), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
folder = args.resume or args.run_dir
folder.mkdir(parents=True, exist_ok=True)
checkpoint, rows, pids = folder / "checkpoint.pt", folder / "evaluations.csv", folder / "pids"
first = not pids.exists()
call = {"argv": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid(), "parent": os.getppid()}
call |= {"threads": os.environ.get("OMP_NUM_THREADS"), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
with open(pids, "a") as file:
    print(json.dumps(call), file=file)
begin = int(checkpoint.read_text()) if args.resume else 0
if not args.resume:
    assert not checkpoint.exists()
    (folder / "config.json").write_text(json.dumps({"total_steps": args.steps}))
if args.mode == "usage":
    sys.exit("error: --beta 7.0: must be at most 1") if first else sys.exit(2)
lines = rows.read_text().splitlines()[: begin + 1] if begin else ["global_step,value"]
rows.write_text("\\n".join(lines) + "\\n")
for step in range(begin + 1, args.steps + 1):
    time.sleep(0 if (folder.parent / "hurry").exists() else args.pace)
    with open(rows, "a") as file:
        print(step, args.seed * step, sep=",", file=file)
    checkpoint.with_suffix(".tmp").write_text(str(step))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    if stop:
        (folder / "stopped").touch()
    if stop or (args.mode in ("drained", "warned") and first and step == 2):
        sys.exit(128 + (signal.SIGUSR1 if args.mode == "warned" else signal.SIGTERM))
    if args.mode == "fails" and step == 2:
        print("stopped: actor is not finite at step 2\\n")
        sys.exit(1)
    if args.mode == "always killed" or (args.mode == "killed" and first and step == 2):
        os.kill(os.getpid(), signal.SIGKILL)
(folder / "results.json").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return str(tmp_path / "fake.py")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / TOKEN).touch()
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def interrupts():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_until(condition, what):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def calls(run_dir):
    """How the script was started in a folder, each time."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (run_dir / "pids").read_text().splitlines()]
    return []


def steps(run_dir):
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        return int((run_dir / "evaluations.csv").read_text().splitlines()[-1].split(",")[0])
    return 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------------------------------------------- the plan


def plan(line, seeds=""):
    return {name: " ".join(words) for name, words in sweep.plan(line.split(), seeds).items()}


def test_several_values_are_a_grid_and_fixed_arguments_are_not_in_the_names():
    assert plan("nbsp.py --quick --method sac nbsp --beta=0.3 --skill-proportion 0.1 .2") == {
        "nbsp__method=sac__skill-proportion=0.1": "nbsp.py --quick --method sac --beta 0.3 --skill-proportion 0.1",
        "nbsp__method=sac__skill-proportion=.2": "nbsp.py --quick --method sac --beta 0.3 --skill-proportion .2",
        "nbsp__method=nbsp__skill-proportion=0.1": "nbsp.py --quick --method nbsp --beta 0.3 --skill-proportion 0.1",
        "nbsp__method=nbsp__skill-proportion=.2": "nbsp.py --quick --method nbsp --beta 0.3 --skill-proportion .2",
    }
    assert plan("ssde.py --quick") == {"ssde": "ssde.py --quick"}
    assert plan("ssde.py --lr -1 -2") == {"ssde__lr=-1": "ssde.py --lr -1", "ssde__lr=-2": "ssde.py --lr -2"}


def test_seeds_are_those_of_every_command():
    assert plan("ssde.py -- nbsp.py --quick", "1-2,7") == {
        f"{script}__seed={seed}": f"{script}.py{quick} --seed {seed}"
        for script, quick in (("ssde", ""), ("nbsp", " --quick"))
        for seed in (1, 2, 7)
    }
    assert list(plan("ssde.py", "3")) == ["ssde__seed=3"]


def test_commands_of_one_script_are_told_apart_by_what_differs():
    assert list(plan("nbsp.py --quick --method nbsp -- nbsp.py --quick --method nbsp --layer-norm", "1-1")) == [
        "nbsp__seed=1",
        "nbsp__layer-norm__seed=1",
    ]
    assert list(plan("nbsp.py --method sac -- nbsp.py --method nbsp --k 3 -- ssde.py --method sac")) == [
        "nbsp__method=sac",
        "nbsp__method=nbsp__k=3",
        "ssde",
    ]


def test_braces_of_the_shell_are_a_grid():
    line = "printf '%s\\n' nbsp.py --method {sac,nbsp} --seed {1..3} --beta={0.1,0.2}"
    words = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()
    assert words[2:4] == ["sac", "nbsp"]  # bash has expanded them before Python sees them
    assert len(sweep.plan(words[:-2], "")) == 6


def test_a_value_with_a_slash_is_no_folder_and_one_with_a_dot_is_not_cut(fake, folder):
    commands = sweep.plan([fake, "--mode", "dmc/dog-run", "plain", "--beta", "0.3", "0.5"], "")
    assert next(iter(commands)) == "fake__mode=dmc-dog-run__beta=0.3"
    for name, command in commands.items():
        assert sweep.execute(command, folder / name, str(ROOT), TOKEN, 0) is None
    assert {path.name for path in folder.iterdir()} == {TOKEN, *commands, *(f"{name}.log" for name in commands)}


@pytest.mark.parametrize(
    ("line", "seeds", "message"),
    [
        ("", "", "nothing to run"),
        ("--", "1-5", "nothing to run"),
        ("nbsp", "", "-- nbsp: must be a script"),
        ("nothing.py --x 1", "", "-- nothing.py: must be a script"),
        ("nbsp.py reach", "", "-- nbsp.py reach: a value without its --name"),
        ("nbsp.py --resume runs/x", "", "--resume: must be left out"),
        ("nbsp.py --quick --run_dir=x", "", "--run-dir: must be left out"),
        ("ssde.py -- nbsp.py --evaluate x", "", "-- nbsp.py --evaluate: must be left out"),
        ("nbsp.py --seed 1", "1-5", "--seeds 1-5: -- nbsp.py has its own --seed"),
        ("nbsp.py", "1-", "--seeds 1-: must be like 1-5 or 1,2,7"),
        ("nbsp.py", "one", "--seeds one: must be like"),
        ("nbsp.py --seed 1 2 1", "", "two runs are called nbsp__seed=1"),
        ("nbsp.py --env a/b a-b", "", "two runs are called nbsp__env=a-b"),
        ("nbsp.py --quick -- nbsp.py --quick", "", "two runs are called nbsp"),
        ("nbsp.py", "5-1", "--seeds 5-1: must be like"),
        (f"nbsp.py --task-seq {'reach,' * 50} push", "", "nbsp__task-seq=reach,reach,.*: too long for a file"),
        ("nbsp.py --beta 0.3 --seed 1 --beta 0.5", "", "--beta: comes twice"),
        ("nbsp.py --layer-norm --layer_norm", "", "--layer-norm: comes twice"),
    ],
)
def test_what_cannot_be_planned_is_an_error(line, seeds, message):
    with pytest.raises(ArgumentError, match=message):
        sweep.plan(line.split(), seeds)


def test_a_run_keeps_its_name_when_the_grid_grows(tmp_path):
    grids = ("nbsp.py --tau 0.01", "nbsp.py --tau 0.01 0.02", "nbsp.py --tau 0.02 --gamma 0.9 1")
    names = [list(sweep.record_plan(tmp_path, sweep.plan(grid.split(), ""))) for grid in grids]
    assert names == [["nbsp"], ["nbsp", "nbsp__tau=0.02"], ["nbsp__gamma=0.9", "nbsp__gamma=1"]]


def test_a_folder_from_elsewhere_is_no_run_of_this_sweep(tmp_path):
    (tmp_path / "nbsp__seed=2").mkdir()
    with pytest.raises(ArgumentError, match="nbsp__seed=2: is there already, and not of this sweep"):
        sweep.record_plan(tmp_path, sweep.plan(["nbsp.py"], "1-3"))
    assert not (tmp_path / "sweep.json").exists()


def test_a_reader_that_is_gone_stops_no_sweep(fake, folder, monkeypatch):
    ray, args = Ray(), sweep.Args(sweep_dir=folder)
    monkeypatch.setattr(sweep, "start_ray", lambda *_: ray)
    with open(os.devnull) as closed:  # which cannot be written
        monkeypatch.setattr(sys, "stdout", closed)
        failed, stopped = sweep.run_all(args, sweep.plan([fake], "1-3"), folder, TOKEN)
    assert len(failed) == len(ray.tasks) == 3 and not stopped


def test_a_name_never_changes_its_meaning(tmp_path):
    folder = tmp_path / "sweeps" / "x"

    def record(line):
        sweep.record_plan(folder, sweep.plan(line.split(), ""))

    record("nbsp.py --beta 0.3 --seed 1 2")
    record("nbsp.py --beta 0.3 --seed 2 3")  # more of the same
    stored = (folder / "sweep.json").read_text()
    assert list(json.loads(stored)) == [f"nbsp__seed={seed}" for seed in (1, 2, 3)]
    with pytest.raises(ArgumentError, match=r"nbsp__seed=2: is another run already: nbsp.py --beta 0.3 --seed 2"):
        record("nbsp.py --beta 0.5 --seed 2 4")
    assert (folder / "sweep.json").read_text() == stored
    (folder / "sweep.json").write_text("{")
    with pytest.raises(ArgumentError, match=f"--sweep-dir {folder}: "):
        record("nbsp.py --beta 0.5")
    folder = folder / "sweep.json"
    with pytest.raises(ArgumentError, match=f"--sweep-dir {folder}: "):
        record("nbsp.py --beta 0.5")


# --------------------------------------------------------------------------------------------------------- one run


def test_a_run_is_quiet_in_the_callers_folder_and_leaves_a_log(fake, folder, tmp_path):
    run_dir = folder / "fake__beta=0.3"
    assert sweep.execute([fake, "--seed", "3"], run_dir, str(tmp_path), TOKEN, 2) is None
    [call] = calls(run_dir)
    assert call["argv"] == ["--seed", "3", "--run-dir", str(run_dir), "--quiet"] and call["cwd"] == str(tmp_path)
    log = f"{sys.executable} {fake} --seed 3 --run-dir {run_dir} --quiet\n"
    assert (folder / "fake__beta=0.3.log").read_text() == log
    assert sweep.done(run_dir) == 1
    sweep.execute([fake, "--seed", "3"], run_dir, str(tmp_path), TOKEN, 2)
    assert len(calls(run_dir)) == 1  # it is finished


@pytest.mark.parametrize(
    ("mode", "retries", "times", "line"),
    [
        ("plain", 2, 1, "fake.py"),
        ("killed", 2, 2, "fake.py"),
        ("drained", 1, 2, "fake.py"),  # 143 that nobody here asked for
        ("warned", 1, 2, "fake.py"),  # by Slurm
        ("killed", 0, 1, "killed by signal 9"),
        ("drained", 0, 1, "killed by signal 15"),
        ("warned", 0, 1, "killed by signal 10"),
        ("always killed", 2, 3, "killed by signal 9"),
        ("fails", 2, 1, "stopped: actor is not finite at step 2"),
        ("usage", 2, 1, "error: --beta 7.0: must be at most 1"),
    ],
)
def test_a_killed_script_goes_on_and_a_failed_one_does_not(fake, folder, mode, retries, times, line):
    run_dir = folder / "run"
    sweep.execute([fake, "--mode", mode, "--seed", "2"], run_dir, str(ROOT), TOKEN, retries)
    assert len(calls(run_dir)) == times and line in sweep.last_line(Path(f"{run_dir}.log"))
    assert [call["argv"][4] for call in calls(run_dir)] == ["--run-dir"] + ["--resume"] * (times - 1)
    finished = line == "fake.py"
    assert (run_dir / "results.json").is_file() == finished and (sweep.done(run_dir) == 1) == finished
    if finished:
        assert (run_dir / "evaluations.csv").read_text() == "global_step,value\n1,2\n2,4\n3,6\n4,8\n"


def test_a_run_that_takes_no_gpu_sees_none(fake, folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as Ray sets it for a worker
    for gpus in (0, 0.25):
        sweep.execute([fake], folder / str(gpus), str(ROOT), TOKEN, 0, gpus)
    assert [calls(folder / name)[0]["gpus"] for name in ("0", "0.25")] == ["", "3"]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(fake, folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    sweep.execute([fake], folder / "run", str(ROOT), TOKEN, 0)
    assert calls(folder / "run")[0]["argv"][0] == "--run-dir" and sweep.done(folder / "run") == 1


def test_a_stopped_run_saves_and_goes_on(fake, folder):
    run_dir, line = folder / "run", [fake, "--steps", "40", "--pace", "0.05", "--seed", "1"]

    def cancel():
        wait_until(lambda: steps(run_dir), "a step")
        _thread.interrupt_main()  # as Ray does: no call of the system is interrupted

    timer = threading.Thread(target=cancel)
    timer.start()
    assert sweep.execute(line, run_dir, str(ROOT), TOKEN, 2) is None  # no KeyboardInterrupt, no second attempt
    assert not alive(calls(run_dir)[0]["pid"]) and (run_dir / "stopped").exists()
    timer.join()
    saved = int((run_dir / "checkpoint.pt").read_text())
    assert len(calls(run_dir)) == 1 and 0 < saved < 40 and sweep.done(run_dir) == saved / 40
    sweep.execute(line, run_dir, str(ROOT), TOKEN, 2)
    rows = [f"{step},{step}" for step in range(1, 41)]
    assert (run_dir / "evaluations.csv").read_text().splitlines() == ["global_step,value", *rows]


def test_a_second_worker_waits_for_the_script_of_a_lost_one(fake, folder):
    """A machine that lost its network only: its script goes on, and must not meet another in its folder."""
    run_dir = folder / "run"
    line = [sys.executable, fake, "--steps", "10", "--pace", "0.05", "--run-dir", str(run_dir)]
    with open(f"{run_dir}.log", "a") as log:
        assert sweep.locked(log)
        script = subprocess.Popen(line, stdout=log, stderr=log)
    sweep.execute([fake, "--steps", "10"], run_dir, str(ROOT), TOKEN, 0)
    assert script.poll() == 0 and len(calls(run_dir)) == 1


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    with open(tmp_path / "log", "a") as log, open(tmp_path / "log", "a") as again:
        assert sweep.locked(log) and not sweep.locked(again)
        monkeypatch.setattr(sweep.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
        assert sweep.locked(again)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
def test_a_script_saves_and_ends_when_its_worker_is_killed(fake, folder):
    run_dir, worker = folder / "run", os.fork()
    if not worker:
        sweep.execute([fake, "--steps", "9000", "--pace", "0.05"], run_dir, str(ROOT), TOKEN, 0)
        os._exit(0)
    wait_until(lambda: steps(run_dir) > 1, "a step")
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    wait_until(lambda: not alive(calls(run_dir)[0]["pid"]), "the script lives on")
    assert int((run_dir / "checkpoint.pt").read_text()) == steps(run_dir) and (run_dir / "stopped").exists()


def test_where_the_folder_is_not_shared_nothing_runs(fake, folder):
    host = sweep.execute([fake], folder / "run", str(ROOT), ".shared-other", 2)
    assert host == os.uname().nodename and {path.name for path in folder.iterdir()} == {TOKEN}


def test_how_far_a_run_is(tmp_path):
    assert sweep.done(tmp_path) == 0
    (tmp_path / "config.json").write_text('{"total_steps": 200}')
    assert sweep.done(tmp_path) == 0
    for text, share in (("global_step,task\n", 0), ("global_step,task\n50,a\n100,b\n", 0.5), ("", 0)):
        (tmp_path / "evaluations.csv").write_text(text)
        assert sweep.done(tmp_path) == share
    (tmp_path / "results.json").write_text("{}")
    assert sweep.done(tmp_path) == 1


# ------------------------------------------------------------------------------------------------------- the sweep


def command(monkeypatch, capsys, *words):
    """Exit code and output of `python -m common.sweep WORDS`, in this process, where Ray is not installed."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, words)])
    try:
        cli.run(sweep.main, sweep.Args)
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    return code, capsys.readouterr()


def test_ray_is_started_for_one_run_a_core_or_found_and_must_have_what_a_run_takes(monkeypatch):
    started, machines = [], [{"Resources": {"CPU": 2.0}}, {"Resources": {"CPU": 1.0, "GPU": 1.0, "memory": 5.0}}]
    stub = types.SimpleNamespace(init=lambda **options: started.append(options), nodes=lambda: machines)
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    sweep.start_ray(None, 2, 0)
    sweep.start_ray("auto", 1, 0.25)
    assert started[0]["address"] == "local" and started[0]["num_cpus"] == 2 and "object_store_memory" in started[0]
    assert set(started[1]) == {
        "address",
        "include_dashboard",
        "log_to_driver",
        "logging_level",
    }
    for cpus, gpus in ((3, 0), (2, 1), (1, 2)):
        with pytest.raises(ArgumentError, match=f"--cpus {cpus} --gpus {gpus}: no machine has that many"):
            sweep.start_ray("auto", cpus, gpus)
    stub.init = lambda **_: (_ for _ in ()).throw(ConnectionError("Could not find any\nRay instance"))
    with pytest.raises(ArgumentError, match=r"--address auto: no Ray cluster here \(Could not find any\)$"):
        sweep.start_ray("auto", 1, 0)


def test_a_sweep_is_stopped_while_a_run_waits_for_a_core(fake, folder, monkeypatch, capsys):
    """Ray's error for such a run has no words."""

    class RayError(Exception):
        pass

    def wait(pending, timeout):
        if not cancelled:
            raise KeyboardInterrupt
        return pending[:1], pending[1:]

    def get(ref):
        raise RayError

    cancelled = []
    remote = types.SimpleNamespace(remote=lambda command, run_dir, *_: run_dir)
    stub = types.SimpleNamespace(remote=lambda **_: lambda _: remote, wait=wait, get=get, shutdown=lambda: None)
    stub.cancel, stub.exceptions = cancelled.append, types.SimpleNamespace(RayError=RayError)
    monkeypatch.setattr(sweep, "start_ray", lambda *_: stub)
    runs = sweep.plan([str(fake)], "1-3")
    assert sweep.run_all(sweep.Args(sweep_dir=folder), runs, folder, "token") == ([], True)
    assert cancelled == [folder / name for name in runs]
    assert "stopping: every run saves" in capsys.readouterr().out


def test_without_ray_one_line_says_how_to_get_it(fake, folder, monkeypatch, capsys):
    code, shown = command(monkeypatch, capsys, "--sweep-dir", folder, "--seeds", "1-2", "--", fake)
    assert code == 2 and shown.err == "error: a sweep needs Ray: python -m pip install ray==2.60.0\n"
    assert {path.name for path in folder.iterdir()} == {TOKEN, "sweep.json"}  # and no token of this sweep


def test_a_finished_sweep_has_nothing_to_do(fake, folder, monkeypatch, capsys):
    sweep.record_plan(folder, sweep.plan([fake], "1"))
    sweep.execute([fake, "--seed", "1"], folder / "fake__seed=1", str(ROOT), TOKEN, 0)
    code, shown = command(monkeypatch, capsys, "--sweep-dir", folder, "--seeds", "1", "--", fake)
    assert code == 0 and shown.out == f"{folder}: 1 of 1 runs finished\n"


def test_a_bad_command_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    words = ("--sweep-dir", tmp_path / "x")
    cases = {"--resume: must be left out": ["--", "nbsp.py", "--resume", "y"], "nothing to run": ["--address", "auto"]}
    cases["--cpus 0.0: must be"] = ["--cpus", "0", "--", "nbsp.py"]
    cases["--cpus 1e-05: must be a multiple of 0.0001"] = ["--cpus", "1e-5", "--", "nbsp.py"]  # Ray's own bounds
    cases["--gpus 1.5: must be a share of one"] = ["--gpus", "1.5", "--", "nbsp.py"]
    cases["--seeds : must be like 1-5"] = ["--seeds", "", "--", "nbsp.py"]
    for message, more in cases.items():
        code, shown = command(monkeypatch, capsys, *words, *more)
        assert code == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert not (tmp_path / "x").exists()


def ignore_sigint():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Sweep:
    """`python -m common.sweep` in a process of its own, started as a shell's `&` does: SIGINT is ignored."""

    def __init__(self, folder, *words):
        self.output = open(folder.parent / "output", "w+")  # noqa: SIM115
        line = [sys.executable, "-m", "common.sweep", "--sweep-dir", str(folder), *words]
        self.process = subprocess.Popen(
            line,
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            preexec_fn=ignore_sigint,
        )

    def end(self):
        code = self.process.wait(LIMIT)
        self.output.seek(0)
        return code, self.output.read().splitlines()


@pytest.fixture
def cluster(monkeypatch):
    """Address of a Ray cluster of its own, started as a shell's `&` does: SIGINT is ignored."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    with socket.socket() as free, tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short path: it holds sockets
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        line = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--temp-dir={folder}"]
        line += [f"--port={port}", "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats"]
        head = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, preexec_fn=ignore_sigint)
        yield f"127.0.0.1:{port}"
        head.terminate()
        head.wait(LIMIT)


REAL = ["neuroplastic_expansion.py", "--env-id", "InvertedPendulum-v5", "--steps-per-task", "400"]
REAL += ["--learning-starts", "100", "--hidden-dim", "16", "--batch-size", "16", "--topology-every", "50"]
REAL += ["--eval-every", "100", "--eval-episodes", "2", "--seed", "2"]


@pytest.fixture
def plain_run(tmp_path, monkeypatch):
    """Folder of a run of a real script, which goes on beside the test; Ray sets the number of threads, it does not."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    line = [sys.executable, *REAL, "--run-dir", str(tmp_path / "plain"), "--quiet"]
    script = subprocess.Popen(line, cwd=ROOT)
    yield tmp_path / "plain"
    script.kill()
    script.wait()


def test_a_sweep_on_ray(fake, tmp_path, cluster, plain_run):
    """A worker is killed, then the sweep; it goes on on a running cluster, is stopped, and goes on to its end.

    There a real script runs too: with the same bytes as outside of a sweep.
    """
    folder = tmp_path / "sweep"
    words = ["--", fake, "--steps", "3000", "--pace", "0.05", "--seed", "1", "2"]
    runs = [folder / "fake__seed=1", folder / "fake__seed=2"]

    first = Sweep(folder, "--cpus", "0.5", *words)  # two at once on a machine with one core, too
    wait_until(lambda: all(steps(run_dir) > 1 for run_dir in runs), "two runs at once")
    assert all(call["threads"] == "1" and call["cwd"] == str(ROOT) for run_dir in runs for call in calls(run_dir))
    os.kill(calls(runs[0])[0]["parent"], signal.SIGKILL)  # Ray's worker
    wait_until(lambda: len(calls(runs[0])) == 2, "another worker goes on")
    before = steps(runs[0])
    wait_until(lambda: steps(runs[0]) > before, "it goes on")
    assert calls(runs[0])[1]["argv"][-3] == "--resume" and not alive(calls(runs[0])[0]["pid"])
    os.kill(first.process.pid, signal.SIGKILL)
    pids = [call["pid"] for run_dir in runs for call in calls(run_dir)]
    wait_until(lambda: not any(map(alive, pids)), "a script lives on without the sweep")
    first.end()

    second = Sweep(folder, "--address", cluster, *words)
    wait_until(lambda: [len(calls(run_dir)) for run_dir in runs] == [3, 2], "both go on")
    reached = [steps(run_dir) for run_dir in runs]
    wait_until(lambda: all(steps(run_dir) > n for run_dir, n in zip(runs, reached, strict=True)), "both go on")
    os.kill(second.process.pid, signal.SIGINT)
    code, lines = second.end()
    assert code == 130 and lines[0].endswith("0 of 2 runs finished")
    assert lines[1:] == [
        "stopping: every run saves at the end of its episode (a second Ctrl-C ends at once)",
        "stopped; the same command goes on",
    ]
    for run_dir in runs:
        assert int((run_dir / "checkpoint.pt").read_text()) == steps(run_dir) < 3000
    assert len(list(folder.glob(".shared*"))) == 1  # of the one that was killed

    (folder / "hurry").touch()
    other = shutil.copy(fake, tmp_path / "other.py")
    words += ["--", other, "--mode", "fails", "killed", "--", *REAL]
    code, lines = Sweep(folder, "--address", cluster, *words).end()
    assert code == 1 and lines[0].endswith("0 of 5 runs finished")
    finished = ["fake__seed=1", "fake__seed=2", "other__mode=killed", "neuroplastic_expansion"]
    assert sorted(lines[1:6]) == sorted(["failed: other__mode=fails", *(f"finished: {name}" for name in finished)])
    assert lines[6:] == ["failed: other__mode=fails: stopped: actor is not finite at step 2"]
    for seed, run_dir in zip((1, 2), runs, strict=True):  # as if nothing had happened
        rows = [f"{step},{seed * step}" for step in range(1, 3001)]
        assert (run_dir / "evaluations.csv").read_text().splitlines() == ["global_step,value", *rows]
    rows = (folder / "neuroplastic_expansion" / "evaluations.csv").read_bytes()
    assert rows == (plain_run / "evaluations.csv").read_bytes() and rows.count(b"\n") == 5


class Ray:
    """Stands in for Ray: every task ends at once, with `host` as its result; `interrupts`: Ctrl-C while it waits."""

    def __init__(self, host=None, interrupts=0):
        self.host, self.interrupts, self.cancelled, self.tasks, self.options = host, interrupts, [], [], None
        self.exceptions, self.cancel = types.SimpleNamespace(RayError=RuntimeError), self.cancelled.append

    def remote(self, **options):
        self.options = options
        return lambda _: types.SimpleNamespace(remote=lambda *words: self.tasks.append(words) or words[1])

    def wait(self, pending, timeout):
        self.interrupts -= 1
        if self.interrupts >= 0:
            raise KeyboardInterrupt
        return pending[:1], pending[1:]

    def get(self, ref):
        return self.host

    def shutdown(self): ...


def test_a_run_gets_the_cores_and_gpus_that_it_takes(fake, folder, monkeypatch):
    ray = Ray()
    monkeypatch.setattr(sweep, "start_ray", lambda *_: ray)
    args = sweep.Args(sweep_dir=folder, cpus=2.0, gpus=0.25, retries=3)
    sweep.run_all(args, sweep.plan([fake], "1-2"), folder, TOKEN)
    assert ray.options == {"num_cpus": 2, "num_gpus": 0.25, "max_retries": 3}
    assert [words[2:] for words in ray.tasks] == [(os.getcwd(), TOKEN, 3, 0.25)] * 2


def test_a_second_interrupt_ends_a_sweep_at_once(fake, folder, monkeypatch):
    ray = Ray(interrupts=2)
    monkeypatch.setattr(sweep, "start_ray", lambda *_: ray)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(sweep.Args(sweep_dir=folder), sweep.plan([fake], "1-2"), folder, TOKEN)


def test_a_sweep_whose_folder_a_machine_does_not_share_stops_and_names_it(fake, folder, monkeypatch):
    ray = Ray(host="elsewhere")
    monkeypatch.setattr(sweep, "start_ray", lambda *_: ray)
    with pytest.raises(ArgumentError, match=f"--sweep-dir {folder}: is not on storage that elsewhere shares"):
        sweep.run_all(sweep.Args(sweep_dir=folder), sweep.plan([fake], "1-3"), folder, TOKEN)
    assert ray.cancelled == [folder / f"fake__seed={seed}" for seed in (2, 3)]


def test_sigterm_stops_a_sweep_as_ctrl_c_does(monkeypatch):
    heard, machine = {}, {"Resources": {"CPU": 1.0}}
    stub = types.SimpleNamespace(init=lambda **_: heard.clear(), nodes=lambda: [machine])  # Ray takes SIGTERM
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.setattr(signal, "signal", heard.__setitem__)
    sweep.start_ray(None, 1, 0)
    assert heard == dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.default_int_handler)
