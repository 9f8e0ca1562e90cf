"""Loading, merging and refusing configs."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

from embodied_rl import load_config as loading
from embodied_rl.command_configs import DemosConfig, EvaluateConfig, PlanConfig, PretrainConfig
from embodied_rl.config import Config
from embodied_rl.errors import UserError
from embodied_rl.load_config import load_config, load_run_config, save_config, schema_keys
from embodied_rl.registry import ACTORS, Q_HEADS
from embodied_rl.validate import leaves

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = (Config, EvaluateConfig, PretrainConfig, DemosConfig, PlanConfig)
ACCEPT_ONLY = {"adv_type", "loss_type", "loss_agg_func", "group_size"}

# RLinf's documentation of CrossQ, section 4, verbatim.
RLINF = """\
   algorithm:
      update_epoch: 32
      group_size: 1
      agg_q: min # ["min", "mean"]. Option to aggregate multiple Q-values.


      adv_type: embodied_sac
      loss_type: embodied_sac
      loss_agg_func: "token-mean"
      q_head_type: "crossq" # ["crossq", "default"]. Choose CrossQ or standard SAC Q-head.
      
      bootstrap_type: standard # [standard, always]. Bootstrap Q-values according to terminations and truncations. "standard" only bootstraps when truncations, while "always" bootstraps when truncations or terminations.
      gamma: 0.8 # Discount factor.
      tau: 0.01  # Soft update coefficient for target networks
      target_update_freq: 1  # Frequency of target network updates
      entropy_tuning:
         alpha_type: softplus  # ["softplus","exp","fixed_alpha"]
         initial_alpha: 0.01  # Initial temperature value
         target_entropy: -4  # Target entropy (-action_dim)
         optim:
            lr: 3.0e-4  # Learning rate for temperature parameter
            lr_scheduler: torch_constant
            clip_grad: 10.0
      
      # Replay buffer settings
      replay_buffer:
         enable_cache: True # Enable memory cache to reduce I/O overhead
         cache_size: 6000  # number of trajectories cached in memory
         sample_window_size: 6000  # number of latest trajectories to sample from for replay buffer
         min_buffer_size: 2  # Minimum buffer size before training starts (in number of trajectories)
"""  # noqa: E501, W293


def load(*args: str) -> Config:
    return load_config(Config, args)[0]


def refusal(*args: str, schema=Config) -> str:
    with pytest.raises(UserError) as caught:
        load_config(schema, args)
    return str(caught.value)


# ---------------------------------------------------------------- what loads


def test_rlinf_block_loads_verbatim(tmp_path):
    path = tmp_path / "rlinf.yaml"
    path.write_text(RLINF)
    config, given = load_config(Config, [f"config={path}"])
    algorithm = config.algorithm
    found = {key: dict(leaves(config))[key] for key in given}
    assert found == {
        "algorithm.update_epoch": 32,
        "algorithm.group_size": 1,
        "algorithm.agg_q": "min",
        "algorithm.adv_type": "embodied_sac",
        "algorithm.loss_type": "embodied_sac",
        "algorithm.loss_agg_func": "token-mean",
        "algorithm.q_head_type": "crossq",
        "algorithm.bootstrap_type": "standard",
        "algorithm.gamma": 0.8,
        "algorithm.tau": 0.01,
        "algorithm.target_update_freq": 1,
        "algorithm.entropy_tuning.alpha_type": "softplus",
        "algorithm.entropy_tuning.initial_alpha": 0.01,
        "algorithm.entropy_tuning.target_entropy": -4.0,
        "algorithm.entropy_tuning.optim.lr": 3e-4,
        "algorithm.entropy_tuning.optim.lr_scheduler": "torch_constant",
        "algorithm.entropy_tuning.optim.clip_grad": 10.0,
        "algorithm.replay_buffer.enable_cache": True,
        "algorithm.replay_buffer.cache_size": 6000,
        "algorithm.replay_buffer.sample_window_size": 6000,
        "algorithm.replay_buffer.min_buffer_size": 2,
    }
    assert algorithm.batch_size == Config().algorithm.batch_size, "other keys keep their defaults"
    swapped = load(f"config={path}", "algorithm.q_head_type=default").algorithm
    assert swapped == dataclasses.replace(algorithm, q_head_type="default")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_defaults_are_valid(schema):
    config, given = load_config(schema, [])
    assert config == schema() and given == set()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(path):
    load(f"config={path}")


def test_merge_order(tmp_path):
    """Defaults, then files in their order, then overrides, wherever these stand."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nalgorithm: {gamma: 0.1, tau: 0.1, n_step: 5}\n")
    second.write_text("algorithm: {gamma: 0.2, tau: 0.2}\ncritic: {hidden: [7]}\n")
    args = ["algorithm.gamma=0.3", f"config={first}", f"config={second}", "env.num_envs=3"]
    config, given = load_config(Config, args)
    algorithm = config.algorithm
    assert (algorithm.gamma, algorithm.tau, algorithm.n_step) == (0.3, 0.2, 5)
    assert (config.seed, config.critic.hidden, config.env.num_envs) == (1, [7], 3)
    assert given == {
        "seed",
        "algorithm.gamma",
        "algorithm.tau",
        "algorithm.n_step",
        "critic.hidden",
        "env.num_envs",
    }
    swapped = load(f"config={second}", f"config={first}").algorithm
    assert (swapped.gamma, swapped.tau) == (0.1, 0.1)
    assert load("seed=1", "seed=2").seed == 2


