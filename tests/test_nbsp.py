"""NBSP's mathematics against literal versions of the paper's formulas, and its promises on real training runs."""

import copy
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nbsp
from common.recorder import ArgumentError, Interrupted, load_checkpoint, parse_args
from nbsp import Agent, Args, PreviousTasks, ReplayBuffer

ROOT = Path(__file__).parent.parent
OBS_DIM, ACT_DIM, CPU = 39, 4, torch.device("cpu")
# Two real tasks, the first one twice, in seconds; batches of old tasks every fourth update.
TINY = {
    "task_seq": "reach,drawer-close",
    "cycles": 2,
    "steps_per_task": 300,
    "learning_starts": 150,
    "eval_every": 1000,
    "eval_episodes": 1,
    "hidden_dim": 24,
    "batch_size": 32,
    "score_steps": 150,
    "previous_buffer_size": 250,
    "replay_interval": 4,
    "quiet": True,
}


def make_agent(**changes) -> Agent:
    torch.manual_seed(0)
    return Agent(Args(**(TINY | changes)), OBS_DIM, ACT_DIM, CPU)


def fill(replay: ReplayBuffer, count: int, seed: int = 0) -> None:
    """Random transitions."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        obs, next_obs = rng.standard_normal((2, OBS_DIM)).astype(np.float32)
        replay.add(obs, next_obs, rng.uniform(-1, 1, ACT_DIM).astype(np.float32), rng.standard_normal())


def random_scores(agent: Agent, seed: int) -> dict[str, list[torch.Tensor]]:
    """Scores in [1/2, 1] of all hidden neurons, some of them constant (NaN)."""
    generator, scores = torch.Generator().manual_seed(seed), {}
    for net in agent.networks():
        drawn = torch.rand(2, 2, agent.args.hidden_dim, generator=generator)
        scores[net] = [(0.5 + 0.5 * score).masked_fill(u < 0.1, math.nan) for score, u in drawn]
    return scores


def experienced_agent(tasks: int = 2, updates: int = 3, **changes) -> Agent:
    """An agent that has ended `tasks` tasks, with moments in its optimizers and a filled buffer."""
    agent = make_agent(**changes)
    for task in range(tasks):
        fill(agent.replay, 120, task)
        agent.update()
        agent.end_task(task, random_scores(agent, task))
    fill(agent.replay, 100, tasks)
    for _ in range(updates):
        agent.update()
    return agent


def literal_mask(agent: Agent, net: str) -> list[list[float]]:
    """mask(N) by the letter: sort the neurons of each task, take the best, alpha (1 - Score), smallest of the tasks."""
    width, args = agent.args.hidden_dim, agent.args
    masks = [[1.0] * width for _ in range(args.hidden_layers)]
    for scores in agent.scores.values():
        ranked = [(-s.item(), layer, i) for layer, row in enumerate(scores[net]) for i, s in enumerate(row)]
        ranked = sorted(neuron for neuron in ranked if not math.isnan(neuron[0]))
        for negative, layer, i in ranked[: round(args.skill_proportion * width * args.hidden_layers)]:
            masks[layer][i] = min(masks[layer][i], args.mask_factor * (1 + negative))
    return masks


# ----------------------------------------------------------------------------------------------------- skill neurons


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), steps=st.integers(2, 30), widths=st.lists(st.integers(1, 6), min_size=1, max_size=3)
)
def test_scores_equal_a_double_loop_over_neurons_and_steps(seed, steps, widths):
    rng = np.random.default_rng(seed)
    # few distinct values: ties with the mean, dead and constant neurons occur
    features = [torch.from_numpy(rng.integers(0, 3, (steps, width))).float() * 0.5 for width in widths]
    q = torch.from_numpy(rng.integers(0, 2, steps)).float()
    for a, score in zip(features, nbsp.neuron_scores(features, q), strict=True):
        assert score.shape == (a.shape[1],)
        for n in range(a.shape[1]):
            values = a[:, n].tolist()
            a_mean, q_mean, hits = sum(values) / steps, sum(q.tolist()) / steps, 0
            for t in range(steps):
                hits += (values[t] > a_mean) == (q[t].item() > q_mean)
            if len(set(values)) == 1 or len(set(q.tolist())) == 1:
                assert math.isnan(score[n])
            else:
                assert score[n].item() == pytest.approx(max(hits / steps, 1 - hits / steps))
                assert 0.5 <= score[n] <= 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_neuron_that_is_the_goal_proximity_or_its_opposite_scores_1(sign):
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    [scores] = nbsp.neuron_scores([features], sign * features[:, 3])
    assert scores[3] == 1 and (scores[torch.arange(8) != 3] < 0.7).all()


def test_a_constant_neuron_is_found_where_its_mean_is_rounded():
    a = torch.full((5000, 1), 0.1)
    assert nbsp.neuron_scores([a], torch.rand(5000))[0].isnan().all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(2, 12), layers=st.integers(1, 3), proportion=st.floats(0, 1))
def test_skill_neurons_are_the_best_of_all_layers_together(seed, width, layers, proportion):
    rng = np.random.default_rng(seed)
    scores = [torch.from_numpy(rng.integers(2, 5, width) / 4).float() for _ in range(layers)]
    scores[0][rng.random(width) < 0.3] = math.nan
    skill = torch.cat(nbsp.skill_neurons(scores, proportion))
    flat = torch.cat(scores)
    alive = (~flat.isnan()).sum().item()
    assert skill.sum() == min(alive, round(proportion * width * layers))
    assert not flat[skill].isnan().any()
    if 0 < skill.sum() < alive:
        assert flat[skill].min() >= flat[~skill & ~flat.isnan()].max()


def test_masks_equal_eq_5_and_the_smallest_of_several_tasks_counts():
    agent = experienced_agent(tasks=3, skill_proportion=0.4)
    for net in agent.networks():
        tasks = [scores[net] for scores in agent.scores.values()]
        masks, literal = nbsp.gradient_masks(tasks, 0.4, 0.2), literal_mask(agent, net)
        torch.testing.assert_close(torch.stack(masks), torch.tensor(literal))
        assert sum(m < 1 for layer in literal for m in layer) > round(0.4 * 48)  # the tasks do not choose the same ones


def test_the_actor_is_scored_at_s_and_the_critics_at_s_and_a():
    """Scores of the actor at s, of the critics at (s, a), recomputed with a loop over the layers."""
    agent = make_agent()
    fill(agent.replay, 60)
    rollout = agent.replay.recent(60) | {"success": torch.rand(60)}
    scores = agent.score(rollout, rollout["success"])
    near = rollout["success"].double() > rollout["success"].double().mean()
    for net, network in agent.networks().items():
        x = rollout["obs"] if net == "actor" else torch.cat([rollout["obs"], rollout["action"]], 1)
        for layer, score in zip(nbsp.linear_layers(network), scores[net], strict=True):
            x = (x @ layer.weight.T + layer.bias).clamp_min(0).detach()
            accuracy = ((x > x.double().mean(0)) == near[:, None]).float().mean(0)
            expected = torch.maximum(accuracy, 1 - accuracy)
            torch.testing.assert_close(score[~score.isnan()], expected[~score.isnan()])
            assert torch.equal(score.isnan(), (x == x[0]).all(0))


def test_goal_proximity_and_its_fallback():
    rollout = {
        "success": torch.tensor([0.0, 1.0]),
        "distance": torch.tensor([3.0, 1.0]),
        "reward": torch.tensor([5.0, 4.0]),
        "episode": torch.zeros(2),
    }
    for gpm, expected in (("success", [0, 1]), ("distance", [-3, -1]), ("reward", [5, 4])):
        q, measure = nbsp.goal_proximity(rollout, gpm)
        assert q.tolist() == expected and measure == gpm
    # the first measure that changes takes its place
    failed, untouched = {"success": torch.zeros(2)}, {"distance": torch.tensor([0.2400, 0.2402])}
    q, measure = nbsp.goal_proximity(rollout | failed, "success")
    assert q.tolist() == [-3, -1] and measure == "distance"
    for gpm in ("success", "distance"):
        q, measure = nbsp.goal_proximity(rollout | failed | untouched, gpm)
        assert q.tolist() == [5, 4] and measure == "reward"
    still = rollout | failed | untouched | {"reward": torch.ones(2)}
    for gpm in ("success", "distance", "reward"):
        q, measure = nbsp.goal_proximity(still, gpm)
        assert measure == "none" and nbsp.neuron_scores([torch.rand(2, 3)], q)[0].isnan().all()
    assert "there are no skill neurons" in nbsp.fallback_warning(Args(), "none")


def test_a_distance_that_only_the_goal_changes_is_no_goal_proximity():
    rollout = {"success": torch.zeros(4), "distance": torch.tensor([0.2, 0.2, 0.3, 0.3]), "reward": torch.arange(4.0)}
    assert nbsp.goal_proximity(rollout | {"episode": torch.tensor([0.0, 0.0, 1.0, 1.0])}, "success")[1] == "reward"
    assert nbsp.goal_proximity(rollout | {"episode": torch.tensor([0.0, 0.0, 0.0, 1.0])}, "success")[1] == "distance"


def test_without_any_measure_a_task_masks_nothing():
    agent, rollout = make_agent(), {"obs": torch.randn(50, OBS_DIM), "action": torch.randn(50, ACT_DIM)}
    fill(agent.replay, 50)
    agent.end_task(0, agent.score(rollout, torch.zeros(50)))
    assert all((mask == 1).all() for pairs in agent.masked.values() for _, mask in pairs)
    skill = agent.skill(0)["actor"]
    assert not torch.cat(skill).any()
    assert not torch.cat(nbsp.random_neurons(skill, agent.scores[0]["actor"], (1, 0))).any()


# --------------------------------------------------------------------------------------------------- gradient masking


def masked_names(agent: Agent, masks: dict[str, list[list[float]]]) -> dict[str, torch.Tensor]:
    """Mask of every parameter by its name, (out, 1) or (out,), 1 where nothing is masked."""
    named = {}
    for net, network in agent.networks().items():
        for name, parameter in network.named_parameters():
            mask = torch.ones(len(parameter))
            if name.startswith("hidden") and net in masks:  # hidden.0, hidden.2: linear layers between the ReLUs
                mask = torch.tensor(masks[net][int(name.split(".")[1]) // 2])
            named[f"{net}.{name}"] = mask[:, None] if parameter.ndim == 2 else mask
    return named


def parameters(agent: Agent) -> dict[str, torch.Tensor]:
    networks = agent.networks().items()
    return {f"{net}.{name}": p.detach().clone() for net, network in networks for name, p in network.named_parameters()}


def step(agent: Agent, part: str) -> dict[str, torch.Tensor]:
    """One update of the critics, or one step of the actor; returns how far each parameter moved."""
    before = parameters(agent)
    torch.manual_seed(5)
    if part == "critics":
        agent.updates = 0  # the next update is the first: no actor, no batch of earlier tasks
        agent.update()
    else:
        agent._update_actor(agent.replay.recent(32)["obs"])
    return {name: value - before[name] for name, value in parameters(agent).items()}


@pytest.mark.parametrize("part", ["actor", "critics"])
def test_one_update_moves_the_fan_in_of_a_skill_neuron_by_its_mask_and_others_fully(part):
    agent = experienced_agent()
    free = copy.deepcopy(agent)
    free.masked = {"actor": [], "critics": []}
    masks = masked_names(agent, {net: literal_mask(agent, net) for net in agent.networks()})
    moved, moved_freely = step(agent, part), step(free, part)
    for name, delta in moved.items():
        mask = masks[name].expand_as(delta)
        torch.testing.assert_close(delta, mask * moved_freely[name], atol=1e-6, rtol=0)
        assert torch.equal(delta[mask == 1], moved_freely[name][mask == 1])
        if name.startswith(part.removesuffix("s")) and name.endswith("weight"):
            assert (moved_freely[name].abs() > 1e-5).any() and ("hidden" not in name or (mask < 1).any())
    # the moments saw the whole gradient
    for optimizer in ("actor_optimizer", "q_optimizer"):
        states = [getattr(a, optimizer).state_dict()["state"] for a in (agent, free)]
        assert_same_tensors(*states)


@pytest.mark.parametrize("part", ["actor", "critics"])
def test_gradient_target_scales_the_gradient_before_adam(part):
    agent = experienced_agent(tasks=1, updates=0, mask_target="gradient")
    optimizer = agent.actor_optimizer if part == "actor" else agent.q_optimizer
    network = agent.actor if part == "actor" else agent.critics[1]
    optimizer.state.clear()  # so that the moments of the next step are its gradients
    free = copy.deepcopy(agent)
    free.masked = {"actor": [], "critics": []}
    net = "actor" if part == "actor" else "critic2"
    masks = masked_names(agent, {net: literal_mask(agent, net)})
    moved, moved_freely = step(agent, part), step(free, part)
    free_network = free.actor if part == "actor" else free.critics[1]
    free_optimizer = free.actor_optimizer if part == "actor" else free.q_optimizer
    for (name, p), p_free in zip(network.named_parameters(), free_network.parameters(), strict=True):
        mean, mean_free = optimizer.state[p]["exp_avg"], free_optimizer.state[p_free]["exp_avg"]
        torch.testing.assert_close(mean, masks[f"{net}.{name}"] * mean_free)
    # Adam takes the scale away again: where gradients are far above its epsilon, weights move as if there were no mask
    name, layer = f"{net}.hidden.2.weight", network.hidden[2]
    skill = (masks[name] < 1) & (optimizer.state[layer.weight]["exp_avg"].abs() > 1e-6)
    assert skill.any()
    torch.testing.assert_close(moved[name][skill], moved_freely[name][skill], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("changes", "actor", "critics"),
    [
        ({}, 4, 8),
        ({"method": "mask"}, 4, 8),
        ({"method": "sac"}, 0, 0),
        ({"method": "replay"}, 0, 0),
        ({"mask_actor": False}, 0, 8),
        ({"mask_critic": False}, 4, 0),
    ],
)
def test_what_is_masked(changes, actor, critics):
    agent = experienced_agent(**changes)
    assert (len(agent.masked["actor"]), len(agent.masked["critics"])) == (actor, critics)
    assert (len(agent.previous) > 0) == (agent.args.method in ("nbsp", "replay"))


# ------------------------------------------------------------------------------------------------------------- replay


@settings(max_examples=25, deadline=None)
@given(capacity=st.integers(1, 12), added=st.integers(1, 40), count=st.integers(1, 20))
def test_replay_keeps_the_latest_transitions(capacity, added, count):
    replay = ReplayBuffer(capacity, 2, 1, CPU)
    for n in range(added):
        replay.add(np.full(2, n, np.float32), np.full(2, n + 0.5, np.float32), np.full(1, -n, np.float32), n)
    kept = list(range(max(0, added - capacity), added))
    recent = replay.recent(count)
    assert recent["reward"].tolist() == kept[-count:]
    batch = replay.sample(64)
    assert set(batch["reward"].tolist()) <= set(kept)
    assert torch.equal(batch["next_obs"][:, 0], batch["reward"] + 0.5)
    assert torch.equal(batch["action"][:, 0], -batch["reward"])
    copied = ReplayBuffer(capacity, 2, 1, CPU)
    copied.load_state_dict(replay.state_dict())
    assert torch.equal(copied.recent(count)["obs"], recent["obs"]) and len(copied) == len(replay)


@settings(max_examples=40, deadline=None)
@given(
    capacity=st.integers(4, 60),  # at least one for each task
    visits=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=7),
)
def test_earlier_tasks_share_the_buffer_equally(capacity, visits):
    """Each transition carries its task, visit and number, so that its whole way can be checked."""
    previous, latest = PreviousTasks(capacity), {}
    for visit, (task, size) in enumerate(visits):
        replay = ReplayBuffer(50, 2, 1, CPU)
        for n in range(size):
            replay.add(np.array([task, visit], np.float32), np.zeros(2, np.float32), np.zeros(1, np.float32), n)
        before = previous.counts()
        previous.add(task, replay)
        latest[task] = (visit, size)
        share, counts = capacity // len(latest), previous.counts()
        for owner, (_, held) in latest.items():
            available = held if owner == task else before[owner]
            assert counts.get(owner, 0) == min(share, available)
        assert len(previous) == sum(counts.values()) <= capacity
        rows = list(
            zip(previous.task.tolist(), *previous.data["obs"].T.tolist(), previous.data["reward"].tolist(), strict=True)
        )
        assert len(set(rows)) == len(rows)  # drawn without replacement
        for owner, task_of_row, visit_of_row, n in rows:
            assert owner == task_of_row and visit_of_row == latest[owner][0] and n < latest[owner][1]


def test_what_is_kept_of_a_task_is_a_uniform_draw():
    torch.manual_seed(0)
    replay, hits = ReplayBuffer(100, 1, 1, CPU), np.zeros(100)
    for n in range(100):
        replay.add(np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32), n)
    for _ in range(300):
        previous = PreviousTasks(20)
        previous.add(0, replay)
        hits[previous.data["reward"].int().numpy()] += 1
    assert hits.sum() == 300 * 20 and hits.min() > 30 and hits.max() < 95  # 60 each, sigma 7


@pytest.mark.parametrize(
    ("method", "expected"), [("nbsp", [4, 8, 12]), ("replay", [4, 8, 12]), ("sac", []), ("mask", [])]
)
def test_every_kth_batch_comes_whole_from_earlier_tasks(method, expected, monkeypatch):
    agent, drawn = experienced_agent(tasks=0, updates=0, method=method), []
    monkeypatch.setattr(
        ReplayBuffer, "sample", lambda b, n, true=ReplayBuffer.sample: (drawn.append(""), true(b, n))[1]
    )
    monkeypatch.setattr(
        PreviousTasks, "sample", lambda b, n, true=PreviousTasks.sample: (drawn.append("old"), true(b, n))[1]
    )
    for _ in range(4):
        agent.update()
    assert drawn == [""] * 4  # no earlier task yet
    agent.end_task(0, random_scores(agent, 0))
    assert len(agent.replay) == 0  # D is emptied
    fill(agent.replay, 100)
    agent.updates = 0
    drawn.clear()
    for _ in range(13):
        agent.update()
    assert [n + 1 for n, name in enumerate(drawn) if name == "old"] == expected and len(drawn) == 13


def test_losses_on_present_and_earlier_tasks_have_their_own_names():
    agent = experienced_agent(tasks=1, updates=0)
    names = {"critic", "q", "actor", "entropy"}
    agent.updates, agent.losses = 0, {}
    for _ in range(3):
        agent.update()
    assert set(agent.losses) == names | {"alpha"}
    of_the_present = dict(agent.losses)
    agent.update()  # the fourth, on earlier tasks
    assert set(agent.losses) == names | {"alpha"} | {f"previous/{name}" for name in names}
    for name in names:
        assert agent.losses[name] is of_the_present[name] and agent.losses[f"previous/{name}"] != agent.losses[name]


# ---------------------------------------------------------------------------------------------------------------- SAC


def test_log_probability_is_that_of_the_squashed_gaussian():
    agent = make_agent()
    torch.nn.init.normal_(agent.actor.head.weight)
    obs = torch.randn(64, OBS_DIM)
    mean, log_std = agent.actor(obs)
    squash = torch.distributions.TanhTransform(cache_size=1)
    torch.manual_seed(3)
    action, log_prob = agent.actor.sample(obs)
    torch.manual_seed(3)
    u = mean + log_std.exp() * torch.randn_like(mean)
    torch.testing.assert_close(action, u.tanh())
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = (normal.log_prob(u) - squash.log_abs_det_jacobian(u, action)).sum(1)
    torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)
    assert log_std.min() >= -5 and log_std.max() <= 2


def test_losses_are_sacs():
    agent = make_agent()
    fill(agent.replay, 50)
    agent.log_alpha.data.fill_(-0.7)
    for parameter in agent.targets.parameters():  # else they equal the critics
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch, alpha = agent.replay.sample(16), math.exp(-0.7)
    torch.manual_seed(5)
    loss, _ = nbsp.critic_loss(agent.actor, agent.critics, agent.targets, agent.log_alpha, batch, 0.9)
    torch.manual_seed(5)
    next_action, next_log_prob = agent.actor.sample(batch["next_obs"])
    expected = 0.0
    for n in range(16):
        sa = torch.cat([batch["next_obs"][n], next_action[n]])[None]
        soft_value = min(target(sa).item() for target in agent.targets) - alpha * next_log_prob[n].item()
        y = batch["reward"][n].item() + 0.9 * soft_value
        sa = torch.cat([batch["obs"][n], batch["action"][n]])[None]
        expected += sum((critic(sa).item() - y) ** 2 for critic in agent.critics) / 16
    assert loss.item() == pytest.approx(expected, rel=1e-4)

    torch.manual_seed(6)
    loss, _ = nbsp.actor_loss(agent.actor, agent.critics, agent.log_alpha, batch["obs"])
    torch.manual_seed(6)
    action, log_prob = agent.actor.sample(batch["obs"])
    q = torch.min(*(critic(torch.cat([batch["obs"], action], 1)) for critic in agent.critics))
    assert loss.item() == pytest.approx((alpha * log_prob - q).mean().item(), rel=1e-4)


def test_compile_compiles_both_losses_and_learns_the_same(monkeypatch):
    compiled, true_compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: (compiled.append(f), true_compile(f, backend="eager"))[1])
    agents = [make_agent(compile=compiles) for compiles in (False, True)]
    assert compiled == [nbsp.critic_loss, nbsp.actor_loss]
    for agent in agents:
        fill(agent.replay, 50)
        torch.manual_seed(5)
        agent.update()
        agent.update()
    for plain, value in zip(*(parameters(agent).values() for agent in agents), strict=True):
        torch.testing.assert_close(value, plain)


def test_critics_learn_at_each_update_the_actor_at_every_second_one_twice():
    agent = experienced_agent(updates=0, tau=0.3)  # so large that targets that stay are seen
    agent.updates = 0
    for update in range(1, 5):
        before, steps = parameters(agent), next(iter(agent.actor_optimizer.state.values()))["step"].item()
        targets = [p.clone() for p in agent.targets.parameters()]
        agent.update()
        changed = {name for name, value in parameters(agent).items() if not torch.equal(value, before[name])}
        assert any(name.startswith("critic1") for name in changed) and any(
            name.startswith("critic2") for name in changed
        )
        assert any(name.startswith("actor") for name in changed) == (update % 2 == 0)
        new_steps = next(iter(agent.actor_optimizer.state.values()))["step"].item()
        assert new_steps - steps == (2 if update % 2 == 0 else 0)
        for target, old, critic in zip(agent.targets.parameters(), targets, agent.critics.parameters(), strict=True):
            torch.testing.assert_close(target, old + agent.args.tau * (critic - old))


def test_the_temperature_rises_while_entropy_is_below_its_target():
    for log_prob, sign in ((5.0, 1), (3.0, -1)):  # entropy -5 is below the target -4: more exploration
        agent = make_agent()
        true_loss = agent.actor_loss
        agent.actor_loss = lambda *a, loss=true_loss, value=log_prob: (loss(*a)[0], torch.tensor(value))
        agent._update_actor(torch.randn(32, OBS_DIM))
        assert math.copysign(1, agent.log_alpha.item()) == sign


def test_everything_learned_goes_on_through_a_border():
    agent = experienced_agent()
    before = copy.deepcopy({name: getattr(agent, name).state_dict() for name in agent.LEARNERS if name != "replay"})
    alpha = agent.log_alpha.item()
    agent.end_task(0, random_scores(agent, 7))
    assert_same_tensors(before, {name: getattr(agent, name).state_dict() for name in before})
    assert agent.log_alpha.item() == alpha


# ----------------------------------------------------------------------------------------------------------- ablation


def test_zeroed_neurons_are_silent_and_the_others_of_their_layer_unchanged():
    agent = make_agent()
    obs = torch.randn(50, OBS_DIM)
    neurons = [torch.rand(24) < 0.3, torch.zeros(24, dtype=torch.bool)]
    weights = parameters(agent)
    cut = nbsp.without_neurons(agent.actor, neurons)
    whole, left = nbsp.metrics.hidden_features(agent.actor, obs), nbsp.metrics.hidden_features(cut, obs)
    assert (left[0][:, neurons[0]] == 0).all() and torch.equal(left[0][:, ~neurons[0]], whole[0][:, ~neurons[0]])
    assert not torch.equal(left[1], whole[1])
    for name, value in parameters(agent).items():  # it is a copy
        assert torch.equal(value, weights[name])


def test_random_neurons_are_as_many_per_layer_and_never_constant_ones():
    agent = make_agent()
    scores = random_scores(agent, 0)["actor"]
    skill = nbsp.skill_neurons(scores, 0.3)
    draws = [nbsp.random_neurons(skill, scores, (1, draw)) for draw in range(200)]
    for draw in draws:
        for mask, chosen, score in zip(draw, skill, scores, strict=True):
            assert mask.sum() == chosen.sum() and not score[mask].isnan().any()
    hits, alive = torch.stack([draw[0] for draw in draws]).float().mean(0), ~scores[0].isnan()
    share = skill[0].sum() / alive.sum()  # any of them, skill neuron or not
    assert (hits[alive] - share).abs().max() < 0.15 and (hits[skill[0]].mean() - share).abs() < 0.05


def test_an_ablation_plays_without_the_skill_neurons_and_without_five_draws_of_random_ones(monkeypatch):
    """Each variant is known by its silent neurons; a fake evaluation returns their number, weighted by their place."""
    agent, place = make_agent(), torch.arange(1.0, 49.0)
    scores = random_scores(agent, 0)["actor"]

    def value(neurons: list[torch.Tensor]) -> float:
        return (torch.cat(neurons) * place).sum().item()

    def evaluate_task(actor, *_, stop=None):
        silent = [(layer.weight == 0).all(1) for layer in nbsp.linear_layers(actor)]
        return {"success": value(silent), "episode_return": -value(silent)}

    monkeypatch.setattr(nbsp, "evaluate_task", evaluate_task)
    report = nbsp.ablation(agent, ["reach-v3", "drawer-close-v3"], 1, scores, 3)
    skill = nbsp.skill_neurons(scores, 0.2)
    draws = [value(nbsp.random_neurons(skill, scores, (1, nbsp.RANDOM_NEURONS, 1, n))) for n in range(5)]
    assert len(set(draws)) == 5 and report["task"] == "drawer-close-v3"
    for name, expected in (("whole", 0), ("without_skill", value(skill)), ("without_random", np.mean(draws))):
        assert report[f"success_{name}"] == -report[f"return_{name}"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_cycling_metrics_by_hand():
    success = np.array([[1.0, 0.0], [0.4, 0.8], [0.9, 0.5], [1.0, 1.0]])  # A, B, A, B
    report = nbsp.cycling_metrics(success)
    assert report["asr"] == pytest.approx((1.0 + (0.4 + 0.8) / 2 + (0.9 + 0.5) / 2 + 1.0) / 4)
    # after B, A lost 0.6; after A, B lost 0.3; after B, A rose from 0.9: no loss
    assert report["fm"] == pytest.approx((0.6 + 0.3 + 0.0) / 3)
    assert report["fwt"] == pytest.approx((1.0 + 0.8 + 0.9 + 1.0) / 4)
    assert nbsp.cycling_metrics(np.array([[0.5], [1.0]])) == {"asr": 0.75, "fm": 0.0, "fwt": 0.75}


@settings(max_examples=30, deadline=None)
@given(tasks=st.integers(1, 4), cycles=st.integers(1, 3), seed=st.integers(0, 1000))
def test_cycling_metrics_equal_a_walk_through_the_phases(tasks, cycles, seed):
    success = np.random.default_rng(seed).random((tasks * cycles, tasks))
    seen, own, lost, right_after = [], [], [], {}
    for phase in range(tasks * cycles):
        trained = phase % tasks
        for task, level in right_after.items():
            if task != trained:
                lost.append(max(0, level - success[phase, task]))
        right_after[trained] = success[phase, trained]
        seen.append(np.mean([success[phase, task] for task in right_after]))
        own.append(success[phase, trained])
    expected = {"asr": np.mean(seen), "fm": np.mean(lost) if lost else 0, "fwt": np.mean(own)}
    assert nbsp.cycling_metrics(success) == pytest.approx(expected)


def test_a_task_is_solved_after_three_good_evaluations_running():
    def rows(successes, task=0):
        return [{"global_step": 10 * n, "task_index": task, "success": s} for n, s in enumerate(successes, start=1)]

    assert nbsp.solved(rows([0.2, 1.0, 0.95, 1.0]), 0, 0)
    assert not nbsp.solved(rows([1.0, 1.0]), 0, 0)
    assert not nbsp.solved(rows([1.0, 1.0, 0.9]), 0, 0) and not nbsp.solved(rows([1.0, 1.0, 0.9, 1.0]), 0, 0)
    assert not nbsp.solved(rows([1.0] * 3, task=1), 0, 0)
    # not those of an earlier phase or of the warm-up
    assert nbsp.solved(rows([1.0] * 4), 0, 10) and not nbsp.solved(rows([1.0] * 4), 0, 20)


def test_one_hot_follows_the_observation():
    args, tasks = Args(task_one_hot=True), ["reach-v3", "drawer-close-v3"]
    for index in range(2):
        env, plain = nbsp.make_task(args, tasks, index), nbsp.make_task(Args(), tasks, index)
        obs, bare = env.reset(seed=3)[0], plain.reset(seed=3)[0]
        assert obs.dtype == np.float32 and env.observation_space.shape == (41,)
        np.testing.assert_array_equal(obs, [*bare, index == 0, index == 1])
        env.close()
        plain.close()


def test_metrics_are_those_of_the_right_networks_and_transitions(assert_plasticity, monkeypatch):
    monkeypatch.setattr(nbsp, "METRIC_BATCH", 60)  # of the 100 in the buffer
    agent = experienced_agent()
    batch, plasticity = agent.replay.recent(60), agent.plasticity()

    def hidden(network: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for module in network.modules():
            if isinstance(module, torch.nn.Linear) and module.out_features == TINY["hidden_dim"]:
                x = torch.relu(module(x))
                outputs.append(x.detach())
        return outputs

    q_input = torch.cat([batch["obs"], batch["action"]], 1)
    features = {"actor": hidden(agent.actor, batch["obs"])}
    features["critic"] = hidden(agent.critics[0], q_input) + hidden(agent.critics[1], q_input)
    for net, module in (("actor", agent.actor), ("critic", agent.critics)):
        assert_plasticity(plasticity, net, module, features[net], {"dormant_ratio": 0.025})
    resumed = make_agent()  # without an update: the norms of the gradients are the checkpoint's
    resumed.load_state_dict(agent.state_dict())
    assert resumed.plasticity() == plasticity and resumed.losses == agent.losses


# --------------------------------------------------------------------------------------------- whole runs, real tasks


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A whole run on real tasks, watched: state at each border, scores, and when updates and random actions came."""
    run_dir = tmp_path_factory.mktemp("nbsp") / "run"
    watched = {"kept": [], "scores": [], "buffers": [], "updates": [], "random": []}
    true_end, true_update, true_random = Agent.end_task, Agent.update, Agent.random_action

    def end_task(agent, task, scores):
        watched["buffers"].append(agent.replay.recent(10_000))
        true_end(agent, task, scores)
        watched["scores"].append((task, scores))
        watched["kept"].append((agent.previous.counts(), dict(agent.previous.data), agent.previous.task))
        watched["phase"] += 1

    def update(agent):
        watched["updates"].append((watched["phase"], agent.replay.added))
        true_update(agent)

    def random_action(agent):
        watched["random"].append(watched["phase"])
        return true_random(agent)

    watched["phase"] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "end_task", end_task)
        patch.setattr(Agent, "update", update)
        patch.setattr(Agent, "random_action", random_action)
        patch.setattr(nbsp, "LOG_EVERY", 100)
        results = nbsp.main(Args(**TINY, run_dir=str(run_dir)))
    checkpoint = load_checkpoint(str(run_dir), "nbsp")
    return {"run_dir": run_dir, "results": results, "checkpoint": checkpoint} | watched


