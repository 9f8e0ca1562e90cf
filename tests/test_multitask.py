"""Several tasks in one environment: which episode has which, and what tells them apart."""

import dataclasses

import numpy as np
import pytest
import torch

from embodied_rl.command_configs import DemosConfig
from embodied_rl.config import Config, EnvConfig
from embodied_rl.envs.host import spec_from_json
from embodied_rl.envs.mixture import MixtureEnv
from embodied_rl.errors import UserError
from embodied_rl.load_config import load_config
from embodied_rl.types import ArraySpec, EnvSpec, EpisodeStats

CPU = torch.device("cpu")
RGB = "sensor_data.base_camera.rgb"
TOLD = {"PushCube-v1": "push the cube away", "PullCube-v1": "pull the cube closer"}
POSE = [0.2, 0.6, 0.5, 0.54587, 0.24756, 0.17291, -0.78156]
ENV = EnvConfig(
    task="PushCube-v1",
    instructions=TOLD,
    obs_mode="rgb",
    obs_keys=[RGB, "agent.qpos", "extra.tcp_pose"],
    hidden_objects=["goal_region"],
    render_size=32,
    kwargs={"sensor_configs": {"base_camera": {"pose": POSE, "fov": 0.8}}},
)


# ---------------------------------------------------------------- without a simulator


class Recorded:
    """An environment that writes down what it is asked."""

    def __init__(self, name: str, shape=(2,), action_dim: int = 1, limit: int = 5) -> None:
        self.spec = EnvSpec({"state": ArraySpec(shape, torch.float32)}, action_dim, limit, name)
        self.asked: list[tuple] = []
        self.closed = False

    def reset(self, seed, *, rebuild=False):
        self.asked.append((seed, rebuild))
        return {"state": np.zeros(2, np.float32)}

    def step(self, action):
        self.asked.append(("step", float(action[0])))
        return {"state": np.ones(2, np.float32)}, 1.0, False, False, True

    def render(self):
        return np.full((2, 2, 3), len(self.asked), np.uint8)

    def close(self):
        self.closed = True


def mixture(*envs: Recorded) -> MixtureEnv:
    return MixtureEnv(envs, [f"do {env.spec.name}" for env in envs])


@pytest.mark.unit
class TestMixture:
    def test_seed_picks_the_task(self):
        envs = [Recorded("a"), Recorded("b"), Recorded("c")]
        env = mixture(*envs)
        shown = [int(env.reset(seed)["instruction"]) for seed in range(10, 19)]
        assert shown == [1, 2, 0] * 3, "equal shares over consecutive seeds"
        assert [len(e.asked) for e in envs] == [3, 3, 3]
        obs, *rest = env.step(np.array([0.5]))
        assert obs["instruction"] == 0 and rest == [1.0, False, False, True]
        assert envs[0].asked[-1] == ("step", 0.5)
        env.close()
        assert all(e.closed for e in envs)

    def test_spec(self):
        spec = mixture(Recorded("a"), Recorded("b")).spec
        assert spec.instructions == ("do a", "do b") and spec.name == "a+b"
        assert spec.obs["instruction"] == ArraySpec((), torch.int64)

    def test_a_rebuild_reaches_every_task_once(self):
        a, b = Recorded("a"), Recorded("b")
        env = mixture(a, b)
        for seed, rebuild in ((0, True), (2, False), (1, False), (3, False), (5, True), (4, False)):
            env.reset(seed, rebuild=rebuild)
        assert a.asked == [(0, True), (2, False), (4, True)]
        assert b.asked == [(1, True), (3, False), (5, True)]

    def test_differing_environments_are_refused(self):
        with pytest.raises(UserError, match=r"a and b observe different things: state\."):
            mixture(Recorded("a"), Recorded("b", shape=(3,)))
        with pytest.raises(UserError, match="a has 1 action entries and 5 steps .* b 2 and 5"):
            mixture(Recorded("a"), Recorded("b", action_dim=2))

    def test_spec_crosses_the_pipe(self):
        from embodied_rl.envs.host import spec_to_json

        spec = mixture(Recorded("a"), Recorded("b")).spec
        assert spec_from_json(spec_to_json(spec)) == spec


