"""The published numbers: against the digest they were read from, against the experiment files, against themselves."""

import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from igpt.report.paper import PublishedRow, load_paper
from igpt.report.runs import flatten
from tests.configs import CONF

PAPER = load_paper()
TITLES = {
    "parameters": "Sizes", "loss": "Generative loss", "probe": "Linear probe: CIFAR", "low_data": "Few labels",
    "probe_imagenet": "Linear probe: ImageNet", "finetune": "Fine-tuning", "compute": "Compute",
}  # fmt: skip
DENSITIES = [row for row in PAPER.rows if row.table.startswith("Bits per dimension")]
FILES = sorted(path.stem for path in (CONF / "experiment" / "paper").glob("*.yaml"))
NAMES = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "STL-10": "stl10", "ImageNet": "imagenet"}


@pytest.fixture
def digest(shared: Path) -> str:
    return (shared / "paper.md").read_text()


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the first table below a title, without its head, bold removed."""
    below = text[text.index(title) :].splitlines()
    first = next(i for i, line in enumerate(below) if line.startswith("|"))
    items = []
    for line in below[first + 2 :]:
        if not line.startswith("|"):
            break
        items.append([cell.strip() for cell in line.replace("**", "").strip("|").split("|")])
    return items


def select_rows(table: str, **wanted: object) -> list[PublishedRow]:
    rows = [p for p in PAPER.rows if p.table.startswith(TITLES[table])]
    return [p for p in rows if all(getattr(p, k) == v for k, v in wanted.items())]


def format_row(row: PublishedRow) -> str:
    """Shares as they stand in a run's own table, of 1."""
    value = row.printed
    if row.unit == "share":
        spread = "" if row.spread is None else f" ± {row.spread:.3f}"
        value = f"{row.relation} {row.value:.{3 if row.relation in ('', '<') else 2}f}{spread}".strip()
    marked = f"; {row.unconfirmed}: from memory, unverified" if row.unconfirmed else ""
    return f"{row.number} {value}: {row.network} ({row.source}{marked})"


def test_losses_and_sizes_are_the_digests(digest: str) -> None:
    """Independent source."""
    for model, loss, _ in cells(digest, "### Generative loss"):
        assert [p.value for p in select_rows("loss", method=model)] == [float(loss)]
    for model, n_layer, n_embd, heads, printed, exact in cells(digest, "## 3. Sizes"):
        size = PAPER.sizes[model]
        assert (size.n_layer, size.n_embd) == (int(n_layer), int(n_embd))
        assert size.n_head == (int(heads) if heads.isdigit() else None)
        assert size.millions == int(re.findall(r"\d+", printed)[0])
        assert abs(int(exact.replace(",", "")) / 1e6 - size.millions) < 1


def test_recipes_are_the_digests(digest: str) -> None:
    """Independent source; only the rate that a second source confirms is said to be. The first version's is none."""
    rates = {}
    for models, objective, resolution, text in cells(digest, "Learning rates (Table 5"):
        values = [float(rate) for rate in re.findall(r"0\.\d+", text)]
        for model, rate in zip(models.split(" / "), values, strict=True):
            rates[f"iGPT-{model}", objective.lower(), int(resolution[:2])] = rate, "[M]" not in text
    published = {name: r for name, r in PAPER.recipes.items() if not r.tokenizer}
    assert {(*r.network.values(),): (r.expects["task.learning_rate"], r.confirmed) for r in published.values()} == rates
    assert {name for name in PAPER.recipes if name not in published} == {"pretrain_l_vq96", "pretrain_l_vq192"}


def test_the_first_versions_tokens_are_the_digests(digest: str) -> None:
    """Independent source: resolutions, grid, vocabulary, factors, both losses and the temperature."""
    (row,) = (cell for cell in cells(digest, "| resolution | models | tokens") if "VQ-VAE" in cell[0])
    sides, factors = re.findall(r"(\d+)²", row[0]), re.findall(r"(\d)×", row[3])
    grid, codes = re.findall(r"latent grid (\d+)², vocabulary (\d+)", row[3])[0]
    rows = [p for p in PAPER.rows if p.key.startswith("vqvae")]
    assert [(p.resolution, p.expects["tokens.factor"], p.expects["tokens.loss"]) for p in rows] == [
        (int(side), int(factor), loss) for side, factor in zip(sides, factors, strict=True) for loss in ("l2", "l1")
    ]
    assert {p.expects["tokens.codes"] for p in rows} == {int(codes)}
    for side, factor in zip(sides, factors, strict=True):
        assert int(side) // int(factor) == int(grid)
        assert PAPER.recipes[f"pretrain_l_vq{side}"].expects["tokens.factor"] == int(factor)
    networks = [p for p in PAPER.rows if (p.init or "").startswith("pretrain_l_vq")]
    assert [p.key for p in networks] == ["probe_stl10_vq96", "probe_imagenet_vq192_11_layers", "samples_vq96"]
    for each in networks:
        expects = PAPER.expects(each)
        assert (expects["tokenizer"], expects["n_vocab"], expects["model.n_ctx"]) == ("vqvae", int(codes), int(row[2]))
    assert "both nearly as good as the original to the eye, L1 slightly more diffuse" in digest
    assert "and, V1, 0.98 (96² VQ-VAE)" in digest
    assert networks[-1].expects["task.temperature"] == 0.98


