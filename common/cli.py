"""The command line of the five scripts: types that check arguments, presets, stored runs, exit codes.

A script has a dataclass `Args`, a dict of presets and `main(args)`; `run(main, Args, PRESETS)` makes them a command.
From Python `main(Args(quick=True))` does the same: `main` begins with `prepare`.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tokenize
import types
import typing
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from annotated_types import Ge, Gt, Interval, Le, Lt
from filelock import FileLock, Timeout
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

CHECKPOINT, CONFIG, LOCK = "checkpoint.pt", "config.json", ".lock"
HELD: list[FileLock] = []  # of the folders that this process writes
# Stop at the end of the episode, with a checkpoint: Ctrl-C, kill, a terminal that closes, Slurm's usual warning.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FORMAT = 2  # of config.json and checkpoint.pt; raised when an older run can no longer be read
# What a field may hold. `check_types` enforces it, --help shows the choices of a Literal.
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Depth = Annotated[int, Interval(ge=1, le=100)]  # of a network: each layer is built before the run
Cycles = Annotated[int, Interval(ge=1, le=1000)]  # of a sequence of tasks: each visit is listed before the run
Device = Literal["auto", "cpu", "cuda"]
# Arguments that do not change what a run computes: free to differ on --resume.
OUTPUT_ARGS = {"resume", "run_dir", "quiet", "track", "wandb_project", "capture_video", "checkpoint_every"}
OUTPUT_ARGS |= {"num_workers", "device", "cuda_graph", "torch_threads"}  # where it runs, which may change rounding
FLOAT32_MAX = 3.4e38  # what the networks compute with
EVALUATE_ARGS = {"evaluate", "episodes", "device", "torch_threads", "quiet", "capture_video"}  # of --evaluate itself
BOUNDS = {  # bound -> (does the value keep it, how to say it)
    Ge: (lambda value, bound: value >= bound.ge, lambda bound: f"at least {bound.ge}"),
    Gt: (lambda value, bound: value > bound.gt, lambda bound: f"above {bound.gt}"),
    Le: (lambda value, bound: value <= bound.le, lambda bound: f"at most {bound.le}"),
    Lt: (lambda value, bound: value < bound.lt, lambda bound: f"below {bound.lt}"),
}


class ArgumentError(ValueError):
    """A bad argument: one line for the user, exit code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # what was typed, or a library's words, may hold line ends


class RunError(Exception):
    """A run that cannot go on, said in one line: exit code 1."""


class NotFiniteError(ArithmeticError):
    """A loss, weight, action, reward or observation that is not finite: exit code 1."""


