"""Many runs at once: scripts, methods and seeds, on this machine or on a Ray cluster.

    python -m common.sweep --sweep-dir sweeps/nbsp --seeds 1-5 -- nbsp.py --task-seq window --method nbsp sac
    python -m common.sweep --sweep-dir sweeps/quick --seeds 1-3 -- ssde.py --quick -- nbsp.py --quick

An argument with several values is a grid, and several commands follow each other with `--` between them. A run has the
folder `SWEEP_DIR/<script>__<what varies>`, and beside it what it printed, in `<the same>.log`. Each core does one run
at a time. Ctrl-C stops all runs at the end of their episode, saved; the same command goes on and leaves alone what is
finished. A run that was killed goes on by itself. `python -m common.plot SWEEP_DIR` draws all of them.

A script of your own takes `--run-dir`, `--resume` (or leaves no checkpoint.pt) and `--quiet`, and writes results.json
into its folder when it is finished.

With `--address auto` the runs go to the Ray cluster that this machine belongs to. All its machines need this checkout,
this Python and SWEEP_DIR at the same paths: a run whose machine is lost goes on elsewhere from its checkpoint.
"""

import ctypes
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from common import cli
from common.cli import CHECKPOINT, CONFIG, SIGNALS, ArgumentError
from common.recorder import EVALUATIONS, RESULTS

ROOT = Path(__file__).resolve().parents[1]  # where the scripts are
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LONGEST_NAME = 255  # bytes, of a file in nearly all file systems


@dataclass
class Args:
    commands: tyro.conf.Positional[tuple[str, ...]] = ()  # after `--`: a script and its arguments
    sweep_dir: Path = Path("sweeps/sweep")  # folder of the runs
    seeds: str | None = None  # seeds of every command: 1-5 or 1,2,7
    address: str | None = None  # of a running Ray cluster, e.g. `auto`; by default all cores of this machine
    cpus: cli.PositiveFloat = 1.0  # cores that a run takes
    gpus: cli.NonNegativeFloat = 0.0  # GPUs that a run takes; with 0.25, four runs share one
    retries: cli.NonNegativeInt = 2  # how often a run that was killed, or whose machine was lost, goes on by itself


# ------------------------------------------------------------------------------------------------------- the plan


def parse_command(words: list[str]) -> tuple[str, list[tuple[str, list[str]]]]:
    """["nbsp.py", "--quick", "--method", "sac", "nbsp"] -> "nbsp.py", [("quick", []), ("method", ["sac", "nbsp"])]."""
    script, *words = words
    if not script.endswith(".py") or not script_path(script).is_file():
        raise ArgumentError(f"-- {script}: must be a script, e.g. nbsp.py")
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options.append((name, [value] if "=" in word else []))
        elif options:
            options[-1][1].append(word)
        else:
            raise ArgumentError(f"-- {script} {word}: a value without its --name")
    names = [name.replace("_", "-") for name, _ in options]
    for name in names:
        if name in ("resume", "run-dir", "evaluate"):
            raise ArgumentError(f"-- {script} --{name}: must be left out: a sweep names the folders of its runs")
        if names.count(name) > 1:
            raise ArgumentError(f"-- {script} --{name}: comes twice; several values of one make a grid")
    return script, options


def script_path(script: str) -> Path:
    """A script in the folder of the caller, or one of ours."""
    return Path(script).resolve() if Path(script).is_file() else ROOT / script