def test_probes_and_fine_tuning_are_the_digests(digest: str) -> None:
    """Independent source: every row with a number is here, with that number, size, resolution and features."""
    for dataset, model, resolution, features, accuracy, _ in cells(digest, "### Linear probe"):
        table = "probe_imagenet" if dataset == "ImageNet" else "probe"
        if not re.fullmatch(r"\d\d\.\d", accuracy):
            continue
        same = select_rows(
            table, dataset=NAMES[dataset], method=model.split()[0], value=round(float(accuracy) / 100, 4)
        )
        assert len(same) == 1, (dataset, model, accuracy)
        if resolution != "–":
            assert same[0].resolution == int(resolution[:2])
        if features != "–":
            assert same[0].features == int(features.replace(",", "").split()[0])
    for dataset, model, resolution, accuracy, _ in cells(digest, "### Full fine-tuning"):
        value = round(float(re.findall(r"\d\d\.\d", accuracy)[0]) / 100, 4)
        name = NAMES[dataset.partition(",")[0]]
        objective = "bert" if "BERT" in model else "ar"
        same = select_rows("finetune", dataset=name, method="iGPT-L", objective=objective, value=value)
        assert [p.resolution for p in same] == [int(resolution[:2])], (dataset, model)
        assert (same[0].init is None) == ("scratch" in model)
    relative = {"BERT": 0.963 - 0.01, "last layer": 0.963 - 0.024}
    assert "more than 1 below AR" in digest
    assert "2.4 lower" in digest
    assert select_rows("probe", objective="bert", dataset="cifar10")[0].value == pytest.approx(relative["BERT"])
    assert select_rows("probe", key="probe_cifar10_last_layer")[0].value == pytest.approx(relative["last layer"])
    assert "6 below AR (≈ 54); almost +1 with 5 masks" in digest
    assert [p.value for p in select_rows("probe_imagenet", objective="bert")] == [0.54, 0.01]


def test_few_labels_are_the_digests(digest: str) -> None:
    """Independent source; what is from memory there is marked here."""
    for labels, accuracy, error in cells(digest, "### Low-data CIFAR-10"):
        per_class = int(re.findall(r"\((\d+) per class", labels)[0])
        (found,) = select_rows("low_data", number=f"test/accuracy_{per_class}_per_class")
        assert found.value == pytest.approx(float(accuracy[:4]) / 100)
        mean, deviation = (float(number) / 100 for number in re.findall(r"\d+\.\d", error))
        assert (1 - mean, deviation) == pytest.approx((found.value, found.spread))
        assert "M]" in error
        assert ("value" in found.unconfirmed) == ("[M]" in accuracy)


def test_others_numbers_are_the_digests(digest: str) -> None:
    """Independent source: as many as there are, each with its name; none of them has a command."""
    names = []
    for setting, text in cells(digest, "### Others' numbers"):
        for part in text.split(" · "):
            cell = re.match(r"(.+?) (\d\d\.\d)", part)
            assert cell, part
            name, value = cell.groups()
            names.append((setting.split()[0], name.lower(), float(value)))
    others = [p for p in PAPER.rows if not p.is_ours and p not in DENSITIES]
    beside = [p for p in others if p.value is not None and p not in [*select_rows("low_data"), *select_rows("compute")]]
    titles = {value: key for key, value in NAMES.items()}
    own = [(titles[str(p.dataset)], p.method.lower(), round(100 * (p.value or 0), 4)) for p in beside]
    spelt = [(data, "amdim-l" if name == "amdim(-l)" else name, value) for data, name, value in names]
    assert sorted(spelt) == sorted(own)
    assert "(88.61 at 40, 94.93 at 250)" in digest
    assert [p.value for p in select_rows("low_data", method="FixMatch")] == pytest.approx([0.8861, 0.9493])
    order = "above Mean Teacher and MixMatch (with a much smaller spread than MixMatch at 40), below UDA and FixMatch"
    assert order in digest
    claims = {(p.table.split(":")[0], p.method): p.detail.split(",")[0] for p in others if p.value is None}
    assert claims == {
        ("Few labels", "Mean Teacher"): "below iGPT-L", ("Few labels", "MixMatch"): "below iGPT-L",
        ("Few labels", "UDA"): "above iGPT-L",
        ("Linear probe", "Wide ResNet"): "supervised: below iGPT-L's probe",  # the paper's abstract
    }  # fmt: skip
    assert "iGPT-L ≈ 2500 V100-days; a similar MoCo ≈ 70" in digest
    assert {p.method: p.value for p in select_rows("compute")} == {"iGPT-L": 2500, "MoCo": 70}
    assert not any(p.command for p in PAPER.rows if not p.is_ours)


