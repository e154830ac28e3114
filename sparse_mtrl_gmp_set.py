"""GMP and SET: sparsity that keeps multi-task reinforcement learning plastic.

Paper: Sparsity-Driven Plasticity in Multi-Task Reinforcement Learning, arXiv 2508.06871 (TMLR 2025), the half on
continuous control. Base algorithm: multi-task multi-head Soft Actor-Critic. Environments: Meta-World v3, MT10.

One actor and two critics learn all tasks at once, with an output head and a temperature for each. Networks that are
trained long and on many tasks lose plasticity: units fall silent, features lose rank. Gradual magnitude pruning (GMP)
removes the smallest weights step by step until 5 % are left. Sparse evolutionary training (SET) begins with 5 % and
keeps moving its smallest weights to random new places. On MT10 the paper's best agent prunes the actor only.

Read first: `GMP` and `SET` with the functions above them, `MultiTaskNetwork` and `gram_schmidt` (heads and experts),
`Agent.update`, then `main`.

Copy GMP and SET: `gmp_sparsity`, `drop_smallest`, `prune`, `evolve`, `erdos_renyi_counts`, `matrices`, `clear`,
`SparseLayers`, `GMP`, `SET` (81 lines; tests/transplants/gmp_set_ppo.py does it).

    sparse = GMP(layers, optimizer, total_updates)  # or SET(layers, optimizer)
    ...
    loss.backward()
    sparse.before_step()  # before the clip of the gradient's norm
    optimizer.step()
    sparse.after_step()

Copy ReDo: `clear`, `recycle` (48 lines; tests/transplants/gmp_set_ppo.py does it).

    python sparse_mtrl_gmp_set.py --quick                          # three easy tasks, small networks: minutes
    python sparse_mtrl_gmp_set.py --benchmark mt10                 # the paper's best: GMP on the actor, 20 M steps
    python sparse_mtrl_gmp_set.py --arch moore --method set        # orthogonal experts, sparse evolutionary training

The authors' code (github.com/atodorov284/sparsity_driven_plasticity) was not at hand. Where we differ from the paper
and from MOORE's code, and why:

1. A weight that is removed is an exact zero whose gradient is masked before it is clipped and whose Adam moments are
   zero. The forward pass multiplies nothing: sparsification costs a masked gradient per update.
2. The paper gives intervals in steps. Here GMP, SET, ReDo and Reset count gradient updates, on MT10 one for every ten
   environment steps, so that they mean the same for any number of tasks.
3. Only trunks are sparsified; the paper prunes heads too. Heads begin near 0 here (8), where a ranking of all weights
   together would take them first.
4. SET's new connections are drawn among those that were inactive before the drop, so each of them is new. Table 5 has
   zeta = 0.3 as the density parameter and 11 as zeta: two names swapped. The density is 1 - sparsity here; 11 is 7 %.
5. SET (which the paper has on MiniGrid only), ReDo and Reset act just before the next update: an evaluation in between
   sees no connection or head that was not trained yet.
6. MOORE's experts are orthogonalised by modified Gram-Schmidt, here also where one is 0; the authors' gives NaN then.
7. Goals are redrawn at every episode; MT10 proper draws them from a fixed list of 50 per task.
8. Where the paper is silent: trunks begin He-uniform (MOORE's code: +-1/sqrt(inputs)), heads small and uniform (MOORE:
   Xavier); SET's first weights are not enlarged for the few that are left, so features begin small; the temperature
   loss is linear in log alpha.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from annotated_types import Ge, Lt
from torch import Tensor, nn

from common import cli, metrics
from common.capture import Captured, CapturedPolicy, keep, with_gradients
from common.cli import Device, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, require
from common.envs import TaskEnvs, WorkerEnvs, env_sizes, make_env, seed_of, task_sequence
from common.recorder import Recorder, evaluate_stored, recorded, restored

LOG_EVERY = 1000  # updates between two points of the loss curves
METRIC_BATCH = 1024  # replayed transitions over all tasks (1020 of ten) for plasticity and ReDo (paper Table 5)
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # paper Table 3
MAX_RESETS = 2  # of the output layers (paper Table 5)
TRAIN_GOALS, EVAL_GOALS = 1, 2  # streams of random numbers, see `seed_of`

QUICK = {"benchmark": "reach,drawer-close,button-press", "total_steps": 90_000, "episode_steps": 200}
QUICK |= {"learning_starts": 3000, "eval_every": 15_000, "eval_episodes": 10, "hidden_dim": 128, "hidden_layers": 2}
QUICK |= {"prune_every": 500, "evolve_every": 500, "redo_every": 500, "reset_every": 10_000}
QUICK |= {"learning_rate": 1e-3, "gamma": 0.98}
PRESETS = {"quick": QUICK}

Steps = Annotated[PositiveInt, tyro.conf.arg(aliases=("--total-timesteps",))]


@dataclass
class Args:
    benchmark: str = "mt10"  # tasks that are learned together: mt10, mt50, or Meta-World names joined by commas
    total_steps: Steps = 20_000_000  # environment steps over all tasks together (paper: 2 M for each of ten tasks)
    seed: Seed = 1  # seed of everything random
    quick: bool = False  # a first look: three easy tasks, small networks, 30 000 steps each; other arguments still win
    resume: str | None = None  # continue the run in this folder with its arguments
    evaluate: str | None = None  # evaluate the run in this folder, print the table, exit
    episodes: PositiveInt = 10  # episodes per task of --evaluate
    run_dir: str | None = None  # folder of the run; by default a new one under runs/
    device: Device = "auto"  # auto: cuda if there is one; --evaluate plays on the CPU
    torch_threads: PositiveInt = 1  # CPU threads of PyTorch; 1 is fastest where several seeds run side by side
    num_workers: NonNegativeInt = 0  # processes that step the environments; 0: this one, in turn. Changes no result
    cuda_graph: bool = True  # on CUDA: updates and acting as CUDA graphs
    compile: bool = False  # torch.compile losses with their gradients: minutes at the start
    checkpoint_every: NonNegativeInt = 50_000  # environment steps between checkpoints; 0: start, end and signals only
    quiet: bool = False  # print nothing
    track: bool = False  # mirror TensorBoard to Weights & Biases
    wandb_project: str = "cleanplasticity"  # project of --track
    capture_video: bool = False  # record the first episode of each task at every evaluation

    # --- Environment and evaluation ---

    reward_version: Literal["v1", "v2"] = "v2"  # Meta-World's reward and success: v2 (0 to 10 a step) or v1 (0 to 2000)
    episode_steps: PositiveInt = 500  # steps of an episode (Table 3)
    eval_every: PositiveInt = 200_000  # environment steps over all tasks between evaluations; the end has one (Table 3)
    eval_episodes: PositiveInt = 50  # deterministic episodes per task and evaluation (Table 3)

    # --- Networks ---

    arch: Literal["shared", "moe", "moore"] = "shared"  # one trunk; a mixture of experts; of orthogonal experts
    experts: PositiveInt = 4  # trunks of moe and moore (MOORE's authors on MT10; 6 on MT50)
    hidden_dim: PositiveInt = 400  # units of a hidden layer (Table 3)
    hidden_layers: cli.Depth = 3  # hidden layers; the last one of an expert is linear (MOORE)

    # --- SAC ---

    buffer_size: PositiveInt = 1_000_000  # replay capacity over all tasks, transitions; every task has an equal share
    batch_per_task: PositiveInt = 128  # transitions of each task in an update (paper: 1280 for ten tasks)
    learning_starts: NonNegativeInt = 40_000  # random steps over all tasks before the first update (Table 3)
    gamma: Fraction = 0.99  # discount
    tau: Fraction = 0.005  # Polyak rate of the target critics
    learning_rate: PositiveFloat = 3e-4  # Adam step size of actor, critics and temperatures (Table 3)
    max_grad_norm: PositiveFloat = 1.0  # bound of the gradients of the actor, and of both critics together (Table 3)
    max_q: PositiveFloat = 5000.0  # target values are clipped to plus and minus this (Table 3, for v2 rewards)

    # --- Sparsification ---

    method: Literal["gmp", "set", "dense"] = "gmp"  # gradual magnitude pruning; sparse evolutionary training; neither
    sparsify_actor: bool = True  # sparsify the actor
    sparsify_critic: bool = False  # sparsify both critics (the paper's best on MT10 leaves them dense)
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.95  # share of a trunk removed: GMP's final one, SET's always (Table 5)
    prune_every: PositiveInt = 5000  # updates between GMP's pruning steps (Table 3)
    prune_start: Fraction = 0.05  # GMP begins after this share of all updates (Table 3)
    prune_until: Fraction = 0.80  # GMP reaches its final sparsity after this share of all updates (Table 3)
    prune_scope: Literal["global", "layer"] = "global"  # GMP ranks all weights of a trunk together, or layer by layer
    evolve_every: PositiveInt = 2000  # updates between SET's rewirings (Table 5)
    zeta: Fraction = 0.3  # share of each layer's connections that SET moves (Table 5, under a swapped name)

    # --- The other interventions of the paper; they combine with --method ---

    intervention: Literal["none", "redo", "reset", "layernorm", "weight-decay"] = "none"  # reset: output layers anew
    redo_every: PositiveInt = 5000  # updates between recyclings of dormant units (Table 5)
    dormant_threshold: NonNegativeFloat = 0.001  # units that score at most this are dormant (Table 5: ReDo)
    reset_every: PositiveInt = 100_000  # updates between resets of the output layers, at most two of them (Table 5)
    weight_decay: NonNegativeFloat = 1e-6  # AdamW's coefficient (Table 5); times the step size it is lost in float32


# --------------------------------------------------------------------------------------------- the method: GMP and SET


def gmp_sparsity(update: int, total_updates: int, start: float, until: float, final: float) -> float:
    """0 up to t_0 = start * total, final * [1 - (1 - (t - t_0) / (t_1 - t_0))^3] up to t_1 = until * total."""
    progress = (update - start * total_updates) / ((until - start) * total_updates)
    return final * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


def drop_smallest(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """`mask` without the `count` of its connections that have the smallest |w|. Any shape."""
    smallest = weight.abs().masked_fill(~mask, math.inf).flatten().topk(count, largest=False, sorted=False).indices
    return mask.flatten().index_fill(0, smallest, False).view_as(mask)


def prune(weights: list[Tensor], masks: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks at `sparsity`, by |w| among all `weights` together. Any shapes. What was pruned never comes back."""
    weight, present = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (weights, masks))
    kept = drop_smallest(weight, present, max(0, round(sparsity * len(present)) - int((~present).sum())))
    return [part.view_as(mask) for part, mask in zip(kept.split([m.numel() for m in masks]), masks, strict=True)]


