"""SSDE's block in other people's networks and training loops, against its literal, full-size form."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.decomposition  # noqa: F401  the block imports it when called, which draws from Python's generator
import ssde_sac
import torch
import torch.nn as nn
import torch.nn.functional as F
from lifting import block, claims, lift, line_count

from common import metrics

SHORT = ssde_sac.Args(steps_per_task=220, learning_starts=60, batch_size=16, hidden=48)


@pytest.fixture
def ssde():
    return lift("ssde")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_docstring_counts_its_lines():
    [claim] = claims("ssde")
    assert line_count(block("ssde", claim.names)[1]) == claim.lines <= 140
    assert claim.files == ["tests/transplants/ssde_sac.py"]


# ------------------------------------------------------------------------------------------- in the foreign SAC


def test_the_foreign_sac_learns_three_tasks_and_forgets_none():
    """An untrained policy stays at a mean distance of 0.8."""
    _, distances = ssde_sac.train(ssde_sac.Args())
    assert max(row[-1] for row in distances) < 0.3
    for row in distances:
        assert row == distances[-1][: len(row)]


def test_in_the_foreign_sac_nothing_of_an_old_task_moves_and_plasticity_is_measured():
    obs, outputs, full, frozen_seen = torch.randn(50, 4), [], [], set()

    def watch(task, step, shared, policy, optimizer):
        nonlocal frozen_seen
        if len(full) == task:
            full.append({name: p.clone() for name, p in shared.network.named_parameters()})
            outputs.append([[y.clone() for y in shared.cut(old)(obs)] for old in range(task)])
        for name, owner in shared.owner.items():
            layer, frozen = policy.get_submodule(name), shared.places(task, name)["weight"][2]
            assert frozen.shape == layer.weight.shape
            for value in (layer.weight, layer.weight.grad, optimizer.state[layer.weight]["exp_avg_sq"]):
                assert (value[frozen] == 0).all()
            rows = shared.places(task, name)["bias"][1]
            bias_frozen = torch.tensor([bool((row < task).any()) for row in owner])[rows]
            assert name == "fc_logstd" or torch.equal(layer.bias_gate == 0, bias_frozen)
            frozen_seen |= {name} if frozen.any() else set()

    shared, _ = ssde_sac.train(SHORT, watch=watch)
    full.append(dict(shared.network.named_parameters()))
    outputs.append([list(shared.cut(old)(obs)) for old in range(3)])
    for before, after in itertools.pairwise(outputs):
        for old, new in zip(before, after, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    for task in range(3):
        for name in ("fc1", "fc2", "fc_mean"):
            for kind, (_, part, frozen) in shared.places(task, name).items():
                mine = torch.zeros_like(full[0][f"{name}.{kind}"], dtype=torch.bool)
                mine[part] = ~frozen
                before, after = full[task][f"{name}.{kind}"], full[task + 1][f"{name}.{kind}"]
                assert torch.equal(before[~mine], after[~mine])
                assert not torch.equal(before[mine], after[mine]) or not mine.any()
    assert frozen_seen == {"fc1", "fc2", "fc_mean"}
    policy = shared.cut(2)
    assert all(value.isfinite() for value in metrics.plasticity({"actor": (policy, (obs,))}).values())
    features = metrics.hidden_features(policy, (obs,))
    assert [h.shape[1] for h in features] == [len(indices) for indices in shared.neurons[2]]


class LiteralLinear(nn.Module):
    """A layer at full size with full-size masks: Eq. 5, 7 and 8 by the letter."""

    def __init__(self, layer, phi_in, phi_out, psi, psi_bias, beta, gate):
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.clone()), nn.Parameter(layer.bias.clone())
        self.used = torch.zeros_like(layer.weight)
        for i in range(len(phi_out)):
            for j in range(len(phi_in)):
                self.used[i, j] = phi_out[i] * phi_in[j]
        self.frozen, self.frozen_bias = self.used * psi, phi_out * psi_bias
        self.trainable, self.trainable_bias = self.used - self.frozen, phi_out - self.frozen_bias
        self.phi_out, self.beta, self.gate = phi_out, beta, gate

    def forward(self, x):
        weight = self.gate * self.trainable * self.weight + self.beta * self.frozen * self.weight.detach()
        bias = self.gate * self.trainable_bias * self.bias + self.beta * self.frozen_bias * self.bias.detach()
        return x @ weight.T + bias


class LiteralShared:
    """SSDE's policy for the foreign actor: accumulated masks Psi, every task's masks kept, nothing cut out."""

    def __init__(self, network, hidden, heads, own_heads, beta=0.3):
        self.network, self.beta, self.policies, self.neurons = network, beta, [], []
        self.psi = {n: torch.zeros_like(network.get_submodule(n).weight) for n in ("fc1", "fc2", "fc_mean")}
        self.psi_bias = {n: torch.zeros_like(network.get_submodule(n).bias) for n in self.psi}
        self.first_logstd = copy.deepcopy(network.fc_logstd)

    def begin_task(self, neurons):
        self.neurons.append(neurons)
        hidden = self.network.fc1.out_features
        phi = [torch.ones(4), *(torch.zeros(hidden).index_fill(0, n, 1) for n in neurons), torch.ones(2)]
        policy, gate = copy.deepcopy(self.network), 1.0 if len(self.neurons) == 1 else 1 - self.beta
        for level, name in enumerate(("fc1", "fc2", "fc_mean")):
            masks = (phi[level], phi[level + 1], self.psi[name], self.psi_bias[name])
            setattr(policy, name, LiteralLinear(getattr(self.network, name), *masks, self.beta, gate))
        none = (torch.zeros_like(self.first_logstd.weight), torch.zeros(2))
        policy.fc_logstd = LiteralLinear(self.first_logstd, phi[2], phi[3], *none, self.beta, 1.0)
        return policy

    def end_task(self, policy):
        self.policies.append(copy.deepcopy(policy))
        for name in self.psi:
            layer, trained = getattr(self.network, name), getattr(policy, name)
            with torch.no_grad():
                layer.weight.copy_(torch.where(trained.trainable == 1, trained.weight, layer.weight))
                layer.bias.copy_(torch.where(trained.trainable_bias == 1, trained.bias, layer.bias))
            self.psi[name] = torch.maximum(self.psi[name], trained.used)
            self.psi_bias[name] = torch.maximum(self.psi_bias[name], trained.phi_out)

    def cut(self, task):
        return self.policies[task]


class LiteralResets:
    """Eq. 9, a neuron and an observation at a time."""

    def __init__(self, layers, optimizer, every, until=650_000, threshold=0.6):
        self.layers, self.optimizer, self.every, self.until = layers, optimizer, every, until
        self.start, self.threshold, self.resets = copy.deepcopy([layers[0], layers[1]]), threshold, 0

    def due(self, step):
        return step % self.every == 0 and step < self.until

    @torch.no_grad()
    def reset(self, policy, obs):
        clean, perturbed = obs, obs + 0.01 * obs.mean(0)
        dormant = []
        for layer in self.layers[:2]:
            y, y2 = layer(clean), layer(perturbed)
            delta = {}
            for i in layer.phi_out.nonzero()[:, 0].tolist():
                delta[i] = sum(abs(float(y[n, i] - y2[n, i])) for n in range(len(obs))) / len(obs)
            mean = sum(delta.values()) / len(delta)
            dormant.append([i for i, d in delta.items() if d / mean < self.threshold])
            clean, perturbed = F.relu(y), F.relu(y2)
        for layer, start, rows in zip(self.layers, self.start, dormant, strict=False):
            self.resets += len(rows)
            for i in rows:
                for parameter, value, mine in (
                    (layer.weight, start.weight, layer.trainable),
                    (layer.bias, start.bias, layer.trainable_bias),
                ):
                    parameter[i] = torch.where(mine[i] == 1, value[i], parameter[i])
                    for moment in ("exp_avg", "exp_avg_sq"):
                        self.optimizer.state[parameter][moment][i] = 0


def test_training_equals_the_literal_full_size_form(ssde, double):
    """Three tasks of 160 updates each, with resets; the two differ by rounding in double precision."""
    made = []

    def literal_resets(*arguments):
        made.append(LiteralResets(*arguments))
        return made[-1]

    literal = {"SharedPolicy": LiteralShared, "DormantResets": literal_resets, "task_neurons": ssde.task_neurons}
    mine, distances = ssde_sac.train(SHORT, ssde)
    theirs, expected = ssde_sac.train(SHORT, SimpleNamespace(**literal))
    np.testing.assert_allclose(np.concatenate(distances), np.concatenate(expected), rtol=1e-6)
    for (name, parameter), other in zip(mine.network.named_parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7, msg=name)
    obs = torch.randn(50, 4)
    for task in range(3):
        for one, two in zip(mine.cut(task)(obs), theirs.cut(task)(obs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    for name, psi in theirs.psi.items():
        assert torch.equal(mine.owner[name] < ssde.NOBODY, psi == 1)
    assert all(resets.resets > 0 for resets in made)


# ------------------------------------------------------------------------------------- in networks of any form


class Stacked(nn.Module):
    """In a Sequential, without biases, a functional LayerNorm, one head, a log-std that depends on nothing."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 20, bias=False), nn.Tanh(), nn.Linear(20, 20, bias=False), nn.GELU())
        self.head, self.log_std = nn.Linear(20, 3, bias=False), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        h = self.net(x)
        return self.head(F.layer_norm(h, h.shape[-1:])), self.log_std.expand(len(x), -1)


