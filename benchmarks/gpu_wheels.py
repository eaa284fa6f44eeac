"""Distributions that a machine without network lacks, and a folder of wheels to take them from.

`requirements.txt` says what igpt needs, `constraints.txt` at which versions. Only the standard library is used: nothing
else may be here yet.
"""

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
BARE = ("torch", "lightning", "torchmetrics", "scikit-learn", "pyarrow", "transformers")  # of a CUDA image
TESTS = ("pytest",)  # of part `tests`, beside requirements.txt
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements() -> list[str]:
    """Names of the distributions that requirements.txt lists, and `TESTS`."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    names = [re.split(r"[\s\[<>=~!;]", line)[0] for line in lines if line and not line.startswith("-")]
    return [normalize(name) for name in (*names, *TESTS)]


def read_constraints() -> dict[str, str]:
    """The version of each distribution in constraints.txt."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {normalize(name): version for name, version in pins}


def parse_needs(lines: Iterable[str]) -> list[str]:
    """Names in Requires-Dist lines that apply to this machine, without extras."""
    needs = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        if "extra" in marker or not _applies(marker.strip()):
            continue
        needs.append(normalize(re.split(r"[\s\[<>=~!(]", requirement.strip())[0]))
    return needs


def _applies(marker: str) -> bool:
    if not marker:
        return True
    try:
        from packaging.markers import Marker
    except ImportError:  # then what the marker would leave out is asked for, too
        return True
    return bool(Marker(marker).evaluate())


def find_installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def list_needed(names: Iterable[str]) -> list[str]:
    """These distributions and all that they need, by what is installed here."""
    needed: dict[str, None] = {}
    open_names = [normalize(name) for name in names]
    while open_names:
        name = open_names.pop()
        if name in needed or (installed := find_installed(name)) is None:
            continue
        needed[name] = None
        open_names += parse_needs(installed.requires or [])
    return sorted(needed)


def list_wheels_to_make(bare: Sequence[str] = BARE, carried: Sequence[str] = ()) -> list[str]:
    """What igpt and its tests need beyond `bare` and what these need: run where everything is installed.

    `carried`: what the image lacks though `bare` needs it here, as with another version of `bare`; their needs, too,
    other than `bare` itself.

    Raises:
        SystemExit: something that requirements.txt lists is not installed here.
    """
    if absent := [name for name in read_requirements() if find_installed(name) is None]:
        raise SystemExit(
            f"{', '.join(absent)}: not installed here; --prepare needs `pip install -r requirements-dev.txt`"
        )
    there = set(list_needed(bare)) - (set(list_needed(carried)) - set(map(normalize, bare)))
    return [name for name in list_needed(read_requirements()) if name not in there]


def is_pure(name: str) -> bool:
    installed = find_installed(name)
    return installed is not None and "Root-Is-Purelib: true" in (installed.read_text("WHEEL") or "")


def describe_commands(folder: Path, names: Sequence[str], python: str) -> list[list[str]]:
    """The pip commands that make the folder.

    Wheels of pure Python are built here, from sources too (antlr4); others are downloaded for the Python and the
    platform of the machine with the GPU.
    """
    versions = read_constraints()
    pins = {name: f"{name}=={versions[name]}" if name in versions else name for name in names}
    pure = [pins[name] for name in names if is_pure(name)]
    compiled = [pins[name] for name in names if not is_pure(name)]
    pip = [sys.executable, "-m", "pip"]
    commands = [[*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), *pure]] if pure else []
    if compiled:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        kind = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
        commands.append([*pip, "download", "--no-deps", *kind, "--dest", str(folder), *compiled])
    return commands


def prepare(folder: Path, bare: Sequence[str], python: str, carried: Sequence[str] = ()) -> None:
    """Fills a folder with wheels, on a machine with a network and everything installed; prints the commands."""
    names = list_wheels_to_make(bare, carried)
    print(f"{len(names)} distributions that an image with {', '.join(bare)} lacks: {', '.join(names)}")
    for command in describe_commands(folder, names, python):
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


def read_wheels(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Of each wheel in a folder: its distribution → its path and what it needs."""
    wheels = {}
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            headers = HeaderParser().parsestr(archive.read(name).decode())
        wheels[normalize(headers["Name"])] = path, parse_needs(headers.get_all("Requires-Dist") or [])
    return wheels


def find_missing(folder: Path | None) -> tuple[list[Path], list[str]]:
    """What is needed and not installed here: the wheels of the folder that bring it, and what it has no wheel of."""
    wheels = read_wheels(folder) if folder else {}
    taken: dict[str, Path] = {}
    absent: list[str] = []
    open_names = read_requirements()
    while open_names:
        name = open_names.pop(0)
        if name in taken or name in absent or find_installed(name) is not None:
            continue
        if name not in wheels:
            absent.append(name)
            continue
        taken[name], needs = wheels[name]
        open_names += needs
    return list(taken.values()), absent


def provide(folder: Path | None, site: Path) -> list[str]:
    """Installs what is missing from a folder of wheels into `site`, for this process and those that it starts.

    Returns what is missing still.
    """
    paths = [str(ROOT / "src"), str(site)]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])
    wheels, absent = find_missing(folder)
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*pip, "--target", str(site), *map(str, wheels)], check=True)
    return absent
