"""GMP, SET and ReDo, cut out of sparse_mtrl_gmp_set.py, in somebody else's PPO: what they promise holds there too."""

import copy
import math

import gmp_set_ppo as ppo
import pytest
import torch
import torch.nn.functional as F
from lifting import block, claims, lift, line_count
from torch import nn

from common import metrics

FEW = ["--num-iterations", "10", "--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--every", "8"]
FEW += ["--sparsity", "0.8"]
COUNTED = ("exp_avg", "exp_avg_sq")
PLACES = 4  # of a channel of the last convolution


@pytest.mark.parametrize("claim", [0, 1])
def test_the_docstring_says_what_the_block_is(claim):
    stated = claims("sparse_mtrl_gmp_set")[claim]
    assert stated.lines == line_count(block("sparse_mtrl_gmp_set", stated.names)[1])
    assert stated.files == ["tests/transplants/gmp_set_ppo.py"]
    assert stated.lines <= 81
    lift("sparse_mtrl_gmp_set", claim)  # in an empty namespace, with few imports


def matrices(tensors) -> list[torch.Tensor]:
    """Every matrix or convolution by itself: a copy for each task is a layer."""
    return [copy for t in tensors for copy in ([*t.detach()] if t.dim() == 3 else [t.detach()])]


def smallest(weight: torch.Tensor, mask: torch.Tensor, count: int) -> set[int]:
    """Places of the `count` smallest |w| of those in the mask, by a literal sort."""
    places = [i for i, exists in enumerate(mask.flatten().tolist()) if exists]
    return set(sorted(places, key=weight.abs().flatten().tolist().__getitem__)[:count])


class Spy:
    """Looks at every call of the method in the foreign loop."""

    def __init__(self, monkeypatch, cls, at_change):
        self.updates, self.changes, self.at_change = 0, 0, at_change
        true_before, true_after = cls.before_step, cls.after_step
        monkeypatch.setattr(cls, "before_step", lambda sparse: self.before(sparse, true_before))
        monkeypatch.setattr(cls, "after_step", lambda sparse: self.after(sparse, true_after))

    def before(self, sparse, true_before):
        parameters = sparse.optimizer.param_groups[0]["params"]
        gradients = [p.grad.clone() for p in parameters]
        true_before(sparse)
        masks = {id(weight): mask for weight, mask in zip(sparse.weights, sparse.masks, strict=True)}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert torch.equal(parameter.grad, gradient * masks.get(id(parameter), 1))

    def after(self, sparse, true_after):
        self.updates += 1
        tensors = [tensor.clone() for tensor in self.tensors(sparse)]
        weights, masks = copy.deepcopy(matrices(sparse.weights)), copy.deepcopy(matrices(sparse.masks))
        state = torch.get_rng_state()
        true_after(sparse)
        now = matrices(sparse.masks)
        if self.updates % sparse.every:
            assert all(map(torch.equal, now, masks)) and torch.equal(torch.get_rng_state(), state)
        else:
            self.changes += 1
            self.at_change(sparse, self.updates, weights, masks, now, state)
        existing = [mask for mask in sparse.masks for _ in range(3)]
        for tensor, before, mask in zip(self.tensors(sparse), tensors, existing, strict=True):
            assert torch.equal(tensor, before * mask)

    @staticmethod
    def tensors(sparse):
        return [
            x
            for weight in sparse.weights
            for x in (weight.detach(), *(sparse.optimizer.state[weight][name] for name in COUNTED))
        ]


@pytest.mark.parametrize("local", [False, True])
def test_gmp_follows_the_cubic_in_the_foreign_loop(local, monkeypatch):
    total = 80

    def at_change(sparse, update, weights, masks, now, _):
        progress = min(max((update - 0.05 * total) / (0.75 * total), 0), 1)
        for group in [[i] for i in range(len(now))] if local else [range(len(now))]:
            weight, before, after = (torch.cat([x[i].flatten() for i in group]) for x in (weights, masks, now))
            assert int((~after).sum()) == round(0.8 * (1 - (1 - progress) ** 3) * len(after))
            dropped = (before & ~after).nonzero()[:, 0].tolist()
            assert set(dropped) == smallest(weight, before, len(dropped)) and not (after & ~before).any()

    spy = Spy(monkeypatch, ppo.gmp_set.SparseLayers, at_change)
    agent, _, sparse, _ = ppo.train(ppo.parse_args([*FEW, "--method", "gmp", *["--local"] * local]))
    assert spy.updates == total and spy.changes == 10
    assert sum(int(mask.sum()) for mask in sparse.masks) == pytest.approx(
        0.2 * sum(m.numel() for m in sparse.masks), abs=4
    )
    for parameter in (agent.actor.weight, agent.critic.weight, agent.conv2.bias, agent.fc.bias):
        assert (parameter != 0).any()
    assert (agent.actor.weight != 0).all()


