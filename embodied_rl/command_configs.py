"""The config schemas of all command lines but `train`, whose is in `config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from embodied_rl.config import Config, EnvConfig, EvalConfig, OptimConfig

# ruff: noqa: UP045 - OmegaConf reads Optional[...] annotations on every Python it supports


@dataclass
class AssumeConfig:
    """What `plan` takes for granted of an environment that it does not start."""

    state_dim: Optional[int] = None  # numbers of proprioception; null: the policy's
    action_dim: Optional[int] = None  # null: the policy's
    cameras: Optional[int] = None  # null: those of policy.cameras, or as many as the policy has
    image_size: Optional[int] = None  # pixels, side of an image; null: from env.kwargs, or 128
    episode_steps: Optional[int] = None  # null: env.max_episode_steps, or 50


@dataclass
class PlanConfig(Config):
    """Everything `python -m embodied_rl.plan` reads: all keys of `train`, and what it runs on."""

    gpu: Any = None  # a known device, or a list of them; null: all of them, or the cpu with gflops=
    gpus: int = 1  # devices that share a run
    gpu_tflops: Optional[float] = None  # peak of a device that is not known
    gpu_memory_gib: Optional[float] = None
    gpu_bandwidth: Optional[float] = None  # GB/s
    gflops: Optional[float] = None  # gpu=cpu: float32 GFLOP/s that it reaches in a matrix product
    env_steps_per_s: Optional[float] = None  # of all environments together, as measured
    json: Optional[str] = None  # file to write the plan to; the word --json prints it instead
    assume: AssumeConfig = field(default_factory=AssumeConfig)


@dataclass
class EvaluateConfig:
    """Everything `python -m embodied_rl.evaluate` reads."""

    policy: Optional[str] = "pickcube_state_bc"  # checkpoint, run or policy folder, shipped name
    seed: int = 0
    device: str = "auto"
    out: Optional[str] = None  # folder for video and scores; null: evaluations/<policy>_<time>
    overwrite: bool = False
    deterministic: bool = True  # act with the mode; false: sample
    env: EnvConfig = field(default_factory=EnvConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    threads: int = 1


@dataclass
class SmallVLAConfig:
    """The backbone small_vla: frozen towers and the sizes of its head."""

    vision: str = "efficientnet_lite0"  # or the folder of a transformers vision encoder or VLM
    text: str = "minilm"  # or the folder of a transformers text encoder or VLM
    keypoints: int = 32  # points that each camera's map is reduced to
    summary: int = 32  # numbers for the map as a whole, beside the points
    text_dim: int = 16  # numbers for the instruction
    denoise_steps: int = 8  # from noise to an action chunk


@dataclass
class TuneConfig:
    """What of a trained policy learns further, and how its folder is read; with `init`."""

    trainable: str = "full"  # full | lora (merged into the weights at the end)
    lora_rank: int = 16
    micro_batch: Optional[int] = None  # rows per forward and backward pass; null: batch_size
    # the others are for folders of other projects (LeRobot, transformers); our own say it all
    cameras: dict[str, str] = field(default_factory=dict)  # policy's camera: observation key
    state: list[str] = field(default_factory=list)  # observation keys of its state, in order
    tokenizer: Optional[str] = None  # folder or tokenizer.json; null: in the policy's folder
    dtype: str = "float32"  # float32 | bfloat16 | float16: precision of the backbone


@dataclass
class PretrainConfig:
    """Everything `python -m embodied_rl.pretrain` reads."""

    data: Optional[str] = None  # demonstration folder or ManiSkill .h5 file
    out: str = "policies/bc"  # where the policy folder is written
    # a policy, run, LeRobot or transformers folder whose backbone learns further; null: a new one
    init: Optional[str] = None
    tune: TuneConfig = field(default_factory=TuneConfig)
    backbone: str = "state"  # state | small_vla
    small_vla: SmallVLAConfig = field(default_factory=SmallVLAConfig)
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    chunk_size: int = 1  # actions per decision
    max_trajectories: Optional[int] = None  # use only the first ones
    validation_fraction: float = 0.1  # share of trajectories held out
    steps: int = 2_000  # gradient steps
    batch_size: int = 256
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, lr_scheduler="cosine", weight_decay=1e-4)
    )
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    threads: int = 1
    env: EnvConfig = field(default_factory=EnvConfig)
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(episodes=200))


@dataclass
class DemosConfig:
    """Everything `python -m embodied_rl.demos` reads."""

    out: str = "demos"  # where the demonstration folder is written
    policy: Optional[str] = None  # policy or run folder that demonstrates; null: scripted experts
    deterministic: bool = True  # with policy: act with the mode; false: sample
    episodes: int = 40  # successful episodes to keep, as many of each task
    noise: float = 0.0  # std of Gaussian noise added to what is executed, not to what is imitated
    max_steps_multiple: int = 20  # give up after this many attempts per kept episode
    compression: str = "none"  # none | zstd: of images on disk
    seed: int = 1_000_000
    device: str = "auto"  # with policy
    overwrite: bool = False
    threads: int = 1
    env: EnvConfig = field(default_factory=EnvConfig)
