"""Whole runs in processes of their own: results, signals, resumes, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

from embodied_rl.backbones.state import StateBackbone
from embodied_rl.metrics import read_records
from embodied_rl.policy import Policy

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds, against hanging only
FAST = (
    *TINY,
    "algorithm.update_epoch=8",
    "rollout.steps=8",
    "env.max_episode_steps=10",
    "eval.interval=160",
    "train.log_interval=64",
    "train.checkpoint_interval=64",
    "train.total_steps=320",
)
FOREVER = "train.total_steps=10000000"


def environment(**changes: str) -> dict[str, str]:
    # a path of its own: the tests run from an empty folder, whether or not it is installed
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def command(module: str, *args: object) -> list[str]:
    return [sys.executable, "-m", f"embodied_rl.{module}", *map(str, args)]


@pytest.fixture
def call(tmp_path):
    """`call("train", "key=value", ...)` runs a command line in an empty folder, to its end."""

    def run(module: str, *args: object, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(module, *args),
            cwd=tmp_path,
            env=environment(**changes),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run on the fake environment: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    args = [*FAST, "run_dir=run", "algorithm.q_head_type=crossq", "algorithm.tau=0.1", "seed=3"]
    done = subprocess.run(
        command("train", *args),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def comparable(run: Path) -> list[dict]:
    """The records of a run without what the clock decides."""
    records = read_records(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("speed/")} for r in records]


def stored_steps(run: Path) -> list[int]:
    return sorted(int(p.name.partition("_")[2]) for p in (run / "checkpoints").glob("step_*"))


def check_records(run: Path, last: int) -> None:
    """Steps never go back or repeat, every value is a finite number, and the end is there."""
    records = read_records(run / "metrics.jsonl")
    for prefix in ("eval/", "train/"):
        steps = [r["step"] for r in records if any(k.startswith(prefix) for k in r)]
        assert steps == sorted(set(steps)) and steps[-1] == last
    assert all(math.isfinite(v) for r in records for v in r.values())


# ---------------------------------------------------------------- a run


def test_a_run_leaves_everything_behind(finished):
    run, printed = finished
    results = json.loads((run / "results.json").read_text())
    assert results["env_steps"] == 320 and results["episodes"] == 4
    for when in ("pretrained", "final"):
        assert 0 <= results[when]["success_once"] <= 1 and math.isfinite(results[when]["return"])
    check_records(run, 320)
    records = read_records(run / "metrics.jsonl")
    evaluations = [r["step"] for r in records if "eval/success_once" in r]
    assert evaluations == [0, 160, 320]
    logged = [r for r in records if "train/updates" in r]
    assert [r["step"] for r in logged] == [64, 128, 192, 256, 320]
    assert logged[-1]["train/updates"] == results["updates"] > 100
    assert {"critic/loss", "actor/loss", "temperature/alpha", "anchor/weight"} <= set(logged[-1])
    for name in ("config.yaml", "learning_curve.png", "tensorboard", "checkpoints/best/policy"):
        assert (run / name).exists(), name
    assert (run / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert stored_steps(run)[-1] == 320
    assert (run / "checkpoints" / "last").resolve().name == "step_000000320"
    assert not [p for p in run.rglob("*.tmp")]
    assert "note: algorithm.tau has no effect with q_head_type=crossq" in printed
    assert "success on 4 held-out episodes: pretrained" in printed.splitlines()[-1]


def test_its_config_reproduces_it(finished, call, tmp_path):
    run, _ = finished
    done = call("train", f"config={run}/config.yaml", "run_dir=other")
    assert done.returncode == 0, done.stderr
    other = tmp_path / "other"
    assert comparable(other) == comparable(run)
    assert (other / "config.yaml").read_text() == (run / "config.yaml").read_text()
    results = [json.loads((r / "results.json").read_text()) for r in (run, other)]
    for r in results:
        r.pop("seconds")
    assert results[0] == results[1]


def test_evaluate_a_run(finished, call, tmp_path):
    run, _ = finished
    args = [f"policy={run}", "out=scores", "eval.seed=10000", "eval.episodes=4", "eval.num_envs=2"]
    done = call("evaluate", *args, "eval.video=false")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    final = json.loads((run / "results.json").read_text())["final"]
    assert {k: scores[k] for k in final} == final, "the policy brought its environment along"
    assert "over 4 episodes, seeds 10000-10003" in done.stdout


def test_help(call):
    done = call("train", "--help")
    assert done.returncode == 0 and "  q_head_type: " in done.stdout


# ---------------------------------------------------------------- stopping and resuming


def start(folder: Path, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        command("train", *args),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoints(process: subprocess.Popen, run: Path, count: int) -> None:
    """Until a checkpoint of step >= 64 * (count - 1) is there."""
    deadline = time.monotonic() + TIMEOUT
    while not [s for s in stored_steps(run) if s >= 64 * (count - 1)]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_a_resume_completes(call, tmp_path, number, code):
    process, run = start(tmp_path, *FAST, FOREVER, "run_dir=run"), tmp_path / "run"
    try:
        wait_for_checkpoints(process, run, 2)
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "saving a checkpoint, then stopping" in out
    assert out.splitlines()[-1] == "stopped; continue with: python -m embodied_rl.train resume=run"
    stopped = stored_steps(run)[-1]
    assert not (run / "results.json").exists()
    total = stopped + 64
    done = call("train", "resume=run", f"train.total_steps={total}")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "results.json").read_text())["env_steps"] == total
    check_records(run, total)
    assert read_records(run / "metrics.jsonl")[0]["step"] == 0, "the record goes on, not anew"


def test_sigkill_then_resume_completes(call, tmp_path):
    process, run = start(tmp_path, *FAST, FOREVER, "run_dir=run"), tmp_path / "run"
    try:
        wait_for_checkpoints(process, run, 3)
    finally:
        process.kill()
        process.communicate()
    total = stored_steps(run)[-1] + 128
    done = call("train", "resume=run", f"train.total_steps={total}")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "results.json").read_text())["env_steps"] == total
    check_records(run, total)


def test_the_same_command_goes_on(call, tmp_path):
    """As a scheduler repeats it: begins, goes on where it was cut off, finds nothing left to do."""
    words = (*FAST, "run_dir=run", "auto_resume=true")
    begun = call("train", *words, "train.total_steps=128")
    assert begun.returncode == 0 and "finetuning" in begun.stdout, begun.stderr
    done = call("train", *words)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
    check_records(tmp_path / "run", 320)
    restarted = call("train", *FAST, "run_dir=other", TORCHELASTIC_RESTART_COUNT="1")
    assert restarted.returncode == 2 and "auto_resume=true" in restarted.stderr
    assert not (tmp_path / "other").exists()


def test_killed_before_the_first_checkpoint(call, finished, tmp_path):
    """The first evaluation takes a while: a run that died in it begins anew, and says so."""
    run = tmp_path / "run"
    (run / "checkpoints" / ".step_000000000.tmp").mkdir(parents=True)
    (run / "config.yaml").write_bytes((finished[0] / "config.yaml").read_bytes())
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/return": 1.0}\n{"step": 64, "trai')
    done = call("train", "resume=run")
    assert done.returncode == 0, done.stderr
    assert "the run ended before its first checkpoint: it begins anew" in done.stdout
    check_records(run, 320)


def test_resume_after_damage_to_the_newest_checkpoint_and_to_replay(call, finished, tmp_path):
    """The previous checkpoint and the readable part of the replay take over."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished[0], run, symlinks=True)
    (run / "checkpoints" / "step_000000320" / "state.json").write_text("{")
    victim = sorted((run / "replay").glob("segment-*"))[1]
    victim.write_bytes(victim.read_bytes()[:100])
    done = call("train", "resume=run")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("warning: replay: ")]
    assert told and all(victim.name in line for line in told)
    assert "warning: step_000000320 is damaged and was not used: state.json" in done.stdout
    assert (run / "checkpoints" / "damaged_step_000000320").is_dir()
    assert json.loads((run / "results.json").read_text())["env_steps"] == 320
    check_records(run, 320)


