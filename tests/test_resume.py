"""A run that was stopped or killed and resumed is, bit for bit, the run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

from embodied_rl.builders import build_env, build_policy
from embodied_rl.checkpoint import Checkpoints
from embodied_rl.envs.fake import FakeVecEnv
from embodied_rl.guard import batch_tensors
from embodied_rl.metrics import read_records
from embodied_rl.sac import SAC
from embodied_rl.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TIMEOUT = 600  # seconds, against hanging only
SMALL = (
    "algorithm.update_epoch=7",  # odd: every other iteration ends before an odd update number
    "rollout.steps=8",
    "eval.interval=160",
    "train.log_interval=80",  # 16 steps per iteration: most checkpoints hold unreported means
    "train.checkpoint_interval=64",
    "train.total_steps=320",
)
ENVS = {
    "fake": (),
    "pendulum": (
        "env.type=gymnasium",
        "env.task=Pendulum-v1",
        "env.max_episode_steps=25",
        "eval.metric=return",
    ),
}
STOP = 112  # seven iterations: 56 steps per environment, in the middle of an episode for both


def same(one, two, path: str = "") -> None:
    """Asserts that nested states are equal, tensors bit for bit."""
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), path
    elif isinstance(one, dict):
        assert list(one) == list(two), path
        for key in one:
            same(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{path}/{i}")
    else:
        assert one == two, path


def records(run: Path) -> list[dict]:
    """The whole record of a run without what the clock decides."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in lines
    ]


class StopAt:
    """Asks for a stop at the first iteration from `step` on that `when` agrees with."""

    def __init__(self, step: int | None, when=lambda trainer: True) -> None:
        self.step, self.when, self.trainer = step, when, None

    @property
    def requested(self) -> bool:
        assert self.trainer is not None
        return self.step is not None and self.trainer.step >= self.step and self.when(self.trainer)


@pytest.fixture
def train(make_config):
    """Runs a trainer in a folder to its end or to where `stop` says; returns it."""

    def run(folder: Path, config, *, resume: bool = False, stop: StopAt | None = None) -> Trainer:
        torch.manual_seed(999 if resume else 1)  # a resume must not depend on it
        stop = stop or StopAt(None)
        env = build_env(config.env, config.env.num_envs, CPU)
        try:
            policy = build_policy(config, env.spec, CPU)
            folder.mkdir(exist_ok=True)
            trainer = stop.trainer = Trainer(config, folder, env, policy, CPU, stop)
            close = trainer.replay.close

            def sample_and_close():
                if trainer.replay.ready:
                    trainer.next_batch = trainer.replay.sample(32)
                close()

            trainer.replay.close = sample_and_close
            trainer.run(resume=resume)
        finally:
            env.close()
        return trainer

    return run


def in_progress(trainer: Trainer) -> bool:
    return bool(trainer.collector._episodes.steps.all())


def assert_same_run(straight: Trainer, resumed: Trainer) -> None:
    assert straight.step == resumed.step and straight.progress.updates == resumed.progress.updates
    same(resumed.sac.state_dict(), straight.sac.state_dict())
    same(resumed.averaged.state_dict(), straight.averaged.state_dict())
    same(batch_tensors(resumed.next_batch), batch_tensors(straight.next_batch), "next batch")
    assert records(resumed.run_dir) == records(straight.run_dir)
    results = [json.loads((t.run_dir / "results.json").read_text()) for t in (straight, resumed)]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]
    same(resumed.collector.state_dict(), straight.collector.state_dict())


