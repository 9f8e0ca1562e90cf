"""Collecting in a process of its own: counts, staleness, checkpoints, and every way to die."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from conftest import TINY

from embodied_rl.builders import add_judge, build_env, build_policy, build_q_head
from embodied_rl.channel import HANDLE, Channel
from embodied_rl.checkpoint import read_checkpoint
from embodied_rl.collecting_process import CollectingProcess, collecting_device, open_env
from embodied_rl.collector import Collector, episode_seed
from embodied_rl.distributed import Ranks
from embodied_rl.errors import UserError
from embodied_rl.metrics import read_records
from embodied_rl.remote_collector import RemoteCollector
from embodied_rl.replay.reader import read_all
from embodied_rl.shared_weights import SharedWeights, moving
from embodied_rl.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TIMEOUT = 300  # seconds, against hanging only
ENVS, LIMIT, STEPS, UPDATES = 2, 10, 8, 5
WORDS = (
    f"env.num_envs={ENVS}",
    f"env.max_episode_steps={LIMIT}",
    f"rollout.steps={STEPS}",
    f"algorithm.update_epoch={UPDATES}",
    "eval.interval=160",
    "train.log_interval=80",
    "train.checkpoint_interval=64",
    "train.total_steps=320",
)
ASYNC = "rollout.asynchronous=true"


def seeds_of(run: Path) -> list[int]:
    """Seeds of the episodes in a replay, in its order; each must be whole."""
    found = [t.fields["obs.state"] for t in read_all(run / "replay")]
    assert all(state[:, 3].tolist() == list(range(LIMIT + 1)) for state in found)
    assert all((state[:, 2] == state[0, 2]).all() for state in found)
    return [int(state[0, 2]) for state in found]


def expected_seeds(steps: int) -> list[int]:
    """Those of all episodes that end within so many steps of both environments together."""
    numbers = range(steps // ENVS // LIMIT)
    return [episode_seed(0, e, n) % 10_000 for n in numbers for e in range(ENVS)]


def expected_updates(steps: int) -> int:
    """Updates of a run: none before the first two episodes, which end together."""
    first, total = LIMIT, steps // ENVS

    def until(s: int) -> int:
        return s // STEPS * UPDATES + s % STEPS * UPDATES // STEPS

    return until(total) - until(first)


# ---------------------------------------------------------------- the parts, without a process


@pytest.mark.unit
def test_channel_carries_tensors_json_and_a_descriptor():
    ours, theirs = multiprocessing.Pipe()
    sent = {
        "nested": [{"a": torch.arange(3), "b": None}, [1.5, "x", True]],
        "flag": torch.tensor(True),
        "image": torch.randint(255, (2, 4, 4, 3), dtype=torch.uint8),
        7: "keys may be numbers",
    }
    read, write = os.pipe()
    Channel(ours).send(sent, write)
    Channel(ours).send({"next": []})
    received = Channel(theirs).receive()
    os.write(received.pop(HANDLE), b"through")
    assert os.read(read, 10) == b"through"
    assert received.keys() == sent.keys() and received["nested"][1] == sent["nested"][1]
    assert torch.equal(received["nested"][0]["a"], torch.arange(3))
    assert received["flag"].dtype == torch.bool and received["flag"].shape == ()
    assert torch.equal(received["image"], sent["image"])
    assert Channel(theirs).receive() == {"next": []}
    ours.close()
    with pytest.raises(EOFError):
        Channel(theirs).receive()


@pytest.mark.unit
@pytest.mark.parametrize("extra", [(), ("actor.batch_renorm=true",)])
def test_weights_arrive_as_they_were_published(make_policy, extra):
    ours, theirs = make_policy(*extra), make_policy(*extra)
    shared = SharedWeights(ours)
    loaded = SharedWeights(theirs, shared.handle)
    assert loaded.layout == shared.layout and len(shared.layout) == len(moving(ours)) > 0
    for tensor in moving(ours).values():
        tensor.copy_(torch.randint(100, tensor.shape))
    shared.publish(7)
    for tensor in moving(ours).values():
        tensor.zero_()  # not published
    assert loaded.load() == 7 and any(t.any() for t in moving(theirs).values())
    for tensor in moving(ours).values():
        tensor.fill_(3)
    shared.publish(9)
    assert loaded.load() == 9
    assert all((tensor == 3).all() for tensor in moving(theirs).values())


@pytest.mark.unit
def test_judge_and_trained_backbone_are_published(make_config, flow_folder, spec):
    """Whatever acting depends on and training moves: the collector acts as the learner would."""
    words = (f"policy.path={flow_folder}", "policy.cache_features=false", "policy.trainable=lora")
    config = make_config(*words, "actor.type=residual", "actor.candidates=3")
    policies = []
    for seed in range(2):
        torch.manual_seed(seed)
        policy = build_policy(config, spec, CPU)
        add_judge(config, policy, build_q_head(config, policy, CPU))
        for tensor in policy.trained_parameters():
            torch.nn.init.normal_(tensor)
        policies.append(policy)
    ours, theirs = policies
    owners = {name.partition(".")[0] for name in moving(ours)}
    assert owners == {"actor", "judge", "backbone"}
    obs = {"state": torch.randn(5, 4)}

    def act(policy):
        return policy.act(obs, generator=torch.Generator().manual_seed(1))

    assert not torch.equal(act(ours), act(theirs))
    shared = SharedWeights(ours)
    shared.publish(1)
    SharedWeights(theirs, shared.handle).load()
    assert torch.equal(act(ours), act(theirs))
    same = theirs.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in ours.state_dict().items())


def load_until(pipe, config, spec, last: int) -> None:
    """A process that loads weights over and over; all their values must be the version."""
    channel = Channel(pipe)
    policy = build_policy(config, spec, CPU)
    weights = SharedWeights(policy, channel.receive()[HANDLE])
    seen, torn = set(), 0
    channel.send({"ready": True})
    while last not in seen:
        version = weights.load()
        seen.add(version)
        torn += any((t != version).any() for t in moving(policy).values())
    channel.send({"seen": len(seen), "torn": torn})


@pytest.mark.e2e
def test_no_reader_sees_half_of_an_update(make_config, spec):
    config = make_config("actor.hidden=[512,512]")
    policy = build_policy(config, spec, CPU)
    shared, last = SharedWeights(policy), 400

    def publish(version: int) -> None:
        for tensor in moving(policy).values():
            tensor.fill_(version)
        shared.publish(version)

    publish(0)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=load_until, args=(theirs, config, spec, last))
    process.start()
    channel = Channel(ours)
    channel.send({}, shared.handle)
    channel.receive()
    for version in range(1, last + 1):
        publish(version)
    answer = channel.receive()
    process.join()
    assert answer["torn"] == 0 and answer["seen"] > 2


class Playing:
    """Stands for the collecting process: acts at once where it may, or as late as it can."""

    num_envs = ENVS

    def __init__(self, policy, *, eager: bool) -> None:
        self.policy, self.eager = policy, eager
        self.warnings: list[str] = []
        self.reports, self.granted, self.taken, self.most = deque(), 0, 0, 0
        self.announced: list[int] = []

    def ask(self, message, handle=None):
        if message["do"] == "weigh":
            self.weights = SharedWeights(self.policy, handle)
        return {"different": 0, "dropped": 0, "state": {"taken": self.taken}}

    def send(self, message) -> None:
        assert message["do"] == "grant" and message["steps"] > self.granted
        self.granted = message["steps"]
        self.announced += message["saved"]
        while self.eager and self.taken < self.granted:
            self.act()

    def act(self) -> None:
        self.taken += 1
        report = {"decisions": ENVS, "version": self.weights.load(), "dropped": 0, "warnings": []}
        report |= {"trajectories": [], "stats": {}, "waited": 0.25, "seconds": 1.0}
        if self.taken in self.announced:
            report["state"] = {"taken": self.taken}
        self.reports.append(report)
        self.most = max(self.most, len(self.reports))

    def receive(self):
        if not self.eager:
            self.act()
        return self.reports.popleft()


@pytest.mark.unit
@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("updates", [1, UPDATES, 32])
@pytest.mark.parametrize("eager", [True, False])
def test_staleness_stays_below_its_bound(make_config, make_policy, ahead, updates, eager):
    """The most eager process comes as close to (ahead + 1) * update_epoch as one can."""
    config = make_config(*WORDS, ASYNC, f"rollout.ahead={ahead}", "train.total_steps=480")
    process = Playing(make_policy(), eager=eager)
    done = [0]
    whole = ENVS * STEPS
    collector = RemoteCollector(
        process,
        make_policy(),
        None,
        config,
        Ranks(),
        updates=lambda: done[0],
        saves=lambda step: step % (2 * whole) == 0,
    )
    assert collector.state_dict()["taken"] == 0, "before the start"
    collector.start()
    while collector.env_steps < 480:
        for s in range(STEPS):
            collector.begin()
            done[0] += (s + 1) * updates // STEPS - s * updates // STEPS
            collector.end()
        if collector.env_steps % (2 * whole) == 0:
            assert collector.state_dict()["taken"] == collector.env_steps // ENVS
    assert process.taken == process.granted == 240, "no step beyond the end"
    assert process.announced == list(range(2 * STEPS, 241, 2 * STEPS))
    speed = collector.pop_speed()
    bound = (ahead + 1) * updates
    assert 0 < speed["staleness"] <= speed["staleness_max"] < bound
    if eager:
        assert process.most == ahead * STEPS
        assert speed["staleness_max"] == (ahead * STEPS + STEPS - 1) * updates // STEPS
    else:
        assert speed["staleness_max"] == updates, "an iteration's, as weights are published"
    assert speed["collector_waits"] == pytest.approx(0.25) and 0 <= speed["learner_waits"] <= 1
    assert collector.pop_speed()["staleness_max"] == 0, "since the last call"


@pytest.mark.unit
def test_settles_after_what_is_under_way(make_config, make_policy):
    config = make_config(*WORDS, ASYNC, "rollout.ahead=2", "train.total_steps=100000")
    process = Playing(make_policy(), eager=True)
    collector = RemoteCollector(
        process,
        make_policy(),
        None,
        config,
        Ranks(),
        updates=lambda: 0,
        saves=lambda step: step == 4 * ENVS * STEPS,
    )
    assert collector.settle(), "nothing has begun"
    collector._settling = False
    collector.start()

    def iterate() -> None:
        for _ in range(STEPS):
            collector.begin()
            collector.end()

    iterate()
    with pytest.raises(RuntimeError, match="no checkpoint was announced"):
        collector.state_dict()
    for _ in range(2):
        assert not collector.settle()
        iterate()
    assert collector.settle() and process.taken == 3 * STEPS
    assert collector.state_dict()["taken"] == 3 * STEPS
    collector._settling = False
    collector._grant()
    iterate()
    assert collector.settle(), "a checkpoint was announced for here"
    assert process.taken > 4 * STEPS and collector.state_dict()["taken"] == 4 * STEPS


# ---------------------------------------------------------------- whole runs


class StopAt:
    """Asks for a stop at the first iteration from `step` on."""

    def __init__(self, step: int | None) -> None:
        self.step, self.trainer = step, None

    @property
    def requested(self) -> bool:
        assert self.trainer is not None
        return self.step is not None and self.trainer.step >= self.step


@pytest.fixture
def train(make_config):
    """`train(folder, word, ...)`: runs a trainer as the command line does; returns it."""

    def run(folder: Path, *words: str, resume: bool = False, stop: int | None = None) -> Trainer:
        config = make_config(*WORDS, *words)
        request = StopAt(stop)
        folder.mkdir(exist_ok=True)
        env = open_env(config, CPU, config.seed, Ranks(), folder)
        try:
            policy = build_policy(config, env.spec, CPU)
            trainer = request.trainer = Trainer(config, folder, env, policy, CPU, request)
            trainer.run(resume=resume)
        finally:
            env.close()
        return trainer

    return run


@pytest.mark.e2e
@pytest.mark.parametrize(("head", "ahead"), [("crossq", 1), ("default", 3)])
def test_trains_to_the_end(train, tmp_path, head, ahead):
    """As many steps, updates and episodes as configured, each episode once and in order."""
    words = (f"algorithm.q_head_type={head}", f"rollout.ahead={ahead}", ASYNC)
    trainer = train(tmp_path / "run", *words)
    assert isinstance(trainer.collector, RemoteCollector)
    assert trainer.step == 320 and trainer.progress.updates == expected_updates(320)
    assert seeds_of(tmp_path / "run") == expected_seeds(320)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["env_steps"] == 320 and results["updates"] == expected_updates(320)
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "train/updates" in r]
    assert [r["step"] for r in records] == [80, 160, 240, 320]
    assert [r["train/updates"] for r in records] == [expected_updates(r["step"]) for r in records]
    assert sum(r["speed/staleness_max"] for r in records) > 0
    for record in records:
        assert 0 <= record["speed/staleness"] <= record["speed/staleness_max"]
        assert record["speed/staleness_max"] < (ahead + 1) * UPDATES
        assert 0 <= record["speed/learner_waits"] <= 1 and 0 <= record["speed/collector_waits"] <= 1
        assert all(math.isfinite(value) for value in record.values())


@pytest.mark.e2e
def test_asynchronous_and_synchronous_runs_continue_one_another(train, tmp_path):
    """Stopped in the middle of episodes, twice; the third goes on from the second's noise."""
    run = tmp_path / "run"
    stopped = train(run, stop=112)
    assert isinstance(stopped.collector, Collector) and stopped.step == 112
    assert "generators" not in part(run, "collector")
    resumed = train(run, ASYNC, resume=True, stop=176)
    assert 176 <= resumed.step <= 176 + ENVS * STEPS and resumed.collector.dropped == 0
    assert resumed.progress.updates == expected_updates(resumed.step)
    state = part(run, "collector")
    assert state["env_steps"] == resumed.step and state["generators"]
    assert all(episode["steps"] for episode in state["episodes"])
    again = train(run, ASYNC, resume=True, stop=192)
    assert again.step < 320
    last = train(run, resume=True)
    assert last.step == 320 and last.progress.updates == expected_updates(320)
    assert last.collector.dropped == 0
    assert seeds_of(run) == expected_seeds(320)


