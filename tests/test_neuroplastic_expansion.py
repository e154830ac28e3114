"""NE's mathematics against literal versions of the paper's formulas, and its promises on real training runs."""

import copy
import csv
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import neuroplastic_expansion as ne
from common import cli, metrics, recorder
from common.cli import Interrupted, load_checkpoint
from neuroplastic_expansion import Agent, Args, ReplayBuffer, Topology

ROOT = Path(__file__).parent.parent
SCRIPT = "neuroplastic_expansion"
CPU = torch.device("cpu")
# A real task with short episodes in seconds: growth, pruning, review and evaluations happen.
TINY = {
    "env_id": "Hopper-v5",
    "steps_per_task": 600,
    "learning_starts": 200,
    "eval_every": 200,
    "eval_episodes": 1,
    "hidden_dim": 16,
    "batch_size": 32,
    "topology_every": 50,
    "review_every": 20,
    "review_threshold": 0.05,
    "dormant_threshold": 0.3,
    "checkpoint_every": 100,
    "quiet": True,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_agent(total_updates: int = 400, obs_dim: int = 5, act_dim: int = 2, **changes) -> Agent:
    """An agent with small networks, whose buffer holds random transitions."""
    torch.manual_seed(0)
    agent = Agent(Args(**(TINY | changes)), obs_dim, act_dim, total_updates, CPU)
    rng = np.random.default_rng(0)
    for _ in range(300):
        obs, next_obs, action = (rng.standard_normal(n).astype(np.float32) for n in (obs_dim, obs_dim, act_dim))
        transition = {"obs": obs, "next_obs": next_obs, "action": action.clip(-1, 1)}
        agent.replay.add(**transition, reward=float(rng.standard_normal()), terminated=float(rng.random() < 0.1))
    return agent


def topologies_of(agent: Agent) -> list[Topology]:
    return [topology for group in agent.topologies.values() for topology in group]


def everything_of(topology: Topology, layer: int) -> dict[str, torch.Tensor]:
    """A layer's weight, its target copy and its Adam moments, by name."""
    weight = topology.layers[layer].weight
    moments = topology.optimizer.state.get(weight, {})
    named = {"weight": weight, "target": topology.targets[layer].weight}
    return named | {name: moments[name] for name in ("exp_avg", "exp_avg_sq") if name in moments}


def density(topology: Topology) -> float:
    return sum(int(mask.sum()) for mask in topology.masks) / sum(mask.numel() for mask in topology.masks)


@functools.cache
def literal_progress(update: int, end: int) -> float:
    """The cosine's increments summed by brute force, normalised to 1 at the end."""
    rate = [1 + math.cos(math.pi * (i + 0.5) / 20_000) for i in range(20_000)]
    return sum(rate[: 20_000 * update // end]) / sum(rate)


# ------------------------------------------------------------------------------------------------ start and schedule


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(shapes=shapes, share=st.floats(0.01, 1))
def test_erdos_renyi_counts_solve_the_equation(shapes, share):
    """min(size, epsilon (in + out)), with epsilon found by bisection."""
    sizes = [rows * columns for rows, columns in shapes]
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(min(size, middle * (r + c)) for size, (r, c) in zip(sizes, shapes, strict=True))
        low, high = (middle, high) if total < share * sum(sizes) else (low, middle)
    counts = ne.erdos_renyi_counts(shapes, share)
    for count, size, (r, c) in zip(counts, sizes, shapes, strict=True):
        assert min(size, high * (r + c)) - 1 - 1e-5 <= count <= min(size, high * (r + c)) + 1e-5
    assert sum(counts) - 1e-5 <= share * sum(sizes) < sum(counts) + len(shapes) + 1e-5


@settings(max_examples=50, deadline=None)
@given(shapes=shapes, shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_no_layer_has_fewer_connections_at_a_higher_density(shapes, shares):
    small, large = (ne.erdos_renyi_counts(shapes, share) for share in sorted(shares))
    assert all(a <= b for a, b in zip(small, large, strict=True))
    assert ne.erdos_renyi_counts(shapes, 1.0) == [rows * columns for rows, columns in shapes]


def test_start_density_of_the_default_networks():
    agent = make_agent(obs_dim=17, act_dim=6, hidden_dim=256)  # as on HalfCheetah-v5
    for topology in topologies_of(agent):
        for layer, target, mask in zip(topology.layers, topology.targets, topology.masks, strict=True):
            assert torch.equal(layer.weight != 0, mask.bool())  # active weights keep their initial value
            assert torch.equal(layer.weight, target.weight) and layer.weight is not target.weight
        assert 0.2 - len(topology.masks) / sum(mask.numel() for mask in topology.masks) < density(topology) <= 0.2
    masks = [topology.masks[1] for topology in agent.topologies["critic"]]
    assert not torch.equal(*masks)  # drawn for each critic on its own


@settings(max_examples=200, deadline=None)
@given(end=st.integers(1, 10_000), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_growth_follows_the_cosine_and_closes_the_gap_exactly(end, fractions):
    earlier, later = sorted(int(fraction * end) for fraction in fractions)
    progress = [ne.growth_progress(update, end) for update in (0, earlier, later, end)]
    assert progress == sorted(progress) and progress[0] == 0 and progress[-1] == 1
    # between two updates it grows by the area under (alpha / 2)(1 + cos(pi t / T_end))
    t = np.linspace(earlier, later, 2001)
    rate = (1 + np.cos(np.pi * t / end)) / end
    assert progress[2] - progress[1] == pytest.approx(np.trapezoid(rate, t), abs=1e-6)


@pytest.mark.parametrize(
    ("every", "until", "delay"),
    [(25, 0.75, 2), (20, 0.75, 2), (7, 0.5, 2), (1000, 0.75, 2), (7, 0.5, 1), (20, 0.75, 3)],
)
def test_topology_updates_come_at_the_interval_and_at_the_end(every, until, delay, monkeypatch):
    """The actor counts its own updates, fewer than the critics'. The end is a moment of its own."""
    options = {"topology_every": every, "topology_until": until, "policy_delay": delay}
    agent = make_agent(100, **options, hidden_dim=4, batch_size=4)
    moments, nets = {"actor": [], "critic": []}, {id(t): n for n, group in agent.topologies.items() for t in group}
    true_after_step = Topology.after_step

    def after_step(topology, forward):
        asked = []
        true_after_step(topology, lambda: asked.append(forward()))
        if asked:  # who is dormant
            moments[nets[id(topology)]].append(agent.updates)

    monkeypatch.setattr(Topology, "after_step", after_step)
    for _ in range(100):
        agent.update()
    end = int(until * 100)
    critic = sorted({*range(every, end + 1, every), end})
    step = delay * (every // delay)
    actor = sorted({*range(step, end + 1, step), end // delay * delay})
    assert moments == {"critic": [m for m in critic for _ in range(2)], "actor": actor}


def test_another_seed_has_other_connections():
    one, same, other = (topologies_of(make_agent(seed=seed))[1].masks[1] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# --------------------------------------------------------------------------------------------------- prune and grow


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 8), columns=st.integers(1, 8), share=st.floats(0, 1))
def test_pick_takes_the_largest_candidates(seed, rows, columns, share):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(0, 4, (rows, columns))).float()  # with ties
    candidates = torch.from_numpy(rng.random((rows, columns)) < 0.7)
    count = int(share * rows * columns)
    picked = ne.pick(scores, candidates, count, generator(seed))
    among = [(scores[i, j].item(), (i, j)) for i in range(rows) for j in range(columns) if candidates[i, j]]
    assert picked.sum() == min(count, len(among))
    largest = sorted((score for score, _ in among), reverse=True)[:count]
    assert sorted(scores[picked].tolist(), reverse=True) == largest
    assert all(candidates[i, j] for i, j in picked.nonzero().tolist())


def test_equal_scores_are_picked_at_random():
    scores, candidates, drawn = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), torch.ones(5, dtype=torch.bool), generator()
    frequency = sum(ne.pick(scores, candidates, 2, drawn).double() for _ in range(600)) / 600
    assert frequency[0] == 1 and frequency[4] == 0
    assert ((frequency[1:4] - 1 / 3).abs() < 0.08).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.1, 0.5]), batch=st.integers(1, 7))
def test_dormant_neurons(seed, threshold, batch):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(3, 5), torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)]
    layers[0].bias.data[:2] -= 10
    layers[1].bias.data -= 0.5
    x = torch.randn(batch, 3)
    network = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    dormant = ne.dormant_neurons([[layer] for layer in layers], lambda: network(x), threshold)
    rows = [[relu(layers[0], row)] for row in x.tolist()]
    rows = [[h, relu(layers[1], h)] for [h] in rows]
    for depth in range(2):
        magnitude = np.mean([row[depth] for row in rows], 0)
        assert dormant[depth].tolist() == [m <= threshold * np.mean(magnitude) for m in magnitude]
    assert dormant[0][:2].all() and not any(layer._forward_pre_hooks for layer in layers)


