"""`task=dashboard`: the panels of docs/dashboards.md as a workspace of Weights & Biases."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from igpt.metric.result import Number, Result
from igpt.report.closing_table import format_markdown
from igpt.settings.reading import DashboardSettings
from igpt.utils import files

log = logging.getLogger(__name__)

STEP, IMAGES = "trainer/global_step", "images_seen"  # x axes
SETTINGS = ("task.learning_rate", "task.batch_size")  # of the panel `search`
GROUPED_BY = ("model.name", "objective.name")  # settings that the table of runs is grouped by
INSTALL = "task=dashboard needs wandb-workspaces, which is not installed: pip install wandb-workspaces==0.4.13"


@dataclass(frozen=True)
class PanelSpec:
    """One panel: the logged keys that it shows, in a section of the workspace."""

    title: str
    kind: Literal["line", "media", "chart", "confusion", "bars", "parallel"]
    keys: tuple[str, ...]
    note: str = ""
    x: str = STEP
    log_y: bool = False


SECTIONS: dict[str, tuple[PanelSpec, ...]] = {
    "Training": (
        PanelSpec("loss", "line", ("train/loss_gen", "val/loss_gen"), "logarithmic y", log_y=True),
        PanelSpec("loss over data", "line", ("val/loss_gen",), "sizes and batches side by side", x=IMAGES),
        PanelSpec("bits", "line", ("train/bits_per_token", "val/bits_per_token")),
        PanelSpec("loss by position", "media", ("loss_by_position",), "of the tokens, at every validation"),
        PanelSpec("learning rate", "line", ("lr",)),
        PanelSpec(
            "gradient norm", "line", ("train/grad_norm", "train/grad_norm_max"), "before clipping; mean and largest"
        ),
        PanelSpec("speed", "line", ("images_per_s", "tokens_per_s", "flop_utilisation"), "the last one with "
                  "`trainer.peak_tflops`"),
        PanelSpec("seen", "line", ("images_seen", "tokens_seen")),
        PanelSpec("samples", "media", ("samples",), "the same random numbers at every validation"),
    ),
    "Fine-tuning and probes": (
        PanelSpec("class loss", "line", ("train/loss_clf", "val/loss_clf")),
        PanelSpec("accuracy", "line", ("train/accuracy", "val/accuracy")),
        PanelSpec("accuracy over depth", "chart", ("curves/accuracy over layer",), "of `task=probe`"),
        PanelSpec("confusion", "confusion", ("confusion_cells",), "classes by name, up to 100 of them"),
    ),
    "Tokenizers": (
        PanelSpec("loss of a tokenizer", "line", ("train/loss", "train/reconstruction", "train/commitment")),
        PanelSpec("PSNR", "line", ("val/psnr",), "dB"),
        PanelSpec("reconstruction", "line", ("val/ssim", "val/mse")),
        PanelSpec("codes", "line", ("val/codes_used", "val/perplexity_share")),
        PanelSpec("reconstructions", "media", ("reconstructions",), "at every validation"),
    ),
    "Results": (
        PanelSpec("pictures", "media", ("pictures/samples", "pictures/completions", "pictures/curves",
                  "pictures/confusion", "pictures/palette_images"), "of finished tasks"),
        PanelSpec("loss of runs", "bars", ("val/loss_gen",), "beside it `…_low` and `…_high` (95 % interval)"),
        PanelSpec("accuracy of runs", "bars", ("test/accuracy",), "likewise"),
        PanelSpec("search", "parallel", ("val/loss_gen",), f"over {' and '.join(f'`{key}`' for key in SETTINGS)}"),
    ),
}  # fmt: skip
KINDS = {
    "line": "line", "media": "media", "chart": "custom chart", "confusion": "custom chart", "bars": "bars",
    "parallel": "parallel coordinates",
}  # fmt: skip


def run(settings: DashboardSettings) -> Result:
    """Writes the workspace to `settings.file` as W&B's API takes it; with a key, creates it there and logs its address.

    Raises:
        ValueError: wandb-workspaces is not installed, the file cannot be written, or W&B refuses.
    """
    spec = build_spec(settings)
    try:
        files.write_json(Path(settings.file), spec)
    except OSError as error:
        raise ValueError(f"task.file={settings.file} cannot be written ({error.strerror})") from error
    n_panel = sum(map(len, SECTIONS.values()))
    log.info("%s: %d panels in %d sections", settings.file, n_panel, len(SECTIONS))
    if (address := create_workspace(settings)) is None:
        log.info("no W&B key is here: after `wandb login` (or with WANDB_API_KEY) the same command creates it there")
    else:
        log.info("the workspace is at %s", address)
    return Result(numbers={"dashboard/panels": Number(n_panel, "panels", 1)})


def create_workspace(settings: DashboardSettings) -> str | None:
    """The address of the workspace, which is made on W&B; None without a key."""
    import wandb

    try:
        if not wandb.login(prompt=False):
            return None
        entity = settings.entity or wandb.Api().default_entity
        workspace = _build_workspace(settings, str(entity))
        workspace.save()
        return str(workspace.url)
    except Exception as error:  # of the client: of W&B, of HTTP, of its answers
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"task=dashboard: W&B refuses, or is out of reach ({reason}); check task.entity and task.project; "
            f"{settings.file} is written"
        ) from error


def build_spec(settings: DashboardSettings) -> dict[str, Any]:
    """What the API is sent: entity, project, display name and the specification of the view."""
    view = _build_workspace(settings, settings.entity or "")._to_model()  # the library has no public way to it
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {
        "entityName": settings.entity, "projectName": settings.project, "displayName": settings.title,
        "type": "project-view", "spec": spec,
    }  # fmt: skip


def _build_workspace(settings: DashboardSettings, entity: str) -> Any:
    """The `Workspace` with all sections, its runs grouped by GROUPED_BY."""
    try:
        import wandb_workspaces.reports.v2 as panels  # optional
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(INSTALL) from error
    sections = [
        workspaces.Section(name=name, panels=[_build_panel(spec, panels) for spec in specs], is_open=True)
        for name, specs in SECTIONS.items()
    ]
    grouped = workspaces.RunsetSettings(groupby=[workspaces.Config(key) for key in GROUPED_BY])
    return workspaces.Workspace(
        entity=entity, project=settings.project, name=settings.title, sections=sections, runset_settings=grouped
    )


def _build_panel(spec: PanelSpec, panels: Any) -> Any:
    """A panel of `wandb_workspaces.reports.v2`, for `spec`."""
    match spec.kind:
        case "line":
            return panels.LinePlot(title=spec.title, x=spec.x, y=list(spec.keys), log_y=spec.log_y or None)
        case "media":
            return panels.MediaBrowser(title=spec.title, media_keys=list(spec.keys))
        case "bars":
            return panels.BarPlot(title=spec.title, metrics=list(spec.keys))
        case "parallel":
            metrics = [*(panels.Config(key) for key in SETTINGS), *map(panels.SummaryMetric, spec.keys)]
            columns = [panels.ParallelCoordinatesPlotColumn(metric=metric) for metric in metrics]
            return panels.ParallelCoordinatesPlot(title=spec.title, columns=columns)
    fields, name = {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"}, "confusion_matrix/v1"
    if spec.kind == "chart":
        fields, name = {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"}, "lineseries/v0"
    (key,) = spec.keys
    chart = panels.CustomChart.from_table(f"{key}_table", fields, {"title": spec.title})
    chart.chart_name = f"wandb/{name}"
    return chart


def list_panels() -> str:
    """The table of docs/dashboards.md, in Markdown."""
    rows = [("section", "panel", "kind", "shows")]
    for section, specs in SECTIONS.items():
        for spec in specs:
            kind = KINDS[spec.kind] + (f", x `{spec.x}`" if spec.kind == "line" else "")
            shows = ", ".join(f"`{key}`" for key in spec.keys) + (f": {spec.note}" if spec.note else "")
            rows.append((section, spec.title, kind, shows))
    return format_markdown(rows)
