"""SSDE: continual reinforcement learning by fine-grained sparse network allocation and dormant neuron resets.

Paper: Mastering Continual Reinforcement Learning through Fine-Grained Sparse Network Allocation and Dormant Neuron
Exploration, arXiv 2503.05246. Base algorithm: Soft Actor-Critic. Environments: Continual World on Meta-World v3.

One policy network learns a sequence of tasks. The sentence that describes a task picks, by sparse coding, which
neurons of each hidden layer the task uses. Weights between them that an earlier task has trained are frozen and
carry knowledge forward; the others are trainable. Nothing that an old task uses ever changes, so nothing is
forgotten. A later task first widens its actions again (distillation), then trains with an empty buffer and new
critics. It has fewer trainable weights, so none may idle: neurons that hardly react to their input are reset.

Read first: `task_neurons` (which neurons), `SharedPolicy` (which weights), `CoAllocatedLinear` (how frozen and
trainable weights act together), `DormantResets`, then `Agent` and `main`.

Copy: `sparse_prompt`, `dictionaries`, `task_neurons`, `NOBODY`, `CoAllocatedLinear`, `SharedPolicy`, `DormantResets`,
`neuron_scores` (140 lines; tests/transplants/ssde_sac.py does it). It takes any actor, with the names of its layers.

    python ssde.py --quick                # two easy tasks, a small network: minutes on a laptop CPU
    python ssde.py --task-seq cw10        # the paper's ten tasks of 1 M steps

Where this script differs from the authors' code, and why (more: tests/benchmarks/results/ssde.md):

1. A task's policy is cut out and trained as small dense matrices: the same function, a tenth of the arithmetic.
2. From the second task on trainable weights act with 1 - beta, as in Eq. 7. The authors' act with 1
   (`--trainable-weight 1`).
3. Every task keeps a log-std head of its own. The authors' tasks share one, so their old stochastic policies drift.
4. A reset touches the dormant neurons' trainable weights and biases. The authors' also reverts every other bias, the
   log-std head, rows of the mean head and layers without a dormant neuron, and clears all moments of all of them.
5. The action is tanh of an unbounded Gaussian. The authors bound the mean first (`--bounded-mean`), so that their mean
   action stays within 0.76.
6. Both lambdas are the paper's 1e-3. The authors' are 1e-2, and the local one falls to 1e-4 (`--lambda-local-end`).
7. The warm-up acts by an earlier task's own policy, drawn for each episode. The authors draw one for each step and let
   it act with the new task's split into frozen and trainable weights.
8. Meta-World v3 with v2 rewards instead of v1 (`--reward-version v1`); sentence vectors of all-MiniLM-L6-v2 instead of
   L12 (`--task-encoder`).
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from common.descriptions import encode_tasks, task_sentences
from common.envs import env_sizes, make_env, seed_of, task_sequence
from common.recorder import Recorder, evaluate_stored, recorded, reference_auc, restored

LOG_EVERY = 1000  # environment steps between two points of the loss curves
METRIC_BATCH = 1000  # recent observations on which sensitivity and plasticity are measured
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
TRAIN_GOALS, EVAL_GOALS = 3, 4  # streams of random numbers, see `seed_of`; 1 and 2 are those of `dictionaries`

# a narrow layer needs a large lambda; resets come every 8 % of a task, until 65 % of it, as at full size
QUICK = {"task_seq": "drawer-close,reach", "steps_per_task": 25_000, "eval_every": 5000, "eval_episodes": 20}
QUICK |= {"hidden_dim": 128, "hidden_layers": 2, "critic_hidden_dim": 128, "lambda_global": 3e-2, "lambda_local": 3e-2}
QUICK |= {"learning_starts": 1000, "actor_lr": 1e-3, "critic_lr": 1e-3, "gamma": 0.98}
QUICK |= {"reset_every": 2000, "reset_until": 16_250, "distill_steps": 2000}
PRESETS = {"quick": QUICK}


@dataclass
class Args:
    task_seq: str = "cw10"  # tasks in order: cw10, cw20, cw3, mt10, mt50, or Meta-World names joined by commas
    steps_per_task: PositiveInt = 1_000_000  # environment steps per task (Continual World: 1 M)
    seed: Seed = 1  # seed of everything random
    quick: bool = False  # a first look: two easy tasks, small networks, 25 000 steps each; other arguments still win
    resume: str | None = None  # continue the run in this folder with its arguments
    evaluate: str | None = None  # evaluate the run in this folder on the tasks it has seen, print the table, exit
    episodes: PositiveInt = 10  # episodes per task of --evaluate
    run_dir: str | None = None  # folder of the run; by default a new one under runs/
    device: Device = "auto"  # auto: cuda if there is one; --evaluate plays on the CPU
    torch_threads: PositiveInt = 1  # CPU threads of PyTorch; 1 is fastest where several seeds run side by side
    cuda_graph: bool = True  # on CUDA: updates and acting as CUDA graphs
    compile: bool = False  # torch.compile losses with their gradients: minutes at the start of every task
    checkpoint_every: NonNegativeInt = 50_000  # environment steps between checkpoints; 0: task borders and signals only
    quiet: bool = False  # print nothing
    track: bool = False  # mirror TensorBoard to Weights & Biases
    wandb_project: str = "cleanplasticity"  # project of --track
    capture_video: bool = False  # record the first episode of each task at every evaluation

    # --- Environment and evaluation ---

    reward_version: Literal["v1", "v2"] = "v2"  # Meta-World's reward and success: v2 (0 to 10 a step), v1 (0 to 2000)
    reward_scale: PositiveFloat | None = None  # factor on training rewards; default 1 for v2, 1/200 for v1 (authors)
    eval_every: PositiveInt = 20_000  # environment steps between evaluations; the end of a task is always evaluated
    eval_episodes: PositiveInt = 10  # deterministic episodes per task and evaluation
    eval_all: bool = False  # evaluate on all tasks of the sequence instead of those seen so far
    reference: str | None = None  # a `--method scratch` run on the same tasks: the reference of forward transfer

    # --- SAC ---

    hidden_dim: PositiveInt = 1024  # width of the actor's hidden layers
    hidden_layers: cli.Depth = 4  # hidden layers of actor and critics
    critic_hidden_dim: PositiveInt = 256  # width of the critics' hidden layers
    buffer_size: PositiveInt = 1_000_000  # replay capacity, transitions; emptied at each task's start
    batch_size: PositiveInt = 256  # transitions per update; one update per environment step
    learning_starts: NonNegativeInt = 10_000  # steps of each task before its first update; see `exploration_policy`
    gamma: Fraction = 0.99  # discount
    tau: Fraction = 0.005  # Polyak rate of the target critics
    actor_lr: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--policy-lr",))] = 3e-4  # Adam: actor and temperature
    critic_lr: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--q-lr",))] = 3e-4  # Adam: the critics
    bounded_mean: bool = False  # the authors' head: mean through tanh first, std = softplus of a value in (-2, 2)

    # --- SSDE ---

    method: Literal["ssde", "finetune", "scratch"] = "ssde"  # baselines: one dense policy, trained on or drawn anew
    task_encoder: str = "bundled"  # bundled (shipped vectors of all-MiniLM-L6-v2), or a sentence-transformers name
    task_descriptions: str | None = None  # JSON file {task name: sentence} that replaces built-in sentences
    lambda_global: PositiveFloat = 1e-3  # L1 penalty, global dictionary: few neurons (Table VI); to width 512 use 3e-2
    lambda_local: PositiveFloat = 1e-3  # L1 penalty, the task's own dictionary (Table VI); up to width 512 use 3e-2
    lambda_local_end: PositiveFloat | None = None  # last task's lambda_local, reached linearly (authors: 1e-2 to 1e-4)
    beta: Annotated[float, Ge(0), Lt(1)] = 0.3  # weight of frozen parameters in the forward pass (Table V)
    trainable_weight: PositiveFloat | None = None  # weight of trainable parameters; default 1 - beta (Eq. 7)
    dormant_metric: Literal["sensitivity", "activation", "none"] = "sensitivity"  # Eq. 9; ReDo's score; no resets
    dormant_threshold: NonNegativeFloat = 0.6  # neurons below this share of their layer's mean are dormant (Table V)
    reset_every: PositiveInt = 80_000  # steps of a task between resets (Table VI)
    reset_until: NonNegativeInt = 650_000  # no reset from this step of a task on (authors)
    distill_steps: NonNegativeInt = 20_000  # updates towards N(0, 1) outputs before each later task (authors)


# ------------------------------------------------------------------------------- the method: which neurons a task uses


def sparse_prompt(embedding: np.ndarray, dictionary: np.ndarray, penalty: float) -> np.ndarray:
    """Neurons that a task picks: 1[alpha > 0], alpha = argmin 1/2 |e - D^T alpha|^2 + penalty |alpha|_1.

    embedding (dimension,), dictionary (atoms, dimension), an atom per neuron -> boolean (atoms,).
    """
    from sklearn.decomposition import sparse_encode  # it takes as long as PyTorch to import: where it is needed

    alpha = sparse_encode(embedding[None], dictionary, algorithm="lasso_lars", alpha=penalty, max_iter=10_000)
    return alpha[0] > 0


def dictionaries(dimension: int, task: int, widths: list[int], seed: int) -> Iterator[list[np.ndarray]]:
    """The global dictionary, of all tasks, and the task's local one: (width, dimension) each, for each hidden layer.

    Entries are N(0, 1), then each atom (row) is scaled into the unit ball. They are never learned.
    """
    for layer, width in enumerate(widths):
        generators = [np.random.default_rng(words) for words in ((seed, 1, layer), (seed, 2, layer, task))]
        draws = [generator.standard_normal((width, dimension)) for generator in generators]
        yield [atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1.0) for atoms in draws]


def task_neurons(embedding, task: int, widths: list[int], lambdas=(1e-3, 1e-3), seed: int = 0) -> list[Tensor]:
    """Co-allocation: phi^l = phi^l[global] or phi^l[local]; indices of the task's neurons in each hidden layer.

    The global dictionary lets tasks with similar sentences share neurons, the local one gives each some of its own.
    embedding: the sentence as a vector of norm 1. lambdas: penalty over the global and over the local dictionary.
    """
    neurons = []
    for layer, pair in enumerate(dictionaries(len(embedding), task, widths, seed), start=1):
        of_all, own = (sparse_prompt(embedding, atoms, penalty) for atoms, penalty in zip(pair, lambdas, strict=True))
        neurons.append(torch.from_numpy(of_all | own).nonzero()[:, 0])
        if len(neurons[-1]) == 0:
            raise ValueError(f"task {task} gets no neuron in layer {layer}; lower lambda")
    return neurons


# ------------------------------------------------------------------------------- the method: which weights are trained

NOBODY = 2**31 - 1  # owner of a weight that no task has trained


class CoAllocatedLinear(nn.Module):
    """Linear layer of a task's policy: y = [trainable_weight W_trainable + beta W_frozen] x, the bias alike (Eq. 7).

    parts: for "weight" and, if there is one, "bias" the values and which of them are frozen. Those act as a constant;
    their places in the parameter are 0 behind a gate of 0, so that no gradient, moment or decay moves them (Eq. 8).
    """

    def __init__(self, parts: dict[str, tuple[Tensor, Tensor]], beta: float, trainable_weight: float):
        super().__init__()
        self.bias, self.plain = None, trainable_weight == 1 and not any(frozen.any() for _, frozen in parts.values())
        for name, (values, frozen) in parts.items():
            setattr(self, name, nn.Parameter(values.masked_fill(frozen, 0)))
            self.register_buffer(f"{name}_gate", trainable_weight * (~frozen).to(values.dtype), persistent=False)
            self.register_buffer(f"{name}_constant", beta * values * frozen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:  # the first task, a task's own heads
            return F.linear(x, self.weight, self.bias)
        weight = torch.addcmul(self.weight_constant, self.weight, self.weight_gate)
        bias = None if self.bias is None else torch.addcmul(self.bias_constant, self.bias, self.bias_gate)
        return F.linear(x, weight, bias)


class SharedPolicy:
    """The network that all tasks share, and the first task that trained each of its weights.

    network: an actor at full size. hidden: names of its hidden linear layers, each reads the one before. heads: names
    of linear layers that read the last one. own_heads: heads of which each task has its own, never frozen or scaled, as
    of all that is not named here. What runs between the layers works at any width: F.layer_norm, not nn.LayerNorm.

    owner[name] (out, in): the first task that trained each weight, or NOBODY; a bias belongs to its row's first owner.
    neurons[k]: indices of task k's neurons in each hidden layer. own[k]: its own parameters, from its end on.
    """

    STATE = ("owner", "neurons", "own")  # and the network

    def __init__(self, network: nn.Module, hidden, heads, own_heads=(), beta=0.3, trainable_weight=None):
        self.network, self.hidden, self.layers, self.own_heads = network, hidden, [*hidden, *heads], own_heads
        self.beta, self.trainable_weight = beta, 1 - beta if trainable_weight is None else trainable_weight
        weights = {name: network.get_parameter(f"{name}.weight") for name in (*self.layers, *own_heads)}
        self.owner = {name: torch.full_like(w, NOBODY, dtype=torch.int32) for name, w in weights.items()}
        self.neurons, self.own = [], {}

    def begin_task(self, neurons: list[Tensor]) -> nn.Module:
        """The next task, which uses these neurons of each hidden layer: returns its policy, to be trained."""
        self.neurons.append([indices.to(self.owner[self.hidden[0]].device) for indices in neurons])
        return self.cut(len(self.neurons) - 1)

    def places(self, task: int, name: str) -> dict[str, tuple]:
        """Of a layer's weight and bias: (parameter, index, frozen). parameter[index] is the task's share of it.

        The share is Psi~_k[i, j] = phi^l[i] phi^{l-1}[j] (Eq. 5), with all inputs and outputs of the network. Frozen is
        what is in an earlier task's too (Psi_{k-1}). A weight between old neurons that no task used together is free.
        """
        layer, owner = self.network.get_submodule(name), self.owner[name]
        rows, columns = (torch.arange(size, device=owner.device) for size in owner.shape)
        level = self.hidden.index(name) if name in self.hidden else len(self.hidden)
        rows = self.neurons[task][level] if name in self.hidden else rows
        columns = self.neurons[task][level - 1] if level > 0 else columns
        places = {"weight": (layer.weight, (rows[:, None], columns), owner[rows[:, None], columns] < task)}
        return places if layer.bias is None else places | {"bias": (layer.bias, rows, owner[rows].amin(1) < task)}

    @torch.no_grad()
    def cut(self, task: int) -> nn.Module:
        """A task's policy: a copy of the network with small layers. A finished task's stays bit-identical."""
        small = {}
        for name in self.owner:
            parts = {kind: (p[index], frozen) for kind, (p, index, frozen) in self.places(task, name).items()}
            factor = 1.0 if task == 0 or name in self.own_heads else self.trainable_weight  # 1: nothing can be frozen
            small[id(self.network.get_submodule(name))] = CoAllocatedLinear(parts, self.beta, factor)
        policy = copy.deepcopy(self.network, small)  # a layer in `small`, deepcopy's memo, is replaced, not copied
        policy.load_state_dict(self.own.get(task, {}), strict=False)
        return policy

    @torch.no_grad()
    def end_task(self, policy: nn.Module) -> None:
        """Write the latest task's weights back to where they were cut out; it owns those that it trained first."""
        task = len(self.neurons) - 1
        for name in self.layers:
            places = self.places(task, name)
            for kind, (parameter, index, frozen) in places.items():
                parameter[index] = torch.where(frozen, parameter[index], getattr(policy.get_submodule(name), kind))
            owner, block = self.owner[name], places["weight"][1]  # NOBODY becomes `task`, earlier owners stay
            owner[block] = owner[block].clamp_max(task)
        own = {key.removeprefix("_orig_mod."): value for key, value in policy.state_dict().items()}  # if it is compiled
        self.own[task] = copy.deepcopy({key: own[key] for key in own if key.rpartition(".")[0] not in self.layers})