@pytest.mark.parametrize("odd", [False, True], ids=["before odd update", "before even update"])
@pytest.mark.parametrize(
    "env",
    [pytest.param("fake", marks=pytest.mark.unit), pytest.param("pendulum", marks=pytest.mark.e2e)],
)
@pytest.mark.parametrize("head", ["crossq", "default"])
def test_resume_is_exact(make_config, train, tmp_path, head, env, odd):
    config = make_config(*SMALL, f"algorithm.q_head_type={head}", *ENVS[env])
    straight = train(tmp_path / "straight", config)

    def parity(trainer) -> bool:
        return trainer.progress.updates % 2 == int(odd) and in_progress(trainer)

    stopped = train(tmp_path / "resumed", config, stop=StopAt(STOP, parity))
    assert stopped.step < 200 and stopped.progress.updates > 0
    assert not (stopped.run_dir / "results.json").exists()
    resumed = train(tmp_path / "resumed", config, resume=True)
    assert resumed.collector.dropped == 0
    assert_same_run(straight, resumed)


@pytest.mark.unit
def test_updates_after_the_simulators_change_nothing(make_config, train, tmp_path, monkeypatch):
    """`rollout.overlap` decides who works when, and neither what is seen nor what is learned."""
    calls: list[str] = []
    for name, owner in (("send", FakeVecEnv), ("recv", FakeVecEnv), ("update", SAC)):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, noted(calls, name, real))
    runs = []
    for overlap in (True, False):
        calls.clear()
        config = make_config(*SMALL, f"rollout.overlap={overlap}")
        runs.append(train(tmp_path / str(overlap), config))
        before = {a for a, b in zip(calls, calls[1:], strict=False) if b == "update"}
        assert before - {"update"} == {"send" if overlap else "recv"}
    assert_same_run(*runs)


def noted(calls, name, real):
    def call(*args, **kwargs):
        calls.append(name)
        return real(*args, **kwargs)

    return call


EXTRAS = {
    "residual actor, random steps": ("actor.type=residual", "rollout.random_steps=150"),
    "average, schedules, fixed alpha": (
        "actor.average_decay=0.9",
        "critic.optim.lr_scheduler=cosine",
        "actor.optim.lr_scheduler=linear",
        "algorithm.entropy_tuning.alpha_type=fixed_alpha",
    ),
    "n-step, pieces, encoding at sampling": (
        "algorithm.n_step=3",
        "rollout.max_trajectory_steps=6",
        "policy.cache_features=false",
    ),
    "terminations, warm-up": (
        "env.task=reach-terminates",
        "algorithm.critic_warmup_steps=170",
        "critic.batch_renorm.warmup_steps=50",
    ),
    "reading from disk": ("algorithm.replay_buffer.enable_cache=false",),
    "weights normalised in the actor": ("actor.batch_renorm=true",),
}


@pytest.mark.e2e
@pytest.mark.parametrize("extra", EXTRAS)
def test_resume_is_exact_with(make_config, train, tmp_path, extra):
    config = make_config(*SMALL, *EXTRAS[extra])
    straight = train(tmp_path / "straight", config)
    train(tmp_path / "resumed", config, stop=StopAt(STOP))
    assert_same_run(straight, train(tmp_path / "resumed", config, resume=True))


@pytest.mark.e2e
def test_demonstrations_go_on_where_they_were(make_config, train, tmp_path, fake_demos):
    config = make_config(*SMALL, "algorithm.demo.fraction=0.5", f"algorithm.demo.path={fake_demos}")
    straight = train(tmp_path / "straight", config)
    train(tmp_path / "resumed", config, stop=StopAt(STOP))
    assert_same_run(straight, train(tmp_path / "resumed", config, resume=True))


@pytest.mark.e2e
def test_many_stops_are_as_good_as_none(make_config, train, tmp_path):
    config = make_config(*SMALL)
    straight = train(tmp_path / "straight", config)
    resumed = train(tmp_path / "resumed", config, stop=StopAt(16))
    for step in range(32, 336, 16):
        resumed = train(tmp_path / "resumed", config, resume=True, stop=StopAt(step))
    resumed = train(tmp_path / "resumed", config, resume=True)
    assert_same_run(straight, resumed)


