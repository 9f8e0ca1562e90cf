"""Deliberate mistakes in the algorithm, each of which the tests must catch.

    python tests/mutations.py            # all of them, a few minutes
    python tests/mutations.py r-swapped  # some

Every mutation is made on a copy of the package, on which the algorithm's tests run until the first
failure. Prints what caught what; exits with 1 if one survived. `test_mutations.py` keeps the list
in step with the source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_parity_sb3.py",
    "test_batch_renorm.py",
    "test_sac.py",
    "test_heads_differ.py",
    "test_known_answers.py",
    "test_replay.py",
    "test_collector.py",
)


class Mutation(NamedTuple):
    """One mistake: in `file`, `old` (which occurs once) becomes `new`; `tests` shall catch it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = TESTS


MUTATIONS = (
    Mutation(
        "no-stop-gradient",
        "q_heads/crossq.py",
        "return now, following.detach()",
        "return now, following",
    ),
    Mutation(
        "two-passes",  # each half normalised by itself
        "q_heads/crossq.py",
        "q = self.critics(torch.cat([x, next_x]), torch.cat([action, next_action]))",
        "q = torch.cat([self.critics(x, action), self.critics(next_x, next_action)], 1)",
    ),
    Mutation(
        "score-in-training-mode",
        "q_heads/crossq.py",
        "        self.critics.eval()\n",
        "        self.critics.train()\n",
    ),
    Mutation(
        "r-swapped",
        "batch_renorm.py",
        "r = (var + self.eps).sqrt() / running_std",
        "r = running_std / (var + self.eps).sqrt()",
    ),
    Mutation(
        "unbiased-variance",
        "batch_renorm.py",
        "var = inv_std.pow(-2) - module.eps",
        "var = (inv_std.pow(-2) - module.eps) * len(x) / (len(x) - 1)",
    ),
    Mutation(
        "statistics-after-the-update",  # r and d against the moments that this batch moved
        "batch_renorm.py",
        "- module.eps\n        r, d = module.corrections(mean, var)",
        "- module.eps\n        module.running_mean.lerp_(mean, 1 - module.momentum)\n"
        "        r, d = module.corrections(mean, var)",
    ),
    Mutation(
        "warm-up-one-longer",
        "batch_renorm.py",
        "(over >= 0).to(over)",
        "(over > 0).to(over)",
    ),
    Mutation(
        "momentum-swapped",
        "batch_renorm.py",
        "self.running_var.lerp_(var, 1 - self.momentum)",
        "self.running_var.lerp_(var, self.momentum)",
    ),
    Mutation(
        "gradient-through-r",  # the scale's gradient forgets r
        "batch_renorm.py",
        "ctx.eps, wanted\n        )\n        return to_x, torch.addcmul(to_shift * d, to_scale, r)",
        "ctx.eps, wanted\n        )\n"
        "        return to_x, torch.addcmul(to_shift * d, to_scale, torch.ones_like(r))",
    ),
    Mutation(
        "norm-before-activation",
        "nn.py",
        'place = 1 if renorm.order == "before" else 2',
        'place = 2 if renorm.order == "before" else 1',
    ),
    Mutation(
        "next-action-in-training-mode",
        "sac.py",
        "            self.actor.eval()\n",
        "            self.actor.train()\n",
    ),
    Mutation(
        "no-entropy-in-target",
        "sac.py",
        "value = value - self.temperature().detach() * next_log_prob",
        "value = value - 0 * next_log_prob",
    ),
    Mutation(
        "maximum-of-critics",
        "interfaces/learner.py",
        "q.min(0).values",
        "q.max(0).values",
    ),
    Mutation(
        "policy-delay-ignored",
        "sac.py",
        "if warm and self.critic_updates % self.config.policy_delay == 0:",
        "if warm:",
    ),
    Mutation(
        "temperature-sign",
        "temperature.py",
        "return -(factor *",
        "return (factor *",
    ),
    Mutation(
        "no-squash-correction",
        "actors/tanh_normal.py",
        "return (normal - squash)",
        "return normal",
    ),
    Mutation(
        "polyak-swapped",
        "q_heads/default.py",
        "get_ema_multi_avg_fn(1 - algorithm.tau)",
        "get_ema_multi_avg_fn(algorithm.tau)",
    ),
    Mutation(
        "online-network-as-target",
        "q_heads/default.py",
        "next_q = self.target(next_x, next_action)",
        "next_q = self.critics(next_x, next_action)",
    ),
    Mutation(
        "bootstrap-over-terminations",
        "replay/returns.py",
        "discount = discount * ~(used & rows",
        "discount = discount * (used | rows",
    ),
    Mutation(
        "n-step-discount",  # the k-th reward is not discounted by what came before it
        "replay/returns.py",
        "gamma**before * chunk",
        "gamma * chunk",
    ),
    Mutation(
        "vector-without-bias",
        "products.py",
        "if bias is not None:",
        "if bias is None:",
        ("test_products.py",),
    ),
    Mutation(
        "bias-gradient-rounded",
        "products.py",
        "gradient.sum(0) if to_bias",
        "low.float().sum(0) if to_bias",
        ("test_products.py",),
    ),
)


CONTROL = Mutation("control", "sac.py", "class SAC:", "class SAC:")


def run(mutation: Mutation) -> str | None:
    """Returns the test that caught the mutation, or None.

    Raises:
        RuntimeError: pytest ended otherwise than with passed or failed tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("embodied_rl", "tests"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, Path(folder, name), ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        source = Path(folder, "embodied_rl", mutation.file)
        text = source.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.name}: not once in {mutation.file}"
        source.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        tests = [f"tests/{name}" for name in mutation.tests if Path(folder, "tests", name).exists()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return None
        found = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        if done.returncode != 1 or found is None:
            raise RuntimeError(
                f"{mutation.name}: pytest exit {done.returncode}\n{done.stdout[-900:]}"
            )
        return found.group(1)


def main() -> int:
    """Runs the mutations named on the command line, or all."""
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or m.name in sys.argv[1:]]
    broken = run(CONTROL)
    if broken is not None:
        print(f"the unmutated package fails {broken}: nothing to learn from mutations")
        return 2
    survivors = 0
    for mutation in chosen:
        caught = run(mutation)
        survivors += caught is None
        print(f"{mutation.name:30} {caught or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} mutations, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
