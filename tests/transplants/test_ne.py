"""NE's block alone, in somebody else's TD3 and in networks of other shapes."""

import copy
import math

import ne_td3
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lifting import block, claims, lift, line_count
from torch import nn

from common import metrics

ne = ne_td3.ne


@pytest.mark.parametrize("number", [0, 1])
def test_the_docstring_says_what_to_copy_and_how_many_lines_it_is(number):
    claim = claims("neuroplastic_expansion")[number]
    lifted = lift("neuroplastic_expansion", number)  # runs in an empty namespace, with imports of torch and math
    assert hasattr(lifted, "Topology") and hasattr(lifted, "Review") == (number == 1)
    assert line_count(block("neuroplastic_expansion", claim.names)[1]) == claim.lines <= (105, 125)[number]
    assert claim.files == ["tests/transplants/ne_td3.py"]


def assert_exact_zeros(topology) -> None:
    """What is off is 0 in the network, its target and all moments."""
    for layer, target, mask in zip(topology.layers, topology.targets, topology.masks, strict=True):
        moments = [m for m in topology.optimizer.state[layer.weight].values() if torch.is_tensor(m) and m.ndim == 2]
        assert moments or not topology.updates
        for values in (layer.weight, target.weight, *moments):
            assert not values[mask == 0].any()


def scheduled(topology, update: int) -> list[int]:
    """Connections of each layer after this update of the network."""
    t = min(1, update / topology.until)
    done = 1 if t == 1 else t + math.sin(math.pi * t) / math.pi
    return [a + math.floor(done * (b - a)) for a, b in zip(topology.start, topology.final, strict=True)]


class Watched(ne.Topology):
    """Every change of connections is compared with the method written out, connection by connection."""

    changes, picked = 0, []

    def before_step(self):
        assert_exact_zeros(self)  # after the last step, and the targets have moved meanwhile
        self.dense = [layer.weight.grad.clone() for layer in self.layers]
        super().before_step()

    def after_step(self, forward):
        number = self.updates + 1
        before = [mask.bool() for mask in self.masks]
        due = number <= self.until and (number % self.every == 0 or number == self.until)
        if not due:
            super().after_step(forward)
            assert all(torch.equal(a, b.bool()) for a, b in zip(before, self.masks, strict=True))
            return
        outputs = []
        hooks = [layer.register_forward_hook(lambda _layer, _x, y: outputs.append(y)) for layer in self.layers[:-1]]
        with torch.no_grad():
            forward()
        for hook in hooks:
            hook.remove()
        sizes = [F.relu(y).abs().mean(0) for y in outputs]
        asleep = [[m <= self.dormant_threshold * size.mean() for m in size] for size in sizes]
        weights, pruned_before = [layer.weight.detach().clone() for layer in self.layers], self.pruned
        self.picked.clear()
        super().after_step(forward)

        expected = 0
        for i, count in enumerate(scheduled(self, number)):
            assert self.masks[i].sum() == count
            eligible = [
                (r, c)
                for r, c in before[i].nonzero().tolist()
                if (i < len(asleep) and asleep[i][r]) or (i > 0 and asleep[i - 1][c])
            ]
            limit = math.floor(self.prune_limit * (count - int(before[i].sum())))
            expected += min(limit, len(eligible))
            (pruned, grown), weight = self.picked[2 * i : 2 * i + 2], self.layers[i].weight
            kept = before[i] & ~pruned
            left = ~kept & ~grown
            assert {tuple(rc) for rc in pruned.nonzero().tolist()} <= set(eligible) and pruned.sum() <= limit
            assert torch.equal(weight[kept], weights[i][kept]) and torch.equal(self.masks[i].bool(), kept | grown)
            size, had_inputs = self.dense[i].abs(), kept.any(1, keepdim=True).expand_as(kept)
            assert not (kept & grown).any() and not weight[grown & had_inputs].any()
            assert not grown.any() or not left.any() or size[grown].min() >= size[left].max()
            if i < len(asleep):
                assert (weight[grown & ~had_inputs] != 0).all()
        assert self.pruned - pruned_before == expected
        Watched.changes += 1


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    block_globals = ne.Topology.before_step.__globals__

    def pick(*arguments, true_pick=block_globals["pick"]):
        Watched.picked.append(true_pick(*arguments))
        return Watched.picked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ne, "Topology", Watched)
        patch.setitem(block_globals, "pick", pick)
        return ne_td3.train(ne_td3.Args())


