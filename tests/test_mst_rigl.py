"""MR.Q against its authors' numbers, MST's topologies against literal versions, and their promises on real runs."""

import contextlib
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
import weakref
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mst_rigl
from common import cli, metrics
from common.cli import ArgumentError, Interrupted, load_checkpoint, parse_args
from common.envs import env_sizes, make_env, seed_of
from common.recorder import restored, state_of
from mst_rigl import PRESETS, Actor, Agent, Args, Block, Critic, Encoder, ReplayBuffer, Topology, linear_layers

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
OBS_DIM, ACT_DIM = 5, 2
# A real task in seconds, with topology changes, terminations and evaluations.
TINY = {
    "env_id": "Hopper-v5",
    "seed": 3,
    "total_steps": 400,
    "learning_starts": 100,
    "eval_every": 150,
    "eval_episodes": 2,
    "buffer_size": 330,
    "batch_size": 16,
    "target_update_every": 50,
    "width_scale": 1 / 32,
    "rigl_every": 60,
    "quiet": True,
}

# ----------------------------------------------------------------------------- parity with the numbers of MR.Q's code


@pytest.fixture(scope="module")
def authors():
    """Weights of a tiny MR.Q, batches, and what its authors' code computed from them."""
    with np.load(ROOT / "tests" / "data" / "mrq_parity.npz") as file:
        return {name: json.loads(str(file[name])) if name == "meta" else torch.from_numpy(file[name]) for name in file}


# our names of the linear layers -> theirs
LAYERS = {f"zs.{i}.linear": f"zs_mlp.l{i + 1}" for i in range(3)} | {"za.0": "za", "model": "model"}
LAYERS |= {"zsa_mlp.0.linear": "zsa.l1", "zsa_mlp.1.linear": "zsa.l2", "zsa_mlp.2": "zsa.l3"}
LAYERS |= {f"twins.{n}.{i}.linear": f"q{n + 1}.q1.l{i + 1}" for n in range(2) for i in range(3)}
LAYERS |= {"twins.0.3": "q1.q2", "twins.1.3": "q2.q2"}
LAYERS |= {"0.linear": "policy.l1", "1.linear": "policy.l2", "2": "policy.l3"}


def their_weights(authors: dict, module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The authors' tensors under `prefix` by our names."""
    names = {name: name.rpartition(".") for name in module.state_dict()}
    return {name: authors[f"{prefix}.{LAYERS[layer]}.{kind}"] for name, (layer, _, kind) in names.items()}


def tiny_mrq(authors: dict) -> tuple[dict, dict]:
    """Networks and targets of the fixture's sizes and weights. `value` and `policy` are their critic and actor."""
    hp = authors["meta"]["hp"]
    nets = []
    for suffix in ("", "_target"):
        latent = (hp["zs_dim"], hp["za_dim"], hp["zsa_dim"])
        encoder = Encoder(OBS_DIM, ACT_DIM, *latent, hp["enc_hdim"], 1, 4)
        critic = Critic(hp["zsa_dim"], hp["value_hdim"], mst_rigl.CRITIC_BLOCKS, 4)
        actor = Actor(hp["zs_dim"], ACT_DIM, hp["policy_hdim"], mst_rigl.ACTOR_BLOCKS, 3)
        nets.append({"encoder": encoder, "critic": critic, "actor": actor})
        for module, theirs in zip(nets[-1].values(), ("encoder", "value", "policy"), strict=True):
            module.load_state_dict(their_weights(authors, module, theirs + suffix))
    return nets[0], nets[1]


def authors_agent(authors: dict) -> Agent:
    """An agent with the arguments of --preset mrq and the networks and targets of the fixture."""
    networks, targets = tiny_mrq(authors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mst_rigl, "build_networks", lambda *_: networks)
        agent = Agent(Args(**PRESETS["preset mrq"], total_steps=20_000, buffer_size=20), OBS_DIM, ACT_DIM, CPU)
    agent.targets = targets
    agent.scales = [torch.tensor(authors["meta"][name]) for name in ("reward_scale", "target_reward_scale")]
    return agent


def encoder_batch(authors: dict) -> dict[str, torch.Tensor]:
    obs = torch.cat([authors["enc_state"][:, :1], authors["enc_next_state"]], 1)
    flat = {name: authors[f"enc_{name}"][..., 0] for name in ("reward", "not_done")}
    return {"obs": obs, "action": authors["enc_action"]} | flat


def rl_batch(authors: dict) -> dict[str, torch.Tensor]:
    flat = {name: authors[f"rl_{name}"][..., 0] for name in ("reward", "not_done")}
    plain = {"obs": authors["rl_state"], "next_obs": authors["rl_next_state"], "action": authors["rl_action"]}
    return plain | flat


close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("terminates", [True, False])
def test_encoder_loss_and_gradients_are_the_authors(authors, terminates):
    nets, targets = tiny_mrq(authors)
    loss = mst_rigl.encoder_loss(nets["encoder"], targets["encoder"], encoder_batch(authors), terminates)[0]
    close(loss, authors["loss.encoder_loss_" + ("terminating" if terminates else "non_terminating")])
    loss.backward()
    if terminates:
        expected = their_weights(authors, nets["encoder"], "after_encoder_step.grad")
        for name, parameter in nets["encoder"].named_parameters():
            close(parameter.grad, expected[name])
    else:  # the done head, the model's first output, is left alone
        assert (nets["encoder"].model.weight.grad[0] == 0).all() and nets["encoder"].model.bias.grad[0] == 0


@pytest.mark.parametrize("terminates", [True, False])
def test_an_agents_encoder_learns_from_its_target_and_from_terminals_once_there_was_one(
    authors, terminates, monkeypatch
):
    agent = authors_agent(authors)
    monkeypatch.setattr(agent.replay, "sample_rows", torch.arange)
    monkeypatch.setattr(agent.replay, "sub_trajectories", lambda rows: encoder_batch(authors))
    agent.learn_encoder(terminates)
    close(agent.losses["encoder"], authors["loss.encoder_loss_" + ("terminating" if terminates else "non_terminating")])
    if terminates:
        expected = their_weights(authors, agent.networks["encoder"], "after_encoder_step.grad")
        for name, parameter in agent.networks["encoder"].named_parameters():
            close(parameter.grad, expected[name])


def test_two_hot_is_the_authors(authors):
    bins = tiny_mrq(authors)[0]["encoder"].bins
    torch.testing.assert_close(bins, authors["two_hot_bins"], atol=1e-5, rtol=1e-6)
    close(mst_rigl.two_hot(authors["two_hot_input"][:, 0], bins), authors["two_hot_output"])


def test_return_q_and_target_are_the_authors(authors, monkeypatch):
    meta, batch = authors["meta"], rl_batch(authors)
    nets, targets = tiny_mrq(authors)
    reward, not_done = mst_rigl.multi_step_return(batch["reward"], batch["not_done"], meta["discount"])
    close(reward, authors["rl_multi_step_reward"])
    close(not_done, authors["rl_multi_step_not_done"])
    close(nets["critic"](nets["encoder"](batch["obs"], batch["action"])), authors["rl_q"])
    monkeypatch.setattr(torch, "randn_like", lambda _: authors["rl_target_noise"])
    scales = [torch.tensor(meta["reward_scale"]), torch.tensor(meta["target_reward_scale"])]
    noise, clip = meta["target_policy_noise"], meta["noise_clip"]
    close(mst_rigl.td_target(targets, batch, meta["discount"], noise, clip, scales), authors["rl_q_target"])


def test_one_update_of_critic_and_actor_is_the_authors(authors, monkeypatch):
    """Losses, priorities, and the weights after a step of the critics and the step of the actor that follows it."""
    agent, priorities = authors_agent(authors), {}
    monkeypatch.setattr(torch, "randn_like", lambda _: authors["rl_target_noise"])
    monkeypatch.setattr(agent.replay, "sample_rows", torch.arange)
    monkeypatch.setattr(agent.replay, "transitions", lambda _: rl_batch(authors))
    monkeypatch.setattr(agent.replay, "update_priority", lambda rows, priority: priorities.update(now=priority))
    agent.learn_critic_and_actor()
    close(agent.losses["critic"], authors["loss.value_loss"])
    close(agent.losses["actor"], authors["loss.policy_loss_after_value_step"])
    close(priorities["now"], authors["lap_priority"])
    for name, prefix in (("critic", "after_value_step.value"), ("actor", "after_policy_step.policy")):
        expected = their_weights(authors, agent.networks[name], prefix)
        for key, weight in agent.networks[name].state_dict().items():
            torch.testing.assert_close(weight, expected[key], atol=1e-7, rtol=0)
    encoder = their_weights(authors, agent.networks["encoder"], "encoder")
    assert all(torch.equal(weight, encoder[name]) for name, weight in agent.networks["encoder"].state_dict().items())


def test_the_arguments_of_preset_mrq_are_the_authors(authors):
    args, meta = Args(**PRESETS["preset mrq"]), authors["meta"]
    assert (args.gamma, args.noise_clip, args.target_noise) == tuple(
        meta[name] for name in ("discount", "noise_clip", "target_policy_noise")
    )
    assert (args.encoder_lr, args.critic_lr, args.actor_lr) == tuple(
        meta[f"{m}_lr"] for m in ("enc", "value", "policy")
    )
    assert {args.weight_decay} == {meta[f"{module}_wd"] for module in ("enc", "value", "policy")}
    assert args.max_grad_norm == meta["value_grad_clip"]
    assert (args.batch_size, args.buffer_size, args.target_update_every, args.learning_starts) == (
        256,
        10**6,
        250,
        10**4,
    )
    assert (args.exploration_noise, args.eval_every, args.eval_episodes) == (0.2, 5000, 10)
    assert (args.rigl_every, args.rigl_drop, args.rigl_until) == (1000, 0.3, 0.75)


@pytest.mark.parametrize(("env_id", "expected"), [("dmc/dog-run", (500_000, 2)), ("HalfCheetah-v5", (1_000_000, 1))])
def test_length_and_action_repeat_are_the_authors_unless_given(env_id, expected, monkeypatch):
    built = []

    def agent(args, *_):
        built.append((args.total_steps, args.action_repeat))
        raise KeyboardInterrupt

    monkeypatch.setattr(mst_rigl, "Agent", agent)
    monkeypatch.setattr(mst_rigl, "env_sizes", lambda *_: (3, 1))
    for changes in ({}, {"total_steps": 20_000, "action_repeat": 3}):
        with pytest.raises(KeyboardInterrupt):
            mst_rigl.main(Args(env_id=env_id, preset="mrq", **changes))
    assert built == [expected, (20_000, 3)]


def test_the_optimizers_of_preset_mrq_are_the_authors(authors):
    args, meta = Args(**PRESETS["preset mrq"], total_steps=20_000, buffer_size=20), authors["meta"]
    for name, optimizer in Agent(args, OBS_DIM, ACT_DIM, CPU).optimizers.items():
        theirs = {"encoder": "enc", "critic": "value", "actor": "policy"}[name]
        [group] = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW
        assert (group["lr"], group["weight_decay"]) == (meta[f"{theirs}_lr"], meta[f"{theirs}_wd"])
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, False)


