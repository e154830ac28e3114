"""NBSP's mathematics against literal versions of the paper's formulas, and its promises on real training runs."""

import copy
import csv
import importlib.util
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
from common import cli, metrics
from common.cli import ArgumentError, Interrupted, load_checkpoint
from common.recorder import state_of
from nbsp import Agent, Args, PreviousTasks, ReplayBuffer

ROOT = Path(__file__).parent.parent
OBS_DIM, ACT_DIM, CPU = 39, 4, torch.device("cpu")
NETWORKS = ("actor", "critic1", "critic2")
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
    "replay_every": 4,
    "quiet": True,
}


def make_agent(**changes) -> Agent:
    torch.manual_seed(0)
    return Agent(Args(**(TINY | changes)), OBS_DIM, ACT_DIM, CPU)


def network(agent: Agent, net: str) -> torch.nn.Module:
    return {"actor": agent.actor, "critic1": agent.critics[0], "critic2": agent.critics[1]}[net]


def fill(replay: ReplayBuffer, count: int, seed: int = 0) -> None:
    """Random transitions."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        obs, next_obs = rng.standard_normal((2, OBS_DIM)).astype(np.float32)
        action = rng.uniform(-1, 1, ACT_DIM).astype(np.float32)
        replay.add(obs=obs, next_obs=next_obs, action=action, reward=rng.standard_normal())


def end_task(agent: Agent, task: int, seed: int | None = None) -> None:
    """With a random rollout: scores differ from task to task, and some neurons are constant."""
    generator = torch.Generator().manual_seed(task if seed is None else seed)
    obs, action = (torch.randn(40, size, generator=generator) for size in (OBS_DIM, ACT_DIM))
    agent.end_task(task, {"obs": 0.1 * obs, "action": action}, torch.rand(40, generator=generator))


def experienced_agent(tasks: int = 2, updates: int = 3, **changes) -> Agent:
    """An agent that has ended `tasks` tasks, with moments in its optimizers and a filled buffer."""
    agent = make_agent(**changes)
    for task in range(tasks):
        fill(agent.replay, 120, task)
        agent.update()
        end_task(agent, task)
    fill(agent.replay, 100, tasks)
    for _ in range(updates):
        agent.update()
    return agent


def literal_mask(agent: Agent, net: str) -> list[list[float]]:
    """mask(N) by the letter: sort the neurons of each task, take the best, alpha (1 - Score), smallest of the tasks."""
    width, args = agent.args.hidden_dim, agent.args
    masks = [[1.0] * width for _ in range(args.hidden_layers)]
    for scores in agent.skills[net].scores.values():
        ranked = [(-s.item(), layer, i) for layer, row in enumerate(scores) for i, s in enumerate(row)]
        ranked = sorted(neuron for neuron in ranked if neuron[0] < 0)
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
                assert score[n] == 0
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
    assert nbsp.neuron_scores([a], torch.rand(5000))[0].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(2, 12), layers=st.integers(1, 3), proportion=st.floats(0, 1))
def test_skill_neurons_are_the_best_of_all_layers_together(seed, width, layers, proportion):
    rng = np.random.default_rng(seed)
    scores = [torch.from_numpy(rng.integers(2, 5, width) / 4).float() for _ in range(layers)]
    scores[0][rng.random(width) < 0.3] = 0.0
    skill = torch.cat(nbsp.skill_neurons(scores, proportion))
    flat = torch.cat(scores)
    live = (flat > 0).sum().item()
    assert skill.sum() == min(live, round(proportion * width * layers))
    assert not flat[skill].eq(0).any()
    if 0 < skill.sum() < live:
        worst = flat[skill].min()
        assert worst >= flat[~skill & (flat > 0)].max()
        ties = skill[flat == worst].tolist()
        assert ties == sorted(ties, reverse=True)  # of equal scores the first neurons win


def test_masks_equal_eq_5_and_the_smallest_of_several_tasks_counts():
    agent = experienced_agent(tasks=3, skill_proportion=0.4)
    for net in NETWORKS:
        literal = literal_mask(agent, net)
        torch.testing.assert_close(torch.stack(agent.skills[net].masks), torch.tensor(literal))
        assert sum(m < 1 for layer in literal for m in layer) > round(0.4 * 48)  # the tasks do not choose the same ones
    before = torch.stack(agent.skills["actor"].masks)
    end_task(agent, 1, seed=9)  # a second visit: its new scores count, its old ones no longer
    assert len(agent.skills["actor"].scores) == 3
    torch.testing.assert_close(torch.stack(agent.skills["actor"].masks), torch.tensor(literal_mask(agent, "actor")))
    assert (torch.stack(agent.skills["actor"].masks) > before).any()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_actor_is_scored_at_s_and_the_critics_at_s_and_a(layer_norm):
    """Scores recomputed with a loop over the layers."""
    agent = make_agent(layer_norm=layer_norm)
    fill(agent.replay, 60)
    rollout, q = agent.replay.recent(60), torch.rand(60)
    agent.end_task(0, rollout, q)
    near = q.double() > q.double().mean()
    for net in NETWORKS:
        x = rollout["obs"] if net == "actor" else torch.cat([rollout["obs"], rollout["action"]], 1)
        for layer, score in zip(network(agent, net).hidden, agent.skills[net].scores[0], strict=True):
            x = x @ layer[0].weight.T + layer[0].bias
            if layer_norm:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = x.clamp_min(0).detach()
            accuracy = ((x > x.double().mean(0)) == near[:, None]).float().mean(0)
            expected = torch.maximum(accuracy, 1 - accuracy)
            torch.testing.assert_close(score[score > 0], expected[score > 0])
            assert torch.equal(score.eq(0), (x == x[0]).all(0))


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
        assert measure == "none" and nbsp.neuron_scores([torch.rand(2, 3)], q)[0].eq(0).all()


def test_a_distance_that_only_the_goal_changes_is_no_goal_proximity():
    rollout = {"success": torch.zeros(4), "distance": torch.tensor([0.2, 0.2, 0.3, 0.3]), "reward": torch.arange(4.0)}
    assert nbsp.goal_proximity(rollout | {"episode": torch.tensor([0.0, 0.0, 1.0, 1.0])}, "success")[1] == "reward"
    assert nbsp.goal_proximity(rollout | {"episode": torch.tensor([0.0, 0.0, 0.0, 1.0])}, "success")[1] == "distance"


class Report:
    """Stands in for the recorder: what `report_scores` says and logs."""

    tasks = ("reach-v3", "drawer-close-v3")

    def __init__(self):
        self.said, self.logged = [], {}

    def say(self, line):
        self.said.append(line)

    def log(self, global_step, scalars):
        self.logged |= scalars


def test_without_any_measure_a_task_masks_nothing_and_it_is_said():
    agent, report = make_agent(), Report()
    fill(agent.replay, 50)
    agent.end_task(0, agent.replay.recent(50), torch.zeros(50))
    for masks in agent.skills.values():
        assert all((mask == 1).all() for mask in masks.masks)
    nbsp.report_scores(agent, 0, "none", report, 300)
    assert "success changed within no episode of 150 steps: there are no skill neurons" in report.said[0]
    assert report.logged["method/constant_neurons/actor"] == 48
    assert not {"method/score_mean/actor", "method/score/actor", "method/skill_score_mean/actor"} & set(report.logged)


# -------------------------------------------------------------------------------------------- the control: random ones


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), widths=st.lists(st.integers(2, 9), min_size=1, max_size=3))
def test_scores_dealt_anew_are_the_same_scores_among_the_same_live_neurons(seed, widths):
    generator = torch.Generator().manual_seed(seed)
    scores = [0.5 + 0.5 * torch.rand(width, generator=generator) for width in widths]
    scores = [score.masked_fill(torch.rand(len(score), generator=generator) < 0.3, 0.0) for score in scores]
    kept = [score.clone() for score in scores]
    dealt = nbsp.dealt_anew(scores, generator)
    for one, two, three in zip(scores, dealt, kept, strict=True):
        assert torch.equal(one.eq(0), two.eq(0)) and torch.equal(one, three)
    one, two = (torch.cat(layers).sort().values for layers in (scores, dealt))
    assert torch.equal(one, two)


def test_random_neurons_are_as_many_with_masks_as_large_drawn_from_all_live_ones():
    agents = {choice: make_agent(mask_neurons=choice) for choice in ("skill", "random")}
    state = torch.get_rng_state()
    for agent in agents.values():
        end_task(agent, 0)
    assert torch.equal(torch.get_rng_state(), state)  # its draws are not training's
    for net in NETWORKS:
        skill, control = (torch.cat(agents[choice].skills[net].masks) for choice in ("skill", "random"))
        assert torch.equal(skill.sort().values, control.sort().values) and not torch.equal(skill, control)
        constant = torch.cat(agents["skill"].skills[net].scores[0]).eq(0)
        assert constant.any() and (control[constant] == 1).all()
    hits = torch.zeros(48)
    for _ in range(300):
        end_task(agents["random"], 0)  # each visit draws again
        hits += torch.cat(agents["random"].skills["actor"].masks) < 1
    live = ~torch.cat(agents["skill"].skills["actor"].scores[0]).eq(0)
    share = round(0.2 * 48) / live.sum()
    assert hits.sum() == 300 * round(0.2 * 48) and (hits[live] / 300 - share).abs().max() < 0.12
    again = make_agent(mask_neurons="random", seed=2)
    end_task(again, 0)
    first = make_agent(mask_neurons="random")
    end_task(first, 0)
    assert not torch.equal(torch.cat(again.skills["actor"].masks), torch.cat(first.skills["actor"].masks))


def test_a_resumed_control_draws_on():
    agent = make_agent(mask_neurons="random")
    end_task(agent, 0)
    resumed = make_agent(mask_neurons="random")
    nbsp.restored(resumed, copy.deepcopy(state_of(agent)), CPU)
    for one in (agent, resumed):
        end_task(one, 1)
    assert_same_tensors(state_of(agent), state_of(resumed))


def test_the_controls_networks_draw_apart():
    masks = make_agent(mask_neurons="random").skills.values()
    assert len({int(torch.randint(2**40, (), generator=one.generator)) for one in masks}) == 3


# --------------------------------------------------------------------------------------------------- gradient masking


def masked_names(agent: Agent, masks: dict[str, list[list[float]]]) -> dict[str, torch.Tensor]:
    """Mask of every parameter by its name, (out, 1) or (out,), 1 where nothing is masked."""
    named = {}
    for net in NETWORKS:
        for name, parameter in network(agent, net).named_parameters():
            mask = torch.ones(len(parameter))
            if name.startswith("hidden") and net in masks:  # hidden.<layer>.<part>: weight and bias, of a norm too
                mask = torch.tensor(masks[net][int(name.split(".")[1])])
            named[f"{net}.{name}"] = mask[:, None] if parameter.ndim == 2 else mask
    return named


def parameters(agent: Agent) -> dict[str, torch.Tensor]:
    named = ((f"{net}.{name}", p) for net in NETWORKS for name, p in network(agent, net).named_parameters())
    return {name: parameter.detach().clone() for name, parameter in named}


def step(agent: Agent, part: str) -> dict[str, torch.Tensor]:
    """One update, of the critics alone or with one step of the actor; returns how far each parameter moved."""
    before = parameters(agent)
    torch.manual_seed(5)
    if part == "critics":
        agent.updates = 0  # the next update is the first: no actor, no batch of earlier tasks
        agent.update()
    else:
        agent.critic_masks, agent.updates = [], 0  # the critics move freely, so that the actor's gradient is the same
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nbsp, "ACTOR_EVERY", 1)
            agent.update()
    return {name: value - before[name] for name, value in parameters(agent).items()}


def unmasked(agent: Agent) -> Agent:
    free = Agent(agent.args, OBS_DIM, ACT_DIM, CPU)
    nbsp.restored(free, copy.deepcopy(state_of(agent)), CPU)
    free.actor_masks = free.critic_masks = []
    return free


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("part", ["actor", "critics"])
def test_one_update_moves_the_fan_in_of_a_skill_neuron_by_its_mask_and_others_fully(part, layer_norm):
    agent = experienced_agent(layer_norm=layer_norm)
    free = unmasked(agent)
    masks = masked_names(agent, {n: literal_mask(agent, n) for n in NETWORKS if n.startswith(part.removesuffix("s"))})
    moved, moved_freely = step(agent, part), step(free, part)
    for name, delta in moved.items():
        mask = masks[name].expand_as(delta)
        torch.testing.assert_close(delta, mask * moved_freely[name], atol=1e-6, rtol=0)
        assert torch.equal(delta[mask == 1], moved_freely[name][mask == 1])
        if name.startswith(part.removesuffix("s")) and name.endswith("weight"):
            assert (moved_freely[name].abs() > 1e-5).any() and ("hidden" not in name or (mask < 1).any())
    # the moments saw the whole gradient
    for optimizer in ("actor_optimizer", "critic_optimizer"):
        states = [getattr(a, optimizer).state_dict()["state"] for a in (agent, free)]
        assert_same_tensors(*states)


@pytest.mark.parametrize("part", ["actor", "critics"])
def test_gradient_target_scales_the_gradient_before_adam(part):
    agent = experienced_agent(tasks=1, updates=0, mask_target="gradient")
    net, optimizer_name = ("actor", "actor_optimizer") if part == "actor" else ("critic2", "critic_optimizer")
    getattr(agent, optimizer_name).state.clear()  # so that the moments of the next step are its gradients
    free = unmasked(agent)
    masks = masked_names(agent, {net: literal_mask(agent, net)})
    moved, moved_freely = step(agent, part), step(free, part)
    states = [getattr(a, optimizer_name).state for a in (agent, free)]
    pairs = zip(network(agent, net).named_parameters(), network(free, net).parameters(), strict=True)
    for (name, p), p_free in pairs:
        mean, mean_free = states[0][p]["exp_avg"], states[1][p_free]["exp_avg"]
        torch.testing.assert_close(mean, masks[f"{net}.{name}"] * mean_free)
    # Adam takes the scale away again: where gradients are far above its epsilon, weights move as if there were no mask
    name, weight = f"{net}.hidden.1.0.weight", network(agent, net).hidden[1][0].weight
    skill = (masks[name] < 1) & (states[0][weight]["exp_avg"].abs() > 1e-6)
    assert skill.any()
    torch.testing.assert_close(moved[name][skill], moved_freely[name][skill], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("changes", "actor", "critics"),
    [
        ({}, 1, 2),
        ({"method": "mask"}, 1, 2),
        ({"method": "sac"}, 0, 0),
        ({"method": "replay"}, 0, 0),
        ({"mask_actor": False}, 0, 2),
        ({"mask_critic": False}, 1, 0),
    ],
)
def test_what_is_masked(changes, actor, critics):
    agent = experienced_agent(**changes)
    assert (len(agent.actor_masks), len(agent.critic_masks)) == (actor, critics)
    assert all(len(masks.masked()) == 4 for masks in agent.actor_masks + agent.critic_masks)  # weights and biases
    assert (len(agent.previous) > 0) == (agent.args.method in ("nbsp", "replay"))


@pytest.mark.parametrize("target", ["update", "gradient"])
def test_before_there_is_an_earlier_task_masks_of_ones_change_nothing(target):
    agents = [make_agent(method=method, mask_target=target) for method in ("nbsp", "sac")]
    for agent in agents:
        fill(agent.replay, 60)
        torch.manual_seed(3)
        for _ in range(4):
            agent.update()
    assert_same_tensors(*(parameters(agent) for agent in agents))


def test_what_an_update_reads_stays_in_its_place():
    """Masks, the table of earlier tasks and the sizes of the buffers are written in place: a graph could hold them."""
    agent = experienced_agent(tasks=0)
    held = [*agent.previous.data.values(), *agent.replay.data.values(), agent.previous.size, agent.replay.size]
    held += [mask for masks in agent.skills.values() for mask in masks.masks]
    places = [tensor.data_ptr() for tensor in held]
    for task in (0, 1, 0):
        end_task(agent, task, task)
        fill(agent.replay, 60)
        agent.update()
    assert (agent.previous.size, agent.replay.size) == (len(agent.previous), len(agent.replay)) == (120, 60)
    assert places == [tensor.data_ptr() for tensor in held]
    now = [*agent.previous.data.values(), *agent.replay.data.values(), agent.previous.size, agent.replay.size]
    now += [mask for masks in agent.skills.values() for mask in masks.masks]
    assert all(one is two for one, two in zip(held, now, strict=True)) and (torch.cat(held[-2:]) < 1).any()


# ------------------------------------------------------------------------------------------------------------- replay


def add(replay: ReplayBuffer, first: float, second: float, reward: float) -> None:
    """A transition of two observed numbers."""
    obs, next_obs = np.array([first, second], np.float32), np.array([first + 0.5, second], np.float32)
    replay.add(obs=obs, next_obs=next_obs, action=np.array([-reward], np.float32), reward=reward)


@settings(max_examples=25, deadline=None)
@given(capacity=st.integers(1, 12), added=st.integers(1, 40), count=st.integers(1, 20))
def test_replay_keeps_the_latest_transitions(capacity, added, count):
    replay = ReplayBuffer(capacity, 2, 1, CPU)
    for n in range(added):
        add(replay, n, n, n)
    kept = list(range(max(0, added - capacity), added))
    recent = replay.recent(count)
    assert recent["reward"].tolist() == kept[-count:] and len(replay) == replay.size == len(kept)
    batch = replay.sample(400)
    assert set(batch["reward"].tolist()) == set(kept)  # all of them: at most 12
    assert torch.equal(batch["next_obs"][:, 0], batch["reward"] + 0.5)
    assert torch.equal(batch["action"][:, 0], -batch["reward"])
    copied = ReplayBuffer(capacity, 2, 1, CPU)
    copied.load_state_dict(replay.state_dict())
    assert torch.equal(copied.recent(count)["obs"], recent["obs"]) and len(copied) == copied.size == len(replay)


@settings(max_examples=40, deadline=None)
@given(
    capacity=st.integers(4, 60),  # at least one for each task
    visits=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=7),
)
def test_earlier_tasks_share_the_buffer_equally(capacity, visits):
    """Each transition carries its task, visit and number, so that its whole way can be checked."""
    previous, latest = PreviousTasks(capacity, 2, 1, CPU), {}
    for visit, (task, size) in enumerate(visits):
        replay = ReplayBuffer(50, 2, 1, CPU)
        for n in range(size):
            add(replay, task, visit, n)
        before = dict(previous.counts)
        previous.add_task(task, replay)
        latest[task] = (visit, size)
        share = capacity // len(latest)
        for owner, (_, held) in latest.items():
            assert previous.counts[owner] == min(share, held if owner == task else before[owner])
        assert len(previous) == previous.size == sum(previous.counts.values()) <= capacity
        owners = [owner for owner, count in previous.counts.items() for _ in range(count)]
        table = previous.recent(capacity)
        rows = list(zip(owners, *table["obs"].T.tolist(), table["reward"].tolist(), strict=True))
        assert len(set(rows)) == len(rows)  # drawn without replacement
        for owner, task_of_row, visit_of_row, n in rows:
            assert owner == task_of_row and visit_of_row == latest[owner][0] and n < latest[owner][1]
        assert torch.equal(table["next_obs"][:, 0], table["obs"][:, 0] + 0.5)
        assert torch.equal(table["action"][:, 0], -table["reward"])
        assert set(previous.sample(2000)["reward"].tolist()) == set(table["reward"].tolist())
    copied = PreviousTasks(capacity, 2, 1, CPU)
    copied.load_state_dict(previous.state_dict())
    assert copied.counts == previous.counts and torch.equal(copied.recent(capacity)["obs"], table["obs"])


def test_what_is_kept_of_a_task_is_a_uniform_draw():
    torch.manual_seed(0)
    replay, hits = ReplayBuffer(100, 2, 1, CPU), np.zeros(100)
    for n in range(100):
        add(replay, 0, 0, n)
    for _ in range(300):
        previous = PreviousTasks(20, 2, 1, CPU)
        previous.add_task(0, replay)
        hits[previous.data["reward"].int().numpy()] += 1
    assert hits.sum() == 300 * 20 and hits.min() > 30 and hits.max() < 95  # 60 each, sigma 7


def test_batches_are_uniform_draws():
    torch.manual_seed(0)
    replay = ReplayBuffer(50, 2, 1, CPU)
    for n in range(20):
        add(replay, 0, 0, n)
    hits = replay.sample(20_000)["reward"].int().bincount(minlength=50)
    assert hits[20:].sum() == 0 and hits[:20].min() > 850 and hits[:20].max() < 1150  # 1000 each, sigma 31


@pytest.mark.parametrize(
    ("method", "expected"), [("nbsp", [4, 8, 12]), ("replay", [4, 8, 12]), ("sac", []), ("mask", [])]
)
def test_every_kth_batch_comes_whole_from_earlier_tasks(method, expected, monkeypatch):
    agent, drawn = experienced_agent(tasks=0, updates=0, method=method), []
    true_sample = ReplayBuffer.sample
    monkeypatch.setattr(ReplayBuffer, "sample", lambda b, n: (drawn.append(type(b)), true_sample(b, n))[1])
    for _ in range(4):
        agent.update()
    assert drawn == [ReplayBuffer] * 4  # no earlier task yet
    end_task(agent, 0)
    assert len(agent.replay) == agent.replay.size == 0  # D is emptied
    fill(agent.replay, 100)
    agent.updates = 0
    drawn.clear()
    for _ in range(13):
        agent.update()
    assert [n + 1 for n, which in enumerate(drawn) if which is PreviousTasks] == expected and len(drawn) == 13


def test_losses_on_present_and_earlier_tasks_have_their_own_names():
    agent = experienced_agent(tasks=1, updates=0)
    names = {"critic", "q", "actor", "entropy"}
    agent.updates, agent.losses = 0, {}
    for _ in range(3):
        agent.update()
    assert set(agent.losses) == names | {"alpha"}
    of_the_present = {name: value.clone() for name, value in agent.losses.items()}
    agent.update()  # the fourth, on earlier tasks
    assert set(agent.losses) == names | {"alpha"} | {f"previous/{name}" for name in names}
    for name in names:
        assert agent.losses[name] == of_the_present[name] != agent.losses[f"previous/{name}"]


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


@pytest.mark.parametrize("layer_norm", [False, True])
def test_hidden_layers_are_linear_norm_relu(layer_norm):
    agent = make_agent(layer_norm=layer_norm, hidden_layers=3)
    for net in NETWORKS:
        kinds = [[type(module).__name__ for module in layer] for layer in network(agent, net).hidden]
        assert kinds == [["Linear", "LayerNorm", "ReLU"] if layer_norm else ["Linear", "ReLU"]] * 3


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


def test_each_run_begins_without_the_compiled_functions_of_another(monkeypatch):
    """PyTorch keeps eight versions of a function and then refuses to compile more."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    for compiled in (False, True):
        cli.prepare(Args(compile=compiled), "nbsp")
    assert len(resets) == 1


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
        moved = [name for name, value in parameters(agent).items() if not torch.equal(value, before[name])]
        changed = {name.split(".")[0] for name in moved}
        assert changed == {"critic1", "critic2"} | ({"actor"} if update % 2 == 0 else set())
        new_steps = next(iter(agent.actor_optimizer.state.values()))["step"].item()
        assert new_steps - steps == (2 if update % 2 == 0 else 0)
        for target, old, critic in zip(agent.targets.parameters(), targets, agent.critics.parameters(), strict=True):
            torch.testing.assert_close(target, old + agent.args.tau * (critic - old))


