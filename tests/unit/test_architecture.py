"""The shape of the package: what may import what, how large things are, what is never used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median, quantiles

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_sip"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MEDIAN_FILE, MAX_FUNCTION, P95_FUNCTION = 400, 150, 120, 55

# who may name these at all
RESERVED = {
    "torch.cuda": {"platform.py", "mcore_patches.py"},
    "transformer_engine": {"platform.py"},
    "vllm": {
        "rollout/shared_memory_worker.py", "rollout/vllm_plugin.py", "rollout/weight_transfer.py",
    },
    "modelopt": {"convert/fp8.py"},
    "apex": set(),
    "ray": set(),
    "megatron.training": set(),
    "megatron.rl": set(),
    "megatron.bridge": set(),
    "torch.utils.tensorboard": {"sinks/tensorboard.py"},
    "wandb": {"sinks/weights_and_biases.py"},
    "mlflow": {"sinks/mlflow.py"},
    "prometheus_client": {"sinks/prometheus.py"},
}  # fmt: skip

# style section 8; a file may import its own layer and those before it
LAYERS = {
    1: ("types", "errors", "config", "config_base", "config_judge", "config_metrics",
        "config_model", "config_objective", "config_rules", "config_rules_objective", "recipe"),
    2: (
        "pool", "rows", "curriculum", "loss_head", "objectives.", "metrics", "data.permutation",
        "judge.schedules.", "judge.pair_scores", "judge.scoring", "judge.prompts", "judge.criteria",
        "judge.text_model", "judge.forms", "judge.reasoned", "judge.guards",
        "judge.attacks", "judge.agreement", "trust.canaries", "trust.band", "trust.alarm",
        "rewriting.text", "rewriting.phrases", "rewriting.acceptance",
        "evaluation.statistics", "convert.names", "convert.families", "rollout.digest",
        "cost", "mismatch", "explain.flops", "explain.hardware", "explain.shapes",
    ),
    4: ("step", "recovery", "reference", "resume", "assembly"),
    5: ("train", "explain."),
}  # fmt: skip
EFFECTFUL = 3


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, `from a import b` as a.b."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{name_of(path)}:{node.name}", node, node.end_lineno - node.lineno + 1


def attributes(path: Path) -> set[str]:
    """Dotted expressions of a file, such as torch.cuda.synchronize."""
    return {ast.unparse(n) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute)}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", RESERVED)
def test_only_the_named_files_use(package: str) -> None:
    users = {
        name_of(path)
        for path in FILES
        if any(within(n, package) for n in {*imports(path), *attributes(path)})
    }
    assert users <= RESERVED[package]


@pytest.mark.parametrize(
    "name",
    ["config.py", "config_metrics.py", "config_objective.py", "sinks/check.py", "types.py"],
)
def test_config_and_types_import_no_torch_when_they_run(name: str) -> None:
    tree = tree_of(PACKAGE / name)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    left = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not [ast.unparse(n) for n in left if "torch" in ast.unparse(n)]


def layer_of(module: str) -> int:
    for layer, names in LAYERS.items():
        if any(module == n or (n.endswith(".") and module.startswith(n)) for n in names):
            return layer
    return EFFECTFUL


def test_imports_point_from_loop_to_effects_to_pure_files_to_types() -> None:
    modules = {name_of(p).removesuffix(".py").replace("/", "."): p for p in FILES}
    modules = {n.removesuffix(".__init__"): p for n, p in modules.items()}
    wrong = []
    for module, path in modules.items():
        mine = layer_of(module + "." if path.name == "__init__.py" else module)
        for imported in imports(path):
            if not within(imported, "megatron_sip"):
                continue
            found = imported.removeprefix("megatron_sip.")
            while found and found not in modules:
                found = found.rpartition(".")[0]
            if not found:
                continue
            theirs = layer_of(found + "." if modules[found].name == "__init__.py" else found)
            if theirs > mine:
                wrong.append(f"{module} (layer {mine}) imports {found} (layer {theirs})")
    assert not wrong


def test_megatron_core_is_imported_in_the_named_files_only() -> None:
    users = {name_of(p) for p in FILES if any(within(n, "megatron.core") for n in imports(p))}
    assert users <= {
        "platform.py", "mcore_patches.py", "parallel.py", "gpt.py", "model.py", "forward.py",
        "optimizer.py", "checkpoint.py", "checkpoint_reading.py", "checkpoint_writing.py",
        "rollout/weight_source.py", "convert/checkpoints.py", "benchmark/loss_head.py",
        "benchmark/checkpoint.py",
        "benchmark/measure.py", "benchmark/dataset_start.py", "benchmark/plain_preprocess.py",
        "benchmark/preprocess.py",
    }  # fmt: skip


def test_files_stay_within_their_budget() -> None:
    lengths = {name_of(p): len(p.read_text().splitlines()) for p in FILES}
    assert not {n: k for n, k in lengths.items() if k > MAX_FILE}
    assert median(lengths.values()) <= MEDIAN_FILE


def test_functions_stay_within_their_budget(record_property: pytest.FixtureRequest) -> None:
    lengths = {name: length for name, _, length in functions()}
    assert not {n: k for n, k in lengths.items() if k > MAX_FUNCTION}
    p95 = quantiles([k for _, _, k in functions()], n=20)[-1]
    record_property("p95_function_lines", p95)  # type: ignore[operator]
    assert p95 <= P95_FUNCTION


def test_objective_losses_are_short() -> None:
    lengths = {n: k for n, _, k in functions() if n.startswith("objectives/")}
    assert not {n: k for n, k in lengths.items() if n.endswith(":loss") and k > 40}


def test_no_file_is_a_drawer_for_everything() -> None:
    assert not {p.name for p in FILES} & {"utils.py", "util.py", "common.py", "helpers.py"}


def test_nothing_is_pickled_or_evaluated() -> None:
    forbidden_modules = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
    for path in FILES:
        named = {*imports(path), *attributes(path)}
        if name_of(path) != "unpickling.py":  # which reads known classes alone
            assert not [n for n in named for m in forbidden_modules if within(n, m)], path
            assert not {"torch.load", "torch.save"} & named, path
        called = {
            node.func.id
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"eval", "exec", "compile", "__import__"}, path


HANDED_ON = (
    "sinks/guarded.py",  # no failure of a dashboard's library, of whatever kind, may end a run
    "data/preprocess/worker_pool.py",  # a task's error is raised where its outcome is taken
)


def test_handler_of_every_exception_raises_again() -> None:
    for path in FILES:
        if name_of(path) in HANDED_ON:
            continue
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not broad or isinstance(node.body[-1], ast.Raise), f"{path}:{node.lineno}"