class Pixels(nn.Module):
    """Behind a convolution that every task has for itself; three layers, two shared heads, one of each task's own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)
        self.a, self.b, self.c = nn.Linear(16, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.heads = nn.ModuleDict({"mean": nn.Linear(20, 3), "value": nn.Linear(20, 1), "std": nn.Linear(20, 3)})
        self.layers = [self.a, self.b, self.c]  # a plain list: it must not keep the layers at full size

    def forward(self, x):
        h = F.relu(self.conv(F.pad(x, (0, 3)).view(-1, 1, 3, 3)).flatten(1))
        for layer in self.layers:
            h = F.relu(layer(h))
        return [head(h) for head in self.heads.values()]


NETWORKS = {
    "stacked": (Stacked, ["net.0", "net.2"], ["head"], []),
    "pixels": (Pixels, ["a", "b", "c"], ["heads.mean", "heads.value"], ["heads.std"]),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_actor_keeps_what_its_tasks_have_learned(ssde, name, optimizer):
    network, hidden, heads, own_heads = NETWORKS[name]
    torch.manual_seed(0)
    shared, obs, finished = ssde.SharedPolicy(network(), hidden, heads, own_heads), torch.randn(32, 6), []
    for task in range(4):
        policy = shared.begin_task([torch.randperm(20)[:9].sort().values for _ in hidden])
        layers = [policy.get_submodule(layer) for layer in [*hidden, heads[0]]]
        optimize = optimizer(policy.parameters(), lr=1e-2)
        resets, first = ssde.DormantResets(layers, optimize, every=7, threshold=1.0), None
        for step in range(1, 21):
            loss = sum(((y - task - 1) ** 2).mean() for y in policy(obs))
            optimize.zero_grad()
            loss.backward()
            optimize.step()
            if resets.due(step):
                resets.reset(policy, obs)
            first = first or loss.item()
        assert loss.item() < first
        finished.append([y.clone() for y in policy(obs)])
        shared.end_task(policy)
        for old, outputs in enumerate(finished):
            assert all(torch.equal(a, b) for a, b in zip(shared.cut(old)(obs), outputs, strict=True)), (task, old)
    assert any(shared.places(3, layer)["weight"][2].any() for layer in hidden)


def test_a_weight_that_is_computed_from_others_is_refused(ssde):
    network = Stacked()
    nn.utils.parametrizations.weight_norm(network.net[2])
    with pytest.raises(AttributeError, match=r"not an .*Parameter"):
        ssde.SharedPolicy(network, ["net.0", "net.2"], ["head"])


def test_a_layer_norm_sees_the_neurons_of_the_task_only(ssde):
    torch.manual_seed(0)
    network = Stacked()
    neurons = [torch.tensor([1, 4, 7]), torch.tensor([0, 2, 3, 9])]
    policy, obs = ssde.SharedPolicy(network, ["net.0", "net.2"], ["head"]).begin_task(neurons), torch.randn(5, 6)
    first = torch.tanh(network.net[0](obs)[:, neurons[0]])
    h = F.gelu(first @ network.net[2].weight[neurons[1]][:, neurons[0]].T)
    mean, variance = h.mean(1, keepdim=True), h.var(1, keepdim=True, unbiased=False)
    expected = (h - mean) / (variance + 1e-5).sqrt() @ network.head.weight[:, neurons[1]].T
    torch.testing.assert_close(policy(obs)[0], expected)