# ------------------------------------------------------------------------------------------------ MR.Q by the letter


@pytest.mark.parametrize("block_type", range(1, 7))
def test_block_types(block_type):
    torch.manual_seed(0)
    for inputs in (7, 5):
        block, x = Block(inputs, 7, block_type), torch.randn(4, inputs)
        y = x @ block.linear.weight.T + block.linear.bias
        if block_type >= 3:
            y = (y - y.mean(1, keepdim=True)) / torch.sqrt(y.var(1, keepdim=True, unbiased=False) + 1e-5)
        y = torch.where(y > 0, y, 0.0 if block_type in (1, 3, 5) else y.exp() - 1)
        close(block(x), y + x if block_type >= 5 and inputs == 7 else y)
        assert sum(p.numel() for p in block.parameters()) == 7 * inputs + 7


def test_types_apply_to_hidden_layers_and_depth_to_their_number():
    agent = make_agent(encoder_type=5, critic_type=1, actor_type=6, depth_scale=3)
    encoder, critic, actor = agent.networks.values()
    kinds = [type(block.activation).__name__ for block in encoder.zs]
    assert kinds == ["ReLU"] * 8 + ["ELU"] and not encoder.zs[-1].residual and encoder.zs[1].residual
    assert [type(layer).__name__ for layer in encoder.zsa_mlp] == ["Block"] * 6 + ["Linear"]
    assert [type(layer).__name__ for layer in critic.twins[1]] == ["Block"] * 9 + ["ValueLayer"]
    assert [type(layer).__name__ for layer in actor] == ["Block"] * 6 + ["Linear"]
    assert isinstance(encoder.za[1], torch.nn.ELU)


def test_initial_weights_are_xavier_with_relu_gain_and_zero_biases():
    torch.manual_seed(0)
    layer = Actor(300, 4, 200, 1, 3)[0].linear
    bound = math.sqrt(2) * math.sqrt(6 / (300 + 200))
    assert 0.99 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0).all()


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-3e4, 3e4, width=32))
def test_two_hot_is_a_distribution_on_two_neighbours_with_the_right_mean(x):
    points = torch.linspace(-10, 10, 65)
    bins = points.sign() * (points.abs().exp() - 1)
    table = mst_rigl.two_hot(torch.tensor([[x]]), bins)[0, 0].double()
    clipped = min(max(x, bins[0].item()), bins[-1].item())
    assert table.sum() == pytest.approx(1) and (table >= 0).all()
    assert (table * bins).sum().item() == pytest.approx(clipped, rel=1e-4, abs=1e-5)
    where = table.nonzero()[:, 0].tolist()
    assert len(where) <= 2 and where[-1] - where[0] <= 1


def test_encoder_loss_equals_a_loop_over_samples_and_steps():
    torch.manual_seed(1)
    sizes = (OBS_DIM, ACT_DIM, 6, 4, 7, 8, 1, 6)
    encoder, target, batch, steps = Encoder(*sizes), Encoder(*sizes), 9, mst_rigl.ENCODER_HORIZON
    data = {"obs": torch.randn(batch, steps + 1, OBS_DIM), "action": torch.rand(batch, steps, ACT_DIM) * 2 - 1}
    data |= {"reward": torch.randn(batch, steps) * 5, "not_done": (torch.rand(batch, steps) < 0.7).float()}
    expected = {"dynamics": 0.0, "reward": 0.0, "done": 0.0}
    for n in range(batch):
        zs = encoder.zs(data["obs"][n, :1])
        for step in range(steps):
            out = encoder.model(encoder.zsa_mlp(torch.cat([zs, encoder.za(data["action"][n, step][None])], 1)))
            done, zs, logits = out[:, :1], out[:, 1:7], out[:, 7:]
            code = mst_rigl.two_hot(data["reward"][n, step], encoder.bins)
            expected["dynamics"] += F.mse_loss(zs, target.zs(data["obs"][n, step + 1][None])) / batch
            expected["reward"] -= (code * torch.log_softmax(logits[0], 0)).sum() / batch
            expected["done"] += (done[0, 0] - (1 - data["not_done"][n, step])) ** 2 / batch
            if data["not_done"][n, step] == 0:
                break
    loss, *parts = mst_rigl.encoder_loss(encoder, target, data, terminates=True)
    for part, name in zip(parts, expected, strict=True):
        close(part, expected[name])
    close(loss, expected["dynamics"] + 0.1 * expected["reward"] + 0.1 * expected["done"])
    loss.backward()
    for parameter in encoder.parameters():
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in target.parameters())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gamma=st.floats(0.1, 1))
def test_return_counts_a_terminal_reward_and_nothing_after_it(seed, gamma):
    rng = np.random.default_rng(seed)
    reward, not_done = rng.standard_normal((4, 3)).astype(np.float32), rng.integers(0, 2, (4, 3)).astype(np.float32)
    total, alive = mst_rigl.multi_step_return(torch.from_numpy(reward), torch.from_numpy(not_done), gamma)
    for n in range(4):
        expected, going_on = 0.0, True
        for t in range(3):
            if going_on:
                expected += gamma**t * reward[n, t]
            going_on = going_on and not_done[n, t] == 1
        assert total[n, 0].item() == pytest.approx(expected, rel=1e-4, abs=1e-5) and alive[n, 0] == going_on


def test_td_target_bootstraps_from_the_smaller_target_where_nothing_terminated():
    torch.manual_seed(2)
    agent = make_agent()
    batch = {"obs": torch.randn(8, OBS_DIM), "next_obs": torch.randn(8, OBS_DIM), "action": torch.zeros(8, ACT_DIM)}
    batch |= {"reward": torch.randn(8, 3), "not_done": (torch.rand(8, 3) < 0.85).float()}
    y = mst_rigl.td_target(agent.targets, batch, 0.9, 0.0, 0.3, [torch.tensor(2.0), torch.tensor(5.0)])
    encoder, critic, actor = agent.targets.values()
    reward, not_done = mst_rigl.multi_step_return(batch["reward"], batch["not_done"], 0.9)
    zs = encoder.zs(batch["next_obs"])
    q = critic(encoder.zsa(zs, torch.tanh(actor(zs)))).min(1).values[:, None]
    close(y, (reward + not_done * 0.9**3 * q * 5) / 2)
    assert 0 < not_done.sum() < 8 and not y.requires_grad


def test_target_noise_is_clipped_and_so_is_the_action(monkeypatch):
    seen = []
    agent = make_agent()
    monkeypatch.setattr(agent.targets["encoder"], "zsa", lambda zs, action: seen.append(action) or torch.zeros(6, 16))
    with torch.no_grad():
        agent.targets["actor"][-1].bias.copy_(torch.tensor([0.0, 10.0]))
        agent.targets["actor"][-1].weight.zero_()
    noise = torch.tensor([-5.0, -1.0, -0.5, 0.5, 1.0, 5.0])[:, None].expand(6, 2)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    batch = {"next_obs": torch.zeros(6, OBS_DIM), "action": torch.zeros(6, ACT_DIM)}
    batch |= {"reward": torch.zeros(6, 3), "not_done": torch.ones(6, 3)}
    mst_rigl.td_target(agent.targets, batch, 0.9, 0.2, 0.3, agent.scales)
    assert seen[0][:, 0].tolist() == pytest.approx([-0.3, -0.2, -0.1, 0.1, 0.2, 0.3])
    assert seen[0][:, 1].tolist() == pytest.approx([0.7, 0.8, 0.9, 1, 1, 1])


def make_agent(obs_dim: int = OBS_DIM, act_dim: int = ACT_DIM, **changes) -> Agent:
    torch.manual_seed(0)
    return Agent(Args(**(TINY | changes)), obs_dim, act_dim, CPU)


def weights_of(agent: Agent) -> list[tuple[str, torch.Tensor]]:
    """Everything that is learned, by name."""
    return [(f"{net}.{name}", p) for net, module in agent.networks.items() for name, p in module.named_parameters()]


