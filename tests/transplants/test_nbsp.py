"""NBSP's block in somebody else's SAC: it stands alone, keeps what the method promises, and equals the long form."""

import subprocess
import sys

import nbsp_sac
import pytest
import torch
import torch.nn.functional as F
from lifting import block, claims, lift, line_count
from torch import nn

from common import metrics

TINY = {"visits": 3, "steps_per_visit": 110, "learning_starts": 40, "batch_size": 16, "score_steps": 60, "previous": 60}
LIFTED = lift("nbsp")
TRUE_RELU = F.relu


def test_the_docstring_says_what_to_copy_and_how_much_it_is():
    [claim] = claims("nbsp")
    assert line_count(block("nbsp", claim.names)[1]) == claim.lines <= 87
    assert claim.files == ["tests/transplants/nbsp_sac.py"]
    assert set(vars(nbsp_sac.nbsp)) >= {"SkillMasks", "neuron_scores", "neuron_masks"}
    assert {name for name in vars(LIFTED) if not name.startswith("__")} == {*claim.names, "torch", "Tensor", "nn"}


def test_it_runs_as_a_command():
    command = [sys.executable, nbsp_sac.__file__]
    out = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True).stdout.splitlines()
    assert len(out) == 7 and out[3].startswith("after visit 3, to task 1: mean reward") and out[4].startswith("actor")


class LongForm:
    """The same by the letter of the paper: loops over neurons and steps, activations caught at F.relu."""

    def __init__(self, layers):
        self.hidden, self.scores, self.old = layers[:-1], {}, {}
        self.mask = {layer: [1.0] * len(layer.weight) for layer in self.hidden}

    def before_step(self):
        self.old = {layer: [p.detach().clone() for p in layer.parameters()] for layer in self.hidden}

    @torch.no_grad()
    def after_step(self):
        for layer, parameters in self.old.items():
            for parameter, old in zip(layer.parameters(), parameters, strict=True):
                for n, mask in enumerate(self.mask[layer]):
                    if mask < 1:
                        parameter[n] = old[n] + mask * (parameter[n] - old[n])

    def end_task(self, task, forward, goal_proximity):
        caught = []
        F.relu = lambda x: (caught.append(TRUE_RELU(x).detach()), TRUE_RELU(x))[1]
        forward()
        F.relu = TRUE_RELU
        q, ranked = goal_proximity.double().tolist(), []
        for depth, a in enumerate(caught):
            for n, values in enumerate(a.double().T.tolist()):
                if len(set(values)) > 1:
                    a_mean, q_mean = sum(values) / len(values), sum(q) / len(q)
                    hits = sum((v > a_mean) == (p > q_mean) for v, p in zip(values, q, strict=True))
                    ranked.append((-max(hits / len(q), 1 - hits / len(q)), depth, n))
        neurons = sum(a.shape[1] for a in caught)
        self.scores[task] = sorted(ranked)[: round(0.2 * neurons)]
        self.mask = {layer: [1.0] * len(layer.weight) for layer in self.hidden}
        for skill in self.scores.values():
            for negative, depth, n in skill:
                mask = self.mask[self.hidden[depth]]
                mask[n] = min(mask[n], 0.2 * (1 + negative))


@pytest.fixture(scope="module")
def watched():
    """A run in which every step of every network is compared with the optimizer's own, and every border looked at."""
    seen = {"steps": 0, "masked": 0, "borders": []}

    class Watched(LIFTED.SkillMasks):
        def before_step(self):
            self.begun = {p: p.detach().clone() for level in self.levels for x in level for p in x.parameters()}
            super().before_step()

        def after_step(self):
            free = {p: p.detach().clone() for p in self.begun}  # where the optimizer put them
            super().after_step()
            for depth, level in enumerate(self.levels):
                for p in (p for layer in level for p in layer.parameters()):
                    mask = self.masks[depth] if depth < len(self.masks) else torch.ones(len(p))
                    moved, freely = p.detach() - self.begun[p], free[p] - self.begun[p]
                    wanted = freely * (mask if p.ndim == 1 else mask[:, None])
                    torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=0)
                    assert torch.equal(p[mask == 1], free[p][mask == 1])  # not by rounding either
                    seen["masked"] += int((mask < 1).any() and (freely[mask < 1].abs() > 1e-5).any())
            seen["steps"] += 1

        def end_task(self, task, forward, goal_proximity):
            super().end_task(task, forward, goal_proximity)
            seen["borders"].append((task, [mask.clone() for mask in self.masks]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbsp_sac.nbsp, "SkillMasks", Watched)
        return seen | nbsp_sac.train(nbsp_sac.Args(**TINY)) | {"seen": seen}


def test_steps_are_scaled_by_the_masks_and_nothing_else_is_touched(watched):
    assert watched["seen"]["steps"] == 3 * 3 * 70  # three networks, three visits
    assert watched["seen"]["masked"] > 300


def test_at_each_border_a_fifth_of_the_neurons_is_held(watched):
    borders = watched["borders"]
    assert [task for task, _ in borders] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    for number, (_, masks) in enumerate(borders):
        flat = torch.cat(masks)
        assert ((flat == 1) | ((flat > -1e-6) & (flat <= 0.1))).all()  # 0.2 (1 - score), scores from 1/2 to 1
        held = int((flat < 1).sum())
        assert held == round(0.2 * 64) if number < 3 else 13 <= held <= 26  # later ones add to the earlier task's


def test_it_equals_the_long_form(watched, monkeypatch):
    """Same masks and, but for rounding, same networks after training."""
    monkeypatch.setattr(nbsp_sac.nbsp, "SkillMasks", LongForm)
    literal = nbsp_sac.train(nbsp_sac.Args(**TINY))
    for ours, theirs in zip(watched["masks"], literal["masks"], strict=True):
        expected = torch.tensor([mask for layer in theirs.hidden for mask in theirs.mask[layer]])
        torch.testing.assert_close(torch.cat(ours.masks), expected)
    networks = [nn.ModuleList([trained["actor"], *trained["critics"]]) for trained in (watched, literal)]
    for one, two in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2)
    free = nbsp_sac.train(nbsp_sac.Args(**(TINY | {"visits": 1})))  # and that is not for want of training
    assert not torch.allclose(free["actor"].fc2.weight, watched["actor"].fc2.weight, atol=1e-3)