def test_a_run_cycles_through_its_tasks(finished_run):
    assert [task for task, _ in finished_run["scores"]] == [0, 1, 0, 1]
    # random actions at first visits only; then updates as soon as there is a batch
    assert finished_run["random"] == [0] * 150 + [1] * 150
    expected = [(phase, n) for phase in (0, 1) for n in range(151, 301)]
    assert finished_run["updates"] == expected + [(phase, n) for phase in (2, 3) for n in range(32, 301)]


def test_each_task_leaves_its_share_of_its_own_buffer(finished_run):
    """250 transitions in all; the buffers held 300."""
    expected = [{0: 250}, {0: 125, 1: 125}, {0: 125, 1: 125}, {0: 125, 1: 125}]
    assert [counts for counts, _, _ in finished_run["kept"]] == expected
    for phase, (_, data, owners) in enumerate(finished_run["kept"]):
        kept = {row.numpy().tobytes() for row in data["obs"][owners == phase % 2]}
        buffer = {row.numpy().tobytes() for row in finished_run["buffers"][phase]["obs"]}
        assert kept <= buffer and len(buffer) == 300


def test_results_hold_success_after_each_phase_and_its_measures(finished_run):
    results, checkpoint = finished_run["results"], finished_run["checkpoint"]
    success = results["metrics"]["success_after_phase"]
    for row in checkpoint["record"]["rows"]:
        assert success[row["phase"]][row["task_index"]] == row["success"]
    assert {name: results["metrics"][name] for name in ("asr", "fm", "fwt")} == nbsp.cycling_metrics(np.array(success))
    # no success in so few steps; the distance to reach-v3's goal always changes, that of the drawer once it is touched
    assert results["metrics"]["scored_by"][::2] == ["distance"] * 2
    assert set(results["metrics"]["scored_by"][1::2]) <= {"distance", "reward"}
    assert results["metrics"]["phase_steps"] == [300] * 4 and results["global_step"] == 1200
    assert [(r["global_step"], r["phase"], r["task_index"]) for r in checkpoint["record"]["rows"]] == [
        (300 * (phase + 1), phase, index) for phase in range(4) for index in range(2)
    ]
    assert_same_tensors(checkpoint["agent"]["scores"][0], finished_run["scores"][2][1])  # of the latest visit
    assert checkpoint["agent"]["updates"] == len(finished_run["updates"])


