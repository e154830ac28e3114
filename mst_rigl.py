"""MST: module-specific sparse training (dense, static, RigL) on MR.Q.

Paper: Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning, arXiv 2510.12096. Base
algorithm: MR.Q, Towards General-Purpose Model-Free RL, arXiv 2501.16142. Environments: dm_control and Gymnasium MuJoCo.

MR.Q learns an encoder by predicting dynamics, reward and termination, and trains a deterministic actor and twin critics
on its features. MST trains each of the three modules as suits it when networks grow: the encoder dense with residual
blocks, the critic with RigL, which moves its few connections to where the gradient wants them, so that it keeps
learning from moving targets, and the actor with a random sparse topology that never changes.

Read first: `Block` (the six block types), `rigl_topology` and `Topology` (who trains how), `encoder_loss` and
`td_target` (MR.Q), then `main`.

    python mst_rigl.py --env-id dmc/dog-run                  # the paper's MST
    python mst_rigl.py --env-id dmc/dog-run --preset mrq     # MR.Q itself: every module dense

Where we differ from MR.Q's code, and why:

1. The 3-step return counts a terminal reward and nothing after it. Theirs also counts the next episode's rewards.
2. Priorities come from the TD error that the critic trains on. Theirs come from Q(s, pi(s)), as one name is used twice.
3. The last sub-trajectory of a truncated episode, which ends with its last observation, is sampled too.
4. The reward scale and the 10 000 random steps count steps only. Theirs also count the slots between episodes.
5. A step gets the largest priority when it becomes sampleable, theirs when it is stored.
6. A terminating step predicts the features of the episode's last observation. Theirs looks that one up in a table that
   was not written there, and mostly finds the first observation of the run.
7. Rewards beyond the outermost bins are clipped, theirs stop the run; priorities start from 0, theirs uninitialised.

The paper's code is not public. We chose block types 1 to 3, Erdos-Renyi densities per module, RigL's interval (The
State of Sparse Training in Deep RL), share and end (about RigL's own), topology change and gradient step in one update
(RigL's Algorithm 1: one or the other), width 5 and depth 4 for the largest network. README.md says more.
"""

import copy
import dataclasses
import math
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
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

# MR.Q's constants (authors' code)
ENCODER_HORIZON, Q_HORIZON = 5, 3  # steps of the latent unroll and of the return
ZS_DIM, ZA_DIM, ZSA_DIM, HIDDEN_DIM = 512, 256, 512, 512
ZS_BLOCKS, ZSA_BLOCKS, CRITIC_BLOCKS, ACTOR_BLOCKS = 3, 2, 3, 2  # blocks before --depth-scale; z_s is its last block
REWARD_BINS, REWARD_RANGE = 65, 10.0  # two-hot bins at symexp of 65 points in [-10, 10]
REWARD_WEIGHT, DONE_WEIGHT = 0.1, 0.1  # in the encoder's loss, where the dynamics have weight 1
PRIORITY_EXPONENT, MIN_PRIORITY = 0.4, 1.0
PRE_ACTIVATION_WEIGHT = 1e-5

LOG_EVERY = 1000  # agent steps between two points of the loss curves
METRIC_BATCH = 1000  # recent steps on which plasticity is measured, at width 1
DORMANT_TAU = 0.1  # of the logged dormant ratio
# Second words of numpy seed sequences: independent streams for training and evaluation episodes.
TRAIN_EPISODES, EVAL_EPISODES = 1, 2

PRESETS = {
    "preset mst": {"preset": "mst"},
    "preset mrq": {
        "preset": "mrq",
        "encoder_type": 4,
        "critic_type": 4,
        "actor_type": 3,
        "critic_regime": "dense",
        "actor_regime": "dense",
    },
    "preset mst-362m": {"preset": "mst-362m", "width_scale": 5.0, "depth_scale": 4},
}