@pytest.mark.unit
def test_records_after_the_checkpoint_are_not_kept_twice(make_config, train, tmp_path):
    """A crash leaves records that the checkpoint does not know of, the last one torn."""
    config = make_config(*SMALL)
    straight = train(tmp_path / "straight", config)
    train(tmp_path / "resumed", config, stop=StopAt(STOP))
    path = tmp_path / "resumed" / "metrics.jsonl"
    known = path.read_bytes()
    path.write_bytes(known + b'{"step": 112, "train/updates": 5.0}\n{"step": 160, "ev')
    resumed = train(tmp_path / "resumed", config, resume=True)
    assert path.read_bytes().startswith(known)
    assert records(resumed.run_dir) == records(straight.run_dir)


@pytest.mark.e2e
def test_episodes_that_cannot_go_on_are_told(make_config, train, tmp_path, capsys):
    """With other settings the simulator does not come back to what was recorded."""
    config = make_config(*SMALL, *ENVS["pendulum"])
    train(tmp_path / "run", config, stop=StopAt(STOP))
    config.env.kwargs["g"] = 5.0
    resumed = train(tmp_path / "run", config, resume=True)
    told = [line for line in capsys.readouterr().out.splitlines() if "were dropped" in line]
    assert len(told) == 1 and told[0].startswith("warning: 2 of 2 episodes in progress")
    assert resumed.collector.dropped == 2
    logged = [r for r in records(resumed.run_dir) if "train/dropped_episodes" in r]
    assert [r["train/dropped_episodes"] for r in logged] == [0, 2, 2, 2]


@pytest.mark.unit
def test_best_that_was_damaged_is_chosen_anew(make_config, train, tmp_path, capsys):
    config = make_config(*SMALL)
    train(tmp_path / "run", config, stop=StopAt(STOP))
    best = (tmp_path / "run" / "checkpoints" / "best").resolve()
    assert best.name == "step_000000000"
    (best / "policy" / "model.safetensors").write_bytes(b"")
    resumed = train(tmp_path / "run", config, resume=True)
    assert "warning: step_000000000, the best, is damaged" in capsys.readouterr().out
    assert resumed.progress.best_step >= 160
    assert int(resumed.checkpoints.best.removeprefix("step_")) == resumed.progress.best_step


# ---------------------------------------------------------------- in processes of their own


class Part:
    """Takes a part of a checkpoint as it is."""

    def state_dict(self):
        raise NotImplementedError

    def load_state_dict(self, state) -> None:
        self.state = state


def saved(run: Path) -> dict:
    """What the newest checkpoint holds, without times and places on disk."""
    parts = {n: Part() for n in ("sac", "collector", "progress", "means", "generators")}
    Checkpoints(run / "checkpoints", parts, 2).restore()
    parts["progress"].state.pop("seconds")
    for name in ("numpy", "python"):  # not seeded by the command line, as no run draws from them
        parts["generators"].state.pop(name)
    return {name: part.state for name, part in parts.items()}


def start(folder: Path, *args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "embodied_rl.train", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err


def kill_after_checkpoint(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not [p for p in (run / "checkpoints").glob("step_*") if int(p.name[5:]) >= step]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.e2e
@pytest.mark.parametrize(("head", "env"), [("crossq", "pendulum"), ("default", "fake")])
def test_sigkill_and_resume_is_exact(tmp_path, head, env):
    """Twice killed at whatever moment, in new processes each time."""
    args = [*TINY, *SMALL, *ENVS[env], f"algorithm.q_head_type={head}", "train.total_steps=640"]
    finish(start(tmp_path, *args, "run_dir=straight"))
    run = tmp_path / "killed"
    kill_after_checkpoint(start(tmp_path, *args, "run_dir=killed"), run, 128)
    kill_after_checkpoint(start(tmp_path, "resume=killed"), run, 352)
    finish(start(tmp_path, "resume=killed"))
    same(saved(run), saved(tmp_path / "straight"))
    assert records(run) == records(tmp_path / "straight")
    assert [r["step"] for r in read_records(run / "metrics.jsonl") if "eval/return" in r] == list(
        range(0, 641, 160)
    )
