"""Cost of updates, actions and whole training steps: `python tests/benchmarks/update_speed.py [--scripts ssde ...]`.

One row per script and variant. On a CPU times are CPU time, and the variants of a script are timed in turns, so that a
busy machine changes little. `ratio` is to the first of the script's variants that were asked for, by default its plain
base algorithm at the same sizes; `x floor` is to the time that the update's matrix products alone would take at the
rate of a plain product timed in the same turns. Memory is the peak of a process of its own, with a full replay buffer
of the default size, after it has written a checkpoint (CleanRL's form has none). The line above the table gives the
machine's matrix product rate, which absolute times depend on. With several threads times are by the clock.

Rows named CleanRL are SAC and TD3 of the same sizes in the shape of its scripts (plain_sac_td3.py).

`--end-to-end 60` times whole training, in turns of some hundred steps: act, step the environment, add, update, as in
the script's main loop on its default environment, without evaluations and records. GMP/SET's rows count the steps of
all ten environments, MST's agent steps, which are two of the simulator.

With `--device cuda` each variant is timed operator by operator (eager), as CUDA graphs (captured, the scripts' default)
and end to end also with each update begun before the environment's step, which can then run beside it (overlapped). A
transition then comes into the buffer one update later. Memory is the peak of the tensors on the GPU.
"""

import copy
import functools
import gc
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from plain_sac_td3 import SAC, TD3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.descriptions import encode_tasks, task_sentences
from common.envs import MT10, TaskEnvs, WorkerEnvs, env_sizes, make_env, task_sequence
from common.recorder import state_of


@dataclass
class Args:
    scripts: tuple[str, ...] = ()
    """scripts to measure, and mst_scale: MST at growing sizes (with few --repeats on a CPU); default all scripts"""
    variants: tuple[str, ...] = ()
    """variants to measure, as the table names them; default all"""
    repeats: int = 50
    """updates timed per variant; the median is shown"""
    end_to_end: float = 0.0
    """seconds of training per variant; 0: none"""
    workers: int = 0
    """processes that step the ten environments of GMP/SET, as its --num-workers"""
    threads: int = 1
    """CPU threads of PyTorch"""
    device: str = "cpu"
    """cpu or cuda"""
    compile: bool = False
    """with --compile of the scripts"""
    memory_of: str = ""
    """(internal) print the peak memory of one variant, script:variant, in MB"""


class Case(NamedTuple):
    """What is timed of a variant: updates, actions, training."""

    agent: object  # with explore(obs) and, for `train`, update() and a replay buffer
    update: Callable[[], object]
    obs: np.ndarray  # what `explore` takes
    train: Callable[[int, bool], None]  # so many steps of training; whether overlapped
    updates: int = 1  # that `update` makes: a whole cycle where some updates do more than others
    tasks: int = 1  # environments that a step of training steps
    turn: int = 200  # steps of training timed at a time: an episode of Meta-World; GMP/SET and dog-run give their own

    def act(self) -> np.ndarray:
        return self.agent.explore(self.obs)


Build = Callable[[Args, bool], Case]  # the bool: as CUDA graphs


def options(args: Args, graph: bool) -> dict:
    """Arguments that all scripts have."""
    return {"device": args.device, "compile": args.compile, "cuda_graph": graph}


def fill(replay) -> None:
    """Random transitions in every row of a replay buffer."""
    for column in replay.data.values():
        column.normal_()
    replay.added = replay.capacity
    if hasattr(replay, "size"):
        replay.size.fill_(replay.capacity)


def add_by_name(replay, obs, action, reward, next_obs, terminated: bool, truncated: bool) -> None:
    """One transition into a buffer that takes its columns by name."""
    transition = {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "terminated": float(terminated)}
    replay.add(**{name: transition[name] for name in replay.data})


environment = functools.cache(make_env)


def train(agent, env_id: str, steps: int, overlapped: bool, add: Callable | None = None, **env_options) -> None:
    """Begin an episode and train for so many steps. add: takes a transition; default `add_by_name`."""
    env, add, done = environment(env_id, **env_options), add or partial(add_by_name, agent.replay), True
    for step in range(steps):
        if done:
            obs, _ = env.reset(seed=step)
        action = agent.explore(obs)
        if overlapped:
            agent.update()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        add(obs, action, reward, next_obs, terminated, truncated)
        if not overlapped:
            agent.update()
        obs, done = next_obs, terminated or truncated


