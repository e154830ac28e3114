"""Environments: bit-identity with Meta-World, seeding, exact resume, episode ends, actions, names, rendering."""

import io
import os

import gymnasium as gym
import metaworld.env_dict
import metaworld.policies
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from common import envs
from common.envs import CW10, MT10, MT50, TASK_DESCRIPTIONS, TASK_SEQUENCES, get_rng_state, make_env, set_rng_state

FAMILIES = ["push-v3", "dmc/ball_in_cup-catch", "HalfCheetah-v5"]


def library_env(task: str, seed: int, reward_version: str) -> gym.Env:
    """Meta-World's own class set up as in Continual World's random_init_all."""
    env = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task](reward_function_version=reward_version)
    env._partially_observable = False
    del env.sawyer_observation_space
    env.observation_space = env.sawyer_observation_space
    env._freeze_rand_vec = False
    env._set_task_called = True
    env.seeded_rand_vec = True
    env.seed(seed)
    return env


def episodes(env: gym.Env, count: int, actions=None) -> list[np.ndarray]:
    """One row per step of ``count`` episodes: observation, reward, ends. Actions sampled from the environment's space
    where no generator is given."""
    rows = []
    for _ in range(count):
        obs, _ = env.reset()
        rows.append(obs)
        done = False
        while not done:
            action = env.action_space.sample() if actions is None else actions.uniform(-1, 1, env.action_space.shape)
            obs, reward, terminated, truncated, _ = env.step(action)
            rows.append(np.concatenate([obs, [reward, terminated, truncated]]))
            done = terminated or truncated
    return rows