def test_set_moves_the_smallest_to_free_places_in_the_foreign_loop(monkeypatch):
    def at_change(sparse, _, weights, masks, now, state):
        generator = torch.Generator()
        generator.set_state(state)
        for weight, before, after in zip(weights, masks, now, strict=True):
            free = (~before).flatten().nonzero()[:, 0].tolist()
            moved = min(int(0.3 * int(before.sum())), len(free))
            order = torch.randperm(len(free), generator=generator)[:moved].tolist()
            assert set((after & ~before).flatten().nonzero()[:, 0].tolist()) == {free[i] for i in order}
            dropped, stayed = before & ~after, before & after
            assert int(dropped.sum()) == moved and int(after.sum()) == int(before.sum())
            # where several have the same |w|, any of them may go
            assert moved == 0 or weight[dropped].abs().max() <= weight[stayed].abs().min()

    spy = Spy(monkeypatch, ppo.gmp_set.SparseLayers, at_change)
    agent, _, sparse, _ = ppo.train(ppo.parse_args([*FEW, "--method", "set"]))
    assert spy.changes == 10
    # Erdős–Rényi: a convolution with its kernel, each task's copy by itself, densities with one factor, at most 1
    parts, factors = matrices(sparse.masks), []
    for mask in parts:
        ratio = sum(mask.shape) / mask.numel()
        factors.append(int(mask.sum()) / mask.numel() / ratio)
        assert not mask.all() or ratio * max(factors) >= 0.99
    free = [factor for factor, mask in zip(factors, parts, strict=True) if not mask.all()]
    assert len(parts) == 5 and max(free) - min(free) < 0.02 * max(free)
    assert sum(int(mask.sum()) for mask in parts) == round(0.2 * sum(mask.numel() for mask in parts))
    assert not any(mask.all() for mask in sparse.masks[1:]) and (agent.actor.weight != 0).all()


class LiteralGMP:
    """GMP in loops over Python floats, for one network: nothing of the block."""

    def __init__(self, layers, optimizer, total, sparsity, every, local):
        self.weights, self.optimizer = [layer.weight for layer in layers], optimizer
        self.total, self.sparsity, self.every, self.updates = total, sparsity, every, 0
        self.gone = [[False] * weight.numel() for weight in self.weights]

    def before_step(self):
        for weight, gone in zip(self.weights, self.gone, strict=True):
            weight.grad.view(-1)[torch.tensor(gone)] = 0

    def after_step(self):
        self.updates += 1
        if self.updates % self.every:
            return
        start, end = 0.05 * self.total, 0.8 * self.total
        progress = 0 if self.updates < start else 1 if self.updates > end else (self.updates - start) / (end - start)
        size = sum(map(len, self.gone))
        removed = round(self.sparsity * (1 - (1 - progress) ** 3) * size)
        entries = []
        for i, weight in enumerate(self.weights):
            for j, value in enumerate(weight.flatten().tolist()):
                entries.append((not self.gone[i][j], abs(value), i, j))
        for _, _, i, j in sorted(entries)[:removed]:
            self.gone[i][j] = True
            weight = self.weights[i]
            for tensor in (weight.data, *(self.optimizer.state[weight][name] for name in COUNTED)):
                tensor.view(-1)[j] = 0


def test_gmp_in_the_foreign_loop_equals_the_literal_form_to_the_last_bit(monkeypatch):
    words = [*FEW, "--method", "gmp"]
    agent, *_ = ppo.train(ppo.parse_args(words))
    monkeypatch.setattr(ppo.gmp_set, "GMP", LiteralGMP)
    literal, *_ = ppo.train(ppo.parse_args(words))
    for name, parameter in agent.named_parameters():
        assert torch.equal(parameter, literal.state_dict()[name]), name


def test_a_layer_that_lost_all_is_one_warning(monkeypatch):
    agent = ppo.Agent(2)
    nn.init.uniform_(agent.conv1.weight, -1e-6, 1e-6)
    optimizer = torch.optim.Adam(agent.parameters())
    sparse = ppo.gmp_set.GMP([agent.conv1, agent.fc], optimizer, 10, every=1)
    with pytest.warns(UserWarning, match="GMP left a layer without connections") as seen:
        for _ in range(10):
            sparse.after_step()
    assert {warning.filename for warning in seen} == {__file__}  # it points at the caller's line: printed once
    assert not agent.conv1.weight.any()


