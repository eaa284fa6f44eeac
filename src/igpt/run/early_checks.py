"""Checks of a composed config's settings before PyTorch and Lightning are imported, which takes seconds."""

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.settings.devices import HardwareSettings, Strategy
from igpt.settings.fields import Settings, parse_settings
from igpt.settings.older_configs import answer
from igpt.settings.probing import EncoderProbeSettings, LowDataSettings, ProbeSettings, ScalingSettings
from igpt.settings.run import OF_LAUNCH, check_structure
from igpt.settings.training import FinetuneSettings, PretrainSettings, TokenizerTaskSettings

# `_target_` of a task → its settings, of the tasks with the most of them; the others are checked when they are imported
TASKS: Mapping[str, type[Settings]] = {
    "igpt.task.pretrain.run": PretrainSettings,
    "igpt.task.finetune.run": FinetuneSettings,
    "igpt.task.train_tokenizer.run": TokenizerTaskSettings,
    "igpt.task.probe.run": ProbeSettings,
    "igpt.task.probe_encoder.run": EncoderProbeSettings,
    "igpt.task.low_data.run": LowDataSettings,
    "igpt.task.scaling.run": ScalingSettings,
}


def check_one_trainer(overrides: Sequence[Override]) -> None:
    """Raises ValueError if a command chooses several options of `trainer`, which exclude each other."""
    values = [each.value() for each in overrides if each.key_or_group == "trainer" and not each.is_sweep_override()]
    chosen = [str(option) for value in values for option in (value if isinstance(value, list) else [value])]
    if len(set(chosen)) > 1:
        raise ValueError(f"trainer={' and trainer='.join(chosen)}: choose one of them")


def check_early(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Raises the ValueError that the run would end with, where its settings of trainer and task alone show it.

    `choices`: the option of each config group.

    Nothing is checked of a resumed run, a variant and `task.operations`: their settings are not known yet.
    """
    try:
        config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    except (OmegaConfBaseException, ValueError):  # a setting that another would decide, or an error that is told later
        return
    task = config.get("task")
    if not isinstance(task, dict) or config.get("resume") not in (None, "auto") or "pretraining" in config:
        return
    check_structure(config)
    check_strategy(choices.get("trainer"), config["trainer"].get("strategy"))
    if task.get("operations") is not None:
        return
    parsed: list[Settings] = []
    for name, model, settings in (
        ("task", TASKS.get(task["_target_"]), {key: value for key, value in task.items() if key not in OF_LAUNCH}),
        ("trainer", HardwareSettings, {key: value for key, value in config["trainer"].items() if key != "_target_"}),
    ):
        if model is None:
            continue
        for key in settings.keys() - model.model_fields.keys():
            if message := answer(f"{name}.{key}"):
                raise ValueError(message)
        parsed.append(parse_settings(model, settings, name))
    hardware = parsed[-1]
    assert isinstance(hardware, HardwareSettings)
    if hardware.is_sharded and isinstance(parsed[0], PretrainSettings):
        parsed[0].check_sharded(hardware.strategy)


def check_strategy(option: Any, strategy: Any) -> None:
    """Raises ValueError if the option of `trainer` is a strategy, and the setting `trainer.strategy` another."""
    if option in get_args(Strategy) and strategy in get_args(Strategy) and strategy != option:
        raise ValueError(f"trainer={option} and trainer.strategy={strategy} name two strategies: leave one of them out")
