"""Evaluation, plasticity and continual-learning metrics: plain functions without state, to be used by copy.

Conventions
-----------
* Features are what the layers after a hidden layer read: one (batch, units) tensor per hidden layer, as
  `hidden_features` returns them from any network.
* `active` holds one boolean (units,) mask per layer; units outside it count neither as units nor in a layer's mean.
* What is computed from tensors is returned as a tensor on the same device (0-d for a single number); `.item()`, which
  waits for a GPU, is left to the caller. NaN or infinity in the features gives NaN, never a plausible number.
* Evaluation and continual-learning metrics return Python floats and numpy arrays.

Aggregation over seeds (interquartile mean, bootstrap intervals) is rliable's: see common/plot.py.
"""

from collections.abc import Callable, Sequence

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from common.envs import seed_of

DORMANT_TAUS = {"dormant_ratio_0": 0.0, "dormant_ratio_0.025": 0.025, "dormant_ratio_0.1": 0.1}

# ------------------------------------------------------------------------------------------------ hidden features


def hidden_features(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Activations of all hidden layers during one forward pass `module(*inputs)`, in the order of the calls.

    A hidden layer's activation is what the next layer reads: so any activation will do, in any form. They are caught at
    the inputs of every layer but the first. What two heads or twins read in common counts once; the network's own input
    does not count. A layer is a module with a `weight` parameter of two or more dimensions. Its forward hooks must run:
    give the plain module, not what `torch.compile` returns. Two limits: inputs are joined or scaled once for all
    branches, else they count as features; and what a layer has read must not be changed in place.

    Returns a list of (samples, units) tensors without gradient. A convolution's input (batch, channels, height, width)
    gives a row per place and a unit per channel. The input (k, batch, units) of a layer with a weight per expert,
    (k, ...), gives k * units units. Raises ValueError where no hidden layer ran.
    """
    read, features = list(inputs), []

    def catch(layer: nn.Module, arguments: tuple) -> None:
        x, first = arguments[0], len(read) == len(inputs)  # the first layer may read the inputs joined: no feature
        if not first and not any(same_memory(x, other) for other in read):
            features.append(units_last(layer, x))
        read.append(x)

    layers = [layer for layer in module.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) > 1]
    hooks = [layer.register_forward_pre_hook(catch) for layer in layers]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not features:
        raise ValueError(f"no hidden layer ran in {type(module).__name__}: there is nothing to measure")
    return features


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place, perhaps in another shape."""
    return x.data_ptr() == y.data_ptr() and x.numel() == y.numel()


def units_last(layer: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as (samples, units)."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return x.movedim(1, -1).flatten(0, -2)
    if x.ndim == 3 and layer.weight.ndim == 3:  # an expert each
        return x.transpose(0, 1).flatten(1)
    return x.flatten(0, -2)


def _layers_and_masks(features: list[Tensor], active: list[Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (batch, units) features and boolean (units,) mask, checked; without `active` every unit counts."""
    if active is None:
        active = [torch.ones(h.shape[-1:], dtype=torch.bool, device=h.device) for h in features]
    if not features:
        raise ValueError("need the features of at least one layer")
    layers = list(zip(features, active, strict=True))
    for h, mask in layers:
        if h.ndim != 2 or mask.shape != h.shape[1:] or mask.dtype != torch.bool:
            raise ValueError(
                "need (batch, units) features and boolean (units,) masks: "
                f"got {tuple(h.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
    return layers


# ------------------------------------------------------------------------------------------------------ plasticity


def dormant_ratio(features: list[Tensor], tau: float = 0.0, active: list[Tensor] | None = None) -> Tensor:
    """Share of tau-dormant units over all hidden layers together (Sokar et al. 2023, ReDo, Eq. 1).

    s_i = E_x|h_i(x)| / mean_k E_x|h_k(x)| within a layer; unit i is dormant iff s_i <= tau; the ratio is the sum of the
    layers' dormant counts over the sum of their widths. In a layer that is zero everywhere all units are dormant.

    features: (batch, units) per layer, active: boolean (units,) per layer. Returns a 0-d tensor.
    Raises ValueError for tau < 0 or shapes that do not fit.
    """
    if tau < 0:
        raise ValueError(f"tau must be >= 0, got {tau}")
    dormant, units, finite = [], [], []
    for h, mask in _layers_and_masks(features, active):
        magnitude = torch.where(mask, h.abs().mean(0), 0)
        layer_mean = magnitude.sum() / mask.sum()
        # s_i <= tau multiplied by the layer mean: the same for live layers, and no 0 / 0 in a dead one.
        dormant.append(((magnitude <= tau * layer_mean) & mask).sum())
        units.append(mask.sum())
        finite.append(magnitude.isfinite().all())
    return torch.where(torch.stack(finite).all(), sum(dormant) / sum(units), torch.nan)


def active_fraction(features: list[Tensor], active: list[Tensor] | None = None) -> Tensor:
    """Fraction of active units (FAU): share of (sample, unit) entries with h > 0, over all hidden layers together.

    Ma et al. 2024 ("Revisiting plasticity in visual RL"); the measure that Neuroplastic Expansion reports.
    features: (batch, units) per layer, active: boolean (units,) per layer. Returns a 0-d tensor.
    Raises ValueError for shapes that do not fit.
    """
    positive, entries, finite = [], [], []
    for h, mask in _layers_and_masks(features, active):
        positive.append(((h > 0) & mask).sum())
        entries.append(mask.sum() * len(h))
        finite.append((h.isfinite() | ~mask).all())
    return torch.where(torch.stack(finite).all(), sum(positive) / sum(entries), torch.nan)


def singular_values(features: Tensor) -> Tensor:
    """Singular values of (batch, units) features, descending: what the three ranks take. NaN if an entry is not finite.

    Raises ValueError for features that are empty or not a matrix.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"need non-empty (batch, units) features, got {tuple(features.shape)}")
    # LAPACK raises on NaN and cuSOLVER may not come back: decompose zeros in its place and put NaN into the result.
    finite = features.isfinite().all()
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite, features, 0)), torch.nan)