def identical(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return [(x.dtype, x.tobytes()) for x in a] == [(x.dtype, x.tobytes()) for x in b]


def received_action(env: gym.Env, action) -> np.ndarray:
    """What the innermost environment is given when ``env`` is stepped with ``action``."""
    received = []
    inner, step = env.unwrapped, env.unwrapped.step
    inner.step = lambda a: received.append(np.array(a)) or step(a)
    env.reset()
    env.step(np.asarray(action, dtype=np.float32))
    return received[0]


# Meta-World


@pytest.mark.parametrize("task", MT50)
def test_meta_world_is_bit_identical_to_the_library(task):
    reference = library_env(task, 3, "v2")
    env = make_env(task, seed=3)
    fast = env.unwrapped
    expert = metaworld.policies.ENV_POLICY_MAP[task]()
    rng = np.random.default_rng(0)
    for reward_version, steps in (("v2", 60), ("v1", 15)):
        reference.reward_function_version = fast.reward_function_version = reward_version
        obs, _ = reference.reset()
        assert obs.tobytes() == fast.reset()[0].tobytes()
        for step in range(steps):
            action = rng.uniform(-1.2, 1.2, 4) if step < 5 else np.clip(expert.get_action(obs), -1, 1)
            action = action.astype(np.float32)
            obs, reward, terminated, truncated, info = reference.step(action)
            fast_obs, fast_reward, *fast_ends, fast_info = fast.step(action)
            assert obs.tobytes() == fast_obs.tobytes() and reward == fast_reward
            assert [terminated, truncated] == fast_ends
            assert list(info) == list(fast_info)
            assert np.array_equal(list(info.values()), list(fast_info.values()), equal_nan=True)
    reference.reward_function_version = fast.reward_function_version = "v2"  # v1 asserts that the goal stays
    reference._target_pos = fast._target_pos = np.full(3, 9.0)  # outside the bounds to which the library clips
    assert reference.step(action)[0].tobytes() == fast.step(action)[0].tobytes()
    env.close()
    reference.close()


def test_touching_object_is_the_library_loop():
    fast = make_env("pick-place", seed=3).unwrapped
    pads = {fast.data.geom("leftpad_geom").id, fast.data.geom("rightpad_geom").id}
    puck = fast.data.geom("objGeom").id
    expert = metaworld.policies.ENV_POLICY_MAP["pick-place-v3"]()
    obs, _ = fast.reset()
    seen = set()
    for _ in range(80):
        obs, *_ = fast.step(np.clip(expert.get_action(obs), -1, 1).astype(np.float32))
        pairs = [{contact.geom1, contact.geom2} for contact in fast.data.contact]
        for geom in range(fast.model.ngeom):
            touching = fast.touching_object(geom)
            assert touching == SawyerXYZEnv.touching_object(fast, geom)
            if geom == puck:
                seen.add((touching, sum({puck, pad} in pairs for pad in pads)))
    assert {(False, 0), (False, 1), (True, 2)} <= seen  # no pad, one pad and both pads on the puck


def test_meta_world_reward_version_and_float32_observation():
    reference, env = library_env("push-v3", 0, "v1"), make_env("push", seed=0, reward_version="v1")
    assert env.reset()[0].tobytes() == reference.reset()[0].astype(np.float32).tobytes()
    action = np.array([0.3, 0.5, -1, 0], dtype=np.float32)
    v1 = reference.step(action)
    obs, reward, _, _, info = env.step(action)
    assert (reward, info["success"]) == (v1[1], v1[4]["success"])
    assert obs.tobytes() == v1[0].astype(np.float32).tobytes()
    v2 = make_env("push", seed=0)
    v2.reset()
    assert v2.step(action)[1] != reward


def test_meta_world_goal_is_visible_and_fresh_at_each_reset():
    env = make_env("push", seed=0)
    goals = [env.reset()[0][36:] for _ in range(3)]
    assert np.array_equal(goals[2], env.unwrapped._target_pos.astype(np.float32))
    assert not np.array_equal(goals[0], goals[1]) and not np.array_equal(goals[1], goals[2])


def test_closed_meta_world_frees_its_memory():
    def resident_mb() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    closed = []
    for count in range(7):
        closed.append(make_env("hammer", seed=0))
        closed[-1].reset()
        closed[-1].close()
        closed[-1].close()
        if count == 0:
            before = resident_mb()
    assert resident_mb() - before < 80  # about 180 where the simulations are kept


# The common interface


@pytest.mark.parametrize("env_id", [*FAMILIES, "dmc/finger-turn_easy", "Pendulum-v1"])
def test_spaces_and_types(env_id):
    env = make_env(env_id, seed=0)
    shape = env.observation_space.shape
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
    assert env.action_space == gym.spaces.Box(-1, 1, env.action_space.shape, np.float32)
    first, info = env.reset()
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    for array in (first, obs):
        assert array.dtype == np.float32 and array.shape == shape and len(shape) == 1
    assert not np.shares_memory(first, obs)
    assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
    assert ("success" in info) == (env_id == "push-v3")
    if "success" in info:
        assert type(info["success"]) is float


@pytest.mark.parametrize("env_id", FAMILIES)
def test_seeding(env_id):
    def rollout(env, count):
        return episodes(env, count, np.random.default_rng(5))

    env = make_env(env_id, seed=1, max_episode_steps=8)
    two = rollout(env, 2)
    assert not identical(two[:9], two[9:])  # without a seed the stream goes on
    assert identical(two, rollout(make_env(env_id, seed=1, max_episode_steps=8), 2))
    other = make_env(env_id, seed=2, max_episode_steps=8)
    assert not identical(two, rollout(other, 2))
    first, _ = other.reset(seed=1)
    assert first.tobytes() == two[0].tobytes()
    assert other.reset()[0].tobytes() == two[9].tobytes()


@pytest.mark.parametrize("env_id", FAMILIES)
def test_resume_at_an_episode_boundary_is_exact(env_id):
    env = make_env(env_id, seed=7, max_episode_steps=12)
    episodes(env, 2)
    file = io.BytesIO()
    torch.save(get_rng_state(env), file)
    file.seek(0)
    expected = episodes(env, 3)

    state = torch.load(file, weights_only=True)
    resumed = make_env(env_id, seed=7, max_episode_steps=12)
    set_rng_state(resumed, state)
    assert identical(episodes(resumed, 3), expected)
    set_rng_state(resumed, state)  # and again in an environment with a past
    assert identical(episodes(resumed, 3), expected)


@pytest.mark.parametrize("env_id", FAMILIES)
def test_rng_state_is_plain_python(env_id):
    def check(value):
        assert type(value) in (int, float, str, list, dict)
        if isinstance(value, dict | list):
            for entry in value.values() if isinstance(value, dict) else value:
                check(entry)

    env = make_env(env_id, seed=0)
    env.reset()
    env.action_space.sample()
    check(get_rng_state(env))


@pytest.mark.parametrize(
    ("env_id", "max_episode_steps", "length"),
    [
        ("reach", None, 200),
        ("reach", 7, 7),
        ("dmc/cartpole-swingup", None, 1000),
        ("dmc/cartpole-swingup", 5, 5),
        ("dmc/cartpole-swingup", 1003, 1003),
        ("Pendulum-v1", None, 200),
        ("Pendulum-v1", 5, 5),
    ],
)
def test_truncation(env_id, max_episode_steps, length):
    env = make_env(env_id, seed=0, max_episode_steps=max_episode_steps)
    for _ in range(2):
        env.reset()
        ends = [env.step(env.action_space.sample())[2:4] for _ in range(length)]
        assert ends == [(False, False)] * (length - 1) + [(False, True)]
    if env_id == "reach":
        with pytest.raises(ValueError, match="reset"):
            env.step(env.action_space.sample())


def test_termination():
    hopper = make_env("Hopper-v5", seed=0)
    *_, last = episodes(hopper, 1)
    assert tuple(last[-2:]) == (True, False)

    env = make_env("dmc/cartpole-swingup", seed=0)
    env.reset()
    env.unwrapped.dm_env.task.get_termination = lambda physics: 0.0  # the discount of dm_control's terminal states
    assert env.step([0.0])[2:4] == (True, False)


def test_actions_within_unit_bounds_pass_bit_for_bit():
    action = np.array([-0.0, 1e-42, -1, 1, 0.1, 1.5], dtype=np.float32)
    assert received_action(make_env("HalfCheetah-v5", seed=0), action).tobytes() == action.tobytes()
    assert received_action(make_env("push", seed=0), action[:4]).tobytes() == action[:4].tobytes()
    assert received_action(make_env("dmc/cheetah-run", seed=0), action).tobytes() == action.tobytes()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Humanoid-v5", "dmc/quadruped-walk"])
def test_other_action_bounds_are_rescaled(env_id):
    env = make_env(env_id, seed=0)
    inner = env.unwrapped.action_space
    for action, expected in ((-1, inner.low), (1, inner.high), (0.5, inner.low + 0.75 * (inner.high - inner.low))):
        received = received_action(env, np.full(inner.shape, action))
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


def test_action_repeat_sums_rewards_and_stops_at_the_episode_end():
    once = make_env("HalfCheetah-v5", seed=0, max_episode_steps=4)
    thrice = make_env("HalfCheetah-v5", seed=0, max_episode_steps=4, action_repeat=3)
    action = np.full(6, 0.5, dtype=np.float32)
    once.reset(), thrice.reset()
    single = [once.step(action) for _ in range(4)]
    first, second = thrice.step(action), thrice.step(action)
    assert first[1] == sum(step[1] for step in single[:3]) and first[0].tobytes() == single[2][0].tobytes()
    assert second[1] == single[3][1] and second[0].tobytes() == single[3][0].tobytes()
    assert first[2:4] == (False, False) and second[2:4] == (False, True)
    assert thrice.metadata["render_fps"] == round(once.metadata["render_fps"] / 3)


def test_a_video_has_at_least_a_frame_a_second():
    assert [make_env("HalfCheetah-v5", seed=0, action_repeat=n).metadata["render_fps"] for n in (1, 4, 50)] == [
        20,
        5,
        1,
    ]


def test_action_repeat_keeps_a_success_between_two_decisions():
    env = make_env("reach", seed=0, action_repeat=3)
    env.reset()
    success = iter([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    env.unwrapped.evaluate_state = lambda obs, action: (1.0, {"success": next(success)})
    assert env.step(np.zeros(4))[4]["success"] == 1.0
    assert env.step(np.zeros(4))[4]["success"] == 0.0


@pytest.mark.parametrize(
    ("env_id", "arguments", "message"),
    [
        ("hamer", {}, "'hamer'.*hammer-v3"),
        ("push-v2", {}, "'push-v2'.*push-v3"),
        ("dmc/cheeta-run", {}, "'dmc/cheeta-run'.*dmc/cheetah-run"),
        ("HalfCheetah-v9", {}, "'HalfCheetah-v9'.*HalfCheetah-v5"),
        ("no such thing", {}, "'no such thing'.*nearest known"),
        ("cheetah-run", {}, "'cheetah-run'.*dmc/cheetah-run"),
        ("dmc/lqr-lqr_2_1", {}, "unknown dm_control task 'dmc/lqr-lqr_2_1'"),
        ("HalfCheetah-v3", {}, "'HalfCheetah-v3' cannot be made"),
        ("CartPole-v1", {}, "action space Discrete.*Box"),
        ("FrozenLake-v1", {}, "observation space Discrete.*Box"),
        ("push", {"reward_version": "v3"}, "reward_version 'v3'.*'v1' or 'v2'"),
        ("push", {"render_mode": "human"}, "render_mode 'human'.*rgb_array"),
        ("push", {"action_repeat": 0}, "action_repeat 0.*at least 1"),
        ("push", {"max_episode_steps": 0}, "max_episode_steps 0.*at least 1"),
    ],
)
def test_bad_arguments_give_one_line(env_id, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make_env(env_id, seed=0, **arguments)
    assert "\n" not in str(error.value)


class UnboundedActions(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, render_mode=None):
        pass


def test_unbounded_actions_are_refused(monkeypatch):
    spec = gym.envs.registration.EnvSpec("Unbounded-v0", entry_point=UnboundedActions)
    monkeypatch.setitem(gym.registry, "Unbounded-v0", spec)
    with pytest.raises(ValueError, match="unbounded actions"):
        make_env("Unbounded-v0", seed=0)


# Task names


def test_names_are_the_benchmarks():
    assert tuple(metaworld.env_dict.MT50_V3) == MT50 and tuple(metaworld.env_dict.MT10_V3) == MT10
    assert len(set(CW10)) == 10 and set(CW10) <= set(MT50)
    assert envs.task_sequence("cw20") == list(CW10 + CW10)
    assert {key: len(tasks) for key, tasks in TASK_SEQUENCES.items()} == {
        "cw10": 10,
        "cw20": 20,
        "cw3": 3,
        "mt10": 10,
        "mt50": 50,
        "window": 2,
        "drawer": 2,
        "button": 2,
        "cycle4": 4,
    }


def test_descriptions_are_complete_and_distinct():
    assert tuple(TASK_DESCRIPTIONS) == MT50
    texts = list(TASK_DESCRIPTIONS.values())
    assert len({text.lower() for text in texts}) == 50
    assert all(text[0].isupper() and text.endswith(".") and text.strip() == text for text in texts)
    assert [TASK_DESCRIPTIONS[task] for task in CW10] == [
        "Hammer a screw on the wall.",
        "Bypass a wall and push a puck to a goal.",
        "Rotate the faucet clockwise.",
        "Pull a puck to a goal.",
        "Grasp a stick and pull a box with the stick.",
        "Press a handle down sideways.",
        "Push the puck to a goal.",
        "Pick and place a puck onto a shelf.",
        "Push and close a window.",
        "Unplug a peg sideways.",
    ]


@given(st.lists(st.tuples(st.sampled_from(MT50), st.booleans(), st.sampled_from(["", " "])), min_size=1))
def test_task_sequence_of_a_list(entries):
    spec = ",".join(space + (task if full else task.removesuffix("-v3")) + space for task, full, space in entries)
    assert envs.task_sequence(spec) == [task for task, _, _ in entries]


@given(st.lists(st.sampled_from([*TASK_SEQUENCES, "reach", "push-v3"]), min_size=1, max_size=4))
def test_task_sequence_of_sequences_is_their_concatenation(names):
    assert envs.task_sequence(",".join(names)) == [task for name in names for task in envs.task_sequence(name)]


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_task_sequence_of_any_text_is_known_tasks_or_one_line(text):
    try:
        assert set(envs.task_sequence(text)) <= set(MT50)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hamer", "'hamer'.*hammer-v3"),
        ("cw11", "'cw11'.*cw10"),
        ("push,windo-close", "'windo-close'.*window-close-v3"),
        ("hammer-v2", "'hammer-v2'.*hammer-v3"),
        ("", "empty"),
        ("push,,reach", "empty"),
    ],
)
def test_task_sequence_names_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        envs.task_sequence(spec)


# Rendering

needs_rendering = pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disable", reason="no EGL library here")


@needs_rendering
def test_meta_world_frame_is_upright_and_not_mirrored(tmp_path):
    env = make_env("push", seed=0, max_episode_steps=2, render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    env.reset()
    frame = env.render()
    assert frame.shape == (480, 480, 3) and frame.dtype == np.uint8
    assert np.ptp(frame[:40].reshape(-1, 3), axis=0).max() < 10  # plain background above, floor and table below
    assert np.ptp(frame[-40:].reshape(-1, 3), axis=0).min() > 50
    red = (frame[..., 0] > 100) & (frame[..., 1:].max(axis=-1) < 60)
    assert red[:, :240].sum() > 4 * red[:, 240:].sum()  # the arm stands at y=0, to the left of the table at y=0.6
    while not any(env.step(np.zeros(4))[2:4]):
        pass
    env.close()
    assert len(list(tmp_path.glob("videos/*.mp4"))) == 1 and env.metadata["render_fps"] == 80


@needs_rendering
@pytest.mark.parametrize("env_id", ["dmc/cartpole-swingup", "HalfCheetah-v5"])
def test_other_frames(env_id):
    make_env(env_id, seed=0).reset()  # the training environment, made without rendering, comes first
    env = make_env(env_id, seed=0, render_mode="rgb_array")
    env.reset()
    frame = env.render()
    assert frame.shape == (480, 480, 3) and frame.dtype == np.uint8 and np.ptp(frame) > 50
    env.close()


def test_record_video_writes_the_first_episode(tmp_path):
    env = make_env("reach", seed=0, render_mode="rgb_array", max_episode_steps=3)
    env = envs.record_video(env, tmp_path / "reach")
    for _ in range(2):
        env.reset()
        while not env.step(np.zeros(4, np.float32))[3]:
            pass
    env.close()
    assert [path.name for path in (tmp_path / "reach").iterdir()] == ["reach-episode-0.mp4"]
