"""Faults on purpose against the five scripts: `python tests/benchmarks/faults.py [--kills 100 --seconds 1500]`.

Tiny runs are killed, get signals, lose their worker processes or their disk, and find their files damaged or exchanged.
A fault may end a process with one line. What then goes on must end with the bytes of a run that nothing happened to:
its evaluations, and every float that was learned. Anything else, a traceback above all, is printed and counts as lost.
"""

import contextlib
import copy
import functools
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import torch
import tyro

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parents[2]))

from common import cli, recorder
from common.envs import make_env

META_WORLD = "--task-seq reach,drawer-close --steps-per-task 210 --learning-starts 80 --eval-every 210"
RUNS = {  # arguments of a run of one or two seconds
    "ssde": f"{META_WORLD} --hidden-dim 32 --hidden-layers 2 --critic-hidden-dim 16 --lambda-global 0.03 "
    "--lambda-local 0.03 --reset-every 40 --distill-steps 30 --batch-size 16",
    "nbsp": f"{META_WORLD} --cycles 1 --hidden-dim 24 --score-steps 60 --previous-buffer-size 99 --batch-size 16",
    "neuroplastic_expansion": "--env-id Hopper-v5 --steps-per-task 500 --learning-starts 100 --eval-every 150 "
    "--hidden-dim 16 --topology-every 50 --review-every 20 --review-threshold 0.05 --batch-size 16",
    "mst_rigl": "--env-id Hopper-v5 --total-steps 250 --learning-starts 90 --eval-every 80 --buffer-size 200 "
    "--target-update-every 25 --width-scale 0.03 --rigl-every 40 --batch-size 16",
    "sparse_mtrl_gmp_set": "--benchmark reach,drawer-close --total-steps 600 --episode-steps 40 --learning-starts 200 "
    "--eval-every 300 --hidden-dim 12 --hidden-layers 2 --batch-per-task 8 --sparsity 0.5 --prune-every 30",
}
COMMON = ["--eval-episodes", "1", "--checkpoint-every", "60", "--quiet"]
HANGS = 120.0  # seconds of a run, at least sixty times what it needs
WRONG = ["wrong", [], {}, -1.5]  # values of another kind than an entry's
FREE = ("versions", "git_commit", "total_steps", "wandb_id", "embeddings", "reference")  # whose values change nothing
# Processes are forked: what takes seconds to import is imported once.
MODULES = {name: importlib.import_module(name) for name in RUNS}
for slow in ("torch._dynamo", "sklearn.decomposition", "metaworld.env_dict"):
    importlib.import_module(slow)


@dataclass
class Args:
    seed: int = 0  # of moments, bits and damages
    kills: int = 100  # SIGKILLs, over all scripts
    signals: int = 40  # SIGINT, SIGTERM, SIGHUP, SIGUSR1
    flips: int = 200  # flipped bits in checkpoint.pt and config.json
    damages: int = 100  # files cut, overwritten, exchanged, removed, or with something wrong in them
    disks: int = 25  # disks that are full at some moment
    workers: int = 5  # killed worker processes
    seconds: float = 1500.0  # no trial begins after so many


class Process:
    """A command of a script in a forked process. size: of the largest file that it can write, as on a full disk."""

    def __init__(self, script: str, words: list[str], size: int = resource.RLIM_INFINITY):
        self.started, (self.output, inner) = time.monotonic(), os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            leave_with(functools.partial(command, script, words, inner, size))
        os.close(inner)

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def end(self) -> tuple[int, str]:
        """Exit code, negative after a signal, and what was printed."""
        text = b""
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() - self.started > HANGS:
                text = b"it hangs\n"
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # worker processes that are left would keep the pipe open
        with open(self.output, "rb") as file:
            return os.waitstatus_to_exitcode(ended[1]), (text + file.read()).decode(errors="replace")


def command(script: str, words: list[str], output: int, size: int) -> None:
    """`python SCRIPT.py WORDS`, printing into the pipe `output`."""
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout = sys.stderr = open(output, "w")  # noqa: SIM115
    sys.modules["__main__"], sys.argv = MODULES[script], [f"{script}.py", *words]  # what worker processes import
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    cli.run(MODULES[script].main, MODULES[script].Args, MODULES[script].PRESETS)