def test_the_temperature_rises_while_entropy_is_below_its_target():
    for log_prob, sign in ((5.0, 1), (3.0, -1)):  # entropy -5 is below the target -4: more exploration
        agent = make_agent()
        true_loss = agent.actor_backward
        agent.actor_backward = lambda *a, loss=true_loss, value=log_prob: (loss(*a)[0], torch.tensor(value))
        fill(agent.replay, 50)
        agent.updates = 1  # the next one trains the actor
        agent.update()
        assert math.copysign(1, agent.log_alpha.item()) == sign


def test_everything_learned_goes_on_through_a_border():
    agent = experienced_agent()
    learned = [name for name in Agent.STATE if name not in ("replay", "previous", "skills")]
    before = copy.deepcopy({name: state_of(getattr(agent, name)) for name in learned})
    assert len(before) == 9
    end_task(agent, 0, seed=7)
    assert_same_tensors(before, {name: state_of(getattr(agent, name)) for name in learned})


def test_an_update_is_a_step_on_sacs_losses_of_one_batch_from_the_targets(monkeypatch):
    monkeypatch.setattr(nbsp, "ACTOR_EVERY", 1)
    agent = experienced_agent(tasks=0, gamma=0.7)
    for parameter in agent.targets.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    actor, critics, targets, log_alpha = copy.deepcopy((agent.actor, agent.critics, agent.targets, agent.log_alpha))
    torch.manual_seed(3)
    agent.update()
    torch.manual_seed(3)
    batch = agent.replay.sample(32)
    assert agent.losses["critic"] == nbsp.critic_loss(actor, critics, targets, log_alpha, batch, 0.7)[0]
    loss, log_prob = nbsp.actor_loss(actor, agent.critics, log_alpha, batch["obs"])  # of the critics after their step
    assert (agent.losses["actor"], agent.losses["entropy"]) == (loss, -log_prob)