def filled_agent(steps: int = 200, **changes) -> Agent:
    """An agent with random transitions, some of which terminate."""
    agent, rng = make_agent(**changes), np.random.default_rng(0)
    for step in range(steps):
        obs, next_obs = rng.standard_normal((2, OBS_DIM)).astype(np.float32)
        action = rng.uniform(-1, 1, ACT_DIM).astype(np.float32)
        agent.replay.add(obs, action, rng.standard_normal(), next_obs, step % 20 == 7, step % 20 == 19)
    return agent


def test_the_actors_loss_computes_no_gradients_of_encoder_and_critic():
    agent = filled_agent()
    agent.copy_targets()
    true_step, gradients = agent.step, {}

    def step(name, *clip):
        true_step(name, *clip)
        gradients[name] = [parameter.grad.clone() for parameter in agent.networks["critic"].parameters()]

    agent.step = step
    agent.learn_critic_and_actor()
    assert all(torch.equal(*pair) for pair in zip(gradients["critic"], gradients["actor"], strict=True))
    assert all(parameter.grad is None for parameter in agent.networks["encoder"].parameters())
    assert all(parameter.grad is not None for parameter in agent.networks["actor"].parameters())


def test_all_targets_become_what_the_networks_are():
    agent = filled_agent()
    for module in agent.networks.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    agent.copy_targets()
    for name, module in agent.networks.items():
        target = agent.targets[name].state_dict()
        assert all(torch.equal(target[key], value) for key, value in module.state_dict().items()), name


def test_a_numpy_flag_of_an_environment_leaves_a_readable_checkpoint(tmp_path):
    agent, row = make_agent(), (np.ones(OBS_DIM, np.float32), np.ones(ACT_DIM, np.float32))
    agent.replay.add(*row, 1.0, row[0], np.True_, np.False_)
    torch.save(state_of(agent), tmp_path / "agent.pt")
    assert torch.load(tmp_path / "agent.pt", weights_only=True)["replay"]["terminates"] is True


def test_targets_are_copied_first_and_then_the_encoder_is_trained_as_often():
    agent, calls = filled_agent(), []
    true_copy, true_encoder = agent.copy_targets, agent.captured_encoder
    agent.copy_targets = lambda: (calls.append("copy"), true_copy())
    agent.captured_encoder = lambda terminates: (calls.append("encoder"), true_encoder(terminates))
    before = {name: p.clone() for name, p in agent.networks["encoder"].state_dict().items()}
    period = agent.args.target_update_every
    for _ in range(period + 1):
        agent.update()
        if len(calls) == period + 1:  # the first cycle: copied before the encoder moved
            target = agent.targets["encoder"].state_dict()
            assert all(torch.equal(target[name], value) for name, value in before.items())
    assert calls == 2 * (["copy"] + ["encoder"] * period)
    assert agent.updates == agent.topologies["critic"].updates == period + 1
    assert agent.scales[0].item() != 1


def test_reward_scale_is_the_mean_of_the_steps_and_the_old_one_stays_with_the_targets():
    agent = make_agent()
    for step, reward in enumerate((3.0, -1.0, 2.0, 0.0)):
        agent.replay.add(
            np.ones(OBS_DIM, np.float32),
            np.ones(ACT_DIM, np.float32),
            reward,
            np.ones(OBS_DIM, np.float32),
            False,
            step == 1,
        )
    agent.copy_targets()
    assert agent.scales[0].item() == pytest.approx(1.5) and agent.scales[1].item() == 1
    agent.replay.add(
        np.ones(OBS_DIM, np.float32), np.ones(ACT_DIM, np.float32), 9.0, np.ones(OBS_DIM, np.float32), True, False
    )
    agent.copy_targets()
    assert agent.scales[0].item() == pytest.approx(3) and agent.scales[1].item() == pytest.approx(1.5)


def test_exploration_adds_clipped_noise(monkeypatch):
    obs = np.ones(OBS_DIM, np.float32)
    agents = {noise: make_agent(exploration_noise=noise) for noise in (0.2, 1.9, 0.0)}
    greedy = agents[0.2].act(obs)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    np.testing.assert_allclose(agents[0.2].explore(obs), np.minimum(greedy + 0.2, 1), atol=1e-6)
    monkeypatch.setattr(torch, "randn_like", lambda x: -torch.ones_like(x))
    np.testing.assert_allclose(agents[1.9].explore(obs), np.maximum(greedy - 1.9, -1), atol=1e-6)
    assert (agents[1.9].explore(obs) == -1).any()
    np.testing.assert_array_equal(agents[0.0].explore(obs), greedy)


def test_bfloat16_gives_nearly_the_same_losses_and_every_gradient():
    exact, rounded = filled_agent(), filled_agent(bf16=True)
    for agent in (exact, rounded):
        agent.copy_targets()
        torch.manual_seed(0)
        agent.replay.sample_rows = lambda _: torch.arange(1, 5)
        agent.learn_critic_and_actor()
        agent.learn_encoder(agent.replay.terminates)
        for name, parameter in weights_of(agent):
            assert parameter.grad.abs().sum() > 0 and parameter.dtype == torch.float32, name
    for name, value in exact.losses.items():
        assert rounded.losses[name] != value or name == "done", name
        torch.testing.assert_close(rounded.losses[name], value, rtol=0.05, atol=0.02)


def test_bfloat16_is_for_products_and_not_for_features_and_values():
    agent, seen = filled_agent(bf16=True), {}
    for group in (agent.networks, agent.targets):
        for net, module in group.items():
            for name, layer in module.named_modules():
                if isinstance(layer, Block | torch.nn.Linear):
                    kind, dtypes = type(layer).__name__, seen.setdefault((id(group), net, name), set())
                    layer.register_forward_hook(lambda _, x, y, kind=kind, seen=dtypes: seen.add((kind, y.dtype)))
    agent.copy_targets()
    agent.learn_encoder(agent.replay.terminates)
    agent.learn_critic_and_actor()
    expected = {"Linear": torch.bfloat16, "Block": torch.float32, "ValueLayer": torch.float32}
    assert {pair for dtypes in seen.values() for pair in dtypes} == set(expected.items())
    assert [key[1:] for key, dtypes in seen.items() if not dtypes] == [("encoder", "model")]  # of the target


def test_bfloat16_leaves_large_values_exact():
    torch.manual_seed(0)
    critic, zsa = Critic(16, 16, mst_rigl.CRITIC_BLOCKS, 4), torch.randn(32, 16)
    for twin in critic.twins:
        twin[-1].bias.data.fill_(100.3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = critic(zsa)
    difference = (rounded - critic(zsa)).abs().max()  # bfloat16's spacing is 0.5 at 100
    assert 0 < difference < 0.03


@pytest.mark.parametrize("width_scale", [1 / 32, 5 / 4])
def test_plasticity_is_measured_on_the_right_features(width_scale, monkeypatch, assert_plasticity):
    """Every number against its definition, on features computed layer by layer: what the next layer reads."""
    monkeypatch.setattr(mst_rigl, "METRIC_BATCH", 80)
    options = {"encoder_type": 6, "critic_type": 5, "actor_type": 5, "depth_scale": 2, "target_update_every": 1}
    agent = filled_agent(width_scale=width_scale, **options)
    agent.update()
    encoder, critic, actor = agent.networks.values()
    batch = agent.replay.recent(100 if width_scale > 1 else 80)

    def forward(layers, x) -> tuple[torch.Tensor, list]:
        """Output, and the output of each block but a last one."""
        outputs = []
        for layer in layers:
            y = layer.activation(layer.norm(layer.linear(x))) if isinstance(layer, Block) else layer(x)
            x = x + y if isinstance(layer, Block) and layer.residual else y
            outputs.append(x)
        return x, outputs[:-1]

    with torch.no_grad():
        zs, first = forward(encoder.zs, batch["obs"])
        both = torch.cat([zs, encoder.za(batch["action"])], 1)
        zsa, second = forward(encoder.zsa_mlp, both)
        features = {"encoder": [*first, both, *second]}
        features |= {"critic": forward(critic.twins[0], zsa)[1], "actor": forward(actor, zs)[1]}
    networks = {"encoder": encoder, "critic": critic.twins[0], "actor": actor}
    plasticity = agent.plasticity() | metrics.grad_norms(**networks)
    for name, module in networks.items():
        assert_plasticity(plasticity, name, module, features[name], metrics.DORMANT_TAUS)


def test_gradient_norms_are_masked_and_not_yet_clipped():
    agent, free = (filled_agent(max_grad_norm=norm, target_update_every=1) for norm in (0.05, 1e9))
    for one in (agent, free):
        torch.manual_seed(3)
        one.update()
    for name, module in free.networks.items():
        expected = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))
        assert agent.grad_norms[name].item() == pytest.approx(expected, rel=1e-3) and expected > 0.001
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in agent.networks["critic"].parameters()))
    assert clipped == pytest.approx(0.05, rel=1e-3) and agent.grad_norms["critic"] > 0.05
    resumed = make_agent()  # whose encoder has no gradient before the next copy of the targets
    restored(resumed, state_of(agent), CPU)
    assert resumed.grad_norms == agent.grad_norms and resumed.losses.keys() == agent.losses.keys()


