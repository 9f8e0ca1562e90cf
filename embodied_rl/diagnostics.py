"""Looks into the learner at every log interval: what a silent learning bug would show first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.config import AlgorithmConfig
from embodied_rl.sac import SAC
from embodied_rl.types import Batch, Features, Obs, Trajectory

DORMANT = 0.025  # tau of Sokar et al. 2023
RUNAWAY = 100.0  # alpha above this multiple of its start is reported


class Diagnostics:
    """Measures on the latest batch and the latest episodes; changes nothing, draws no numbers.

    - `q_bias`, `q_bias_std`: mean and standard deviation of Q - R over recent states, over |mean R|
      (Bhatt et al. 2024, section 4.3; Chen et al. 2021, appendix B). R is the discounted soft
      Monte-Carlo return, bootstrapped with the present Q where the time limit cut the episode.
    - `<net>/weight_norm`, `<net>/effective_lr`: Euclidean norm of all matrices, and learning rate
      over its square, which is how fast a normalised layer turns (van Laarhoven 2017).
    - `<net>/dormant`: share of ReLU units whose mean activation is at most 0.025 of their layer's
      (Sokar et al. 2023, definition 3.1).
    - `batch_renorm/r_clipped`, `d_clipped`: share of corrections outside [1/r_max, r_max] and
      [-d_max, d_max]; `batch_renorm/warm`: share of layers whose warm-up is over.

    Args:
        sac: the learner.
        config: discount, aggregation and entropy settings.
        encode: backbone forward, for trajectories that carry no features.
        device: where networks live.
    """

    def __init__(
        self,
        sac: SAC,
        config: AlgorithmConfig,
        encode: Callable[[Obs], Features],
        device: torch.device,
    ) -> None:
        self.sac, self.config, self.device = sac, config, device
        self._encode = encode
        self._warned = False

    @torch.no_grad()
    def measure(self, batch: Batch, recent: Sequence[Trajectory]) -> dict[str, float]:
        """Returns scalars by metric name.

        Args:
            batch: the latest training batch.
            recent: the latest finished trajectories; may be empty.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the training run's numbers stay as they are
            values = self._networks(batch)
            if recent:
                values |= self._q_bias(recent)
        return {f"diagnostics/{name}": value for name, value in values.items()}

    def warning(self, values: dict[str, float]) -> str | None:
        """Returns a message, once a run, if the temperature has run away."""
        alpha, start = values.get("temperature/alpha"), self.config.entropy_tuning.initial_alpha
        if self._warned or alpha is None or alpha <= RUNAWAY * start:
            return None
        self._warned = True
        entropy = values.get("actor/entropy", math.nan)
        return (
            f"warning: the temperature alpha grew from {start:g} to {alpha:.3g} while the policy's "
            f"entropy is {entropy:.2f} and its target {self.sac.temperature.target_entropy:g}: the "
            "entropy bonus may drown the reward. Lower algorithm.entropy_tuning.target_entropy or "
            "its optim.lr, or set algorithm.entropy_tuning.alpha_type=fixed_alpha."
        )

    def state_dict(self) -> dict[str, Any]:
        """Whether the warning was given."""
        return {"warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it: the warning is given once a run, not once a resume."""
        self._warned = state["warned"]

    def _networks(self, batch: Batch) -> dict[str, float]:
        """Runs copies of actor and critics over the batch, as training does."""
        head, actor = copy.deepcopy(self.sac.q_head), copy.deepcopy(self.sac.actor)
        watched = {"critic": Watch(head), "actor": Watch(actor)}
        following = actor.eval()(batch.next_features).action
        x = batch.features.vector
        head.td_pair(x, batch.action, batch.next_features.vector, following)
        watched["critic"].activity.clear()  # target networks ran as well
        head.score(x, batch.action)
        values: dict[str, float] = {}
        for name, lr in self.sac.learning_rates().items():
            if name not in watched:
                continue
            matrices = [m.weight for m in watched[name].linears]
            norm = float(torch.nn.utils.get_total_norm(matrices))
            values[f"{name}/weight_norm"] = norm
            values[f"{name}/effective_lr"] = lr / norm**2
            values[f"{name}/dormant"] = watched[name].dormant()
        values |= watched["critic"].renorm()
        return values

    def _q_bias(self, recent: Sequence[Trajectory]) -> dict[str, float]:
        predicted, returns = [], []
        for trajectory in recent:
            q, r = self._q_and_return(trajectory)
            predicted.append(q)
            returns.append(r)
        q, r = torch.cat(predicted), torch.cat(returns)
        bias, scale = q - r, r.mean().abs().clamp(min=1e-8)
        return {
            "q_bias": float(bias.mean() / scale),
            "q_bias_std": float(bias.std(correction=0) / scale),
            "q": float(q.mean()),
            "return_to_go": float(r.mean()),
        }

    @torch.no_grad()
    def _q_and_return(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Q of the actions taken, [T], and their soft Monte-Carlo returns, [T]."""
        config, actor, head = self.config, self.sac.actor, self.sac.q_head
        fields = {k: v.to(self.device) for k, v in trajectory.fields.items()}
        features = self._features(fields)
        q = head.score(features.vector[:-1], fields["action"][:-1]).mean(0).cpu()
        sample = actor.eval()(features)
        last = float(head.score(features.vector[-1:], sample.action[-1:]).mean())
        alpha = float(self.sac.temperature()) if config.backup_entropy else 0.0
        bonus = (-alpha * sample.log_prob).tolist()
        rewards = trajectory.fields["reward"].cpu()
        powers = config.gamma ** torch.arange(rewards.shape[1])
        gains = (rewards * powers).sum(1).tolist()
        steps = trajectory.fields["steps"].tolist()
        ended = trajectory.fields["terminated"].tolist()
        value, out = last + bonus[-1], []
        for t in reversed(range(trajectory.length)):
            cut = ended[t] and config.bootstrap_type == "standard"
            gain = gains[t] if cut else gains[t] + config.gamma ** steps[t] * value
            out.append(gain)
            value = gain + bonus[t]
        return q, torch.tensor(out[::-1])

    def _features(self, fields: dict[str, Tensor]) -> Features:
        stored = Features.from_fields(fields)
        if stored is not None:
            return stored
        obs = {k.removeprefix("obs."): v for k, v in fields.items() if k.startswith("obs.")}
        return self._encode(obs)


class Watch:
    """Hooks on a network that is about to run once: activations and renormalisation inputs."""

    def __init__(self, net: nn.Module) -> None:
        modules = list(net.modules())
        self.linears = [m for m in modules if isinstance(m, nn.Linear) and m.weight.requires_grad]
        self.activity: list[Tensor] = []
        self._clipped: list[tuple[Tensor, Tensor]] = []
        self._warm: list[Tensor] = []
        for module in modules:
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._saw_activation)
            if isinstance(module, BatchRenorm):
                module.register_forward_pre_hook(self._saw_renorm)

    def _saw_activation(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.activity.append(output.flatten(0, -2).abs().mean(0))

    def _saw_renorm(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, BatchRenorm)
        if not layer.training:
            return
        var, mean = torch.var_mean(inputs[0].flatten(0, -2), 0, correction=0)
        std = (layer.running_var + layer.eps).sqrt()
        r, d = (var + layer.eps).sqrt() / std, (mean - layer.running_mean) / std
        outside = (r > layer.r_max) | (r < 1 / layer.r_max)
        self._clipped.append((outside.float().mean(), (d.abs() > layer.d_max).float().mean()))
        self._warm.append(layer.steps >= layer.warmup_steps)

    def dormant(self) -> float:
        """Share of dormant units over all layers that ran."""
        if not self.activity:
            return 0.0
        idle = [a <= DORMANT * a.mean() for a in self.activity]
        return float(torch.cat(idle).float().mean())

    def renorm(self) -> dict[str, float]:
        """Clip fractions and warm-up, averaged over layers; empty without Batch Renormalisation."""
        if not self._clipped:
            return {}
        r, d = (torch.stack(part).mean() for part in zip(*self._clipped, strict=True))
        warm = torch.stack(self._warm).float().mean()
        return {
            "batch_renorm/r_clipped": float(r),
            "batch_renorm/d_clipped": float(d),
            "batch_renorm/warm": float(warm),
        }
