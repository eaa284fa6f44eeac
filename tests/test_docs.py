"""README and docs: links lead somewhere, options exist, commands compose."""

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from igpt.run.arguments import complete_overrides
from igpt.run.early_checks import check_early

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
EVIDENCE = ROOT / "docs" / "evidence"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUPS = [path.name for path in CONF.iterdir() if path.is_dir()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEWCOMER = [
    "pip install -r requirements.txt && python train.py experiment=quickstart",
    "pip install -r requirements-dev.txt && python -m pytest",
]


def list_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in words}


def list_links(page: Path) -> set[str]:
    """Targets of a page's links and pictures that are files of this repository."""
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))
    targets = {*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)}
    return {target for target in targets if not re.match(r"https?:", target)}


def list_commands(page: Path) -> list[str]:
    """The arguments of every command `python train.py …` or `igpt …`, in blocks and in lines, without its comment."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    lines = [line for _, block in BLOCK.findall(text) for line in block.splitlines()]
    lines += [" ".join(each.split()) for each in re.findall(r"`([^`]*)`", BLOCK.sub("", text))]
    found = (re.search(r"(?:^|\s)(?:python train\.py|igpt) (.*)", line) for line in lines)
    return [re.split(r"\s{2,}|\s#\s", match[1])[0] for match in found if match]


def test_the_newcomers_commands_are_the_first() -> None:
    """Invariant: what .ci/run executes, the sh blocks of the README and then of docs/, begins with the two commands."""
    (_, first), *_ = [block for block in BLOCK.findall(PAGES[0].read_text()) if block[0] == "sh"]
    assert first.splitlines() == NEWCOMER
    assert "' README.md docs/*.md |" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere() -> None:
    """Invariant: every file and heading that a page links to is there."""
    broken = []
    for page in PAGES:
        for link in sorted(list_links(page)):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if target.parent.parent == EVIDENCE and not target.parent.exists():
                continue  # a finding without runs yet
            if not target.exists() or (anchor and anchor not in list_anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_every_picture_is_shown() -> None:
    """Invariant: no picture is left that no page shows."""
    shown = {(page.parent / link).resolve() for page in PAGES for link in list_links(page)}
    assert {path.name for path in (ROOT / "docs" / "pictures").iterdir() if path.resolve() not in shown} == set()


def test_options_of_commands_exist() -> None:
    """Invariant: an option that a command chooses is a file of conf/; placeholders are capitals, or `mine`."""
    missing = []
    for page in PAGES:
        for command in list_commands(page):
            for group, values in re.findall(rf"(?<!\S)({'|'.join(GROUPS)})=\[?([\w/,]+)", command):
                for option in values.split(","):
                    if option != "mine" and not option.isupper() and not (CONF / group / f"{option}.yaml").exists():
                        missing.append(f"{page.relative_to(ROOT)}: {group}={option}")
    assert not missing


@pytest.mark.ci
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_compose(page: Path) -> None:
    """Invariant: settings of a command exist, and their values are allowed; runs that it names are not looked at."""
    refused = []
    for command in list_commands(page):
        if any(mark in command for mark in ("…", "$(", "--config-dir", "-sc ", ".nope=")):
            continue
        arguments = shlex.split(re.sub(r"\$\w+", "X", re.sub(r"=(BEST|N)(?!\S)", "=1", command)))
        overrides = [each for each in arguments if re.match(r"(?!init=|resume=|task\.runs=|-)\S+=", each)]
        overrides = [re.sub(r"^\+?trainer\.lightning\.", "++trainer.lightning.", each) for each in overrides]
        if re.search("init=|task.runs=", command) and not re.search(r"(?<!\S)(data|experiment)=", command):
            overrides = ["data=cifar10", *overrides]  # in place of the run's images
        try:
            cfg = complete_overrides(overrides, [CONF])[1]
            check_early(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), {})
        except ValueError as error:
            refused.append(f"{command}: {error}")
    assert not refused
