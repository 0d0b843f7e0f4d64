"""House rules that no linter knows: sizes, docstrings, words, and that documents, metadata and code agree."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from d4_core.config import PRESETS, Preset
from d4_datasets.contract import Action, Align, Contract, Episode, Files, Observation, Reward, Tasks

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCRIPTS = [ROOT / name for name in ("bin/setup", "bin/demo", "bin/test", ".ci/run")]

MOST_LINES, LONGEST_FUNCTION = 600, 60
BANNED = ("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")  # put together, so that this file may hold them
LEFTOVERS = (".tmp-", ".old-")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    """Path as it is shown in test names."""
    return str(path.relative_to(ROOT))


def definitions(path: Path) -> Iterator[tuple[str, Definition, bool]]:
    """(dotted name, node, is it public) of all functions and classes of a file, nested ones too."""

    def walk(node: ast.AST, prefix: str, is_public: bool) -> Iterator[tuple[str, Definition, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                public = is_public and not child.name.startswith("_") and not is_function
                yield prefix + child.name, child, public
                yield from walk(child, f"{prefix}{child.name}.", public)
            else:
                yield from walk(child, prefix, is_public)

    yield from walk(ast.parse(path.read_text()), "", True)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
    limit = LONGEST_FUNCTION if path in SOURCES else 2 * LONGEST_FUNCTION
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node, _ in definitions(path)
               if not isinstance(node, ast.ClassDef)}  # fmt: skip
    assert {name: length for name, length in lengths.items() if length > limit} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_everything_public_is_documented(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "the module has no docstring"
    protocol_stubs = {"..."}
    missing = [
        name
        for name, node, is_public in definitions(path)
        if is_public and not ast.get_docstring(node) and ast.unparse(node.body[-1]) not in protocol_stubs
    ]
    assert missing == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_signatures_are_annotated(path: Path) -> None:
    bare = []
    for name, node, is_public in definitions(path):
        if not is_public or isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare += [
            f"{name}({a.arg})" for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
        ]
        bare += [f"{name} returns"] * (node.returns is None)
    assert bare == []


@pytest.mark.parametrize("path", [*SOURCES, *TESTS, *DOCS, *SCRIPTS], ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    text = path.read_text()
    assert [word for word in BANNED if re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_punctuation_is_ascii(path: Path) -> None:
    assert sorted(set(re.findall("[\u2010-\u2027\u2030-\u205e]", path.read_text()))) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_executable_and_parse(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)


def test_commands_exist_and_are_documented() -> None:
    commands = PROJECT["project"]["scripts"]
    for target in commands.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))
    readme = (ROOT / "README.md").read_text()
    assert [name for name in commands if name not in readme] == []
    for path in DOCS:
        if path.name != "CHANGELOG.md":
            named = set(re.findall(r"(?<![\w/.-])d4-[a-z]+\b(?![-/])", path.read_text()))
            assert sorted(named - commands.keys()) == [], f"{path} names commands that do not exist"


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=name_of)
def test_guides_open_with_a_command(path: Path) -> None:
    paragraphs = re.split(r"\n\s*\n", path.read_text().strip())
    assert paragraphs[0].startswith("# ")
    assert any(block.lstrip().startswith("```") for block in paragraphs[1:3])


def test_every_dependency_says_what_it_is_for() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(item for extra in extras for item in extra)]
    plain = ("pytest", "pytest-cov", "ruff", "mypy", "types-PyYAML")  # known to everyone who runs the tests
    silent = []
    for item in wanted:
        line = next(line for line in lines if f'"{item}"' in line)
        if "#" not in line and re.match(r"[\w-]+", item)[0] not in plain:
            silent.append(item)
    assert silent == []


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_what_is_imported_is_declared() -> None:
    owners = packages_distributions()
    extras = PROJECT["project"]["optional-dependencies"].values()
    items = [*PROJECT["project"]["dependencies"], *(item for extra in extras for item in extra)]
    declared = {re.match(r"[\w-]+", item)[0].lower() for item in items}
    own = {package.name for package in PACKAGES}
    foreign = set().union(*map(imported, SOURCES)) - sys.stdlib_module_names - own - {"__future__"}
    undeclared = {n for n in foreign if n in owners and not {o.lower() for o in owners[n]} & declared}
    assert sorted(undeclared) == []


def test_a_wheel_holds_what_the_code_reads() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    files = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    sources = [
        str(path.relative_to(package.parent)) for package in PACKAGES for path in package.rglob("*.py")
    ]
    data = ["d4_sim/yard.xml", "d4_sim/yard.yaml", "d4_core/report_style.css", "d4_core/report_template.html"]
    data += ["d4_datasets/audit_page.css", "d4_datasets/audit_page.html", "d4_sim/crafter/crafter.yaml"]
    data += [f"d4_sim/luanti/mod/d4_room/{name}" for name in ("init.lua", "mod.conf")]
    assert sorted({*sources, *data} - files) == []


def test_the_working_tree_holds_no_leftovers() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [Path(line) for line in done.stdout.splitlines()]
    assert [str(f) for f in files if any(part.startswith(LEFTOVERS) for part in f.parts)] == []
    assert [str(f) for f in files if (ROOT / f).exists() and (ROOT / f).stat().st_size > 10_000_000] == []


def code_blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_contracts_in_documents_are_valid() -> None:
    found = [
        Contract.from_dict(yaml.safe_load(block), source=str(path))
        for path in DOCS for block in code_blocks(path, "yaml") if block.startswith("name:")
    ]  # fmt: skip
    assert "my_robot" in {contract.name for contract in found}


def test_the_contract_guide_explains_every_key() -> None:
    text = (ROOT / "docs" / "contract.md").read_text()
    kinds = (Contract, Observation, Action, Align, Tasks, Reward, Episode, Files)
    keys = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert sorted(key for key in keys if not re.search(rf"`(\w+\.)?{key}[`.]", text)) == []


def test_the_training_guide_agrees_with_the_presets() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \| `([^`]+)` \|", text, re.MULTILINE)
    assert len(rows) > 5
    for option, default, nano in rows:
        for preset, shown in ((Preset(), default), (PRESETS["nano"], nano)):
            value = reduce(getattr, option.split("."), preset)
            assert json.loads(shown) == value, f"{option} is {value}"
    assert [name for name in PRESETS if f"`{name}`" not in text] == []


def gates_in_code() -> Iterator[tuple[str, str | None]]:
    """(constant beginning of its name, limit as text or None where it is computed) of all gates."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Gate":
                name, _, operator, limit = node.args[:4]
                first = name.values[0] if isinstance(name, ast.JoinedStr) else name
                if isinstance(first, ast.Constant):
                    known = isinstance(operator, ast.Constant) and isinstance(limit, ast.Constant)
                    yield first.value, f"{operator.value} {limit.value:g}" if known else None


def test_the_gates_guide_has_every_gate_with_its_limit() -> None:
    rows = [line for line in (ROOT / "docs" / "gates.md").read_text().splitlines() if line.startswith("| ")]
    found = list(gates_in_code())
    assert len(found) > 10
    for name, limit in found:
        row = next((row for row in rows if row.startswith(f"| {name}")), None)
        assert row is not None, f"docs/gates.md does not explain the gate {name!r}"
        assert limit is None or f"| {limit} |" in row, f"{name}: the limit is {limit}"


def test_tests_run_with_the_models_that_worlds_are_made_of() -> None:
    """The versions of the extra [suite], by which results compare."""
    suite = PROJECT["project"]["optional-dependencies"]["suite"]
    assert f"for models in {' '.join(suite)}; do" in (ROOT / "bin" / "test").read_text()