def test_saved_config_round_trip(tmp_path):
    config = load(
        "algorithm.q_head_type=default",
        "critic.hidden=[3,4]",
        "env.kwargs.robot.uids=panda",
        "train.stop_at=0.5",
        "algorithm.entropy_tuning.target_entropy=-4",
        "critic.optim.clip_grad=1",
        "run_dir=a b",
    )
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load(f"config={path}") == config
    assert load_run_config(tmp_path, ["seed=5"]) == (
        dataclasses.replace(config, seed=5),
        {"seed"},
    ), "what the run recorded does not count as given"


def test_no_recorded_config(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml there, so it is not a run folder"):
        load_run_config(tmp_path, [])


def test_env_kwargs_are_free_form():
    assert load("env.kwargs.a.b=1", "env.kwargs.c=[2]").env.kwargs == {"a": {"b": 1}, "c": [2]}


def test_null_clears_optional_keys():
    config = load("policy.path=null", "algorithm.entropy_tuning.optim.clip_grad=null")
    assert config.policy.path is None
    assert config.algorithm.entropy_tuning.optim.clip_grad is None


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_shows_every_key(schema):
    lines = loading.help_text("train", schema).splitlines()
    shown = {line.strip().partition(":")[0] for line in lines}
    assert {key.rpartition(".")[2] for key in schema_keys(schema())} <= shown


# ---------------------------------------------------------------- what is refused

UNKNOWN = {
    "algorithm.q_head_typ=crossq": ("algorithm.q_head_typ", "algorithm.q_head_type"),
    "algorithm.gama=0.9": ("algorithm.gama", "algorithm.gamma"),
    "gamma=0.9": ("gamma", "algorithm.gamma"),
    "train.q_head_type=crossq": ("train.q_head_type", "algorithm.q_head_type"),
    "algoritm.gamma=0.9": ("algoritm.gamma", "algorithm.gamma"),
    "algorithm.gamma.x=1": ("algorithm.gamma.x", "algorithm.gamma"),
    "sed=3": ("sed", "seed"),
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_unknown_key_names_the_nearest(override):
    received, wanted = UNKNOWN[override]
    message = refusal(override)
    assert f"unknown config key '{received}'. Did you mean '{wanted}'?" in message
    assert message.startswith("the command line: ")


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("algorithm:\n  gama: 0.9\n")
    message = refusal(f"config={path}")
    assert message == (
        f"{path}: unknown config key 'algorithm.gama'. Did you mean 'algorithm.gamma'?"
    )


RANGES = {
    "algorithm.gamma=1.5": "algorithm.gamma=1.5 is out of range. Allowed: [0, 1].",
    "algorithm.gamma=-0.1": "algorithm.gamma=-0.1 is out of range. Allowed: [0, 1].",
    "algorithm.tau=0": "algorithm.tau=0.0 is out of range. Allowed: (0, 1].",
    "algorithm.batch_size=1": "algorithm.batch_size=1 is out of range. Allowed: [2, infinity).",
    "algorithm.demo.fraction=1": ("algorithm.demo.fraction=1.0 is out of range. Allowed: [0, 1)."),
    "algorithm.group_size=2": "algorithm.group_size=2 is out of range. Allowed: [1, 1].",
    "critic.hidden=[8,0]": "critic.hidden=0 is out of range. Allowed: [1, infinity).",
    "critic.optim.betas=[0.9,1.0]": "critic.optim.betas=1.0 is out of range. Allowed: [0, 1).",
    "critic.batch_renorm.r_max=0.5": (
        "critic.batch_renorm.r_max=0.5 is out of range. Allowed: [1, infinity)."
    ),
    "rollout.ahead=0": "rollout.ahead=0 is out of range. Allowed: [1, 1000].",
    "env.num_envs=0": "env.num_envs=0 is out of range. Allowed: [1, 4096].",
}


@pytest.mark.parametrize("override", RANGES)
def test_out_of_range_names_the_range(override):
    assert refusal(override) == RANGES[override]


@pytest.mark.parametrize("bound", ["algorithm.gamma=0", "algorithm.gamma=1", "algorithm.tau=1"])
def test_closed_bounds_are_allowed(bound):
    load(bound)


def numeric_keys() -> list[tuple[str, type]]:
    """Dotted keys whose values are numbers, or lists of them, by their annotation."""

    def walk(schema, prefix=""):
        for field in dataclasses.fields(schema):
            value = getattr(schema, field.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{field.name}.")
            for kind in (int, float):
                if kind.__name__ in str(field.type):
                    yield f"{prefix}{field.name}", kind

    return list(walk(Config()))


UNBOUNDED = {"train.stop_at", "algorithm.entropy_tuning.target_entropy"}  # any number makes sense


@pytest.mark.parametrize(("key", "kind"), numeric_keys())
def test_every_number_has_a_range(key, kind):
    if key in UNBOUNDED:
        return
    is_list = isinstance(dict(leaves(Config()))[key], list)
    value = "nan" if kind is float else "-1000000"
    message = refusal(f"{key}=[{value}]" if is_list else f"{key}={value}")
    assert f"{key}=" in message and "out of range" in message


CHOICES = {
    "algorithm.q_head_type=crosq": "Allowed: default, crossq. Did you mean 'crossq'?",
    "algorithm.agg_q=max": "Allowed: min, mean.",
    "algorithm.actor_agg_q=max": "Allowed: min, mean.",
    "algorithm.bootstrap_type=never": "Allowed: standard, always.",
    "algorithm.entropy_tuning.alpha_type=softpls": "Did you mean 'softplus'?",
    "algorithm.adv_type=gae": "Allowed: embodied_sac.",
    "actor.type=gausian": "Did you mean 'gaussian'?",
    "env.type=maniskil": "Did you mean 'maniskill'?",
    "critic.optim.lr_scheduler=step": "Allowed: torch_constant, linear, cosine.",
    "algorithm.entropy_tuning.optim.lr_scheduler=step": "Allowed: torch_constant, linear, cosine.",
    "eval.metric=succes_once": "Did you mean 'success_once'?",
}


@pytest.mark.parametrize("override", CHOICES)
def test_wrong_choice_lists_the_choices(override):
    key, _, value = override.partition("=")
    message = refusal(override)
    assert f"{key}={value!r}" in message and CHOICES[override] in message


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.gamma=high",
        "algorithm.batch_size=2.5",
        "eval.video=maybe",
        "env.num_envs=null",
        "critic.hidden=8",
        "critic.hidden=[a]",
        "critic.hidden=[8.5]",
        "train.stop_at=soon",
        "env.kwargs=3",
    ],
)
def test_wrong_type_names_the_key(override):
    assert override.partition("=")[0] in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (
            [
                "algorithm.replay_buffer.min_buffer_size=9",
                "algorithm.replay_buffer.sample_window_size=8",
            ],
            ["replay_buffer.min_buffer_size=9", "replay_buffer.sample_window_size=8"],
        ),
        (["resume=a", "run_dir=b"], ["resume=a", "run_dir=b"]),
        (["auto_resume=true"], ["auto_resume=true", "run_dir"]),
        (
            ["eval.seed=100", "eval.final_seed=150", "eval.episodes=51"],
            ["eval.seed=100", "eval.final_seed=150", "eval.episodes=51"],
        ),
        (["rollout.ahead=3"], ["rollout.ahead=3", "rollout.asynchronous=false"]),
        (["rollout.asynchronous=true", "rollout.overlap=false"], ["rollout.overlap=false"]),
        (
            ["rollout.asynchronous=false", "rollout.device=cpu"],
            ["rollout.device=cpu", "rollout.asynchronous=false"],
        ),
        (
            ["algorithm.demo.path=demos", "algorithm.demo.fraction=0"],
            ["algorithm.demo.path", "algorithm.demo.fraction=0"],
        ),
    ],
)
def test_contradictions_name_both_keys(overrides, keys):
    message = refusal(*overrides)
    assert all(key in message for key in keys)