def test_set_that_begins_with_an_empty_layer_says_so():
    layers = [nn.Linear(4, 4), nn.Linear(400, 400)]
    with pytest.warns(UserWarning, match="SET left a layer without connections"):
        ppo.gmp_set.SET(layers, torch.optim.Adam([p for layer in layers for p in layer.parameters()]), 0.99999)


def test_a_layer_that_got_no_gradient_is_let_be():
    used, frozen = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.Adam([*used.parameters(), *frozen.parameters()])
    sparse = ppo.gmp_set.SET([used, frozen], optimizer, 0.5)
    used(torch.ones(1, 3)).sum().backward()
    sparse.before_step()
    assert torch.equal(used.weight.grad != 0, sparse.masks[0]) and frozen.weight.grad is None


@pytest.mark.parametrize(("start", "until"), [(0.5, 0.5), (0.9, 0.5), (0.5, 1.0)])
def test_pruning_needs_some_time_and_a_step_at_its_end(start, until):
    layer = nn.Linear(3, 2)
    with pytest.raises(AssertionError, match="no pruning step at the final sparsity"):
        ppo.gmp_set.GMP([layer], torch.optim.Adam(layer.parameters()), 95, start=start, until=until, every=10)


@pytest.mark.parametrize(
    ("optimizer_class", "numbers"),
    [(torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}), (torch.optim.SGD, {"momentum": 0.9})],
)
def test_other_optimizers_keep_what_is_missing_at_zero(optimizer_class, numbers):
    torch.manual_seed(0)
    agent = ppo.Agent(2)
    optimizer = optimizer_class(agent.parameters(), lr=1e-2, **numbers)
    sparse = ppo.gmp_set.SET([agent.conv2, agent.fc, agent.task_fc], optimizer, sparsity=0.9, every=3)
    for _ in range(10):
        optimizer.zero_grad()
        agent(torch.rand(2, 6, *ppo.IMAGE))[0].square().mean().backward()
        sparse.before_step()
        optimizer.step()
        sparse.after_step()
        for weight, mask in zip(sparse.weights, sparse.masks, strict=True):
            state = [x for x in optimizer.state[weight].values() if torch.is_tensor(x) and x.shape == weight.shape]
            assert len(state) == (3 if "amsgrad" in numbers else 1)
            assert all((x[~mask] == 0).all() for x in (weight, *state)) and all((x[mask] != 0).any() for x in state)


def literal_units(agent, obs) -> list[torch.Tensor]:
    """Mean |h| of every unit of conv1, conv2, fc and of task_fc for each task."""
    tasks = len(obs)
    h1 = F.relu(F.conv2d(obs.flatten(0, 1), agent.conv1.weight))
    h2 = F.relu(F.conv2d(h1, agent.conv2.weight, agent.conv2.bias))
    h3 = F.relu(F.linear(h2.flatten(1), agent.fc.weight, agent.fc.bias)).view(tasks, -1, 64)
    h4 = torch.stack([F.relu(h3[t] @ agent.task_fc.weight[t] + agent.task_fc.bias[t]) for t in range(tasks)])
    return [h1.abs().mean((0, 2, 3)), h2.abs().mean((0, 2, 3)), h3.abs().mean((0, 1)), h4.abs().mean(1)]