# ------------------------------------------------------------------------------------------------------------ ssde

NEURONS = {}  # of each task, the same in all variants: to encode one takes half a minute


def ssde_case(method: str, tasks: int, args: Args, graph: bool, full_size: bool = False) -> Case:
    """SSDE at the paper's sizes in its `tasks`-th task, after a full buffer of random transitions."""
    import ssde

    script_args, sequence = ssde.Args(method=method, **options(args, graph)), task_sequence("cw10")
    embeddings = encode_tasks(task_sentences(sequence, None), "bundled")
    agent = ssde.Agent(script_args, embeddings, 39, 4, torch.device(args.device))
    encode = agent.neurons
    agent.neurons = lambda task: NEURONS.get(task) or NEURONS.setdefault(task, encode(task))
    for task in range(tasks):
        if task:
            agent.end_task()
        agent.begin_task()
    if agent.distilled < script_args.distill_steps:
        agent.end_distillation()
    fill(agent.replay)
    if full_size:
        agent.policy = full_size_masked(agent)
        agent.start_from_here()

    return Case(agent, agent.update, np.zeros(39, np.float32), partial(train, agent, sequence[tasks - 1]))


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
                for kind, (_, part, frozen) in shared.places(task, name).items():
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
        def hidden(self):
            return self.layers[:-2]

        @property
        def mean(self):
            return self.layers[-2]

    return FullSizeMasked().to(agent.device)


SSDE = {
    "SAC, dense 4x1024": partial(ssde_case, "scratch", 1),
    "full-size masks, task 2": partial(ssde_case, "ssde", 2, full_size=True),
    "SSDE, task 1": partial(ssde_case, "ssde", 1),
    "SSDE, task 2": partial(ssde_case, "ssde", 2),
}


# ------------------------------------------------------------------------------------------------------------ nbsp


def nbsp_case(method: str, args: Args, graph: bool, mask_target: str = "update") -> Case:
    """SAC or NBSP on Meta-World's sizes after two tasks, buffers filled; two updates, of which one moves the actor."""
    import nbsp

    device = torch.device(args.device)
    agent = nbsp.Agent(nbsp.Args(method=method, mask_target=mask_target, **options(args, graph)), 39, 4, device)
    rollout = {"obs": torch.randn(5000, 39, device=device), "action": torch.rand(5000, 4, device=device)}
    for task in range(2):
        fill(agent.replay)
        agent.end_task(task, rollout, torch.rand(5000, device=device))
    fill(agent.replay)
    return two_updates(agent, np.zeros(39, np.float32), partial(train, agent, "window-open"))


def two_updates(agent, obs: np.ndarray, train: Callable) -> Case:
    return Case(agent, lambda: (agent.update(), agent.update()), obs, train, updates=2)


def plain_sac_case(args: Args, graph: bool) -> Case:
    agent = SAC(39, 4, 256, 2, 500_000, torch.device(args.device))
    return two_updates(agent, np.zeros(39, np.float32), partial(train, agent, "window-open", add=agent.replay.add))


NBSP = {
    "SAC": partial(nbsp_case, "sac"),
    "CleanRL's SAC": plain_sac_case,
    "gradient masking alone": partial(nbsp_case, "mask"),
    "NBSP": partial(nbsp_case, "nbsp"),
    "NBSP, mask on the gradient": partial(nbsp_case, "nbsp", mask_target="gradient"),
}


# ------------------------------------------------------------------------------------------- neuroplastic_expansion


def neuroplastic_expansion_case(method: str, in_review: bool, args: Args, graph: bool) -> Case:
    """TD3 or NE on HalfCheetah-v5's sizes, after a full buffer; two updates, of which one moves the actor too."""
    import neuroplastic_expansion as ne

    agent = ne.Agent(ne.Args(method=method, **options(args, graph)), 17, 6, 975_000, torch.device(args.device))
    fill(agent.replay)
    agent.replay.data["terminated"].zero_()
    if in_review:
        agent.review.change = 0.0
    return two_updates(agent, np.zeros(17, np.float32), partial(train, agent, "HalfCheetah-v5"))


def plain_td3_case(args: Args, graph: bool) -> Case:
    agent = TD3(17, 6, 256, (2, 3), 1_000_000, torch.device(args.device))
    return two_updates(agent, np.zeros(17, np.float32), partial(train, agent, "HalfCheetah-v5", add=agent.replay.add))


