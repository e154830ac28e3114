"""Neuroplastic Expansion: a small sparse network that grows while it learns, and so stays able to learn.

Paper: Neuroplastic Expansion in Deep RL, arXiv 2410.07994 (ICLR 2025). Base algorithm: TD3. Environments: Gymnasium
MuJoCo and dm_control.

Actor and critics start with a fifth of their connections, placed at random. At intervals, connections are added where
the gradient of the loss is largest: in the paper's words, that revives neurons about to fall silent. Before that, some
connections of neurons that are silent already are removed. Behind a plain ReLU the gradient of such connections is 0,
so they come back when few others are left to grow; behind the critics' LayerNorm it is not, and they may return at
once. Growth slows down along a cosine and ends at full size. While the share of the critics' silent neurons hardly
changes, each batch comes with probability one half from the oldest transitions, so that what was learned early is kept.

Read first: `Topology.after_step` (what is pruned and grown) with `pick`, `erdos_renyi_counts` (the start) and
`growth_progress` (how fast), `Review` (when old transitions are reviewed), then `Agent.update` and `main`.

Copy: `Topology`, `erdos_renyi_counts`, `growth_progress`, `pick`, `dormant_neurons` (105 lines; the calls of a
training loop are in tests/transplants/ne_td3.py).

Copy with review: `Topology`, `erdos_renyi_counts`, `growth_progress`, `pick`, `dormant_neurons`, `Review`
(125 lines; tests/transplants/ne_td3.py has both).

    topology = Topology([fc1, fc2, fc3], optimizer, [target.fc1, ...], every=10_000, until=750_000)
    # every, until: in updates of this network
    loss.backward()
    topology.before_step()
    optimizer.step()
    topology.after_step(lambda: critic(obs, action))

    python neuroplastic_expansion.py --quick                    # a small run: minutes on a laptop CPU
    python neuroplastic_expansion.py --env-id dmc/cheetah-run   # 1 M steps at the paper's sizes

This script follows the paper, but it prunes before it grows, as the authors' code does, and a neuron that lost all its
inputs gets new ones with fresh weights; with weights of 0, as all others that grow, it would stay silent behind a ReLU.
Where the authors' code differs:

1. The authors start from the largest weights, this script from random ones, as the paper's Erdős–Rényi start.
2. Their dormant pruning looks layers up by names that do not exist and falls back to the smallest weights
   (`--prune magnitude`). Here connections of dormant neurons are removed.
3. Their review is off by default and compares the share of active units with a constant. Here it is on, and follows the
   change of the dormant ratio.
4. They skip the optimizer step on a topology update, and keep Adam's moments of weights that went. Here the step is
   taken, so that every update counts, and the moments are cleared, so that what comes back starts anew.
5. They zero Adam's step counters at a topology update, so the next steps are as large as at the start. Here they go on.
6. They stop at density 0.75 and go on exchanging weights. Here growth ends at 1 (`--final-density`), the paper's full
   size, and nothing is pruned or grown after that.
7. They prune 40 % of what a step grows in all, so 60 % of it is net growth. Here at most 40 % of the net growth is
   pruned in addition, so that the density keeps its schedule exactly.
8. Their command keeps the actor's topology (`--static_actor`). Here actor and critics grow.

What the paper leaves open, and what this script does: omega limits pruning layer by layer, so a layer that starts dense
is never pruned; who is dormant is judged after the optimizer step; the average that starts the review begins with the
first change; the buffer is emptied at each visit, so old tasks are not reviewed.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn

from common import cli, metrics
from common.capture import Captured, CapturedPolicy, keep, with_gradients
from common.cli import Device, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, require
from common.envs import canonical, env_options, env_sizes, make_env, seed_of
from common.recorder import Recorder, evaluate_stored, recorded, restored

LOG_EVERY = 1000  # updates between two points of the loss curves, each at one that trains the actor
METRIC_BATCH = 1000  # recent transitions on which plasticity, and the review's dormant ratio, are measured
TRAIN_STARTS, EVAL_STARTS, METHOD_DRAWS = 1, 2, 3  # streams of random numbers, see `seed_of`

QUICK = {"steps_per_task": 20_000, "learning_starts": 1000, "eval_every": 2000, "eval_episodes": 5}
QUICK |= {"hidden_dim": 128, "learning_rate": 1e-3, "topology_every": 500, "review_every": 200}
PRESETS = {"quick": QUICK}
Share = Annotated[float, Gt(0), Le(1)]


@dataclass
class Args:
    quick: bool = False  # a first look: small networks, 20 000 steps; other arguments still win
    seed: Seed = 1  # seed of everything random
    resume: str | None = None  # continue the run in this folder with its arguments
    evaluate: str | None = None  # evaluate the run in this folder, print the table, exit
    episodes: PositiveInt = 10  # episodes per task of --evaluate
    run_dir: str | None = None  # folder of the run; by default a new one under runs/
    device: Device = "auto"  # auto: cuda if there is one; --evaluate plays on the CPU
    torch_threads: PositiveInt = 1  # CPU threads of PyTorch; 1 is fastest where several seeds run side by side
    cuda_graph: bool = True  # on CUDA: updates and acting as CUDA graphs
    compile: bool = False  # torch.compile losses with their gradients: minutes at the start
    checkpoint_every: NonNegativeInt = 50_000  # environment steps between checkpoints; 0: task borders and signals only
    quiet: bool = False  # print nothing
    track: bool = False  # mirror TensorBoard to Weights & Biases
    wandb_project: str = "cleanplasticity"  # project of --track
    capture_video: bool = False  # record the first episode of each task at every evaluation

    # --- Environment and evaluation ---

    env_id: str = "HalfCheetah-v5"  # Gymnasium id with Box spaces, or dmc/<domain>-<task>
    task_seq: str | None = None  # environments joined by commas, visited in turn by one network, instead of --env-id
    cycles: cli.Cycles = 2  # how often --task-seq goes round
    env_kwargs: str = ""  # JSON, further arguments of a Gymnasium environment's constructor: '{"xml_file": "my.xml"}'
    max_episode_steps: PositiveInt | None = None  # in the environment's own steps; default its own limit or 10 000
    steps_per_task: PositiveInt = 1_000_000  # steps of a run, of each visit with --task-seq (paper: 1 M)
    action_repeat: PositiveInt = 1  # environment steps per action; all steps but --max-episode-steps are actions
    eval_every: PositiveInt = 5000  # steps between evaluations on the present task; a visit's end evaluates all tasks
    eval_episodes: PositiveInt = 10  # deterministic episodes per task and evaluation

    # --- TD3 ---

    hidden_dim: PositiveInt = 256  # width of all hidden layers: two of the actor, three of each critic
    buffer_size: PositiveInt = 1_000_000  # replay capacity, transitions; emptied at the start of each visit
    batch_size: PositiveInt = 256  # transitions per update; one update per step
    learning_starts: NonNegativeInt = 25_000  # steps of each visit before its first update; random at first visits
    gamma: Fraction = 0.99  # discount
    tau: Fraction = 0.005  # Polyak rate of the targets
    learning_rate: PositiveFloat = 3e-4  # Adam step size of actor and critics
    exploration_noise: NonNegativeFloat = 0.1  # standard deviation of the noise on training actions
    target_noise: NonNegativeFloat = 0.2  # standard deviation of the noise on target actions
    noise_clip: NonNegativeFloat = 0.5  # bound of the noise on target actions
    policy_delay: PositiveInt = 2  # critic updates per update of actor and targets

    # --- Neuroplastic Expansion ---

    method: Literal["ne", "static", "td3"] = "ne"  # static: sparse masks that never change, no review; td3: dense
    initial_density: Share = 0.2  # share of the weights that actor and critics start with
    final_density: Share = 1.0  # share of the weights that they grow to (paper: full size; authors' code: 0.75)
    topology_every: PositiveInt = 10_000  # critic updates between topology updates
    topology_until: Share = 0.75  # share of all updates after which the final density is reached
    growth: Literal["gradient", "random", "none"] = "gradient"  # where connections grow; none: nothing is pruned either
    prune: Literal["dormant", "magnitude", "none"] = "dormant"  # first pruned: dormant neurons' weights, or smallest
    prune_limit: Fraction = 0.4  # omega: at most this share of the scheduled growth of a layer is pruned
    dormant_threshold: NonNegativeFloat = 0.0  # dormant: up to this multiple of the layer's mean |activation|
    review: bool = True  # experience review
    review_every: PositiveInt = 1000  # critic updates between measurements of the dormant ratio
    review_threshold: NonNegativeFloat = 0.01  # epsilon: review while the critics' dormant ratio changes less
    review_probability: Fraction = 0.5  # probability of a batch from the oldest transitions while in review
    review_fraction: Share = 0.3  # the oldest share of the buffer that is reviewed


# ------------------------------------------------------------------------------------------ the method: connections


class Topology:
    """Which connections one network and its target have, and how they change.

    Weights that are off are exactly 0 in network, target and moments. So the forward pass costs nothing extra, and
    their gradient, read before it is masked, tells what a connection would be worth. Biases are dense and do not count.

    layers: linear layers in order, heads that read the same layer in an inner list at the end. Others stay as they are.
    targets: the target network's. every, until: in updates of this network. masks[i] (out, in): 1.0 where layer i has a
    connection (floats multiply faster). A checkpoint holds STATE and the generator.
    """

    STATE = ("masks", "updates", "pruned", "grown")  # a resume makes this, loads the weights, assigns these

    def __init__(
        self, layers, optimizer, targets=None, *, every, until, initial_density=0.2, final_density=1.0,
        growth="gradient", prune="dormant", prune_limit=0.4, dormant_threshold=0.0, generator=None,
    ):  # fmt: skip
        self.levels, targets = ([x if isinstance(x, list) else [x] for x in n] for n in (layers, targets or layers))
        self.layers, self.targets = ([layer for level in net for layer in level] for net in (self.levels, targets))
        for d, level in enumerate(self.levels[1:]):
            assert level[0].in_features == self.levels[d][0].out_features, f"level {d + 1} does not read level {d}"
        self.every, self.until, self.growth, self.prune = every, int(until), growth, prune
        self.prune_limit, self.dormant_threshold = prune_limit if prune != "none" else 0, dormant_threshold
        self.optimizer, self.generator, self.gradients = optimizer, generator, []
        self.updates = self.pruned = self.grown = 0  # the last two: connections, over the whole run
        shapes = [layer.weight.shape for layer in self.layers]
        self.start, self.final = (erdos_renyi_counts(shapes, density) for density in (initial_density, final_density))
        tied = [torch.zeros_like(layer.weight) for layer in self.layers]
        self.masks = [pick(t, t == 0, count, generator).float() for t, count in zip(tied, self.start, strict=True)]
        for i, mask in enumerate(self.masks):
            self._clear(i, "weight", mask == 0)

    @property
    def due(self) -> bool:
        """Whether connections change in the present update."""
        n = self.updates + 1
        return self.growth != "none" and n <= self.until and (n % self.every == 0 or n == self.until)

    def before_step(self) -> None:
        """After `backward`: mask the gradients. If connections change in this update, copy the dense ones first."""
        self.gradients = [layer.weight.grad.clone() for layer in self.layers] if self.due else []
        for layer, mask in zip(self.layers, self.masks, strict=True):
            layer.weight.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self, forward: Callable) -> None:
        """After the step, when due: prune, then grow. `forward` runs the network on the batch: who is dormant."""
        due, self.updates = self.due, self.updates + 1
        if not due:
            return
        progress, never = growth_progress(self.updates, self.until), self.masks[0].new_zeros(1, dtype=torch.bool)
        dormant = [never, *dormant_neurons(self.levels, forward, self.dormant_threshold), never]  # [d]: read by level d
        for i, (d, layer) in enumerate((d, layer) for d, level in enumerate(self.levels) for layer in level):
            mask, tied = self.masks[i].bool(), torch.zeros_like(layer.weight)
            count, scheduled = int(mask.sum()), self.start[i] + int(progress * (self.final[i] - self.start[i]))
            at_dormant = dormant[d] | dormant[d + 1][:, None]  # connections that begin or end at such a neuron
            candidates = (-layer.weight.abs(), mask) if self.prune == "magnitude" else (tied, mask & at_dormant)
            pruned = pick(*candidates, int(self.prune_limit * (scheduled - count)), self.generator)
            mask &= ~pruned
            self._clear(i, "weight", pruned)
            # A hidden neuron that lost all inputs restarts: bias 0, and weights drawn when inputs grow back. Outputs
            # stay. With weights of 0 it would stay silent, and a silent ReLU passes no gradient on.
            orphans = ~mask.any(1) & (d < len(self.levels) - 1)
            self._clear(i, "bias", orphans & pruned.any(1))  # who never had an input keeps its bias
            score = self.gradients[i].abs() if self.growth == "gradient" else tied
            grown = pick(score, ~mask, scheduled - int(mask.sum()), self.generator)
            reborn = grown & orphans[:, None]
            uniform = 2 * torch.rand(int(reborn.sum()), generator=self.generator) - 1  # as nn.Linear draws them
            layer.weight[reborn] = uniform.to(layer.weight) / math.sqrt(layer.in_features)
            self.masks[i].copy_(mask | grown)  # other grown weights are 0 already, and so are their moments
            self.pruned, self.grown = self.pruned + int(pruned.sum()), self.grown + int(grown.sum())

    @torch.no_grad()
    def _clear(self, i: int, name: str, where: Tensor) -> None:
        """Entries `where` of a layer's weight or bias become 0, in the target and in the optimizer's moments too."""
        for parameter in (getattr(layer, name) for layer in (self.layers[i], self.targets[i])):  # None without bias
            for values in (parameter, *self.optimizer.state.get(parameter, {}).values()):
                if torch.is_tensor(values) and values.shape == where.shape:
                    values.masked_fill_(where, 0)


def erdos_renyi_counts(shapes: list[tuple[int, int]], density: float) -> list[int]:
    """Connections of each layer (out, in): density epsilon (in + out) / (in out), rounded down; in all `density`.

    Layers that would exceed 1 are dense, and epsilon is solved again for the others (Mocanu et al. 2018).
    """
    sizes, dense = [rows * columns for rows, columns in shapes], set()
    while True:
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / max(1, sum(sum(shape) for i, shape in enumerate(shapes) if i not in dense))
        full = dense | {i for i, size in enumerate(sizes) if epsilon * sum(shapes[i]) >= size - 1e-6}  # rounding
        if full == dense:
            return [size if i in dense else int(epsilon * sum(shapes[i])) for i, size in enumerate(sizes)]
        dense = full


def growth_progress(update: int, end: int) -> float:
    """Share of the growth that is done: the integral of (alpha / 2)(1 + cos(pi t / T_end)), 1 at T_end."""
    t = update / end
    return min(1.0, t + math.sin(math.pi * t) / math.pi)


def pick(scores: Tensor, candidates: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """The `count` candidates with the largest scores (all, if there are fewer), boolean; ties break at random."""
    index = candidates.flatten().nonzero()[:, 0]
    index = index[torch.randperm(len(index), generator=generator).to(index.device)]
    best = scores.flatten()[index].topk(min(count, len(index))).indices
    return torch.zeros_like(candidates).flatten().index_fill(0, index[best], True).view_as(candidates)


def dormant_neurons(levels: list[list[nn.Linear]], forward: Callable, threshold: float) -> list[Tensor]:
    """Neurons with mean |h_i| <= threshold mean_k |h_k| during `forward()` (ReDo), boolean (width,) per hidden level.

    h is what the next level's layers read: so any activation will do, in any form. Call the uncompiled network.
    """
    h, readers = {}, [level[0] for level in levels[1:]]
    hooks = [reader.register_forward_pre_hook(lambda layer, x: h.update({layer: x[0]})) for reader in readers]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    magnitudes = [h[reader].abs().flatten(0, -2).mean(0) for reader in readers]
    return [m <= threshold * m.mean() for m in magnitudes]


# ----------------------------------------------------------------------------------------------- the method: review


class Review:
    """Experience review: while the share f of dormant neurons stands still, batches may come from old transitions.

    change: the average of |f - f_previous| (EMA 0.9); it begins with the first change, and is infinite before.
    """

    STATE = ("change", "ratio", "reviews")

    def __init__(self, threshold=0.01, probability=0.5, fraction=0.3, generator=None):
        self.threshold, self.probability, self.fraction, self.generator = threshold, probability, fraction, generator
        self.change, self.ratio, self.reviews = math.inf, None, 0  # reviews: updates made in review

    def measure(self, dormant: list[Tensor]) -> None:
        """Every 1000 updates or so: f from what `dormant_neurons` returns."""
        previous, self.ratio = self.ratio, torch.cat(dormant).float().mean().item()
        if previous is not None:
            change = abs(self.ratio - previous)
            self.change = change if math.isinf(self.change) else 0.9 * self.change + 0.1 * change

    def oldest(self) -> float:
        """Once per update, as it draws: the share of the buffer, oldest first, that the next batch comes from."""
        review = self.change < self.threshold
        self.reviews += review
        drawn = review and torch.rand((), generator=self.generator).item() < self.probability
        return self.fraction if drawn else 1.0


# ------------------------------------------------------------------------------------------------------------- TD3


class Actor(nn.Sequential):
    """Deterministic policy: (batch, obs_dim) -> (batch, act_dim) in (-1, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, width: int):
        relu = nn.ReLU(inplace=True)
        super().__init__(nn.Linear(obs_dim, width), relu, nn.Linear(width, width), relu, nn.Linear(width, act_dim))

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(super().forward(obs))

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """One observation (obs_dim,) of any float type -> one action (act_dim,), float32."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self[0].weight.device)
        return self(obs[None])[0].cpu().numpy()


class Critic(nn.Module):
    """Twin Q(s, a), with LayerNorm on the third hidden layer (authors)."""

    def __init__(self, obs_dim: int, act_dim: int, width: int):
        super().__init__()
        self.twins, relu = nn.ModuleList(), nn.ReLU(inplace=True)
        for _ in range(2):
            hidden = [nn.Linear(obs_dim + act_dim, width), relu, nn.Linear(width, width), relu]
            hidden += [nn.Linear(width, width), nn.LayerNorm(width), relu]
            self.twins.append(nn.Sequential(*hidden, nn.Linear(width, 1)))

    def forward(self, obs: Tensor, action: Tensor) -> list[Tensor]:
        """(batch, obs_dim), (batch, act_dim) -> two values (batch,)."""
        x = torch.cat([obs, action], 1)
        return [twin(x)[:, 0] for twin in self.twins]


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    """The linear layers of a network, in order."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


