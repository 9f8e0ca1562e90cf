"""The contract that every registered environment keeps, and the error texts of the adapters."""

import math

import pytest
import torch

from embodied_rl.builders import build_env
from embodied_rl.errors import UserError
from embodied_rl.registry import ENVS

CPU = torch.device("cpu")
LIMIT = 5
ENV_CASES = {
    "fake": (2, ("env.type=fake", "env.task=reach")),
    "gymnasium": (2, ("env.type=gymnasium", "env.task=Pendulum-v1")),
    "gymnasium in_process": (
        2,
        ("env.type=gymnasium", "env.task=Pendulum-v1", "env.in_process=true"),
    ),
    "maniskill": (1, ("env.type=maniskill", "env.task=PickCube-v1", "env.render_size=32")),
}


@pytest.mark.unit
def test_every_environment_is_covered():
    assert {name.partition(" ")[0] for name in ENV_CASES} == set(ENVS.names)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.e2e if name == "maniskill" else pytest.mark.unit)
        for name in ENV_CASES
    ],
)
def open_env(request, make_config):
    """Opens environments of one type; the time limit is their only difference."""
    opened = {}
    num_envs, overrides = ENV_CASES[request.param]

    def get(limit: int = LIMIT):
        if limit not in opened:
            env = make_config(*overrides, f"env.max_episode_steps={limit}").env
            opened[limit] = build_env(env, num_envs, CPU)
        return opened[limit]

    yield get
    for env in opened.values():
        env.close()
        env.close()  # harmless when called twice


def play(env, seeds: list[int], next_seeds: list[int], steps: int):
    """Resets, then takes `steps` fixed pseudo-random actions; returns first obs and results."""
    rng = torch.Generator().manual_seed(7)
    first = env.reset(seeds)
    results = []
    for _ in range(steps):
        actions = torch.rand(env.num_envs, env.spec.action_dim, generator=rng) * 2 - 1
        env.send(actions, next_seeds)
        results.append(env.recv())
    return first, results


def seeds_of(env, start: int) -> list[int]:
    return [start + i for i in range(env.num_envs)]


def assert_same(a: dict, b: dict) -> None:
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_env_shapes(open_env):
    env = open_env()
    n = env.num_envs
    first, (result, *_) = play(env, seeds_of(env, 10), seeds_of(env, 20), 1)
    assert env.spec.max_episode_steps == LIMIT
    for obs in (first, result.obs, result.final_obs):
        assert obs.keys() == env.spec.obs.keys()
        for key, array in env.spec.obs.items():
            assert obs[key].shape == (n, *array.shape) and obs[key].dtype == array.dtype
    assert result.reward.shape == (n,) and result.reward.dtype == torch.float32
    assert result.reward.isfinite().all()
    for flag in (result.terminated, result.truncated, result.success, result.restarted):
        assert flag.shape == (n,) and flag.dtype == torch.bool
    assert not result.restarted.any() and env.pop_warnings() == []


def test_env_same_seed_same_trajectory(open_env):
    env = open_env()
    first, results = play(env, seeds_of(env, 10), seeds_of(env, 20), LIMIT + 2)
    again, repeated = play(env, seeds_of(env, 10), seeds_of(env, 20), LIMIT + 2)
    assert_same(first, again)
    for one, two in zip(results, repeated, strict=True):
        assert_same(one.obs, two.obs)
        assert_same(one.final_obs, two.final_obs)
        assert torch.equal(one.reward, two.reward)
    other, _ = play(env, seeds_of(env, 30), seeds_of(env, 20), 1)
    assert not torch.equal(first["state"], other["state"])


def test_env_autoreset(open_env):
    """final_obs belongs to the old episode, obs to the one that the next seed determines."""
    env, longer = open_env(), open_env(LIMIT + 3)
    _, results = play(env, seeds_of(env, 10), seeds_of(env, 20), LIMIT)
    _, uncut = play(longer, seeds_of(env, 10), seeds_of(env, 20), LIMIT)
    for t, (cut, free) in enumerate(zip(results, uncut, strict=True)):
        last = t == LIMIT - 1
        assert cut.truncated.tolist() == [last] * env.num_envs
        assert not cut.terminated.any() and not free.truncated.any()
        assert_same(cut.final_obs, free.final_obs)
        assert_same(free.final_obs, free.obs)
        if not last:
            assert_same(cut.final_obs, cut.obs)
    assert_same(results[-1].obs, env.reset(seeds_of(env, 20)))
    assert not torch.equal(results[-1].obs["state"], results[-1].final_obs["state"])


def test_env_resume_goes_back(open_env):
    """In the middle of the second episode; then everything goes on as if nothing had happened."""
    env = open_env()
    steps = LIMIT + 3
    seeds = [seeds_of(env, s) for s in (10, 20, 30)]
    play(env, seeds[0], seeds[1], steps)
    state = env.state_dict()
    rng = torch.Generator().manual_seed(8)
    actions = torch.rand(LIMIT, env.num_envs, env.spec.action_dim, generator=rng) * 2 - 1

    def go_on():
        results = []
        for action in actions:
            env.send(action, seeds[2])
            results.append(env.recv())
        return results

    expected = go_on()
    play(env, seeds[2], seeds[0], 2)
    shown, restarted = env.resume(state, seeds[2])
    assert not restarted.any()
    for one, two in zip(go_on(), expected, strict=True):
        assert_same(one.obs, two.obs)
        assert_same(one.final_obs, two.final_obs)
        assert torch.equal(one.reward, two.reward) and torch.equal(one.truncated, two.truncated)
    assert expected[LIMIT - 4].truncated.all(), "the episode ends where it would have"
    assert shown.keys() == env.spec.obs.keys()


