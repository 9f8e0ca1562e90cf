"""Policy x fake environment -> trajectories, step by step."""

import pytest
import torch

from embodied_rl.collector import TRAIN_SEEDS, Collector, episode_seed
from embodied_rl.config import RolloutConfig
from embodied_rl.guard import Guard
from embodied_rl.policy import Policy
from embodied_rl.registry import ACTORS

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
SEED = 3


class Sink:
    """Stands where the replay buffer does and keeps what it is given."""

    def __init__(self) -> None:
        self.trajectories = []

    def add(self, trajectory) -> None:
        self.trajectories.append(trajectory)


@pytest.fixture
def make_collector(make_env, tmp_path):
    """A collector on the fake environment, and the sink that it fills."""

    def make(policy, *, num_envs=1, limit=5, task="reach", features=False, env=None, **rollout):
        sink = Sink()
        collector = Collector(
            env or make_env(task, num_envs, limit),
            policy,
            sink,
            RolloutConfig(**{"max_trajectory_steps": 500, "random_steps": 0, **rollout}),
            Guard(tmp_path / "failure", enabled=True),
            store_features=features,
            seed=SEED,
            device=CPU,
        )
        return collector, sink

    return make


def advance(collector, steps: int) -> None:
    for _ in range(steps):
        collector.begin()
        collector.end()


@pytest.fixture
def collect(make_collector):
    """Runs `steps` steps; returns the collector and the fields of its trajectories."""

    def run(policy, steps, **settings):
        collector, sink = make_collector(policy, **settings)
        collector.start()
        advance(collector, steps)
        return collector, [t.fields for t in sink.trajectories]

    return run


def test_episode_seeds():
    seeds = [episode_seed(r, e, n) for r in range(3) for e in range(8) for n in range(200)]
    assert all(TRAIN_SEEDS <= s < 2**31 for s in seeds), "apart from the evaluation seeds"
    assert len(set(seeds)) == len(seeds)
    assert episode_seed(1, 2, 3) == episode_seed(1, 2, 3)


def test_trajectory_by_hand(collect, scripted):
    """Constant action (0.5, -0.25): each step moves the point by (0.1, -0.05)."""
    policy = scripted(lambda s: torch.tensor([0.5, -0.25]).expand(len(s), 1, 2))
    collector, (fields, *more) = collect(policy, 5)
    assert collector.env_steps == 5 and not more
    start = fields["obs.state"][0, :2]
    assert fields["obs.state"][0, 2] == episode_seed(SEED, 0, 0) % 10_000
    position = start + torch.arange(6)[:, None] * torch.tensor([0.1, -0.05])
    torch.testing.assert_close(fields["obs.state"][:, :2], position, rtol=0, atol=1e-6)
    assert fields["obs.state"][:, 3].tolist() == [0, 1, 2, 3, 4, 5]
    assert fields["action"].shape == (6, 1, 2)
    assert fields["action"][:5, 0].tolist() == [[0.5, -0.25]] * 5
    assert (fields["action"][5] == 0).all() and (fields["reward"][5] == 0).all()
    reward = -position[1:].norm(dim=1)[:, None]
    torch.testing.assert_close(fields["reward"][:5], reward, rtol=0, atol=1e-6)
    assert fields["steps"].tolist() == [1, 1, 1, 1, 1, 0]
    assert fields["truncated"].tolist() == [False] * 4 + [True, False]
    assert not fields["terminated"].any()
    assert not [name for name in fields if name.startswith("features")]
    stats = collector.pop_stats()
    assert stats.lengths == [5]
    assert stats.returns == [pytest.approx(float(reward.sum()), rel=1e-5)]
    assert len(collector.pop_stats()) == 0


def test_counts_and_seeds_over_several_environments(collect, scripted, to_origin):
    collector, trajectories = collect(scripted(to_origin), 17, num_envs=3, limit=5)
    assert collector.env_steps == 51
    assert len(trajectories) == 9 and len(collector.pop_stats()) == 9
    found = [int(f["obs.state"][0, 2]) for f in trajectories]
    expected = [episode_seed(SEED, env, n) % 10_000 for n in range(3) for env in range(3)]
    assert found == expected
    for fields in trajectories:
        assert fields["obs.state"][:, 3].tolist() == list(range(6))
        assert (fields["obs.state"][:, 2] == fields["obs.state"][0, 2]).all()


def test_termination_flags(collect, scripted, to_origin):
    collector, trajectories = collect(scripted(to_origin), 30, limit=20, task="reach-terminates")
    assert len(trajectories) > 3
    for fields in trajectories:
        assert fields["terminated"].nonzero().flatten().tolist() == [len(fields["steps"]) - 2]
        assert torch.equal(fields["success"], fields["terminated"])
        assert not fields["truncated"].any()
    stats = collector.pop_stats()
    assert all(stats.success_once) and all(stats.success_at_end)