class ReplayBuffer:
    """Ring of transitions in a preallocated table."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.shapes = {"obs": (obs_dim,), "next_obs": (obs_dim,), "action": (act_dim,), "reward": (), "terminated": ()}
        # a row is a transition: one copy to the device. On a CPU, zeros take no memory before they are written
        self.table = torch.zeros(capacity, sum(map(math.prod, self.shapes.values())), device=device)
        self.data = self.columns(self.table)  # views
        self.capacity, self.added = capacity, 0
        # where batches are drawn: tensors, as a CUDA graph of the update could not see a Python number change
        self.bound, self.oldest_row = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows of the table, (n, width), taken apart: obs (n, obs_dim), reward (n,), and so on."""
        parts = zip(self.shapes.items(), rows.split([*map(math.prod, self.shapes.values())], 1), strict=True)
        return {name: part if shape else part[:, 0] for (name, shape), part in parts}

    def add(self, **transition: np.ndarray | float) -> None:
        """Append one transition, over the oldest one when full."""
        values = [np.atleast_1d(transition[name]) for name in self.shapes]
        row = np.concatenate(values, dtype=np.float32, casting="same_kind")
        self.table[self.added % self.capacity] = torch.from_numpy(row)
        self.added += 1

    def draw_from(self, oldest: float) -> None:
        """The next batch comes from the oldest share of the transitions: 1.0 for all of them."""
        self.bound.fill_(max(1, int(oldest * len(self))))
        self.oldest_row.fill_(self.added - len(self))

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Uniform draws with replacement from where `draw_from` said. The bias of the remainder is below 1e-12."""
        ages = torch.randint(2**62, (batch_size,), device=self.bound.device) % self.bound
        rows = (ages + self.oldest_row) % self.capacity
        return self.columns(self.table[rows])

    def recent(self, count: int) -> dict[str, Tensor]:
        """The last `count` transitions, or all there are."""
        rows = torch.arange(self.added - min(count, len(self)), self.added) % self.capacity
        return self.columns(self.table[rows])

    def state_dict(self) -> dict:
        size = len(self)  # a slice would save its whole storage: clone what is filled, unless it is all
        data = {name: c if size == self.capacity else c[:size].clone() for name, c in self.data.items()}
        return {"data": data, "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, column in state["data"].items():
            self.data[name][: len(self)] = column


def critic_loss(
    critic: Critic, target_actor: Actor, target_critic: Critic, batch: dict[str, Tensor], args: Args
) -> tuple[Tensor, Tensor]:
    """Squared error of both critics to the clipped double-Q target (Fujimoto et al. 2018), summed; mean of the first Q.

    batch: rows of `ReplayBuffer`, (batch, ...) each. Two 0-d tensors.
    """
    with torch.no_grad():
        noise = (args.target_noise * torch.randn_like(batch["action"])).clamp(-args.noise_clip, args.noise_clip)
        next_action = (target_actor(batch["next_obs"]) + noise).clamp(-1, 1)
        next_q = torch.min(*target_critic(batch["next_obs"], next_action))
        y = batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_q
    values = critic(batch["obs"], batch["action"])
    return sum(F.mse_loss(q, y) for q in values), values[0].detach().mean()


def actor_loss(actor: Actor, critic: Critic, obs: Tensor) -> Tensor:
    """-Q(s, pi(s)) of the first critic, mean over observations (batch, obs_dim). 0-d tensor."""
    return -critic.twins[0](torch.cat([obs, actor(obs)], 1)).mean()


class Agent:
    """TD3 whose networks grow. total_updates: critic updates of the whole run, on which the growth schedule depends."""

    STATE = ("actor", "critic", "target_actor", "target_critic", "optimizers", "topologies", "review", "generator")
    STATE += ("replay", "updates", "losses")

    def __init__(self, args: Args, obs_dim: int, act_dim: int, total_updates: int, device: torch.device):
        self.args, self.act_dim = args, act_dim
        self.actor = Actor(obs_dim, act_dim, args.hidden_dim).to(device)
        self.critic = Critic(obs_dim, act_dim, args.hidden_dim).to(device)
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=device.type == "cuda")
        self.optimizers = {"actor": adam(self.actor.parameters()), "critic": adam(self.critic.parameters())}
        self.replay = ReplayBuffer(min(args.buffer_size, args.steps_per_task), obs_dim, act_dim, device)

        # The method draws from a generator of its own: it takes no random numbers away from TD3.
        self.generator = torch.Generator().manual_seed(seed_of(args.seed, METHOD_DRAWS))
        self.topologies, self.review = {}, None
        if args.method != "td3":
            until = int(args.topology_until * total_updates)
            pairs = zip(self.critic.twins, self.target_critic.twins, strict=True)
            self.topologies = {
                "actor": [self.topology("actor", self.actor, self.target_actor, until, args.policy_delay)],
                "critic": [self.topology("critic", *pair, until) for pair in pairs],
            }
        if args.method == "ne" and args.review:
            numbers = args.review_threshold, args.review_probability, args.review_fraction
            self.review = Review(*numbers, self.generator)

        self.updates = 0
        self.losses: dict[str, Tensor] = {}
        self.captured = Captured(self.learn, device, args.cuda_graph, self.topologies_of)
        self.captured_policy = CapturedPolicy(lambda obs: self.actor(obs[None])[0], device, args.cuda_graph)
        self.critic_backward = with_gradients(critic_loss, self.optimizers["critic"], args.compile)
        self.actor_backward = with_gradients(actor_loss, self.optimizers["actor"], args.compile)

    def topology(self, net: str, network: nn.Module, target: nn.Module, until: int, delay: int = 1) -> Topology:
        """How the actor or one critic grows. It counts its own updates, of which there is one in `delay` updates."""
        args = self.args
        return Topology(
            linear_layers(network),
            self.optimizers[net],
            linear_layers(target),
            every=max(1, args.topology_every // delay),
            until=until // delay,
            initial_density=args.initial_density,
            final_density=args.final_density,
            growth=args.growth if args.method == "ne" else "none",  # static: the masks of the start
            prune=args.prune,
            prune_limit=args.prune_limit,
            dormant_threshold=args.dormant_threshold,
            generator=self.generator,
        )

    def topologies_of(self, trains_actor: bool) -> list[Topology]:
        """Those that take part in an update."""
        return self.topologies.get("critic", []) + (self.topologies.get("actor", []) if trains_actor else [])

    # -------------------------------------------------------------------------------------------------- training

    @property
    def logged(self) -> bool:
        """Whether `main` logs the latest update, losses and gradients: one in `LOG_EVERY`, which trains the actor."""
        delay = self.args.policy_delay
        return self.updates % delay == 0 and self.updates % LOG_EVERY < delay

    def update(self) -> None:
        """One update of the critics and, every `policy_delay`-th time, of actor and targets; `losses` has the latest.

        Nothing waits for the device but topology updates and measurements of the dormant ratio, which are rare.
        """
        self.updates += 1
        self.replay.draw_from(self.review.oldest() if self.review else 1.0)
        self.captured(self.updates % self.args.policy_delay == 0, eager=self.logged)
        if self.review and self.updates % self.args.review_every == 0:
            self.review.measure(self.dormant_of_critics())

    def learn(self, trains_actor: bool) -> None:
        """The work of an update: one CUDA graph (common/capture.py), so it changes tensors in place only.

        A `..._backward` leaves the loss's gradients in `.grad`, see `with_gradients`.
        """
        args, batch = self.args, self.replay.sample(self.args.batch_size)
        loss, q_mean = self.critic_backward(self.critic, self.target_actor, self.target_critic, batch, args)
        keep(self.losses, {"critic": loss, "q": q_mean})
        self.step("critic", lambda: self.critic(batch["obs"], batch["action"]))

        if trains_actor:
            loss = self.actor_backward(self.actor, self.critic, batch["obs"])
            keep(self.losses, {"actor": loss})
            self.step("actor", lambda: self.actor(batch["obs"]))
            with torch.no_grad():
                for target, network in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
                    for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
                        slow.lerp_(fast, args.tau)

    def step(self, net: str, forward: Callable) -> None:
        """The optimizer's step, its gradients masked; then, when due, prune and grow (`Topology`, above)."""
        topologies = self.topologies.get(net, [])
        for topology in topologies:
            topology.before_step()
        self.optimizers[net].step()
        for topology in topologies:
            topology.after_step(forward)

    def dormant_of_critics(self) -> list[Tensor]:
        """Which hidden neurons of both critics are dormant on recent transitions."""
        batch, threshold = self.replay.recent(METRIC_BATCH), self.args.dormant_threshold

        def forward():
            return self.critic(batch["obs"], batch["action"])

        return [d for t in self.topologies["critic"] for d in dormant_neurons(t.levels, forward, threshold)]

    def explore(self, obs: np.ndarray) -> np.ndarray:
        """The policy's action for one observation (obs_dim,), with exploration noise -> (act_dim,) in [-1, 1]."""
        noise = self.args.exploration_noise * torch.randn(self.act_dim).numpy()
        return (self.captured_policy(obs) + noise).clip(-1, 1)

    # --------------------------------------------------------------------------------------------------- metrics

    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of the actor and the first critic on recent transitions."""
        batch = self.replay.recent(METRIC_BATCH)
        obs_action = torch.cat([batch["obs"], batch["action"]], 1)
        networks = {"actor": (self.actor, (batch["obs"],)), "critic": (self.critic.twins[0], (obs_action,))}
        return metrics.plasticity(networks)

    def method_scalars(self) -> dict[str, float]:
        """Densities, connections pruned and grown so far, and the state of the review."""
        scalars = {}
        for net, topologies in self.topologies.items():
            layers = [torch.stack(masks) for masks in zip(*(topology.masks for topology in topologies), strict=True)]
            density = sum(layer.sum() for layer in layers) / sum(layer.numel() for layer in layers)
            scalars[f"sparsity/{net}/density"] = density
            scalars |= {f"sparsity/{net}/layer{i}": layer.mean() for i, layer in enumerate(layers, start=1)}
            scalars[f"method/pruned/{net}"] = sum(topology.pruned for topology in topologies)
            scalars[f"method/grown/{net}"] = sum(topology.grown for topology in topologies)
        if self.review:
            review = self.review
            scalars["method/review"] = review.change < review.threshold
            scalars["method/review_share"] = review.reviews / max(1, self.updates)
            measured = {"method/dormant_ratio_of_review": review.ratio, "method/dormant_change": review.change}
            scalars |= {name: value for name, value in measured.items() if value not in (None, math.inf)}
        return scalars

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the actor and of one critic, and connections that they have now."""
        networks = {"actor": self.actor, "critic": self.critic.twins[0]}
        counts = {net: sum(p.numel() for p in network.parameters()) for net, network in networks.items()}
        masks = {net: topologies[0].masks for net, topologies in self.topologies.items()}
        return counts | {f"{net}_connections": sum(int(mask.sum()) for mask in masks[net]) for net in masks}


