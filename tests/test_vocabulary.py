"""The field's words: no name of the private dialect is left in code, settings, docs or tests."""

import ast
import io
import json
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "igpt"
# where old names must stand: the table by which older runs are read, its tests, the answer to an old setting, this list
EXEMPT = {"config_changes.py", "older_configs.py", "test_older_configs.py", "test_vocabulary.py"}

# names that stand nowhere: today's word → the field's
GONE = {
    "keeps_a_run": "writes_run_dir",
    "looked_at": "run_interactive",
    "carried_out": "execute_task",
    "perform": "run_and_report",
    "said": "message, predictions",
    "_said": "message, predictions",
    "whole": "full, complete",
    "theirs": "other, saved, reference",
    "chosen_folder": "resolve_run_dir",
    "began_with": "init_provenance",
    "made_by": "cache_key",
    "on_the_way": "read_training_checkpoint",
    "shape_of": "meta_model",
    "attention_apart": "unfused_attention_backend",
    "natively": "_c_step",
    "by_columns": "_torch_cpu_step",
    "_newest": "_decode_step",
    "_remember": "_update_kv_cache",
    "kept_at": "library_path",
    "item_keys": "per_example_keys",
    "Raster": "PixelOrder",
    "EndlessBatches": "InfiniteBatchSampler",
    "OncePerImage": "EvalBatchSampler",
    "Lane": "ShardReader",
    "Place": "ReaderState",
    "Dealt": "ShardAssignment",
    "dealt": "assign_shards",
    "_Shelf": "PixelCacheDir",
    "strengths": "C_grid",
    "_Guess": "_Preconditioner",
    "ProbeWhileTraining": "OnlineLinearProbe",
    "Machine": "HardwareConfig",
    "reading_plan": "eval_batch_layout",
    "hold_memory": "disable_malloc_trim",
    "from_first": "broadcast_from_rank0",
    "Agreement": "AsyncMax",
    "hold_lifeline": "die_with_parent",
    "deaf": "ignore_signals",
    "MEETING": "RENDEZVOUS_FILE",
    "TELL": "RUN_DIR_FILE",
    "n_colour": "palette_size",
    "checkpoint_in_pieces": "sharded_checkpoint",
}
# common words that name no function, class, method, attribute or constant of src/ and benchmarks/
UNDEFINED = {
    "alone", "factory", "image_nats", "Build", "Origin", "together", "put", "products", "stepping",
    "growing", "prompted", "residuals",
    "given", "fitted", "Read", "searched", "chosen", "look", "times", "remaining", "made", "tally", "publish",
    "validated", "_expect", "gathered", "joined", "heard", "listening", "sums", "fold", "concat", "untrained", "needs",
    "scheduled", "checkpoint_in_pieces", "stated", "found_compiler", "trained", "planned", "held", "kept", "hashed",
    "opened", "listed", "converted", "exported", "downloaded", "thinned", "embedded", "shortened", "grouped", "shifted",
    "verified", "pooled", "reserved", "Found", "needed", "room", "inputs",
    "stacked", "turned", "resized", "_bracketed", "_rounded", "_counted", "timed", "interleaved", "applied",
    "shown", "passed", "_naming",
}  # fmt: skip
# a setting's old name, as it would be written on the command line or in a message → its new one
SETTINGS = {
    r"task\.(gen|clf)": "task.loss_weights",
    r"task\.masks": "task.eval_masks",
    r"task\.strengths": "task.C_grid",
    r"task\.beside": "task.compare_with",
    r"task\.(pixels|untrained)": "task.baselines",
    r"task\.concat": "task.concat_layers",
    r"task\.needs": "task.requires",
    r"data\.n_colour": "data.palette_size",
    r"(data\.)?stream\.held": "data.stream.held_in_memory",
    r"(data\.)?stream\.lanes": "data.stream.num_readers",
    r"trainer\.checkpoint_in_pieces": "trainer.sharded_checkpoint",
    r"trainer\.attention": "trainer.attention_backend",
    r"(?<![\w.])force=(true|false)": "rerun",
}
# keys that no YAML file of the group has at the start of a line, however far in
KEYS = {
    "task": ("gen:?", "clf:?", "masks", "strengths", "beside", "pixels", "untrained", "concat", "needs"),
    "experiment": ("masks", "strengths", "beside", "pixels", "untrained", "concat", "needs", "n_colour"),
    "data": ("n_colour", "held", "lanes"),
    "trainer": ("checkpoint_in_pieces", "attention"),
    ".": ("force",),
}


