"""What CUDA graphs ask of an update, and, where there is a GPU, that they compute the same."""

import pytest
import torch

from embodied_rl.cuda_graphs import Graphed
from embodied_rl.errors import UserError
from embodied_rl.nests import mapped, tensors_of
from embodied_rl.registry import Q_HEADS


def state_of(sac) -> dict[str, torch.Tensor]:
    """Everything that an update changes, by name."""
    modules = {"actor": sac.actor, "head": sac.q_head, "average": sac.average.module}
    modules["temperature"] = sac.temperature
    tensors = {
        f"{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()
    }
    for name, part in sac.engine._trainables.items():
        tensors[f"{name}.rate"] = part.rate
        for kind in ("steps", "exp_avgs", "exp_avg_sqs"):
            tensors |= {f"{name}.{kind}.{i}": t for i, t in enumerate(getattr(part, kind))}
    return tensors


@pytest.mark.unit
@pytest.mark.parametrize("actor", ["actor.batch_renorm=true", "actor.average_decay=0.9"])
@pytest.mark.parametrize("head", Q_HEADS.names)
def test_updates_change_tensors_where_they_are(make_sac, make_batch, head, actor):
    """A recorded update reads and writes addresses: a tensor that is made anew would be lost."""
    sac = make_sac(
        f"algorithm.q_head_type={head}",
        "actor.average_decay=0",
        actor,
        "algorithm.target_update_freq=2",
        "critic.optim.lr_scheduler=linear",
    )
    before = {name: (t.data_ptr(), t.clone()) for name, t in state_of(sac).items()}
    for i in range(4):
        sac.engine.set_progress(i / 4)
        sac.update(make_batch(16, seed=i), env_steps=i)
    after = state_of(sac)
    assert {name: t.data_ptr() for name, t in after.items()} == {
        name: address for name, (address, _) in before.items()
    }
    moved = {name for name, (_, value) in before.items() if not torch.equal(value, after[name])}
    assert {n.split(".")[0] for n in moved} >= {"actor", "head", "average", "temperature", "critic"}


@pytest.mark.unit
def test_is_refused_where_there_is_no_gpu(make_sac):
    with pytest.raises(UserError, match=r"train\.cuda_graphs=true \(device cpu, 1 processes"):
        make_sac("train.cuda_graphs=true")


@pytest.mark.unit
def test_all_tensors_of_a_batch_are_found(make_batch):
    batch, weight = make_batch(4, seed=0), torch.ones(())
    found = tensors_of((batch, weight))
    kept = mapped((batch, weight), torch.Tensor.clone)
    assert len(found) == len(tensors_of(kept)) == 9  # six fields, two of them pairs, and the weight
    assert all(torch.equal(a, b) for a, b in zip(found, tensors_of(kept), strict=True))
    assert not {t.data_ptr() for t in found} & {t.data_ptr() for t in tensors_of(kept)}
    kept[0].features.vector.zero_()
    assert batch.features.vector.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("head", Q_HEADS.names)
def test_graphed_updates_equal_plain_ones(make_sac, make_batch, head):
    """The same kernels in the same order, noise included: equal but for atomics in reductions."""
    words = [f"algorithm.q_head_type={head}", "actor.average_decay=0.9"]
    plain, graphed = (make_sac(*words, device=torch.device("cuda")) for _ in range(2))
    for step in ("_critic_step", "_actor_step"):
        setattr(graphed, step, Graphed(getattr(graphed, step)))
    for sac in (plain, graphed):
        torch.manual_seed(1)
        for i in range(12):
            batch = mapped(make_batch(16, seed=i), lambda t: t.cuda())
            sac.engine.set_progress(i / 12)
            sac.last = sac.update(batch, env_steps=i)
    assert graphed._critic_step._graph is not None and graphed._actor_step._graph is not None
    for name, value in plain.last.items():
        torch.testing.assert_close(graphed.last[name], value, rtol=1e-4, atol=1e-5, msg=name)
    one, other = state_of(graphed), state_of(plain)
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)
