"""Multi-task PPO on MiniGrid: its pieces against the formulas, GMP and SET on its networks, its runs."""

import csv
import json
import math
import subprocess
import sys
from itertools import count

import gymnasium as gym
import mtppo_minigrid as ppo
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import plot, sweep

FEW = ["--epochs", "3", "--epoch-steps", "40", "--minibatch", "16", "--actor-epochs", "2", "--eval-every", "2"]
FEW += ["--eval-episodes", "1", "--prune-every", "6", "--evolve-every", "6", "--quiet"]
BEST_OF_EMPTY = 0.5  # a task's best return, that tells in the score
UPDATES = 6  # of the actor in an epoch of FEW: two passes over 16 + 16 + 8 samples of each task
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 12), st.floats(0, 1))
def test_gae_is_the_sum_of_td_errors_up_to_the_end_of_an_episode_or_of_the_rollout(seed, tasks, steps, ends):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, tasks, steps))
    terminated, truncated = (rng.random((2, tasks, steps)) < ends / 2).astype(float)
    arguments = map(torch.from_numpy, (rewards, values, next_values, terminated, truncated))
    advantages = ppo.gae(*arguments)
    for i in range(tasks):
        for t in range(steps):
            expected = 0.0
            for k in range(t, steps):
                # a terminal state is worth nothing, the state at a time limit what the critic says
                bootstrapped = 0.0 if terminated[i, k] else next_values[i, k]
                expected += (0.99 * 0.95) ** (k - t) * (rewards[i, k] + 0.99 * bootstrapped - values[i, k])
                if terminated[i, k] or truncated[i, k]:
                    break
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 6), st.floats(0, 2))
def test_the_actors_loss_is_the_clipped_surrogate_and_the_entropy(seed, tasks, samples, apart):
    rng = np.random.default_rng(seed)
    logits, advantages = rng.normal(size=(tasks, samples, ppo.ACTIONS)) * 2, rng.normal(size=(tasks, samples))
    actions, shift = rng.integers(0, ppo.ACTIONS, (tasks, samples)), rng.normal(size=(tasks, samples)) * apart
    surrogate = entropy = 0.0
    old_log_prob = np.zeros((tasks, samples))
    for i in range(tasks):
        for n in range(samples):
            probs = [math.exp(x) / sum(math.exp(y) for y in logits[i, n]) for x in logits[i, n]]
            old = probs[actions[i, n]] * math.exp(-shift[i, n])
            old_log_prob[i, n] = math.log(old)
            ratio, advantage = probs[actions[i, n]] / old, advantages[i, n]
            surrogate += min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            entropy -= sum(p * math.log(p) for p in probs)
    expected = -surrogate / (tasks * samples) - 0.01 * entropy / (tasks * samples)
    loss = ppo.actor_loss(*map(torch.from_numpy, (logits, actions, old_log_prob, advantages)))
    assert float(loss) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 9), st.floats(0.1, 1e3), st.floats(-1e3, 1e3))
def test_advantages_are_normalised_within_a_task(seed, steps, scale, shift):
    advantages = np.random.default_rng(seed).normal(size=(2, steps)) * [[1.0], [scale]] + [[0.0], [shift]]
    result = ppo.normalised(torch.from_numpy(advantages)).numpy()
    for row, normalised in zip(advantages, result, strict=True):  # from a task's own steps alone
        mean = sum(row) / steps
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / steps)
        assert normalised == pytest.approx((row - mean) / (std + 1e-8), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 8), st.integers(1, 3))
def test_a_pass_takes_every_sample_of_every_task_once(tasks, steps, size, passes):
    batches = list(ppo.minibatches(tasks, steps, size, passes))
    per_pass = math.ceil(steps / size)
    assert len(batches) == passes * per_pass and all(batch.shape[1] <= size for batch in batches)
    for i in range(passes):
        drawn = torch.cat(batches[i * per_pass : (i + 1) * per_pass], 1)
        assert torch.equal(drawn.sort(1).values, torch.arange(steps).expand(tasks, steps))


def test_actions_have_the_softmaxs_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.0]])
    samples = 20_000
    actions = ppo.act(lambda obs: logits, np.zeros((1, 1), np.uint8), ppo.gumbel_noise(samples, 1))
    frequency = np.bincount(np.ravel(actions), minlength=ppo.ACTIONS) / samples
    assert frequency == pytest.approx(torch.softmax(logits[0], 0).numpy(), abs=4 * 0.5 / math.sqrt(samples))


