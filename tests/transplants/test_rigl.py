"""RigL and static topologies inside other people's SAC and TD3: the block stands alone and keeps what it promises."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import rigl_sac
import rigl_td3
import torch
import torch.nn.functional as F
from lifting import block, claims, lift, line_count
from torch import nn

from common import metrics

SHORT_SAC = {"total_timesteps": 550, "learning_starts": 200}
SHORT_TD3 = {"critic_regime": "rigl", "actor_regime": "rigl", "steps": 700, "start_steps": 200}


def test_the_block_has_the_lines_and_the_users_that_the_docstring_says():
    [claim] = claims("mst_rigl")
    assert claim.lines == line_count(block("mst_rigl", claim.names)[1]) <= 80
    assert claim.files == ["tests/transplants/rigl_sac.py", "tests/transplants/rigl_td3.py"]
    assert set(vars(lift("mst_rigl"))) >= set(claim.names)  # and it ran in an empty namespace


class Literal:
    """The same by the letter: the places of a layer's connections in a list, sorted in Python, and loops."""

    def __init__(self, layers, optimizer, regime, sparsity, until, every=1000, drop=0.3, targets=()):
        self.optimizer, self.regime, self.until, self.every, self.drop = optimizer, regime, until, every, drop
        self.layers, self.updates = [], 0
        weights, targets = [layer.weight for layer in layers], [layer.weight for layer in targets or layers]
        counts = rigl_sac.rigl.erdos_renyi_counts([tuple(w.shape) for w in weights], sparsity)
        for weight, target, count in zip(weights, targets, counts, strict=True):
            if count < weight.numel():
                self.layers.append((weight, target, set(torch.randperm(weight.numel())[:count].tolist())))
        for weight, target, places in self.layers:
            zero_outside(weight, places)
            zero_outside(target, places)

    def before_step(self):
        self.updates += 1
        for i, (weight, target, places) in enumerate(self.layers):
            if self.regime == "rigl" and self.updates % self.every == 0 and self.updates < self.until:
                share = self.drop / 2 * (1 + math.cos(math.pi * self.updates / self.until))
                count = int(share * len(places))
                size, gradient = weight.abs().flatten().tolist(), weight.grad.abs().flatten().tolist()
                kept = set(sorted(places, key=lambda place: size[place])[count:])
                free = sorted(set(range(len(size))) - kept, key=lambda place: -gradient[place])
                zero_outside(weight, kept)
                for moment in ("exp_avg", "exp_avg_sq"):
                    zero_outside(self.optimizer.state[weight][moment], kept)
                zero_outside(target, kept)
                places = kept | set(free[:count])
                self.layers[i] = (weight, target, places)
            zero_outside(weight.grad, places)


def zero_outside(tensor, places):
    tensor.data.view(-1)[[place for place in range(tensor.numel()) if place not in places]] = 0.0


class Watch:
    """What a topology promises, checked after every update; the updates at which each one moved; the last variables."""

    def __init__(self):
        self.moves, self.masks, self.counts, self.found = {}, {}, {}, None

    def __call__(self, found: dict) -> None:
        self.found = found
        for number, topology in enumerate(topologies_of(found)):
            moments = [topology.optimizer.state.get(weight) for weight in topology.weights]
            for i, mask in topology.masks.items():
                zeros = [topology.weights[i], topology.targets[i], *(moments[i][m] for m in ("exp_avg", "exp_avg_sq"))]
                assert all((tensor[~mask] == 0).all() for tensor in zeros), (number, i, topology.updates)
                assert self.counts.setdefault((number, i), int(mask.sum())) == int(mask.sum())
            before = self.masks.get(number, topology.initial)
            if any(not torch.equal(before[i], mask) for i, mask in topology.masks.items()):
                self.moves.setdefault(number, []).append(topology.updates)
            self.masks[number] = {i: mask.clone() for i, mask in topology.masks.items()}


def topologies_of(found: dict) -> list:
    """The topologies among the local variables of either script, critics first."""
    if "topologies" in found:
        return list(found["topologies"].values())
    return [found["q_topology"], found["actor_topology"]]


def networks_of(found: dict) -> dict[str, nn.Module]:
    """The networks among the local variables of either script; not those that a loop ended with."""
    passing = ("net", "targ", "q", "qf", "qf_target")
    return {name: found[name] for name in found if isinstance(found[name], nn.Module) and name not in passing}


@pytest.fixture(scope="module", params=["sac", "td3"])
def run(request):
    """A short foreign run that is watched; -> its script, how it was called, what was seen."""
    torch.set_num_threads(1)
    script, options = (rigl_sac, SHORT_SAC) if request.param == "sac" else (rigl_td3, SHORT_TD3)
    watch = Watch()
    script.train(**options, watch=watch)
    return script, options, watch


def share_of_the_first(topology) -> float:
    """Share of a topology's connections that it had at the start."""
    masks = [(mask, topology.initial[i]) for i, mask in topology.masks.items()]
    return sum(int((now & first).sum()) for now, first in masks) / sum(int(now.sum()) for now, _ in masks)