def parse_seeds(seeds: str) -> list[str]:
    """ "1-3,7" -> ["1", "2", "3", "7"]."""
    numbers: list[str] = []
    for part in seeds.split(","):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ArgumentError(f"--seeds {seeds}: must be like 1-5 or 1,2,7")
        numbers += map(str, range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def plan(commands: list[str], seeds: str) -> dict[str, list[str]]:
    """The command of each run by its name: the script and what varies within a command or between a script's commands.

    ["nbsp.py", "--quick", "--method", "sac", "nbsp"] -> {"nbsp__method=sac": ["nbsp.py", "--quick", "--method", "sac"],
    "nbsp__method=nbsp": ...}. Raises ArgumentError for what cannot be read and where two runs have the same name.
    """
    parsed = [parse_command(list(words)) for dashes, words in itertools.groupby(commands, "--".__eq__) if not dashes]
    if not parsed:
        raise ArgumentError("nothing to run: give a script and its arguments after `--`")
    runs: dict[str, list[str]] = {}
    for script, options in parsed:
        if seeds:
            if "seed" in dict(options):
                raise ArgumentError(f"--seeds {seeds}: -- {script} has its own --seed")
            options.append(("seed", parse_seeds(seeds)))
    for script, options in parsed:
        others = [other for same, other in parsed if same == script]
        varying = [
            len(option[1]) > 1 or (seeds and option[0] == "seed") or not all(option in other for other in others)
            for option in options
        ]
        for values in itertools.product(*[values or [None] for _, values in options]):
            pairs = [(name, value) for (name, _), value in zip(options, values, strict=True)]
            parts = [name if value is None else f"{name}={value}" for name, value in itertools.compress(pairs, varying)]
            name = "__".join([Path(script).stem, *parts]).replace("/", "-")  # dmc/dog-run is not a folder
            if len(os.fsencode(f"{name}.log")) > LONGEST_NAME:
                raise ArgumentError(f"a run would be called {name}: too long for a file")
            if name in runs:
                raise ArgumentError(f"two runs are called {name}: each must differ from the others in its arguments")
            words = [word for name_, value in pairs for word in (f"--{name_}", value) if word is not None]
            runs[name] = [script, *words]
    return runs


def record_plan(sweep_dir: Path, runs: dict[str, list[str]]) -> dict[str, list[str]]:
    """Add the runs to `sweep.json`; returns them, those that stand there with the names that they have there.

    A grid that grows gives longer names to all its runs. Raises ArgumentError if a name stands for another command, if
    there is a folder of that name from elsewhere, or if the folder or the file is no such thing.
    """
    file = sweep_dir / "sweep.json"
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        known = cli.read_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--sweep-dir {sweep_dir}: {error}") from None
    earlier = {tuple(command): name for name, command in known.items()}
    runs = {earlier.get(tuple(command), name): command for name, command in runs.items()}
    for name, command in runs.items():
        if known.get(name, command) != command:
            other = f"{shlex.join(known[name])}; not {shlex.join(command)}"
            raise ArgumentError(f"{sweep_dir / name}: is another run already: {other}")
        if name not in known and (sweep_dir / name).exists():
            raise ArgumentError(f"{sweep_dir / name}: is there already, and not of this sweep")
    file.write_text(json.dumps(known | runs, indent=2) + "\n", encoding="utf-8")
    return runs


# -------------------------------------------------------------------------------------------------------- one run


def execute(command: list[str], run_dir: Path, cwd: str, token: str, retries: int, gpus: float = 0) -> str | None:
    """One run, in a Ray worker: start or resume the script until it ends by itself. Its folder says how it went.

    token: name of a file that the sweep has put beside the run folders.
    gpus: that the run takes; Ray names them in the environment. A run that takes none shall see none.

    Returns: where SWEEP_DIR is not shared with this machine, the machine's name.
    """
    environment = os.environ | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    # What starts under a shell's `&` ignores SIGINT, Ray's workers too: then no task could be cancelled.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not (run_dir.parent / token).is_file():
        return socket.gethostname()
    with open(f"{run_dir}.log", "a", encoding="utf-8") as log:  # with_suffix would cut beta=0.3
        # The script inherits the open file and with it the lock: if this worker dies and the script lives on, the
        # worker that tries again waits here for its end.
        while not locked(log):
            time.sleep(POLL_SECONDS)
        for _ in range(retries + 1):
            if (run_dir / RESULTS).is_file():
                break
            folder = "--resume" if (run_dir / CHECKPOINT).is_file() else "--run-dir"
            code = attempt([sys.executable, *command, folder, str(run_dir), "--quiet"], cwd, environment, log)
            signum = {128 + heard: heard for heard in SIGNALS}.get(code, -code)  # it saved and left, or was killed
            if signum <= 0:  # it has finished, or an error would come again
                break
            print(f"killed by signal {signum:d}", file=log, flush=True)
    return None


def attempt(line: list[str], cwd: str, environment: dict[str, str], log) -> int:
    """Start a script and wait for its end. Returns its exit code; 0 if the sweep was stopped."""
    print(shlex.join(line), file=log, flush=True)
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    script = subprocess.Popen(line, cwd=cwd, env=environment, preexec_fn=end_with_parent(), **streams)
    try:
        while script.poll() is None:  # not wait(): a task is cancelled between two instructions of Python
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        script.terminate()
        script.wait()
        return 0
    return script.returncode


def locked(file) -> bool:
    """Take the lock of an open file, unless another process has it. A file system without locks has nothing to take."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def end_with_parent():
    """For a new process on Linux, to be called in it: SIGTERM comes when the process that started it ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def done(run_dir: Path) -> float:
    """Share of a run that its evaluations cover; 1 when it is finished."""
    if (run_dir / RESULTS).is_file():
        return 1.0
    try:
        total = json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))["total_steps"]
        return int((run_dir / EVALUATIONS).read_text(encoding="utf-8").split("\n")[-2].split(",")[0]) / total
    except (OSError, ValueError, LookupError):
        return 0.0