# ---------------------------------------------------------------- refusals


def assert_refused(done: subprocess.CompletedProcess, folder: Path, *texts: str) -> None:
    assert done.returncode == 2, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    for text in texts:
        assert text in done.stderr
    assert not (folder / "runs").exists() and not (folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("algorithm.q_head_typ=crossq", ["'algorithm.q_head_typ'", "'algorithm.q_head_type'"]),
        ("algorithm.gamma=1.5", ["algorithm.gamma=1.5", "[0, 1]"]),
        ("algorithm.q_head_type=crosq", ["'crosq'", "Did you mean 'crossq'?"]),
        ("algorithm.gamma", ["'algorithm.gamma'", "expected key.path=value"]),
        ("policy.path=nowhere", ["no folder nowhere"]),
        ("env.task=reech", ["env.task='reech'", "Did you mean 'reach'?"]),
        ("resume=nowhere", ["resume=nowhere", "not a run folder"]),
        ("device=tpu", ["device='tpu'", "Allowed: auto, cpu, cuda"]),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["run_dir", "default folder"])
def test_typos(call, tmp_path, override, texts, named):
    if named and override.startswith("resume"):
        pytest.skip("resume excludes run_dir")
    folder = ["run_dir=run"] if named else []
    assert_refused(call("train", *FAST, *folder, override), tmp_path, *texts)


def test_unknown_maniskill_task(call, tmp_path):
    done = call("train", "env.task=PickCub-v1", "env.num_envs=1")
    assert_refused(done, tmp_path, "env.task='PickCub-v1'", "Did you mean 'PickCube-v1'?")


def test_hidden_vulkan_driver(call, tmp_path):
    args = ("env.type=maniskill", "env.task=PickCube-v1", "env.num_envs=1")
    done = call("train", *args, VK_DRIVER_FILES="/none.json")
    assert_refused(done, tmp_path, "/none.json", "unset VK_DRIVER_FILES")