class Interrupted(Exception):
    """The run stopped on a signal and left a checkpoint: exit code 128 + signal number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


# ---------------------------------------------------------------------------------------------------- how main begins


def prepare(args, script: str, presets: dict[str, dict] | None = None):
    """How every `main` begins. -> the arguments, the checkpoint of `--resume` (else None), the device.

    presets: values by the argument that asks for them, {"quick": {...}, "preset mrq": {...}}. Where `args` were made in
    Python, a field that still has its default takes the preset's value, or with `resume` or `evaluate` the stored
    run's. Raises ArgumentError for whatever is wrong with them.
    """
    for name in ("resume", "evaluate", "run_dir"):
        value = str(getattr(args, name))
        require(args, name, value != "", "a folder")  # of a shell's variable that is not set
        require(args, name, value.encode(errors="replace").decode() == value, "a name in UTF-8")
    require(args, "evaluate", not (args.resume and args.evaluate), "without --resume")
    stored = stored_defaults(type(args), args.resume, args.evaluate)
    if not hasattr(args, "parsed"):
        args = with_defaults(args, stored or chosen(args, presets or {}))
    check_types(args)
    refuse_contradictions(args, stored)
    stays = not args.resume or args.run_dir in (None, args.resume, stored.get("run_dir"))
    require(args, "run_dir", stays, "left out: a run goes on in the folder of --resume")
    cores = os.cpu_count() or 1
    require(args, "torch_threads", args.torch_threads <= cores, f"at most the number of cores, {cores}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)  # a product with denormal weights can be a hundred times slower
    torch.manual_seed(args.seed)
    if getattr(args, "compile", False) and not args.evaluate:
        compiler = os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")
        if not shutil.which(compiler.partition(" ")[0]):
            raise ArgumentError(f"--compile: needs a C++ compiler, and there is no {compiler}")
        torch.compiler.reset()  # PyTorch keeps some compiled versions of a function and then refuses
    if args.resume:
        hold(args.resume)
    checkpoint = load_checkpoint(args.resume, script) if args.resume else None
    if checkpoint:
        refuse_foreign(args.resume, args, checkpoint)
    return args, checkpoint, torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def chosen(args, presets: dict[str, dict]) -> dict:
    """The values of the presets that `args` ask for."""
    values = {}
    for name, preset in presets.items():
        field, _, choice = name.partition(" ")
        if getattr(args, field) in (True, choice):
            values |= preset
    return values


def with_defaults(args, values: dict):
    """`args` with `values` in the fields that have their class's default."""
    unchanged = {field.name for field in dataclasses.fields(args) if getattr(args, field.name) == field.default}
    return dataclasses.replace(args, **{name: value for name, value in values.items() if name in unchanged})


def load_run(run_dir: str, cls: type, script: str):
    """Arguments and checkpoint of a stored run, to play its policy. The tensors stay in the file until they are read.

    The arguments are the run's own, with `quiet` and without `capture_video`. Raises ArgumentError where there is none.
    """
    args, checkpoint = cls(**stored_args(run_dir, cls)), load_checkpoint(run_dir, script, mmap=True)
    refuse_foreign(run_dir, args, checkpoint)
    return dataclasses.replace(args, quiet=True, capture_video=False), checkpoint


def require_task(run_dir: str, task: int, tasks: int) -> None:
    """Raise ArgumentError unless a stored run has this one of its tasks."""
    if not 0 <= task < tasks:
        raise ArgumentError(f"{run_dir}: has no task {task}; it has tasks 0 to {tasks - 1}")


def loader(load):
    """Decorator of a function that loads a policy from `run_dir`, its first argument: what does not fit is one line."""

    @functools.wraps(load)
    def guarded(run_dir, *args, **kwargs):
        try:
            return load(run_dir, *args, **kwargs)
        except ArgumentError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ArgumentError(f"{Path(run_dir) / CHECKPOINT}: does not fit ({words_of(error)})") from None

    return guarded


# ----------------------------------------------------------------------------------------------------------- checking


def flag(name: str) -> str:
    """Field name -> the word typed on the command line."""
    return "--" + name.replace("_", "-")


def require(args, name: str, condition: bool, allowed: str) -> None:
    """Raise ArgumentError with the argument, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"{flag(name)} {getattr(args, name)}: must be {allowed}")


def check_types(args) -> None:
    """Raise ArgumentError for the first field whose value its type does not allow: a Literal's choices, bounds, NaN."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        value, marks = getattr(args, name), []
        while hint is not None:  # peel the annotations off, down to the plain type
            marks += getattr(hint, "__metadata__", ())
            if typing.get_origin(hint) is Annotated:
                hint = typing.get_args(hint)[0]
            elif typing.get_origin(hint) in (types.UnionType, typing.Union):  # `X | None`
                hint = None if value is None else typing.get_args(hint)[0]
            else:
                break
        if hint is None:
            continue
        if hint in (bool, int, float, str):
            typed = isinstance(value, (int, float) if hint is float else hint)
            typed &= hint is bool or not isinstance(value, bool)  # in Python a bool is an int
            require(args, name, typed, f"of type {hint.__name__}")
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            require(args, name, value in choices, "one of " + ", ".join(map(str, choices)))
        bounds = [bound for mark in marks for bound in (mark if isinstance(mark, Interval) else (mark,))]
        bounds = [bound for bound in bounds if type(bound) in BOUNDS]  # other marks concern the command line only
        allowed = " and ".join(BOUNDS[type(bound)][1](bound) for bound in bounds)
        require(args, name, all(BOUNDS[type(bound)][0](value, bound) for bound in bounds), allowed)
        if isinstance(value, int | float):
            require(args, name, math.isfinite(value), "a finite number")
            require(args, name, abs(value) < (2**53 if hint is int else FLOAT32_MAX), "smaller in size")