def test_tensorboard_has_what_scoring_found_and_the_losses(finished_run):
    events = EventAccumulator(str(finished_run["run_dir"]))
    events.Reload()

    def curve(name):
        return {point.step: point.value for point in events.Scalars(name)}

    for phase, ((_, scores), (counts, _, _)) in enumerate(
        zip(finished_run["scores"], finished_run["kept"], strict=True)
    ):
        step = 300 * (phase + 1)
        for net, layers in scores.items():
            flat, skill = torch.cat(layers), nbsp.skill_neurons(layers, 0.2)
            assert curve(f"method/constant_neurons/{net}")[step] == flat.isnan().sum()
            assert curve(f"method/score_mean/{net}")[step] == pytest.approx(flat.nanmean().item())
            chosen = flat[torch.cat(skill)].mean().item()
            assert curve(f"method/skill_score_mean/{net}")[step] == pytest.approx(chosen) and chosen > flat.nanmean()
            widths = [curve(f"method/skill_neurons/{net}/layer{layer}")[step] for layer in (1, 2)]
            assert widths == [mask.sum() for mask in skill]
        for task, name in enumerate(("reach-v3", "drawer-close-v3")):
            assert curve(f"method/previous_transitions/{name}").get(step, 0) == counts.get(task, 0)
    # every 100 steps with updates; the first visit has no earlier task
    for name in ("critic", "q", "actor", "entropy"):
        assert list(curve(f"losses/{name}")) == [200, 300, 500, *range(600, 1300, 100)]
        assert list(curve(f"losses/previous/{name}")) == [500, *range(600, 1300, 100)]