def relu(layer: torch.nn.Linear, x: list[float]) -> list[float]:
    """A layer of neurons, one after the other."""
    weights, biases = layer.weight.tolist(), layer.bias.tolist()
    return [
        max(0.0, sum(w * v for w, v in zip(row, x, strict=True)) + b) for row, b in zip(weights, biases, strict=True)
    ]


def trained_topology(net: str = "critic", **changes):
    """An agent after some updates without topology changes; one of its topologies; a call of that network."""
    agent = make_agent(topology_every=1000, topology_until=1.0, total_updates=1000, **changes)
    for _ in range(6):
        agent.update()
    batch = agent.replay.recent(64)
    inputs = (batch["obs"],) if net == "actor" else (torch.cat([batch["obs"], batch["action"]], 1),)
    network = agent.actor if net == "actor" else agent.critic.twins[0]
    return agent, agent.topologies[net][0], lambda: network(*inputs)


def change(topology: Topology, update: int, gradients: list[torch.Tensor], forward) -> None:
    """Prune and grow as in this update, one of 100 in which the network grows, with these dense gradients."""
    topology.every, topology.until, topology.updates, topology.gradients = 1, 100, update - 1, gradients
    topology.after_step(forward)


def hidden(topology: Topology, forward) -> list[torch.Tensor]:
    """Hidden activations, from the outputs of the ReLU modules of the network that `forward` calls."""
    outputs = []
    hooks = [layer.register_forward_pre_hook(lambda _, x: outputs.append(x[0].clone())) for layer in topology.layers]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return outputs[1:]


