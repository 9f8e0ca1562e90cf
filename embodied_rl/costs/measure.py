"""Runs acting and one update on the meta device under a meter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embodied_rl.costs.draft import META, Draft
from embodied_rl.costs.meter import Meter
from embodied_rl.interfaces import FlowBackbone
from embodied_rl.types import Batch, Features, Obs

LATE = 2**40  # environment steps by which every warm-up and ramp is over


@dataclass
class Cost:
    """What one piece of work takes on one device.

    Attributes:
        precision: of its products, a torch dtype's name.
        flops: floating-point operations.
        kernels: at least as many launches.
        weight_bytes: read by products, at least once each.
        peak: bytes held while it runs, besides what is held anyway.
    """

    precision: str
    flops: float = 0.0
    kernels: float = 0.0
    weight_bytes: float = 0.0
    peak: float = 0.0

    def times(self, count: float) -> Cost:
        """The same work `count` times, one after the other."""
        return Cost(
            self.precision,
            self.flops * count,
            self.kernels * count,
            self.weight_bytes * count,
            self.peak,
        )

    def minus(self, part: Cost) -> Cost:
        """What remains without a part of it."""
        return Cost(
            self.precision,
            self.flops - part.flops,
            self.kernels - part.kernels,
            self.weight_bytes - part.weight_bytes,
            self.peak,
        )

    def rows(self, before: int, after: int) -> Cost:
        """The same work on another number of rows in one go."""
        share = after / before
        return Cost(
            self.precision,
            self.flops * share,
            self.kernels,
            self.weight_bytes,
            self.peak * share,
        )


@dataclass
class Costs:
    """The work of a run.

    Attributes:
        acting_rows: observations that acting was measured with.
        prefix: of acting: observations to features (everything, for a policy that is no flow).
        denoise: of acting: noise to base chunks.
        decode: of acting: the actor's actions to chunks.
        actor: of acting: the adapter.
        acting_peak: bytes held at most while acting.
        encode: of one update: the batch's observations to features; None where they are stored.
        heads: of one update, on average: critics, actor and temperature.
        heads_peak: bytes held at most in an update of these.
        backbone: of one update: the second pass with gradients; None where it is frozen.
        features: of acting, on the meta device: what replay stores of them.
    """

    acting_rows: int
    prefix: Cost
    denoise: Cost
    decode: Cost
    actor: Cost
    acting_peak: float
    encode: Cost | None
    heads: Cost
    heads_peak: float
    backbone: Cost | None
    features: Features

    @property
    def acting(self) -> list[Cost]:
        """The parts of one inference."""
        return [self.prefix, self.denoise, self.actor, self.decode]

    @property
    def update(self) -> list[Cost]:
        """The parts of one update."""
        parts = (self.encode, self.heads, self.backbone)
        return [part for part in parts if part is not None]


def measure(draft: Draft, batch_rows: int, acting_rows: int) -> Costs:
    """Meters one inference for `acting_rows` environments and updates of `batch_rows` rows."""
    backbone = draft.policy.backbone
    precision = next((str(p.dtype)[6:] for p in backbone.parameters()), "float32")
    prefix, denoise, actor, decode, features, peak = _act(draft, acting_rows, precision)
    cached = draft.config.policy.cache_features
    encode = trained = None
    if not cached:
        whole = Cost(
            precision,
            prefix.flops + denoise.flops,
            prefix.kernels + denoise.kernels,
            prefix.weight_bytes + denoise.weight_bytes,
            prefix.peak,
        )
        rows = min(draft.config.policy.micro_batch or batch_rows, batch_rows)
        pieces = batch_rows / rows
        encode = whole.rows(acting_rows, rows).times(2 * pieces)  # this observation and the next
    if draft.backbone is not None:
        trained = _train(draft, batch_rows, precision)
    heads, heads_peak = _update(draft, batch_rows, features)
    return Costs(
        acting_rows,
        prefix,
        denoise,
        decode,
        actor,
        peak,
        encode,
        heads,
        heads_peak,
        trained,
        features.detach(),
    )


def observations(draft: Draft, rows: int) -> Obs:
    """Observations [rows, ...] on the meta device."""
    spec = draft.sketch.spec
    return {
        key: torch.zeros((rows, *entry.shape), dtype=entry.dtype, device=META)
        for key, entry in spec.obs.items()
    }


def _read(meter: Meter, precision: str) -> Cost:
    """What the meter counted since the last time, and starts counting anew."""
    cost = Cost(precision, meter.flops, meter.kernels, meter.weight_bytes, meter.peak)
    meter.reset()
    return cost


def _meter(draft: Draft) -> Meter:
    modules = [draft.policy, draft.q_head, *draft.sketch.elsewhere]
    return Meter([p for module in modules for p in module.parameters()])


@torch.no_grad()
def _act(draft: Draft, rows: int, precision: str) -> tuple[Cost, Cost, Cost, Cost, Features, float]:
    policy = draft.policy
    assert policy.actor is not None
    obs = observations(draft, rows)
    with _meter(draft) as meter:
        if isinstance(policy.backbone, FlowBackbone):
            policy.eval()
            kept = policy.backbone.prefix(obs)
            prefix = _read(meter, precision)
            del kept
            meter.reset()
            features = policy.encode(obs)
            denoise = _read(meter, precision)
            peak = denoise.peak
            denoise = denoise.minus(prefix)
            prefix.peak = peak
        else:
            features = policy.encode(obs)
            prefix, denoise = _read(meter, precision), Cost(precision)
            peak = prefix.peak
        action = policy.actor.explore(features, LATE)
        actor = _read(meter, "float32")
        policy.decode(features, action)
        decode = _read(meter, precision)
        del action
    return prefix, denoise, actor, decode, features, max(peak, actor.peak, decode.peak)


def _features(like: Features, rows: int) -> Features:
    return like.map(lambda t: torch.zeros((rows, *t.shape[1:]), dtype=t.dtype, device=META))


def _update(draft: Draft, rows: int, like: Features) -> tuple[Cost, float]:
    """Critic and actor steps: the cost of an update on average, and the peak of one with both."""
    sac, config = draft.sac, draft.config
    actor = draft.policy.actor
    assert actor is not None
    precision = config.critic.matmul_dtype

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=META)

    with _meter(draft) as meter:
        _make_gradients(draft, ["critic", "actor", "temperature"])
        persistent = meter.held
        batch = Batch(
            _features(like, rows),
            _features(like, rows),
            zeros(rows, *actor.action_shape),
            zeros(rows),
            zeros(rows),
            zeros(rows, dtype=torch.bool),
            None if config.policy.cache_features else observations(draft, rows),
        )
        delay = config.algorithm.policy_delay
        meter.reset()
        critic = Cost(precision)
        if delay > 1:
            sac.critic_updates = 0
            sac.update(batch, env_steps=LATE)
            critic = _read(meter, precision)
        sac.critic_updates = delay - 1
        sac.update(batch, env_steps=LATE)
        both = _read(meter, precision)
        _drop_gradients(draft)
    share = 1 / delay
    mean = Cost(
        precision,
        share * both.flops + (1 - share) * critic.flops,
        share * both.kernels + (1 - share) * critic.kernels,
        share * both.weight_bytes + (1 - share) * critic.weight_bytes,
    )
    mean.peak = max(both.peak, critic.peak) - persistent
    return mean, mean.peak


def _train(draft: Draft, rows: int, precision: str) -> Cost:
    """The backbone's pass with gradients: of two pieces, where there are several, and scaled."""
    assert draft.backbone is not None
    piece = min(draft.backbone.rows or rows, rows)
    seen = min(2 * piece, rows)
    with _meter(draft) as meter:
        _make_gradients(draft, ["backbone"])
        persistent = meter.held
        obs = observations(draft, seen)
        size = draft.policy.backbone.feature_dim
        gradient = torch.zeros(seen, size, device=META)
        meter.reset()
        draft.backbone.step(obs, gradient)
        cost = _read(meter, precision)
        _drop_gradients(draft)
    cost.peak -= persistent
    return cost.times(rows / seen)


def _make_gradients(draft: Draft, names: list[str]) -> None:
    for name, account in draft.engine.accounts.items():
        if name in names:
            for parameter in account.parameters:
                parameter.grad = torch.zeros_like(parameter)


def _drop_gradients(draft: Draft) -> None:
    for account in draft.engine.accounts.values():
        for parameter in account.parameters:
            parameter.grad = None
