"""Every published number of Chen et al. 2020, its source, and the command that measures the same here.

V2 is the version the released code cites, V1 the conference's. The transcription that was read has tables and figures
as pictures: numbers that only stand there come from what others quote of them, and what nobody confirms is marked. A
figure that prints no number is here by what it shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from igpt.report.protocols import AUGMENTED, FEW, IMAGENET, JOINT, LBFGS, RECIPES, SGD, SIZES

V2, V1 = "Chen et al. 2020", "first version of Chen et al. 2020"
QUOTED = f"{V2}, as others quote it"  # in the blog, the talk, a review
README = "OpenAI's README"  # of the released code
LEADERBOARD = "a copy of a leaderboard, for the first version"

TABLES = {  # in the order they are shown; key → title
    "parameters": "Sizes",
    "loss": "Generative loss on ILSVRC validation (README of the released code; Figure 3)",
    "probe": "Linear probe: CIFAR-10, CIFAR-100, STL-10",
    "probe_imagenet": "Linear probe: ImageNet",
    "depth": "Accuracy over depth (figure)",
    "scaling": "Loss against features (Figure 3)",
    "finetune": "Fine-tuning of all weights",
    "low_data": "Few labels: CIFAR-10",
}

RELEASED = {("iGPT-S", 32): "igpt-s", ("iGPT-M", 32): "igpt-m", ("iGPT-L", 32): "igpt-l"}  # weights, AR and BERT
NO_VQ_VAE = "its pixels come through a VQ-VAE, which is not part of this repository"
WEB = "the 100 M web images that it was also trained on are not public: data=imagenet64_web takes your own"


@dataclass(frozen=True)
class Published:
    """One number, what it is of, and what measures it here. Shares are of 1; losses in nats per token."""

    table: str
    method: str  # iGPT-S, M, L, XL; or somebody else's
    value: float | None  # None: a figure, by what it shows
    source: str
    unit: str = "share"
    dataset: str | None = None  # as in conf/data; None: whatever it is measured on
    objective: str | None = None  # ar, bert; None: others' methods, or either
    resolution: int | None = None  # pixels a side, where it is stated
    features: int | None = None
    detail: str = ""  # what else sets it apart
    relation: str = ""  # what stands before the value: ≈, <, almost
    spread: float | None = None  # standard deviation, where one is printed
    unconfirmed: str = ""  # the part that is from memory of the paper
    tasks: tuple[str, ...] = ()  # whose result.json has it
    key: str = ""  # the number there; `a - b`: the difference of two; several, or a pattern: a figure's
    experiment: str | None = None  # conf/experiment/paper/<name>.yaml
    otherwise: str = ""  # what measures it where no experiment file does
    more: str = ""  # what is to be given beside init=RUN
    expects: Mapping[str, Any] = field(default_factory=dict)  # settings that the paper states
    why_not: str = ""  # why nothing measures it here, or not all of it
    scratch: bool = False  # from weights that were never trained

    @property
    def ours(self) -> bool:
        """Whether it is of an Image GPT."""
        return self.method in SIZES

    @property
    def pretraining(self) -> str | None:
        """The experiment whose weights it is of; None: it needs none, or there is none."""
        if self.scratch or self.tasks in ((), ("pretrain",), ("scaling",)):
            return None
        of = [(recipe.model, recipe.objective, recipe.resolution) for recipe in RECIPES.values()]
        mine = (self.method, self.objective, self.resolution)
        return list(RECIPES)[of.index(mine)] if mine in of else None

    @property
    def command(self) -> str | None:
        """What measures it; RUN: the folder of its pretraining."""
        if self.experiment is None:
            return f"python train.py {self.otherwise}" if self.otherwise else None
        start = " init=RUN" if self.pretraining else ""
        return f"python train.py experiment=paper/{self.experiment}{start}{self.more and ' ' + self.more}"

    @property
    def run(self) -> str:
        """What RUN stands for in the command; empty where there is no RUN."""
        if self.pretraining is None:
            return ""
        released = RELEASED.get((self.method, self.resolution or 0))
        bert = "-bert" if self.objective == "bert" else ""
        return f"experiment=paper/{self.pretraining}" + (f", or {released}{bert}/1000000" if released else "")

    @property
    def setting(self) -> str:
        """What it is of, in a line."""
        of_data = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10", "imagenet": "ImageNet"}
        return ", ".join(part for part in (of_data.get(self.dataset or "", ""), self.network) if part)

    @property
    def network(self) -> str:
        """The same without the dataset."""
        parts = [
            f"{self.method} {(self.objective or '').upper()}".strip(),
            f"{self.resolution}×{self.resolution}" if self.resolution else "",
            f"{self.features:,} features" if self.features else "",
            self.detail if self.value is not None else "",  # else it is the claim
        ]
        return ", ".join(part for part in parts if part)

    @property
    def printed(self) -> str:
        """The value as one reads it; a figure's claim."""
        if self.value is None:
            return self.detail
        if self.unit == "share":
            digits = 0 if self.relation in ("≈", "almost") else 1 if abs(1000 * self.value % 1) < 1e-6 else 2
            text = f"{100 * self.value:.{digits}f}"
            text += f" ± {100 * self.spread:.1f} %" if self.spread is not None else " %"
        else:
            text = f"{self.value / 1e6:.0f}M" if self.unit == "weights" else f"{self.value:.4f} {self.unit}"
        return f"{self.relation} {text}".strip()


