"""Published numbers: Chen et al. 2020 (`paper.yaml`), densities (`densities.yaml`), and how to measure each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from igpt.settings.recipe_table import load_recipes
from igpt.utils.overrides import suggest_name
from igpt.utils.program import program_name

DATASETS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10", "imagenet": "ImageNet",
    "downsampled_imagenet": "downsampled ImageNet",
}  # fmt: skip
PRETRAINING = "pretraining."  # before the settings of the run that trained the weights


@dataclass(frozen=True, eq=False)
class PublishedRow:
    """A published number, its setting, and the command that measures it. Shares are of 1; losses in nats per token."""

    table: str  # title of its table
    method: str  # iGPT-S, M, L, XL; iGPT's VQ-VAE; or another paper's
    source: str
    value: float | None = None  # None: a figure, whose claim is in `detail`; or `unpublished`
    unpublished: bool = False  # of no publication: the row of this repository's runs among other methods
    unit: str = "share"
    dataset: str | None = None  # as in conf/data; None: any
    objective: str | None = None  # ar, bert; None: another method, or either
    resolution: int | None = None  # pixels a side, if published
    features: int | None = None
    detail: str = ""  # further description; of a figure its claim
    relation: str = ""  # prefix of the value: ≈, <, almost
    spread: float | None = None  # standard deviation, if published
    unconfirmed: str = ""  # the part quoted from memory
    number: str = ""  # key in result.json; `a - b`: a difference; of a figure several keys, glob patterns or pictures
    key: str = ""  # task.paper=KEY; made by experiment=paper/KEY
    instead: str = ""  # overrides of the command where experiment=paper/KEY does not exist
    init: str | None = None  # recipe of the initial weights
    more: str = ""  # overrides beside init=RUN
    expects: dict[str, Any] = field(default_factory=dict)  # published settings
    why_not: str = ""  # reason why it cannot be measured here, or only in part

    @property
    def is_ours(self) -> bool:
        """Whether it is of an Image GPT."""
        return self.method.startswith(("iGPT", "Image GPT"))

    @property
    def command(self) -> str:
        """The command that measures it, with RUN for the directory of its pretraining; "" if there is none."""
        experiment = self.instead or (self.key and f"experiment=paper/{self.key}")
        return experiment and " ".join(filter(None, (program_name(), experiment, self.init and "init=RUN", self.more)))

    @property
    def run(self) -> str:
        """The experiment or released weights that RUN stands for; "" without RUN."""
        if self.init is None:
            return ""
        text, recipe = f"experiment=paper/{self.init}", load_paper().recipes.get(self.init)
        if recipe is not None and recipe.tokenizer:
            text += f" tokens.path=TOKENIZER, of experiment=paper/{recipe.tokenizer}"
        if recipe is not None and recipe.released:
            text += f", or {recipe.released}"
        return text

    @property
    def network(self) -> str:
        """The network in a line."""
        side = f"{self.resolution}×{self.resolution}" if self.resolution else ""
        features = f"{self.features:,} features" if self.features else ""
        name = f"{self.method} {(self.objective or '').upper()}".strip()
        return ", ".join(filter(None, (name, side, features, self.detail if self.value is not None else "")))

    @property
    def setting(self) -> str:
        """The dataset and the network in a line."""
        return ", ".join(filter(None, (DATASETS.get(self.dataset or ""), self.network)))

    @property
    def printed(self) -> str:
        """The value as the paper prints it; a figure's claim."""
        if self.value is None:
            return self.detail
        decimals = {"bits/dim": 2, "V100-days": 0}.get(self.unit, 4)
        text = f"{self.value / 1e6:.0f}M" if self.unit == "weights" else f"{self.value:,.{decimals}f} {self.unit}"
        if self.unit == "share":
            digits = 0 if self.relation in ("≈", "almost") else 1 if abs(1000 * self.value % 1) < 1e-6 else 2
            spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
            text = f"{100 * self.value:.{digits}f}{spread} %"
        return f"{self.relation} {text}".strip()