def test_densities_are_those_of_their_abstracts() -> None:
    """Independent source, by hand: the abstracts of PixelSNAIL, the Image Transformer, i-DODE; test/bits_per_dim."""
    stated = {
        ("PixelSNAIL", "cifar10"): [2.85], ("PixelSNAIL", "downsampled_imagenet"): [3.80],
        ("Image Transformer", "downsampled_imagenet"): [3.77], ("gated PixelCNN", "downsampled_imagenet"): [3.83],
        ("i-DODE", "cifar10"): [2.56], ("i-DODE", "downsampled_imagenet"): [3.69, 3.43],
    }  # fmt: skip
    of_32 = [p for p in DENSITIES if p.resolution == 32]
    assert stated == {(m, d): [p.value for p in of_32 if (p.method, p.dataset) == (m, d)] for m, d in stated}
    tables = {p.table: [row for row in DENSITIES if row.table == p.table] for p in DENSITIES}
    assert [len(rows) for rows in tables.values()] == [9, 7, 6]
    for *others, own in tables.values():  # from high to low; the last row is for runs of this repository
        values = [p.value for p in others]
        assert values == sorted(values, reverse=True)
        assert {(p.key, p.is_ours, p.printed.endswith(" bits/dim")) for p in others} == {("", False, True)}
        assert own.is_ours
        assert own.unpublished
        assert own.value is None


def test_every_number_has_a_command_or_a_reason() -> None:
    """Invariant; and its weights have a recipe."""
    for published in PAPER.rows:
        assert published.command or published.why_not
        assert ("init=RUN" in published.command) == bool(published.key and published.init)
        if published.init is not None:
            assert published.run.startswith(f"experiment=paper/{published.init}")
        if published.init is not None and published not in DENSITIES:
            recipe = PAPER.recipes[published.init].network
            assert recipe == {key: getattr(published, key) for key in ("method", "objective", "resolution")}
    assert {p.method for p in PAPER.rows if p.is_ours and p not in DENSITIES} == {*PAPER.sizes, "iGPT's VQ-VAE"}


def composed(name: str) -> dict[str, object]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment=paper/{name}"])
    body = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(body, dict)
    return {str(key): value for key, value in body.items()}


OF_DENSITIES = sorted({str(name) for row in DENSITIES if row.key for name in (row.key, row.init)})


@pytest.mark.parametrize("name", OF_DENSITIES)
def test_a_density_is_measured_on_the_images_of_the_published_ones(name: str) -> None:
    """Round trip: files of pretraining and of evaluation name the row of their table, and list the others.

    Images are not cropped, flipped or, if they have that size, resized; next tokens are predicted, of RGB values.
    """
    config = composed(name)
    (own,) = (row for row in DENSITIES if name in (row.key, row.init))
    others = [row for row in DENSITIES if row.table == own.table and row is not own]
    assert config["published"] == [format_row(row) for row in others]
    settings = flatten(config)
    expected = {
        "task.paper": own.key, "data.name": own.dataset, "data.resolution": own.resolution, "data.crop.size": None,
        "data.crop.eval_short_side": None, "data.augment.flip": False, "data.augment.pad": 0,
    } | ({"task.name": "evaluate", "task.split": "test"} if name == own.key else {
        "task.name": "pretrain", "tokens._target_": "igpt.tokens.rgb.RGBSettings", "tokens.order": "raster",
        "objective.name": "ar",
    })  # fmt: skip
    assert {key: settings[key] for key in expected} == expected


OF_FIGURES = [name for name in FILES if name.startswith("figure")]


