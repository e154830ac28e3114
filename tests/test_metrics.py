"""common/metrics.py against literal, slow versions of the formulas and against cases worked out by hand."""

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.metrics import (
    active_fraction,
    auc_cw,
    dormant_ratio,
    effective_rank,
    evaluate,
    fisher_trace,
    forgetting_cw,
    forward_transfer_cw,
    grad_norm,
    grad_norms,
    gradient_cosine,
    hidden_features,
    performance_cw,
    plasticity,
    singular_values,
    srank,
    stable_rank,
    success_matrix,
    weight_norm,
)

NAN = float("nan")

few_examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 7)


@st.composite
def layers_with_masks(draw):
    """ReLU features of one to three layers, some units dead, and masks that leave at least one unit in each."""
    generator = torch.Generator().manual_seed(draw(seeds))
    batch = draw(sizes)
    features, masks = [], []
    for units in draw(st.lists(sizes, min_size=1, max_size=3)):
        live = torch.rand(units, generator=generator) < 0.7
        features.append(torch.randn(batch, units, generator=generator, dtype=torch.float64).relu() * live)
        mask = torch.rand(units, generator=generator) < 0.6
        mask[int(torch.randint(units, (1,), generator=generator))] = True
        masks.append(mask)
    return features, masks


# ------------------------------------------------------------------------------------------------ hidden features


def test_hidden_features_are_what_the_next_layers_read_in_call_order():
    torch.manual_seed(0)
    shared = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 4), shared, nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), shared, nn.Linear(6, 2))
    x = torch.randn(7, 3)
    first = net[0](x).clamp(min=0)
    second = net[2](first).tanh()
    third = net[4](second).clamp(min=0)
    features = hidden_features(net, (x,))
    assert [tuple(h.shape) for h in features] == [(7, 4), (7, 5), (7, 6)]
    for h, expected in zip(features, (first, second, third), strict=True):
        assert torch.equal(h, expected) and not h.requires_grad


class Critic(nn.Module):
    """Functional activations, joined inputs, twins that read the same."""

    def __init__(self):
        super().__init__()
        self.bodies = nn.ModuleList(nn.Linear(5, 4) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, observation, action):
        x = torch.cat([observation, action], 1)
        return [head(F.elu(body(x))) for body, head in zip(self.bodies, self.heads, strict=True)]


def test_joined_inputs_are_no_features_also_of_the_second_twin_and_the_output_is_left_alone():
    critic, inputs = Critic(), (torch.randn(6, 3), torch.randn(6, 2))
    before = critic(*inputs)
    features = hidden_features(critic, inputs)
    expected = [F.elu(body(torch.cat(inputs, 1))) for body in critic.bodies]
    assert len(features) == 2 and all(map(torch.equal, features, expected))
    assert all(map(torch.equal, critic(*inputs), before))