def leave_with(function) -> None:
    """Call and end this process, as a process of its own would end."""
    code = 0
    try:
        function()
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def words_of(script: str, folder: Path, *more: str) -> list[str]:
    """The command that goes on in a folder, or begins there."""
    begin = [*RUNS[script].split(), *COMMON, "--run-dir", str(folder)]
    return [*(["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else begin), *more]


def fingerprint(folder: Path) -> str:
    """Of what a finished run has evaluated and learned."""
    digest = hashlib.sha256((folder / "evaluations.csv").read_bytes())
    for name, tensor in recorder.tensors_of(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith(("error: ", "stopped: ", "interrupted"))


class Campaign:
    """Of each script a whole run, one of another seed, and one that stopped halfway; and what became of the others."""

    def __init__(self, seed: int, root: Path):
        self.root, self.rng, self.folders, self.lost = root, np.random.default_rng(seed), 0, 0
        self.tried, self.good, self.seconds, self.expected, self.played = Counter(), Counter(), {}, {}, {}
        for script in RUNS:
            whole, half, begun = root / f"{script}-whole", root / f"{script}-half", time.monotonic()
            assert Process(script, words_of(script, whole)).end() == (0, "")
            self.seconds[script], self.expected[script] = time.monotonic() - begun, fingerprint(whole)
            assert Process(script, words_of(script, root / f"{script}-other", "--seed", "2")).end() == (0, "")
            while not (half / "checkpoint.pt").exists() or (half / "results.json").exists():
                shutil.rmtree(half, ignore_errors=True)
                process = Process(script, words_of(script, half))
                self.wait(script, 0.4)
                process.send(signal.SIGTERM)
                process.end()
            self.played[script] = self.play(script, half)

    def wait(self, script: str, first: float = 0.0) -> None:
        """Until a random moment of a run."""
        time.sleep(self.rng.uniform(first, 1) * self.seconds[script])

    def play(self, script: str, folder: Path) -> tuple[int, str]:
        return Process(script, ["--evaluate", str(folder), "--episodes", "1"]).end()

    def folder(self, script: str, copied: str = "") -> Path:
        """A new folder, or a copy of a run's."""
        self.folders += 1
        folder = self.root / f"{script}-{self.folders}"
        return Path(shutil.copytree(self.root / f"{script}-{copied}", folder)) if copied else folder

    def note(self, kind: str, script: str, folder: Path, problem: str, count: int = 1) -> None:
        self.tried[kind] += count
        self.good[kind] += 0 if problem else count
        if problem:
            self.lost += 1
            print(f"LOST: {kind}, {folder}: {problem}", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def goes_on(self, script: str, folder: Path, refusable: bool = False) -> str:
        """Go on to the end. -> what is wrong with it, or nothing. refusable: it may also be refused in one line."""
        code, text = Process(script, words_of(script, folder)).end()
        if refusable and code == 2 and is_line(text):
            return ""
        if (code, text) != (0, ""):
            return f"exit code {code}, {text}"
        return "" if fingerprint(folder) == self.expected[script] else "other bytes"

    def judge(self, kind: str, script: str, folder: Path, how: str, told) -> None:
        """After damage: refused in one line, or the same as without it."""
        if how == "evaluate":
            code, text = self.play(script, folder)
            same = (code, text) == self.played[script] or (code == 2 and is_line(text))
            problem = "" if same else f"exit code {code}, {text}"
        elif (folder / "checkpoint.pt").exists():
            problem = self.goes_on(script, folder, refusable=True)
        else:
            code, text = Process(script, ["--resume", str(folder)]).end()
            problem = "" if code == 2 and is_line(text) else f"exit code {code}, {text}"
        self.note(kind, script, folder, problem and f"{how}, {told}: {problem}")

    # ------------------------------------------------------------------------------------------------ faults in time

    def kill(self, script: str) -> None:
        """Up to four SIGKILLs in one run."""
        folder, killed = self.folder(script), 0
        for _ in range(self.rng.integers(1, 5)):
            process = Process(script, words_of(script, folder))
            self.wait(script)
            process.send(signal.SIGKILL)
            killed += process.end()[0] == -signal.SIGKILL
        self.note("SIGKILL", script, folder, self.goes_on(script, folder), killed)

    def signal(self, script: str) -> None:
        folder, signum = self.folder(script), self.rng.choice(recorder.SIGNALS)
        process = Process(script, words_of(script, folder))
        self.wait(script, 0.05)
        process.send(signum)
        code, text = process.end()
        obeyed = (code == 128 + signum and is_line(text)) or (code, text) == (0, "")
        early = code in (-signum, 128 + signum) and not text and not (folder / "checkpoint.pt").exists()
        problem = "" if obeyed or early else f"{signum}, exit code {code}, {text}"
        self.note("a signal", script, folder, problem or self.goes_on(script, folder))

    def disk(self, script: str) -> None:
        whole = self.root / f"{script}-whole" / "checkpoint.pt"
        folder, limit = self.folder(script), int(self.rng.uniform(0, 1.1) * whole.stat().st_size)
        code, text = Process(script, words_of(script, folder), limit).end()
        said = (code in (1, 2) and is_line(text)) or (code, text) == (0, "")
        problem = "" if said and not list(folder.glob("*.tmp")) else f"{limit} bytes, exit code {code}, {text}"
        self.note("a full disk", script, folder, problem or self.goes_on(script, folder))

    def worker(self, _: str) -> None:
        script, children = "sparse_mtrl_gmp_set", []
        folder = self.folder(script)
        process = Process(script, words_of(script, folder, "--num-workers", "2"))
        while len(children) < 2:
            time.sleep(0.1)
            pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            children = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        time.sleep(self.rng.uniform(0, 10))
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.rng.choice(children)), signal.SIGKILL)
        code, text = process.end()
        said = (code == 1 and is_line(text) and "worker process" in text) or (code, text) == (0, "")
        problem = "" if said else f"exit code {code}, {text}"
        self.note("a dead worker", script, folder, problem or self.goes_on(script, folder))

    # ----------------------------------------------------------------------------------------------- faults in files

    def flip(self, script: str) -> None:
        folder, how = self.folder(script, "half"), self.rng.choice(["resume", "resume", "evaluate"])
        path = folder / self.rng.choice(["checkpoint.pt", "config.json"], p=[0.8, 0.2])
        data = bytearray(path.read_bytes())
        bit = int(self.rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        self.judge(f"a flipped bit in {path.name}", script, folder, how, f"bit {bit}")

    def damage(self, script: str) -> None:
        """A file of a half or a whole run is damaged in one of five ways, or something inside it is."""
        how = self.rng.choice(["resume", "evaluate"])
        folder = self.folder(script, "half" if how == "evaluate" else self.rng.choice(["half", "whole"]))
        names = [name for name in ("checkpoint.pt", "config.json", "results.json") if (folder / name).exists()]
        path, other = folder / self.rng.choice(names), self.rng.choice([name for name in RUNS if name != script])
        way = self.rng.choice(["cut", "overwritten", "of another script", "of another seed", "removed", "wrong inside"])
        data, told = path.read_bytes(), ""
        place = int(self.rng.integers(len(data) - 50))
        if way == "cut":
            path.write_bytes(data[:place])
        elif way == "overwritten":
            path.write_bytes(data[:place] + self.rng.bytes(50) + data[place + 50 :])
        elif way.startswith("of another"):
            shutil.copy(
                self.root / (f"{other}-whole" if way.endswith("script") else f"{script}-other") / path.name, path
            )
        elif way == "removed":
            path.unlink()
            told = path.mkdir() if self.rng.random() < 0.5 else "no folder in its place"
        else:
            told = self.spoil(path)
        self.judge(f"{path.name} {way}", script, folder, how, (place, told))

    def spoil(self, path: Path) -> tuple[str, object]:
        """A sound file in which an entry is gone or of another kind."""
        is_json = path.suffix == ".json"
        whole = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=True)
        part = {"config.json": "args", "checkpoint.pt": self.rng.choice(["agent", "at", "record", "random"])}
        place = whole[part[path.name]] if path.name in part and self.rng.random() < 0.7 else whole
        name = str(self.rng.choice([name for name in place if name not in FREE]))
        place[name] = WRONG[self.rng.integers(len(WRONG))]
        if not is_json and self.rng.random() < 0.3:
            del place[name]
        path.write_text(json.dumps(whole)) if is_json else torch.save(whole, path)
        return name, place.get(name, "gone")


def main(args: Args) -> int:
    """Print the table; -> how many trials were lost."""
    torch.set_num_threads(1)
    recorder.draw_summary = lambda *_: None  # takes half a second; a picture that fails costs a warning
    compiled = functools.cache(mujoco.MjModel.from_xml_path)
    mujoco.MjModel.from_xml_path = staticmethod(lambda path: copy.copy(compiled(path)))
    for task in ("reach", "drawer-close", "Hopper-v5"):
        make_env(task).close()
    begun, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(args.seed, root)
    print("seconds of an undisturbed run:", {name: round(s, 1) for name, s in campaign.seconds.items()}, flush=True)
    for what in ("worker", "disk", "damage", "flip", "signal", "kill"):
        i, before = 0, sum(campaign.tried.values())
        while (
            sum(campaign.tried.values()) - before < getattr(args, f"{what}s")
            and time.monotonic() - begun < args.seconds
        ):
            getattr(campaign, what)(list(RUNS)[i % len(RUNS)])
            i += 1
    print(f"\n{time.monotonic() - begun:.0f} s, --seed {args.seed}\n")
    print("| kind | tried | same bytes or one line | traceback or lost |\n|---|---|---|---|")
    for kind, tried in sorted(campaign.tried.items()):
        print(f"| {kind} | {tried} | {campaign.good[kind]} | {tried - campaign.good[kind]} |")
    if not campaign.lost:
        shutil.rmtree(root)
    return campaign.lost


if __name__ == "__main__":
    sys.exit(bool(main(tyro.cli(Args, description=__doc__))))