def test_defaults_are_the_papers_and_cleanrls():
    args = Args()
    named = {"method": "nbsp", "skill_proportion": 0.2, "mask_factor": 0.2, "replay_every": 10, "gpm": "success"}
    named |= {"previous_buffer_size": 100_000, "buffer_size": 1_000_000, "batch_size": 256, "learning_starts": 5000}
    named |= {"hidden_dim": 256, "hidden_layers": 2, "gamma": 0.99, "tau": 0.005, "actor_lr": 3e-4, "critic_lr": 1e-3}
    named |= {"steps_per_task": 500_000, "cycles": 2, "score_steps": 5000, "eval_every": 10_000, "layer_norm": False}
    assert {name: getattr(args, name) for name in named} == named
    agent = make_agent()
    optimizers = (agent.actor_optimizer, agent.critic_optimizer, agent.alpha_optimizer)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [3e-4, 1e-3, 1e-3]


def test_the_log_std_lies_between_minus_5_and_2_by_a_tanh():
    actor, obs = make_agent().actor, torch.randn(64, OBS_DIM)
    torch.nn.init.normal_(actor.head.weight, std=3)
    raw = actor.head(actor.hidden(obs))[:, ACT_DIM:]
    torch.testing.assert_close(actor(obs)[1], -5 + 7 * (raw.tanh() + 1) / 2)