@dataclass(frozen=True)
class Size:
    """A network of the paper: L, d, heads (None: not published)."""

    n_layer: int
    n_embd: int
    n_head: int | None
    millions: int  # weights as printed, with 1,024 positions

    @property
    def expects(self) -> dict[str, int]:
        """The settings of `conf/model/` that are published."""
        known = {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": self.n_head}
        return {f"model.{key}": value for key, value in known.items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """How a network was pretrained, by its experiment file."""

    network: dict[str, Any]  # method, objective, resolution
    expects: dict[str, Any]  # the settings of `task=pretrain` that the paper states
    confirmed: bool = False  # the learning rate, by a second source; else it is from memory
    released: str = ""  # OpenAI's weights
    tokenizer: str = ""  # the experiment that trains its tokenizer

    @property
    def images(self) -> int | None:
        """Images seen, each as often as it came; None: not published."""
        if "task.steps" not in self.expects:
            return None
        return int(self.expects["task.steps"] * self.expects["task.batch_size"])


@dataclass(frozen=True)
class Paper:
    """All published numbers, networks and recipes."""

    sizes: Mapping[str, Size]
    recipes: Mapping[str, Recipe]
    rows: tuple[PublishedRow, ...]  # in the order they are shown
    images: Mapping[str, int]  # dataset → images of its test split
    everywhere: dict[str, Any]  # published settings of every network, where its row has no others

    @property
    def keys(self) -> list[str]:
        """Every KEY of `task.paper=KEY`."""
        return list(dict.fromkeys(row.key for row in self.rows if row.key))

    def expects(self, row: PublishedRow) -> dict[str, Any]:
        """The published settings of a row; those of the pretraining of its weights have the prefix `pretraining.`."""
        own = {"data.name": row.dataset, "data.resolution": row.resolution, "objective.name": row.objective}
        expected = {key: value for key, value in own.items() if value is not None}
        if row.method in self.sizes:
            expected |= self.sizes[row.method].expects | self.everywhere
        expected |= row.expects
        recipe = self.recipes.get(row.init or "")
        if recipe is not None:
            of_weights = recipe.expects | {
                "data.resolution": recipe.network["resolution"],
                "trainer.precision": self.everywhere["trainer.precision"],
            }
            of_weights |= {} if recipe.images is None else {"images": recipe.images}
            expected |= {f"{PRETRAINING}{key}": value for key, value in of_weights.items()}
        return expected


@cache
def load_paper() -> Paper:
    """The content of `paper.yaml` and `densities.yaml`."""
    names = "paper.yaml", "densities.yaml"
    data, densities = (OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name(name))) for name in names)
    assert isinstance(data, dict)
    assert isinstance(densities, dict)
    return Paper(
        {name: Size(**size) for name, size in data["sizes"].items()},
        {name: _complete_recipe(Recipe(**recipe)) for name, recipe in data["recipes"].items()},
        tuple(
            PublishedRow(table["title"], **table["common"] | row)
            for table in (*data["tables"], *densities["tables"])
            for row in table["rows"]
        ),
        data["images"],
        data["everywhere"],
    )


def _complete_recipe(recipe: Recipe) -> Recipe:
    """With rate, batch, steps and warm-up of the table of recipes; unchanged on a tokenizer's tokens: not published."""
    if recipe.tokenizer:
        return recipe
    method, objective, side = recipe.network.values()
    rate = load_recipes().find_rate(f"igpt_{method.removeprefix('iGPT-').lower()}", objective, side)
    length = load_recipes().find_length("imagenet")
    steps = length.steps(rate.batch_size)
    of_table = {
        "task.learning_rate": rate.learning_rate, "task.batch_size": rate.batch_size, "task.steps": steps,
        "task.warmup_steps": length.warmup_steps(rate.batch_size, steps),
    }  # fmt: skip
    return replace(recipe, expects=recipe.expects | of_table, confirmed=rate.confirmed)


def check_paper_key(task: Mapping[Any, Any], where: str) -> None:
    """Raises ValueError if `task.paper` is not null and no key of a published number."""
    key, keys = task.get("paper"), load_paper().keys
    if key is not None and key not in keys:
        raise ValueError(
            f"{where}.paper={key}: no published number has this key{suggest_name(str(key), keys)}; "
            f"there are {', '.join(keys)}"
        )
