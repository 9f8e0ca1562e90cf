"""Critic, actor and temperature losses and the order of their updates, for either Q head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from embodied_rl.averaging import WeightAverage
from embodied_rl.config import AlgorithmConfig, Config
from embodied_rl.interfaces import ActorAdapter, QHead, UpdateEngine, aggregate
from embodied_rl.schedules import linear
from embodied_rl.temperature import Temperature
from embodied_rl.trained_backbone import TrainedBackbone
from embodied_rl.types import Batch


class SAC:
    """Soft actor-critic with delayed policy updates and an anchor to the pretrained policy.

    Args:
        actor: the trainable policy.
        q_head: critics and their bootstrap.
        temperature: entropy coefficient.
        engine: takes the optimiser steps.
        config: the run's config.
        backbone: the part of the pretrained policy that the critic's loss trains; None: frozen.
        compile: makes a faster function of each step; None: they run as they are written.
    """

    def __init__(
        self,
        actor: ActorAdapter,
        q_head: QHead,
        temperature: Temperature,
        engine: UpdateEngine,
        config: Config,
        backbone: TrainedBackbone | None = None,
        compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        self.config: AlgorithmConfig = config.algorithm
        self.actor, self.q_head, self.temperature = actor, q_head, temperature
        self.engine, self.backbone = engine, backbone
        anchor = config.algorithm.anchor
        self.anchored = anchor.weight > 0 or anchor.final_weight > 0
        self.average = WeightAverage(actor, config.actor.average_decay)
        self.critic_updates = 0
        self._critic = engine.attach("critic", q_head.critic_parameters(), config.critic.optim)
        self._actor = engine.attach("actor", actor.parameters(), config.actor.optim)
        self._temperature = None
        if temperature.tuned:
            optim = self.config.entropy_tuning.optim
            self._temperature = engine.attach("temperature", temperature.parameters(), optim)
        plain = compile is None
        self._critic_step = self._update_critic if plain else compile(self._update_critic)
        self._actor_step = self._update_actor if plain else compile(self._update_actor)

    def update(self, batch: Batch, *, env_steps: int) -> dict[str, Tensor]:
        """Takes one critic step and, every `policy_delay` of them, one actor step.

        Args:
            batch: transitions.
            env_steps: environment steps so far: the anchor's schedule and the critic warm-up.

        Returns:
            Scalar tensors by metric name; reading them is left to the caller.
        """
        metrics = self._critic_step(batch)
        self.critic_updates += 1
        warm = env_steps >= self.config.critic_warmup_steps
        if warm and self.critic_updates % self.config.policy_delay == 0:
            weight = batch.reward.new_tensor(self.anchor_weight(env_steps))
            metrics = {**metrics, **self._actor_step(batch, weight)}
        return metrics

    def anchor_weight(self, env_steps: int) -> float:
        """The anchor's lambda after `env_steps`."""
        anchor = self.config.anchor
        return linear(anchor.weight, anchor.final_weight, anchor.decay_steps, env_steps)

    def learning_rates(self) -> dict[str, float]:
        """Present learning rate of each trained part."""
        parts = {"critic": self._critic, "actor": self._actor, "temperature": self._temperature}
        return {name: t.learning_rate for name, t in parts.items() if t is not None}

    def td_target(self, batch: Batch, next_q: Tensor, next_log_prob: Tensor) -> Tensor:
        """Computes y = R + Gamma (agg_j Q_j(s', a') - alpha log pi(a'|s')), [B]."""
        value = aggregate(next_q, self.config.agg_q)
        if self.config.backup_entropy:
            value = value - self.temperature().detach() * next_log_prob
        return batch.reward + batch.discount * value

    def _update_critic(self, batch: Batch) -> dict[str, Tensor]:
        """The whole step as a function of tensors: nothing in it is read on the host."""
        with torch.no_grad():
            self.actor.eval()
            following = self.actor.backup(batch.next_features)
        x = batch.features.vector
        if self.backbone is not None:
            x = x.detach().requires_grad_()
        q, next_q = self.q_head.td_pair(
            x, batch.action, batch.next_features.vector, following.action
        )
        target = self.td_target(batch, next_q, following.log_prob)
        loss = 0.5 * (q - target).square().mean(1).sum()
        norm = self.engine.step(self._critic, loss, [x] if x.requires_grad else [])
        self.q_head.after_update()
        metrics = {
            "critic/loss": loss.detach(),
            "critic/q": q.detach().mean(),
            "critic/target": target.mean(),
            "critic/grad_norm": norm,
        }
        if self.backbone is not None:
            assert batch.obs is not None and x.grad is not None
            metrics["backbone/grad_norm"] = self.backbone.step(batch.obs, x.grad)
        return metrics

    def _update_actor(self, batch: Batch, anchor_weight: Tensor) -> dict[str, Tensor]:
        self.actor.train()
        features = batch.features
        sample = self.actor(features)
        q = self.value(features.vector, sample.action)
        alpha = self.temperature().detach()
        loss = (alpha * sample.log_prob - q).mean()
        metrics = {"actor/q": q.detach().mean(), "actor/entropy": -sample.log_prob.detach().mean()}
        if self.anchored:
            distance, kept = self._anchor(batch, sample.mode)
            loss = loss + anchor_weight * (distance * kept).mean()
            metrics["anchor/distance"] = distance.detach().mean()
            metrics["anchor/kept"] = kept.mean()
        norm = self.engine.step(self._actor, loss)
        self.average.update()
        metrics |= {"actor/loss": loss.detach(), "actor/grad_norm": norm}
        metrics["anchor/weight"] = anchor_weight
        if self._temperature is not None:
            temperature_loss = self.temperature.loss(sample.log_prob)
            self.engine.step(self._temperature, temperature_loss)
            metrics["temperature/loss"] = temperature_loss.detach()
        metrics["temperature/alpha"] = self.temperature().detach()
        return metrics

    def value(self, x: Tensor, action: Tensor) -> Tensor:
        """Q [B] of features x [B, D] and actions, as the actor loss aggregates it."""
        how = self.config.actor_agg_q or self.config.agg_q
        return aggregate(self.q_head.score(x, action), how)

    def _anchor(self, batch: Batch, mode: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance [B] of the mode to its anchor, and which rows keep it [B].

        The anchor is the pretrained action, in demonstrations the demonstrated one. With the
        Q-filter (Nair et al. 2018, section 4) a row keeps it only where it scores higher.
        """
        base = self.actor.anchor(batch.features)
        anchor = torch.where(batch.is_demo[:, None, None], batch.action, base)
        distance = (mode - anchor).square().flatten(1).sum(-1)
        if not self.config.anchor.q_filter:
            return distance, torch.ones_like(distance)
        x = batch.features.vector
        with torch.no_grad():
            both = self.value(torch.cat([x, x]), torch.cat([anchor, mode]))
        better, present = both.chunk(2)
        return distance, (better > present).to(distance.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Weights, statistics, optimiser moments and counters."""
        return {
            "actor": self.actor.state_dict(),
            "average": self.average.state_dict(),
            "q_head": self.q_head.state_dict(),
            "temperature": self.temperature.state_dict(),
            "engine": self.engine.state_dict(),
            "critic_updates": self.critic_updates,
            "backbone": None if self.backbone is None else self.backbone.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.actor.load_state_dict(state["actor"])
        self.average.load_state_dict(state["average"])
        self.q_head.load_state_dict(state["q_head"])
        self.temperature.load_state_dict(state["temperature"])
        self.engine.load_state_dict(state["engine"])
        self.critic_updates = int(state["critic_updates"])
        if self.backbone is not None:
            self.backbone.load_state_dict(state["backbone"])