def make_policy(folder: Path, state_dim: int = 4) -> Path:
    env = {"type": "fake", "task": "reach"}
    Policy(StateBackbone(state_dim, 2, 1, [8]), "state", env=env).save_pretrained(folder)
    return folder


def test_truncated_policy(call, tmp_path):
    weights = make_policy(tmp_path / "p") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    done = call("train", *FAST, "policy.path=p")
    assert_refused(done, tmp_path, "p/model.safetensors is damaged or truncated")


def test_policy_of_another_task(call, tmp_path):
    make_policy(tmp_path / "p", state_dim=7)
    done = call("train", *FAST, "policy.path=p")
    assert_refused(done, tmp_path, "7 observation entries, but fake reach has 4")


def test_run_dir_in_use(call, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    done = call("train", *FAST, "run_dir=mine")
    assert_refused(done, tmp_path, "run_dir=mine is not empty")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_run_dir_is_a_file(call, tmp_path):
    (tmp_path / "mine").write_text("a file")
    assert_refused(call("train", *FAST, "run_dir=mine"), tmp_path, "run_dir=mine")


def test_resume_with_other_networks(call, finished, tmp_path):
    import shutil

    shutil.copytree(finished[0], tmp_path / "mine", symlinks=True)
    done = call("train", "resume=mine", "critic.hidden=[8]", "train.total_steps=640")
    assert_refused(done, tmp_path, "does not fit this config")


# ---------------------------------------------------------------- the other command lines


def test_pretrain_then_finetune_on_the_fake_environment(call, tmp_path, fake_demos):
    done = call(
        "pretrain",
        f"data={fake_demos}",
        "out=bc",
        "steps=300",
        "hidden=[32]",
        *[a for a in TINY if a.startswith(("env.", "eval."))],
        "env.max_episode_steps=12",
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "bc" / "evaluation.json").read_text())
    assert scores["success_once"] >= 0.75, "cloning an easy expert works"
    policy = Policy.from_pretrained(tmp_path / "bc")
    assert policy.env["type"] == "fake" and policy.actor is None
    args = [a for a in FAST if not a.startswith(("policy.", "algorithm.demo"))]
    done = call(
        "train",
        *args,
        "policy.path=bc",
        f"algorithm.demo.path={fake_demos}",
        "algorithm.demo.fraction=0.5",
        "algorithm.q_head_type=default",
        "env.max_episode_steps=12",
        "run_dir=run",
    )
    assert done.returncode == 0, done.stderr
    first = read_records(tmp_path / "run" / "metrics.jsonl")[0]
    for name in ("success_once", "return"):
        # the actor's mode starts as the cloned action (clipped at 0.97)
        assert first[f"eval/{name}"] == pytest.approx(scores[name], abs=0.1)
    again = call("pretrain", f"data={fake_demos}", "out=bc")
    assert again.returncode == 2 and "out=bc is not empty" in again.stderr


def test_pretrain_without_data(call, tmp_path):
    assert_refused(call("pretrain"), tmp_path, "data= is missing")
    assert_refused(call("pretrain", "data=nowhere"), tmp_path, "does not exist")


def test_demos_pretrain_and_train_in_maniskill(call, tmp_path):
    """The whole path in the real simulator, as small as it gets."""
    done = call("demos", "out=demos", "episodes=1")
    assert done.returncode == 0, done.stderr
    small = (
        "env.num_envs=1",
        "eval.episodes=1",
        "eval.num_envs=1",
        "eval.video_episodes=1",
        "env.render_size=128",
    )
    done = call("pretrain", "data=demos", "out=bc", "steps=20", "hidden=[16]", *small)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bc" / "evaluation.mp4").stat().st_size > 1000
    done = call(
        "train",
        "policy.path=bc",
        "algorithm.demo.path=demos",
        "algorithm.demo.fraction=0.25",
        "algorithm.q_head_type=crossq",
        "algorithm.replay_buffer.min_buffer_size=1",
        "algorithm.critic_warmup_steps=0",
        "algorithm.batch_size=16",
        "critic.hidden=[16]",
        "actor.hidden=[16]",
        "train.total_steps=64",
        "run_dir=run",
        *small,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["env_steps"] == 64 and results["updates"] > 0
    for name in ("first.mp4", "last.mp4"):
        assert (tmp_path / "run" / "videos" / name).stat().st_size > 1000
    states = Policy.from_pretrained(tmp_path / "run").state_dict().values()
    assert all(torch.isfinite(t).all() for t in states)


def test_demos_refuses_what_its_expert_cannot_do(call, tmp_path):
    done = call("demos", "env.task=StackCube-v1")
    assert_refused(done, tmp_path, "env.task='StackCube-v1'", "Allowed: PickCube-v1")
    done = call("demos", "env.control_mode=pd_joint_delta_pos")
    assert_refused(done, tmp_path, "env.control_mode=pd_joint_delta_pos", "pd_ee_delta_pos")
    assert not (tmp_path / "demos").exists()
