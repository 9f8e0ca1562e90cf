"""The mutation list stays in step with the source that it mutates."""

import ast

import pytest
from mutations import MUTATIONS, ROOT

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_each_can_be_made(mutation):
    text = (ROOT / "embodied_rl" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))


def test_names_are_unique():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