def test_env_actions_matter(open_env):
    env = open_env()
    outcomes = []
    for value in (-1.0, 1.0):
        env.reset(seeds_of(env, 10))
        env.send(torch.full((env.num_envs, env.spec.action_dim), value), seeds_of(env, 20))
        outcomes.append(env.recv().obs["state"])
    assert not torch.equal(*outcomes)


def test_env_render(open_env, request):
    env = open_env()
    if "gymnasium" in request.node.name:
        pytest.importorskip("pygame", reason="gymnasium draws classic control with pygame")
    env.reset(seeds_of(env, 10))
    for index in range(env.num_envs):
        frame = env.render(index)
        assert frame.dtype == "uint8" and frame.ndim == 3 and frame.shape[2] == 3
        assert frame.min() < frame.max(), "not a blank picture"


@pytest.mark.unit
def test_fake_env_by_hand(make_env):
    env = make_env("reach-terminates", 1, 20)
    state = env.reset([12_345])["state"][0]
    assert state[2:].tolist() == [2345.0, 0.0]  # seed mod 10,000 and step
    position, steps = state[:2].clone(), 0
    while True:
        action = (-position / 0.2).clamp(-1, 1)
        env.send(action[None], [7])
        result = env.recv()
        position, steps = position + 0.2 * action, steps + 1
        distance = math.hypot(*position.tolist())
        torch.testing.assert_close(result.final_obs["state"][0, :2], position, rtol=0, atol=1e-6)
        assert result.final_obs["state"][0, 2:].tolist() == [2345.0, float(steps)]
        assert float(result.reward[0]) == pytest.approx(-distance, abs=1e-6)
        assert bool(result.success[0]) == bool(result.terminated[0]) == (distance < 0.15)
        if result.terminated[0]:
            break
    assert 1 <= steps <= 5  # at most one unit per axis, 0.2 a step
    assert result.obs["state"][0, 2:].tolist() == [7.0, 0.0]


BAD_GYMNASIUM = {
    "env.task=Pendulm-v1": r"env\.task='Pendulm-v1'.*Did you mean 'Pendulum-v1'\?",
    "env.task=CartPole-v1": r"CartPole-v1 has Discrete\(2\) actions; only Box is supported",
    "env.kwargs.no_such=1": r"no_such",
}


@pytest.mark.unit
@pytest.mark.parametrize("override", BAD_GYMNASIUM)
def test_gymnasium_errors_cross_the_process_border(make_config, override):
    settings = make_config("env.type=gymnasium", "env.task=Pendulum-v1", override).env
    with pytest.raises(UserError, match=BAD_GYMNASIUM[override]):
        build_env(settings, 1, CPU)


@pytest.mark.unit
def test_unknown_fake_task(make_env):
    with pytest.raises(UserError, match=r"env\.task='reech'.*Did you mean 'reach'\?"):
        make_env("reech")


@pytest.mark.unit
def test_in_process_or_not_is_the_same(make_config):
    """Bit for bit, over ends of episodes and a resume in the middle of one."""
    shown = []
    for in_process in ("true", "false"):
        settings = make_config(
            "env.type=gymnasium",
            "env.task=Pendulum-v1",
            "env.max_episode_steps=3",
            f"env.in_process={in_process}",
        ).env
        env = build_env(settings, 2, CPU)
        first, results = play(env, [1, 2], [3, 4], 8)
        state = env.state_dict()
        env.reset([5, 6])
        again, restarted = env.resume(state, [7, 8])
        assert torch.equal(again["state"], results[-1].obs["state"]) and not restarted.any()
        shown.append([first["state"], *(x for r in results for x in (r.obs["state"], r.reward))])
        env.close()
    assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))


@pytest.mark.unit
def test_gymnasium_rescales_actions(make_config):
    settings = make_config(
        "env.type=gymnasium", "env.task=Pendulum-v1", "env.kwargs.g=0.0", "env.max_episode_steps=3"
    ).env
    env = build_env(settings, 1, CPU)
    try:
        cos, sin, speed = env.reset([5])["state"][0].tolist()
        env.send(torch.tensor([[0.5]]), [6])
        result = env.recv()
        # torque range is [-2, 2]: action 0.5 means torque 1; m = l = 1, dt = 0.05, g = 0:
        # speed' = speed + 3 u dt; cost = angle^2 + 0.1 speed^2 + 0.001 u^2
        expected = speed + 3 * 1.0 * 0.05
        assert float(result.final_obs["state"][0, 2]) == pytest.approx(expected, abs=1e-6)
        angle = math.atan2(sin, cos)
        cost = angle**2 + 0.1 * speed**2 + 0.001
        assert float(result.reward[0]) == pytest.approx(-cost, abs=1e-5)
    finally:
        env.close()


BAD_MANISKILL = {
    "env.task=PickCub-v1": r"env\.task='PickCub-v1'.*Did you mean 'PickCube-v1'\?",
    "env.sim_backend=physx_cuda": r"simulates on a GPU, and device is cpu.*device=cuda",
    "env.control_mode=pd_ee_deltapos": r"control_mode=pd_ee_deltapos",
    "env.kwargs.no_such=1": r"no_such",
}


@pytest.mark.e2e
@pytest.mark.parametrize("override", BAD_MANISKILL)
def test_maniskill_errors(make_config, override):
    settings = make_config("env.type=maniskill", "env.task=PickCube-v1", override).env
    with pytest.raises(UserError, match=BAD_MANISKILL[override]):
        build_env(settings, 1, CPU)
