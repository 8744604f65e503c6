"""The page of `subspan report`: what is in it for whole, unfinished and broken runs, and what it does in a real browser."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_cli import run as subspan
from tiny import tiny_config

from subspan import options
from subspan.diagnostics import FIELDS
from subspan.plan import Planner
from subspan.report.page import _in_common, report_page
from subspan.report.runs import POINTS, command_of, drift, durations, read_runs, smooth, thin
from subspan.report.tables import facts_of
from subspan.training.config import save_config
from subspan.training.finetune_config import (
    ClassifierConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    TaskConfig,
)

pytest.importorskip("plotly")
pytest.importorskip("yaml")

FIGURES = ["loss", "lr", "norm", "memory", "drift", "energy", "pace"]


def write_run(folder: Path, *, steps: int = 40, seed: int = 0, diagnostics: bool = True, finished: bool = True) -> Path:
    """A run folder as `subspan train` leaves it, without the training."""
    folder.mkdir(parents=True)
    config = tiny_config(folder, run={"steps": steps, "out": str(folder), "eval_every": 10}, optim={"preset": "galore"})
    (folder / "text.txt").unlink()
    save_config(config, folder / "config.yaml")
    draw, lines = random.Random(seed), []
    for step in range(1, steps + 1):
        loss = 2 + 6 * math.exp(-3 * step / steps) + draw.gauss(0, 0.1)
        lines.append({"step": step, "tokens": 128 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1 + draw.random()})
        lines[-1] |= {"seconds": 0.1 * step, "peak_memory_bytes": 6 * 10**8, "skipped": 0}
        if diagnostics and step % 10 == 1:
            names = [
                f"model.layers.{layer}.self_attn.{kind}.weight" for layer in (0, 1) for kind in ("q_proj", "o_proj")
            ]
            rows = [{"name": name, **dict.fromkeys(FIELDS, draw.random())} for name in names]
            lines.append({"step": step, "refreshes": rows})
        if step % 10 == 0:
            lines.append(
                {"step": step, "tokens": 128 * step, "valid_loss": loss + 0.1, "perplexity": math.exp(loss + 0.1)}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {
            "valid_loss": loss + 0.1,
            "tokens": 128 * steps,
            "seconds": 0.1 * steps,
            "tokens_per_second": 1280.0,
            "refresh_seconds": 0.05,
            "parameters": 44_000,
            "bytes": {"weights": 200_000, "gradients": 200_000, "basis": 50_000, "moments": 90_000},
            "peak_memory_bytes": 6 * 10**8,
            "device": "cpu, 2 threads",
            "corpus": {"sha256": "ab12", "description": "1 file"},
            "versions": {"python": "3.11", "torch": "2.13"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_seeds(folder: Path) -> Path:
    """The folder of a fine-tuning with a finished seed and one that was stopped."""
    folder.mkdir()
    config = FinetuneConfig(
        ClassifierConfig(name="some/encoder"),
        TaskConfig(task="cola", folder="glue"),
        FinetuneOptimConfig(preset="galore", rank=4),
        FinetuneRunConfig(out=str(folder), seeds=[1, 10]),
    )
    save_config(config, folder / "config.yaml")
    for seed in (1, 10):
        (folder / f"seed_{seed}").mkdir()
        rows: list[dict[str, Any]] = [
            {"step": step, "tokens": 9 * step, "loss": 0.7 / step, "lr": 1e-5, "grad_norm": 1.0, "seconds": 0.2 * step}
            for step in range(1, 7)
        ]
        rows.insert(3, {"step": 3, "epoch": 1, "matthews": 0.25, "valid_loss": 0.5})
        (folder / f"seed_{seed}" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"best": {"epoch": 1, "matthews": 0.25, "valid_loss": 0.5}, "peak_memory_bytes": 9**9}
    (folder / "seed_1" / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(autouse=True, scope="module")
def _one_planner() -> Iterator[None]:
    """What a planner keeps serves all tests: their models are the same one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subspan.report.page.Planner", functools.cache(Planner))
        yield