def read_sources(*tops: str) -> Iterator[tuple[Path, str]]:
    for top in tops:
        for path in [ROOT / top] if (ROOT / top).is_file() else sorted((ROOT / top).rglob("*.py")):
            if path.name not in EXEMPT and path.parent.name != "older_runs":
                yield path, path.read_text()
    if "notebooks" in tops:
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            cells = json.loads(path.read_text())["cells"]
            yield path, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def list_identifiers(source: str) -> set[str]:
    return {t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.NAME}


def list_definitions(source: str) -> Iterator[tuple[str, int]]:
    """Names of functions, classes, methods, module constants and attributes that a class declares or sets."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        for node in scope.body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            for target in targets:
                yield from ((name.id, name.lineno) for name in ast.walk(target) if isinstance(name, ast.Name))


def test_no_identifier_of_the_dialect() -> None:
    """Invariant: none of the vocabulary's old names is a name in code, tests, benchmarks or notebooks."""
    left = {
        f"{path.relative_to(ROOT)}: {name} (the field says {GONE[name]})"
        for path, source in read_sources("src", "tests", "benchmarks", "notebooks", "train.py")
        for name in list_identifiers(source) & GONE.keys()
    }
    assert not left


def test_no_definition_by_a_participle() -> None:
    """Invariant: what is defined is not called by a word of the dialect that a variable may well have."""
    left = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, source in read_sources("src", "benchmarks")
        for name, line in list_definitions(source)
        if name in UNDEFINED
    }
    assert not left


def test_functions_are_not_called_by_what_they_are_of() -> None:
    """Invariant: a function is a verb and its object: none ends in `_of` or begins with `of_`."""
    left = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path, source in read_sources("src", "tests", "benchmarks", "train.py")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("test_")
        and re.search(r"_of$|^_?of(_|$)", node.name)
    }
    assert not left


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_by_its_old_name(setting: str) -> None:
    """Invariant: commands, messages and prose write a setting as it is called."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml")]
    files += [*SRC.rglob("*.html"), *(ROOT / "notebooks").glob("*.ipynb")]
    texts = [(path, path.read_text()) for path in files] + list(read_sources("src", "tests", "benchmarks", "train.py"))
    pattern = re.compile(rf"{setting}(?![\w])".replace(r"\.", r"\\?\."))
    left = {str(path.relative_to(ROOT)) for path, text in texts if pattern.search(text)}
    assert not left, f"the setting is {SETTINGS[setting]}"


@pytest.mark.parametrize("group", KEYS)
def test_no_key_of_the_dialect_in_conf(group: str) -> None:
    """Invariant: no old key in a config group; gen and clf stand below loss_weights alone."""
    paths = sorted((ROOT / "conf" / group).glob("*.yaml") if group == "." else (ROOT / "conf" / group).rglob("*.yaml"))
    left = set()
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for key in KEYS[group]:
                top_alone = key.endswith(":?")  # such a key is only wrong at the top
                if re.match(rf"{'' if top_alone else ' *'}{key.removesuffix(':?')}:", line):
                    left.add(f"{path.relative_to(ROOT)}:{number}: {line}")
    assert paths
    assert not left


def test_one_name_means_one_thing() -> None:
    """Invariant: no two modules and no two public classes of igpt share a name; little lies loose."""
    modules, classes = defaultdict(list), defaultdict(list)
    for path in sorted(SRC.rglob("*.py")):
        if path.stem != "__init__":
            modules[path.stem].append(str(path.relative_to(SRC)))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(str(path.relative_to(SRC)))
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}
    assert {name: where for name, where in classes.items() if len(where) > 1} == {}
    assert {path.name for path in SRC.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "hub.py"}
