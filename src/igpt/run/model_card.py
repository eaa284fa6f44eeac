"""The model card of exported weights: `README.md` with the Hub's metadata, and the pictures that it shows."""

import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt.checkpoint.find import HUB_NAME
from igpt.checkpoint.igpt_format import Weights
from igpt.metric.result import Number
from igpt.report.closing_table import format_markdown
from igpt.report.folder import environment
from igpt.report.grid_pictures import palette_picture
from igpt.report.runs import RunRecord, read_run
from igpt.report.significant import format_measured
from igpt.settings.data import name_dataset
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.utils import files
from igpt.utils.overrides import train_command

CARD = "README.md"
MOST_NUMBERS = 24
HUB_DATA = {name: f"uoft-cs/{name}" for name in ("cifar10", "cifar100")}  # dataset → its name on the Hub
HUB_DATA |= {"imagenet": "ILSVRC/imagenet-1k", "stl10": "tanganke/stl10"}
DATA_LICENCES = {  # dataset → what its authors say
    "digits": "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits, by way of scikit-learn)",
    "letters": "drawn from the DejaVu, STIX and Computer Modern fonts that matplotlib ships, under the fonts' licences",
    **dict.fromkeys(("cifar10", "cifar100"), "its authors state none (Krizhevsky 2009)"),
    "imagenet": "ImageNet's terms of access: non-commercial research and education only",
    "downsampled_imagenet": "ImageNet's terms of access: non-commercial research and education only",
    "stl10": "images of ImageNet, under its terms: non-commercial research and education only",
}
RECIPE = (  # settings of a training task that the card tells, in this order
    "steps", "batch_size", "optimizer", "learning_rate", "schedule", "warmup_steps", "beta1", "beta2", "momentum",
    "weight_decay", "gradient_clip", "dropout", "ema", "patience",
)  # fmt: skip
OBJECTIVES = {"ar": "the next token", "bert": "masked tokens"}
UNITS = ("nats", "bits", "share")  # prefixes of units of the numbers that it tells
PATH = re.compile(r"(^|[\[,:'\"=])(/|~)")  # the start of a place on this machine, in the value of an override
CITATION = """```bibtex
@inproceedings{chen2020generative,
  title     = {Generative Pretraining from Pixels},
  author    = {Chen, Mark and Radford, Alec and Child, Rewon and Wu, Jeffrey and Jun, Heewoo and Luan, David and
               Sutskever, Ilya},
  booktitle = {Proceedings of the 37th International Conference on Machine Learning}, volume = {119}, year = {2020}
}

@software{igpt,
  title  = {igpt: Image GPT as an experiment repository},
  author = {{The igpt authors}}, year = {2026}, note = {commit COMMIT}
}
```"""


@dataclass(frozen=True)
class CardContent:
    """The sources of the card: the weights, their format there, the run that made them, the runs that measured them."""

    weights: Weights
    format: str  # huggingface or igpt
    name: str | None  # owner/name on the Hub
    has_head: bool  # a class head is exported with them
    run: RunRecord | None  # None: no record of it is beside the weights
    measured: tuple[RunRecord, ...]  # other stages of its pipeline that read these weights

    @property
    def is_final(self) -> bool:
        """Whether these are the weights that the run's numbers are of: not those of a step, or averaged over steps."""
        return self.weights.folder.name == "model"

    @property
    def data(self) -> dict[str, Any]:
        """The settings of the images of the run; {} without one."""
        return dict(self.run.config.get("data") or {}) if self.run else {}

    @property
    def dataset(self) -> str:
        return name_dataset(self.data) if self.data else self.weights.metadata.data

    @property
    def hub_dataset(self) -> str | None:
        """The dataset's name on the Hub, if it has one."""
        path = str(self.data.get("path") or "")
        return path if HUB_NAME.fullmatch(path) else HUB_DATA.get(self.dataset)


def write_model_card(
    folder: Path, weights: Weights, *, format: str, has_head: bool = False, name: str | None = None
) -> None:
    """Writes CARD and its pictures into an exported folder; no place on this machine is named in it."""
    run = _find_run(weights)
    content = CardContent(weights, format, name, has_head, run, _find_measured(run, weights.sha256))
    pictures = _write_pictures(folder, content)
    with files.atomic_write(folder / CARD) as file:
        file.write(render_card(content, pictures).encode())


def _find_run(weights: Weights) -> RunRecord | None:
    """The finished run that made the weights: its folder holds `model/` or `checkpoints/`."""
    try:
        return read_run(weights.folder.absolute().parent)
    except (ValueError, OSError):  # weights from elsewhere, or of a run that is not finished
        return None