def test_every_growth_in_a_foreign_loop_is_the_method_written_out(trained):
    """The comparisons are in `Watched`; here, that they were made."""
    assert Watched.changes == sum(-(-topology.until // topology.every) for topology in trained["topologies"])
    for topology in trained["topologies"]:
        assert topology.pruned > 0 and all(mask.all() for mask in topology.masks)
        assert sum(topology.start) == pytest.approx(0.2 * sum(mask.numel() for mask in topology.masks), abs=3)
        assert sum(topology.start) + topology.grown - topology.pruned == sum(topology.final)


def test_the_foreign_loop_still_learns(trained):
    assert np.mean(trained["returns"][-5:]) > np.mean(trained["returns"][:5]) / 3  # minus distances: nearer to 0


def test_review_takes_old_transitions_once_the_dormant_ratio_stands_still():
    review = ne.Review(threshold=0.01, probability=1.0, fraction=0.3)
    asleep = [torch.tensor([True] + [False] * 9)]
    assert review.oldest() == 1.0
    review.measure(asleep)
    assert review.oldest() == 1.0  # one measurement is no change
    review.measure(asleep)
    assert review.oldest() == 0.3 and review.reviews == 1
    review.measure([~asleep[0]])
    assert review.change == pytest.approx(0.1 * 0.8) and review.oldest() == 1.0


def test_plasticity_metrics_see_the_foreign_networks(trained):
    obs, actions = trained["batch"]
    logged = metrics.plasticity({"actor": (trained["actor"], (obs,)), "critic": (trained["qf1"], (obs, actions))})
    with torch.no_grad():
        for name, net, inputs in (("actor", trained["actor"], (obs,)), ("critic", trained["qf1"], (obs, actions))):
            x = torch.cat(inputs, 1)
            h1 = F.relu(net.fc1(x))
            h2 = F.relu(net.fc2(h1))
            shares = torch.cat([h.mean(0) / h.mean() for h in (h1, h2)])
            for tau in (0, 0.025, 0.1):
                assert logged[f"plasticity/{name}/dormant_ratio_{tau}"] == (shares <= tau).float().mean()
            assert logged[f"plasticity/{name}/active_fraction"] == torch.cat([h1 > 0, h2 > 0]).float().mean()


class TwoHeads(nn.Module):
    """SAC's actor, as people write it."""

    def __init__(self, bias=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 24, bias=bias), nn.Linear(24, 16, bias=bias)
        self.fc_mean, self.fc_logstd = nn.Linear(16, 2, bias=bias), nn.Linear(16, 2, bias=bias)

    def forward(self, x):
        x = F.silu(self.fc2(torch.tanh(self.fc1(x))))
        return torch.cat([self.fc_mean(x), self.fc_logstd(x)], 1)

    def layers(self):
        return [self.fc1, self.fc2, [self.fc_mean, self.fc_logstd]]


class BesideConvolution(nn.Module):
    """Linear layers in a Sequential behind a convolution, which is not in the list."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16))
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        return self.out(F.relu(self.trunk(F.relu(self.conv(x.view(-1, 1, 4, 4))).flatten(1))))

    def layers(self):
        return [self.trunk[0], self.trunk[3], self.out]


SHAPES = {"two heads": TwoHeads, "no bias": lambda: TwoHeads(bias=False), "convolution": BesideConvolution}


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_held_in_any_way(shape, optimizer):
    torch.manual_seed(0)
    net = SHAPES[shape]()
    target, inputs = copy.deepcopy(net), 16 if shape == "convolution" else 5
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    optimizer = optimizer(net.parameters(), lr=1e-2, **options)
    numbers = {"every": 4, "until": 30, "dormant_threshold": 0.3}
    topology = ne.Topology(net.layers(), optimizer, target.layers(), **numbers)
    assert len(topology.layers) == len(topology.masks) == (3 if shape == "convolution" else 4)
    for update in range(1, 41):
        x = torch.randn(32, inputs)
        optimizer.zero_grad()
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        topology.before_step()
        optimizer.step()
        topology.after_step(lambda x=x: net(x))
        for param, target_param in zip(net.parameters(), target.parameters(), strict=True):
            target_param.data.lerp_(param.data, 0.1)
        assert_exact_zeros(topology)
        moment = 30 if update >= 30 else update - update % 4
        assert [int(mask.sum()) for mask in topology.masks] == scheduled(topology, moment)
    assert topology.pruned > 0 and all(mask.all() for mask in topology.masks)
    if shape == "convolution":
        assert net.conv.weight.all()


def test_a_dormant_neuron_is_pruned_in_both_heads():
    torch.manual_seed(0)
    net = TwoHeads()
    optimizer = torch.optim.Adam(net.parameters())
    numbers = {"every": 1, "until": 2, "prune_limit": 1.0}
    topology = ne.Topology(net.layers(), optimizer, **numbers)  # without targets
    net.fc2.bias.data[3] = -1000
    for layer in (net.fc_mean, net.fc_logstd, net.fc2):  # all its connections are there
        column = layer.weight[3] if layer is net.fc2 else layer.weight[:, 3]
        column.data.fill_(1)
    topology.masks[1][3], topology.masks[2][:, 3], topology.masks[3][:, 3] = 1, 1, 1
    net(torch.randn(32, 5)).sum().backward()
    topology.before_step()
    optimizer.step()
    net.fc2.bias.data[3] = -1000
    topology.after_step(lambda: net(torch.randn(32, 5)))
    assert not net.fc_mean.weight[:, 3].any() and not net.fc_logstd.weight[:, 3].any()
    assert net.fc2.bias[3] == 0  # without inputs for a moment: it starts anew


def test_half_an_update_too_many_still_ends_at_full_size():
    net = TwoHeads()
    optimizer = torch.optim.Adam(net.parameters())
    topology = ne.Topology(net.layers(), optimizer, every=5, until=25 / 2)  # as `until / delay` gives it
    for _ in range(13):
        net(torch.randn(32, 5)).sum().backward()
        topology.before_step()
        optimizer.step()
        topology.after_step(lambda: net(torch.randn(32, 5)))
    assert all(mask.all() for mask in topology.masks)


def test_a_list_in_the_wrong_order_is_refused():
    net = TwoHeads()
    with pytest.raises(AssertionError, match="level 1 does not read level 0"):
        ne.Topology([net.fc2, net.fc1], torch.optim.Adam(net.parameters()), every=1, until=1)