# ----------------------------------------------------------------------------- tests/benchmarks/ablate_neurons.py


@pytest.fixture(scope="module")
def ablate():
    spec = importlib.util.spec_from_file_location("ablate_neurons", ROOT / "tests/benchmarks/ablate_neurons.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablate_neurons"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layer_norm", [False, True])
def test_silenced_neurons_output_0_and_the_others_of_their_layer_are_unchanged(ablate, layer_norm):
    actor, obs = make_agent(layer_norm=layer_norm).actor, torch.randn(50, OBS_DIM)
    neurons = [torch.rand(24) < 0.3, torch.zeros(24, dtype=torch.bool)]
    whole = metrics.hidden_features(actor, (obs,))
    left = metrics.hidden_features(ablate.silenced(actor, neurons), (obs,))
    assert (left[0][:, neurons[0]] == 0).all() and torch.equal(left[0][:, ~neurons[0]], whole[0][:, ~neurons[0]])
    assert not torch.equal(left[1], whole[1])
    assert_same_tensors(whole, metrics.hidden_features(actor, (obs,)))  # it is a copy


def test_random_neurons_of_an_ablation_are_as_many_per_layer_and_never_constant_ones(ablate):
    generator = torch.Generator().manual_seed(0)
    scores = [0.5 + 0.5 * torch.rand(24, generator=generator) for _ in range(2)]
    scores = [score.masked_fill(torch.rand(24, generator=generator) < 0.2, 0.0) for score in scores]
    skill = nbsp.skill_neurons(scores, 0.3)
    draws = [ablate.random_neurons(skill, scores, (1, draw)) for draw in range(200)]
    for draw in draws:
        for mask, chosen, score in zip(draw, skill, scores, strict=True):
            assert mask.sum() == chosen.sum() and not score[mask].eq(0).any()
    hits, live = torch.stack([draw[0] for draw in draws]).float().mean(0), (scores[0] > 0)
    share = skill[0].sum() / live.sum()  # any of them, skill neuron or not
    assert (hits[live] - share).abs().max() < 0.15 and (hits[skill[0]].mean() - share).abs() < 0.05


def test_an_ablation_plays_without_the_skill_neurons_and_without_five_draws_of_random_ones(ablate, monkeypatch):
    """Each variant is known by its silent neurons; a fake evaluation returns their number, weighted by their place."""
    args, actor = Args(**(TINY | {"score_steps": 50})), Agent(Args(**TINY), 4, 2, CPU).actor
    place = torch.arange(48).double().exp2()  # each set of neurons has a sum of its own
    probe = 10 * torch.randn(500, 4)

    def value(neurons: list[torch.Tensor]) -> float:
        return (torch.cat(neurons) * place).sum().item()

    def policy(actor, one_hot):
        silent = [(h == 0).all(0) for h in metrics.hidden_features(actor, (probe,))]
        return value([now & ~always for now, always in zip(silent, dead, strict=True)])

    dead = [(h == 0).all(0) for h in metrics.hidden_features(actor, (probe,))]
    monkeypatch.setattr(nbsp, "policy", policy)
    monkeypatch.setattr(ablate.metrics, "evaluate", lambda v, *_: {"success": v, "episode_return": -v})
    report = ablate.ablation(actor, args, 1, Point("drawer-close-v3"), np.zeros(0, np.float32), 3)
    env = Point("drawer-close-v3")
    rollout = nbsp.score_rollout(actor, args, env, 1, lambda: False)
    scores = nbsp.neuron_scores(metrics.hidden_features(actor, (rollout["obs"],)), -rollout["distance"])
    skill = nbsp.skill_neurons(scores, 0.2)
    draws = [ablate.random_neurons(skill, scores, (1, ablate.RANDOM_NEURONS, 1, n)) for n in range(5)]
    values = [value([m & ~d for m, d in zip(draw, dead, strict=True)]) for draw in draws]
    assert len(set(values)) == 5 and report["scored_by"] == "distance"
    assert report["neurons_per_layer"] == [int(layer.sum()) for layer in skill] and value(skill) > 0
    for name, expected in (("whole", 0), ("without_skill", value(skill)), ("without_random", np.mean(values))):
        assert report[f"success_{name}"] == -report[f"episode_return_{name}"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_cycling_metrics_by_hand():
    success = np.array([[1.0, 0.0], [0.4, 0.8], [0.9, 0.5], [1.0, 1.0]])  # A, B, A, B
    report = metrics.cycling_report(success)
    assert report["asr"] == pytest.approx((1.0 + (0.4 + 0.8) / 2 + (0.9 + 0.5) / 2 + 1.0) / 4)
    # after B, A lost 0.6; after A, B lost 0.3; after B, A rose from 0.9: no loss
    assert report["fm"] == pytest.approx((0.6 + 0.3 + 0.0) / 3)
    assert report["fwt"] == pytest.approx((1.0 + 0.8 + 0.9 + 1.0) / 4)
    assert metrics.cycling_report(np.array([[0.5], [1.0]])) == {"asr": 0.75, "fm": 0.0, "fwt": 0.75}


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
    assert metrics.cycling_report(success) == pytest.approx(expected)


def test_a_task_is_solved_after_three_good_evaluations_running():
    def rows(successes, task=0):
        return [{"global_step": 10 * n, "task_index": task, "success": s} for n, s in enumerate(successes, start=1)]

    assert nbsp.solved(rows([0.2, 1.0, 0.95, 1.0]), 0, 0)
    assert not nbsp.solved(rows([1.0, 1.0]), 0, 0)
    assert not nbsp.solved(rows([1.0, 1.0, 0.9]), 0, 0) and not nbsp.solved(rows([1.0, 1.0, 0.9, 1.0]), 0, 0)
    assert not nbsp.solved(rows([1.0] * 3, task=1), 0, 0)
    # not those of an earlier phase or of the warm-up
    assert nbsp.solved(rows([1.0] * 4), 0, 10) and not nbsp.solved(rows([1.0] * 4), 0, 20)


def test_metrics_are_those_of_the_right_networks_and_transitions(monkeypatch):
    monkeypatch.setattr(nbsp, "METRIC_BATCH", 60)  # of the 100 in the buffer
    agent = experienced_agent()
    batch, plasticity = agent.replay.recent(60), agent.plasticity()
    inputs = {"actor": batch["obs"], "critic": torch.cat([batch["obs"], batch["action"]], 1)}
    for net, x in inputs.items():
        module, features = network(agent, net.replace("critic", "critic1")), []
        for layer in module.hidden:
            x = torch.relu(x @ layer[0].weight.T + layer[0].bias).detach()
            features.append(x)
        units = torch.cat([h.abs().mean(0) / h.abs().mean() for h in features])
        for tau in (0, 0.025, 0.1):
            assert plasticity[f"plasticity/{net}/dormant_ratio_{tau}"] == pytest.approx((units <= tau).float().mean())
        positive = torch.cat([(h > 0).float().mean(0) for h in features]).mean()
        assert plasticity[f"plasticity/{net}/active_fraction"] == pytest.approx(positive.item())
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()))
        assert plasticity[f"plasticity/{net}/weight_norm"] == pytest.approx(norm, rel=1e-4)
        assert agent.parameter_counts()[net] == sum(p.numel() for p in module.parameters())


