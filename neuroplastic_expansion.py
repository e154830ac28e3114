"""Neuroplastic Expansion: a small sparse network that grows while it learns, and so stays able to learn.

Paper: Neuroplastic Expansion in Deep RL, arXiv 2410.07994 (ICLR 2025). Base algorithm: TD3. Environments: Gymnasium
MuJoCo and dm_control.

Actor and critics start with a fifth of their connections, placed at random. At intervals, connections are added where
the gradient of the loss is largest, so that neurons about to fall silent get a strong signal. Before that, some
connections of neurons that are silent already are removed; they may come back. Growth slows down along a cosine and
ends at full size. Once the share of silent neurons stops moving, half of the batches come from the oldest transitions,
so that what was learned early is kept.

Read first: `erdos_renyi_counts` (the start), `growth_progress` (how fast), `pick` and `Topology.update` (what is pruned
and grown), `smoothed_change` (when to review), then `Agent.update` and `main`.

    python neuroplastic_expansion.py --quick                    # a small run: minutes on a laptop CPU
    python neuroplastic_expansion.py --env-id dmc/cheetah-run   # 1 M steps at the paper's sizes

We implement the paper. Where the authors' code differs:

1. They start from the largest weights; we draw the mask at random.
2. Their dormant pruning looks layers up by names that do not exist and falls back to the smallest weights
   (`--prune magnitude`). Ours removes connections of dormant neurons.
3. Their review is off by default and compares the share of active units with a constant. Ours follows the change of
   the dormant ratio. It is on by default.
4. They skip the optimizer step on a topology update, and keep Adam's moments of weights that went. We take the step and
   clear the moments.
5. They stop at density 0.75 and go on exchanging weights. We grow to 1 (`--final-density`) and are done.
6. They prune 40 % of what a step grows in all, so 60 % of it is net growth. We prune at most 40 % of the net growth.
7. Their command keeps the actor's topology (`--static_actor`). Ours grows actor and critics.

What the paper leaves open: omega limits pruning layer by layer, so a layer that starts dense is never pruned; who is
dormant is judged after the optimizer step; the average that starts the review begins with the first change; the
buffer is emptied at each visit, so old tasks are not reviewed.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import metrics
from common.envs import can_draw, get_rng_state, make_env, record_video, set_rng_state
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

LOG_EVERY = 1000  # environment steps between two points of the loss curves
METRIC_BATCH = 1000  # recent transitions on which plasticity is measured
DORMANT_TAUS = {"dormant_ratio": 0.025, "dormant_ratio_tau_0": 0.0, "dormant_ratio_tau_0.1": 0.1}
# Second words of numpy seed sequences: independent streams for the starts of episodes and for the method's own draws.
TRAIN_EPISODES, EVAL_EPISODES, METHOD = 1, 2, 3

QUICK = {
    "steps_per_task": 20_000,
    "learning_starts": 1000,
    "eval_every": 2000,
    "eval_episodes": 5,
    "hidden_dim": 128,
    "learning_rate": 1e-3,
    "topology_interval": 500,
    "review_interval": 200,
}


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """Gymnasium id with Box spaces, or dmc/<domain>-<task>"""
    task_cycle: str | None = None
    """environments joined by commas, visited in turn by one network; --env-id is not used then"""
    cycles: int = 2
    """how often --task-cycle goes round"""
    steps_per_task: int = 1_000_000
    """environment steps of a run, of each visit with --task-cycle (paper: 1 M)"""
    seed: int = 1
    """seed of everything random"""
    quick: bool = False
    """a first look: small networks, 20 000 steps; other arguments still win"""
    resume: str | None = None
    """go on with the run in this folder; its arguments are used"""
    evaluate: str | None = None
    """evaluate the run in this folder with its arguments, print the table, do nothing else"""
    episodes: int = 10
    """episodes per task of --evaluate"""
    run_dir: str | None = None
    """folder of the run; default runs/neuroplastic_expansion__<task>__<seed>__<time>"""
    device: str = "auto"
    """auto, cpu or cuda"""
    torch_threads: int = 1
    """CPU threads of PyTorch; one per run is the fastest use of a machine that trains several seeds"""
    compile: bool = False
    """compile the losses with torch.compile"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints, at the next episode's end; 0: at the start, task borders, signals only"""
    quiet: bool = False
    """print nothing"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases"""
    wandb_project: str = "cleanplasticity"
    """project of --track"""
    capture_video: bool = False
    """record the first episode of each task at every evaluation"""

    # Environment and evaluation
    action_repeat: int = 1
    """environment steps per action; all other step counts are counts of actions"""
    eval_every: int = 5000
    """steps between evaluations on the present task, at the next episode's end; a visit's end evaluates all tasks"""
    eval_episodes: int = 10
    """deterministic episodes per task and evaluation"""

    # TD3
    hidden_dim: int = 256
    """width of all hidden layers: two of the actor, three of each critic"""
    buffer_size: int = 1_000_000
    """replay capacity, transitions; emptied at the start of each visit"""
    batch_size: int = 256
    """transitions per update; one update per step"""
    learning_starts: int = 25_000
    """steps of each visit before its first update; random actions on the first visit to a task"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """Polyak rate of the targets"""
    learning_rate: float = 3e-4
    """Adam step size of actor and critics"""
    exploration_noise: float = 0.1
    """standard deviation of the noise on training actions"""
    policy_noise: float = 0.2
    """standard deviation of the noise on target actions"""
    noise_clip: float = 0.5
    """bound of the noise on target actions"""
    policy_delay: int = 2
    """critic updates per update of actor and targets"""

    # Neuroplastic Expansion
    method: str = "ne"
    """ne; static: sparse masks that never change, no review; td3: dense networks"""
    initial_density: float = 0.2
    """share of the weights that actor and critics start with"""
    final_density: float = 1.0
    """share of the weights that they grow to (paper: full size; authors' code: 0.75)"""
    topology_interval: int = 10_000
    """critic updates between topology updates"""
    topology_end: float = 0.75
    """share of all updates after which the final density is reached"""
    growth: str = "gradient"
    """where connections grow: gradient, random, or none (then nothing is pruned either)"""
    prune: str = "dormant"
    """what is pruned before growth: dormant (neurons' connections), magnitude (the smallest weights), or none"""
    prune_limit: float = 0.4
    """omega: at most this share of the scheduled growth of a layer is pruned"""
    dormant_threshold: float = 0.0
    """a neuron is dormant if its mean activation is at most this share of its layer's mean; 0: silent on all samples"""
    review: bool = True
    """experience review"""
    review_interval: int = 1000
    """critic updates between measurements of the dormant ratio"""
    review_threshold: float = 0.01
    """epsilon: review while the smoothed change of the critics' dormant ratio is below"""
    review_probability: float = 0.5
    """probability of a batch from the oldest transitions while in review"""
    review_fraction: float = 0.3
    """the oldest share of the buffer that is reviewed"""


# --------------------------------------------------------------------------------------------------------- networks


class Actor(nn.Sequential):
    """Deterministic policy: (batch, obs_dim) -> (batch, act_dim) in (-1, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, width: int):
        hidden = [nn.Linear(obs_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        super().__init__(*hidden, nn.Linear(width, act_dim))

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(super().forward(obs))


class Critic(nn.Sequential):
    """Q(s, a): (batch, obs_dim + act_dim) -> (batch, 1). LayerNorm on the third hidden layer (authors)."""

    def __init__(self, inputs: int, width: int):
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        hidden += [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
        super().__init__(*hidden, nn.Linear(width, 1))


# ------------------------------------------------------------------------------------------ the method: connections


def erdos_renyi_counts(shapes: list[tuple[int, int]], density: float) -> list[int]:
    """Connections of each linear layer (out, in), so that the network's density is at most `density`.

    A layer's own density is epsilon (in + out) / (in out): wide layers are sparser. Layers that would exceed 1 are
    dense, and epsilon is solved again for the others (Mocanu et al. 2018; Evci et al. 2020). Counts are rounded down.
    """
    sizes = [rows * columns for rows, columns in shapes]
    dense: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        sparse = [i for i in range(len(shapes)) if i not in dense]
        epsilon = budget / max(1, sum(sum(shapes[i]) for i in sparse))
        full = {i for i in sparse if epsilon * sum(shapes[i]) >= sizes[i] - 1e-6}  # rounding must not leave one out
        if not full:
            return [size if i in dense else int(epsilon * sum(shapes[i])) for i, size in enumerate(sizes)]
        dense |= full


def growth_progress(update: int, end: int) -> float:
    """Share of the growth that is done at an update in [0, end]: 0 at the start, 1 at `end`.

    It grows at the rate (alpha / 2)(1 + cos(pi t / T_end)), with alpha such that the gap between the first and the
    final density closes exactly at T_end: the integral over t is t / T_end + sin(pi t / T_end) / pi.
    """
    t = update / end
    return min(1.0, t + math.sin(math.pi * t) / math.pi)


def pick(scores: Tensor, candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The `count` candidates with the largest scores (all, if there are fewer); ties break at random.

    scores: any shape; candidates: boolean of this shape -> boolean of this shape.
    """
    index = candidates.flatten().nonzero()[:, 0]
    index = index[torch.randperm(len(index), generator=generator).to(index.device)]
    best = scores.flatten()[index].topk(min(count, len(index))).indices
    return torch.zeros_like(candidates).flatten().index_fill(0, index[best], True).view_as(candidates)


def dormant_neurons(features: list[Tensor], threshold: float) -> list[Tensor]:
    """Neurons with mean |h_i| <= threshold mean_k |h_k|, ReDo's score. Per layer (batch, width) -> boolean (width,)."""
    magnitudes = [h.abs().mean(0) for h in features]
    return [m <= threshold * m.mean() for m in magnitudes]


def dormant_connections(dormant: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
    """For each linear layer (out, in) the connections that begin or end at a dormant neuron, boolean (out, in).

    dormant: one boolean (width,) per hidden layer. Inputs and outputs of the network are never dormant.
    """
    alive = partial(torch.zeros, dtype=torch.bool, device=dormant[0].device)
    borders = [alive(shapes[0][1]), *dormant, alive(shapes[-1][0])]
    return [after[:, None] | before[None] for before, after in pairwise(borders)]


class Topology:
    """Which connections one network and its target have, and how they change.

    Weights are stored masked: those that are off are exactly 0 in network and target, and so are their Adam moments.
    So the forward pass costs nothing extra, and the gradient of a weight that is off, read before it is masked, tells
    what the connection would be worth. Biases and LayerNorm are dense and do not count.

    masks[l] (out, in): 1.0 where layer l has a connection (floats: multiplying by them is faster than by booleans).
    counts[l]: its connections; start[l], final[l]: at the beginning and at the end of growth.
    """

    def __init__(self, network: nn.Module, target: nn.Module, density: float, final: float, generator: torch.Generator):
        self.layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        self.targets = [module for module in target.modules() if isinstance(module, nn.Linear)]
        self.network, self.generator = network, generator
        self.shapes = [tuple(layer.weight.shape) for layer in self.layers]
        self.start, self.final = erdos_renyi_counts(self.shapes, density), erdos_renyi_counts(self.shapes, final)
        self.masks: list[Tensor] = []
        for layer, count in zip(self.layers, self.start, strict=True):
            tied = torch.zeros_like(layer.weight)
            self.masks.append(pick(tied, tied == 0, count, generator).float())
        self.counts = list(self.start)
        with torch.no_grad():
            for layer, target_layer, mask in zip(self.layers, self.targets, self.masks, strict=True):
                layer.weight.mul_(mask)
                target_layer.weight.mul_(mask)

    def gradients(self) -> list[Tensor]:
        """Copies of the weights' gradients, (out, in) each."""
        return [layer.weight.grad.clone() for layer in self.layers]

    def mask_gradients(self) -> None:
        """Gradients of weights that are off become 0."""
        for layer, mask, count in zip(self.layers, self.masks, self.counts, strict=True):
            if count < mask.numel():
                layer.weight.grad.mul_(mask)

    @torch.no_grad()
    def update(
        self, progress: float, gradients: list[Tensor], inputs: Tensor, optimizer: torch.optim.Adam, args: Args
    ) -> list[int]:
        """Prune, then grow each layer to its scheduled number of connections. Returns how many went and how many came.

        progress: `growth_progress` of now; gradients: (out, in) of the batch, for weights that are off too; inputs: the
        batch, whose activations tell who is dormant; optimizer: Adam after its step.
        """
        dormant = dormant_neurons(metrics.hidden_features(self.network, inputs), args.dormant_threshold)
        dormant = dormant_connections(dormant, self.shapes)
        pruned_and_grown = [0, 0]
        for i, layer in enumerate(self.layers):
            mask, tied = self.masks[i].bool(), torch.zeros_like(layer.weight)
            scheduled = self.start[i] + int(progress * (self.final[i] - self.start[i]))
            limit = int(args.prune_limit * (scheduled - self.counts[i])) if args.prune != "none" else 0
            if args.prune == "magnitude":
                pruned = pick(-layer.weight.abs(), mask, limit, self.generator)
            else:
                pruned = pick(tied, mask & dormant[i], limit, self.generator)
            mask &= ~pruned
            self._clear(i, "weight", pruned, optimizer)
            # A hidden neuron that lost all inputs starts anew: bias 0, and weights drawn when inputs grow back. With
            # weights of 0 it would stay silent, and a silent ReLU passes no gradient on.
            orphans = ~mask.any(1) if i < len(self.layers) - 1 else torch.zeros_like(mask[:, 0])
            self._clear(i, "bias", orphans & pruned.any(1), optimizer)

            score = gradients[i].abs() if args.growth == "gradient" else tied
            count = self.counts[i] - int(pruned.sum())
            grown = pick(score, ~mask, scheduled - count, self.generator)
            reborn = grown & orphans[:, None]
            layer.weight[reborn] = self._initial_weights(i, int(reborn.sum()))
            self.masks[i] = (mask | grown).float()
            pruned_and_grown[0] += self.counts[i] - count
            pruned_and_grown[1] += scheduled - count
            self.counts[i] = scheduled
        return pruned_and_grown

    def _clear(self, i: int, name: str, where: Tensor, optimizer: torch.optim.Adam) -> None:
        """Entries `where` of a layer's weight or bias become 0, in the target and in Adam's moments too."""
        parameter = getattr(self.layers[i], name)
        moments = optimizer.state[parameter]
        for values in (parameter, getattr(self.targets[i], name), moments["exp_avg"], moments["exp_avg_sq"]):
            values.masked_fill_(where, 0)

    def _initial_weights(self, i: int, count: int) -> Tensor:
        """Draws of nn.Linear's initialiser, uniform within 1 / sqrt(in)."""
        uniform = 2 * torch.rand(count, generator=self.generator) - 1
        return uniform.to(self.masks[i].device) / math.sqrt(self.shapes[i][1])

    def load_masks(self, masks: list[Tensor]) -> None:
        """Continue with saved masks."""
        self.masks = [mask.to(self.masks[0].device) for mask in masks]
        self.counts = [int(mask.count_nonzero()) for mask in masks]


# ----------------------------------------------------------------------------------------------- the method: review


def smoothed_change(smoothed: float, previous: float | None, ratio: float) -> float:
    """EMA (0.9) of |f - f_previous|, f the dormant ratio: below epsilon, plasticity has stopped changing.

    It is infinite until there are two measurements, and the first change makes the first average.
    """
    if previous is None:
        return math.inf
    change = abs(ratio - previous)
    return change if math.isinf(smoothed) else 0.9 * smoothed + 0.1 * change


# ------------------------------------------------------------------------------------------------------------- TD3


class ReplayBuffer:
    """Ring of transitions in preallocated tensors."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        new = partial(torch.zeros, device=device)  # on a CPU, pages of zeros take no memory before they are written
        self.data = {
            "obs": new(capacity, obs_dim),
            "next_obs": new(capacity, obs_dim),
            "action": new(capacity, act_dim),
            "reward": new(capacity),
            "terminated": new(capacity),
        }
        self.capacity, self.added = capacity, 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, obs: np.ndarray, next_obs: np.ndarray, action: np.ndarray, reward: float, terminated: bool) -> None:
        """Append one transition, over the oldest one when full."""
        row = self.added % self.capacity
        self.data["obs"][row] = torch.from_numpy(obs)
        self.data["next_obs"][row] = torch.from_numpy(next_obs)
        self.data["action"][row] = torch.from_numpy(action)
        self.data["reward"][row] = reward
        self.data["terminated"][row] = float(terminated)
        self.added += 1

    def clear(self) -> None:
        """Forget all transitions."""
        self.added = 0

    def sample(self, batch_size: int, oldest: float = 1.0) -> dict[str, Tensor]:
        """Uniform draws with replacement from the oldest share of the transitions."""
        ages = torch.randint(max(1, int(oldest * len(self))), (batch_size,), device=self.data["reward"].device)
        rows = (ages + self.added - len(self)) % self.capacity
        return {name: column[rows] for name, column in self.data.items()}

    def recent(self, count: int) -> dict[str, Tensor]:
        """The last `count` transitions, or all there are."""
        rows = torch.arange(self.added - min(count, len(self)), self.added) % self.capacity
        return {name: column[rows] for name, column in self.data.items()}

    def state_dict(self) -> dict:
        size = len(self)  # a slice would save its whole storage: clone what is filled, unless it is all
        data = {name: c if size == self.capacity else c[:size].clone() for name, c in self.data.items()}
        return {"data": data, "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, column in state["data"].items():
            self.data[name][: len(self)] = column


def critic_loss(
    critics: nn.ModuleList, target_actor: Actor, target_critics: nn.ModuleList, batch: dict[str, Tensor], args: Args
) -> tuple[Tensor, Tensor]:
    """Squared error of both critics to the clipped double-Q target (Fujimoto et al. 2018), summed; mean of the first Q.

    batch: rows of `ReplayBuffer`, (batch, ...) each. Two 0-d tensors.
    """
    with torch.no_grad():
        noise = (args.policy_noise * torch.randn_like(batch["action"])).clamp(-args.noise_clip, args.noise_clip)
        next_action = (target_actor(batch["next_obs"]) + noise).clamp(-1, 1)
        next_input = torch.cat([batch["next_obs"], next_action], 1)
        next_q = torch.min(*(target(next_input)[:, 0] for target in target_critics))
        y = batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_q
    q_input = torch.cat([batch["obs"], batch["action"]], 1)
    values = [critic(q_input)[:, 0] for critic in critics]
    return sum(F.mse_loss(q, y) for q in values), values[0].detach().mean()


def actor_loss(actor: Actor, critic: Critic, obs: Tensor) -> Tensor:
    """-Q(s, pi(s)), mean over observations (batch, obs_dim). 0-d tensor."""
    return -critic(torch.cat([obs, actor(obs)], 1)).mean()


class Agent:
    """TD3 whose networks grow.

    obs_dim, act_dim: of the widest task; shorter observations are padded with zeros, surplus actions are ignored.
    total_updates: critic updates of the whole run, on which the growth schedule depends.
    """

    def __init__(self, args: Args, obs_dim: int, act_dim: int, total_updates: int, device: torch.device):
        self.args, self.device, self.obs_dim, self.act_dim = args, device, obs_dim, act_dim
        self.total_updates = total_updates
        self.actor = Actor(obs_dim, act_dim, args.hidden_dim).to(device)
        self.target_actor = Actor(obs_dim, act_dim, args.hidden_dim).to(device)
        self.critics = nn.ModuleList(Critic(obs_dim + act_dim, args.hidden_dim) for _ in range(2)).to(device)
        self.target_critics = nn.ModuleList(Critic(obs_dim + act_dim, args.hidden_dim) for _ in range(2)).to(device)
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critics.load_state_dict(self.critics.state_dict())
        self.actor_parameters = list(self.actor.parameters())
        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.optimizers = {"actor": adam(self.actor_parameters), "critic": adam(self.critics.parameters())}
        self.replay = ReplayBuffer(min(args.buffer_size, args.steps_per_task), obs_dim, act_dim, device)

        # The method draws from a generator of its own: it takes no random numbers away from TD3.
        seed = int(np.random.SeedSequence((args.seed, METHOD)).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)
        densities = (1.0, 1.0) if args.method == "td3" else (args.initial_density, args.final_density)
        pairs = {"actor": [(self.actor, self.target_actor)]}
        pairs["critic"] = list(zip(self.critics, self.target_critics, strict=True))
        self.topologies = {
            net: [Topology(*pair, *densities, self.generator) for pair in networks] for net, networks in pairs.items()
        }
        # The actor, which is updated less often, counts its own updates: about the same moments of training.
        end = int(args.topology_end * total_updates)
        self.interval = {"critic": args.topology_interval, "actor": max(1, args.topology_interval // args.policy_delay)}
        self.end = {"critic": end, "actor": end // args.policy_delay}
        self.pruned_and_grown = {"actor": [0, 0], "critic": [0, 0]}  # connections, over the whole run
        self.updates, self.reviews, self.change, self.ratio = 0, 0, math.inf, None

        self.losses: dict[str, Tensor] = {}
        self.loaded_grad_norms: dict[str, Tensor] = {}
        self.critic_loss, self.actor_loss = critic_loss, actor_loss
        if args.compile:
            self.critic_loss, self.actor_loss = torch.compile(critic_loss), torch.compile(actor_loss)

    # -------------------------------------------------------------------------------------------------- training

    @property
    def in_review(self) -> bool:
        """Whether plasticity has stopped changing, so that old experience is reviewed."""
        return self.args.method == "ne" and self.args.review and self.change < self.args.review_threshold

    def update(self) -> dict[str, Tensor]:
        """One update of the critics and, every `policy_delay`-th time, of actor and targets. Returns the latest losses.

        Nothing waits for the device but topology updates and measurements of the dormant ratio, which are rare.
        """
        args, oldest = self.args, 1.0
        if self.in_review:
            self.reviews += 1
            if torch.rand((), generator=self.generator).item() < args.review_probability:
                oldest = args.review_fraction
        batch = self.replay.sample(args.batch_size, oldest)

        q_loss, q_mean = self.critic_loss(self.critics, self.target_actor, self.target_critics, batch, args)
        self.optimizers["critic"].zero_grad(set_to_none=True)
        q_loss.backward()
        self.updates += 1
        self._step("critic", self.updates, torch.cat([batch["obs"], batch["action"]], 1))
        self.losses |= {"critic": q_loss.detach(), "q": q_mean}

        if self.updates % args.policy_delay == 0:
            loss = self.actor_loss(self.actor, self.critics[0], batch["obs"])
            self.optimizers["actor"].zero_grad(set_to_none=True)
            loss.backward(inputs=self.actor_parameters)  # no gradients of the critic's weights
            self._step("actor", self.updates // args.policy_delay, batch["obs"])
            self.losses |= {"actor": loss.detach()}
            with torch.no_grad():
                for target, network in ((self.target_actor, self.actor), (self.target_critics, self.critics)):
                    for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
                        slow.lerp_(fast, args.tau)

        if self.updates % args.review_interval == 0:
            ratio = metrics.dormant_ratio(self.features()["critic"], args.dormant_threshold).item()
            self.change, self.ratio = smoothed_change(self.change, self.ratio, ratio), ratio
        return self.losses

    def _step(self, net: str, update: int, inputs: Tensor) -> None:
        """Optimizer step with the masks as they are; then, at the moments of the schedule, prune and grow."""
        args, topologies, end = self.args, self.topologies[net], self.end[net]
        due = update <= end and (update % self.interval[net] == 0 or update == end)
        due &= args.method == "ne" and args.growth != "none"
        gradients = [topology.gradients() for topology in topologies] if due else []
        for topology in topologies:
            topology.mask_gradients()
        self.optimizers[net].step()
        if due:
            for topology, gradient in zip(topologies, gradients, strict=True):
                progress = growth_progress(update, end)
                changes = topology.update(progress, gradient, inputs, self.optimizers[net], args)
                self.pruned_and_grown[net] = [a + b for a, b in zip(self.pruned_and_grown[net], changes, strict=True)]

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """One observation, padded to (obs_dim,) -> the deterministic action (act_dim,)."""
        return self.actor(torch.from_numpy(obs).to(self.device)[None])[0].cpu().numpy()

    def explore(self, obs: np.ndarray) -> np.ndarray:
        """The action with exploration noise, clipped to [-1, 1]."""
        noise = self.args.exploration_noise * torch.randn(self.act_dim).numpy()
        return (self.act(obs) + noise).clip(-1, 1)

    def random_action(self) -> np.ndarray:
        """Uniform in [-1, 1], from PyTorch's generator, which is in the checkpoint."""
        return (2 * torch.rand(self.act_dim) - 1).numpy()

    # --------------------------------------------------------------------------------------------------- metrics

    def features(self) -> dict[str, list[Tensor]]:
        """Hidden activations of actor and critics on recent transitions, (batch, width) per layer."""
        batch = self.replay.recent(METRIC_BATCH)
        q_input = torch.cat([batch["obs"], batch["action"]], 1)
        critics = [h for critic in self.critics for h in metrics.hidden_features(critic, q_input)]
        return {"actor": metrics.hidden_features(self.actor, batch["obs"]), "critic": critics}

    def grad_norms(self) -> dict[str, Tensor]:
        """Norms of the last update's gradients, 0-d; NaN before there was one."""
        return metrics.latest_grad_norms({"actor": self.actor, "critic": self.critics}, self.loaded_grad_norms)

    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of actor and critics."""
        scalars, features, grad_norms = {}, self.features(), self.grad_norms()
        for net, module in (("actor", self.actor), ("critic", self.critics)):
            prefix = f"plasticity/{net}"
            scalars |= {f"{prefix}/{name}": metrics.dormant_ratio(features[net], t) for name, t in DORMANT_TAUS.items()}
            scalars |= {
                f"{prefix}/active_fraction": metrics.active_fraction(features[net]),
                f"{prefix}/srank": metrics.srank(features[net][-1]),
                f"{prefix}/effective_rank": metrics.effective_rank(features[net][-1]),
                f"{prefix}/weight_norm": metrics.weight_norm(module),
                f"{prefix}/grad_norm": grad_norms[net],
            }
        return scalars

    def method_scalars(self) -> dict[str, float]:
        """Densities, connections pruned and grown so far, and the state of the review."""
        scalars = {}
        for net, topologies in self.topologies.items():
            counts = np.sum([topology.counts for topology in topologies], 0)
            sizes = np.array([math.prod(shape) for shape in topologies[0].shapes]) * len(topologies)
            scalars[f"sparsity/{net}/density"] = counts.sum() / sizes.sum()
            for i, density in enumerate(counts / sizes, start=1):
                scalars[f"sparsity/{net}/layer{i}"] = density
            scalars[f"method/pruned/{net}"], scalars[f"method/grown/{net}"] = self.pruned_and_grown[net]
        scalars |= {"method/review": self.in_review, "method/review_share": self.reviews / max(1, self.updates)}
        if self.ratio is not None:
            scalars["method/dormant_ratio_of_review"] = self.ratio
        return scalars | ({} if math.isinf(self.change) else {"method/dormant_change": self.change})

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of actor and of one critic, and connections that they have now."""
        networks = {"actor": self.actor, "critic": self.critics[0]}
        counts = {net: sum(p.numel() for p in network.parameters()) for net, network in networks.items()}
        return counts | {f"{net}_connections": sum(self.topologies[net][0].counts) for net in networks}

    # ----------------------------------------------------------------------------------------------- checkpoints

    NETWORKS = ("actor", "critics", "target_actor", "target_critics")
    COUNTERS = ("pruned_and_grown", "updates", "reviews", "change", "ratio", "losses")

    def named_weights(self) -> list[tuple[str, Tensor]]:
        """Everything that is learned, by name."""
        return [(f"{net}.{name}", p) for net in self.NETWORKS for name, p in getattr(self, net).named_parameters()]

    def state_dict(self) -> dict:
        state = {name: getattr(self, name) for name in self.COUNTERS}
        state |= {name: getattr(self, name).state_dict() for name in (*self.NETWORKS, "replay")}
        state["optimizers"] = {net: optimizer.state_dict() for net, optimizer in self.optimizers.items()}
        state["masks"] = {net: [topology.masks for topology in group] for net, group in self.topologies.items()}
        return state | {"generator": self.generator.get_state(), "grad_norms": self.grad_norms()}

    def load_state_dict(self, state: dict) -> None:
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        for name in (*self.NETWORKS, "replay"):
            getattr(self, name).load_state_dict(state[name])
        for net, group in self.topologies.items():
            self.optimizers[net].load_state_dict(state["optimizers"][net])
            for topology, masks in zip(group, state["masks"][net], strict=True):
                topology.load_masks(masks)
        self.generator.set_state(state["generator"])
        self.loaded_grad_norms = state["grad_norms"]


# ------------------------------------------------------------------------------------------------------ the run


def check_args(args: Args) -> None:
    """Refuse impossible arguments before anything is built. Raises ArgumentError: argument, value, what is allowed."""
    choices = {
        "method": ("ne", "static", "td3"),
        "growth": ("gradient", "random", "none"),
        "prune": ("dormant", "magnitude", "none"),
        "device": ("auto", "cpu", "cuda"),
    }
    for name, values in choices.items():
        require(args, name, getattr(args, name) in values, "one of " + ", ".join(values))
    for name in ("cycles", "steps_per_task", "action_repeat", "eval_every", "eval_episodes", "episodes", "hidden_dim"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("buffer_size", "batch_size", "policy_delay", "topology_interval", "review_interval", "torch_threads"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("checkpoint_every", "learning_starts", "seed"):
        require(args, name, getattr(args, name) >= 0, "at least 0")
    for name in ("exploration_noise", "policy_noise", "noise_clip", "dormant_threshold", "review_threshold"):
        require(args, name, 0 <= getattr(args, name) < math.inf, "a number of at least 0")
    require(args, "learning_rate", 0 < args.learning_rate < math.inf, "a positive number")
    for name in ("gamma", "tau", "prune_limit", "review_probability"):
        require(args, name, 0 <= getattr(args, name) <= 1, "between 0 and 1")
    for name in ("initial_density", "topology_end", "review_fraction"):
        require(args, name, 0 < getattr(args, name) <= 1, "above 0 and at most 1")
    require(args, "seed", args.seed < 2**32, "below 2**32")
    require(args, "capture_video", can_draw() or not args.capture_video, "off: no EGL library is here to draw with")
    allowed = f"at least --initial-density {args.initial_density} and at most 1"
    require(args, "final_density", args.initial_density <= args.final_density <= 1, allowed)
    below = f"below --steps-per-task {args.steps_per_task}"
    require(args, "learning_starts", args.learning_starts < args.steps_per_task, below)


def visits_of(args: Args) -> list[str]:
    """The environment of each visit: one, or the whole cycle as often as it goes round."""
    return [args.env_id] if args.task_cycle is None else args.task_cycle.split(",") * args.cycles


def env_sizes(args: Args) -> tuple[int, int]:
    """Largest observation and action dimension among the tasks. Raises ArgumentError for what is no environment."""
    sizes = []
    for task in dict.fromkeys(visits_of(args)):
        try:
            env = make_env(task, seed=0)
        except ValueError as error:
            given = f"--env-id {args.env_id}" if args.task_cycle is None else f"--task-cycle {args.task_cycle}"
            raise ArgumentError(f"{given}: {error}") from None
        env.close()
        sizes.append((env.observation_space.shape[0], env.action_space.shape[0]))
    return tuple(max(dims) for dims in zip(*sizes, strict=True))


def new_agent(args: Args, device: torch.device) -> Agent:
    """The agent for the widest task, with the growth schedule of the whole run."""
    total_updates = len(visits_of(args)) * (args.steps_per_task - args.learning_starts)
    agent = Agent(args, *env_sizes(args), total_updates, device)
    for net, topologies in agent.topologies.items():
        least = min(topologies[0].start)
        require(args, "initial_density", least > 0, f"higher: a layer of the {net} gets no connection")
    if args.method == "ne" and args.growth != "none":
        require(args, "topology_end", agent.end["critic"] >= 1, "higher: the critics make no update before")
        require(args, "policy_delay", agent.end["actor"] >= 1, "smaller: the actor makes no update while networks grow")
    return agent


def padded(obs: np.ndarray, size: int) -> np.ndarray:
    """An observation with zeros behind it: (n,) -> (size,)."""
    return obs if len(obs) == size else np.pad(obs, (0, size - len(obs)))


def evaluate_task(
    agent: Agent, tasks: list[str], index: int, episodes: int, video: Path | None, stop=None
) -> dict | None:
    """Deterministic episodes of one task; their starts depend on the seed, the task and the episode number only.

    The result of `metrics.evaluate`: None if `stop()` came true in between.
    """
    args, task = agent.args, tasks[index]
    render_mode = "rgb_array" if video else None
    env = make_env(task, seed=0, action_repeat=args.action_repeat, render_mode=render_mode)
    act_dim = env.action_space.shape[0]
    if video:
        env = record_video(env, video / f"{index}-{task.replace('/', '-')}")

    def policy(obs: np.ndarray) -> np.ndarray:
        return agent.act(padded(obs, agent.obs_dim))[:act_dim]

    try:
        return metrics.evaluate(policy, env, episodes, (args.seed, EVAL_EPISODES, index), stop)
    finally:
        env.close()


def evaluate_run(args: Args) -> dict:
    """`--evaluate RUN_DIR`: evaluate a run's latest checkpoint on its tasks, print and return the results."""
    stored = Args(**stored_args(args.evaluate, Args) | {"buffer_size": 1})  # the actor is all that is needed
    agent = new_agent(stored, select_device(args.device))
    agent.actor.load_state_dict(load_checkpoint(args.evaluate, "neuroplastic_expansion")["agent"]["actor"])
    video = Path(args.evaluate) / "videos" / "evaluate" if args.capture_video else None
    results, tasks = {}, list(dict.fromkeys(visits_of(stored)))
    for index in range(len(tasks)):
        results[index] = evaluate_task(agent, tasks, index, args.episodes, video)
    if not args.quiet:
        print(f"{'task':<34}{'return':>12}{'length':>10}")
        for index, row in results.items():
            print(f"{index:>2}  {tasks[index]:<30}{row['episode_return']:>12.1f}{row['length']:>10.1f}")
    return results


def warn_of_long_intervals(agent: Agent, recorder: Recorder) -> None:
    """Budgets below the paper's need intervals scaled with them."""
    args, end = agent.args, agent.end["critic"]
    if args.method == "ne" and args.growth != "none" and args.topology_interval > end / 4:
        steps = -(-end // args.topology_interval)
        recorder.say(f"warning: growth in {steps} large step(s): --topology-interval {args.topology_interval}")
    if args.method == "ne" and args.review and 2 * args.review_interval > agent.total_updates:
        recorder.say(f"warning: no review without two measurements: --review-interval {args.review_interval}")
    if args.eval_every > args.steps_per_task:
        recorder.say(f"warning: evaluation at a visit's end only: --eval-every {args.eval_every}")


def final_metrics(agent: Agent, rows: list[dict], visits: list[str]) -> dict[str, float | list[float]]:
    """What results.json holds beside the tasks' returns."""
    own = [row for row in rows if row["task"] == visits[row["phase"]]]
    at_end = [[row["episode_return"] for row in own if row["phase"] == phase][-1] for phase in range(len(visits))]
    scalars = {name: float(value) for name, value in (agent.plasticity() | agent.method_scalars()).items()}
    kept = ("density", "active_fraction", "srank", *DORMANT_TAUS)
    names = [name for name in scalars if name.startswith("method/") or name.endswith(kept)]
    means = {"mean_return": float(np.mean([row["episode_return"] for row in own])), "return_at_visit_end": at_end}
    return means | {name.partition("/")[2].replace("/", "_"): scalars[name] for name in names}


def main(args: Args) -> dict:
    """Train; returns what results.json holds, or with --evaluate the result of each task.

    Raises ArgumentError, NotFiniteError, Interrupted.
    """
    check_args(args)
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)  # a product with denormal weights can be a hundred times slower
    if args.evaluate:
        return evaluate_run(args)
    if args.resume:
        finished = finished_results(args)
        if finished is not None:
            return finished
    checkpoint = load_checkpoint(args.resume, "neuroplastic_expansion") if args.resume else None
    device = select_device(args.device)
    visits = visits_of(args)
    tasks = list(dict.fromkeys(visits))

    torch.manual_seed(args.seed)
    agent = new_agent(args, device)
    label = (args.task_cycle or args.env_id).replace("/", "-").replace(",", "+")
    run_name = f"neuroplastic_expansion__{label}__{args.seed}"
    recorder = Recorder(args, "neuroplastic_expansion", run_name, tasks, len(visits) * args.steps_per_task, checkpoint)
    # Where the run is: a phase is one visit to a task, `step` counts its steps.
    start = {"step": 0, "next_eval": min(args.eval_every, args.steps_per_task), "env": None}
    at = {"phase": 0} | start
    if checkpoint:
        agent.load_state_dict(checkpoint.pop("agent"))  # pop: the buffer's second copy is not kept
        at |= checkpoint["at"]
        set_random_state(checkpoint["random"], device)

    def global_step() -> int:
        return at["phase"] * args.steps_per_task + at["step"]

    def save() -> None:
        """Checkpoint; only at an episode's end, where an environment's future is its random state."""
        recorder.require_finite_weights(agent.named_weights(), global_step())
        recorder.save(global_step(), {"agent": agent.state_dict(), "random": random_state(device), "at": at})

    def evaluate(indices: list[int]) -> bool:
        """Evaluate on these tasks; False if a signal came in between: then nothing is recorded."""
        recorder.require_finite_weights(agent.named_weights(), global_step())
        video = recorder.run_dir / "videos" / f"step-{global_step()}" if args.capture_video else None
        results = {}
        for index in indices:
            results[index] = evaluate_task(agent, tasks, index, args.eval_episodes, video, lambda: recorder.stopped)
            if results[index] is None:
                return False
        for index, result in results.items():
            recorder.evaluation(global_step(), at["phase"], index, args.eval_episodes, result)
        recorder.log(global_step(), agent.plasticity())
        returns = "  ".join(f"{tasks[index]} {result['episode_return']:.1f}" for index, result in results.items())
        recorder.say(f"step {global_step()}: return {returns}")
        return True

    if checkpoint is None:
        recorder.log(0, agent.method_scalars())
        save()
        warn_of_long_intervals(agent, recorder)
    save_every = args.checkpoint_every or math.inf
    first_step, clock = global_step(), time.monotonic()
    for phase in range(at["phase"], len(visits)):
        episodes = int(np.random.SeedSequence((args.seed, TRAIN_EPISODES, phase)).generate_state(1)[0])
        env = make_env(visits[phase], seed=episodes, action_repeat=args.action_repeat)
        act_dim, index = env.action_space.shape[0], tasks.index(visits[phase])
        if at["step"] == 0:
            agent.replay.clear()
        if at["env"] is not None:
            set_rng_state(env, at["env"])

        next_save = at["step"] + save_every
        while True:  # once per episode
            at["env"] = get_rng_state(env)
            ended = at["step"] == args.steps_per_task
            if at["step"] >= at["next_eval"] and evaluate([*range(len(tasks))] if ended else [index]):
                following = (at["step"] // args.eval_every + 1) * args.eval_every
                at["next_eval"] = math.inf if ended else min(following, args.steps_per_task)
            if recorder.stopped:
                save()
                recorder.leave()
            if ended:
                break
            if at["step"] >= next_save:
                next_save = at["step"] + save_every
                save()

            obs = padded(env.reset()[0], agent.obs_dim)
            done, episode_return = False, 0.0
            while not done and at["step"] < args.steps_per_task:
                warm_up = at["step"] < args.learning_starts and visits[phase] not in visits[:phase]
                action = agent.random_action() if warm_up else agent.explore(obs)
                recorder.require_finite("action", action, global_step())
                next_obs, reward, terminated, truncated, _ = env.step(action[:act_dim])
                next_obs = padded(next_obs, agent.obs_dim)
                agent.replay.add(obs, next_obs, action, reward, terminated)
                obs, done, episode_return = next_obs, terminated or truncated, episode_return + reward
                at["step"] += 1
                if at["step"] <= args.learning_starts:
                    continue
                losses = agent.update()
                if at["step"] % LOG_EVERY == 0:
                    for name, value in losses.items():
                        recorder.require_finite(f"losses/{name}", value, global_step())
                    recorder.log(global_step(), {f"losses/{name}": value for name, value in losses.items()})
                    recorder.log(global_step(), agent.method_scalars())
                    speed = (global_step() - first_step) / (time.monotonic() - clock)
                    recorder.log(global_step(), {"charts/SPS": speed})
            if done:  # a visit's last episode may be cut short
                recorder.log(global_step(), {"charts/episodic_return": episode_return})
            recorder.progress(global_step(), task=visits[phase], ret=f"{episode_return:.0f}")

        env.close()
        at |= {"phase": phase + 1} | start
        save()

    return recorder.finish(global_step(), final_metrics(agent, recorder.rows, visits), agent.parameter_counts())


if __name__ == "__main__":
    run(main, Args, {"quick": QUICK})