def last_line(log: Path) -> str:
    """The last line that a run printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "it never began")


# ------------------------------------------------------------------------------------------------------- the sweep


def start_ray(address: str | None, cpus: float, gpus: float):
    """Connect to a cluster or start Ray on this machine, with both signals as KeyboardInterrupt.

    Raises ArgumentError without Ray, without the cluster, and if no machine has what a run takes.
    """
    try:
        import ray
    except ImportError:
        raise ArgumentError("a sweep needs Ray: python -m pip install ray==2.60.0") from None
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if not address:
        options |= {"num_cpus": len(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else {}
        options |= {"object_store_memory": 100_000_000}  # nothing goes through it
    try:
        ray.init(address=address or "local", **options)
    except ConnectionError as error:
        raise ArgumentError(f"--address {address}: no Ray cluster here ({str(error).splitlines()[0]})") from None
    machines = [{"CPU": 0.0, "GPU": 0.0} | node["Resources"] for node in ray.nodes()]
    if not any(machine["CPU"] >= cpus and machine["GPU"] >= gpus for machine in machines):
        raise ArgumentError(f"--cpus {cpus} --gpus {gpus}: no machine has that many; a run would wait for ever")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)  # after ray.init, which takes SIGTERM
    return ray


def run_all(args: Args, runs: dict[str, list[str]], root: Path, token: str) -> tuple[list[str], bool]:
    """Do the runs. Returns a line for each that failed, and whether the sweep was stopped."""
    ray = start_ray(args.address, args.cpus, args.gpus)
    task = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries)(execute)
    pending = {}
    for name, (script, *words) in runs.items():
        if not (root / name / RESULTS).is_file():
            command = [str(script_path(script)), *words]
            pending[task.remote(command, root / name, os.getcwd(), token, args.retries, args.gpus)] = name
    failed, stopped, stranger = {}, False, None
    bar_format = "{percentage:3.0f}%|{bar:20}| {n:.1f}/{total} runs, {elapsed} gone, {remaining} to go{postfix}"
    bar = tqdm(total=len(runs), bar_format=bar_format, smoothing=0, dynamic_ncols=True, disable=not sys.stderr.isatty())
    bar.initial = bar.n = sum(done(root / name) for name in runs)
    while pending:
        try:
            for ref in ray.wait(list(pending), timeout=2)[0]:
                name, problem = pending.pop(ref), ""
                try:
                    stranger = ray.get(ref) or stranger
                except ray.exceptions.RayError as error:  # a lost worker, or a run that was stopped before it began
                    problem = f" ({(str(error).strip() or type(error).__name__).splitlines()[-1]})"
                if (root / name / RESULTS).is_file():  # the folder is right after every kind of death, Ray is not
                    cli.say(f"finished: {name}")
                elif not stopped:
                    cli.say(f"failed: {name}")
                    failed[name] = f"failed: {name}: {last_line(Path(f'{root / name}.log'))}{problem}"
            bar.n = sum(name in failed or done(root / name) for name in runs)
            bar.set_postfix_str(f"{len(failed)} failed" if failed else "")
            if stranger and not stopped:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
            cli.say("stopping: every run saves at the end of its episode (a second Ctrl-C ends at once)")
            for ref in pending:
                ray.cancel(ref)
    bar.close()
    ray.shutdown()
    if stranger:
        raise ArgumentError(f"--sweep-dir {args.sweep_dir}: is not on storage that {stranger} shares")
    return list(failed.values()), stopped


def main(args: Args) -> None:
    """Do all runs of a sweep that are not finished. Exit code 1 if a run failed, 130 if the sweep was stopped."""
    cli.check_types(args)
    cli.require(args, "cpus", round(args.cpus, 4) == args.cpus, "a multiple of 0.0001")
    shared = round(args.gpus, 4) == args.gpus and (args.gpus < 1 or args.gpus == int(args.gpus))
    cli.require(args, "gpus", shared, "a share of one, a multiple of 0.0001, or a whole number")
    cli.require(args, "seeds", args.seeds != "", "like 1-5 or 1,2,7")  # of a shell's variable that is not set
    runs = record_plan(args.sweep_dir, plan(list(args.commands), args.seeds or ""))
    root, token = args.sweep_dir.resolve(), f".shared-{uuid.uuid4().hex}"
    finished = sum((root / name / RESULTS).is_file() for name in runs)
    cli.say(f"{args.sweep_dir}: {finished} of {len(runs)} runs finished")
    if finished == len(runs):
        return
    (root / token).touch()
    try:
        failed, stopped = run_all(args, runs, root, token)
    finally:
        (root / token).unlink()
    for line in [*failed, *["stopped; the same command goes on"] * stopped]:
        cli.say(line)
    raise SystemExit(130 if stopped else bool(failed))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a job's log shows lines as they come
    cli.run(main, Args)
