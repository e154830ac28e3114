"""MR.Q against its authors' numbers, MST's topologies against literal versions, and their promises on real runs."""

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

import mst_rigl
from common.recorder import Interrupted, load_checkpoint, parse_args
from mst_rigl import Actor, Agent, Args, Block, Critic, Encoder, ReplayBuffer, Topology

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
OBS_DIM, ACT_DIM = 5, 2
MODULES = ("encoder", "critic", "actor")

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
        encoder = Encoder(OBS_DIM, ACT_DIM, *latent, hp["enc_hdim"], mst_rigl.ENCODER_BLOCKS, 4)
        critic = Critic(hp["zsa_dim"], hp["value_hdim"], mst_rigl.CRITIC_BLOCKS, 4)
        actor = Actor(hp["zs_dim"], ACT_DIM, hp["policy_hdim"], mst_rigl.ACTOR_BLOCKS, 3)
        nets.append({"encoder": encoder, "critic": critic, "actor": actor})
        for module, theirs in zip(nets[-1].values(), ("encoder", "value", "policy"), strict=True):
            module.load_state_dict(their_weights(authors, module, theirs + suffix))
    return nets[0], nets[1]


def authors_agent(authors: dict) -> Agent:
    """An agent with the arguments of --preset mrq, its networks, optimizers and topologies those of the fixture."""
    args = Args(**mst_rigl.PRESETS["preset mrq"], total_steps=20_000, buffer_size=20)
    agent = Agent(args, OBS_DIM, ACT_DIM, CPU)
    agent.networks, agent.targets = tiny_mrq(authors)
    for name, module in agent.networks.items():
        lr = getattr(args, f"{name}_lr")
        agent.optimizers[name] = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=args.weight_decay)
        agent.topologies[name] = Topology(module, agent.optimizers[name], "dense", 0.0)
    agent.scales = tuple(torch.tensor(authors["meta"][name]) for name in ("reward_scale", "target_reward_scale"))
    return agent


def encoder_batch(authors: dict) -> dict[str, torch.Tensor]:
    obs = torch.cat([authors["enc_state"][:, :1], authors["enc_next_state"]], 1)
    flat = {name: authors[f"enc_{name}"][..., 0] for name in ("reward", "not_done")}
    return {"obs": obs, "action": authors["enc_action"]} | flat


def rl_batch(authors: dict) -> dict[str, torch.Tensor]:
    flat = {name: authors[f"rl_{name}"][..., 0] for name in ("reward", "not_done")}
    plain = {"obs": authors["rl_state"], "next_obs": authors["rl_next_state"], "action": authors["rl_action"]}
    return plain | flat


close = pytest.importorskip("functools").partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("terminates", [True, False])
def test_encoder_loss_and_gradients_are_the_authors(authors, terminates):
    nets, targets = tiny_mrq(authors)
    loss = mst_rigl.encoder_loss(nets["encoder"], targets["encoder"], encoder_batch(authors), terminates)[0]
    close(loss, authors["loss.encoder_loss_" + ("terminating" if terminates else "non_terminating")])
    if terminates:
        loss.backward()
        expected = their_weights(authors, nets["encoder"], "after_encoder_step.grad")
        for name, parameter in nets["encoder"].named_parameters():
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
    scales = (torch.tensor(meta["reward_scale"]), torch.tensor(meta["target_reward_scale"]))
    noise = (meta["target_policy_noise"], meta["noise_clip"])
    close(mst_rigl.td_target(targets, batch, meta["discount"], noise, scales), authors["rl_q_target"])


def test_one_update_of_critic_and_actor_is_the_authors(authors, monkeypatch):
    """Losses, priorities, and the weights after a step of the critics and the step of the actor that follows it."""
    agent, priorities = authors_agent(authors), {}
    monkeypatch.setattr(torch, "randn_like", lambda _: authors["rl_target_noise"])
    monkeypatch.setattr(agent.replay, "transitions", lambda _: rl_batch(authors))
    monkeypatch.setattr(agent.replay, "update_priority", lambda rows, priority: priorities.update(now=priority))
    agent.update_critic_and_actor(torch.arange(6))
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
    args, meta = Args(**mst_rigl.PRESETS["preset mrq"]), authors["meta"]
    assert (args.gamma, args.noise_clip, args.target_noise) == tuple(
        meta[name] for name in ("discount", "noise_clip", "target_policy_noise")
    )
    assert (args.encoder_lr, args.critic_lr, args.actor_lr) == tuple(meta[f"{m}_lr"] for m in ("enc", "value", "policy"))
    assert {args.weight_decay} == {meta[f"{module}_wd"] for module in ("enc", "value", "policy")}
    assert args.max_grad_norm == meta["value_grad_clip"]
    assert (args.batch_size, args.buffer_size, args.target_update, args.learning_starts) == (256, 10**6, 250, 10**4)
