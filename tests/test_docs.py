"""The README and docs/: every fenced block runs or is checked, the API page is whole, and the site builds without a warning.

Python blocks of a page run in order, in one namespace that has what a reader has (`stand_ins`), on a tiny model. Commands are
parsed by the parsers of `subspan`, and not run. What needs more, or cannot run, stands in `RULES` with its reason.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pytest
import torch
import trl
from tiny import SIZES, write_tokenizer
from torch import distributed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import subspan
from subspan import options

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


class Rule(NamedTuple):
    """How a block is treated that does not simply run. `before`: what runs before it, where it is "prepare"."""

    how: Literal["skip", "process", "prepare"]
    why: str
    before: str = ""


RULES = {
    ("README.md", "norm = optimizer.prepare(loss)  # projects, refreshes if all is finite; changes no weight"): Rule(
        "prepare",
        "shows the end of a step, after a backward pass",
        "loss = model(**next(iter(loader))).loss; loss.backward(); loss = loss.detach()",
    ),
    ("docs/distributed.md", "from subspan.distributed import shard_along"): Rule(
        "skip", "wants eight GPUs; tests/test_shards.py does the same with processes on a CPU"
    ),
    ("docs/distributed.md", "from subspan.distributed import ignore_projected"): Rule(
        "prepare", "wants a process group, and a new model", "one_process(); model, loader = fresh()"
    ),
    ("docs/distributed.md", "#!/bin/bash"): Rule("skip", "is a job for Slurm; the commands above it are checked"),
    ("docs/integrations.md", "from accelerate import Accelerator"): Rule(
        "prepare",
        "is a loop of its own: an optimizer above still has the hooks of its model",
        "model, loader = fresh()",
    ),
    ("docs/integrations.md", "import lightning"): Rule(
        "prepare", "is a loop of its own as well", "model, loader = fresh()"
    ),
    ("docs/integrations.md", "import subspan.compat"): Rule(
        "process", "changes what `import galore_torch` means in its process"
    ),
}
"""(page, first line of the block) -> what is special about it."""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    @property
    def rule(self) -> Rule | None:
        return RULES.get((self.page, self.text.partition("\n")[0]))

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, text[: m.start()].count("\n") + 2, m[1], m[2]) for m in FENCE.finditer(text)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# ------------------------------------------------------------------------------------------------------------ Python


def tiny_model(*_: Any, dtype: torch.dtype = torch.float32, **__: Any) -> LlamaForCausalLM:
    """What `from_pretrained` gives here."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)).to(dtype)


def one_process() -> None:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages take for granted, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny_model)
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, bf16=False))  # as the page says for a CPU
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 20, (64, 16))]
    tokenizer = write_tokenizer(tmp_path, special=False)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    messages = [{"role": "user", "content": "the cat sees"}, {"role": "assistant", "content": "the old dog"}]
    yield {
        "model": tiny_model(),
        "loader": DataLoader(rows, batch_size=4),
        "dataset": rows,
        "chat": datasets.Dataset.from_list([{"messages": messages}] * 16),
        "tokenizer": tokenizer,
        "fresh": lambda: (tiny_model(), DataLoader(rows, batch_size=4)),
        "one_process": one_process,
    }
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of Lightning and others, about how small everything is
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))])
def test_python_blocks_run(page: str, stand_ins: dict[str, Any]) -> None:
    for block in blocks_of(page):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")  # tracebacks have the page's lines
        rule = block.rule
        try:
            if rule is None or rule.how == "prepare":
                exec(rule.before if rule else "", stand_ins)
                exec(code, stand_ins)
            elif rule.how == "process":
                subprocess.run([sys.executable, "-W", "ignore", "-c", block.text], check=True)
        except Exception as error:
            pytest.fail(
                f"{block.place}: {type(error).__name__}: {error}\n\n{textwrap.indent(block.text, '    ')}\n"
                "A block that is right and lacks something gets it from `stand_ins`; one that cannot run here gets an entry of "
                "RULES, with the reason (tests/test_docs.py)."
            )


# ---------------------------------------------------------------------------------------------------------- commands


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a console block: lines with a `$`, and those that a backslash adds."""
    joined = block.text.replace("\\\n", " ")
    lines = [line[2:] for line in joined.split("\n") if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


def check_command(words: list[str]) -> None:
    """ValueError, or what the parsers raise, for a command that would not work as it stands; KeyError for an unknown one."""
    program, *rest = words
    if program == "torchrun":  # its own options are torch's affair
        words = rest[rest.index("-m") + 1 :]
        program, *rest = words
    if program == "subspan":
        check_subspan(rest)
    elif program == "make":
        if not re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
            raise ValueError(f"the Makefile has no target {rest[0]}")
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        name, extra = re.fullmatch(r"(-e \.|\w+)(?:\[(\w+)\])?", " ".join(rest[1:])).groups()
        if name not in (project["name"], "-e .") or (extra and extra not in project["optional-dependencies"]):
            raise ValueError(f"pyproject.toml has no {rest[1]}")
    else:
        raise KeyError(program)


def check_subspan(argv: list[str]) -> None:
    if argv[0] == "train":
        options.parse_train(argv)
    elif argv[0] == "finetune":
        options.parse_finetune(argv)
    else:
        arguments = options.parsers()[0].parse_args(argv)
        if argv[0] == "plan":
            options.plan_config(arguments.plan)


def test_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with recipes, and the run that a page has started before it goes on with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "parsers", functools.cache(options.parsers))  # half a second each time
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "runs/cola").mkdir(parents=True)
    (tmp_path / "runs/cola/config.yaml").write_text("model: {name: FacebookAI/roberta-base}\ndata: {task: cola}\n")
    wrong = []
    for block in BLOCKS:
        if block.language != "console" or block.rule:
            continue
        found = commands(block)
        if not found:
            wrong.append(f"{block.place}: no line of this block begins with '$ '")
        for words in found:
            try:
                check_command(words)
            except KeyError:
                wrong.append(
                    f"{block.place}: {words[0]} is unknown: teach check_command, or give the block an entry of RULES"
                )
            except Exception as error:
                wrong.append(f"{block.place}: {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_block_is_of_a_kind_that_is_checked_and_every_rule_has_a_block() -> None:
    for block in BLOCKS:
        assert block.language in ("python", "console") or block.rule, (
            f"{block.place}: {block.language or 'a block without a language'} is not checked: make it python or console "
            "(with '$ '), indent it by four spaces if it is no code, or give it an entry of RULES with the reason "
            "(tests/test_docs.py)"
        )
    unused = set(RULES) - {(block.page, block.text.partition("\n")[0]) for block in BLOCKS}
    assert not unused, f"no block begins so any more, drop these of RULES: {unused}"


# -------------------------------------------------------------------------------------------------------------- site


def test_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^::: subspan\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(subspan.__all__) <= set(listed)


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """A link that leads nowhere is a warning; and what stands outside of docs/ is there. (With --quiet mkdocs counts none.)"""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="the site needs pip install 'subspan[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in (
        path.parent for kind in ("reproductions", "benchmarks") for path in ROOT.glob(f"{kind}/*/README.md")
    ):
        page = tmp_path / folder.relative_to(ROOT)
        assert (page / "index.html").is_file(), folder
        assert {path.name for path in folder.glob("*.png")} == {path.name for path in page.glob("*.png")}
    assert "benchmarks/quality/" in (tmp_path / "results/index.html").read_text()  # the README's table
    assert "../README.md" not in (tmp_path / "memory/index.html").read_text()