# ----------------------------------------------------------------------------------------- the method: dormant neurons


class DormantResets:
    """Resets dormant neurons: their trainable incoming weights return to the values at the time that this was made.

    layers: the hidden layers of a task's policy as its forward pass calls them, then a head. every, until: its steps.
    """

    STATE = ("start",)

    def __init__(self, layers, optimizer, every=80_000, until=650_000, threshold=0.6, metric="sensitivity"):
        self.layers, self.optimizer, self.every, self.until = list(layers), optimizer, every, until
        self.threshold, self.metric = threshold, metric
        self.start = [[p.detach().clone() for p in layer.parameters()] for layer in self.layers[:-1]]

    def due(self, step: int) -> bool:
        return step % self.every == 0 and step < self.until

    @torch.no_grad()
    def reset(self, forward: Callable, obs: Tensor) -> list[Tensor]:
        """Where a neuron's score is low: reset trainable incoming weights, bias and moments. Returns the scores."""
        scores = neuron_scores(self.layers, forward, obs, self.metric)
        for layer, start, score in zip(self.layers[:-1], self.start, scores, strict=True):
            dormant = score < self.threshold
            for parameter, value in zip(layer.parameters(), start, strict=True):
                parameter[dormant] = value[dormant]
                for moment in self.optimizer.state.get(parameter, {}).values():
                    if getattr(moment, "shape", None) == parameter.shape:
                        moment[dormant] = 0
        return scores