class Reader(HTMLParser):
    """What a page loads, its texts by element, tables by figure, and the data of its script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.plots: dict[str, int] = {}  # tables after it
        self.notices: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(page)
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
        assert found
        self.data = json.loads(found[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside.append(tag)
        self.loads += [given[name] or "" for name in ("src", "href", "srcset", "action", "poster") if name in given]
        if given.get("class") == "plot":
            self.plots[given["id"] or ""] = 0
        if tag == "table" and self.plots:
            self.plots[list(self.plots)[-1]] += 1
        if tag == "li":
            self.notices.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & {*self._inside}:
            self.text += data
            if "li" in self._inside:
                self.notices[-1] += data


def page_of(*runs: Path, out: Path) -> Reader:
    """The page that `subspan report` writes of them."""
    assert subspan("report", *map(str, runs), "--out", str(out)) == 0
    return Reader(out.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------- what is in it


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "galore")
    assert subspan("report", str(run)) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert [link for link in page.loads if not link.startswith("#")] == []  # nothing is loaded from anywhere
    assert not re.search(r"@import|url\(", text[: text.index("</style>")])
    assert list(page.plots) == FIGURES
    assert all(page.plots.values())
    assert page.notices == []
    (shown,) = page.data["runs"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert shown["loss"]["y"] == [pytest.approx(line["loss"], rel=1e-5) for line in logged if "loss" in line]
    assert shown["valid"]["tokens"] == [1280, 2560, 3840, 5120]
    assert shown["loss"]["seconds"][-1] == 4.0
    assert shown["drift"]["matrices"][:2] == [{"layer": 0, "kind": "q_proj"}, {"layer": 0, "kind": "o_proj"}]
    assert shown["drift"]["step"] == [1, 11, 21, 31]
    assert {*shown["drift"]["fields"]} == {*FIELDS}
    planned, measured = page.data["memory"][0]["bars"]
    assert (planned["label"], measured["label"]) == ("planned", "measured")
    weights = 4 * (2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32)
    assert planned["parts"]["weights"] == pytest.approx(weights, rel=1e-3)  # and buffers
    assert sum(measured["parts"].values()) == measured["total"] == 6 * 10**8
    for wanted in ("torch 2.13", "cpu, 2 threads", "ab12", "--optim.update_proj_gap 5", "vocab_size: 300"):
        assert wanted in page.text


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", seed=i) for i, name in enumerate("abc")]
    page = page_of(*runs, runs[0], out=tmp_path / "page.html")
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run", "c/run"]
    assert page.text.count("\u2605") == 1  # the best validation loss


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 100,000 steps, with a loss of 99 at step 54,321."""
    folder = tmp_path_factory.mktemp("long")
    run = write_run(folder / "long", steps=100_000, diagnostics=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    spike = next(i for i, line in enumerate(lines) if '"step": 54321,' in line)
    lines[spike] = json.dumps({**json.loads(lines[spike]), "loss": 99.0})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page_of(run, out=folder / "page.html")
    return folder / "page.html"


def test_a_long_run_is_thinned(long_page: Path) -> None:
    page = Reader(long_page.read_text(encoding="utf-8"))
    (shown,) = page.data["runs"]
    for name in ("loss", "valid", "lr", "norm", "pace"):
        assert 2 <= len(shown[name]["y"]) <= POINTS
    assert max(shown["loss"]["y"]) == 99.0
    assert shown["loss"]["step"][:: len(shown["loss"]["step"]) - 1] == [1, 100_000]
    assert page.text.count("\n") < 3000  # tables are short ones
    assert "Nothing is known of refreshes: train with --run.diagnostics true." in page.text


@pytest.mark.parametrize("length", [0, 1, 2, 999, 1000, 1001, 5000])
def test_thinning_keeps_extremes(length: int) -> None:
    draw = random.Random(length)
    values = [None if draw.random() < 0.1 else draw.gauss(0, 1) for _ in range(length)]
    kept = thin(values)
    assert len(kept) <= POINTS
    assert kept == sorted({*kept})
    there = [value for value in values if value is not None]
    if there:
        assert {min(there), max(there)} <= {values[i] for i in kept}
        assert {0, length - 1} <= {*kept}


def test_smoothing_is_a_mean_and_leaves_gaps() -> None:
    assert smooth([2.0, None, 2.0, 2.0]) == [2.0, None, 2.0, 2.0]
    assert smooth([1.0, 3.0])[1] == pytest.approx((1 * 2 / 3 + 3) / (2 / 3 + 1))


# -------------------------------------------------------------------------------------------------------- what is missing


def cut_short(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: len(text) - 20])