@dataclass
class Args:
    env_id: str = "dmc/dog-run"
    """dmc/<domain>-<task> of dm_control, or a Gymnasium or Meta-World id with continuous actions"""
    total_steps: int | None = None
    """agent steps; default 500 000 in dm_control (1 M frames) and 1 M elsewhere (MR.Q)"""
    seed: int = 1
    """seed of everything random"""
    preset: str = "mst"
    """mst; mrq: all dense, MR.Q's blocks; mst-362m: width 5, depth 4. Command line only; what is typed wins"""
    resume: str | None = None
    """go on with the run in this folder; its arguments are used"""
    evaluate: str | None = None
    """evaluate the run in this folder with its arguments, print the table (unless quiet), do nothing else"""
    episodes: int = 10
    """episodes of --evaluate"""
    run_dir: str | None = None
    """folder of the run; default runs/mst_rigl__<env-id>__<seed>__<time>"""
    device: str = "auto"
    """auto, cpu or cuda"""
    torch_threads: int = 1
    """CPU threads of PyTorch; one per run is the fastest use of a machine that trains several seeds"""
    compile: bool = False
    """compile the losses and the critics' targets with torch.compile"""
    bf16: bool = False
    """products of the updates in bfloat16 (autocast), where hardware has them; not bit-comparable with float32"""
    checkpoint_every: int = 50_000
    """agent steps between checkpoints, at the next episode's end; 0: at the start, the end and on a signal only"""
    quiet: bool = False
    """print nothing"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases"""
    wandb_project: str = "cleanplasticity"
    """project of --track"""
    capture_video: bool = False
    """record the first episode of every evaluation"""

    # Environment and evaluation
    action_repeat: int | None = None
    """environment steps per agent step; default 2 in dm_control and 1 elsewhere (MR.Q)"""
    eval_every: int = 5000
    """agent steps between evaluations, at the next episode's end; the end of the run is always evaluated"""
    eval_episodes: int = 10
    """deterministic episodes per evaluation"""

    # MR.Q
    buffer_size: int = 1_000_000
    """replay capacity, transitions"""
    batch_size: int = 256
    """sub-trajectories per update; one update of every module per agent step"""
    learning_starts: int = 10_000
    """uniformly random steps before the first update"""
    gamma: float = 0.99
    """discount"""
    target_update: int = 250
    """training steps between hard copies to the targets, each followed by as many encoder updates"""
    exploration_noise: float = 0.2
    """standard deviation of the Gaussian noise on actions"""
    target_noise: float = 0.2
    """standard deviation of the noise on target actions (TD3)"""
    noise_clip: float = 0.3
    """largest noise on a target action"""
    encoder_lr: float = 1e-4
    """AdamW step size of the encoder"""
    critic_lr: float = 3e-4
    """AdamW step size of the critics"""
    actor_lr: float = 3e-4
    """AdamW step size of the actor"""
    weight_decay: float = 1e-4
    """AdamW weight decay of every module"""
    max_grad_norm: float = 20.0
    """the critics' gradient is clipped to this norm"""

    # Scale and sparse training
    width_scale: float = 1.0
    """factor on every hidden and latent width (paper: up to 5)"""
    depth_scale: int = 1
    """factor on the number of hidden blocks"""
    encoder_type: int = 6
    """1 ReLU, 2 ELU, 3 and 4 with LayerNorm, 5 and 6 with LayerNorm and residual (MR.Q: 4)"""
    critic_type: int = 4
    """block type of the critics (MR.Q: 4)"""
    actor_type: int = 5
    """block type of the actor (MR.Q: 3)"""
    encoder_regime: str = "dense"
    """dense; static: a random sparse topology, kept; rigl: a sparse topology that follows weights and gradients"""
    critic_regime: str = "rigl"
    """as for the encoder (MR.Q: dense)"""
    actor_regime: str = "static"
    """as for the encoder (MR.Q: dense)"""
    encoder_sparsity: float = 0.6
    """share of the encoder's linear weights that is 0, unless dense (paper: 0.6)"""
    critic_sparsity: float = 0.6
    """share of the critics' linear weights that is 0, unless dense (paper: 0.6)"""
    actor_sparsity: float = 0.6
    """share of the actor's linear weights that is 0, unless dense (paper: 0.6)"""
    rigl_interval: int = 1000
    """updates of a module between two changes of its topology (State of Sparse Training in Deep RL)"""
    rigl_drop: float = 0.3
    """share of a layer's connections that is moved at first (RigL); decays to 0 along a cosine"""
    rigl_until: float = 0.75
    """share of the updates after which topologies stay (RigL: 25 000 of 32 000 steps)"""


