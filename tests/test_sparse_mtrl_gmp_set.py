"""GMP, SET and the networks of multi-task SAC against literal formulas, and their promises on real training runs."""

import copy
import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

import sparse_mtrl_gmp_set as script
from common import cli, envs, metrics
from common.cli import Interrupted, NotFiniteError, load_checkpoint, parse_args
from common.recorder import Recorder
from sparse_mtrl_gmp_set import Actor, Agent, Args, MultiTaskNetwork, ReplayBuffer

ROOT = Path(__file__).parent.parent
OBS_DIM, ACT_DIM, CPU = 39, 4, torch.device("cpu")
# Three real tasks in seconds: four prunings, two evaluations. SHORT is half of it.
TINY = {
    "benchmark": "reach,drawer-close,push",
    "total_steps": 900,
    "episode_steps": 50,
    "learning_starts": 300,
    "eval_every": 450,
    "eval_episodes": 1,
    "arch": "moore",
    "experts": 2,
    "hidden_dim": 12,
    "hidden_layers": 2,
    "batch_per_task": 8,
    "sparsify_critic": True,
    "prune_every": 50,
    "evolve_every": 50,
    "checkpoint_every": 150,
    "quiet": True,
}
# trunks of 12 units lose whole layers to the global ranking
pytestmark = pytest.mark.filterwarnings("ignore:GMP left a layer without connections")
ARCHITECTURES = ("shared", "moe", "moore")


def make_agent(**changes) -> Agent:
    """An agent on three tasks whose buffer is filled with random transitions."""
    args = Args(**(TINY | changes))
    torch.manual_seed(0)
    agent = Agent(args, 3, OBS_DIM, ACT_DIM, CPU)
    rng = np.random.default_rng(0)
    for _ in range(40):
        obs, next_obs = rng.standard_normal((2, 3, OBS_DIM)).astype(np.float32)
        action = rng.uniform(-1, 1, (3, ACT_DIM)).astype(np.float32)
        reward = rng.standard_normal(3).astype(np.float32)
        agent.replay.add(obs=obs, next_obs=next_obs, action=action, reward=reward)
    return agent


def large_heads(network: MultiTaskNetwork) -> MultiTaskNetwork:
    """Heads and biases that are not near zero, so that errors in them show."""
    for parameter in (*network.heads.parameters(), *(layer.bias for layer in network.layers)):
        torch.nn.init.normal_(parameter)
    return network


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> list[torch.Tensor]:
    return [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]


def sparse_layers(agent: Agent):
    """(weight, mask, optimizer) of every layer that is sparsified."""
    for sparse in agent.sparse.values():
        for weight, mask in zip(sparse.weights, sparse.masks, strict=True):
            yield weight, mask, sparse.optimizer


def train(agent: Agent, updates: int):
    """Updates with all that comes after and before them; yields what there is to log."""
    for _ in range(updates):
        agent.update()
        yield agent.after_update() | agent.before_update()


# -------------------------------------------------------------------------------------------------------- networks


def literal_output(network: MultiTaskNetwork, x: torch.Tensor, task: int) -> torch.Tensor:
    """The network's output for one sample of one task, with a loop over experts: x (inputs,) -> (outputs,)."""
    if network.arch == "shared":
        x = torch.cat([x, F.one_hot(torch.tensor(task), len(network.heads.weight)).to(x)])
    outputs = []
    for expert in range(network.experts):
        h = x
        for i, (layer, norm) in enumerate(
            zip(network.layers, [*network.norms, None][: len(network.layers)], strict=True)
        ):
            h = h @ layer.weight[expert] + layer.bias[expert, 0]
            if i < len(network.norms):
                if isinstance(norm, script.ExpertNorm):
                    h = F.layer_norm(h, h.shape) * norm.gain[expert, 0] + norm.shift[expert, 0]
                h = h.clamp_min(0)
        outputs.append(h)
    if network.arch == "moore":
        q, r = torch.linalg.qr(torch.stack(outputs, 1))
        outputs = (q * r.diagonal().sign()).unbind(1)
    if network.arch == "shared":
        features = outputs[0]
    else:
        features = torch.tanh(sum(w * h for w, h in zip(network.mixing[task], outputs, strict=True)))
    return features @ network.heads.weight[task] + network.heads.bias[task, 0]


@pytest.mark.parametrize("intervention", ["none", "layernorm"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batched_experts_and_heads_equal_loops_over_tasks_experts_and_samples(arch, intervention):
    torch.manual_seed(1)
    args = Args(**(TINY | {"arch": arch, "hidden_layers": 3, "experts": 3, "intervention": intervention}))
    network = large_heads(MultiTaskNetwork(args, 3, OBS_DIM, 2, 0.1)).double()
    for norm in network.norms:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    x = torch.randn(3, 5, OBS_DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([torch.stack([literal_output(network, s, t) for s in x[t]]) for t in range(3)])
        torch.testing.assert_close(network(x), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(network(x[1:2], slice(1, 2)), expected[1:2], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_head_gets_gradient_from_the_samples_of_its_own_task_only(arch):
    actor = Actor(Args(**(TINY | {"arch": arch})), 3, OBS_DIM, ACT_DIM)
    actor(torch.randn(3, 4, OBS_DIM))[1].square().sum().backward()
    for parameter in actor.heads.parameters():
        assert (parameter.grad[[0, 2]] == 0).all() and (parameter.grad[1] != 0).any()
    if arch != "shared":
        assert (actor.mixing.grad[[0, 2]] == 0).all() and (actor.mixing.grad[1] != 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 5), parallel=st.sampled_from([0.0, 0.9, 0.9999]))
def test_gram_schmidt_is_orthonormal_per_sample_and_keeps_the_spans(seed, k, parallel):
    generator = torch.Generator().manual_seed(seed)
    common, own = torch.randn(1, 6, 64, generator=generator), torch.randn(k, 6, 64, generator=generator)
    vectors = math.sqrt(parallel) * common + math.sqrt(1 - parallel) * own
    basis = torch.stack(script.gram_schmidt(vectors.unbind()), 1)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(k).expand(6, k, k), atol=2e-6, rtol=0)
    q, r = torch.linalg.qr(vectors.double().permute(1, 2, 0))  # unique up to the signs of R's diagonal
    expected = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).mT
    torch.testing.assert_close(basis.double(), expected, atol=1e-3, rtol=0)


def test_gram_schmidt_gives_zero_and_no_gradient_for_a_zero_or_dependent_vector():
    vectors = torch.randn(5, 300, 40)
    vectors[1], vectors[2], vectors[4] = 0, vectors[0], 0.3 * vectors[0] - 2 * vectors[3]
    vectors.requires_grad_()
    basis = torch.stack(script.gram_schmidt(vectors.unbind()))
    (basis * torch.randn_like(basis)).sum().backward()
    norms = basis.detach().norm(dim=-1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0, 0, 1, 0])[:, None].expand(5, 300), atol=1e-5, rtol=0)
    assert (basis[0] * basis[3]).sum(-1).abs().max() < 1e-6
    gradients = vectors.grad.norm(dim=-1)
    assert (gradients[[1, 2, 4]] == 0).all() and (gradients[[0, 3]] > 0).all() and gradients.max() < 10


def test_moore_with_one_expert_is_the_shared_trunk_up_to_normalisation():
    options = TINY | {"experts": 1, "hidden_layers": 3}
    moore = large_heads(Actor(Args(**(options | {"arch": "moore"})), 3, OBS_DIM, ACT_DIM))
    shared = Actor(Args(**(options | {"arch": "shared"})), 3, OBS_DIM, ACT_DIM)
    with torch.no_grad():
        for mine, other in zip(shared.layers, moore.layers, strict=True):
            mine.weight.zero_()[:, : other.weight.shape[1]] = other.weight  # nothing comes from the one-hot
            mine.bias.copy_(other.bias)
        x = torch.randn(3, 5, OBS_DIM)
        seen = []
        shared.layers[-1].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.clone()))
        shared(x)
        direction = F.normalize(seen[0].view(3, 5, -1), dim=-1)
        features = torch.tanh(moore.mixing[:, :, None] * direction)
        expected = torch.baddbmm(moore.heads.bias, features, moore.heads.weight)
        torch.testing.assert_close(moore(x), expected, atol=1e-5, rtol=1e-5)


def test_log_probability_is_that_of_the_squashed_gaussian():
    actor = large_heads(Actor(Args(**TINY), 3, OBS_DIM, ACT_DIM))
    obs = torch.randn(3, 16, OBS_DIM)
    mean, log_std = actor(obs).chunk(2, -1)
    std = log_std.clamp(-20, 2).exp()
    torch.manual_seed(3)
    action, log_prob = actor.sample(obs)
    torch.manual_seed(3)
    u = (mean + std * torch.randn_like(mean)).double()
    squash = torch.distributions.TanhTransform(cache_size=1)
    torch.testing.assert_close(action, u.tanh().float())
    normal = torch.distributions.Normal(mean.double(), std.double())
    expected = (normal.log_prob(u) - squash.log_abs_det_jacobian(u, u.tanh())).sum(-1)
    torch.testing.assert_close(log_prob.double(), expected, atol=1e-3, rtol=1e-3)