NEUROPLASTIC_EXPANSION = {
    "TD3": partial(neuroplastic_expansion_case, "td3", False),
    "CleanRL's TD3": plain_td3_case,
    "NE, density 0.2": partial(neuroplastic_expansion_case, "ne", False),
    "NE, density 0.2, in review": partial(neuroplastic_expansion_case, "ne", True),
}


# --------------------------------------------------------------------------------------------- sparse_mtrl_gmp_set


def gmp_set_case(arch: str, method: str, args: Args, graph: bool, critic: bool = True) -> Case:
    """MT10 at the paper's sizes with a full buffer of random transitions, at the final sparsity."""
    import sparse_mtrl_gmp_set as gmp_set

    script_args = gmp_set.Args(arch=arch, method=method, sparsify_critic=critic, **options(args, graph))
    agent = gmp_set.Agent(script_args, len(MT10), 39, 4, torch.device(args.device))
    fill(agent.replay)
    for sparse in agent.sparse.values():
        if method == "gmp":
            sparse.set_masks(gmp_set.prune(*map(gmp_set.matrices, (sparse.weights, sparse.masks)), agent.args.sparsity))
    observations, run = np.zeros((len(MT10), 39), np.float32), partial(train_on_all_tasks, args.workers, agent)
    return Case(agent, agent.update, observations, run, tasks=len(MT10), turn=500)


@functools.cache
def environments(workers: int, episode_steps: int):
    arguments = (list(MT10), [0] * len(MT10), episode_steps, "v2")
    return WorkerEnvs(*arguments, workers) if workers else TaskEnvs(*arguments)


def train_on_all_tasks(workers: int, agent, steps: int, overlapped: bool) -> None:
    """`train` in all environments at once."""
    envs, episode_steps = environments(workers, agent.args.episode_steps), agent.args.episode_steps
    for step in range(steps):
        if step % episode_steps == 0:
            obs = envs.reset([step] * len(MT10))
        actions = agent.explore(obs)
        if overlapped:
            agent.update()
        next_obs, rewards, _ = envs.step(actions)
        agent.replay.add(obs=obs, next_obs=next_obs, action=actions, reward=rewards)
        if not overlapped:
            agent.update()
        obs = next_obs


GMP_SET = {
    "shared, dense": partial(gmp_set_case, "shared", "dense"),
    "shared, GMP actor": partial(gmp_set_case, "shared", "gmp", critic=False),
    "shared, GMP both": partial(gmp_set_case, "shared", "gmp"),
    "shared, SET both": partial(gmp_set_case, "shared", "set"),
    "MOORE, dense": partial(gmp_set_case, "moore", "dense"),
    "MOORE, GMP both": partial(gmp_set_case, "moore", "gmp"),
}


# -------------------------------------------------------------------------------------------------------- mst_rigl


def mst_rigl_case(preset: str, args: Args, graph: bool, **changes) -> Case:
    """MR.Q with a full buffer on the sizes of dog-run; an average step of a whole target cycle.

    That is one update of the encoder and one of critics and actor: copying the targets comes once in 250 steps.
    """
    import mst_rigl

    arguments = mst_rigl.PRESETS.get(f"preset {preset}", {}) | {"total_steps": 500_000} | options(args, graph) | changes
    env_id = mst_rigl.Args.env_id
    obs_dim, act_dim = env_sizes(env_id)
    agent = mst_rigl.Agent(mst_rigl.Args(**arguments), obs_dim, act_dim, torch.device(args.device))
    replay = agent.replay
    for name, column in replay.data.items():
        column.normal_() if name in ("obs", "action", "reward") else column.fill_(1)
    replay.data["priority"][replay.capacity :] = 0  # rows that fill the last block
    replay.size = replay.capacity
    agent.copy_targets()

    def update() -> None:
        agent.captured_encoder(replay.terminates)
        agent.captured_critic_and_actor()

    run = partial(train, agent, env_id, add=replay.add, action_repeat=2)
    return Case(agent, update, np.zeros(obs_dim, np.float32), run, turn=500)


def mst_rigl_cases(args: Args) -> dict[str, Build]:
    cases = {
        "MR.Q, dense": partial(mst_rigl_case, "mrq"),
        "MR.Q, RigL critic": partial(mst_rigl_case, "mrq", critic_regime="rigl"),
        "MST": partial(mst_rigl_case, "mst"),
    }
    hardware = torch.cpu.get_capabilities()
    has_bf16 = any(has for name, has in hardware.items() if name.endswith("bf16")) or args.device == "cuda"
    if has_bf16:  # seconds a step elsewhere
        cases["MR.Q, dense, bf16"] = partial(mst_rigl_case, "mrq", bf16=True)
        cases["MST, bf16"] = partial(mst_rigl_case, "mst", bf16=True)
    return cases