# --------------------------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """A hidden layer of one of the paper's six types: (batch, inputs) -> (batch, outputs).

    1 ReLU, 2 ELU, 3 ReLU + LayerNorm, 4 ELU + LayerNorm, 5 and 6: 3 and 4 with the input added, past normalisation and
    activation, where the widths agree. LayerNorm has no learned scale or shift, as in MR.Q. With --bf16 the product
    alone is in bfloat16: autocast by itself would also sum the residuals in it, on a CPU.
    """

    def __init__(self, inputs: int, outputs: int, block_type: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs, elementwise_affine=False) if block_type >= 3 else nn.Identity()
        self.activation = nn.ReLU() if block_type % 2 else nn.ELU()
        self.residual = block_type >= 5 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm(self.linear(x).float()))
        return x + y if self.residual else y


def hidden_blocks(inputs: int, width: int, blocks: int, block_type: int) -> list[Block]:
    """`blocks` hidden layers of `width` units."""
    return [Block(inputs if i == 0 else width, width, block_type) for i in range(blocks)]


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights with ReLU gain and zero biases (MR.Q)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, nn.init.calculate_gain("relu"))
            nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """State features z_s, state-action features z_sa, and a linear model of what comes next from z_sa (MR.Q)."""

    def __init__(self, obs_dim: int, act_dim: int, zs: int, za: int, zsa: int, width: int, depth: int, block_type: int):
        super().__init__()
        zs_hidden = hidden_blocks(obs_dim, width, depth * ZS_BLOCKS - 1, block_type)
        self.zs = nn.Sequential(*zs_hidden, Block(width, zs, block_type=4))  # z_s is normalised, whatever the type
        self.za = nn.Sequential(nn.Linear(act_dim, za), nn.ELU())
        self.zsa_mlp = nn.Sequential(
            *hidden_blocks(zs + za, width, depth * ZSA_BLOCKS, block_type), nn.Linear(width, zsa)
        )
        self.model = nn.Linear(zsa, 1 + zs + REWARD_BINS)
        self.sizes = (1, zs, REWARD_BINS)
        # where the rewards' two-hot bins stand: symexp(x) = sign(x) (exp|x| - 1)
        points = torch.linspace(-REWARD_RANGE, REWARD_RANGE, REWARD_BINS)
        self.register_buffer("bins", points.sign() * (points.abs().exp() - 1), persistent=False)
        init_weights(self)

    def zsa(self, zs: Tensor, action: Tensor) -> Tensor:
        """z_s (batch, zs) and actions (batch, act_dim) -> z_sa (batch, zsa)."""
        return self.zsa_mlp(torch.cat([zs, self.za(action)], 1))

    def predict(self, zs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_s and actions -> done (batch, 1), next z_s (batch, zs), logits of the reward's bins (batch, bins)."""
        return self.model(self.zsa(zs, action)).float().split(self.sizes, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Observations (batch, obs_dim) and actions (batch, act_dim) -> z_sa (batch, zsa)."""
        return self.zsa(self.zs(obs), action)


class ValueLayer(nn.Linear):
    """The critics' last layer, float32 also with --bf16: at a value of 100 two bfloat16 numbers are 0.5 apart.

    That is the size of a TD error here, as values count in units of the mean reward.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Critic(nn.Module):
    """Twin values of z_sa: (batch, zsa) -> (batch, 2)."""

    def __init__(self, zsa: int, width: int, blocks: int, block_type: int):
        super().__init__()
        self.twins = nn.ModuleList(
            nn.Sequential(*hidden_blocks(zsa, width, blocks, block_type), ValueLayer(width, 1)) for _ in range(2)
        )
        init_weights(self)

    def forward(self, zsa: Tensor) -> Tensor:
        return torch.cat([twin(zsa) for twin in self.twins], 1)


class Actor(nn.Sequential):
    """Deterministic policy: z_s (batch, zs) -> actions before the tanh (batch, act_dim)."""

    def __init__(self, zs: int, act_dim: int, width: int, blocks: int, block_type: int):
        super().__init__(*hidden_blocks(zs, width, blocks, block_type), nn.Linear(width, act_dim))
        init_weights(self)


def build_networks(args: Args, obs_dim: int, act_dim: int) -> dict[str, nn.Module]:
    """Encoder, critic and actor at the asked width, depth and block types."""
    zs, za, zsa, width = (max(1, round(args.width_scale * n)) for n in (ZS_DIM, ZA_DIM, ZSA_DIM, HIDDEN_DIM))
    depth = args.depth_scale
    return {
        "encoder": Encoder(obs_dim, act_dim, zs, za, zsa, width, depth, args.encoder_type),
        "critic": Critic(zsa, width, depth * CRITIC_BLOCKS, args.critic_type),
        "actor": Actor(zs, act_dim, width, depth * ACTOR_BLOCKS, args.actor_type),
    }


# ----------------------------------------------------------------------------------------- the method: sparse training


def erdos_renyi_counts(shapes: list[tuple[int, int]], sparsity: float) -> list[int]:
    """Active weights of each layer: density proportional to (n_in + n_out) / (n_in n_out), at most 1 (SET, RigL).

    The counts sum to round((1 - sparsity) * all weights), exactly. shapes: (n_out, n_in) of each linear layer.
    """
    sizes = [math.prod(shape) for shape in shapes]
    left = round((1 - sparsity) * sum(sizes))  # connections still to be given out
    dense: set[int] = set()  # layers whose share would exceed their size
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        scale = left / max(1, sum(sum(shapes[i]) for i in sparse))
        full = [i for i in sparse if scale * sum(shapes[i]) >= sizes[i]]
        if not full:
            break
        dense.update(full)
        left -= sum(sizes[i] for i in full)
    counts = [sizes[i] if i in dense else int(scale * sum(shapes[i])) for i in range(len(shapes))]
    # what rounding down left over goes to the largest remainders
    by_remainder = sorted(sparse, key=lambda i: counts[i] - scale * sum(shapes[i]))
    for i in by_remainder[: left - sum(counts[i] for i in sparse)]:
        counts[i] += 1
    return counts


def rigl_fraction(update: int, last_update: int, alpha: float) -> float:
    """Share of a layer's connections to move at `update`: alpha / 2 (1 + cos(pi t / T_end)) (RigL, Eq. 1)."""
    return alpha / 2 * (1 + math.cos(math.pi * update / last_update))


def rigl_topology(weight: Tensor, gradient: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Move `count` connections of a layer (RigL, Algorithm 1, drop and grow). All tensors (n_out, n_in), mask boolean.

    Drops the active weights with the smallest |w|, then grows those with the largest |gradient| among all that were
    not kept: a weight that was just dropped may come back. Returns the masks of what is kept and of what is grown.
    """
    dropped = weight.abs().masked_fill(~mask, math.inf).flatten().topk(count, largest=False).indices
    kept = mask.flatten().index_fill(0, dropped, False)
    chosen = gradient.abs().flatten().masked_fill(kept, -1).topk(count).indices
    grown = torch.zeros_like(kept).index_fill(0, chosen, True)
    return kept.view_as(mask), grown.view_as(mask)


class Topology:
    """Which linear weights of a module exist: all (dense), a random share (static), a share that moves (rigl).

    Biases are always dense, and so is a layer that Erdős-Rényi gives all its weights. An inactive weight is 0 with a
    zero gradient and zero moments. AdamW keeps all of that 0, decay included, so no mask is applied after a step.

    masks, initial: {weight's name: boolean (n_out, n_in)}, empty for a dense module.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, regime: str, sparsity: float):
        self.regime, self.optimizer = regime, optimizer
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}
        self.updates, self.changed = 0, 0.0
        if regime != "dense":
            linear = {f"{n}.weight": m.weight for n, m in module.named_modules() if isinstance(m, nn.Linear)}
            counts = erdos_renyi_counts([tuple(weight.shape) for weight in linear.values()], sparsity)
            for (name, weight), count in zip(linear.items(), counts, strict=True):
                if count < weight.numel():
                    mask = torch.zeros(weight.numel(), dtype=torch.bool)
                    mask[torch.randperm(weight.numel())[:count]] = True
                    self.weights[name], self.masks[name] = weight, mask.view_as(weight).to(weight.device)
                    weight.data.mul_(self.masks[name])
        self.initial = {name: mask.clone() for name, mask in self.masks.items()}

    def before_step(self, interval: int, last_update: int, drop: float) -> None:
        """Between `backward` and the optimizer's step: let RigL read the dense gradients, then mask them.

        Every `interval` updates before `last_update` the topology of a `rigl` module changes; `drop` is the share of a
        layer's connections that would move at update 0 (see `rigl_fraction`).
        """
        self.updates += 1
        if self.regime == "rigl" and self.updates % interval == 0 and self.updates < last_update:
            self._move_connections(rigl_fraction(self.updates, last_update, drop))
        for name, weight in self.weights.items():
            weight.grad.mul_(self.masks[name])

    @torch.no_grad()
    def _move_connections(self, fraction: float) -> None:
        """Drop and grow that share of each layer's connections; grown ones start from 0 with zero moments."""
        new, total = 0, 0
        for name, weight in self.weights.items():
            mask = self.masks[name]
            active = int(mask.sum())
            kept, grown = rigl_topology(weight, weight.grad, mask, int(fraction * active))
            state = self.optimizer.state.get(weight, {})  # empty before the first step
            for tensor in (weight, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)):
                tensor.mul_(kept)
            self.masks[name] = kept | grown
            new, total = new + int((grown & ~mask).sum()), total + active
        self.changed = new / max(1, total)

    def overlap(self) -> float:
        """Share of today's connections that the first topology had, in the layers that have a mask; 1 if none has."""
        shared = sum(int((mask & self.initial[name]).sum()) for name, mask in self.masks.items())
        total = sum(int(mask.sum()) for mask in self.masks.values())
        return shared / total if total else 1.0

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("masks", "initial", "updates", "changed")}

    def load_state_dict(self, state: dict) -> None:
        self.updates, self.changed = state["updates"], state["changed"]
        for name, weight in self.weights.items():
            self.masks[name] = state["masks"][name].to(weight.device)
            self.initial[name] = state["initial"][name].to(weight.device)


