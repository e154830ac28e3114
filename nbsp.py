"""NBSP: neuron-level balance between stability and plasticity, by masks on skill neurons and replay of earlier tasks.

Paper: Neuron-level Balance between Stability and Plasticity in Deep Reinforcement Learning, arXiv 2504.08000.
Base algorithm: Soft Actor-Critic. Environments: cycling Meta-World v3 tasks.

One agent learns tasks A, B, A, B in turn. After each visit its policy acts for some episodes, and every hidden neuron
of actor and critics gets a score: how reliably its activation, above or below its mean, tells whether the agent is
nearer to the goal than on average. The best fifth of a network's neurons are the task's skill neurons. From then on
their incoming weights and biases move a tenth as far or less, until the end of the task's next visit, which chooses
anew; the others move freely. Every tenth update is on transitions of earlier tasks.

Read first: `SkillMasks` and the functions below it (Algorithm 1, Eq. 5 and 6), `goal_proximity`, `PreviousTasks`
(Eq. 7), then `Agent.update` and `main`.

Copy: `SkillMasks`, `neuron_scores`, `skill_neurons`, `neuron_masks`, `dealt_anew`, `hidden_activations`
(87 lines; tests/transplants/nbsp_sac.py does it). The replay of earlier tasks is four lines of the loop there.

    python nbsp.py --quick                                          # reach, button-press, twice: minutes on a CPU
    python nbsp.py --task-seq window-open,window-close --cycles 2   # the paper's first cycle, 500 000 steps a visit

We know of no public code of the authors. Where we differ from the paper (1, 3), and what we chose where it is silent:

1. Adam's step hardly depends on a constant scale of the gradient. So the mask scales the step itself, and the moments
   see the whole gradient (`--mask-target update`); `gradient` is the paper's letter.
2. A step's goal proximity is its success flag (`--gpm`). Where that changes in no episode, the distance to the target
   takes its place, or else the reward.
3. Neurons that are constant while scored are left out. By the formula a dead one would score the share of steps above
   or below the mean proximity, whichever is larger: with rare success more than most live ones. One that fires in a
   single step scores almost as much and is still chosen, so with rare success the choice is weak.
4. "Earlier tasks" are all that were trained before, with the present one when it comes again; each by its latest scores
   and its latest transitions.
5. The present task's buffer is emptied at a border, and updates wait until it holds a batch again; networks, targets,
   temperature and Adam's moments go on.
6. The paper names ASR, FM and FWT; the formulas are our reading (`common.metrics.cycling_report`).
7. `--mask-neurons random` masks as many neurons as strongly, drawn among all that are not constant: the control for
   whether it matters which, which the paper does not have. tests/benchmarks/ablate_neurons.py silences them instead.
8. Actor and temperature learn in every second update only, so of their steps a fifth are on earlier tasks.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from annotated_types import Ge
from torch import Tensor, nn

from common import cli, metrics
from common.capture import Captured, CapturedPolicy, keep, with_gradients
from common.cli import Device, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Seed, require
from common.envs import env_sizes, make_env, seed_of, task_sequence
from common.recorder import Recorder, evaluate_stored, recorded, restored

LOG_EVERY, LOGGED = 1000, 2  # updates between two points of the loss curves, at one that trains the actor
METRIC_BATCH = 1000  # recent transitions on which plasticity is measured
CONSTANT = 1e-3  # a goal proximity whose range within every episode is smaller counts as constant
ACTOR_EVERY = 2  # every second update trains the actor, twice (CleanRL)
SOLVED, SOLVED_IN_A_ROW = 0.95, 3  # a task is solved after so many evaluations at this success or above
TRAIN_GOALS, EVAL_GOALS, SCORE_GOALS, MASK_NEURONS = 1, 2, 3, 4  # streams of random numbers, see `seed_of`

QUICK = {"task_seq": "reach,button-press", "steps_per_task": 20_000, "learning_starts": 1000, "layer_norm": True}
QUICK |= {"eval_every": 2500, "eval_episodes": 20, "hidden_dim": 128, "actor_lr": 1e-3, "gamma": 0.98}
PRESETS = {"quick": QUICK}


@dataclass
class Args:
    task_seq: str = "window"  # tasks of a cycle: window, drawer, button, cycle4, or Meta-World names joined by commas
    cycles: cli.Cycles = 2  # how often the tasks come in turn
    steps_per_task: PositiveInt = 500_000  # environment steps of one visit to a task, at most (our choice)
    stop_when_solved: bool = True  # end a visit after three evaluations in a row with success 0.95 or above
    seed: Seed = 1  # seed of everything random
    quick: bool = False  # a first look: two easy tasks, small networks, short visits; other arguments still win
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
    task_one_hot: bool = False  # append the task's index to observations, one-hot
    eval_every: PositiveInt = 10_000  # environment steps between evaluations on all tasks; each visit's end has one
    eval_episodes: PositiveInt = 10  # deterministic episodes per task and evaluation

    # --- SAC (defaults of CleanRL) ---
    hidden_dim: PositiveInt = 256  # width of the hidden layers of actor and critics
    hidden_layers: cli.Depth = 2  # hidden layers of actor and critics
    layer_norm: bool = False  # LayerNorm before each ReLU of actor and critics
    buffer_size: PositiveInt = 1_000_000  # replay capacity of the present task, transitions; emptied at each border
    batch_size: PositiveInt = 256  # transitions per update; one update per environment step
    learning_starts: NonNegativeInt = 5000  # steps at each task's first visit that act at random, without updates
    gamma: Fraction = 0.99  # discount
    tau: Fraction = 0.005  # Polyak rate of the target critics
    actor_lr: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--policy-lr",))] = 3e-4  # Adam step size of the actor
    critic_lr: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--q-lr",))] = 1e-3  # of critics, temperature

    # --- NBSP ---
    method: Literal["nbsp", "mask", "replay", "sac"] = "nbsp"  # mask, replay: its parts alone; sac: neither (Table 2)
    skill_proportion: Fraction = 0.2  # share of a network's hidden neurons that are skill neurons of a task (Figure 4)
    mask_factor: Fraction = 0.2  # alpha of Eq. 5: a skill neuron's mask is alpha (1 - score)
    mask_actor: bool = True  # mask the actor (Table 4)
    mask_critic: bool = True  # mask the critics (Table 4)
    mask_target: Literal["update", "gradient"] = "update"  # what the mask scales: the weights' step, or the gradient
    mask_neurons: Literal["skill", "random"] = "skill"  # random, the control: as many neurons, masks as large
    gpm: Literal["success", "distance", "reward"] = "success"  # goal proximity of a step; distance: to the target
    score_steps: Annotated[int, Ge(2)] = 5000  # steps over which neurons are scored after each visit (our choice)
    previous_buffer_size: PositiveInt = 100_000  # transitions kept of all earlier tasks together (paper)
    replay_every: PositiveInt = 10  # every k-th update is on earlier tasks (paper: k = 10)


# ------------------------------------------------------------------------------------------ the method: skill neurons


class SkillMasks:
    """The skill neurons of one network's earlier tasks, and how far training may still move them.

    layers: in order, the output last; each a linear layer, or a list or nn.Sequential of it and its LayerNorm, or of
    two heads. A hidden neuron is a row of its layer: incoming weights and bias. target: what the mask scales, "update"
    (the optimizer's step) or "gradient" (the paper's letter, of which Adam leaves little). choose: "skill", or the
    control "random": as many neurons with masks as large, drawn among those that are not constant.
    scores[task][l], masks[l]: (width,) for hidden layer l.
    """

    STATE = ("scores", "masks", "generator")  # what a checkpoint holds; of the generator its `get_state()`

    def __init__(self, layers, proportion=0.2, factor=0.2, target="update", choose="skill", seed=0):
        self.levels = [[item] if hasattr(item, "weight") else list(item) for item in layers]
        self.proportion, self.factor, self.target, self.choose = proportion, factor, target, choose
        self.generator = torch.Generator().manual_seed(seed)  # of "random": training's own draws stay as they are
        self.scores, self.old = {}, []
        self.masks = [level[0].weight.new_ones(len(level[0].weight)) for level in self.levels[:-1]]

    def masked(self) -> list[tuple[nn.Parameter, Tensor]]:
        """All that leads into the hidden neurons, each parameter with its mask in a shape that broadcasts."""
        levels = zip(self.levels, self.masks, strict=False)  # the last level has no hidden neurons
        pairs = [(p, mask) for level, mask in levels for layer in level for p in layer.parameters()]
        return [(p, mask if p.ndim == 1 else mask[:, None]) for p, mask in pairs]

    @torch.no_grad()
    def before_step(self) -> None:
        """After `backward`: remember the parameters, or scale their gradients."""
        if self.target == "update":
            self.old = [parameter.clone() for parameter, _ in self.masked()]
        else:
            for parameter, mask in self.masked():
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer's step: w <- w_old + mask (w_new - w_old) (Eq. 6), if these were remembered."""
        for (parameter, mask), old in zip(self.masked(), self.old, strict=False):
            torch.lerp(old, parameter, mask, out=parameter)

    def end_task(self, task, forward, goal_proximity: Tensor) -> None:
        """From now on `task` is an earlier one; if it was before, its new scores count.

        forward: calls the uncompiled network on T steps of the task's own policy. goal_proximity: of these steps, (T,).
        """
        scores = neuron_scores(hidden_activations(self.levels, forward), goal_proximity)
        self.scores[task] = dealt_anew(scores, self.generator) if self.choose == "random" else scores
        masks = neuron_masks(list(self.scores.values()), self.proportion, self.factor)
        for mask, new in zip(self.masks, masks, strict=True):
            mask.copy_(new)