@pytest.mark.parametrize("net", ["actor", "critic"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("prune", ["dormant", "magnitude", "none"])
def test_one_topology_update_by_the_letter(net, growth, prune):
    """Prune, then grow each layer to the schedule: sets and counts against sorting, everything off is exactly 0."""
    _, topology, forward = trained_topology(net, growth=growth, prune=prune, dormant_threshold=0.0)
    topology.layers[0].bias.data[:5] = -1000  # silent whatever they receive
    gradients = [torch.rand(mask.shape) - 0.5 for mask in topology.masks]
    before = [mask.bool() for mask in topology.masks]
    weights = [layer.weight.detach().clone() for layer in topology.layers]
    silent = [(h == 0).all(0) for h in hidden(topology, forward)]
    assert silent[0][:5].all()
    in_place = [mask.data_ptr() for mask in topology.masks]
    change(topology, 20, gradients, forward)
    assert [mask.data_ptr() for mask in topology.masks] == in_place

    total = [0, 0]
    for i, mask in enumerate(topology.masks):
        now, count = mask.bool(), int(before[i].sum())
        scheduled = topology.start[i] + int((topology.final[i] - topology.start[i]) * literal_progress(20, 100))
        limit = int(0.4 * (scheduled - count))
        assert now.sum() == scheduled
        values = everything_of(topology, i)
        assert len(values) == 4
        assert all((value[~now] == 0).all() for value in values.values())

        # which connections were pruned: even those that were grown again do not have their old weight
        pruned = before[i] & (values["weight"] != weights[i])
        eligible = [
            (r, c)
            for r, c in before[i].nonzero().tolist()
            if (i < len(silent) and silent[i][r]) or (i > 0 and silent[i - 1][c])
        ]
        if prune == "dormant":
            assert {tuple(rc) for rc in pruned.nonzero().tolist()} <= set(eligible)
            assert pruned.sum() == min(limit, len(eligible))
        elif prune == "magnitude":
            smallest = sorted((abs(weights[i][r, c].item()), r, c) for r, c in before[i].nonzero().tolist())[:limit]
            assert {tuple(rc) for rc in pruned.nonzero().tolist()} == {(r, c) for _, r, c in smallest}
        else:
            assert not pruned.any()

        kept = before[i] & ~pruned
        grown, k = now & ~kept, scheduled - int(kept.sum())
        assert grown.sum() == k
        off = [(abs(gradients[i][r, c].item()), r, c) for r, c in (~kept).nonzero().tolist()]
        top = {(r, c) for _, r, c in sorted(off, reverse=True)[:k]}
        assert ({tuple(rc) for rc in grown.nonzero().tolist()} == top) == (growth == "gradient" or k in (0, len(off)))
        assert (values["weight"][grown & kept.any(1, keepdim=True)] == 0).all()  # neurons with inputs: start at 0
        assert all((values[name][grown] == 0).all() for name in ("exp_avg", "exp_avg_sq"))
        assert torch.equal(values["weight"][kept], weights[i][kept])
        total[0] += int(pruned.sum())
        total[1] += k
    assert [topology.pruned, topology.grown] == total and (total[0] > 0) == (prune != "none")


def test_a_neuron_without_inputs_gets_weights_of_the_initialiser():
    """Its bias is left alone if it never had any: it may be all that makes the neuron active, and so worth inputs."""
    _, topology, forward = trained_topology("critic", prune="none")
    above = topology.masks[2].any(1)  # a sparse start may leave some without inputs
    topology.masks[1][3] = 0
    topology.layers[1].weight.data[3] = 0
    topology.targets[1].weight.data[3] = 0
    untouched = topology.layers[1].bias.detach().clone()
    outgoing_before = topology.layers[2].weight[:, 3].detach().clone()
    moments = topology.optimizer.state[topology.layers[1].bias]
    moments["exp_avg"].fill_(1)
    gradients = [torch.zeros_like(mask) for mask in topology.masks]
    gradients[1][3] = 1  # so that its inputs are picked
    change(topology, 30, gradients, forward)
    incoming = topology.layers[1].weight[3].detach()
    bound = 1 / math.sqrt(topology.layers[1].in_features)
    assert (incoming != 0).all() and (incoming.abs() <= bound).all() and incoming.abs().max() > bound / 2
    assert torch.equal(topology.layers[1].bias, untouched) and (moments["exp_avg"] == 1).all()
    assert torch.equal(topology.layers[2].weight[above, 3], outgoing_before[above])  # what is new on its way out is 0


def test_a_dormant_neuron_loses_all_its_connections_and_comes_back_alive():
    """omega = 1 and growth enough: pruned to the last input, its bias reset, weights of the initialiser on return."""
    _, topology, forward = trained_topology("critic", prune_limit=1.0)
    topology.layers[1].bias.data[0] = -1000
    moments = topology.optimizer.state[topology.layers[1].bias]
    moments["exp_avg"].fill_(1)
    below, own = ne.dormant_neurons(topology.levels, forward, topology.dormant_threshold)[:2]
    had = topology.masks[1].bool()
    left = had & ~own[:, None] & ~below
    gradients = [torch.rand(mask.shape) for mask in topology.masks]
    gradients[1][0] = 2  # its inputs are the first to be picked
    change(topology, 60, gradients, forward)
    assert 0 < topology.pruned < topology.grown and topology.masks[1][0].all()
    assert topology.layers[1].bias[0] == topology.targets[1].bias[0] == moments["exp_avg"][0] == 0
    assert torch.equal(moments["exp_avg"] == 0, had.any(1) & ~left.any(1))
    incoming = topology.layers[1].weight[0].detach()
    assert (incoming != 0).all() and incoming.abs().max() <= 1 / math.sqrt(topology.layers[1].in_features)
    assert (topology.targets[1].weight[0] == 0).all()  # the target follows by averaging
    assert (hidden(topology, forward)[1][:, 0] > 0).any()


def test_the_networks_output_keeps_its_bias():
    """Only hidden neurons can be silent for ever."""
    _, topology, forward = trained_topology("actor", prune="none")
    topology.masks[-1].zero_()
    topology.layers[-1].weight.data.zero_()
    bias = topology.layers[-1].bias.detach().clone()
    change(topology, 30, [torch.rand(mask.shape) for mask in topology.masks], forward)
    assert torch.equal(topology.layers[-1].bias, bias) and (topology.layers[-1].weight == 0).all()


def test_growth_reads_the_gradients_of_the_batch_and_the_step_uses_the_old_masks(monkeypatch):
    """The dense gradient of the critics' loss reaches the topology; the same step leaves new connections at 0."""
    agent = make_agent(topology_every=5, prune="none")
    for _ in range(4):
        agent.update()
    seen, steps = [], []
    true_after_step, true_step = Topology.after_step, agent.optimizers["critic"].step

    def after_step(topology, forward):
        steps.append("topology")
        seen.append((topology, topology.gradients, [mask.clone() for mask in topology.masks]))
        true_after_step(topology, forward)

    def step():
        steps.append("step")
        true_step()

    monkeypatch.setattr(Topology, "after_step", after_step)
    monkeypatch.setattr(agent.optimizers["critic"], "step", step)
    state, critic, target = torch.get_rng_state(), copy.deepcopy(agent.critic), copy.deepcopy(agent.target_critic)
    agent.update()
    assert steps == ["step", "topology", "topology"]
    torch.set_rng_state(state)
    batch = agent.replay.sample(agent.args.batch_size)
    loss, _ = ne.critic_loss(critic, agent.target_actor, target, batch, agent.args)
    linear = [module.weight for module in critic.modules() if isinstance(module, torch.nn.Linear)]
    expected = torch.autograd.grad(loss, linear)
    gradients = [gradient for _, copies, _ in seen for gradient in copies]
    for gradient, value in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, value)
    assert any((gradient[mask == 0] != 0).any() for gradient, mask in zip(gradients, seen[0][2], strict=False))
    had = seen[0][2][1].bool()
    new = ~had & had.any(1, keepdim=True) & seen[0][0].masks[1].bool()
    assert new.any() and (agent.critic.twins[0][2].weight[new] == 0).all()


def test_who_is_dormant_is_told_by_the_network_itself_on_the_batch(monkeypatch):
    agent, outputs = make_agent(topology_every=1), []
    for parameter in (*agent.target_actor.parameters(), *agent.target_critic.parameters()):
        parameter.data.add_(0.1)
    monkeypatch.setattr(Topology, "after_step", lambda topology, forward: outputs.append(forward()))
    agent.updates = 1
    torch.manual_seed(3)
    agent.update()
    torch.manual_seed(3)
    batch = agent.replay.sample(agent.args.batch_size)
    *of_critics, action = outputs
    assert torch.equal(action, agent.actor(batch["obs"]))
    for values in of_critics:
        assert all(map(torch.equal, values, agent.critic(batch["obs"], batch["action"])))


# ----------------------------------------------------------------------------------------------------------- review


def test_the_change_of_the_dormant_ratio_by_the_letter():
    review, changes = ne.Review(), []
    for dormant in (5, 4, 4, 7):
        review.measure([torch.arange(6) < dormant - 1, torch.arange(4) < 1])
        changes.append(review.change)
    assert review.ratio == pytest.approx(0.7)
    assert changes == pytest.approx([math.inf, 0.1, 0.09, 0.9 * 0.09 + 0.1 * 0.3])


def test_review_draws_half_of_the_batches_from_the_oldest_transitions(monkeypatch):
    agent, drawn = make_agent(review_threshold=0.02, review_every=10_000), []
    true_draw_from = ReplayBuffer.draw_from

    def draw_from(replay, oldest):
        drawn.append(oldest)
        true_draw_from(replay, oldest)

    monkeypatch.setattr(ReplayBuffer, "draw_from", draw_from)
    for _ in range(50):
        agent.update()
    assert set(drawn) == {1.0} and agent.review.reviews == 0
    agent.review.change = 0.019
    for _ in range(200):
        agent.update()
    share = np.mean([oldest == 0.3 for oldest in drawn[50:]])
    assert set(drawn[50:]) == {0.3, 1.0} and 0.4 < share < 0.6 and agent.review.reviews == 200
    for changes in ({"review": False}, {"method": "static"}, {"method": "td3"}):
        assert make_agent(**changes).review is None


def test_the_method_takes_no_random_numbers_from_td3():
    states = []
    for method in ("td3", "ne"):
        agent = make_agent(method=method, topology_every=2, review_threshold=1.0)
        if agent.review:
            agent.review.change = 0.0
        for _ in range(4):
            agent.update()
        states.append(torch.get_rng_state())
    assert agent.review.reviews == 4 and sum(topology.pruned for topology in agent.topologies["critic"]) > 0
    assert torch.equal(*states)


def test_the_dormant_ratio_of_both_critics_is_measured_at_its_interval():
    agent = make_agent(review_every=7)
    for update in range(1, 22):
        agent.update()
        if update % 7 == 0:
            batch = agent.replay.recent(ne.METRIC_BATCH)
            features = metrics.hidden_features(agent.critic, (batch["obs"], batch["action"]))
            assert len(features) == 6 and agent.review.ratio == metrics.dormant_ratio(features, 0.3).item()
        assert math.isinf(agent.review.change) == (update < 14)


@settings(max_examples=50, deadline=None)
@given(added=st.integers(1, 40), capacity=st.integers(1, 20), oldest=st.floats(0, 1))
def test_the_oldest_transitions_of_the_ring(added, capacity, oldest):
    replay = ReplayBuffer(capacity, 1, 1, CPU)
    in_place = replay.bound.data_ptr(), replay.oldest_row.data_ptr()
    for number in range(added):
        value = np.array([number], dtype=np.float32)
        replay.add(obs=value, next_obs=value, action=value, reward=number, terminated=0.0)
    present = list(range(max(0, added - capacity), added))
    eligible = present[: max(1, int(oldest * len(present)))]
    replay.draw_from(oldest)
    batch = replay.sample(500)
    assert set(batch["reward"].tolist()) <= set(eligible)
    assert len(eligible) > 8 or set(batch["reward"].tolist()) == set(eligible)
    assert torch.equal(batch["obs"][:, 0], batch["reward"])
    assert replay.recent(3)["reward"].tolist() == present[-3:]
    assert in_place == (replay.bound.data_ptr(), replay.oldest_row.data_ptr())


# ------------------------------------------------------------------------------------------------------------- TD3


def test_losses_by_the_letter():
    agent = make_agent(target_noise=0.7, noise_clip=0.5)
    for _ in range(3):
        agent.update()
    batch = agent.replay.recent(64)
    assert batch["terminated"].sum() > 0
    with torch.no_grad():  # each target critic is the smaller one on half of the batch
        one, two = agent.target_critic(batch["next_obs"], agent.target_actor(batch["next_obs"]))
        agent.target_critic.twins[0][-1].bias += (two - one).median()
    torch.manual_seed(5)
    loss, q_mean = ne.critic_loss(agent.critic, agent.target_actor, agent.target_critic, batch, agent.args)
    torch.manual_seed(5)
    noise = torch.randn_like(batch["action"])
    total, q_values = 0.0, []
    with torch.no_grad():
        for n in range(64):
            jitter = [min(0.5, max(-0.5, 0.7 * e)) for e in noise[n].tolist()]
            target_action = agent.target_actor(batch["next_obs"][n])
            action = torch.tensor([min(1, max(-1, a + e)) for a, e in zip(target_action.tolist(), jitter, strict=True)])
            q = min(twin(torch.cat([batch["next_obs"][n], action])).item() for twin in agent.target_critic.twins)
            y = batch["reward"][n].item() + (0.0 if batch["terminated"][n] else 0.99 * q)
            for twin in agent.critic.twins:
                q_values.append(twin(torch.cat([batch["obs"][n], batch["action"][n]])).item())
                total += (q_values[-1] - y) ** 2 / 64
        action = agent.actor(batch["obs"])
        expected = -agent.critic.twins[0](torch.cat([batch["obs"], action], 1)).mean()
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert q_mean.item() == pytest.approx(np.mean(q_values[::2]), rel=1e-4, abs=1e-5)
    assert ne.actor_loss(agent.actor, agent.critic, batch["obs"]).item() == pytest.approx(expected.item())


def test_actor_and_targets_move_at_every_second_update_only():
    agent = make_agent(method="td3", tau=0.3)  # so large that targets that stay are seen
    nets = ("actor", "target_actor", "target_critic", "critic")
    for update in range(1, 5):
        before = {net: [p.detach().clone() for p in getattr(agent, net).parameters()] for net in nets}
        agent.update()
        for net in nets:
            moved = [not torch.equal(a, b) for a, b in zip(before[net], getattr(agent, net).parameters(), strict=True)]
            assert all(moved) == any(moved) == (net == "critic" or update % 2 == 0), (net, update)
    for slow, old, fast in (
        (agent.target_actor, before["target_actor"], agent.actor),
        (agent.target_critic, before["target_critic"], agent.critic),
    ):
        for mine, was, online in zip(slow.parameters(), old, fast.parameters(), strict=True):
            torch.testing.assert_close(mine, 0.7 * was + 0.3 * online)


def test_defaults_are_the_papers():
    args, agent = Args(), make_agent()
    named = {"hidden_dim": 256, "batch_size": 256, "learning_rate": 3e-4, "gamma": 0.99, "tau": 0.005}
    named |= {"exploration_noise": 0.1, "target_noise": 0.2, "noise_clip": 0.5, "policy_delay": 2}
    named |= {"learning_starts": 25_000, "steps_per_task": 1_000_000, "buffer_size": 1_000_000}
    named |= {"eval_every": 5000, "eval_episodes": 10, "action_repeat": 1, "initial_density": 0.2, "final_density": 1}
    named |= {"topology_every": 10_000, "topology_until": 0.75, "prune_limit": 0.4, "dormant_threshold": 0}
    named |= {"review_every": 1000, "review_probability": 0.5, "review_fraction": 0.3}
    named["review_threshold"] = 0.01
    assert {name: getattr(args, name) for name in named} == named
    assert (args.growth, args.prune, args.review) == ("gradient", "dormant", True)
    for optimizer in agent.optimizers.values():
        assert optimizer.defaults["lr"] == 3e-4 and optimizer.defaults["betas"] == (0.9, 0.999)


def test_the_arguments_reach_the_method():
    """A copied block has its own defaults: each argument of the script must override them."""
    changes = {"initial_density": 0.3, "final_density": 0.6, "topology_every": 31, "topology_until": 0.5}
    changes |= {"growth": "random", "prune": "magnitude", "prune_limit": 0.2, "dormant_threshold": 0.07}
    changes |= {"review_threshold": 0.3, "review_probability": 0.4, "review_fraction": 0.6}
    agent = make_agent(**changes)
    for net, delay in (("actor", 2), ("critic", 1)):
        for topology in agent.topologies[net]:
            assert (topology.every, topology.until) == (31 // delay, 200 // delay)
            named = ("growth", "prune", "prune_limit", "dormant_threshold")
            assert {name: getattr(topology, name) for name in named} == {name: changes[name] for name in named}
            shapes = [layer.weight.shape for layer in topology.layers]
            assert topology.start == ne.erdos_renyi_counts(shapes, 0.3)
            assert topology.final == ne.erdos_renyi_counts(shapes, 0.6)
            assert topology.generator is agent.generator is agent.review.generator
    assert (agent.review.threshold, agent.review.probability, agent.review.fraction) == (0.3, 0.4, 0.6)


def test_layers_and_normalisation():
    agent = make_agent()
    kinds = [[type(m).__name__ for m in network] for network in (agent.actor, agent.critic.twins[0])]
    assert kinds[0] == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert kinds[1] == ["Linear", "ReLU"] * 2 + ["Linear", "LayerNorm", "ReLU", "Linear"]


def test_exploration_is_noise_on_the_policy():
    agent = make_agent(exploration_noise=0.1)
    obs = np.zeros(5, dtype=np.float32)
    noise = np.array([agent.explore(obs) - agent.actor.act(obs) for _ in range(500)])
    assert 0.09 < noise.std() < 0.11 and abs(noise.mean()) < 0.01
    agent.actor[-1].bias.data.fill_(5)
    assert max(abs(agent.explore(obs)).max() for _ in range(20)) == 1


def test_td3_has_no_masks_and_nothing_of_the_method():
    agent = make_agent(method="td3")
    assert agent.topologies == {} and agent.review is None and agent.method_scalars() == {}
    assert all(p.all() for p in agent.actor.parameters()) and set(agent.parameter_counts()) == {"actor", "critic"}


def test_the_actor_learns_from_the_critics_on_the_batchs_observations():
    agent = make_agent(method="td3", policy_delay=1)
    for _ in range(5):  # the targets stay behind
        agent.update()
    actor = copy.deepcopy(agent.actor)
    torch.manual_seed(3)
    agent.update()
    torch.manual_seed(3)
    agent.replay.draw_from(1.0)
    batch = agent.replay.sample(agent.args.batch_size)
    assert agent.losses["actor"] == ne.actor_loss(actor, agent.critic, batch["obs"])  # after their step


def test_every_action_has_a_noise_of_its_own():
    agent, obs = make_agent(), np.zeros(5, dtype=np.float32)
    noise = np.array([agent.explore(obs) - agent.actor.act(obs) for _ in range(200)])
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.3


# ------------------------------------------------------------------------------------------------- on real training


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A whole run, watched: after every update, what is off is 0 and the density is the schedule's."""
    run_dir = tmp_path_factory.mktemp("ne") / "run"
    true_update, watched = Agent.update, {"densities": [], "reviews": []}

    def update(agent, **options):
        true_update(agent, **options)
        row = []
        for net, group in agent.topologies.items():
            own = agent.updates if net == "critic" else agent.updates // 2
            end, every = (300, 50) if net == "critic" else (150, 25)
            moment = min(own // every * every, end)
            for topology in group:
                for i, mask in enumerate(topology.masks):
                    for name, value in everything_of(topology, i).items():
                        assert (value[mask == 0] == 0).all(), (agent.updates, net, i, name)
                    gap = topology.final[i] - topology.start[i]
                    scheduled = topology.start[i] + gap * literal_progress(moment, end)
                    assert scheduled - 1 - 1e-6 <= mask.sum() <= scheduled + 1e-6 <= topology.final[i] + 1e-5
                row.append(density(topology))
        watched["densities"].append(row)
        watched["reviews"].append(agent.review.change < agent.review.threshold)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "update", update)
        patch.setattr(ne, "LOG_EVERY", 100)
        results = ne.main(Args(**TINY, run_dir=str(run_dir)))
    return {"run_dir": run_dir, "results": results, "checkpoint": load_checkpoint(str(run_dir), SCRIPT)} | watched


def test_a_run_grows_from_a_fifth_to_full_size(finished_run):
    densities, measured = np.array(finished_run["densities"]), finished_run["results"]["metrics"]
    assert len(densities) == 400 and (np.diff(densities, axis=0) >= 0).all()
    assert (densities[0] > 0.17).all() and (densities[0] <= 0.2).all()
    assert (densities[299:] == 1).all() and (densities[290] < 1).all()
    assert len(np.unique(densities[:, 1])) == 7  # the start and six topology updates of the critic
    assert measured["sparsity/actor/density"] == measured["sparsity/critic/density"] == 1
    assert measured["method/pruned/actor"] > 0
    assert measured["method/grown/critic"] > measured["method/pruned/critic"] > 0
    reviews = [False, *finished_run["reviews"][:-1]]
    assert 0 < measured["method/review_share"] < 1 and measured["method/review_share"] == np.mean(reviews)


def test_what_a_run_reports_is_what_its_files_and_masks_say(finished_run):
    measured, state = finished_run["results"]["metrics"], finished_run["checkpoint"]["agent"]
    with open(finished_run["run_dir"] / "evaluations.csv", newline="") as file:
        returns = [float(row["episode_return"]) for row in csv.DictReader(file)]
    assert (
        measured["mean_return"] == pytest.approx(np.mean(returns)) and measured["return_at_visit_end"] == returns[-1:]
    )
    parameters, topologies = finished_run["results"]["parameters"], state["topologies"]
    for net in ("actor", "critic"):
        assert parameters[f"{net}_connections"] == sum(int(mask.sum()) for mask in topologies[net][0]["masks"])
        assert measured[f"method/pruned/{net}"] == sum(topology["pruned"] for topology in topologies[net])
    assert parameters["actor"] == sum(value.numel() for value in state["actor"].values())
    twin = [value for name, value in state["critic"].items() if name.startswith("twins.0.")]
    assert parameters["critic"] == sum(value.numel() for value in twin)


def test_tensorboard_has_the_named_scalars_with_their_values(finished_run):
    events = EventAccumulator(str(finished_run["run_dir"])).Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/return/Hopper-v5"}
    expected |= {"losses/critic", "losses/actor", "losses/q"}
    expected |= {"method/review", "method/review_share", "method/dormant_change", "method/dormant_ratio_of_review"}
    for net, layers in (("actor", 3), ("critic", 4)):
        names = ("dormant_ratio_0", "dormant_ratio_0.025", "dormant_ratio_0.1", "active_fraction", "srank")
        names += ("effective_rank", "stable_rank", "weight_norm", "grad_norm")
        expected |= {f"plasticity/{net}/{name}" for name in names}
        expected |= {f"sparsity/{net}/{name}" for name in ("density", *(f"layer{i + 1}" for i in range(layers)))}
        expected |= {f"method/pruned/{net}", f"method/grown/{net}"}
    assert expected <= tags
    assert all(math.isfinite(event.value) for tag in tags for event in events.Scalars(tag))
    assert [event.step for event in events.Scalars("losses/critic")] == [300, 400, 500, 600]
    densities = [(event.step, event.value) for event in events.Scalars("sparsity/actor/density")]
    assert [step for step, _ in densities] == [0, 300, 400, 500, 600]
    assert [value for _, value in densities[1:]] == pytest.approx(
        [finished_run["densities"][n][0] for n in (99, 199, 299, 399)]
    )
    measured = {n: v for n, v in finished_run["results"]["metrics"].items() if n.startswith(("plasticity/", "method/"))}
    assert {name: events.Scalars(name)[-1].value for name in measured} == pytest.approx(measured)


def test_metrics_are_those_of_the_actor_and_the_first_critic_on_recent_transitions(monkeypatch):
    monkeypatch.setattr(ne, "METRIC_BATCH", 100)  # of the 300 in the buffer
    agent = make_agent()
    for _ in range(11):
        agent.update()
    batch, plasticity = agent.replay.recent(100), agent.plasticity()
    inputs = {"actor": (agent.actor, batch["obs"])}
    inputs["critic"] = (agent.critic.twins[0], torch.cat([batch["obs"], batch["action"]], 1))
    for net, (network, x) in inputs.items():
        features = []
        for module in network:
            x = module(x)
            if isinstance(module, torch.nn.ReLU):
                features.append(x.detach())
        units = torch.cat([h.mean(0) / h.mean() for h in features])
        for tau in (0, 0.025, 0.1):
            assert plasticity[f"plasticity/{net}/dormant_ratio_{tau}"] == (units <= tau).float().mean()
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in network.parameters()))
        assert plasticity[f"plasticity/{net}/weight_norm"] == pytest.approx(norm, rel=1e-4)


