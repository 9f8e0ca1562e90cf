"""NaN and infinity stop a run where they appear, and leave something to look at."""

import json
import math

import pytest
import torch
from conftest import CPU
from safetensors.torch import load_file

from embodied_rl.builders import build_env, build_policy
from embodied_rl.errors import RunStopped
from embodied_rl.guard import PENDING, Guard, Update
from embodied_rl.stopping import StopRequest
from embodied_rl.trainer import Trainer

pytestmark = pytest.mark.unit
NAN, INF = math.nan, math.inf


@pytest.fixture
def guard(tmp_path):
    return Guard(tmp_path / "failure", enabled=True)


def strict(path):
    """Reads JSON as other languages do: NaN and Infinity are errors."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def stopped(call) -> str:
    with pytest.raises(RunStopped) as caught:
        call()
    return str(caught.value)


def test_finite_values_pass(guard, tmp_path):
    huge = torch.tensor([3e38, 3e38])  # their sum is not finite, they are
    tensors = {
        "huge": huge,
        "half": torch.full((9,), 6e4, dtype=torch.float16),
        "image": torch.full((2, 3), 255, dtype=torch.uint8),
        "flag": torch.tensor([True]),
        "empty": torch.zeros(0),
    }
    guard.check("now", 5, tensors)
    assert not (tmp_path / "failure").exists()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_arrives(guard, tmp_path, value):
    obs = torch.zeros(2, 3)
    obs[1, 2] = obs[0, 0] = value
    tensors = {"reward": torch.zeros(2), "obs.state": obs}
    also = {"seeds": [1, 2], "actions": {"0": [torch.ones(1)]}, "total": value}
    message = stopped(lambda: guard.check("in the step", 1234, tensors, lambda: also))
    assert "NaN or infinite, in the step at environment step 1,234: obs.state (2 of 6)." in message
    assert "train.guard=false switches this check off" in message
    path = tmp_path / "failure" / "step_000001234.safetensors"
    assert str(path) in message
    saved = load_file(path)
    assert torch.equal(saved["obs.state"], obs) or value is NAN
    assert saved["actions.0.0"].tolist() == [1] and saved["reward"].tolist() == [0, 0]
    facts = strict(path.with_suffix(".json"))
    assert facts["env_steps"] == 1234 and facts["not_finite"] == {"obs.state": 2}
    assert facts["seeds"] == [1, 2] and facts["total"] == str(value)


def metrics(loss: float = 0.5) -> dict[str, torch.Tensor]:
    return {"critic/q": torch.tensor(1.0), "critic/loss": torch.tensor(loss)}


@pytest.mark.parametrize("bad", [1, 5, PENDING, PENDING + 3])
def test_the_first_bad_update_is_named(guard, make_batch, tmp_path, bad):
    """All updates from `bad` on are broken; the batch of that one is saved."""

    def train():
        for number in range(1, 2 * PENDING):
            batch = make_batch(4, seed=number)
            guard.watch(Update(number, 10 * number, batch, metrics(NAN if number >= bad else 1)))
        guard.verify()

    message = stopped(train)
    assert f"in update {bad} at environment step {10 * bad}: critic/loss (1 of 1)." in message
    saved = load_file(tmp_path / "failure" / f"step_{10 * bad:09d}.safetensors")
    expected = make_batch(4, seed=bad)
    assert torch.equal(saved["batch.reward"], expected.reward)
    assert torch.equal(saved["batch.next_features.vector"], expected.next_features.vector)
    facts = strict(tmp_path / "failure" / f"step_{10 * bad:09d}.json")
    assert facts["update"] == bad and facts["metrics"] == {"critic/q": 1.0, "critic/loss": "nan"}


def test_the_batch_itself_is_looked_at(guard, make_batch):
    batch = make_batch(4)
    batch.reward[2] = INF
    guard.watch(Update(7, 70, batch, metrics(INF)))
    message = stopped(guard.verify)
    assert "batch.reward (1 of 4), critic/loss (1 of 1)" in message


def test_nothing_is_read_between(guard, make_batch):
    """On a GPU each read would wait for all work queued there."""

    class Unread(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(f"{function} on a metric")

    unread = {"critic/loss": torch.tensor(1.0).as_subclass(Unread)}
    for number in range(PENDING - 1):
        guard.watch(Update(number, 0, make_batch(4), unread))


def test_a_bad_loss_is_named_before_the_action_it_leads_to(guard, make_batch):
    guard.watch(Update(3, 30, make_batch(4), metrics(NAN)))
    message = stopped(lambda: guard.check("in the actions", 32, {"action": torch.tensor([NAN])}))
    assert "in update 3" in message and "critic/loss" in message


def test_switched_off(tmp_path, make_batch):
    guard = Guard(tmp_path / "failure", enabled=False)
    guard.check("now", 1, {"obs": torch.tensor([NAN])})
    for number in range(2 * PENDING):
        guard.watch(Update(number, 1, make_batch(4), metrics(NAN)))
    guard.verify()
    guard.check_state(1, {"weights": torch.tensor([NAN])})
    assert not (tmp_path / "failure").exists()


def test_a_full_disk_does_not_hide_the_finding(tmp_path):
    (tmp_path / "failure").write_text("in the way")
    guard = Guard(tmp_path / "failure", enabled=True)
    message = stopped(lambda: guard.check("now", 1, {"obs": torch.tensor([NAN])}))
    assert "obs (1 of 1)" in message and "could not be saved" in message


# ---------------------------------------------------------------- in a run


@pytest.fixture
def make_trainer(make_config, tmp_path):
    def make(*overrides: str) -> Trainer:
        config = make_config(
            "algorithm.update_epoch=4",
            "train.total_steps=320",
            "train.checkpoint_interval=64",
            "train.log_interval=64",
            "eval.interval=128",
            "algorithm.q_head_type=default",
            *overrides,
        )
        torch.manual_seed(0)
        env = build_env(config.env, 2, CPU)
        policy = build_policy(config, env.spec, CPU)
        return Trainer(config, tmp_path / "run", env, policy, CPU, StopRequest())

    (tmp_path / "run").mkdir()
    return make


def assert_stopped_well(trainer, make_trainer, message: str, last: int) -> None:
    """The last checkpoint is `last`, named, and good to continue from."""
    run = trainer.run_dir
    assert f"The last good checkpoint, step_{last:09d}, is intact" in message
    assert message.endswith(f"python -m embodied_rl.train resume={run}")
    assert (run / "checkpoints" / "last").resolve().name == f"step_{last:09d}"
    lines = (run / "metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines
    again = make_trainer()
    assert again.run(resume=True)["env_steps"] == 320
    assert all(t.isfinite().all() for t in again.sac.actor.state_dict().values())


@pytest.mark.parametrize("what", ["reward", "final_obs"])
def test_environment_that_returns_nan(make_trainer, what):
    trainer = make_trainer()
    receive = trainer.env.recv

    def recv():
        result = receive()
        if trainer.step == 200:
            tensor = result.reward if what == "reward" else result.final_obs["state"][1]
            tensor[1] = NAN
        return result

    trainer.env.recv = recv
    message = stopped(lambda: trainer.run(resume=False))
    name, size = ("reward", 2) if what == "reward" else ("final_obs.state", 8)
    assert (
        f"in the step of the environments at environment step 200: {name} (1 of {size})" in message
    )
    saved = load_file(trainer.run_dir / "failure" / "step_000000200.safetensors")
    assert saved["env.state"].shape == saved["seen_before.state"].shape == (2, 4)
    assert_stopped_well(trainer, make_trainer, message, 192)


@pytest.mark.parametrize("how", ["loss", "weights"])
def test_learner_that_breaks(make_trainer, how):
    trainer = make_trainer()
    update, numbers = trainer.sac.update, []

    def broken(batch, *, env_steps):
        numbers.append(env_steps)
        if len(numbers) == 30:
            if how == "loss":
                batch.reward[3] = INF
            else:
                with torch.no_grad():
                    next(iter(trainer.sac.q_head.critic_parameters())).fill_(NAN)
        return update(batch, env_steps=env_steps)

    trainer.sac.update = broken
    message = stopped(lambda: trainer.run(resume=False))
    assert "in update 30 at environment step" in message and "critic/loss (1 of 1)" in message
    assert "critic/grad_norm (1 of 1)" in message
    assert ("batch.reward (1 of 16)" in message) == (how == "loss")
    last = numbers[29] // 64 * 64  # checkpoints come every four iterations of 16 steps
    assert_stopped_well(trainer, make_trainer, message, last)


def test_state_that_no_loss_has_seen_yet(make_trainer):
    """A broken target network shows in the next update; a checkpoint may come before that."""
    trainer = make_trainer()
    verify = trainer.guard.verify

    def after_the_iteration():
        verify()
        if trainer.step == 192:
            next(trainer.sac.q_head.target.parameters()).data.fill_(NAN)

    trainer.guard.verify = after_the_iteration
    message = stopped(lambda: trainer.run(resume=False))
    assert "in the state to be saved at environment step 192: q_head.target" in message
    assert_stopped_well(trainer, make_trainer, message, 128)


def test_a_run_without_the_guard_goes_on(make_trainer):
    trainer = make_trainer("train.guard=false", "train.total_steps=160", "train.diagnostics=false")
    receive = trainer.env.recv

    def recv():
        result = receive()
        result.reward[0] = INF
        return result

    trainer.env.recv = recv
    assert trainer.run(resume=False) is not None