# ----------------------------------------------------------------------------------- whole runs, on a toy and for real


class Point(gym.Env):
    """A point in the plane that has to reach the goal it sees, or in the second task the goal's mirror image.

    An episode has 20 steps, and its goal depends on the reset's seed only: without one there is an error.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, task: str, seed: int = 0, render_mode: str | None = None):
        self.sign = 1 if task == "reach-v3" else -1

    def reset(self, *, seed, options=None):
        self.position, self.goal, self.steps = np.zeros(2), np.random.default_rng(seed).uniform(-1, 1, 2), 0
        return np.array([*self.position, *self.goal], np.float32), {}

    def step(self, action):
        self.position, self.steps = self.position + 0.2 * action, self.steps + 1
        distance = np.linalg.norm(self.position - self.sign * self.goal)
        info = {"success": float(distance < 0.15), "obj_to_target": distance}
        return np.array([*self.position, *self.goal], np.float32), -distance, False, self.steps == 20, info


@pytest.fixture
def toy(monkeypatch):
    """Runs are on `Point`. The options are those of a run of four visits, 90 steps each."""
    patch_toy(monkeypatch)
    return TOY


TOY = TINY | {"steps_per_task": 90, "learning_starts": 40, "score_steps": 40, "previous_buffer_size": 60}
TOY |= {"eval_every": 40, "eval_episodes": 2, "batch_size": 16, "hidden_dim": 16, "stop_when_solved": False}


def patch_toy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nbsp, "make_env", Point)
    patch.setattr(nbsp, "env_sizes", lambda task, args: (4, 2))


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A whole run of the toy."""
    run_dir = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch_toy(patch)
        nbsp.main(Args(**TOY, run_dir=str(run_dir)))
    return run_dir


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A whole run on real tasks, watched: state at each border, scores, and when updates and random actions came."""
    run_dir = tmp_path_factory.mktemp("nbsp") / "run"
    watched = {"kept": [], "scores": [], "buffers": [], "updates": [], "phase": 0}
    true_end, true_update = Agent.end_task, Agent.update

    def end_task(agent, task, rollout, q):
        watched["buffers"].append(agent.replay.recent(10_000))
        true_end(agent, task, rollout, q)
        watched["scores"].append((task, {net: masks.scores[task] for net, masks in agent.skills.items()}))
        watched["kept"].append((dict(agent.previous.counts), agent.previous.recent(10_000)))
        watched["phase"] += 1

    def update(agent):
        watched["updates"].append((watched["phase"], agent.replay.added))
        true_update(agent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "end_task", end_task)
        patch.setattr(Agent, "update", update)
        patch.setattr(nbsp, "LOG_EVERY", 100)
        results = nbsp.main(Args(**TINY, run_dir=str(run_dir)))
    checkpoint = load_checkpoint(str(run_dir), "nbsp")
    return {"run_dir": run_dir, "results": results, "checkpoint": checkpoint} | watched


def test_a_run_cycles_through_its_tasks(finished_run):
    assert [task for task, _ in finished_run["scores"]] == [0, 1, 0, 1]
    # no update in the warm-up of first visits; then as soon as there is a batch
    expected = [(phase, n) for phase in (0, 1) for n in range(151, 301)]
    assert finished_run["updates"] == expected + [(phase, n) for phase in (2, 3) for n in range(32, 301)]


def test_random_actions_come_at_first_visits_only(toy, tmp_path, monkeypatch):
    explored, true_call = [], nbsp.CapturedPolicy.__call__

    def call(policy, obs):
        explored.append(obs)
        return true_call(policy, obs)

    monkeypatch.setattr(nbsp.CapturedPolicy, "__call__", call)
    nbsp.main(Args(**toy, run_dir=str(tmp_path / "run")))
    assert len(explored) == 50 + 50 + 90 + 90


def test_each_task_leaves_its_share_of_its_own_buffer(finished_run):
    """250 transitions in all; the buffers held 300."""
    expected = [{0: 250}, {0: 125, 1: 125}, {0: 125, 1: 125}, {0: 125, 1: 125}]
    assert [counts for counts, _ in finished_run["kept"]] == expected
    for phase, (counts, data) in enumerate(finished_run["kept"]):
        owners = np.repeat(list(counts), list(counts.values()))
        kept = {row.numpy().tobytes() for row in data["obs"][owners == phase % 2]}
        buffer = {row.numpy().tobytes() for row in finished_run["buffers"][phase]["obs"]}
        assert kept <= buffer and len(buffer) == 300


def test_results_hold_success_after_each_phase_and_its_measures(finished_run):
    results, checkpoint = finished_run["results"], finished_run["checkpoint"]
    success = results["metrics"]["success_after_phase"]
    for row in checkpoint["record"]["rows"]:
        assert success[row["phase"]][row["task_index"]] == row["success"]
    expected = metrics.cycling_report(np.array(success))
    assert {name: results["metrics"][name] for name in ("asr", "fm", "fwt")} == expected
    # no success in so few steps; the distance to reach-v3's goal always changes, that of the drawer once it is touched
    assert results["metrics"]["scored_by"][::2] == ["distance"] * 2
    assert set(results["metrics"]["scored_by"][1::2]) <= {"distance", "reward"}
    assert results["metrics"]["phase_steps"] == [300] * 4 and results["global_step"] == 1200
    assert [(r["global_step"], r["phase"], r["task_index"]) for r in checkpoint["record"]["rows"]] == [
        (300 * (phase + 1), phase, index) for phase in range(4) for index in range(2)
    ]
    stored = {net: checkpoint["agent"]["skills"][net]["scores"][0] for net in NETWORKS}
    assert_same_tensors(stored, finished_run["scores"][2][1])  # of the latest visit
    assert checkpoint["agent"]["updates"] == len(finished_run["updates"])
    assert results["run_dir"] == str(finished_run["run_dir"])


def test_tensorboard_has_what_scoring_found_and_the_losses(finished_run):
    events = EventAccumulator(str(finished_run["run_dir"]))
    events.Reload()

    def curve(name):
        return {point.step: point.value for point in events.Scalars(name)}

    for phase, ((_, scores), (counts, _)) in enumerate(zip(finished_run["scores"], finished_run["kept"], strict=True)):
        step = 300 * (phase + 1)
        for net, layers in scores.items():
            flat, skill = torch.cat(layers), nbsp.skill_neurons(layers, 0.2)
            assert curve(f"method/constant_neurons/{net}")[step] == flat.eq(0).sum()
            assert curve(f"method/score_mean/{net}")[step] == pytest.approx(flat[flat > 0].mean().item())
            chosen = flat[torch.cat(skill)].mean().item()
            assert (
                curve(f"method/skill_score_mean/{net}")[step] == pytest.approx(chosen)
                and chosen > flat[flat > 0].mean()
            )
            widths = [curve(f"method/skill_neurons/{net}/layer{layer}")[step] for layer in (1, 2)]
            assert widths == [mask.sum() for mask in skill]
        for task, name in enumerate(("reach-v3", "drawer-close-v3")):
            assert curve(f"method/previous_transitions/{name}").get(step, 0) == counts.get(task, 0)
    # every 100 steps with updates; the first visit has no earlier task
    numbered = enumerate(finished_run["updates"], start=1)
    due = [300 * phase + step for number, (phase, step) in numbered if number % 100 == 2]
    assert len(due) > 5
    for name in ("critic", "q", "actor", "entropy"):
        assert list(curve(f"losses/{name}")) == due
        assert list(curve(f"losses/previous/{name}")) == [step for step in due if step > 300]
    assert list(curve("plasticity/critic/grad_norm")) == list(curve("losses/critic"))
    assert set(curve("charts/episodic_length").values()) == {200}
    assert list(curve("plasticity/actor/dormant_ratio_0.025")) == [300, 600, 900, 1200]


def test_every_episode_has_a_seed_of_its_own(toy, tmp_path, monkeypatch):
    """Training, evaluation and scoring: no goal comes twice, but evaluations repeat theirs."""
    seeds, true_reset = [], Point.reset
    monkeypatch.setattr(Point, "reset", lambda env, *, seed, **o: (seeds.append(seed), true_reset(env, seed=seed))[1])
    nbsp.main(Args(**toy, run_dir=str(tmp_path / "run")))
    training = [nbsp.seed_of(1, nbsp.TRAIN_GOALS, phase, n) for phase in range(4) for n in range(5)]
    evaluation = [nbsp.seed_of(1, nbsp.EVAL_GOALS, task, n) for task in range(2) for n in range(2)]
    scoring = [nbsp.seed_of(1, nbsp.SCORE_GOALS, task, n) for task in range(2) for n in range(2)]
    assert len({*training, *evaluation, *scoring}) == 28
    assert sorted(seeds) == sorted([*training, *4 * 3 * evaluation, *2 * scoring])


@pytest.mark.parametrize("one_hot", [False, True])
def test_a_stored_policy_plays_as_in_the_run(toy, tmp_path, monkeypatch, one_hot):
    run_dir = str(tmp_path / "run")
    results = nbsp.main(Args(**(toy | {"task_one_hot": one_hot}), run_dir=run_dir))
    weights = load_checkpoint(run_dir, "nbsp")["agent"]["actor"]
    assert weights["hidden.0.0.weight"].shape == (16, 6 if one_hot else 4)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    seen = nbsp.main(Args(evaluate=run_dir, episodes=2, quiet=True))
    assert [row["episode_return"] for row in seen.values()] == [t["final_return"] for t in results["tasks"]]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    actor = Agent(Args(**(toy | {"task_one_hot": one_hot})), 6 if one_hot else 4, 2, CPU).actor
    actor.load_state_dict(weights)
    for task in (-1, 2):
        with pytest.raises(ArgumentError, match=f"has no task {task}; it has tasks 0 to 1"):
            nbsp.load_policy(run_dir, task)
    for task in range(2):
        play, obs = nbsp.load_policy(run_dir, task), np.random.default_rng(0).standard_normal(4)
        shown = torch.tensor([*obs, *([task == 0, task == 1] if one_hot else [])], dtype=torch.float32)
        expected = torch.tanh(actor(shown[None])[0])[0].detach().numpy()
        for dtype in (np.float64, np.float32):
            action = play(obs.astype(dtype))
            assert action.dtype == np.float32 and action.shape == (2,)
            np.testing.assert_allclose(action, expected, rtol=1e-5)
        assert play(obs.astype(np.float16)).dtype == np.float32


def test_training_observations_end_with_the_one_hot(toy, tmp_path):
    run_dir = str(tmp_path / "run")
    nbsp.main(Args(**(toy | {"task_one_hot": True}), run_dir=run_dir))
    previous = load_checkpoint(run_dir, "nbsp")["agent"]["previous"]
    assert previous["counts"] == {0: 30, 1: 30}
    for name in ("obs", "next_obs"):
        assert previous["data"][name][:, 4:].tolist() == [[1, 0]] * 30 + [[0, 1]] * 30


def test_a_solved_task_ends_its_visit(tmp_path, monkeypatch, toy):
    """Every evaluation says that the second task succeeds: its visits end after three, those to the first never.

    The evaluation at step 20 does not count, neither after a warm-up nor while the buffer does not hold a batch (32):
    no visit ends before there were updates.
    """
    true_evaluate = metrics.evaluate

    def evaluate(policy, env, episodes, seed, stop=None):
        return true_evaluate(policy, env, episodes, seed, stop) | {"success": float(env.sign == -1)}

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    options = TINY | {"steps_per_task": 100, "learning_starts": 20, "eval_every": 20, "score_steps": 20}
    results = nbsp.main(Args(**options, run_dir=str(tmp_path / "run")))
    assert results["metrics"]["phase_steps"] == [100, 80, 100, 80] and results["global_step"] == 360
    assert results["metrics"]["success_after_phase"] == [[0, 1]] * 4
    results = nbsp.main(Args(**options, stop_when_solved=False, run_dir=str(tmp_path / "full")))
    assert results["global_step"] == 400


def test_success_after_a_phase_is_that_of_its_last_evaluation(tmp_path, monkeypatch, toy):
    true_evaluate, successes = metrics.evaluate, []

    def evaluate(policy, env, episodes, seed, stop=None):
        successes.append(len(successes) % 7 / 10)
        return true_evaluate(policy, env, episodes, seed, stop) | {"success": successes[-1]}

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    options = TINY | {"steps_per_task": 100, "learning_starts": 20, "eval_every": 40, "score_steps": 20}
    results = nbsp.main(Args(**options, run_dir=str(tmp_path / "run")))
    rounds = [successes[i : i + 2] for i in range(0, len(successes), 2)]  # of both tasks
    assert len(rounds) == 12  # at steps 40, 80, 100 of each visit
    assert results["metrics"]["success_after_phase"] == rounds[2::3]
    report = metrics.cycling_report(np.array(rounds[2::3]))
    assert {name: results["metrics"][name] for name in report} == report and results["metrics"]["fm"] != 0


def test_the_scoring_rollout_is_the_deterministic_actor_on_goals_of_its_own():
    """Against a loop that writes down what the environment gave; 50 steps are two episodes of 20 and a half one."""
    args = Args(**(TINY | {"score_steps": 50, "seed": 7}))
    actor, before = Agent(args, 4, 2, CPU).actor, torch.get_rng_state()
    rollout, expected = nbsp.score_rollout(actor, args, Point("drawer-close-v3"), 1, lambda: False), []
    assert torch.equal(torch.get_rng_state(), before)
    env = Point("drawer-close-v3")
    for t in range(50):
        if t % 20 == 0:
            seed = np.random.SeedSequence((7, nbsp.SCORE_GOALS, 1, t // 20)).generate_state(1)[0]
            obs, _ = env.reset(seed=int(seed))
        action = torch.tanh(actor(torch.from_numpy(obs)[None])[0])[0].detach().numpy()
        next_obs, reward, _, _, info = env.step(action)
        expected.append((obs, action, info["success"], info["obj_to_target"], reward, t // 20))
        obs = next_obs
    names = ("obs", "action", "success", "distance", "reward", "episode")
    for name, column in zip(names, zip(*expected, strict=True), strict=True):
        assert torch.equal(rollout[name], torch.from_numpy(np.array(column, np.float32))), name
    assert set(rollout) == set(names)


@pytest.mark.slow
def test_it_learns_both_tasks_and_forgets_less_than_sac(tmp_path, toy):
    """Opposite tasks, told apart by one-hot observations: a point has to go to the goal or to its mirror image.

    It guards SAC and the replay of earlier tasks, which alone could keep the first task here; masks are tested above.
    """
    options = TINY | {"steps_per_task": 2000, "learning_starts": 200, "eval_every": 2000, "eval_episodes": 40}
    options |= {"cycles": 1, "hidden_dim": 32, "batch_size": 64, "previous_buffer_size": 10_000, "replay_every": 10}
    options |= {"actor_lr": 3e-3, "critic_lr": 3e-3, "gamma": 0.8, "task_one_hot": True, "score_steps": 500}
    reports = {}
    for method in ("sac", "nbsp"):
        reports[method] = nbsp.main(Args(**options, method=method, run_dir=str(tmp_path / method)))["metrics"]
    assert reports["sac"]["fwt"] >= 0.8 and reports["sac"]["fm"] >= 0.5
    assert reports["nbsp"]["fwt"] >= 0.8 and reports["nbsp"]["fm"] <= 0.2


def test_an_episode_that_succeeded_once_is_a_success_and_one_cut_short_is_not_whole(toy, tmp_path, monkeypatch):
    seen, true_step = [], Point.step

    def step(env, action):
        *rest, info = true_step(env, action)
        return *rest, info | {"success": float(env.steps == 3)}

    monkeypatch.setattr(Point, "step", step)
    monkeypatch.setattr(nbsp.Recorder, "episode", lambda recorder, *arguments: seen.append(arguments))
    nbsp.main(Args(**(toy | {"cycles": 1}), run_dir=str(tmp_path / "run")))
    visit = 4 * [(True, 20, 1)] + [(False, 10, 1)]
    assert [(whole, length, success) for _, _, whole, _, length, success in seen] == 2 * visit


def test_the_buffer_holds_an_episodes_steps_one_after_the_other(toy, tmp_path, monkeypatch):
    kept, true_end = [], Agent.end_task
    monkeypatch.setattr(Agent, "end_task", lambda a, *rest: (kept.append(a.replay.recent(90)), true_end(a, *rest)))
    nbsp.main(Args(**toy, run_dir=str(tmp_path / "run")))
    goes_on = torch.arange(89) % 20 != 19  # the next row is not of a new episode
    for data in kept:
        assert torch.equal(data["next_obs"][:-1][goes_on], data["obs"][1:][goes_on])
        torch.testing.assert_close(data["next_obs"][:, :2], data["obs"][:, :2] + 0.2 * data["action"])


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
        for name in ("seconds", "pace", "events"):  # of the clock and the file system
            del checkpoint["record"][name]
    assert_same_tensors(first, second)
    assert (one / "evaluations.csv").read_bytes() == (two / "evaluations.csv").read_bytes()
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for name in ("metrics", "tasks", "global_step", "parameters"):
        assert results[0][name] == results[1][name]


def test_killed_at_random_moments_and_resumed_it_is_the_same_run_and_leaves_every_file(finished_run, tmp_path):
    run_dir, rng = tmp_path / "run", np.random.default_rng(int.from_bytes(os.urandom(4), "little"))

    def saved_step() -> int:
        if not (run_dir / "checkpoint.pt").exists():
            return 0
        return load_checkpoint(str(run_dir), "nbsp")["record"]["global_step"]

    run, killed_at = start(**(TINY | {"run_dir": run_dir, "checkpoint_every": 100, "quiet": False})), [0]
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
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert_same_run(run_dir, finished_run["run_dir"])
    # a subprocess and a call of main are the same run; it leaves every file and ends with a table
    assert "fwt" in out and "drawer-close-v3: skill neurons per layer: actor" in out and str(run_dir) in out
    assert "warning: success changed within no episode of 150 steps: neurons are scored by" in out
    assert (run_dir / "summary.png").stat().st_size > 10_000
    results = json.loads((run_dir / "results.json").read_text())
    assert results["script"] == "nbsp" and results["global_step"] == 1200 and len(results["tasks"]) == 2
    with open(run_dir / "evaluations.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    assert list(run_dir.glob("events.out.tfevents.*"))


def test_interrupt_saves_prints_the_resume_command_and_exits_130(tmp_path):
    options = {"run_dir": tmp_path / "run", "steps_per_task": 100_000, "checkpoint_every": 0, "eval_every": 200}
    options |= {"quiet": False}
    run = start(**(TINY | options))
    evaluations = tmp_path / "run" / "evaluations.csv"
    while not evaluations.exists() or len(evaluations.read_text().splitlines()) < 2:  # a row: after an episode
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert f"python nbsp.py --resume {tmp_path / 'run'}" in err.splitlines()[-1]
    at = load_checkpoint(str(tmp_path / "run"), "nbsp")["at"]
    assert at["step"] == 200 * at["episode"] > 0  # at an episode's end


@pytest.mark.parametrize("moment", ["evaluate", "recorded", "score"])
def test_interrupted_in_between_it_goes_on_to_the_same_bytes(toy, toy_run, tmp_path, monkeypatch, moment):
    """The signal arrives in an evaluation, right after one, or while neurons are scored."""
    calls, targets = [], {"evaluate": (metrics, "evaluate"), "recorded": (Agent, "plasticity")}
    target, name = targets.get(moment, (nbsp, "score_rollout"))
    true_function = getattr(target, name)

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == (4 if moment == "evaluate" else 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return true_function(*arguments)

    monkeypatch.setattr(target, name, interrupted)
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        nbsp.main(Args(**toy, run_dir=str(run_dir)))
    saved = load_checkpoint(str(run_dir), "nbsp")
    # evaluations at steps 40, 80 and 90 of a visit, two tasks each; the second rollout ends the second visit
    assert saved["record"]["global_step"] == {"evaluate": 80, "recorded": 80, "score": 180}[moment]
    assert len(saved["record"]["rows"]) == {"evaluate": 2, "recorded": 4, "score": 12}[moment]
    nbsp.main(Args(resume=str(run_dir), quiet=True))
    assert_same_run(run_dir, toy_run)


BAD_ARGUMENTS = {
    "unknown task": (["--task-seq", "windoww"], r"windoww.*window"),
    "task twice": (["--task-seq", "reach,push,reach"], r"--task-seq reach,push,reach: .*reach-v3 comes twice"),
    "method": (["--method", "spn"], r"--method.*(nbsp).*"),
    "proportion": (["--skill-proportion", "1.2"], r"--skill-proportion 1\.2: must be .*at most 1"),
    "replay": (
        ["--replay-every", "2"],
        "--replay-every 2: must be above 2: the actor would learn on earlier tasks only",
    ),
    "replay only": (["--replay-every", "1"], "--replay-every 1: must be above 2"),
    "old buffer": (["--previous-buffer-size", "1"], r"--previous-buffer-size 1: must be at least .*tasks, 2"),
    "scoring": (["--score-steps", "1"], r"--score-steps 1: must be at least 2"),
    "warm-up": (["--steps-per-task", "5000"], r"--learning-starts 5000: must be below --steps-per-task 5000"),
    "batch": (
        ["--batch-size", "6000", "--steps-per-task", "6000"],
        r"--batch-size 6000: must be below --steps-per-task",
    ),
    "small buffer": (["--buffer-size", "100"], r"--buffer-size 100: must be at least --batch-size 256"),
    "old flag's alias": (["--policy-lr", "0"], r"--actor-lr 0\.0: must be above 0"),
    "nothing to evaluate": (["--evaluate", "nothing"], r"nothing: no readable run"),
}


def assert_refused(words: list[str], expected: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["nbsp.py", *words])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        cli.run(nbsp.main, Args, nbsp.PRESETS)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.search(expected, err) and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.iterdir()) == before  # no folder is left behind


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_2(case, monkeypatch, capsys, tmp_path):
    words, expected = BAD_ARGUMENTS[case]
    assert_refused(words, expected, monkeypatch, capsys, tmp_path)


def test_bad_resumes_give_one_line_and_exit_2(toy_run, monkeypatch, capsys, tmp_path):
    run_dir = shutil.copytree(toy_run, tmp_path / "run")
    (run_dir / "results.json").unlink()
    factor = ["--resume", str(run_dir), "--mask-factor", "0.5"]
    assert_refused(factor, r"--mask-factor 0\.5: contradicts.*0\.2", monkeypatch, capsys, tmp_path)
    checkpoint = run_dir / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    assert_refused(["--resume", str(run_dir)], r"checkpoint\.pt: damaged", monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("words", [[], ["--gamma", "0.9", "--q-lr", "0.01"]])
def test_quick_sets_defaults_and_what_is_typed_wins(words):
    args = cli.parse_args(Args, nbsp.PRESETS, ["--quick", *words])
    typed = {"gamma": 0.9, "critic_lr": 0.01} if words else {}
    assert args == Args(**(nbsp.QUICK | {"quick": True} | typed))
    assert len(nbsp.cycle_of(args)) == 2


def test_quick_works_from_python_too(toy, tmp_path, monkeypatch):
    """With what the run's own options leave of it."""
    options = {name: value for name, value in toy.items() if name not in ("hidden_dim", "task_seq")}
    nbsp.main(Args(**options, quick=True, run_dir=str(tmp_path / "run")))
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert (stored["hidden_dim"], stored["task_seq"]) == (nbsp.QUICK["hidden_dim"], nbsp.QUICK["task_seq"])
    assert stored["steps_per_task"] == 90