def test_connections_move_on_schedule_and_their_number_never_changes(run):
    script, _, watch = run
    critic, actor = [100, 200, 300], []  # of 349 updates, as their time is later; a static actor
    if script is rigl_td3:
        critic, actor = [100, 200, 300], [100]  # before 375, and before 187 of the actor's 250 updates
    numbers = range(len(topologies_of(watch.found)))
    assert [watch.moves.get(number, []) for number in numbers] == [critic] * (len(numbers) - 1) + [actor]
    for number, topology in enumerate(topologies_of(watch.found)):
        shapes = [tuple(weight.shape) for weight in topology.weights]
        expected = script.rigl.erdos_renyi_counts(shapes, 0.6)
        assert sum(expected) == round(0.4 * sum(map(math.prod, shapes)))
        for i, count in enumerate(expected):
            assert watch.counts.get((number, i), math.prod(shapes[i])) == count
        assert (share_of_the_first(topology) < 1) == (number in watch.moves)


def test_training_is_that_of_the_literal_form(run, monkeypatch):
    script, options, watch = run
    monkeypatch.setattr(script.rigl, "Topology", Literal)
    literal = {}
    script.train(**options, watch=literal.update)
    for name, module in networks_of(watch.found).items():
        for key, weight in module.state_dict().items():
            assert torch.equal(weight, literal[name].state_dict()[key]), f"{name}.{key}"


def test_a_dense_topology_changes_nothing(monkeypatch):
    options = {"critic_regime": "dense", "actor_regime": "dense", "steps": 400, "start_steps": 300}
    dense, without = {}, {}
    rigl_td3.train(**options, watch=dense.update)
    nothing = SimpleNamespace(before_step=lambda: None)
    monkeypatch.setattr(rigl_td3.rigl, "Topology", lambda *arguments, **numbers: nothing)
    rigl_td3.train(**options, watch=without.update)
    for name, module in networks_of(dense).items():
        for key, weight in module.state_dict().items():
            assert torch.equal(weight, without[name].state_dict()[key]), f"{name}.{key}"


def test_our_metrics_measure_their_networks(run, assert_plasticity):
    script, _, watch = run
    found, torch_input = watch.found, torch.randn(50, 4 if script is rigl_sac else 3)
    action = torch.rand(50, 2 if script is rigl_sac else 1)
    critic = found["qf1" if script is rigl_sac else "q1"]
    networks = {"actor": (found["actor"], (torch_input,)), "critic": (critic, (torch_input, action))}
    logged = metrics.plasticity(networks) | metrics.grad_norms(actor=found["actor"], critic=critic)
    first, second = [list(module.children())[:2] for module in (found["actor"], critic)]
    if script is rigl_td3:
        first = [first[0][0], first[0][2]]
    with torch.no_grad():
        hidden = [F.relu(first[0](torch_input))]
        hidden.append(F.relu(first[1](hidden[0])))
        assert_plasticity(logged, "actor", found["actor"], hidden, metrics.DORMANT_TAUS)
        hidden = [F.relu(second[0](torch.cat([torch_input, action], 1)))]
        normed = second[1](hidden[0]) if script is rigl_sac else F.layer_norm(second[1](hidden[0]), (64,))
        assert_plasticity(logged, "critic", critic, [*hidden, F.relu(normed)], metrics.DORMANT_TAUS)


class Pixels(nn.Module):
    """Somebody's network: a convolution without bias, attributes, functional activations, two heads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.fc = nn.Linear(8 * 25, 32)
        self.mean, self.log_std = nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x):
        h = F.relu(self.fc(F.relu(self.conv(x)).flatten(1)))
        return self.mean(h), self.log_std(h)


@pytest.mark.parametrize("with_convolution", [True, False])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    ],
)
def test_convolutions_heads_and_other_optimizers(with_convolution, optimizer):
    torch.manual_seed(0)
    net, rigl = Pixels(), lift("mst_rigl")
    optimizer = optimizer(net.parameters())
    layers = [net.conv] * with_convolution + [net.fc, net.mean, net.log_std]
    topology = rigl.Topology(layers, optimizer, "rigl", 0.8, until=40, every=5)
    untouched = net.conv.weight.detach().clone()
    assert (untouched == 0).any() == with_convolution
    for _ in range(50):
        mean, log_std = net(torch.randn(8, 3, 7, 7))
        optimizer.zero_grad()
        (mean.square().sum() + (log_std - 1).square().sum()).backward()
        topology.before_step()
        optimizer.step()
        for i, mask in topology.masks.items():
            moments = [value for value in optimizer.state[layers[i].weight].values() if torch.is_tensor(value)]
            for tensor in (layers[i].weight, *(moment for moment in moments if moment.shape == mask.shape)):
                assert (tensor[~mask] == 0).all()
    assert share_of_the_first(topology) < 0.9
    assert list(topology.masks) == list(range(len(layers) - 2))  # narrow heads are dense
    assert (net.conv.weight == 0).any() == with_convolution


@pytest.mark.parametrize("regime", ["static", "rigl"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimizer_that_has_moments_already_brings_nothing_back(regime, optimizer):
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2)),
        torch.randn(9, 6),
    )
    optimizer = optimizer(net.parameters(), lr=1e-2)
    for update in range(20):
        if update == 10:
            layers = [net[0], net[2]]
            topology = lift("mst_rigl").Topology(layers, optimizer, regime, 0.6, until=1000, every=500)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        if update >= 10:
            topology.before_step()
        optimizer.step()
    for layer, mask in zip(layers, topology.masks.values(), strict=True):
        assert not layer.weight[~mask].any() and layer.weight[mask].all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rigl_sac", "rigl_td3"])
def test_it_runs_as_a_command_and_learns(name):
    command = [sys.executable, str(Path(__file__).parent / f"{name}.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    first, last = (float(words.split()[0]) for words in run.stdout.partition("return ")[2].split(", "))
    assert last > {"rigl_sac": -8, "rigl_td3": -450}[name] > first, run.stdout
