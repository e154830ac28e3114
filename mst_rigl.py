"""MST: module-specific sparse training (dense, static, RigL) on MR.Q.

Paper: Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning, arXiv 2510.12096. Base
algorithm: MR.Q, Towards General-Purpose Model-Free RL, arXiv 2501.16142. Environments: dm_control and Gymnasium MuJoCo.

MR.Q learns an encoder by predicting dynamics, reward and termination, and trains a deterministic actor and twin critics
on its features. MST trains each of the three modules as suits it when networks grow. The encoder is dense. In the
critics 40 % of the weights exist; at intervals RigL drops the smallest of them and grows as many where the gradient is
largest, so that the critics keep learning from moving targets. In the actor a random 40 % exist and never change.
Encoder and actor have residual blocks where widths agree.

Read first: `Topology` and `rigl_topology` (which weights exist), `Block` (the six block types), `encoder_loss` and
`td_target` (MR.Q), `Agent.update`, then `main`.

Copy: `erdos_renyi_counts`, `rigl_fraction`, `rigl_topology` and `Topology` (80 lines;
tests/transplants/rigl_sac.py and tests/transplants/rigl_td3.py do it).

    python mst_rigl.py --quick                               # a small MST on a small task: two minutes on a CPU
    python mst_rigl.py --env-id dmc/dog-run                  # the paper's MST
    python mst_rigl.py --env-id dmc/dog-run --preset mrq     # MR.Q itself: every module dense

Where this script differs from the authors' code of MR.Q (1 to 6) and from Google's of RigL (7, 8), and why:

1. The 3-step return counts a terminal reward and nothing after it. The authors leave out the terminal reward and count
   those after it, which belong to the next episode. Equal where nothing terminates, as in nearly all of dm_control.
2. The last sub-trajectory of a truncated episode, which ends with its last observation, is sampled too.
3. The reward scale and the 10 000 random steps count steps only. The authors also count the slots between episodes.
4. A step gets the largest priority when it can first be sampled, five steps later. The authors give it at once.
5. For a terminating step the next features are those of the episode's last observation. The authors read them from a
   slot that was not written for it, and mostly find the first observation of the run.
6. Rewards beyond the outermost two-hot bins are clipped here; they stop the authors' run. Priorities start from 0, the
   authors' from memory that nobody wrote.
7. A connection that is dropped and grown again in one change starts from 0, as the paper says of grown ones. In
   Google's code it keeps its weight.
8. An update that changes a topology makes a gradient step too. In RigL's Algorithm 1 it makes none.

The MST paper's code is not public. Chosen here: what block types 1 to 3 are; Erdős-Rényi densities for each module;
changes every 1000 updates, as The State of Sparse Training in Deep RL has for SAC, of 0.3 of a layer at first, none
after 75 % of the updates, as it has for PPO; width 5 and depth 4 for the largest network. More, and what was measured:
tests/benchmarks/results/mst_rigl.md.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from common import cli, metrics
from common.capture import Captured, CapturedPolicy, keep, with_gradients
from common.cli import Device, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, require
from common.envs import canonical, env_options, env_sizes, make_env, seed_of
from common.recorder import Recorder, evaluate_stored, recorded, restored

# MR.Q's constants (authors' code)
ENCODER_HORIZON, Q_HORIZON = 5, 3  # steps of the latent unroll and of the return
ZS_DIM, ZA_DIM, ZSA_DIM, HIDDEN_DIM = 512, 256, 512, 512
ZS_BLOCKS, ZSA_BLOCKS, CRITIC_BLOCKS, ACTOR_BLOCKS = 3, 2, 3, 2  # at --depth-scale 1; the last of ZS_BLOCKS gives z_s
REWARD_BINS, REWARD_RANGE = 65, 10.0  # two-hot bins at symexp of 65 points in [-10, 10]
REWARD_WEIGHT, DONE_WEIGHT = 0.1, 0.1  # in the encoder's loss, where the dynamics have weight 1
PRIORITY_EXPONENT, MIN_PRIORITY = 0.4, 1.0
PRE_ACTIVATION_WEIGHT = 1e-5

PRIORITY_BLOCK = 250  # rows whose priorities are summed first, see `sample_rows`
LOG_EVERY = 1000  # updates between two points of the loss curves
METRIC_BATCH = 1000  # recent rows of the replay buffer on which plasticity is measured, at width 1
TRAIN_STARTS, EVAL_STARTS = 1, 2  # streams of random numbers, see `seed_of`

MRQ = {"encoder_type": 4, "critic_type": 4, "actor_type": 3, "critic_regime": "dense", "actor_regime": "dense"}
QUICK = {"env_id": "InvertedPendulum-v5", "total_steps": 4000, "learning_starts": 500, "eval_every": 500}
QUICK |= {"eval_episodes": 5, "buffer_size": 10_000, "batch_size": 64, "gamma": 0.98, "target_update_every": 50}
QUICK |= {"encoder_lr": 1e-3, "critic_lr": 1e-3, "width_scale": 1 / 8, "rigl_every": 100}
PRESETS = {"quick": QUICK, "preset mrq": MRQ, "preset mst-362m": {"width_scale": 5.0, "depth_scale": 4}}

BlockType = Literal[1, 2, 3, 4, 5, 6]
Regime = Literal["dense", "static", "rigl"]
Sparsity = Annotated[float, Ge(0), Lt(1)]


@dataclass
class Args:
    env_id: str = "dmc/dog-run"  # dmc/<domain>-<task>, or a Gymnasium or Meta-World id with continuous actions
    # agent steps; default 500 000 in dm_control (1 M frames), else 1 M (MR.Q)
    total_steps: Annotated[PositiveInt | None, tyro.conf.arg(aliases=("--total-timesteps",))] = None
    seed: Seed = 1  # seed of everything random
    preset: Literal["mst", "mrq", "mst-362m"] = "mst"  # mrq: all dense, MR.Q's blocks; mst-362m: width 5, depth 4
    quick: bool = False  # a small network on a small task: minutes on a laptop
    resume: str | None = None  # continue the run in this folder with its arguments
    evaluate: str | None = None  # evaluate the run in this folder, print the table, exit
    episodes: PositiveInt = 10  # episodes of --evaluate
    run_dir: str | None = None  # folder of the run; by default a new one under runs/
    device: Device = "auto"  # auto: cuda if there is one; --evaluate plays on the CPU
    torch_threads: PositiveInt = 1  # CPU threads of PyTorch; 1 is fastest where several seeds run side by side
    cuda_graph: bool = True  # on CUDA: updates and acting as CUDA graphs
    compile: bool = False  # torch.compile losses with their gradients, and the critics' targets: minutes at the start
    bf16: bool = False  # products of the updates in bfloat16 (autocast); not bit-comparable with float32
    checkpoint_every: NonNegativeInt = 50_000  # agent steps between checkpoints; 0: start, end and signals only
    quiet: bool = False  # print nothing
    track: bool = False  # mirror TensorBoard to Weights & Biases
    wandb_project: str = "cleanplasticity"  # project of --track
    capture_video: bool = False  # record the first episode of every evaluation

    # --- Environment and evaluation ---

    action_repeat: PositiveInt | None = None  # environment steps per agent step; default 2 in dm_control, else 1 (MR.Q)
    env_kwargs: str = ""  # JSON, further arguments of a Gymnasium environment's constructor: '{"xml_file": "my.xml"}'
    max_episode_steps: PositiveInt | None = None  # environment steps; default its own limit, 10 000 without one
    eval_every: PositiveInt = 5000  # agent steps between evaluations; the end of the run is always evaluated
    eval_episodes: PositiveInt = 10  # deterministic episodes per evaluation

    # --- MR.Q ---

    buffer_size: Annotated[int, Gt(10)] = 1_000_000  # replay capacity, steps; each episode's end takes one
    batch_size: PositiveInt = 256  # sub-trajectories per update; one update of critics and actor per agent step
    learning_starts: Annotated[int, Gt(10)] = 10_000  # uniformly random steps before the first update
    gamma: Fraction = 0.99  # discount
    target_update_every: PositiveInt = 250  # updates between copies to the targets; then as many encoder updates
    exploration_noise: NonNegativeFloat = 0.2  # standard deviation of the Gaussian noise on actions
    target_noise: NonNegativeFloat = 0.2  # standard deviation of the noise on target actions (TD3)
    noise_clip: NonNegativeFloat = 0.3  # largest noise on a target action
    encoder_lr: PositiveFloat = 1e-4  # AdamW step size of the encoder
    critic_lr: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--q-lr",))] = 3e-4  # AdamW step size of the critics
    actor_lr: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--policy-lr",))] = 3e-4  # AdamW step size of the actor
    weight_decay: NonNegativeFloat = 1e-4  # AdamW weight decay of every module
    max_grad_norm: PositiveFloat = 20.0  # the critics' gradient is clipped to this norm

    # --- Scale and sparse training (MST) ---

    width_scale: PositiveFloat = 1.0  # factor on every hidden and latent width (paper: up to 5)
    depth_scale: cli.Depth = 1  # factor on the number of hidden blocks
    encoder_type: BlockType = 6  # 1 ReLU, 2 ELU; 3, 4 with LayerNorm; 5, 6 with LayerNorm and residual (MR.Q: 4)
    critic_type: BlockType = 4  # block type of the critics (MR.Q: 4)
    actor_type: BlockType = 5  # block type of the actor (MR.Q: 3)
    encoder_regime: Regime = "dense"  # static: a random sparse topology, kept; rigl: one that follows the gradients
    critic_regime: Regime = "rigl"  # as for the encoder (MR.Q: dense)
    actor_regime: Regime = "static"  # as for the encoder (MR.Q: dense)
    encoder_sparsity: Sparsity = 0.6  # share of the encoder's linear weights that is 0, unless dense (paper: 0.6)
    critic_sparsity: Sparsity = 0.6  # share of the critics' linear weights that is 0, unless dense (paper: 0.6)
    actor_sparsity: Sparsity = 0.6  # share of the actor's linear weights that is 0, unless dense (paper: 0.6)
    rigl_every: PositiveInt = 1000  # updates between changes of a topology (State of Sparse Training, SAC)
    rigl_drop: Fraction = 0.3  # share of a layer dropped at first, falls along a cosine (State of Sparse Training, PPO)
    rigl_until: Fraction = 0.75  # share of the updates after which topologies stay (as rigl_drop; RigL: 78 %)


# ----------------------------------------------------------------------------------------- the method: sparse training


def erdos_renyi_counts(shapes: list[tuple[int, ...]], sparsity: float) -> list[int]:
    """Connections of each layer: density proportional to sum(shape) / prod(shape), at most 1 (SET; RigL's ERK).

    They sum to round((1 - sparsity) * all weights), exactly. shapes: (n_out, n_in), of a convolution with its kernel.
    """
    sizes, sums = [math.prod(shape) for shape in shapes], [sum(shape) for shape in shapes]
    total = left = round((1 - sparsity) * sum(sizes))
    sums_left = sum(sums)
    for size, shape_sum in sorted(zip(sizes, sums, strict=True), key=lambda layer: layer[0] / layer[1]):
        scale = left / sums_left
        if scale * shape_sum < size:
            break
        left, sums_left = left - size, sums_left - shape_sum  # this layer is dense: the others share what is left
    shares = [min(size, scale * shape_sum) for size, shape_sum in zip(sizes, sums, strict=True)]
    counts = [int(share) for share in shares]
    for i in sorted(range(len(shapes)), key=lambda i: counts[i] - shares[i])[: total - sum(counts)]:
        counts[i] += 1  # what rounding down left over goes to the largest remainders
    return counts


def rigl_fraction(update: int, until: float, drop: float) -> float:
    """Share of a layer's connections to drop and to grow at `update`: drop / 2 (1 + cos(pi update / until)) (RigL)."""
    return drop / 2 * (1 + math.cos(math.pi * update / until))


def rigl_topology(weight: Tensor, gradient: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Masks of what is kept and of what is grown when `count` connections of a layer move (RigL, Algorithm 1).

    Drops the active weights with the smallest |w|, then grows those with the largest |gradient| among all that were
    not kept: a weight that was just dropped may come back. All tensors have the weight's shape; `mask` is boolean.
    """
    dropped = weight.abs().masked_fill(~mask, math.inf).flatten().topk(count, largest=False).indices
    kept = mask.flatten().index_fill(0, dropped, False)
    chosen = gradient.abs().flatten().masked_fill(kept, -1).topk(count).indices
    grown = torch.zeros_like(kept).index_fill(0, chosen, True)
    return kept.view_as(mask), grown.view_as(mask)


class Topology:
    """Which weights of `layers` exist: all (dense), a random share (static), a share that moves (rigl).

    A weight that does not exist is 0, its gradient and moments too: Adam, AdamW and a target's averaging keep it so.
    Biases are dense. masks: {place in `layers`: boolean, the weight's shape}, without the layers that stay dense.
    layers: anything with a `weight`; targets: the same of target networks that follow slowly. until: the update from
    which nothing moves; every: updates between two moves; drop: share dropped at first; changed: share that the last
    one moved.
    """

    STATE = ("masks", "initial", "updates", "changed")  # a resume makes this, loads the weights, assigns these

    def __init__(self, layers, optimizer, regime, sparsity, until, every=1000, drop=0.3, targets=()):
        self.optimizer, self.regime, self.until, self.every, self.drop = optimizer, regime, until, every, drop
        self.weights = [layer.weight for layer in layers]
        self.targets = [layer.weight for layer in targets] or self.weights
        self.masks, self.updates, self.changed = {}, 0, 0.0
        counts = erdos_renyi_counts([tuple(w.shape) for w in self.weights], 0.0 if regime == "dense" else sparsity)
        for i, (weight, count) in enumerate(zip(self.weights, counts, strict=True)):
            if count < weight.numel():
                self.masks[i] = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
                self.masks[i].view(-1)[torch.randperm(weight.numel())[:count]] = True
                self._clear(i, self.masks[i])
        self.initial = {i: mask.clone() for i, mask in self.masks.items()}

    @property
    def due(self) -> bool:
        """Whether connections move in the present update."""
        return self.regime == "rigl" and (self.updates + 1) % self.every == 0 and self.updates + 1 < self.until

    @torch.no_grad()
    def before_step(self) -> None:
        """Between `backward` and the clip of the gradient's norm: RigL reads the dense gradient, then it is masked."""
        due, self.updates = self.due, self.updates + 1
        if due:
            self._move_connections(rigl_fraction(self.updates, self.until, self.drop))
        for i, mask in self.masks.items():
            self.weights[i].grad.mul_(mask)

    def _move_connections(self, fraction: float) -> None:
        """Drop and grow that share of each layer's connections; grown ones start from 0 with zero moments."""
        moved = total = 0
        for i, mask in self.masks.items():
            weight, count = self.weights[i], int(mask.sum())
            kept, grown = rigl_topology(weight, weight.grad, mask, int(fraction * count))
            moved, total = moved + int((grown & ~mask).sum()), total + count
            self._clear(i, kept)  # so what grows starts from 0, also where it was just dropped
            mask.copy_(kept | grown)
        self.changed = moved / max(1, total)

    def _clear(self, i: int, kept: Tensor) -> None:
        """What is not kept becomes 0, in a layer's weight, its target and the optimizer's moments."""
        weight = self.weights[i]
        state = self.optimizer.state.get(weight, {}).values()  # empty before the first step
        moments = (value for value in state if getattr(value, "shape", None) == weight.shape)
        for tensor in (weight, self.targets[i], *moments):
            tensor.data.mul_(kept)


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


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """All linear layers of a network, in the order in which it was built."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights with ReLU gain and zero biases (MR.Q)."""
    for layer in linear_layers(module):
        nn.init.xavier_uniform_(layer.weight, nn.init.calculate_gain("relu"))
        nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """State features z_s, state-action features z_sa, and a linear model of what comes next from z_sa (MR.Q)."""

    def __init__(self, obs_dim: int, act_dim: int, zs: int, za: int, zsa: int, width: int, depth: int, block_type: int):
        super().__init__()
        zs_hidden = hidden_blocks(obs_dim, width, depth * ZS_BLOCKS - 1, block_type)
        self.zs = nn.Sequential(*zs_hidden, Block(width, zs, block_type=4))  # z_s is normalised, whatever the type
        self.za = nn.Sequential(nn.Linear(act_dim, za), nn.ELU())
        zsa_hidden = hidden_blocks(zs + za, width, depth * ZSA_BLOCKS, block_type)
        self.zsa_mlp = nn.Sequential(*zsa_hidden, nn.Linear(width, zsa))
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


# ------------------------------------------------------------------------------------------------------------- MR.Q


class ReplayBuffer:
    """Ring of steps in preallocated tensors, sampled by priority as sub-trajectories of `ENCODER_HORIZON` steps.

    Row i holds a step's observation; the next one is in row i + 1. A row of its own holds the last observation of an
    episode. priority[i] is 0 unless a whole sub-trajectory starts at row i: one that a time limit cuts is never
    sampled, one that a termination cuts is, as the losses mask what follows.
    """

    COUNTERS = ("head", "size", "episode_steps", "terminates", "max_priority")

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        sizes = {"obs": (obs_dim,), "action": (act_dim,), "reward": (), "not_done": (), "is_step": (), "priority": ()}
        # on a CPU, zeros take no memory before they are written; the rows that fill the last block are never used
        rows = math.ceil(capacity / PRIORITY_BLOCK) * PRIORITY_BLOCK
        self.data = {name: torch.zeros(rows, *size, device=device) for name, size in sizes.items()}
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
        self.data["is_step"][row] = 1.0
        self.episode_steps += 1
        self.terminates |= bool(terminated)  # a numpy flag would make the checkpoint unreadable
        if terminated or truncated:
            last = self._append(next_obs)
            self.data["is_step"][last] = 0.0
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

        First a block of rows by the sum of its priorities, then a row of this block: cheaper than a cumulative sum over
        a large buffer at each draw. At least one priority must be above 0.
        """
        blocks = self.data["priority"].view(-1, PRIORITY_BLOCK)
        block = draw(blocks.sum(1), (count,))
        return block * PRIORITY_BLOCK + draw(blocks[block], (count, 1))[:, 0]

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
        # a row may be there several times: it gets the largest, whatever the device does first
        self.data["priority"].scatter_reduce_(0, rows, priority, "amax", include_self=False)
        torch.maximum(self.max_priority, priority.max(), out=self.max_priority)

    def reward_scale(self) -> Tensor:
        """Mean |r| over the steps in the buffer, 0-d."""
        reward, is_step = self.data["reward"][: self.size], self.data["is_step"][: self.size]
        return ((reward.abs() * is_step).sum() / is_step.sum()).clamp_min(1e-8)

    def recent(self, count: int) -> dict[str, Tensor]:
        """Observations and actions of the steps in the last `count` rows, or all there are."""
        rows = (self.head - 1 - torch.arange(min(count, self.size), device=self.max_priority.device)) % self.capacity
        rows = rows[self.data["is_step"][rows] > 0]
        return {"obs": self.data["obs"][rows], "action": self.data["action"][rows]}

    def state_dict(self) -> dict:
        data = {name: column[: self.size] for name, column in self.data.items()}
        if self.size < self.capacity:  # a slice would save its whole storage: clone what is filled
            data = {name: column.clone() for name, column in data.items()}
        return {"data": data} | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state_dict(self, state: dict) -> None:
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        self.max_priority = self.max_priority.to(self.data["priority"].device)
        for name, column in state["data"].items():
            self.data[name][: self.size] = column


def draw(priority: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Indices (of that shape) along the last dimension of `priority`, drawn in proportion to it.

    priority (n,) -> (count,), priority (m, n) -> (m, count). Each row needs a priority above 0.
    """
    cumulative = priority.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    points = torch.rand(shape, dtype=torch.float64, device=total.device) * total.nextafter(torch.zeros_like(total))
    # right: a point at exactly 0 falls on the first index whose priority is not 0
    return torch.searchsorted(cumulative, points, right=True)


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
def td_target(targets: dict, batch: dict, gamma: float, noise: float, clip: float, scales: list[Tensor]) -> Tensor:
    """MR.Q's regression target of the critics (batch, 1), in units of the reward scale.

    y = (n-step return + gamma^n alive min Q'(s', pi'(s') + clipped noise) * target scale) / scale.
    targets: the target networks by name; batch: what `ReplayBuffer.transitions` gives; noise: standard deviation; clip:
    largest noise; scales: mean |r| in whose units the critics learn now, and that in whose units the targets learned.
    """
    scale, target_scale = scales
    returns, alive = multi_step_return(batch["reward"], batch["not_done"], gamma)
    next_zs = targets["encoder"].zs(batch["next_obs"])
    action_noise = (torch.randn_like(batch["action"]) * noise).clamp(-clip, clip)
    next_action = (torch.tanh(targets["actor"](next_zs)) + action_noise).clamp(-1, 1)
    next_q = targets["critic"](targets["encoder"].zsa(next_zs, next_action)).amin(1, keepdim=True)
    return (returns + alive * gamma**Q_HORIZON * next_q * target_scale) / scale


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


def action_of(encoder: Encoder, actor: Actor, obs: Tensor, noise: float = 0.0) -> Tensor:
    """One observation (obs_dim,) -> one action (act_dim,) in [-1, 1]. noise: standard deviation of what is added."""
    action = torch.tanh(actor(encoder.zs(obs[None])))[0]
    return (action + noise * torch.randn_like(action)).clamp(-1, 1) if noise else action


@torch.no_grad()
def act(encoder: Encoder, actor: Actor, obs: np.ndarray) -> np.ndarray:
    """The policy without noise, for an observation of any float type."""
    obs = torch.as_tensor(obs, dtype=torch.float32, device=actor[-1].weight.device)
    return action_of(encoder, actor, obs).cpu().numpy()


class Agent:
    """MR.Q with a topology for each of its modules."""

    STATE = ("networks", "targets", "optimizers", "topologies", "replay", "updates", "scales", "losses", "grad_norms")

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.device = args, device
        self.networks = {name: module.to(device) for name, module in build_networks(args, obs_dim, act_dim).items()}
        self.optimizers, self.topologies = {}, {}
        schedule = {"until": int(args.rigl_until * (args.total_steps - args.learning_starts))}
        schedule |= {"every": args.rigl_every, "drop": args.rigl_drop}
        adam = partial(torch.optim.AdamW, weight_decay=args.weight_decay, fused=True, capturable=device.type == "cuda")
        for name, module in self.networks.items():
            optimizer = self.optimizers[name] = adam(module.parameters(), lr=getattr(args, f"{name}_lr"))
            regime, sparsity = getattr(args, f"{name}_regime"), getattr(args, f"{name}_sparsity")
            self.topologies[name] = Topology(linear_layers(module), optimizer, regime, sparsity, **schedule)
        # the targets are copied whole, so that their topologies need no care
        self.targets = {name: copy.deepcopy(module).requires_grad_(False) for name, module in self.networks.items()}
        self.replay = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
        self.updates = 0
        # mean |r| in whose units the critics learn now, and in whose units the targets learned
        self.scales = [torch.ones((), device=device), torch.zeros((), device=device)]
        self.losses: dict[str, Tensor] = {}
        self.grad_norms: dict[str, Tensor] = {}  # by module (both critics together), masked and not yet clipped
        losses = {"encoder": encoder_loss, "critic": critic_loss, "actor": actor_loss}
        cast = {name: self.autocast()(loss) for name, loss in losses.items()}  # the forward pass alone
        # each computes a module's loss and leaves gradients in `.grad` of that module only
        self.backward = {name: with_gradients(cast[name], self.optimizers[name], args.compile) for name in losses}
        self.td_target = torch.compile(td_target) if args.compile else td_target
        captured, topologies = partial(Captured, device=device, graphs=args.cuda_graph), self.topologies
        # captured_...: learn_... as a CUDA graph, outside of which its topologies change
        self.captured_encoder = captured(self.learn_encoder, schedules=lambda _: [topologies["encoder"]])
        both = [topologies["critic"], topologies["actor"]]
        self.captured_critic_and_actor = captured(self.learn_critic_and_actor, schedules=lambda: both)
        explore = partial(action_of, self.networks["encoder"], self.networks["actor"], noise=args.exploration_noise)
        self.explore = CapturedPolicy(explore, device, args.cuda_graph)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """One observation (obs_dim,) -> the action without noise (act_dim,)."""
        return act(self.networks["encoder"], self.networks["actor"], obs)

    def update(self) -> None:
        """One training step of MR.Q; its losses are in `self.losses`. Only a topology change waits for the device."""
        if self.updates % self.args.target_update_every == 0:
            self.copy_targets()
            for _ in range(self.args.target_update_every):
                self.captured_encoder(self.replay.terminates)
        self.updates += 1
        self.captured_critic_and_actor()

    def copy_targets(self) -> None:
        """Targets become what the networks are now, and the reward scale is measured again."""
        for name, target in self.targets.items():
            target.load_state_dict(self.networks[name].state_dict())
        scale, old_scale = self.scales
        old_scale.copy_(scale)
        scale.copy_(self.replay.reward_scale())

    def learn_encoder(self, terminates: bool) -> None:
        """One step of the encoder: one CUDA graph (common/capture.py), so it changes tensors in place only.

        terminates: whether any step ever terminated.
        """
        batch = self.replay.sub_trajectories(self.replay.sample_rows(self.args.batch_size))
        losses = self.backward["encoder"](self.networks["encoder"], self.targets["encoder"], batch, terminates)
        self.step("encoder")
        keep(self.losses, dict(zip(("encoder", "dynamics", "reward", "done"), losses, strict=True)))

    def learn_critic_and_actor(self) -> None:
        """One step of the critics, then one of the actor, and new priorities: one CUDA graph too."""
        args, rows = self.args, self.replay.sample_rows(self.args.batch_size)
        encoder, critic, actor = self.networks.values()
        batch = self.replay.transitions(rows)
        with self.autocast(), torch.no_grad():
            target = self.td_target(self.targets, batch, args.gamma, args.target_noise, args.noise_clip, self.scales)
            zs = encoder.zs(batch["obs"])
            zsa = encoder.zsa(zs, batch["action"])
        loss, q_mean, td_error = self.backward["critic"](critic, zsa, target)
        self.step("critic", args.max_grad_norm)
        self.replay.update_priority(rows, td_error.clamp_min(MIN_PRIORITY).pow(PRIORITY_EXPONENT))
        policy_loss = self.backward["actor"](actor, encoder, critic, zs)
        self.step("actor")
        keep(self.losses, {"critic": loss, "q": q_mean, "actor": policy_loss})

    def step(self, name: str, max_grad_norm: float = math.inf) -> None:
        """With the gradients of one module: its topology, then the norm's clip, then AdamW."""
        optimizer = self.optimizers[name]
        parameters = optimizer.param_groups[0]["params"]
        self.topologies[name].before_step()
        keep(self.grad_norms, {name: nn.utils.clip_grad_norm_(parameters, max_grad_norm)})
        optimizer.step()

    def autocast(self) -> torch.autocast:
        """--bf16: matrix products in bfloat16, of a block of code or of a function that it decorates."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    # ----------------------------------------------------------------------------------------------------- metrics

    @torch.no_grad()
    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of every module on recent steps."""
        encoder, critic, actor = self.networks.values()
        # the rank of features is at most the number of rows: more of them for wider layers
        batch = self.replay.recent(round(METRIC_BATCH * max(1, self.args.width_scale)))
        obs, action = batch["obs"], batch["action"]
        networks = {"encoder": (encoder, (obs, action)), "critic": (critic.twins[0], (encoder(obs, action),))}
        return metrics.plasticity(networks | {"actor": (actor, (encoder.zs(obs),))})

    def sparsity(self) -> dict[str, float]:
        """For each module that is not dense: active share of its parameters, biases too; share of the connections that
        its last change moved; share of them that the first topology had."""
        counts, scalars = self.parameter_counts(), {}
        for name, topology in self.topologies.items():
            if topology.regime != "dense":
                scalars[f"sparsity/{name}/density"] = counts[f"{name}_active"] / counts[name]
                scalars[f"sparsity/{name}/changed"] = topology.changed
                kept = sum(int((mask & topology.initial[i]).sum()) for i, mask in topology.masks.items())
                connections = sum(int(mask.sum()) for mask in topology.masks.values())
                scalars[f"sparsity/{name}/overlap_with_initial"] = kept / connections if connections else 1.0
        return scalars

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each module, and how many of them are active."""
        counts = {}
        for name, module in self.networks.items():
            masks = self.topologies[name].masks.values()
            counts[name] = sum(p.numel() for p in module.parameters())
            counts[f"{name}_active"] = counts[name] - sum(int((~mask).sum()) for mask in masks)
        return counts


# ------------------------------------------------------------------------------------------------------ the run


@cli.loader
def load_policy(run_dir: str) -> Callable[[np.ndarray], np.ndarray]:
    """The policy of a stored run: an observation (obs_dim,) of any float type -> an action (act_dim,) in [-1, 1]."""
    args, checkpoint = cli.load_run(run_dir, Args, "mst_rigl")
    weights = checkpoint["agent"]["networks"]
    obs_dim, act_dim = (weights["encoder"][f"{layer}.weight"].shape[1] for layer in ("zs.0.linear", "za.0"))
    with torch.device("meta"):  # takes no memory: encoder and actor get their weights from the file, critics none
        networks = build_networks(args, obs_dim, act_dim)
    for name in ("encoder", "actor"):
        networks[name].load_state_dict(weights[name], assign=True)
    return partial(act, networks["encoder"], networks["actor"])


def startup_warnings(agent: Agent) -> list[str]:
    """What will never happen, or be slow, with the arguments of a run."""
    args, device, lines = agent.args, agent.device.type, []
    for name, topology in agent.topologies.items():
        if topology.regime == "rigl" and topology.every >= topology.until:
            never = f"the {name}'s topology never changes: --rigl-every {topology.every}"
            lines.append(f"warning: {never} is not below {topology.until}, from where on topologies stay")
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    if args.bf16 and not has_bf16:
        has_none = f"this {device} device has no bfloat16 products (a CPU needs AVX-512 BF16 or AMX)"
        lines.append(f"warning: --bf16: {has_none}: expect a slow run")
    return lines


@recorded
def main(args: Args) -> dict:
    """Train on one task; returns what results.json holds, or with --evaluate what `metrics.evaluate` returns."""
    args, checkpoint, device = cli.prepare(args, "mst_rigl", PRESETS)
    args = replace(args, env_id=canonical(args.env_id))  # stored is what was run
    steps, repeat = (500_000, 2) if args.env_id.startswith("dmc/") else (1_000_000, 1)
    args = replace(args, total_steps=args.total_steps or steps, action_repeat=args.action_repeat or repeat)
    make_task, tasks = partial(make_env, action_repeat=args.action_repeat, **env_options(args)), [args.env_id]
    if args.evaluate:
        policy = load_policy(args.evaluate)
        return evaluate_stored(args, tasks, [0], lambda _: policy, make_task, EVAL_STARTS)[0]
    below = f"below --total-steps {args.total_steps}"
    require(args, "learning_starts", args.learning_starts < args.total_steps, below)
    fewest = (ENCODER_HORIZON - 1) * args.action_repeat + 1
    enough = args.max_episode_steps is None or args.max_episode_steps >= fewest
    allowed = f"at least {fewest}: the encoder learns from {ENCODER_HORIZON} agent steps"
    require(args, "max_episode_steps", enough, allowed)

    obs_dim, act_dim = env_sizes(args.env_id, args)
    with cli.Memory(device, args.batch_size):
        agent, at = Agent(args, obs_dim, act_dim, device), {"step": 0, "episode": 0}
    for name, topology in agent.topologies.items():
        linked = all(mask.any() for mask in topology.masks.values())
        require(args, f"{name}_sparsity", linked, f"lower: a layer of the {name} gets no connection")
    if checkpoint:
        restored(agent, checkpoint.pop("agent"), device)  # pop: the buffer's second copy is not kept
        at = restored(at, checkpoint["at"], device)
    phases = [(args.total_steps, args.learning_starts)]
    recorder = Recorder(args, "mst_rigl", args.env_id, tasks, phases, checkpoint)
    recorder.begin(agent, at, checkpoint, agent.parameter_counts())
    for line in startup_warnings(agent):
        recorder.say(line)
    env, step, episode = make_task(args.env_id, seed=args.seed), at["step"], at["episode"]

    while True:  # once per episode: a run can be saved between two episodes only
        at = {"step": step, "episode": episode}
        if recorder.evaluation_due(step, 0, ended=step == args.total_steps):
            recorder.require_finite_weights(agent, step)
            if recorder.evaluate(step, 0, [0], lambda _: agent.act, make_task, EVAL_STARTS):
                recorder.log(step, agent.plasticity() | agent.sparsity())
        if recorder.checkpoint_due(step):
            recorder.save(step, agent, at)
        recorder.leave()
        if step == args.total_steps:
            break

        obs, _ = env.reset(seed=seed_of(args.seed, TRAIN_STARTS, 0, episode))  # which decides all of it
        first_step, done, episode_return = step, False, 0.0
        while not done and step < args.total_steps:
            action = (2 * torch.rand(act_dim) - 1).numpy() if step < args.learning_starts else agent.explore(obs)
            recorder.require_finite("action", action, step)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            agent.replay.add(obs, action, reward, next_obs, terminated, truncated)
            obs, episode_return, done = next_obs, episode_return + reward, terminated or truncated
            step += 1
            if step <= args.learning_starts:
                continue
            cut_short = done and step - first_step < ENCODER_HORIZON  # by a limit: it has no priority
            if (agent.updates == 0 or cut_short) and not agent.replay.data["priority"].any():
                recorder.close()
                few = f"no episode has {ENCODER_HORIZON} agent steps, of which the encoder learns"
                raise cli.ArgumentError(f"--env-id {args.env_id} --action-repeat {args.action_repeat}: {few}")
            agent.update()
            if agent.updates % LOG_EVERY == LOG_EVERY // 2:  # between two changes of a topology by default
                recorder.losses(step, agent.losses)
                norms = {f"plasticity/{name}/grad_norm": norm for name, norm in agent.grad_norms.items()}
                recorder.log(step, norms | {"method/reward_scale": agent.scales[0]})
        episode += 1
        recorder.episode(step, args.env_id, done, episode_return, step - first_step)

    env.close()
    recorder.save(step, agent, at)
    returns = [row["episode_return"] for row in recorder.rows]
    report = {"final_return": returns[-1], "mean_return": float(np.mean(returns))} | agent.sparsity()
    report |= {name: float(value) for name, value in agent.plasticity().items()}
    return recorder.finish(step, report, agent.parameter_counts())


if __name__ == "__main__":
    cli.run(main, Args, PRESETS)
