"""Studies as run folders: points joined by the hash of their weights, the plan of a study, the tasks that read it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from igpt.app.advise import count_operations, describe_reach
from igpt.distributed.launcher import SWEEP
from igpt.metric.result import Number
from igpt.metric.throughput import train_flops_per_image
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.report.found_runs import find_runs
from igpt.run import isoflop_sweep
from igpt.run.launch import run
from igpt.run.operations import resolve_steps
from igpt.scaling_law.study_layout import StudySize, plan_study
from igpt.scaling_law.study_points import StudyPoint, count_network_weights, read_points
from igpt.settings.fields import parse_settings
from igpt.settings.reading import AdviseSettings
from tests.report.records import made
from tests.run.test_search import CONF, compose_config, initialize_config_dir

SIZES = {"1x8": (1, 8, 1), "2x16": (2, 16, 2), "3x24": (3, 24, 2), "4x32": (4, 32, 4), "5x48": (5, 48, 4)}
BUDGETS = (1e11, 3e11, 1e12, 3e12)
ALPHA, BETA = 0.4, 0.3


def network(n_layer: int, n_embd: int, n_head: int) -> GPTConfig:
    return GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=64, n_vocab=17, causal=True)


def loss(weights: float, tokens: float) -> float:
    """A surface whose optima lie inside SIZES at BUDGETS."""
    return float(1.5 + 0.2 * (weights / 3e4) ** -ALPHA + 0.2 * (tokens / 2e6) ** -BETA)


def write_study(folder: Path) -> list[Path]:
    """A pretraining for each size and budget, and a probe of its weights, from one record of each."""
    numbers = {key: Number(1.0, "", 1) for key in ("val/loss_gen", "train/operations", "train/images_seen")}
    trained = made(folder / "trained", numbers, task__batch_size=32)
    probed = made(
        folder / "probed", {"val/accuracy": Number(0.5, "share", 100)}, task__name="probe", task__C_grid=[0.1]
    )
    runs = []
    for budget in BUDGETS:
        for name, sizes in SIZES.items():
            config = network(*sizes)
            flops = train_flops_per_image(config)
            images = 32 * round(budget / flops / 32)
            sha256 = hashlib.sha256(f"{name} {budget}".encode()).hexdigest()
            value = loss(sum(count_network_weights(config)[:1]), images * 64)
            for source, measured in (
                (trained, {"val/loss_gen": value, "train/operations": images * flops, "train/images_seen": images}),
                (probed, {"val/accuracy": 1.2 - value / 2}),
            ):
                place = folder / f"{source.name}-{name}-{budget:g}"
                place.mkdir()
                for record in ("run.json", "result.json"):
                    content = json.loads((source / record).read_text())
                    content["config"]["model"]["name"] = name
                    if record == "result.json":
                        content["provenance"] = {"tokenizer": "t"} | (
                            {"weights": sha256} if source is probed else {"train_images": 1000}
                        )
                        for key, number in measured.items():
                            content["numbers"][key]["value"] = number
                    (place / record).write_text(json.dumps(content))
                runs.append(place)
            (folder / f"trained-{name}-{budget:g}" / "model").mkdir()
            saved = {"network": config.to_dict(), "weights_sha256": sha256}
            (folder / f"trained-{name}-{budget:g}" / "model" / "config.json").write_text(json.dumps(saved))
    return runs


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"))


def read(folders: Sequence[Path]) -> list[StudyPoint]:
    return read_points(find_runs([str(folder) for folder in folders]).runs)


def test_numbers_are_joined_by_the_weights(study: list[Path]) -> None:
    """By hand: each pretraining has its own probe's error, and N, D and C of its network and length."""
    points = read(study)
    assert len(points) == len(SIZES) * len(BUDGETS)
    for point in points:
        assert point.targets["probe"] == pytest.approx(point.targets["loss"] / 2 - 0.2)
        assert point.targets["loss"] == loss(point.n_all, point.tokens)
        flops = train_flops_per_image(network(*point.sizes.values()))
        assert point.operations == point.images * flops
        assert StudyPoint.from_dict(json.loads(json.dumps(point.to_dict()))) == point


def test_weights_are_counted_with_and_without_embeddings() -> None:
    """By hand: all are the network's; tables of tokens in and out, positions and the start have (2 V + T + 1) C."""
    config = network(2, 16, 2)
    every, inside = count_network_weights(config)
    assert every == sum(weight.numel() for weight in GPT(config).parameters())
    assert every - inside == (2 * 17 + 64 + 1) * 16


