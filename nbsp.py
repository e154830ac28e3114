"""NBSP: neuron-level balance between stability and plasticity, by gradient masks on skill neurons and replay.

Paper: Neuron-level Balance between Stability and Plasticity in Deep Reinforcement Learning, arXiv 2504.08000.
Base algorithm: Soft Actor-Critic. Environments: cycling Meta-World v3 tasks.

One agent learns tasks A, B, A, B in turn. After each task its policy acts for some episodes, and every hidden neuron of
actor and critics gets a score: how reliably does its activation, above or below its mean, tell whether the agent is
nearer to the goal than on average? The best fifth are the task's skill neurons. In all later training their incoming
weights move a tenth as far or less, the others move freely. Every tenth update is on transitions of earlier tasks.

Read first: `goal_proximity` and `neuron_scores` (Algorithm 1), `skill_neurons`, `gradient_masks` (Eq. 5), `masked_step`
(Eq. 6), `PreviousTasks` (Eq. 7), then `Agent.update` and `main`.

    python nbsp.py --quick                                          # two easy tasks, twice: 11 to 16 minutes on a CPU
    python nbsp.py --task-seq window-open,window-close --cycles 2   # the paper's first cycle, 500 000 steps a visit

There is no public code. Where we differ from the paper (1, 3), and what we chose where it is silent:

1. Adam divides a constant scale of the gradient away. So the mask scales the weight's step, and Adam's moments see the
   whole gradient (`--mask-target update`); `gradient` is the paper's letter.
2. A step's goal proximity is its success flag (`--gpm`); where that changes in no episode the distance to the target,
   or else the reward.
3. Neurons that are constant while scored are no skill neurons: by the formula a dead one scores the share of failures
   or of successes, whichever is larger. One that fires in a single step scores about as much, and is chosen: with
   rare success the score says little.
4. "Earlier tasks" are all that were trained before, with the present one when it comes again; each by its latest scores
   and its latest transitions.
"""

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import metrics
from common.envs import can_draw, get_rng_state, make_env, record_video, set_rng_state, task_sequence
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
CONSTANT = 1e-3  # a goal proximity that changes by less (success, m, reward of a step) does not tell steps apart
DORMANT_TAU = 0.025  # of the logged dormant ratio, as in Sokar et al. 2023
ACTOR_EVERY = 2  # every second update trains the actor, twice (CleanRL)
SOLVED, SOLVED_IN_A_ROW = 0.95, 3  # a task is solved after so many evaluations at this success or above
RANDOM_DRAWS = 5  # random choices of neurons that --ablate-neurons averages
# Second words of numpy seed sequences: independent streams of training, evaluation and scoring goals, random neurons.
TRAIN_GOALS, EVAL_GOALS, SCORE_GOALS, RANDOM_NEURONS = 1, 2, 3, 4

QUICK = {
    "task_seq": "drawer-close,button-press",
    "steps_per_task": 25_000,
    "learning_starts": 1000,
    "eval_every": 2500,
    "eval_episodes": 20,
    "hidden_dim": 128,
    "policy_lr": 1e-3,
    "gamma": 0.98,
}


@dataclass
class Args:
    task_seq: str = "window"
    """tasks of a cycle: window, drawer, button (two tasks each), cycle4, or Meta-World names joined by commas"""
    cycles: int = 2
    """how often the tasks come in turn"""
    steps_per_task: int = 500_000
    """environment steps of one visit to a task, at most (our choice)"""
    stop_when_solved: bool = True
    """end a visit after three evaluations in a row with success 0.95 or above"""
    seed: int = 1
    """seed of everything random"""
    quick: bool = False
    """a first look: drawer-close and button-press, small networks, at most 25 000 steps a visit; others still win"""
    resume: str | None = None
    """go on with the run in this folder; its arguments are used"""
    evaluate: str | None = None
    """evaluate the run in this folder with its arguments, print the table, do nothing else"""
    episodes: int = 10
    """episodes per task of --evaluate"""
    run_dir: str | None = None
    """folder of the run; default runs/nbsp__<task-seq>__<seed>__<time>"""
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
    task_one_hot: bool = False
    """append the task's index to observations, one-hot"""
    eval_every: int = 10_000
    """environment steps between evaluations on all tasks, at the next episode's end; each visit's end has one"""
    eval_episodes: int = 10
    """deterministic episodes per task and evaluation"""

    # SAC (defaults of CleanRL)
    hidden_dim: int = 256
    """width of the hidden layers of actor and critics"""
    hidden_layers: int = 2
    """hidden layers of actor and critics"""
    buffer_size: int = 1_000_000
    """replay capacity of the present task, transitions; emptied at each border"""
    batch_size: int = 256
    """transitions per update; one update per environment step"""
    learning_starts: int = 5000
    """steps at each task's first visit that act at random, without updates"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """Polyak rate of the target critics"""
    policy_lr: float = 3e-4
    """Adam step size of the actor"""
    q_lr: float = 1e-3
    """Adam step size of critics and temperature"""

    # NBSP
    method: str = "nbsp"
    """nbsp; its parts alone: mask (gradient masking), replay; sac: neither (paper Table 2)"""
    skill_proportion: float = 0.2
    """share of a network's hidden neurons that are a task's skill neurons (paper Figure 4)"""
    mask_factor: float = 0.2
    """alpha of Eq. 5: a skill neuron's mask is alpha (1 - score)"""
    mask_actor: bool = True
    """mask the actor (paper Table 4)"""
    mask_critic: bool = True
    """mask the critics (paper Table 4)"""
    mask_target: str = "update"
    """what the mask scales: update (the weights' step) or gradient (before Adam, which takes most of it back)"""
    gpm: str = "success"
    """goal proximity of a step: success (its flag), distance (minus obj_to_target) or reward"""
    score_steps: int = 5000
    """steps over which neurons are scored after each visit (our choice)"""
    previous_buffer_size: int = 100_000
    """transitions kept of all earlier tasks together (paper)"""
    replay_interval: int = 10
    """every so many updates the batch comes from earlier tasks (paper: k = 10)"""
    ablate_neurons: bool = False
    """after each visit, or with --evaluate: success without the actor's skill neurons, and without random ones"""


