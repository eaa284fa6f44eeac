"""A second dataset beside that of `data`: the images that a task probes (`task.probe_data`)."""

from igpt.run.components import Components
from igpt.run.run_config import RunConfig

PLACE = "data@task.probe_data"  # the choice of an option for it


def build_probe_components(components: Components) -> Components:
    """The parts of a run whose `data` is `task.probe_data`, else as of `components`: the same weights and caches.

    Raises:
        ValueError: settings or images that cannot be read, or that the weights do not.
    """
    cfg = components.run.cfg.copy()
    cfg.data, cfg.task.probe_data = cfg.task.probe_data, None
    cfg.task.runs = cfg.task.runs[:1]
    choices = {**components.run.choices, "data": components.run.choices.get(PLACE)}
    try:
        probed = Components(RunConfig(cfg, choices))
        probed.check_settings()
        assert probed.source  # is built
        assert probed.tokenizer  # compares the resolution with that of the weights
    except ValueError as error:
        raise ValueError(f"task.probe_data: {error}") from error
    probed.run_dir = components.run_dir
    return probed
