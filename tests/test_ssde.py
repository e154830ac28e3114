"""SSDE's mathematics against literal versions of the paper's formulas, and its promises on real training runs.

Its block in other people's networks and loops: tests/transplants/test_ssde.py.
"""

import copy
import csv
import dataclasses
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
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssde
from common import cli, metrics
from common.cli import ArgumentError, Interrupted, load_checkpoint
from common.descriptions import TASK_DESCRIPTIONS, encode_tasks, task_sentences
from common.envs import seed_of, task_sequence
from common.recorder import reference_auc, state_of
from ssde import NOBODY, Actor, Agent, Args, Critic, ReplayBuffer, SharedPolicy

ROOT = Path(__file__).parent.parent
OBS_DIM, ACT_DIM, CPU = 39, 4, torch.device("cpu")
SMALL = {"hidden_dim": 24, "hidden_layers": 2, "critic_hidden_dim": 16, "lambda_global": 0.05, "lambda_local": 0.05}
# Three real tasks in seconds, with resets, distillation and evaluations in each.
TINY = SMALL | {"task_seq": "reach,drawer-close,push", "steps_per_task": 300, "learning_starts": 150, "eval_every": 200}
TINY |= {"eval_episodes": 1, "batch_size": 16, "reset_every": 40, "distill_steps": 50, "checkpoint_every": 100}
TINY |= {"quiet": True}
# The same on a toy: episodes of 20 steps, see `Point`.
TOY = TINY | {"steps_per_task": 90, "learning_starts": 40, "eval_every": 40, "eval_episodes": 2, "distill_steps": 20}
TOY |= {"reset_every": 15}


class FullSizeOracle:
    """SSDE's policy by the letter: full-size matrices, full-size masks, a masked LayerNorm, python loops over Psi."""

    def __init__(self, actor: Actor):
        layers = [*actor.hidden, actor.mean]
        self.weights = [layer.weight.detach().clone().double().requires_grad_() for layer in layers]
        self.biases = [layer.bias.detach().clone().double().requires_grad_() for layer in actor.hidden]
        self.psi = [torch.zeros_like(w) for w in self.weights]
        self.psi_bias = [torch.zeros_like(b) for b in self.biases]

    def allocate(self, neurons: list[torch.Tensor]) -> dict:
        masks = [torch.zeros(len(b)).index_fill(0, n, 1) for b, n in zip(self.biases, neurons, strict=True)]
        phi = [torch.ones(self.weights[0].shape[1]), *masks, torch.ones(ACT_DIM)]
        psi_task = []
        for layer, weight in enumerate(self.weights):
            own = torch.zeros_like(weight, dtype=torch.float32)
            for i in range(own.shape[0]):
                for j in range(own.shape[1]):
                    own[i, j] = phi[layer + 1][i] * phi[layer][j]  # Eq. 5
            psi_task.append(own)
        task = {"phi": phi, "psi": psi_task}
        task["frozen"] = [own * old for own, old in zip(psi_task, self.psi, strict=True)]
        task["frozen_bias"] = [m * old for m, old in zip(phi[1:-1], self.psi_bias, strict=True)]
        self.psi = [torch.maximum(own, old) for own, old in zip(psi_task, self.psi, strict=True)]
        self.psi_bias = [torch.maximum(m, old) for m, old in zip(phi[1:-1], self.psi_bias, strict=True)]
        return task

    def mean(self, task: dict, obs: torch.Tensor, beta: float, gate: float) -> torch.Tensor:
        x = obs.double()
        for layer, weight in enumerate(self.weights):
            scale = gate * (task["psi"][layer] - task["frozen"][layer]) + beta * task["frozen"][layer]  # Eq. 7
            y = x @ (scale * weight).T
            if layer == len(self.biases):
                return y
            mask = task["phi"][layer + 1].double()
            frozen_bias = task["frozen_bias"][layer]
            y = y + (gate * (mask - frozen_bias) + beta * frozen_bias) * self.biases[layer]
            if layer == 0:
                mean = (y * mask).sum(1, keepdim=True) / mask.sum()
                variance = ((y - mean).square() * mask).sum(1, keepdim=True) / mask.sum()
                x = torch.tanh((y - mean) / torch.sqrt(variance + 1e-6)) * mask
            else:
                x = torch.where(y > 0, y, 0.01 * y) * mask


def random_neurons(rng: np.random.Generator, width: int, layers: int) -> list[torch.Tensor]:
    """At least two neurons of each layer, as LayerNorm of one neuron is constant."""
    chosen = [rng.permutation(width)[: rng.integers(2, width + 1)] for _ in range(layers)]
    return [torch.from_numpy(np.sort(c)) for c in chosen]


def shared_policy(rng, width: int, layers: int, beta: float = 0.3, trainable: float | None = None) -> SharedPolicy:
    """A shared policy with biases and a head that are not near zero, so that errors in them show."""
    actor = Actor(OBS_DIM, ACT_DIM, width, layers)
    for parameter in (*(layer.bias for layer in actor.hidden), actor.mean.weight):
        parameter.data.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)))
    return ssde.shared_policy(Args(hidden_layers=layers, beta=beta, trainable_weight=trainable), actor)


def weights(shared: SharedPolicy) -> list[torch.Tensor]:
    """The parameters that the tasks share: weights of hidden layers and mean head, then biases."""
    actor = shared.network
    layers = [*actor.hidden, actor.mean]
    return [p.detach().clone() for p in (*(layer.weight for layer in layers), *(layer.bias for layer in actor.hidden))]


# ------------------------------------------------------------------------------------------------------ allocation


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(3, 12),
    layers=st.integers(1, 3),
    beta=st.floats(0, 1),
    trainable_weight=st.none() | st.floats(0.1, 2),
)
def test_cut_policy_and_its_gradients_equal_the_full_size_masked_formula(seed, width, layers, beta, trainable_weight):
    rng = np.random.default_rng(seed)
    shared = shared_policy(rng, width, layers, beta, trainable_weight)
    weighs = 1 - beta if trainable_weight is None else trainable_weight
    oracle = FullSizeOracle(shared.network)
    obs = torch.from_numpy(rng.standard_normal((5, OBS_DIM))).float()
    for task in range(3):
        neurons = random_neurons(rng, width, layers)
        policy, literal = shared.begin_task(neurons).double(), oracle.allocate(neurons)
        # in double precision, as LayerNorm over two near-equal neurons blows rounding up
        mean, expected = policy(obs.double())[0], oracle.mean(literal, obs, beta, 1.0 if task == 0 else weighs)
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-4)

        # Eq. 8: the gradient of the loss, times the mask of what is trainable
        mean.sin().sum().backward()
        gradients = torch.autograd.grad(expected.sin().sum(), [*oracle.weights, *oracle.biases])
        for layer, trained in enumerate((*policy.hidden, policy.mean)):
            trainable = literal["psi"][layer] - literal["frozen"][layer]
            rows, columns = literal["phi"][layer + 1].bool(), literal["phi"][layer].bool()
            block = (gradients[layer] * trainable)[rows][:, columns]
            torch.testing.assert_close(trained.weight.grad, block, atol=1e-5, rtol=1e-4)
            assert (trained.weight.grad[literal["frozen"][layer][rows][:, columns] == 1] == 0).all()
        for layer, trained in enumerate(policy.hidden):
            rows = literal["phi"][layer + 1].bool()
            trainable = (literal["phi"][layer + 1] - literal["frozen_bias"][layer])[rows]
            expected = gradients[len(oracle.weights) + layer][rows] * trainable
            torch.testing.assert_close(trained.bias.grad, expected, atol=1e-5, rtol=1e-4)
        shared.end_task(policy.float())
        for name, psi in zip(shared.layers, oracle.psi, strict=True):
            assert torch.equal(shared.owner[name] < NOBODY, psi.bool())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_end_task_changes_the_trainable_weights_of_the_task_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    shared = shared_policy(rng, 10, 2)
    first, second = random_neurons(rng, 10, 2), random_neurons(rng, 10, 2)
    shared.end_task(shared.begin_task(first))
    before, policy = weights(shared), shared.begin_task(second)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    shared.end_task(policy)

    def uses(neurons):
        phi = [torch.ones(OBS_DIM), *(torch.zeros(10).index_fill(0, n, 1) for n in neurons), torch.ones(ACT_DIM)]
        phi = [mask.bool() for mask in phi]
        return [*(phi[layer + 1][:, None] & phi[layer][None] for layer in range(3)), *phi[1:3]]

    for old, new, was_used, is_used in zip(before, weights(shared), uses(first), uses(second), strict=True):
        trainable = is_used & ~was_used
        assert torch.equal(new[~trainable], old[~trainable])
        assert (new[trainable] != old[trainable]).all()


