"""GMP and SET: sparsity that keeps multi-task reinforcement learning plastic.

Paper: Sparsity-Driven Plasticity in Multi-Task Reinforcement Learning, arXiv 2508.06871 (TMLR 2025), the half on
continuous control. Base algorithm: multi-task multi-head Soft Actor-Critic. Environments: Meta-World v3, MT10.

One actor and two critics learn all tasks at once, with an output head and a temperature for each. Networks that are
trained long and on many tasks lose plasticity: units fall silent, features lose rank. Gradual magnitude pruning (GMP)
removes the smallest weights step by step until 5 % are left. Sparse evolutionary training (SET) begins with 5 % and
keeps moving its smallest weights to random new places. On MT10 the paper's best agent prunes the actor only.

Read first: `gmp_sparsity` and `prune` (GMP), `erdos_renyi_counts` and `evolve` (SET), `apply_mask` (what a removed
weight is), `MultiTaskNetwork` and `gram_schmidt` (heads and experts), `Agent.prune_networks`, then `main`.

    python sparse_mtrl_gmp_set.py --quick                          # three easy tasks, small networks: minutes
    python sparse_mtrl_gmp_set.py --benchmark mt10                 # the paper's best: GMP on the actor, 20 M steps
    python sparse_mtrl_gmp_set.py --arch moore --sparsify set      # orthogonal experts, sparse evolutionary training

Where we differ from the paper and from others' code, and why:

1. A weight that is removed is an exact zero whose gradient is masked before it is clipped and whose Adam moments are
   zero. The forward pass multiplies nothing: sparsification costs a masked gradient per update.
2. Intervals of GMP, SET, ReDo and Reset count gradient updates, not environment steps (a tenth as many on MT10).
3. SET's new connections are drawn among those that were inactive before the drop, so each of them is new.
4. MOORE's experts are orthogonalised by modified Gram-Schmidt that bears a zero vector; the authors' gives NaN there.
5. Goals are redrawn at every episode; MT10 proper draws them from a fixed list of 50 per task.
6. Where the paper is silent: He-uniform weights, small uniform heads, a temperature loss linear in log alpha. SET's
   density is 1 - sparsity; the paper's density parameter of 11 would be 7 %.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import metrics
from common.envs import TaskEnvs, WorkerEnvs, can_draw, make_env, record_video, task_sequence
from common.recorder import (
    ArgumentError,
    Recorder,
    finished_results,
    load_checkpoint,
    random_state,
    require,
    run,
    select_device,
    set_random_state,
    stored_args,
)

LOG_EVERY = 1000  # updates between two points of the loss curves
METRIC_BATCH = 1024  # replayed transitions, over all tasks, on which plasticity is measured (paper Table 5)
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # paper Table 3
MAX_RESETS = 2  # of the output layers (paper Table 5)
# Second words of numpy seed sequences: independent streams for training goals and evaluation goals.
TRAIN_GOALS, EVAL_GOALS = 1, 2

QUICK = {
    "benchmark": "reach,drawer-close,button-press",
    "total_steps": 90_000,
    "episode_steps": 200,
    "learning_starts": 3000,
    "eval_every": 15_000,
    "eval_episodes": 10,
    "width": 128,
    "depth": 2,
    "prune_every": 500,
    "evolve_every": 500,
    "redo_every": 500,
    "reset_every": 10_000,
    "learning_rate": 1e-3,
    "gamma": 0.98,
}


@dataclass
class Args:
    benchmark: str = "mt10"
    """tasks that are learned together: mt10, mt50, or Meta-World names joined by commas"""
    total_steps: int = 20_000_000
    """environment steps over all tasks together (paper: 20 M, 2 M for each of ten tasks)"""
    seed: int = 1
    """seed of everything random, below 2**32"""
    quick: bool = False
    """a first look: reach, drawer-close, button-press, small networks, 30 000 steps each; other arguments still win"""
    resume: str | None = None
    """go on with the run in this folder; its arguments are used"""
    evaluate: str | None = None
    """evaluate the run in this folder with its arguments, print the table unless --quiet, do nothing else"""
    episodes: int = 10
    """episodes per task of --evaluate"""
    run_dir: str | None = None
    """folder of the run; default runs/sparse_mtrl_gmp_set__<benchmark>__<seed>__<time>"""
    device: str = "auto"
    """auto, cpu or cuda"""
    torch_threads: int = 1
    """CPU threads of PyTorch; one per run is the fastest use of a machine that trains several seeds"""
    num_workers: int = 0
    """processes that step the environments; 0: this one, in turn, as fast on a small machine. Changes no result"""
    compile: bool = False
    """compile the losses with torch.compile"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints, at an episode's end; 0: at the start, the end and on a signal only"""
    quiet: bool = False
    """print nothing"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases"""
    wandb_project: str = "cleanplasticity"
    """project of --track"""
    capture_video: bool = False
    """record the first episode of each task at every evaluation"""

    # Environment and evaluation
    reward_version: str = "v2"
    """Meta-World's reward function: v2 (0 to 10 a step, the paper's) or v1 (0 to 2000, needs a larger --max-q)"""
    episode_steps: int = 500
    """steps of an episode (paper Table 3)"""
    eval_every: int = 200_000
    """environment steps over all tasks between evaluations; the end of the run is always evaluated (paper Table 3)"""
    eval_episodes: int = 50
    """deterministic episodes per task and evaluation (paper Table 3)"""

    # Networks
    arch: str = "shared"
    """shared: one trunk; moe: a mixture of experts; moore: a mixture of orthogonal experts"""
    experts: int = 4
    """trunks of moe and moore (MOORE's authors on MT10; 6 on MT50)"""
    width: int = 400
    """units of a hidden layer (paper Table 3)"""
    depth: int = 3
    """hidden layers; the last one of an expert is linear (MOORE)"""

    # SAC
    buffer_size: int = 1_000_000
    """replay capacity over all tasks, transitions; every task has an equal share"""
    batch_per_task: int = 128
    """transitions of each task in an update (paper: 1280 for ten tasks)"""
    learning_starts: int = 40_000
    """environment steps over all tasks before the first update, acted uniformly at random (paper Table 3)"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """Polyak rate of the target critics"""
    learning_rate: float = 3e-4
    """Adam step size of actor, critics and temperatures (paper Table 3)"""
    max_grad_norm: float = 1.0
    """the gradients of the actor, and of both critics together, are clipped to this norm (paper Table 3)"""
    max_q: float = 5000.0
    """target values are clipped to plus and minus this (paper Table 3, for v2 rewards)"""

    # Sparsification
    sparsify: str = "gmp"
    """gmp: gradual magnitude pruning; set: sparse evolutionary training; none: dense"""
    sparsify_actor: bool = True
    """sparsify the actor"""
    sparsify_critic: bool = False
    """sparsify both critics (the paper's best on MT10 leaves them dense)"""
    sparsity: float = 0.95
    """share of a trunk's weights that is removed: at the end of GMP's schedule, always in SET (paper Table 5)"""
    prune_every: int = 5000
    """updates between GMP's pruning steps (paper Table 3)"""
    prune_start: float = 0.05
    """GMP begins after this share of all updates (paper Table 3)"""
    prune_end: float = 0.80
    """GMP reaches its final sparsity after this share of all updates (paper Table 3)"""
    prune_scope: str = "global"
    """global: GMP ranks all weights of a network's trunk together; layer: each layer alone"""
    evolve_every: int = 2000
    """updates between SET's rewirings (paper Table 5)"""
    zeta: float = 0.3
    """share of each layer's connections that SET moves (paper Table 5, under the name of the density parameter)"""

    # The other interventions of the paper; they combine with --sparsify
    intervention: str = "none"
    """none, redo (recycle dormant units), reset (output layers anew), layernorm or weight-decay"""
    redo_every: int = 5000
    """updates between recyclings of dormant units (paper Table 5)"""
    dormant_tau: float = 0.001
    """units that score at most this are dormant, for ReDo and in the logs (paper Table 5)"""
    reset_every: int = 100_000
    """updates between resets of the output layers, at most two of them (paper Table 5)"""
    weight_decay: float = 1e-6
    """AdamW's coefficient under --intervention weight-decay (paper Table 5: too small to change a float32)"""


# --------------------------------------------------------------------------------------------------------- networks


class ExpertLinear(nn.Module):
    """A linear layer for each of k experts, in one batched product: (k, batch, inputs) -> (k, batch, outputs).

    `mask` (k, inputs, outputs) is True where a connection exists. Elsewhere weight, gradient and moments are kept at
    zero from outside (`apply_mask`, `mask_gradients`); the forward pass does not look at it.
    """

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(he_uniform((experts, inputs, outputs)))
        self.bias = nn.Parameter(torch.zeros(experts, 1, outputs))
        self.register_buffer("mask", torch.ones(experts, inputs, outputs, dtype=torch.bool))

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
    """Parameters of an output layer per task. Weight (tasks, inputs, outputs), U(-scale, scale)."""

    def __init__(self, tasks: int, inputs: int, outputs: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(tasks, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(tasks, 1, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.scale, self.scale)
        nn.init.uniform_(self.bias, -self.scale, self.scale)


class MultiTaskNetwork(nn.Module):
    """A trunk or a mixture of experts that all tasks share, and a linear head per task.

    shared: the input carries the task's one-hot; `depth` ReLU layers.
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
        sizes = [inputs + tasks if shared else inputs, *[args.width] * args.depth]
        self.layers = nn.ModuleList(ExpertLinear(self.experts, *size) for size in pairwise(sizes))
        self.hidden = args.depth if shared else args.depth - 1  # layers that end in a ReLU
        self.activations = nn.ModuleList(nn.ReLU(inplace=True) for _ in range(self.hidden))
        norm = partial(ExpertNorm, self.experts, args.width) if args.intervention == "layernorm" else nn.Identity
        self.norms = nn.ModuleList(norm() for _ in range(self.hidden))
        if shared:
            self.register_buffer("one_hot", torch.eye(tasks))
        else:
            self.mixing = nn.Parameter(nn.init.xavier_uniform_(torch.empty(tasks, self.experts)))
            self.mixed = nn.Tanh()
        self.heads = TaskHeads(tasks, args.width, outputs, head_scale)

    def forward(self, x: Tensor, tasks: slice = slice(None)) -> Tensor:
        """(tasks, batch, inputs), the samples of each task in `tasks`, in order -> (tasks, batch, outputs)."""
        count, batch = x.shape[:2]
        if self.arch == "shared":
            x = torch.cat([x, self.one_hot[tasks, None].expand(-1, batch, -1)], -1)
        h = x.reshape(1, count * batch, -1).expand(self.experts, -1, -1)
        for layer, norm, activation in zip(self.layers, self.norms, self.activations, strict=False):
            h = activation(norm(layer(h)))
        if self.arch == "shared":
            features = h.view(count, batch, -1)
        else:
            outputs = self.layers[-1](h).view(self.experts, count, batch, -1).unbind()
            if self.arch == "moore":
                outputs = gram_schmidt(outputs)
            weights = self.mixing[tasks, :, None, None].unbind(1)
            features = self.mixed(sum(w * output for w, output in zip(weights, outputs, strict=True)))
        return torch.baddbmm(self.heads.bias[tasks], features, self.heads.weight[tasks])

    def features(self, x: Tensor) -> list[Tensor]:
        """Activations of all hidden layers, (samples, units) each; the last are what the heads see. x as in forward."""
        hidden = metrics.hidden_features(self, x)
        layers = [h.transpose(0, 1).flatten(1) for h in hidden[: self.hidden]]
        return layers if self.arch == "shared" else [*layers, hidden[-1].flatten(0, 1)]

    def connected_units(self) -> list[Tensor]:
        """Units of `features` that are not masked: those with an incoming connection. Boolean (units,) per layer."""
        connected = [layer.mask.any(1) for layer in self.layers]
        units = [layer.flatten() for layer in connected[: self.hidden]]
        return units if self.arch == "shared" else [*units, connected[-1].any(0)]


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
    def act(self, obs: np.ndarray) -> np.ndarray:
        """One observation of every task (tasks, obs_dim) -> sampled actions (tasks, act_dim)."""
        obs = torch.from_numpy(obs).to(self.heads.weight.device)
        return self.sample(obs[:, None])[0][:, 0].cpu().numpy()

    @torch.no_grad()
    def act_deterministic(self, obs: np.ndarray, task: int) -> np.ndarray:
        """One observation (obs_dim,) of one task -> the mean's action (act_dim,)."""
        obs = torch.from_numpy(obs).to(self.heads.weight.device)
        return torch.tanh(self.distribution(obs[None, None], slice(task, task + 1))[0])[0, 0].cpu().numpy()


class Critic(MultiTaskNetwork):
    """Q(s, a) per task."""

    def __init__(self, args: Args, tasks: int, obs_dim: int, act_dim: int):
        super().__init__(args, tasks, obs_dim + act_dim, 1, head_scale=3e-3)

    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """(tasks, batch, obs_dim), (tasks, batch, act_dim) -> (tasks, batch)."""
        return self(torch.cat([obs, action], -1)).squeeze(-1)


def he_uniform(shape: tuple[int, ...]) -> Tensor:
    """U(-b, b), b = sqrt(6 / inputs), for weights (..., inputs, outputs)."""
    bound = math.sqrt(6 / shape[-2])
    return torch.empty(shape).uniform_(-bound, bound)


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


# --------------------------------------------------------------------------------------------- the method: GMP and SET


def gmp_sparsity(update: int, total_updates: int, start: float, end: float, final: float) -> float:
    """Sparsity rho_t of the cubic schedule (Zhu & Gupta 2017; paper Table 3).

    0 before t_0 = start * total_updates, then rho_F [1 - (1 - (t - t_0) / (t_1 - t_0))^3], and rho_F = `final` from
    t_1 = end * total_updates on.
    """
    progress = (update - start * total_updates) / ((end - start) * total_updates)
    return final * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


@torch.no_grad()
def prune(weights: list[Tensor], masks: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks after the smallest |w| of all `weights` together were removed, down to `sparsity`. Any shapes.

    What is masked already stays so, whatever the sparsity: pruned weights never come back.
    """
    scores = [weight.abs().masked_fill(~mask, -1).flatten() for weight, mask in zip(weights, masks, strict=True)]
    scores = torch.cat(scores)
    removed = max(round(sparsity * len(scores)), int((scores < 0).sum()))
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.topk(removed, largest=False, sorted=False).indices] = False
    parts = kept.split([mask.numel() for mask in masks])
    return [part.view_as(mask) for part, mask in zip(parts, masks, strict=True)]


def erdos_renyi_counts(shapes: list[tuple[int, int]], sparsity: float) -> list[int]:
    """Connections per layer, so that all layers (inputs, outputs) together have `sparsity` (SET, Mocanu et al. 2018).

    A layer's density is epsilon (inputs + outputs) / (inputs * outputs): small layers are denser. A layer whose density
    would pass 1 is dense, and epsilon follows from the others.
    """
    sizes = [inputs * outputs for inputs, outputs in shapes]
    budget, dense = (1 - sparsity) * sum(sizes), set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        epsilon = (budget - sum(sizes[i] for i in dense)) / max(1, sum(sum(shapes[i]) for i in sparse))
        too_dense = {i for i in sparse if epsilon * sum(shapes[i]) > sizes[i]}
        if not too_dense:
            return [sizes[i] if i in dense else round(epsilon * sum(shapes[i])) for i in range(len(shapes))]
        dense |= too_dense


def random_mask(shape: tuple[int, int], connections: int) -> Tensor:
    """A boolean mask with exactly `connections` entries, drawn uniformly."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel())[:connections]] = True
    return mask


@torch.no_grad()
def evolve(weight: Tensor, mask: Tensor, zeta: float) -> Tensor:
    """One rewiring of SET: the mask of a layer after its smallest connections moved to random places.

    The fraction `zeta` of the active weights with the smallest |w| is dropped; as many are grown, uniformly among
    those that were inactive before. weight, mask: any shape.
    """
    active, inactive = mask.flatten().nonzero()[:, 0], (~mask).flatten().nonzero()[:, 0]
    moved = min(int(zeta * len(active)), len(inactive))
    smallest = weight.flatten()[active].abs().topk(moved, largest=False, sorted=False).indices
    grown = inactive[torch.randperm(len(inactive), device=mask.device)[:moved]]
    mask = mask.flatten().clone()
    mask[active[smallest]] = False
    mask[grown] = True
    return mask.view_as(weight)


@torch.no_grad()
def apply_mask(layer: ExpertLinear, mask: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Give `layer` a new mask (k, inputs, outputs): weights and moments outside it become 0.

    A connection that is grown starts from 0 and without a past, since all that was missing is 0 already.
    """
    layer.weight[~mask] = 0
    zero_moments(optimizer, layer.weight, ~mask)
    layer.mask.copy_(mask)


def mask_gradients(network: MultiTaskNetwork) -> None:
    """Zero the gradients of missing connections; Adam then leaves those weights at exactly 0."""
    for layer in network.layers:
        layer.weight.grad.mul_(layer.mask)


def zero_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Forget Adam's moments of the entries in `where` (boolean, the parameter's shape)."""
    for moment in ("exp_avg", "exp_avg_sq"):
        if parameter in optimizer.state:
            optimizer.state[parameter][moment][where] = 0


# ------------------------------------------------------------------------------- the other interventions of the paper


@torch.no_grad()
def recycle(network: MultiTaskNetwork, optimizer: torch.optim.Optimizer, inputs: Tensor, tau: float) -> int:
    """ReDo (Sokar et al. 2023): give the dormant ReLU units of a network a new start; returns how many they were.

    A unit is dormant if its mean |h| is at most tau times the mean over the connected units of its layer, of all
    experts together. Its incoming weights are drawn anew (missing connections stay missing), its bias, its outgoing
    weights and all their moments become 0. inputs: (tasks, batch, inputs).
    """
    dormant = []
    for h, connected in zip(network.features(inputs)[: network.hidden], network.connected_units(), strict=False):
        magnitude = h.abs().mean(0)
        dormant.append(((magnitude <= tau * magnitude[connected].mean()) & connected).view(network.experts, 1, -1))
    for layer, units in zip(network.layers, dormant, strict=False):
        fresh = he_uniform(tuple(layer.weight.shape)).to(layer.weight.device) * layer.mask
        layer.weight.copy_(torch.where(units, fresh, layer.weight))
        layer.bias.masked_fill_(units, 0)
        zero_moments(optimizer, layer.weight, units.expand_as(layer.weight))
        zero_moments(optimizer, layer.bias, units)
    # after all incoming weights: a connection between two dormant units ends at 0
    followers = [*network.layers[1:], network.heads]
    for follower, units in zip(followers, dormant, strict=False):
        outgoing = units.transpose(1, 2).expand_as(follower.weight)
        follower.weight[outgoing] = 0
        zero_moments(optimizer, follower.weight, outgoing)
    return sum(int(units.sum()) for units in dormant)


@torch.no_grad()
def reset_heads(network: MultiTaskNetwork, optimizer: torch.optim.Optimizer) -> None:
    """Reset (Nikishin et al. 2022): draw the output layers anew and forget their moments."""
    network.heads.reset_parameters()
    for parameter in network.heads.parameters():
        zero_moments(optimizer, parameter, torch.ones_like(parameter, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------------- SAC


class ReplayBuffer:
    """A ring of transitions per task in preallocated tensors (tasks, capacity, ...), all filled at the same pace.

    Meta-World never terminates, so there is no terminal flag.
    """

    def __init__(self, tasks: int, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        new = partial(torch.zeros, tasks, capacity, device=device)  # on a CPU, unwritten pages of zeros take no memory
        self.data = {"obs": new(obs_dim), "next_obs": new(obs_dim), "action": new(act_dim), "reward": new()}
        self.task_index, self.capacity, self.added = torch.arange(tasks, device=device)[:, None], capacity, 0

    def __len__(self) -> int:
        """Transitions per task."""
        return min(self.added, self.capacity)

    def add(self, obs: np.ndarray, next_obs: np.ndarray, action: np.ndarray, reward: np.ndarray) -> None:
        """Append one transition of each task, arrays (tasks, ...), over the oldest when full."""
        row = self.added % self.capacity
        for name, value in (("obs", obs), ("next_obs", next_obs), ("action", action), ("reward", reward)):
            self.data[name][:, row] = torch.from_numpy(value)
        self.added += 1

    def sample(self, batch_per_task: int) -> dict[str, Tensor]:
        """Uniform draws with replacement, the same number from each task: (tasks, batch_per_task, ...)."""
        rows = torch.randint(len(self), (len(self.task_index), batch_per_task), device=self.task_index.device)
        return {name: column[self.task_index, rows] for name, column in self.data.items()}

    def state_dict(self) -> dict:
        # a slice would save its whole storage: clone what is filled
        return {"data": {name: c[:, : len(self)].clone() for name, c in self.data.items()}, "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, column in state["data"].items():
            self.data[name][:, : len(self)] = column


def critic_loss(
    actor: Actor,
    critics: nn.ModuleList,
    targets: nn.ModuleList,
    log_alpha: Tensor,
    batch: dict[str, Tensor],
    gamma: float,
    max_q: float,
) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, summed, per task (tasks,), and the mean of the first critic's Q, 0-d.

    The end of an episode is only its time limit. log_alpha: (tasks,); batch: (tasks, batch, ...).
    """
    with torch.no_grad():
        next_action, next_log_prob = actor.sample(batch["next_obs"])
        next_q = torch.min(*(target.q(batch["next_obs"], next_action) for target in targets))
        y = batch["reward"] + gamma * (next_q - log_alpha.exp()[:, None] * next_log_prob)
        y = y.clamp(-max_q, max_q)
    values = [critic.q(batch["obs"], batch["action"]) for critic in critics]
    return sum((q - y).square().mean(1) for q in values), values[0].detach().mean()


def actor_loss(actor: Actor, critics: nn.ModuleList, log_alpha: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
    """alpha log pi - Q and the mean of log pi, both per task (tasks,)."""
    action, log_prob = actor.sample(obs)
    q = torch.min(*(critic.q(obs, action) for critic in critics))
    return (log_alpha.detach().exp()[:, None] * log_prob - q).mean(1), log_prob.detach().mean(1)


class Agent:
    """Multi-task SAC with sparse or dense networks."""

    # What a checkpoint holds beside log_alpha: attributes with a state_dict of their own, and plain values.
    LEARNERS = ("actor", "critics", "targets", "actor_optimizer", "q_optimizer", "alpha_optimizer", "replay")
    PLAIN = ("updates", "resets", "recycled", "grad_norms")

    def __init__(self, args: Args, tasks: int, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.tasks, self.obs_dim, self.act_dim, self.device = args, tasks, obs_dim, act_dim, device
        sizes = (tasks, obs_dim, act_dim)
        self.actor = Actor(args, *sizes).to(device)
        self.critics = nn.ModuleList(Critic(args, *sizes) for _ in range(2)).to(device)
        self.targets = nn.ModuleList(Critic(args, *sizes) for _ in range(2)).to(device)
        self.log_alpha = torch.zeros(tasks, device=device, requires_grad=True)
        decay = args.weight_decay if args.intervention == "weight-decay" else 0.0  # AdamW without decay is Adam
        adam = partial(torch.optim.AdamW, lr=args.learning_rate, eps=1e-5, weight_decay=decay, fused=True)
        self.actor_optimizer = adam(self.actor.parameters())
        self.q_optimizer = adam(self.critics.parameters())
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.learning_rate, eps=1e-5, fused=True)
        self.actor_parameters = list(self.actor.parameters())
        self.replay = ReplayBuffer(tasks, min(args.buffer_size, args.total_steps) // tasks, obs_dim, act_dim, device)
        self.updates, self.total_updates, self.resets, self.recycled = 0, count_updates(args, tasks), 0, 0
        # of the last update, missing connections left out, before clipping
        self.grad_norms = {"actor": torch.zeros(()), "critic": torch.zeros(())}
        self.critic_loss, self.actor_loss = critic_loss, actor_loss
        if args.compile:
            self.critic_loss, self.actor_loss = torch.compile(critic_loss), torch.compile(actor_loss)
        if args.sparsify == "set":
            self._draw_sparse_layers()
        self.targets.load_state_dict(self.critics.state_dict())  # their copies of the masks are never used again

    # ------------------------------------------------------------------------------------------------ sparsification

    def networks(self) -> Iterator[tuple[str, MultiTaskNetwork, torch.optim.Optimizer]]:
        """Actor and critics, with the optimizer that trains them."""
        yield "actor", self.actor, self.actor_optimizer
        for i, critic in enumerate(self.critics):
            yield f"critic{i + 1}", critic, self.q_optimizer

    def sparse_networks(self) -> list[tuple[MultiTaskNetwork, torch.optim.Optimizer]]:
        """Those that are to be sparsified."""
        actor, critic = self.args.sparsify_actor, self.args.sparsify_critic
        return [(net, optimizer) for name, net, optimizer in self.networks() if (actor if name == "actor" else critic)]

    def _draw_sparse_layers(self) -> None:
        """SET's initial connections. An expert's matrix counts as a layer of its own.

        The weights keep the bound of a dense layer, so features begin small (the paper does not say how they do).
        """
        for network, optimizer in self.sparse_networks():
            shapes = [tuple(layer.mask.shape[1:]) for layer in network.layers]
            for layer, count in zip(network.layers, erdos_renyi_counts(shapes, self.args.sparsity), strict=True):
                masks = [random_mask(layer.mask.shape[1:], count) for _ in layer.mask]
                apply_mask(layer, torch.stack(masks).to(self.device), optimizer)

    def prune_if_due(self) -> dict[str, float]:
        """After an update: a pruning step of GMP, if it is time. Returns what there is to log."""
        if self.args.sparsify != "gmp" or self.updates % self.args.prune_every != 0:
            return {}
        self.prune_networks()
        return self.densities()

    def prune_networks(self) -> None:
        """A pruning step of GMP, at the sparsity of the present update."""
        args = self.args
        schedule = (self.total_updates, args.prune_start, args.prune_end, args.sparsity)
        sparsity = gmp_sparsity(self.updates, *schedule)
        for network, optimizer in self.sparse_networks():
            if args.prune_scope == "global":
                weights = [layer.weight for layer in network.layers]
                masks = prune(weights, [layer.mask for layer in network.layers], sparsity)
            else:  # an expert's matrix counts as a layer of its own
                pairs = [zip(layer.weight, layer.mask, strict=True) for layer in network.layers]
                masks = [torch.stack([prune([w], [m], sparsity)[0] for w, m in pair]) for pair in pairs]
            for layer, mask in zip(network.layers, masks, strict=True):
                apply_mask(layer, mask, optimizer)

    def evolve_networks(self) -> None:
        """A rewiring of SET in every layer."""
        for network, optimizer in self.sparse_networks():
            for layer in network.layers:
                pairs = zip(layer.weight, layer.mask, strict=True)
                mask = torch.stack([evolve(weight, mask, self.args.zeta) for weight, mask in pairs])
                apply_mask(layer, mask, optimizer)

    def intervene(self) -> dict[str, float]:
        """Before an update: rewire, recycle or reset, if it is time. Returns what there is to log.

        Before and not after: the evaluations in between, and the end of the run, see weights that were trained.
        """
        args, report = self.args, {}
        if self.updates == 0:
            return {}
        if args.sparsify == "set" and self.updates % args.evolve_every == 0:
            self.evolve_networks()
        if args.intervention == "redo" and self.updates % args.redo_every == 0:
            batch = self.replay.sample(max(1, METRIC_BATCH // self.tasks))
            q_input = torch.cat([batch["obs"], batch["action"]], -1)
            for name, network, optimizer in self.networks():
                inputs = batch["obs"] if name == "actor" else q_input
                recycled = recycle(network, optimizer, inputs, args.dormant_tau)
                report[f"method/recycled/{name}"] = recycled
                self.recycled += recycled
        if args.intervention == "reset" and self.updates % args.reset_every == 0 and self.resets < MAX_RESETS:
            for _, network, optimizer in self.networks():
                reset_heads(network, optimizer)
            for target, critic in zip(self.targets, self.critics, strict=True):
                target.heads.load_state_dict(critic.heads.state_dict())  # as Nikishin et al.
            self.resets += 1
            report["method/resets"] = self.resets
        return report

    def densities(self) -> dict[str, float]:
        """Share of connections that exist, per network, per layer of its trunk, and from the action into a critic."""
        scalars = {}
        for name, network, _ in self.networks():
            counts = [(int(layer.mask.sum()), layer.mask.numel()) for layer in network.layers]
            active, sizes = map(sum, zip(*counts, strict=True))
            scalars[f"sparsity/{name}/density"] = active / sizes
            scalars |= {f"sparsity/{name}/layer{i}": n / size for i, (n, size) in enumerate(counts, start=1)}
            if network is not self.actor:
                action_rows = slice(self.obs_dim, self.obs_dim + self.act_dim)
                scalars[f"sparsity/{name}/action"] = network.layers[0].mask[:, action_rows].float().mean().item()
        return scalars

    # ------------------------------------------------------------------------------------------------------ training

    def random_actions(self) -> np.ndarray:
        """Uniform in [-1, 1], (tasks, act_dim), from PyTorch's generator, which is in the checkpoint."""
        return (2 * torch.rand(self.tasks, self.act_dim) - 1).numpy()

    def update(self) -> dict[str, Tensor]:
        """One SAC update on all tasks. Returns the losses as 0-d tensors; nothing here waits for the device."""
        args, batch = self.args, self.replay.sample(self.args.batch_per_task)

        q_losses, q_mean = self.critic_loss(
            self.actor, self.critics, self.targets, self.log_alpha, batch, args.gamma, args.max_q
        )
        self.q_optimizer.zero_grad(set_to_none=True)
        q_losses.mean().backward()
        if args.sparsify != "none" and args.sparsify_critic:
            for critic in self.critics:
                mask_gradients(critic)
        self.grad_norms["critic"] = nn.utils.clip_grad_norm_(self.critics.parameters(), args.max_grad_norm)
        self.q_optimizer.step()

        actor_losses, log_prob = self.actor_loss(self.actor, self.critics, self.log_alpha, batch["obs"])
        self.actor_optimizer.zero_grad(set_to_none=True)
        actor_losses.mean().backward(inputs=self.actor_parameters)  # no gradients of the critics' weights
        if args.sparsify != "none" and args.sparsify_actor:
            mask_gradients(self.actor)
        self.grad_norms["actor"] = nn.utils.clip_grad_norm_(self.actor_parameters, args.max_grad_norm)
        self.actor_optimizer.step()

        # target entropy -|A|; the loss is linear in log alpha
        alpha_loss = -(self.log_alpha * (log_prob - self.act_dim)).mean()
        self.alpha_optimizer.zero_grad(set_to_none=True)
        alpha_loss.backward()
        self.alpha_optimizer.step()

        with torch.no_grad():
            for target, value in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(value, args.tau)
        self.updates += 1
        losses = {"critic": q_losses.mean(), "actor": actor_losses.mean(), "q": q_mean, "entropy": -log_prob.mean()}
        losses["alpha"] = self.log_alpha.exp().mean()
        return {name: value.detach() for name, value in losses.items()}

    # ------------------------------------------------------------------------------------------------------- metrics

    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of actor and critics on replayed transitions. Takes no random number from the training."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            batch = self.replay.sample(max(1, METRIC_BATCH // self.tasks))
            trace = fisher_trace(self.actor, batch["obs"])
            actor_losses, _ = actor_loss(self.actor, self.critics, self.log_alpha, batch["obs"])
            learners = (self.actor, self.critics, self.targets, self.log_alpha)
            q_losses, _ = critic_loss(*learners, batch, self.args.gamma, self.args.max_q)
        q_input = torch.cat([batch["obs"], batch["action"]], -1)
        parts = {  # networks, their inputs, their losses per task
            "actor": ([self.actor], batch["obs"], actor_losses),
            "critic": (list(self.critics), q_input, q_losses),
        }
        scalars = {"plasticity/actor/fisher_trace": trace}
        for name, (networks, inputs, losses) in parts.items():
            features = [network.features(inputs) for network in networks]
            hidden = [h for layers in features for h in layers]
            connected = [units for network in networks for units in network.connected_units()]
            module, prefix = nn.ModuleList(networks), f"plasticity/{name}/"
            scalars |= {
                prefix + "dormant_ratio": metrics.dormant_ratio(hidden, self.args.dormant_tau, connected),
                prefix + "active_fraction": metrics.active_fraction(hidden, connected),
                prefix + "srank": metrics.srank(features[0][-1]),
                prefix + "effective_rank": metrics.effective_rank(features[0][-1]),
                prefix + "weight_norm": metrics.weight_norm(module),
                prefix + "grad_norm": self.grad_norms[name],
            }
            if self.tasks > 1:
                scalars[prefix + "gradient_cosine"] = metrics.gradient_cosine(trunk_gradients(networks[0], losses))
        return scalars

    def parameter_counts(self) -> dict[str, int]:
        """Weights and biases of the actor and of one critic, and how many of them are left."""
        counts = {}
        for name, network in (("actor", self.actor), ("critic", self.critics[0])):
            counts[name] = sum(p.numel() for p in network.parameters())
            counts[f"{name}_active"] = counts[name] - sum(int((~layer.mask).sum()) for layer in network.layers)
        return counts

    # --------------------------------------------------------------------------------------------------- checkpoints

    def named_weights(self) -> list[tuple[str, Tensor]]:
        """Everything that is learned, by name."""
        modules = {"actor": self.actor, "critics": self.critics, "targets": self.targets}
        named = [(f"{net}.{name}", p) for net, module in modules.items() for name, p in module.named_parameters()]
        return [*named, ("log_alpha", self.log_alpha)]

    def state_dict(self) -> dict:
        state = {name: getattr(self, name).state_dict() for name in self.LEARNERS}
        state |= {name: getattr(self, name) for name in self.PLAIN}
        return state | {"log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state: dict) -> None:
        for name in self.LEARNERS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.log_alpha.data.copy_(state["log_alpha"])


def trunk_gradients(network: MultiTaskNetwork, losses: Tensor) -> Tensor:
    """Gradient of each task's loss (tasks,) in the trunk's existing connections: (tasks, weights)."""
    weights = [layer.weight for layer in network.layers]
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        rows.append(torch.cat([(g * layer.mask).flatten() for g, layer in zip(gradients, network.layers, strict=True)]))
    return torch.stack(rows)


def fisher_trace(actor: Actor, obs: Tensor) -> Tensor:
    """E ||grad_theta log pi(a|s)||^2 over the samples of all tasks, a ~ pi, without missing connections (paper C.2).

    obs: (tasks, batch, obs_dim). The actions before the squash serve, as its Jacobian has no parameters.
    """
    masks = {f"layers.{i}.weight": layer.mask for i, layer in enumerate(actor.layers)}
    with torch.no_grad():
        mean, log_std = actor.distribution(obs)
        u = mean + log_std.exp() * torch.randn_like(mean)

    def log_prob(task: int, parameters: dict[str, Tensor], obs: Tensor, u: Tensor) -> Tensor:
        present = {name: p * masks[name] if name in masks else p for name, p in parameters.items()}
        arguments = (obs[None, None], slice(task, task + 1))
        mean, log_std = torch.func.functional_call(actor, present, arguments)[0, 0].chunk(2, -1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        return (-0.5 * ((u - mean) / log_std.exp()).square() - log_std).sum()

    parameters = dict(actor.named_parameters())
    traces = [
        metrics.fisher_trace(partial(log_prob, task), parameters, (obs[task], u[task])) for task in range(len(obs))
    ]
    return torch.stack(traces).mean()


# ------------------------------------------------------------------------------------------------------ the run


def count_updates(args: Args, tasks: int) -> int:
    """Updates of a whole run: one per step of all environments, after the warm-up."""
    return args.total_steps // tasks - args.learning_starts // tasks


def check_args(args: Args) -> list[str]:
    """Refuse impossible arguments before anything is built; returns the tasks.

    Raises ArgumentError: argument, value, what is allowed.
    """
    choices = {
        "arch": ("shared", "moe", "moore"),
        "sparsify": ("none", "gmp", "set"),
        "prune_scope": ("global", "layer"),
        "intervention": ("none", "redo", "reset", "layernorm", "weight-decay"),
        "reward_version": ("v1", "v2"),
        "device": ("auto", "cpu", "cuda"),
    }
    for name, values in choices.items():
        require(args, name, getattr(args, name) in values, "one of " + ", ".join(values))
    sizes = ("total_steps", "eval_every", "eval_episodes", "episodes", "episode_steps", "experts", "width", "depth")
    intervals = ("prune_every", "evolve_every", "redo_every", "reset_every")
    for name in (*sizes, *intervals, "batch_per_task", "torch_threads"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("checkpoint_every", "learning_starts", "num_workers", "dormant_tau", "weight_decay"):
        require(args, name, 0 <= getattr(args, name) < math.inf, "at least 0")
    require(args, "seed", 0 <= args.seed < 2**32, "at least 0 and below 2**32")
    require(args, "capture_video", can_draw() or not args.capture_video, "off: no EGL library is here to draw with")
    for name in ("learning_rate", "max_grad_norm", "max_q"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a positive number")
    for name in ("gamma", "tau", "zeta"):
        require(args, name, 0 <= getattr(args, name) <= 1, "between 0 and 1")
    require(args, "sparsity", 0 <= args.sparsity < 1, "at least 0 and below 1")
    below = f"at least 0 and below --prune-end {args.prune_end}"
    require(args, "prune_start", 0 <= args.prune_start < args.prune_end, below)
    require(args, "prune_end", args.prune_end <= 1, "at most 1")
    require(args, "depth", args.arch == "shared" or args.depth >= 2, f"at least 2 with --arch {args.arch}")
    orthogonal = args.arch != "moore" or args.experts <= args.width
    require(args, "experts", orthogonal, f"at most --width {args.width} with --arch moore")
    something = args.sparsify == "none" or args.sparsify_actor or args.sparsify_critic
    require(args, "sparsify", something, "none where neither actor nor critic is sparsified")
    unclipped = args.reward_version == "v2" or args.max_q > Args.max_q
    require(args, "reward_version", unclipped, f"v2 unless --max-q is above {Args.max_q}: v1 pays up to 2000 a step")
    try:
        tasks = task_sequence(args.benchmark)
    except ValueError as error:
        raise ArgumentError(f"--benchmark {args.benchmark}: {error}") from None
    require(args, "benchmark", len(set(tasks)) == len(tasks), "a list without repetition")
    require(args, "num_workers", args.num_workers <= len(tasks), f"at most the number of tasks, {len(tasks)}")
    require(args, "buffer_size", args.buffer_size >= len(tasks), f"at least the number of tasks, {len(tasks)}")
    updates = count_updates(args, len(tasks))
    require(args, "learning_starts", updates >= 1, f"below --total-steps {args.total_steps} by a step of every task")
    # else the run would end before its final sparsity, or without its intervention, in silence
    last = updates // args.prune_every * args.prune_every
    reached = args.sparsify != "gmp" or last >= args.prune_end * updates
    final = f"{math.ceil(args.prune_end * updates)} to {updates}"
    require(args, "prune_every", reached, f"so that a multiple of it is among the final updates, {final}")
    for name, wanted in (
        ("evolve_every", args.sparsify == "set"),
        ("redo_every", args.intervention == "redo"),
        ("reset_every", args.intervention == "reset"),
    ):
        require(args, name, not wanted or getattr(args, name) < updates, f"below the number of updates, {updates}")
    return tasks


def evaluate_task(
    actor: Actor,
    args: Args,
    tasks: list[str],
    index: int,
    episodes: int,
    video: Path | None,
    stop: Callable[[], bool] | None = None,
) -> dict | None:
    """Deterministic episodes of one task; its goals depend on the seed, the task and the episode number only.

    video: folder for the first episode. Returns what `metrics.evaluate` does.
    """
    options = {"reward_version": args.reward_version, "max_episode_steps": args.episode_steps}
    env = make_env(tasks[index], seed=0, render_mode="rgb_array" if video else None, **options)
    if video:
        env = record_video(env, video / tasks[index])
    try:
        act = partial(actor.act_deterministic, task=index)
        return metrics.evaluate(act, env, episodes, (args.seed, EVAL_GOALS, index), stop)
    finally:
        env.close()


def evaluate_run(args: Args) -> dict:
    """`--evaluate RUN_DIR`: evaluate a run's latest checkpoint on its tasks, print the table; results by task index."""
    stored = Args(**stored_args(args.evaluate, Args))
    checkpoint = load_checkpoint(args.evaluate, "sparse_mtrl_gmp_set")
    tasks = task_sequence(stored.benchmark)
    actor = Actor(stored, len(tasks), *env_sizes(tasks[0])).to(select_device(args.device))
    actor.load_state_dict(checkpoint["agent"]["actor"])
    video = Path(args.evaluate) / "videos" / "evaluate" if args.capture_video else None
    say, results = (lambda _: None) if args.quiet else print, {}
    say(f"{'task':<34}{'return':>12}{'success':>10}")
    for index, task in enumerate(tasks):
        results[index] = result = evaluate_task(actor, stored, tasks, index, args.episodes, video)
        say(f"{index:>2}  {task:<30}{result['episode_return']:>12.1f}{result['success']:>10.2f}")
    say(f"{'mean':<34}{'':>12}{np.mean([result['success'] for result in results.values()]):>10.2f}")
    return results


def env_sizes(task: str) -> tuple[int, int]:
    """Observation and action dimension of a Meta-World task."""
    env = make_env(task, seed=0)
    env.close()
    return env.observation_space.shape[0], env.action_space.shape[0]


def main(args: Args) -> dict:
    """Train on all tasks; returns what results.json holds, with --evaluate what `evaluate_run` does.

    Raises ArgumentError, NotFiniteError, Interrupted.
    """
    tasks = check_args(args)
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)  # a product with denormal weights can be a hundred times slower
    if args.evaluate:
        return evaluate_run(args)
    if args.resume:
        finished = finished_results(args)
        if finished is not None:
            return finished
    checkpoint = load_checkpoint(args.resume, "sparse_mtrl_gmp_set") if args.resume else None
    device = select_device(args.device)

    torch.manual_seed(args.seed)
    agent = Agent(args, len(tasks), *env_sizes(tasks[0]), device)
    label = args.benchmark.replace(",", "+") if len(args.benchmark) < 40 else f"{len(tasks)}tasks"
    total_steps = args.total_steps // len(tasks) * len(tasks)
    run_name = f"sparse_mtrl_gmp_set__{label}__{args.seed}"
    recorder = Recorder(args, "sparse_mtrl_gmp_set", run_name, tasks, total_steps, checkpoint)
    # Where the run is; `step` counts the environment steps of all tasks.
    at = {"step": 0, "next_eval": min(args.eval_every, total_steps), "envs": None, "plasticity": {}}
    if checkpoint:
        agent.load_state_dict(checkpoint.pop("agent"))  # pop: the buffer's second copy is not kept
        at |= checkpoint["at"]
        set_random_state(checkpoint["random"], device)

    seeds = [int(np.random.SeedSequence((args.seed, TRAIN_GOALS, i)).generate_state(1)[0]) for i in range(len(tasks))]
    arguments = (tasks, seeds, args.episode_steps, args.reward_version)
    envs = WorkerEnvs(*arguments, args.num_workers) if args.num_workers else TaskEnvs(*arguments)

    def save() -> None:
        """Checkpoint; only at an episode's end, where an environment's future is its random state."""
        recorder.require_finite_weights(agent.named_weights(), at["step"])
        recorder.save(at["step"], {"agent": agent.state_dict(), "random": random_state(device), "at": at})

    def evaluate() -> None:
        """Evaluate on all tasks. If a signal comes in between, nothing is recorded and it is done again on resume."""
        recorder.require_finite_weights(agent.named_weights(), at["step"])
        video = recorder.run_dir / "videos" / f"step-{at['step']}" if args.capture_video else None
        results = []
        for index in range(len(tasks)):
            result = evaluate_task(agent.actor, args, tasks, index, args.eval_episodes, video, lambda: recorder.stopped)
            if result is None:
                return
            results.append(result)
        for index, result in enumerate(results):
            recorder.evaluation(at["step"], 0, index, args.eval_episodes, result)
        mean_success = float(np.mean([result["success"] for result in results]))
        at["plasticity"] = {name: float(value) for name, value in agent.plasticity().items()}
        recorder.log(at["step"], {"eval/mean_success": mean_success} | at["plasticity"])
        densities = agent.densities()
        if args.sparsify != "gmp":  # which logs them when it prunes
            recorder.log(at["step"], densities)
        blind = [name for name in ("critic1", "critic2") if densities[f"sparsity/{name}/action"] == 0]
        if blind:  # such a critic has no gradient for the actor
            recorder.say(f"warning: no connection from the action into {' and '.join(blind)} is left")
        following = (at["step"] // args.eval_every + 1) * args.eval_every
        at["next_eval"] = min(following, total_steps) if at["step"] < total_steps else math.inf
        successes = "  ".join(f"{task} {result['success']:.2f}" for task, result in zip(tasks, results, strict=True))
        recorder.say(f"step {at['step']}: mean success {mean_success:.2f}: {successes}")

    warm_up, first_step, clock = args.learning_starts // len(tasks), at["step"], time.monotonic()
    next_checkpoint = at["step"] + (args.checkpoint_every or math.inf)
    with closing(envs):
        if at["envs"] is not None:
            envs.set_rng_states(at["envs"])
        if checkpoint is None:
            at["envs"] = envs.rng_states()
            save()
        while True:  # once per episode
            at["envs"] = envs.rng_states()
            if at["step"] >= at["next_eval"]:
                evaluate()
            if recorder.stopped:
                save()
                recorder.leave()
            if at["step"] == total_steps:
                break
            if at["step"] >= next_checkpoint:
                next_checkpoint = at["step"] + args.checkpoint_every
                save()

            obs, episode_return, success = envs.reset(), 0.0, np.zeros(len(tasks))
            steps = min(args.episode_steps, (total_steps - at["step"]) // len(tasks))
            for _ in range(steps):
                learning = at["step"] // len(tasks) >= warm_up
                actions = agent.actor.act(obs) if learning else agent.random_actions()
                recorder.require_finite("action", actions, at["step"])
                next_obs, rewards, successes = envs.step(actions)
                agent.replay.add(obs, next_obs, actions, rewards)
                obs, episode_return, success = next_obs, episode_return + rewards.mean(), np.maximum(success, successes)
                at["step"] += len(tasks)
                if not learning:
                    continue
                recorder.log(at["step"], agent.intervene())
                losses = agent.update()
                recorder.log(at["step"], agent.prune_if_due())
                if agent.updates % LOG_EVERY == 0:
                    for name, value in losses.items():
                        recorder.require_finite(f"losses/{name}", value, at["step"])
                    recorder.log(at["step"], {f"losses/{name}": value for name, value in losses.items()})
                    recorder.log(at["step"], {"charts/SPS": (at["step"] - first_step) / (time.monotonic() - clock)})
            if steps == args.episode_steps:  # not for the piece of an episode that may end the run
                scalars = {"charts/episodic_return": episode_return, "charts/episodic_success": success.mean()}
                recorder.log(at["step"], scalars)
            recorder.progress(at["step"], ret=f"{episode_return:.0f}", success=f"{success.mean():.2f}")

    save()
    report = {"final_success": float(np.mean([row["success"] for row in recorder.rows[-len(tasks) :]]))}
    report |= {name: value for name, value in agent.densities().items() if name.endswith("density")}
    report |= at["plasticity"]
    report |= {"updates": agent.updates, "recycled_units": agent.recycled, "head_resets": agent.resets}
    return recorder.finish(at["step"], report, agent.parameter_counts())


if __name__ == "__main__":
    run(main, Args, {"quick": QUICK})
