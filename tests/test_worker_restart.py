"""Worker processes that really die or hang: started again, told, and not for ever."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU
from tiny_env import DIES_DRAWING, LIMIT, STRAYS, TinyEnv

from embodied_rl.builders import build_policy
from embodied_rl.collector import Collector
from embodied_rl.config import RolloutConfig
from embodied_rl.distributed import Ranks
from embodied_rl.envs import worker as worker_module
from embodied_rl.envs.worker import WorkerVecEnv
from embodied_rl.errors import RunStopped, UserError
from embodied_rl.evaluator import Evaluator
from embodied_rl.examiner import Examiner
from embodied_rl.guard import Guard
from embodied_rl.metrics import read_records
from embodied_rl.progress import Progress
from embodied_rl.registry import ENVS
from embodied_rl.stopping import StopRequest
from embodied_rl.trainer import Trainer

pytestmark = pytest.mark.unit
OK, DIE, HANG, RAISE = 0.25, 1.0, -1.0, 0.85


@pytest.fixture
def make_env():
    opened = []

    def make(num_envs: int = 3, timeout: float = 60.0, rebuild_every: int = 1) -> WorkerVecEnv:
        args = ("tiny", rebuild_every > 1)
        opened.append(WorkerVecEnv(TinyEnv, args, num_envs, ("tiny_env",), timeout, rebuild_every))
        return opened[-1]

    yield make
    for env in opened:
        env.close()


def kill(env: WorkerVecEnv, i: int, number: int = signal.SIGKILL) -> None:
    """Returns once the process is gone (or stopped)."""
    process = env._workers[i].process
    os.kill(process.pid, number)
    if number == signal.SIGKILL:
        process.join(10)


def step(env: WorkerVecEnv, actions, seeds):
    env.send(torch.tensor(actions)[:, None], seeds)
    return env.recv()


def states(obs) -> list[list[float]]:
    return obs["state"].tolist()


def test_killed_worker_is_back_in_its_next_episode(make_env):
    env = make_env()
    env.reset([1, 2, 3])
    before = step(env, [OK, OK, OK], [11, 12, 13])
    assert not before.restarted.any() and env.pop_warnings() == []
    others = [env._workers[i].process.pid for i in (0, 2)]
    kill(env, 1)
    result = step(env, [OK, OK, OK], [11, 12, 13])
    assert result.restarted.tolist() == [False, True, False]
    assert states(result.obs) == [[1, 2, 0.5], [12, 0, 0], [3, 2, 0.5]]
    assert not result.truncated.any() and result.reward[::2].tolist() == [OK, OK]
    (warning,) = env.pop_warnings()
    assert warning.startswith("environment worker 1 ended with exit code -9 (killed, most often")
    assert env.pop_warnings() == []
    assert [env._workers[i].process.pid for i in (0, 2)] == others, "the others are unaffected"
    after = step(env, [OK, 0.5, OK], [11, 22, 13])
    assert states(after.obs) == [[1, 3, 0.75], [12, 1, 0.5], [3, 3, 0.75]]
    assert not after.restarted.any()


def test_crash_and_hang_during_a_step(make_env):
    env = make_env(timeout=2.0)
    env.reset([1, 2, 3])
    started = time.monotonic()
    result = step(env, [HANG, OK, DIE], [11, 12, 13])
    assert result.restarted.tolist() == [True, False, True]
    assert states(result.obs) == [[11, 0, 0], [2, 1, 0.25], [13, 0, 0]]
    hung, died = env.pop_warnings()
    assert hung == "environment worker 0 did not answer within 2 s; it was started again."
    assert died == "environment worker 2 ended with exit code -11; it was started again."
    assert time.monotonic() - started < 60


def test_stopped_process_counts_as_hanging(make_env):
    env = make_env(num_envs=1, timeout=1.0)
    env.reset([1])
    kill(env, 0, signal.SIGSTOP)
    assert step(env, [OK], [11]).restarted.tolist() == [True]


def test_slow_is_not_hanging(make_env):
    """Time in which the caller did not wait, updates say, does not count."""
    env = make_env(num_envs=1, timeout=1.0)
    env.reset([1])
    env.send(torch.tensor([[OK]]), [11])
    time.sleep(2)
    assert not env.recv().restarted.any()


def test_reset_and_resume_are_repeated(make_env):
    env = make_env(num_envs=2)
    kill(env, 0)
    assert states(env.reset([1, 2])) == [[1, 0, 0], [2, 0, 0]]
    step(env, [OK, 0.5], [11, 12])
    state = env.state_dict()
    kill(env, 1)
    shown, restarted = env.resume(state, [11, 12])
    assert not restarted.any() and states(shown) == [[1, 1, 0.25], [2, 1, 0.5]]
    assert len(env.pop_warnings()) == 2
    result = step(env, [OK, OK], [11, 12])
    assert not result.restarted.any(), "nothing was lost"
    assert states(result.obs) == [[1, 2, 0.5], [2, 2, 0.75]]


@pytest.mark.parametrize("steps", range(0, 4 * LIMIT, 3))
def test_resume_repeats_what_a_reset_does_not_wipe_out(make_env, steps):
    """Traces of earlier episodes are there again: the past is repeated from the last rebuild."""

    def run(env, count):
        results = []
        for t in range(count):
            episode = 1 + env.total // LIMIT
            env.total += 1
            results.append(states(step(env, [OK, 0.5 - t / 100], [episode, 100 + episode]).obs))
        return results

    env = make_env(num_envs=2, rebuild_every=3)
    env.total = 0
    env.reset([0, 100])
    run(env, steps)
    state = env.state_dict()
    assert len(state["past"][0]["seeds"]) == 1 + steps // LIMIT % 3, "no longer than that"
    other = make_env(num_envs=2, rebuild_every=3)
    other.total = steps
    _, restarted = other.resume(state, [0, 0])
    assert not restarted.any()
    assert run(other, 4 * LIMIT) == run(env, 4 * LIMIT)


def test_resume_in_a_simulator_that_is_not_deterministic(make_env):
    env = make_env(num_envs=3)
    env.reset([1, STRAYS, 3])
    step(env, [OK, OK, OK], [11, 12, 13])
    shown, restarted = env.resume(env.state_dict(), [11, 12, 13])
    assert restarted.tolist() == [False, True, False]
    assert states(shown) == [[1, 1, 0.25], [12, 0, 0], [3, 1, 0.25]]
    assert states(env.state_dict()["shown"]) == states(shown)
    assert states(step(env, [OK, OK, OK], [21, 22, 23]).obs)[1] == [12, 1, 0.25]


def test_crash_while_drawing(make_env):
    env = make_env(num_envs=2)
    env.reset([1, DIES_DRAWING])
    assert env.render(0).shape == (16, 16, 3)
    assert env.render(1) is None and env.render(1) is None
    result = step(env, [OK, OK], [11, 12])
    assert result.restarted.tolist() == [False, True]
    assert states(result.obs) == [[1, 1, 0.25], [12, 0, 0]]
    assert env.render(1) is not None


def make_tiny(config, num_envs, device) -> WorkerVecEnv:
    return WorkerVecEnv(TinyEnv, ("tiny",), num_envs, ("tiny_env",))


@pytest.mark.parametrize("seed", [DIES_DRAWING, DIES_DRAWING + 10])
def test_a_renderer_that_crashes_costs_the_films_alone(
    make_config, scripted, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(ENVS, "_table", {**ENVS._table, "tiny": f"{__name__}:make_tiny"})
    config, said = make_config(), []
    config.env.type, config.env.in_process = "tiny", False
    config.eval.video, config.eval.final_seed, config.eval.episodes = True, seed, 3
    config.eval.video_episodes = 2
    guard, logger = Guard(tmp_path / "failure", enabled=True), SimpleNamespace(say=said.append)
    examiner = Examiner(config, CPU, Ranks(), guard, Progress(), logger)
    policies = [scripted(lambda s, a=a: torch.full((len(s), 1, 1), a)) for a in (OK, 2 * OK)]
    results = examiner.compare(*policies)
    assert results["pretrained"]["return"] == LIMIT * OK == results["final"]["return"] / 2
    examiner.film(*policies, tmp_path)
    examiner.close()
    films = {path.name for path in tmp_path.glob("*.mp4")}
    if seed == DIES_DRAWING:
        assert len(said) == 1 and "no videos" in said[0] and "eval.video=false" in said[0]
        assert not films
    else:
        assert films == {"first.mp4", "last.mp4"} and not said


def test_too_many_losses_end_the_run(make_env):
    env = make_env(num_envs=1)
    env.reset([1])
    for _ in range(worker_module.MAX_LOSSES):
        assert step(env, [DIE], [11]).restarted.all()
    with pytest.raises(RunStopped, match=r"lost 4 times within 60 minutes; .* 0, ended with exit"):
        step(env, [DIE], [11])


def test_old_losses_are_forgotten(make_env, monkeypatch):
    monkeypatch.setattr(worker_module, "WINDOW", 0.0)
    env = make_env(num_envs=1)
    env.reset([1])
    for _ in range(worker_module.MAX_LOSSES + 2):
        assert step(env, [DIE], [11]).restarted.all()


def test_an_exception_is_no_death(make_env):
    """A mistake in an environment's code would only come again."""
    env = make_env(num_envs=1)
    env.reset([1])
    with pytest.raises(RuntimeError, match="a mistake in the environment's own code"):
        step(env, [RAISE], [11])