def evolve(weight: Tensor, mask: Tensor, zeta: float) -> Tensor:
    """The mask after SET moved the share `zeta` of its connections, the smallest, to random places that were free."""
    free = (~mask).flatten().nonzero()[:, 0]
    moved = min(int(zeta * int(mask.sum())), len(free))
    grown = free[torch.randperm(len(free), device=mask.device)[:moved]]
    return drop_smallest(weight, mask, moved).flatten().index_fill(0, grown, True).view_as(mask)


def erdos_renyi_counts(shapes: list[tuple[int, ...]], sparsity: float) -> list[int]:
    """Connections of each layer: density proportional to sum(shape) / prod(shape), at most 1, exact in total (SET)."""
    sizes, sums = [math.prod(shape) for shape in shapes], [sum(shape) for shape in shapes]
    counts, left, rest = [0] * len(shapes), round((1 - sparsity) * sum(sizes)), sum(sums)
    for i in sorted(range(len(shapes)), key=lambda i: sizes[i] / sums[i]):  # those that become dense come first
        counts[i] = min(sizes[i], round(left * sums[i] / rest))
        left, rest = left - counts[i], rest - sums[i]
    return counts


def matrices(tensors: list[Tensor]) -> list[Tensor]:
    """A view per layer. Of three dimensions, (copies, inputs, outputs), each copy is one: so no Conv1d."""
    return [matrix for t in tensors for matrix in (t.detach().unbind() if t.dim() == 3 else [t.detach()])]