def refuse_contradictions(args, stored: dict) -> None:
    """Raise ArgumentError naming both values where `args` differ from the stored run that they resume or evaluate."""
    for name, value in dataclasses.asdict(args).items():
        if name not in OUTPUT_ARGS and name in stored and value != stored[name]:
            raise ArgumentError(f"{flag(name)} {value}: contradicts the stored run, which has {stored[name]}")


def refuse_foreign(run_dir: str, args, checkpoint: dict) -> None:
    """Raise ArgumentError unless `checkpoint` is of the run whose `args` stand in the folder's `config.json`."""
    for name, value in checkpoint.get("args", {}).items():
        if name not in OUTPUT_ARGS and getattr(args, name, value) != value:
            files = f"{Path(run_dir) / CHECKPOINT}: not of the run of {CONFIG}"
            raise ArgumentError(f"{files}, which has {flag(name)} {getattr(args, name)} and not {value}")


def words_of(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


# ------------------------------------------------------------------------------------------------------------- memory


class Memory(TorchFunctionMode):
    """`with Memory(device, batch_size):` around what builds an agent: refuses what cannot fit into the memory there.

    It counts, before they are made, the tensors that `torch.empty` gives to weights and `torch.zeros` to the replay
    buffer: the least that must be there at once. A weight has a gradient and two moments beside it, a batch has the
    outputs of each weight matrix (outputs, inputs) or (copies, inputs, outputs). Raises ArgumentError with both sums.
    """

    def __init__(self, device: torch.device, batch_size: int):
        super().__init__()
        self.device, self.batch_size, self.free = device, batch_size, available_memory(device)
        self.needed = {"networks": 0, "a batch": 0, "the replay buffer": 0}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros) and self.free is not None:
            try:
                tensor = func(*args, **kwargs | {"device": "meta"})  # a shape without memory
            except RuntimeError as error:  # more than 64 bits can count
                raise ArgumentError(f"memory: too large for any: {words_of(error)}") from None
            if func is torch.zeros:
                self.needed["the replay buffer"] += tensor.nbytes
            else:
                outputs = tensor.numel() // tensor.shape[1] if tensor.ndim > 1 else 0
                self.needed["networks"] += 4 * tensor.nbytes
                self.needed["a batch"] += tensor.itemsize * self.batch_size * outputs
            if sum(self.needed.values()) > self.free:
                shown = ", ".join(f"{size / 1e9:,.1f} GB for {name}" for name, size in self.needed.items())
                free = f"{self.free / 1e9:,.1f} GB are free ({self.device.type})"
                raise ArgumentError(f"memory: needs at least {shown}; {free}")
        return func(*args, **kwargs)


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take at most, of a GPU or, where Linux tells it, of the machine; else None."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with contextlib.suppress(OSError, LookupError, ValueError):
        limits.append(1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]))
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):  # "max": none
            limits.append(int((Path("/sys/fs/cgroup") / file).read_text()))
    return min(limits, default=None)


# -------------------------------------------------------------------------------------------------------- stored runs


def script_of(cls: type) -> str:
    """Name of the script, without `.py`, whose arguments `cls` holds."""
    return Path(inspect.getfile(cls)).stem