def srank(sigma: Tensor, delta: float = 0.01) -> Tensor:
    """Effective rank srank_delta of features with these singular values (Kumar et al. 2020, under-parameterization).

    Smallest k with sum_{i<=k} sigma_i / sum_i sigma_i >= 1 - delta; 0 for features that are zero everywhere.
    Returns a 0-d tensor. Raises ValueError for delta outside [0, 1).
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must lie in [0, 1), got {delta}")
    cumulative = sigma.cumsum(0)
    total = cumulative[-1]
    rank = (cumulative < (1 - delta) * total).sum() + 1
    return torch.where(total > 0, rank, total)  # total is 0 for dead and NaN for invalid features


def effective_rank(sigma: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values, p = sigma / sum sigma (Roy & Vetterli 2007).

    Between 1 and min(batch, units); 0 for features that are zero. sigma: singular values, descending -> 0-d tensor.
    """
    total = sigma.sum()
    return torch.where(total > 0, torch.special.entr(sigma / total).sum().exp(), total)


def stable_rank(sigma: Tensor) -> Tensor:
    """||H||_F^2 / ||H||_2^2 = sum sigma_i^2 / sigma_1^2 (Rudelson & Vershynin 2007). Some toolboxes call this srank.

    Between 1 and min(batch, units); 0 for features that are zero. sigma: singular values, descending -> 0-d tensor.
    """
    # Dividing before squaring keeps small features out of the underflow.
    return torch.where(sigma[0] > 0, (sigma / sigma[0]).square().sum(), sigma[0])


def weight_norm(module: nn.Module) -> Tensor:
    """L2 norm of all parameters of a module taken as one vector: sqrt(sum_p ||p||^2). Returns a 0-d tensor."""
    return nn.utils.get_total_norm(module.parameters())


