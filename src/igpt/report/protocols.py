"""What Chen et al. 2020 state of their networks, pretraining and protocols, by the setting each thing is here.

What the paper leaves open (the batch size of probes, filters, how long fine-tuning lasts) is not listed: no run can
differ from it there.
"""

from dataclasses import dataclass
from typing import Any

TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "stl10": 8_000, "imagenet": 50_000}
N_COLOUR = 512
PRECISION = "32-true"  # "float32", §3


@dataclass(frozen=True)
class Size:
    """A network of the paper: L, d, heads (None: not published)."""

    n_layer: int
    n_embd: int
    n_head: int | None
    millions: int  # weights as printed, with 1,024 positions


SIZES = {
    "iGPT-S": Size(24, 512, 8, 76),
    "iGPT-M": Size(36, 1024, 8, 455),
    "iGPT-L": Size(48, 1536, 16, 1362),  # printed for 48×48, too, whose own table of positions has more
    "iGPT-XL": Size(60, 3072, None, 6801),  # printed for 64×64
}

# What the protocols state, by the setting it is here. What the paper leaves open is not listed.
IMAGENET = {
    "data.val_fraction": 0.04, "data.crop.short_side": [256, 384], "data.crop.eval_short_side": 224,
    "data.crop.size": 224,
}  # fmt: skip
PLAIN = {"data.labels_per_class": None, "data.augment.pad": 0, "data.augment.flip": False}
SMALL = PLAIN | {"data.val_fraction": 0.1}  # CIFAR and STL-10
ADAM = {"task.beta1": 0.9, "task.beta2": 0.95, "task.weight_decay": 0.0, "task.batch_size": 128}
PROBE = {"task.norm": "ln_1", "task.layer": None, "task.concat": None}
LBFGS = SMALL | PROBE | {"task.solver": "lbfgs", "task.refit": True}
SGD = PLAIN | IMAGENET | PROBE | {"task.solver": "sgd", "task.sgd.momentum": 0.9, "task.sgd.steps": 1_000_000}
JOINT = ADAM | PLAIN | {"task.loss_weights.gen": 1.0, "task.loss_weights.clf": 1.0}
AUGMENTED = {"data.augment.pad": 4, "data.augment.flip": True, "data.val_fraction": 0.1}  # of CIFAR, in fine-tuning
FEW = SMALL | {"task.norm": "ln_1", "task.subsets": 5}


@dataclass(frozen=True)
class Recipe:
    """How a network was pretrained; its experiment file is named `pretrain_…`. The rates are of Table 5."""

    model: str
    objective: str
    resolution: int
    learning_rate: float
    confirmed: bool = False  # the rate, by a second source; else it is from memory of the table

    @property
    def expects(self) -> dict[str, Any]:
        """The settings of `task=pretrain` that the paper states."""
        xl = self.model == "iGPT-XL"
        batch, steps = (64, 2_000_000) if xl else (128, 1_000_000)
        of_data = {
            "data.name": "imagenet_web" if xl else "imagenet",
            "data.resolution": self.resolution,
            **PLAIN,
            **IMAGENET,
        }
        epoch = -(-1_229_920 // batch)  # the warm-up; 96 % of ImageNet's training images
        length = {"task.steps": steps, "task.batch_size": batch, "task.warmup_steps": epoch}
        return {**of_data, **ADAM, **length, "task.learning_rate": self.learning_rate}

    @property
    def images(self) -> int:
        """Images seen, each as often as it came."""
        return int(self.expects["task.steps"] * self.expects["task.batch_size"])


RECIPES = {
    "pretrain_s": Recipe("iGPT-S", "ar", 32, 0.003, confirmed=True),
    "pretrain_m": Recipe("iGPT-M", "ar", 32, 0.003),
    "pretrain_l": Recipe("iGPT-L", "ar", 32, 0.001),
    "pretrain_l_48": Recipe("iGPT-L", "ar", 48, 0.01),
    "pretrain_xl": Recipe("iGPT-XL", "ar", 64, 0.0003),
    "pretrain_s_bert": Recipe("iGPT-S", "bert", 32, 0.01),
    "pretrain_m_bert": Recipe("iGPT-M", "bert", 32, 0.003),
    "pretrain_l_bert": Recipe("iGPT-L", "bert", 32, 0.001),
}