def stored_args(run_dir: str, cls: type) -> dict:
    """The arguments in `run_dir`/config.json; ArgumentError if there are none or they belong to another script."""
    path = Path(run_dir) / CONFIG
    try:
        config = read_json(path.read_text(encoding="utf-8"))
        stored, script, version = dict(config["args"]), config.get("script"), config.get("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{run_dir}: no readable run here ({CONFIG}: {type(error).__name__})") from None
    if version != FORMAT:
        raise ArgumentError(f"{path}: a run of another version (format {version or 1}; this version reads {FORMAT})")
    unknown = sorted(set(stored) - {field.name for field in dataclasses.fields(cls)})
    own = script_of(cls)
    if script != own or unknown:
        what = f" (it has {', '.join(unknown)})" if unknown else ""
        raise ArgumentError(f"{path}: the run of {script}.py, not of {own}.py{what}")
    try:
        check_types(cls(**stored))
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from None
    return stored


def read_json(text: str) -> dict:
    """The object that a JSON text holds. Raises ValueError where it holds none."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("brackets within brackets, too deep to be read") from None
    if not isinstance(value, dict):
        raise ValueError(f"no object {{...}} but {type(value).__name__}")
    return value


def hold(run_dir: str | Path) -> None:
    """Keep a run's folder for this process until it is released or the process ends. Raises ArgumentError if taken."""
    lock = FileLock(Path(run_dir) / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ArgumentError(f"{run_dir}: another process is writing this run") from None
    except OSError as error:
        raise ArgumentError(f"{run_dir}: cannot be written ({error.strerror})") from None
    HELD.append(lock)


def release() -> None:
    """Give the folders back that this process holds."""
    while HELD:
        HELD.pop().release(force=True)


def load_checkpoint(run_dir: str, script: str, mmap: bool = False) -> dict:
    """Read `run_dir`/checkpoint.pt on the CPU. Loads tensors and plain values only: a stranger's file runs no code."""
    path = Path(run_dir) / CHECKPOINT
    if not path.is_file():
        raise ArgumentError(f"{path}: no checkpoint here")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums: a flipped bit would pass
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise ArgumentError(f"{path}: damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("script") != script:
        raise ArgumentError(f"{path}: not a checkpoint of {script}.py")
    if checkpoint.get("format") != FORMAT:
        raise ArgumentError(f"{path}: of another version (format {checkpoint.get('format', 1)}, not {FORMAT})")
    for part in ("record", "agent", "at", "random"):
        if not isinstance(checkpoint.get(part), dict):
            raise ArgumentError(f"{path}: damaged: it has no {part}")
    return checkpoint


# ------------------------------------------------------------------------------------------------------------ parsing


def stored_defaults(cls: type, resume: str | None = None, evaluate: str | None = None) -> dict:
    """The arguments of the run that is resumed or evaluated, but those that an evaluation has itself; else none."""
    if evaluate:
        return {name: value for name, value in stored_args(evaluate, cls).items() if name not in EVALUATE_ARGS}
    return stored_args(resume, cls) if resume else {}


def say(line: str, file=None) -> None:
    """Print a line above the progress bar. No output is worth a run: a stream that is closed or full is let be."""
    stream = file or sys.stdout  # None where the shell closed it
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(line, file=stream)
            stream.flush()  # a file or a pipe would hold it back


def parse_args(cls: type, presets: dict[str, dict] | None = None, argv: list[str] | None = None):
    """Parse `argv` into the dataclass `cls` with tyro. Raises ArgumentError for what cannot be parsed.

    A preset (`presets["quick"]` for `--quick`, `presets["preset mrq"]` for `--preset mrq`) or the stored arguments of
    `--resume RUN_DIR` or `--evaluate RUN_DIR` become the defaults, so whatever else is typed wins over a preset and is
    compared with a stored run (by `prepare`).
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults, typed = {}, [*argv, *map(" ".join, itertools.pairwise(argv))]
    for name, values in (presets or {}).items():
        if "--" + name in typed or "--" + name.replace(" ", "=") in typed:
            defaults |= values
    for word, after in itertools.pairwise([*argv, ""]):
        option, equals, value = word.partition("=")
        if option in ("--resume", "--evaluate") and hasattr(cls, option[2:]):
            defaults |= stored_defaults(cls, **{option[2:]: value if equals else after})
    framed, grouped = io.StringIO(), grouped_class(cls, defaults, presets or {})
    try:
        with contextlib.redirect_stderr(framed):
            parsed = tyro.cli(grouped, args=argv, description=(inspect.getmodule(cls).__doc__ or "").partition("\n")[0])
    except SystemExit as leaving:
        if not leaving.code:  # --help
            raise
        raise ArgumentError(one_line(framed.getvalue())) from None
    args = cls(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
    args.parsed = True  # `prepare` leaves presets and stored values alone: what was typed has won already
    return args


def grouped_class(cls: type, defaults: dict, presets: dict[str, dict]) -> type:
    """`cls` for tyro: a field per `# --- heading ---` in its source, with the fields below it; comments are their help.

    defaults: in place of the class's own. The help of a field names what presets set it to.
    """
    groups: dict[str, list] = {"": []}
    hints, (helps, headings) = typing.get_type_hints(cls, include_extras=True), comments(cls)
    for field in dataclasses.fields(cls):
        if field.name in headings:
            groups[headings[field.name]] = []
        shown = [f"{flag(name)}: {values[field.name]}" for name, values in presets.items() if field.name in values]
        text = helps[field.name] + (f" [{', '.join(shown)}]" if shown else "")
        hint = Annotated[hints[field.name], tyro.conf.arg(help=text)]
        list(groups.values())[-1].append((field.name, hint, defaults.get(field.name, field.default)))
    fields = []
    for i, (heading, members) in enumerate(groups.items()):
        group = dataclasses.make_dataclass(f"Group{i}", members)
        hint = Annotated[group, tyro.conf.arg(name=heading, help=""), tyro.conf.OmitArgPrefixes]
        fields.append((f"group{i}", hint, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def comments(cls: type) -> tuple[dict[str, str], dict[str, str]]:
    """From the source of a dataclass: the comment at each field, and the heading above a field, where there is one."""
    source = inspect.getsource(cls)
    [definition] = ast.parse(source).body
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    helps, headings = dict.fromkeys((node.target.id for node in fields), ""), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, heading = token.start[0], re.fullmatch(r"# --- (.+) ---", token.string)
            field = next(node.target.id for node in fields if node.end_lineno >= line)
            if heading:
                headings[field] = heading[1]
            else:
                helps[field] = token.string.removeprefix("# ")
    return helps, headings


def one_line(framed: str) -> str:
    """A message of tyro without its frame: the paragraphs between the rulers, but not the last, the hint at --help."""
    lines = [line.strip("│ ") for line in framed.splitlines() if not line.startswith(("╭", "╰"))]
    groups = itertools.groupby(lines, lambda line: line.strip("─-") == "")  # -: where the terminal has ASCII only
    paragraphs = [" ".join(group) for ruler, group in groups if not ruler]
    return "; ".join(paragraphs[:-1]) or " ".join(framed.split())


def run(main, cls: type, presets: dict[str, dict] | None = None) -> None:
    """Run `main(parse_args(cls))` and turn what a user can cause into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows fewer letters
    try:
        main(parse_args(cls, presets))
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (NotFiniteError, RunError) as error:
        say(f"stopped: {error}", sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as interrupt:
        say(str(interrupt), sys.stderr)
        raise SystemExit(interrupt.exit_code) from None
    except KeyboardInterrupt:  # before there was a run to save, or the second Ctrl-C
        raise SystemExit(128 + signal.SIGINT) from None