@torch.no_grad()
def neuron_scores(layers: list[nn.Module], forward: Callable, obs: Tensor, metric="sensitivity") -> list[Tensor]:
    """How alive the neurons of each hidden layer are, 1 = the layer's mean: (width,) each.

    "sensitivity" (Eq. 9): mean |y_i(x) - y_i(x')| of the layer's linear output, x' = x + 0.01 mean(x) for observations
    x (batch, obs_dim), not centred; "activation" (ReDo, Sokar et al. 2023): mean |h_i|. forward: uncompiled policy.
    """
    calls = []  # (input, linear output) of each layer, on x and on x'; cloned: an activation may work in place
    hooks = [layer.register_forward_hook(lambda _, x, y: calls.append((x[0], y.clone()))) for layer in layers]
    for x in (obs, obs + 0.01 * obs.mean(0)):
        forward(x)
    for hook in hooks:
        hook.remove()
    first, second = calls[: len(layers)], calls[len(layers) :]
    if metric == "activation":  # a layer's activations are what the next one reads, hence the head
        alive = [h.abs().mean(0) for h, _ in first[1:]]
    else:
        alive = [(y - y2).abs().mean(0) for (_, y), (_, y2) in zip(first[:-1], second[:-1], strict=True)]
    return [a / a.mean().clamp_min(torch.finfo(a.dtype).tiny) for a in alive]


