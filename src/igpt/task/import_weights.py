"""`task=import`: converts OpenAI's, Hugging Face's or sharded weights, or a step of a run, to a run's `model/`."""

from pathlib import Path

from igpt.checkpoint.head_files import copy_head
from igpt.checkpoint.igpt_format import save_model
from igpt.distributed import ranks
from igpt.metric.result import Number, Result
from igpt.run.components import Components
from igpt.settings.reading import ImportSettings


def run(components: Components, settings: ImportSettings) -> Result:
    """Writes the weights in this project's format, tensor by tensor, with their class head if any.

    The settings concern OpenAI's checkpoints and are applied when the weights are opened.
    """
    weights = components.trained_weights
    target = components.run_dir / "model"
    if ranks.this_rank().is_first:
        save_model(target, weights.state(), weights.metadata, label="importing")
        copy_head(weights, target)
    ranks.barrier()
    return Result(
        numbers={"weights": Number(weights.n_parameter, "numbers", 1)},
        files={"weights": Path("model")},
        provenance={"from": str(weights.path), "sha256": weights.sha256},
    )