def grad_norm(module: nn.Module) -> Tensor:
    """L2 norm of the gradients of all parameters as one vector, 0-d tensor; NaN before there is any gradient.

    A single parameter without a gradient counts 0.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else torch.tensor(float("nan"))


def plasticity(
    networks: dict[str, tuple[nn.Module, tuple[Tensor, ...]]], active: dict[str, list[Tensor]] | None = None
) -> dict[str, Tensor]:
    """Metrics of each network on its inputs, as {"plasticity/<network>/<metric>": 0-d tensor}.

    One forward pass gives the dormant ratio at each of `DORMANT_TAUS`, the active fraction and the ranks of the last
    hidden layer; the norm of the weights comes with them. active: by network, see the conventions above.
    """
    scalars = {}
    for name, (module, inputs) in networks.items():
        features, masks = hidden_features(module, inputs), (active or {}).get(name)
        measured = {metric: dormant_ratio(features, tau, masks) for metric, tau in DORMANT_TAUS.items()}
        measured |= {"active_fraction": active_fraction(features, masks), "weight_norm": weight_norm(module)}
        sigma = singular_values(features[-1])
        measured |= {rank.__name__: rank(sigma) for rank in (srank, effective_rank, stable_rank)}
        scalars |= {f"plasticity/{name}/{metric}": value for metric, value in measured.items()}
    return scalars


def grad_norms(**modules: nn.Module) -> dict[str, Tensor]:
    """`grad_norm` of each module, as {"plasticity/<network>/grad_norm": 0-d tensor}."""
    return {f"plasticity/{name}/grad_norm": grad_norm(module) for name, module in modules.items()}


def gradient_cosine(gradients: Tensor) -> Tensor:
    """Mean cosine similarity between the gradients of all pairs of tasks; negative means conflict (Yu et al. 2020).

    gradients: (tasks, parameters), one flattened gradient per task. A gradient of zero has cosine 0 with every other.
    Returns a 0-d tensor. Raises ValueError for fewer than two tasks.
    """
    if gradients.ndim != 2 or len(gradients) < 2:
        raise ValueError(f"need (tasks, parameters) with at least two tasks, got {tuple(gradients.shape)}")
    tasks = len(gradients)
    direction = nn.functional.normalize(gradients, dim=1)
    cosine = direction @ direction.T
    return (cosine.sum() - cosine.trace()) / (tasks * (tasks - 1))


def fisher_trace(
    log_prob: Callable[..., Tensor], parameters: dict[str, Tensor], samples: tuple[Tensor, ...], chunk_size: int = 32
) -> Tensor:
    """Trace of a policy's Fisher information matrix, E ||grad_theta log pi(a|s)||^2 with a ~ pi(.|s).

    log_prob(parameters, *sample) -> scalar for one sample (no batch dimension), differentiable in `parameters`;
    parameters: e.g. dict(actor.named_parameters()); samples: (batch, ...) tensors, e.g. (observations, actions) with
    actions drawn from the present policy (replayed actions give another quantity). For a Gaussian actor:

        def log_prob(parameters, observation, action):  # action before the tanh, whose Jacobian has no parameters
            mean, log_std = torch.func.functional_call(actor, parameters, (observation[None],))
            return Normal(mean, log_std.exp(), validate_args=False).log_prob(action).sum()  # vmap cannot validate

    Per-sample gradients exist for `chunk_size` samples at a time (memory: chunk_size copies of the parameters).
    Returns a 0-d tensor. Raises ValueError for an empty batch.
    """
    if len(samples[0]) == 0:
        raise ValueError("the Fisher trace of an empty batch is not defined")
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}

    def squared_norm(*sample: Tensor) -> Tensor:
        gradient = torch.func.grad(log_prob)(parameters, *sample)
        return sum(g.square().sum() for g in gradient.values())

    return torch.func.vmap(squared_norm, chunk_size=chunk_size)(*samples).mean()


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    policy: Callable[[np.ndarray], np.ndarray],
    env: gym.Env,
    episodes: int,
    seed: int | Sequence[int],
    stop: Callable[[], bool] | None = None,
) -> dict[str, float | None] | None:
    """Means over `episodes` episodes: {"episode_return", "success", "length"}.

    policy: one float32 observation (obs_dim,) -> action (act_dim,), deterministic if evaluations are to be comparable.
    seed: an int or a sequence, e.g. (run seed, task index). Episode n is reset with a seed made of (*seed, n) only: it
    has the same goal at every evaluation, whenever and however often one evaluates. Use `env` for nothing else, or
    training would inherit these resets.
    success: share of episodes in which any step had info["success"] > 0; None if the environment never reports one.
    stop: asked before every step; once it returns True (a signal arrived) the result is None.
    Raises ValueError for episodes < 1.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    returns, lengths, successes, reports_success = [], [], [], False
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed_of(*np.atleast_1d(seed), episode))
        episode_return, length, success, done = 0.0, 0, False, False
        while not done:
            if stop is not None and stop():
                return None
            action = policy(np.asarray(observation, dtype=np.float32))
            observation, reward, terminated, truncated, info = env.step(action)
            episode_return += float(reward)
            length += 1
            reports_success |= "success" in info
            success |= bool(info.get("success", 0) > 0)
            done = terminated or truncated
        returns.append(episode_return)
        lengths.append(length)
        successes.append(success)
    return {
        "episode_return": float(np.mean(returns)),
        "success": float(np.mean(successes)) if reports_success else None,
        "length": float(np.mean(lengths)),
    }