def test_a_weight_between_two_old_neurons_that_no_task_joins_is_trainable():
    shared = shared_policy(np.random.default_rng(0), 4, 2)
    for first, second in (([0, 1], [0, 1]), ([2, 3], [2, 3]), ([0, 2], [1, 3])):
        shared.end_task(shared.begin_task([torch.tensor(first), torch.tensor(second)]))
    # layer 2 of the third task: rows 1, 3; columns 0, 2: 1<-0 was trained by task 0 and 3<-2 by task 1
    assert shared.places(2, "hidden.1")["weight"][2].tolist() == [[True, False], [False, True]]
    assert shared.places(2, "hidden.1")["bias"][2].tolist() == [True, True]
    assert [float(shared.places(2, name)["weight"][2].float().mean()) for name in shared.layers] == [1.0, 0.5, 1.0]


def literal_lasso(embedding: np.ndarray, dictionary: np.ndarray, sparsity: float) -> np.ndarray:
    """argmin 1/2 |e - D^T a|^2 + sparsity |a|_1 by cyclic coordinate descent."""
    alpha = np.zeros(len(dictionary))
    for _ in range(1000):
        for i, atom in enumerate(dictionary):
            correlation = atom @ (embedding - dictionary.T @ alpha + atom * alpha[i])
            alpha[i] = math.copysign(max(abs(correlation) - sparsity, 0), correlation) / (atom @ atom)
    return alpha


@pytest.mark.parametrize(("seed", "sparsity"), [(0, 0.01), (1, 0.03), (2, 0.1)])
def test_sparse_prompt_picks_the_positive_coefficients_of_the_lasso(seed, sparsity):
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal(12)
    embedding /= np.linalg.norm(embedding)
    [(dictionary, _)] = ssde.dictionaries(12, 0, [16], seed)
    alpha = literal_lasso(embedding, dictionary, sparsity)
    assert (alpha > 1e-6).any() and (alpha < -1e-6).any()  # negative ones must not count
    assert np.array_equal(ssde.sparse_prompt(embedding, dictionary, sparsity), alpha > 1e-6)


def test_dictionary_atoms_lie_in_the_unit_ball_short_ones_stay_and_the_local_one_is_the_tasks():
    layers = list(ssde.dictionaries(2, 3, [500, 20], seed=7))
    for layer, ((of_all, own), width) in enumerate(zip(layers, [500, 20], strict=True)):
        for atoms, stream in ((of_all, (7, 1, layer)), (own, (7, 2, layer, 3))):
            raw = np.random.default_rng(stream).standard_normal((width, 2))
            for atom, drawn in zip(atoms, raw, strict=True):
                np.testing.assert_allclose(atom, drawn / max(1, np.linalg.norm(drawn)))
    other = list(ssde.dictionaries(2, 4, [500, 20], seed=7))
    assert np.array_equal(layers[0][0], other[0][0]) and not np.array_equal(layers[0][1], other[0][1])


def test_task_neurons_are_the_union_of_the_global_and_the_local_prompt():
    embeddings = encode_tasks(["Push the puck to a goal.", "Hammer a screw on the wall."], "bundled")
    for task, embedding in enumerate(embeddings):
        layers = zip(
            ssde.task_neurons(embedding, task, [32, 20], (0.05, 0.02), 7),
            ssde.dictionaries(384, task, [32, 20], 7),
            strict=True,
        )
        for neurons, (of_all, own) in layers:
            used = ssde.sparse_prompt(embedding, of_all, 0.05) | ssde.sparse_prompt(embedding, own, 0.02)
            assert neurons.tolist() == np.flatnonzero(used).tolist()
    with pytest.raises(ValueError, match="task 1 gets no neuron in layer 1"):
        ssde.task_neurons(embedding, 1, [32, 20], (0.9, 0.9), 7)


def test_similar_sentences_share_more_neurons():
    sentences = ["Push the puck to a goal.", "Pull a puck to a goal.", "Hammer a screw on the wall."]
    embeddings = encode_tasks(sentences, "bundled")
    neurons = [ssde.task_neurons(e, task, [128] * 2, (3e-2, 3e-2)) for task, e in enumerate(embeddings)]
    overlap = metrics.overlap(neurons)
    for i, j in np.ndindex(3, 3):
        both = either = 0
        for a, b in zip(neurons[i], neurons[j], strict=True):
            both += len(set(a.tolist()) & set(b.tolist()))
            either += len(set(a.tolist()) | set(b.tolist()))
        assert overlap[i][j] == pytest.approx(both / either)
    assert overlap[0][1] > overlap[0][2] and overlap[0][1] > overlap[1][2]


def test_lambda_local_falls_linearly_to_its_end(monkeypatch):
    seen, true_neurons = [], ssde.task_neurons
    monkeypatch.setattr(ssde, "task_neurons", lambda *a: (seen.append((a[1], a[3])), true_neurons(*a))[1])
    agent = make_agent(lambda_local=0.05, lambda_local_end=0.01)
    for _ in range(3):
        begin(agent).end_task()
    assert [task for task, _ in seen] == [0, 1, 2]
    assert [value for _, pair in seen for value in pair] == pytest.approx([0.05, 0.05, 0.05, 0.03, 0.05, 0.01])


@pytest.mark.parametrize("sparsity", [0.05, 0.08, 0.11, 0.14])
def test_a_later_task_without_neurons_is_refused_before_the_first_is_trained(sparsity):
    """Exactly where the allocation of one of the tasks says so."""
    embeddings = encode_tasks(task_sentences(task_sequence("cw10"), None), "bundled")
    args = Args(hidden_dim=64, hidden_layers=2, critic_hidden_dim=16, lambda_global=sparsity, lambda_local=sparsity)
    agent = Agent(args, embeddings, OBS_DIM, ACT_DIM, CPU)

    def refused(allocate) -> str:
        try:
            allocate()
        except ArgumentError as error:
            return str(error)
        return ""

    expected = next(filter(None, (refused(lambda task=task: agent.neurons(task)) for task in range(10))), "")
    assert refused(lambda: ssde.refuse_empty_tasks(agent)) == expected
    assert (sparsity < 0.1) == (expected == "")
    assert sparsity != 0.11 or "task 1 gets no neuron" in expected


def test_the_dictionaries_are_of_the_runs_seed():
    for seed in (1, 2):
        agent = make_agent(seed=seed)
        expected = ssde.task_neurons(agent.embeddings[1], 1, [24, 24], (0.05, 0.05), seed)
        assert all(map(torch.equal, agent.neurons(1), expected))
    assert not all(map(torch.equal, agent.neurons(1), make_agent(seed=1).neurons(1)))


# ----------------------------------------------------------------------------------------------------- initial weights


def test_truncated_normal_weights_have_the_asked_variance_and_are_cut_at_two_sigma():
    torch.manual_seed(0)
    layer = ssde.linear(500, 400, 2.0)
    assert layer.weight.var().item() == pytest.approx(2 / 500, rel=0.02)
    assert layer.weight.abs().max() <= 2 * math.sqrt(2 / 500) / 0.8796 + 1e-6
    assert not layer.bias.any() and ssde.linear(5, 4, 1.0, bias=False).bias is None
    actor = Actor(OBS_DIM, ACT_DIM, 1000, 3)
    for parameter, variance in ((actor.hidden[2].weight, 2), (actor.mean.weight, 1e-4), (actor.log_std.weight, 1e-4)):
        assert parameter.var().item() == pytest.approx(variance / 1000, rel=0.1)


# ------------------------------------------------------------------------------------------------------------- SAC


def make_agent(**changes) -> Agent:
    args = Args(**(TINY | changes))
    sentences = [TASK_DESCRIPTIONS[task] for task in task_sequence(args.task_seq)]
    torch.manual_seed(0)
    return Agent(args, encode_tasks(sentences, "bundled"), OBS_DIM, ACT_DIM, CPU)


def begin(agent: Agent) -> Agent:
    """Begin the next task, distil if it is to be, and fill the buffer with random transitions."""
    agent.begin_task()
    while agent.distilled < agent.args.distill_steps:
        agent.distill()
    rng = np.random.default_rng(0)
    for _ in range(100):
        obs, next_obs = rng.standard_normal((2, OBS_DIM)).astype(np.float32)
        action = rng.uniform(-1, 1, ACT_DIM).astype(np.float32)
        agent.replay.add(obs=obs, next_obs=next_obs, action=action, reward=rng.standard_normal())
    return agent


def trained_agent(**changes) -> Agent:
    """The second task of an agent, after some updates: part of its weights is frozen, Adam has moments."""
    agent = begin(make_agent(**changes))
    agent.update()
    agent.end_task()
    begin(agent)
    for _ in range(3):
        agent.update()
    return agent