def test_success_once_is_not_success_at_end(collect, scripted, through_origin):
    collector, (fields,) = collect(scripted(through_origin), 20, limit=20)
    stats = collector.pop_stats()
    assert stats.success_once == [True] and stats.success_at_end == [False]
    assert fields["success"].any() and not fields["success"][19]
    assert stats.summary()["success_once"] == 1.0 and stats.summary()["success_at_end"] == 0.0


def test_chunked_execution(collect, scripted):
    """Chunks of three, two of them executed, five steps: decisions of 2, 2 and 1 steps."""

    def script(state):
        return torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.9, 0.0]]).expand(len(state), 3, 2)

    policy = scripted(script, chunk=3, execute=2)
    _, (fields,) = collect(policy, 5, limit=5)
    assert fields["obs.state"][:, 3].tolist() == [0, 2, 4, 5]
    assert fields["steps"].tolist() == [2, 2, 1, 0]
    assert fields["action"].shape == (4, 2, 2), "what is executed is stored"
    assert fields["action"][0, :, 0].tolist() == pytest.approx([0.1, 0.2], rel=1e-6)
    start = fields["obs.state"][0, :2]
    moved = torch.tensor([0.02, 0.06, 0.08, 0.12, 0.14])  # 0.2 * cumulative 0.1, 0.2, 0.1, ...
    path = start + torch.stack([moved, torch.zeros(5)], 1)
    reward = (-path.norm(dim=1)).tolist()
    assert fields["reward"].shape == (4, 2)
    assert fields["reward"].flatten().tolist() == pytest.approx([*reward, 0, 0, 0], abs=1e-6)
    assert fields["truncated"].tolist() == [False, False, True, False]
    assert [int(s[3]) for s in policy.backbone.asked] == [0, 2, 4, 5], (
        "asked when a chunk is used up"
    )


def test_environments_decide_when_their_own_chunk_is_used_up(collect, scripted, to_origin):
    """Terminations put the two environments out of step; each keeps its own plan."""
    policy = scripted(lambda s: to_origin(s).repeat(1, 3, 1) * 0.7, chunk=3)
    _, trajectories = collect(policy, 40, num_envs=2, limit=20, task="reach-terminates")
    assert len({len(f["steps"]) for f in trajectories}) > 1
    for fields in trajectories:
        steps = fields["steps"][:-1]
        assert (steps[:-1] == 3).all() and 1 <= steps[-1] <= 3
        passed = torch.cat([torch.zeros(1), steps.cumsum(0)])
        assert torch.equal(fields["obs.state"][:, 3], passed.float())


def test_random_steps(collect, scripted):
    """Six random steps in two environments: three each, then the policy."""
    policy = scripted(lambda s: torch.full((len(s), 1, 2), 0.25))
    _, trajectories = collect(policy, 5, num_envs=2, limit=5, random_steps=6)
    for fields in trajectories:
        action = fields["action"][:5, 0]
        assert (action[:3] != 0.25).all() and action[:3].abs().max() <= 1
        assert (action[3:] == 0.25).all()
    _, (fields,) = collect(policy, 400, limit=400, random_steps=10**6, max_trajectory_steps=500)
    values = fields["action"][:400].flatten()
    # uniform on [-1, 1]: mean 0, variance 1/3; five standard errors over 800 draws
    assert abs(float(values.mean())) < 0.1 and float(values.var()) == pytest.approx(1 / 3, abs=0.06)


def test_long_episodes_enter_in_pieces(collect, scripted, to_origin):
    collector, pieces = collect(scripted(to_origin), 20, limit=20, max_trajectory_steps=8)
    assert [len(f["steps"]) - 1 for f in pieces] == [8, 8, 4]
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert torch.equal(before["obs.state"][-1], after["obs.state"][0])
        assert not before["truncated"].any() and not before["terminated"].any()
        assert (before["action"][-1] == 0).all() and before["steps"][-1] == 0
    assert pieces[-1]["truncated"].nonzero().flatten().tolist() == [3]
    assert torch.cat([f["obs.state"][:-1, 3] for f in pieces]).tolist() == list(range(20))
    stats = collector.pop_stats()
    assert stats.lengths == [20], "one episode all the same"
    total = sum(float(f["reward"].sum()) for f in pieces)
    assert stats.returns == [pytest.approx(total, rel=1e-5)]


def test_features_are_those_of_the_observation(collect, scripted, to_origin):
    _, pieces = collect(scripted(to_origin), 12, limit=6, features=True, max_trajectory_steps=4)
    assert len(pieces) == 4
    for fields in pieces:
        state = fields["obs.state"]
        assert torch.equal(fields["features.vector"], state / 2), "the last row included"
        assert torch.equal(fields["features.base_action"], to_origin(state))


