"""Cost of one update and of one action, side by side: `python tests/benchmarks/update_speed.py [--scripts ssde ...]`.

One row per script and variant. The variants of a script are timed in turns, so that a busy machine slows all of them;
`ratio` is to the script's first variant, its plain base algorithm at the same sizes; `x floor` is to the time that the
update's matrix products alone would take at the rate of a plain product timed in the same turns. Memory is the peak of
a process of its own, with a full replay buffer of the default size, after it has written a checkpoint; on a GPU it is
that of the tensors there. The line above the table gives the machine's matrix product rate, which absolute times depend
on.
"""

import copy
import functools
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.descriptions import encode_tasks, task_sentences
from common.envs import task_sequence
from common.recorder import state_of


@dataclass
class Args:
    scripts: tuple[str, ...] = ()
    """scripts to measure, and mst_scale: MST at growing sizes (with few --repeats on a CPU); default all scripts"""
    repeats: int = 50
    """updates timed per variant; the median is shown"""
    threads: int = 1
    """CPU threads of PyTorch"""
    device: str = "cpu"
    """cpu or cuda"""
    compile: bool = False
    """with --compile of the scripts"""
    memory_of: str = ""
    """(internal) print the peak memory of one variant, script:variant, in MB"""


class Case(NamedTuple):
    """What is timed of a variant: an update, one action for one observation, one checkpoint."""

    update: Callable[[], object]
    act: Callable[[], object]
    checkpoint: Callable[[], dict]
    updates: int = 1  # that `update` makes: a whole cycle where some updates do more than others


# ------------------------------------------------------------------------------------------------------------ ssde


def ssde_case(method: str, tasks: int, args: Args, full_size: bool = False) -> Case:
    """SSDE at the paper's sizes in its `tasks`-th task, after a full buffer of random transitions."""
    import ssde

    script_args = ssde.Args(method=method, device=args.device, compile=args.compile)
    sentences = task_sentences(task_sequence("cw10"), None)
    agent = ssde.Agent(script_args, encode_tasks(sentences, "bundled"), 39, 4, torch.device(args.device))
    for task in range(tasks):
        if task:
            agent.end_task()
        agent.begin_task()
    if agent.distilled < script_args.distill_steps:
        agent.end_distillation()
    fill(agent.replay)
    if full_size:
        agent.policy = full_size_masked(agent)
        agent.actor_optimizer = torch.optim.Adam(agent.policy.parameters(), lr=script_args.actor_lr, fused=True)
    observation = np.zeros(39, dtype=np.float32)
    return Case(agent.update, lambda: agent.policy.act(observation), lambda: state_of(agent))


def full_size_masked(agent) -> nn.Module:
    """SSDE's policy as full-size matrices times masks at every forward pass, as the authors' code computes it."""
    import ssde

    class FullSizeMasked(ssde.Actor):
        def __init__(self):
            nn.Module.__init__(self)
            self.bounded_mean, shared, task = False, agent.shared, agent.task
            self.layers, self.scales, self.units = nn.ModuleList(), [], []
            for name in shared.owner:
                layer = copy.deepcopy(shared.network.get_submodule(name))
                scale = {kind: torch.zeros_like(p) for kind, p in layer.named_parameters()}
                for kind, (_, part, frozen) in shared.parts(task, name).items():
                    scale[kind][part] = torch.where(frozen, shared.beta, shared.trainable_weight)
                self.layers.append(layer)
                self.scales.append(scale)
            for indices in shared.neurons[task]:
                self.units.append(torch.zeros(agent.args.hidden_dim, device=agent.device).index_fill(0, indices, 1))

        def masked(self, i: int, x):
            layer, scale = self.layers[i], self.scales[i]
            bias = None if layer.bias is None else layer.bias * scale["bias"]
            return nn.functional.linear(x, layer.weight * scale["weight"], bias)

        def forward(self, x):
            for i, units in enumerate(self.units):
                x = self.masked(i, x)
                if i == 0:
                    mean = (x * units).sum(1, keepdim=True) / units.sum()
                    centred = (x - mean) * units
                    variance = centred.square().sum(1, keepdim=True) / units.sum()
                    x = torch.tanh(centred * torch.rsqrt(variance + 1e-6))
                else:
                    x = nn.functional.leaky_relu(x) * units
            mean, raw = self.masked(len(self.units), x), self.masked(len(self.units) + 1, x)
            return mean, torch.exp(-5 + 3.5 * (torch.tanh(raw) + 1))

        @property
        def mean(self):
            return self.layers[-2]

    return FullSizeMasked().to(agent.device)