# ----------------------------------------------------------------------------------------------- continual learning
#
# success: S[e, i] in [0, 1], evaluations e in time order, one column i per *phase*: a task that comes twice in the
# sequence (CW20) has two columns. A task not yet evaluated counts 0.
# phase_of_evaluation: (evaluations,), the phase of each; an evaluation at a task border belongs to the phase that ends.
# Source: Wolczyk et al. 2021, Continual World, arXiv 2105.10919, and its code.


def success_matrix(rows: list[dict], tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Success array and phase of each evaluation from the rows of evaluations.csv.

    rows: dicts with numbers under global_step, phase, task_index and success.
    -> S (evaluations, tasks), 0 where a task was not evaluated, and phases (evaluations,), in time order.
    """
    steps = sorted({row["global_step"] for row in rows})
    success, phases = np.zeros((len(steps), tasks)), np.zeros(len(steps), dtype=int)
    for row in rows:
        evaluation = steps.index(row["global_step"])
        success[evaluation, row["task_index"]] = row["success"]
        phases[evaluation] = row["phase"]
    return success, phases


def performance_cw(success: np.ndarray, window: int = 5) -> tuple[float, np.ndarray]:
    """Final performance P = mean_i P_i, P_i = mean of S[e, i] over the last `window` evaluations of the run.

    These should all be of the last phase: in an earlier one the tasks that come later count 0.
    `window=1` is the plain success at the end of the run. Returns P and the (tasks,) array of P_i.
    Raises ValueError for window < 1, NaN, or a wrong shape.
    """
    per_task = _last_mean(_checked(success), window)
    return float(per_task.mean()), per_task


def forgetting_cw(success: np.ndarray, phase_of_evaluation: np.ndarray, window: int = 5) -> tuple[float, np.ndarray]:
    """Forgetting F = mean_i F_i, F_i = (mean of the last `window` evaluations of phase i) - P_i. Not clipped at 0.

    A phase with fewer evaluations uses all it has; the last phase is part of the mean, as in Continual World. A method
    whose old policies never change still has F < 0, since success rises inside a phase's window; `window=1` (the
    evaluation at the phase's end minus the run's last) is exactly 0 then. Returns F and the (tasks,) array of F_i.
    Raises ValueError for window < 1, NaN, wrong shapes, or a phase without evaluation.
    """
    at_phase_end = np.array([_last_mean(curve, window) for curve in _phase_curves(success, phase_of_evaluation)])
    per_task = at_phase_end - performance_cw(success, window)[1]
    return float(per_task.mean()), per_task


def auc_cw(success: np.ndarray, phase_of_evaluation: np.ndarray) -> np.ndarray:
    """Area under each task's learning curve: AUC_i = mean of S[e, i] over the evaluations of phase i; (tasks,) array.

    Of a run that learns every task from scratch it is the `reference` of `forward_transfer_cw`.
    Raises ValueError for NaN, wrong shapes, or a phase without evaluation.
    """
    return np.array([curve.mean() for curve in _phase_curves(success, phase_of_evaluation)])


def forward_transfer_cw(
    success: np.ndarray, phase_of_evaluation: np.ndarray, reference: np.ndarray
) -> tuple[float, np.ndarray]:
    """Forward transfer FT = mean_i FT_i, FT_i = (AUC_i - AUC_i^ref) / (1 - AUC_i^ref).

    reference: (tasks,) AUC_i^ref of training from scratch (`auc_cw` of such runs, averaged over seeds), in the order of
    `success`. Where it is 1 nothing can be gained: FT_i is NaN and left out of FT (NaN if no task remains).
    Returns FT and the (tasks,) array of FT_i.
    Raises ValueError for NaN, wrong shapes, a phase without evaluation, or a reference outside [0, 1].
    """
    auc = auc_cw(success, phase_of_evaluation)
    reference = np.asarray(reference, dtype=np.float64)
    if reference.shape != auc.shape or not ((reference >= 0) & (reference <= 1)).all():
        raise ValueError(f"reference must hold {len(auc)} values in [0, 1], got {reference}")
    headroom = np.where(reference < 1, 1 - reference, np.nan)
    per_task = (auc - reference) / headroom
    defined = per_task[reference < 1]
    return float(defined.mean()) if len(defined) else float("nan"), per_task


def _checked(success: np.ndarray) -> np.ndarray:
    success = np.asarray(success, dtype=np.float64)
    if success.ndim != 2 or success.size == 0 or not np.isfinite(success).all():
        raise ValueError(
            "success must be a finite, non-empty (evaluations, tasks) array (0 where a task was not evaluated yet): "
            f"got shape {success.shape} with {int((~np.isfinite(success)).sum())} entries that are not finite"
        )
    return success


def _last_mean(evaluations: np.ndarray, window: int) -> np.ndarray:
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return evaluations[-window:].mean(axis=0)


def _phase_curves(success: np.ndarray, phase_of_evaluation: np.ndarray) -> list[np.ndarray]:
    """For each task i its success at the evaluations of phase i, in time order."""
    success, phase = _checked(success), np.asarray(phase_of_evaluation)
    tasks = success.shape[1]
    if phase.shape != (len(success),) or not np.array_equal(np.unique(phase), np.arange(tasks)):
        raise ValueError(
            f"need a phase for each of the {len(success)} evaluations and each of 0..{tasks - 1} at least once: "
            f"got {phase.tolist()}"
        )
    if (np.diff(phase) < 0).any():
        raise ValueError(f"phases must not decrease (phases count visits, not tasks): got {phase.tolist()}")
    return [success[phase == i, i] for i in range(tasks)]


def continual_report(rows: list[dict], tasks: list[str], reference: dict[str, float] | None) -> dict:
    """Final success, forgetting and Continual World's P, F, FT from the evaluations of a run.

    `final_success` and `forgetting` compare single evaluations on the same goals: at the end of a task's phase and at
    the end of the run. Continual World's P and F average five evaluations, or those of the last phase if these are
    fewer. reference: AUC^ref by task, for FT.
    """
    # --eval-all has rows of tasks that were not trained yet: left out, so that they count 0 as without it
    success, phases = success_matrix([row for row in rows if row["task_index"] <= row["phase"]], len(tasks))
    at_phase_end = np.array([success[phases == i][-1, i] for i in range(len(tasks))])
    window = min(5, int((phases == len(tasks) - 1).sum()))
    report = {
        "final_success": success[-1].mean(),
        "forgetting": (at_phase_end - success[-1]).mean(),
        "performance_cw": performance_cw(success, window)[0],
        "forgetting_cw": forgetting_cw(success, phases, window)[0],
        "success_at_phase_end": at_phase_end.tolist(),
        "success_at_run_end": success[-1].tolist(),
        "auc": auc_cw(success, phases).tolist(),
    }
    if reference is None:
        report["forward_transfer_cw"] = "needs --reference"
    elif all(reference[task] == 1 for task in tasks):
        report["forward_transfer_cw"] = "undefined: the reference is perfect"
    else:
        auc = np.array([reference[task] for task in tasks])
        report["forward_transfer_cw"] = forward_transfer_cw(success, phases, auc)[0]
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in report.items()}


def overlap(neurons: list[list[Tensor]]) -> list[list[float]]:
    """Intersection over union of the neurons that tasks use, layers together. neurons[task][layer]: indices."""
    used = [{(layer, i) for layer, indices in enumerate(task) for i in indices.tolist()} for task in neurons]
    return [[len(one & two) / len(one | two) for two in used] for one in used]


def cycling_report(success: np.ndarray) -> dict[str, float]:
    """ASR, FM and FWT of S[p, i], success on task i after phase p, where phase p trains task p mod n.

    NBSP's paper names the three measures without formulas. These are our reading, chosen so that its numbers make sense
    (FM below 0.2 and FWT above 0.95 with an ASR of 0.9):

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
