"""Cost of one update and of one action, side by side: `python tests/benchmarks/update_speed.py [--scripts ssde ...]`.

One row per script and variant. The variants of a script are timed in turns, so that a busy machine slows all of them;
`ratio` is to the script's first variant, its plain base algorithm at the same sizes. Memory is the peak of a process
of its own, with a full replay buffer of the default size, after it has written a checkpoint. The line above the table
gives the machine's matrix product rate, which absolute times depend on.
"""

import functools
import resource
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

sys.path.insert(0, str(Path(__file__).parents[2]))


@dataclass
class Args:
    scripts: tuple[str, ...] = ()
    """scripts to measure; default all"""
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
    sentences = [ssde.TASK_DESCRIPTIONS[task] for task in ssde.task_sequence("cw10")]
    agent = ssde.Agent(script_args, ssde.encode_tasks(sentences, "bundled"), 39, 4, torch.device(args.device))
    for task in range(tasks):
        if task:
            agent.end_task()
        agent.begin_task(task)
    for column in agent.replay.data.values():
        column.normal_()
    agent.replay.added = agent.replay.capacity
    if full_size:
        agent.policy = FullSizeMasked(agent.shared, tasks - 1).to(agent.device)
        agent._new_policy_optimizer()
    observation = np.zeros(39, dtype=np.float32)
    return Case(agent.update, lambda: agent.policy.act(observation), agent.state_dict)


class FullSizeMasked(nn.Module):
    """SSDE's policy as full-size matrices times masks at every forward pass, as the authors' code computes it."""

    def __init__(self, shared, task: int):
        import ssde

        super().__init__()
        own, widths = shared.tasks[task], [len(bias) for bias in shared.biases]
        self.weights = nn.ParameterList(shared.weights)
        self.biases = nn.ParameterList(shared.biases)
        self.log_std = nn.Linear(widths[-1], len(shared.weights[-1]))
        self.scales, self.bias_scales, self.units = [], [], []
        for layer, weight in enumerate(shared.weights):
            scale = torch.zeros_like(weight)
            scale[shared._block(own["neurons"], layer)] = own["trainable_weight"]
            self.scales.append(torch.where(shared.used_weights[layer] & (scale > 0), own["beta"], scale))
            if layer < len(widths):
                units = torch.zeros(widths[layer], device=weight.device).index_fill(0, own["neurons"][layer], 1)
                self.units.append(units)
                self.bias_scales.append(
                    torch.where(shared.used_biases[layer], own["beta"], own["trainable_weight"]) * units
                )
        self.act = functools.partial(ssde.TaskPolicy.act, self)
        self.sample = functools.partial(ssde.TaskPolicy.sample, self)

    def forward(self, x):
        for layer, units in enumerate(self.units):
            weight = self.weights[layer] * self.scales[layer]
            x = nn.functional.linear(x, weight, self.biases[layer] * self.bias_scales[layer])
            if layer == 0:
                mean = (x * units).sum(1, keepdim=True) / units.sum()
                centred = (x - mean) * units
                variance = centred.square().sum(1, keepdim=True) / units.sum()
                x = torch.tanh(centred * torch.rsqrt(variance + 1e-6))
            else:
                x = nn.functional.leaky_relu(x) * units
        mean = nn.functional.linear(x, self.weights[-1] * self.scales[-1])
        return mean, torch.exp(-5 + 3.5 * (torch.tanh(self.log_std(x)) + 1))


def ssde_cases() -> dict[str, Callable[[Args], Case]]:
    return {
        "SAC, dense 4x1024": functools.partial(ssde_case, "scratch", 1),
        "full-size masks, task 2": functools.partial(ssde_case, "ssde", 2, full_size=True),
        "SSDE, task 1": functools.partial(ssde_case, "ssde", 1),
        "SSDE, task 2": functools.partial(ssde_case, "ssde", 2),
    }


# ------------------------------------------------------------------------------------------- neuroplastic_expansion


def neuroplastic_expansion_case(method: str, in_review: bool, args: Args) -> Case:
    """TD3 or NE on HalfCheetah-v5's sizes, after a full buffer; two updates, of which one moves the actor too."""
    import neuroplastic_expansion as ne

    script_args = ne.Args(method=method, device=args.device, compile=args.compile)
    agent = ne.Agent(script_args, 17, 6, 975_000, torch.device(args.device))
    for column in agent.replay.data.values():
        column.normal_()
    agent.replay.data["terminated"].zero_()
    agent.replay.added = agent.replay.capacity
    if in_review:
        agent.change = 0.0
    observation = np.zeros(17, dtype=np.float32)
    return Case(lambda: (agent.update(), agent.update()), lambda: agent.act(observation), agent.state_dict, updates=2)


def neuroplastic_expansion_cases() -> dict[str, Callable[[Args], Case]]:
    return {
        "TD3": functools.partial(neuroplastic_expansion_case, "td3", False),
        "NE, density 0.2": functools.partial(neuroplastic_expansion_case, "ne", False),
        "NE, density 0.2, in review": functools.partial(neuroplastic_expansion_case, "ne", True),
    }


CASES: dict[str, Callable[[], dict[str, Callable[[Args], Case]]]] = {
    "ssde": ssde_cases,
    "neuroplastic_expansion": neuroplastic_expansion_cases,
}


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


def matrix_rate(device: str) -> float:
    """GFLOP/s of a 256x1024 by 1024x1024 float32 product, the best of 100."""
    a, b = torch.randn(256, 1024, device=device), torch.randn(1024, 1024, device=device)
    best = min(timed(lambda: a @ b, device) for _ in range(100))
    return 2 * 256 * 1024 * 1024 / best / 1e6


def peak_memory(script: str, variant: str, args: Args) -> float:
    """Peak memory in MB of a process that runs three updates and writes a checkpoint."""
    command = [sys.executable, __file__, "--memory-of", f"{script}:{variant}", "--device", args.device]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def print_peak_memory(args: Args) -> None:
    script, variant = args.memory_of.split(":")
    case = CASES[script]()[variant](args)
    for _ in range(3):
        case.update()
        case.act()
    with tempfile.TemporaryFile() as file:
        torch.save(case.checkpoint(), file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else peak)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.memory_of:
        return print_peak_memory(args)
    unit = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU thread(s)"
    print(f"{unit}, torch {torch.__version__}, float32 matrix product {matrix_rate(args.device):.0f} GFLOP/s\n")
    print("| script | variant | ms per update | ratio | ms per action | peak MB |\n|---|---|---|---|---|---|")
    for script in args.scripts or CASES:
        variants = CASES[script]()
        # first, as the peak of a child process counts what its parent held when it was forked
        memory = [peak_memory(script, variant, args) for variant in variants]
        cases = [build(args) for build in variants.values()]
        updates = medians_in_turns([case.update for case in cases], args.repeats, args.device)
        updates = [update / case.updates for update, case in zip(updates, cases, strict=True)]
        actions = medians_in_turns([case.act for case in cases], 10 * args.repeats, args.device)
        del cases
        for variant, update, action, peak in zip(variants, updates, actions, memory, strict=True):
            ratio = update / updates[0]
            print(f"| {script} | {variant} | {update:.2f} | {ratio:.3f} | {action:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