def test_compiled_it_is_the_same_update(monkeypatch):
    """Traced by torch.compile, which needs no compiler of C++ for that."""
    compiled, true_compile = [], torch.compile

    def compile_in_python(function, **options):
        compiled.append(options)
        return true_compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_in_python)
    agents = filled_agent(), filled_agent(compile=True)
    # of encoder, critic and actor with their gradients, no piece of which stays outside; the targets of the critics
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 3 + [{}]
    for agent in agents:
        torch.manual_seed(1)
        agent.copy_targets()
        agent.learn_encoder(agent.replay.terminates)
        agent.learn_critic_and_actor()
    for (name, weight), (_, other) in zip(weights_of(agents[0]), weights_of(agents[1]), strict=True):
        torch.testing.assert_close(weight, other, msg=name)


def test_an_update_gives_its_priorities_to_the_rows_that_it_learned_from():
    agent, seen = filled_agent(), {}
    true_transitions, true_update = agent.replay.transitions, agent.replay.update_priority
    agent.replay.transitions = lambda rows: seen.update(learned=rows) or true_transitions(rows)
    agent.replay.update_priority = lambda rows, new: seen.update(given=rows) or true_update(rows, new)
    agent.update()
    assert torch.equal(seen["learned"], seen["given"])


def test_rewards_that_are_all_zero_leave_finite_losses():
    """As until the first success of a task with sparse rewards."""
    agent = filled_agent(target_update_every=1)
    agent.replay.data["reward"].zero_()
    agent.update()
    agent.update()  # whose targets count in the units of the first
    assert all(loss.isfinite() for loss in agent.losses.values())


def test_only_the_critics_gradient_is_clipped():
    agent = filled_agent(max_grad_norm=1e-4)
    agent.update()
    for name, module in agent.networks.items():
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))
        assert norm == pytest.approx(1e-4 if name == "critic" else agent.grad_norms[name].item(), rel=1e-3)
        assert agent.grad_norms[name] > 2e-4


def test_an_agent_learns_by_its_own_discount_noise_and_schedule(monkeypatch):
    true_target, seen = mst_rigl.td_target, []
    monkeypatch.setattr(mst_rigl, "td_target", lambda *given: seen.append(given[2:5]) or true_target(*given))
    agent = filled_agent(gamma=0.9, target_noise=0.4, noise_clip=0.7, rigl_drop=0.1, rigl_until=0.5)
    agent.update()
    assert seen == [(0.9, 0.4, 0.7)]
    for topology in agent.topologies.values():
        assert (topology.drop, topology.until, topology.every) == (0.1, 150, 60)


def test_losses_have_the_names_of_what_they_are(monkeypatch):
    agent = filled_agent()
    numbers = {"encoder": (0.1, 0.2, 0.3, 0.4), "critic": (0.5, 0.6), "actor": (0.7,)}
    numbers = {name: [torch.tensor(value) for value in values] for name, values in numbers.items()}
    agent.step = lambda *_: None
    agent.backward = {"encoder": lambda *_: numbers["encoder"], "actor": lambda *_: numbers["actor"][0]}
    agent.backward["critic"] = lambda *_: (*numbers["critic"], torch.ones(agent.args.batch_size))
    agent.update()
    names = ("encoder", "dynamics", "reward", "done", "critic", "q", "actor")
    assert agent.losses == dict(zip(names, [value for values in numbers.values() for value in values], strict=True))


# ------------------------------------------------------------------------------------------------------------ replay


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(12, 40),
    episodes=st.lists(st.tuples(st.integers(1, 15), st.booleans()), min_size=1, max_size=8),
    unfinished=st.integers(0, 8),
)
def test_replay_samples_whole_or_terminated_sub_trajectories_and_no_others(capacity, episodes, unfinished):
    """Against a list of everything that ever happened. A row's number is its observation."""
    horizon, replay = mst_rigl.ENCODER_HORIZON, ReplayBuffer(capacity, 1, 1, CPU)
    rows = []  # (time of the episode's end row, terminated) for each row; None for rows of last observations
    for length, terminated in [*episodes, (unfinished, None)]:
        start = len(rows)
        for step in range(length):
            time_, over = len(rows), terminated is not None and step == length - 1
            one, two, action = (np.full(1, value, np.float32) for value in (time_, time_ + 1, -time_))
            replay.add(one, action, time_ + 0.5, two, over and terminated, over and not terminated)
            rows.append((start + length, terminated))
        if terminated is not None:
            rows.append(None)
    present = range(max(0, len(rows) - capacity), len(rows))
    allowed = {}
    for row in present:
        if rows[row] is not None:
            end, terminated = rows[row]
            if terminated or row + horizon < min(end + (terminated is not None), len(rows)):
                allowed[row % capacity] = row
    sampleable = set(replay.data["priority"][: replay.size].nonzero()[:, 0].tolist())
    assert sampleable == set(allowed)
    kept = [row + 0.5 for row in present if rows[row] is not None]
    assert replay.reward_scale().item() == pytest.approx(np.mean(kept))
    assert sorted(replay.recent(capacity)["obs"][:, 0].tolist()) == [reward - 0.5 for reward in kept]

    starts = torch.tensor(sorted(allowed), dtype=torch.long)
    whole, short = replay.sub_trajectories(starts), replay.transitions(starts)
    for n, start in enumerate(starts.tolist()):
        row = allowed[start]
        end, terminated = rows[row]
        length = min(horizon, end - row)  # until the termination, if that comes first
        expected = torch.arange(row, row + length)
        assert torch.equal(whole["obs"][n, : length + 1, 0], torch.arange(row, row + length + 1).float())
        assert torch.equal(whole["action"][n, :length, 0], -expected.float())
        assert torch.equal(whole["reward"][n, :length], expected + 0.5)
        last = row + length == end and bool(terminated)
        assert whole["not_done"][n, :length].tolist() == [1.0] * (length - last) + [0.0] * last
        assert short["obs"][n, 0] == row and short["action"][n, 0] == -row
        assert torch.equal(short["reward"][n, : min(3, length)], expected[:3] + 0.5)
        if not last or length > 3:
            assert short["next_obs"][n, 0] == row + 3
        assert torch.equal(short["not_done"][n, : min(3, length)], whole["not_done"][n, : min(3, length)])

    copy = ReplayBuffer(capacity, 1, 1, CPU)
    copy.load_state_dict(replay.state_dict())
    torch.manual_seed(0)
    drawn = set(copy.sample_rows(200).tolist()) if allowed else set()
    assert drawn <= set(allowed)
    assert all(torch.equal(copy.data[name][: copy.size], replay.data[name][: replay.size]) for name in replay.data)
    assert (copy.head, copy.size, copy.terminates) == (replay.head, replay.size, any(t for _, t in episodes))


@settings(max_examples=60, deadline=None)
@given(
    priorities=st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any),
    points=st.lists(st.floats(0, 1 - 2**-53), min_size=1, max_size=8),
)
def test_an_index_is_drawn_where_the_point_falls_in_the_running_sum(priorities, points):
    """Against a walk along the list, with the fraction of the sum that each point stands for."""
    expected = []
    for point in points:
        left, index = Fraction(point) * sum(priorities), 0
        while left >= priorities[index]:
            left, index = left - priorities[index], index + 1
        expected.append(index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda shape, **_: torch.tensor(points, dtype=torch.float64).view(shape))
        flat = mst_rigl.draw(torch.tensor(priorities).float(), (len(points),)).tolist()
        rows = torch.tensor(priorities).float().expand(len(points), -1)
        assert mst_rigl.draw(rows, (len(points), 1))[:, 0].tolist() == flat
    for index, right, point in zip(flat, expected, points, strict=True):
        near = abs(float(Fraction(point) * sum(priorities)) - sum(priorities[: max(index, right)])) < 1e-9
        assert priorities[index] > 0 and (index == right or near)  # a point on the border may fall either way


def test_rows_are_drawn_in_proportion_to_their_priority_from_all_blocks():
    replay = ReplayBuffer(1100, 1, 1, CPU)  # the last block is not full
    torch.manual_seed(0)
    rows = torch.tensor([1, 2, 249, 250, 999, 1000, 1099])
    priority = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 5.0, 4.0])
    replay.update_priority(rows, priority)
    counts = torch.bincount(replay.sample_rows(20_000), minlength=1100)
    assert len(counts) == 1100 and counts.sum() == counts[rows].sum()
    np.testing.assert_allclose(counts[rows] / 20_000, priority / 20, atol=0.015)


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
def test_the_extreme_draws_fall_on_rows_that_may_be_sampled(point, monkeypatch):
    replay = ReplayBuffer(1100, 1, 1, CPU)
    replay.data["priority"][300:320], replay.data["priority"][560:777] = 1.3, 1.7
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, point, dtype=options["dtype"]))
    assert replay.sample_rows(3).tolist() == [300 if point == 0 else 776] * 3


def test_a_row_that_comes_twice_gets_its_largest_priority():
    replay = ReplayBuffer(50, 1, 1, CPU)
    replay.data["priority"][:10] = 9.0
    replay.update_priority(torch.tensor([3, 4, 3, 5, 3]), torch.tensor([1.0, 2.0, 7.0, 8.0, 4.0]))
    assert replay.data["priority"][:10].tolist() == [9, 9, 9, 7, 2, 8, 9, 9, 9, 9] and replay.max_priority == 8