def _find_measured(run: RunRecord | None, sha256: str) -> tuple[RunRecord, ...]:
    """The finished stages of the run's pipeline that read these weights."""
    found = []
    for folder in sorted(run.folder.parent.glob("[0-9]*_*")) if run is not None and run.is_stage else ():
        try:
            stage = read_run(folder)
        except (ValueError, OSError):  # unfinished, or damaged: not told
            continue
        if stage.result.provenance.get("weights") == sha256:
            found.append(stage)
    return tuple(found)


def _write_pictures(folder: Path, content: CardContent) -> dict[str, str]:
    """Copies samples and completions of the run, and draws the palette; returns file name → caption."""
    pictures: dict[str, str] = {}
    for run in content.measured:
        for name, caption in (("samples", "Samples"), ("completions", "Completions of held-out images")):
            path = run.files_inside.get(name)
            if path is not None and path.suffix == ".png" and (run.folder / path).is_file():
                shutil.copyfile(run.folder / path, folder / f"{name}.png")
                pictures[f"{name}.png"] = caption
    if "samples.png" not in pictures and content.run is not None and content.is_final:
        drawn = [
            path for path in sorted((content.run.folder / "samples").glob("step_*.png"))
            if files.resolve_below(content.run.folder, path.relative_to(content.run.folder)) is not None
        ]  # fmt: skip
        if drawn:
            shutil.copyfile(drawn[-1], folder / "samples.png")
            pictures["samples.png"] = "Samples, drawn while it was trained"
    tokenizer = content.weights.metadata.tokenizer
    if isinstance(tokenizer, PaletteTokenizer) and tokenizer.kind == PaletteTokenizer.kind:
        palette_picture(folder / "palette.png", tokenizer.palette.colours)
        pictures["palette.png"] = "The colours of the palette, in the order of the tokens"
    return pictures