def test_signals_to_the_whole_group_leave_workers_alone(make_env):
    """`kill -TERM -<group>`, as a service manager sends it: the trainer then ends them itself."""
    env = make_env(num_envs=2)
    env.reset([1, 2])
    for number in (signal.SIGTERM, signal.SIGINT):
        for i in range(2):
            os.kill(env._workers[i].process.pid, number)
    time.sleep(0.3)
    assert not step(env, [OK, OK], [11, 12]).restarted.any()


def test_worker_that_dies_at_the_start():
    with pytest.raises(UserError, match=r"worker ended with exit code 3 while it started"):
        WorkerVecEnv(os._exit, (3,), 1)


class Sink:
    def __init__(self) -> None:
        self.trajectories = []

    def add(self, trajectory) -> None:
        self.trajectories.append(trajectory)


def test_collector_drops_the_episode_and_goes_on(make_env, scripted, tmp_path):
    env, sink = make_env(num_envs=2), Sink()
    collector = Collector(
        env,
        scripted(lambda s: torch.full((len(s), 1, 1), OK)),
        sink,  # type: ignore[arg-type]
        RolloutConfig(),
        Guard(tmp_path, enabled=True),
        store_features=False,
        seed=0,
        device=CPU,
    )
    collector.start()
    for t in range(3 * LIMIT):
        if t == 7:  # in the second episode
            kill(env, 1)
        collector.begin()
        collector.end()
    assert collector.dropped == 1
    assert all(t.length == LIMIT for t in sink.trajectories) and len(sink.trajectories) == 5
    for trajectory in sink.trajectories:
        seed, count, total = trajectory.fields["obs.state"].unbind(1)
        assert (seed == seed[0]).all() and count.tolist() == list(range(LIMIT + 1))
        assert total.tolist() == [OK * t for t in range(LIMIT + 1)]