def test_a_solved_task_ends_its_visit(tmp_path, monkeypatch):
    """Every evaluation says that the second task succeeds: its visits end after three, those to the first never.

    The evaluation at step 20 does not count, neither after a warm-up nor while the buffer does not hold a batch (32):
    no visit ends before there were updates.
    """
    true_evaluate = nbsp.evaluate_task

    def evaluate_task(actor, args, tasks, index, *rest, **options):
        return true_evaluate(actor, args, tasks, index, *rest, **options) | {"success": float(index)}

    monkeypatch.setattr(nbsp, "evaluate_task", evaluate_task)
    monkeypatch.setattr(nbsp, "make_env", lambda task, seed, render_mode: Point(task, seed))  # episodes of 20 steps
    options = TINY | {"steps_per_task": 100, "learning_starts": 20, "eval_every": 20, "score_steps": 20}
    results = nbsp.main(Args(**options, run_dir=str(tmp_path / "run")))
    assert results["metrics"]["phase_steps"] == [100, 80, 100, 80] and results["global_step"] == 360
    assert results["metrics"]["success_after_phase"] == [[0, 1]] * 4
    results = nbsp.main(Args(**options, stop_when_solved=False, run_dir=str(tmp_path / "full")))
    assert results["global_step"] == 400


class Point(gym.Env):
    """A point in the plane that has to reach the goal it sees, or in the second task the goal's mirror image."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)

    def __init__(self, task: str, seed: int):
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.sign = 1 if task == "reach-v3" else -1
        self.reset(seed=seed)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal, self.steps = np.zeros(2), self.np_random.uniform(-1, 1, 2), 0
        return np.array([*self.position, *self.goal], np.float32), {}

    def step(self, action):
        self.position, self.steps = self.position + 0.2 * action, self.steps + 1
        distance = np.linalg.norm(self.position - self.sign * self.goal)
        info = {"success": float(distance < 0.15), "obj_to_target": distance}
        return np.array([*self.position, *self.goal], np.float32), -distance, False, self.steps == 20, info


def test_the_scoring_rollout_is_the_deterministic_actor_on_goals_of_its_own(monkeypatch):
    """Against a loop that writes down what the environment gave; 50 steps are two episodes of 20 and a half one."""
    monkeypatch.setattr(nbsp, "make_env", lambda task, seed, render_mode: Point(task, seed))
    tasks, args = ["reach-v3", "drawer-close-v3"], Args(**(TINY | {"score_steps": 50, "seed": 7}))
    actor, before = Agent(args, 4, 2, CPU).actor, torch.get_rng_state()
    rollout, expected = nbsp.score_rollout(actor, args, tasks, 1), []
    assert torch.equal(torch.get_rng_state(), before)
    env = Point("drawer-close-v3", 0)
    for t in range(50):
        if t % 20 == 0:
            seed = np.random.SeedSequence((7, nbsp.SCORE_GOALS, 1, t // 20)).generate_state(1)[0]
            obs, _ = env.reset(seed=int(seed))
        action = actor.act(obs, deterministic=True)
        next_obs, reward, _, _, info = env.step(action)
        expected.append((obs, action, info["success"], info["obj_to_target"], reward, t // 20))
        obs = next_obs
    names = ("obs", "action", "success", "distance", "reward", "episode")
    for name, column in zip(names, zip(*expected, strict=True), strict=True):
        assert torch.equal(rollout[name], torch.from_numpy(np.array(column, np.float32))), name
    assert set(rollout) == set(names)


@pytest.mark.slow
def test_it_learns_both_tasks_and_forgets_less_than_sac(tmp_path, monkeypatch):
    """Opposite tasks, told apart by one-hot observations: a point has to go to the goal or to its mirror image.

    It guards SAC and the replay of earlier tasks, which alone could keep the first task here; masks are tested above.
    """
    monkeypatch.setattr(nbsp, "make_env", lambda task, seed, render_mode: Point(task, seed))
    options = TINY | {"steps_per_task": 2000, "learning_starts": 200, "eval_every": 2000, "eval_episodes": 40}
    options |= {"cycles": 1, "hidden_dim": 32, "batch_size": 64, "previous_buffer_size": 10_000, "replay_interval": 10}
    options |= {"policy_lr": 3e-3, "q_lr": 3e-3, "gamma": 0.8, "task_one_hot": True, "score_steps": 500}
    reports = {}
    for method in ("sac", "nbsp"):
        reports[method] = nbsp.main(Args(**options, method=method, run_dir=str(tmp_path / method)))["metrics"]
    # seed 1 gave fwt 1.00 and 0.94, fm 0.98 and 0.00
    assert reports["sac"]["fwt"] >= 0.8 and reports["sac"]["fm"] >= 0.5
    assert reports["nbsp"]["fwt"] >= 0.8 and reports["nbsp"]["fm"] <= 0.2


# -------------------------------------------------------------------------------------------------- the command line


def command_line(**options) -> list[str]:
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def start(*words, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "nbsp.py"), *words, *command_line(**options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    """Same weights, moments, buffers, random states and evaluations, byte by byte, and the same metrics."""
    first, second = load_checkpoint(str(one), "nbsp"), load_checkpoint(str(two), "nbsp")
    for checkpoint in (first, second):
        del checkpoint["record"]["seconds"]
    assert_same_tensors(first, second)
    assert (one / "evaluations.csv").read_bytes() == (two / "evaluations.csv").read_bytes()
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for name in ("metrics", "tasks", "global_step", "parameters"):
        assert results[0][name] == results[1][name]


def test_the_command_leaves_every_file_and_ends_with_a_table(finished_run, tmp_path):
    run = start(**(TINY | {"run_dir": tmp_path / "run", "quiet": False}))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "fwt" in out and "drawer-close-v3: skill neurons per layer: actor" in out and str(tmp_path / "run") in out
    assert "warning: success did not change in 150 steps: neurons are scored by distance" in out
    assert (tmp_path / "run" / "summary.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["script"] == "nbsp" and results["global_step"] == 1200 and len(results["tasks"]) == 2
    with open(tmp_path / "run" / "evaluations.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    # a subprocess and a call of main are the same run
    assert_same_run(tmp_path / "run", finished_run["run_dir"])


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(finished_run, tmp_path):
    run_dir, rng = tmp_path / "run", np.random.default_rng(int.from_bytes(os.urandom(4), "little"))

    def saved_step() -> int:
        if not (run_dir / "checkpoint.pt").exists():
            return 0
        return load_checkpoint(str(run_dir), "nbsp")["record"]["global_step"]

    run, killed_at = start(**(TINY | {"run_dir": run_dir, "checkpoint_every": 100})), [0]
    while len(killed_at) < 3:
        while saved_step() == killed_at[-1]:  # until it got further
            assert run.poll() is None, "ended before it was killed"
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=60)
        assert run.returncode == -signal.SIGKILL
        killed_at.append(saved_step())
        run = start("--resume", str(run_dir))
    assert 0 < killed_at[1] < killed_at[2] < 1200
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert_same_run(run_dir, finished_run["run_dir"])


def test_interrupt_saves_prints_the_resume_command_and_exits_130(tmp_path):
    options = {"run_dir": tmp_path / "run", "steps_per_task": 100_000, "checkpoint_every": 0, "quiet": False}
    run = start(**(TINY | options))
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.1)
    time.sleep(2)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert f"python nbsp.py --resume {tmp_path / 'run'}" in err.splitlines()[-1]
    step = load_checkpoint(str(tmp_path / "run"), "nbsp")["at"]["step"]
    assert step > 0 and step % 200 == 0  # at an episode's end


@pytest.mark.parametrize("moment", ["evaluate", "recorded", "score", "ablate"])
def test_interrupted_in_between_it_goes_on_to_the_same_bytes(finished_run, tmp_path, monkeypatch, moment):
    """The signal arrives in an evaluation, right after one, while neurons are scored, or in the ablation."""
    calls = []
    target, name = {
        "evaluate": (nbsp.metrics, "evaluate"),
        "recorded": (Agent, "plasticity"),
        "score": (nbsp, "score_rollout"),
        "ablate": (nbsp, "random_neurons"),
    }[moment]
    true_function = getattr(target, name)

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_function(*arguments)

    monkeypatch.setattr(target, name, interrupted)
    run_dir, options = tmp_path / "run", TINY | ({"ablate_neurons": True} if moment == "ablate" else {})
    with pytest.raises(Interrupted):
        nbsp.main(Args(**options, run_dir=str(run_dir)))
    saved = load_checkpoint(str(run_dir), "nbsp")
    # evaluations come at steps 300, two of them; the second rollout, or its ablation, ends the second visit
    at_step = {"evaluate": 300, "recorded": 600, "score": 600, "ablate": 300}[moment]
    assert saved["record"]["global_step"] == at_step
    results = nbsp.main(Args(**options, run_dir=str(run_dir), resume=str(run_dir)))
    if moment != "ablate":
        assert_same_run(run_dir, finished_run["run_dir"])
        return
    # the ablation is a measurement: the run is the same as without it
    assert_same_tensors(load_checkpoint(str(run_dir), "nbsp")["agent"], finished_run["checkpoint"]["agent"])
    assert [(report["phase"], report["task"]) for report in results["metrics"]["ablations"]] == [
        (phase, ["reach-v3", "drawer-close-v3"][phase % 2]) for phase in range(4)
    ]
    for report, (_, scores) in zip(results["metrics"]["ablations"], finished_run["scores"], strict=True):
        expected = [int(layer.sum()) for layer in nbsp.skill_neurons(scores["actor"], 0.2)]
        assert report["neurons_per_layer"] == expected and sum(expected) == round(0.2 * 48)
    last = finished_run["results"]["tasks"][1]["final_return"]
    assert results["metrics"]["ablations"][-1]["return_whole"] == last != report["return_without_skill"]


BAD_ARGUMENTS = {
    "unknown task": (["--task-seq", "windoww"], r"windoww.*window"),
    "task twice": (["--task-seq", "reach,push,reach"], r"--task-seq reach,push,reach: .*reach-v3 comes twice"),
    "no cycle": (["--cycles", "0"], r"--cycles 0: must be at least 1"),
    "method": (["--method", "nsbp"], r"--method nsbp: must be one of nbsp, sac, replay, mask"),
    "gpm": (["--gpm", "return"], r"--gpm return: must be one of success, distance, reward"),
    "target": (["--mask-target", "weights"], r"--mask-target weights: must be one of update, gradient"),
    "proportion": (["--skill-proportion", "1.2"], r"--skill-proportion 1\.2: must be between 0 and 1"),
    "not a number": (["--mask-factor", "nan"], r"--mask-factor nan: must be between 0 and 1"),
    "interval": (["--replay-interval", "0"], r"--replay-interval 0: must be at least 1"),
    "old buffer": (["--previous-buffer-size", "1"], r"--previous-buffer-size 1: must be at least .*tasks, 2"),
    "scoring": (["--score-steps", "1"], r"--score-steps 1: must be at least 2"),
    "tau": (["--tau", "1.5"], r"--tau 1\.5: must be between 0 and 1"),
    "step size": (["--policy-lr", "0"], r"--policy-lr 0\.0: must be a positive number"),
    "negative seed": (["--seed", "-1"], r"--seed -1: must be at least 0"),
    "large seed": (["--seed", str(2**32)], r"--seed 4294967296: must be below 2\*\*32"),
    "warm-up": (["--steps-per-task", "5000"], r"--learning-starts 5000: must be below --steps-per-task 5000"),
    "small buffer": (["--buffer-size", "100"], r"--buffer-size 100: must be at least --batch-size 256"),
    "cuda": (["--device", "cuda"], r"--device cuda: .*no CUDA"),
    "nothing to resume": (["--resume", "nothing"], r"nothing: no readable run"),
    "nothing to evaluate": (["--evaluate", "nothing"], r"nothing: no readable run"),
    "unwritable": (["--run-dir", "/dev/null/run"], r"--run-dir /dev/null/run: cannot be written"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_2(case, monkeypatch, capsys, tmp_path):
    words, expected = BAD_ARGUMENTS[case]
    assert_refused(words, expected, monkeypatch, capsys, tmp_path)


def assert_refused(words: list[str], expected: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["nbsp.py", *words])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        nbsp.run(nbsp.main, Args, {"quick": nbsp.QUICK})
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.search(expected, err) and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.iterdir()) == before  # no folder is left behind


def test_bad_resumes_give_one_line_and_exit_2(finished_run, monkeypatch, capsys, tmp_path):
    run_dir = shutil.copytree(finished_run["run_dir"], tmp_path / "run")
    (run_dir / "results.json").unlink()
    words = ["--resume", str(run_dir)]
    factor = [*words, "--mask-factor", "0.5"]
    assert_refused(factor, r"--mask-factor 0\.5: contradicts.*0\.2", monkeypatch, capsys, tmp_path)
    assert_refused(["--run-dir", str(run_dir)], r"holds a run already.*--resume", monkeypatch, capsys, tmp_path)
    checkpoint = run_dir / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    assert_refused(words, r"checkpoint\.pt: damaged", monkeypatch, capsys, tmp_path)
    torch.save({"script": "ssde"}, checkpoint)
    assert_refused(words, r"checkpoint\.pt: not a checkpoint of nbsp", monkeypatch, capsys, tmp_path)
    checkpoint.unlink()
    assert_refused(words, r"checkpoint\.pt: no checkpoint", monkeypatch, capsys, tmp_path)


def test_quick_sets_defaults_and_what_is_typed_wins():
    args = parse_args(Args, {"quick": nbsp.QUICK}, ["--quick", "--gamma", "0.9"])
    assert args == Args(**(nbsp.QUICK | {"quick": True, "gamma": 0.9}))
    nbsp.check_args(args)


def test_help_names_every_argument():
    out, _ = start("--help").communicate(timeout=60)
    for name in Args.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out


def test_resuming_a_finished_run_returns_its_result(finished_run):
    run_dir = str(finished_run["run_dir"])
    before = (finished_run["run_dir"] / "checkpoint.pt").read_bytes()
    assert nbsp.main(Args(**TINY, run_dir=run_dir, resume=run_dir)) == finished_run["results"]
    assert (finished_run["run_dir"] / "checkpoint.pt").read_bytes() == before


def test_killed_before_its_results_were_written_a_run_still_ends(finished_run, tmp_path):
    run_dir = shutil.copytree(finished_run["run_dir"], tmp_path / "run")
    (run_dir / "results.json").unlink()
    nbsp.main(Args(**TINY, run_dir=str(finished_run["run_dir"]), resume=str(run_dir)))
    assert_same_run(run_dir, finished_run["run_dir"])


def test_evaluate_gives_the_last_evaluation_of_the_run(finished_run, capsys):
    """Same policy, same goals, same numbers; nothing in the folder changes."""
    run_dir = finished_run["run_dir"]
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    seen = nbsp.main(Args(evaluate=str(run_dir), episodes=1, ablate_neurons=True))
    final = finished_run["results"]["tasks"]
    assert [result["episode_return"] for result in seen.values()] == [task["final_return"] for task in final]
    for result in seen.values():
        assert result["ablation"]["return_whole"] == result["episode_return"]
        assert result["ablation"]["return_without_skill"] != result["episode_return"]
    out = capsys.readouterr().out
    assert out.count("warning: success did not change in 150 steps: neurons are scored by") == 2
    assert "drawer-close-v3" in out and out.count("without skill neurons") == out.count("without random neurons") == 2
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before
    quiet = nbsp.main(Args(evaluate=str(run_dir), episodes=1, quiet=True))
    assert quiet[0]["episode_return"] == final[0]["final_return"] and capsys.readouterr().out == ""
    with pytest.raises(ArgumentError, match="no CUDA"):
        nbsp.main(Args(evaluate=str(run_dir), device="cuda"))


def test_evaluating_more_often_changes_nothing_in_training(finished_run, tmp_path):
    changes = {"eval_every": 200, "eval_episodes": 2, "stop_when_solved": False}
    nbsp.main(Args(**(TINY | changes), run_dir=str(tmp_path / "run")))
    often, seldom = load_checkpoint(str(tmp_path / "run"), "nbsp"), finished_run["checkpoint"]
    assert_same_tensors(often["agent"], seldom["agent"])
    assert_same_tensors(often["random"], seldom["random"])
    assert len(often["record"]["rows"]) == 2 * len(seldom["record"]["rows"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("action", "action is not finite at step 170"),  # the actor is trained at every second update
        ("loss", "losses/q is not finite at step 200"),
        ("weight", r"targets\.0\.\S+ is not finite at step 300"),
    ],
)
def test_what_is_not_finite_stops_with_exit_1_and_keeps_the_good_checkpoint(
    what, message, tmp_path, monkeypatch, capsys
):
    true_update, calls = Agent.update, []

    def update(agent):
        calls.append(None)
        if what == "action" and len(calls) == 20:  # at step 170
            agent.log_alpha.data.fill_(math.nan)
        true_update(agent)
        if what == "loss":
            agent.losses["q"] = torch.tensor(math.nan)
        elif what == "weight" and len(calls) == 150:  # the visit's last
            next(agent.targets.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(nbsp, "LOG_EVERY", 100)
    monkeypatch.setattr("sys.argv", ["nbsp.py", *command_line(**TINY, run_dir=tmp_path / "run")])
    with pytest.raises(SystemExit) as leaving:
        nbsp.run(nbsp.main, Args)
    err = capsys.readouterr().err
    assert leaving.value.code == 1 and err.count("\n") == 1
    assert re.search(message, err) and str(tmp_path) in err
    checkpoint = load_checkpoint(str(tmp_path / "run"), "nbsp")
    assert checkpoint["record"]["global_step"] == 0
    agent = make_agent()
    agent.load_state_dict(checkpoint["agent"])
    assert all(weight.isfinite().all() for _, weight in agent.named_weights())
