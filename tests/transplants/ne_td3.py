# ruff: noqa: B023 (the functions below are called in the loop's same turn)
"""Somebody else's TD3, in the idiom of CleanRL, on a toy cart. The lines marked "# NE" are ours.

    python tests/transplants/ne_td3.py

It prints how the networks grew and what the policy earns.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from lifting import lift

ne = lift("neuroplastic_expansion", 1)  # NE: what the docstring of neuroplastic_expansion.py says to copy, with review


@dataclass
class Args:
    seed: int = 1
    total_timesteps: int = 1700
    learning_starts: int = 200
    learning_rate: float = 1e-3
    buffer_size: int = 2000
    batch_size: int = 64
    gamma: float = 0.9
    tau: float = 0.01
    exploration_noise: float = 0.2
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    policy_frequency: int = 2
    hidden: int = 32
    topology_every: int = 50
    prune_limit: float = 0.4
    dormant_threshold: float = 0.1
    review_every: int = 50


class CartEnv:
    """A cart on a line: it sees its position, its speed and a goal, and is paid minus the distance to the goal."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def reset(self):
        self.x, self.v, self.goal, self.t = 0.0, 0.0, self.rng.uniform(-1, 1), 0
        return np.array([self.x, self.v, self.goal], np.float32)

    def step(self, action):
        self.v = 0.8 * self.v + 0.2 * float(action[0])
        self.x, self.t = self.x + 0.3 * self.v, self.t + 1
        return np.array([self.x, self.v, self.goal], np.float32), -abs(self.x - self.goal), self.t == 30


class ReplayBuffer:
    def __init__(self, size):
        self.rows, self.size, self.pos = [], size, 0

    def add(self, *row):
        self.rows[self.pos : self.pos + 1] = [row]
        self.pos = (self.pos + 1) % self.size

    def sample(self, n, oldest=1.0):  # NE: the share of the buffer, oldest first
        start = self.pos if len(self.rows) == self.size else 0
        picks = np.random.randint(0, max(1, int(oldest * len(self.rows))), n)
        batch = zip(*(self.rows[(start + i) % self.size] for i in picks), strict=True)
        return [torch.as_tensor(np.array(column, np.float32)) for column in batch]