# --------------------------------------------------------------------------------------------------------- networks


def hidden_stack(inputs: int, width: int, layers: int) -> nn.Sequential:
    """`layers` times Linear and ReLU: (batch, inputs) -> (batch, width)."""
    modules = []
    for _ in range(layers):
        modules += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*modules)


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh."""

    def __init__(self, obs_dim: int, act_dim: int, width: int, layers: int):
        super().__init__()
        self.hidden = hidden_stack(obs_dim, width, layers)
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
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """One observation (obs_dim,) -> one action (act_dim,)."""
        obs = torch.from_numpy(obs).to(self.head.weight.device)[None]
        action = torch.tanh(self(obs)[0]) if deterministic else self.sample(obs)[0]
        return action[0].cpu().numpy()


class Critic(nn.Module):
    """Q(s, a): (batch, obs_dim + act_dim) -> (batch,)."""

    def __init__(self, inputs: int, width: int, layers: int):
        super().__init__()
        self.hidden = hidden_stack(inputs, width, layers)
        self.q = nn.Linear(width, 1)

    def forward(self, obs_action: Tensor) -> Tensor:
        return self.q(self.hidden(obs_action))[:, 0]


# ------------------------------------------------------------------------------------------ the method: skill neurons


def goal_proximity(rollout: dict[str, Tensor], gpm: str) -> tuple[Tensor, str]:
    """Goal proximity q(t) of each step, (T,), and the measure that it is: the first that changes, or "none".

    rollout: `success`, `distance` (obj_to_target, m), `reward` and `episode` (number) of each step, (T,) each. A q that
    is constant in every episode knows at most the goal, not the way there. After `gpm` come distance, which on many
    tasks is constant until the object is moved (and on some always), and reward.
    """
    episodes = [rollout["episode"] == number for number in rollout["episode"].unique()]
    for measure in (gpm, "distance", "reward"):
        q = -rollout["distance"] if measure == "distance" else rollout[measure]
        if any(q[steps].max() - q[steps].min() > CONSTANT for steps in episodes):
            return q, measure
    return torch.zeros_like(q), "none"


def neuron_scores(features: list[Tensor], q: Tensor) -> list[Tensor]:
    """Score(N) = max(Acc, 1 - Acc) of each hidden neuron, in [1/2, 1] (Algorithm 1).

    Acc(N) = 1/T sum_t 1[1[a(N, t) > mean a(N)] = 1[q(t) > mean q]]: both above their means or neither.

    features: activations a, (T, width) for each hidden layer; q: goal proximity (T,). -> (width,) for each layer, NaN
    for a neuron that is constant over the T steps, and for all where q is.
    """
    near, scores, constant = q.double() > q.double().mean(), [], q.amin() == q.amax()
    for a in features:
        a = a.double()  # so that the rounding of a mean decides nothing
        accuracy = ((a > a.mean(0)) == near[:, None]).double().mean(0)
        score = torch.maximum(accuracy, 1 - accuracy).float()
        scores.append(torch.where(constant | (a.amin(0) == a.amax(0)), torch.nan, score))
    return scores


def skill_neurons(scores: list[Tensor], proportion: float) -> list[Tensor]:
    """The best round(proportion * neurons) neurons of a network, ranked over its layers together.

    scores: (width,) for each hidden layer; neurons with NaN are never chosen. -> boolean masks of the same shapes.
    """
    flat = torch.cat(scores)
    # a stable sort: of equal scores the first neurons win, on every machine
    order = flat.nan_to_num(-1).sort(descending=True, stable=True).indices
    skill = torch.zeros_like(flat, dtype=torch.bool)
    skill[order[: round(proportion * len(flat))]] = True
    return list((skill & ~flat.isnan()).split([len(score) for score in scores]))


def gradient_masks(tasks: list[list[Tensor]], proportion: float, factor: float) -> list[Tensor]:
    """mask(N) = factor * (1 - Score(N)) for skill neurons, else 1 (Eq. 5); of several tasks the smallest counts.

    tasks: for each earlier task the scores of one network, (width,) for each hidden layer. -> masks like scores.
    """
    masks = []
    for scores in tasks:
        skill = skill_neurons(scores, proportion)
        masks.append([torch.where(s, factor * (1 - score), 1) for s, score in zip(skill, scores, strict=True)])
    return [torch.stack(layer).amin(0) for layer in zip(*masks, strict=True)]


def linear_layers(network: Actor | Critic) -> list[nn.Linear]:
    """The hidden linear layers: row i of the weight and entry i of the bias lead into neuron i."""
    return [module for module in network.hidden if isinstance(module, nn.Linear)]


def masked_parameters(network: Actor | Critic, masks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """Incoming weights and biases of the hidden neurons, each with its mask in a shape that broadcasts."""
    pairs = []
    for layer, mask in zip(linear_layers(network), masks, strict=True):
        pairs += [(layer.weight, mask[:, None]), (layer.bias, mask)]
    return pairs


@torch.no_grad()
def masked_step(optimizer: torch.optim.Optimizer, masked: list[tuple[nn.Parameter, Tensor]], target: str) -> None:
    """One optimizer step that changes each masked parameter by `mask` times what it would have been (Eq. 6).

    "update": the moments see the whole gradient, then w <- w_old + mask (w_new - w_old).
    "gradient": the gradient is scaled before the step. Adam's steps do not depend on a constant scale: what is left of
    the mask is its change over time, and the weight of Adam's epsilon.
    """
    if target == "gradient":
        for parameter, mask in masked:
            parameter.grad.mul_(mask)
        optimizer.step()
        return
    old = [parameter.clone() for parameter, _ in masked]
    optimizer.step()
    for (parameter, mask), before in zip(masked, old, strict=True):
        torch.lerp(before, parameter, mask, out=parameter)


@torch.no_grad()
def without_neurons(network: Actor, neurons: list[Tensor]) -> Actor:
    """A copy whose hidden neurons in `neurons`, boolean (width,) for each layer, always output 0."""
    network = copy.deepcopy(network)
    for layer, off in zip(linear_layers(network), neurons, strict=True):
        layer.weight[off] = 0
        layer.bias[off] = 0
    return network


def random_neurons(skill: list[Tensor], scores: list[Tensor], seed: tuple[int, ...]) -> list[Tensor]:
    """As many neurons of each layer as in `skill`, drawn from all that are not constant, as masks like it."""
    generator, masks = np.random.default_rng(seed), []
    for chosen, score in zip(skill, scores, strict=True):
        alive = (~score.isnan()).nonzero()[:, 0].cpu().numpy()
        mask = torch.zeros_like(chosen)
        mask[torch.from_numpy(generator.choice(alive, int(chosen.sum()), replace=False))] = True
        masks.append(mask)
    return masks


# ----------------------------------------------------------------------------------------------------------- replay


class ReplayBuffer:
    """Ring of transitions in preallocated tensors. Meta-World never terminates, so there is no terminal flag."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        new = partial(torch.zeros, device=device)  # on a CPU, pages of zeros take no memory before they are written
        self.data = {
            "obs": new(capacity, obs_dim),
            "next_obs": new(capacity, obs_dim),
            "action": new(capacity, act_dim),
            "reward": new(capacity),
        }
        self.capacity, self.added = capacity, 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, obs: np.ndarray, next_obs: np.ndarray, action: np.ndarray, reward: float) -> None:
        """Append one transition, over the oldest one when full."""
        row = self.added % self.capacity
        self.data["obs"][row] = torch.from_numpy(obs)
        self.data["next_obs"][row] = torch.from_numpy(next_obs)
        self.data["action"][row] = torch.from_numpy(action)
        self.data["reward"][row] = reward
        self.added += 1

    def clear(self) -> None:
        """Forget all transitions."""
        self.added = 0

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Uniform draws with replacement."""
        rows = torch.randint(len(self), (batch_size,), device=self.data["reward"].device)
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


class PreviousTasks:
    """D_pre of Eq. 7: transitions of the tasks trained before, `capacity` in all, an equal share for each task.

    A task whose buffer held less than its share gives what it had.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.task: Tensor | None = None  # (n,): whose transition each row is
        self.data: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return 0 if self.task is None else len(self.task)

    def counts(self) -> dict[int, int]:
        """Transitions of each task."""
        if self.task is None:
            return {}
        tasks, counts = self.task.unique(return_counts=True)
        return dict(zip(tasks.tolist(), counts.tolist(), strict=True))

    def add(self, task: int, replay: ReplayBuffer) -> None:
        """Keep a uniform draw from the buffer of `task` in place of its older one; shrink the others to their share."""
        tasks = sorted({*self.counts(), task})
        parts, owners = [], []
        for owner in tasks:
            if owner == task:
                source, rows = replay.data, torch.arange(len(replay))
            else:
                source, rows = self.data, (self.task.cpu() == owner).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows))[: self.capacity // len(tasks)]]
            rows = rows.to(replay.data["reward"].device)
            parts.append({name: column[rows] for name, column in source.items()})
            owners.append(torch.full_like(rows, owner))
        self.task = torch.cat(owners)
        self.data = {name: torch.cat([part[name] for part in parts]) for name in replay.data}

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Uniform draws with replacement."""
        rows = torch.randint(len(self), (batch_size,), device=self.task.device)
        return {name: column[rows] for name, column in self.data.items()}


# ------------------------------------------------------------------------------------------------------------- SAC


def critic_loss(
    actor: Actor, critics: nn.ModuleList, targets: nn.ModuleList, log_alpha: Tensor, batch: dict, gamma: float
) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, summed, and the mean of Q, 0-d. The end of an episode is only its time limit.

    batch: `obs`, `next_obs` (batch, obs_dim), `action` (batch, act_dim), `reward` (batch,).
    """
    with torch.no_grad():
        next_action, next_log_prob = actor.sample(batch["next_obs"])
        next_input = torch.cat([batch["next_obs"], next_action], 1)
        next_q = torch.min(*(target(next_input) for target in targets))
        y = batch["reward"] + gamma * (next_q - log_alpha.exp() * next_log_prob)
    q_input = torch.cat([batch["obs"], batch["action"]], 1)
    values = [critic(q_input) for critic in critics]
    return sum(F.mse_loss(q, y) for q in values), values[0].detach().mean()


def actor_loss(actor: Actor, critics: nn.ModuleList, log_alpha: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of alpha log pi - Q over observations (batch, obs_dim), and the mean of log pi, 0-d."""
    action, log_prob = actor.sample(obs)
    q_input = torch.cat([obs, action], 1)
    q = torch.min(*(critic(q_input) for critic in critics))
    return (log_alpha.detach().exp() * log_prob - q).mean(), log_prob.detach().mean()


class Agent:
    """SAC with gradient masks on the skill neurons of earlier tasks and replay of their transitions."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.act_dim, self.device = args, act_dim, device
        sizes = (args.hidden_dim, args.hidden_layers)
        self.actor = Actor(obs_dim, act_dim, *sizes).to(device)
        self.critics = nn.ModuleList(Critic(obs_dim + act_dim, *sizes) for _ in range(2)).to(device)
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.actor_parameters = list(self.actor.parameters())
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.policy_lr, fused=True)
        self.q_optimizer = torch.optim.Adam(self.critics.parameters(), lr=args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.q_lr, fused=True)
        self.critic_loss, self.actor_loss = critic_loss, actor_loss
        if args.compile:
            self.critic_loss, self.actor_loss = torch.compile(critic_loss), torch.compile(actor_loss)

        self.replay = ReplayBuffer(min(args.buffer_size, args.steps_per_task), obs_dim, act_dim, device)
        self.previous = PreviousTasks(args.previous_buffer_size)
        self.scores: dict[int, dict[str, list[Tensor]]] = {}  # scores[task][network][layer], of the latest visit
        self.masked = {"actor": [], "critics": []}  # pairs of parameter and mask, see `masked_parameters`
        self.updates = 0
        self.losses: dict[str, Tensor] = {}  # the latest ones, 0-d; on batches of earlier tasks "previous/..."
        self.loaded_grad_norms: dict[str, Tensor] = {}

    def networks(self) -> dict[str, Actor | Critic]:
        """The networks whose neurons are scored, each ranked by itself."""
        return {"actor": self.actor, "critic1": self.critics[0], "critic2": self.critics[1]}

    def random_action(self) -> np.ndarray:
        """Uniform in [-1, 1], from PyTorch's generator, which is in the checkpoint."""
        return (2 * torch.rand(self.act_dim) - 1).numpy()

    # -------------------------------------------------------------------------------------------------- training

    def update(self) -> None:
        """One SAC update; every `replay_interval`-th one is on earlier tasks. Nothing here waits for the device."""
        args = self.args
        self.updates += 1
        replays = len(self.previous) > 0 and self.updates % args.replay_interval == 0
        batch = (self.previous if replays else self.replay).sample(args.batch_size)
        group = "previous/" if replays else ""

        q_loss, q_mean = self.critic_loss(self.actor, self.critics, self.targets, self.log_alpha, batch, args.gamma)
        self.q_optimizer.zero_grad(set_to_none=True)
        q_loss.backward()
        masked_step(self.q_optimizer, self.masked["critics"], args.mask_target)
        self.losses |= {f"{group}critic": q_loss.detach(), f"{group}q": q_mean}

        if self.updates % ACTOR_EVERY == 0:
            for _ in range(ACTOR_EVERY):
                self._update_actor(batch["obs"], group)

        with torch.no_grad():
            for target, value in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(value, args.tau)

    def _update_actor(self, obs: Tensor, group: str = "") -> None:
        policy_loss, log_prob = self.actor_loss(self.actor, self.critics, self.log_alpha, obs)
        self.actor_optimizer.zero_grad(set_to_none=True)
        policy_loss.backward(inputs=self.actor_parameters)  # no gradients of the critics' weights
        masked_step(self.actor_optimizer, self.masked["actor"], self.args.mask_target)

        alpha_loss = -self.log_alpha.exp() * (log_prob - self.act_dim)  # target entropy -|A|
        self.alpha_optimizer.zero_grad(set_to_none=True)
        alpha_loss.backward()
        self.alpha_optimizer.step()
        self.losses |= {f"{group}actor": policy_loss.detach(), f"{group}entropy": -log_prob}
        self.losses["alpha"] = self.log_alpha.detach().exp()

    # ----------------------------------------------------------------------------------------------- task borders

    def score(self, rollout: dict[str, Tensor], q: Tensor) -> dict[str, list[Tensor]]:
        """Scores of all hidden neurons from a rollout of the deterministic actor and its goal proximity q (T,)."""
        q_input = torch.cat([rollout["obs"], rollout["action"]], 1)
        inputs = {"actor": rollout["obs"], "critic1": q_input, "critic2": q_input}
        nets = self.networks()
        return {name: neuron_scores(metrics.hidden_features(nets[name], x), q) for name, x in inputs.items()}

    def end_task(self, task: int, scores: dict[str, list[Tensor]]) -> None:
        """From now on `task` is an earlier task. Networks, targets, temperature and optimizers go on as they are."""
        self.scores[task] = scores
        self._set_masks()
        if self.args.method in ("nbsp", "replay"):
            self.previous.add(task, self.replay)
        self.replay.clear()

    def _set_masks(self) -> None:
        args = self.args
        masked = {
            name: masked_parameters(
                network,
                gradient_masks([s[name] for s in self.scores.values()], args.skill_proportion, args.mask_factor),
            )
            for name, network in self.networks().items()
        }
        masks = args.method in ("nbsp", "mask")
        self.masked["actor"] = masked["actor"] if masks and args.mask_actor else []
        self.masked["critics"] = masked["critic1"] + masked["critic2"] if masks and args.mask_critic else []

    def skill(self, task: int) -> dict[str, list[Tensor]]:
        """Skill neurons of a task by network, boolean (width,) for each layer."""
        return {name: skill_neurons(s, self.args.skill_proportion) for name, s in self.scores[task].items()}

    # ----------------------------------------------------------------------------------------------- measurements

    def grad_norms(self) -> dict[str, Tensor]:
        """Norms of the last update's gradients, 0-d; NaN before there was one."""
        return metrics.latest_grad_norms({"actor": self.actor, "critic": self.critics}, self.loaded_grad_norms)

    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of actor and critics on recent transitions, 0-d tensors by their name in TensorBoard."""
        grad_norms = self.grad_norms()
        batch = self.replay.recent(METRIC_BATCH)
        q_input = torch.cat([batch["obs"], batch["action"]], 1)
        features = {"actor": metrics.hidden_features(self.actor, batch["obs"])}
        features["critic"] = [h for critic in self.critics for h in metrics.hidden_features(critic, q_input)]
        scalars = {}
        for net, module in (("actor", self.actor), ("critic", self.critics)):
            scalars |= {
                f"plasticity/{net}/dormant_ratio": metrics.dormant_ratio(features[net], DORMANT_TAU),
                f"plasticity/{net}/active_fraction": metrics.active_fraction(features[net]),
                f"plasticity/{net}/srank": metrics.srank(features[net][-1]),
                f"plasticity/{net}/effective_rank": metrics.effective_rank(features[net][-1]),
                f"plasticity/{net}/weight_norm": metrics.weight_norm(module),
                f"plasticity/{net}/grad_norm": grad_norms[net],
            }
        return scalars

    def parameter_counts(self) -> dict[str, int]:
        """Sizes of the actor and of one critic."""
        networks = {"actor": self.actor, "critic": self.critics[0]}
        return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}

    # ------------------------------------------------------------------------------------------------ checkpoints

    LEARNERS = ("actor", "critics", "targets", "actor_optimizer", "q_optimizer", "alpha_optimizer", "replay")

    def named_weights(self) -> list[tuple[str, Tensor]]:
        """Everything that is learned, by name."""
        modules = {"actor": self.actor, "critics": self.critics, "targets": self.targets}
        named = [(f"{net}.{name}", p) for net, module in modules.items() for name, p in module.named_parameters()]
        return [*named, ("log_alpha", self.log_alpha)]

    def state_dict(self) -> dict:
        state = {name: getattr(self, name).state_dict() for name in self.LEARNERS}
        state |= {"log_alpha": self.log_alpha.detach(), "scores": self.scores, "updates": self.updates}
        state |= {"grad_norms": self.grad_norms(), "losses": self.losses}
        return state | {"previous": {"task": self.previous.task, "data": self.previous.data}}

    def load_state_dict(self, state: dict) -> None:
        for name in self.LEARNERS:
            getattr(self, name).load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.updates, self.losses, self.loaded_grad_norms = state["updates"], state["losses"], state["grad_norms"]
        self.scores = _to(state["scores"], self.device)
        if self.scores:
            self._set_masks()
        if state["previous"]["data"]:
            self.previous.task = state["previous"]["task"].to(self.device)
            self.previous.data = _to(state["previous"]["data"], self.device)


def _to(value, device: torch.device):
    """Move the tensors in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value.to(device)


# ------------------------------------------------------------------------------------------------------ the run


def check_args(args: Args) -> None:
    """Refuse impossible arguments before anything is built. Raises ArgumentError: argument, value, what is allowed."""
    choices = {
        "method": ("nbsp", "sac", "replay", "mask"),
        "mask_target": ("update", "gradient"),
        "gpm": ("success", "distance", "reward"),
        "device": ("auto", "cpu", "cuda"),
    }
    for name, values in choices.items():
        require(args, name, getattr(args, name) in values, "one of " + ", ".join(values))
    for name in ("cycles", "steps_per_task", "eval_every", "eval_episodes", "episodes", "hidden_dim", "hidden_layers"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("batch_size", "replay_interval", "torch_threads"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("checkpoint_every", "learning_starts", "seed"):
        require(args, name, getattr(args, name) >= 0, "at least 0")
    for name in ("policy_lr", "q_lr"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a positive number")
    for name in ("gamma", "tau", "skill_proportion", "mask_factor"):
        require(args, name, 0 <= getattr(args, name) <= 1, "between 0 and 1")
    require(args, "seed", args.seed < 2**32, "below 2**32")
    require(args, "capture_video", can_draw() or not args.capture_video, "off: no EGL library is here to draw with")
    require(args, "score_steps", args.score_steps >= 2, "at least 2")
    require(args, "buffer_size", args.buffer_size >= args.batch_size, f"at least --batch-size {args.batch_size}")
    below = f"below --steps-per-task {args.steps_per_task}"
    require(args, "learning_starts", args.learning_starts < args.steps_per_task, below)
    require(args, "batch_size", args.batch_size < args.steps_per_task, below)
    tasks = len(cycle_of(args))
    require(args, "previous_buffer_size", args.previous_buffer_size >= tasks, f"at least the number of tasks, {tasks}")


def cycle_of(args: Args) -> list[str]:
    """The tasks of one cycle. Raises ArgumentError for an unknown name or a task that is there twice."""
    try:
        tasks = task_sequence(args.task_seq)
    except ValueError as error:
        raise ArgumentError(f"--task-seq {args.task_seq}: {error}") from None
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    require(args, "task_seq", not twice, f"different tasks ({', '.join(twice)} comes twice); repeat them by --cycles")
    return tasks


class TaskOneHot(gym.ObservationWrapper):
    """Appends the one-hot index of the task to the observation."""

    def __init__(self, env: gym.Env, index: int, tasks: int):
        super().__init__(env)
        self.one_hot = np.eye(tasks, dtype=np.float32)[index]
        size = env.observation_space.shape[0] + tasks
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([observation, self.one_hot])


def make_task(args: Args, tasks: list[str], index: int, seed: int = 0, render_mode: str | None = None) -> gym.Env:
    """The environment of one task of the cycle."""
    env = make_env(tasks[index], seed=seed, render_mode=render_mode)
    return TaskOneHot(env, index, len(tasks)) if args.task_one_hot else env


def make_agent(args: Args, tasks: list[str], device: torch.device) -> Agent:
    """An agent for the tasks' observations and actions."""
    env = make_task(args, tasks, 0)
    env.close()
    return Agent(args, env.observation_space.shape[0], env.action_space.shape[0], device)


def evaluate_task(
    actor: Actor, args: Args, tasks: list[str], index: int, episodes: int, video: Path | None = None, stop=None
) -> dict | None:
    """Deterministic episodes of one task; its goals depend on the seed, the task and the episode number only.

    -> `episode_return`, `success`, `length`, means over the episodes; None if `stop()` said so. video: folder.
    """
    env = make_task(args, tasks, index, render_mode="rgb_array" if video else None)
    if video:
        env = record_video(env, video / f"{index}-{tasks[index]}")
    try:
        act = partial(actor.act, deterministic=True)
        return metrics.evaluate(act, env, episodes, (args.seed, EVAL_GOALS, index), stop)
    finally:
        env.close()


def score_rollout(actor: Actor, args: Args, tasks: list[str], index: int, stop=None) -> dict[str, Tensor] | None:
    """`--score-steps` steps of the deterministic actor on one task, on goals of their own; None if `stop()` said so.

    -> `obs` (T, obs_dim), `action` (T, act_dim), `success`, `distance`, `reward` and `episode` (number), (T,) each.
    """
    env, episode, truncated = make_task(args, tasks, index), -1, True
    rows = {"obs": [], "action": [], "success": [], "distance": [], "reward": [], "episode": []}
    try:
        for _ in range(args.score_steps):
            if stop is not None and stop():
                return None
            if truncated:
                episode += 1
                seed = np.random.SeedSequence((args.seed, SCORE_GOALS, index, episode)).generate_state(1)[0]
                obs, _ = env.reset(seed=int(seed))
            action = actor.act(obs, deterministic=True)
            next_obs, reward, _, truncated, info = env.step(action)
            row = (obs, action, info["success"], info["obj_to_target"], reward, episode)
            for column, value in zip(rows.values(), row, strict=True):
                column.append(value)
            obs = next_obs
    finally:
        env.close()
    device = actor.head.weight.device
    return {name: torch.from_numpy(np.array(column, np.float32)).to(device) for name, column in rows.items()}


def ablation(agent: Agent, tasks: list[str], index: int, scores: list[Tensor], episodes: int, stop=None) -> dict | None:
    """Success and return on a task with the actor whole, without its skill neurons, and without as many random ones.

    The random ones are the mean of five draws. All play the evaluation's goals. None if `stop()` said so.
    """
    args = agent.args
    skill = skill_neurons(scores, args.skill_proportion)
    seeds = [(args.seed, RANDOM_NEURONS, index, draw) for draw in range(RANDOM_DRAWS)]
    variants = {
        "whole": [agent.actor],
        "without_skill": [without_neurons(agent.actor, skill)],
        "without_random": [without_neurons(agent.actor, random_neurons(skill, scores, seed)) for seed in seeds],
    }
    report = {"task": tasks[index], "neurons_per_layer": [int(layer.sum()) for layer in skill]}
    for name, actors in variants.items():
        results = [evaluate_task(actor, args, tasks, index, episodes, stop=stop) for actor in actors]
        if None in results:
            return None
        report[f"success_{name}"] = float(np.mean([result["success"] for result in results]))
        report[f"return_{name}"] = float(np.mean([result["episode_return"] for result in results]))
    return report


def fallback_warning(args: Args, measure: str) -> str:
    """The line for a task whose neurons are scored by another measure than `--gpm`, or by none."""
    found = "there are no skill neurons" if measure == "none" else f"neurons are scored by {measure}"
    return f"warning: {args.gpm} did not change in {args.score_steps} steps: {found}"


def evaluate_run(args: Args) -> dict[int, dict]:
    """`--evaluate RUN_DIR`: evaluate a run's latest checkpoint on its tasks; prints the table, unless `--quiet`.

    Returns what `evaluate_task` returns by task index, with the report of `--ablate-neurons` under `ablation`.
    """
    stored = Args(**stored_args(args.evaluate, Args))
    checkpoint = load_checkpoint(args.evaluate, "nbsp")
    tasks, say = cycle_of(stored), (lambda line: None) if args.quiet else print
    agent = make_agent(stored, tasks, select_device(args.device))
    agent.load_state_dict(checkpoint["agent"])
    video = Path(args.evaluate) / "videos" / "evaluate" if args.capture_video else None
    seen = {}
    say(f"{'task':<34}{'return':>12}{'success':>10}")
    for index, task in enumerate(tasks):
        seen[index] = result = evaluate_task(agent.actor, stored, tasks, index, args.episodes, video)
        say(f"{index:>2}  {task:<30}{result['episode_return']:>12.1f}{result['success']:>10.2f}")
        if args.ablate_neurons:
            rollout = score_rollout(agent.actor, stored, tasks, index)
            q, measure = goal_proximity(rollout, stored.gpm)
            if measure != stored.gpm:
                say(fallback_warning(stored, measure))
            result["ablation"] = ablation(agent, tasks, index, agent.score(rollout, q)["actor"], args.episodes)
            for name in ("without_skill", "without_random"):
                left = [result["ablation"][f"{value}_{name}"] for value in ("return", "success")]
                say(f"    {name.replace('_', ' ') + ' neurons':<30}{left[0]:>12.1f}{left[1]:>10.2f}")
    return seen


def solved(rows: list[dict], task: int, since: int) -> bool:
    """Whether the last three evaluations of a task all had success 0.95 or above; only those after step `since` count.

    rows: dicts with `global_step`, `task_index` and `success`, as in evaluations.csv.
    """
    successes = [row["success"] for row in rows if row["task_index"] == task and row["global_step"] > since]
    return len(successes) >= SOLVED_IN_A_ROW and min(successes[-SOLVED_IN_A_ROW:]) >= SOLVED


def cycling_metrics(success: np.ndarray) -> dict[str, float]:
    """ASR, FM and FWT of S[p, i], success on task i after phase p, where phase p trains task p mod n.

    The paper's formulas are not public. These are our reading, chosen so that its numbers make sense (FM below 0.2 and
    FWT above 0.95 with an ASR of 0.9):

    asr: mean over phases, and over the tasks seen so far, of S: stability and plasticity together.
    fm: mean over phases p and earlier tasks i, i not the task of p, of max(0, S after i's last training - S after p);
        0 where there is only one task.
    fwt: mean over phases of S on the phase's own task: the ability to learn the current task.
    """
    phases, tasks = success.shape
    seen = [success[p, : min(p + 1, tasks)].mean() for p in range(phases)]
    lost = []
    for p in range(phases):
        for i in range(min(p + 1, tasks)):
            if i != p % tasks:
                trained = p - (p - i) % tasks  # the last phase up to p that trained i
                lost.append(max(0.0, success[trained, i] - success[p, i]))
    own = [success[p, p % tasks] for p in range(phases)]
    return {"asr": float(np.mean(seen)), "fm": float(np.mean(lost)) if lost else 0.0, "fwt": float(np.mean(own))}


def report_scores(agent: Agent, task: int, measure: str, recorder: Recorder, global_step: int) -> None:
    """Say and log what the scoring of a task found."""
    skill, scalars, counts = agent.skill(task), {}, []
    for net, scores in agent.scores[task].items():
        flat = torch.cat(scores)
        alive = flat[~flat.isnan()]
        scalars[f"method/constant_neurons/{net}"] = constant = len(flat) - len(alive)
        if len(alive):
            recorder.writer.add_histogram(f"method/score/{net}", alive, global_step)
            scalars[f"method/score_mean/{net}"] = alive.mean()
        if torch.cat(skill[net]).any():
            scalars[f"method/skill_score_mean/{net}"] = flat[torch.cat(skill[net])].mean()
        widths = [int(layer.sum()) for layer in skill[net]]
        for layer, width in enumerate(widths, start=1):
            scalars[f"method/skill_neurons/{net}/layer{layer}"] = width
        counts.append(f"{net} {widths} ({constant} constant)")
    for owner, kept in agent.previous.counts().items():
        scalars[f"method/previous_transitions/{recorder.tasks[owner]}"] = kept
    recorder.log(global_step, scalars)
    if measure != agent.args.gpm:
        recorder.say(fallback_warning(agent.args, measure))
    recorder.say(f"{recorder.tasks[task]}: skill neurons per layer: {', '.join(counts)}")


def draw_skill_map(figure, agent: Agent, tasks: list[str]) -> None:
    """Skill neurons by network, layer and task: a line each, a column per neuron, coloured by score."""
    lines, names = [], []
    skills = {task: agent.skill(task) for task in sorted(agent.scores)}
    for net in agent.networks():
        for layer in range(agent.args.hidden_layers):
            for task, skill in skills.items():
                score = agent.scores[task][net][layer]
                lines.append(torch.where(skill[net][layer], score, torch.nan).cpu().numpy())
                names.append(f"{net}, layer {layer + 1}: {tasks[task]}")
    axis = figure.subplots()
    image = axis.imshow(np.stack(lines), aspect="auto", interpolation="nearest", vmin=0.5, vmax=1, cmap="viridis")
    axis.set_yticks(range(len(names)), names, fontsize="x-small")
    for border in range(len(skills), len(lines), len(skills)):
        axis.axhline(border - 0.5, color="grey", linewidth=0.5)
    axis.set(xlabel="neuron", title="skill neurons")
    figure.colorbar(image, label="score")


def main(args: Args) -> dict:
    """Train on the cycles; returns what results.json holds, with `--evaluate` what `evaluate_run` returns.

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
    checkpoint = load_checkpoint(args.resume, "nbsp") if args.resume else None
    tasks = cycle_of(args)
    phases = args.cycles * len(tasks)
    device = select_device(args.device)

    torch.manual_seed(args.seed)
    agent = make_agent(args, tasks, device)
    label = args.task_seq.replace(",", "+") if len(args.task_seq) < 40 else f"{len(tasks)}tasks"
    recorder = Recorder(args, "nbsp", f"nbsp__{label}__{args.seed}", tasks, phases * args.steps_per_task, checkpoint)
    # Where the run is: a phase is one visit to a task, `step` counts its environment steps.
    start = {"step": 0, "next_eval": min(args.eval_every, args.steps_per_task), "env": None}
    at = {"phase": 0, "phase_steps": [], "scored_by": [], "ablations": []} | start
    if checkpoint:
        agent.load_state_dict(checkpoint.pop("agent"))  # pop: the buffer's second copy is not kept
        at |= checkpoint["at"]
        set_random_state(checkpoint["random"], device)

    def global_step() -> int:
        return sum(at["phase_steps"]) + at["step"]

    def stop() -> bool:
        return recorder.stopped

    def save() -> None:
        """Checkpoint; only at an episode's end, where an environment's future is its random state."""
        recorder.require_finite_weights(agent.named_weights(), global_step())
        recorder.save(global_step(), {"agent": agent.state_dict(), "random": random_state(device), "at": at})

    def evaluate_all() -> bool:
        """Evaluate on all tasks; False if a signal came in between: then nothing is recorded."""
        recorder.require_finite_weights(agent.named_weights(), global_step())
        video = recorder.run_dir / "videos" / f"step-{global_step()}" if args.capture_video else None
        results = {}
        for index in range(len(tasks)):
            results[index] = evaluate_task(agent.actor, args, tasks, index, args.eval_episodes, video, stop)
            if results[index] is None:
                return False
        for index, result in results.items():
            recorder.evaluation(global_step(), at["phase"], index, args.eval_episodes, result)
        recorder.log(global_step(), agent.plasticity())
        successes = "  ".join(f"{tasks[index]} {result['success']:.2f}" for index, result in results.items())
        recorder.say(f"step {global_step()}, phase {at['phase']}: success {successes}")
        return True

    if checkpoint is None:
        save()
    save_every = args.checkpoint_every or math.inf
    first_step, clock = global_step(), time.monotonic()
    for phase in range(at["phase"], phases):
        task = phase % len(tasks)
        goals = int(np.random.SeedSequence((args.seed, TRAIN_GOALS, phase)).generate_state(1)[0])
        env = make_task(args, tasks, task, goals)
        if at["env"] is not None:
            set_rng_state(env, at["env"])
        warm_up = args.learning_starts if phase < len(tasks) else 0
        # no evaluation before the first update counts as solved
        learning_since = sum(at["phase_steps"]) + max(warm_up, args.batch_size - 1)
        next_save = at["step"] + save_every

        while True:  # once per episode
            at["env"] = get_rng_state(env)
            ended = at["step"] == args.steps_per_task
            if at["step"] >= at["next_eval"] and evaluate_all():
                following = (at["step"] // args.eval_every + 1) * args.eval_every
                at["next_eval"] = math.inf if ended else min(following, args.steps_per_task)
            if recorder.stopped:
                save()
                recorder.leave()
            if ended or (args.stop_when_solved and solved(recorder.rows, task, learning_since)):
                break
            if at["step"] >= next_save:
                next_save = at["step"] + save_every
                save()

            obs, _ = env.reset()
            truncated, episode_return, success = False, 0.0, 0.0
            while not truncated and at["step"] < args.steps_per_task:
                action = agent.random_action() if at["step"] < warm_up else agent.actor.act(obs)
                recorder.require_finite("action", action, global_step())
                next_obs, reward, _, truncated, info = env.step(action)
                agent.replay.add(obs, next_obs, action, reward)
                obs, episode_return, success = next_obs, episode_return + reward, max(success, info["success"])
                at["step"] += 1
                if at["step"] > warm_up and len(agent.replay) >= args.batch_size:
                    agent.update()
                if at["step"] % LOG_EVERY == 0 and at["step"] > warm_up:
                    for name, value in agent.losses.items():
                        recorder.require_finite(f"losses/{name}", value, global_step())
                    recorder.log(global_step(), {f"losses/{name}": value for name, value in agent.losses.items()})
                    speed = (global_step() - first_step) / (time.monotonic() - clock)
                    recorder.log(global_step(), {"charts/SPS": speed})
            if truncated:  # the last episode of a visit may be cut short
                episode = {"charts/episodic_return": episode_return, "charts/episodic_success": success}
                recorder.log(global_step(), episode)
            recorder.progress(global_step(), task=tasks[task], ret=f"{episode_return:.0f}", success=success)

        env.close()
        rollout = score_rollout(agent.actor, args, tasks, task, stop)
        if rollout is not None:
            q, measure = goal_proximity(rollout, args.gpm)
            scores = agent.score(rollout, q)
            if args.ablate_neurons:
                ablated = ablation(agent, tasks, task, scores["actor"], args.eval_episodes, stop)
        if recorder.stopped:  # the border is crossed after scoring, or not at all
            save()
            recorder.leave()
        agent.end_task(task, scores)
        report_scores(agent, task, measure, recorder, global_step())
        if args.ablate_neurons:
            at["ablations"].append({"phase": phase} | ablated)
        at["scored_by"].append(measure)
        at |= {"phase": phase + 1, "phase_steps": [*at["phase_steps"], at["step"]]} | start
        save()

    last = {(row["phase"], row["task_index"]): row["success"] for row in recorder.rows}
    success = np.array([[last[phase, index] for index in range(len(tasks))] for phase in range(phases)])
    report = cycling_metrics(success) | {"success_after_phase": success.tolist()}
    report |= {"phase_steps": at["phase_steps"], "scored_by": at["scored_by"]}
    if args.ablate_neurons:
        report["ablations"] = at["ablations"]
    picture = partial(draw_skill_map, agent=agent, tasks=tasks)
    return recorder.finish(global_step(), report, agent.parameter_counts(), picture)


if __name__ == "__main__":
    run(main, Args, {"quick": QUICK})