def test_compile_compiles_both_losses_and_learns_the_same(monkeypatch):
    """With their gradients; traced by torch.compile, which needs no compiler of C++ for that."""
    compiled, true_compile = [], torch.compile

    def compile_in_python(function, **options):
        compiled.append(options)
        return true_compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_in_python)
    agents = [make_agent(compile=compiles) for compiles in (False, True)]
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 2  # no piece of them stays outside
    for agent in agents:
        torch.manual_seed(5)
        for _ in range(4):
            agent.update()
    for net in ("actor", "critic", "target_critic"):
        for plain, weight in zip(*(getattr(agent, net).parameters() for agent in agents), strict=True):
            torch.testing.assert_close(weight, plain)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"topology_every": 200}, "growth in 2 large step"),
        ({"review_every": 200}, "no review: two measurements take all updates"),
        ({"review_every": 199}, None),
        ({"method": "td3", "topology_every": 200, "review_every": 300}, None),
        ({}, None),
    ],
)
def test_what_a_short_budget_never_reaches_is_said(changes, warning):
    class Said(list):
        say = list.append

    said = Said()
    ne.warn_of_long_intervals(make_agent(**changes), said, 400)
    assert [warning in line for line in said] == [True] if warning else said == []


@pytest.mark.parametrize("delay", [1, 2, 3, 7])
def test_what_is_logged_is_of_updates_that_train_the_actor(monkeypatch, delay):
    monkeypatch.setattr(ne, "LOG_EVERY", 10)
    agent, logged = make_agent(policy_delay=delay), []
    for update in range(1, 61):
        before = [p.clone() for p in agent.actor.parameters()]
        agent.update()
        trained = any(not torch.equal(p, old) for p, old in zip(agent.actor.parameters(), before, strict=True))
        assert trained == (update % delay == 0)
        if agent.logged:
            logged.append(update)
            assert trained and agent.actor[0].weight.grad is not None
    due = [next(u for u in range(start, start + delay) if u % delay == 0) for start in range(10, 60, 10)]
    assert [update for update in logged if 10 <= update < 60] == due