@pytest.mark.e2e
def test_what_cannot_be_built_is_told(make_config):
    config = make_config(ASYNC, "env.task=rech")
    with pytest.raises(UserError, match="Did you mean 'reach'"):
        open_env(config, CPU, 0, Ranks(), Path("nowhere"))


@pytest.mark.unit
def test_its_device_is_checked_before_it_starts(make_config):
    config = make_config(ASYNC, "rollout.device=gpu")
    with pytest.raises(UserError, match=r"rollout\.device='gpu' is not known"):
        open_env(config, CPU, 0, Ranks(), Path("nowhere"))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "learner", "place"),
    [
        (None, "cuda:1", "cuda:1"),
        ("auto", "cuda:1", "cuda:1"),
        ("cuda", "cuda:1", "cuda:1"),
        ("cuda:0", "cuda:1", "cuda:0"),
        ("cpu", "cuda:1", "cpu"),
        (None, "cpu", "cpu"),
        ("cuda", "cpu", "cuda:1"),
    ],
)
def test_its_device_is_that_of_its_learner(monkeypatch, name, learner, place):
    """Of the second process on a machine of two GPUs."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert collecting_device(name, torch.device(learner)) == torch.device(place)


@pytest.mark.unit
def test_trainer_refuses_environments_of_its_own(make_config, make_policy, tmp_path):
    config = make_config(ASYNC)
    env = build_env(config.env, 2, CPU)
    with pytest.raises(ValueError, match="wants a CollectingProcess"):
        Trainer(config, tmp_path, env, make_policy(), CPU, StopAt(None))


def part(run: Path, name: str) -> dict:
    """One part of the newest checkpoint."""
    return read_checkpoint((run / "checkpoints" / "last").resolve())[0][name]


# ---------------------------------------------------------------- from the command line


def start(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Starts a run with a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "embodied_rl.train", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(process: subprocess.Popen, run: Path) -> None:
    """Waits for one that was written after training began."""
    deadline = time.monotonic() + TIMEOUT
    while not [p for p in (run / "checkpoints").glob("step_*") if int(p.name[5:]) > 0]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below one, by number."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z":
                parents[int(folder.name)] = int(stat[1])
                line = (folder / "cmdline").read_bytes()
                commands[int(folder.name)] = line.replace(b"\0", b" ").decode()
        except OSError:
            continue
    found, level = {}, {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= {child: commands[child] for child in level}
    return found


def collector_of(pid: int) -> int:
    """The collecting process of a learner."""
    found = [p for p, line in descendants(pid).items() if "multiprocessing.spawn" in line]
    assert len(found) == 1
    return found[0]


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(below: dict[int, str]) -> None:
    """Waits until none of these processes is alive."""
    deadline = time.monotonic() + TIMEOUT
    while left := [pid for pid in below if alive(pid)]:
        assert time.monotonic() < deadline, [below[pid] for pid in left]
        time.sleep(0.05)


LONG = ("train.total_steps=1000000", "eval.interval=0", "run_dir=run")
PENDULUM = ("env.type=gymnasium", "env.task=Pendulum-v1", "eval.metric=return")


@pytest.mark.e2e
def test_sigkill_of_the_learner_leaves_no_orphan(tmp_path):
    """Collecting process, simulators, servers: all are gone soon."""
    process = start(tmp_path, *TINY, *WORDS, *PENDULUM, *LONG, ASYNC)
    wait_for_checkpoint(process, tmp_path / "run")
    below = descendants(process.pid)
    own = descendants(collector_of(process.pid))
    assert len([line for line in own.values() if "forkserver" in line]) >= ENVS
    process.kill()
    gone(below)
    process.communicate()


@pytest.mark.e2e
def test_sigkill_of_the_collector_ends_the_run(tmp_path):
    process = start(tmp_path, *TINY, *WORDS, *LONG, ASYNC)
    wait_for_checkpoint(process, tmp_path / "run")
    collector = collector_of(process.pid)
    os.kill(collector, signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2
    assert f"error: the collecting process (rollout.asynchronous=true, pid {collector}) " in err
    assert "ended with exit code -9 (killed" in err and "Traceback" not in err
    assert "is intact; to continue from it: python -m embodied_rl.train resume=run" in err


@pytest.mark.e2e
def test_ctrl_c_stops_and_resume_goes_on(tmp_path):
    """SIGINT to the whole group, as a terminal sends it: nothing is lost, nothing comes twice."""
    run = tmp_path / "run"
    process = start(tmp_path, *TINY, *WORDS, *LONG, ASYNC)
    wait_for_checkpoint(process, run)
    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "stopped; continue with: python -m embodied_rl.train resume=run" in out
    assert "Traceback" not in err
    gone(below)
    saved = part(run, "collector")["env_steps"]
    assert saved % (ENVS * STEPS) == 0
    assert part(run, "progress")["updates"] == expected_updates(saved)
    total = saved + 5 * ENVS * STEPS
    process = start(tmp_path, "resume=run", f"train.total_steps={total}")
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert json.loads((run / "results.json").read_text())["updates"] == expected_updates(total)
    assert seeds_of(run) == expected_seeds(total)


BROKEN = """
import gymnasium, numpy as np

