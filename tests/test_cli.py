import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SIZES, tiny_config, write_text

from subspan import cli, options
from subspan.training.config import load_config, make_config, save_config
from subspan.training.runlog import describe_summary
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
    optim = options.parse_train(["train", "--optim.preset", "apollo"]).optim
    assert (optim.scale, optim.gradients) == (1.0, "hold")


def test_what_the_end_of_a_run_proposes_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tiny_words(tmp_path)) == 0
    shown = capsys.readouterr().out
    commands = re.findall(r"python -m subspan (.*)", shown)
    assert [words.split()[0] for words in commands] == ["eval", "train"]
    for words in commands:
        assert run(*words.split()) == 0
    assert load_config(tmp_path / "run_adamw" / "config.yaml").optim.preset == "adamw"


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"moments": "transport", "moments_gate": 0.5, "adaptive_refresh": 0.6, "max_update_proj_gap": 500}},
        {"optim": {"projector": "svd", "basis_dtype": "int4"}, "run": {"diagnostics": True}},
        {"optim": {"preset": "fira"}, "run": {"diagnostics": True}},
        {"optim": {"preset": "adamw"}, "model": {"baseline": "lora"}},
        {"optim": {"preset": "subspan", "gradients": "update"}},
        {"optim": {"preset": "qgalore"}},
    ],
)
def test_the_proposed_comparison_is_a_command(tmp_path: Path, sections: dict[str, dict[str, object]]) -> None:
    config = make_config({"model": {}, "data": {}, "optim": {}, "run": {}, **sections, "resume": None})
    config.run.out = str(tmp_path)
    save_config(config, tmp_path / "config.yaml")
    sizes = dict.fromkeys(("basis", "moments", "adam_full_rank"), 1)
    known = {"valid_loss": 1.0, "perplexity": 1.0, "first_loss": 1.0, "tokens": 1, "seconds": 1}
    shown = describe_summary({**known, "bytes": sizes, "config": dataclasses.asdict(config)})
    (words,) = re.findall(r"try next .*: subspan (.*)", shown)
    optim = options.parse_train(shlex.split(words)).optim
    assert optim.preset == ("galore" if config.optim.preset in ("adamw", "subspan") else "adamw")
    assert (optim.scale, optim.gradients) == (0.25, "update" if config.optim.gradients == "update" else "project")


def test_what_follows_from_preset_and_rank_does_so_from_a_runs_file_too(tmp_path: Path) -> None:
    for preset, other, filled in (
        ("galore", "apollo_mini", (1.0, "hold")),  # at rank 128
        ("apollo_mini", "galore", (0.25, "project")),
    ):
        save_config(options.parse_train(["train", "--optim.preset", preset]), tmp_path / "config.yaml")
        optim = options.parse_train(["train", "--config", f"{tmp_path}/config.yaml", "--optim.preset", other]).optim
        assert (optim.scale, optim.gradients) == filled
    words = ["finetune", "--data.folder", "glue", "--data.task", "cola"]
    save_config(options.parse_finetune([*words, "--optim.rank", "4"]), tmp_path / "config.yaml")
    for rank, scale in (("4", 4.0), ("8", 2.0)):
        made = options.parse_finetune(["finetune", "--config", f"{tmp_path}/config.yaml", "--optim.rank", rank])
        assert made.optim.scale == scale
    save_config(options.parse_train(["train", "--optim.scale", "0.5"]), tmp_path / "config.yaml")
    assert (
        options.parse_train(["train", "--config", f"{tmp_path}/config.yaml", "--optim.preset", "fira"]).optim.scale
        == 0.5
    )


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


def test_eval_of_other_text_than_the_run_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files in the place of a dataset, a dataset in that of files."""
    config = tiny_config(tmp_path, run={"eval_sequences": 2, "steps": 1, "warmup_steps": 0})
    train(config)
    file = tmp_path / "run" / "config.yaml"
    words = ["eval", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "c")]
    config.data.files, config.data.dataset = None, "some/text"
    save_config(config, file)
    assert run(*words, "--data.files", str(tmp_path / "text.txt")) == 0
    config.data.files, config.data.dataset, config.data.valid_files = (
        str(tmp_path / "text.txt"),
        None,
        str(tmp_path / "text.txt"),
    )
    save_config(config, file)
    capsys.readouterr()
    assert run(*words, "--data.dataset", str(tmp_path / "nothing")) == 2
    assert "exclude" not in capsys.readouterr().err  # it was looked for
    assert run(*words) == 0
    assert f", {tmp_path}/text.txt\n" in capsys.readouterr().out


def test_an_unknown_option_of_a_recipe_is_told_what_is_near(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, said in (
        ("optim: {ranks: 4}", "optim.ranks is no option of subspan train, optim.rank is near"),
        ("data: {max_length: 4}", "data.max_length is no option of subspan train, subspan finetune has it"),
    ):
        recipe.write_text(text)
        assert run("train", "--config", str(recipe)) == 2
        assert said in capsys.readouterr().err


def test_eval_says_when_the_text_is_another_one_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tmp_path))
    write_text(tmp_path, seed=9)
    assert run("eval", str(tmp_path / "run")) == 0
    assert "warning: the text is not the one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optim.proj_type", "sdt"], "--optim.proj_type"),
        (["--optim.ranks", "4"], "--optim.ranks"),
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