@pytest.mark.parametrize("bounded_mean", [False, True])
def test_the_gaussian_and_its_log_probability_after_the_squash(bounded_mean):
    agent = make_agent(bounded_mean=bounded_mean)
    agent.begin_task()
    policy = agent.policy
    torch.nn.init.normal_(policy.mean.weight)
    torch.nn.init.normal_(policy.log_std.weight)
    obs = torch.randn(64, OBS_DIM)
    mean, std = policy(obs)
    h = torch.tanh(F.layer_norm(policy.hidden[0](obs), (len(policy.hidden[0].weight),), eps=1e-6))
    h = F.leaky_relu(policy.hidden[1](h))
    raw = [math.tanh(value) for value in policy.log_std(h).flatten().tolist()]
    if bounded_mean:  # the authors' head
        torch.testing.assert_close(mean, torch.tanh(policy.mean(h)))
        expected = [math.log(1 + math.exp(2 * value)) for value in raw]
    else:
        torch.testing.assert_close(mean, policy.mean(h))
        expected = [math.exp(-5 + 3.5 * (value + 1)) for value in raw]
    torch.testing.assert_close(std.flatten(), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    squash = torch.distributions.TanhTransform(cache_size=1)
    torch.manual_seed(3)
    action, log_prob = policy.sample(obs)
    torch.manual_seed(3)
    u = mean + std * torch.randn_like(mean)
    torch.testing.assert_close(action, u.tanh())
    normal = torch.distributions.Normal(mean, std)
    expected = (normal.log_prob(u) - squash.log_abs_det_jacobian(u, action)).sum(1)
    torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)


def test_losses_are_sacs():
    agent = begin(make_agent())
    agent.log_alpha.data.fill_(-0.7)
    batch, alpha = agent.replay.sample(16), math.exp(-0.7)
    torch.manual_seed(5)
    loss, _ = ssde.critic_loss(agent.policy, agent.critic, agent.target, agent.log_alpha, batch, 0.9)
    torch.manual_seed(5)
    next_action, next_log_prob = agent.policy.sample(batch["next_obs"])
    expected = 0.0
    for n in range(16):
        sa = torch.cat([batch["next_obs"][n], next_action[n]])[None]
        soft_value = min(target(sa).item() for target in agent.target.twins) - alpha * next_log_prob[n].item()
        y = batch["reward"][n].item() + 0.9 * soft_value
        sa = torch.cat([batch["obs"][n], batch["action"][n]])[None]
        expected += sum((critic(sa).item() - y) ** 2 for critic in agent.critic.twins) / 16
    assert loss.item() == pytest.approx(expected, rel=1e-4)

    torch.manual_seed(6)
    loss, _ = ssde.actor_loss(agent.policy, agent.critic, agent.log_alpha, batch["obs"])
    torch.manual_seed(6)
    action, log_prob = agent.policy.sample(batch["obs"])
    q = torch.min(*(critic(torch.cat([batch["obs"], action], 1))[:, 0] for critic in agent.critic.twins))
    assert loss.item() == pytest.approx((alpha * log_prob - q).mean().item(), rel=1e-4)


def test_update_moves_every_network_as_it_should():
    agent = begin(make_agent(tau=0.3))  # so large that targets that stay are seen
    nets = {"actor": agent.actor, "policy": agent.policy, "critic": agent.critic, "target": agent.target}

    def learned() -> dict[str, torch.Tensor]:
        return {f"{net}.{n}": p.detach().clone() for net, m in nets.items() for n, p in m.named_parameters()}

    before = learned()
    agent.update()
    after = learned()
    for name, value in before.items():
        if name.startswith("target"):
            online = after[name.replace("target", "critic")]
            torch.testing.assert_close(after[name], value + agent.args.tau * (online - value))
        elif name.startswith("actor"):  # the task trains a copy
            assert torch.equal(after[name], value), name
        elif "bias" not in name:
            assert not torch.equal(after[name], value), name


def test_the_temperature_rises_while_entropy_is_below_its_target():
    for log_prob, sign in ((3.0, 1), (1.0, -1)):  # entropy -3 is below the target -2: more exploration
        agent = begin(make_agent())
        true_loss = agent.actor_backward
        agent.actor_backward = lambda *a, loss=true_loss, value=log_prob: (loss(*a)[0], torch.tensor(value))
        agent.update()
        assert math.copysign(1, agent.log_alpha.item()) == sign


def test_distillation_loss_is_the_divergence_from_a_standard_normal():
    agent = begin(make_agent())
    torch.nn.init.normal_(agent.policy.mean.weight)
    obs = torch.randn(32, OBS_DIM)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(*agent.policy(obs)), normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(ssde.distillation_loss(agent.policy, obs), expected)


@pytest.mark.parametrize("changes", [{"method": "scratch"}, {"method": "finetune"}, {"distill_steps": 0}])
def test_a_task_without_distillation_begins_with_an_empty_buffer(changes):
    agent = begin(make_agent(**changes))
    agent.end_task()
    agent.begin_task()
    assert agent.distilled == agent.args.distill_steps and len(agent.replay) == 0 and agent.replay.size == 0


def test_distillation_brings_outputs_near_a_standard_normal_and_ends_with_a_fresh_optimizer():
    agent = begin(make_agent(distill_steps=400, actor_lr=3e-3))
    agent.end_task()
    agent.begin_task()
    obs, early = agent.replay.recent(100)["obs"], [p.clone() for p in agent.policy.hidden.parameters()]
    first = ssde.distillation_loss(agent.policy, obs).item()
    for _ in range(400):
        agent.distill()
    assert ssde.distillation_loss(agent.policy, obs).item() < 0.05 * first
    assert not agent.actor_optimizer.state and len(agent.replay) == 0
    start = [value for layer in agent.dormant.start for value in layer]
    for parameter, value, before in zip(agent.policy.hidden.parameters(), start, early, strict=True):
        assert torch.equal(parameter, value) and not torch.equal(value, before)
    assert agent.dormant.optimizer is agent.actor_optimizer


def test_cutting_an_old_policy_takes_no_random_numbers():
    """Else evaluating old tasks, and how often, would change the training."""
    agent = begin(make_agent())
    before = torch.get_rng_state()
    agent.shared.cut(0)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=25, deadline=None)
@given(capacity=st.integers(1, 12), added=st.integers(1, 40), count=st.integers(1, 20))
def test_replay_keeps_the_latest_transitions(capacity, added, count):
    replay = ReplayBuffer(capacity, 2, 1, CPU)
    place = replay.size.data_ptr()
    for n in range(added):
        columns = {"obs": np.full(2, n), "next_obs": np.full(2, n + 0.5), "action": np.full(1, -n)}
        replay.add(**{name: column.astype(np.float32) for name, column in columns.items()}, reward=n)
    kept = list(range(max(0, added - capacity), added))
    recent = replay.recent(count)
    assert recent["reward"].tolist() == kept[-count:]
    batch = replay.sample(64)
    assert set(batch["reward"].tolist()) <= set(kept)
    assert torch.equal(batch["next_obs"][:, 0], batch["reward"] + 0.5)
    assert torch.equal(batch["action"][:, 0], -batch["reward"])
    other = ReplayBuffer(capacity, 2, 1, CPU)
    other.load_state_dict(replay.state_dict())
    assert torch.equal(other.recent(count)["obs"], recent["obs"]) and len(other) == len(replay) == other.size
    replay.set_added(0)
    assert replay.size == 0 and replay.size.data_ptr() == place


def test_batches_are_uniform_draws():
    replay = ReplayBuffer(10, 1, 1, CPU)
    for n in range(7):
        replay.add(obs=np.zeros(1), next_obs=np.zeros(1), action=np.zeros(1), reward=n)
    torch.manual_seed(0)
    counts = replay.sample(70_000)["reward"].long().bincount(minlength=10)
    assert counts[7:].sum() == 0 and (counts[:7] - 10_000).abs().max() < 500


def test_an_update_is_a_step_on_sacs_losses_of_one_batch_from_the_targets():
    agent = begin(make_agent(gamma=0.7))
    for parameter in agent.target.parameters():  # else they equal the critics
        parameter.data += 0.1 * torch.randn_like(parameter)
    policy, critic, target, log_alpha = copy.deepcopy((agent.policy, agent.critic, agent.target, agent.log_alpha))
    torch.manual_seed(3)
    agent.update()
    torch.manual_seed(3)
    batch = agent.replay.sample(16)
    assert agent.losses["critic"] == ssde.critic_loss(policy, critic, target, log_alpha, batch, 0.7)[0]
    loss, log_prob = ssde.actor_loss(policy, agent.critic, log_alpha, batch["obs"])  # of the critics after their step
    assert (agent.losses["actor"], agent.losses["entropy"]) == (loss, -log_prob)


def test_actor_and_temperature_have_the_actors_step_size():
    agent = trained_agent(actor_lr=1e-3, critic_lr=2e-3)
    optimizers = (agent.actor_optimizer, agent.alpha_optimizer, agent.critic_optimizer)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1e-3, 1e-3, 2e-3]


# --------------------------------------------------------------------------------------------------- dormant neurons


def test_sensitivity_scores_equal_a_loop_over_neurons_and_observations():
    agent = trained_agent()
    obs = agent.replay.recent(40)["obs"]
    scores = ssde.neuron_scores(agent.dormant.layers, agent.policy, obs, "sensitivity")
    clean, perturbed = obs, obs + 0.01 * obs.mean(0)
    for i, (layer, score) in enumerate(zip(agent.policy.hidden, scores, strict=True)):
        y, y2 = layer(clean), layer(perturbed)
        if i == 0:
            clean, perturbed = (torch.tanh(F.layer_norm(x, x.shape[1:], eps=1e-6)) for x in (y, y2))
        delta = []
        for j in range(y.shape[1]):
            delta.append(sum(abs(y[n, j].item() - y2[n, j].item()) for n in range(len(obs))) / len(obs))
        torch.testing.assert_close(score, torch.tensor(delta) / np.mean(delta), atol=1e-3, rtol=1e-3)