def test_visits_are_one_environment_or_a_sequence():
    visits = {
        (): ["HalfCheetah-v5"],
        ("env_id", "Ant-v5"): ["Ant-v5"],
        ("env_id", "Hopper-v5,Ant-v5"): ["Hopper-v5,Ant-v5"],  # no environment: refused where it is made
        ("task_seq", "Hopper-v5,Ant-v5"): ["Hopper-v5", "Ant-v5"] * 2,
        ("task_seq", ""): [""] * 2,  # a shell's variable that is not set: refused too
    }
    for option, expected in visits.items():
        assert ne.visits_of(Args(cycles=2, **dict([option] if option else []))) == expected
    with pytest.raises(cli.ArgumentError, match="--task-seq"):
        ne.sizes_of(Args(task_seq=""))
    with pytest.raises(cli.ArgumentError, match="--env-id Hopper-v5,Ant-v5"):
        ne.sizes_of(Args(env_id="Hopper-v5,Ant-v5"))


def test_static_masks_never_change_and_final_density_is_the_limit():
    for changes, most in (({"method": "static"}, 0.2), ({"growth": "none"}, 0.2), ({"final_density": 0.5}, 0.5)):
        agent = make_agent(**changes)
        first = [mask.clone() for topology in topologies_of(agent) for mask in topology.masks]
        for _ in range(320):
            agent.update()
            for topology in topologies_of(agent):
                assert all(mask.sum() <= final for mask, final in zip(topology.masks, topology.final, strict=True))
        last = [mask for topology in topologies_of(agent) for mask in topology.masks]
        assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True)) == (most == 0.2)
        for net in ("actor", "critic"):
            assert most - 0.02 < agent.method_scalars()[f"sparsity/{net}/density"] <= most, (changes, net)
        for topology in topologies_of(agent):
            for i, mask in enumerate(topology.masks):
                assert all((v[mask == 0] == 0).all() for v in everything_of(topology, i).values())


