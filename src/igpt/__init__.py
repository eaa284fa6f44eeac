"""Image GPT as an experiment repository. From Python: `igpt.load(path or Hub name)`."""

from typing import TYPE_CHECKING, Any

from igpt.distributed.spinning import limit_spinning

if TYPE_CHECKING:
    from igpt.hub import ImageGPT, load

__version__ = "0.2.0"  # what a change of it means: CHANGELOG.md
__all__ = ["ImageGPT", "load"]

limit_spinning()  # here, as it has an effect only before PyTorch is imported


def __getattr__(name: str) -> Any:
    """`load` and what it returns, imported when they are asked for: the commands do without."""
    if name not in __all__:
        raise AttributeError(f"igpt has no {name}")
    from igpt import hub

    return getattr(hub, name)