def test_neighbouring_seeds_do_not_contradict():
    load("eval.seed=100", "eval.final_seed=150", "eval.episodes=50")
    load("eval.seed=150", "eval.final_seed=100", "eval.episodes=50")


@pytest.mark.parametrize("group", ["algorithm", "algorithm.anchor", "critic.optim"])
def test_group_set_to_a_scalar(group):
    for value in ("5", "[1]"):
        message = refusal(f"{group}={value}")
        assert f"{group} is a group of keys, got the value" in message
        assert f"Set one of: {group}." in message


@pytest.mark.parametrize("word", ["seed", "--seed=1", "-h1", "=3", ""])
def test_argument_without_equals(word):
    message = refusal(word)
    assert repr(word) in message and "expected key.path=value" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected a mapping of config keys, got list"),
        ("a: [\n", "is not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("1: 2\n", "unknown config key '1'"),
        ("seed: ${nosuch}\n", "nosuch"),
        ("5\n", "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message in refusal(f"config={path}")


def test_missing_and_binary_files(tmp_path):
    assert refusal(f"config={tmp_path}/none.yaml") == f"config={tmp_path}/none.yaml: no such file."
    assert "is a folder" in refusal(f"config={tmp_path}")
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    assert "is not valid YAML" in refusal(f"config={binary}")
    binary.write_bytes(b"")
    assert load(f"config={binary}") == Config(), "an empty file changes nothing"


@pytest.mark.parametrize("betas", ["[0.9]", "[0.9,0.9,0.9]", "[]"])
def test_betas_are_two(betas):
    assert "critic.optim.betas" in refusal(f"critic.optim.betas={betas}")


def test_any_allowed_initial_alpha_builds():
    from embodied_rl.temperature import Temperature

    tuning = load(
        "algorithm.entropy_tuning.initial_alpha=100", "algorithm.entropy_tuning.alpha_type=exp"
    ).algorithm.entropy_tuning
    made = Temperature(tuning.alpha_type, tuning.initial_alpha, -4.0)
    assert made().item() == pytest.approx(100, rel=1e-5)


# ---------------------------------------------------------------- no dead keys


def attributes_read() -> set[str]:
    """Names of attributes that some module besides the config ones reads."""
    skip = {"config.py", "command_configs.py", "allowed.py", "validate.py", "load_config.py"}
    names = set()
    for path in (ROOT / "embodied_rl").rglob("*.py"):
        if path.name in skip and path.parent.name == "embodied_rl":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("schema", SCHEMAS)
def test_no_dead_keys(schema):
    read = attributes_read() | ACCEPT_ONLY
    assert [k for k in schema_keys(schema()) if k.rpartition(".")[2] not in read] == []


def test_accept_only_keys_are_few():
    names = {key.rpartition(".")[2] for key in schema_keys(Config())}
    assert names >= ACCEPT_ONLY
    assert not attributes_read() & ACCEPT_ONLY


# read by `train.main` before the trainer exists, or by simulators other than the fake one
OUTSIDE_THE_TRAINER = {
    "device",
    "run_dir",
    "resume",
    "auto_resume",
    "train.threads",
    "train.rank_timeout",
    "env.num_envs",
    "env.render_size",
    "env.sim_backend",
    "env.worker_timeout",
    "env.in_process",
    "eval.video_episodes",  # of films: tests/test_worker_restart.py
    "rollout.ahead",  # of the collecting process: tests/test_asynchronous.py
    "rollout.device",
    *(f"algorithm.{key}" for key in ACCEPT_ONLY),
    # read when the policy is a folder in another project's layout: tests/test_pi0.py
    *(f"policy.{key}" for key in ("cameras", "dtype", "state", "tokenizer")),
}


def spy(config, seen: set[str], prefix: str = ""):
    """A copy of a config object that notes each dotted key that is read."""
    names = {field.name for field in dataclasses.fields(config)}

    class Spy(type(config)):
        def __getattribute__(self, name):
            if name in names:
                seen.add(f"{prefix}{name}")
            if name == "__dict__":  # vars(config) reads all
                seen.update(f"{prefix}{n}" for n in names)
            return super().__getattribute__(name)

    values = {}
    for name in names:
        value = getattr(config, name)
        is_group = dataclasses.is_dataclass(value)
        values[name] = spy(value, seen, f"{prefix}{name}.") if is_group else value
    return Spy(**values)


def test_a_run_reads_every_key(make_config, tmp_path, fake_demos, flow_folder):
    """Dynamic counterpart of the AST test: the trainer on the fake env, all heads and actors.

    The third run trains its backbone, which none of the others may.
    """
    from embodied_rl.builders import build_env, build_policy
    from embodied_rl.stopping import StopRequest
    from embodied_rl.trainer import Trainer

    seen: set[str] = set()
    demos = ("algorithm.demo.fraction=0.25", f"algorithm.demo.path={fake_demos}")
    steered = ("algorithm.demo.fraction=0", f"policy.path={flow_folder}")
    steered += ("policy.cache_features=false", "policy.trainable=lora")
    runs = [("crossq", "gaussian", demos), ("default", "residual", demos)]
    runs.append(("crossq", "noise", steered))
    assert {r[0] for r in runs} == set(Q_HEADS.names) and {r[1] for r in runs} == set(ACTORS.names)
    for head, actor, more in runs:
        config = make_config(
            f"algorithm.q_head_type={head}",
            f"actor.type={actor}",
            *more,
            "actor.batch_renorm=true",
            "algorithm.replay_buffer.min_buffer_size=1",
            "eval.episodes=2",
            "train.total_steps=48",
            "env.max_episode_steps=5",
        )
        watched = spy(config, seen)
        cpu = torch.device("cpu")
        env = build_env(watched.env, 2, cpu)
        policy = build_policy(watched, env.spec, cpu)
        run_dir = tmp_path / head / actor
        run_dir.mkdir(parents=True)
        with StopRequest() as stop:
            results = Trainer(watched, run_dir, env, policy, cpu, stop).run(resume=False)
        assert results is not None and results["env_steps"] == 48
    unread = set(schema_keys(config)) - seen - OUTSIDE_THE_TRAINER
    assert not unread