def ssde_cases(args: Args) -> dict[str, Callable[[Args], Case]]:
    return {
        "SAC, dense 4x1024": functools.partial(ssde_case, "scratch", 1),
        "full-size masks, task 2": functools.partial(ssde_case, "ssde", 2, full_size=True),
        "SSDE, task 1": functools.partial(ssde_case, "ssde", 1),
        "SSDE, task 2": functools.partial(ssde_case, "ssde", 2),
    }


# ------------------------------------------------------------------------------------------------------------ nbsp


def nbsp_case(method: str, args: Args, mask_target: str = "update") -> Case:
    """SAC or NBSP on Meta-World's sizes after two tasks, buffers filled; two updates, of which one moves the actor."""
    import nbsp

    script_args = nbsp.Args(method=method, mask_target=mask_target, device=args.device, compile=args.compile)
    device = torch.device(args.device)
    agent = nbsp.Agent(script_args, 39, 4, device)
    rollout = {"obs": torch.randn(5000, 39, device=device), "action": torch.rand(5000, 4, device=device)}
    for task in range(2):
        fill(agent.replay)
        agent.end_task(task, rollout, torch.rand(5000, device=device))
    fill(agent.replay)
    observation = np.zeros(39, dtype=np.float32)
    update, act = lambda: (agent.update(), agent.update()), lambda: agent.actor.act(observation)
    return Case(update, act, lambda: state_of(agent), updates=2)


def nbsp_cases(args: Args) -> dict[str, Callable[[Args], Case]]:
    return {
        "SAC": functools.partial(nbsp_case, "sac"),
        "gradient masking alone": functools.partial(nbsp_case, "mask"),
        "NBSP": functools.partial(nbsp_case, "nbsp"),
        "NBSP, mask on the gradient": functools.partial(nbsp_case, "nbsp", mask_target="gradient"),
    }


# ------------------------------------------------------------------------------------------- neuroplastic_expansion


def neuroplastic_expansion_case(method: str, in_review: bool, args: Args) -> Case:
    """TD3 or NE on HalfCheetah-v5's sizes, after a full buffer; two updates, of which one moves the actor too."""
    import neuroplastic_expansion as ne

    script_args = ne.Args(method=method, device=args.device, compile=args.compile)
    agent = ne.Agent(script_args, 17, 6, 975_000, torch.device(args.device))
    fill(agent.replay)
    agent.replay.data["terminated"].zero_()
    if in_review:
        agent.review.change = 0.0
    observation = np.zeros(17, dtype=np.float32)
    update, act = lambda: (agent.update(), agent.update()), lambda: agent.explore(observation)
    return Case(update, act, lambda: state_of(agent), updates=2)


def neuroplastic_expansion_cases(args: Args) -> dict[str, Callable[[Args], Case]]:
    return {
        "TD3": functools.partial(neuroplastic_expansion_case, "td3", False),
        "NE, density 0.2": functools.partial(neuroplastic_expansion_case, "ne", False),
        "NE, density 0.2, in review": functools.partial(neuroplastic_expansion_case, "ne", True),
    }


# --------------------------------------------------------------------------------------------- sparse_mtrl_gmp_set