# ------------------------------------------------------------------------------------------------- networks and losses


def linear(inputs: int, outputs: int, variance_scale: float, bias: bool = True) -> nn.Linear:
    """Linear layer with truncated normal weights of variance `variance_scale`/inputs (as JAX draws them), bias 0."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    std = math.sqrt(variance_scale / inputs) / 0.87962566103423978  # a cut at two sigma takes this factor away
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh. SSDE replaces its layers by narrower ones: `forward` works at any width."""

    def __init__(self, obs_dim: int, act_dim: int, width: int, layers: int, bounded_mean: bool = False):
        super().__init__()
        self.hidden = nn.ModuleList(linear(n, width, 2.0) for n in [obs_dim, *[width] * (layers - 1)])
        self.mean, self.log_std = linear(width, act_dim, 1e-4, bias=False), linear(width, act_dim, 1e-4)
        self.bounded_mean = bounded_mean

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (batch, obs_dim) -> mean and standard deviation before the squash, (batch, act_dim) each."""
        h = self.hidden[0](obs)
        h = torch.tanh(F.layer_norm(h, h.shape[-1:], eps=1e-6))  # over the task's neurons only, as in CoTASP
        for layer in self.hidden[1:]:
            h = F.leaky_relu(layer(h), inplace=True)
        mean, raw = self.mean(h), self.log_std(h)
        if self.bounded_mean:
            return torch.tanh(mean), F.softplus(2 * torch.tanh(raw))
        return mean, torch.exp(LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1))

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (batch, act_dim) in (-1, 1) and their log-probabilities (batch,)."""
        mean, std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + std * noise
        log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2) without overflow
        log_prob = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi) - log_derivative
        return torch.tanh(u), log_prob.sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, explore: bool = False) -> np.ndarray:
        """One observation (obs_dim,) of any float type -> one action (act_dim,) float32."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.mean.weight.device)[None]
        return (self.sample(obs)[0] if explore else torch.tanh(self(obs)[0]))[0].cpu().numpy()


class Critic(nn.Module):
    """Twin Q(s, a): LayerNorm and leaky ReLU on every hidden layer."""

    def __init__(self, inputs: int, width: int, layers: int):
        super().__init__()
        self.twins = nn.ModuleList()
        for _ in range(2):
            modules = []
            for size in [inputs, *[width] * (layers - 1)]:
                modules += [nn.Linear(size, width), nn.LayerNorm(width), nn.LeakyReLU(inplace=True)]
            self.twins.append(nn.Sequential(*modules, nn.Linear(width, 1)))

    def forward(self, obs: Tensor, action: Tensor) -> list[Tensor]:
        """(batch, obs_dim), (batch, act_dim) -> two values (batch,)."""
        x = torch.cat([obs, action], 1)
        return [twin(x)[:, 0] for twin in self.twins]


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


def critic_loss(
    policy: Actor, critic: Critic, target: Critic, log_alpha: Tensor, batch: dict, gamma: float
) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, summed, and the mean of the first Q. Episodes end by their time limit only.

    batch: `obs`, `next_obs` (batch, obs_dim), `action` (batch, act_dim), `reward` (batch,).
    """
    with torch.no_grad():
        next_action, next_log_prob = policy.sample(batch["next_obs"])
        next_q = torch.min(*target(batch["next_obs"], next_action))
        y = batch["reward"] + gamma * (next_q - log_alpha.exp() * next_log_prob)
    values = critic(batch["obs"], batch["action"])
    return sum(F.mse_loss(q, y) for q in values), values[0].detach().mean()