@pytest.mark.unit
class TestConfig:
    def refusal(self, *args: str) -> str:
        with pytest.raises(UserError) as caught:
            load_config(Config, args)
        return str(caught.value)

    def test_task_follows_the_instructions(self):
        config, _ = load_config(Config, ["env.instructions.A-v1=x", "env.instructions.B-v1=y"])
        assert config.env.task == "A-v1" and config.env.name == "A-v1+B-v1"
        assert config.env.instructions == {"A-v1": "x", "B-v1": "y"}
        assert load_config(Config, [])[0].env.name == "PickCube-v1"

    def test_contradictions_name_both_keys(self):
        told = "env.instructions.A-v1=x"
        assert "env.task=C-v1 is not among the tasks of env.instructions: A-v1." in self.refusal(
            told, "env.task=C-v1"
        )
        assert "two tasks apart by nothing" in self.refusal(told, "env.instructions.B-v1=x")
        assert "has an empty instruction" in self.refusal("env.instructions.A-v1=' '")
        message = self.refusal(told, "env.type=gymnasium")
        assert "env.instructions" in message and "env.type=gymnasium" in message
        message = self.refusal("env.obs_keys=[a]")
        assert "env.obs_keys=['a']" in message and "env.obs_mode=state" in message
        assert "env.type=fake" in self.refusal("env.hidden_objects=[a]", "env.type=fake")
        assert "env.type=fake" in self.refusal("env.render_every=2", "env.type=fake")
        assert "env.type=maniskill" in self.refusal("env.in_process=true")
        inside = ("env.type=gymnasium", "env.task=Pendulum-v1", "env.in_process=true")
        assert "env.worker_timeout=60" in self.refusal(*inside, "env.worker_timeout=60")


@pytest.mark.unit
def test_success_by_instruction():
    from embodied_rl.evaluator import by_instruction

    stats = EpisodeStats()
    for once in (True, False, True, True):
        stats.add(0.0, once, once, 5)
    tasks = {0: 0, 1: 0, 2: 1, 3: 1}
    shares = by_instruction(stats, tasks, ("push", "pull"))
    assert shares == {"success_once/push": 0.5, "success_once/pull": 1.0}
    assert by_instruction(stats, tasks, ("push",)) == {}, "nothing to tell apart"


@pytest.mark.unit
def test_decisions_need_frames(scripted, to_origin):
    from embodied_rl.builders import check_decisions

    policy = scripted(lambda s: to_origin(s).repeat(1, 4, 1), 4)
    for every in (1, 2, 4):
        check_decisions(EnvConfig(render_every=every), policy)
    with pytest.raises(UserError, match=r"env\.render_every=3 .* every 4 steps"):
        check_decisions(EnvConfig(render_every=3), policy)


# ---------------------------------------------------------------- in ManiSkill


@pytest.fixture(scope="module")
def env():
    from embodied_rl.envs.maniskill import build_maniskill

    opened = build_maniskill(ENV)
    yield opened
    opened.close()


