"""RigL and static sparse training inside somebody else's TD3, module by module as in MST.

    python tests/transplants/rigl_td3.py

A plain script on Pendulum-v1 with a buffer and names of its own. `# MST` marks what was added.
"""

import copy

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from lifting import lift

rigl = lift("mst_rigl")  # MST: in a project of your own the block stands here, between the imports and the networks


class QNetwork(nn.Module):
    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.l1 = nn.Linear(obs_dim + act_dim, 64)
        self.l2 = nn.Linear(64, 64, bias=False)
        self.l3 = nn.Linear(64, 1)

    def forward(self, obs, act):
        x = F.relu(self.l1(torch.cat([obs, act], 1)))
        return self.l3(F.relu(F.layer_norm(self.l2(x), (64,))))


class Actor(nn.Module):
    def __init__(self, obs_dim, act_dim, max_action):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(obs_dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.fc_mu = nn.Linear(64, act_dim)
        self.max_action = max_action

    def forward(self, obs):
        return self.max_action * torch.tanh(self.fc_mu(self.layers(obs)))


class Buffer:
    def __init__(self, size, obs_dim, act_dim):
        self.obs, self.next_obs = np.zeros((size, obs_dim), np.float32), np.zeros((size, obs_dim), np.float32)
        self.act, self.rew = np.zeros((size, act_dim), np.float32), np.zeros((size, 1), np.float32)
        self.pos = 0

    def store(self, obs, act, rew, next_obs):
        i, self.pos = self.pos, self.pos + 1
        self.obs[i], self.act[i], self.rew[i], self.next_obs[i] = obs, act, rew, next_obs

    def sample(self, n):
        rows = np.random.randint(self.pos, size=n)
        return (torch.from_numpy(column[rows]) for column in (self.obs, self.act, self.rew, self.next_obs))


def train(critic_regime="rigl", actor_regime="static", seed=1, steps=4000, start_steps=500, batch=64, watch=None):
    """Train; -> the returns of all episodes. watch: called after each update with the local variables."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    env = gym.make("Pendulum-v1", max_episode_steps=100)
    env.action_space.seed(seed)
    obs_dim, act_dim, max_action = 3, 1, 2.0
    buf, returns = Buffer(steps, obs_dim, act_dim), [0.0]
    actor, q1, q2 = Actor(obs_dim, act_dim, max_action), QNetwork(obs_dim, act_dim), QNetwork(obs_dim, act_dim)
    actor_targ, q1_targ, q2_targ = copy.deepcopy(actor), copy.deepcopy(q1), copy.deepcopy(q2)
    q1_opt, q2_opt = (torch.optim.AdamW(q.parameters(), lr=1e-3, weight_decay=1e-2) for q in (q1, q2))
    pi_opt = torch.optim.Adam(actor.parameters(), lr=1e-3)

    # MST: a topology for each network; the actor is updated half as often
    moves = {"until": int(0.75 * (steps - start_steps)), "every": 100, "drop": 0.3}
    topologies = {
        q: rigl.Topology([q.l1, q.l2, q.l3], opt, critic_regime, 0.6, targets=[targ.l1, targ.l2, targ.l3], **moves)
        for q, targ, opt in ((q1, q1_targ, q1_opt), (q2, q2_targ, q2_opt))
    }
    layers, targets = ([pi.layers[0], pi.layers[2], pi.fc_mu] for pi in (actor, actor_targ))
    moves["until"] //= 2
    topologies[actor] = rigl.Topology(layers, pi_opt, actor_regime, 0.6, targets=targets, **moves)

    obs, _ = env.reset(seed=seed)
    for t in range(steps):
        with torch.no_grad():
            act = actor(torch.as_tensor(obs[None]))[0].numpy() + 0.2 * np.random.randn(act_dim)
        act = np.clip(act, -max_action, max_action) if t >= start_steps else env.action_space.sample()
        next_obs, rew, terminated, truncated, _ = env.step(act.astype(np.float32))
        buf.store(obs, act, rew / 10, next_obs)
        returns[-1] += float(rew)
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
            returns.append(0.0)

        if t >= start_steps:
            o, a, r, o2 = buf.sample(batch)
            with torch.no_grad():
                noise = (0.4 * torch.randn_like(a)).clamp(-0.8, 0.8)
                a2 = (actor_targ(o2) + noise).clamp(-max_action, max_action)
                backup = r + 0.98 * torch.min(q1_targ(o2, a2), q2_targ(o2, a2))
            for q, opt in ((q1, q1_opt), (q2, q2_opt)):
                opt.zero_grad()
                F.mse_loss(q(o, a), backup).backward()
                topologies[q].before_step()  # MST
                nn.utils.clip_grad_norm_(q.parameters(), 10.0)
                opt.step()
            if t % 2 == 0:
                pi_opt.zero_grad()
                (-q1(o, actor(o)).mean()).backward()
                topologies[actor].before_step()  # MST
                pi_opt.step()
                for net, targ in ((actor, actor_targ), (q1, q1_targ), (q2, q2_targ)):
                    for p, p_targ in zip(net.parameters(), targ.parameters(), strict=True):
                        p_targ.data.mul_(0.99).add_(0.01 * p.data)
            if watch:
                watch(locals())
    env.close()
    return returns[:-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    episodes = train()
    first, last = np.mean(episodes[:5]), np.mean(episodes[-5:])
    print(f"{len(episodes)} episodes: return {first:.0f} at random, {last:.0f} at the end")