def test_evaluation_repeats_the_episode(make_env, scripted):
    """Every seed is scored, each once, whatever dies."""
    policy = scripted(lambda s: (s[:, :1] / 100)[:, None])  # the return tells the seed
    env = make_env(num_envs=2)
    evaluator = Evaluator(env, 5, CPU)
    expected = evaluator.run(policy, 10).stats
    receive, calls = env.recv, []

    def recv():
        calls.append(None)
        if len(calls) in (3, 9):
            kill(env, len(calls) % 2)
        return receive()

    env.recv = recv
    assert evaluator.run(policy, 10).stats == expected
    assert len(env.pop_warnings()) == 2
    assert expected.returns == pytest.approx([LIMIT * (10 + e) / 100 for e in range(5)])


# ---------------------------------------------------------------- in a run


@pytest.fixture
def trainer(make_config, tmp_path):
    """A run on Pendulum whose training workers the test can reach."""
    from embodied_rl.builders import build_env

    config = make_config(
        "env.type=gymnasium",
        "env.task=Pendulum-v1",
        "env.max_episode_steps=20",
        "eval.metric=return",
        "algorithm.update_epoch=2",
        "train.total_steps=320",
        "train.log_interval=160",
        "train.checkpoint_interval=64",
        "eval.interval=0",
    )
    env = build_env(config.env, 2, CPU)
    policy = build_policy(config, env.spec, CPU)
    with StopRequest() as stop:
        yield Trainer(config, tmp_path, env, policy, CPU, stop)
    env.close()


def kill_at(trainer, steps: set[int]) -> None:
    begin = trainer.collector.begin

    def with_deaths():
        if trainer.step in steps:
            kill(trainer.env, 1)
        begin()

    trainer.collector.begin = with_deaths


def test_a_run_survives_and_tells(trainer, capsys):
    kill_at(trainer, {100, 230})
    assert trainer.run(resume=False)["env_steps"] == 320
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("warning: environment worker 1 ended")]
    assert len(told) == 2
    logged = [r for r in read_records(trainer.run_dir / "metrics.jsonl") if "train/return" in r]
    assert [r["train/dropped_episodes"] for r in logged] == [1, 2]


def test_repeated_deaths_stop_the_run_clearly(trainer):
    kill_at(trainer, set(range(100, 320, 2)))
    with pytest.raises(RunStopped) as caught:
        trainer.run(resume=False)
    message = str(caught.value)
    assert "environment workers were lost 4 times" in message
    last = trainer.checkpoints.last
    assert last == "step_000000064" and f"{last}, is intact" in message
    assert f"python -m embodied_rl.train resume={trainer.run_dir}" in message
