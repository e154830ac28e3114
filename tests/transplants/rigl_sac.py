"""RigL inside somebody else's SAC: a plain script with a buffer and names of its own, and seven lines for the method.

    python tests/transplants/rigl_sac.py

The critics' connections move (RigL), the actor's stay where they are (static). `# MST` marks what was added.
"""

import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from lifting import lift

rigl = lift("mst_rigl")  # MST: in a project of your own the block stands here, between the imports and the networks

LOG_STD_MIN, LOG_STD_MAX = -5, 2


class PointMass:
    """A point on a plane that is pushed to a goal: observation (position, goal), reward minus the distance."""

    def reset(self):
        self.t, self.x, self.goal = 0, np.random.uniform(-1, 1, 2), np.random.uniform(-1, 1, 2)
        return np.concatenate([self.x, self.goal]).astype(np.float32)

    def step(self, action):
        self.t, self.x = self.t + 1, np.clip(self.x + 0.2 * action, -1, 1)
        reward = -np.linalg.norm(self.x - self.goal)
        return np.concatenate([self.x, self.goal]).astype(np.float32), reward, self.t == 20


class SoftQNetwork(nn.Module):
    def __init__(self, obs_dim=4, act_dim=2):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim + act_dim, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 1)

    def forward(self, x, a):
        x = torch.cat([x, a], 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Actor(nn.Module):
    def __init__(self, obs_dim=4, act_dim=2):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc_mean = nn.Linear(64, act_dim)
        self.fc_logstd = nn.Linear(64, act_dim)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        log_std = torch.tanh(self.fc_logstd(x))
        return self.fc_mean(x), LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std + 1)

    def get_action(self, x):
        mean, log_std = self(x)
        normal = torch.distributions.Normal(mean, log_std.exp())
        x_t = normal.rsample()
        action = torch.tanh(x_t)
        log_prob = normal.log_prob(x_t) - torch.log(1 - action.pow(2) + 1e-6)
        return action, log_prob.sum(1, keepdim=True)


def train(
    seed=1, total_timesteps=2500, learning_starts=500, batch_size=64, gamma=0.9, tau=0.01, alpha=0.05, watch=None
):
    """Train; -> the returns of all episodes. watch: called after each update with the local variables."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    env, rb, returns = PointMass(), [], [0.0]
    actor, qf1, qf2, qf1_target, qf2_target = Actor(), *(SoftQNetwork() for _ in range(4))
    qf1_target.load_state_dict(qf1.state_dict())
    qf2_target.load_state_dict(qf2.state_dict())
    q_optimizer = optim.Adam(list(qf1.parameters()) + list(qf2.parameters()), lr=1e-3)
    actor_optimizer = optim.Adam(list(actor.parameters()), lr=1e-3)

    # MST: each critic's layers beside those of its target
    q_layers = [layer for qf in (qf1, qf2) for layer in (qf.fc1, qf.fc2, qf.fc3)]
    target_layers = [layer for qf in (qf1_target, qf2_target) for layer in (qf.fc1, qf.fc2, qf.fc3)]
    q_topology = rigl.Topology(q_layers, q_optimizer, "rigl", 0.6, until=1500, every=100, targets=target_layers)
    actor_layers = [actor.fc1, actor.fc2, actor.fc_mean, actor.fc_logstd]
    actor_topology = rigl.Topology(actor_layers, actor_optimizer, "static", 0.6, until=0)

    obs = env.reset()
    for global_step in range(total_timesteps):
        if global_step < learning_starts:
            action = np.random.uniform(-1, 1, 2)
        else:
            action = actor.get_action(torch.tensor(obs[None]))[0][0].detach().numpy()
        next_obs, reward, done = env.step(action)
        rb.append((obs, np.float32(action), np.float32(reward), next_obs))
        returns[-1] += reward
        obs = next_obs
        if done:
            obs = env.reset()
            returns.append(0.0)

        if global_step > learning_starts:
            columns = zip(*random.sample(rb, batch_size), strict=True)
            s, a, r, s2 = (torch.tensor(np.array(column)) for column in columns)
            with torch.no_grad():
                a2, log_pi2 = actor.get_action(s2)
                min_qf_next_target = torch.min(qf1_target(s2, a2), qf2_target(s2, a2)) - alpha * log_pi2
                next_q_value = r[:, None] + gamma * min_qf_next_target
            qf_loss = F.mse_loss(qf1(s, a), next_q_value) + F.mse_loss(qf2(s, a), next_q_value)
            q_optimizer.zero_grad()
            qf_loss.backward()
            q_topology.before_step()  # MST
            q_optimizer.step()

            pi, log_pi = actor.get_action(s)
            actor_loss = (alpha * log_pi - torch.min(qf1(s, pi), qf2(s, pi))).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_topology.before_step()  # MST
            actor_optimizer.step()

            for qf, qf_target in ((qf1, qf1_target), (qf2, qf2_target)):
                for param, target_param in zip(qf.parameters(), qf_target.parameters(), strict=True):
                    target_param.data.copy_(tau * param.data + (1 - tau) * target_param.data)
            if watch:
                watch(locals())
    return returns[:-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    episodes = train()
    first, last = np.mean(episodes[:25]), np.mean(episodes[-25:])
    print(f"{len(episodes)} episodes: return {first:.1f} at random, {last:.1f} at the end")