def render_card(content: CardContent, pictures: dict[str, str]) -> str:
    """The text of the card, with the Hub's metadata in front; `pictures`: file name → caption."""
    metadata = content.weights.metadata
    shown = [f"![{caption}]({file})\n\n{caption}." for file, caption in pictures.items() if file != "palette.png"]
    palette = [f"![{pictures['palette.png']}](palette.png)"] if "palette.png" in pictures else []
    numbers = list(_list_numbers(content))
    rows = [("number", "value", "unit", "n", "measured by"), *(
        (name, format_measured(number), number.unit, f"{number.n:,}", task) for name, number, task in numbers
    )]  # fmt: skip
    licence = DATA_LICENCES.get(content.dataset, "not known to this program: see where the images are from")
    side, hub, objective = metadata.tokenizer.side, content.hub_dataset, metadata.objective["name"]
    objective = OBJECTIVES.get(objective, objective)
    link = f" ([{hub}](https://huggingface.co/datasets/{hub}))" if hub else ""
    blocks = [
        f"---\n{_card_metadata(content, numbers)}\n---",
        f"# {content.name or f'{metadata.model} on {content.dataset}'}",
        f"An Image GPT (Chen et al. 2020): {_describe_network(content)}, trained to predict {objective} in images of "
        f"{content.dataset} at {side}×{side} pixels.",
        *shown,
        "## Data",
        f"{content.dataset}{link}, {side}×{side} pixels. Licence of the data: {licence}.",
        f"Tokens: {metadata.tokenizer.describe()}; hash `{metadata.tokenizer.hash}`.",
        *palette,
        "## Recipe",
        *_describe_recipe(content),
        "## Numbers",
        format_markdown(rows) if numbers else "None is recorded of these weights.",
        *(["`[low, high]`: 95 % confidence interval; n: what it was measured on."] if numbers else []),
        "## How to load",
        _describe_loading(content),
        "## Limits",
        _describe_limits(content),
        "## Licence",
        "The code is under the MIT licence. For the weights none is stated: whoever publishes them chooses one, with "
        "regard to that of the data.",
        "## Citation",
        CITATION.replace("COMMIT", _find_commit(content)),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _card_metadata(content: CardContent, numbers: Sequence[tuple[str, Number, str]]) -> str:
    """The YAML front matter of the card."""
    from huggingface_hub import EvalResult, ModelCardData  # lazy: slow, and of exports only

    metadata, hub = content.weights.metadata, content.hub_dataset
    results = [
        EvalResult(
            task_type="image-classification" if "accuracy" in name else "unconditional-image-generation",
            dataset_type=hub or content.dataset, dataset_name=content.dataset, dataset_split=name.partition("/")[0],
            metric_type="accuracy" if "accuracy" in name else "loss", metric_name=name, metric_value=number.value,
        )
        for name, number, _ in numbers
        if name.endswith(("/accuracy", "/loss_gen", "/loss_clf"))
    ]  # fmt: skip
    data = ModelCardData(
        library_name="transformers" if content.format == "huggingface" else "igpt",
        license="unknown",
        tags=["image-gpt", "igpt", metadata.objective["name"], metadata.tokenizer.kind],
        datasets=[hub] if hub else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        pipeline_tag="image-classification" if content.has_head else "unconditional-image-generation"
        if metadata.network.causal else "image-feature-extraction",
        model_name=(content.name or metadata.model).rpartition("/")[2],
        eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml()


def _list_numbers(content: CardContent) -> Iterable[tuple[str, Number, str]]:
    """(name, number, task) of losses, bits and accuracies; of each name the first, at most MOST_NUMBERS."""
    found: dict[str, tuple[str, Number, str]] = {}
    for run in filter(None, (content.run if content.is_final else None, *content.measured)):
        for name, number in run.result.numbers.items():
            if name.startswith(("val/", "test/")) and number.unit.startswith(UNITS):
                found.setdefault(name, (name, number, run.title))
    return list(found.values())[:MOST_NUMBERS]


def _describe_network(content: CardContent) -> str:
    network = content.weights.metadata.network
    size = f"{network.n_layer} blocks of width {network.n_embd} with {network.n_head} heads"
    return f"{size}, {content.weights.n_parameter:,} parameters, {network.n_ctx:,} tokens of {network.n_vocab:,} kinds"


def _describe_recipe(content: CardContent) -> list[str]:
    """A table of the training's settings, the command and the commit; of weights from elsewhere a sentence."""
    metadata, run = content.weights.metadata, content.run
    known = f"Step {metadata.step:,}, seed {metadata.seed}."
    if run is None or "steps" not in run.config.get("task", {}):
        return [f"{known} How they were trained is not recorded beside them."]
    task = run.config["task"]
    rows = [(key, str(task[key])) for key in RECIPE if task.get(key) is not None]
    rows += [("precision", str(run.config.get("trainer", {}).get("precision")))]
    seen = run.result.numbers.get("train/images_seen")
    rows += [("images seen", f"{seen.value:,.0f}")] if seen is not None and content.is_final else []
    first = run.init_history.pretraining
    start = [f"Initial weights: of a pretraining on {name_dataset(first.config['data'])}."] if first else []
    return [
        f"task={run.task}. {known}",
        *start,
        format_markdown([("setting", "value"), *rows]),
        f"Commit `{_find_commit(content)}`; the command, without places of the machine that it ran on:",
        f"```\n{_hide_paths(run)}\n```",
    ]


def _hide_paths(run: RunRecord) -> str:
    """The command that repeats the run, PATH for each place on this machine."""
    arguments = run.overrides if run.overrides is not None else shlex.split(str(run.record.get("command", "")))[2:]
    shown = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if not key.startswith("paths."):
            shown.append(f"{key}=PATH" if PATH.search(value) else argument)
    return train_command(*shown)


def _find_commit(content: CardContent) -> str:
    return str(content.run.record["commit"] if content.run else environment()["commit"])


def _describe_loading(content: CardContent) -> str:
    name = content.name or "FOLDER"
    lines = [
        "import igpt", "",
        f'model = igpt.load("{name}")',
        *(["images = model.sample(16)  # (16, R, R, 3) uint8"] if content.weights.metadata.network.causal else []),
    ]  # fmt: skip
    text = "With this project (`pip install` its repository):\n\n```python\n" + "\n".join(lines) + "\n```"
    if content.format == "huggingface":
        text += (
            "\n\nWith transformers:\n\n```python\n"
            "from transformers import ImageGPTForCausalImageModeling, ImageGPTImageProcessor\n\n"
            f'model = ImageGPTForCausalImageModeling.from_pretrained("{name}")\n'
            f'processor = ImageGPTImageProcessor.from_pretrained("{name}")\n```'
        )
    return text


def _describe_limits(content: CardContent) -> str:
    metadata = content.weights.metadata
    side = metadata.tokenizer.side
    lines = [
        f"- It knows images of {side}×{side} pixels in {metadata.tokenizer.describe()}; other images are resized and "
        "lose what that cannot show.",
        f"- It has learned the images of {content.dataset}, with their biases and gaps; samples may resemble training "
        "images.",
        "- It is a model for research: nothing here was tested for decisions about people.",
    ]
    if not metadata.network.causal:
        lines.append("- It predicts masked tokens and draws no samples.")
    if content.format == "huggingface":
        lines.append("- Hugging Face's image processor resizes bilinearly and does not crop, as `data.crop` does.")
    return "\n".join(lines)