def test_a_compiled_policy_is_written_back_whole_and_scoring_it_is_refused():
    """Hooks that came after its compilation do not run, so no neuron would ever be reset."""
    agent = trained_agent()
    compiled, obs = torch.compile(agent.policy, backend="eager"), agent.replay.recent(40)["obs"]
    with torch.no_grad():
        expected = compiled(obs)
    with pytest.raises(ValueError, match="zip"):
        agent.dormant.reset(compiled, obs)
    agent.shared.end_task(compiled)
    for got, want in zip(agent.shared.cut(1)(obs), expected, strict=True):
        assert torch.equal(got, want)


def test_activation_scores_are_redos():
    agent = trained_agent(dormant_metric="activation")
    obs = agent.replay.recent(40)["obs"]
    first = torch.tanh(F.layer_norm(agent.policy.hidden[0](obs), (len(agent.policy.hidden[0].weight),), eps=1e-6))
    features = [first, F.leaky_relu(agent.policy.hidden[1](first))]
    for h, score in zip(features, agent.dormant.reset(agent.policy, obs), strict=True):
        torch.testing.assert_close(score, h.abs().mean(0) / h.abs().mean())


def test_a_layer_that_does_not_react_at_all_scores_0_and_scoring_leaves_no_hooks():
    agent = trained_agent()
    scores = ssde.neuron_scores(agent.dormant.layers, agent.policy, torch.zeros(10, OBS_DIM), "sensitivity")
    assert all((score == 0).all() for score in scores)
    assert not any(layer._forward_hooks for layer in agent.dormant.layers)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), method=st.sampled_from(["Adam", "AMSGrad", "SGD"]))
def test_reset_gives_dormant_neurons_their_start_back_and_leaves_the_rest(seed, method):
    agent = trained_agent()
    parameters = list(agent.policy.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    if method != "SGD":
        optimizer = torch.optim.Adam(parameters, amsgrad=method == "AMSGrad")
    ssde.distillation_loss(agent.policy, agent.replay.recent(50)["obs"]).backward()
    optimizer.step()
    agent.dormant.optimizer = optimizer
    torch.manual_seed(seed)
    scores = [torch.rand(len(layer.weight)) for layer in agent.policy.hidden]
    start = {f"hidden.{i}": values for i, values in enumerate(agent.dormant.start)}
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items() if v is not None} for p in parameters}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssde, "neuron_scores", lambda *arguments: scores)
        assert agent.dormant.reset(agent.policy, None) is scores
    for name, parameter in agent.policy.named_parameters():
        layer, _, kind = name.rpartition(".")
        dormant = torch.zeros(len(parameter), dtype=torch.bool)
        if layer in start:
            dormant = scores[int(layer[-1])] < 0.6
            value = start[layer][0 if kind == "weight" else 1]
            assert torch.equal(parameter[dormant], value[dormant])
        assert torch.equal(parameter[~dormant], before[name][~dormant])
        for key, old in state[parameter].items():
            now = optimizer.state[parameter][key]
            if now.shape == parameter.shape:
                assert (now[dormant] == 0).all() and torch.equal(now[~dormant], old[~dormant])
            else:
                assert torch.equal(now, old)  # Adam's step counter


def test_frozen_entries_never_get_a_gradient_or_a_moment():
    agent = trained_agent()
    for _ in range(3):
        agent.reset_dormant()
        agent.update()
    checked = set()
    for name in agent.shared.layers:
        layer = agent.policy.get_submodule(name)
        for kind, (_, _, frozen) in agent.shared.places(1, name).items():
            parameter = getattr(layer, kind)
            moments = agent.actor_optimizer.state[parameter]
            for value in (parameter, parameter.grad, moments["exp_avg"], moments["exp_avg_sq"]):
                assert (value[frozen] == 0).all()
            assert (moments["exp_avg"][~frozen] != 0).any() or frozen.all()
            checked |= {kind} if frozen.any() else set()
    assert checked == {"weight", "bias"}


def test_a_reset_counts_where_there_is_something_to_reset():
    """A neuron of the first layer whose weights are all frozen, as those that an earlier task used are, does not."""
    agent = trained_agent()
    agent.dormant.threshold = math.inf
    log = agent.reset_dormant()
    trainable = [(~agent.shared.places(1, name)["weight"][2]).any(1) for name in agent.shared.hidden]
    assert agent.resets[-1] == [int(rows.sum()) for rows in trainable]
    assert [log[f"method/resets/layer{i}"] for i in (1, 2)] == agent.resets[-1]
    assert 0 < agent.resets[-1][0] < len(trainable[0])


def test_without_a_metric_neurons_are_scored_and_none_is_reset():
    agent = trained_agent(dormant_metric="none")
    before = [p.detach().clone() for p in agent.policy.parameters()]
    log = agent.reset_dormant()
    assert log["method/dormant_share/layer1"] > 0 and log["method/resets/layer1"] == 0
    assert all(torch.equal(p, old) for p, old in zip(agent.policy.parameters(), before, strict=True))
    scores = ssde.neuron_scores(agent.dormant.layers, agent.policy, agent.replay.recent(1000)["obs"], "sensitivity")
    assert torch.equal(log["method/score/layer1"], scores[0])


# ----------------------------------------------------------------------------------- whole runs, on a toy and for real


class Point(gym.Env):
    """A point in the plane that has to reach the goal it sees, or in other tasks than `reach` its mirror image.

    An episode has 20 steps, and its goal depends on the reset's seed only: without one there is an error.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, task: str, seed: int = 0, reward_version: str = "v2", render_mode: str | None = None):
        self.sign, self.pay = 1 if task == "reach-v3" else -1, 200.0 if reward_version == "v1" else 1.0

    def reset(self, *, seed, options=None):
        self.position, self.goal, self.steps = np.zeros(2), np.random.default_rng(seed).uniform(-1, 1, 2), 0
        return np.array([*self.position, *self.goal], np.float32), {}

    def step(self, action):
        self.position, self.steps = self.position + 0.2 * action, self.steps + 1
        distance = np.linalg.norm(self.position - self.sign * self.goal)
        info = {"success": float(distance < 0.3)}
        return np.array([*self.position, *self.goal], np.float32), -self.pay * distance, False, self.steps == 20, info


def patch_toy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ssde, "make_env", Point)
    patch.setattr(ssde, "env_sizes", lambda task, args: (4, 2))


@pytest.fixture
def toy(monkeypatch):
    """Runs are on `Point`. The options are those of a run of three tasks, 90 steps each."""
    patch_toy(monkeypatch)
    return TOY


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A whole run of the toy."""
    run_dir = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch_toy(patch)
        ssde.main(Args(**TOY, run_dir=str(run_dir)))
    return run_dir


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A whole run on three real tasks, watched: every finished task's outputs, and the weights at each border."""
    run_dir = tmp_path_factory.mktemp("ssde") / "run"
    obs = torch.randn(100, OBS_DIM, generator=torch.Generator().manual_seed(0))
    watched = {"outputs": [], "weights": []}
    true_end, true_begin = Agent.end_task, Agent.begin_task

    def begin_task(agent):
        watched["weights"].append(weights(agent.shared))
        true_begin(agent)

    def end_task(agent):
        with torch.no_grad():
            watched["outputs"].append(agent.policy(obs))
        true_end(agent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "begin_task", begin_task)
        patch.setattr(Agent, "end_task", end_task)
        results = ssde.main(Args(**TINY, run_dir=str(run_dir)))
    checkpoint = load_checkpoint(str(run_dir), "ssde")
    agent = make_agent()
    agent.load(checkpoint["agent"])
    return {"run_dir": run_dir, "results": results, "agent": agent, "obs": obs, "checkpoint": checkpoint} | watched


def test_finished_policies_are_bit_identical_for_ever(finished_run):
    assert len(finished_run["outputs"]) == 3
    for task, (mean, std) in enumerate(finished_run["outputs"]):
        with torch.no_grad():
            now = finished_run["agent"].shared.cut(task)(finished_run["obs"])
        assert torch.equal(mean, now[0]) and torch.equal(std, now[1])
    assert sum(map(sum, finished_run["results"]["metrics"]["resets"][1:])) > 0  # resets happened
    assert finished_run["results"]["metrics"]["forgetting"] == 0


