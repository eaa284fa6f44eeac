"""The stages of a pipeline before they start: datasets and weights of their own, composed and checked."""

import shutil
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from igpt.run.arguments import resolve_paths
from igpt.run.components import Components
from igpt.run.execute import stage_runner
from igpt.run.pipeline_stages import StageConfig, stage_configs
from tests.compositions import check_overrides
from tests.configs import CONF, built, save_small


def compose_stages(*overrides: str) -> dict[str, StageConfig]:
    build = built("task=pipeline", *overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return stage_configs(build.run)


def check(build: Components) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        stage_runner(build)


@pytest.mark.parametrize(("data", "side"), [("cifar100", 32), ("{option: cifar100, resolution: 8, path: HERE}", 8)])
def test_a_stage_reads_its_own_dataset(data: str, side: int, tmp_path: Path) -> None:
    """Invariant: it has the settings of its option and its own; without an option, the pipeline's and its own."""
    data = data.replace("HERE", str(tmp_path))
    listed = f"{{pretrain: {{}}, probe: {{data: {data}}}, again: {{task: probe, data: {{labels_per_class: 4}}}}}}"
    stages = compose_stages("data=cifar10", "data.path=/there", f"++task.stages={listed}")
    alone = built("data=cifar100", f"data.resolution={side}", *([f"data.path={tmp_path}"] if side == 8 else []))
    assert stages["probe"].cfg.data == alone.run.cfg.data
    assert stages["probe"].choices["data"] == "cifar100"
    assert stages["pretrain"].cfg.data.path == stages["again"].cfg.data.path == "/there"
    assert stages["again"].cfg.data == {**stages["pretrain"].cfg.data, "labels_per_class": 4}
    assert stages["again"].choices["data"] == "cifar10"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "{data: cifar101}",
            r"task\.stages\.probe\.data=cifar101: there is no such option, did you mean cifar10.*stl10",
        ),
        (
            "{data: {option: ../task/probe}}",
            r"data must be the name of an option, as in conf/data/, got '\.\./task/probe'",
        ),
        ("{data: 5}", r"data must be the name of an option, as in conf/data/, got 5"),
        ("{data: {option: null}}", r"data must be the name of an option, as in conf/data/, got None"),
        ("{data: {option: cifar100, shift: 1}}", r"task\.stages\.probe\.data has no setting 'shift'"),
        ("{model: igpt_sm}", r"task\.stages\.probe\.model=igpt_sm: there is no such option, did you mean igpt_s"),
        ("{data: {option: cifar100, resolution: many}, init: RUN}", r"data\.resolution must be a whole number"),
        ("{data: cifar100, init: RUN}", r"reads 8×8 pixels .*, data=cifar100 gives 32×32"),
        ("{objective: bert, init: RUN}", r"^task\.stages\.probe: .*RUN.* objective"),
        (
            "{task: scaling, from: [palette], probe_data: folder}",
            r"^task\.stages\.probe\.probe_data=folder needs to know",
        ),
        ("{data: folder}", r"^task\.stages\.probe\.data=folder needs to know where the images are: task"),
        ("{data: {option: folder, path: ./gone}}", r"^task\.stages\.probe\.data\.path=\./gone: there is no such file"),
        ("{init: NOWHERE}", r"^task\.stages\.probe: init=NOWHERE: no config\.json"),
        ("{}", r"^task\.stages\.probe: task=probe needs trained weights"),
    ],
)
def test_a_stage_is_checked_before_the_first_one_starts(stage: str, message: str, tmp_path: Path) -> None:
    """Invariant: dataset and weights of its own, too, whatever comes before it."""
    save_small(tmp_path / "RUN")
    stage = stage.replace("RUN", str(tmp_path / "RUN"))
    build = built("task=pipeline", f"++task.stages={{palette: {{}}, probe: {stage}}}", f"paths.cache={tmp_path}")
    with pytest.raises(ValueError, match=message):
        check(build)


def test_figures_are_checked_before_they_start(tmp_path: Path) -> None:
    """Invariant: AR from init=, BERT from its own; the other objective is refused. Paths are typed without a +."""
    ar, bert = (save_small(tmp_path / name, causal=name == "ar") for name in ("ar", "bert"))
    (data := tmp_path / "data").mkdir()
    typed = [
        "experiment=paper/figure4", "data.resolution=8", f"init={ar}", f"task.stages.probe_bert.init={bert}",
        f"task.stages.probe_ar_imagenet.data.path={data}", f"paths.cache={tmp_path}",
        "task.stages.finetune_ar_imagenet=null", "task.stages.probe_bert_imagenet=null", "task.stages.finetune_ar=null",
    ]  # fmt: skip
    check_overrides(typed, [CONF])
    check_overrides(["experiment=paper/figure2", f"task.stages.probe_stl10.data.path={data}"], [CONF])
    build = built(*typed)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        stages = stage_configs(build.run)
    assert {name: stage.cfg.init for name, stage in stages.items()} == {
        name: str(bert if "bert" in name else ar) for name in stages
    }
    assert not any(stage.waits for stage in stages.values())
    assert [stage.cfg.data.path for name, stage in stages.items() if "imagenet" in name] == [str(data)] * 2
    assert stages["finetune_bert"].cfg.data.augment == {"pad": 1, "flip": True}  # an eighth of 8 pixels
    check(build)
    with pytest.raises(ValueError, match="objective"):
        check(built(*typed, f"init={bert}"))


@pytest.mark.parametrize("figure", ["figure2", "figure4"])
def test_the_stages_of_a_figure_are_the_protocols_of_the_paper(figure: str, tmp_path: Path) -> None:
    """Independent source: `experiment=paper/KEY`, which a stage with `paper: KEY` is to equal, refit and data too."""
    ar, bert = (save_small(tmp_path / name, causal=name == "ar") for name in ("ar", "bert"))
    given = ["task.stages.probe_ar_imagenet.data.path=.", f"task.stages.probe_bert.init={bert}"]
    given = [] if figure == "figure2" else given
    build = built(f"experiment=paper/{figure}", "data.resolution=8", "data.path=.", f"init={ar}", *given)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for stage in stage_configs(build.run).values():
            own = ["data.resolution=8", f"data.path={stage.cfg.data.path}", f"init={stage.cfg.init}"]
            alone = hydra.compose("config", overrides=[f"experiment=paper/{stage.cfg.task.paper}", *own])
            assert (stage.cfg.task, stage.cfg.data) == (alone.task, alone.data), stage.name


def test_a_run_is_that_of_its_stages_weights(tmp_path: Path) -> None:
    """Invariant: the name follows the weights, not their place; relative paths are made absolute."""
    first = save_small(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    save_small(tmp_path / "c", causal=False)
    names = [built("task=pipeline", f"++task.stages={{probe: {{init: {tmp_path / each}}}}}").run.name for each in "abc"]
    assert names[0] == names[1] != names[2]
    cfg = OmegaConf.create({"task": {"stages": {"probe": {"init": str(tmp_path / "x" / ".." / "a"), "data": {}}}}})
    resolve_paths(cfg)
    assert Path(cfg.task.stages.probe.init).is_absolute()