def test_what_an_update_writes_stays_where_it_is():
    """So that an update can be one graph on a GPU: nothing is replaced by a new tensor, by no kind of update."""
    agent = filled_agent(rigl_every=1, target_update_every=2, encoder_regime="rigl", actor_regime="rigl")
    agent.update()

    def places() -> list[int]:
        tensors = [*agent.scales, agent.replay.max_priority, *agent.replay.data.values()]
        tensors += [p for group in (agent.networks, agent.targets) for net in group.values() for p in net.parameters()]
        tensors += [mask for topology in agent.topologies.values() for mask in topology.masks.values()]
        states = [state for optimizer in agent.optimizers.values() for state in optimizer.state.values()]
        return [tensor.data_ptr() for tensor in [*tensors, *(value for state in states for value in state.values())]]

    before, values = places(), (agent.scales[1].item(), agent.topologies["actor"].changed)
    for _ in range(3):
        agent.update()
    assert places() == before and values != (agent.scales[1].item(), agent.topologies["actor"].changed)


def test_new_steps_start_at_the_largest_priority_ever_given():
    agent = filled_agent()
    agent.replay.update_priority(torch.tensor([1]), torch.tensor([3.0]))
    agent.replay.update_priority(torch.tensor([1]), torch.tensor([2.0]))
    before = agent.replay.head
    for _ in range(8):
        agent.replay.add(
            np.ones(OBS_DIM, np.float32), np.ones(ACT_DIM, np.float32), 0.0, np.ones(OBS_DIM, np.float32), False, False
        )
    assert agent.replay.data["priority"][before : before + 8].tolist() == [3.0] * 3 + [0.0] * 5


def test_new_steps_start_at_the_largest_priority_after_a_resume_too():
    replay, other = (ReplayBuffer(50, 1, 1, CPU) for _ in range(2))
    replay.update_priority(torch.tensor([1]), torch.tensor([3.0]))
    other.load_state_dict(replay.state_dict())
    assert other.max_priority == 3


# ---------------------------------------------------------------------------------------------------------- topologies


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(shapes=shapes, sparsity=st.floats(0, 0.99))
def test_erdos_renyi_counts_are_exact_and_proportional(shapes, sparsity):
    counts, sizes = mst_rigl.erdos_renyi_counts(shapes, sparsity), [a * b for a, b in shapes]
    assert sum(counts) == round((1 - sparsity) * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    # literally: one epsilon, density = epsilon (n_in + n_out) / (n_in n_out), at most 1; bisect for it
    low, high = 0.0, 1e3
    for _ in range(200):
        epsilon = (low + high) / 2
        total = sum(min(epsilon * (a + b), a * b) for a, b in shapes)
        low, high = (epsilon, high) if total < sum(counts) else (low, epsilon)
    for count, (a, b) in zip(counts, shapes, strict=True):
        assert abs(count - min(low * (a + b), a * b)) <= 1 + 1e-6


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), columns=st.integers(1, 9), share=st.floats(0, 1))
def test_rigl_drops_and_grows_the_sets_of_a_literal_sort(seed, rows, columns, share):
    rng = np.random.default_rng(seed)
    size = rows * columns
    weight, gradient = rng.permutation(size) - size / 3 + 0.1, rng.permutation(size) - size / 2 + 0.1
    mask = rng.random(size) < 0.5
    count = int(share * mask.sum())
    active = [i for i in range(size) if mask[i]]
    kept = set(active) - set(sorted(active, key=lambda i: abs(weight[i]))[:count])
    candidates = sorted((i for i in range(size) if i not in kept), key=lambda i: -abs(gradient[i]))
    tensors = [torch.from_numpy(x).view(rows, columns) for x in (weight, gradient, mask)]
    result = mst_rigl.rigl_topology(*tensors, count)
    assert [set(m.flatten().nonzero()[:, 0].tolist()) for m in result] == [kept, set(candidates[:count])]


def test_the_moved_share_falls_along_a_cosine():
    shares = [mst_rigl.rigl_fraction(t, 100, 0.3) for t in (0, 25, 50, 75, 100)]
    assert shares == pytest.approx([0.3, 0.15 * (1 + math.sqrt(0.5)), 0.15, 0.15 * (1 - math.sqrt(0.5)), 0.0])


def literal_masks(topology, gradients: list, fraction: float) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By sorting: which connections RigL is to keep, and which there are to be afterwards."""
    masks = {}
    for i, mask in topology.masks.items():
        weight, gradient = topology.weights[i].abs().flatten().tolist(), gradients[i].abs().flatten().tolist()
        active = mask.flatten().nonzero()[:, 0].tolist()
        count = int(fraction * len(active))
        kept = set(sorted(active, key=lambda place: weight[place])[count:])
        rest = sorted(set(range(mask.numel())) - kept, key=lambda place: -gradient[place])
        sets = (sorted(kept), sorted(kept | set(rest[:count])))
        empty = torch.zeros(mask.numel(), dtype=torch.bool)
        masks[i] = tuple(empty.index_fill(0, torch.tensor(s), True).view_as(mask) for s in sets)
    return masks


def test_an_update_reads_the_dense_gradient_then_masks_it_then_clips_it():
    """One step of the critics at which the topology changes, against the same by hand."""
    agent = filled_agent(rigl_every=4, max_grad_norm=0.05)
    agent.copy_targets()
    for _ in range(3):
        agent.learn_critic_and_actor()
    critic, topology = agent.networks["critic"], agent.topologies["critic"]
    hand, optimizer = make_agent().networks["critic"], agent.optimizers["critic"]
    hand.load_state_dict(critic.state_dict())
    hand_optimizer = torch.optim.AdamW(hand.parameters(), lr=agent.args.critic_lr, weight_decay=agent.args.weight_decay)
    hand_optimizer.load_state_dict(json_like_copy(optimizer.state_dict()))
    zsa, target = torch.randn(16, 16), torch.randn(16, 1)
    mst_rigl.critic_loss(hand, zsa, target)[0].backward()
    weights = [layer.weight for layer in linear_layers(hand)]
    fraction = 0.15 * (1 + math.cos(math.pi * 4 / (0.75 * 300)))
    expected = literal_masks(topology, [weight.grad for weight in weights], fraction)
    before = {i: mask.clone() for i, mask in topology.masks.items()}
    with torch.no_grad():
        for i, (kept, mask) in expected.items():
            assert (mask & ~before[i]).any(), i
            moments = hand_optimizer.state[weights[i]]
            for tensor in (weights[i], moments["exp_avg"], moments["exp_avg_sq"]):
                tensor[~kept] = 0
            weights[i].grad[~mask] = 0
    torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.05)
    hand_optimizer.step()

    agent.backward["critic"](critic, zsa, target)
    agent.step("critic", agent.args.max_grad_norm)
    for i, (_, mask) in expected.items():
        assert torch.equal(topology.masks[i], mask), i
    for parameter, by_hand in zip(critic.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, by_hand.grad, atol=1e-8, rtol=1e-4)
        torch.testing.assert_close(parameter, by_hand, atol=1e-7, rtol=1e-5)
    changed = sum(int((expected[i][1] & ~before[i]).sum()) for i in before)
    assert topology.changed == pytest.approx(changed / sum(int(mask.sum()) for mask in before.values()))


def json_like_copy(state: dict) -> dict:
    """A deep copy of an optimizer's state, so that two optimizers share nothing."""
    moments = {i: {k: v.clone() for k, v in moment.items()} for i, moment in state["state"].items()}
    groups = [group | {"fused": False, "params": list(group["params"])} for group in state["param_groups"]]
    return {"state": moments, "param_groups": groups}


def test_a_connection_that_is_dropped_and_grown_again_starts_from_zero():
    layer = torch.nn.Linear(10, 10)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    topology = Topology([layer], optimizer, "rigl", 0.5, until=10_000, drop=0.02 * 2)  # one of the fifty
    layer(torch.randn(4, 10)).square().sum().backward()
    topology.before_step()
    optimizer.step()
    active = topology.masks[0].nonzero()
    smallest = min(active.tolist(), key=lambda ij: layer.weight[tuple(ij)].abs().item())
    layer.weight.grad = torch.zeros(10, 10)
    layer.weight.grad[tuple(smallest)] = 1.0
    topology.updates = 999
    topology.before_step()
    state = optimizer.state[layer.weight]
    assert topology.masks[0][tuple(smallest)] and topology.changed == 0
    for tensor in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
        assert tensor[tuple(smallest)] == 0


def test_topologies_change_at_every_interval_until_their_time_and_static_ones_never():
    for regime, expected in (("rigl", [3, 6, 9]), ("static", []), ("dense", [])):
        layer, changes = torch.nn.Linear(6, 6), []
        optimizer = torch.optim.AdamW(layer.parameters())
        topology = Topology([layer], optimizer, regime, 0.5, until=12, every=3)
        topology._move_connections = lambda fraction, changes=changes, t=topology: changes.append(t.updates)
        for _ in range(20):
            layer.weight.grad = torch.ones(6, 6)
            topology.before_step()
        assert changes == expected
        assert (layer.weight.grad == 0).sum() == (0 if regime == "dense" else 18)


def test_masks_are_random_and_targets_have_them_from_the_start():
    layers, targets = ([torch.nn.Linear(30, 30) for _ in range(2)] for _ in range(2))
    optimizer = torch.optim.AdamW(p for layer in layers for p in layer.parameters())
    masks = [Topology(layers, optimizer, "static", 0.5, until=0, targets=targets).masks[0] for _ in range(2)]
    assert 300 < (masks[0] ^ masks[1]).sum() < 600 and 150 < masks[0][:15].sum() < 300
    assert all((target.weight[~mask] == 0).all() for target, mask in zip(targets[:1], masks, strict=False))


def test_a_topology_may_change_at_the_very_first_update():
    agent = filled_agent(rigl_every=1, encoder_regime="rigl", actor_regime="rigl")
    agent.update()
    for topology in agent.topologies.values():
        assert topology.changed > 0.01
        assert any((mask != topology.initial[i]).any() for i, mask in topology.masks.items())