def change(folder: Path, record: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads((folder / record).read_text())
    edit(content)
    (folder / record).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"trained": lambda r: r["config"]["data"].update(resolution=16)}, "differ in data.resolution, 8 and 16"),
        ({"trained": lambda r: r["config"]["objective"].update(name="bert")}, "differ in objective.name, ar and bert"),
        ({"trained": lambda r: r["provenance"].update(tokenizer="u")}, "differ in tokens, t and u"),
        (
            {"probed": lambda r: r["config"]["task"].update(C_grid=[1.0])},
            "differ in task.C_grid, \\[0.1\\] and \\[1.0\\]",
        ),
        ({"trained": lambda r: r["numbers"].pop("train/operations")}, "has no train/operations: it is of an older"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(
    tmp_path: Path, study: list[Path], edits: dict[str, Callable[[dict[str, Any]], None]], message: str
) -> None:
    """Invariant: tokens, images, objective and measurement are the same in a study; the error names both runs."""
    folders = copy_runs(study[:4], tmp_path)
    for kind, edit in edits.items():
        change(next(f for f in reversed(folders) if f.name.startswith(kind)), "result.json", edit)
    with pytest.raises(ValueError, match=message) as caught:
        read(folders)
    assert str(folders[-1].parent) in str(caught.value)


def copy_runs(folders: Sequence[Path], into: Path) -> list[Path]:
    copies = []
    for folder in folders:
        copies.append(into / folder.name)
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            target = copies[-1] / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copies


def test_repeated_runs(tmp_path: Path, study: list[Path]) -> None:
    """Invariant: the same weights are one point; other weights of the same size, budget and seed are refused."""
    copied = copy_runs(study[:2], tmp_path)
    assert len(read([*study[:2], *copied])) == 1
    change(copied[0] / "model", "config.json", lambda saved: saved.update(weights_sha256="f" * 64))
    with pytest.raises(ValueError, match="of the same size, budget and seed: leave one out"):
        read([*study[:2], copied[0]])
    change(copied[1], "result.json", lambda record: record["numbers"]["val/accuracy"].update(value=0.1))
    with pytest.raises(ValueError, match="measured val/accuracy of the same weights, and differ"):
        read([*study[:2], copied[1]])
    with pytest.raises(ValueError, match="no finished pretraining is among them"):
        read(study[1:2])


def test_the_tasks(study: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed form: the surface's exponents from run folders; the advice spends the operations to within a step."""
    monkeypatch.chdir(tmp_path)
    places = f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"
    names = ",".join(str(folder) for folder in study)
    result, folder = run(
        "task=isoflop", f"task.runs=[{names}]", "task.targets=[loss]", "task.bootstrap=10", *places, conf=CONF
    )
    assert folder is not None
    assert {"isoflop.txt", "isoflop.md", "isoflop_loss.png", "points.json", "report.html"} <= {
        path.name for path in folder.iterdir()
    }
    expected = {"alpha": ALPHA, "beta": BETA, "E": 1.5}
    found = {name: result.numbers[f"loss/surface_{name}"].value for name in expected}
    assert found == pytest.approx(expected, rel=0.01)
    assert result.numbers["loss/a"].value == pytest.approx(result.numbers["loss/surface_a"].value, rel=0.1)
    advice, _ = run("task=advise", f"task.study={folder}", "task.operations=1e14", *places, conf=CONF)
    numbers = {key: number.value for key, number in advice.numbers.items()}
    config = network(int(numbers["loss/n_layer"]), int(numbers["loss/n_embd"]), 1)
    weights, _ = count_network_weights(config)
    assert weights == pytest.approx(numbers["loss/weights_by_surface"], rel=0.15)
    step = train_flops_per_image(config) * 32
    assert abs(numbers["loss/images"] * step / 32 - 1e14) <= step / 2
    assert numbers["loss/expected"] == pytest.approx(loss(weights, numbers["loss/images"] * 64), rel=0.01)
    inside, _ = run("task=advise", f"task.study={folder}", "task.operations=1e12", *places, conf=CONF)
    n_layer, n_embd, *optima = (
        inside.numbers[f"loss/{key}"].value
        for key in ("n_layer", "n_embd", "weights_by_parabolas", "weights_by_surface")
    )
    weights, _ = count_network_weights(network(int(n_layer), int(n_embd), 1))
    near = [abs(weights - optimum) for optimum in optima]
    assert near[0] < near[1]  # the minima were measured there
    assert "EXTRAPOLATED: 33 TIMES THE LARGEST MEASURED BUDGET (3E+12 FLOP)" in advice.warnings[0]
    points = [replace(point, train_images=10_000, step_seconds=0.1) for point in read(study) if point.name == "5x48"]
    seen = numbers["loss/images"] / 10_000
    assert f"every image is seen {seen:.0f} times, in the study at most 5.1" in describe_reach(points, 1e14, advice)
    hours = AdviseSettings(study="x", operations=None, hours=2.0, speed=None)
    assert count_operations(points, hours) == 7200 * train_flops_per_image(network(5, 48, 4)) * 32 / 0.1
    with pytest.raises(ValueError, match=r"task.hours needs task.speed"):
        count_operations(read(study), hours)
    with pytest.raises(ValueError, match="it is no run of task=isoflop"):
        run("task=advise", f"task.study={study[0]}", "task.operations=1e14", *places, conf=CONF)


@pytest.mark.parametrize(
    "given", [{"operations": None, "hours": None}, {"operations": 1e9, "hours": 1.0}, {"operations": 1e9, "speed": 1e9}]
)
def test_compute_is_given_once(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"task.operations=1e18 or task.hours=24|task.speed turns task.hours"):
        parse_settings(AdviseSettings, {"study": "x", "operations": None, "hours": None, "speed": None} | given, "task")


def small(**changed: Any) -> StudySize:
    return replace(StudySize(network(1, 8, 1), batch_size=32, warmup_steps=10), **changed)


def test_a_plan_spends_each_budget() -> None:
    """Invariant: counted operations are within half a step of the budget; sizes outside the window are left out."""
    sizes = {name: small(network=network(*of)) for name, of in SIZES.items()}
    planned = plan_study(BUDGETS, sizes, tokens_per_weight=None)
    assert len(planned) == len(SIZES) * len(BUDGETS)
    for each in planned:
        step = train_flops_per_image(sizes[each.name].network) * 32
        assert abs(each.operations - each.budget) <= step / 2
        assert each.operations == each.steps * step
    kept = plan_study(BUDGETS, sizes, tokens_per_weight=(2, 3000))
    assert {run.name for run in planned} - {run.name for run in kept if run.budget == 1e11} == {"1x8", "5x48"}
    assert all(2 <= run.tokens_per_weight <= 3000 for run in kept)


@pytest.mark.parametrize(
    ("budgets", "changed", "message"),
    [
        ((1e11, 1e11), {}, "must be different operations above 0"),
        ((1e11,), {"4x32": None, "5x48": None, "3x24": None}, "the budget of 1e\\+11 operations has 2 sizes"),
        ((1e11,), {"again": (1, 8, 1)}, "1x8 and again are the same network"),
        ((1e9,), {}, "1e\\+09 operations are 10 steps of 2x16, and the warm-up has 10"),
    ],
)
def test_plans_that_are_refused(budgets: tuple[float, ...], changed: dict[str, Any], message: str) -> None:
    sizes = {name: small(network=network(*of)) for name, of in (SIZES | changed).items() if of is not None}
    with pytest.raises(ValueError, match=message):
        plan_study(budgets, sizes, tokens_per_weight=None)


def test_a_sweep_lays_out_runs_and_ends_in_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a job has the plan's steps when it is composed; the last is the fit of those that finished."""
    monkeypatch.setenv(SWEEP, "to be put back")
    launched: list[list[str]] = []

    def launch(jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        assert first == len(launched)
        launched.extend(map(list, jobs))
        returned = [JobReturn(working_dir=f"run_{first + i}", status=JobStatus.COMPLETED) for i in range(len(jobs))]
        for i, job in enumerate(returned):
            job.return_value = float("nan") if first + i == 1 else 1.0
        return returned

    with initialize_config_dir(str(CONF), version_base="1.3"):
        arguments = ["experiment=isoflop", "data=digits", "data.palette_size=17", f"paths.runs={tmp_path}"]

        def compose(overrides: Sequence[str]) -> DictConfig:
            return compose_config("config", overrides=list(overrides), return_hydra_config=True)

        isoflop_sweep.isoflop(
            compose(arguments), arguments, launch=launch, compose=compose, budgets=[1.00000001e11],
            tokens_per_weight=None,
            sizes=[[1, 8, 1], {"n_layer": 2, "n_embd": 8, "n_head": 1, "learning_rate": 0.02}, "igpt_pico"],
            fit={"weights": "non_embedding"},
        )  # fmt: skip
        *jobs, fit = launched
        assert fit == [
            "hydra/sweeper=isoflop", "task=isoflop", 'task.runs=["run_0","run_2"]',
            "task.weights=non_embedding", f"paths.runs={tmp_path}",
        ]  # fmt: skip
        assert [job[len(arguments) :][-1] for job in jobs] == ["++task.stages.pretrain.operations=1.00000001e+11"] * 3
        assert "++task.stages.pretrain.learning_rate=0.02" in jobs[1]
        assert "model=igpt_pico" in jobs[2]
        job = isoflop_sweep.compose_run(compose, jobs[1])
        resolve_steps(job, jobs[1])
        config = GPTConfig(n_layer=2, n_embd=8, n_head=1, n_ctx=64, n_vocab=17, causal=True)
        steps = round(1e11 / 32 / train_flops_per_image(config))
        assert (job.cfg.task.stages.pretrain.steps, job.model_name) == (steps, "igpt_2x8")
    with pytest.raises(ValueError, match="a size is \\[n_layer, n_embd, n_head\\], an option of conf/model/"):
        isoflop_sweep.name_sizes([[1, 8]], "task")
    with pytest.raises(ValueError, match="budgets must be a list of operations"):
        isoflop_sweep.read_budgets([1e12, float("nan")])
    assert isoflop_sweep.read_window([5, 20000]) == (5.0, 20000.0)
    with pytest.raises(ValueError, match="tokens_per_weight must be"):
        isoflop_sweep.read_window([5])
    with pytest.raises(ValueError, match="igpt_1x8 stands twice"):
        isoflop_sweep.name_sizes([[1, 8, 1], [1, 8, 2]], "task")