def test_resuming_a_finished_run_returns_its_result(finished_run):
    run_dir = str(finished_run["run_dir"])
    before = (finished_run["run_dir"] / "checkpoint.pt").read_bytes()
    assert nbsp.main(Args(resume=run_dir, quiet=True)) == finished_run["results"]
    assert (finished_run["run_dir"] / "checkpoint.pt").read_bytes() == before


def test_evaluate_gives_the_last_evaluation_of_the_run(finished_run, ablate, capsys):
    """Same policy, same goals, same numbers, on real tasks; so does the ablation's whole actor."""
    run_dir = str(finished_run["run_dir"])
    seen = nbsp.main(Args(evaluate=run_dir, episodes=1))
    final = finished_run["results"]["tasks"]
    assert [result["episode_return"] for result in seen.values()] == [task["final_return"] for task in final]
    assert "drawer-close-v3" in capsys.readouterr().out
    reports = ablate.main(ablate.Args(run_dir, episodes=1))
    assert [report["episode_return_whole"] for report in reports.values()] == [task["final_return"] for task in final]
    for report in reports.values():
        assert report["episode_return_without_skill"] != report["episode_return_whole"]
    assert "without random" in capsys.readouterr().out
    with pytest.raises(ArgumentError, match="no CUDA"):
        nbsp.main(Args(evaluate=run_dir, device="cuda"))