def test_a_layer_that_gets_all_its_weights_is_left_alone():
    agent = make_agent(actor_sparsity=0.2)
    assert list(agent.topologies["actor"].masks) == [0, 1]  # not the narrow output layer
    assert make_agent(critic_sparsity=0.0).sparsity()["sparsity/critic/overlap_with_initial"] == 1  # no layer has one
    counts = agent.parameter_counts()
    linear = [m.weight.numel() for m in agent.networks["actor"].modules() if isinstance(m, torch.nn.Linear)]
    assert counts["actor"] - counts["actor_active"] == sum(linear) - round(0.8 * sum(linear))


@pytest.mark.parametrize(("preset", "millions"), [("mst", 3.99), ("mst-362m", 351.7)])
def test_parameters_of_the_presets_on_dog_run(preset, millions):
    args = parse_args(Args, PRESETS, ["--preset", preset])
    with torch.device("meta"):
        networks = mst_rigl.build_networks(args, 223, 38)
    count = sum(p.numel() for net in networks.values() for p in net.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=2e-3)


def test_a_wide_and_deep_network_makes_a_step():
    """The block types, depth and regimes of --preset mst-362m, a sixteenth as wide."""
    agent = filled_agent(**(PRESETS["preset mst-362m"] | {"width_scale": 5 / 16, "target_update_every": 1}))
    before = [weight.clone() for _, weight in weights_of(agent)]
    agent.update()
    for (name, weight), old in zip(weights_of(agent), before, strict=True):
        assert weight.isfinite().all() and not torch.equal(weight, old), name