@pytest.mark.parametrize("sparsity", [None, 0.8])
def test_redo_revives_dormant_units_and_leaves_the_policy_and_the_rest_alone(sparsity):
    words = [*FEW, "--method", "set" if sparsity else "dense", "--seed", "3"]
    agent, optimizer, sparse, _ = ppo.train(ppo.parse_args(words))
    masks = dict(zip(sparse.weights, sparse.masks, strict=True)) if sparse else {}
    with torch.no_grad():  # channels, units and one unit of the second task's own layer fall silent
        agent.conv1.weight[2].abs_().neg_()
        agent.conv2.bias[[0, 5]] = -99
        agent.fc.bias[[1, 7]] = -99
        agent.task_fc.bias[:, 0, 4] = torch.tensor([9.0, -99.0])
    obs = torch.rand(2, 32, *ppo.IMAGE)
    with torch.no_grad():
        means, before = literal_units(agent, obs), agent(obs)
    old, layers = copy.deepcopy(agent), [agent.conv1, agent.conv2, agent.fc, agent.task_fc]
    connected = []
    for layer, mean in zip(layers, means, strict=True):
        mask = masks.get(layer.weight, torch.ones_like(layer.weight, dtype=torch.bool))
        dims = 1 if mask.dim() == 3 else tuple(range(1, mask.dim()))
        connected.append(mask.any(1) if mask.dim() == 3 else mask.amax(dims).bool())
        assert connected[-1].shape == mean.shape
    dormant = [(mean == 0) & alive for mean, alive in zip(means, connected, strict=True)]
    if not sparsity:
        assert dormant[0][2] and dormant[1][[0, 5]].all() and dormant[2][[1, 7]].all() and dormant[3][1, 4]
        assert not dormant[3][0, 4]
    levels = [*layers, [agent.actor, agent.critic]]
    assert ppo.redo.recycle(levels, optimizer, lambda: agent(obs), 0.0, masks) == sum(int(d.sum()) for d in dormant)

    with torch.no_grad():
        after = agent(obs)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)  # what goes out of a dormant unit is 0 now
    # literally, weight by weight: incoming new where they exist, then outgoing 0, moments 0, the rest the same bits
    forgotten = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in agent.named_parameters()}
    for c in dormant[0].nonzero()[:, 0].tolist():
        forgotten["conv1.weight"][c] = forgotten["conv2.weight"][:, c] = True
    for c in dormant[1].nonzero()[:, 0].tolist():
        forgotten["conv2.weight"][c] = forgotten["conv2.bias"][c] = True
        forgotten["fc.weight"][:, PLACES * c : PLACES * (c + 1)] = True
    for u in dormant[2].nonzero()[:, 0].tolist():
        forgotten["fc.weight"][u] = forgotten["fc.bias"][u] = True
        forgotten["task_fc.weight"][:, u] = True
    for t, u in dormant[3].nonzero().tolist():
        forgotten["task_fc.weight"][t, :, u] = forgotten["task_fc.bias"][t, 0, u] = True
        forgotten["actor.weight"][t, u] = forgotten["critic.weight"][t, u] = True
    for name, parameter in agent.named_parameters():
        where, was = forgotten[name], old.state_dict()[name]
        assert torch.equal(parameter[~where], was[~where]), name
        moments = [optimizer.state[parameter][moment] for moment in COUNTED]
        assert all((moment[where] == 0).all() for moment in moments), name
        assert all((moment[~where] != 0).any() for moment in moments), name
        if parameter in masks:
            assert (parameter[~masks[parameter]] == 0).all()
    for name, units, fan_in in (("conv1", dormant[0], 12), ("conv2", dormant[1], 64), ("fc", dormant[2], 16 * PLACES)):
        previous = {"conv1": None, "conv2": dormant[0], "fc": dormant[1].repeat_interleave(PLACES)}[name]
        weight = agent.get_submodule(name).weight.detach()
        for unit in units.nonzero()[:, 0].tolist():
            fresh = weight[unit] if previous is None else weight[unit][~previous]
            mask = masks.get(agent.get_submodule(name).weight, torch.ones_like(weight, dtype=torch.bool))[unit]
            fresh = fresh[mask if previous is None else mask[~previous]]
            bound = math.sqrt(6 / fan_in)
            assert (fresh != 0).all() and fresh.abs().max() <= bound
            assert previous is None or (weight[unit][previous] == 0).all()  # between two dormant units
        assert agent.get_submodule(name).bias is None or (agent.get_submodule(name).bias[units] == 0).all()
    if not sparsity:
        with torch.no_grad():
            assert (literal_units(agent, obs)[1][[0, 5]] > 0).any()


