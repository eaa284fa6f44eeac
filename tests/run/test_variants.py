"""`variant=NAME`: named settings of the network and of the pretraining."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from igpt.report.sweep_report import TABLE, check_table
from igpt.run.launch import build_components
from tests.compositions import check_overrides

CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides: str) -> Any:
    return build_components(*overrides, conf=CONF).run


def test_a_variant_is_the_run_with_its_settings_given_singly() -> None:
    """Invariant: the same name, alone and in a pipeline; its own name is not part of the identity, and is recorded."""
    by_hand = ("task.optimizer=muon", "task.learning_rate=0.006")
    alone = composed("variant=muon")
    assert alone.name == composed(*by_hand).name
    assert alone.subject["variant"] == "muon"
    assert "variant" not in composed().subject
    assert composed("variant=paper").name == composed().name
    pipeline = ("experiment=depth", "data=digits")
    of_stage = ("+task.stages.pretrain.optimizer=muon", "task.stages.pretrain.learning_rate=0.006")
    assert composed(*pipeline, "variant=muon").name == composed(*pipeline, *of_stage).name != composed(*pipeline).name


def test_what_is_typed_stands_over_a_variant() -> None:
    """Invariant: and a variant over an experiment, in every stage that pretrains and no other."""
    assert composed("variant=muon", "task.learning_rate=0.5").config["task"]["learning_rate"] == 0.5
    overrides = ["experiment=scaling", "data=digits", "task.stages.pretrain_nano.learning_rate=0.5", "variant=muon"]
    stages = composed(*overrides).config["task"]["stages"]
    rates = {name: stage.get("learning_rate") for name, stage in stages.items()}
    assert rates == {"pretrain_pico": 0.006, "pretrain_nano": 0.5, "pretrain_micro": 0.006, "scaling": None}
    assert {stages[name].get("optimizer") for name in stages} == {"muon", None}


def test_a_variant_of_a_training_needs_one() -> None:
    with pytest.raises(ValueError, match=r"^this variant sets the pretraining's optimizer, learning_rate, and task=pa"):
        composed("variant=muon", "task=palette")
    with pytest.raises(ValueError, match=r"^model.attention is set .*, and model=checkpoint is the network of in"):
        composed("variant=local", "model=checkpoint")


@pytest.mark.parametrize("experiment", ["priors", "recipe"])
def test_an_experiment_over_variants_composes(experiment: str) -> None:
    """Invariant: what it varies is there to be varied, its reference is among its jobs, and its numbers are a run's."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True).hydra
    varied: Any = OmegaConf.to_container(hydra.sweeper.params)
    swept = [f"{key}={values}" for key, values in varied.items()]
    check_overrides([f"experiment={experiment}", "data=digits", *swept], [CONF])
    check_overrides([f"experiment={experiment}", *(text.partition(",")[0] for text in swept)], [CONF])
    jobs = [[f"variant={name}"] for name in varied["variant"].split(",")]
    table: Any = OmegaConf.to_container(hydra.launcher)
    check_table(jobs, **{key: table[key] for key in TABLE})
    assert {key.partition("/")[0] for key in (table["metric"], *table["columns"])} <= {"pretrain", "probe"}
