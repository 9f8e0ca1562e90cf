"""The config schema of `train`: every key, its default and its meaning.

`command_configs.py` has those of the other command lines, made of the same groups.
`load_config.py` merges YAML files and dot-list overrides into them and validates the result.
Dataclasses are not frozen and use `str` for choices, as OmegaConf needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

# ruff: noqa: UP045 - OmegaConf reads Optional[...] annotations on every Python it supports


@dataclass
class EnvConfig:
    """Which environment, and how many of it."""

    type: str = "maniskill"  # maniskill | gymnasium | fake
    task: str = "PickCube-v1"
    # ManiSkill: task -> what the policy is told, to train on several tasks in turn (episode seed
    # modulo their number); task= is then one of them and only names the run; empty: task= alone
    instructions: dict[str, str] = field(default_factory=dict)
    num_envs: int = 4  # parallel training environments
    obs_mode: str = "state"  # ManiSkill: state | state_dict | rgb | rgbd | ...
    control_mode: str = "pd_ee_delta_pos"  # ManiSkill only
    reward_mode: str = "normalized_dense"  # ManiSkill: normalized_dense | dense | sparse
    sim_backend: str = "physx_cpu"  # ManiSkill: physx_cpu (a process each) | physx_cuda (a GPU)
    max_episode_steps: Optional[int] = None  # null: the task's own limit
    ignore_terminations: bool = True  # ManiSkill: reaching success does not end an episode
    # ManiSkill, observations of several entries (rgb, state_dict): those kept; empty: all
    obs_keys: list[str] = field(default_factory=list)
    # ManiSkill: objects, as attributes of the task, that cameras in observations do not see
    hidden_objects: list[str] = field(default_factory=list)
    # ManiSkill, cameras in observations: draw at every n-th step of an episode (and its last) and
    # repeat the frame in between; for policies that execute n (2n, ...) actions per decision
    render_every: int = 1
    render_size: int = 256  # pixels, side of a video frame
    # gymnasium: step environments in this process, which is faster where a step takes less than a
    # millisecond. One that crashes or hangs then takes the run along; one that draws from the
    # global generators changes the noise of training
    in_process: bool = False
    worker_timeout: float = 300.0  # seconds for a step or reset before its process is restarted
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to the simulator

    @property
    def name(self) -> str:
        """The task, or all of them."""
        return "+".join(self.instructions) or self.task


@dataclass
class OptimConfig:
    """One module's optimiser."""

    lr: float = 3e-4
    lr_scheduler: str = "torch_constant"  # torch_constant | linear | cosine
    final_lr: float = 0.0  # where linear and cosine end
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip_grad: Optional[float] = None  # gradient norm bound; null: none


@dataclass
class PolicyConfig:
    """The pretrained policy that finetuning starts from."""

    # a policy folder, a run folder, a shipped policy's name, or null: start from scratch
    path: Optional[str] = "pickcube_state_bc"
    backbone: str = "state"  # backbone built when path is null
    cache_features: bool = True  # store features in replay; false: encode each sampled batch
    # the next four are for folders of other projects (LeRobot, transformers); our own say it all
    cameras: dict[str, str] = field(default_factory=dict)  # policy's camera: observation key
    state: list[str] = field(default_factory=list)  # observation keys of its state, in order
    tokenizer: Optional[str] = None  # folder or tokenizer.json; null: in the policy's folder
    dtype: str = "float32"  # float32 | bfloat16 | float16: precision of the backbone
    # which weights of the pretrained policy the critic's loss trains too (needs
    # cache_features=false): none | lora | last (the last `last_blocks` blocks) | full
    trainable: str = "none"
    lora_rank: int = 16
    last_blocks: int = 1
    micro_batch: Optional[int] = None  # observations encoded at a time in updates; null: all
    gradient_checkpointing: bool = False
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, clip_grad=1.0))


@dataclass
class BatchRenormConfig:
    """Batch Renormalisation (Ioffe 2017) as CrossQ uses it.

    The last five keys reproduce other implementations; their defaults are the paper's.
    """

    momentum: float = 0.99  # running <- momentum * running + (1 - momentum) * batch
    eps: float = 1e-3
    r_max: float = 3.0
    d_max: float = 5.0
    warmup_steps: int = 5_000  # training forwards with r = 1, d = 0; the paper's long runs: 1e5
    ramp_steps: int = 0  # forwards over which the bounds then grow to r_max and d_max (SLM-Lab)
    variance: str = "biased"  # biased | unbiased (sb3-contrib)
    form: str = "unfolded"  # unfolded | folded: r and d inside the root (sb3-contrib, sbx)
    on_input: bool = True  # normalise the network's input too; false: SLM-Lab
    order: str = "after"  # after | before the activation (SLM-Lab)