def test_hidden_layers_begin_he_uniform():
    weight, bound = script.ExpertLinear(2, 50, 400).weight, math.sqrt(6 / 50)
    assert 0.99 * bound < weight.abs().max() <= bound


# ------------------------------------------------------------------------------------------------------------- GMP


def literal_cubic(t: float, t0: float, t1: float, final: float) -> float:
    if t < t0:
        return 0.0
    return final if t > t1 else final * (1 - (1 - (t - t0) / (t1 - t0)) ** 3)


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(1, 100_000),
    start=st.floats(0, 0.9),
    length=st.floats(0.01, 1),
    final=st.floats(0, 0.999),
    data=st.data(),
)
def test_schedule_is_the_cubic_and_monotone(total, start, length, final, data):
    end = min(1.0, start + length)
    steps = sorted(data.draw(st.lists(st.integers(0, total), min_size=2, max_size=6)))
    values = [script.gmp_sparsity(t, total, start, end, final) for t in steps]
    assert values == sorted(values)
    for t, value in zip(steps, values, strict=True):
        assert value == pytest.approx(literal_cubic(t, start * total, end * total, final), abs=1e-9)
    assert script.gmp_sparsity(total, total, start, end, final) == final


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), sparsities=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_prune_removes_the_smallest_to_one_weight_and_for_ever(seed, sparsities):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(2, 3, 4, generator=generator), torch.randn(5, 2, generator=generator)]
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    gone: set[int] = set()
    for sparsity in sparsities:
        masks = script.prune(weights, masks, sparsity)
        # literally: walk through all weights by size, what is gone first
        flat = [w.item() for weight in weights for w in weight.flatten()]
        order = sorted(range(len(flat)), key=lambda i: (i not in gone, abs(flat[i])))
        gone |= set(order[: round(sparsity * len(flat))])
        removed = {i for i, kept in enumerate(torch.cat([m.flatten() for m in masks])) if not kept}
        assert removed == gone
        for weight, mask in zip(weights, masks, strict=True):
            weight.copy_(torch.randn(weight.shape, generator=generator) * mask)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("arch", ["shared", "moore"])
def test_gmp_keeps_the_cubic_in_training_and_pruned_weights_and_moments_stay_zero(arch, scope):
    agent = make_agent(arch=arch, prune_scope=scope, prune_every=20)
    seen, previous = [], [mask.clone() for _, mask, _ in sparse_layers(agent)]
    assert len(previous) == 6 and all(mask.all() for mask in previous)
    for update in range(1, 201):
        agent.update()
        before = [[weight.detach().clone() for weight in sparse.weights] for sparse in agent.sparse.values()]
        report = agent.after_update() | agent.before_update()
        assert bool(report) == (update % 20 == 0)
        target = literal_cubic(update // 20 * 20, 10, 160, 0.95)
        for sparse, weights in zip(agent.sparse.values(), before, strict=True):
            matrices = [
                (w, m) for ws, ms in zip(weights, sparse.masks, strict=True) for w, m in zip(ws, ms, strict=True)
            ]
            if scope == "global":
                matrices = [
                    tuple(torch.cat([part.flatten() for part in parts]) for parts in zip(*matrices, strict=True))
                ]
            for weight, mask in matrices:  # the smallest went: of a network, or of each of its matrices
                assert abs(int((~mask).sum()) - target * mask.numel()) <= 0.5
                some = bool((~mask).any() and mask.any())
                seen.append(some)
                assert not some or weight[~mask].abs().max() <= weight[mask].abs().min()
        for weight, mask, optimizer in sparse_layers(agent):
            for value in (weight, *moments(optimizer, weight)):
                assert (value[~mask] == 0).all() and (value != 0).any() == mask.any()
        masks = [mask.clone() for _, mask, _ in sparse_layers(agent)]
        assert not any((new & ~old).any() for new, old in zip(masks, previous, strict=True))
        previous = masks
    assert agent.densities()["sparsity/actor/density"] == pytest.approx(0.05, abs=1e-3) and any(seen)


@pytest.mark.parametrize("arch", ["shared", "moore"])
def test_a_critic_that_lost_its_actions_shows_in_the_densities(arch):
    agent = make_agent(arch=arch)
    critic, sparse = agent.critics[1], agent.sparse["critic2"]

    def cut(actions: int) -> dict[str, float]:
        sparse.masks[0][:, OBS_DIM : OBS_DIM + actions] = False
        sparse.set_masks(script.matrices(sparse.masks))
        return agent.densities()

    density = cut(ACT_DIM - 1)
    assert (density["sparsity/critic1/action"], density["sparsity/critic2/action"]) == (1, 1 / ACT_DIM)
    assert cut(ACT_DIM)["sparsity/critic2/action"] == 0
    batch = agent.replay.sample(4)
    assert torch.equal(critic(batch["obs"], batch["action"]), critic(batch["obs"], -batch["action"]))


@pytest.mark.parametrize("method", ["gmp", "set"])
def test_only_the_asked_networks_are_sparse_and_never_heads_biases_or_the_mixing(method):
    agent = make_agent(sparsify_critic=False, method=method)
    for _ in train(agent, 200):
        pass
    density = agent.densities()
    assert density["sparsity/actor/density"] == pytest.approx(0.05, abs=2e-3) and list(agent.sparse) == ["actor"]
    assert density["sparsity/critic1/density"] == density["sparsity/critic2/density"] == 1
    for parameter in (agent.actor.heads.weight, agent.actor.mixing, agent.critics[0].layers[0].weight):
        assert (parameter != 0).all()
    for bias in (agent.actor.heads.bias, *(layer.bias for layer in agent.actor.layers)):
        assert (bias != 0).any()
    counts = agent.parameter_counts()
    missing = sum(int((~mask).sum()) for _, mask, _ in sparse_layers(agent))
    assert counts["actor"] - counts["actor_active"] == missing and counts["critic"] == counts["critic_active"]
    assert counts["actor"] == sum(p.numel() for p in agent.actor.parameters())


def test_dense_is_a_run_without_masks_and_without_pruning_what_is_masked_changes_nothing():
    """Before its first pruning GMP is the dense agent, bit for bit."""
    agents = [make_agent(method="dense"), make_agent(method="gmp")]
    for agent in agents:
        torch.manual_seed(1)
        for _ in train(agent, 49):
            pass
    assert agents[0].sparse == {} and set(agents[0].densities().values()) == {1}
    for one, two in zip(agents[0].critics.parameters(), agents[1].critics.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_gradient_is_masked_before_it_is_clipped(monkeypatch):
    agent = make_agent(max_grad_norm=1e-3)
    for _ in train(agent, 200):
        pass
    seen = []
    true_clip = torch.nn.utils.clip_grad_norm_

    def clip(parameters, limit):
        norm = true_clip(parameters, limit)
        seen.append(norm)
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    agent.update()
    assert min(seen) > 1e-3  # something was clipped
    for module in (agent.critics, agent.actor):
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3)  # of what is left after masking
    for weight, mask, _ in sparse_layers(agent):
        assert (weight.grad[~mask] == 0).all()


# ------------------------------------------------------------------------------------------------------------- SET


def literal_densities(shapes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """Erdős–Rényi: epsilon * sum(shape) / prod(shape), epsilon by bisection, so that densities above 1 are cut to 1."""
    sizes = [math.prod(shape) for shape in shapes]

    def densities(epsilon: float) -> list[float]:
        return [min(1.0, epsilon * sum(shape) / size) for shape, size in zip(shapes, sizes, strict=True)]

    low, high = 0.0, float(max(sizes))
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(d * size for d, size in zip(densities(middle), sizes, strict=True))
        low, high = (middle, high) if total < (1 - sparsity) * sum(sizes) else (low, middle)
    return densities(high)


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 400), st.integers(1, 400))
        | st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5)),
        min_size=1,
        max_size=6,
    ),
    sparsity=st.floats(0, 0.99),
)
def test_erdos_renyi_counts_are_exact_in_total_and_proportional(shapes, sparsity):
    """Convolutions (outputs, inputs, k, k) by the kernel rule: (in + out + k + k) / (in * out * k * k)."""
    counts, sizes = script.erdos_renyi_counts(shapes, sparsity), [math.prod(shape) for shape in shapes]
    assert sum(counts) == round((1 - sparsity) * sum(sizes))
    for count, density, size in zip(counts, literal_densities(shapes, sparsity), sizes, strict=True):
        assert 0 <= count <= size and abs(count - density * size) <= len(shapes)