def test_evaluating_more_often_changes_nothing_in_training(toy, toy_run, tmp_path):
    nbsp.main(Args(**(toy | {"eval_every": 20, "eval_episodes": 3}), run_dir=str(tmp_path / "run")))
    often, seldom = load_checkpoint(str(tmp_path / "run"), "nbsp"), load_checkpoint(str(toy_run), "nbsp")
    assert_same_tensors(often["agent"], seldom["agent"])
    assert_same_tensors(often["random"], seldom["random"])
    assert len(often["record"]["rows"]) > len(seldom["record"]["rows"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("action", "action is not finite at step 60"),  # the actor is trained at every second update
        ("loss", r"losses/q is not finite at step \d+"),
        ("weight", r"targets\.0\.\S+ is not finite at step 90"),
    ],
)
def test_what_is_not_finite_stops_with_exit_1_and_keeps_the_good_checkpoint(
    what, message, toy, tmp_path, monkeypatch, capsys
):
    true_update, calls = Agent.update, []

    def update(agent):
        calls.append(None)
        if what == "action" and len(calls) == 20:  # at step 60
            agent.log_alpha.data.fill_(math.nan)
        true_update(agent)
        if what == "loss":
            agent.losses["q"] = torch.tensor(math.nan)
        elif what == "weight" and len(calls) == 50:  # the visit's last
            next(agent.targets.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(nbsp, "LOG_EVERY", 70)
    options = toy | {"run_dir": tmp_path / "run", "eval_every": 1000}
    monkeypatch.setattr("sys.argv", ["nbsp.py", *command_line(**options)])
    with pytest.raises(SystemExit) as leaving:
        cli.run(nbsp.main, Args, nbsp.PRESETS)
    err = capsys.readouterr().err
    assert leaving.value.code == 1 and err.count("\n") == 1
    assert re.search(message, err) and str(tmp_path) in err
    checkpoint = load_checkpoint(str(tmp_path / "run"), "nbsp")
    assert checkpoint["record"]["global_step"] == 0
    agent = Agent(Args(**TOY), 4, 2, CPU)
    nbsp.restored(agent, checkpoint["agent"], CPU)
    assert all(weight.isfinite().all() for weight in [*parameters(agent).values(), *agent.targets.parameters()])