@dataclass
class CriticConfig:
    """The Q ensemble."""

    num_critics: int = 2
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    matmul_dtype: str = "float32"  # float32 | bfloat16: products of the hidden layers
    batch_renorm: BatchRenormConfig = field(default_factory=BatchRenormConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3))


@dataclass
class ActorConfig:
    """The actor adapter on top of the pretrained policy."""

    type: str = "gaussian"  # gaussian | residual | noise
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    initial_std: float = 0.15  # exploration noise before any learning, in action units
    batch_renorm: bool = False  # Batch Renormalisation in the actor too
    # evaluated and saved is a running average of the weights; this is the old average's weight in
    # each actor update; 0: the latest weights
    average_decay: float = 0.999
    residual_scale: float = 0.1  # residual only: xi in a = clip(a_base + xi * delta)
    residual_ramp_steps: int = 10_000  # residual only: delta's probability is min(1, t / this)
    # residual only: base actions drawn for each observation of a policy that samples; with more
    # than one, acting and bootstrapping take the best of them and their corrections (EXPO)
    candidates: int = 1
    noise_bound: float = 1.0  # noise only: largest noise given to the flow policy
    noise_std: float = 1.0  # noise only: spread before any learning; 1: about the policy's own
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3))


@dataclass
class AnchorConfig:
    """Keeps the actor near the pretrained policy: lambda * |a_mode - anchor|^2.

    The anchor is the pretrained action, in demonstration rows the demonstrated one.
    """

    weight: float = 1.0  # lambda at the start; 0 switches the anchor off
    final_weight: float = 0.0
    decay_steps: int = 15_000  # environment steps from weight to final_weight, linearly
    q_filter: bool = False  # only where the critic scores the anchor higher than the mode


@dataclass
class DemoConfig:
    """Demonstrations mixed into every batch (RLPD)."""

    # a demonstration folder or ManiSkill .h5; null: the ones beside the policy, if any
    path: Optional[str] = None
    fraction: float = 0.25  # share of each batch; 0 switches demonstrations off


@dataclass
class TemperatureOptimConfig:
    """The temperature's optimiser."""

    lr: float = 3.0e-4
    lr_scheduler: str = "torch_constant"
    final_lr: float = 0.0
    clip_grad: Optional[float] = 10.0


@dataclass
class EntropyTuningConfig:
    """The temperature alpha."""

    alpha_type: str = "softplus"  # softplus | exp | fixed_alpha
    initial_alpha: float = 0.005
    target_entropy: Optional[float] = None  # null: -(action_dim * chunk length)
    objective: str = "alpha"  # alpha | log_alpha (stable-baselines3, sbx): factor in the loss
    optim: TemperatureOptimConfig = field(default_factory=TemperatureOptimConfig)


@dataclass
class ReplayBufferConfig:
    """The trajectory replay buffer; sizes and bytes of all processes together."""

    enable_cache: bool = True  # keep trajectories in memory; false: read each batch from disk
    cache_size: int = 6000  # trajectories held in memory
    sample_window_size: int = 6000  # newest trajectories to sample from
    min_buffer_size: int = 2  # trajectories before training starts
    cache_bytes: Optional[int] = 4_294_967_296  # bound on that memory; null: only cache_size
    cache_device: str = "auto"  # auto (where the networks are) | cpu
    pin_memory: bool = False  # cpu cache, networks on a GPU: page-locked batches
    prefetch: int = 0  # batches read ahead in the background; for images and large windows
    max_bytes: Optional[int] = None  # disk budget: the oldest are evicted beyond it; null: none
    compression: str = "none"  # none | zstd: of images on disk
    segment_size: int = 64  # trajectories per file on disk