# ------------------------------------------------------------------------------------------------------------- MR.Q


class ReplayBuffer:
    """Ring of steps in preallocated tensors, sampled by priority as sub-trajectories of `ENCODER_HORIZON` steps.

    Row i holds a step's observation; the next one is in row i + 1. A row of its own holds the last observation of an
    episode. priority[i] is 0 unless a whole sub-trajectory starts at row i: one that a time limit cuts is never
    sampled, one that a termination cuts is, as the losses mask what follows.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        new = partial(torch.zeros, device=device)  # on a CPU, zeros take no memory before they are written
        self.data = {
            "obs": new(capacity, obs_dim),
            "action": new(capacity, act_dim),
            "reward": new(capacity),
            "not_done": new(capacity),
            "is_step": new(capacity, dtype=torch.bool),
            "priority": new(capacity),
        }
        self.capacity, self.head, self.size = capacity, 0, 0
        self.episode_steps = 0
        self.terminates = False  # whether any step ever terminated
        self.max_priority = torch.full((), MIN_PRIORITY, device=device)

    def add(self, obs: np.ndarray, action: np.ndarray, reward: float, next_obs, terminated: bool, truncated: bool):
        """Append one step, over the oldest one when full. obs, next_obs (obs_dim,), action (act_dim,)."""
        row = self._append(obs)
        self.data["action"][row] = torch.from_numpy(action)
        self.data["reward"][row] = reward
        self.data["not_done"][row] = 1.0 - terminated
        self.data["is_step"][row] = True
        self.episode_steps += 1
        self.terminates |= bool(terminated)  # a numpy flag would make the checkpoint unreadable
        if terminated or truncated:
            last = self._append(next_obs)
            self.data["is_step"][last] = False
            if terminated:
                rows = last - 1 - torch.arange(min(self.episode_steps, ENCODER_HORIZON))
                self.data["priority"][rows % self.capacity] = self.max_priority
            self.episode_steps = 0

    def _append(self, obs: np.ndarray) -> int:
        """Write an observation into the next row; the sub-trajectory that it ends can be sampled from now on."""
        row = self.head
        self.data["obs"][row] = torch.from_numpy(obs)
        self.data["priority"][row] = 0.0
        if self.episode_steps >= ENCODER_HORIZON:
            self.data["priority"][(row - ENCODER_HORIZON) % self.capacity] = self.max_priority
        self.head, self.size = (row + 1) % self.capacity, min(self.size + 1, self.capacity)
        return row

    def sample_rows(self, count: int) -> Tensor:
        """First rows (count,) of sub-trajectories, drawn in proportion to their priority, with replacement.

        At least one priority must be above 0.
        """
        cumulative = self.data["priority"][: self.size].cumsum(0, dtype=torch.float64)
        below_total = torch.nextafter(cumulative[-1], torch.zeros_like(cumulative[-1]))
        draws = torch.rand(count, dtype=torch.float64, device=cumulative.device) * below_total
        # right: a draw of exactly 0 falls on the first row whose priority is not 0
        return torch.searchsorted(cumulative, draws, right=True)

    def sub_trajectories(self, rows: Tensor) -> dict[str, Tensor]:
        """The encoder's batch: H = ENCODER_HORIZON steps from each row.

        obs (batch, H + 1, obs_dim), action (batch, H, act_dim), reward and not_done (batch, H).
        """
        steps = (rows[:, None] + torch.arange(ENCODER_HORIZON + 1, device=rows.device)) % self.capacity
        batch = {name: self.data[name][steps[:, :-1]] for name in ("action", "reward", "not_done")}
        return batch | {"obs": self.data["obs"][steps]}

    def transitions(self, rows: Tensor) -> dict[str, Tensor]:
        """The critic's and actor's batch: n = Q_HORIZON steps as one.

        obs, next_obs (batch, obs_dim), the latter n steps later; action (batch, act_dim); reward, not_done (batch, n).
        """
        steps = (rows[:, None] + torch.arange(Q_HORIZON, device=rows.device)) % self.capacity
        batch = {name: self.data[name][steps] for name in ("reward", "not_done")}
        batch |= {name: self.data[name][rows] for name in ("obs", "action")}
        return batch | {"next_obs": self.data["obs"][(rows + Q_HORIZON) % self.capacity]}

    def update_priority(self, rows: Tensor, priority: Tensor) -> None:
        """Give `rows` their new priorities (batch,); new steps start at the largest one ever given."""
        self.data["priority"][rows] = priority
        self.max_priority = torch.maximum(self.max_priority, priority.max())

    def reward_scale(self) -> Tensor:
        """Mean |r| over the steps in the buffer, 0-d."""
        reward, is_step = self.data["reward"][: self.size], self.data["is_step"][: self.size]
        return ((reward.abs() * is_step).sum() / is_step.sum()).clamp_min(1e-8)

    def recent(self, count: int) -> dict[str, Tensor]:
        """Observations and actions of the steps in the last `count` rows, or all there are."""
        rows = (self.head - 1 - torch.arange(min(count, self.size), device=self.max_priority.device)) % self.capacity
        rows = rows[self.data["is_step"][rows]]
        return {"obs": self.data["obs"][rows], "action": self.data["action"][rows]}

    COUNTERS = ("head", "size", "episode_steps", "terminates", "max_priority")

    def state_dict(self) -> dict:
        full = self.size == self.capacity  # a slice would save its whole storage: clone what is filled
        data = {name: column if full else column[: self.size].clone() for name, column in self.data.items()}
        return {"data": data} | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state_dict(self, state: dict) -> None:
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        self.max_priority = self.max_priority.to(self.data["priority"].device)
        for name, column in state["data"].items():
            self.data[name][: self.size] = column


def two_hot(x: Tensor, bins: Tensor) -> Tensor:
    """Weights on the two neighbouring bins whose mean is x: (...) -> (..., bins); clipped to the range of the bins."""
    x = x.clamp(bins[0], bins[-1])
    lower = (torch.searchsorted(bins, x, right=True) - 1).clamp_max(len(bins) - 2)
    weight = (x - bins[lower]) / (bins[lower + 1] - bins[lower])
    table = torch.zeros(*x.shape, len(bins), device=x.device)
    table.scatter_(-1, lower[..., None], (1 - weight)[..., None])
    return table.scatter_(-1, lower[..., None] + 1, weight[..., None])


def encoder_loss(encoder: Encoder, target: Encoder, batch: dict[str, Tensor], terminates: bool) -> tuple[Tensor, ...]:
    """MR.Q's model loss: from z_s of the first observation, ENCODER_HORIZON latent steps along the taken actions.

    Each step adds (z_s - target z_s of the next observation)^2, the cross-entropy of the reward's two-hot code and,
    once a terminal has been seen, (done - its flag)^2; steps after a termination count 0. batch: what
    `ReplayBuffer.sub_trajectories` gives. Returns the loss and the three parts, 0-d.
    """
    with torch.no_grad():
        next_zs = target.zs(batch["obs"][:, 1:])
    reward_codes = two_hot(batch["reward"], encoder.bins)
    zs = encoder.zs(batch["obs"][:, 0])
    alive = torch.ones_like(batch["not_done"][:, 0])
    dynamics = rewards = dones = torch.zeros((), device=zs.device)
    for step in range(ENCODER_HORIZON):
        done, zs, logits = encoder.predict(zs, batch["action"][:, step])
        dynamics = dynamics + (alive * (zs - next_zs[:, step]).square().mean(1)).mean()
        rewards = rewards + (alive * F.cross_entropy(logits, reward_codes[:, step], reduction="none")).mean()
        if terminates:
            dones = dones + (alive * (done[:, 0] - 1 + batch["not_done"][:, step]).square()).mean()
        alive = alive * batch["not_done"][:, step]
    loss = dynamics + REWARD_WEIGHT * rewards + DONE_WEIGHT * dones
    return loss, dynamics.detach(), rewards.detach(), dones.detach()


def multi_step_return(reward: Tensor, not_done: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Sum_t gamma^t r_t prod_{s<t} not_done_s, and whether no step terminated: (batch, n) -> (batch, 1) each."""
    alive = torch.ones_like(reward[:, 0])
    total = torch.zeros_like(alive)
    for step in range(reward.shape[1]):
        total = total + gamma**step * reward[:, step] * alive
        alive = alive * not_done[:, step]
    return total[:, None], alive[:, None]


