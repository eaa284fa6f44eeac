"""The steps of a training as weights: those kept for good, checkpoints, the last; or the steps of a release."""

from pathlib import Path

from igpt.checkpoint import openai
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import CONFIG, Weights
from igpt.checkpoint.resume import find_checkpoints, find_kept, parse_step
from igpt.utils import files


def list_paths(place: Path | str) -> list[str]:
    """What `init=` takes for each step of a training, each step once, the earliest first and the final weights last.

    `place`: a pretraining run, finished or not: the steps it keeps for good (`task.keep_steps`), its checkpoints and
    `model/`. Or a folder of folders with weights, as OpenAI's `igpt-s/` with its steps. Anything else: itself.
    """
    folder = Path(place)
    by_step = {parse_step(path): path for path in find_checkpoints(folder)} | find_kept(folder)
    final = folder / "model"
    if (final / CONFIG).is_file():
        config = files.read_json(final / CONFIG)
        last = config.get("step") if isinstance(config, dict) else None
        by_step = {step: path for step, path in by_step.items() if step != last}
        return [*(str(by_step[step]) for step in sorted(by_step)), str(final)]
    if by_step:
        return [str(by_step[step]) for step in sorted(by_step)]
    if folder.is_dir() and not _has_weights(folder) and not (folder / "run.json").is_file():
        inside = [path for path in folder.iterdir() if path.is_dir() and _has_weights(path)]
        return [str(path) for path in sorted(inside, key=lambda path: (len(path.name), path.name))] or [str(place)]
    return [str(place)]


def _has_weights(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or openai.find_prefix(folder) is not None


def list_weights(run: Path | str, *, palette: str | None = None) -> list[Weights]:
    """The weights at each of `list_paths`, by step; the final ones of a run last. `palette`: as of `find_weights`.

    Raises:
        ValueError: no weights, or damaged ones.
    """
    return sorted(
        (find_weights(path, palette=palette) for path in list_paths(run)), key=lambda weights: weights.metadata.step
    )