# ------------------------------------------------------------------------------------------------------ the run


class PadSpaces(gym.Wrapper):
    """Observations with zeros behind them, and surplus actions ignored: one network for tasks of different sizes."""

    def __init__(self, env: gym.Env, obs_dim: int):
        super().__init__(env)
        self.zeros = np.zeros(obs_dim - env.observation_space.shape[0], np.float32)

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        return np.concatenate([obs, self.zeros]), info

    def step(self, action: np.ndarray):
        obs, *rest = self.env.step(action[: self.env.action_space.shape[0]])
        return np.concatenate([obs, self.zeros]), *rest


def visits_of(args: Args) -> list[str]:
    """The environment of each visit: one, or the whole sequence as often as it goes round."""
    if args.task_seq is None:
        return [canonical(args.env_id)]
    return [canonical(task) for task in args.task_seq.split(",")] * args.cycles


def sizes_of(args: Args) -> dict[str, tuple[int, int]]:
    """Observation and action dimension of each task, in the order of the first visits."""
    flag = "--env-id" if args.task_seq is None else "--task-seq"
    return {task: env_sizes(task, args, flag) for task in dict.fromkeys(visits_of(args))}


@cli.loader
def load_policy(run_dir: str, task: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The policy of a stored run on one of its tasks: an observation (obs_dim,) -> the action (act_dim,), float32."""
    args, checkpoint = cli.load_run(run_dir, Args, "neuroplastic_expansion")
    sizes = list(sizes_of(args).values())
    cli.require_task(run_dir, task, len(sizes))
    obs_dim, act_dim = (max(dims) for dims in zip(*sizes, strict=True))
    actor = Actor(obs_dim, act_dim, args.hidden_dim)
    actor.load_state_dict(checkpoint["agent"]["actor"])
    return lambda obs: actor.act(np.pad(obs, (0, obs_dim - len(obs))))[: sizes[task][1]]


def check(agent: Agent) -> None:
    """Refuse what the types of `Args` cannot tell."""
    args = agent.args
    below = f"below --steps-per-task {args.steps_per_task}"
    require(args, "learning_starts", args.learning_starts < args.steps_per_task, below)
    at_least = f"at least --initial-density {args.initial_density}"
    require(args, "final_density", args.initial_density <= args.final_density, at_least)
    for net, name, change in (("critic", "topology_until", "higher"), ("actor", "policy_delay", "smaller")):
        for topology in agent.topologies.get(net, []):
            linked = min(topology.start) > 0
            require(args, "initial_density", linked, f"higher: a layer of the {net} gets no connection")
            grows = topology.growth == "none" or topology.until >= 1
            require(args, name, grows, f"{change}: the {net} makes no update while networks grow")


def warn_of_long_intervals(agent: Agent, recorder: Recorder, total_updates: int) -> None:
    """Budgets below the paper's need intervals scaled with them."""
    args = agent.args
    for topology in agent.topologies.get("critic", [])[:1]:
        if topology.growth != "none" and topology.every > topology.until / 4:
            steps = -(-topology.until // topology.every)
            recorder.say(f"warning: growth in {steps} large step(s): --topology-every {args.topology_every}")
    if agent.review and 2 * args.review_every >= total_updates:
        recorder.say(f"warning: no review: two measurements take all updates: --review-every {args.review_every}")


def final_metrics(agent: Agent, rows: list[dict], visits: list[str]) -> dict[str, float | list[float]]:
    """What results.json holds beside the tasks' returns."""
    own = [row for row in rows if row["task"] == visits[row["phase"]]]
    at_end = [[row["episode_return"] for row in own if row["phase"] == phase][-1] for phase in range(len(visits))]
    means = {"mean_return": float(np.mean([row["episode_return"] for row in own])), "return_at_visit_end": at_end}
    return means | {name: float(value) for name, value in (agent.plasticity() | agent.method_scalars()).items()}


@recorded
def main(args: Args) -> dict:
    """Train; returns what results.json holds, or with --evaluate the result of each task."""
    args, checkpoint, device = cli.prepare(args, "neuroplastic_expansion", PRESETS)
    visits, sizes = visits_of(args), sizes_of(args)
    tasks, (obs_dim, act_dim) = list(sizes), (max(dims) for dims in zip(*sizes.values(), strict=True))

    def make_task(task: str, **options) -> gym.Env:
        options |= env_options(args)
        return PadSpaces(make_env(task, action_repeat=args.action_repeat, **options), obs_dim)

    if args.evaluate:
        policy_of = partial(load_policy, args.evaluate)
        return evaluate_stored(args, tasks, range(len(tasks)), policy_of, make_task, EVAL_STARTS)
    total_updates = len(visits) * max(0, args.steps_per_task - args.learning_starts)
    with cli.Memory(device, args.batch_size):
        agent = Agent(args, obs_dim, act_dim, total_updates, device)
    check(agent)
    at = {"phase": 0, "step": 0, "episode": 0}
    if checkpoint:
        restored(agent, checkpoint.pop("agent"), device)  # pop: the buffer's second copy is not kept
        at = restored(at, checkpoint["at"], device)

    def policy_of(index: int) -> Callable[[np.ndarray], np.ndarray]:
        return agent.actor.act

    phases, label = [(args.steps_per_task, args.learning_starts)] * len(visits), args.task_seq or args.env_id
    recorder = Recorder(args, "neuroplastic_expansion", label, tasks, phases, checkpoint)
    if not checkpoint:
        recorder.log(0, agent.method_scalars())  # the first checkpoint holds them
    recorder.begin(agent, at, checkpoint, agent.parameter_counts())
    warn_of_long_intervals(agent, recorder, total_updates)

    for phase in range(at["phase"], len(visits)):
        task, start, step, episode = visits[phase], phase * args.steps_per_task, at["step"], at["episode"]
        env = make_task(task, seed=0)  # each episode has a seed of its own
        if step == 0:
            agent.replay.added = 0  # old tasks are not reviewed
        while True:  # once per episode: a run can be saved between two episodes only
            at |= {"phase": phase, "step": step, "episode": episode}
            ended = step == args.steps_per_task
            if recorder.evaluation_due(start + step, start, ended):
                recorder.require_finite_weights(agent, start + step)
                indices = range(len(tasks)) if ended else [tasks.index(task)]
                if recorder.evaluate(start + step, phase, indices, policy_of, make_task, EVAL_STARTS):
                    recorder.log(start + step, agent.plasticity())  # not where a signal cut it short
            if recorder.checkpoint_due(start + step):
                recorder.save(start + step, agent, at)
            recorder.leave()
            if ended:
                break

            obs, _ = env.reset(seed=seed_of(args.seed, TRAIN_STARTS, phase, episode))
            done, episode_return, length = False, 0.0, 0
            while not done and step < args.steps_per_task:
                warm_up = step < args.learning_starts and task not in visits[:phase]
                action = 2 * torch.rand(act_dim).numpy() - 1 if warm_up else agent.explore(obs)
                recorder.require_finite("action", action, start + step)
                next_obs, reward, terminated, truncated, _ = env.step(action)
                transition = {"obs": obs, "next_obs": next_obs, "action": action, "reward": reward}
                agent.replay.add(**transition, terminated=float(terminated))  # a time limit is no end: bootstrap
                obs, done = next_obs, terminated or truncated
                step, length, episode_return = step + 1, length + 1, episode_return + reward
                if step > args.learning_starts:
                    agent.update()
                    if agent.logged:
                        recorder.losses(start + step, agent.losses)
                        recorder.log(start + step, metrics.grad_norms(actor=agent.actor, critic=agent.critic.twins[0]))
                        recorder.log(start + step, agent.method_scalars())
            episode += 1
            recorder.episode(start + step, task, done, episode_return, length)

        env.close()
        at |= {"phase": phase + 1, "step": 0, "episode": 0}
        recorder.save(start + step, agent, at)
    total_steps = len(visits) * args.steps_per_task
    return recorder.finish(total_steps, final_metrics(agent, recorder.rows, visits), agent.parameter_counts())


if __name__ == "__main__":
    cli.run(main, Args, PRESETS)