def neuron_scores(activations: list[Tensor], goal_proximity: Tensor) -> list[Tensor]:
    """Score(N) = max(Acc, 1 - Acc) of each hidden neuron, in [1/2, 1] (Algorithm 1).

    Acc(N) = 1/T sum_t 1[1[a(N, t) > mean a(N)] = 1[q(t) > mean q]]: both above their means or neither.
    a (T, width) for each hidden layer, q (T,) -> (width,) for each layer; 0 for a neuron that is constant over the T
    steps, and for all where q is.
    """
    q, scores = goal_proximity.double(), []
    for a in activations:
        a = a.double()  # so that the rounding of a mean decides nothing
        accuracy = ((a > a.mean(0)) == (q > q.mean())[:, None]).double().mean(0)
        constant = (q.amin() == q.amax()) | (a.amin(0) == a.amax(0))
        scores.append(torch.maximum(accuracy, 1 - accuracy).float().masked_fill(constant, 0))
    return scores


def skill_neurons(scores: list[Tensor], proportion: float) -> list[Tensor]:
    """The best round(proportion * neurons) neurons of a network, ranked over its layers together; never a constant one.

    Scores (width,) for each hidden layer -> booleans of the same shapes. Of equal scores the first win, on any device.
    """
    flat = torch.cat(scores)
    best = flat.sort(descending=True, stable=True).indices[: round(proportion * len(flat))]
    skill = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, best, True) & (flat > 0)
    return list(skill.split([len(layer) for layer in scores]))


