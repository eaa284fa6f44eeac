"""`${recipe:KEY}` in conf/: a value of the recipe table, for the network, tokens and data of the whole config."""

from collections.abc import Iterator
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.settings.devices import Precision
from igpt.settings.older_configs import read_record
from igpt.settings.recipe_table import Rate, load_recipes
from igpt.utils import files

PLACES = ("task", "data.augment")  # groups with values of the table
SHOWN = {
    "learning_rate": "rate {:g}",
    "batch_size": "batch {:,}",
    "steps": "{:,} steps",
    "warmup_steps": "warm-up {:,}",
}
AUGMENTATION = {"pad": "pad {}", "flip": "flip"}
PAPER = "Chen et al. 2020, §3.1"
RGB = "igpt.tokens.rgb.RGBSettings"  # three tokens a pixel
CHECKPOINT = "checkpoint"  # option of model, tokens, objective and data: take it from the weights of init=


class Taken(NamedTuple):
    """A setting that no one gave."""

    group: DictConfig
    place: str  # its group
    key: str
    value: Any


def register_recipes() -> None:
    """Makes `${recipe:KEY}` known to OmegaConf."""
    OmegaConf.register_new_resolver("recipe", _resolve, replace=True)


def describe_recipe(cfg: DictConfig) -> str:
    """What a run takes from the table (rate, batch, steps, warm-up, augmentation) and from whom; "" if nothing.

    `recipe: iGPT-L, 48×48, next pixels (Chen et al. 2020, Table 5; the rate from memory, unverified): rate 0.01 …`
    """
    taken = {each.key: each.value for each in _list_taken(cfg)}
    data, (rate, is_exact), is_tuned = _read(cfg, "data.name"), _find_rate(cfg), _is_tuned(cfg)
    likeness = "" if is_exact else "as "
    if "learning_rate" in taken:
        network = f"{'a tenth of the rate of ' if is_tuned else likeness}{rate.network} ({rate.source})"
    else:
        network = f"{likeness}{rate.network} ({PAPER})"
    rows = {
        network: ("learning_rate", "batch_size"),
        f"{data} ({load_recipes().find_length(data).source})": ("steps", "warmup_steps"),
    }
    texts = [
        f"{row}: {', '.join(SHOWN[key].format(taken[key]) for key in keys if key in taken)}"
        for row, keys in rows.items()
        if taken.keys() & keys
    ]
    if augmentation := [AUGMENTATION[key].format(taken[key]) for key in AUGMENTATION if taken.get(key)]:
        texts.append(f"augmentation ({PAPER}): {', '.join(augmentation)}")
    return f"recipe: {'; '.join(texts)}" if texts else ""


def keep_recorded(cfg: DictConfig, folder: Path) -> None:
    """Gives a config the values that the run in `folder` began with, where it takes others from the table.

    So a run goes on by the recipe of the release that began it, and, where `trainer.precision` is `auto`, in the
    precision that it began in. Of the record only numbers, switches and precisions are taken.
    """
    if not (folder / "run.json").is_file():
        return
    saved = read_record(folder / "run.json").get("config", {})
    for each in list(_list_taken(cfg)):
        group: Any = saved
        for name in each.place.split("."):
            group = group.get(name) if isinstance(group, dict) else None
        recorded = group.get(each.key) if isinstance(group, dict) else None
        if isinstance(recorded, int | float) and recorded != each.value:
            each.group[each.key] = recorded
    trainer = saved.get("trainer")
    if _read(cfg, "trainer.precision") == "auto" and isinstance(trainer, dict):
        began_in = trainer.get("precision")
        if began_in in get_args(Precision):
            cfg.trainer.precision = began_in


def _list_taken(cfg: DictConfig) -> Iterator[Taken]:
    """Yields every setting of PLACES that is a value of the table, not given by anyone."""
    for place in PLACES:
        group = _read(cfg, place)
        if isinstance(group, DictConfig):
            for key, raw in OmegaConf.to_container(group, resolve=False).items():  # type: ignore[union-attr]  # a dict
                if isinstance(raw, str) and raw.startswith("${recipe:"):
                    yield Taken(group, place, str(key), group[key])