def test_weights_outside_a_tasks_mask_are_bit_identical_across_it(finished_run):
    shared = finished_run["agent"].shared
    borders = [*finished_run["weights"], weights(shared)]
    kinds = [(name, "weight") for name in shared.layers] + [(name, "bias") for name in shared.hidden]
    for task in range(3):
        for (name, kind), before, after in zip(kinds, borders[task], borders[task + 1], strict=True):
            _, part, frozen = shared.places(task, name)[kind]
            mine = torch.zeros_like(before, dtype=torch.bool)
            mine[part] = ~frozen
            assert torch.equal(before[~mine], after[~mine])
            assert not torch.equal(before[mine], after[mine]) or not mine.any()


def test_earlier_policies_explore_in_the_warm_up():
    agent = begin(make_agent())
    assert agent.exploration_policy() is None
    for _ in (1, 2):
        agent.end_task()
        begin(agent)
    policies = [agent.exploration_policy() for _ in range(30)]
    assert all(act.func.__name__ == "act" and act.keywords == {"explore": True} for act in policies)
    sizes = {tuple(len(layer.weight) for layer in act.func.__self__.hidden) for act in policies}
    cut = {tuple(len(layer.weight) for layer in agent.shared.cut(task).hidden) for task in (0, 1)}
    assert sizes == cut


def assert_new_critics(agent: Agent) -> None:
    """Begin a task: critics, their targets, temperature and optimizers start anew."""
    old = [p.detach().clone() for p in agent.critic.parameters() if p.ndim > 1]
    agent.begin_task()
    new = [p for p in agent.critic.parameters() if p.ndim > 1]
    assert not any(map(torch.equal, old, new)) and agent.log_alpha.item() == 0
    assert all(map(torch.equal, agent.critic.parameters(), agent.target.parameters()))
    assert not agent.critic_optimizer.state and not agent.alpha_optimizer.state
    assert agent.critic_optimizer.param_groups[0]["params"][0] is next(agent.critic.parameters())


def test_a_later_task_has_new_critics():
    agent = begin(make_agent())
    agent.update()
    agent.end_task()
    assert_new_critics(agent)


def test_dense_baselines():
    """finetune goes on with the same weights, scratch draws new ones; both use the whole network."""
    for method, same in (("finetune", True), ("scratch", False)):
        agent = begin(make_agent(method=method))
        agent.update()
        trained = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
        agent.end_task()
        assert_new_critics(agent)
        assert [len(layer.weight) for layer in agent.policy.hidden] == [24, 24]
        for name, parameter in agent.policy.named_parameters():
            assert torch.equal(parameter, trained[name]) == (same or ("bias" in name and not trained[name].any())), name
        assert agent.distilled == agent.args.distill_steps and not agent.actor_optimizer.state
        assert agent.policy is agent.actor and agent.dormant is None
        act = agent.exploration_policy()
        assert act.func.__self__ is agent.policy if same else act is None


def test_continual_metrics_by_hand():
    """Two tasks, two evaluations each; what was not evaluated counts 0."""
    rows = [
        {"global_step": 1, "phase": 0, "task_index": 0, "success": 0.2},
        {"global_step": 2, "phase": 0, "task_index": 0, "success": 0.8},
        {"global_step": 2, "phase": 0, "task_index": 1, "success": 0.9},  # of --eval-all: not trained yet
        {"global_step": 3, "phase": 1, "task_index": 0, "success": 0.8},
        {"global_step": 3, "phase": 1, "task_index": 1, "success": 0.0},
        {"global_step": 4, "phase": 1, "task_index": 0, "success": 0.4},
        {"global_step": 4, "phase": 1, "task_index": 1, "success": 1.0},
    ]
    report = metrics.continual_report(rows, ["a", "b"], {"a": 0.0, "b": 0.25})
    assert report["final_success"] == pytest.approx(0.7)
    assert report["forgetting"] == pytest.approx((0.8 - 0.4 + 0) / 2)
    assert report["success_at_phase_end"] == [0.8, 1.0]
    assert report["auc"] == pytest.approx([0.5, 0.5])
    assert report["forward_transfer_cw"] == pytest.approx((0.5 + (0.5 - 0.25) / 0.75) / 2)
    # of the last phase's two evaluations, fewer than Continual World's five
    assert report["performance_cw"] == pytest.approx(((0.8 + 0.4) / 2 + (0 + 1) / 2) / 2)
    assert report["forgetting_cw"] == pytest.approx(((0.2 + 0.8) / 2 - (0.8 + 0.4) / 2 + 0) / 2)
    assert metrics.continual_report(rows, ["a", "b"], None)["forward_transfer_cw"] == "needs --reference"


def test_a_perfect_learner_that_is_evaluated_once_a_phase_is_perfect():
    rows = [
        {"global_step": phase, "phase": phase, "task_index": i, "success": 1.0}
        for phase in range(4)
        for i in range(phase + 1)
    ]
    report = metrics.continual_report(rows, list("abcd"), None)
    assert report["performance_cw"] == report["final_success"] == 1 and report["forgetting_cw"] == 0


def test_metrics_are_those_of_the_right_networks_and_transitions(monkeypatch):
    monkeypatch.setattr(ssde, "METRIC_BATCH", 60)  # of the 100 in the buffer
    agent = trained_agent()
    batch, plasticity, features = agent.replay.recent(60), agent.plasticity(), {}
    x = torch.tanh(F.layer_norm(agent.policy.hidden[0](batch["obs"]), (len(agent.policy.hidden[0].weight),), eps=1e-6))
    features["actor"] = [x, F.leaky_relu(agent.policy.hidden[1](x))]
    x, features["critic"] = torch.cat([batch["obs"], batch["action"]], 1), []
    for module in list(agent.critic.twins[0])[:-1]:
        x = module(x)
        features["critic"] += [x] if isinstance(module, torch.nn.LeakyReLU) else []
    for net, module in {"actor": agent.policy, "critic": agent.critic.twins[0]}.items():
        units = torch.cat([h.abs().mean(0) / h.abs().mean() for h in features[net]])
        for tau in (0, 0.025, 0.1):
            assert plasticity[f"plasticity/{net}/dormant_ratio_{tau}"] == pytest.approx((units <= tau).float().mean())
        positive = torch.cat([(h > 0).float().mean(0) for h in features[net]]).mean()
        assert plasticity[f"plasticity/{net}/active_fraction"] == pytest.approx(positive.item())
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()))
        assert plasticity[f"plasticity/{net}/weight_norm"] == pytest.approx(norm, rel=1e-4)
    counts = agent.parameter_counts()
    assert counts["actor"] == 39 * 24 + 24 + 24 * 24 + 24 + 24 * 4 + 24 * 4 + 4
    assert counts["critic"] == 43 * 16 + 16 + 32 + 16 * 16 + 16 + 32 + 17
    for task, count in enumerate(counts["task_policies"]):
        first, second = (len(indices) for indices in agent.shared.neurons[task])
        assert count == 40 * first + (first + 1) * second + 4 * second + 4 * second + 4


def test_defaults_are_the_papers():
    args, agent = Args(), trained_agent()
    named = {"steps_per_task": 1_000_000, "learning_starts": 10_000, "eval_every": 20_000, "eval_episodes": 10}
    named |= {"hidden_dim": 1024, "hidden_layers": 4, "critic_hidden_dim": 256, "buffer_size": 1_000_000}
    named |= {"batch_size": 256, "gamma": 0.99, "tau": 0.005, "actor_lr": 3e-4, "critic_lr": 3e-4, "beta": 0.3}
    named |= {"lambda_global": 1e-3, "lambda_local": 1e-3, "dormant_threshold": 0.6, "reset_every": 80_000}
    named |= {"reset_until": 650_000, "distill_steps": 20_000, "dormant_metric": "sensitivity", "method": "ssde"}
    assert {name: getattr(args, name) for name in named} == named
    assert args.trainable_weight is None and args.lambda_local_end is None and args.reward_scale is None
    block = ssde.SharedPolicy(Actor(OBS_DIM, ACT_DIM, 8, 2), ["hidden.0", "hidden.1"], ["mean"])
    assert (block.beta, block.trainable_weight) == (0.3, 0.7)
    resets = ssde.DormantResets([], None)
    assert (resets.every, resets.until, resets.threshold) == (80_000, 650_000, 0.6)
    for optimizer, rate in ((agent.actor_optimizer, agent.args.actor_lr), (agent.critic_optimizer, 3e-4)):
        assert optimizer.defaults["lr"] == rate and optimizer.defaults["betas"] == (0.9, 0.999)


def test_compile_wraps_both_losses(monkeypatch):
    called, inside = [], []

    def compiled(function, **_):
        def run(*arguments):
            inside.append(None)
            results = function(*arguments)
            inside.pop()
            return results

        return run

    def watched(loss):
        return lambda *arguments: (called.append((loss.__name__, len(inside))), loss(*arguments))[1]

    for loss in (ssde.critic_loss, ssde.actor_loss):
        monkeypatch.setattr(ssde, loss.__name__, watched(loss))
    monkeypatch.setattr(torch, "compile", compiled)
    agent = trained_agent(compile=True)
    called.clear()
    agent.update()
    assert agent.losses["critic"].isfinite() and called == [("critic_loss", 1), ("actor_loss", 1)]