def test_redo_with_a_threshold_and_a_head_module_for_each_task():
    """Heads that read their own task's samples: a unit is judged by all of them."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 6), [nn.Linear(6, 2), nn.Linear(6, 2, bias=False)]
    optimizer = torch.optim.Adam(trunk.parameters())
    x = torch.rand(2, 8, 4)
    with torch.no_grad():
        trunk.weight[1], trunk.bias[1] = torch.tensor([5.0, 0, 0, 0]), 0.0
        x[0, :, 0], x[1, :, 0] = 0, 1  # unit 1 is silent in the first task only
        trunk.weight[2], trunk.bias[2] = 0.0, 0.01  # unit 2 nearly so in both

    def forward():
        return [head(F.relu(trunk(samples))) for head, samples in zip(heads, x, strict=True)]

    magnitude = F.relu(trunk(x)).abs().mean((0, 1))
    dormant = (magnitude <= 0.1 * magnitude.mean()).tolist()
    assert dormant[2] and not dormant[1]
    assert ppo.redo.recycle([trunk, heads], optimizer, forward, 0.1) == sum(dormant)
    for head in heads:
        assert (head.weight[:, 2] == 0).all() and (head.weight[:, 1] != 0).all()


def test_redo_refuses_a_layer_that_reads_more_than_the_one_before():
    """Joined with something of the same width, the units would be counted in pairs and the wrong ones reset."""
    first, second = nn.Linear(4, 6), nn.Linear(12, 6)
    optimizer, x = torch.optim.Adam([*first.parameters(), *second.parameters()]), torch.rand(8, 4)
    weight = first.weight.clone()
    with pytest.raises(AssertionError, match="reads something else than the units of the one before"):
        forward = lambda: second(torch.cat([F.relu(first(x)), torch.zeros(8, 6)], 1))  # noqa: E731
        ppo.redo.recycle([first, second], optimizer, forward, 0.1)
    assert torch.equal(first.weight, weight)


def test_redo_refuses_convolutions_that_read_more_or_other_channels():
    first, grouped, joined = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(8, 4, 1)
    x, weight = torch.rand(8, 1, 4, 4), first.weight.clone()
    optimizer = torch.optim.Adam(first.parameters())
    h = lambda: F.relu(first(x))  # noqa: E731
    for reader, forward in ((grouped, lambda: grouped(h())), (joined, lambda: joined(torch.cat([h(), h()], 1)))):
        with pytest.raises(AssertionError, match="reads something else than the units of the one before"):
            ppo.redo.recycle([first, reader], optimizer, forward, 0.1)
    assert torch.equal(first.weight, weight)


@pytest.mark.parametrize("method", ["GMP", "SET"])
def test_a_weight_that_is_computed_from_others_is_refused(method):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    optimizer = torch.optim.Adam(layer.parameters())
    with pytest.raises(AttributeError, match=r"not an .*Parameter"):
        getattr(ppo.gmp_set, method)([layer], optimizer, 1000)


@pytest.mark.parametrize("shape", [(32,), (4, 8), (2, 4, 2, 2)])
def test_redo_takes_batches_of_any_shape_and_leaves_no_hook_behind(shape):
    torch.manual_seed(0)
    first, second = nn.Linear(4, 6), nn.Linear(6, 2)
    first.weight.data[[1, 4]], first.bias.data[[1, 4]] = 0.0, -1.0
    first.bias.data[[0, 2, 3, 5]] = 9.0
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()])

    def fails():
        raise MemoryError

    with pytest.raises(MemoryError):
        ppo.redo.recycle([first, second], optimizer, fails, 0.1)
    assert not second._forward_pre_hooks
    assert ppo.redo.recycle([first, second], optimizer, lambda: second(F.relu(first(torch.rand(*shape, 4)))), 0.1) == 2
    assert (second.weight[:, [1, 4]] == 0).all() and (second.weight[:, [0, 2, 3, 5]] != 0).all()
    assert not second._forward_pre_hooks


def test_the_metrics_see_the_foreign_network():
    """A channel is a unit where a convolution reads it; behind `flatten` each of its places is."""
    agent = ppo.Agent(2)
    with torch.no_grad():
        agent.conv2.bias[[0, 5]] = -99
        agent.fc.bias[1] = -99
    obs = torch.rand(2, 16, *ppo.IMAGE)
    scalars = metrics.plasticity({"actor": (agent, (obs,))})
    with torch.no_grad():
        conv1, _, fc, task_fc = literal_units(agent, obs)
        conv2 = F.relu(agent.conv2(F.relu(agent.conv1(obs.flatten(0, 1))))).flatten(1).mean(0)
    units = torch.cat([mean.flatten() / mean.mean() for mean in (conv1, conv2, fc, task_fc)])
    assert len(units) == 16 + agent.fc.in_features + 64 + 2 * 32
    for name, tau in (("dormant_ratio_0", 0), ("dormant_ratio_0.025", 0.025), ("dormant_ratio_0.1", 0.1)):
        assert scalars[f"plasticity/actor/{name}"] == pytest.approx((units <= tau).float().mean().item())
    assert scalars["plasticity/actor/dormant_ratio_0"] > 0


def test_the_foreign_script_repeats():
    one, two = (ppo.train(ppo.parse_args([*FEW, "--method", "set", "--redo-every", "20"]))[0] for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


@pytest.mark.slow
def test_the_foreign_script_learns():
    *_, returns = ppo.train(ppo.parse_args(["--method", "gmp", "--redo-every", "200"]))
    assert (returns[-5:].mean(0) > returns[:5].mean(0) + 0.2).all()