def random_mask(shape: tuple[int, ...], count: int) -> torch.Tensor:
    return torch.randperm(math.prod(shape)).view(shape) < count


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.02, 1), zeta=st.floats(0, 1))
def test_evolve_moves_the_smallest_connections_to_places_that_were_empty(seed, density, zeta):
    torch.manual_seed(seed)
    mask = random_mask((9, 11), max(1, round(density * 99)))
    weight = torch.randn(9, 11) * mask
    new = script.evolve(weight, mask, zeta)
    active = [(i, j) for i, j in np.ndindex(9, 11) if mask[i, j]]
    moved = min(int(zeta * len(active)), 99 - len(active))
    smallest = sorted(active, key=lambda ij: abs(weight[ij].item()))[:moved]
    dropped = {ij for ij in np.ndindex(9, 11) if mask[ij] and not new[ij]}
    grown = {ij for ij in np.ndindex(9, 11) if new[ij] and not mask[ij]}
    assert dropped == set(smallest)
    assert len(grown) == moved and grown <= set(np.ndindex(9, 11)) - set(active)
    assert new.sum() == mask.sum()


@pytest.mark.parametrize("shape", [(6, 7), (5, 4, 2, 2), (3, 6, 7)])
def test_a_mask_comes_to_weights_and_moments_of_any_layer(shape):
    """Linear, convolution, a matrix for each expert, which is a layer with its own share of the connections."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Adam([layer.weight])
    layer.weight.square().sum().backward()
    optimizer.step()
    sparse = script.SET([layer], optimizer, sparsity=0.5, every=1)
    [mask] = sparse.masks
    for value in (layer.weight, *moments(optimizer, layer.weight)):
        assert (value[~mask] == 0).all() and (value[mask] != 0).all()
    counts = [int(part.sum()) for part in (mask if len(shape) == 3 else mask[None])]
    assert len(set(counts)) == 1 and sum(counts) == round(0.5 * mask.numel())
    before = mask.clone()
    sparse.after_step()
    assert not torch.equal(before, mask) and (layer.weight[mask & ~before] == 0).all()
    assert [int(part.sum()) for part in (mask if len(shape) == 3 else mask[None])] == counts


def test_growth_is_uniform_over_the_empty_places():
    torch.manual_seed(0)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0] = True
    grown = sum((script.evolve(torch.rand(4, 5), mask, 0.4) & ~mask).float() for _ in range(3000))
    assert grown[0].sum() == 0 and grown.sum() == 6000
    assert grown[1:].min() > 300 and grown[1:].max() < 500  # 400 each


def test_set_keeps_the_count_of_every_layer_and_new_weights_start_at_zero_without_a_past():
    agent = make_agent(method="set", evolve_every=10, zeta=0.3)
    counts = [[int(m.sum()) for m in mask] for _, mask, _ in sparse_layers(agent)]
    total = sum(mask.numel() for mask in agent.sparse["actor"].masks)
    assert sum(sum(c) for c in counts[:2]) == round(0.05 * total)
    for target, critic in zip(agent.targets, agent.critics, strict=True):
        assert torch.equal(target.layers[0].weight, critic.layers[0].weight)
    moved = 0
    for update in range(1, 41):
        agent.update()
        before = [(weight.detach().abs(), mask.clone()) for weight, mask, _ in sparse_layers(agent)]
        agent.before_update()
        for (w, old), (weight, new, optimizer), count in zip(before, sparse_layers(agent), counts, strict=True):
            assert [int(m.sum()) for m in new] == count
            moved += int((new & ~old).sum())
            assert update % 10 == 0 or torch.equal(new, old)
            for size, gone, stayed in zip(w, old & ~new, old & new, strict=True):  # the smallest went
                assert not gone.any() or size[gone].max() <= size[stayed].min()
            for value in (weight, *moments(optimizer, weight)):
                assert (value[~new | ~old] == 0).all()
    assert moved == 4 * sum(int(0.3 * n) for layer in counts for n in layer)


# ------------------------------------------------------------------------------------------------ other interventions


@pytest.mark.parametrize("arch", ["shared", "moe"])
def test_redo_gives_dormant_units_a_new_start_and_leaves_the_rest(arch):
    changes = {"hidden_layers": 3, "prune_every": 40, "prune_scope": "layer", "intervention": "redo"}
    agent = make_agent(arch=arch, redo_every=10_000, **changes)
    for _ in train(agent, 80):
        pass
    network, optimizer, obs = agent.actor, agent.actor_optimizer, agent.replay.sample(30)["obs"]
    sparse, relus = agent.sparse["actor"], len(network.norms)
    with torch.no_grad():
        network.layers[0].bias[0, 0, :2] = -100  # two units that never fire, one of them without a connection
        sparse.masks[0][0, :, 1] = False
        network.layers[0].weight[0, :, 1] = 0
        network.layers[1].bias[-1, 0, 3] = -100
        if arch == "shared":  # whose last layer has ReLUs; its readers are the heads
            network.layers[2].bias[0, 0, 4] = -100
    # literally
    dormant = []
    features, connected = metrics.hidden_features(network, (obs,)), network.connected_units(sparse.masks)
    for h, alive in zip(features[:relus], connected[:relus], strict=True):
        units = [i for i in range(h.shape[1]) if alive[i]]
        mean = np.mean([h[:, i].abs().mean().item() for i in units])
        dormant.append({i for i in units if h[:, i].abs().mean().item() <= 0.001 * mean})
    assert 0 in dormant[0] and 1 not in dormant[0] and 12 * (network.experts - 1) + 3 in dormant[1]
    before = copy.deepcopy(network)
    old_moments = {name: copy.deepcopy(moments(optimizer, p)) for name, p in network.named_parameters()}
    forgotten = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in network.named_parameters()}
    masks = dict(zip(sparse.weights, sparse.masks, strict=True))
    recycled = script.recycle(network.levels(), optimizer, lambda: network(obs), 0.001, masks)
    assert recycled == sum(map(len, dormant))
    dormant += [set()] * (len(network.layers) - len(dormant))
    for index, (layer, old, mask) in enumerate(zip(network.layers, before.layers, sparse.masks, strict=True)):
        bound = math.sqrt(6 / layer.weight.shape[1])
        for e, i, o in np.ndindex(*layer.weight.shape):
            incoming = e * 12 + o in dormant[index]
            outgoing = index > 0 and e * 12 + i in dormant[index - 1]
            w = layer.weight[e, i, o]
            if outgoing or (incoming and not mask[e, i, o]):
                assert w == 0
            elif incoming:
                assert w != old.weight[e, i, o] and abs(w) <= bound
            else:
                assert w == old.weight[e, i, o]
            forgotten[f"layers.{index}.weight"][e, i, o] = incoming or outgoing
        for e, o in np.ndindex(layer.bias.shape[0], 12):
            forgotten[f"layers.{index}.bias"][e, 0, o] = e * 12 + o in dormant[index]
        assert torch.equal(layer.bias, old.bias.masked_fill(forgotten[f"layers.{index}.bias"], 0))
    if arch == "shared":
        assert 4 in dormant[2]
        forgotten["heads.weight"][:, sorted(dormant[2])] = True
    assert torch.equal(network.heads.weight, before.heads.weight.masked_fill(forgotten["heads.weight"], 0))
    for name, parameter in network.named_parameters():
        for moment, old_moment in zip(moments(optimizer, parameter), old_moments[name], strict=True):
            assert torch.equal(moment, old_moment.masked_fill(forgotten[name], 0)), name
            assert not forgotten[name].any() or (old_moment[forgotten[name]] != 0).any(), name


def test_redo_and_reset_come_when_they_should():
    agent = make_agent(intervention="reset", reset_every=30, method="dense")
    previous, changed = None, []
    for update, report in enumerate(train(agent, 100), start=1):
        weight = agent.actor.heads.weight.detach().clone()
        if "method/resets" in report:
            changed.append(update)
            assert weight.abs().max() <= 1e-3 and not torch.equal(weight, previous)
            for _, network, optimizer in agent.networks():
                for parameter in network.heads.parameters():
                    assert all((moment == 0).all() for moment in moments(optimizer, parameter))
            for critic, target in zip(agent.critics, agent.targets, strict=True):
                assert critic.heads.weight.abs().max() <= 3e-3
                assert torch.equal(critic.heads.weight, target.heads.weight)
        previous = weight
    assert changed == [30, 60]  # at most two
    agent = make_agent(intervention="redo", redo_every=30, method="dense")
    for critic in agent.critics:
        critic.layers[0].bias.data[0, 0, 5] = -1000  # never fires
    reports = {update: report for update, report in enumerate(train(agent, 100), start=1) if report}
    assert list(reports) == [30, 60, 90]
    for report in reports.values():
        assert list(report) == [f"method/recycled/{name}" for name in ("actor", "critic1", "critic2")]
    for i, critic in enumerate(agent.critics, start=1):
        assert reports[30][f"method/recycled/critic{i}"] >= 1 and critic.layers[0].bias[0, 0, 5] > -1
    assert agent.recycled == sum(sum(report.values()) for report in reports.values())


@pytest.mark.parametrize("method", ["gmp", "set"])
def test_redo_leaves_what_is_missing_at_zero(method):
    options = {"method": method, "prune_every": 20, "evolve_every": 25, "sparsify_critic": True, "arch": "shared"}
    options |= {"prune_scope": "layer"}
    agent = make_agent(intervention="redo", redo_every=30, dormant_threshold=0.3, **options)
    for _ in train(agent, 100):
        for sparse in agent.sparse.values():
            assert all((w[~mask] == 0).all() for w, mask in zip(sparse.weights, sparse.masks, strict=True))
    assert agent.recycled > 0 and any(not mask.all() for sparse in agent.sparse.values() for mask in sparse.masks)


def test_weight_decay_is_adamws():
    weights = []
    for intervention in ("none", "weight-decay"):
        agent = make_agent(intervention=intervention, weight_decay=0.1, method="dense", learning_rate=1e-2)
        before = agent.actor.layers[0].weight.detach().clone()
        torch.manual_seed(0)
        agent.update()
        weights.append(agent.actor.layers[0].weight.detach().clone())
    torch.testing.assert_close(weights[0] - weights[1], 1e-2 * 0.1 * before, atol=1e-6, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------- SAC


def test_losses_are_multi_task_sacs():
    agent = make_agent(arch="shared")
    agent.log_alpha.data.copy_(torch.tensor([-0.7, 0.1, 0.5]))
    for network in (agent.actor, *agent.critics, *agent.targets):
        large_heads(network)
    batch, alpha = agent.replay.sample(6), agent.log_alpha.exp().tolist()
    torch.manual_seed(5)
    action, log_prob = agent.actor.sample(batch["next_obs"])
    y = np.zeros((3, 6))
    for task, n in np.ndindex(3, 6):
        sa = torch.cat([batch["next_obs"][task, n], action[task, n]])
        q = min(literal_output(target, sa, task).item() for target in agent.targets)
        y[task, n] = batch["reward"][task, n].item() + 0.9 * (q - alpha[task] * log_prob[task, n].item())
    max_q = float(np.median(np.abs(y)))  # so that half of them are clipped
    y = y.clip(-max_q, max_q)
    torch.manual_seed(5)
    learners = (agent.actor, agent.critics, agent.targets, agent.log_alpha)
    losses, _ = script.critic_loss(*learners, batch, Args(gamma=0.9, max_q=max_q))
    for task in range(3):
        expected = 0.0
        for n in range(6):
            sa = torch.cat([batch["obs"][task, n], batch["action"][task, n]])
            expected += sum((literal_output(critic, sa, task).item() - y[task, n]) ** 2 for critic in agent.critics) / 6
        assert losses[task].item() == pytest.approx(expected, rel=1e-3)

    torch.manual_seed(6)
    losses, mean_log_prob = script.actor_loss(agent.actor, agent.critics, agent.log_alpha, batch["obs"])
    torch.manual_seed(6)
    action, log_prob = agent.actor.sample(batch["obs"])
    q = torch.min(*(critic(batch["obs"], action) for critic in agent.critics))
    for task in range(3):
        expected = (alpha[task] * log_prob[task] - q[task]).mean().item()
        assert losses[task].item() == pytest.approx(expected, rel=1e-3)
        assert mean_log_prob[task].item() == pytest.approx(log_prob[task].mean().item(), rel=1e-4)


def test_update_moves_every_network_and_each_temperature_by_its_own_task():
    agent = make_agent(tau=0.3)  # so large that targets that stay are seen
    true_loss = agent.actor_backward
    log_prob = torch.tensor([9.0, 4.0, -9.0])  # entropy below, at and above its target -4
    agent.actor_backward = lambda *inputs: (true_loss(*inputs)[0], log_prob)

    def weights() -> dict[str, torch.Tensor]:
        modules = {"actor": agent.actor, "critics": agent.critics, "targets": agent.targets}
        return {f"{net}.{name}": p.detach().clone() for net, m in modules.items() for name, p in m.named_parameters()}

    before = weights()
    agent.update()
    after = weights()
    for name, value in before.items():
        if name.startswith("targets"):
            online = after[name.replace("targets", "critics")]
            torch.testing.assert_close(after[name], value + agent.args.tau * (online - value))
        elif name.endswith("weight"):
            assert not torch.equal(after[name], value), name
    assert agent.log_alpha[0] > 0 and agent.log_alpha[1] == 0 and agent.log_alpha[2] < 0


@settings(max_examples=25, deadline=None)
@given(capacity=st.integers(1, 12), added=st.integers(1, 40))
def test_replay_keeps_the_latest_transitions_of_each_task(capacity, added):
    replay = ReplayBuffer(2, capacity, 2, 1, CPU)
    for n in range(added):
        value = np.array([n, 1000 + n], np.float32)
        obs = np.stack([value, value], 1)
        replay.add(obs=obs, next_obs=obs + 0.5, action=-value[:, None], reward=value)
    batch = replay.sample(200)
    for task in range(2):
        kept = {1000.0 * task + n for n in range(max(0, added - capacity), added)}
        assert set(batch["reward"][task].tolist()) == kept or capacity > 8
        assert set(batch["reward"][task].tolist()) <= kept
    assert torch.equal(batch["next_obs"][..., 0], batch["reward"] + 0.5)
    assert torch.equal(batch["obs"][..., 1], batch["reward"]) and torch.equal(batch["action"][..., 0], -batch["reward"])
    other = ReplayBuffer(2, capacity, 2, 1, CPU)
    other.load_state_dict(replay.state_dict())
    assert all(torch.equal(other.data[name], replay.data[name]) for name in replay.data)
    assert other.size == replay.size == min(added, capacity)


def test_the_defaults_are_the_papers_settings():
    expected = {
        "total_steps": 20_000_000,
        "episode_steps": 500,
        "learning_starts": 40_000,
        "eval_every": 200_000,
        "eval_episodes": 50,
        "reward_version": "v2",
        "arch": "shared",
        "experts": 4,
        "hidden_dim": 400,
        "hidden_layers": 3,
        "buffer_size": 1_000_000,
        "batch_per_task": 128,
        "gamma": 0.99,
        "tau": 0.005,
        "learning_rate": 3e-4,
        "max_grad_norm": 1.0,
        "max_q": 5000.0,
        "method": "gmp",
        "sparsify_actor": True,
        "sparsify_critic": False,
        "sparsity": 0.95,
        "prune_every": 5000,
        "prune_start": 0.05,
        "prune_until": 0.80,
        "prune_scope": "global",
        "evolve_every": 2000,
        "zeta": 0.3,
        "redo_every": 5000,
        "dormant_threshold": 0.001,
        "reset_every": 100_000,
        "weight_decay": 1e-6,
    }
    assert {name: getattr(Args(), name) for name in expected} == expected
    assert (script.LOG_STD_MIN, script.LOG_STD_MAX, script.METRIC_BATCH, script.MAX_RESETS) == (-20, 2, 1024, 2)
    agent = make_agent()
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer, agent.alpha_optimizer):
        [group] = optimizer.param_groups
        assert (group["eps"], group["lr"], group["betas"], group["weight_decay"]) == (1e-5, 3e-4, (0.9, 0.999), 0)
    assert (agent.log_alpha == 0).all()  # temperatures begin at 1


def test_an_update_is_a_step_on_sacs_losses_of_one_batch_from_the_targets():
    agent = make_agent(gamma=0.7)
    for parameter in agent.targets.parameters():  # else they equal the critics
        parameter.data += 0.1 * torch.randn_like(parameter)
    actor, critics, targets, log_alpha = copy.deepcopy((agent.actor, agent.critics, agent.targets, agent.log_alpha))
    torch.manual_seed(3)
    agent.update()
    torch.manual_seed(3)
    batch = agent.replay.sample(8)
    losses, _ = script.critic_loss(actor, critics, targets, log_alpha, batch, agent.args)
    assert agent.losses["critic"] == losses.mean()
    losses, log_prob = script.actor_loss(actor, agent.critics, log_alpha, batch["obs"])  # after the critics' step
    assert (agent.losses["actor"], agent.losses["entropy"]) == (losses.mean(), -log_prob.mean())


def test_the_buffer_is_shared_out_equally():
    assert make_agent(buffer_size=100).replay.capacity == 33 and make_agent(total_steps=900).replay.capacity == 300


def test_evaluations_have_goals_that_training_does_not_have():
    assert len({script.TRAIN_GOALS, script.EVAL_GOALS}) == 2


def test_weight_decay_is_of_actor_and_critics_and_not_of_the_temperatures():
    agent = make_agent(intervention="weight-decay", weight_decay=0.1)
    optimizers = (agent.actor_optimizer, agent.critic_optimizer, agent.alpha_optimizer)
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in optimizers] == [0.1, 0.1, 0]


@pytest.mark.parametrize("intervention", ["redo", "reset"])
def test_nothing_is_recycled_or_reset_before_the_first_update(intervention):
    agent = make_agent(intervention=intervention, dormant_threshold=0.9)
    before = copy.deepcopy(agent.actor.state_dict())
    assert agent.before_update() == {} and agent.resets == agent.recycled == 0
    assert all(torch.equal(before[name], weight) for name, weight in agent.actor.state_dict().items())


def test_redo_comes_after_sets_move_on_many_transitions_and_with_its_own_threshold(monkeypatch):
    calls, true_sample, true_masks = [], ReplayBuffer.sample, script.SET.next_masks
    agent = make_agent(method="set", intervention="redo", evolve_every=2, redo_every=2, dormant_threshold=0.4)
    monkeypatch.setattr(script.SET, "next_masks", lambda *given: calls.append("set") or true_masks(*given))
    monkeypatch.setattr(ReplayBuffer, "sample", lambda replay, n: calls.append(n) or true_sample(replay, n))
    monkeypatch.setattr(script, "recycle", lambda *given: calls.append(given[3]) or 0)
    for _ in train(agent, 2):
        pass
    assert calls == [8, 8, *["set"] * 3, script.METRIC_BATCH // 3, *[0.4] * 3]  # after the batches of two updates


def test_the_methods_get_the_arguments_of_the_run():
    changes = {"sparsity": 0.7, "prune_start": 0.2, "prune_until": 0.6, "prune_every": 40}
    gmp = make_agent(method="gmp", **changes).sparse["actor"]
    assert gmp.schedule == (200, 0.2, 0.6, 0.7) and gmp.every == 40 and not gmp.local
    sparse = make_agent(method="set", sparsity=0.7, zeta=0.1, evolve_every=40).sparse["actor"]
    assert (sparse.zeta, sparse.every) == (0.1, 40)


def test_a_task_mixes_its_experts_by_xavier_uniform_weights_of_both_signs():
    torch.manual_seed(0)
    mixing = Actor(Args(**(TINY | {"experts": 6})), 50, OBS_DIM, ACT_DIM).mixing
    bound = math.sqrt(6 / (50 + 6))
    assert 0.95 * bound < mixing.max() <= bound and -bound <= mixing.min() < -0.95 * bound


def test_it_explores_by_samples_of_the_policy():
    agent, obs = make_agent(), np.zeros((3, OBS_DIM), np.float32)
    torch.manual_seed(2)
    actions = agent.explore(obs)
    torch.manual_seed(2)
    expected = agent.actor.sample(torch.from_numpy(obs)[:, None])[0][:, 0]
    assert np.array_equal(actions, expected.detach().numpy()) and not np.array_equal(actions, agent.explore(obs))


def test_losses_have_the_names_of_what_they_are():
    agent = make_agent()
    agent.critic_backward = lambda *_: (torch.full((3,), 0.1), torch.tensor(0.2))
    agent.actor_backward = lambda *_: (torch.full((3,), 0.3), torch.full((3,), -0.4))
    agent.step = lambda *_: None
    agent.update()
    expected = {"critic": 0.1, "actor": 0.3, "q": 0.2, "entropy": 0.4, "alpha": agent.log_alpha.exp().mean().item()}
    assert {name: loss.item() for name, loss in agent.losses.items()} == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------- metrics


def literal_features(network: MultiTaskNetwork, x: torch.Tensor) -> list[torch.Tensor]:
    """Activations of all hidden layers (samples, units), experts side by side. x: (tasks, batch, inputs)."""
    tasks, batch = x.shape[:2]
    if network.arch == "shared":
        x = torch.cat([x, torch.eye(tasks)[:, None].expand(-1, batch, -1)], -1)
    experts, features = [x.flatten(0, 1)] * network.experts, []
    for i, layer in enumerate(network.layers):
        experts = [h @ layer.weight[e] + layer.bias[e, 0] for e, h in enumerate(experts)]
        if i < len(network.norms):
            experts = [h.clamp_min(0) for h in experts]
            features.append(torch.cat(experts, 1).detach())
    if network.arch == "shared":
        return features
    if network.arch == "moore":
        q, r = torch.linalg.qr(torch.stack(experts, -1))
        experts = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).unbind(-1)
    weights = network.mixing.repeat_interleave(batch, 0)
    mixed = sum(weights[:, e, None] * h for e, h in enumerate(experts))
    return [*features, torch.tanh(mixed).detach()]


@pytest.mark.parametrize("arch", ["shared", "moore"])
def test_plasticity_metrics_against_literal_versions(arch, monkeypatch):
    agent = make_agent(arch=arch, dormant_threshold=0.2)
    for _ in train(agent, 120):  # a mask on actor and critics
        pass
    state = torch.get_rng_state()
    scalars = agent.plasticity()
    assert torch.equal(torch.get_rng_state(), state)  # metrics take nothing from the training's stream
    torch.manual_seed(agent.args.seed)
    batch = agent.replay.sample(script.METRIC_BATCH // 3)
    mean, log_std = agent.actor.distribution(batch["obs"])
    u = (mean + log_std.exp() * torch.randn_like(mean)).detach()
    losses, _ = script.actor_loss(agent.actor, agent.critics, agent.log_alpha, batch["obs"])
    learners = (agent.actor, agent.critics, agent.targets, agent.log_alpha)
    q_losses, _ = script.critic_loss(*learners, batch, agent.args)

    parts = {"actor": (agent.actor, [batch["obs"]], agent.sparse["actor"])}
    parts["critic"] = (agent.critics[0], [batch["obs"], batch["action"]], agent.sparse["critic1"])
    for name, (network, inputs, sparse) in parts.items():
        features = literal_features(network, torch.cat(inputs, -1))
        # over the units that have a connection: dormant ones, and the share of samples in which they are positive
        scores, positive, entries, all_units = [], 0, 0, 0
        for h, mask in zip(features, sparse.masks, strict=True):
            assert len(h) == 3 * (script.METRIC_BATCH // 3)
            connected = mask.any(1).flatten()
            if len(connected) > h.shape[1]:  # the mixture of what the experts say
                connected = mask.any(1).any(0)
            magnitude = h.abs().mean(0)[connected]
            scores += (magnitude / magnitude.mean()).tolist()
            positive, entries = positive + int((h[:, connected] > 0).sum()), entries + int(connected.sum()) * len(h)
            all_units += h.shape[1]
        sigma = np.linalg.svd(features[-1].double().numpy(), compute_uv=False)
        share = sigma / sigma.sum()
        expected = {
            f"plasticity/{name}/dormant_ratio_0": np.mean(np.array(scores) <= 0),
            f"plasticity/{name}/dormant_ratio_0.025": np.mean(np.array(scores) <= 0.025),
            f"plasticity/{name}/dormant_ratio_0.1": np.mean(np.array(scores) <= 0.1),
            f"method/dormant_ratio/{name}": np.mean(np.array(scores) <= 0.2),
            f"plasticity/{name}/active_fraction": positive / entries,
            f"plasticity/{name}/srank": int((np.cumsum(share) < 0.99).sum()) + 1,
            f"plasticity/{name}/effective_rank": math.exp(-sum(p * math.log(p) for p in share if p > 0)),
            f"plasticity/{name}/stable_rank": (sigma**2).sum() / sigma[0] ** 2,
            f"plasticity/{name}/weight_norm": math.sqrt(
                sum(float(p.detach().double().square().sum()) for p in network.parameters())
            ),
        }
        assert len(scores) < all_units and 0 < positive < entries
        assert {key: scalars[key].item() for key in expected} == pytest.approx(expected, rel=1e-3)

    # mean pairwise cosine of the tasks' gradients in the trunk
    for name, task_losses in (("actor", losses), ("critic", q_losses)):
        network, _, sparse = parts[name]
        rows = []
        for task in range(3):
            network.zero_grad()
            task_losses[task].backward(retain_graph=True)
            grads = [(w.grad * mask).flatten() for w, mask in zip(sparse.weights, sparse.masks, strict=True)]
            rows.append(torch.cat(grads))
        pairs = [F.cosine_similarity(rows[i], rows[j], dim=0).item() for i, j in ((0, 1), (0, 2), (1, 2))]
        assert scalars[f"plasticity/{name}/gradient_cosine"].item() == pytest.approx(np.mean(pairs), abs=1e-4)

    # Fisher trace, a sample at a time
    total, masks = 0.0, dict(zip(agent.sparse["actor"].weights, agent.sparse["actor"].masks, strict=True))
    for task, n in np.ndindex(*u.shape[:2]):
        agent.actor.zero_grad()
        mean, log_std = agent.actor.distribution(batch["obs"][task, n][None, None], slice(task, task + 1))
        torch.distributions.Normal(mean[0, 0], log_std[0, 0].exp()).log_prob(u[task, n]).sum().backward()
        total += sum(float((p.grad * masks.get(p, 1)).square().sum()) for p in agent.actor.parameters())
    assert scalars["plasticity/actor/fisher_trace"].item() == pytest.approx(total / u[..., 0].numel(), rel=1e-3)


def test_the_gradient_norms_are_those_before_the_clip():
    """Of the masked gradients; and one TensorBoard tag per network."""
    agent, norms, true_clip = make_agent(method="set"), [], torch.nn.utils.clip_grad_norm_

    def clip(parameters, limit):  # called for the critics, then for the actor
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm())
        return true_clip(parameters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        agent.update()
    assert list(agent.grad_norms) == ["critics", "actor"]
    for seen, expected in zip(agent.grad_norms.values(), norms, strict=True):
        torch.testing.assert_close(seen, expected)


def test_compile_compiles_both_losses_and_learns_the_same(monkeypatch):
    """With their gradients; traced by torch.compile, which needs no compiler of C++ for that."""
    true_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: true_compile(function, backend="eager", **how))
    agents = [make_agent(compile=compiles, intervention="layernorm") for compiles in (False, True)]
    for agent in agents:
        torch.manual_seed(5)
        agent.update()
        agent.update()
    for plain, compiled in zip(*(agent.networks() for agent in agents), strict=True):
        for weight, other in zip(plain[1].parameters(), compiled[1].parameters(), strict=True):
            torch.testing.assert_close(other, weight)


# --------------------------------------------------------------------------------------------- whole runs, real tasks

SHORT = TINY | {
    "total_steps": 450,
    "episode_steps": 25,
    "learning_starts": 150,
    "eval_every": 225,
    "prune_every": 25,
    "evolve_every": 25,
    "checkpoint_every": 75,
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("gmp") / "run"
    results = script.main(Args(**SHORT, run_dir=str(run_dir)))
    return {"run_dir": run_dir, "results": results, "checkpoint": load_checkpoint(str(run_dir), "sparse_mtrl_gmp_set")}


def command_line(**options) -> list[str]:
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def start(*words, start_new_session=False, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "sparse_mtrl_gmp_set.py"), *words, *command_line(**options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, start_new_session=start_new_session)


def wait_for(happened: Callable[[], bool], run: subprocess.Popen) -> None:
    while not happened() and run.poll() is None:
        time.sleep(0.02)


def assert_same_tensors(one, two, where: str = "") -> None:
    """Equal bytes in nested dicts and lists, NaN included."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.shape == two.shape, where
        assert one.contiguous().numpy().tobytes() == two.contiguous().numpy().tobytes(), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same_tensors(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same_tensors(a, b, f"{where}/{index}")
    else:
        assert one == two, where


def assert_same_run(one: Path, two: Path) -> None:
    """Same weights, masks, moments, buffer, random states and evaluations, byte by byte, and the same metrics."""
    first, second = (load_checkpoint(str(run), "sparse_mtrl_gmp_set") for run in (one, two))
    for checkpoint in (first, second):
        for name in ("seconds", "pace", "events"):  # of the clock and the file system
            del checkpoint["record"][name]
    assert_same_tensors(first, second)
    assert (one / "evaluations.csv").read_bytes() == (two / "evaluations.csv").read_bytes()
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for name in ("metrics", "tasks", "global_step", "parameters"):
        assert results[0][name] == results[1][name]


def test_the_command_leaves_every_file_and_ends_with_a_table(finished_run, tmp_path):
    run = start(**(SHORT | {"run_dir": tmp_path / "run", "quiet": False}))
    out, err = run.communicate(timeout=600)
    assert run.returncode == 0, err
    assert out.startswith(str(tmp_path / "run")) and "final_success" in out and "step 225" in out
    for name in ("config.json", "evaluations.csv", "results.json", "checkpoint.pt", "summary.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["script"] == "sparse_mtrl_gmp_set" and results["global_step"] == 450 and len(results["tasks"]) == 3
    report = results["metrics"]
    assert report["updates"] == 100 and report["sparsity/actor/density"] == pytest.approx(0.05, abs=1e-3)
    assert report["final_success"] == pytest.approx(np.mean([task["final_success"] for task in results["tasks"]]))
    with open(tmp_path / "run" / "evaluations.csv", newline="") as file:
        rows = [(int(r["global_step"]), int(r["phase"]), int(r["task_index"])) for r in csv.DictReader(file)]
    assert rows == [(step, 0, task) for step in (225, 450) for task in range(3)]
    # a subprocess and a call of main are the same run
    assert_same_run(tmp_path / "run", finished_run["run_dir"])


def test_warm_up_updates_and_pruning_come_at_their_steps(finished_run):
    checkpoint = finished_run["checkpoint"]
    assert checkpoint["agent"]["updates"] == 100 and checkpoint["agent"]["replay"]["added"] == 150
    density = checkpoint["record"]["curves"]["density"]["actor"]
    expected = {step: 1 - literal_cubic(update, 5, 80, 0.95) for step, update in ((225, 25), (300, 50), (375, 75))}
    assert [step for step, _ in density] == [225, 300, 375, 450]  # one point each, also where an evaluation coincides
    seen = dict(density)
    for step, value in expected.items():
        assert seen[step] == pytest.approx(value, abs=2e-3)
    warm_up = checkpoint["agent"]["replay"]["data"]["action"][:, :50]
    assert warm_up.min() < -0.95 and warm_up.max() > 0.95 and abs(warm_up.mean()) < 0.1


def test_every_training_episode_has_its_own_seed(tmp_path, monkeypatch):
    """By task and number, so that nothing but the number has to be known to go on."""
    seen, true_reset = [], envs.TaskEnvs.reset
    monkeypatch.setattr(envs.TaskEnvs, "reset", lambda tasks, seeds: seen.append(seeds) or true_reset(tasks, seeds))
    options = SHORT | {"method": "dense", "eval_every": 450, "hidden_dim": 4}
    script.main(Args(**options, run_dir=str(tmp_path / "run")))
    assert seen == [[envs.seed_of(1, script.TRAIN_GOALS, task, n) for task in range(3)] for n in range(6)]
    assert len({seed for seeds in seen for seed in seeds}) == 18


def test_evaluations_and_the_end_of_a_run_see_trained_connections(tmp_path, monkeypatch):
    """SET rewires before an update and not after one; GMP's pruning belongs to its update."""
    seen, true_masks, true_evaluate = [], script.SET.next_masks, Recorder.evaluate
    monkeypatch.setattr(script.SET, "next_masks", lambda s, *a: seen.append(s.updates) or true_masks(s, *a))
    monkeypatch.setattr(Recorder, "evaluate", lambda *a: seen.append("evaluation") or true_evaluate(*a))
    script.main(Args(**(SHORT | {"method": "set", "sparsify_critic": False}), run_dir=str(tmp_path / "run")))
    assert seen == ["evaluation", 25, 50, 75, "evaluation"]


def test_stopped_and_killed_at_random_moments_and_resumed_it_is_the_same_run(finished_run, tmp_path):
    """SIGTERM to the whole group, as of timeout, systemd and Slurm, while the workers still import or in training;
    SIGKILL in training without workers; then on to the end."""
    run_dir, rng = tmp_path / "run", np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    config, checkpoint = run_dir / "config.json", run_dir / "checkpoint.pt"
    run = start(**SHORT, run_dir=run_dir, num_workers=2, start_new_session=True)
    wait_for(config.exists, run)
    time.sleep(rng.uniform(0, 4))
    os.killpg(run.pid, signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM and "Traceback" not in err and "--resume" in err, err
    written = checkpoint.stat().st_mtime_ns
    run = start("--resume", str(run_dir), "--num-workers", "0", start_new_session=True)
    wait_for(lambda: checkpoint.stat().st_mtime_ns > written, run)
    time.sleep(rng.uniform(0, 0.2))
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode in (-signal.SIGKILL, 0)
    script.main(Args(**SHORT, run_dir=str(run_dir), resume=str(run_dir)))
    assert_same_run(run_dir, finished_run["run_dir"])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("gmp", {"intervention": "redo", "redo_every": 30}),
        ("set", {"intervention": "reset", "reset_every": 30, "arch": "shared"}),
    ],
)
def test_stopped_in_training_or_evaluation_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, method, changes):
    """A signal in the middle of an episode, with moments and masks, then one in the middle of an evaluation."""
    whole, options = tmp_path / "whole", SHORT | {"method": method} | changes
    script.main(Args(**options, run_dir=str(whole)))
    run_dir, calls = tmp_path / "run", {"update": 0, "evaluate": 0}
    true_update, true_evaluate = Agent.update, metrics.evaluate

    def update(agent):
        calls["update"] += 1
        if calls["update"] == 35:
            os.kill(os.getpid(), signal.SIGTERM)
        true_update(agent)

    def evaluate(*arguments):
        calls["evaluate"] += 1
        if calls["evaluate"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_evaluate(*arguments)

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(metrics, "evaluate", evaluate)
    resume = {}
    for _ in range(2):
        with pytest.raises(Interrupted, match=f"--resume {run_dir}"):
            script.main(Args(**options, run_dir=str(run_dir), **resume))
        resume = {"resume": str(run_dir)}
    script.main(Args(**options, run_dir=str(run_dir), **resume))
    assert_same_run(run_dir, whole)


def test_worker_processes_change_nothing():
    """Observations, rewards and successes of two processes equal those of one, denormal rewards included."""
    torch.set_flush_denormal(True)  # as main does
    arguments = (["reach-v3", "push-v3", "drawer-close-v3"], [5, 6, 3], 500, "v2")
    alone, workers = envs.TaskEnvs(*arguments), envs.WorkerEnvs(*arguments, 2)
    rng = np.random.default_rng(3)
    try:
        for seeds, steps in (([5, 6, 3], 500), ([1, 2, 3], 5)):
            np.testing.assert_array_equal(workers.reset(seeds), alone.reset(seeds))
            for _ in range(steps):  # these actions bring denormal rewards to drawer-close with its seed of 3
                actions = np.repeat(rng.uniform(-1, 1, (1, ACT_DIM)), 3, axis=0).astype(np.float32)
                for mine, other in zip(workers.step(actions), alone.step(actions), strict=True):
                    np.testing.assert_array_equal(mine, other)
    finally:
        workers.close()
        alone.close()
    assert not any(process.is_alive() for process in workers.processes)


def test_no_worker_process_outlives_main(tmp_path, monkeypatch):
    true_update, seen = Agent.update, []
    options = SHORT | {"learning_starts": 75, "total_steps": 225, "prune_every": 10, "num_workers": 2}

    def update(agent):
        if agent.updates == 20:
            seen.extend(multiprocessing.active_children())
            agent.log_alpha.data[1] = math.nan
        true_update(agent)

    monkeypatch.setattr(Agent, "update", update)
    with pytest.raises(NotFiniteError):
        script.main(Args(**options, run_dir=str(tmp_path / "run")))
    assert len(seen) == 2 and multiprocessing.active_children() == []


def test_other_options_run_to_their_end(tmp_path, monkeypatch, capsys):
    """compile (recorded, not done), layernorm, a piece of an episode at the end, which is no episode in the log; the
    names in the log; critics that pruning cut from their actions."""
    compiled, scalars, true_add = [], [], SummaryWriter.add_scalar

    def add_scalar(writer, name, value, step):
        scalars.append((step, name))
        true_add(writer, name, value, step)

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    monkeypatch.setattr(script, "LOG_EVERY", 50)
    options = SHORT | {"compile": True, "intervention": "layernorm", "total_steps": 480}
    options |= {"sparsity": 0.999, "quiet": False}
    with pytest.warns(UserWarning, match="GMP left a layer without connections"):
        results = script.main(Args(**options, run_dir=str(tmp_path / "run")))
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 2 and results["global_step"] == 480
    ends = [step for step, name in scalars if name == "charts/episodic_return"]
    assert ends == [75, 150, 225, 300, 375, 450]
    assert len(set(scalars)) == len(scalars)  # no tag has two points at a step
    names = {name for _, name in scalars}
    known = {f"losses/{name}" for name in ("critic", "actor", "q", "entropy", "alpha")}
    known |= {"charts/SPS", "charts/episodic_return", "charts/episodic_length", "charts/episodic_success"}
    tasks = ("reach-v3", "drawer-close-v3", "push-v3")
    known |= {f"eval/{what}/{task}" for what in ("return", "success") for task in tasks}
    known |= {"eval/mean_success", "plasticity/actor/fisher_trace"}
    plasticity = (*metrics.DORMANT_TAUS, "active_fraction", "srank", "effective_rank", "stable_rank", "weight_norm")
    for net in ("actor", "critic"):
        known |= {f"plasticity/{net}/{name}" for name in (*plasticity, "gradient_cosine")}
        known |= {f"method/dormant_ratio/{net}"}
    known |= {"plasticity/actor/grad_norm", "plasticity/critics/grad_norm"}
    for net in ("actor", "critic1", "critic2"):
        known |= {f"sparsity/{net}/{name}" for name in ("density", "layer1", "layer2")}
    assert names == known | {"sparsity/critic1/action", "sparsity/critic2/action"}
    assert set(results["metrics"]) <= names | {"final_success", "updates", "recycled_units", "head_resets"}
    out = capsys.readouterr().out
    for net in ("critic1", "critic2"):
        assert f"warning: {net} has no connection left from the action" in out


def test_mt10_with_moore_and_gmp_trains_stops_resumes_and_evaluates(tmp_path, monkeypatch, capsys):
    true_update, run_dir = Agent.update, str(tmp_path / "run")
    command = ["--benchmark", "mt10", "--arch", "moore", "--method", "gmp", "--run-dir", run_dir]
    small = {"total_steps": 400, "episode_steps": 10, "learning_starts": 100, "prune_every": 2, "eval_every": 400}
    small |= {"eval_episodes": 1, "hidden_dim": 12, "hidden_layers": 2, "batch_per_task": 8, "quiet": True}

    def update(agent):
        if agent.updates == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        true_update(agent)

    monkeypatch.setattr(Agent, "update", update)
    with pytest.raises(Interrupted, match=f"--resume {run_dir}"):
        script.main(parse_args(Args, script.PRESETS, [*command, *command_line(**small)]))
    results = script.main(parse_args(Args, script.PRESETS, ["--resume", run_dir]))
    assert [task["name"] for task in results["tasks"]] == envs.task_sequence("mt10")
    assert results["metrics"]["updates"] == 30 and results["run_dir"] == run_dir
    assert results["metrics"]["sparsity/actor/density"] == pytest.approx(0.05, abs=2e-3)
    capsys.readouterr()
    seen = script.main(parse_args(Args, script.PRESETS, ["--evaluate", run_dir, "--episodes", "1"]))
    assert [seen[i]["episode_return"] for i in range(10)] == [task["final_return"] for task in results["tasks"]]
    assert capsys.readouterr().out.count("-v3") == 10


BAD_ARGUMENTS = {
    "unknown task": (["--benchmark", "reech"], r"--benchmark reech: .*reach-v3"),
    "twice": (["--benchmark", "reach,reach"], r"--benchmark reach,reach: must be a list without repetition"),
    "sparsity": (["--sparsity", "1"], r"--sparsity 1\.0: must be at least 0 and below 1"),
    "window": (["--prune-start", "0.9"], r"--prune-start 0\.9: must be below --prune-until 0\.8"),
    "never pruned": (["--total-steps", "60000"], r"--prune-every 5000: must be so that .* 1600 to 2000"),
    "warm-up": (["--total-steps", "30000"], r"--learning-starts 40000: must be below --total-steps 30000"),
    "layers": (["--arch", "moe", "--hidden-layers", "1"], r"--hidden-layers 1: must be at least 2 with --arch moe"),
    "buffer": (["--buffer-size", "9"], r"--buffer-size 9: must be at least the number of tasks, 10"),
    "clipped": (
        ["--benchmark", "reach,push", "--reward-version", "v1"],
        r"--reward-version v1: must be v2 unless --max-q is above 5000\.0",
    ),
    "no success": (["--reward-version", "v1"], "--benchmark mt10: peg-insert-side-v3 never reports a success"),
    "experts": (
        ["--arch", "moore", "--experts", "9", "--hidden-dim", "8"],
        r"--experts 9: must be at most --hidden-dim 8",
    ),
    "nothing sparse": (["--no-sparsify-actor"], r"--method gmp: must be dense where neither"),
    "never rewired": (["--method", "set", "--evolve-every", "2000000"], r"--evolve-every .* updates, 1996000"),
    "never recycled": (["--intervention", "redo", "--redo-every", "2000000"], r"--redo-every .* updates, 1996000"),
    "never reset": (["--intervention", "reset", "--reset-every", "2000000"], r"--reset-every .* updates, 1996000"),
    "workers": (["--num-workers", "11"], r"--num-workers 11: must be at most the number of tasks, 10"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_2(case, monkeypatch, capsys, tmp_path):
    words, expected = BAD_ARGUMENTS[case]
    assert_refused(words, expected, monkeypatch, capsys, tmp_path)


def assert_refused(words: list[str], expected: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["sparse_mtrl_gmp_set.py", *words])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        cli.run(script.main, Args, script.PRESETS)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.search(expected, err) and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.iterdir()) == before  # no folder is left behind


def test_bad_resumes_give_one_line_and_exit_2(finished_run, monkeypatch, capsys, tmp_path):
    run_dir = shutil.copytree(finished_run["run_dir"], tmp_path / "run")
    (run_dir / "results.json").unlink()
    words = ["--resume", str(run_dir)]
    for flag, value, stored in (("--total-steps", "1200", "450"), ("--sparsity", "0.5", r"0\.95")):
        assert_refused([*words, flag, value], rf"{flag} .*contradicts.*{stored}", monkeypatch, capsys, tmp_path)
    assert_refused(["--run-dir", str(run_dir)], r"holds a run already.*--resume", monkeypatch, capsys, tmp_path)


def test_the_presets_and_the_papers_settings_are_accepted():
    for options in ({}, script.PRESETS["quick"], {"benchmark": "mt50"}, {"method": "set", "arch": "moe"}):
        for intervention in ("none", "redo", "reset", "layernorm", "weight-decay"):
            args = Args(**options, intervention=intervention)
            script.check(args, envs.task_sequence(args.benchmark))
    script.check(Args(reward_version="v1", max_q=1e6), envs.task_sequence("mt10"))
    assert script.count_updates(Args(), 10) == 1_996_000


def test_names_of_other_scripts_work_too():
    words = ["--total-timesteps", "90000", "--quick", "--method", "set"]
    args = parse_args(Args, script.PRESETS, words)
    assert (args.total_steps, args.hidden_dim, args.method) == (90_000, 128, "set")


def test_evaluate_gives_the_last_evaluation_of_the_run(finished_run, capsys):
    """Same policies, same goals, same numbers; nothing in the folder changes."""
    run_dir = finished_run["run_dir"]
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    seen = script.main(Args(evaluate=str(run_dir), episodes=1))
    returns = [task["final_return"] for task in finished_run["results"]["tasks"]]
    assert [result["episode_return"] for result in seen.values()] == returns
    assert "push-v3" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before


def test_load_policy_acts_as_the_trained_actor_for_each_task(finished_run, monkeypatch):
    """It builds an actor only; any float type in, float32 out."""
    monkeypatch.setattr(script, "Critic", None)
    monkeypatch.setattr(script, "ReplayBuffer", None)
    actor = Actor(Args(**SHORT), 3, OBS_DIM, ACT_DIM)
    actor.load_state_dict(finished_run["checkpoint"]["agent"]["actor"])
    obs = np.random.default_rng(0).standard_normal(OBS_DIM)
    for task in range(3):
        policy = script.load_policy(str(finished_run["run_dir"]), task)
        x = torch.from_numpy(obs).float()[None, None].expand(3, -1, -1)
        expected = actor(x)[task, 0, :ACT_DIM].tanh().detach().numpy()
        for dtype in (np.float16, np.float32, np.float64):
            action = policy(obs.astype(dtype))
            assert action.dtype == np.float32 and action.shape == (ACT_DIM,)
            np.testing.assert_allclose(action, expected, atol=1e-3 if dtype == np.float16 else 1e-6)
    for task in (-1, 3):
        with pytest.raises(cli.ArgumentError, match=f"has no task {task}; it has tasks 0 to 2"):
            script.load_policy(str(finished_run["run_dir"]), task)
    first = script.load_policy(str(finished_run["run_dir"]))
    assert not np.array_equal(first(obs), policy(obs))


def test_evaluating_more_often_changes_nothing_in_training(finished_run, tmp_path):
    options = SHORT | {"eval_every": 150, "eval_episodes": 2}
    script.main(Args(**options, run_dir=str(tmp_path / "run")))
    often, seldom = load_checkpoint(str(tmp_path / "run"), "sparse_mtrl_gmp_set"), finished_run["checkpoint"]
    assert_same_tensors(often["agent"], seldom["agent"])
    assert_same_tensors(often["random"], seldom["random"])


@pytest.mark.parametrize("what", ["loss", "weight", "weight before an evaluation"])
def test_what_is_not_finite_stops_with_exit_1_and_keeps_the_good_checkpoint(what, tmp_path, monkeypatch, capsys):
    true_update = Agent.update

    def update(agent):
        true_update(agent)
        if what == "loss" and agent.updates == 30:
            agent.losses["q"] = torch.tensor(math.nan)
        elif what == "weight" and agent.updates == 50:  # at an episode's end, where a checkpoint is due
            agent.log_alpha.data[1] = math.nan
        elif what == "weight before an evaluation" and agent.updates == 25:
            agent.actor.heads.bias.data[0] = math.nan

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(script, "LOG_EVERY", 10 if what == "loss" else 10_000)
    monkeypatch.setattr("sys.argv", ["sparse_mtrl_gmp_set.py", *command_line(**SHORT, run_dir=tmp_path / "run")])
    with pytest.raises(SystemExit) as leaving:
        cli.run(script.main, Args, script.PRESETS)
    err = capsys.readouterr().err
    expected = {"loss": "losses/q is not finite at step 240", "weight": "log_alpha is not finite at step 300"}
    expected = expected.get(what, r"actor\.heads\.bias is not finite at step 225")
    assert leaving.value.code == 1 and re.search(expected, err) and err.count("\n") == 1, err
    checkpoint = load_checkpoint(str(tmp_path / "run"), "sparse_mtrl_gmp_set")
    assert checkpoint["agent"]["log_alpha"].isfinite().all()
    assert checkpoint["agent"]["updates"] <= {"loss": 30, "weight": 49}.get(what, 24)
    evaluated = (tmp_path / "run" / "evaluations.csv").read_text().count("\n") - 1
    assert evaluated == (0 if what == "weight before an evaluation" else 3)


def test_evaluations_have_the_episodes_of_training(finished_run):
    with open(finished_run["run_dir"] / "evaluations.csv", newline="") as file:
        assert {float(row["episode_length"]) for row in csv.DictReader(file)} == {SHORT["episode_steps"]}


def test_training_and_evaluations_are_paid_by_the_reward_version(tmp_path, monkeypatch):
    made, true_make = [], envs.make_env

    def make_env(task, **options):
        made.append((options.get("reward_version"), options.get("max_episode_steps")))
        return true_make(task, **options)

    for module in (script, envs):
        monkeypatch.setattr(module, "make_env", make_env)
    options = SHORT | {"reward_version": "v1", "max_q": 1e6, "total_steps": 225, "prune_every": 5, "hidden_dim": 4}
    script.main(Args(**options, run_dir=str(tmp_path / "run")))
    assert made.count(("v1", 25)) == 3 + 3  # to train in, and to evaluate in


def test_an_episode_that_succeeded_once_is_a_success(tmp_path, monkeypatch):
    true_step, seen = envs.TaskEnvs.step, []

    def step(tasks, actions):
        obs, rewards, _ = true_step(tasks, actions)
        seen.append(None)
        return obs, rewards, np.array([len(seen) % 25 == 3, 0, 0], np.float32)

    monkeypatch.setattr(envs.TaskEnvs, "step", step)
    successes = []
    monkeypatch.setattr(Recorder, "episode", lambda recorder, *arguments: successes.append(arguments[-1]))
    script.main(Args(**(SHORT | {"method": "dense", "hidden_dim": 4}), run_dir=str(tmp_path / "run")))
    assert successes == pytest.approx(6 * [1 / 3])


def test_the_buffer_holds_an_episodes_steps_one_after_the_other(finished_run):
    data = finished_run["checkpoint"]["agent"]["replay"]["data"]
    goes_on = torch.arange(149) % SHORT["episode_steps"] != SHORT["episode_steps"] - 1
    assert torch.equal(data["next_obs"][:, :-1][:, goes_on], data["obs"][:, 1:][:, goes_on])
    assert not (data["next_obs"] == data["obs"]).all(-1).any()


def test_an_episodes_return_is_the_mean_of_the_tasks(tmp_path, monkeypatch):
    true_step, returns = envs.TaskEnvs.step, []

    def step(tasks, actions):
        obs, _, successes = true_step(tasks, actions)
        return obs, np.array([1.0, 2.0, 6.0], np.float32), successes

    monkeypatch.setattr(envs.TaskEnvs, "step", step)
    monkeypatch.setattr(Recorder, "episode", lambda recorder, *arguments: returns.append(arguments[3]))
    script.main(Args(**(SHORT | {"method": "dense", "hidden_dim": 4}), run_dir=str(tmp_path / "run")))
    assert returns == 6 * [25 * 3.0]


# --------------------------------------------------------------------------------------------------------- learning


class Point(gym.Env):
    """A point on a line that should go right in one task and left in the other; the observation does not tell which."""

    def __init__(self, task: str, seed: int, max_episode_steps: int, **_):
        self.goal = {"reach-v3": 0.8, "push-v3": -0.8}[task]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.np_random = np.random.default_rng(seed)
        self.limit = max_episode_steps

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.default_rng(seed)
        self.position, self.steps = self.np_random.uniform(-1, 1), 0
        return self._observation(), {}

    def _observation(self):
        return np.array([self.position, 1.0], dtype=np.float32)

    def step(self, action):
        self.position = float(np.clip(self.position + 0.2 * action[0], -1, 1))
        self.steps += 1
        distance = abs(self.position - self.goal)
        info = {"success": float(distance < 0.1 and self.steps == self.limit)}  # at the goal when the episode ends
        return self._observation(), -distance, False, self.steps == self.limit, info


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "method"), [("shared", "gmp"), ("moore", "set")])
def test_two_opposite_tasks_are_learned_with_a_tenth_of_the_weights(arch, method, tmp_path, monkeypatch):
    """Whoever mixes up heads, tasks, signs or masks stays at a success near 0.1."""
    for module in (script, envs):
        monkeypatch.setattr(
            module, "make_env", lambda task, seed, max_episode_steps=20, **_: Point(task, seed, max_episode_steps)
        )
    options = {
        "benchmark": "reach,push",
        "total_steps": 2200,
        "episode_steps": 20,
        "learning_starts": 400,
        "eval_every": 2200,
        "eval_episodes": 20,
        "arch": arch,
        "method": method,
        "sparsify_critic": True,
        "sparsity": 0.9,
        "experts": 2,
        "hidden_dim": 48,
        "hidden_layers": 2,
        "batch_per_task": 32,
        "prune_every": 100,
        "evolve_every": 100,
        "learning_rate": 6e-3,
        "gamma": 0.9,
        "checkpoint_every": 0,
        "quiet": True,
    }
    results = script.main(Args(**options, run_dir=str(tmp_path / "run")))
    assert results["metrics"]["sparsity/actor/density"] == pytest.approx(0.1, abs=0.01)
    for task in results["tasks"]:
        assert task["final_success"] >= 0.8 and task["final_return"] > -8  # a random policy: -16