class QNetwork(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.fc1 = nn.Linear(3 + 1, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 1)

    def forward(self, x, a):
        x = torch.cat([x, a], 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x


class Actor(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.fc1 = nn.Linear(3, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc_mu = nn.Linear(hidden, 1)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return torch.tanh(self.fc_mu(x))


def train(args):
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    actor, target_actor = Actor(args.hidden), Actor(args.hidden)
    qf1, qf2 = QNetwork(args.hidden), QNetwork(args.hidden)
    qf1_target, qf2_target = QNetwork(args.hidden), QNetwork(args.hidden)
    target_actor.load_state_dict(actor.state_dict())
    qf1_target.load_state_dict(qf1.state_dict())
    qf2_target.load_state_dict(qf2.state_dict())
    q_optimizer = optim.Adam(list(qf1.parameters()) + list(qf2.parameters()), lr=args.learning_rate)
    actor_optimizer = optim.Adam(list(actor.parameters()), lr=args.learning_rate)

    # NE: each network grows on its own; the actor counts its own updates, half as many
    updates = args.total_timesteps - args.learning_starts  # NE
    every, until = args.topology_every, int(0.75 * updates)  # NE
    options = {"prune_limit": args.prune_limit, "dormant_threshold": args.dormant_threshold}  # NE
    options["generator"] = torch.Generator().manual_seed(args.seed)  # NE
    q_topologies = []  # NE
    for qf, target in ((qf1, qf1_target), (qf2, qf2_target)):  # NE
        layers, targets = [qf.fc1, qf.fc2, qf.fc3], [target.fc1, target.fc2, target.fc3]  # NE
        schedule = {"every": every, "until": until}  # NE
        q_topologies.append(ne.Topology(layers, q_optimizer, targets, **schedule, **options))  # NE
    layers = [actor.fc1, actor.fc2, actor.fc_mu]  # NE
    targets = [target_actor.fc1, target_actor.fc2, target_actor.fc_mu]  # NE
    schedule = {"every": every // 2, "until": until // 2}  # NE
    actor_topology = ne.Topology(layers, actor_optimizer, targets, **schedule, **options)  # NE
    review = ne.Review(generator=options["generator"])  # NE

    env, rb, returns, episode_return = CartEnv(args.seed), ReplayBuffer(args.buffer_size), [], 0.0
    obs = env.reset()
    for global_step in range(args.total_timesteps):
        if global_step < args.learning_starts:
            actions = np.random.uniform(-1, 1, 1)
        else:
            with torch.no_grad():
                actions = actor(torch.Tensor(obs)[None])[0]
                actions += torch.normal(0, args.exploration_noise, size=(1,))
                actions = actions.numpy().clip(-1, 1)

        next_obs, reward, done = env.step(actions)
        rb.add(obs, next_obs, actions, reward)
        obs, episode_return = next_obs, episode_return + reward
        if done:
            obs = env.reset()
            returns.append(episode_return)
            episode_return = 0.0

        if global_step >= args.learning_starts:
            b_obs, b_next_obs, b_actions, b_rewards = rb.sample(args.batch_size, review.oldest())  # NE: the second one
            with torch.no_grad():
                noise = torch.randn_like(b_actions) * args.policy_noise
                next_actions = target_actor(b_next_obs) + noise.clamp(-args.noise_clip, args.noise_clip)
                next_actions = next_actions.clamp(-1, 1)
                min_q = torch.min(qf1_target(b_next_obs, next_actions), qf2_target(b_next_obs, next_actions))
                next_q = b_rewards.flatten() + args.gamma * min_q.view(-1)
            qf_loss = F.mse_loss(qf1(b_obs, b_actions).view(-1), next_q)
            qf_loss = qf_loss + F.mse_loss(qf2(b_obs, b_actions).view(-1), next_q)
            q_optimizer.zero_grad()
            qf_loss.backward()
            [topology.before_step() for topology in q_topologies]  # NE
            q_optimizer.step()
            q_topologies[0].after_step(lambda: qf1(b_obs, b_actions))  # NE
            q_topologies[1].after_step(lambda: qf2(b_obs, b_actions))  # NE

            if global_step % args.policy_frequency == 0:
                actor_loss = -qf1(b_obs, actor(b_obs)).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward()
                actor_topology.before_step()  # NE
                actor_optimizer.step()
                actor_topology.after_step(lambda: actor(b_obs))  # NE
                for net, target in ((actor, target_actor), (qf1, qf1_target), (qf2, qf2_target)):
                    for param, target_param in zip(net.parameters(), target.parameters(), strict=True):
                        target_param.data.copy_(args.tau * param.data + (1 - args.tau) * target_param.data)

            if global_step % args.review_every == 0:  # NE
                levels, threshold = q_topologies[0].levels, args.dormant_threshold  # NE
                review.measure(ne.dormant_neurons(levels, lambda: qf1(b_obs, b_actions), threshold))  # NE

    trained = {"actor": actor, "qf1": qf1, "qf2": qf2, "batch": (b_obs, b_actions), "returns": returns}
    return trained | {"topologies": [actor_topology, *q_topologies], "review": review}


if __name__ == "__main__":
    trained = train(Args())
    for name, topology in zip(("actor", "qf1", "qf2"), trained["topologies"], strict=True):
        first, last = sum(topology.start), sum(int(mask.sum()) for mask in topology.masks)
        print(f"{name}: {first} connections became {last}; {topology.pruned} were pruned on the way")
    print(f"updates in review: {trained['review'].reviews}")
    earlier, later = np.mean(trained["returns"][:5]), np.mean(trained["returns"][-5:])
    print(f"mean return of five episodes: {earlier:.2f} at the start, {later:.2f} at the end")