@pytest.mark.e2e
class TestManiSkill:
    def test_only_the_instruction_tells_the_tasks_apart(self, env):
        """The same seed in both tasks: the same pixels, joints and tool pose, another index."""
        push, pull = env._envs
        for seed in range(4):
            one, two = push.reset(seed, rebuild=True), pull.reset(seed, rebuild=True)
            assert one.keys() == two.keys() == set(ENV.obs_keys)
            assert all(np.array_equal(one[k], two[k]) for k in one)
            assert not np.array_equal(push.position("goal_region"), pull.position("goal_region"))
        assert [int(env.reset(seed)["instruction"]) for seed in (6, 7, 8)] == [0, 1, 0]

    def test_the_goal_is_hidden_and_shown_in_videos(self, env):
        frame = env.reset(0)[RGB].astype(int)
        red = (frame[..., 0] > 150) & (frame[..., 1] < 80) & (frame[..., 2] < 90)
        white = (frame > 215).all(-1)
        assert red.sum() == 0 and white.sum() < 40, "a red and white disc, but for the white arm"
        plain = dataclasses.replace(ENV, hidden_objects=[], instructions={})
        from embodied_rl.envs.maniskill import build_maniskill

        opened = build_maniskill(plain)
        shown = opened.reset(0)[RGB].astype(int)
        opened.close()
        assert (shown != frame).any(-1).sum() > 100

    def test_wrong_names(self):
        from embodied_rl.envs.maniskill import build_maniskill

        plain = dataclasses.replace(ENV, instructions={})
        for change, message in (
            (
                {"obs_keys": ["agent.qpo"]},
                r"no observation 'agent\.qpo'\. Did you mean 'agent\.qpos'",
            ),
            ({"hidden_objects": ["goal"]}, r"no object 'goal'.* It has: .*goal_region"),
        ):
            opened = None
            with pytest.raises(UserError, match=message):
                opened = build_maniskill(dataclasses.replace(plain, **change))
                opened.reset(0)
            if opened is not None:
                opened.close()

    @pytest.mark.parametrize("solved", [False, True])
    def test_sparse_cameras(self, env, solved):
        """Frames at every third step and the last are those that would have been drawn anyway.

        A task that is solved, and goes on, draws no more of them.
        """
        from embodied_rl.envs.maniskill import build_maniskill

        limit = 7
        every = dataclasses.replace(ENV, max_episode_steps=limit)
        runs = []
        for config in (every, dataclasses.replace(every, render_every=3)):
            opened = build_maniskill(config)
            frames = [opened.reset(1, rebuild=True)[RGB]]
            if solved:
                task = opened.env._env.unwrapped
                task.obj.set_pose(task.goal_region.pose)
            for _ in range(limit):
                action = np.array([0.5, 0.2, 0.3, 1], np.float32)
                obs, _, ended, done, success = opened.step(action)
                frames.append(obs[RGB])
                assert success == solved and not ended
            assert done
            opened.close()
            runs.append(frames)
        same = [np.array_equal(a, b) for a, b in zip(*runs, strict=True)]
        assert same == [t % 3 == 0 or t == limit for t in range(limit + 1)]

    def test_resume_in_the_middle_of_an_episode(self):
        """As for one task: bit for bit, pixels included, over autoresets that change the task."""
        from embodied_rl.envs.maniskill import build_maniskill
        from embodied_rl.envs.worker import WorkerVecEnv

        config = dataclasses.replace(ENV, max_episode_steps=4, render_every=2)
        first, second = (WorkerVecEnv(build_maniskill, (config,), 1, rebuild_every=3) for _ in "ab")
        rng = torch.Generator().manual_seed(0)

        def advance(env, steps):
            seen = []
            for action, seed in steps:
                env.send(action[None], [seed])
                result = env.recv()
                seen += [*result.obs.values(), *result.final_obs.values(), result.reward]
            return seen

        def plan(count, seed):
            return [(torch.rand(4, generator=rng) * 2 - 1, seed) for _ in range(count)]

        try:
            assert first.spec.instructions == tuple(TOLD.values())
            first.reset([5])
            advance(first, [*plan(4, 8), *plan(4, 3), *plan(2, 4)])  # two episodes and a half
            state = first.state_dict()
            following = [*plan(2, 4), *plan(4, 7), *plan(3, 9)]  # beyond the next rebuild
            second.reset([6])
            _, restarted = second.resume(state, [0])
            assert not restarted.any()
            pairs = zip(advance(first, following), advance(second, following), strict=True)
            assert all(torch.equal(one, two) for one, two in pairs)
        finally:
            first.close()
            second.close()

    def test_demonstrations(self, tmp_path):
        """Both experts succeed; equal shares; what is stored depends on no number of processes."""
        from embodied_rl.demonstrations import read_demos, read_instructions
        from embodied_rl.demos import collect
        from embodied_rl.envs.demonstrator import make_demonstrators
        from embodied_rl.replay.store import TrajectoryStore

        stored = []
        for num_envs in (1, 2):
            config = DemosConfig(episodes=2, noise=0.15, env=ENV)
            opened = make_demonstrators(config.env, num_envs)
            folder = tmp_path / str(num_envs)
            meta = {"instructions": list(opened.spec.instructions)}
            try:
                store = TrajectoryStore(folder, 4, meta, compression="zstd")
                assert collect(opened, store, config) <= 6
                store.flush()
                store.close()
            finally:
                opened.close()
            assert read_instructions(folder) == list(TOLD.values())
            stored.append(read_demos(folder))
        one, three = stored
        assert [int(t.fields["obs.instruction"][0]) for t in one] == [0, 1]
        for a, b in zip(one, three, strict=True):
            assert a.length == 50 and a.fields["success"].any() and a.fields["truncated"][49]
            assert a.fields.keys() == b.fields.keys()
            assert all(torch.equal(a.fields[k], b.fields[k]) for k in a.fields)
            assert not torch.equal(a.fields["action"], a.fields["expert_action"])
            assert torch.equal(a.labels, a.fields["expert_action"][:50, 0])