def test_full_density_without_review_and_pruning_is_td3_byte_by_byte(tmp_path):
    ne.main(Args(**(TINY | {"method": "td3"}), run_dir=str(tmp_path / "td3")))
    ne.main(Args(**TINY, initial_density=1.0, review=False, prune="none", run_dir=str(tmp_path / "ne")))
    td3, grown = (load_checkpoint(str(tmp_path / name), SCRIPT) for name in ("td3", "ne"))
    for checkpoint in (td3, grown):
        del checkpoint["agent"]["generator"], checkpoint["agent"]["topologies"]  # what TD3 has no use for
    for key in ("agent", "random", "at"):
        assert_same_tensors(td3[key], grown[key], key)
    assert (tmp_path / "td3" / "evaluations.csv").read_bytes() == (tmp_path / "ne" / "evaluations.csv").read_bytes()


SEQUENCE = TINY | {"task_seq": "Hopper-v5, InvertedPendulum-v5", "steps_per_task": 300, "learning_starts": 100}


def test_a_sequence_of_tasks_is_padded_and_visited_in_turn(tmp_path, monkeypatch):
    """Random actions on the first visit to a task only; a visit starts with an empty buffer; all resumes exactly."""
    learned, batches, true_explore, true_sample = [], [], Agent.explore, ReplayBuffer.sample

    def explore(agent, obs):
        learned.append(agent.updates)
        return true_explore(agent, obs)

    def sample(replay, batch_size):
        batch = true_sample(replay, batch_size)
        batches.append(batch["obs"])
        return batch

    monkeypatch.setattr(Agent, "explore", explore)
    monkeypatch.setattr(ReplayBuffer, "sample", sample)
    results = ne.main(Args(**SEQUENCE, run_dir=str(tmp_path / "whole")))
    assert results["global_step"] == 1200 and len(results["metrics"]["return_at_visit_end"]) == 4
    # steps on which the policy acts before an update: none in the first two warm-ups, all in the others
    assert [learned.count(updates) for updates in (0, 200, 400, 600)] == [1, 1, 101, 101]
    padding = [bool((obs[:, 4:] == 0).all()) for obs in batches]  # a pendulum has four observations, a hopper eleven
    assert padding == ([False] * 200 + [True] * 200) * 2
    with open(tmp_path / "whole" / "evaluations.csv", newline="") as file:
        rows = [(int(r["global_step"]), int(r["phase"]), int(r["task_index"])) for r in csv.DictReader(file)]
    ends = [(300 * (phase + 1), phase, i) for phase in range(4) for i in range(2)]
    between = [row for row in rows if row[0] % 300]
    assert [row for row in rows if row[0] % 300 == 0] == ends and all(row[2] == row[1] % 2 for row in between)

    policies = [ne.load_policy(str(tmp_path / "whole"), task) for task in range(2)]
    for task in (-1, 2):
        with pytest.raises(cli.ArgumentError, match=f"has no task {task}; it has tasks 0 to 1"):
            ne.load_policy(str(tmp_path / "whole"), task)
    assert [policy(np.zeros(n)).shape for policy, n in zip(policies, (11, 4), strict=True)] == [(3,), (1,)]
    one, two = policies[1](np.ones(4)), policies[0](np.r_[np.ones(4), np.zeros(7)])
    assert one == two[:1]  # one network, zeros behind the pendulum's observation

    monkeypatch.undo()
    interrupt_at(monkeypatch, update=430)
    run_dir = str(tmp_path / "parts")
    with pytest.raises(Interrupted):
        ne.main(Args(**SEQUENCE, run_dir=run_dir))
    monkeypatch.undo()
    ne.main(Args(resume=run_dir, quiet=True))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_episodes_are_seeded_one_by_one(tmp_path, monkeypatch):
    seeds, true_reset = [], ne.PadSpaces.reset

    def reset(env, **options):
        seeds.append(options["seed"])
        return true_reset(env, **options)

    monkeypatch.setattr(ne.PadSpaces, "reset", reset)
    changes = {"steps_per_task": 60, "learning_starts": 50, "cycles": 1, "eval_every": 1000, "eval_episodes": 1}
    ne.main(Args(**(SEQUENCE | changes), run_dir=str(tmp_path)))
    per_visit = [[ne.seed_of(1, ne.TRAIN_STARTS, phase, episode) for episode in range(60)] for phase in range(2)]
    training = [[seed for seed in seeds if seed in own] for own in per_visit]  # the others are evaluations
    assert all(len(used) > 1 and used == own[: len(used)] for used, own in zip(training, per_visit, strict=True))
    assert not set(per_visit[0]) & set(per_visit[1])