def test_critic_has_normalisation_on_every_hidden_layer_and_two_twins():
    critic = Critic(5, 8, 2)
    kinds = [[type(module).__name__ for module in twin] for twin in critic.twins]
    assert kinds == [["Linear", "LayerNorm", "LeakyReLU"] * 2 + ["Linear"]] * 2
    values = critic(torch.ones(3, 4), torch.ones(3, 1))
    assert [v.shape for v in values] == [(3,), (3,)] and not torch.equal(*values)


def test_every_episode_has_a_seed_of_its_own(toy, tmp_path, monkeypatch):
    """No goal comes twice, but evaluations repeat theirs."""
    seeds, true_reset = [], Point.reset
    monkeypatch.setattr(Point, "reset", lambda env, *, seed, **o: (seeds.append(seed), true_reset(env, seed=seed))[1])
    ssde.main(Args(**toy, run_dir=str(tmp_path / "run")))
    training = [seed_of(1, ssde.TRAIN_GOALS, task, n) for task in range(3) for n in range(5)]
    evaluation = [[seed_of(1, ssde.EVAL_GOALS, task, n) for n in range(2)] for task in range(3)]
    assert len({*training, *(seed for goals in evaluation for seed in goals)}) == 21
    times = [9, 6, 3]  # evaluations at steps 40, 80 and 90 of a task, of all tasks seen
    expected = [seed for goals, n in zip(evaluation, times, strict=True) for seed in n * goals]
    assert sorted(seeds) == sorted([*training, *expected])


@pytest.mark.parametrize("method", ["ssde", "finetune"])
def test_a_stored_policy_plays_as_in_the_run(toy, tmp_path, method, capsys):
    run_dir = str(tmp_path / "run")
    results = ssde.main(Args(**(toy | {"method": method}), run_dir=run_dir))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert results["run_dir"] == run_dir and capsys.readouterr().out == ""
    seen = ssde.main(Args(evaluate=run_dir, episodes=2))
    assert [row["episode_return"] for row in seen.values()] == [t["final_return"] for t in results["tasks"]]
    assert "push-v3" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    actions = []
    for task in range(3):
        play, obs = ssde.load_policy(run_dir, task), np.random.default_rng(0).standard_normal(4)
        for dtype in (np.float64, np.float32, np.float16):
            action = play(obs.astype(dtype))
            assert action.dtype == np.float32 and action.shape == (2,)
        actions.append(play(obs))
        np.testing.assert_allclose(play(obs.astype(np.float32)), actions[-1], rtol=1e-5)
    assert np.array_equal(actions[0], actions[2]) == (method == "finetune")
    with pytest.raises(ArgumentError, match="has no task 3; it has tasks 0 to 2"):
        ssde.load_policy(run_dir, 3)


def test_a_stored_policy_of_a_task_in_training_is_the_latest(toy, tmp_path, monkeypatch):
    """Neither the one that was cut out at the task's start, nor the baseline's of an earlier task."""
    for method in ("ssde", "scratch"):
        run_dir, calls, true_update = tmp_path / method, [], Agent.update

        def update(agent, calls=calls, true_update=true_update, **options):
            calls.append(agent)
            if len(calls) == 80:  # in the second task
                os.kill(os.getpid(), signal.SIGTERM)
            true_update(agent, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Agent, "update", update)
            with pytest.raises(Interrupted):
                ssde.main(Args(**(toy | {"method": method}), run_dir=str(run_dir)))
        obs = np.random.default_rng(0).standard_normal(4)
        assert np.array_equal(ssde.load_policy(str(run_dir), 1)(obs), calls[-1].policy.act(obs))
        expected = calls[-1].policy_of(0).act(obs)
        assert np.array_equal(ssde.load_policy(str(run_dir), 0)(obs), expected)
        assert len(ssde.main(Args(evaluate=str(run_dir), episodes=1, quiet=True))) == 2


def test_evaluating_seldom_but_longer_on_all_tasks_changes_nothing_in_training(toy, toy_run, tmp_path):
    changes = {"eval_every": 10_000, "eval_episodes": 3, "eval_all": True}
    ssde.main(Args(**(toy | changes), run_dir=str(tmp_path / "run")))
    seldom, often = load_checkpoint(str(tmp_path / "run"), "ssde"), load_checkpoint(str(toy_run), "ssde")
    assert_same_tensors(seldom["agent"], often["agent"])
    assert_same_tensors(seldom["random"], often["random"])
    rows = [(row["global_step"], row["task_index"]) for row in seldom["record"]["rows"]]
    assert rows == [(step, index) for step in (90, 180, 270) for index in range(3)]


def test_resets_follow_their_schedule_and_updates_start_after_the_warm_up(toy, tmp_path, monkeypatch):
    """A reset every reset_every steps of a task below reset_until, an update every step after learning_starts."""
    steps, updates, rewards = [], [], []
    true_reset, true_update, true_add = Agent.reset_dormant, Agent.update, ReplayBuffer.add
    monkeypatch.setattr(Agent, "reset_dormant", lambda agent: (steps.append(agent.replay.added), true_reset(agent))[1])
    monkeypatch.setattr(Agent, "update", lambda a, **how: (updates.append(a.replay.added), true_update(a, **how))[1])
    monkeypatch.setattr(ReplayBuffer, "add", lambda replay, **t: (rewards.append(t["reward"]), true_add(replay, **t)))
    # 90 is no multiple of an episode: the last one is cut short
    changes = {"task_seq": "reach,reach", "learning_starts": 27, "reset_every": 20, "reset_until": 80}
    changes |= {"dormant_metric": "activation", "bounded_mean": True, "distill_steps": 0}
    ends_with_a_reset = {"task_seq": "reach", "reset_every": 30, "reset_until": 1000}
    ssde.main(Args(**(toy | changes | ends_with_a_reset), run_dir=str(tmp_path / "last")))
    assert steps == [30, 60], "none at the last step, after which nothing trains"
    steps.clear(), updates.clear(), rewards.clear()
    results = ssde.main(Args(**(toy | changes), run_dir=str(tmp_path / "run")))
    assert steps == [40, 60] * 2
    assert updates == list(range(28, 91)) * 2
    assert results["metrics"]["forgetting"] == 0 and len(results["metrics"]["success_at_run_end"]) == 2
    # v1 pays 200 times as much here, of which it takes away
    unscaled, scales = list(rewards), {"reward_scale": (0.5, 2), "reward_version": ("v1", 1)}
    for name, (value, factor) in scales.items():
        rewards.clear()
        ssde.main(Args(**(toy | changes | {name: value}), run_dir=str(tmp_path / name)))
        # the warm-up of the first task does not depend on the rewards
        np.testing.assert_allclose(rewards[:27], np.array(unscaled[:27]) / factor)


def test_who_acts_when(toy, tmp_path, monkeypatch):
    """A task's warm-up: at random in the first one, by earlier policies later; then the policy in training."""
    acted, true_act, true_call = [], Actor.act, ssde.CapturedPolicy.__call__

    def act(actor, obs, explore=False):
        acted.extend(["earlier"] * explore)
        return true_act(actor, obs, explore)

    def call(policy, obs):
        acted.append("own")
        return true_call(policy, obs)

    monkeypatch.setattr(Actor, "act", act)
    monkeypatch.setattr(ssde.CapturedPolicy, "__call__", call)
    ssde.main(Args(**toy, run_dir=str(tmp_path / "run")))
    assert acted == ["own"] * 50 + (["earlier"] * 40 + ["own"] * 50) * 2


def test_what_would_never_happen_is_said(toy, tmp_path, capsys):
    changes = {"reset_every": 90, "eval_every": 500, "task_seq": "reach", "quiet": False}
    ssde.main(Args(**(toy | changes), run_dir=str(tmp_path / "run")))
    out = capsys.readouterr().out
    assert "warning: no dormant reset" in out and "warning: evaluation at a phase's end only" in out
    assert "task 0 reach-v3: neurons [" in out and "layer1 100%, layer2 100%, head 100%" in out


@pytest.mark.slow
def test_it_learns_and_forgets_nothing(tmp_path, monkeypatch):
    """Reach, then its mirror image. To stay where one is succeeds in 7 % of the episodes.

    The same network trained on (`finetune`) loses the first task.
    """
    patch_toy(monkeypatch)
    options = TOY | {"task_seq": "reach,push", "steps_per_task": 800, "learning_starts": 100, "eval_episodes": 20}
    options |= {
        "hidden_dim": 48,
        "batch_size": 64,
        "actor_lr": 3e-3,
        "critic_lr": 3e-3,
        "gamma": 0.8,
        "reset_every": 100,
    }
    options |= {"eval_every": 800, "reset_every": 100, "reset_until": 500, "distill_steps": 200}
    final = {}
    for method in ("ssde", "finetune"):
        results = ssde.main(Args(**(options | {"method": method}), run_dir=str(tmp_path / method)))
        final[method] = results["metrics"]["success_at_run_end"]
    assert min(final["ssde"]) > 0.8 and final["finetune"][0] < 0.5 and final["finetune"][1] > 0.8