@pytest.mark.parametrize("tasks", [2, 5])
def test_the_networks_have_the_papers_shape_and_a_head_for_each_task(tasks):
    torch.manual_seed(0)
    network = ppo.Network(tasks, 7)
    assert sum(p.numel() for p in network.parameters()) == 10_544 + tasks * (1024 * 128 + 128 + 128 * 7 + 7)
    obs = torch.randint(0, 11, (tasks, 4, *ppo.IMAGE)).float()
    with torch.no_grad():
        outputs, h = network(obs), obs.flatten(0, 1)
        for layer in (network.conv1, network.conv2, network.conv3):
            size = h.shape[2] - 1
            patches = torch.stack([h[:, :, i : size + i, j : size + j] for i in (0, 1) for j in (0, 1)], 2)
            h = torch.einsum("bckyx,ock->boyx", patches, layer.weight.flatten(2)) + layer.bias[:, None, None]
            h = torch.tanh(h) if layer is network.conv3 else h.clamp(min=0)
        for task in range(tasks):
            x = h.flatten(1).view(tasks, 4, 1024)[task]
            x = torch.tanh(x @ network.hidden.weight[task] + network.hidden.bias[task])
            torch.testing.assert_close(outputs[task], x @ network.output.weight[task] + network.output.bias[task])
    for layer in network.children():  # PyTorch's own: uniform up to 1 / sqrt(inputs)
        inputs = layer.weight[0].numel() if layer.weight.dim() == 4 else layer.weight.shape[1]
        assert 0.9 < layer.weight.abs().max() * math.sqrt(inputs) <= 1


def numbers(drawn):
    for n in count():
        drawn.append(n)
        yield n


def test_a_rollout_is_what_the_environments_say():
    names, steps = ["DoorKey-6x6", "LavaGapS7"], 80
    envs = ppo.make_envs(names)
    for env in envs:
        env.max_steps = 9  # so that episodes end in time, too
    actor = ppo.Network(2, ppo.ACTIONS)
    drawn = [[], []]
    data = ppo.rollout(actor, envs, [numbers(one) for one in drawn], steps)
    for i, name in enumerate(names):
        env = gym.make(f"minigrid:MiniGrid-{name}-v0").unwrapped
        env.max_steps, starts = 9, iter(drawn[i])
        now, kinds = env.reset(seed=next(starts))[0], set()
        for t in range(steps):
            obs, next_obs, action, *outcome = (array[i, t] for array in data)
            assert (obs == np.moveaxis(now["image"], 2, 0)).all()
            now, reward, terminated, truncated, _ = env.step(int(action))
            assert (next_obs == np.moveaxis(now["image"], 2, 0)).all()
            assert outcome == [np.float32(reward), terminated, truncated]
            kinds |= {(terminated, truncated)}
            if terminated or truncated:
                now, _ = env.reset(seed=next(starts))
        assert (False, True) in kinds and next(starts, None) is None
        assert name != "LavaGapS7" or (True, False) in kinds