class Broken(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}
    steps = 0
    def __init__(self, render_mode=None):
        self.render_mode = render_mode
    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}
    def step(self, action):
        self.steps += 1
        bad = np.nan if self.steps == 90 else 0.0
        return np.zeros(3, np.float32), bad, False, False, {}

gymnasium.register("Broken-v0", entry_point=Broken, max_episode_steps=10)
"""


@pytest.mark.e2e
def test_broken_numbers_come_over_with_their_text(tmp_path):
    (tmp_path / "broken_task.py").write_text(BROKEN)
    words = ("env.type=gymnasium", "env.task=broken_task:Broken-v0", "eval.metric=return")
    process = start(tmp_path, *TINY, *WORDS, *words, *LONG, ASYNC)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, err
    assert "in the step of the environments at environment step 178: reward (2 of 2)" in err
    assert (tmp_path / "run" / "failure" / "step_000000178.json").is_file()
    assert "The last good checkpoint, step_000000128, is intact" in err


@pytest.mark.dist
def test_two_learners_with_a_collector_each_and_then_one(tmp_path):
    """Equal weights, disjoint episodes; dealt to one process, every episode has been seen once."""
    run, other = tmp_path / "run", tmp_path / "run" / "ranks" / "1_of_2"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    words = (*TINY, *WORDS, ASYNC, "env.num_envs=4", "train.total_steps=192", "run_dir=run")
    process = start(tmp_path, *words, launcher=launcher)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err[-3000:]
    assert part(run, "collector")["env_steps"] == 192
    assert part(run, "progress") | {"seconds": 0} == part(other, "progress") | {"seconds": 0}
    first, second = part(run, "sac")["actor"], part(other, "sac")["actor"]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    shards = [run / "ranks" / f"{rank}_of_2" for rank in range(2)]
    numbers = range(192 // 4 // LIMIT)
    for rank, shard in enumerate(shards):
        envs = range(2 * rank, 2 * rank + 2)
        assert seeds_of(shard) == [episode_seed(0, e, n) % 10_000 for n in numbers for e in envs]
    records = [r for r in read_records(run / "metrics.jsonl") if "train/updates" in r]
    assert 0 < max(r["speed/staleness_max"] for r in records) < 2 * UPDATES

    process = start(tmp_path, "resume=run", "train.total_steps=288")
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err[-3000:]
    numbers = range(288 // 4 // LIMIT)
    everything = [episode_seed(0, e, n) % 10_000 for n in numbers for e in range(4)]
    assert sorted(seeds_of(run)) == sorted(everything)


@pytest.mark.e2e
def test_closing_twice_is_harmless(make_config, tmp_path):
    process = open_env(make_config(ASYNC), CPU, 0, Ranks(), tmp_path)
    assert isinstance(process, CollectingProcess) and process.spec.name == "fake reach"
    pid = process.pid
    assert pid is not None and alive(pid)
    process.close()
    process.close()
    assert not alive(pid)