def test_dm_control_with_action_repeat(tmp_path):
    changes = {"env_id": "dmc/cartpole-balance", "action_repeat": 8, "steps_per_task": 260, "eval_every": 1000}
    results = ne.main(Args(**(TINY | changes), run_dir=str(tmp_path / "run")))
    assert results["tasks"][0]["final_return"] > 0
    with open(tmp_path / "run" / "evaluations.csv", newline="") as file:
        assert next(csv.DictReader(file))["episode_length"] == "125.0"
    replay = load_checkpoint(str(tmp_path / "run"), SCRIPT)["agent"]["replay"]["data"]
    assert not replay["terminated"].any(), "a time limit is no end"


def test_what_terminates_is_stored_as_the_end(finished_run):
    """Hopper falls within a few dozen steps: as often as an episode was over before its limit of 1000."""
    ends = EventAccumulator(str(finished_run["results"]["run_dir"])).Reload().Scalars("charts/episodic_length")
    assert len(ends) > 5 and all(end.value < 1000 for end in ends)
    assert finished_run["checkpoint"]["agent"]["replay"]["data"]["terminated"].sum() == len(ends)


@pytest.mark.slow
def test_it_learns_to_swing_up_a_pendulum(tmp_path):
    """TD3 and growth together. A random policy returns about -1200, this run -161, seeds 1 and 2 -300 and -178.

    Which connections grow is not seen here: the tests of one topology update are for that.
    """
    arguments = {"env_id": "Pendulum-v1", "steps_per_task": 4000, "learning_starts": 500, "eval_every": 4000, "seed": 3}
    arguments |= {"hidden_dim": 64, "batch_size": 64, "learning_rate": 2e-3, "gamma": 0.98, "policy_delay": 1}
    arguments |= {"topology_every": 100, "review_every": 100, "quiet": True}
    results = ne.main(Args(**arguments, run_dir=str(tmp_path / "run")))
    assert results["tasks"][0]["final_return"] > -400
    assert results["metrics"]["sparsity/critic/density"] == 1


def test_growth_lasts_over_all_visits(tmp_path, monkeypatch):
    built = []

    def agent(args, obs_dim, act_dim, total_updates, device):
        built.append((obs_dim, act_dim, total_updates))
        raise KeyboardInterrupt

    monkeypatch.setattr(ne, "Agent", agent)
    with pytest.raises(KeyboardInterrupt):
        ne.main(Args(**SEQUENCE, run_dir=str(tmp_path / "run")))
    assert built == [(11, 3, 4 * (300 - 100))]


def test_the_report_takes_of_each_visit_its_own_tasks_returns():
    names = ("phase", "task", "episode_return")
    rows = [(0, "a", 1.0), (0, "a", 3.0), (0, "b", 50.0), (1, "b", 6.0), (1, "a", 70.0), (1, "b", 8.0), (1, "a", 90.0)]
    report = ne.final_metrics(make_agent(), [dict(zip(names, row, strict=True)) for row in rows], ["a", "b"])
    assert report["return_at_visit_end"] == [3.0, 8.0] and report["mean_return"] == (1 + 3 + 6 + 8) / 4


def test_the_buffer_holds_an_episodes_steps_one_after_the_other(finished_run):
    data = finished_run["checkpoint"]["agent"]["replay"]["data"]
    goes_on = data["terminated"][:-1] == 0  # a hopper's episode ends by its fall
    assert torch.equal(data["next_obs"][:-1][goes_on], data["obs"][1:][goes_on])
    assert not (data["next_obs"] == data["obs"]).all(1).any()


# -------------------------------------------------------------------------------------------------- the command line


def command_line(**options) -> list[str]:
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


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
    """Same weights, moments, masks, buffer, random states and evaluations, byte by byte, and the same metrics."""
    first, second = load_checkpoint(str(one), SCRIPT), load_checkpoint(str(two), SCRIPT)
    for checkpoint in (first, second):
        for name in ("seconds", "pace", "events"):  # of the clock and the file system
            del checkpoint["record"][name]
    for key in ("agent", "at", "random"):
        assert_same_tensors(first[key], second[key], key)
    assert_same_tensors(first["record"]["rows"], second["record"]["rows"])
    for net, curve in first["record"]["curves"]["density"].items():  # `LOG_EVERY` may differ, step 0 is always there
        assert curve[0] == second["record"]["curves"]["density"][net][0] and curve[0][0] == 0
    assert (one / "evaluations.csv").read_bytes() == (two / "evaluations.csv").read_bytes()
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for name in ("metrics", "tasks", "global_step", "parameters"):
        assert results[0][name] == results[1][name]


def interrupt_at(monkeypatch, update: int, signum: int = signal.SIGTERM) -> None:
    """A signal arrives during this update."""
    true_update, calls = Agent.update, []

    def interrupted(agent, **options):
        calls.append(None)
        if len(calls) == update:
            os.kill(os.getpid(), signum)
        true_update(agent, **options)

    monkeypatch.setattr(Agent, "update", interrupted)