def test_exploration_sees_the_step_count(collect, make_backbone, make_config):
    """A residual actor whose ramp is far away acts with the base action at first."""
    config = make_config("actor.residual_ramp_steps=1000000000")
    backbone = make_backbone()
    actor = ACTORS.get("residual").for_backbone(backbone, config.actor, None)
    policy = Policy(backbone, "state", actor, "residual")
    _, (fields,) = collect(policy, 5, features=True)
    assert torch.equal(fields["action"][:5], fields["features.base_action"][:5])
    actor.ramp_steps = 0
    _, (fields,) = collect(policy, 5, features=True)
    assert (fields["action"][:5] != fields["features.base_action"][:5]).any()


# ---------------------------------------------------------------- going on from a checkpoint


def same_trajectories(ours, theirs) -> None:
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one.fields.keys() == two.fields.keys()
        for name, value in one.fields.items():
            assert torch.equal(value, two.fields[name]), name
            assert value.dtype == two.fields[name].dtype, name


@pytest.mark.parametrize("before", [0, 3, 11, 12, 16])
def test_episodes_in_progress_go_on(make_collector, scripted, to_origin, before):
    """Chunks of three of which two run, pieces of two decisions, environments out of step."""
    settings = {"num_envs": 3, "limit": 7, "task": "reach-terminates", "max_trajectory_steps": 2}
    policy = scripted(lambda s: to_origin(s).repeat(1, 3, 1) * 0.4, chunk=3, execute=2)
    straight, expected = make_collector(policy, **settings, features=True)
    straight.start()
    advance(straight, before)
    state, done = straight.state_dict(), len(expected.trajectories)
    left = [0 if e["plan"] is None else len(e["plan"]) for e in state["episodes"]]
    assert left == [e["steps"] % 2 for e in state["episodes"]], "what is left: checkpoint.VERSION 4"
    resumed, found = make_collector(policy, **settings, features=True)
    resumed.load_state_dict(state)
    assert resumed.start() == 0 and resumed.dropped == 0
    advance(straight, 20)
    advance(resumed, 20)
    same_trajectories(found.trajectories, expected.trajectories[done:])
    same_trajectories(resumed.recent, straight.recent)
    assert resumed.pop_stats() == straight.pop_stats(), "unreported episodes are kept"
    assert resumed.env_steps == straight.env_steps
    assert resumed.state_dict().keys() == state.keys()


def test_episodes_that_come_out_different_are_dropped(
    make_collector, make_env, scripted, to_origin
):
    """What the environments do not come back to begins anew, with the next seed."""
    settings = {"num_envs": 3, "limit": 9}
    policy = scripted(to_origin)
    straight, _ = make_collector(policy, **settings)
    straight.start()
    advance(straight, 13)
    env = make_env("reach", 3, 9)

    def resume(state, next_seeds):
        env._state[:] = state["state"].numpy()
        env._start(1, next_seeds[1])
        return env._obs(), torch.tensor([False, True, False])

    env.resume = resume
    resumed, found = make_collector(policy, env=env, **settings)
    resumed.load_state_dict(straight.state_dict())
    assert resumed.start() == 1 and resumed.dropped == 1
    advance(resumed, 9)
    seeds = [int(t.fields["obs.state"][0, 2]) for t in found.trajectories]
    numbers = [(0, 1), (2, 1), (1, 2)]  # the first two end after five more steps
    assert seeds == [episode_seed(SEED, env, n) % 10_000 for env, n in numbers]
    assert all(t.length == 9 for t in found.trajectories)


def test_another_number_of_environments_is_refused(make_collector, scripted, to_origin):
    policy = scripted(to_origin)
    state = make_collector(policy, num_envs=3)[0].state_dict()
    with pytest.raises(ValueError, match=r"has 3 environments, env\.num_envs is 2"):
        make_collector(policy, num_envs=2)[0].load_state_dict(state)


def test_lost_environment_drops_its_episode(make_collector, make_env, scripted, to_origin):
    """`restarted` ends the episode without a trace; the others do not notice."""
    env = make_env("reach", 2, 5)
    lost_at, steps, receive = 3, [], env.recv

    def recv():
        steps.append(None)
        result = receive()
        if len(steps) == lost_at:
            env._start(1, collector._seeds(ahead=1)[1])
            result.restarted[1] = True
            result.reward[1] = 1e9  # means nothing
            result.obs["state"][1] = torch.from_numpy(env._state[1])
        return result

    env.recv = recv
    collector, sink = make_collector(scripted(to_origin), num_envs=2, env=env)
    collector.start()
    advance(collector, 8)
    seeds = [int(t.fields["obs.state"][0, 2]) for t in sink.trajectories]
    assert seeds == [episode_seed(SEED, e, n) % 10_000 for e, n in ((0, 0), (1, 1))]
    assert collector.dropped == 1 and collector.env_steps == 16
    stats = collector.pop_stats()
    assert stats.lengths == [5, 5] and all(abs(r) < 10 for r in stats.returns)