def neuron_masks(tasks: list[list[Tensor]], proportion: float, factor: float) -> list[Tensor]:
    """How far a neuron may move: factor (1 - Score(N)) for skill neurons, else 1 (Eq. 5); of several tasks the least.

    tasks: for each earlier task the scores (width,) of each hidden layer -> masks (width,) of each hidden layer.
    """
    masks = []
    for scores in tasks:
        skill = skill_neurons(scores, proportion)
        masks.append([torch.where(s, factor * (1 - score), 1) for s, score in zip(skill, scores, strict=True)])
    return [torch.stack(layer).amin(0) for layer in zip(*masks, strict=True)]


def dealt_anew(scores: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The control: the same scores, dealt at random to the network's neurons that are not constant."""
    flat = torch.cat(scores)
    live = flat.nonzero()[:, 0]
    flat[live] = flat[live[torch.randperm(len(live), generator=generator).to(live.device)]]
    return list(flat.split([len(layer) for layer in scores]))


def hidden_activations(levels: list[list[nn.Module]], forward) -> list[Tensor]:
    """Activations of each hidden layer in a call of `forward`, (T, width): what the layer behind it reads."""
    read = {level[0]: [] for level in levels[1:]}  # of each call, in order
    hooks = [r.register_forward_pre_hook(lambda layer, x: read[layer].append(torch.atleast_2d(x[0]))) for r in read]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return [torch.cat(calls) for calls in read.values()]


def goal_proximity(rollout: dict[str, Tensor], gpm: str) -> tuple[Tensor, str]:
    """Goal proximity q(t) of each step, (T,), and the measure that it is: the first that changes, or "none".

    rollout: `success`, `distance` (obj_to_target, m), `reward` and `episode` (number) of each step, (T,) each. A q that
    is constant within every episode tells episodes apart, not steps, and is passed over. After `gpm` come distance,
    which on many tasks is constant until the object is moved (and on some always), and reward.
    """
    episodes = [rollout["episode"] == number for number in rollout["episode"].unique()]
    for measure in (gpm, "distance", "reward"):
        q = -rollout["distance"] if measure == "distance" else rollout[measure]
        if any(q[steps].max() - q[steps].min() > CONSTANT for steps in episodes):
            return q, measure
    return torch.zeros_like(q), "none"


# ----------------------------------------------------------------------------- replay, of the present and earlier tasks


class ReplayBuffer:
    """Ring of transitions in a preallocated table. Meta-World never terminates, so there is no terminal flag."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.shapes = {"obs": (obs_dim,), "next_obs": (obs_dim,), "action": (act_dim,), "reward": ()}
        # a row is a transition: one copy to the device. On a CPU, zeros take no memory before they are written
        self.table = torch.zeros(capacity, sum(map(math.prod, self.shapes.values())), device=device)
        self.data = self.columns(self.table)  # views
        self.capacity, self.added = capacity, 0
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # filled rows, where `sample` reads them

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def set_added(self, added: int) -> None:
        """So many transitions have been added; 0 empties the buffer."""
        self.added = added
        self.size.fill_(len(self))

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows of the table, (n, width), taken apart: obs (n, obs_dim), reward (n,), and so on."""
        parts = zip(self.shapes.items(), rows.split([*map(math.prod, self.shapes.values())], 1), strict=True)
        return {name: part if shape else part[:, 0] for (name, shape), part in parts}

    def add(self, **transition: np.ndarray | float) -> None:
        """Append one transition, over the oldest one when full."""
        values = [np.atleast_1d(transition[name]) for name in self.shapes]
        row = np.concatenate(values, dtype=np.float32, casting="same_kind")
        self.table[self.added % self.capacity] = torch.from_numpy(row)
        self.set_added(self.added + 1)

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Uniform draws with replacement. The bound is a tensor, so that one CUDA graph can draw while it changes."""
        rows = torch.randint(2**62, (batch_size,), device=self.size.device) % self.size
        return self.columns(self.table[rows])

    def recent(self, count: int) -> dict[str, Tensor]:
        """The last `count` transitions, or all there are."""
        rows = torch.arange(self.added - min(count, len(self)), self.added) % self.capacity
        return self.columns(self.table[rows])

    def state_dict(self) -> dict:
        """The filled rows. A slice would save its whole storage: cloned, unless it is all."""
        filled = len(self)
        data = {name: c if filled == self.capacity else c[:filled].clone() for name, c in self.data.items()}
        return {"data": data, "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.set_added(state["added"])
        for name, column in state["data"].items():
            self.data[name][: len(self)] = column


class PreviousTasks(ReplayBuffer):
    """D_pre of Eq. 7: transitions of the tasks trained before, `capacity` in all, an equal share for each task.

    One table that is filled in place. counts: the rows of each task in the table's order; one whose buffer held less
    than its share gave what it had.
    """

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.counts: dict[int, int] = {}

    def add_task(self, task: int, replay: ReplayBuffer) -> None:
        """Keep a uniform draw from the buffer of `task` in place of its older one; shrink the others to their share."""
        parts = dict(zip(self.counts, self.table[: self.added].split([*self.counts.values()]), strict=True))
        parts[task] = replay.table[: len(replay)]
        for owner, part in sorted(parts.items()):
            rows = torch.randperm(len(part))[: self.capacity // len(parts)]
            parts[owner] = part[rows.to(part.device)]  # a copy
        self.counts = {owner: len(part) for owner, part in sorted(parts.items())}
        self.set_added(sum(self.counts.values()))
        self.table[: self.added] = torch.cat([parts[owner] for owner in self.counts])

    def state_dict(self) -> dict:
        return super().state_dict() | {"counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.counts = state["counts"]


# ------------------------------------------------------------------------------------------------- networks and losses


def hidden_stack(inputs: int, width: int, layers: int, layer_norm: bool) -> nn.Sequential:
    """Hidden layers, each Linear, perhaps LayerNorm, and ReLU: (batch, inputs) -> (batch, width)."""
    stack = nn.Sequential()
    for _ in range(layers):
        norm = [nn.LayerNorm(width)] if layer_norm else []
        stack.append(nn.Sequential(nn.Linear(inputs, width), *norm, nn.ReLU(inplace=True)))
        inputs = width
    return stack


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh."""

    def __init__(self, obs_dim: int, act_dim: int, width: int, layers: int, layer_norm: bool):
        super().__init__()
        self.hidden = hidden_stack(obs_dim, width, layers, layer_norm)
        self.head = nn.Linear(width, 2 * act_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (batch, obs_dim) -> mean and log of the standard deviation, (batch, act_dim) each."""
        mean, raw = self.head(self.hidden(obs)).chunk(2, dim=-1)
        return mean, -5 + 3.5 * (torch.tanh(raw) + 1)  # log std in [-5, 2]

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (batch, act_dim) in (-1, 1) and their log-probabilities (batch,)."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # log of the tanh's derivative, in a form that does not overflow
        log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_derivative
        return torch.tanh(u), log_prob.sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """One observation (obs_dim,) -> the action of the mean (act_dim,)."""
        obs = torch.from_numpy(obs).to(self.head.weight.device)[None]
        return torch.tanh(self(obs)[0])[0].cpu().numpy()


class Critic(nn.Module):
    """Q(s, a): (batch, obs_dim + act_dim) -> (batch,)."""

    def __init__(self, inputs: int, width: int, layers: int, layer_norm: bool):
        super().__init__()
        self.hidden = hidden_stack(inputs, width, layers, layer_norm)
        self.head = nn.Linear(width, 1)

    def forward(self, obs_action: Tensor) -> Tensor:
        return self.head(self.hidden(obs_action))[:, 0]


class Critics(nn.ModuleList):
    """Twin critics: (batch, obs_dim), (batch, act_dim) -> two values (batch,)."""

    def forward(self, obs: Tensor, action: Tensor) -> list[Tensor]:
        x = torch.cat([obs, action], 1)
        return [critic(x) for critic in self]


def critic_loss(actor, critics, targets, log_alpha: Tensor, batch: dict, gamma: float) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, summed, and the mean of the first Q. Episodes end by their time limit only.

    batch: `obs`, `next_obs` (batch, obs_dim), `action` (batch, act_dim), `reward` (batch,).
    """
    with torch.no_grad():
        next_action, next_log_prob = actor.sample(batch["next_obs"])
        next_q = torch.min(*targets(batch["next_obs"], next_action))
        y = batch["reward"] + gamma * (next_q - log_alpha.exp() * next_log_prob)
    values = critics(batch["obs"], batch["action"])
    return sum(F.mse_loss(q, y) for q in values), values[0].detach().mean()


def actor_loss(actor, critics, log_alpha: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of alpha log pi - Q over observations (batch, obs_dim), and the mean of log pi, 0-d."""
    action, log_prob = actor.sample(obs)
    return (log_alpha.detach().exp() * log_prob - torch.min(*critics(obs, action))).mean(), log_prob.detach().mean()


class Agent:
    """SAC with masks on the skill neurons of earlier tasks and replay of their transitions."""

    STATE = ("actor", "critics", "targets", "log_alpha", "actor_optimizer", "critic_optimizer", "alpha_optimizer")
    STATE += ("replay", "previous", "skills", "updates", "losses")

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.act_dim = args, act_dim
        shape = (args.hidden_dim, args.hidden_layers, args.layer_norm)
        self.actor = Actor(obs_dim, act_dim, *shape).to(device)
        self.critics = Critics(Critic(obs_dim + act_dim, *shape) for _ in range(2)).to(device)
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.critic_optimizer = adam(self.critics.parameters(), lr=args.critic_lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.critic_lr)
        self.critic_backward = with_gradients(critic_loss, self.critic_optimizer, args.compile)
        self.actor_backward = with_gradients(actor_loss, self.actor_optimizer, args.compile)
        self.replay = ReplayBuffer(min(args.buffer_size, args.steps_per_task), obs_dim, act_dim, device)
        self.previous = PreviousTasks(args.previous_buffer_size, obs_dim, act_dim, device)
        numbers = (args.skill_proportion, args.mask_factor, args.mask_target, args.mask_neurons)
        networks = {"actor": self.actor, "critic1": self.critics[0], "critic2": self.critics[1]}
        self.skills = {  # each network's neurons are ranked by themselves
            name: SkillMasks([*network.hidden, network.head], *numbers, seed=seed_of(args.seed, MASK_NEURONS, number))
            for number, (name, network) in enumerate(networks.items())
        }
        uses_masks = args.method in ("nbsp", "mask")  # all methods score their neurons, for the record; these use it
        self.actor_masks = [self.skills["actor"]] if uses_masks and args.mask_actor else []
        self.critic_masks = [self.skills["critic1"], self.skills["critic2"]] if uses_masks and args.mask_critic else []
        self.updates = 0
        self.losses: dict[str, Tensor] = {}  # the latest ones, 0-d; on batches of earlier tasks "previous/..."
        self.captured = Captured(self.learn, device, args.cuda_graph)
        self.explore = CapturedPolicy(lambda obs: self.actor.sample(obs[None])[0][0], device, args.cuda_graph)

    def step(self, optimizer: torch.optim.Adam, skills: Sequence[SkillMasks]) -> None:
        """The optimizer's step, masked in the networks whose `SkillMasks` are given."""
        for masks in skills:
            masks.before_step()
        optimizer.step()
        for masks in skills:
            masks.after_step()

    def update(self) -> None:
        """One SAC update; every `replay_every`-th one is on earlier tasks, every second trains the actor."""
        self.updates += 1
        replays = len(self.previous) > 0 and self.updates % self.args.replay_every == 0
        logged = self.updates % LOG_EVERY == LOGGED  # by `main`, which reads the gradients too
        self.captured(replays, self.updates % ACTOR_EVERY == 0, eager=logged)

    def learn(self, replays: bool, trains_actor: bool) -> None:
        """The work of an update, on a batch of earlier tasks or of the present one: one CUDA graph (common/capture.py).

        So it changes tensors in place only. A `..._backward` leaves gradients in `.grad`, see `with_gradients`.
        """
        args, group = self.args, "previous/" if replays else ""
        batch = (self.previous if replays else self.replay).sample(args.batch_size)

        q_loss, q_mean = self.critic_backward(self.actor, self.critics, self.targets, self.log_alpha, batch, args.gamma)
        self.step(self.critic_optimizer, self.critic_masks)
        keep(self.losses, {f"{group}critic": q_loss, f"{group}q": q_mean})

        for _ in range(ACTOR_EVERY if trains_actor else 0):  # two steps, as the next update makes none
            policy_loss, log_prob = self.actor_backward(self.actor, self.critics, self.log_alpha, batch["obs"])
            self.step(self.actor_optimizer, self.actor_masks)
            alpha_loss = -self.log_alpha.exp() * (log_prob - self.act_dim)  # target entropy -|A|
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
            values = {f"{group}actor": policy_loss, f"{group}entropy": -log_prob, "alpha": self.log_alpha.exp()}
            keep(self.losses, values)

        with torch.no_grad():
            for target, value in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(value, args.tau)

    def end_task(self, task: int, rollout: dict[str, Tensor], proximity: Tensor) -> None:
        """From now on `task` is an earlier task. Networks, targets, temperature and optimizers go on as they are.

        rollout: `obs` (T, obs_dim) and `action` (T, act_dim) of the deterministic actor, proximity: q (T,).
        """
        self.skills["actor"].end_task(task, lambda: self.actor(rollout["obs"]), proximity)
        for name in ("critic1", "critic2"):
            self.skills[name].end_task(task, lambda: self.critics(rollout["obs"], rollout["action"]), proximity)
        if self.args.method in ("nbsp", "replay"):
            self.previous.add_task(task, self.replay)
        self.replay.set_added(0)

    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of the actor and the first critic on recent transitions."""
        batch = self.replay.recent(METRIC_BATCH)
        obs_action = torch.cat([batch["obs"], batch["action"]], 1)
        return metrics.plasticity({"actor": (self.actor, (batch["obs"],)), "critic": (self.critics[0], (obs_action,))})

    def parameter_counts(self) -> dict[str, int]:
        """Sizes of the actor and of one critic."""
        networks = (("actor", self.actor), ("critic", self.critics[0]))
        return {name: sum(p.numel() for p in network.parameters()) for name, network in networks}


# ------------------------------------------------------------------------------------------------------ the run


def cycle_of(args: Args) -> list[str]:
    """The tasks of one cycle. Raises ArgumentError for what the types of `Args` cannot tell."""
    tasks = task_sequence(args.task_seq)
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    require(args, "task_seq", not twice, f"different tasks ({', '.join(twice)} comes twice); repeat them by --cycles")
    require(args, "buffer_size", args.buffer_size >= args.batch_size, f"at least --batch-size {args.batch_size}")
    below = f"below --steps-per-task {args.steps_per_task}"
    require(args, "learning_starts", args.learning_starts < args.steps_per_task, below)
    require(args, "batch_size", args.batch_size < args.steps_per_task, below)
    never = args.method in ("nbsp", "replay") and args.replay_every <= ACTOR_EVERY
    require(args, "replay_every", not never, f"above {ACTOR_EVERY}: the actor would learn on earlier tasks only")
    count = f"at least the number of tasks, {len(tasks)}"
    require(args, "previous_buffer_size", args.previous_buffer_size >= len(tasks), count)
    return tasks


def one_hots(args: Args, tasks: list[str]) -> np.ndarray:
    """What the observations of each task end with: (tasks, tasks) with --task-one-hot, else nothing, (tasks, 0)."""
    return np.eye(len(tasks), len(tasks) if args.task_one_hot else 0, dtype=np.float32)


def policy(actor: Actor, one_hot: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Deterministic actor on one task: observation without the one-hot, of any float type -> action (act_dim,)."""
    return lambda obs: actor.act(np.concatenate([obs, one_hot], dtype=np.float32, casting="same_kind"))


@cli.loader
def load_actor(run_dir: str) -> tuple[Args, Actor]:
    """Arguments and actor of a stored run."""
    args, checkpoint = cli.load_run(run_dir, Args, "nbsp")
    weights = checkpoint["agent"]["actor"]
    (_, inputs), (outputs, _) = weights["hidden.0.0.weight"].shape, weights["head.weight"].shape
    actor = Actor(inputs, outputs // 2, args.hidden_dim, args.hidden_layers, args.layer_norm)
    actor.load_state_dict(weights)
    return args, actor


def load_policy(run_dir: str, task: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The policy of a stored run on a task of its cycle: observation (39,) of any float type -> action (4,) float32."""
    args, actor = load_actor(run_dir)
    tasks = cycle_of(args)
    cli.require_task(run_dir, task, len(tasks))
    return policy(actor, one_hots(args, tasks)[task])


def score_rollout(actor: Actor, args: Args, env: gym.Env, task: int, stop: Callable[[], bool]) -> dict | None:
    """`--score-steps` steps of the deterministic actor, on goals of their own; None if `stop()` came true.

    -> `obs` (T, obs_dim), `action` (T, act_dim), `success`, `distance`, `reward` and `episode` (number), (T,) each.
    """
    rows, episode, truncated = [], -1, True
    for _ in range(args.score_steps):
        if stop():
            return None
        if truncated:
            episode += 1
            obs, _ = env.reset(seed=seed_of(args.seed, SCORE_GOALS, task, episode))
        action = actor.act(obs)
        next_obs, reward, _, truncated, info = env.step(action)
        rows.append((obs, action, info["success"], info["obj_to_target"], reward, episode))
        obs = next_obs
    names, device = ("obs", "action", "success", "distance", "reward", "episode"), actor.head.weight.device
    columns = [torch.from_numpy(np.array(column, np.float32)).to(device) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=True))


def solved(rows: list[dict], task: int, since: int) -> bool:
    """Whether a task's last three evaluations all had success 0.95 or above; only those after step `since` count."""
    successes = [row["success"] for row in rows if row["task_index"] == task and row["global_step"] > since]
    return len(successes) >= SOLVED_IN_A_ROW and min(successes[-SOLVED_IN_A_ROW:]) >= SOLVED


def report_scores(agent: Agent, task: int, measure: str, recorder: Recorder, global_step: int) -> None:
    """Say and log what the scoring of a task found."""
    scalars, counts = {}, []
    for net, masks in agent.skills.items():
        scores, skill = torch.cat(masks.scores[task]), skill_neurons(masks.scores[task], agent.args.skill_proportion)
        live = scores[scores > 0]
        scalars[f"method/constant_neurons/{net}"] = constant = len(scores) - len(live)
        if len(live):
            scalars |= {f"method/score/{net}": live, f"method/score_mean/{net}": live.mean()}  # a histogram, a number
        if torch.cat(skill).any():
            scalars[f"method/skill_score_mean/{net}"] = scores[torch.cat(skill)].mean()
        widths = [int(layer.sum()) for layer in skill]
        scalars |= {f"method/skill_neurons/{net}/layer{i}": width for i, width in enumerate(widths, start=1)}
        counts.append(f"{net} {widths} ({constant} constant)")
    for owner, kept in agent.previous.counts.items():
        scalars[f"method/previous_transitions/{recorder.tasks[owner]}"] = kept
    recorder.log(global_step, scalars)
    if measure != agent.args.gpm:
        found = "there are no skill neurons" if measure == "none" else f"neurons are scored by {measure}"
        recorder.say(f"warning: {agent.args.gpm} changed within no episode of {agent.args.score_steps} steps: {found}")
    recorder.say(f"{recorder.tasks[task]}: skill neurons per layer: {', '.join(counts)}")


def draw_skill_map(figure, agent: Agent, tasks: list[str]) -> None:
    """Skill neurons by network, layer and task: a line each, a column per neuron, coloured by score."""
    lines, names = [], []
    for net, masks in agent.skills.items():
        scores = dict(sorted(masks.scores.items()))
        skills = {task: skill_neurons(layers, agent.args.skill_proportion) for task, layers in scores.items()}
        for layer in range(agent.args.hidden_layers):
            for task, skill in skills.items():
                lines.append(torch.where(skill[layer], scores[task][layer], torch.nan).cpu().numpy())
                names.append(f"{net}, layer {layer + 1}: {tasks[task]}")
    axis = figure.subplots()
    image = axis.imshow(np.stack(lines), aspect="auto", interpolation="nearest", vmin=0.5, vmax=1, cmap="viridis")
    axis.set_yticks(range(len(names)), names, fontsize="x-small")
    for border in range(len(skills), len(lines), len(skills)):
        axis.axhline(border - 0.5, color="grey", linewidth=0.5)
    axis.set(xlabel="neuron", title=f"{agent.args.mask_neurons} neurons")
    figure.colorbar(image, label="score")


@recorded
def main(args: Args) -> dict:
    """Train on the cycles; returns what results.json holds, with --evaluate the result of each task."""
    args, checkpoint, device = cli.prepare(args, "nbsp", PRESETS)
    tasks = cycle_of(args)
    if args.evaluate:
        stored_policy = partial(load_policy, args.evaluate)
        return evaluate_stored(args, tasks, range(len(tasks)), stored_policy, make_env, EVAL_GOALS)
    (obs_dim, act_dim), one_hot = env_sizes(tasks[0], args), one_hots(args, tasks)
    with cli.Memory(device, args.batch_size):
        agent = Agent(args, obs_dim + one_hot.shape[1], act_dim, device)
    # Where the run is: a phase is one visit to a task, which takes `phase_steps` environment steps.
    at = {"phase": 0, "step": 0, "episode": 0, "phase_steps": [], "scored_by": []}
    if checkpoint:
        restored(agent, checkpoint.pop("agent"), device)  # pop: the buffer's second copy is not kept
        at = restored(at, checkpoint["at"], device)
    random_steps = [args.learning_starts if phase < len(tasks) else 0 for phase in range(args.cycles * len(tasks))]
    idle_steps = [max(steps, args.batch_size - 1) for steps in random_steps]  # before updates: there is a batch
    lengths = at["phase_steps"] + [args.steps_per_task] * (len(idle_steps) - len(at["phase_steps"]))
    phases = list(zip(lengths, idle_steps, strict=True))  # length (if not solved before), steps without an update
    recorder = Recorder(args, "nbsp", args.task_seq, tasks, phases, checkpoint)
    recorder.begin(agent, at, checkpoint, agent.parameter_counts())

    def policy_of(index: int) -> Callable:
        return policy(agent.actor, one_hot[index])

    for phase in range(at["phase"], len(phases)):
        task, start, step, episode = phase % len(tasks), sum(at["phase_steps"]), at["step"], at["episode"]
        env = make_env(tasks[task], seed=0)  # each episode has a seed of its own
        env = gym.wrappers.TransformObservation(env, partial(np.append, values=one_hot[task]), None)
        while True:  # once per episode: a run can be saved between two episodes only
            at |= {"phase": phase, "step": step, "episode": episode}
            ended = step == args.steps_per_task
            if recorder.evaluation_due(start + step, start, ended):
                recorder.require_finite_weights(agent, start + step)
                if recorder.evaluate(start + step, phase, range(len(tasks)), policy_of, make_env, EVAL_GOALS):
                    recorder.log(start + step, agent.plasticity())
            if recorder.checkpoint_due(start + step):
                recorder.save(start + step, agent, at)
            recorder.leave()
            # before a visit's first update an evaluation would judge the visit before
            if ended or (args.stop_when_solved and solved(recorder.rows, task, start + idle_steps[phase])):
                break

            obs, _ = env.reset(seed=seed_of(args.seed, TRAIN_GOALS, phase, episode))
            truncated, episode_return, success, length = False, 0.0, 0.0, 0
            while not truncated and step < args.steps_per_task:
                warm_up = step < random_steps[phase]  # uniform, of PyTorch's generator, which is in the checkpoint
                action = 2 * torch.rand(act_dim).numpy() - 1 if warm_up else agent.explore(obs)
                recorder.require_finite("action", action, start + step)
                next_obs, reward, _, truncated, info = env.step(action)
                agent.replay.add(obs=obs, next_obs=next_obs, action=action, reward=reward)
                obs, episode_return, success = next_obs, episode_return + reward, max(success, info["success"])
                step, length = step + 1, length + 1
                if step > idle_steps[phase]:
                    agent.update()
                    if agent.updates % LOG_EVERY == LOGGED:
                        recorder.losses(start + step, agent.losses)
                        recorder.log(start + step, metrics.grad_norms(actor=agent.actor, critic=agent.critics[0]))
            episode += 1
            recorder.episode(start + step, tasks[task], truncated, episode_return, length, success)

        rollout = score_rollout(agent.actor, args, env, task, lambda: recorder.stopped)
        env.close()
        if rollout is None:  # a signal came: as it was before scoring, which a resume begins anew
            recorder.save(start + step, agent, at)
            recorder.leave()
        proximity, measure = goal_proximity(rollout, args.gpm)
        agent.end_task(task, rollout, proximity)
        report_scores(agent, task, measure, recorder, start + step)
        at["scored_by"].append(measure)
        at |= {"phase": phase + 1, "step": 0, "episode": 0, "phase_steps": [*at["phase_steps"], step]}
        recorder.phase_ended(phase, step)
        recorder.save(start + step, agent, at)

    last = {(row["phase"], row["task_index"]): row["success"] for row in recorder.rows}  # of each phase, the last wins
    success = np.array([[last[phase, index] for index in range(len(tasks))] for phase in range(len(phases))])
    report = metrics.cycling_report(success) | {"success_after_phase": success.tolist()}
    report |= {"phase_steps": at["phase_steps"], "scored_by": at["scored_by"]}
    picture = partial(draw_skill_map, agent=agent, tasks=tasks)
    return recorder.finish(sum(at["phase_steps"]), report, agent.parameter_counts(), picture)


if __name__ == "__main__":
    cli.run(main, Args, PRESETS)