@torch.no_grad()
def td_target(
    targets: dict[str, nn.Module],
    batch: dict[str, Tensor],
    gamma: float,
    noise_std: float,
    noise_clip: float,
    scale: Tensor,
    old_scale: Tensor,
) -> Tensor:
    """MR.Q's regression target of the critics (batch, 1), in units of the reward scale.

    y = (n-step return + gamma^n not_done min Q'(s', pi'(s') + clipped noise) * old scale) / scale.
    batch: what `ReplayBuffer.transitions` gives; scale, old_scale: mean |r|, 0-d, in whose units the critics are
    trained now and their targets were.
    """
    reward, not_done = multi_step_return(batch["reward"], batch["not_done"], gamma)
    next_zs = targets["encoder"].zs(batch["next_obs"])
    action_noise = (torch.randn_like(batch["action"]) * noise_std).clamp(-noise_clip, noise_clip)
    next_action = (torch.tanh(targets["actor"](next_zs)) + action_noise).clamp(-1, 1)
    next_q = targets["critic"](targets["encoder"].zsa(next_zs, next_action)).amin(1, keepdim=True)
    return (reward + not_done * gamma**Q_HORIZON * next_q * old_scale) / scale


def critic_loss(critic: Critic, zsa: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Huber loss of both critics against (batch, 1) targets; the mean of Q; the larger |TD error| (batch,)."""
    q = critic(zsa)
    loss = F.smooth_l1_loss(q, target.expand(-1, 2))
    return loss, q.detach().mean(), (q.detach() - target).abs().amax(1)


def actor_loss(actor: Actor, encoder: Encoder, critic: Critic, zs: Tensor) -> Tensor:
    """-mean Q(s, pi(s)) over both critics, and a little weight on the squared actions before the tanh."""
    pre_activation = actor(zs).float()
    q = critic(encoder.zsa(zs, torch.tanh(pre_activation)))
    return -q.mean() + PRE_ACTIVATION_WEIGHT * pre_activation.square().mean()


@torch.no_grad()
def act(networks: dict[str, nn.Module], device: torch.device, obs: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """One observation (obs_dim,) -> one action (act_dim,) in [-1, 1], with Gaussian noise if `noise` is not 0."""
    zs = networks["encoder"].zs(torch.from_numpy(obs).to(device)[None])
    action = torch.tanh(networks["actor"](zs))[0]
    if noise:
        action = (action + noise * torch.randn_like(action)).clamp(-1, 1)
    return action.cpu().numpy()


class Agent:
    """MR.Q with a topology for each of its modules."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.act_dim, self.device = args, act_dim, device
        self.networks = {name: module.to(device) for name, module in build_networks(args, obs_dim, act_dim).items()}
        self.optimizers, self.topologies = {}, {}
        for name, module in self.networks.items():
            rates = {"lr": getattr(args, f"{name}_lr"), "weight_decay": args.weight_decay}
            self.optimizers[name] = torch.optim.AdamW(module.parameters(), **rates, fused=True)
            regime, sparsity = getattr(args, f"{name}_regime"), getattr(args, f"{name}_sparsity")
            self.topologies[name] = Topology(module, self.optimizers[name], regime, sparsity)
        self.targets = copy.deepcopy(self.networks)
        for target in self.targets.values():
            target.requires_grad_(False)
        self.replay = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
        self.updates = 0
        self.last_topology_update = int(args.rigl_until * (args.total_steps - args.learning_starts))
        self.scales = (torch.ones((), device=device), torch.zeros((), device=device))  # mean |r| now, of the targets
        self.losses: dict[str, Tensor] = {}
        self.grad_norms: dict[str, Tensor] = {}  # of encoder and critic, masked and not yet clipped
        functions = (encoder_loss, critic_loss, actor_loss, td_target)
        compiled = map(torch.compile, functions) if args.compile else functions
        self.encoder_loss, self.critic_loss, self.actor_loss, self.td_target = compiled

    # ------------------------------------------------------------------------------------------------------ acting

    def act(self, obs: np.ndarray, explore: bool = False) -> np.ndarray:
        """One observation (obs_dim,) -> one action (act_dim,) in [-1, 1]."""
        return act(self.networks, self.device, obs, self.args.exploration_noise if explore else 0.0)

    def random_action(self) -> np.ndarray:
        """Uniform in [-1, 1], from PyTorch's generator, which is in the checkpoint."""
        return (2 * torch.rand(self.act_dim) - 1).numpy()

    # ---------------------------------------------------------------------------------------------------- training

    def update(self) -> None:
        """One training step of MR.Q; its losses are in `self.losses`. Only a topology change waits for the device."""
        args = self.args
        if self.updates % args.target_update == 0:
            self.copy_targets()
            # priorities do not change in between, so all of these batches are drawn at once
            for rows in self.replay.sample_rows(args.target_update * args.batch_size).split(args.batch_size):
                self.update_encoder(rows)
            self.grad_norms["encoder"] = metrics.grad_norm(self.networks["encoder"])
        self.updates += 1
        self.update_critic_and_actor(self.replay.sample_rows(args.batch_size))

    def copy_targets(self) -> None:
        """Targets become what the networks are now, and the reward scale is measured again."""
        for name, target in self.targets.items():
            target.load_state_dict(self.networks[name].state_dict())
        self.scales = (self.replay.reward_scale(), self.scales[0])

    def update_encoder(self, rows: Tensor) -> None:
        """One step of the encoder on the sub-trajectories from `rows` (batch,)."""
        batch = self.replay.sub_trajectories(rows)
        with self._autocast():
            encoders = self.networks["encoder"], self.targets["encoder"]
            loss, dynamics, reward, done = self.encoder_loss(*encoders, batch, self.replay.terminates)
        self._step("encoder", loss)
        self.losses |= {"encoder": loss.detach(), "dynamics": dynamics, "reward": reward, "done": done}

    def update_critic_and_actor(self, rows: Tensor) -> None:
        """One step of the critics, then one of the actor, on the transitions from `rows`; new priorities for them."""
        args = self.args
        encoder, critic, actor = self.networks.values()
        batch = self.replay.transitions(rows)
        with self._autocast(), torch.no_grad():
            noise = args.target_noise, args.noise_clip
            target = self.td_target(self.targets, batch, args.gamma, *noise, *self.scales)
            zs = encoder.zs(batch["obs"])
            zsa = encoder.zsa(zs, batch["action"])
        with self._autocast():
            loss, q_mean, td_error = self.critic_loss(critic, zsa, target)
        self._step("critic", loss, args.max_grad_norm)
        self.replay.update_priority(rows, td_error.clamp_min(MIN_PRIORITY).pow(PRIORITY_EXPONENT))
        with self._autocast():
            policy_loss = self.actor_loss(actor, encoder, critic, zs)
        self._step("actor", policy_loss)
        self.losses |= {"critic": loss.detach(), "q": q_mean, "actor": policy_loss.detach()}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _step(self, name: str, loss: Tensor, max_grad_norm: float = math.inf) -> None:
        """Gradients of one module only, then its topology, then the norm's clip, then AdamW."""
        args, optimizer = self.args, self.optimizers[name]
        parameters = optimizer.param_groups[0]["params"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        self.topologies[name].before_step(args.rigl_interval, self.last_topology_update, args.rigl_drop)
        if max_grad_norm < math.inf:
            self.grad_norms[name] = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()

    # ----------------------------------------------------------------------------------------------------- metrics

    @torch.no_grad()
    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of every module on recent steps, by TensorBoard name."""
        encoder = self.networks["encoder"]
        # the rank of features is at most the number of rows: more of them for wider layers
        batch = self.replay.recent(round(METRIC_BATCH * max(1, self.args.width_scale)))
        obs, action = batch["obs"], batch["action"]
        inputs = {"encoder": (obs, action), "critic": encoder(obs, action), "actor": encoder.zs(obs)}
        scalars = {}
        for name, module in self.networks.items():
            last = metrics.hidden_features(module, inputs[name], (Block,))[-1]  # with what a residual adds
            units = metrics.hidden_features(module, inputs[name])
            values = {
                "dormant_ratio": metrics.dormant_ratio(units, DORMANT_TAU),
                "active_fraction": metrics.active_fraction(units),
                "srank": metrics.srank(last),
                "stable_rank": metrics.stable_rank(last),
                "effective_rank": metrics.effective_rank(last),
                "weight_norm": metrics.weight_norm(module),
            }
            scalars |= {f"plasticity/{name}/{metric}": value for metric, value in values.items()}
            del units  # of a wide network it is the largest thing in memory
        return scalars

    def gradient_scalars(self) -> dict[str, Tensor]:
        """Norms of the latest gradients, masked and not yet clipped, by TensorBoard name."""
        norms = self.grad_norms | {"actor": metrics.grad_norm(self.networks["actor"])}
        return {f"plasticity/{name}/grad_norm": norm for name, norm in norms.items()}

    def sparsity(self) -> dict[str, float]:
        """For each module that is not dense: its density, what its last change moved, what is left of the start."""
        counts, scalars = self.parameter_counts(), {}
        for name, topology in self.topologies.items():
            if topology.regime != "dense":
                scalars[f"sparsity/{name}/density"] = counts[f"{name}_active"] / counts[name]
                scalars[f"sparsity/{name}/changed"] = topology.changed
                scalars[f"sparsity/{name}/overlap_with_initial"] = topology.overlap()
        return scalars

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each module, and how many of them are active."""
        counts = {}
        for name, module in self.networks.items():
            masks = self.topologies[name].masks.values()
            counts[name] = sum(p.numel() for p in module.parameters())
            counts[f"{name}_active"] = counts[name] - sum(int((~mask).sum()) for mask in masks)
        return counts

    # ------------------------------------------------------------------------------------------------- checkpoints

    STATEFUL = ("networks", "targets", "optimizers", "topologies")

    def named_weights(self) -> list[tuple[str, Tensor]]:
        """Everything that is learned, by name."""
        return [(f"{net}.{name}", p) for net, module in self.networks.items() for name, p in module.named_parameters()]

    def state_dict(self) -> dict:
        state = {group: {n: part.state_dict() for n, part in getattr(self, group).items()} for group in self.STATEFUL}
        state |= {"replay": self.replay.state_dict(), "updates": self.updates}
        return state | {"scales": list(self.scales), "losses": self.losses, "grad_norms": self.grad_norms}

    def load_state_dict(self, state: dict) -> None:
        for group in self.STATEFUL:
            for name, part in getattr(self, group).items():
                part.load_state_dict(state[group][name])
        self.replay.load_state_dict(state["replay"])
        self.updates, self.losses, self.grad_norms = (state[name] for name in ("updates", "losses", "grad_norms"))
        self.scales = tuple(scale.to(self.device) for scale in state["scales"])


# ------------------------------------------------------------------------------------------------------ the run


def check_args(args: Args) -> None:
    """Refuse impossible arguments before anything is built. Raises ArgumentError: argument, value, what is allowed."""
    regimes, types = ("dense", "static", "rigl"), tuple(range(1, 7))
    choices = {"device": ("auto", "cpu", "cuda"), "preset": tuple(name.split()[1] for name in PRESETS)}
    for module in ("encoder", "critic", "actor"):
        choices |= {f"{module}_type": types, f"{module}_regime": regimes}
        sparsity = f"{module}_sparsity"
        require(args, sparsity, 0 <= getattr(args, sparsity) < 1, "at least 0 and below 1")
    for name, values in choices.items():
        require(args, name, getattr(args, name) in values, "one of " + ", ".join(map(str, values)))
    for name in ("total_steps", "eval_every", "eval_episodes", "episodes", "batch_size", "target_update"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("action_repeat", "depth_scale", "rigl_interval", "torch_threads"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("buffer_size", "learning_starts"):
        require(args, name, getattr(args, name) > 2 * ENCODER_HORIZON, f"above {2 * ENCODER_HORIZON}")
    require(args, "checkpoint_every", args.checkpoint_every >= 0, "at least 0")
    require(args, "seed", 0 <= args.seed < 2**32, "at least 0 and below 2**32")
    require(args, "capture_video", can_draw() or not args.capture_video, "off: no EGL library is here to draw with")
    for name in ("encoder_lr", "critic_lr", "actor_lr", "max_grad_norm", "width_scale"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a positive number")
    for name in ("exploration_noise", "target_noise", "noise_clip", "weight_decay"):
        require(args, name, 0 <= getattr(args, name) < math.inf, "a number of at least 0")
    for name in ("gamma", "rigl_drop", "rigl_until"):
        require(args, name, 0 <= getattr(args, name) <= 1, "between 0 and 1")
    below = f"below --total-steps {args.total_steps}"
    require(args, "learning_starts", args.learning_starts < args.total_steps, below)


def fill_in(args: Args) -> Args:
    """Put the environment's defaults where the user gave none: what is stored is what was run."""
    dm_control = args.env_id.startswith("dmc/")
    total_steps = args.total_steps if args.total_steps is not None else (500_000 if dm_control else 1_000_000)
    action_repeat = args.action_repeat if args.action_repeat is not None else (2 if dm_control else 1)
    return dataclasses.replace(args, total_steps=total_steps, action_repeat=action_repeat)


def build_env(args: Args, stream: int, video: Path | None = None):
    """The environment for training or evaluation, seeded apart. Raises ArgumentError for one that there is not."""
    seed = int(np.random.SeedSequence((args.seed, stream)).generate_state(1)[0])
    render_mode = "rgb_array" if video else None
    try:
        env = make_env(args.env_id, seed=seed, action_repeat=args.action_repeat, render_mode=render_mode)
    except ValueError as error:
        raise ArgumentError(f"--env-id {args.env_id}: {error}") from None
    return record_video(env, video) if video else env


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU that does not is many times slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def evaluate_run(args: Args) -> dict:
    """`--evaluate RUN_DIR`: evaluate the policy of a run's latest checkpoint, print the table, return the result."""
    stored = Args(**stored_args(args.evaluate, Args))
    device = select_device(args.device)
    weights = load_checkpoint(args.evaluate, "mst_rigl")["agent"]["networks"]
    video = Path(args.evaluate) / "videos" / "evaluate" if args.capture_video else None
    with closing(build_env(stored, EVAL_EPISODES, video)) as env:
        networks = build_networks(stored, env.observation_space.shape[0], env.action_space.shape[0])
        for name, module in networks.items():
            module.to(device).load_state_dict(weights[name])
        policy = partial(act, networks, device)
        result = metrics.evaluate(policy, env, args.episodes, (stored.seed, EVAL_EPISODES))
    if not args.quiet:
        print(f"{'task':<34}{'return':>12}{'length':>10}")
        print(f"{stored.env_id:<34}{result['episode_return']:>12.1f}{result['length']:>10.1f}")
    return result


def main(args: Args) -> dict:
    """Train on one task; returns what results.json holds, or with --evaluate what `metrics.evaluate` returns.

    Raises ArgumentError, NotFiniteError, Interrupted.
    """
    args = fill_in(args)
    check_args(args)
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)  # a product with denormal weights can be a hundred times slower
    if args.evaluate:
        return evaluate_run(args)
    if args.resume:
        finished = finished_results(args)
        if finished is not None:
            return finished
    checkpoint = load_checkpoint(args.resume, "mst_rigl") if args.resume else None
    device = select_device(args.device)

    torch.manual_seed(args.seed)
    env = build_env(args, TRAIN_EPISODES)
    agent = Agent(args, env.observation_space.shape[0], env.action_space.shape[0], device)
    run_name = f"mst_rigl__{args.env_id.replace('/', '-')}__{args.seed}"
    recorder = Recorder(args, "mst_rigl", run_name, [args.env_id], args.total_steps, checkpoint)
    at = {"step": 0, "next_eval": min(args.eval_every, args.total_steps), "env": get_rng_state(env)}
    if checkpoint:
        agent.load_state_dict(checkpoint.pop("agent"))  # pop: the buffer's second copy is not kept
        at |= checkpoint["at"]
        set_random_state(checkpoint["random"], device)
        set_rng_state(env, at["env"])

    def save() -> None:
        """Checkpoint; only at an episode's end, where an environment's future is its random state."""
        recorder.require_finite_weights(agent.named_weights(), at["step"])
        recorder.save(at["step"], {"agent": agent.state_dict(), "random": random_state(device), "at": at})

    def evaluate() -> bool:
        """Evaluate the policy; False if a signal came in between: then nothing is recorded."""
        recorder.require_finite_weights(agent.named_weights(), at["step"])
        video = recorder.run_dir / "videos" / f"step-{at['step']}" if args.capture_video else None
        with closing(build_env(args, EVAL_EPISODES, video)) as eval_env:
            seed = (args.seed, EVAL_EPISODES)
            result = metrics.evaluate(agent.act, eval_env, args.eval_episodes, seed, lambda: recorder.stopped)
        if result is None:
            return False
        recorder.evaluation(at["step"], 0, 0, args.eval_episodes, result)
        recorder.log(at["step"], agent.plasticity() | agent.sparsity())
        recorder.say(f"step {at['step']}: return {result['episode_return']:.1f}")
        return True

    counts = agent.parameter_counts()
    for name in agent.networks:
        regime, block_type = getattr(args, f"{name}_regime"), getattr(args, f"{name}_type")
        size = f"{counts[name]:,} parameters, {counts[f'{name}_active']:,} active"
        recorder.say(f"{name}: {size} ({regime}, block type {block_type})")
        if regime == "rigl" and args.rigl_interval >= agent.last_topology_update:
            never = f"the {name}'s topology never changes: --rigl-interval {args.rigl_interval}"
            recorder.say(f"warning: {never} is not below {agent.last_topology_update}, its last update")
    if args.bf16 and not has_bf16(device):
        has_none = f"this {device.type} device has no bfloat16 products (a CPU needs AVX-512 BF16 or AMX)"
        recorder.say(f"warning: --bf16: {has_none}: expect a slow run")
    if checkpoint is None:
        save()

    save_every = args.checkpoint_every or math.inf
    next_save = at["step"] + save_every
    first_step, clock = at["step"], time.monotonic()
    while True:  # once per episode
        at["env"] = get_rng_state(env)
        ended = at["step"] == args.total_steps
        if at["step"] >= at["next_eval"] and evaluate():
            next_eval = (at["step"] // args.eval_every + 1) * args.eval_every
            at["next_eval"] = math.inf if ended else min(next_eval, args.total_steps)
        if recorder.stopped:
            save()
            recorder.leave()
        if ended:
            break
        if at["step"] >= next_save:
            next_save = at["step"] + save_every
            save()

        obs, _ = env.reset()
        done, episode_return = False, 0.0
        while not done and at["step"] < args.total_steps:
            action = agent.random_action() if at["step"] < args.learning_starts else agent.act(obs, explore=True)
            recorder.require_finite("action", action, at["step"])
            next_obs, reward, terminated, truncated, _ = env.step(action)
            agent.replay.add(obs, action, reward, next_obs, terminated, truncated)
            obs, episode_return, done = next_obs, episode_return + reward, terminated or truncated
            at["step"] += 1
            if at["step"] <= args.learning_starts:
                continue
            if agent.updates == 0 and not agent.replay.data["priority"].any():
                recorder.close()
                given = f"--env-id {args.env_id} --action-repeat {args.action_repeat}"
                raise ArgumentError(f"{given}: no episode is as long as {ENCODER_HORIZON} agent steps")
            agent.update()
            if at["step"] % LOG_EVERY == 0:
                for name, value in agent.losses.items():
                    recorder.require_finite(f"losses/{name}", value, at["step"])
                recorder.log(at["step"], {f"losses/{name}": value for name, value in agent.losses.items()})
                recorder.log(at["step"], agent.gradient_scalars())
                speed = (at["step"] - first_step) / (time.monotonic() - clock)
                recorder.log(at["step"], {"charts/SPS": speed, "charts/reward_scale": agent.scales[0]})
        if done:
            recorder.log(at["step"], {"charts/episodic_return": episode_return})
        recorder.progress(at["step"], ret=f"{episode_return:.0f}")

    env.close()
    save()
    returns = [row["episode_return"] for row in recorder.rows]
    report = {"final_return": returns[-1], "mean_return": float(np.mean(returns))} | agent.sparsity()
    report |= {name: float(value) for name, value in agent.plasticity().items()}
    return recorder.finish(at["step"], report, counts)


if __name__ == "__main__":
    run(main, Args, PRESETS)