@pytest.mark.parametrize(("name", "claim"), [("figure2", "rises to the middle"), ("figure4", "BERT: worse probes")])
def test_a_figure_is_made_of_the_protocols(name: str, claim: str) -> None:
    """Round trip: a stage has the settings of its key's file; the lines are those numbers of iGPT-L; rows name it."""
    config = composed(name)
    task: Any = config["task"]
    lines = []
    for stage, settings in task["stages"].items():
        of_key, data = flatten(composed(settings["paper"])), flatten(settings.get("data", {}), "data")
        own = {f"task.{key}": value for key, value in flatten(settings).items() if not key.startswith("data")}
        stated = {key: value for key, value in (own | data).items() if key in of_key and key != "task.paper"}
        assert stated == {key: of_key[key] for key in stated}, stage
        option = data.get("data.option", "cifar10")
        assert of_key["data.name"] == option.rstrip("0123456789") if option == "imagenet32" else option
        rows = [row for row in PAPER.rows if row.key == settings["paper"] and row.method == "iGPT-L"]
        lines += [
            f"{stage}/{format_row(row)}" for row in rows
            if row.value is not None and row.objective == settings.get("objective", "ar")
        ]  # fmt: skip
    assert config["published"] == lines
    rows = [row for row in PAPER.rows if row.command.startswith(f"python train.py experiment=paper/{name} init=RUN")]
    assert rows
    assert all(row.printed.startswith(claim) for row in rows)
    drawn = [*flatten(task["curves"]).values(), *flatten(task["bars"]).values()]
    named = {key.partition("/")[0] for each in drawn for key in ([each] if isinstance(each, str) else each)}
    assert named == {*task["stages"]}


@pytest.mark.parametrize("name", [name for name in FILES if name not in (*OF_DENSITIES, *OF_FIGURES)])
def test_an_experiment_file_says_what_is_published(name: str) -> None:
    """Round trip: its lines are those of the numbers it is for; and each setting that the paper states is the paper's.

    iGPT-XL's data is not: its web images are not public.
    """
    config = composed(name)
    rows = [row for row in PAPER.rows if row.key == name]
    elsewhere = [row for row in PAPER.rows if row.table.startswith(TITLES["loss"]) and row.init == name]
    assert config["published"] == [
        *(format_row(row) for row in rows if row.value is not None),
        *(f"{format_row(row)}, by experiment=paper/{row.key}" for row in elsewhere),
    ]
    settings = flatten(config)
    assert settings["task.paper"] == (name if rows else None)
    expects = [row.expects for row in rows]
    if name in PAPER.recipes:
        recipe = PAPER.recipes[name]
        expects.append(recipe.expects)
        assert f"igpt_{recipe.network['method'][5:].lower()}" == settings["model.name"]
        assert settings["objective.name"] == recipe.network["objective"]
        assert settings["data.resolution"] == recipe.network["resolution"]
    assert expects, f"{name} is of no published number, and no pretraining"
    stated = {key: value for each in expects for key, value in each.items()}
    if name.startswith("pretrain"):
        stated.pop("data.resolution", None)  # of the sizes, which are printed for 32×32
    wrong = {key: settings.get(key) for key, value in stated.items() if settings.get(key) != value}
    of_weights = {"tokenizer", "n_vocab", "model.n_ctx"} & wrong.keys()  # the checkpoint's, in no file
    assert not of_weights or any((row.init or "").startswith("pretrain_l_vq") for row in rows)
    assert wrong.keys() - of_weights <= {"retrained with validation images", "pretraining.tokens.palette._target_"} | (
        {"data.name"} if name == "pretrain_xl" else set()
    )
    assert settings["trainer.precision"] == "auto"  # float32 on a CPU; on a GPU the tables name what differs
    if "retrained with validation images" in stated:
        assert settings["task.refit"] == ("auto" if settings.get("task.solver") == "lbfgs" else True)


def test_every_experiment_named_is_there() -> None:
    """Invariant."""
    named = {p.key for p in PAPER.rows if p.key and not p.instead} | {p.init for p in PAPER.rows if p.init}
    named |= {recipe.tokenizer for recipe in PAPER.recipes.values() if recipe.tokenizer}
    assert named <= set(FILES)


def test_the_page_holds_every_number() -> None:
    """Invariant: docs/paper.md has a row for each, with its value, its setting and its command."""
    page = (CONF.parent / "docs" / "paper.md").read_text().splitlines()
    for published in PAPER.rows:
        rows = [line for line in page if line.startswith(f"| {published.printed}<br>") and published.setting in line]
        assert rows, f"{published.printed}, {published.setting}: run the command that is named on the page again"
        assert all(published.command in row for row in rows)