REFERENCE_DAMAGE = [  # what of a sound config.json makes the damaged files, what is said
    (lambda config: {"config.json": json.dumps(config | {"script": "nbsp"})}, r"the run of nbsp\.py, not of ssde\.py"),
    (lambda config: {"config.json": json.dumps(config | {"format": 1})}, "a run of another version"),
    (
        lambda config: {"config.json": json.dumps(config | {"args": {"eval_every": "40"}})},
        "--eval-every 40: must be of",
    ),
    (lambda config: {"config.json": "[" * 100_000}, "no readable run here"),
    (lambda config: {"config.json": json.dumps(config), "evaluations.csv": "a,b\n1,2\n"}, "evaluations.csv cannot be"),
    (lambda config: {"evaluations.csv": "phase,task,task_index,success\n0,reach-v3,0,\n"}, "evaluations.csv cannot be"),
]


def test_forward_transfer_from_a_reference_run(toy, tmp_path):
    for name, changes in {"unfinished": {}, "wrong method": {"method": "ssde"}}.items():
        folder = tmp_path / name
        folder.mkdir()
        stored = dataclasses.asdict(Args(**toy)) | {"method": "scratch"} | changes
        config = {"script": "ssde", "format": cli.FORMAT, "args": stored}
        (folder / "config.json").write_text(json.dumps(config))
        # the reference counts where a task is trained (phase = task_index) and nowhere else
        rows = ["0,reach-v3,0,0.2", "0,reach-v3,0,0.6", "1,reach-v3,0,0.9", "1,push-v3,1,0.5"]
        (folder / "evaluations.csv").write_text("\n".join(["phase,task,task_index,success", *rows]))
        with pytest.raises(ArgumentError, match=r"must be a finished run of --method scratch"):
            reference_auc(str(folder), Args(**toy), ["reach-v3"])
    (tmp_path / "unfinished" / "results.json").write_text("{}")
    reference = reference_auc(str(tmp_path / "unfinished"), Args(**toy), ["push-v3", "reach-v3"])
    assert reference == pytest.approx({"reach-v3": 0.4, "push-v3": 0.5})
    for change, message in REFERENCE_DAMAGE:
        for name, text in change(config).items():
            (tmp_path / "wrong method" / name).write_text(text)
        with pytest.raises(ArgumentError, match=rf"^--reference \S*wrong method.*{message}[^\n]*$"):
            reference_auc(str(tmp_path / "wrong method"), Args(**toy), ["reach-v3"])
    short = toy | {"task_seq": "reach,drawer-close", "distill_steps": 5}
    reference = ssde.main(Args(**(short | {"method": "scratch"}), run_dir=str(tmp_path / "reference")))
    results = ssde.main(Args(**short, run_dir=str(tmp_path / "run"), reference=str(tmp_path / "reference")))
    auc, reference = (np.array(r["metrics"]["auc"]) for r in (results, reference))
    expected = np.mean((auc - reference) / (1 - reference))
    assert results["metrics"]["forward_transfer_cw"] == pytest.approx(expected)
    with pytest.raises(ArgumentError, match="--steps-per-task 90, this run 80"):
        ssde.main(Args(**(short | {"steps_per_task": 80}), reference=str(tmp_path / "reference")))


def test_what_a_loaded_agent_does_next_is_the_same():
    agent = trained_agent()
    other = make_agent()
    other.load(copy.deepcopy(state_of(agent)))
    for one in (agent, other):
        torch.manual_seed(9)
        one.reset_dormant()
        one.update()
    assert_same_tensors(state_of(agent), state_of(other))


def test_an_episode_that_succeeded_once_is_a_success_and_one_cut_short_is_not_whole(toy, tmp_path, monkeypatch):
    seen, true_step = [], Point.step
    monkeypatch.setattr(Point, "step", lambda e, a: (*true_step(e, a)[:4], {"success": float(e.steps == 3)}))
    monkeypatch.setattr(ssde.Recorder, "episode", lambda recorder, *arguments: seen.append(arguments))
    ssde.main(Args(**(toy | {"task_seq": "reach"}), run_dir=str(tmp_path / "run")))
    found = [(whole, length, success) for _, _, whole, _, length, success in seen]
    assert found == 4 * [(True, 20, 1)] + [(False, 10, 1)]


def test_evaluations_are_paid_by_the_reward_version_too(toy, tmp_path):
    """By v1 two hundred times as much, of which training takes away all."""
    returns = []
    for version in ("v1", "v2"):
        run_dir = str(tmp_path / version)
        options = toy | {"task_seq": "reach", "reward_version": version}
        [task] = ssde.main(Args(**options, run_dir=run_dir))["tasks"]
        [again] = ssde.main(Args(evaluate=run_dir, episodes=2, quiet=True)).values()
        returns.append((task["final_return"], again["episode_return"]))
    np.testing.assert_allclose(returns[0], 200 * np.array(returns[1]), rtol=0.01)


def test_used_capacity_is_the_share_that_any_task_has_trained(finished_run):
    owner = finished_run["agent"].shared.owner
    expected = [(owner[name] < NOBODY).float().mean().item() for name in ("hidden.0", "hidden.1", "mean")]
    assert finished_run["results"]["metrics"]["used_capacity"] == pytest.approx(expected)


def test_the_buffer_holds_an_episodes_steps_one_after_the_other(toy_run):
    data = load_checkpoint(str(toy_run), "ssde")["agent"]["replay"]["data"]
    goes_on = torch.arange(89) % 20 != 19  # the next row is not of a new episode
    assert torch.equal(data["next_obs"][:-1][goes_on], data["obs"][1:][goes_on])
    moved = data["obs"][:, :2] + 0.2 * data["action"]
    torch.testing.assert_close(data["next_obs"][:, :2], moved)


def test_continual_worlds_window_is_five_evaluations_and_one_perfect_reference_is_no_obstacle():
    rows = [
        {"global_step": step, "phase": step // 8, "task_index": i, "success": step / 16}
        for step in range(16)
        for i in range(2)
    ]
    report = metrics.continual_report(rows, ["a", "b"], {"a": 1.0, "b": 0.5})
    assert report["performance_cw"] == pytest.approx(13 / 16)  # the mean of steps 11 to 15
    assert report["forgetting_cw"] == pytest.approx((5 - 13) / 16 / 2)
    assert report["forward_transfer_cw"] == pytest.approx((11.5 / 16 - 0.5) / 0.5)
    report = metrics.continual_report(rows, ["a", "b"], {"a": 1.0, "b": 1.0})
    assert report["forward_transfer_cw"] == "undefined: the reference is perfect"


@pytest.mark.parametrize(("name", "other"), [("steps_per_task", 7), ("eval_every", 7), ("reward_version", "v1")])
def test_a_reference_of_other_tasks_or_evaluations_is_refused(name, other, toy, tmp_path):
    stored = dataclasses.asdict(Args(**toy)) | {"method": "scratch", name: other}
    (tmp_path / "config.json").write_text(json.dumps({"script": "ssde", "format": cli.FORMAT, "args": stored}))
    (tmp_path / "evaluations.csv").write_text("phase,task,task_index,success\n0,reach-v3,0,0.2\n")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ArgumentError, match=rf"^--reference \S+: has {cli.flag(name)} {other}, this run "):
        reference_auc(str(tmp_path), Args(**toy), ["reach-v3"])


# -------------------------------------------------------------------------------------------------- the command line