def clear(weight: Tensor, where: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Weights in `where` (boolean) become 0, and so does all that the optimizer remembers of them."""
    memory = optimizer.state.get(weight, {}).values()  # empty before the first step
    for tensor in [weight.detach(), *(t for t in memory if torch.is_tensor(t) and t.shape == weight.shape)]:
        tensor.masked_fill_(where, 0)


class SparseLayers:
    """Layers some of whose weights are missing: 0, with gradient and moments 0. `GMP` and `SET` say which.

    layers: anything with a `weight`: linear (outputs, inputs), convolutional (outputs, inputs, k, k), or a matrix per
    expert or task (copies, inputs, outputs), where each copy counts as a layer. every: updates between new masks.
    """

    STATE = ("masks", "updates")  # a resume makes this, loads the weights, assigns these

    def __init__(self, layers, optimizer: torch.optim.Optimizer, every: int):
        self.weights = [layer.get_parameter("weight") for layer in layers]  # not what a parametrization computes
        self.optimizer, self.every, self.updates = optimizer, every, 0
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights]

    def before_step(self) -> None:
        """Between `backward` and the clip of the gradient's norm: with a gradient of 0 Adam leaves a 0 alone."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def after_step(self) -> None:
        """Once after each optimizer step: new masks if due. Evaluate GMP after it, SET before: what SET moved is 0."""
        self.updates += 1
        if self.updates % self.every == 0:
            self.set_masks(self.next_masks(matrices(self.weights), matrices(self.masks)))

    def set_masks(self, masks: list[Tensor]) -> None:
        """What is missing becomes 0, in weights and moments, so what grows there later starts from 0."""
        if not all(mask.any() for mask in masks):
            warnings.warn(f"{type(self).__name__} left a layer without connections", stacklevel=3)
        for old, new in zip(matrices(self.masks), masks, strict=True):
            old.copy_(new)
        for weight, mask in zip(self.weights, self.masks, strict=True):
            clear(weight, ~mask, self.optimizer)


class GMP(SparseLayers):
    """Gradual magnitude pruning (Zhu & Gupta 2017). total_updates: of the whole run; local: rank |w| layer by layer."""

    def __init__(self, layers, optimizer, total_updates, sparsity=0.95, start=0.05, until=0.8, every=5000, local=False):
        super().__init__(layers, optimizer, every)
        assert start < until <= total_updates // every * every / total_updates, "no pruning step at the final sparsity"
        self.schedule, self.local = (total_updates, start, until, sparsity), local

    def next_masks(self, weights: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        groups = [([w], [m]) for w, m in zip(weights, masks, strict=True)] if self.local else [(weights, masks)]
        return [mask for group in groups for mask in prune(*group, gmp_sparsity(self.updates, *self.schedule))]


class SET(SparseLayers):
    """Sparse evolutionary training (Mocanu et al. 2018), from random masks; zeta: share of connections that move."""

    def __init__(self, layers, optimizer, sparsity=0.95, zeta=0.3, every=2000):
        super().__init__(layers, optimizer, every)
        self.zeta, parts = zeta, matrices(self.masks)
        counts = erdos_renyi_counts([tuple(part.shape) for part in parts], sparsity)
        self.set_masks([torch.randperm(m.numel()).view_as(m) < n for m, n in zip(parts, counts, strict=True)])

    def next_masks(self, weights: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        return [evolve(weight, mask, self.zeta) for weight, mask in zip(weights, masks, strict=True)]


# ------------------------------------------------------------------------------- the other interventions of the paper


@torch.no_grad()
def recycle(levels: list, optimizer, forward: Callable, threshold: float, masks: dict | None = None) -> int:
    """ReDo (Sokar et al. 2023): give dormant ReLU units a new start; returns how many they were.

    A unit is dormant if its mean |h| is at most threshold times the mean over its level's connected units. Its incoming
    weights are drawn anew (He-uniform), where they exist; its bias, its outgoing weights and their moments become 0.

    levels: layers in order, as in `SparseLayers`, each of which reads the one before and nothing else; only the last
    may be a list, of several that read the same units: [conv, fc, [fc_mean, fc_logstd]]. Its outputs are not units.
    forward: runs them on a batch, `lambda: actor(obs)`.
    masks: {weight: boolean, its shape} of those with missing connections, `dict(zip(sparse.weights, sparse.masks))`.
    """
    levels, masks = [level if isinstance(level, list) else [level] for level in levels], masks or {}
    inputs: dict = {reader: [] for readers in levels[1:] for reader in readers}
    hooks = [r.register_forward_pre_hook(lambda layer, read: inputs[layer].append(read[0].abs())) for r in inputs]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    dormant = []  # boolean (copies, units) for each level; copies: 1, or the experts
    for (layer,), readers in pairwise(levels):
        mask = masks.get(layer.weight, torch.ones_like(layer.weight, dtype=torch.bool))
        connected = mask.any(1) if mask.dim() == 3 else mask.flatten(1).any(1)[None]
        copies, units = connected.shape
        # a convolution's unit is a channel, read by a convolution or, flattened channels first, by a linear layer
        fits = all(r.weight.shape[1] == units or layer.weight.dim() > 3 >= r.weight.dim() for r in readers)
        assert fits, "a layer reads something else than the units of the one before"
        seen = [(reader.weight.dim() > 3, x) for reader in readers for x in inputs[reader]]
        seen = [x.flatten(2).mean(2) if conv else x.unflatten(-1, (units, -1)).mean(-1) for conv, x in seen]
        magnitude = torch.cat([x.reshape(copies, -1, units) for x in seen], 1).mean(1)
        dormant.append((magnitude <= threshold * magnitude[connected].mean()) & connected)
    for (layer,), units in zip(levels[:-1], dormant, strict=True):
        weight, bound = layer.weight, math.sqrt(6 * units.numel() / layer.weight.numel())
        rows = units[:, None] if weight.dim() == 3 else units.view(-1, *[1] * (weight.dim() - 1))
        fresh = torch.empty_like(weight).uniform_(-bound, bound) * masks.get(weight, 1)
        clear(weight, rows, optimizer)
        weight.add_(fresh * rows)
        if getattr(layer, "bias", None) is not None:
            clear(layer.bias, units.view_as(layer.bias), optimizer)
    for readers, units in zip(levels[1:], dormant, strict=True):  # last: a weight between two dormant units ends at 0
        for reader in readers:
            columns = units.repeat_interleave(reader.weight.shape[1] // units.shape[1], 1)
            clear(reader.weight, columns.view(*columns.shape, *[1] * (reader.weight.dim() - 2)), optimizer)
    return sum(int(units.sum()) for units in dormant)


@torch.no_grad()
def reset_heads(heads: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reset (Nikishin et al. 2022): draw the output layers anew and forget their moments."""
    for parameter in heads.parameters():
        clear(parameter, torch.ones_like(parameter, dtype=torch.bool), optimizer)
    heads.reset_parameters()


# --------------------------------------------------------------------------------------------------------- networks


class ExpertLinear(nn.Module):
    """A linear layer for each of k experts, in one batched product: (k, batch, inputs) -> (k, batch, outputs)."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        bound = math.sqrt(6 / inputs)  # He
        self.weight = nn.Parameter(torch.empty(experts, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(experts, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class ExpertNorm(nn.Module):
    """LayerNorm over the units of each expert, with a gain and a shift per expert: (k, batch, units) -> same."""

    def __init__(self, experts: int, units: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(experts, 1, units))
        self.shift = nn.Parameter(torch.zeros(experts, 1, units))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, F.layer_norm(x, x.shape[-1:]), self.gain)


class TaskHeads(nn.Module):
    """A linear output layer per task, in one batched product. It begins as U(-scale, scale)."""

    def __init__(self, tasks: int, inputs: int, outputs: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(tasks, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(tasks, 1, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.scale, self.scale)
        nn.init.uniform_(self.bias, -self.scale, self.scale)

    def forward(self, features: Tensor, tasks: slice) -> Tensor:
        """(tasks * batch, inputs), the samples of each task in `tasks`, in order -> (tasks, batch, outputs)."""
        weight = self.weight[tasks]
        return torch.baddbmm(self.bias[tasks], features.view(len(weight), -1, weight.shape[1]), weight)


class MultiTaskNetwork(nn.Module):
    """A trunk or a mixture of experts that all tasks share, and a linear head per task.

    shared: the input carries the task's one-hot; all layers of the trunk end in a ReLU.
    moe: k experts see the input without it; the last layer of an expert is linear. A task mixes their outputs E_j with
        its own weights, tanh(sum_j w_j(task) E_j(x)); w is a linear map, without bias, of the task's one-hot.
    moore: the same after the k outputs were made orthonormal for every sample (arXiv 2311.11385).

    `--intervention layernorm` normalises before each ReLU.

    Args:
        inputs, outputs: sizes of one sample.
        head_scale: the heads begin as U(-head_scale, head_scale).
    """

    def __init__(self, args: Args, tasks: int, inputs: int, outputs: int, head_scale: float):
        super().__init__()
        self.arch = args.arch
        shared = args.arch == "shared"
        self.experts = 1 if shared else args.experts
        sizes = [inputs + tasks if shared else inputs, *[args.hidden_dim] * args.hidden_layers]
        self.layers = nn.ModuleList(ExpertLinear(self.experts, *size) for size in pairwise(sizes))
        norm = partial(ExpertNorm, self.experts, args.hidden_dim) if args.intervention == "layernorm" else nn.Identity
        self.norms = nn.ModuleList(norm() for _ in range(args.hidden_layers if shared else args.hidden_layers - 1))
        if shared:
            self.register_buffer("one_hot", torch.eye(tasks))
        else:
            self.mixing = nn.Parameter(nn.init.xavier_uniform_(torch.empty(tasks, self.experts)))
        self.heads = TaskHeads(tasks, args.hidden_dim, outputs, head_scale)

    def forward(self, x: Tensor, tasks: slice = slice(None)) -> Tensor:
        """(tasks, batch, inputs), the samples of each task in `tasks`, in order -> (tasks, batch, outputs)."""
        count, batch = x.shape[:2]
        if self.arch == "shared":
            x = torch.cat([x, self.one_hot[tasks, None].expand(-1, batch, -1)], -1)
        h = x.reshape(1, count * batch, -1).expand(self.experts, -1, -1)
        for layer, norm in zip(self.layers, self.norms, strict=False):  # not the last layer of an expert
            h = F.relu(norm(layer(h)), inplace=True)
        if self.arch == "shared":
            return self.heads(h[0], tasks)
        outputs = self.layers[-1](h).view(self.experts, count, batch, -1).unbind()
        if self.arch == "moore":
            outputs = gram_schmidt(outputs)
        weights = self.mixing[tasks, :, None, None].unbind(1)
        features = torch.tanh(sum(w * output for w, output in zip(weights, outputs, strict=True)))
        return self.heads(features.flatten(0, 1), tasks)

    def levels(self) -> list[nn.Module]:
        """Layers for `recycle`: those whose outputs are ReLU units, and the last that reads such units."""
        return [*self.layers, self.heads] if self.arch == "shared" else [*self.layers]

    def connected_units(self, masks: list[Tensor]) -> list[Tensor]:
        """Which units of each hidden layer have an incoming connection, boolean (units,), by the layers' masks."""
        units = [mask.any(1) for mask in masks]
        if self.arch != "shared":
            units[-1] = units[-1].any(0)  # of the mixture: in one of the experts
        return [u.flatten() for u in units]


def gram_schmidt(vectors: tuple[Tensor, ...], eps: float = 1e-4) -> list[Tensor]:
    """Orthonormal vectors with the same spans, sample by sample (MOORE, Eq. 4): k times (..., units) -> the same.

    Modified Gram-Schmidt: each projection is taken off what is left of the vector, not off the vector, and all of them
    twice: with nearly parallel experts what is left is short and its rounding errors are large. A vector of which less
    than the share eps is left becomes 0 and gets no gradient: it was zero, as from an untrained expert without
    connections, or depends on those before it, and a division by its norm would give NaN or noise.
    """
    basis: list[Tensor] = []
    for vector in vectors:
        length = vector.norm(dim=-1, keepdim=True)
        for unit in basis * 2:
            vector = torch.addcmul(vector, (vector * unit).sum(-1, keepdim=True), unit, value=-1)
        norm = vector.norm(dim=-1, keepdim=True)
        basis.append(vector / torch.where(norm > eps * length, norm, torch.inf))
    return basis


class Actor(MultiTaskNetwork):
    """Gaussian policy per task, squashed by tanh. One network gives mean and log-std."""

    def __init__(self, args: Args, tasks: int, obs_dim: int, act_dim: int):
        super().__init__(args, tasks, obs_dim, 2 * act_dim, head_scale=1e-3)

    def distribution(self, obs: Tensor, tasks: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(tasks, batch, obs_dim) -> mean and log-std before the squash, (tasks, batch, act_dim) each."""
        mean, log_std = self(obs, tasks).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (tasks, batch, act_dim) in (-1, 1) and their log-probabilities (tasks, batch)."""
        mean, log_std = self.distribution(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # log of the tanh's derivative, in a form that does not overflow
        log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_derivative
        return torch.tanh(u), log_prob.sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, task: int) -> np.ndarray:
        """One observation (obs_dim,) of one task, of any float type -> the mean's action (act_dim,)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.heads.weight.device)
        return torch.tanh(self.distribution(obs[None, None], slice(task, task + 1))[0])[0, 0].cpu().numpy()


class Critic(MultiTaskNetwork):
    """Q(s, a) per task."""

    def __init__(self, args: Args, tasks: int, obs_dim: int, act_dim: int):
        super().__init__(args, tasks, obs_dim + act_dim, 1, head_scale=3e-3)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(tasks, batch, obs_dim), (tasks, batch, act_dim) -> (tasks, batch)."""
        return super().forward(torch.cat([obs, action], -1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------- SAC


class ReplayBuffer:
    """A ring of transitions per task in preallocated tensors (tasks, capacity, ...), all filled at the same pace.

    Meta-World never terminates, so there is no terminal flag.
    """

    def __init__(self, tasks: int, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        sizes = {"obs": (obs_dim,), "next_obs": (obs_dim,), "action": (act_dim,), "reward": ()}
        # on a CPU, unwritten pages of zeros take no memory
        self.data = {name: torch.zeros(tasks, capacity, *size, device=device) for name, size in sizes.items()}
        self.tasks, self.capacity, self.added = torch.arange(tasks, device=device)[:, None], capacity, 0
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # transitions of each task

    def add(self, **transition: np.ndarray) -> None:
        """Append one transition of each task, arrays (tasks, ...), over the oldest when full."""
        for name, value in transition.items():
            self.data[name][:, self.added % self.capacity] = torch.from_numpy(value)
        self.added += 1
        self.size.fill_(min(self.added, self.capacity))

    def sample(self, batch_per_task: int) -> dict[str, Tensor]:
        """Uniform draws with replacement, the same number from each task: (tasks, batch_per_task, ...)."""
        rows = torch.randint(2**62, (len(self.tasks), batch_per_task), device=self.tasks.device) % self.size
        return {name: column[self.tasks, rows] for name, column in self.data.items()}

    def state_dict(self) -> dict:
        # a slice would save its whole storage: clone what is filled
        return {"data": {name: c[:, : self.added].clone() for name, c in self.data.items()}, "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        self.size.fill_(min(self.added, self.capacity))
        for name, column in state["data"].items():
            self.data[name][:, : self.added] = column


def critic_loss(actor, critics, targets, log_alpha: Tensor, batch: dict, args: Args) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, summed, per task (tasks,), and the mean of the first critic's Q, 0-d.

    No terminal mask: episodes end by their time only. log_alpha: (tasks,); batch: (tasks, batch, ...).
    """
    with torch.no_grad():
        next_action, next_log_prob = actor.sample(batch["next_obs"])
        next_q = torch.min(*(target(batch["next_obs"], next_action) for target in targets))
        y = batch["reward"] + args.gamma * (next_q - log_alpha.exp()[:, None] * next_log_prob)
        y = y.clamp(-args.max_q, args.max_q)
    values = [critic(batch["obs"], batch["action"]) for critic in critics]
    return sum((q - y).square().mean(1) for q in values), values[0].detach().mean()


def actor_loss(actor: Actor, critics: nn.ModuleList, log_alpha: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
    """alpha log pi - Q and the mean of log pi, both per task (tasks,)."""
    action, log_prob = actor.sample(obs)
    q = torch.min(*(critic(obs, action) for critic in critics))
    return (log_alpha.detach().exp()[:, None] * log_prob - q).mean(1), log_prob.detach().mean(1)


class Agent:
    """Multi-task SAC with sparse or dense networks."""

    STATE = ("actor", "critics", "targets", "log_alpha", "actor_optimizer", "critic_optimizer", "alpha_optimizer")
    STATE += ("replay", "sparse", "updates", "resets", "recycled")

    def __init__(self, args: Args, tasks: int, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.tasks, self.obs_dim, self.act_dim, self.device = args, tasks, obs_dim, act_dim, device
        sizes = (tasks, obs_dim, act_dim)
        self.actor = Actor(args, *sizes).to(device)
        self.critics = nn.ModuleList(Critic(args, *sizes) for _ in range(2)).to(device)
        self.log_alpha = torch.zeros(tasks, device=device, requires_grad=True)
        decay = args.weight_decay if args.intervention == "weight-decay" else 0.0  # AdamW without decay is Adam
        options = {"lr": args.learning_rate, "eps": 1e-5, "fused": True, "capturable": device.type == "cuda"}
        adam = partial(torch.optim.AdamW, **options)
        self.actor_optimizer = adam(self.actor.parameters(), weight_decay=decay)
        self.critic_optimizer = adam(self.critics.parameters(), weight_decay=decay)
        self.alpha_optimizer = adam([self.log_alpha], weight_decay=0.0)
        self.replay = ReplayBuffer(tasks, min(args.buffer_size, args.total_steps) // tasks, obs_dim, act_dim, device)
        self.updates, self.resets, self.recycled = 0, 0, 0
        self.losses: dict[str, Tensor] = {}  # the latest ones, 0-d
        self.grad_norms: dict[str, Tensor] = {}  # "actor" and "critics" (both), masked, before clipping
        self.captured = Captured(self.learn, device, args.cuda_graph)
        self.explore = CapturedPolicy(lambda obs: self.actor.sample(obs[:, None])[0][:, 0], device, args.cuda_graph)
        self.critic_backward = with_gradients(critic_loss, self.critic_optimizer, args.compile)
        self.actor_backward = with_gradients(actor_loss, self.actor_optimizer, args.compile)
        self.sparse: dict[str, GMP | SET] = {}  # what decides which weights exist, by network
        for name, network, optimizer in self.networks():
            if args.method != "dense" and (args.sparsify_actor if name == "actor" else args.sparsify_critic):
                self.sparse[name] = self.sparsified(network.layers, optimizer)
        self.targets = copy.deepcopy(self.critics)  # they follow by averaging and need no masks

    def networks(self) -> Iterator[tuple[str, MultiTaskNetwork, torch.optim.Optimizer]]:
        """Actor and critics, with the optimizer that trains them."""
        yield "actor", self.actor, self.actor_optimizer
        for i, critic in enumerate(self.critics, start=1):
            yield f"critic{i}", critic, self.critic_optimizer

    def sparsified(self, layers: nn.ModuleList, optimizer: torch.optim.Optimizer) -> GMP | SET:
        """The method on a trunk."""
        args, updates = self.args, count_updates(self.args, self.tasks)
        if args.method == "set":
            return SET(layers, optimizer, args.sparsity, args.zeta, args.evolve_every)
        schedule = {"start": args.prune_start, "until": args.prune_until, "every": args.prune_every}
        return GMP(layers, optimizer, updates, args.sparsity, **schedule, local=args.prune_scope == "layer")

    def masks(self, name: str, network: MultiTaskNetwork) -> list[Tensor]:
        """Which connections of a trunk exist: boolean (k, inputs, outputs) per layer."""
        if name in self.sparse:
            return self.sparse[name].masks
        return [torch.ones_like(layer.weight, dtype=torch.bool) for layer in network.layers]

    # ------------------------------------------------------------------------------------------------------ training

    def update(self) -> None:
        """One SAC update on all tasks; `losses` has the latest. Nothing here waits for the device."""
        self.captured()
        self.updates += 1

    def learn(self) -> None:
        """The work of an update: one CUDA graph (common/capture.py), so it changes tensors in place only.

        A `..._backward` leaves the gradients of the loss's mean in `.grad`, see `with_gradients`.
        """
        args, batch = self.args, self.replay.sample(self.args.batch_per_task)
        q_losses, q_mean = self.critic_backward(self.actor, self.critics, self.targets, self.log_alpha, batch, args)
        self.step("critics", self.critic_optimizer)
        actor_losses, log_prob = self.actor_backward(self.actor, self.critics, self.log_alpha, batch["obs"])
        self.step("actor", self.actor_optimizer)

        # target entropy -|A|; the loss is linear in log alpha
        alpha_loss = -(self.log_alpha * (log_prob - self.act_dim)).mean()
        self.alpha_optimizer.zero_grad(set_to_none=True)
        alpha_loss.backward()
        self.alpha_optimizer.step()
        with torch.no_grad():
            for target, value in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(value, args.tau)
        values = {"critic": q_losses.mean(), "actor": actor_losses.mean(), "q": q_mean, "entropy": -log_prob.mean()}
        keep(self.losses, values | {"alpha": self.log_alpha.exp().mean()})

    def step(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """The gradients, masked, then clipped; the optimizer's step."""
        parameters = optimizer.param_groups[0]["params"]
        for sparse in self.sparse.values():
            if sparse.optimizer is optimizer:
                sparse.before_step()
        keep(self.grad_norms, {name: nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)})
        optimizer.step()

    def after_update(self) -> dict[str, float]:
        """GMP's pruning, if it is time, so that evaluations see its sparsity. Returns what there is to log."""
        if self.args.method != "gmp":
            return {}
        for sparse in self.sparse.values():
            sparse.after_step()
        return self.densities() if self.updates % self.args.prune_every == 0 else {}

    def before_update(self) -> dict[str, float]:
        """Rewire (SET), recycle (ReDo) or reset, if it is time. Returns what there is to log.

        Before the next update and not after the last: the evaluations in between see weights that were trained.
        """
        args, report = self.args, {}
        if self.updates == 0:
            return {}
        if args.method == "set":  # put off from the last update; before ReDo, whose outgoing zeros it would drop
            for sparse in self.sparse.values():
                sparse.after_step()
        if args.intervention == "redo" and self.updates % args.redo_every == 0:
            batch = self.replay.sample(max(1, METRIC_BATCH // self.tasks))
            for name, network, optimizer in self.networks():
                weights = [layer.weight for layer in network.layers]
                masks = dict(zip(weights, self.masks(name, network), strict=True))
                inputs = [batch["obs"]] if name == "actor" else [batch["obs"], batch["action"]]
                levels, forward = network.levels(), partial(network, *inputs)
                recycled = recycle(levels, optimizer, forward, args.dormant_threshold, masks)
                report[f"method/recycled/{name}"] = recycled
            self.recycled += sum(report.values())
        if args.intervention == "reset" and self.updates % args.reset_every == 0 and self.resets < MAX_RESETS:
            for _, network, optimizer in self.networks():
                reset_heads(network.heads, optimizer)
            for target, critic in zip(self.targets, self.critics, strict=True):
                target.heads.load_state_dict(critic.heads.state_dict())  # as Nikishin et al.
            self.resets += 1
            report["method/resets"] = self.resets
        return report

    # ------------------------------------------------------------------------------------------------------- metrics

    def densities(self) -> dict[str, float]:
        """Share of connections that exist: in each trunk, in its layers, and from the action into a critic."""
        scalars = {}
        for name, network, _ in self.networks():
            masks = self.masks(name, network)
            scalars[f"sparsity/{name}/density"] = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
            scalars |= {f"sparsity/{name}/layer{i}": int(m.sum()) / m.numel() for i, m in enumerate(masks, start=1)}
            if network is not self.actor:
                action = masks[0][:, self.obs_dim : self.obs_dim + self.act_dim]
                scalars[f"sparsity/{name}/action"] = int(action.sum()) / action.numel()
        return scalars

    def plasticity(self) -> dict[str, Tensor]:
        """Metrics of actor and first critic on replayed transitions. Takes no random number from the training."""
        masks = {"actor": self.masks("actor", self.actor), "critic": self.masks("critic1", self.critics[0])}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            batch = self.replay.sample(max(1, METRIC_BATCH // self.tasks))
            trace = fisher_trace(self.actor, batch["obs"], masks["actor"])
            losses = {"actor": actor_loss(self.actor, self.critics, self.log_alpha, batch["obs"])[0]}
            learners = (self.actor, self.critics, self.targets, self.log_alpha)
            losses["critic"] = critic_loss(*learners, batch, self.args)[0]
        pair = (batch["obs"], batch["action"])
        networks = {"actor": (self.actor, pair[:1]), "critic": (self.critics[0], pair)}
        active = {name: network.connected_units(masks[name]) for name, (network, _) in networks.items()}
        scalars = metrics.plasticity(networks, active) | {"plasticity/actor/fisher_trace": trace}
        for name, (network, inputs) in networks.items():
            features = metrics.hidden_features(network, inputs)
            dormant = metrics.dormant_ratio(features, self.args.dormant_threshold, active[name])
            scalars[f"method/dormant_ratio/{name}"] = dormant
            if self.tasks > 1:
                gradients = trunk_gradients(network, losses[name], masks[name])
                scalars[f"plasticity/{name}/gradient_cosine"] = metrics.gradient_cosine(gradients)
        return scalars

    def parameter_counts(self) -> dict[str, int]:
        """Weights and biases of the actor and of one critic, and how many of them are left."""
        counts = {}
        for name, network, _ in list(self.networks())[:2]:
            net = name.rstrip("1")
            counts[net] = sum(p.numel() for p in network.parameters())
            counts[f"{net}_active"] = counts[net] - sum(int((~mask).sum()) for mask in self.masks(name, network))
        return counts


def trunk_gradients(network: MultiTaskNetwork, losses: Tensor, masks: list[Tensor]) -> Tensor:
    """Gradient of each task's loss (tasks,) in the trunk's existing connections: (tasks, weights)."""
    weights = [layer.weight for layer in network.layers]
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        rows.append(torch.cat([(g * mask).flatten() for g, mask in zip(gradients, masks, strict=True)]))
    return torch.stack(rows)


def fisher_trace(actor: Actor, obs: Tensor, masks: list[Tensor]) -> Tensor:
    """E ||grad_theta log pi(a|s)||^2 over the samples of all tasks, a ~ pi, without missing connections (paper C.2).

    obs: (tasks, batch, obs_dim). The actions before the squash serve, as its Jacobian has no parameters.
    """
    by_name = {f"layers.{i}.weight": mask for i, mask in enumerate(masks)}
    with torch.no_grad():
        mean, log_std = actor.distribution(obs)
        u = mean + log_std.exp() * torch.randn_like(mean)

    def log_prob(task: int, parameters: dict[str, Tensor], obs: Tensor, u: Tensor) -> Tensor:
        present = {name: p * by_name[name] if name in by_name else p for name, p in parameters.items()}
        arguments = (obs[None, None], slice(task, task + 1))
        mean, log_std = torch.func.functional_call(actor, present, arguments)[0, 0].chunk(2, -1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        return (-0.5 * ((u - mean) / log_std.exp()).square() - log_std).sum()

    parameters = dict(actor.named_parameters())
    traces = [metrics.fisher_trace(partial(log_prob, i), parameters, (obs[i], u[i])) for i in range(len(obs))]
    return torch.stack(traces).mean()


# ------------------------------------------------------------------------------------------------------ the run


def count_updates(args: Args, tasks: int) -> int:
    """Updates of a whole run: one per step of all environments, after the warm-up."""
    return args.total_steps // tasks - args.learning_starts // tasks


def check(args: Args, tasks: list[str]) -> None:
    """Refuse what the types of `Args` cannot tell, such as a run that would end before its final sparsity."""
    updates = count_updates(args, len(tasks))
    last, first = updates // args.prune_every * args.prune_every, math.ceil(args.prune_until * updates)
    fits, sparse = args.experts <= args.hidden_dim, args.sparsify_actor or args.sparsify_critic
    number, mixture = f"the number of tasks, {len(tasks)}", f"with --arch {args.arch}"
    clipped = f"v2 unless --max-q is above {Args.max_q}: v1 pays up to 2000 a step"
    final = f"so that a multiple of it is among the final updates, {first} to {updates}"
    rules = [
        ("prune_start", args.prune_start < args.prune_until, f"below --prune-until {args.prune_until}"),
        ("hidden_layers", args.arch == "shared" or args.hidden_layers >= 2, f"at least 2 {mixture}"),
        ("experts", args.arch != "moore" or fits, f"at most --hidden-dim {args.hidden_dim} {mixture}"),
        ("method", args.method == "dense" or sparse, "dense where neither actor nor critic is sparsified"),
        ("reward_version", args.reward_version == "v2" or args.max_q > Args.max_q, clipped),
        ("benchmark", len(set(tasks)) == len(tasks), "a list without repetition"),
        ("num_workers", args.num_workers <= len(tasks), f"at most {number}"),
        ("buffer_size", args.buffer_size >= len(tasks), f"at least {number}"),
        ("learning_starts", updates >= 1, f"below --total-steps {args.total_steps} by a step of every task"),
        ("prune_every", args.method != "gmp" or last >= args.prune_until * updates, final),
    ]
    due = [("evolve_every", args.method == "set"), ("redo_every", args.intervention == "redo")]
    for name, used in [*due, ("reset_every", args.intervention == "reset")]:
        rules.append((name, not used or getattr(args, name) < updates, f"below the number of updates, {updates}"))
    for rule in rules:
        require(args, *rule)


@cli.loader
def load_actor(run_dir: str) -> Actor:
    """The actor of a stored run, as its last checkpoint has it."""
    args, checkpoint = cli.load_run(run_dir, Args, "sparse_mtrl_gmp_set")
    tasks = task_sequence(args.benchmark, "--benchmark")
    actor = Actor(args, len(tasks), *env_sizes(tasks[0]))
    actor.load_state_dict(checkpoint["agent"]["actor"])
    return actor


def load_policy(run_dir: str, task: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The policy of a stored run on one of its tasks: an observation (obs_dim,) -> the mean's action (act_dim,)."""
    actor = load_actor(run_dir)
    cli.require_task(run_dir, task, len(actor.heads.weight))
    return partial(actor.act, task=task)


@recorded
def main(args: Args) -> dict:
    """Train on all tasks; returns what results.json holds, with --evaluate the result of each task."""
    args, checkpoint, device = cli.prepare(args, "sparse_mtrl_gmp_set", PRESETS)
    tasks = task_sequence(args.benchmark, "--benchmark", args.reward_version)
    check(args, tasks)
    indices = range(len(tasks))
    make_task = partial(make_env, reward_version=args.reward_version, max_episode_steps=args.episode_steps)
    if args.evaluate:
        actor = load_actor(args.evaluate)
        return evaluate_stored(args, tasks, indices, lambda task: partial(actor.act, task=task), make_task, EVAL_GOALS)
    with cli.Memory(device, args.batch_per_task * len(tasks)):
        agent = Agent(args, len(tasks), *env_sizes(tasks[0], args), device)
    at = {"step": 0, "episode": 0, "metrics": {}}  # `step` counts the environment steps of all tasks
    if checkpoint:
        restored(agent, checkpoint.pop("agent"), device)  # pop: the buffer's second copy is not kept
        at = restored(at, checkpoint["at"], device)
    step, total_steps = at["step"], args.total_steps // len(tasks) * len(tasks)
    warm_up_steps = args.learning_starts // len(tasks) * len(tasks)
    phases = [(total_steps, warm_up_steps)]
    recorder = Recorder(args, "sparse_mtrl_gmp_set", args.benchmark, tasks, phases, checkpoint)

    def policy_of(task: int):
        return partial(agent.actor.act, task=task)

    def evaluate() -> None:
        """Evaluate on all tasks, measure plasticity."""
        recorder.require_finite_weights(agent, step)
        if not recorder.evaluate(step, 0, indices, policy_of, make_task, EVAL_GOALS):
            return  # a signal came in between: it is done again on resume
        success, densities = np.mean([row["success"] for row in recorder.rows[-len(tasks) :]]), agent.densities()
        plasticity = {name: float(value) for name, value in agent.plasticity().items()}
        at["metrics"] = {"final_success": float(success)} | plasticity
        recorder.log(step, plasticity)
        if args.method != "gmp":  # which logs them when it prunes
            recorder.log(step, densities)
        for name in ("critic1", "critic2"):
            if densities[f"sparsity/{name}/action"] == 0:
                recorder.say(f"warning: {name} has no connection left from the action: it teaches the actor nothing")

    arguments = (tasks, [0] * len(tasks), args.episode_steps, args.reward_version)  # every reset has its own seeds
    with closing(WorkerEnvs(*arguments, args.num_workers) if args.num_workers else TaskEnvs(*arguments)) as envs:
        recorder.begin(agent, at, checkpoint, agent.parameter_counts())
        while True:  # once per episode; how it starts depends on its number only
            at["step"] = step
            if recorder.evaluation_due(step, 0, ended=step == total_steps):
                evaluate()
            if recorder.checkpoint_due(step):
                recorder.save(step, agent, at)
            recorder.leave()
            if step == total_steps:
                break

            seeds = [seed_of(args.seed, TRAIN_GOALS, task, at["episode"]) for task in indices]
            obs, episode_return, success = envs.reset(seeds), 0.0, np.zeros(len(tasks))
            at["episode"] += 1
            steps = min(args.episode_steps, (total_steps - step) // len(tasks))
            for _ in range(steps):
                warm_up = step < warm_up_steps
                actions = 2 * torch.rand(len(tasks), agent.act_dim).numpy() - 1 if warm_up else agent.explore(obs)
                recorder.require_finite("action", actions, step)
                next_obs, rewards, successes = envs.step(actions)
                agent.replay.add(obs=obs, next_obs=next_obs, action=actions, reward=rewards)
                obs, episode_return, success = next_obs, episode_return + rewards.mean(), np.maximum(success, successes)
                step += len(tasks)
                if warm_up:
                    continue
                recorder.log(step, agent.before_update())
                agent.update()
                recorder.log(step, agent.after_update())
                if agent.updates % LOG_EVERY == 0:
                    recorder.losses(step, agent.losses)
                    recorder.log(step, {f"plasticity/{name}/grad_norm": n for name, n in agent.grad_norms.items()})
            whole = steps == args.episode_steps
            recorder.episode(step, f"{len(tasks)} tasks", whole, episode_return, steps, success.mean())

    recorder.save(step, agent, at)
    densities = {name: value for name, value in agent.densities().items() if name.endswith("density")}
    counts = {"updates": agent.updates, "recycled_units": agent.recycled, "head_resets": agent.resets}
    return recorder.finish(step, at["metrics"] | densities | counts, agent.parameter_counts())


if __name__ == "__main__":
    cli.run(main, Args, PRESETS)
