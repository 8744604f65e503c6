"""Who may import whom: read from the source, so that the tree keeps its promise."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "subspan"

LAYERS = {
    "advice": 0,
    "checks": 0,
    "extras": 0,
    "optim.books": 0,
    "optim.copies": 2,
    "optim.dtensors": 0,
    "optim.int8": 1,
    "optim.marks": 0,
    "optim.projectors": 1,
    "optim.quant": 1,
    "optim.refresh": 2,
    "optim.refreshing": 2,
    "optim.rules": 1,
    "optim.shards": 2,
    "optim.backward": 2,
    "optim.combine": 2,
    "optim.feedback": 2,
    "optim.groups": 2,
    "optim.norms": 2,
    "optim.optimizer": 2,
    "optim.presets": 2,
    "optim.state": 2,
    "optim.sweep": 2,
    "optim.update": 2,
    "live": 1,
    "traffic": 1,
    "diagnostics": 3,
    "memory": 3,
    "simulation": 3,
    "training.baselines": 3,
    "training.checkpoint": 3,
    "training.config": 3,
    "training.corpus": 3,
    "training.data": 3,
    "training.evaluation": 3,
    "training.finetune_config": 3,
    "training.models": 3,
    "training.optimizers": 3,
    "training.runlog": 3,
    "training.profile": 3,
    "training.processes": 4,
    "training.resume": 4,
    "training.text": 4,
    "training.tasks": 4,
    "training.classifier": 4,
    "training.trainer": 4,
    "training.finetune": 4,
    "plan": 4,
    "budget": 5,
    "cluster": 5,
    "cli": 5,
    "options": 5,
    "compat": 5,
    "distributed": 5,
    "doctor": 4,
    "hf": 5,
    "report.figures": 5,
    "report.page": 5,
    "report.runs": 5,
    "report.tables": 5,
}
# Presets are the optimizer with a rule; the optimizer, cut in three for length, reads groups and owns its hooks, which know its
# type, and both go through weights by update's parts, which sweep does the arithmetic of; shards say which part of a parameter is
# here; data and corpus, trainer, text and resume are one module each, cut for length, as are finetune, classifier and tasks; a
# checkpoint asks memory whether a copy fits; the command is its options and what they start.
SIBLINGS = {
    ("optim.presets", "optim.optimizer"),
    ("optim.optimizer", "optim.groups"),
    ("optim.optimizer", "optim.refresh"),
    ("optim.presets", "optim.refresh"),
    ("optim.presets", "optim.combine"),
    ("optim.presets", "optim.feedback"),
    ("optim.sweep", "optim.refresh"),
    ("optim.optimizer", "optim.backward"),
    ("optim.backward", "optim.optimizer"),
    ("optim.backward", "optim.groups"),
    ("optim.optimizer", "optim.update"),
    ("optim.update", "optim.sweep"),
    ("optim.update", "optim.norms"),
    ("optim.update", "optim.combine"),
    ("optim.sweep", "optim.combine"),
    ("optim.optimizer", "optim.combine"),
    ("optim.optimizer", "optim.sweep"),
    ("optim.optimizer", "optim.norms"),
    ("optim.optimizer", "optim.refreshing"),
    ("optim.refreshing", "optim.state"),
    ("optim.refreshing", "optim.sweep"),
    ("optim.refreshing", "optim.groups"),
    ("optim.refreshing", "optim.copies"),
    ("optim.optimizer", "optim.shards"),
    ("optim.feedback", "optim.norms"),
    ("optim.feedback", "optim.refresh"),
    ("optim.optimizer", "optim.feedback"),
    ("optim.state", "optim.feedback"),
    ("optim.sweep", "optim.feedback"),
    ("optim.state", "optim.groups"),
    ("optim.state", "optim.refresh"),
    ("optim.state", "optim.combine"),
    ("optim.state", "optim.sweep"),
    ("optim.state", "optim.update"),
    ("optim.state", "optim.shards"),
    ("optim.optimizer", "optim.copies"),
    ("optim.norms", "optim.shards"),
    ("optim.update", "optim.shards"),
    ("optim.shards", "optim.groups"),
    ("optim.shards", "optim.copies"),
    ("training.checkpoint", "memory"),
    ("training.baselines", "training.config"),
    ("training.baselines", "training.finetune_config"),
    ("training.optimizers", "training.config"),
    ("training.finetune_config", "training.config"),
    ("training.classifier", "training.tasks"),
    ("training.finetune", "training.classifier"),
    ("training.finetune", "training.tasks"),
    ("training.finetune", "training.trainer"),
    ("training.finetune", "training.resume"),
    ("training.runlog", "diagnostics"),
    ("training.runlog", "training.config"),
    ("training.data", "training.corpus"),
    ("training.trainer", "training.text"),
    ("training.trainer", "training.processes"),
    ("training.checkpoint", "training.processes"),
    ("plan", "training.trainer"),
    ("plan", "training.processes"),
    ("cli", "options"),
    ("options", "cluster"),
    ("cli", "budget"),
    ("cli", "cluster"),
    ("cli", "report.figures"),
    ("cli", "report.page"),
    ("cli", "report.runs"),
    ("report.page", "cluster"),
    ("report.page", "report.figures"),
    ("report.page", "report.runs"),
    ("report.page", "report.tables"),
    ("report.tables", "report.figures"),
    ("report.tables", "report.runs"),
    ("training.trainer", "training.resume"),
}
TORCH_ALONE = {
    "optim.books",
    "optim.combine",
    "optim.copies",
    "optim.dtensors",
    "optim.feedback",
    "optim.int8",
    "optim.projectors",
    "optim.quant",
    "optim.refreshing",
    "optim.rules",
    "optim.shards",
    "optim.sweep",
    "optim.backward",
    "optim.groups",
    "optim.optimizer",
    "optim.presets",
    "optim.state",
    "optim.update",
    "live",
    "memory",
    "simulation",
    "traffic",
    "compat",
    "distributed",
    "doctor",
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith(("__init__", "__main__")):
            yield name, ast.parse(path.read_text())


def imports(tree):
    """Absolute names of everything imported anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} == set(LAYERS)


def test_arrows_point_down():
    for name, tree in modules():
        for imported in imports(tree):
            other = imported.removeprefix("subspan.")
            if imported.startswith("subspan.") and other in LAYERS and other != name:
                allowed = LAYERS[other] < LAYERS[name] or (name, other) in SIBLINGS
                assert allowed, f"{name} imports {other}"


def test_the_library_needs_torch_alone():
    for name, tree in modules():
        if name in TORCH_ALONE:
            tops = {imported.partition(".")[0] for imported in imports(tree)}
            assert tops <= sys.stdlib_module_names | {"torch", "subspan"}, name


def test_import_subspan_loads_nothing_but_torch():
    code = (
        "import torch, sys; before = set(sys.modules); import subspan; "
        "print({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("{'subspan'}", "{'subspan', 'torch'}", "{'torch', 'subspan'}")
