"""Updates as CUDA graphs, without a GPU: what is captured could be, stays where it is, and trains the same.

The same on a GPU: tests/test_cuda.py. Agents that learn from made-up transitions, and graphs on a CPU: conftest.py.
"""

import contextlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import mst_rigl
import nbsp
import neuroplastic_expansion as ne
from common.capture import WARM_UP, Captured, CapturedPolicy, keep, with_gradients
from common.recorder import restored, state_of

CPU = torch.device("cpu")
STEPS, BORDER = 56, 24  # of the tests of whole agents

# ----------------------------------------------------------------------------------- what all five scripts hand over


MAKE = {getattr(torch, n) for n in ("zeros", "ones", "full", "empty", "eye", "arange", "linspace", "randperm")}
MAKE |= {torch.rand, torch.randn, torch.randint}
BRING = {getattr(Tensor, n) for n in ("cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__float__")}
BRING |= {Tensor.__int__, Tensor.__index__, torch.tensor, torch.as_tensor, torch.from_numpy}


class NoHost(TorchFunctionMode):
    """Refuses what makes a tensor on the CPU, or brings one there: calls that a `Capturable` on a CPU cannot tell."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function not in BRING, f"{function.__name__} is on the host"
        assert function not in MAKE or kwargs.get("device"), f"{function.__name__} without a device"
        return function(*args, **kwargs)


def test_nothing_that_is_captured_waits_for_the_device_or_reads_the_host(learner, capturable, monkeypatch):
    """In every kind of update, before and after a task border; twice each, as these checks are slow."""
    true_call, kinds = Captured.__call__, Counter()

    def call(captured, *arguments, eager=False):
        kind = (captured.function.__name__, one.borders, *arguments)
        kinds[kind] += 1
        with contextlib.ExitStack() as modes:
            # what is due runs operator by operator, on a GPU too
            if kinds[kind] <= 2 and not any(schedule.due for schedule in captured.schedules(*arguments)):
                modes.enter_context(capturable())
                modes.enter_context(NoHost())
            true_call(captured, *arguments, eager=eager)

    monkeypatch.setattr(Captured, "__call__", call)
    one = learner(CPU, True)
    one.train(40, border=16)
    updates = sum(count for name, count in one.graphs.items() if name != "play")
    assert len(kinds) >= updates and min(kinds.values()) > 2
    policy, obs = one.policy(), torch.from_numpy(one.normal())
    with torch.no_grad(), capturable(), NoHost():
        assert policy.policy(obs).shape[-1] == 2


def tensors_of(value, name: str = "") -> dict[str, Tensor]:
    """Every tensor of an agent's state by name, those of optimizers, buffers and masks too."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, nn.Module):
        parts = dict(value.named_parameters()) | dict(value.named_buffers())
    elif isinstance(value, torch.optim.Optimizer):
        parts = dict(enumerate(value.state.values()))
    elif hasattr(value, "STATE"):
        # scores of skill neurons are for the masks of the next border
        parts = {part: getattr(value, part) for part in value.STATE if part != "scores"}
        parts |= {part: getattr(value, part) for part in ("losses", "grad_norms", "network") if hasattr(value, part)}
    elif type(value).__name__ in ("ReplayBuffer", "PreviousTasks"):
        parts = vars(value)
    else:
        parts = dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {}
    return {k: t for part, item in parts.items() for k, t in tensors_of(item, f"{name}.{part}").items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are gone or elsewhere. `before` holds on to the old ones: no new one takes their place."""
    return [n for n, t in before.items() if n not in after or after[n].data_ptr() != t.data_ptr()]


def test_state_stays_where_it_is(learner):
    """Weights, targets, moments, masks, buffers, losses: across changes of topologies, resets and borders.

    SSDE's networks have new sizes at a border: there within a task.
    """
    one = learner(CPU, True)
    one.train(BORDER + 12, BORDER)
    before = {name: tensor.detach() for name, tensor in tensors_of(one.agent).items()}
    values = {name: tensor.clone() for name, tensor in before.items()}
    one.train(50, border=None if type(one).__name__ == "Ssde" else 20)
    after = tensors_of(one.agent)
    assert not moved(before, after)
    changed = [name for name, value in values.items() if not torch.equal(value, after[name])]
    groups = {name.split(".")[1] for name in values}
    assert {"losses", "replay"} <= groups and len(changed) > 0.6 * len(values)


def everything_of(learner) -> dict:
    return state_of(learner.agent) | {"losses": learner.agent.losses, "random": torch.get_rng_state()}


def assert_same(one, two, where: str = "") -> None:
    """Equal bytes in nested dicts and lists."""
    assert type(one) is type(two), where
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    else:
        assert one == two, where


def test_captured_it_trains_to_the_same_bytes(learner, fake_cuda, counted):
    """With graphs that record and replay operators: to the same state, losses and random numbers as without.

    A Python number that changes, a tensor that is replaced, a count that is lost: each would show.
    """
    states = []
    for cuda_graph in (False, True):
        one = learner(CPU, cuda_graph)
        one.train(STEPS, BORDER)
        states.append(everything_of(one))
    assert_same(*states)
    assert fake_cuda.replays == counted.replays(one.graphs) > STEPS  # of updates and of the policy


# --------------------------------------------------------------------------------------- what the checks above find out


def replaced(store: dict, values: dict) -> None:
    store |= {name: value.detach() for name, value in values.items()}


@pytest.mark.parametrize("learner", ["nbsp"], indirect=True)
def test_a_loss_that_is_replaced_is_found(learner, fake_cuda, counted, monkeypatch):
    monkeypatch.setattr(nbsp, "keep", replaced)
    with pytest.raises(AssertionError, match=r"losses\.critic"):
        test_state_stays_where_it_is(learner)
    with pytest.raises(AssertionError, match=r"losses\.critic"):
        test_captured_it_trains_to_the_same_bytes(learner, fake_cuda, counted)


@pytest.mark.parametrize("learner", ["mst"], indirect=True)
def test_a_mask_that_is_replaced_is_found(learner, fake_cuda, counted, monkeypatch):
    true_move = mst_rigl.Topology._move_connections

    def move(topology, fraction):
        true_move(topology, fraction)
        topology.masks = {i: mask.clone() for i, mask in topology.masks.items()}

    monkeypatch.setattr(mst_rigl.Topology, "_move_connections", move)
    with pytest.raises(AssertionError, match=r"topologies\.critic\.masks"):
        test_state_stays_where_it_is(learner)
    with pytest.raises(AssertionError):
        test_captured_it_trains_to_the_same_bytes(learner, fake_cuda, counted)


@pytest.mark.parametrize("learner", ["ne"], indirect=True)
@pytest.mark.parametrize(
    ("wait", "message"),
    [
        (lambda batch: batch["reward"].max().item(), "item is on the host"),
        (lambda batch: bool(batch["reward"].any()), "__bool__ is on the host"),
        (lambda batch: batch["obs"][batch["reward"] > 0], "index by booleans"),
        (lambda batch: batch["reward"].nonzero(), "nonzero waits"),
        (lambda batch: batch["reward"].cpu(), "cpu is on the host"),
        (lambda batch: batch["reward"] * torch.tensor(2.0), "tensor is on the host"),
        (lambda batch: batch["reward"] + torch.zeros(len(batch["reward"])), "zeros without a device"),
    ],
)
def test_what_waits_for_the_device_is_found(learner, wait, message, capturable, monkeypatch):
    true_sample = ne.ReplayBuffer.sample

    def sample(replay, count):
        batch = true_sample(replay, count)
        wait(batch)
        return batch

    monkeypatch.setattr(ne.ReplayBuffer, "sample", sample)
    with pytest.raises(AssertionError, match=message):
        test_nothing_that_is_captured_waits_for_the_device_or_reads_the_host(learner, capturable, monkeypatch)


@pytest.mark.parametrize("learner", ["ne"], indirect=True)
def test_a_python_number_that_changes_is_found(learner, fake_cuda, counted, monkeypatch):
    """As the buffer's length once was: a replay draws from the rows of the capture."""

    def draw_from(replay, oldest):
        replay.bound, replay.oldest_row = torch.tensor(max(1, int(oldest * len(replay)))), torch.tensor(0)

    monkeypatch.setattr(ne.ReplayBuffer, "draw_from", draw_from)
    with pytest.raises(AssertionError):
        test_captured_it_trains_to_the_same_bytes(learner, fake_cuda, counted)


# ----------------------------------------------------------------------------------------------- the classes themselves


class Schedule:
    """Due at every `every`-th update, as the topologies are."""

    def __init__(self, every: int):
        self.every, self.updates = every, 0

    @property
    def due(self) -> bool:
        return (self.updates + 1) % self.every == 0


class Sum:
    """total <- total + number + a random number. Schedule 0 counts every call, schedules 1 and 2 those of a number."""

    def __init__(self, periods: list[int], graphs: bool):
        self.total, self.store, self.runs = torch.zeros(()), {}, []
        self.schedules = [Schedule(period) for period in periods]
        self.captured = Captured(self.add, CPU, graphs, self.schedules_of)

    def schedules_of(self, number: int) -> list[Schedule]:
        return [self.schedules[0], self.schedules[number]]

    def add(self, number: int) -> None:
        self.runs.append(number)
        self.total.add_(number + torch.rand(()))
        keep(self.store, {"double": 2 * self.total})
        for schedule in self.schedules_of(number):
            schedule.updates += 1


@given(
    periods=st.lists(st.integers(1, 30), min_size=3, max_size=3),
    calls=st.lists(st.tuples(st.integers(1, 2), st.sampled_from([False, False, False, True])), max_size=50),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_calls_counts_once_each_and_replays_what_it_may(fake_cuda, periods, calls):
    """Three ordinary calls for each number, then its graph; never for a call that is due or asked for as ordinary."""
    sums = [Sum(periods, graphs) for graphs in (False, True)]
    for one in sums:
        torch.manual_seed(3)
        fake_cuda.replays = 0
        for done, (number, eager) in enumerate(calls, start=1):
            one.captured(number, eager=eager)
            counted = [done, *(sum(n == k for n, _ in calls[:done]) for k in (1, 2))]
            assert [schedule.updates for schedule in one.schedules] == counted
    plain, captured = sums
    assert torch.equal(plain.total, captured.total) and plain.store == captured.store
    assert plain.runs == [number for number, _ in calls]
    runs, replays, counts, updates = [], 0, Counter(), Counter()
    for number, eager in calls:
        due = any((updates[k] + 1) % periods[k] == 0 for k in (0, number))
        counts[number] += not (due or eager)
        replayed = not (due or eager) and counts[number] > WARM_UP
        replays += replayed
        runs += [] if replayed and counts[number] > WARM_UP + 1 else [number]  # the fourth one is recorded
        updates.update((0, number))
    assert (captured.runs, fake_cuda.replays) == (runs, replays)
    assert set(captured.captured.graphs) == {(n,) for n, count in counts.items() if count > WARM_UP}


@pytest.mark.parametrize(("device", "graphs"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_without_graphs_it_is_the_function(device, graphs):
    seen = []
    captured = Captured(lambda *arguments: seen.append(arguments), torch.device(device), graphs)
    for _ in range(6):
        captured(1, True)
        captured(2, eager=True)
    assert seen == [(1, True), (2,)] * 6 and captured.graphs is None


def test_a_graph_goes_on_from_tensors_that_were_changed_outside(fake_cuda):
    one = Sum([100, 100, 100], True)
    for _ in range(6):
        one.captured(1)
    one.total.zero_()
    one.captured(2)
    one.captured(1)
    assert 3 < one.total < 5 and one.store["double"] == 2 * one.total and fake_cuda.replays == 4


def test_a_captured_policy_acts_as_the_policy(fake_cuda):
    """From the first call on, with the same random numbers; what it returned stays when it is called again."""
    observations = [np.random.default_rng(n).standard_normal(3).astype(np.float32) for n in range(9)]
    actions, layer = [], nn.Linear(3, 2)
    for graphs in (False, True):
        runs = []

        def policy(obs, runs=runs):
            runs.append(obs)
            return layer(obs) + torch.rand(2)

        layer.weight.data.fill_(0.5)
        captured = CapturedPolicy(policy, CPU, graphs)
        torch.manual_seed(1)
        actions.append([])
        for n, obs in enumerate(observations):
            if n == 6:
                layer.weight.data.fill_(-1)  # an update between two steps
            actions[-1].append(captured(obs))
            assert actions[-1][-1].dtype == np.float32 and actions[-1][-1].shape == (2,)
        assert len(runs) == (1 + WARM_UP + 1 if graphs else 9)
    for plain, with_graphs in zip(*actions, strict=True):
        np.testing.assert_array_equal(plain, with_graphs)
    assert fake_cuda.replays == 9 - 1 - WARM_UP
    assert not any(np.array_equal(*pair) for pair in pairwise(actions[1]))


def test_on_a_cpu_a_captured_policy_is_the_policy():
    captured = CapturedPolicy(lambda obs: 2 * obs, CPU, True)
    for n in range(6):
        assert captured(np.full(2, n, np.float32)).tolist() == [2 * n] * 2
    assert captured.obs is None and captured.launch.graphs is None


def test_what_is_kept_is_written_in_place_and_is_a_copy():
    value, store = torch.ones(2, requires_grad=True), {}
    keep(store, {"a": value, "b": (2 * value).sum()})
    places = {name: tensor.data_ptr() for name, tensor in store.items()}
    assert not any(tensor.requires_grad for tensor in store.values()) and places["a"] != value.data_ptr()
    value.data.fill_(5)
    assert store["a"].tolist() == [1, 1]  # a later change of the value does not reach it
    keep(store, {"a": value})
    assert store["a"].tolist() == [5, 5] and store["b"] == 4  # names that do not come stay
    value.data.fill_(7)
    assert store["a"].tolist() == [5, 5] and {n: t.data_ptr() for n, t in store.items()} == places
    keep(store, {"c": value[0]})
    value.data.fill_(8)
    assert store["c"] == 7 and store["c"].grad_fn is None


def test_a_loss_leaves_the_gradients_of_its_optimizers_parameters_only():
    mine, other = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.Adam([mine])
    loss = with_gradients(lambda x: ((mine * x) ** 2 * other, other * x), optimizer, compiled=False)
    for x in (1.0, 2.0):
        losses, more = loss(torch.tensor(x))
        torch.testing.assert_close(losses, (mine.detach() * x) ** 2 * 3)
        assert more == 3 * x and not losses.requires_grad and not more.requires_grad
        torch.testing.assert_close(mine.grad, mine.detach() * x**2 * 3)  # of the mean of two, not added to the last
        assert other.grad is None
    alone = with_gradients(lambda: mine.sum(), optimizer, compiled=False)
    assert alone() == 3 and mine.grad.tolist() == [1, 1]


@pytest.mark.parametrize(("stored", "needed"), [(False, True), (True, False)])
def test_a_run_from_another_device_gets_the_optimizers_of_this_one(stored, needed):
    """A CUDA graph needs `capturable`, which a CPU does not have: with the moments, it is not taken over."""
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    old, new = (torch.optim.Adam([w], capturable=c, fused=True) for w, c in zip(weights, (stored, needed), strict=True))
    weights[0].grad = torch.full((3,), 2.0)
    old.param_groups[0]["lr"] = 0.5
    old.step()
    restored(new, state_of(old), CPU)
    assert new.param_groups[0]["capturable"] is needed and new.param_groups[0]["lr"] == 0.5
    for name, value in old.state[weights[0]].items():
        assert torch.equal(new.state[weights[1]][name], value)


def test_streams_wait_for_each_other_and_the_host_for_the_action(fake_cuda, monkeypatch):
    """On a GPU, without these, a warm-up reads what is not written yet, and a policy returns the action before."""

    class Stream:
        def __init__(self):
            calls.append("new")

        def wait_stream(self, other):
            calls.append(("side" if self is not current else "main", "waits"))

        def synchronize(self):
            calls.append("synchronize")

    calls, modes = [], []
    current = Stream()
    true_init = torch.cuda.graph.__init__
    init = lambda graph, *words, **options: modes.append(options) or true_init(graph, *words, **options)  # noqa: E731
    monkeypatch.setattr(torch.cuda.graph, "__init__", init)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    policy = CapturedPolicy(lambda obs: 2 * obs, CPU, True)
    for _ in range(1 + WARM_UP + 2):
        policy(np.ones(2, np.float32))
    warm_up = [("side", "waits"), ("main", "waits"), "synchronize"]
    assert calls == ["new", "new", *WARM_UP * warm_up, "synchronize", "synchronize"]  # one stream for all warm-ups
    assert modes == [{"capture_error_mode": "thread_local"}]  # other threads may go on


def test_compiled_losses_draw_the_random_numbers_of_ordinary_ones(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "fallback_random", False)
    weight = torch.ones(2, requires_grad=True)
    with_gradients(lambda: weight.sum(), torch.optim.Adam([weight]), compiled=True)
    assert torch._inductor.config.fallback_random
