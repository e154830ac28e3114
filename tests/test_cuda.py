"""On a GPU: updates and acting as CUDA graphs train as they do operator by operator, and whole runs end.

    pytest -n 0 tests/test_cuda.py                   # by itself: all other calls of pytest hide the GPU
    CUDA_REHEARSAL=1 pytest -n 0 tests/test_cuda.py  # its logic on a CPU, with graphs that record and replay operators

Agents that learn from made-up transitions, and those graphs: conftest.py.
"""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mst_rigl
import nbsp
import neuroplastic_expansion as ne
import sparse_mtrl_gmp_set as gmp_set
import ssde
from common.capture import CapturedPolicy
from common.cli import Interrupted
from common.recorder import random_state, set_random_state

REHEARSAL = os.environ.get("CUDA_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
pytestmark = [
    pytest.mark.skipif(not REHEARSAL and not torch.cuda.is_available(), reason="no CUDA, or not called by itself"),
    # trunks of 16 units lose whole layers to the global ranking
    pytest.mark.filterwarnings("ignore:GMP left a layer without connections"),
]

UPDATES, EARLY = 300, 50
# Weights after that many updates: how far captured and uncaptured may be apart, as a share of their norm. The kernels
# are the same and so are the random numbers, so the only difference is the order in which a library sums when its
# workspace is another one. On a CPU, weights that differ by 6e-8 at the start are still less than 4e-7 apart after 300
# updates, while training moves them by 0.03 to 1. What chooses by rounding is not: neurons that score the same
# (LayerNorm has them), connections of nearly the same size (bfloat16): there it was 6e-3 and 2e-2.
EARLY_TOLERANCE, TOLERANCE = 1e-5, 1e-3
TOLERANCES = {"nbsp, gradients masked": (1e-5, 0.03), "mst, all rigl, bfloat16": (0.01, 0.1)}


@pytest.fixture(autouse=True)
def graphs(request):
    """Of a rehearsal: those of conftest.py."""
    if REHEARSAL:
        request.getfixturevalue("fake_cuda")


@pytest.fixture
def replays(graphs, monkeypatch) -> list:
    """Grows by one whenever a graph is replayed."""
    seen, true_replay = [], torch.cuda.CUDAGraph.replay

    def replay(graph):
        seen.append(None)
        true_replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return seen


@pytest.fixture
def say(capsys):
    """Print, past pytest, with the memory that was used on the GPU."""
    if not REHEARSAL:
        torch.cuda.reset_peak_memory_stats()

    def line(text: str) -> None:
        peak = 0 if REHEARSAL else torch.cuda.max_memory_allocated() / 2**20
        with capsys.disabled():
            print(f"\n  {text}; peak memory {peak:.0f} MiB", end=" ", flush=True)

    return line


def networks_of(agent) -> dict[str, Tensor]:
    """The weights of each network of an agent, targets too, as one vector each, on the CPU."""

    def parts(value, name: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, nn.Module):
            yield name, torch.cat([parameter.detach().flatten() for parameter in value.parameters()]).cpu()
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from parts(item, f"{name}.{key}")

    return {name: weights for attribute in agent.STATE for name, weights in parts(getattr(agent, attribute), attribute)}


def masks_of(agent) -> list[Tensor]:
    """Which connections exist, as one vector of zeros and ones for each topology."""
    groups = [*getattr(agent, "topologies", {}).values(), *getattr(agent, "sparse", {}).values()]
    topologies = [topology for group in groups for topology in (group if isinstance(group, list) else [group])]
    masks = [t.masks.values() if isinstance(t.masks, dict) else t.masks for t in topologies]
    return [torch.cat([mask.flatten().float() for mask in layers]).cpu() for layers in masks if layers]


def numbers_of(agent) -> dict[str, int]:
    """Counts, which do not depend on rounding."""
    groups = [*getattr(agent, "topologies", {}).values(), *getattr(agent, "sparse", {}).values()]
    topologies = [topology for group in groups for topology in (group if isinstance(group, list) else [group])]
    names = ("updates", "task", "distilled", "resets")
    numbers = {name: getattr(agent, name) for name in names if isinstance(getattr(agent, name, None), int)}
    return numbers | {f"updates {i}": topology.updates for i, topology in enumerate(topologies)}


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest distance of two states of a network, as a share of its norm."""
    assert one.keys() == two.keys()
    distances = {name: ((one[name] - two[name]).norm() / one[name].norm().clamp_min(1e-6)).item() for name in one}
    return max(distances.values())


def test_captured_it_trains_as_operator_by_operator(learner, request, counted, replays, say):
    """Over 300 updates, with changes of topologies, resets, two task borders, and a resume between them."""
    early, late = [], []
    for cuda_graph in (False, True):
        assert replays == []  # nor without graphs
        one = learner(DEVICE, cuda_graph, UPDATES)
        start = networks_of(one.agent)
        one.train(EARLY)
        losses = torch.stack([*one.agent.losses.values()]).cpu()
        early.append(networks_of(one.agent) | {"losses": losses})
        assert min(apart({name: start[name]}, {name: early[-1][name]}) for name in start if name != "actor") > 1e-4
        one.train(UPDATES // 2 - EARLY, border=25)
        random, other = random_state(), learner(DEVICE, cuda_graph, UPDATES)
        other.resumed(one)
        set_random_state(random)
        other.train(UPDATES // 2, border=75)
        drawn = [torch.rand(4, device=device).tolist() for device in {DEVICE, torch.device("cpu")}]
        late.append((networks_of(other.agent), masks_of(other.agent), numbers_of(other.agent), drawn))
        assert all(weights.isfinite().all() for weights in late[-1][0].values())
        assert all(loss.isfinite() for loss in other.agent.losses.values())
    expected = {name: 2 * count for name, count in one.graphs.items()}
    if "learn_encoder" in expected:
        expected["learn_encoder"] -= 1  # when it is resumed, episodes terminate already
    assert len(replays) == counted.replays(expected) > UPDATES  # of updates and of the policy
    (plain, masks, numbers, drawn), (weights, other_masks, other_numbers, other_drawn) = late
    assert numbers == other_numbers and drawn == other_drawn
    [variant] = request.node.callspec.params.values()
    near, far = TOLERANCES.get(variant, (EARLY_TOLERANCE, TOLERANCE))
    differing = [float((a != b).float().mean()) for a, b in zip(masks, other_masks, strict=True)]
    distances = apart(*early), apart(plain, weights)
    say(f"{variant}: apart {distances[0]:.0e}, {distances[1]:.0e}; masks {max([0.0, *differing]):.0e}")
    assert distances[0] <= near and distances[1] <= far and all(share <= 10 * far for share in differing)


def test_a_captured_policy_acts_as_the_policy(learner, replays):
    """With the same random numbers, from the first call on and after an update in between."""
    one, actions = learner(DEVICE, True), []
    plain = CapturedPolicy(one.policy().policy, DEVICE, False)
    for n in range(14):
        if n == 9:
            one.train(1)
            replays.clear()
        obs = one.normal()
        for policy in (one.policy(), plain):
            torch.manual_seed(n)
            actions.append(policy(obs))
        np.testing.assert_allclose(actions[-2], actions[-1], rtol=0, atol=1e-5)
        assert actions[-1].dtype == actions[-2].dtype == np.float32
    assert len(replays) == 5 and np.ptp(actions[::2], axis=0).max() > 0  # what was returned is not written over


@pytest.mark.parametrize("learner", ["nbsp", "ssde", "ne", "mst", "gmp", "set, reset"], indirect=True)
def test_a_run_goes_on_on_the_other_device(learner, replays):
    """From a CPU to a GPU, where its optimizers must learn to be captured, and back."""
    one, two, three = (learner(device, True) for device in ("cpu", DEVICE, "cpu"))
    one.train(10)
    two.resumed(one)
    assert apart(networks_of(one.agent), networks_of(two.agent)) == 0
    replays.clear()
    two.train(40)
    assert len(replays) > 40
    three.resumed(two)
    assert apart(networks_of(two.agent), networks_of(three.agent)) == 0
    three.train(5)
    for agent in (two.agent, three.agent):
        assert all(weights.isfinite().all() for weights in networks_of(agent).values())


# --------------------------------------------------------------------------------------------------------- whole runs

TINY = {"eval_episodes": 1, "quiet": True, "device": DEVICE.type}
NBSP = {"task_seq": "reach,drawer-close", "cycles": 1, "steps_per_task": 300, "learning_starts": 100, "hidden_dim": 24}
NBSP |= {"eval_every": 1000, "batch_size": 32, "score_steps": 100, "previous_buffer_size": 250, "replay_every": 4}
SSDE = {"task_seq": "reach,drawer-close", "steps_per_task": 300, "learning_starts": 100, "hidden_dim": 24}
SSDE |= {"hidden_layers": 2, "critic_hidden_dim": 16, "lambda_global": 0.05, "lambda_local": 0.05, "batch_size": 16}
SSDE |= {"eval_every": 1000, "reset_every": 40, "distill_steps": 50}
NE = {"env_id": "Hopper-v5", "steps_per_task": 500, "learning_starts": 100, "eval_every": 300, "hidden_dim": 16}
NE |= {"batch_size": 32, "topology_every": 50, "review_every": 20, "review_threshold": 0.05, "dormant_threshold": 0.3}
MST = {"env_id": "Hopper-v5", "total_steps": 400, "learning_starts": 100, "eval_every": 300, "buffer_size": 330}
MST |= {"batch_size": 16, "target_update_every": 50, "width_scale": 1 / 32, "rigl_every": 60}
GMP_SET = {"benchmark": "reach,drawer-close", "total_steps": 800, "episode_steps": 50, "learning_starts": 200}
GMP_SET |= {"eval_every": 600, "hidden_dim": 16, "hidden_layers": 2, "batch_per_task": 8, "sparsify_critic": True}
GMP_SET |= {"prune_every": 50, "intervention": "redo", "redo_every": 60}
RUNS = {  # options, and how many updates a run makes
    nbsp: (NBSP, 200 + 200),
    ssde: (SSDE, 200 + 200),
    ne: (NE, 400),
    mst_rigl: (MST, 300),
    gmp_set: (GMP_SET, 300),
}


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_a_run_ends_through_a_signal_and_a_resume(script, tmp_path, replays, monkeypatch, say):
    """With real tasks, evaluations, metrics and checkpoints. Most updates and actions are replayed."""
    options, updates = RUNS[script]
    monkeypatch.setattr(script, "LOG_EVERY", 100)
    true_update, calls = script.Agent.update, []

    def update(agent, **logged):
        calls.append(None)
        if len(calls) == updates * 3 // 5:
            os.kill(os.getpid(), signal.SIGTERM)
        true_update(agent, **logged)

    monkeypatch.setattr(script.Agent, "update", update)
    run_dir = str(tmp_path / "run")
    with pytest.raises(Interrupted):
        script.main(script.Args(**(TINY | options), run_dir=run_dir))
    results = script.main(script.Args(resume=run_dir, quiet=True, device=DEVICE.type))
    assert len(calls) == updates
    assert len(replays) > 1.5 * updates  # of the update and of the policy
    values = [value for value in results["metrics"].values() if isinstance(value, float)]
    assert values and np.isfinite(values).all() and len(list((tmp_path / "run").glob("*.csv"))) >= 1
    say(f"{script.__name__}: {len(replays)} replays of {updates} updates and as many actions")
    script.main(script.Args(evaluate=run_dir, episodes=1, quiet=True, device=DEVICE.type))
    obs = np.zeros(script.env_sizes(options.get("env_id", "reach-v3"))[0], np.float32)
    assert np.isfinite(script.load_policy(run_dir)(obs)).all()