def actor_loss(policy: Actor, critic: Critic, log_alpha: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of alpha log pi - Q over observations (batch, obs_dim), and the mean of log pi, 0-d."""
    action, log_prob = policy.sample(obs)
    return (log_alpha.detach().exp() * log_prob - torch.min(*critic(obs, action))).mean(), log_prob.detach().mean()


def distillation_loss(policy: Actor, obs: Tensor) -> Tensor:
    """KL(pi || N(0, 1)) before the squash: widens a later task's first actions, which frozen weights decide."""
    mean, std = policy(obs)
    return (0.5 * (mean.square() + std.square() - 1) - std.log()).sum(-1).mean()


# ----------------------------------------------------------------------------------------------------------- the agent


def shared_policy(args: Args, actor: Actor) -> SharedPolicy:
    """The actor as the network that SSDE's tasks share."""
    hidden = [f"hidden.{i}" for i in range(args.hidden_layers)]
    return SharedPolicy(actor, hidden, ["mean"], ["log_std"], args.beta, args.trainable_weight)


def lambdas(args: Args, task: int, tasks: int) -> tuple[float, float]:
    """Penalties over the global and over the task's own dictionary."""
    end = args.lambda_local if args.lambda_local_end is None else args.lambda_local_end
    return args.lambda_global, args.lambda_local + (end - args.lambda_local) * task / max(1, tasks - 1)


class Agent:
    """SAC whose policy is the present task's part of one network that all tasks share."""

    STATE = ("task", "actor", "shared", "distilled", "resets", "replay", "policy", "critic", "target", "log_alpha")
    STATE += ("actor_optimizer", "critic_optimizer", "alpha_optimizer", "dormant")

    def __init__(self, args: Args, embeddings: np.ndarray, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.embeddings, self.sizes, self.device = args, embeddings, (obs_dim, act_dim), device
        self.task, self.resets = -1, []  # the latest task; for each task the neurons reset so far, by hidden layer
        self.adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.actor = self.draw_actor()
        self.shared = shared_policy(args, self.actor) if args.method == "ssde" else None
        self.replay = ReplayBuffer(min(args.buffer_size, args.steps_per_task), obs_dim, act_dim, device)

    def draw_actor(self) -> Actor:
        args = self.args
        return Actor(*self.sizes, args.hidden_dim, args.hidden_layers, args.bounded_mean).to(self.device)

    def neurons(self, task: int) -> list[Tensor]:
        """`task_neurons`. Raises ArgumentError where a layer gets none."""
        args, penalties = self.args, lambdas(self.args, task, len(self.embeddings))
        try:
            widths = [args.hidden_dim] * args.hidden_layers
            return task_neurons(self.embeddings[task], task, widths, penalties, args.seed)
        except ValueError as error:
            raise cli.ArgumentError("--lambda-global {} --lambda-local {}: {}".format(*penalties, error)) from None

    def begin_task(self) -> None:
        """Give the next task its part of the network, and new critics, temperature and optimizers."""
        self.task, self.distilled = self.task + 1, 0
        if self.args.method == "scratch":
            self.actor = self.draw_actor()
        self.draw_learners(self.shared.begin_task(self.neurons(self.task)) if self.shared else self.actor)
        self.resets.append([0] * self.args.hidden_layers)
        if self.shared is None or self.task == 0 or self.args.distill_steps == 0:  # no distillation
            self.end_distillation()

    def draw_learners(self, policy: Actor) -> None:
        args, self.policy = self.args, policy
        self.critic = Critic(sum(self.sizes), args.critic_hidden_dim, args.hidden_layers).to(self.device)
        self.target = copy.deepcopy(self.critic)
        self.log_alpha = torch.zeros((), device=self.device, requires_grad=True)
        if args.compile:
            torch.compiler.reset()  # the last task's networks are gone
        self.critic_optimizer = self.adam(self.critic.parameters(), lr=args.critic_lr)
        self.alpha_optimizer = self.adam([self.log_alpha], lr=args.actor_lr)
        self.start_from_here()

    def start_from_here(self) -> None:
        """A fresh optimizer for the policy, whose present weights are those that resets go back to; new CUDA graphs."""
        args, self.losses = self.args, {}  # the latest ones, 0-d
        self.actor_optimizer = self.adam(self.policy.parameters(), lr=args.actor_lr)
        threshold = 0.0 if args.dormant_metric == "none" else args.dormant_threshold  # none: scores, no resets
        until = min(args.reset_until, args.steps_per_task)  # after a reset at the last step nothing would train
        schedule = (args.reset_every, until, threshold, args.dormant_metric)
        layers = [*self.policy.hidden, self.policy.mean]
        self.dormant = DormantResets(layers, self.actor_optimizer, *schedule) if self.shared else None
        self.critic_backward = with_gradients(critic_loss, self.critic_optimizer, args.compile)
        self.actor_backward = with_gradients(actor_loss, self.actor_optimizer, args.compile)
        self.distillation_backward = with_gradients(distillation_loss, self.actor_optimizer, False)
        captured = partial(Captured, device=self.device, graphs=args.cuda_graph)
        self.captured, self.captured_distillation = captured(self.learn), captured(self.learn_to_explore)
        self.explore = CapturedPolicy(lambda obs: self.policy.sample(obs[None])[0][0], self.device, args.cuda_graph)

    def distill(self) -> Tensor:
        """One step that brings exploration back, on the previous task's observations. Returns the loss, 0-d."""
        self.captured_distillation()
        self.distilled, loss = self.distilled + 1, self.losses["distillation"]
        if self.distilled == self.args.distill_steps:
            self.end_distillation()
        return loss

    def learn_to_explore(self) -> None:
        """The work of `distill`: a CUDA graph too."""
        loss = self.distillation_backward(self.policy, self.replay.sample(self.args.batch_size)["obs"])
        self.actor_optimizer.step()
        keep(self.losses, {"distillation": loss})

    def end_distillation(self) -> None:
        """The task's training begins, with an empty buffer. Where nothing is distilled, all steps count as done."""
        self.distilled = self.args.distill_steps
        self.start_from_here()
        self.replay.set_added(0)

    def end_task(self) -> None:
        """Write the policy back into what the tasks share. The buffer stays, for the next task's distillation."""
        if self.shared:
            self.shared.end_task(self.policy)

    def load(self, state: dict) -> None:
        """Go on from a checkpoint: first with what the tasks share, which gives the present task's policy its sizes."""
        for name in ("task", "actor", "shared"):
            setattr(self, name, restored(getattr(self, name), state[name], self.device))
        self.draw_learners(self.shared.cut(self.task) if self.shared else self.actor)
        restored(self, state, self.device)

    def policy_of(self, task: int) -> Actor:
        """The policy to evaluate on `task`: its own, or for a baseline and a task not begun yet the latest."""
        return self.shared.cut(task) if self.shared and task < self.task else self.policy

    def exploration_policy(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Who acts in a warm-up episode. None: random actions, in the first task and in those of `scratch`.

        For SSDE a uniformly drawn earlier task's policy (ClonEx-SAC), for `finetune` the one there is.
        """
        if self.task == 0 or self.args.method == "scratch":
            return None
        policy = self.policy_of(int(torch.randint(self.task, ()))) if self.shared else self.policy
        return partial(policy.act, explore=True)

    def update(self, logged: bool = False) -> None:
        """One SAC update; `losses` has the latest. logged: `.grad` will be read."""
        self.captured(eager=logged)

    def learn(self) -> None:
        """The work of an update: one CUDA graph (common/capture.py), so it changes tensors in place only.

        A `..._backward` leaves the loss's gradients in `.grad`, see `with_gradients`.
        """
        args, batch = self.args, self.replay.sample(self.args.batch_size)
        q_loss, q_mean = self.critic_backward(self.policy, self.critic, self.target, self.log_alpha, batch, args.gamma)
        self.critic_optimizer.step()
        policy_loss, log_prob = self.actor_backward(self.policy, self.critic, self.log_alpha, batch["obs"])
        self.actor_optimizer.step()
        alpha_loss = -self.log_alpha.exp() * (log_prob - self.sizes[1] / 2)  # target entropy -|A|/2 (authors)
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        with torch.no_grad():
            for target, value in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                target.lerp_(value, args.tau)
        values = {"critic": q_loss, "actor": policy_loss, "q": q_mean, "alpha": self.log_alpha.exp()}
        keep(self.losses, values | {"entropy": -log_prob})

    def reset_dormant(self) -> dict[str, Tensor | float]:
        """Score the hidden neurons and reset the dormant ones. Returns what to log."""
        scores = self.dormant.reset(self.policy, self.replay.recent(METRIC_BATCH)["obs"])
        resets, log = self.resets[-1], {}
        for i, (layer, score) in enumerate(zip(self.policy.hidden, scores, strict=True)):
            low = score < self.dormant.threshold  # which is 0 with --dormant-metric none
            resets[i] += int((low & layer.weight_gate.any(1)).sum())  # where all is frozen nothing is reset
            log |= {f"method/score/layer{i + 1}": score, f"method/resets/layer{i + 1}": resets[i]}
            log[f"method/dormant_share/layer{i + 1}"] = (score < self.args.dormant_threshold).float().mean()
        return log

    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of the actor and the first critic on recent transitions."""
        batch = self.replay.recent(METRIC_BATCH)
        obs_action = torch.cat([batch["obs"], batch["action"]], 1)
        networks = {"actor": (self.policy, (batch["obs"],)), "critic": (self.critic.twins[0], (obs_action,))}
        return metrics.plasticity(networks)

    def shares(self, task: int) -> tuple[list[float], list[float]]:
        """Per layer, the head last: trainable share of the task's weights; share of all weights that have an owner."""
        frozen = [self.shared.places(task, name)["weight"][2] for name in self.shared.layers]
        owned = [self.shared.owner[name] < NOBODY for name in self.shared.layers]
        return [1 - f.float().mean().item() for f in frozen], [o.float().mean().item() for o in owned]

    def allocation(self) -> dict:
        """For results.json: capacity used; mask overlap beside the similarity of the sentences; resets."""
        if self.shared is None:
            return {}
        trainable, used = zip(*(self.shares(task) for task in range(self.task + 1)), strict=True)
        report = {"used_capacity": used[-1], "trainable_shares": list(trainable), "resets": self.resets}
        report["sentence_cosine"] = (self.embeddings @ self.embeddings.T).tolist()
        return report | {"mask_overlap": metrics.overlap(self.shared.neurons)}

    def parameter_counts(self) -> dict[str, int | list[int]]:
        """Sizes of the actor at full size, of one critic, and of each task's policy."""
        policies = [self.policy_of(task) for task in range(self.task + 1)]
        counts = [sum(p.numel() for p in net.parameters()) for net in (self.actor, self.critic.twins[0], *policies)]
        return {"actor": counts[0], "critic": counts[1], "task_policies": counts[2:]}


# ------------------------------------------------------------------------------------------------------------ the run


@cli.loader
def tasks_begun(run_dir: str) -> int:
    """How many tasks a stored run has begun, the present one included."""
    return cli.load_run(run_dir, Args, "ssde")[1]["agent"]["task"] + 1


@cli.loader
def load_policy(run_dir: str, task: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The policy of a stored run on a task of its sequence: observation (39,) of any float type -> action (4,)."""
    args, checkpoint = cli.load_run(run_dir, Args, "ssde")
    state = checkpoint["agent"]
    cli.require_task(run_dir, task, state["task"] + 1)  # those that have begun
    (_, inputs), (outputs, _) = state["actor"]["hidden.0.weight"].shape, state["actor"]["mean.weight"].shape
    policy = Actor(inputs, outputs, args.hidden_dim, args.hidden_layers, args.bounded_mean)
    policy.load_state_dict(state["actor"])
    if args.method == "ssde":
        policy = restored(shared_policy(args, policy), state["shared"], torch.device("cpu")).cut(task)
        if task == state["task"]:  # perhaps in training still
            policy.load_state_dict(state["policy"])
    return policy.act


def refuse_empty_tasks(agent: Agent) -> None:
    """Refuse a lambda at which a later task gets no neuron: now, and not at that task's start.

    To encode every task takes minutes. This encodes those in doubt, where no atom's product with the sentence exceeds
    its lambda; one that it misses is refused at its start.
    """
    for task, embedding in enumerate(agent.embeddings):
        penalties = lambdas(agent.args, task, len(agent.embeddings))
        widths = [agent.args.hidden_dim] * agent.args.hidden_layers
        for pair in dictionaries(len(embedding), task, widths, agent.args.seed):
            if all((atoms @ embedding).max() <= penalty for atoms, penalty in zip(pair, penalties, strict=True)):
                agent.neurons(task)


def share_scalars(agent: Agent) -> dict[str, float]:
    """What the present task got of each layer, and what earlier tasks own of it, as points of TensorBoard."""
    if not agent.shared:
        return {}
    names, scalars = [*(f"layer{i + 1}" for i in range(agent.args.hidden_layers)), "head"], {}
    for group, shares in zip(("trainable", "used"), agent.shares(agent.task), strict=True):
        scalars |= {f"sparsity/{group}/{name}": share for name, share in zip(names, shares, strict=True)}
    return scalars


def announce(agent: Agent, recorder: Recorder) -> None:
    """Say what a task has got; warn where little is left to train, or of a reset that never comes."""
    args, scalars = agent.args, share_scalars(agent)
    trainable = {name.rpartition("/")[2]: share for name, share in scalars.items() if "/trainable/" in name}
    shown = ", ".join(f"{name} {share:.0%}" for name, share in trainable.items())
    widths = [len(indices) for indices in agent.shared.neurons[agent.task]]
    recorder.say(f"task {agent.task} {recorder.tasks[agent.task]}: neurons {widths}; trainable {shown}")
    # these two freeze whole neurons, as all inputs and all outputs count as used
    if min(trainable["layer1"], trainable["head"]) < 0.05:
        recorder.say("warning: less than 5 % of the first layer or the head is trainable; raise lambda or the width")
    first_reset = (args.learning_starts // args.reset_every + 1) * args.reset_every
    if first_reset >= min(args.reset_until, args.steps_per_task) and args.dormant_metric != "none":
        recorder.say(f"warning: no dormant reset: --reset-every {args.reset_every} --reset-until {args.reset_until}")


@recorded
def main(args: Args) -> dict:
    """Train on the sequence; returns what results.json holds, or with --evaluate the result of each task."""
    args, checkpoint, device = cli.prepare(args, "ssde", PRESETS)
    tasks, steps = task_sequence(args.task_seq, reward_version=args.reward_version), args.steps_per_task
    require(args, "learning_starts", args.learning_starts < steps, f"below --steps-per-task {steps}")
    make_task = partial(make_env, reward_version=args.reward_version)
    if args.evaluate:
        indices, stored_policy = range(tasks_begun(args.evaluate)), partial(load_policy, args.evaluate)
        return evaluate_stored(args, tasks, indices, stored_policy, make_task, EVAL_GOALS)
    at = {"task": 0, "step": 0, "episode": 0, "embeddings": None, "reference": None}
    if checkpoint:
        at = restored(at, checkpoint["at"], torch.device("cpu"))
    else:  # where the run is, and what comes from files, which may have changed or gone on resume
        sentences, reference = task_sentences(tasks, args.task_descriptions), reference_auc(args.reference, args, tasks)
        embeddings = torch.from_numpy(encode_tasks(sentences, args.task_encoder))
        at |= {"embeddings": embeddings, "reference": reference}
    with cli.Memory(device, args.batch_size):
        agent = Agent(args, at["embeddings"].numpy(), *env_sizes(tasks[0], args), device)
        if checkpoint:
            agent.load(checkpoint.pop("agent"))  # pop: the buffer's second copy is not kept
        else:
            if args.method == "ssde":
                refuse_empty_tasks(agent)
            agent.begin_task()
    reward_scale = args.reward_scale or {"v1": 1 / 200, "v2": 1.0}[args.reward_version]
    phases = [(steps, args.learning_starts)] * len(tasks)
    recorder = Recorder(args, "ssde", args.task_seq, tasks, phases, checkpoint)
    if not checkpoint:
        recorder.log(0, share_scalars(agent))  # the first checkpoint holds them
    recorder.begin(agent, at, checkpoint, agent.parameter_counts())

    for task in range(at["task"], len(tasks)):
        start, step, episode = task * steps, at["step"], at["episode"]  # of the run; of the task
        if step == 0 and agent.shared:
            announce(agent, recorder)
        env = make_task(tasks[task], seed=0)  # each episode has a seed of its own
        while agent.distilled < args.distill_steps and not recorder.stopped:
            loss = agent.distill()
            if agent.distilled % LOG_EVERY == 0 or agent.distilled == args.distill_steps:
                recorder.require_finite("distillation loss", loss, start)
                recorder.progress(start, task=tasks[task], distilled=agent.distilled)

        while True:  # once per episode
            at |= {"task": task, "step": step, "episode": episode}
            if recorder.evaluation_due(start + step, start, ended=step == steps):
                recorder.require_finite_weights(agent, start + step)
                seen = range(len(tasks) if args.eval_all else task + 1)
                if recorder.evaluate(start + step, task, seen, lambda i: agent.policy_of(i).act, make_task, EVAL_GOALS):
                    recorder.log(start + step, agent.plasticity())
            if recorder.checkpoint_due(start + step):
                recorder.save(start + step, agent, at)
            recorder.leave()
            if step == steps:
                break

            obs, _ = env.reset(seed=seed_of(args.seed, TRAIN_GOALS, task, episode))
            explore = agent.exploration_policy() if step < args.learning_starts else agent.explore
            truncated, episode_return, success, episode_start = False, 0.0, 0.0, step
            while not truncated and step < steps:
                action = 2 * torch.rand(agent.sizes[1]).numpy() - 1 if explore is None else explore(obs)
                recorder.require_finite("action", action, start + step)
                next_obs, reward, _, truncated, info = env.step(action)
                agent.replay.add(obs=obs, next_obs=next_obs, action=action, reward=reward * reward_scale)
                obs, episode_return, success = next_obs, episode_return + reward, max(success, info["success"])
                step += 1
                if step > args.learning_starts:
                    agent.update(logged=step % LOG_EVERY == 0)
                    if agent.dormant and agent.dormant.due(step):
                        recorder.log(start + step, agent.reset_dormant())
                    if step % LOG_EVERY == 0:
                        recorder.losses(start + step, agent.losses)
                        recorder.log(start + step, metrics.grad_norms(actor=agent.policy, critic=agent.critic.twins[0]))
            episode, length = episode + 1, step - episode_start
            recorder.episode(start + step, tasks[task], truncated, episode_return, length, success)

        env.close()
        agent.end_task()
        if task + 1 < len(tasks):
            agent.begin_task()
            recorder.log(start + step, share_scalars(agent))
        at |= {"task": task + 1, "step": 0, "episode": 0}
        recorder.save(start + step, agent, at)

    report = metrics.continual_report(recorder.rows, tasks, at["reference"]) | agent.allocation()
    return recorder.finish(len(tasks) * steps, report, agent.parameter_counts())


if __name__ == "__main__":
    cli.run(main, Args, PRESETS)