def mst_scale_cases() -> dict[str, Build]:
    """MST at growing widths and depths, with a small buffer: the networks are what grows. The last is mst-362m."""
    case = partial(mst_rigl_case, "mst", buffer_size=10_000)
    cases = {f"width {width}": partial(case, width_scale=float(width)) for width in (1, 2, 3, 5)}
    cases["width 5, depth 4"] = partial(case, width_scale=5.0, depth_scale=4)
    return cases | {"width 5, depth 4, bf16": partial(case, width_scale=5.0, depth_scale=4, bf16=True)}


def chosen_cases(args: Args) -> dict[str, dict[str, Build]]:
    """What `--scripts` and `--variants` ask for: {script: {variant: how to build it}}."""
    cases = {"ssde": SSDE, "nbsp": NBSP, "neuroplastic_expansion": NEUROPLASTIC_EXPANSION}
    cases |= {"sparse_mtrl_gmp_set": GMP_SET, "mst_rigl": mst_rigl_cases(args)}
    scripts = args.scripts or tuple(cases)
    cases["mst_scale"] = mst_scale_cases()  # hours on a CPU with the default --repeats: only when it is asked for
    if strangers := set(scripts) - set(cases):
        sys.exit(f"--scripts: {', '.join(sorted(strangers))}: not one of {', '.join(cases)}")
    cases = {script: cases[script] for script in scripts}
    known = {variant for variants in cases.values() for variant in variants}
    if unknown := set(args.variants) - known:
        sys.exit(f"--variants: {', '.join(sorted(unknown))}: not a row of {', '.join(cases)}")
    wanted = args.variants or known
    cases = {script: {v: build for v, build in variants.items() if v in wanted} for script, variants in cases.items()}
    return {script: variants for script, variants in cases.items() if variants}


# ----------------------------------------------------------------------------------------------------- measurements

WARM_UP = {"cpu": 3, "cuda": 25}  # calls that allocate, and on CUDA capture: NBSP's replay comes every tenth update


def timed(function: Callable[[], object], args: Args) -> float:
    """Milliseconds of one call: by the clock where others work too, else of this thread, which may share its core."""
    several = args.device == "cuda" or args.workers or args.threads > 1
    clock = time.perf_counter if several else time.thread_time
    start = clock()
    function()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def medians_in_turns(functions: list[Callable[[], object]], repeats: int, args: Args) -> list[float]:
    """Median milliseconds of each function, called one after the other `repeats` times."""
    times = []
    for turn in range(repeats + WARM_UP[args.device]):
        row = [timed(function, args) for function in functions]
        if turn >= WARM_UP[args.device]:
            times.append(row)
    return np.median(times, axis=0).tolist()


def rates_in_turns(runs: list[tuple[Case, bool]], args: Args) -> list[float]:
    """Environment steps a second of each case, overlapped or not, in turns for `--end-to-end` on average."""
    for case, overlapped in runs:
        case.train(2 * WARM_UP[args.device], overlapped)
    turns = []
    while np.sum(turns) < 1000 * args.end_to_end * len(runs):
        turns.append([timed(partial(case.train, case.turn, overlapped), args) for case, overlapped in runs])
    milliseconds = np.median(turns, axis=0)
    return [1000 * case.turn * case.tasks / ms for (case, _), ms in zip(runs, milliseconds, strict=True)]


PRODUCT_GFLOP = 2 * 256 * 1024 * 1024 / 1e9


def matrix_product(device: str = "cpu") -> Callable[[], object]:
    """A 256x1024 by 1024x1024 float32 product, PRODUCT_GFLOP of arithmetic."""
    a, b = torch.randn(256, 1024, device=device), torch.randn(1024, 1024, device=device)
    return lambda: a @ b


def matrix_rate(args: Args) -> float:
    """GFLOP/s of `matrix_product` on the CPU, the best of 100."""
    product = matrix_product()
    return 1e3 * PRODUCT_GFLOP / min(timed(product, args) for _ in range(100))


def matrix_gflop(case: Case) -> float:
    """GFLOP of the matrix products of one update, which must not be compiled: the counter sees single operators."""
    with FlopCounterMode(display=False) as counter:
        case.update()
    return counter.get_total_flops() / case.updates / 1e9


