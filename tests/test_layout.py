"""The shape of the code, held by its syntax trees: who imports whom, and that every flag is described and read."""
import ast
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"step", "data", "codec", "shapes", "ckpt", "log", "parallel"}
STAGES = ("prepare", "train", "distill", "sample", "export", "evaluate", "bench")
IMPORTS = {  # every file and what it may import of ours: a new file takes its place here
    "kernels": set(),
    "attention": {"kernels"},
    **dict.fromkeys(LEAVES, set()),
    "model": {"attention"},
    **dict.fromkeys(STAGES, LEAVES | {"attention", "model"}),
}
FILES = sorted(ROOT.glob("*.py"))
ROOTS = [path for path in FILES if "class Config" in path.read_text()]
FLAGS = 40


def imported(path):
    """Names of all modules that a file imports, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def fields(path):
    """{name: line} of the fields of a root's Config."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    config = next(node for node in classes if node.name == "Config")
    return {node.target.id: node.end_lineno for node in config.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_imports_only_what_the_table_allows(path):
    assert path.stem in IMPORTS, f"{path.name} has no place in the table of imports"
    ours = {name.split(".")[0] for name in imported(path)} & IMPORTS.keys()
    assert ours <= IMPORTS[path.stem], f"{path.name} imports {sorted(ours - IMPORTS[path.stem])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_parallel_says_torch_distributed(path):
    said = {name for name in imported(path) if name.startswith("torch.distributed")}
    said |= {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"}
    assert bool(said) == (path.stem == "parallel"), said


@pytest.mark.parametrize("path", ROOTS, ids=lambda path: path.name)
def test_every_flag_is_read_by_its_root(path):
    read = {node.attr for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg"}
    assert not fields(path).keys() - read


@pytest.mark.parametrize("path", ROOTS, ids=lambda path: path.name)
def test_every_flag_has_a_comment_which_is_its_help(path):
    with open(path, "rb") as file:
        commented = {token.start[0] for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT}
    assert not [name for name, line in fields(path).items() if line not in commented]


@pytest.mark.parametrize("path", ROOTS, ids=lambda path: path.name)
def test_a_root_has_no_more_flags_than_one_can_read(path):
    assert len(fields(path)) <= FLAGS