@dataclass
class AlgorithmConfig:
    """Soft actor-critic and everything that keeps the pretrained policy alive."""

    q_head_type: str = "crossq"  # crossq | default (SAC)
    adv_type: str = "embodied_sac"
    loss_type: str = "embodied_sac"
    loss_agg_func: str = "token-mean"
    group_size: int = 1
    update_epoch: int = 32  # gradient updates per iteration of num_envs * rollout.steps env steps
    batch_size: int = 128
    gamma: float = 0.8
    n_step: int = 1  # decisions per return
    agg_q: str = "min"  # min | mean, in the TD target
    actor_agg_q: Optional[str] = None  # min | mean, in the actor loss; null: agg_q
    bootstrap_type: str = "standard"  # standard: not after terminations | always
    backup_entropy: bool = True  # entropy term in the TD target
    policy_delay: int = 2  # critic updates per actor update
    tau: float = 0.01  # default head: Polyak coefficient of the target network
    target_update_freq: int = 1  # default head: critic updates per Polyak step
    critic_warmup_steps: int = 3_000  # env steps in which only the critic learns
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)
    entropy_tuning: EntropyTuningConfig = field(default_factory=EntropyTuningConfig)
    replay_buffer: ReplayBufferConfig = field(default_factory=ReplayBufferConfig)


@dataclass
class RolloutConfig:
    """How experience is collected."""

    steps: int = 16  # steps of every environment per iteration
    random_steps: int = 0  # first env steps with uniform random actions (from-scratch runs)
    max_trajectory_steps: int = 200  # longer episodes enter replay in pieces of this many decisions
    execute_steps: Optional[int] = None  # actions executed of each chunk; null: as the policy says
    # learn while simulators run; false leaves the cores to one, then the other. null: true, unless
    # simulators need every core of a CPU and there is an update for each of their steps (cores.py)
    overlap: Optional[bool] = None
    # collect in a process of its own while this one learns (docs/asynchronous.md): faster where
    # the policy's inference is much of the work; no two runs are then equal. The next two: for it
    asynchronous: bool = False
    ahead: int = 1  # iterations that it may be ahead of the learner
    device: Optional[str] = None  # where the collecting policy lives; null: as device= says


@dataclass
class EvalConfig:
    """Evaluation on fixed seeds that training never sees."""

    interval: int = 10_000  # env steps between evaluations; 0: only at the end
    episodes: int = 100
    num_envs: int = 4
    seed: int = 0  # first seed of the learning curve's episodes
    final_seed: int = 10_000  # first seed of the closing before/after comparison
    metric: str = "success_once"  # success_once | success_at_end | return: the score of "best"
    video: bool = True  # MP4s of the closing comparison: the same episodes before and after
    video_episodes: int = 4  # filmed; of `evaluate` and `pretrain`: of the first environment's


@dataclass
class TrainConfig:
    """Length of a run and what it leaves behind."""

    total_steps: int = 50_000  # environment steps
    stop_at: Optional[float] = None  # end early once an evaluation's metric reaches this
    checkpoint_interval: int = 2_500  # env steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept besides the best
    log_interval: int = 500  # env steps between metric records
    diagnostics: bool = True  # Q bias, dormant units, clip fractions, weight norms per record
    guard: bool = True  # stop at the first NaN or infinity and save the batch; false: train on
    threads: Optional[int] = None  # of torch; null: cores that simulators leave free, at most 4
    # compiled updates (20 s, kept by torch): auto (from 20,000 updates) | always | never
    compile: str = "auto"
    cuda_graphs: bool = False  # on a GPU: each step of the learner recorded, then one launch
    # several processes: auto (ddp, or what accelerate launch was told) | ddp | fsdp | deepspeed;
    # the last two share out the optimiser's memory (docs/distributed.md)
    engine: str = "auto"
    zero_stage: Optional[int] = None  # deepspeed: 1 shares out moments, 2 gradients too; null: 2
    offload_optimizer: bool = False  # fsdp, deepspeed: moments and their step in host memory
    # several processes (torchrun, accelerate launch): seconds until one that does not answer ends
    # the run; an evaluation or checkpoint of the others must fit in
    rank_timeout: float = 1_800.0


@dataclass
class Config:
    """Everything `python -m embodied_rl.train` reads."""

    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    run_dir: Optional[str] = None  # null: runs/<task>_<head>_s<seed>_<time>
    resume: Optional[str] = None  # a run folder to continue
    # whether to continue the run in `run_dir` if there is one: for commands that schedulers repeat
    auto_resume: bool = False
    env: EnvConfig = field(default_factory=EnvConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