def use(case: Case, device: str) -> None:
    """What takes memory in a run: updates and actions, also as CUDA graphs, and a checkpoint."""
    for _ in range(WARM_UP[device]):
        case.update()
        case.act()
    if hasattr(case.agent, "STATE"):
        with tempfile.TemporaryFile() as file:
            torch.save(state_of(case.agent), file)


def peak_memory(script: str, variant: str, args: Args) -> float:
    """Peak memory in MB of a process of its own on the CPU."""
    command = [sys.executable, __file__, "--memory-of", f"{script}:{variant}", "--scripts", script]
    command += ["--compile"] * args.compile
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def print_peak_memory(args: Args) -> None:
    script, variant = args.memory_of.split(":")
    use(chosen_cases(args)[script][variant](args, False), "cpu")
    # the process's own high-water mark: ru_maxrss is inherited from the process that forked it
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def peak_cuda_memory(build: Build, args: Args, graph: bool) -> float:
    """Peak memory of tensors on the GPU in MB, above what is there already."""
    gc.collect()  # an agent is part of a cycle
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    use(build(args, graph), "cuda")
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(script: str, variants: dict[str, Build], args: Args) -> dict[str, dict[str, str]]:
    """The rows of a script's table: {variant: {column: cell}}. On CUDA each form of a variant has its own columns."""
    cuda = args.device == "cuda"
    forms = [(variant, form) for variant in variants for form in (("eager", "captured") if cuda else ("",))]
    forms = [(variant, form) for variant, form in forms if form != "captured" or not variant.startswith("CleanRL")]
    # first, as the peak of a child process counts what its parent held when it was forked
    if cuda:
        memory = [peak_cuda_memory(variants[variant], args, form == "captured") for variant, form in forms]
    else:
        memory = [peak_memory(script, variant, args) for variant, _ in forms]
    cases = [variants[variant](args, form == "captured") for variant, form in forms]
    functions = [matrix_product(args.device), *(case.update for case in cases)]
    product, *updates = medians_in_turns(functions, args.repeats, args)
    updates = [update / case.updates for update, case in zip(updates, cases, strict=True)]
    actions = medians_in_turns([case.act for case in cases], 10 * args.repeats, args)
    if args.end_to_end:
        captured = [case for case, (_, form) in zip(cases, forms, strict=True) if form == "captured"]
        runs = [(case, False) for case in cases] + [(case, True) for case in captured]
        rates = rates_in_turns(runs, args)
        rates, rates_overlapped = rates[: len(cases)], iter(rates[len(cases) :])

    rows, base = {variant: {} for variant in variants}, {}
    for i, (variant, form) in enumerate(forms):
        cells = {"ms per update": f"{updates[i]:.2f}", "ratio": f"{updates[i] / base.setdefault(form, updates[i]):.3f}"}
        if not cuda:
            counted = variants[variant](replace(args, compile=False), False) if args.compile else cases[i]
            floor = matrix_gflop(counted) / PRODUCT_GFLOP * product  # of float32 products
            cells["x floor"] = "" if "bf16" in variant else f"{updates[i] / floor:.2f}"
        cells["ms per action"] = f"{actions[i]:.3f}"
        if args.end_to_end:
            cells["steps/s"] = f"{rates[i]:.1f}"
            if form == "captured":
                cells["steps/s overlapped"] = f"{next(rates_overlapped):.1f}"
        cells["peak MB"] = f"{memory[i]:.0f}"
        rows[variant] |= {f"{form} {column}".strip(): cell for column, cell in cells.items()}
    return rows


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    cases = chosen_cases(args)
    for script in cases:
        importlib.import_module(script.replace("mst_scale", "mst_rigl"))  # first: see `common.envs` on denormals
    torch.set_flush_denormal(True)
    if args.memory_of:
        return print_peak_memory(args)
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{args.threads} CPU thread(s), float32 matrix product {matrix_rate(args):.0f} GFLOP/s"
    print(f"{machine}, torch {torch.__version__}\n")
    header = None
    for script, variants in cases.items():
        rows = measure(script, variants, args)
        if header is None:
            header = max(rows.values(), key=len)
            print(" | ".join(("| script", "variant", *header)), "|\n" + "|---" * (2 + len(header)) + "|")
        for variant, cells in rows.items():
            print(" | ".join((f"| {script}", variant, *(cells.get(column, "") for column in header))), "|", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