def test_plasticity_metrics_take_its_networks(watched):
    obs, action = torch.randn(30, 4), torch.randn(30, 2)
    networks = {"actor": (watched["actor"], (obs,)), "critic": (watched["critics"][0], (obs, action))}
    scalars = metrics.plasticity(networks)
    for net, x in {"actor": obs, "critic": torch.cat([obs, action], 1)}.items():
        first = TRUE_RELU(networks[net][0].fc1(x))
        second = TRUE_RELU(networks[net][0].fc2(first))
        features = metrics.hidden_features(*networks[net])
        assert len(features) == 2 and torch.equal(features[0], first) and torch.equal(features[1], second)
        positive = torch.cat([first, second], 1).gt(0).float().mean()
        assert scalars[f"plasticity/{net}/active_fraction"] == pytest.approx(positive.item())


class Pixels(nn.Module):
    """A network of yet another style: a convolution, a Sequential trunk with a norm, no biases, two heads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        norm = nn.LayerNorm(10)
        self.trunk = nn.Sequential(nn.Linear(12, 10, bias=False), norm, nn.ReLU(), nn.Linear(10, 8, bias=False))
        self.value, self.advantage = nn.Linear(8, 1), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = torch.tanh(self.trunk(F.relu(self.conv(x)).flatten(1)))
        return self.value(x) + self.advantage(x)


@pytest.mark.parametrize("batch", [1, 7, None])
def test_the_rollout_may_come_in_several_calls(batch):
    """Whatever acts step by step, with or without a dimension for the batch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))
    x, q, layers = torch.randn(40, 5), torch.rand(40), [network[0], network[2], network[4]]
    parts = x.unbind() if batch is None else x.split(batch)
    one, several = LIFTED.SkillMasks(layers), LIFTED.SkillMasks(layers)
    one.end_task("task", lambda: network(x), q)
    several.end_task("task", lambda: [network(part) for part in parts], q)
    assert sum(int((mask < 1).sum()) for mask in one.masks) == 5
    for mask, other in zip(one.masks, several.masks, strict=True):
        torch.testing.assert_close(mask, other)


@pytest.mark.parametrize("target", ["update", "gradient"])
def test_layers_held_in_any_way(target):
    torch.manual_seed(0)
    network, x, q = Pixels(), torch.randn(40, 1, 4, 4), torch.rand(40)
    linear, norm, _, last = network.trunk
    masks = LIFTED.SkillMasks([[linear, norm], last, [network.value, network.advantage]], 0.5, 0.4, target)
    masks.end_task("any name", lambda: network(x), q)
    first = torch.relu(norm(linear(TRUE_RELU(network.conv(x)).flatten(1))))
    expected = LIFTED.neuron_scores([first, torch.tanh(last(first))], q)
    expected = LIFTED.neuron_masks([expected], 0.5, 0.4)
    for mask, one in zip(masks.masks, expected, strict=True):
        torch.testing.assert_close(mask, one)
    assert sum(int((mask < 1).sum()) for mask in masks.masks) == 9
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(x).square().mean().backward()
    gradients = {p: p.grad.clone() for p in network.parameters()}
    begun = {p: p.detach().clone() for p in network.parameters()}
    masks.before_step()
    optimizer.step()
    masks.after_step()
    of = {linear: masks.masks[0], norm: masks.masks[0], last: masks.masks[1]}
    for layer in (network.conv, linear, norm, last, network.value, network.advantage):
        for p in layer.parameters():
            mask = of.get(layer, torch.ones(len(p)))
            wanted = -0.1 * gradients[p] * mask.view(-1, *[1] * (p.ndim - 1))  # of plain SGD both targets are one
            torch.testing.assert_close(p.detach() - begun[p], wanted, atol=1e-6, rtol=0)


def test_the_control_holds_as_many_random_neurons_and_neither_holds_a_dead_one():
    torch.manual_seed(0)
    actor, obs, q = nbsp_sac.Actor(32), torch.randn(60, 4), torch.rand(60)
    actor.fc1.weight.data[3], actor.fc1.bias.data[3] = 0, -1
    layers = [actor.fc1, actor.fc2, [actor.fc_mean, actor.fc_logstd]]
    held = {}
    for proportion in (0.2, 1.0):
        for choose in ("skill", "random"):
            masks = LIFTED.SkillMasks(layers, proportion, choose=choose, seed=3)
            masks.end_task(0, lambda: actor(obs), q)
            held[choose] = torch.cat(masks.masks)
        skill, control = held["skill"], held["random"]
        assert torch.equal(skill.sort().values, control.sort().values) and not torch.equal(skill, control)
        assert (control < 1).sum() == (13 if proportion == 0.2 else 64 - sum(constant(actor, obs)))
        assert skill[3] == control[3] == 1


def constant(actor: nn.Module, obs: torch.Tensor) -> list[int]:
    """How many neurons of each hidden layer are the same for all observations."""
    return [int((h == h[0]).all(0).sum()) for h in metrics.hidden_features(actor, (obs,))]