def command_line(**options) -> list[str]:
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def start(*words, **options) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "ssde.py"), *words, *command_line(**options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    """Same weights, moments, buffer, random states and evaluations, byte by byte, and the same metrics."""
    first, second = load_checkpoint(str(one), "ssde"), load_checkpoint(str(two), "ssde")
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
        return load_checkpoint(str(run_dir), "ssde")["record"]["global_step"]

    run, killed_at = start(**(TINY | {"run_dir": run_dir, "quiet": False})), [0]
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
    assert 0 < killed_at[1] < killed_at[2] < 900
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert_same_run(run_dir, finished_run["run_dir"])
    # a subprocess and a call of main are the same run; it leaves every file and ends with a table
    assert "final_success" in out and "task 2 push-v3: neurons" in out and str(run_dir) in out
    assert (run_dir / "summary.png").stat().st_size > 10_000
    results = json.loads((run_dir / "results.json").read_text())
    assert results["script"] == "ssde" and results["global_step"] == 900 and len(results["tasks"]) == 3
    assert np.shape(results["metrics"]["mask_overlap"]) == np.shape(results["metrics"]["sentence_cosine"]) == (3, 3)
    assert np.shape(results["metrics"]["trainable_shares"]) == (3, 3)
    with open(run_dir / "evaluations.csv", newline="") as file:
        rows = [(int(r["global_step"]), int(r["phase"]), int(r["task_index"])) for r in csv.DictReader(file)]
    expected = [(phase * 300 + step, phase, i) for phase in range(3) for step in (200, 300) for i in range(phase + 1)]
    assert rows == expected
    assert list(run_dir.glob("events.out.tfevents.*"))


def test_interrupt_saves_prints_the_resume_command_and_exits_130(tmp_path):
    options = {"run_dir": tmp_path / "run", "steps_per_task": 100_000, "checkpoint_every": 0, "quiet": False}
    run = start(**(TINY | options))
    evaluations = tmp_path / "run" / "evaluations.csv"
    while not evaluations.exists() or len(evaluations.read_text().splitlines()) < 2:  # a row: after an episode
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert f"python ssde.py --resume {tmp_path / 'run'}" in err.splitlines()[-1]
    at = load_checkpoint(str(tmp_path / "run"), "ssde")["at"]
    assert at["step"] == 200 * at["episode"] > 0  # at an episode's end


@pytest.mark.parametrize("moment", ["distill", "evaluate", "plasticity"])
def test_a_signal_at_work_between_episodes_goes_on_to_the_same_bytes(toy, toy_run, tmp_path, monkeypatch, moment):
    """In the middle of the second task's distillation; of the evaluation at its end; just after that evaluation."""
    owner, at_call = {"distill": (Agent, 8), "evaluate": (metrics, 8), "plasticity": (Agent, 6)}[moment]
    calls, true_function = [], getattr(owner, moment)

    def patched(*arguments):
        calls.append(None)
        if len(calls) == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_function(*arguments)

    monkeypatch.setattr(owner, moment, patched)
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        ssde.main(Args(**toy, run_dir=str(run_dir)))
    saved = load_checkpoint(str(run_dir), "ssde")
    assert saved["record"]["global_step"] == (90 if moment == "distill" else 180)
    assert saved["agent"]["distilled"] == (8 if moment == "distill" else 20)
    ssde.main(Args(resume=str(run_dir), quiet=True))
    assert_same_run(run_dir, toy_run)
    events = EventAccumulator(str(run_dir)).Reload()
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag
        assert steps == [0, 90, 180] or not tag.startswith("sparsity/"), tag


def test_a_trainable_part_that_weighs_nothing_is_refused(tmp_path):
    for name, value in (("beta", 1.0), ("trainable_weight", 0.0), ("trainable_weight", -1.0)):
        with pytest.raises(ArgumentError, match=f"--{name.replace('_', '-')} {value}: must be "):
            ssde.main(Args(**{name: value}, run_dir=str(tmp_path / "run")))


def test_tasks_that_cannot_succeed_with_the_old_reward_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="peg-insert-side-v3 never reports a success with --reward-version v1"):
        ssde.main(Args(task_seq="mt10", reward_version="v1", run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("method", ["finetune", "scratch"])
def test_the_baselines_resume(toy, tmp_path, monkeypatch, method):
    options = toy | {"method": method, "task_seq": "reach,push"}
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    ssde.main(Args(**options, run_dir=str(whole)))
    true_update, calls = Agent.update, []

    def update(agent, **options):
        calls.append(None)
        if len(calls) == 70:  # in the second task
            os.kill(os.getpid(), signal.SIGINT)
        true_update(agent, **options)

    monkeypatch.setattr(Agent, "update", update)
    with pytest.raises(Interrupted):
        ssde.main(Args(**options, run_dir=str(run_dir)))
    ssde.main(Args(resume=str(run_dir), quiet=True))
    assert_same_run(run_dir, whole)


FEW_NEURONS = ["--hidden-dim", "64", "--hidden-layers", "2", "--lambda-global", "0.11", "--lambda-local", "0.11"]
BAD_ARGUMENTS = {
    "unknown task": (["--task-seq", "haammer"], r"haammer.*hammer-v3"),
    "beta": (["--beta", "1.5"], r"--beta 1\.5: must be at least 0 and below 1"),
    "warm-up": (["--steps-per-task", "5000"], r"--learning-starts 10000: must be below --steps-per-task 5000"),
    "old flag's alias": (["--policy-lr", "0"], r"--actor-lr 0\.0: must be above 0"),
    "empty prompt": (["--quick", "--lambda-global", "0.9", "--lambda-local", "0.9"], r"no neuron"),
    "empty later prompt": (  # before the folder is asked for
        ["--task-seq", "cw10", *FEW_NEURONS, "--run-dir", "/dev/null"],
        r"--lambda-global 0\.11 --lambda-local 0\.11: task 1 gets no neuron",
    ),
    "encoder": (["--task-encoder", "no/such-model"], r"--task-encoder no/such-model: no model"),
    "descriptions": (["--task-descriptions", "nothing.json"], r"--task-descriptions nothing\.json"),
    "nothing to evaluate": (["--evaluate", "nothing"], r"nothing: no readable run"),
    "no reference": (["--reference", "nothing"], r"--reference nothing: no readable run"),
}


def assert_refused(words: list[str], expected: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["ssde.py", *words])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        cli.run(ssde.main, Args, ssde.PRESETS)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.search(expected, err) and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.iterdir()) == before  # no folder is left behind


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_2(case, monkeypatch, capsys, tmp_path):
    words, expected = BAD_ARGUMENTS[case]
    words = words if "--task-seq" in words else [*words, "--task-seq", "reach"]
    assert_refused(words, expected, monkeypatch, capsys, tmp_path)


def test_bad_resumes_give_one_line_and_exit_2(toy_run, monkeypatch, capsys, tmp_path):
    run_dir = shutil.copytree(toy_run, tmp_path / "run")
    (run_dir / "results.json").unlink()
    words = ["--resume", str(run_dir)]
    assert_refused([*words, "--beta", "0.5"], r"--beta 0\.5: contradicts.*0\.3", monkeypatch, capsys, tmp_path)
    checkpoint = run_dir / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    assert_refused(words, r"checkpoint\.pt: damaged", monkeypatch, capsys, tmp_path)


def test_quick_sets_defaults_and_what_is_typed_wins():
    args = cli.parse_args(Args, ssde.PRESETS, ["--quick", "--gamma", "0.9", "--q-lr", "0.01"])
    assert args == Args(**(ssde.QUICK | {"quick": True, "gamma": 0.9, "critic_lr": 0.01}))
    args = cli.prepare(Args(quick=True, gamma=0.9), "ssde", ssde.PRESETS)[0]
    assert args == Args(**(ssde.QUICK | {"quick": True, "gamma": 0.9}))


def test_resuming_a_finished_run_returns_its_result(finished_run):
    run_dir = str(finished_run["run_dir"])
    before = (finished_run["run_dir"] / "checkpoint.pt").read_bytes()
    assert ssde.main(Args(resume=run_dir, quiet=True)) == finished_run["results"]
    assert (finished_run["run_dir"] / "checkpoint.pt").read_bytes() == before


def test_killed_before_its_results_were_written_a_run_still_ends(toy, toy_run, tmp_path):
    run_dir = shutil.copytree(toy_run, tmp_path / "run")
    (run_dir / "results.json").unlink()
    ssde.main(Args(resume=str(run_dir), quiet=True))
    assert_same_run(run_dir, toy_run)


def test_evaluate_gives_the_last_evaluation_of_the_run(finished_run):
    """Same policies, same goals, same numbers, on real tasks."""
    seen = ssde.main(Args(evaluate=str(finished_run["run_dir"]), episodes=1, quiet=True))
    final = finished_run["results"]["tasks"]
    assert [result["episode_return"] for result in seen.values()] == [task["final_return"] for task in final]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("action", "action is not finite at step 71"),
        ("score", r"method/score/layer1 is not finite at step 75"),
        ("loss", "losses/q is not finite at step 60"),
        ("weight", r"actor\.hidden\.0\.weight is not finite at step 80"),
    ],
)
def test_what_is_not_finite_stops_with_exit_1_and_keeps_the_good_checkpoint(
    toy, what, message, tmp_path, monkeypatch, capsys
):
    true_update, calls = Agent.update, []

    def update(agent, **options):
        calls.append(None)
        if len(calls) == {"action": 31, "score": 35}.get(what):
            agent.log_alpha.data.fill_(math.nan)
        true_update(agent, **options)
        if what == "loss":
            agent.losses["q"] = torch.tensor(math.nan)
        elif what == "weight" and len(calls) == 39:  # in a weight that is not the task's
            unused = agent.shared.owner["hidden.0"].clone().fill_(1)
            unused[agent.shared.places(0, "hidden.0")["weight"][1]] = 0
            agent.actor.hidden[0].weight.data[unused == 1] = math.nan

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(ssde, "LOG_EVERY", 60)
    monkeypatch.setattr("sys.argv", ["ssde.py", *command_line(**toy, run_dir=tmp_path / "run")])
    with pytest.raises(SystemExit) as leaving:
        cli.run(ssde.main, Args, ssde.PRESETS)
    err = capsys.readouterr().err
    assert leaving.value.code == 1 and re.search(message, err) and str(tmp_path) in err and err.count("\n") == 1
    checkpoint = load_checkpoint(str(tmp_path / "run"), "ssde")
    assert checkpoint["record"]["global_step"] == 0
    assert all(weight.isfinite().all() for weight in checkpoint["agent"]["actor"].values())