def test_an_evaluation_is_a_sum_of_rewards_over_whole_episodes_and_repeats():
    torch.manual_seed(0)
    actor = ppo.Network(2, ppo.ACTIONS)
    state = torch.get_rng_state()
    one, two = (ppo.evaluate(actor, ppo.TASKS["mt2"], 3, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)  # evaluating more often changes nothing in training
    assert all(map(np.array_equal, one, two)) and not np.array_equal(
        one[1], ppo.evaluate(actor, ppo.TASKS["mt2"], 3, 2)[1]
    )
    for i, limit in enumerate((100, 144)):
        for episode_return, length in zip(one[0][i], one[1][i], strict=True):
            success = 1 - 0.9 * length / limit  # MiniGrid's reward, at the goal
            assert episode_return == pytest.approx(success) or (episode_return, length) == (0, limit)


def random_data(tasks, steps, seed=0):
    """What `rollout` returns, of no environment."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.integers(0, 11, (2, tasks, steps, *ppo.IMAGE), dtype=np.uint8)
    flags = (rng.random((2, tasks, steps)) < 0.1).astype(np.float32)
    return obs, next_obs, rng.integers(0, 7, (tasks, steps)), rng.random((tasks, steps), np.float32), *flags


def make_agent(*words, tasks=2):
    torch.manual_seed(0)
    args = ppo.parse_args([*FEW, *words])
    return ppo.Agent(args, tasks), random_data(tasks, args.epoch_steps)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_critic_makes_one_step_on_all_samples_or_as_many_as_its_minibatches(passes):
    agent, data = make_agent("--critic-epochs", str(passes))
    obs, next_obs, _, rewards, terminated, truncated = map(torch.from_numpy, data)
    literal = ppo.Network(2, 1)
    literal.load_state_dict(agent.critic.state_dict())
    with torch.no_grad():
        values, next_values = literal(obs.float())[..., 0], literal(next_obs.float())[..., 0]
    targets = values + ppo.gae(rewards, values, next_values, terminated, truncated)
    report = agent.fit(data)
    steps = {
        name: int(o.state[o.param_groups[0]["params"][0]]["step"])
        for name, o in zip(agent.networks, agent.optimizers, strict=True)
    }
    assert steps == {"actor": UPDATES, "critic": 1 if passes == 1 else 9} and agent.updates == UPDATES
    variance = ((targets - values) - (targets - values).mean()).square().sum() / (
        targets - targets.mean()
    ).square().sum()
    assert report["explained_variance"] == pytest.approx(1 - float(variance), abs=1e-5)
    if passes == 1:
        optimizer = torch.optim.Adam(literal.parameters(), 1e-3)
        (literal(obs.float())[..., 0] - targets).square().mean().backward()
        optimizer.step()
        for one, two in zip(agent.critic.parameters(), literal.parameters(), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def parts(tensors):
    """A layer's tensor, or that of each task's copy."""
    return [part for t in tensors for part in (t.detach().unbind() if t.dim() == 3 else [t.detach()])]


@pytest.mark.parametrize(("heads", "scope"), [(True, "global"), (False, "layer")])
def test_gmp_follows_the_cubic_in_actor_and_critic_at_the_actors_updates(heads, scope):
    epochs, words = 10, [] if heads else ["--sparse-layers", "convolutions"]
    agent, data = make_agent("--method", "gmp", "--epochs", str(epochs), "--prune-scope", scope, *words)
    total = epochs * UPDATES
    for epoch in range(1, epochs + 1):
        agent.fit(data)
        progress = min(max((epoch * UPDATES - 0.05 * total) / (0.75 * total), 0), 1)
        for network in agent.networks.values():
            weights = [layer.weight for layer in network.children()]
            pruned, dense = (weights, []) if heads else (weights[:3], weights[3:])
            for group in [pruned] if scope == "global" else [[weight] for weight in pruned]:
                zeros, size = sum(int((w == 0).sum()) for w in group), sum(w.numel() for w in group)
                assert zeros == round(0.95 * (1 - (1 - progress) ** 3) * size)
            assert all((weight != 0).all() for weight in dense)
    density = agent.measure(data[0])
    for name, network in agent.networks.items():
        weights = torch.cat([layer.weight.flatten() for layer in network.children()])
        expected = float((weights != 0).double().mean())
        assert density[f"sparsity/{name}/density"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("layers", "count"), [("all", 3 + 2 * 3), ("convolutions", 3), ("heads", 2 * 3)])
def test_set_has_erdos_renyis_counts_by_task_and_moves_three_tenths(layers, count):
    agent, data = make_agent("--method", "set", "--sparse-layers", layers, tasks=3)
    for sparse in agent.sparse:
        masks = [mask.clone() for mask in parts(sparse.masks)]
        assert len(masks) == count
        counts, sizes = [int(mask.sum()) for mask in masks], [mask.numel() for mask in masks]
        assert sum(counts) == round(0.05 * sum(sizes))
        # the density of a layer of the shape (a, b, ...) is c * (a + b + ...) / (a * b * ...), up to 1
        factors = [n / sum(m.shape) for n, m in zip(counts, masks, strict=True) if n < m.numel()]
        assert max(factors) - min(factors) <= 1 / min(sum(m.shape) for m in masks) + 1e-9
        assert all(sum(m.shape) * max(factors) > 0.98 * m.numel() for m in masks if m.all())
        sparse.before = masks
    agent.fit(data)  # six updates of the actor: time to rewire both, but not before the next rollout is over
    for sparse in agent.sparse:
        assert all(map(torch.equal, sparse.before, parts(sparse.masks)))
        assert all((weight[mask] != 0).all() for weight, mask in zip(parts(sparse.weights), sparse.before, strict=True))
    agent.fit(data)
    for sparse in agent.sparse:
        for old, new, weight in zip(sparse.before, parts(sparse.masks), parts(sparse.weights), strict=True):
            n = int(old.sum())
            moved = min(int(0.3 * n), int((~old).sum()))
            assert int(new.sum()) == n and int((new & ~old).sum()) == int((old & ~new).sum()) == moved
            assert (weight[~new] == 0).all() and (weight[new & old] != 0).all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of FEW on two tasks, as a sweep starts them: one of them twice."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*FEW, "--tasks", "mt2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ppo.BEST, "Empty-5x5", BEST_OF_EMPTY)
        for name, more in {"dense": [], "again": [], "two": ["--seed", "2"], "gmp": ["--method", "gmp"]}.items():
            ppo.main(ppo.parse_args([*words, *more, "--run-dir", str(folder / name)]))
    return folder


def test_the_best_returns_are_those_of_the_shortest_ways():
    steps = {"DoorKey-6x6": 11, "DistShift1": 11, "RedBlueDoors-6x6": 8, "LavaGapS7": 8, "MemoryS11": 15}
    steps |= {"SimpleCrossingS9N2": 15, "MultiRoom-N2-S4": 5}  # the paper's Table 4
    for name, env in zip(steps, ppo.make_envs(steps), strict=True):
        assert ppo.BEST[name] == pytest.approx(1 - 0.9 * steps[name] / env.max_steps, abs=1e-4)
    assert set(ppo.BEST) == set(steps)


def test_the_same_seed_gives_the_same_bytes(runs):
    for name in ("evaluations.csv", "training.csv"):
        one, again, two = ((runs / run / name).read_bytes() for run in ("dense", "again", "two"))
        assert one == again != two


def test_a_runs_folder_holds_what_sweep_and_plot_read(runs, capsys, tmp_path):
    rows = list(csv.DictReader((runs / "gmp" / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [0, 0, 160, 160, 240, 240]
    assert [row["task"] for row in rows[:2]] == ppo.TASKS["mt2"]
    results = json.loads((runs / "gmp" / "results.json").read_text())["metrics"]
    last = [float(row["episode_return"]) for row in rows[-2:]]
    assert results["mean_return"] == pytest.approx(sum(last) / 2) and results["updates"] == 3 * UPDATES
    assert results["normalised_return"] == pytest.approx((last[0] / BEST_OF_EMPTY + last[1]) / 2)
    assert results["mean_success"] == pytest.approx(sum(float(row["success"]) for row in rows[-2:]) / 2)
    assert [results[f"return/{task}"] for task in ppo.TASKS["mt2"]] == last
    for net in ("actor", "critic"):
        assert results[f"sparsity/{net}/density"] == pytest.approx(0.05, abs=1e-4)
        assert 0 <= results[f"plasticity/{net}/dormant_ratio_0.025"] <= 1
    assert sweep.done(runs / "gmp") == 1
    (runs / "two" / "results.json").rename(tmp_path / "results.json")
    assert sweep.done(runs / "two") == 1.0  # by its evaluations, all steps counted
    (tmp_path / "results.json").rename(runs / "two" / "results.json")
    table = plot.main(plot.Args(folders=(runs / "dense", runs / "two", runs / "gmp"), out=tmp_path / "out", reps=10))
    assert "dense (2 runs)" in table and "gmp (1 run)" in table and "| mean_return |" in table


def test_a_finished_run_is_left_alone_and_one_cut_off_begins_anew(runs, tmp_path):
    words = [*FEW, "--tasks", "mt2"]
    with pytest.raises(SystemExit, match="holds a finished run"):
        ppo.main(ppo.parse_args([*words, "--run-dir", str(runs / "gmp")]))
    (tmp_path / "evaluations.csv").write_text("half a run\n")
    ppo.main(ppo.parse_args([*words, "--run-dir", str(tmp_path)]))
    assert (tmp_path / "evaluations.csv").read_bytes() == (runs / "dense" / "evaluations.csv").read_bytes()


@pytest.mark.slow
def test_gmp_learns_two_easy_tasks_with_a_twentieth_of_the_weights(tmp_path):
    words = ["--tasks", "mt2", "--method", "gmp", "--epochs", "14", "--epoch-steps", "256", "--minibatch", "64"]
    words += ["--actor-epochs", "10", "--critic-epochs", "10", "--eval-every", "14", "--prune-every", "40"]
    script = [sys.executable, ppo.__file__, *words, "--run-dir", str(tmp_path)]
    out = subprocess.run(script, check=True, timeout=300, capture_output=True, text=True).stdout.splitlines()
    before, after = (float(line.split("mean return ")[1].split()[0]) for line in out)
    assert before < 0.3 and after > 0.65
