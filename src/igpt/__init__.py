"""Image GPT as an experiment repository. From Python: `igpt.load(path or Hub name)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igpt.hub import ImageGPT, load

__version__ = "0.2.0"  # what a change of it means: CHANGELOG.md
__all__ = ["ImageGPT", "load"]


def __getattr__(name: str) -> Any:
    """`load` and what it returns, imported when they are asked for: the commands do without."""
    if name not in __all__:
        raise AttributeError(f"igpt has no {name}")
    from igpt import hub

    return getattr(hub, name)