def gmp_set_case(arch: str, method: str, args: Args, critic: bool = True) -> Case:
    """MT10 at the paper's sizes with a full buffer of random transitions, at the final sparsity."""
    import sparse_mtrl_gmp_set as gmp_set

    options = {"arch": arch, "method": method, "sparsify_critic": critic, "compile": args.compile}
    device = torch.device(args.device)
    agent = gmp_set.Agent(gmp_set.Args(**options), 10, 39, 4, device)
    fill(agent.replay)
    for sparse in agent.sparse.values():
        if method == "gmp":
            sparse.set_masks(gmp_set.prune(*map(gmp_set.matrices, (sparse.weights, sparse.masks)), agent.args.sparsity))
    observations = np.zeros((10, 39), dtype=np.float32)
    return Case(agent.update, lambda: agent.actor.explore(observations), lambda: state_of(agent))


def gmp_set_cases(args: Args) -> dict[str, Callable[[Args], Case]]:
    case = functools.partial
    return {
        "shared, dense": case(gmp_set_case, "shared", "dense"),
        "shared, GMP actor": case(gmp_set_case, "shared", "gmp", critic=False),
        "shared, GMP both": case(gmp_set_case, "shared", "gmp"),
        "shared, SET both": case(gmp_set_case, "shared", "set"),
        "MOORE, dense": case(gmp_set_case, "moore", "dense"),
        "MOORE, GMP both": case(gmp_set_case, "moore", "gmp"),
    }


# -------------------------------------------------------------------------------------------------------- mst_rigl


def mst_rigl_case(preset: str, args: Args, obs_dim: int = 67, act_dim: int = 21, **changes) -> Case:
    """MR.Q with a full buffer, by default on the sizes of humanoid-run; an average step of a whole target cycle.

    That is one update of the encoder and one of critics and actor: copying the targets, and drawing the encoder's
    batches, comes once in 250 steps.
    """
    import mst_rigl

    options = mst_rigl.PRESETS.get(f"preset {preset}", {}) | {"total_steps": 500_000, "compile": args.compile} | changes
    agent = mst_rigl.Agent(mst_rigl.Args(**options), obs_dim, act_dim, torch.device(args.device))
    replay = agent.replay
    for name, column in replay.data.items():
        column.normal_() if name in ("obs", "action", "reward") else column.fill_(1)
    replay.data["priority"][replay.capacity :] = 0  # rows that fill the last block
    replay.size = replay.capacity
    agent.copy_targets()
    rows = replay.sample_rows(agent.args.batch_size)

    def update() -> None:
        agent.update_encoder(rows)
        agent.update_critic_and_actor(replay.sample_rows(agent.args.batch_size))

    observation = np.zeros(obs_dim, dtype=np.float32)
    return Case(update, lambda: agent.act(observation, 0.2), lambda: state_of(agent))


def mst_rigl_cases(args: Args) -> dict[str, Callable[[Args], Case]]:
    cases = {
        "MR.Q, dense": functools.partial(mst_rigl_case, "mrq"),
        "MR.Q, RigL critic": functools.partial(mst_rigl_case, "mrq", critic_regime="rigl"),
        "MST": functools.partial(mst_rigl_case, "mst"),
    }
    hardware = torch.cpu.get_capabilities()
    has_bf16 = any(has for name, has in hardware.items() if name.endswith("bf16")) or args.device == "cuda"
    if has_bf16:  # seconds a step elsewhere
        cases["MR.Q, dense, bf16"] = functools.partial(mst_rigl_case, "mrq", bf16=True)
    return cases


def mst_scale_cases(args: Args) -> dict[str, Callable[[Args], Case]]:
    """MST at growing widths and depths on dog-run's sizes, with a small buffer: the networks are what grows."""
    case = functools.partial(mst_rigl_case, "mst", obs_dim=223, act_dim=38, buffer_size=10_000)
    cases = {f"width {width}": functools.partial(case, width_scale=float(width)) for width in (1, 2, 3, 5)}
    return cases | {"width 5, depth 4": functools.partial(case, width_scale=5.0, depth_scale=4)}


def fill(replay) -> None:
    """Random transitions in every row of a replay buffer."""
    for column in replay.data.values():
        column.normal_()
    replay.added = replay.capacity
    if hasattr(replay, "size"):
        replay.size.fill_(replay.capacity)