# -------------------------------------------------------------------------------------------- whole runs, a real task


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A whole run on Hopper whose topologies are checked after every update."""
    run_dir = tmp_path_factory.mktemp("mst_rigl") / "run"
    true_update, true_copy, true_action_of = Agent.update, Agent.copy_targets, mst_rigl.action_of
    masks, acted, warm_up, seeds = [], {"explore": [], "greedy": []}, [], []

    def action_of(encoder, actor, obs, noise=0.0):
        acted["explore" if noise else "greedy"].append(len(masks))  # updates so far
        assert noise in (0.0, Args.exploration_noise)
        return true_action_of(encoder, actor, obs, noise)

    def copy_targets(agent):
        true_copy(agent)
        for name, topology in agent.topologies.items():
            assert topology.masks or name == "encoder"
            for i, mask in topology.masks.items():  # a tensor of their own, not the networks'
                target = linear_layers(agent.targets[name])[i].weight
                assert (target[~mask] == 0).all() and target is not topology.weights[i]

    def update(agent):
        if agent.updates == 0:
            warm_up.append(agent.replay.data["action"][agent.replay.data["is_step"] > 0])
        true_update(agent)
        for name, topology in agent.topologies.items():
            for i, mask in topology.masks.items():
                weight, state = topology.weights[i], agent.optimizers[name].state[topology.weights[i]]
                for tensor in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]):
                    assert (tensor[~mask] == 0).all(), (agent.updates, name, i)
        masks.append({n: {i: m.clone() for i, m in t.masks.items()} for n, t in agent.topologies.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "update", update)
        patch.setattr(Agent, "copy_targets", copy_targets)
        patch.setattr(mst_rigl, "action_of", action_of)
        patch.setattr(mst_rigl, "seed_of", lambda *words: seeds.append(words) or seed_of(*words))
        patch.setattr(mst_rigl, "LOG_EVERY", 100)
        results = mst_rigl.main(Args(**TINY, run_dir=str(run_dir)))
    run = {"run_dir": run_dir, "results": results, "checkpoint": checkpoint_of(run_dir), "masks": masks}
    return run | {"acted": acted, "warm_up": warm_up[0], "seeds": seeds}


def results_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "results.json").read_text())


def checkpoint_of(run_dir: Path) -> dict:
    return load_checkpoint(str(run_dir), "mst_rigl")


def test_masks_keep_their_exact_counts_for_ever(finished_run):
    agent = make_agent(*env_sizes(TINY["env_id"]))
    for name in ("critic", "actor"):
        weights = [layer.weight for layer in agent.networks[name].modules() if isinstance(layer, torch.nn.Linear)]
        counts = mst_rigl.erdos_renyi_counts([tuple(weight.shape) for weight in weights], 0.6)
        sparse = {i: count for i, count in enumerate(counts) if count < weights[i].numel()}
        for masks in finished_run["masks"]:
            assert {i: int(mask.sum()) for i, mask in masks[name].items()} == sparse
        size = sum(weight.numel() for weight in weights)
        assert sum(counts) == round(0.4 * size)
        parameters = finished_run["results"]["parameters"]
        assert parameters[name] - parameters[f"{name}_active"] == size - round(0.4 * size)


def test_rigl_moves_the_critics_connections_and_nothing_moves_the_actors(finished_run):
    masks = finished_run["masks"]
    every, until = TINY["rigl_every"], int(0.75 * (TINY["total_steps"] - TINY["learning_starts"]))
    for update, (now, then) in enumerate(pairwise(masks), start=2):  # the first entry is after update 1
        moved = any(not torch.equal(now["critic"][key], then["critic"][key]) for key in now["critic"])
        assert moved == (update % every == 0 and update < until), update
    assert all(torch.equal(masks[0]["actor"][key], mask) for key, mask in masks[-1]["actor"].items())
    assert masks[0]["actor"] and masks[0]["encoder"] == {}
    metrics = finished_run["results"]["metrics"]
    for name, overlap in (("actor", 1.0), ("critic", None)):
        topology = finished_run["checkpoint"]["agent"]["topologies"][name]
        shared = sum(int((topology["initial"][key] & mask).sum()) for key, mask in masks[-1][name].items())
        share = shared / sum(int(mask.sum()) for mask in masks[-1][name].values())
        assert metrics[f"sparsity/{name}/overlap_with_initial"] == pytest.approx(share)
        assert share == overlap or (overlap is None and share < 1)


def test_it_acts_at_random_then_with_noise_and_without_in_evaluations(finished_run):
    updates = TINY["total_steps"] - TINY["learning_starts"]
    assert finished_run["acted"]["explore"] == list(range(updates))  # the steps before the first update are random
    actions = finished_run["warm_up"]
    assert len(actions) == TINY["learning_starts"] + 1  # and the first that is not
    assert actions.min() < -0.98 and actions.max() > 0.98 and abs(actions.mean()) < 0.15
    with open(finished_run["run_dir"] / "evaluations.csv", newline="") as file:
        lengths = [float(row["episode_length"]) * TINY["eval_episodes"] for row in csv.DictReader(file)]
    assert len(finished_run["acted"]["greedy"]) == sum(lengths)


def test_each_training_episode_has_a_seed_of_its_own(finished_run):
    episodes = len(finished_run["seeds"])
    assert finished_run["seeds"] == [(TINY["seed"], 1, 0, episode) for episode in range(episodes)] and episodes > 10
    assert finished_run["checkpoint"]["at"] == {"step": 400, "episode": episodes}
    env = make_env(TINY["env_id"], seed=0)
    first, _ = env.reset(seed=seed_of(TINY["seed"], 1, 0, episodes - 1))  # the last one, which the end of the run cut
    replay = finished_run["checkpoint"]["agent"]["replay"]
    row = (replay["head"] - replay["episode_steps"]) % TINY["buffer_size"]
    assert replay["episode_steps"] > 0 and torch.equal(replay["data"]["obs"][row], torch.from_numpy(first))


def test_a_dense_module_is_untouched_by_masks(finished_run):
    encoder = finished_run["checkpoint"]["agent"]["networks"]["encoder"]
    assert all((weight != 0).float().mean() > 0.99 for weight in encoder.values())
    assert finished_run["results"]["parameters"]["encoder"] == finished_run["results"]["parameters"]["encoder_active"]


def test_evaluations_start_elsewhere_than_training():
    """No start is both a training episode's and an evaluation's, whose first word after the seed is the stream."""
    assert len({mst_rigl.TRAIN_STARTS, mst_rigl.EVAL_STARTS}) == 2


def test_what_a_run_reports_is_what_its_files_and_masks_say(finished_run):
    results, topologies = finished_run["results"], finished_run["checkpoint"]["agent"]["topologies"]
    with open(finished_run["run_dir"] / "evaluations.csv", newline="") as file:
        returns = [float(row["episode_return"]) for row in csv.DictReader(file)]
    assert results["metrics"]["mean_return"] == pytest.approx(np.mean(returns)) and len(set(returns)) > 1
    for name in ("critic", "actor"):
        size = results["parameters"][name]
        missing = sum(int((~mask).sum()) for mask in topologies[name]["masks"].values())
        assert results["metrics"][f"sparsity/{name}/density"] == pytest.approx(1 - missing / size)


def test_the_last_observation_of_an_episode_is_the_one_that_it_ended_with(finished_run):
    """Not the one before, of which it would be a copy."""
    data = finished_run["checkpoint"]["agent"]["replay"]["data"]
    ends = (data["is_step"] == 0).nonzero()[:, 0]
    assert len(ends) > 5 and not (data["obs"][ends] == data["obs"][ends - 1]).all(1).any()


def test_the_reward_scale_in_the_log_is_the_one_in_use(finished_run):
    events = EventAccumulator(str(finished_run["run_dir"])).Reload()
    scales = finished_run["checkpoint"]["agent"]["scales"]
    [*_, last] = events.Scalars("method/reward_scale")  # one more copy of the targets came after it
    assert last.value == pytest.approx(scales[1].item()) and scales[0] != scales[1]


# -------------------------------------------------------------------------------------------------- the command line


def command_line(**options) -> list[str]:
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def start(*words, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "mst_rigl.py"), *words, *command_line(**options)]
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
    """Same weights, moments, masks, buffer, random states and evaluations, byte by byte, and the same metrics."""
    first, second = checkpoint_of(one), checkpoint_of(two)
    for checkpoint in (first, second):
        for name in ("seconds", "pace", "events"):  # of the clock and the file system
            del checkpoint["record"][name]
    assert_same_tensors(first, second)
    assert (one / "evaluations.csv").read_bytes() == (two / "evaluations.csv").read_bytes()
    results = [results_of(run) for run in (one, two)]
    for name in ("metrics", "tasks", "global_step", "parameters"):
        assert results[0][name] == results[1][name]


def test_the_command_leaves_every_file_and_ends_with_a_table(finished_run, tmp_path):
    run = start(**(TINY | {"run_dir": tmp_path / "run", "quiet": False}))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "final_return" in out and str(tmp_path / "run") in out.splitlines()[0]
    assert f"critic_active {results_of(tmp_path / 'run')['parameters']['critic_active']:,}" in out.splitlines()[0]
    assert "Warning" not in err
    assert (tmp_path / "run" / "summary.png").stat().st_size > 10_000
    results = results_of(tmp_path / "run")
    assert results["script"] == "mst_rigl" and results["global_step"] == TINY["total_steps"]
    assert results["tasks"][0]["final_return"] == results["metrics"]["final_return"]
    assert all(math.isfinite(value) for value in results["metrics"].values())
    with open(tmp_path / "run" / "evaluations.csv", newline="") as file:
        steps = [int(row["global_step"]) for row in csv.DictReader(file)]
    assert len(steps) == 3 and 150 <= steps[0] < 300 <= steps[1] < steps[2] == 400
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    # a subprocess and a call of main are the same run
    assert_same_run(tmp_path / "run", finished_run["run_dir"])


def test_tensorboard_has_the_named_scalars(finished_run):
    events = EventAccumulator(str(finished_run["run_dir"])).Reload()
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/return/Hopper-v5"}
    expected |= {"method/reward_scale"}
    expected |= {f"losses/{name}" for name in ("encoder", "dynamics", "reward", "done", "critic", "q", "actor")}
    names = {*metrics.DORMANT_TAUS, "active_fraction", "srank", "stable_rank", "effective_rank"}
    names |= {"weight_norm", "grad_norm"}
    for module in ("encoder", "critic", "actor"):
        expected |= {f"plasticity/{module}/{name}" for name in names}
        if module != "encoder":
            expected |= {f"sparsity/{module}/{name}" for name in ("density", "changed", "overlap_with_initial")}
    assert set(events.Tags()["scalars"]) == expected
    for tag in expected:
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    # a return for each episode that ended, none for the one that the end of the run cut
    data = finished_run["checkpoint"]["agent"]["replay"]["data"]
    assert data["is_step"][(finished_run["checkpoint"]["agent"]["replay"]["head"] - 1) % TINY["buffer_size"]]
    assert events.Scalars("charts/episodic_return")[-1].step < TINY["total_steps"]


def test_episodes_that_are_too_short_for_the_encoder_are_refused(tmp_path):
    options = TINY | {"env_id": "dmc/cartpole-swingup", "action_repeat": 250, "run_dir": str(tmp_path / "run")}
    options |= {"learning_starts": 20}
    with pytest.raises(ArgumentError, match="--action-repeat 250: no episode has 5 agent steps"):
        mst_rigl.main(Args(**options))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_limit_below_the_encoders_horizon_is_refused_before_anything_is_written(tmp_path):
    options = TINY | {"run_dir": str(tmp_path / "run")}
    for repeat, fewest in ((1, 5), (3, 13)):
        with pytest.raises(ArgumentError, match=f"--max-episode-steps {fewest - 1}: must be at least {fewest}: "):
            mst_rigl.main(Args(**options, action_repeat=repeat, max_episode_steps=fewest - 1))
    assert not (tmp_path / "run").exists()
    env, steps = mst_rigl.make_env("Hopper-v5", action_repeat=3, max_episode_steps=13), 0
    env.reset(seed=1)
    while not any(env.step(np.zeros(3, np.float32))[2:4]):
        steps += 1
    assert steps + 1 == mst_rigl.ENCODER_HORIZON  # 13 is enough
    env.close()


def test_a_buffer_that_holds_short_episodes_only_is_one_line(tmp_path, monkeypatch):
    """Episodes that terminate can be learned from; once they last to a time limit of four steps, none can."""

    class Short(gym.Wrapper):
        episodes = 0

        def reset(self, **options):
            self.steps, Short.episodes = 0, Short.episodes + 1
            return self.env.reset(**options)

        def step(self, action):
            obs, reward, *_ = self.env.step(action)
            self.steps += 1
            ends = self.steps == 4
            return obs, reward, ends and Short.episodes < 60, ends and Short.episodes >= 60, {}

    make_env = mst_rigl.make_env
    monkeypatch.setattr(mst_rigl, "make_env", lambda *args, **options: Short(make_env(*args, **options)))
    with pytest.raises(ArgumentError, match="no episode has 5 agent steps"):
        mst_rigl.main(Args(**(TINY | {"total_steps": 2000, "eval_every": 2000}), run_dir=str(tmp_path / "run")))
    assert load_checkpoint(str(tmp_path / "run"), "mst_rigl")["at"]["step"] == 0


def test_a_layer_without_connections_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"--critic-sparsity 0\.9999: must be lower: a layer of the critic gets no"):
        mst_rigl.main(Args(**TINY, critic_sparsity=0.9999, run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize(("every", "modules"), [(224, []), (225, ["critic"])])
def test_a_topology_that_will_never_change_is_said(tmp_path, monkeypatch, every, modules):
    said = []
    monkeypatch.setattr(mst_rigl.Recorder, "say", lambda _, line: said.append(line))
    monkeypatch.setattr(Agent, "update", lambda agent: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mst_rigl.main(Args(**(TINY | {"rigl_every": every}), run_dir=str(tmp_path / "run")))
    assert [re.search(r"warning: the (\w+)'s", line)[1] for line in said if "never changes" in line] == modules


@pytest.mark.parametrize(("capabilities", "warned"), [({"amx_bf16": False}, True), ({"avx512_bf16": True}, False)])
def test_bfloat16_on_a_processor_without_it_is_warned_about(tmp_path, monkeypatch, capabilities, warned):
    said = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | capabilities)
    monkeypatch.setattr(mst_rigl.Recorder, "say", lambda _, line: said.append(line))
    monkeypatch.setattr(Agent, "update", lambda agent: (_ for _ in ()).throw(KeyboardInterrupt))
    for bf16 in (False, True):
        said.clear()
        with pytest.raises(KeyboardInterrupt):
            mst_rigl.main(Args(**TINY, bf16=bf16, run_dir=str(tmp_path / str(bf16))))
        assert any("--bf16: this cpu device has no bfloat16" in line for line in said) == (bf16 and warned)


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(finished_run, tmp_path):
    run_dir, rng = tmp_path / "run", np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    run, kills = start(**(TINY | {"run_dir": run_dir, "checkpoint_every": 50})), 0
    while True:
        if kills < 3:  # at a random moment after its next checkpoint
            checkpoint, before = run_dir / "checkpoint.pt", time.time_ns()
            while run.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
                time.sleep(0.01)
        try:
            run.communicate(timeout=rng.uniform(0, 0.5) if kills < 3 else 300)
            break
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL if kills % 2 == 0 else signal.SIGTERM)
            _, err = run.communicate(timeout=60)
            assert run.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), err
            kills += 1
            run = start("--resume", str(run_dir))
    assert run.returncode == 0 and kills == 3
    assert_same_run(run_dir, finished_run["run_dir"])


@pytest.mark.parametrize("moment", ["training", "last evaluation"])
def test_interrupted_it_saves_and_goes_on_to_the_same_bytes(finished_run, tmp_path, monkeypatch, moment):
    calls = {"update": 0, "evaluate": 0}
    true_update, true_evaluate = Agent.update, metrics.evaluate

    def update(agent):
        calls["update"] += 1
        if moment == "training" and calls["update"] == 170:
            os.kill(os.getpid(), signal.SIGTERM)
        true_update(agent)

    def evaluate(*arguments):
        calls["evaluate"] += 1
        if moment == "last evaluation" and calls["evaluate"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_evaluate(*arguments)

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(metrics, "evaluate", evaluate)
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted) as leaving:
        mst_rigl.main(Args(**TINY, run_dir=str(run_dir)))
    assert leaving.value.exit_code == 128 + signal.SIGTERM
    assert f"python mst_rigl.py --resume {run_dir}" in str(leaving.value)
    assert checkpoint_of(run_dir)["agent"]["replay"]["episode_steps"] == 0 or moment == "last evaluation"
    mst_rigl.main(Args(**TINY, run_dir=str(run_dir), resume=str(run_dir)))
    assert_same_run(run_dir, finished_run["run_dir"])


def test_a_run_killed_before_its_results_were_written_ends_on_resume(finished_run, tmp_path, monkeypatch):
    """And the loaded replay buffer is gone once it is copied into the agent's."""
    run_dir = shutil.copytree(finished_run["run_dir"], tmp_path / "run")
    (run_dir / "results.json").unlink()
    true_load, true_plasticity, loaded, alive = cli.load_checkpoint, Agent.plasticity, [], []

    def load(*arguments):
        checkpoint = true_load(*arguments)
        loaded.append(weakref.ref(checkpoint["agent"]["replay"]["data"]["obs"]))
        return checkpoint

    monkeypatch.setattr(cli, "load_checkpoint", load)
    monkeypatch.setattr(Agent, "plasticity", lambda agent: alive.append(loaded[0]()) or true_plasticity(agent))
    mst_rigl.main(Args(**TINY, run_dir=str(finished_run["run_dir"]), resume=str(run_dir)))
    assert alive == [None]
    assert_same_run(run_dir, finished_run["run_dir"])