class TwoHeads(nn.Module):
    """Convolutions, a trunk that flattens, two heads on the same features, an input that comes late."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 2, bias=False), nn.Conv2d(3, 2, 2)
        self.fc, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)
        self.action, self.mean, self.log_std = nn.Linear(2, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, image, action):
        h = F.relu(self.conv2(F.relu(self.conv1(image)))).flatten(1)
        h = torch.tanh(self.norm(self.fc(h))) + self.action(action)
        return self.mean(h), self.log_std(h)


def test_two_heads_count_once_a_convolution_by_channels_and_a_late_input_not_at_all():
    torch.manual_seed(0)
    net, image, action = TwoHeads(), torch.randn(5, 1, 4, 4), torch.randn(5, 2)
    maps = F.relu(net.conv1(image))
    flat = F.relu(net.conv2(maps)).flatten(1)
    last = torch.tanh(net.norm(net.fc(flat))) + net.action(action)
    places = torch.stack([maps[b, :, i, j] for b in range(5) for i in range(3) for j in range(3)])
    features = hidden_features(net, (image, action))
    assert len(features) == 3 and all(map(torch.equal, features, (places, flat, last)))


class Experts(nn.Module):
    """Two experts as one batched layer each, and heads of three tasks that read their mean."""

    class Batched(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return x @ self.weight

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = self.Batched(2, 3, 4), self.Batched(2, 4, 5), self.Batched(5, 1)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x.expand(2, -1, -1))))).mean(0))


def test_units_of_experts_count_apart():
    net, x = Experts(), torch.randn(7, 3)
    h = [F.relu(x @ net.first.weight[expert]) for expert in range(2)]
    last = torch.stack([F.relu(one @ weight) for one, weight in zip(h, net.second.weight, strict=True)]).mean(0)
    features = hidden_features(net, (x,))
    assert torch.allclose(features[0], torch.cat(h, 1)) and torch.allclose(features[1], last)
    assert [tuple(f.shape) for f in features] == [(7, 8), (7, 5)]


def test_hidden_features_removes_its_hooks_even_on_error():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    hidden_features(net, (torch.randn(2, 3),))
    assert not net[2]._forward_pre_hooks
    with pytest.raises(RuntimeError):
        hidden_features(net, (torch.randn(2, 99),))
    assert not net[2]._forward_pre_hooks


def test_a_network_without_a_hidden_layer_has_nothing_to_measure():
    with pytest.raises(ValueError, match="no hidden layer ran in Linear"):
        hidden_features(nn.Linear(3, 4), (torch.randn(2, 3),))


def test_plasticity_is_all_metrics_of_each_network_from_one_forward_pass():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(20, 3)
    with torch.no_grad():
        for layer, dead in ((net[0], slice(3)), (net[2], slice(5, 6))):
            layer.bias.fill_(99)
            layer.bias[dead] = -9999
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    features = hidden_features(net, (x,))
    active = [torch.arange(8) < 6, torch.arange(8) < 8]
    report = plasticity({"actor": (net, (x,)), "critic": (net, (x,))}, {"critic": active})
    assert len(calls) == 3
    sigma = torch.linalg.svdvals(features[1])
    for name, masks in (("actor", None), ("critic", active)):
        for metric, tau in (("dormant_ratio_0", 0), ("dormant_ratio_0.025", 0.025), ("dormant_ratio_0.1", 0.1)):
            assert report[f"plasticity/{name}/{metric}"] == dormant_ratio(features, tau, masks)
        assert report[f"plasticity/{name}/active_fraction"] == active_fraction(features, masks)
        assert report[f"plasticity/{name}/srank"] == srank(sigma)
        assert report[f"plasticity/{name}/effective_rank"] == effective_rank(sigma)
        assert report[f"plasticity/{name}/stable_rank"] == stable_rank(sigma)
        assert report[f"plasticity/{name}/weight_norm"] == weight_norm(net)
    assert report["plasticity/actor/dormant_ratio_0"] == 4 / 16
    assert report["plasticity/critic/dormant_ratio_0"] == 4 / 14
    assert len(report) == 16


# ------------------------------------------------------------------------------------------------------ plasticity


def dormant_ratio_literal(features, tau, masks):
    dormant, units = 0, 0
    for h, mask in zip(features, masks, strict=True):
        used = [i for i in range(h.shape[1]) if mask[i]]
        magnitude = {i: sum(abs(float(v)) for v in h[:, i]) / len(h) for i in used}
        layer_mean = sum(magnitude.values()) / len(used)
        for i in used:
            score = magnitude[i] / layer_mean if layer_mean > 0 else 0.0
            dormant += score <= tau
            units += 1
    return dormant / units


@few_examples
@given(layers_with_masks(), st.sampled_from([0.0, 0.025, 0.1, 0.6, 1.7]))
def test_dormant_ratio_is_the_formula(layers, tau):
    features, masks = layers
    everything = [torch.ones_like(mask) for mask in masks]
    assert dormant_ratio(features, tau).item() == pytest.approx(dormant_ratio_literal(features, tau, everything))
    assert dormant_ratio(features, tau, masks).item() == pytest.approx(dormant_ratio_literal(features, tau, masks))


def test_dormant_ratio_by_hand():
    h = torch.tensor([[1.0, -1.0, 0.0, 0.1], [3.0, 1.0, 0.0, 0.1]])  # E|h| = 2, 1, 0, 0.1; mean 0.775
    dead = torch.zeros(2, 2)
    assert dormant_ratio([h]).item() == pytest.approx(1 / 4)
    assert dormant_ratio([h], tau=0.2).item() == pytest.approx(2 / 4)  # scores 2.58, 1.29, 0, 0.129
    assert dormant_ratio([h, dead]).item() == pytest.approx(3 / 6)  # counts and widths are summed, not ratios averaged
    assert dormant_ratio([dead]).item() == 1.0
    # Without the strongest unit the mean is 0.367 and the scores are 2.73, 0, 0.27: the mask acts on the mean as well.
    mask = torch.tensor([False, True, True, True])
    assert dormant_ratio([h], tau=0.2, active=[mask]).item() == pytest.approx(1 / 3)


@few_examples
@given(layers_with_masks())
def test_active_fraction_is_the_formula(layers):
    features, masks = layers
    for chosen in ([torch.ones_like(mask) for mask in masks], masks):
        entries = [
            float(h[n, i]) > 0
            for h, mask in zip(features, chosen, strict=True)
            for n, i in itertools.product(range(h.shape[0]), range(h.shape[1]))
            if mask[i]
        ]
        assert active_fraction(features, chosen).item() == pytest.approx(sum(entries) / len(entries))
    assert active_fraction([torch.tensor([[1.0, -1.0], [0.0, 2.0]])]).item() == 0.5


def test_nan_is_never_a_plausible_number():
    for bad in (NAN, math.inf):
        h = torch.ones(3, 3)
        h[1, 1] = bad
        healthy = torch.rand(3, 2)
        for metric in (dormant_ratio, active_fraction):
            assert metric([healthy, h]).isnan() and metric([h, healthy]).isnan()
            without = torch.tensor([True, False, True])
            assert metric([h], active=[without]).isfinite()  # a unit outside the mask cannot spoil the others
        for metric in (srank, effective_rank, stable_rank):
            assert metric(singular_values(h)).isnan()


def test_masks_and_features_must_fit():
    h = torch.rand(4, 3)
    for features, masks in (
        ([], None),
        ([h], []),
        ([h], [torch.ones(2, dtype=torch.bool)]),
        ([h], [torch.ones(3)]),
        ([h[None]], None),
        ([h[None]], [torch.ones(4, 3, dtype=torch.bool)]),
        ([h, h], [torch.ones(3, dtype=torch.bool)]),
    ):
        for metric in (dormant_ratio, active_fraction):
            with pytest.raises(ValueError):
                metric(features, active=masks)
    with pytest.raises(ValueError, match="tau"):
        dormant_ratio([h], tau=-0.1)


@few_examples
@given(seeds, sizes, sizes, st.sampled_from([0.0, 0.01, 0.3, 0.9]))
def test_ranks_are_the_formulas(seed, batch, units, delta):
    h = np.random.default_rng(seed).normal(size=(batch, units))
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(h @ h.T if batch < units else h.T @ h)[::-1], 0, None))
    total, k = sum(sigma), 1
    while sum(sigma[:k]) / total < 1 - delta - 1e-9:
        k += 1
    values = singular_values(torch.from_numpy(h))
    # With delta = 0 the last singular value must count as well, unless rounding hides it: well-conditioned cases only.
    if delta > 0 or sigma[-1] / total > 1e-6:
        assert srank(values, delta).item() == k
    p = sigma / total
    assert effective_rank(values).item() == pytest.approx(math.exp(-sum(q * math.log(q) for q in p if q > 0)), rel=1e-4)
    assert stable_rank(values).item() == pytest.approx((h**2).sum() / np.linalg.norm(h, 2) ** 2)


def test_ranks_by_hand():
    sigma = singular_values(torch.diag(torch.tensor([1.0, 6.0, 3.0])))  # 6, 3, 1: shares 0.6, 0.3, 0.1
    assert [srank(sigma, delta).item() for delta in (0.45, 0.3, 0.05, 0.01)] == [1, 2, 3, 3]
    assert stable_rank(sigma).item() == pytest.approx(46 / 36)
    assert effective_rank(torch.ones(4)).item() == pytest.approx(4)
    assert effective_rank(singular_values(torch.ones(5, 3))).item() == pytest.approx(1, abs=1e-4)
    assert stable_rank(torch.full((4,), 1e-25)).item() == pytest.approx(4)  # its squares underflow in float32
    for metric in (srank, effective_rank, stable_rank):
        assert metric(singular_values(torch.zeros(4, 3))).item() == 0
    for bad in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match="non-empty"):
            singular_values(bad)
    for delta in (-0.1, 1.0):
        with pytest.raises(ValueError, match="delta"):
            srank(sigma, delta)


def test_weight_and_gradient_norm_are_over_all_parameters():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert grad_norm(net).isnan()  # as nobody has taken a gradient
    net[0](torch.randn(5, 3)).square().sum().backward()  # the other layers get no gradient
    weights = [float(v) for parameter in net.parameters() for v in parameter.detach().flatten()]
    gradients = [float(v) for parameter in net[0].parameters() for v in parameter.grad.flatten()]
    assert weight_norm(net).item() == pytest.approx(math.sqrt(sum(v * v for v in weights)))
    assert grad_norm(net).item() == pytest.approx(math.sqrt(sum(v * v for v in gradients)))
    assert not weight_norm(net).requires_grad


def test_gradient_norms_are_named_by_network():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    one.weight.grad = torch.full((2, 3), 2.0)
    norms = grad_norms(actor=one, critic=two)
    assert norms["plasticity/actor/grad_norm"] == pytest.approx(math.sqrt(24))
    assert norms["plasticity/critic/grad_norm"].isnan() and len(norms) == 2


@few_examples
@given(seeds, st.integers(2, 5), st.integers(1, 9))
def test_gradient_cosine_is_the_mean_over_pairs(seed, tasks, parameters):
    g = np.random.default_rng(seed).normal(size=(tasks, parameters))
    pairs = [
        g[i] @ g[j] / (np.linalg.norm(g[i]) * np.linalg.norm(g[j])) for i, j in itertools.combinations(range(tasks), 2)
    ]
    assert gradient_cosine(torch.from_numpy(g)).item() == pytest.approx(np.mean(pairs))


def test_gradient_cosine_by_hand():
    assert gradient_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])).item() == pytest.approx(-1 / 3)
    assert gradient_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).item() == 0
    for shape in ((1, 4), (4,)):
        with pytest.raises(ValueError, match="two tasks"):
            gradient_cosine(torch.ones(shape))


def test_fisher_trace_is_the_mean_squared_gradient_whatever_the_chunk():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    observations, actions = torch.randn(11, 3).double(), torch.randn(11, 2).double()

    def log_density(output, action):
        mean, log_std = output.chunk(2, -1)
        return torch.distributions.Normal(mean, log_std.exp(), validate_args=False).log_prob(action).sum()

    def log_prob(parameters, observation, action):
        return log_density(torch.func.functional_call(body, parameters, (observation[None],))[0], action)

    squares = []
    for observation, action in zip(observations, actions, strict=True):
        body.zero_grad()
        log_density(body(observation), action).backward()
        squares.append(sum(float(p.grad.square().sum()) for p in body.parameters()))
    body.zero_grad()
    parameters = dict(body.named_parameters())
    for chunk_size in (1, 4, 11, 50):
        trace = fisher_trace(log_prob, parameters, (observations, actions), chunk_size)
        assert trace.item() == pytest.approx(np.mean(squares), rel=1e-10)
        assert not trace.requires_grad and all(p.grad is None for p in body.parameters())
    with pytest.raises(ValueError, match="empty"):
        fisher_trace(log_prob, parameters, (observations[:0], actions[:0]))


def test_fisher_trace_of_a_gaussian_mean_is_its_known_value():
    # log N(a; theta, sigma^2): the Fisher information of theta is 1 / sigma^2.
    torch.manual_seed(0)
    theta, sigma = torch.tensor([0.3]), 0.5
    actions = theta + sigma * torch.randn(20_000, 1)
    trace = fisher_trace(lambda p, a: (-0.5 * ((a - p["mean"]) / sigma) ** 2).sum(), {"mean": theta}, (actions,), 5_000)
    assert trace.item() == pytest.approx(1 / sigma**2, rel=0.05)


# ------------------------------------------------------------------------------------------------------ evaluation


class GoalEnv(gym.Env):
    """The goal of an episode is drawn at its reset and is the reward; success can come on the third step only.

    The episode terminates on the fourth step if the goal is below one half, and is truncated on the fifth otherwise.
    """

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, reports_success=True):
        self.reports_success = reports_success
        self.goals = []

    def _observation(self):
        return np.array([self.goals[-1], 0.0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.goals.append(self.np_random.random())
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        assert self.steps <= 5, "stepped on after the end of the episode"
        if action[0] > 0:
            self.np_random.random()  # some episodes draw more random numbers than others
        hit = self.steps == 3 and abs(float(action[0]) - self.goals[-1]) < 0.5
        info = {"success": float(hit)} if self.reports_success else {}
        terminated = self.steps == 4 and self.goals[-1] < 0.5
        return self._observation(), self.goals[-1], terminated, self.steps >= 5, info


def test_evaluate_gives_means_over_episodes():
    env, dtypes = GoalEnv(), []

    def policy(observation):
        dtypes.append((observation.dtype, observation.shape))
        return np.array([0.0])  # succeeds where the goal is below one half

    result = evaluate(policy, env, episodes=8, seed=3)
    assert set(dtypes) == {(np.dtype(np.float32), (2,))}
    assert len(env.goals) == 8 and 0 < result["success"] < 1
    lengths = [4 if goal < 0.5 else 5 for goal in env.goals]
    assert result == {
        "episode_return": pytest.approx(np.dot(lengths, env.goals) / 8),
        "success": np.mean([goal < 0.5 for goal in env.goals]),
        "length": np.mean(lengths),
    }
    assert evaluate(policy, GoalEnv(reports_success=False), 2, 0)["success"] is None
    with pytest.raises(ValueError, match="episodes"):
        evaluate(policy, env, 0, 0)


def test_evaluate_counts_success_where_only_successful_steps_report_one():
    class Terse(GoalEnv):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, ({"success": True} if info["success"] else {})

    env = Terse()
    result = evaluate(lambda _: np.array([0.0]), env, 8, 3)
    assert result["success"] == np.mean([goal < 0.5 for goal in env.goals]) < 1


def goals(env, episodes, seed, action=0.0):
    env.goals.clear()
    evaluate(lambda _: np.array([action]), env, episodes, seed)
    return list(env.goals)


def test_goals_depend_on_seed_and_episode_number_only():
    env = GoalEnv()
    first = goals(env, 4, (7, 0))
    assert len(set(first)) == 4
    env.reset(seed=99)  # whatever the environment did in between
    np.random.seed(5)
    assert goals(env, 6, (7, 0))[:4] == first  # later, and with more episodes
    assert goals(env, 4, (7, 0), action=1.0) == first  # whatever the policy does
    assert goals(GoalEnv(), 4, [7, 0]) == first
    assert not set(goals(env, 4, (7, 1))) & set(first)
    assert not set(goals(env, 4, (8, 0))) & set(first)
    assert goals(env, 3, 7) == goals(env, 3, (7,))
    state = np.random.get_state()[1].tolist()
    goals(env, 2, 1)
    assert np.random.get_state()[1].tolist() == state


def test_evaluate_stops_inside_an_episode():
    env, steps = GoalEnv(), []

    def policy(_):
        steps.append(None)
        return np.zeros(1)

    assert evaluate(policy, env, 10, 0, stop=lambda: len(steps) >= 7) is None
    assert len(steps) == 7 and len(env.goals) == 2


# ----------------------------------------------------------------------------------------------- continual learning

# Two phases, the first of six evaluations, the second of three; task 1 is not evaluated before its phase.
SUCCESS = np.array(
    [[0.0, 0.0], [0.2, 0.0], [0.4, 0.0], [0.6, 0.0], [0.8, 0.0], [1.0, 0.0], [0.9, 0.3], [0.5, 0.6], [0.4, 0.9]]
)
PHASE = np.array([0] * 6 + [1] * 3)


def test_continual_world_metrics_by_hand():
    performance, per_task = performance_cw(SUCCESS)
    assert per_task == pytest.approx([(0.8 + 1.0 + 0.9 + 0.5 + 0.4) / 5, (0 + 0 + 0.3 + 0.6 + 0.9) / 5])  # 0.72, 0.36
    assert performance == pytest.approx(0.54)
    forgetting, per_task = forgetting_cw(SUCCESS, PHASE)
    # Task 0: (0.2 + 0.4 + 0.6 + 0.8 + 1) / 5 = 0.6. Task 1 has three evaluations in its phase: 0.6.
    assert per_task == pytest.approx([0.6 - 0.72, 0.6 - 0.36])
    assert forgetting == pytest.approx(0.06)
    assert auc_cw(SUCCESS, PHASE) == pytest.approx([0.5, 0.6])
    transfer, per_task = forward_transfer_cw(SUCCESS, PHASE, [0.75, 0.2])
    assert per_task == pytest.approx([-1.0, 0.5])
    assert transfer == pytest.approx(-0.25)


def test_window_one_is_the_plain_pair():
    assert performance_cw(SUCCESS, window=1)[1] == pytest.approx([0.4, 0.9])
    forgetting, per_task = forgetting_cw(SUCCESS, PHASE, window=1)
    assert per_task == pytest.approx([1.0 - 0.4, 0.0]) and forgetting == pytest.approx(0.3)
    # A frozen policy scores the same ever after: exactly 0, while the windowed value is below 0.
    frozen = np.array([[0.1, 0.0], [0.7, 0.0], [0.7, 0.2], [0.7, 0.3]])
    assert forgetting_cw(frozen, [0, 0, 1, 1], window=1)[1].tolist() == [0, 0]
    assert forgetting_cw(frozen, [0, 0, 1, 1])[0] < 0


def test_a_task_that_comes_twice_has_a_phase_of_its_own_each_time():
    # Sequence A, B, A: columns 0 and 2 are the same task and hold the same success; phases tell them apart.
    success = np.array(
        [[0.2, 0.0, 0.2], [0.6, 0.0, 0.6], [0.4, 0.5, 0.4], [0.0, 1.0, 0.0], [0.8, 0.5, 0.8], [1.0, 0.0, 1.0]]
    )
    phase = [0, 0, 1, 1, 2, 2]
    assert auc_cw(success, phase) == pytest.approx([0.4, 0.75, 0.9])
    assert forgetting_cw(success, phase, window=2)[1] == pytest.approx([0.4 - 0.9, 0.75 - 0.25, 0.0])
    assert forward_transfer_cw(success, phase, [0.2, 0.5, 0.2])[1] == pytest.approx([0.25, 0.5, 0.875])
    with pytest.raises(ValueError, match="decrease"):  # task indices in the place of phases
        auc_cw(success[:, :2], [0, 0, 1, 1, 0, 0])


def test_tasks_learned_from_scratch_at_once_have_no_forward_transfer():
    transfer, per_task = forward_transfer_cw(SUCCESS, PHASE, [1.0, 0.2])
    assert math.isnan(per_task[0]) and transfer == per_task[1] == pytest.approx(0.5)
    assert math.isnan(forward_transfer_cw(SUCCESS, PHASE, [1.0, 1.0])[0])
    # A run compared with itself.
    assert forward_transfer_cw(SUCCESS, PHASE, auc_cw(SUCCESS, PHASE))[0] == 0


@few_examples
@given(seeds, st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(1, 7))
def test_continual_world_metrics_are_the_formulas(seed, evaluations_per_phase, window):
    rng = np.random.default_rng(seed)
    phase = [i for i, count in enumerate(evaluations_per_phase) for _ in range(count)]
    tasks = len(evaluations_per_phase)
    success, reference = rng.random((len(phase), tasks)), 0.9 * rng.random(tasks)
    for i in range(tasks):
        final = [success[e][i] for e in range(len(phase))][-window:]
        inside = [success[e][i] for e in range(len(phase)) if phase[e] == i]
        last = inside[-window:]
        auc = sum(inside) / len(inside)
        assert performance_cw(success, window)[1][i] == pytest.approx(sum(final) / len(final))
        assert forgetting_cw(success, phase, window)[1][i] == pytest.approx(
            sum(last) / len(last) - sum(final) / len(final)
        )
        assert forward_transfer_cw(success, phase, reference)[1][i] == pytest.approx(
            (auc - reference[i]) / (1 - reference[i])
        )


def test_continual_world_metrics_refuse_what_has_no_meaning():
    with_nan = SUCCESS.copy()
    with_nan[0, 1] = NAN
    for bad in (with_nan, SUCCESS[0], np.zeros((0, 2))):
        with pytest.raises(ValueError, match="success must be"):
            performance_cw(bad)
    for phase in (PHASE[:-1], np.zeros(9, dtype=int), PHASE + 1):
        with pytest.raises(ValueError, match="phase"):
            forgetting_cw(SUCCESS, phase)
    for window in (0, -1):
        with pytest.raises(ValueError, match="window"):
            performance_cw(SUCCESS, window)
    for reference in ([0.5], [0.5, 1.1], [0.5, NAN]):
        with pytest.raises(ValueError, match="reference"):
            forward_transfer_cw(SUCCESS, PHASE, reference)


def test_success_matrix_puts_rows_in_time_order_and_zero_where_nothing_was_evaluated():
    rows = [
        {"global_step": 20, "phase": 1, "task_index": 1, "success": 0.5},
        {"global_step": 10, "phase": 0, "task_index": 0, "success": 1.0},
        {"global_step": 20, "phase": 1, "task_index": 0, "success": 0.25},
    ]
    success, phases = success_matrix(rows, 3)
    assert success.tolist() == [[1.0, 0.0, 0.0], [0.25, 0.5, 0.0]] and phases.tolist() == [0, 1]


def test_a_layer_that_reads_the_first_units_only_reads_other_features():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.all, self.some = nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(2, 1)

        def forward(self, x):
            h = self.body(x).relu()
            return self.all(h) + self.some(h[:, :2])

    assert [h.shape[1] for h in hidden_features(Narrow(), (torch.randn(4, 3),))] == [6, 2]