CASES: dict[str, Callable[[Args], dict[str, Callable[[Args], Case]]]] = {
    "ssde": ssde_cases,
    "nbsp": nbsp_cases,
    "neuroplastic_expansion": neuroplastic_expansion_cases,
    "sparse_mtrl_gmp_set": gmp_set_cases,
    "mst_rigl": mst_rigl_cases,
}
SCRIPTS = tuple(CASES)
CASES["mst_scale"] = mst_scale_cases  # hours on a CPU with the default --repeats: only when it is asked for


# ----------------------------------------------------------------------------------------------------- measurements


def timed(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def medians_in_turns(functions: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Median milliseconds of each function, called one after the other `repeats` times."""
    times = []
    for turn in range(repeats + 3):
        row = [timed(function, device) for function in functions]
        if turn >= 3:  # the first calls allocate
            times.append(row)
    return np.median(times, axis=0).tolist()


PRODUCT_GFLOP = 2 * 256 * 1024 * 1024 / 1e9


def matrix_product(device: str) -> Callable[[], object]:
    """A 256x1024 by 1024x1024 float32 product, PRODUCT_GFLOP of arithmetic."""
    a, b = torch.randn(256, 1024, device=device), torch.randn(1024, 1024, device=device)
    return lambda: a @ b


def matrix_rate(device: str) -> float:
    """GFLOP/s of `matrix_product`, the best of 100."""
    product = matrix_product(device)
    return 1e3 * PRODUCT_GFLOP / min(timed(product, device) for _ in range(100))


def matrix_gflop(update: Callable[[], object]) -> float:
    """GFLOP of the matrix products of one update."""
    with FlopCounterMode(display=False) as counter:
        update()
    return counter.get_total_flops() / 1e9


def peak_memory(script: str, variant: str, args: Args) -> float:
    """Peak memory in MB of a process that runs three updates and writes a checkpoint."""
    command = [sys.executable, __file__, "--memory-of", f"{script}:{variant}", "--device", args.device]
    command += ["--compile"] * args.compile
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def print_peak_memory(args: Args) -> None:
    script, variant = args.memory_of.split(":")
    case = CASES[script](args)[variant](args)
    for _ in range(3):
        case.update()
        case.act()
    with tempfile.TemporaryFile() as file:
        torch.save(case.checkpoint(), file)
    # the process's own high-water mark: ru_maxrss is inherited from the process that forked it
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    print(torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else peak)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    for script in SCRIPTS:
        importlib.import_module(script)  # first: NumPy complains where it is imported with denormals off
    torch.set_flush_denormal(True)
    if args.memory_of:
        return print_peak_memory(args)
    unit = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU thread(s)"
    print(f"{unit}, torch {torch.__version__}, float32 matrix product {matrix_rate(args.device):.0f} GFLOP/s\n")
    print("| script | variant | ms per update | ratio | x floor | ms per action | peak MB |\n" + "|---" * 7 + "|")
    for script in args.scripts or SCRIPTS:
        variants = CASES[script](args)
        # first, as the peak of a child process counts what its parent held when it was forked
        memory = [peak_memory(script, variant, args) for variant in variants]
        cases = [build(args) for build in variants.values()]
        functions = [matrix_product(args.device), *(case.update for case in cases)]
        product, *updates = medians_in_turns(functions, args.repeats, args.device)
        updates = [update / case.updates for update, case in zip(updates, cases, strict=True)]
        actions = medians_in_turns([case.act for case in cases], 10 * args.repeats, args.device)
        # last, as a function that is first called while it is counted is never compiled
        gflop = [matrix_gflop(case.update) / case.updates for case in cases]
        del cases
        for variant, update, work, action, peak in zip(variants, updates, gflop, actions, memory, strict=True):
            ratio, floor = update / updates[0], f"{update / (work / PRODUCT_GFLOP * product):.2f}"
            floor = "" if "bf16" in variant else floor  # which is of float32 products
            cells = (f"{update:.2f}", f"{ratio:.3f}", floor, f"{action:.2f}", f"{peak:.0f}")
            print(" | ".join((f"| {script}", variant, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