def _resolve(key: str, *, _root_: DictConfig, _parent_: DictConfig) -> Any:
    """The value of `${recipe:KEY}`. Settings of wrong types are refused where they are read, not here."""
    table, (rate, _) = load_recipes(), _find_rate(_root_)
    length = table.find_length(data := _read(_root_, "data.name"))
    match key:
        case "learning_rate" | "batch_size":
            return getattr(rate, key)
        case "finetuning_rate":
            return table.finetuning.rate(rate.learning_rate)
        case "steps":
            return length.steps(_read_count(_parent_, "batch_size") or rate.batch_size)
        case "warmup_steps":
            batch_size = _read_count(_parent_, "batch_size") or rate.batch_size
            return length.warmup_steps(batch_size, _read_count(_parent_, "steps") or length.steps(batch_size))
        case "keep_steps":
            last = _read_count(_parent_, "steps") or 0
            return ListConfig([step for step in length.keep_steps if step <= last])
        case "val_every" | "log_every" | "checkpoint_every":
            return getattr(length, key)
        case "pad" | "flip":
            is_augmented = _is_tuned(_root_) and data in table.finetuning.augmented
            pad = max(1, round((_read_count(_root_, "data.resolution") or 1) / table.finetuning.pad_of_side))
            return is_augmented if key == "flip" else pad * is_augmented
    raise ValueError(f"the recipes have no {key!r}")


def _is_tuned(cfg: DictConfig) -> bool:
    return bool(_read(cfg, "task.name") == "finetune")


def _find_rate(cfg: DictConfig) -> tuple[Rate, bool]:
    """The row of the table for a config's network, and whether it is that network's own row.

    Size and side, or the objective, are those of the weights where `model=checkpoint` or `objective=checkpoint`.
    """
    model, objective, init = _read(cfg, "model.name"), _read(cfg, "objective.name"), _read(cfg, "init")
    pixels = _read_count(cfg, "tokens.factor") or _read_count(cfg, "tokens.patch") or 1  # of a token, a side
    side = (_read_count(cfg, "data.resolution") or 0) // pixels
    if CHECKPOINT in (model, objective) and isinstance(init, str):
        try:
            names = _read_names(init) or _find_names(init, _read(cfg, "data.clusters"))
        except (ValueError, OSError):  # no weights are there: the run is refused, or an earlier stage makes them
            names = None, None, 0
        model, side = (names[0], names[2]) if model == CHECKPOINT else (model, side)
        objective = names[1] if objective == CHECKPOINT else objective
    rate = load_recipes().find_rate(model, objective, side)
    is_of_pixels = pixels == 1 and _read(cfg, "tokens._target_") != RGB
    return rate, is_of_pixels and (rate.model, rate.objective, rate.side) == (model, objective, side)


Names = tuple[Any, Any, int]  # of weights: model, objective, tokens a side


def _read_names(init: str) -> Names | None:
    """Those in our `config.json`, without a look at the weights; None where there is none."""
    place = Path(init).expanduser()
    for folder in (place, place / "model", place.parent):
        try:
            saved = files.read_json(folder / "config.json")
            return saved["model"], saved["objective"]["name"], isqrt(saved["network"]["n_ctx"])
        except (OSError, ValueError, LookupError, TypeError):  # another format, or damaged: `init` is refused if it is
            continue
    return None


@cache
def _find_names(init: str, palette: str | None) -> Names:
    """Those of weights in another format. Raises ValueError or OSError where there are none."""
    from igpt.checkpoint.find import find_weights  # imports PyTorch

    metadata = find_weights(init, palette=palette).metadata
    return metadata.model, metadata.objective["name"], isqrt(metadata.network.n_ctx)


def _read(cfg: DictConfig, key: str) -> Any:
    """The value of a setting; None where there is none, or it cannot be resolved."""
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return None


def _read_count(cfg: DictConfig, key: str) -> int | None:
    """The value of a setting if it is a whole number above 0."""
    value = _read(cfg, key)
    return value if type(value) is int and value > 0 else None
