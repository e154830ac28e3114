"""The record of a run: its folder, TensorBoard, CSV, picture, checkpoint file and interrupts.

It knows no algorithm. A script calls

    recorder = Recorder(args, script, run_name, tasks, total_steps, checkpoint)
    recorder.log(global_step, {"losses/critic": 0.3})
    recorder.evaluation(global_step, phase, task_index, episodes, result)
    recorder.save(global_step, state)          # and `stopped`: has a signal asked the run to end?
    recorder.finish(global_step, metrics, parameters)

Whoever copies a method into another project replaces these five calls by their own logging and loses nothing.
`run` and `parse_args` are the command line: presets, `--resume`, errors of one line, exit codes.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT, CONFIG, EVALUATIONS, RESULTS = "checkpoint.pt", "config.json", "evaluations.csv", "results.json"
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "metaworld", "dm-control", "scikit-learn")
# Arguments that do not change what a run computes: free to differ on --resume.
OUTPUT_ARGS = {"resume", "run_dir", "quiet", "track", "wandb_project", "capture_video", "checkpoint_every"}
OUTPUT_ARGS |= {"num_workers", "device"}  # where it is computed; a device rounds in its own way
# Scalars `<group>/<net>/<name>` that the picture shows below the success, and the label of their axis.
CURVES = {"dormant_ratio": "dormant ratio", "density": "density"}


class ArgumentError(ValueError):
    """A bad argument: one line for the user, exit code 2."""


class NotFiniteError(ArithmeticError):
    """A loss, weight or action that is not finite: exit code 1."""


class Interrupted(Exception):
    """The run stopped on a signal after writing its checkpoint: exit code 128 + signal number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


# ----------------------------------------------------------------------------------------------- the command line


def parse_args(cls: type, presets: dict[str, dict] | None = None, argv: list[str] | None = None):
    """Parse `argv` into the dataclass `cls` with tyro. Raises ArgumentError for what cannot be parsed.

    A preset (`presets["quick"]` for `--quick`, `presets["preset mrq"]` for `--preset mrq`) or the stored arguments of
    `--resume RUN_DIR` become the defaults, so whatever else is typed wins over a preset and is compared with a stored
    run (by `Recorder`).
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults, typed = {}, [*argv, *map(" ".join, itertools.pairwise(argv))]
    for name, values in (presets or {}).items():
        if "--" + name in typed or "--" + name.replace(" ", "=") in typed:
            defaults |= values
    for i, word in enumerate(argv):
        if word.startswith("--resume=") or (word == "--resume" and i + 1 < len(argv)):
            defaults = stored_args(word.partition("=")[2] or argv[i + 1], cls)
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(cls, default=cls(**defaults), args=argv)
    except SystemExit as leaving:
        if not leaving.code:  # --help
            raise
        raise ArgumentError(one_line(framed.getvalue())) from None


def one_line(framed: str) -> str:
    """A message of tyro without its frame: the paragraphs between the rulers, but not the last, the hint at --help."""
    lines = [line.strip("│ ") for line in framed.splitlines() if not line.startswith(("╭", "╰"))]
    groups = itertools.groupby(lines, lambda line: line.strip("─-") == "")  # -: where the terminal has ASCII only
    paragraphs = [" ".join(group) for ruler, group in groups if not ruler]
    return "; ".join(paragraphs[:-1]) or " ".join(framed.split())


def stored_args(run_dir: str, cls: type) -> dict:
    """The arguments in `run_dir`/config.json; ArgumentError if there are none or they belong to another script."""
    path = Path(run_dir) / CONFIG
    try:
        config = json.loads(path.read_text())
        stored = dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{run_dir}: no readable run here ({CONFIG}: {type(error).__name__})") from None
    unknown = sorted(set(stored) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ArgumentError(f"{path}: the run was made by another script or version (it has {', '.join(unknown)})")
    return stored


def run(main, cls: type, presets: dict[str, dict] | None = None) -> None:
    """Run `main(parse_args(cls))` and turn what a user can cause into one line and an exit code."""
    try:
        main(parse_args(cls, presets))
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except NotFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as interrupt:
        print(interrupt, file=sys.stderr)
        raise SystemExit(interrupt.exit_code) from None
    except KeyboardInterrupt:  # before there was a run to save, or the second Ctrl-C
        raise SystemExit(128 + signal.SIGINT) from None


def require(args, name: str, condition: bool, allowed: str) -> None:
    """Raise ArgumentError with the argument, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {allowed}")


