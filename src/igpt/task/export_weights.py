"""`task=export`: writes weights as a Hugging Face folder (`from_pretrained`) or in this project's own format."""

import logging
from pathlib import Path

from igpt.checkpoint import huggingface
from igpt.checkpoint.head_files import copy_head, has_head
from igpt.checkpoint.hub_upload import check_upload, upload_folder
from igpt.checkpoint.igpt_format import save_model
from igpt.distributed import ranks
from igpt.metric.result import Number, Result
from igpt.run.components import Components
from igpt.run.model_card import CARD, write_model_card
from igpt.settings.reading import ExportSettings
from igpt.utils import files

log = logging.getLogger(__name__)


def run(components: Components, settings: ExportSettings) -> Result:
    """Writes `huggingface/` or `igpt/` in the run directory, atomically, with a model card; uploads it (`push`).

    Raises:
        ValueError: Hugging Face's format cannot hold the model: masked pixels, another pixel order, a class head. The
            Hub takes no upload: said before anything is written where a token or the network is missing.
    """
    weights, format, class_head = components.trained_weights, settings.format, settings.class_head
    if format == "huggingface":
        huggingface.check_exportable(weights)
        if class_head and has_head(weights):
            raise ValueError(
                f"{weights.path} has a class head, which Hugging Face's ImageGPT for causal image modelling does not: "
                "task.class_head=false leaves it out, task.format=igpt keeps it"
            )
    if settings.push is not None:
        check_upload(settings.push)
    target = components.run_dir / format
    provenance = {"weights": weights.sha256, "format": format}
    if ranks.this_rank().is_first:
        if target.exists():
            log.info("%s is there, from a run that was stopped after it", target)
        elif format == "huggingface":
            huggingface.write(target, weights)
        else:
            with files.atomic_folder(target) as temporary:
                save_model(temporary, weights.state(), weights.metadata, label="exporting")
                if class_head:
                    copy_head(weights, temporary)
        if not (target / CARD).is_file():
            with_head = format == "igpt" and class_head and has_head(weights)
            write_model_card(target, weights, format=format, has_head=with_head, name=settings.push)
        if settings.push is not None:
            provenance["pushed_to"] = upload_folder(target, settings.push, private=settings.private)
            log.info("%s is at %s", target, provenance["pushed_to"])
    ranks.barrier()
    return Result(
        numbers={"weights": Number(weights.n_parameter, "numbers", 1)},
        files={format: Path(format)},
        provenance=dict(provenance),
    )