def lines(experiment: str) -> list[str]:
    """What stands as `published:` in an experiment file, from the numbers it is for."""
    found = [of for of in PUBLISHED if of.value is not None and of.experiment == experiment]
    elsewhere = [of for of in PUBLISHED if of.table == "loss" and of.pretraining == experiment]
    return [_line(of) for of in found] + [f"{_line(of)}, by experiment=paper/{of.experiment}"
                                          for of in elsewhere]  # fmt: skip


def _line(of: Published) -> str:
    """Shares as they stand in a run's own table, of 1."""
    value = of.printed
    if of.unit == "share":
        spread = "" if of.spread is None else f" ± {of.spread:.3f}"
        value = f"{of.relation} {of.value:.{3 if of.relation in ('', '<') else 2}f}{spread}".strip()
    marked = f"; {of.unconfirmed}: from memory, unverified" if of.unconfirmed else ""
    return f"{of.key} {value}: {of.network} ({of.source}{marked})"


def _probe(dataset: str, value: float | None, source: str, model: str = "iGPT-L", **own: Any) -> Published:
    layers = own.get("expects", {}).get("task.concat") or 1
    given: dict[str, Any] = {
        "objective": "ar", "resolution": 32, "features": layers * SIZES[model].n_embd, "tasks": ("probe",),
        "key": "test/accuracy", "table": "probe_imagenet" if dataset == "imagenet" else "probe",
        "experiment": f"probe_{dataset}" + (f"{own.get('resolution', 32)}" if dataset == "imagenet" else ""),
    }  # fmt: skip
    expects = (SGD if dataset == "imagenet" else LBFGS) | own.pop("expects", {})
    return Published(dataset=dataset, value=value, source=source, method=model, expects=expects, **given | own)


def _finetune(dataset: str, value: float, objective: str = "ar", **own: Any) -> Published:
    given: dict[str, Any] = {
        "resolution": 32, "tasks": ("finetune",), "key": "test/accuracy", "source": V2,
        "experiment": f"finetune_{dataset}" + (f"{own.get('resolution', 32)}" if dataset == "imagenet" else ""),
    }  # fmt: skip
    expects = JOINT | (IMAGENET if dataset == "imagenet" else AUGMENTED) | own.pop("expects", {})
    for key in own.pop("unstated", ()):
        del expects[key]
    of = {"table": "finetune", "method": "iGPT-L", "dataset": dataset, "objective": objective}
    return Published(value=value, expects=expects, **of | given | own)


def _few(per_class: int, value: float, spread: float, *, unconfirmed: str, source: str = V2) -> Published:
    return Published(
        "low_data", "iGPT-L", value, source, dataset="cifar10", objective="ar", resolution=32, spread=spread,
        detail=f"{per_class * 10:,} labels, 5 subsets", unconfirmed=unconfirmed, tasks=("low_data",), expects=FEW,
        key=f"test/accuracy_{per_class}_per_class", experiment="low_data_cifar10",
    )  # fmt: skip


def _other(table: str, dataset: str, method: str, percent: float, features: int | None = None, detail: str = "",
           resolution: int | None = None) -> Published:  # fmt: skip
    return Published(table, method, round(percent / 100, 6), f"{V2}, beside its own", dataset=dataset, detail=detail,
                     features=features, resolution=resolution, why_not="another method")  # fmt: skip


GAIN = {"relation": "almost", "detail": "gain by the vote of 5 masks", "key": "test/accuracy - test/accuracy_one_mask"}

