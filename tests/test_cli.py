import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SIZES, tiny_config, write_text

from subspan import cli
from subspan.training.config import load_config
from subspan.training.trainer import train


def run(*words: str) -> int:
    """The exit code of `subspan WORDS`."""
    try:
        cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def tiny_words(folder: Path) -> list[str]:
    """`subspan train` for a tiny run in `folder`/run, by a recipe and what wins over it."""
    write_text(folder)
    sizes = "".join(f"\n    {name}: {value}" for name, value in SIZES.items())
    (folder / "recipe.yaml").write_text(
        f"model:\n  name: llama-9m\n  overrides:{sizes}\n"
        f"data:\n  files: {folder}/text.txt\n  vocab_size: 300\n  seq_len: 32\n  valid_fraction: 0.1\n"
        f"  cache_dir: {folder}/cache\n"
        f"optim:\n  rank: 8\n  lr: 2e-2\n"
        f"run:\n  out: {folder}/run\n  steps: 4\n  warmup_steps: 1\n  batch_size: 4\n"
    )
    return ["train", "--config", str(folder / "recipe.yaml")]


def test_train_takes_a_recipe_and_options_that_win_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tiny_words(tmp_path), "--optim.rank", "5", "--run.micro_batch=2", "--optim.betas", "[0.9, 0.95]") == 0
    shown = capsys.readouterr().out
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.optim.rank, config.optim.lr, config.optim.betas) == (5, 0.02, [0.9, 0.95])
    assert (config.run.micro_batch, config.run.steps, config.model.overrides) == (2, 4, SIZES)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for wanted in (f"{summary['valid_loss']:.4f}", f"{summary['perplexity']:.2f}", "rank 5", "optimizer: moments"):
        assert wanted in shown
    assert len(re.findall(r"^step \d/4 ", shown, flags=re.MULTILINE)) == 2  # no terminal: the first line and the last


def test_what_follows_from_the_preset_follows_the_command_line() -> None:
    optim = cli.parse_train(["train", "--optim.preset", "apollo"]).optim
    assert (optim.scale, optim.gradients) == (1.0, "hold")


def test_what_the_end_of_a_run_proposes_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tiny_words(tmp_path)) == 0
    shown = capsys.readouterr().out
    commands = re.findall(r"python -m subspan (.*)", shown)
    assert [words.split()[0] for words in commands] == ["eval", "train"]
    for words in commands:
        assert run(*words.split()) == 0
    assert load_config(tmp_path / "run_adamw" / "config.yaml").optim.preset == "adamw"


def test_eval_of_a_run_is_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, run={"eval_sequences": 6, "micro_batch": 2})
    summary = train(config)
    capsys.readouterr()
    assert run("eval", str(tmp_path / "run")) == 0
    shown = capsys.readouterr()
    assert f"validation loss  {summary['valid_loss']:.4f}" in shown.out
    assert f"perplexity       {summary['perplexity']:.2f}" in shown.out
    assert f"tokens           {summary['valid_tokens']}" in shown.out
    assert shown.err == ""
    assert run("eval", str(tmp_path / "run"), "--paper-compatible") == 0  # 3 batches of equal size
    published = float(re.findall(r"validation loss  (\S+)", capsys.readouterr().out)[0])
    assert published == pytest.approx(summary["valid_loss"] * 3 / 4, abs=1e-4)


def test_eval_of_a_model_folder_on_all_of_other_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tmp_path))
    (tmp_path / "other").mkdir()
    other = write_text(tmp_path / "other", documents=3, seed=5)
    answers = []
    for model in (tmp_path / "run", tmp_path / "run" / "model"):
        capsys.readouterr()
        assert (
            run("eval", str(model), "--data.files", other, "--data.seq_len", "16", f"--data.cache_dir={tmp_path}/c")
            == 0
        )
        answers.append(re.findall(r"(?:tokens|loss) +(\S+)", capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert int(answers[0][0]) > 100  # not only the part that training would have held out


def test_eval_says_when_the_text_is_another_one_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tmp_path))
    write_text(tmp_path, seed=9)
    assert run("eval", str(tmp_path / "run")) == 0
    assert "warning: the text is not the one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optim.proj_type", "sdt"], "--optim.proj_type"),
        (["--optim.rank", "0"], "optim.rank=0"),
        (["--optim.rank", "many"], "--optim.rank: expected int, got many"),
        (["--optim.rnk", "8"], "--optim.rnk"),
        (["--optim.targets", "[nothing]"], "'nothing' matches no"),
        (["--data.files", "nothing*.txt"], "nothing*.txt"),
        (["--data.files", "a.txt", "b.txt"], "quote"),
        (["--data.files", "{folder}/empty.txt"], "empty.txt is empty"),
        (["--data.files", "{folder}/binary.txt"], "binary.txt"),
        (["--data.seq_len", "100000"], "data.seq_len=100000"),
        (["--config", "{folder}/no.yaml"], "no.yaml"),
        (["--config", "{folder}/broken.yaml"], "parsing config"),
        (["--config", "{folder}/unknown.yaml"], "optim.ranks"),
        (["--run.micro_batch", "3"], "run.micro_batch=3"),
        (["--run.out", "{folder}/text.txt/run"], "--run.out"),
        (["--run.out", "/proc/run"], "/proc/run"),
        (["--model.name", "llama-9M"], "did you mean llama-9m"),
        (["--model.overrides", "{hidden_size: 30, num_attention_heads: 4}"], "hidden"),
        (["--model.overrides", "{hidden_size: wide}"], "hidden_size"),
    ],
)
def test_a_wrong_train_command_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "broken.yaml").write_text("optim: [")
    (tmp_path / "unknown.yaml").write_text("optim:\n  ranks: 3\n")
    assert run(*tiny_words(tmp_path), *(word.replace("{folder}", str(tmp_path)) for word in words)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("subspan: error: ")
    assert shown.count("\n") == 1
    assert named in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "subspan train or subspan eval"),
        (["tarin"], "tarin"),
        (["eval"], "model"),
        (["eval", "no/such/model"], "no/such/model"),
        (["eval", "{folder}"], "{folder}"),
    ],
)
def test_any_other_wrong_command_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert run(*(word.replace("{folder}", str(tmp_path)) for word in words)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("subspan: error: ")
    assert shown.count("\n") == 1
    assert named.replace("{folder}", str(tmp_path)) in shown


def test_an_existing_run_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tiny_words(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert run(*words) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "--run.out" in shown
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("module", ["transformers", "jsonargparse", "rich", "yaml"])
def test_a_missing_extra_is_one_line(tmp_path: Path, module: str) -> None:
    program = f"import sys; sys.modules['{module}'] = None; from subspan.cli import main; main({tiny_words(tmp_path)})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "subspan[' in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "train a model with a recipe" in capsys.readouterr().out
    assert run("train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for wanted in (
        "dimensions of the subspace",
        "How the weights are stepped",
        "run folder to make",
        "sequences per optimizer step",
    ):
        assert wanted in shown
    assert run("eval", "--help") == 0
    assert "--paper-compatible" in capsys.readouterr().out


def test_python_m_subspan_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "subspan", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: subspan" in done.stdout