def test_the_command_leaves_every_file_and_ends_with_a_table(finished_run, tmp_path):
    words = command_line(**(TINY | {"run_dir": tmp_path / "run", "quiet": False}))
    command = [sys.executable, str(ROOT / "neuroplastic_expansion.py"), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "run") in run.stdout.splitlines()[0]
    assert "mean_return" in run.stdout and "Warning" not in run.stderr
    assert (tmp_path / "run" / "summary.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["script"] == SCRIPT and results["global_step"] == 600 and len(results["tasks"]) == 1
    with open(tmp_path / "run" / "evaluations.csv", newline="") as file:
        steps = [int(row["global_step"]) for row in csv.DictReader(file)]
    assert len(steps) == 3 and 200 <= steps[0] < 400 <= steps[1] < steps[2] == 600  # at the end of the episode
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    # a subprocess and a call of main are the same run
    assert_same_run(tmp_path / "run", finished_run["run_dir"])


KILLED = """
import os, signal, sys
import neuroplastic_expansion as ne
true_update, last = ne.Agent.update, int(sys.argv.pop())
def update(agent, **options):
    if agent.updates == last:
        os.kill(os.getpid(), signal.SIGKILL)
    true_update(agent, **options)
ne.Agent.update = update
ne.cli.run(ne.main, ne.Args)
"""


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(finished_run, tmp_path):
    run_dir, rng = tmp_path / "run", np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    moments = [0, *sorted(int(n) for n in rng.integers(5, 395, 2))]  # the first one before any later checkpoint
    for resumes, moment in enumerate(moments):
        words = command_line(**(TINY | {"run_dir": run_dir, "checkpoint_every": 0}))
        if resumes:
            words = ["--resume", str(run_dir), "--quiet", "--checkpoint-every", str(TINY["checkpoint_every"])]
        command = [sys.executable, "-c", KILLED, *words, str(moment)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
        assert run.returncode == -signal.SIGKILL, (moments, run.stderr)
        assert not list(run_dir.glob("results.json"))
    ne.main(Args(resume=str(run_dir), quiet=True))
    assert_same_run(run_dir, finished_run["run_dir"])


def test_interrupt_saves_prints_the_resume_command_and_exits_130(finished_run, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, update=120, signum=signal.SIGINT)
    run_dir = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["neuroplastic_expansion.py", *command_line(**TINY, run_dir=run_dir)])
    with pytest.raises(SystemExit) as leaving:
        cli.run(ne.main, Args, ne.PRESETS)
    assert leaving.value.code == 130
    assert f"python neuroplastic_expansion.py --resume {run_dir}" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    ne.main(Args(resume=str(run_dir), quiet=True))
    assert_same_run(run_dir, finished_run["run_dir"])


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(finished_run, tmp_path, monkeypatch):
    true_evaluate, calls = metrics.evaluate, []

    def evaluate(*arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_evaluate(*arguments)

    monkeypatch.setattr(recorder.metrics, "evaluate", evaluate)
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        ne.main(Args(**TINY, run_dir=str(run_dir)))
    ne.main(Args(resume=str(run_dir), quiet=True))
    assert_same_run(run_dir, finished_run["run_dir"])


BAD_ARGUMENTS = {
    "unknown environment": (["--env-id", "HalfCheeta-v5"], r"--env-id HalfCheeta-v5: .*HalfCheetah-v5"),
    "unknown task": (["--env-id", "dmc/cheetah-rum"], r"--env-id dmc/cheetah-rum: .*dmc/cheetah-run"),
    "discrete": (["--env-id", "CartPole-v1"], r"--env-id CartPole-v1: .*expected a Box"),
    "sequence": (["--task-seq", "Hopper-v5,Antt-v5"], r"--task-seq Antt-v5: .*Ant-v5"),
    "empty name": (["--task-seq", "Hopper-v5,,Ant-v5"], r"--task-seq : "),
    "final density": (["--final-density", "0.1"], r"--final-density 0\.1: must be at least --initial-density 0\.2"),
    "nothing to grow from": (["--initial-density", "1e-6"], r"--initial-density 1e-06: must be higher: a layer of"),
    "growth end": (["--topology-until", "0"], r"--topology-until 0\.0: must be above 0 and at most 1"),
    "early growth end": (["--topology-until", "1e-6"], r"--topology-until 1e-06: must be higher"),
    "rare actor": (["--policy-delay", "2000000"], r"--policy-delay 2000000: must be smaller"),
    "omega": (["--prune-limit", "1.5"], r"--prune-limit 1\.5: must be at least 0 and at most 1"),
    "warm-up": (["--steps-per-task", "5000"], r"--learning-starts 25000: must be below --steps-per-task 5000"),
    "nothing to evaluate": (["--evaluate", "nothing"], r"nothing: no readable run"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_2(case, monkeypatch, capsys, tmp_path):
    assert_refused(*BAD_ARGUMENTS[case], monkeypatch, capsys, tmp_path)


def assert_refused(words: list[str], expected: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["neuroplastic_expansion.py", *words])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        cli.run(ne.main, Args, ne.PRESETS)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.search(expected, err) and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.iterdir()) == before  # no folder is left behind


def test_a_resume_with_another_length_is_refused(finished_run, monkeypatch, capsys, tmp_path):
    """The schedule of growth depends on it."""
    words = ["--resume", str(finished_run["run_dir"]), "--steps-per-task", "700"]
    assert_refused(words, r"--steps-per-task 700: contradicts.*600", monkeypatch, capsys, tmp_path)


def test_help_and_presets(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["neuroplastic_expansion.py", "--help"])
    with pytest.raises(SystemExit) as leaving:
        cli.run(ne.main, Args, ne.PRESETS)
    out = capsys.readouterr().out
    assert leaving.value.code == 0
    for name in Args.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out
    args, _, _ = cli.prepare(Args(quick=True, gamma=0.9), SCRIPT, ne.PRESETS)
    assert args.gamma == 0.9 and {name: getattr(args, name) for name in ne.PRESETS["quick"]} == ne.PRESETS["quick"]


def test_resuming_a_finished_run_returns_its_result(finished_run):
    before = (finished_run["run_dir"] / "checkpoint.pt").read_bytes()
    assert ne.main(Args(resume=str(finished_run["run_dir"]), quiet=True)) == finished_run["results"]
    assert (finished_run["run_dir"] / "checkpoint.pt").read_bytes() == before


def test_evaluate_gives_the_last_evaluation_of_the_run(finished_run, capsys):
    """Same policy, same starts, same numbers; nothing in the folder changes."""
    run_dir = finished_run["run_dir"]
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    results = ne.main(Args(evaluate=str(run_dir), episodes=1))
    assert results[0]["episode_return"] == finished_run["results"]["tasks"][0]["final_return"]
    assert "Hopper-v5" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before


def test_load_policy_is_the_actor_of_the_run(finished_run):
    policy, weights = ne.load_policy(finished_run["results"]["run_dir"]), finished_run["checkpoint"]["agent"]["actor"]
    obs = np.random.default_rng(0).standard_normal(11)
    h = obs
    for layer in (0, 2, 4):
        h = weights[f"{layer}.weight"].double().numpy() @ h + weights[f"{layer}.bias"].double().numpy()
        h = np.tanh(h) if layer == 4 else np.maximum(h, 0)
    for dtype in (np.float32, np.float64, np.float16):
        action = policy(obs.astype(dtype))
        assert action.dtype == np.float32 and action == pytest.approx(h, abs=1e-5 if dtype != np.float16 else 1e-2)


def test_evaluating_more_often_changes_nothing_in_training(finished_run, tmp_path):
    ne.main(Args(**(TINY | {"eval_every": 100, "eval_episodes": 2}), run_dir=str(tmp_path / "run")))
    often, seldom = load_checkpoint(str(tmp_path / "run"), SCRIPT), finished_run["checkpoint"]
    assert_same_tensors(often["agent"], seldom["agent"])
    assert_same_tensors(often["random"], seldom["random"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("action", "action is not finite at step 350"),
        ("loss", "losses/q is not finite at step 400"),
        ("weight", r"target_critic\.twins\.0\.\S+ is not finite at step 600"),
    ],
)
def test_what_is_not_finite_stops_with_exit_1_and_keeps_the_good_checkpoint(
    what, message, tmp_path, monkeypatch, capsys
):
    true_update, calls = Agent.update, []

    def update(agent, **options):
        calls.append(None)
        if what == "action" and len(calls) == 150:
            agent.actor[0].bias.data.fill_(math.nan)
        true_update(agent, **options)
        if what == "loss" and len(calls) == 200:  # at step 400
            agent.losses["q"] = torch.tensor(math.nan)
        elif what == "weight" and len(calls) == 400:  # the last one
            next(agent.target_critic.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(ne, "LOG_EVERY", 100)
    words = command_line(**(TINY | {"checkpoint_every": 0, "env_id": "InvertedPendulum-v5"}), run_dir=tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["neuroplastic_expansion.py", *words])
    with pytest.raises(SystemExit) as leaving:
        cli.run(ne.main, Args, ne.PRESETS)
    err = capsys.readouterr().err
    assert leaving.value.code == 1 and err.count("\n") == 1
    assert re.search(message, err) and str(tmp_path) in err
    checkpoint = load_checkpoint(str(tmp_path / "run"), SCRIPT)
    assert checkpoint["record"]["global_step"] == 0
    assert all(weight.isfinite().all() for weight in checkpoint["agent"]["actor"].values())