def select_device(name: str) -> torch.device:
    """auto, cpu or cuda -> the device; ArgumentError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_checkpoint(run_dir: str, script: str) -> dict:
    """Read `run_dir`/checkpoint.pt on the CPU. Loads tensors and plain values only: a stranger's file runs no code."""
    path = Path(run_dir) / CHECKPOINT
    if not path.is_file():
        raise ArgumentError(f"{path}: no checkpoint here")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise ArgumentError(f"{path}: damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("script") != script:
        raise ArgumentError(f"{path}: not a checkpoint of {script}.py")
    return checkpoint


def random_state(device: torch.device) -> dict:
    """State of PyTorch's generators, for a checkpoint."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict, device: torch.device) -> None:
    """Put PyTorch's generators where `random_state` found them."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


# ------------------------------------------------------------------------------------------------------ the record


class Recorder:
    """Everything that a run leaves behind.

    Args:
        args: the script's dataclass; its fields `run_dir`, `resume`, `quiet`, `track`, `wandb_project` and `seed`
            are used here.
        script: name of the script, without `.py`.
        run_name: folder name under `runs/` when `args.run_dir` is None.
        tasks: task names; a task's index in this list is its `task_index`.
        total_steps: length of the progress bar, in steps.
        checkpoint: what `load_checkpoint` returned, when the run is resumed.

    Raises:
        ArgumentError: the folder holds a run already, cannot be written, or `args` contradict the stored run.
    """

    def __init__(self, args, script: str, run_name: str, tasks: list[str], total_steps: int, checkpoint=None):
        self.args, self.script, self.tasks = args, script, tasks
        self.rows: list[dict] = []
        self.curves: dict[str, dict[str, list]] = {name: {} for name in CURVES}  # name -> net -> [step, value]
        self.previous_seconds, self.started, self.stop_signal = 0.0, time.monotonic(), None
        first_step, wandb = 0, import_wandb() if args.track else None
        if checkpoint is None:
            self.run_dir = self._create(run_name)
        else:
            self.run_dir = Path(args.resume)
            refuse_contradictions(args, stored_args(args.resume, type(args)))
            record = checkpoint["record"]
            self.rows, self.curves, self.previous_seconds = record["rows"], record["curves"], record["seconds"]
            first_step = record["global_step"]
        self._write_rows(self.rows, "w")  # on resume without what came after the checkpoint
        if wandb:
            config = dataclasses.asdict(args)
            wandb.init(project=args.wandb_project, name=self.run_dir.name, config=config, sync_tensorboard=True)
        # Whatever was logged after the checkpoint is logged again: purge it, or its points double.
        self.writer = SummaryWriter(str(self.run_dir), purge_step=None if checkpoint is None else first_step + 1)
        self.bar = tqdm(total=total_steps, initial=first_step, disable=args.quiet, unit="step", dynamic_ncols=True)
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _create(self, run_name: str) -> Path:
        run_dir = Path(self.args.run_dir or Path("runs") / f"{run_name}__{time.strftime('%Y%m%d-%H%M%S')}")
        versions = {"python": sys.version.split()[0]} | {package: installed_version(package) for package in PACKAGES}
        config = {"args": dataclasses.asdict(self.args), "versions": versions, "git_commit": git_commit()}
        try:
            if any((run_dir / name).exists() for name in (CHECKPOINT, RESULTS)):
                raise ArgumentError(f"--run-dir {run_dir}: holds a run already; go on with --resume {run_dir}")
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise ArgumentError(f"--run-dir {run_dir}: cannot be written ({error.strerror})") from None
        return run_dir

    # --------------------------------------------------------------------------------------------- while it runs

    @property
    def stopped(self) -> bool:
        """Whether SIGINT or SIGTERM has come: end the episode, save, leave (see `leave`)."""
        return self.stop_signal is not None

    def _on_signal(self, signum: int, frame) -> None:
        self.stop_signal = signum
        self._restore_handlers()  # a second signal ends the process at once
        if not self.args.quiet:  # not by print, which the signal may have interrupted
            os.write(2, b"\nsaving at the end of this episode (a second signal ends at once)\n")

    def _restore_handlers(self) -> None:
        for signum, handler in getattr(self, "handlers", {}).items():
            signal.signal(signum, handler)

    def leave(self):
        """End an interrupted run whose state was just saved."""
        self.close()
        command = f"python {self.script}.py --resume {self.run_dir}"
        raise Interrupted(self.stop_signal, f"interrupted; go on with: {command}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if not self.args.quiet:
            tqdm.write(line)

    def progress(self, global_step: int, **shown) -> None:
        """Move the progress bar to `global_step` and show `shown` beside it."""
        self.bar.set_postfix(shown, refresh=False)
        if global_step > self.bar.n:
            self.bar.update(global_step - self.bar.n)
        else:  # work between two steps: the bar would show it at its next step only
            self.bar.refresh()

    def log(self, global_step: int, scalars: dict) -> None:
        """Write scalars (floats or 0-d tensors) to TensorBoard; those of `CURVES` are kept for the picture."""
        for name, value in scalars.items():
            value = float(value)
            self.writer.add_scalar(name, value, global_step)
            *group, curve = name.split("/")
            if curve in CURVES:
                self.curves[curve].setdefault(group[-1], []).append([global_step, value])

    def evaluation(self, global_step: int, phase: int, task_index: int, episodes: int, result: dict) -> None:
        """Record what `common.metrics.evaluate` returned for one task."""
        task = self.tasks[task_index]
        row = {"global_step": global_step, "phase": phase, "task_index": task_index, "task": task}
        row |= {"episodes": episodes, "episode_return": result["episode_return"], "success": result["success"]}
        self.rows.append(row | {"episode_length": result["length"]})
        self._write_rows(self.rows[-1:], "a")
        # A sequence may hold a task twice: its index tells the phases apart.
        label = f"{task_index}-{task}" if self.tasks.count(task) > 1 else task
        self.writer.add_scalar(f"eval/return/{label}", result["episode_return"], global_step)
        if result["success"] is not None:
            self.writer.add_scalar(f"eval/success/{label}", result["success"], global_step)

    def _write_rows(self, rows: list[dict], mode: str) -> None:
        names = ("global_step", "phase", "task_index", "task", "episodes", "episode_return", "success")
        with open(self.run_dir / EVALUATIONS, mode, newline="") as file:
            writer = csv.DictWriter(file, (*names, "episode_length"))
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, global_step: int, state: dict) -> None:
        """Replace the checkpoint by `state` (plain values and tensors) at once: killed at any moment, one is whole."""
        record = {"rows": self.rows, "curves": self.curves, "seconds": self.seconds, "global_step": global_step}
        temporary = self.run_dir / (CHECKPOINT + ".tmp")
        with open(temporary, "wb") as file:
            torch.save({"script": self.script, "record": record} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.run_dir / CHECKPOINT)

    def require_finite(self, name: str, value: np.ndarray | torch.Tensor, global_step: int) -> None:
        """Close and raise NotFiniteError if `value` has a NaN or infinity: the checkpoint on disk is the last good."""
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        if not np.isfinite(value).all():
            self.close()
            last_good = self.run_dir / CHECKPOINT
            raise NotFiniteError(f"{name} is not finite at step {global_step}; last good checkpoint: {last_good}")

    def require_finite_weights(self, named_weights: list[tuple[str, torch.Tensor]], global_step: int) -> None:
        """`require_finite` for each of them."""
        for name, weight in named_weights:
            self.require_finite(name, weight, global_step)

    @property
    def seconds(self) -> float:
        """Seconds that the run took so far, over all its resumes."""
        return self.previous_seconds + time.monotonic() - self.started

    # ------------------------------------------------------------------------------------------------ the results

    def finish(self, global_step: int, metrics: dict, parameters: dict, draw_below=None) -> dict:
        """Write `results.json` and `summary.png`, print the table, return the results.

        draw_below: called with a matplotlib figure, it draws what only this script has, below the success curves.
        """
        last = {row["task_index"]: row for row in self.rows}
        tasks = [
            {"index": i, "name": task, "final_return": last[i]["episode_return"], "final_success": last[i]["success"]}
            for i, task in enumerate(self.tasks)
            if i in last
        ]
        results = {
            "script": self.script,
            "seed": self.args.seed,
            "global_step": global_step,
            "wall_seconds": round(self.seconds, 3),
            "steps_per_second": round(global_step / self.seconds, 3),
            "tasks": tasks,
            "metrics": metrics,
            "parameters": parameters,
        }
        self.close()
        title = f"{self.script}: {self.run_dir.name}"
        draw_summary(self.run_dir / "summary.png", self.rows, self.curves, title, draw_below)
        temporary = self.run_dir / (RESULTS + ".tmp")
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(temporary, self.run_dir / RESULTS)
        if not self.args.quiet:
            print_results(results, self.run_dir)
        return results

    def close(self) -> None:
        """Close TensorBoard and the bar, give the signals back."""
        self.bar.close()
        self.writer.close()
        self._restore_handlers()


def refuse_contradictions(args, stored: dict) -> None:
    """Raise ArgumentError naming both values where `args` differ from the run that they resume."""
    for name, value in dataclasses.asdict(args).items():
        if name not in OUTPUT_ARGS and name in stored and value != stored[name]:
            flag = "--" + name.replace("_", "-")
            raise ArgumentError(f"{flag} {value}: contradicts the resumed run, which has {stored[name]}")


def finished_results(args) -> dict | None:
    """The results of the run `args.resume` if it has ended (printed), else None. Raises ArgumentError as `Recorder`."""
    refuse_contradictions(args, stored_args(args.resume, type(args)))
    path = Path(args.resume) / RESULTS
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    if not args.quiet:
        print_results(results, args.resume)
    return results


def print_results(results: dict, run_dir) -> None:
    """Print the final table: a line per task, then the scalar metrics."""
    print(f"\n{'task':<34}{'return':>12}{'success':>10}")
    for task in results["tasks"]:
        success = "" if task["final_success"] is None else f"{task['final_success']:.2f}"
        print(f"{task['index']:>2}  {task['name']:<30}{task['final_return']:>12.1f}{success:>10}")
    for name, value in results["metrics"].items():
        if isinstance(value, (int, float, str)):
            print(f"{name:<34}{value if isinstance(value, (int, str)) else format(value, '.4f'):>12}")
    print(f"{results['global_step']} steps, {results['steps_per_second']:.1f} a second. The run: {run_dir}")


def draw_summary(path: Path, rows: list[dict], curves: dict[str, dict[str, list]], title: str, draw_below=None) -> None:
    """Draw success (or return) per task over training, phase borders as dotted lines, dormant ratio and density below.

    Tasks that are all learned in one phase get their mean as a black line.

    curves: points [step, value] by name in `CURVES` and network. Density has a panel where there is one.
    draw_below: draws into a matplotlib figure below all that; None for nothing.
    """
    import matplotlib  # slow to import, and needed once, at the end
    from matplotlib.figure import Figure

    measure = "success" if any(row["success"] is not None for row in rows) else "episode_return"
    shown = [name for name in CURVES if curves[name] or name == "dormant_ratio"]
    height, height_below = 3.7 + 1.8 * len(shown), 4.5
    top = figure = Figure(figsize=(9, height + (height_below if draw_below else 0)), layout="constrained")
    if draw_below:
        top, below = figure.subfigures(2, 1, height_ratios=(height, height_below))
        draw_below(below)
    upper, *lower = top.subplots(1 + len(shown), 1, sharex=True, height_ratios=(2, *[1] * len(shown)))
    indices = sorted({row["task_index"] for row in rows})
    if len(indices) > 10:
        upper.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for index in indices:
        points = [(row["global_step"], row[measure], row["task"]) for row in rows if row["task_index"] == index]
        steps, values, names = zip(*points, strict=True)
        upper.plot(steps, values, marker=".", label=f"{index} {names[0]}")
    phases = sorted({row["phase"] for row in rows})
    borders = [max(row["global_step"] for row in rows if row["phase"] == phase) for phase in phases[:-1]]
    if len(phases) == 1 and len(indices) > 1:  # tasks that are learned together
        steps = sorted({row["global_step"] for row in rows})
        means = [np.mean([row[measure] for row in rows if row["global_step"] == step]) for step in steps]
        upper.plot(steps, means, color="black", linewidth=2.5, label="mean")
    for axis in (upper, *lower):
        for border in borders:
            axis.axvline(border, color="grey", linestyle=":", linewidth=1)
        axis.grid(alpha=0.3)
    upper.set(ylabel=measure.replace("_", " "), title=title)
    if measure == "success":
        upper.set_ylim(-0.03, 1.03)
    if rows:
        upper.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for name, axis in zip(shown, lower, strict=True):
        for net, series in curves[name].items():
            axis.plot(*zip(*series, strict=True), label=net)
        axis.set(ylabel=CURVES[name])
        if curves[name]:
            axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    lower[-1].set(xlabel="steps")
    figure.savefig(path, dpi=120)


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the code, or None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def import_wandb():
    """The wandb module, which is not a requirement; ArgumentError with what to do where it is missing."""
    try:
        import wandb
    except ImportError:
        raise ArgumentError("--track: needs Weights & Biases: python -m pip install wandb") from None
    return wandb