def test_dm_control_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """An action repeat, episodes that are truncated only: after 125 steps."""
    options = TINY | {"env_id": "dmc/cartpole-swingup", "action_repeat": 8}
    options |= {"total_steps": 300, "eval_every": 125, "learning_starts": 210}
    whole, broken, calls = tmp_path / "whole", tmp_path / "broken", []
    mst_rigl.main(Args(**options, run_dir=str(whole)))
    true_update = Agent.update

    def update(agent):
        calls.append(None)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        true_update(agent)

    monkeypatch.setattr(Agent, "update", update)
    with pytest.raises(Interrupted):
        mst_rigl.main(Args(**options, run_dir=str(broken)))
    checkpoint = checkpoint_of(broken)
    assert checkpoint["at"]["step"] == 250 and not checkpoint["agent"]["replay"]["terminates"]
    mst_rigl.main(Args(**options, run_dir=str(broken), resume=str(broken)))
    assert_same_run(broken, whole)


BAD_ARGUMENTS = {
    "unknown task": (["--env-id", "dmc/cartpole-swing"], r"--env-id dmc/cartpole-swing: .*dmc/cartpole-swingup"),
    "regime": (["--actor-regime", "set"], r"--actor-regime.*dense.*static.*rigl"),
    "sparsity": (["--critic-sparsity", "1"], r"--critic-sparsity 1\.0: must be at least 0 and below 1"),
    "no steps": (["--total-timesteps", "0"], r"--total-steps 0: must be at least 1"),
    "warm-up": (["--total-steps", "5000"], r"--learning-starts 10000: must be below --total-steps 5000"),
    "small buffer": (["--buffer-size", "10"], r"--buffer-size 10: must be above 10"),
    "nothing to resume": (["--resume", "nothing"], r"nothing: no readable run"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_2(case, monkeypatch, capsys, tmp_path):
    words, expected = BAD_ARGUMENTS[case]
    assert_refused(
        words if "--env-id" in words else [*words, "--env-id", TINY["env_id"]], expected, monkeypatch, capsys, tmp_path
    )


def assert_refused(words: list[str], expected: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["mst_rigl.py", *words])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as leaving:
        cli.run(mst_rigl.main, Args, PRESETS)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.search(expected, err) and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.iterdir()) == before  # no folder is left behind


def test_a_contradiction_on_resume_gives_one_line_and_exit_2(finished_run, monkeypatch, capsys, tmp_path):
    words = ["--resume", str(finished_run["run_dir"]), "--rigl-every", "70"]
    assert_refused(words, r"--rigl-every 70: contradicts.*60", monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("words", [["--preset", "mrq"], ["--preset=mrq"]])
def test_a_preset_sets_defaults_and_what_is_typed_wins(words):
    args = parse_args(Args, PRESETS, [*words, "--actor-regime", "rigl"])
    assert (args.encoder_type, args.critic_type, args.actor_type) == (4, 4, 3)
    assert (args.encoder_regime, args.critic_regime, args.actor_regime) == ("dense", "dense", "rigl")
    assert args.preset == "mrq" and args == cli.prepare(Args(preset="mrq", actor_regime="rigl"), "mst_rigl", PRESETS)[0]
    large = parse_args(Args, PRESETS, ["--preset", "mst-362m", "--depth-scale", "5"])
    assert (large.width_scale, large.depth_scale, large.critic_regime, large.encoder_type) == (5, 5, "rigl", 6)
    quick = parse_args(Args, PRESETS, ["--quick", "--preset", "mrq", "--seed", "3"])
    assert (quick.env_id, quick.critic_regime, quick.seed) == ("InvertedPendulum-v5", "dense", 3)
    mst = Args()
    assert (mst.encoder_type, mst.critic_type, mst.actor_type) == (6, 4, 5)
    assert (mst.encoder_regime, mst.critic_regime, mst.actor_regime) == ("dense", "rigl", "static")


def test_help_names_every_argument():
    out, _ = start("--help").communicate(timeout=60)
    for name in Args.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out


def test_resuming_a_finished_run_returns_its_result(finished_run, tmp_path):
    run_dir = shutil.copytree(finished_run["run_dir"], tmp_path / "run")
    result = mst_rigl.main(Args(**TINY, resume=str(run_dir)))
    assert result == finished_run["results"] | {"run_dir": str(run_dir)}
    assert_same_run(run_dir, finished_run["run_dir"])


def test_evaluate_gives_the_last_evaluation_of_the_run(finished_run, capsys):
    """Same policy, same episodes, same numbers; nothing in the folder changes."""
    run_dir = finished_run["run_dir"]
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    result = mst_rigl.main(Args(evaluate=str(run_dir), episodes=TINY["eval_episodes"]))
    assert result["episode_return"] == finished_run["results"]["tasks"][0]["final_return"]
    assert TINY["env_id"] in capsys.readouterr().out
    assert mst_rigl.main(Args(evaluate=str(run_dir), episodes=1, quiet=True)) and capsys.readouterr().out == ""
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before


def test_a_stored_policy_plays_as_the_agent_did_and_nothing_else_is_built(finished_run, monkeypatch):
    agent, random_state = make_agent(*env_sizes(TINY["env_id"])), torch.get_rng_state()
    for name in ("Agent", "ReplayBuffer", "make_env"):
        monkeypatch.setattr(mst_rigl, name, None)
    policy = mst_rigl.load_policy(str(finished_run["run_dir"]))
    for name, module in agent.networks.items():
        module.load_state_dict(finished_run["checkpoint"]["agent"]["networks"][name])
    obs = np.random.default_rng(0).standard_normal(11).astype(np.float16)
    for kind in (np.float16, np.float32, np.float64):
        action = policy(obs.astype(kind))
        assert action.dtype == np.float32 and np.array_equal(action, agent.act(obs.astype(np.float32)))
    encoder, actor = policy.args
    assert encoder.model.weight.device == actor[-1].weight.device == CPU
    assert torch.equal(torch.get_rng_state(), random_state)


def test_evaluating_more_often_changes_nothing_in_training(finished_run, tmp_path):
    mst_rigl.main(Args(**(TINY | {"eval_every": 60, "eval_episodes": 2}), run_dir=str(tmp_path / "run")))
    often, seldom = checkpoint_of(tmp_path / "run"), finished_run["checkpoint"]
    assert len(often["record"]["rows"]) > len(seldom["record"]["rows"])
    assert_same_tensors(often["agent"], seldom["agent"])
    assert_same_tensors(often["random"], seldom["random"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("action", "action is not finite at step 251"),
        ("loss", "losses/q is not finite at step 150"),  # at update 50
        ("weight", r"encoder\.model\.weight is not finite at step 2[2-4]\d"),  # at the end of an episode
    ],
)
def test_what_is_not_finite_stops_with_exit_1_and_keeps_the_good_checkpoint(
    what, message, tmp_path, monkeypatch, capsys
):
    true_update = Agent.update

    def update(agent):
        if what == "action" and agent.updates == 150:
            agent.networks["actor"][-1].bias.data.fill_(math.nan)
        true_update(agent)
        if what == "loss":
            agent.losses["q"] = torch.tensor(math.nan)
        elif what == "weight" and agent.updates == 120:  # the encoder's loss comes at updates 101 and 151
            agent.networks["encoder"].model.weight.data.fill_(math.nan)

    monkeypatch.setattr(Agent, "update", update)
    monkeypatch.setattr(mst_rigl, "LOG_EVERY", 100)
    options = TINY | {"run_dir": tmp_path / "run", "checkpoint_every": 10 if what == "weight" else 0}
    monkeypatch.setattr("sys.argv", ["mst_rigl.py", *command_line(**options)])
    with pytest.raises(SystemExit) as leaving:
        cli.run(mst_rigl.main, Args)
    err = capsys.readouterr().err
    assert leaving.value.code == 1 and err.count("\n") == 1
    assert re.search(message, err) and str(tmp_path) in err
    checkpoint = checkpoint_of(tmp_path / "run")
    assert checkpoint["record"]["global_step"] <= (220 if what == "weight" else 0)
    assert all(weight.isfinite().all() for net in checkpoint["agent"]["networks"].values() for weight in net.values())


@pytest.mark.slow
def test_the_quick_run_learns_to_balance_a_pendulum(tmp_path, monkeypatch):
    """Random actions drop it after six steps, a policy that is never trained after three: far below the bar."""
    true_evaluate, returns = metrics.evaluate, []

    def evaluate(*arguments):
        result = true_evaluate(*arguments)
        returns.append(result["episode_return"])
        if returns[-1] > 200:  # over the bar: no need to train on
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    with contextlib.suppress(Interrupted):
        mst_rigl.main(Args(quick=True, seed=2, quiet=True, run_dir=str(tmp_path / "run")))
    assert max(returns) > 200, returns
