"""The shape of the code, held by its syntax trees: who imports whom, how long a story is, that every flag is read."""
import ast
import tokenize
from collections import Counter
from functools import cache

import pytest

from conftest import ROOT

LEAVES = {"step", "data", "codec", "films", "shapes", "ckpt", "log", "parallel", "flags", "signs", "viewer"}
STAGES = ("prepare", "train", "distill", "sample", "export", "evaluate", "bench", "demo")
IMPORTS = {  # every file and what it may import of ours: a new file takes its place here
    "attention": set(),
    **dict.fromkeys(LEAVES, set()),
    "model": {"attention"},
    "store": {"data"},
    "plan": {"model", "parallel", "data"},
    **dict.fromkeys(STAGES, LEAVES | {"attention", "model", "store", "plan"}),
}
FILES = sorted(ROOT.glob("*.py"))
ROOTS = [path for path in FILES if "class Config" in path.read_text()]
LONGEST = {"train": 65, "distill": 90}    # lines of main; any other function there has 65 at most


@cache
def tree(path):
    """A file's syntax tree."""
    return ast.parse(path.read_text())


def imported(path):
    """Names of all modules that a file imports, at its top or in a function."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def fields(path):
    """{name: line} of the fields of a root's Config."""
    classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
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
    said |= {ast.unparse(node) for node in ast.walk(tree(path))
             if isinstance(node, ast.Attribute) and node.attr == "distributed"} & {"torch.distributed"}
    assert bool(said) == (path.stem == "parallel"), said


@pytest.mark.parametrize("path", ROOTS, ids=lambda path: path.name)
def test_every_flag_is_read_by_its_root_or_by_what_it_hands_its_flags_to(path):
    read = set()
    for file in (path, *(ROOT / f"{name}.py" for name in {"flags", "plan"} & imported(path))):
        read |= {node.attr for node in ast.walk(tree(file))
                 if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg"}
    assert not fields(path).keys() - read


@pytest.mark.parametrize("path", ROOTS, ids=lambda path: path.name)
def test_every_flag_has_a_comment_which_is_its_help(path):
    with open(path, "rb") as file:
        commented = {token.start[0] for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT}
    assert not [name for name, line in fields(path).items() if line not in commented]


@pytest.mark.parametrize("root", LONGEST)
def test_no_function_of_a_story_is_longer_than_its_page(root):
    functions = [node for node in ast.walk(tree(ROOT / f"{root}.py"))
                 if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths.pop("main") <= LONGEST[root]
    assert not {name: lines for name, lines in lengths.items() if lines > 65}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_name_of_a_module_is_defined_twice(path):
    """A merge that keeps both sides of a change leaves two of one name, imported or not, of which the first is dead."""
    body = tree(path).body
    names = Counter(node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
    assert not [name for name, times in names.items() if times > 1 and name != "_"]