PUBLISHED: Sequence[Published] = (
    *(
        Published("parameters", model, 1e6 * size.millions, V2, unit="weights", tasks=("pretrain",), key="parameters",
                  detail=f"{size.n_layer} blocks of width {size.n_embd:,}, 1,024 positions",
                  experiment=f"pretrain_{model[5:].lower()}")
        for model, size in SIZES.items()
    ),
    *(
        Published("loss", model, value, README, unit="nats/token", dataset="imagenet", objective="ar", resolution=32,
                  tasks=("evaluate", "pretrain"), key="test/loss_gen", experiment="loss_imagenet32",
                  expects={"task.split": "test"} | IMAGENET)
        for model, value in (("iGPT-S", 2.0895), ("iGPT-M", 2.0614), ("iGPT-L", 2.0466))
    ),
    _probe("cifar10", 0.963, V2),
    _probe("cifar10", 0.939, V2, detail="last layer, printed as 2.4 below the best", expects={"task.layer": 48},
           experiment="probe_cifar10_last_layer"),
    _probe("cifar10", 0.953, V2, objective="bert", relation="<", detail="printed as more than 1 below AR",
           expects={"task.masks": 5}),
    _other("probe", "cifar10", "ResNet-152", 94.0),
    _other("probe", "cifar10", "SimCLR", 95.3, 8192),
    _probe("cifar100", 0.828, QUOTED),
    _other("probe", "cifar100", "ResNet-152", 78.0),
    _other("probe", "cifar100", "SimCLR", 80.2, 8192),
    _probe("stl10", 0.955, QUOTED),
    _probe("stl10", 0.971, LEADERBOARD, resolution=None, features=None, unconfirmed="that it is of 96×96 pixels",
           tasks=(), key="", experiment=None, why_not=NO_VQ_VAE),
    _other("probe", "stl10", "AMDIM-L", 94.2, 8192),
    _probe("imagenet", 0.419, V2, "iGPT-S"),
    _probe("imagenet", 0.545, V2, "iGPT-M"),
    _probe("imagenet", 0.603, V2),
    _probe("imagenet", 0.652, V2, resolution=48),
    _probe("imagenet", 0.673, f"{V1}, as others quote it", resolution=48, detail="11 layers",
           expects={"task.concat": 11}, experiment="probe_imagenet48_11_layers", more="task.layer=BEST"),
    _probe("imagenet", 0.690, V1, resolution=None, features=None, detail="through a VQ-VAE, best configuration",
           unconfirmed="192×192 pixels, 11 layers", tasks=(), key="", experiment=None, why_not=NO_VQ_VAE),
    _probe("imagenet", 0.687, V2, "iGPT-XL", resolution=64, why_not=WEB),
    _probe("imagenet", 0.720, V2, "iGPT-XL", resolution=64, detail="5 layers", expects={"task.concat": 5},
           experiment="probe_imagenet64_5_layers", more="task.layer=BEST", why_not=WEB),
    _probe("imagenet", 0.54, V2, objective="bert", relation="≈", detail="printed as 6 below AR",
           key="test/accuracy_one_mask", expects={"task.masks": 5}),
    _probe("imagenet", 0.01, V2, objective="bert", expects={"task.masks": 5}, **GAIN),
    *(
        _other("probe_imagenet", "imagenet", method, percent, features, f"{millions}M weights")
        for method, percent, features, millions in (
            ("Rotation", 55.4, 8192, 86), ("BigBiGAN", 61.3, None, 86), ("AMDIM", 68.1, 8192, 626),
            ("MoCo", 68.6, 8192, 375), ("SimCLR", 69.3, 2048, 24), ("CPC v2", 71.5, 8192, 303),
            ("SimCLR", 76.5, 8192, 375),
        )  # BigBiGAN's features: the paper and its blog differ
    ),
    *(
        _probe(dataset, None, V2, table="depth", features=None, detail="rises to the middle layers, then falls mildly",
               key="probe/layer, val/accuracy, val/embedding, val/last_layer")
        for dataset in ("cifar10", "cifar100", "stl10")
    ),
    Published("scaling", "iGPT-L", None, V2, objective="ar", tasks=("scaling",), key="*/rank_correlation",
              detail="lower loss, better probe, within a run and from S to M to L",
              otherwise="task=scaling task.runs=[RUN_S,RUN_M,RUN_L] data=cifar10"),
    _finetune("cifar10", 0.990),
    _finetune("cifar10", 0.986, "bert"),
    _finetune("cifar10", 0.421, detail="40 labels", experiment="finetune_cifar10_40_labels",
              expects={"data.labels_per_class": 4}, unstated=("data.augment.pad", "data.augment.flip")),
    *(_other("finetune", "cifar10", *of) for of in (("AutoAugment", 98.5), ("SimCLR", 98.6), ("GPipe", 99.0))),
    _other("finetune", "cifar10", "BiT-L", 99.3, detail="trained on JFT, 300 M images"),
    _finetune("cifar100", 0.885),
    *(_other("finetune", "cifar100", *of) for of in (("SimCLR", 89.0), ("AutoAugment", 89.3), ("EfficientNet", 91.7))),
    _finetune("imagenet", 0.663),
    _finetune("imagenet", 0.726, resolution=48),
    _finetune("imagenet", 0.532, resolution=48, detail="from scratch, L_CLF alone, 18 epochs", scratch=True,
              experiment="scratch_imagenet48", expects={"task.loss_weights.gen": 0.0, "task.steps": 173_000},
              why_not="the paper tuned dropout for it, which this network has none of"),
    _finetune("imagenet", 0.665, "bert", detail="whether by a vote of 5 masks is not said", expects={"task.masks": 5}),
    _finetune("imagenet", 0.01, "bert", expects={"task.masks": 5}, **GAIN),
    _other("finetune", "imagenet", "Isometric Nets", 70.2, resolution=28),
    _few(4, 0.732, 0.015, unconfirmed="the deviation"),
    _few(25, 0.876, 0.006, unconfirmed="the deviation"),
    _few(400, 0.943, 0.001, unconfirmed="value and deviation"),
    _other("low_data", "cifar10", "FixMatch", 88.61, detail="40 labels"),
    _other("low_data", "cifar10", "FixMatch", 94.93, detail="250 labels"),
)  # fmt: skip
