"""The house: what may import what, which words stand where, and how files are named."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gblm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A modality is a package with a command; everything else is core, some of which has one too.
TOOLS = {"report", "packed", "gains"}
SIDES = tuple(sorted({file.parent.name for file in PACKAGE.glob("*/__main__.py")} - TOOLS))

# From the ground up; what stands on one line may import its own line and those above it here.
LAYERS = [
    ("base",),
    ("kernels",),
    ("maths",),
    ("machine",),
    ("packed",),
    ("report",),
    ("gains",),
    ("walk",),
    ("methods",),
    ("command",),
    SIDES,
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
OUTSIDE = {"eval", "tests"}  # they stand above the package

FORBIDDEN = {"transformers", "timm", "datasets", "torchvision", "lm_eval"}
WORDS = re.compile(r"tokens?|images?", re.IGNORECASE)


def part(module: str) -> str:
    """Return the part of the package a module is in: gblm.llm.data is in llm."""
    return module.split(".")[1] if "." in module else ""


def name_of(file: Path) -> str:
    module = file.relative_to(ROOT).with_suffix("")
    return ".".join(module.parts).removesuffix(".__init__")


MODULES = {name_of(file): file.read_text() for file in FILES}
CORE = [name for name in MODULES if part(name) not in SIDES]


def imports(source: str) -> set[str]:
    """Return every module a source imports, anywhere in it; names of gblm by their module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in whole if name in MODULES}
            found |= modules or {str(node.module)}
    return found


def upward(module: str, source: str) -> list[str]:
    """Return the imports of a module that do not point down."""
    own = {name for name in imports(source) if name.split(".")[0] in {"gblm", *OUTSIDE}}
    if not part(module):  # gblm itself opens the core's doors
        return sorted(name for name in own if part(name) in {*SIDES, "command"})
    return sorted(
        name
        for name in own
        if part(name) not in RANK
        or RANK[part(name)] > RANK[part(module)]
        or (part(name) in SIDES and part(module) in SIDES and part(name) != part(module))
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert not part(module) or part(module) in RANK, f"say in LAYERS where {module} stands"
    assert upward(module, MODULES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gblm.maths.stats", "from gblm.walk.prune import prune"),
        ("gblm.maths.stats", "def late():\n    import gblm.methods"),
        ("gblm.base", "from gblm import stats"),
        ("gblm.maths.stats", "from gblm import Statistics"),
        ("gblm.llm.data", "import gblm.vit.data"),
        ("gblm.vit.data", "from gblm.llm import data"),
        ("gblm.command.side", "from tests import conftest"),
        ("gblm", "from gblm.llm import data"),
    ],
)
def test_the_check_sees_an_import_that_points_up(module, source):
    assert upward(module, source)


def test_no_two_modules_import_each_other():
    below = {name: imports(source) & MODULES.keys() for name, source in MODULES.items()}
    left = {name: set(names) - {"gblm"} for name, names in below.items() if name != "gblm"}
    while free := [name for name, names in left.items() if not names & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle of imports among {sorted(left)}"


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_library_of_models(module):
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & FORBIDDEN


@pytest.mark.parametrize("module", CORE)
def test_the_core_has_no_word_of_one_side(module):
    assert WORDS.findall(MODULES[module]) == []


def test_the_check_sees_a_word_of_one_side():
    assert WORDS.findall("n_tokens = 3  # of the image") == ["tokens", "image"]


def test_no_file_is_named_like_a_module_of_python_or_of_a_dependency():
    taken = set(sys.stdlib_module_names) | FORBIDDEN | {"torch", "numpy", "rich", "utils", "common"}
    names = {file.stem for file in FILES} - {"__init__", "__main__"}
    names |= {file.parent.name for file in FILES} - {"gblm"}
    assert names & taken == set()


@pytest.mark.parametrize("module", MODULES)
def test_every_public_thing_says_what_it_is(module):
    tree = ast.parse(MODULES[module])
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    missing = [node.name for node in public if not ast.get_docstring(node)]
    assert missing == []


def test_the_surface_is_small_and_real():
    import gblm

    assert len(gblm.__all__) <= 20
    assert all(hasattr(gblm, name) for name in gblm.__all__)