def with_nan(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(
            '{"step": 41, "loss": null}\n{"step": 42, "loss": NaN, "grad_norm": "x", "lr": 1' + 400 * "0" + "}\n"
        )


def with_nonsense(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text().splitlines()
    text[3:5] = ["[1, 2]", '{"step": true}', '{"step": 4, "refreshes": [7, {"name": 3}]}', "\0\0\0"]
    (run / "metrics.jsonl").write_text("\n".join(text) + "\n")


BROKEN = {
    "cut short": (cut_short, "The last line of metrics.jsonl is cut short"),
    "nan": (with_nan, "2 steps have a loss that is not finite"),
    "nonsense": (with_nonsense, "3 lines of metrics.jsonl cannot be read, the first is line 4"),
    "unfinished": (lambda run: (run / "summary.json").unlink(), "Not finished: the last step in the log is 40 of 40"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing or empty"),
    "empty metrics": (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl is missing or empty"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing"),
    "broken config": (lambda run: (run / "config.yaml").write_text("model: ["), "config.yaml cannot be read"),
    "other config": (lambda run: (run / "config.yaml").write_text("7"), "config.yaml cannot be read"),
    "old config": (lambda run: (run / "config.yaml").write_text("run: {walk: 3}"), "config.yaml cannot be read"),
    "unknown model": (lambda run: rename_model(run), "Its memory cannot be planned"),
    "broken summary": (lambda run: (run / "summary.json").write_text('{"valid'), "summary.json cannot be read"),
    "odd summary": (lambda run: (run / "summary.json").write_text('{"bytes": 3, "corpus": [], "versions": [1]}'), None),
}


def rename_model(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub("name: .*", "name: no/such/model", text, count=1))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_has_a_notice(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, notice = BROKEN[case]
    run, whole = write_run(tmp_path / "broken"), write_run(tmp_path / "whole")
    spoil(run)
    page = page_of(run, whole, out=tmp_path / "page.html")
    assert [text for text in page.notices if notice and notice in text] != [] or notice is None
    assert all(text.strip().startswith("broken") for text in page.notices)
    assert list(page.plots) == FIGURES  # the other one's
    assert page_of(run, out=tmp_path / "page.html").notices == page.notices
    assert capsys.readouterr().err == ""


def test_a_run_of_nothing_but_a_config(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", finished=False)
    (run / "metrics.jsonl").unlink()
    page = page_of(run, out=tmp_path / "page.html")
    assert list(page.plots) == ["memory"]
    for wanted in ("No loss was logged.", "No learning rate was logged.", "No times were logged."):
        assert wanted in page.text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["{folder}/none"], "none' is no folder: name the run.out"),
        (["{folder}"], "is no run folder, it has none of metrics.jsonl"),
        (["{folder}/run", "{folder}"], "is no run folder"),
        (["{folder}/run", "--out", "page.pdf"], "out='page.pdf' has no known ending: use one of .html"),
        (["{folder}/run", "--out", "no/folder/page.html"], "no folder no/folder, make it first"),
        (["{folder}/run", "{folder}/run", "--figure", "x.png"], "figure='x.png' draws one run"),
        ([], "runs"),
    ],
)
def test_what_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    write_run(tmp_path / "run")
    assert subspan("report", *(word.format(folder=tmp_path) for word in words)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("subspan: error: ")
    assert shown.count("\n") == 1
    assert named in shown


@pytest.mark.parametrize("module", ["plotly.offline", "jinja2"])
def test_a_missing_extra_is_one_line(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert subspan("report", str(write_run(tmp_path / "run"))) == 2
    assert 'pip install "subspan[report]"' in capsys.readouterr().err


def test_texts_of_a_run_are_only_texts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", finished=False)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 41, "refreshes": [{"name": "</script><b>", "overlap": 0.5}]}) + "\n")
    page = page_of(run, out=tmp_path / "page.html")
    assert [link for link in page.loads if not link.startswith("#")] == []


def test_seeds_of_a_finetuning(tmp_path: Path) -> None:
    page = page_of(write_seeds(tmp_path / "cola"), out=tmp_path / "page.html")
    assert [run["name"] for run in page.data["runs"]] == ["cola/seed_1", "cola/seed_10"]
    assert page.data["scores"] == ["matthews"]
    assert page.data["runs"][0]["scores"]["matthews"] == {"step": [3], "tokens": [27], "seconds": [0.6], "y": [0.25]}
    assert "scores" in page.plots
    assert any("seed_10" in text and "Not finished" in text for text in page.notices)
    assert "subspan finetune" in page.text


# ------------------------------------------------------------------------------------------------------------- its parts


def test_a_run_that_went_on_after_its_summary_is_not_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    file = run / "metrics.jsonl"
    (found,) = read_runs([run])
    assert found.status == "finished"
    last = found.steps[-1]
    file.write_text(file.read_text() + json.dumps({**last, "step": last["step"] + 1}) + "\n")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "steps": last["step"]}))
    (found,) = read_runs([run])
    assert found.status == "unfinished"
    assert found.notices[0].startswith("Not finished")


def test_commands_make_the_same_configuration(tmp_path: Path) -> None:
    optim = {"preset": "fira", "betas": [0.9, 0.95], "targets": ["q_proj", "it's"], "max_grad_norm": 1.0}
    config = tiny_config(tmp_path, optim=optim, run={"micro_batch": 2, "autocast": True, "eval_sequences": None})
    assert options.parse_train(shlex.split(command_of(config).replace("\\\n", ""))[1:]) == config
    tuning = FinetuneConfig(
        ClassifierConfig(name="a b"), TaskConfig(task="mrpc", columns=["a", "b"]), FinetuneOptimConfig(rank=4)
    )
    for optim in ({"rank": 4}, {"rank": 4, "scale": 2.0}, {"rank": 8, "scale": 4.0}):  # 2 is what rank 8 has by itself
        tuning.optim = FinetuneOptimConfig(**optim)
        assert options.parse_finetune(shlex.split(command_of(tuning).replace("\\\n", ""))[1:]) == tuning


def test_runs_that_are_called_seeds_are_runs(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"seed_{seed}", seed=seed)
    runs = read_runs([tmp_path])
    assert [run.status for run in runs] == ["finished", "finished"]
    assert all(run.config for run in runs)


def test_what_one_run_does_not_say_is_not_said_of_all(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", finished=True), write_run(tmp_path / "b", finished=False)]
    subtitles = [_in_common(read_runs(part)) for part in (runs[:1], runs)]
    assert ["cpu, 2 threads" in text for text in subtitles] == [True, False]


def test_refreshes_go_into_columns(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [
        {"step": step, "refreshes": [{"name": f"layers.{layer}.up.weight", "overlap": float(step)}]}
        for step in range(1, 101)
        for layer in (step % 2, 5)[: 1 + (step % 10 == 0)]
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_runs([run])
    assert durations(found) == []
    table = drift(found, cells=3 * 20)
    assert table is not None
    assert [matrix["layer"] for matrix in table["matrices"]] == [0, 1, 5]
    assert len(table["step"]) == 20
    assert [len(row) for row in table["fields"]["overlap"]] == [20] * 3
    # Means of steps 2, 4 (6 belongs to the next column), and of 10.
    assert table["fields"]["overlap"][0][0] == 3.0
    assert [value for value in table["fields"]["overlap"][2] if value is not None] == [10.0 * i for i in range(1, 11)]


def test_the_page_of_a_plan(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_config(tiny_config(tmp_path), tmp_path / "recipe.yaml")
    words = ["plan", "--config", str(tmp_path / "recipe.yaml"), "--html"]
    assert subspan(*words, str(tmp_path / "plan.html")) == 0
    page = Reader((tmp_path / "plan.html").read_text(encoding="utf-8"))
    assert [link for link in page.loads if not link.startswith("#")] == []
    assert page.plots == {"memory": 2}
    assert [group["name"] for group in page.data["memory"]][:2] == ["this run", "AdamW"]
    assert "This run beside other methods" in page.text
    assert "subspan train" in page.text
    assert subspan(*words, str(tmp_path / "plan.txt")) == 2


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as drivers:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next(filter(None, map(shutil.which, names)), drivers.chromium.executable_path)
        if not os.path.exists(found):
            pytest.skip(f"no browser: none of {', '.join(names)} is installed, nor playwright's own")
        browser = drivers.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of 1, 3 and 20 runs, and of broken ones."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / "runs" / f"run_with_a_rather_long_name_{i}", seed=i) for i in range(20)]
    cut_short(write_run(folder / "runs" / "cut"))
    (write_run(folder / "runs" / "new", finished=False) / "metrics.jsonl").unlink()
    shown = {
        "one": runs[:1],
        "three": runs[:3],
        "twenty": runs,
        "broken": [folder / "runs" / "cut", folder / "runs" / "new"],
    }
    for name, some in shown.items():
        page_of(*some, out=folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in shown}


def opened(browser: Any, path: Path, width: int = 1280, **options: Any) -> Any:
    """The page in a browser without network; what it complains of is in `page.complaints`."""
    page = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options).new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or page.complaints.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector(".plot .main-svg")
    return page


def scroll_through(page: Any) -> int:
    """The number of figures that are drawn once all of the page was in view."""
    for plot in page.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
        page.wait_for_function("plot => plot.querySelector('.main-svg')", arg=plot)
    return len(page.query_selector_all(".plot .main-svg:first-child"))


@pytest.mark.parametrize("name", ["twenty", "broken"])
def test_a_browser_draws_it(browser: Any, pages: dict[str, Path], name: str) -> None:
    page = opened(browser, pages[name])
    assert scroll_through(page) == len(page.query_selector_all(".plot")) == len(FIGURES)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.complaints == []
    page.context.close()


def test_a_phone_draws_it(browser: Any, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["twenty"], 390, is_mobile=True, has_touch=True)
    assert scroll_through(page) == len(FIGURES)
    for details in page.query_selector_all("details:visible"):
        details.evaluate("e => { e.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("loss.layout.dragmode") is False  # a finger scrolls
    assert page.complaints == []
    page.context.close()


def traces(page: Any, figure: str = "loss") -> list[dict[str, Any]]:
    page.locator(f"#{figure}").scroll_into_view_if_needed()
    page.wait_for_function(f"!waiting.has({figure})")  # those out of view are drawn later
    return page.evaluate(
        f"document.getElementById('{figure}').data.map(({{name, x, y, mode}}) => ({{name, x, y, mode}}))"
    )


def test_controls_work(browser: Any, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["three"])
    assert scroll_through(page) == len(FIGURES)
    lines = traces(page)
    assert len(lines) == 9  # raw, smoothed, validation
    assert lines[1]["x"][-1] == 5120
    page.get_by_role("radio", name="time").check()
    assert traces(page)[1]["x"][-1] == 4.0
    page.get_by_role("radio", name="steps").check()
    assert traces(page)[1]["x"][-1] == 40
    page.get_by_role("radio", name="perplexity").check()
    assert traces(page)[1]["y"][-1] == pytest.approx(math.exp(lines[1]["y"][-1]))
    page.locator("#raw").uncheck()
    assert len(traces(page)) == 6
    page.locator("input[name=run]").first.uncheck()
    assert len(traces(page)) == 4
    assert not page.locator("details [data-run='0']").first.is_visible()
    page.get_by_role("button", name="None").click()
    assert traces(page) == []
    page.get_by_role("button", name="All").click()
    assert len(traces(page)) == 6

    page.locator("#drift").scroll_into_view_if_needed()
    page.wait_for_selector("#drift .main-svg")
    heat = "(([trace]) => [trace.y.length, trace.zmax])(document.getElementById('drift').data)"
    assert page.evaluate(heat) == [2, 1]
    page.locator("#drift-field").select_option("median_angle")
    page.locator("#drift-kind").select_option("*")
    assert page.evaluate(heat) == [4, 90]
    page.locator("#memory ~ details summary").click()
    assert page.locator("#memory ~ details table").is_visible()
    assert page.complaints == []
    page.context.close()


def test_light_and_dark(browser: Any, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["one"], color_scheme="light")
    assert scroll_through(page) == len(FIGURES)
    paper = "[getComputedStyle(document.body).backgroundColor, document.getElementById('loss').layout.paper_bgcolor]"

    def is_dark() -> list[bool]:
        return [sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in page.evaluate(paper)]

    page.locator("#loss").scroll_into_view_if_needed()
    assert is_dark() == [False] * 2
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("loss.layout.paper_bgcolor !== 'rgb(255, 255, 255)'")
    assert is_dark() == [True] * 2
    page.locator("#theme").click()  # wins over the system's
    assert is_dark() == [False] * 2
    page.locator("#theme").click()
    assert is_dark() == [True] * 2
    assert page.complaints == []
    page.context.close()


def test_keys_reach_everything(browser: Any, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["three"])
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.id || e.name || e.dataset.show || e.className)(document.activeElement)"))
    assert {"skip", "theme", "x", "y", "raw", "run", "all", "none", *FIGURES, "drift-run", "drift-field"} <= {*reached}
    for id in ("theme", "loss"):  # with an outline that is seen
        page.locator(f"#{id}").focus()
        page.keyboard.press("Shift")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.locator("#loss").get_attribute("aria-label").startswith("Loss and perplexity.")
    before = page.evaluate("loss._fullLayout.xaxis.range")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#loss .hoverlayer .legend, #loss .hoverlayer .hovertext")
    page.keyboard.press("+")
    low, high = page.evaluate("loss._fullLayout.xaxis.range")
    assert high - low == pytest.approx((before[1] - before[0]) / 2)
    page.keyboard.press("0")
    page.wait_for_function("before => Math.abs(loss._fullLayout.xaxis.range[1] - before[1]) < 1", arg=before)
    assert page.complaints == []
    page.context.close()


def test_a_page_of_100_000_steps_draws_no_more_than_it_must(browser: Any, long_page: Path) -> None:
    """So it stays fluid: a tenth of a second for a zoom, on a machine that has nothing else to do."""
    page = opened(browser, long_page)
    page.evaluate("Plotly.relayout('loss', {'xaxis.range': [1e6, 2e6]})")
    points = page.evaluate("loss.data.map(trace => trace.x.length)")
    assert max(points) <= POINTS
    assert page.complaints == []
    page.context.close()


def test_scores_and_losses_that_are_not_numbers_make_a_page(tmp_path: Path) -> None:
    """A correlation may be nan; a run that diverged after its last good evaluation ended with no loss, not with that one."""
    tuned, diverged = write_seeds(tmp_path / "tuned"), write_run(tmp_path / "diverged")
    result = {"best": {"epoch": 1, "pearson": None, "valid_loss": 0.5}}
    (tuned / "seed_1" / "result.json").write_text(json.dumps(result))
    summary = json.loads((diverged / "summary.json").read_text())
    (diverged / "summary.json").write_text(json.dumps(summary | {"valid_loss": None}))
    runs = read_runs([str(tuned), str(diverged)])
    assert "pearson -" in report_page(runs)
    assert dict(facts_of(next(run for run in runs if run.name == "diverged")))["validation loss"] == ""
