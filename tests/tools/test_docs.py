"""The pages: their code runs, the files and tests that they name exist."""

import ast
import doctest
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from scripts import ROOT, output_of

import moe_ext

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_plan_on_the_concepts_page_is_the_plan_of_its_ids():
    expert_ids = torch.tensor([[2, 0], [0, 1], [2, 1], [2, 0]], dtype=torch.int32)
    plan = moe_ext.make_plan(expert_ids, 3, 2)
    text = (ROOT / "docs" / "concepts.md").read_text()
    for t, (ids, slots) in enumerate(zip(expert_ids.tolist(), plan.slots.tolist(), strict=True)):
        row = rf"t{t} +{ids[0]} {ids[1]} +t{t} +{slots[0]} +{slots[1]} "
        assert re.search(row, text), row
    for row, route in enumerate(plan.sources.tolist()):
        assert f"row {row}  route {route} (t{route // 2}, k{route % 2})" in text
    for e, offset in enumerate(plan.offsets.tolist()[:3]):
        assert f"e{e} from {offset}\n" in text
    assert f"load  {' '.join(map(str, plan.load.tolist()))} " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_and_files_exist(page):
    text = page.read_text()
    last = None
    for name, function in re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)?(?:::(\w+))?`", text):
        if not name and not function:
            continue
        last = name or last
        (path,) = (ROOT / "tests").rglob(last)
        assert not function or f"def {function}(" in path.read_text(), (last, function)
    for name in re.findall(r"`((?:examples|bench|csrc|tests|moe_ext)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_import_what_there_is(page):
    tree = ast.parse("\n".join(python_blocks(page)), page.name)
    compile(tree, page.name, "exec")
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
        if "moe_ext" in text and "transformers" not in text:
            if "moe_ext.hf" in text:
                pytest.importorskip("transformers", reason="needs the extra peers")
            exec(text, {})


def test_every_page_asks_for_the_same_setuptools():
    pages = [ROOT / name for name in ("pyproject.toml", "Makefile", "README.md")]
    pages += (ROOT / "docs").glob("*.md")
    asked = [re.findall(r'"(setuptools[<>=][^"]*)"', page.read_text()) for page in pages]
    assert {one for some in asked for one in some} == {"setuptools>=77,<82"}


def save_small_mixtral(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_local_experts": 4}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes)).save_pretrained(folder)


def test_every_block_of_the_readme_runs(tmp_path, monkeypatch):
    """The block for transformers only where it is installed."""
    blocks = python_blocks(ROOT / "README.md")
    if importlib.util.find_spec("transformers"):
        save_small_mixtral(tmp_path)
    else:
        blocks = [block for block in blocks if "transformers" not in block]
    names = {"path": tmp_path}
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name, value in {"MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    try:
        for block in blocks:
            exec(block, names)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_the_first_layer_is_causal_and_drops_nothing(training):
    names: dict = {}
    exec(python_blocks(ROOT / "README.md")[0], names)
    layer, hidden, k = names["layer"].train(training), names["hidden"], names["gate"].k
    assert all(p.grad is not None for p in layer.parameters())
    length = hidden.shape[1] // 3
    torch.testing.assert_close(layer(hidden[:, :length]), layer(hidden)[:, :length])
    plan = layer.gate.route(hidden.flatten(0, 1)).plan
    assert (plan.slots >= 0).all()
    assert plan.kept().sum() == layer.exp_counts.sum() == k * hidden[..., 0].numel()


def test_grouped_experts_replace_deepspeed_experts_with_equal_outputs():
    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

        def forward(self, x):
            return self.down(torch.nn.functional.gelu(self.up(x)))

    moe, hidden = moe_ext.MoE(8, Expert(), 4), torch.randn(20, 8)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    moe.eval()
    before = moe(hidden)[0]
    text = (ROOT / "docs" / "deepspeed.md").read_text().split("## Faster experts")[1]
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {"moe": moe})
    torch.testing.assert_close(moe(hidden)[0], before)


def entries() -> dict[str, list[str]]:
    """The entries of the API page, each with the members it lists; none means all."""
    text = (ROOT / "docs" / "api.md").read_text()
    found = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.M)
    chosen = {name: re.search(r"members: \[(.*)\]", options) for name, options in found}
    return {name: match[1].split(", ") if match else [] for name, match in chosen.items()}


def test_every_public_name_is_on_the_api_page():
    names = set(entries())
    hidden = {"build", "ops"}
    assert {f"moe_ext.{name}" for name in set(moe_ext.__all__) - hidden} <= names


def shown(name: str, members: list[str]) -> Iterator[tuple[str, object]]:
    """The classes, functions and methods of an entry that have arguments to describe."""
    what = pkgutil.resolve_name(name)
    if inspect.ismodule(what):
        own = {k: v for k, v in vars(what).items() if getattr(v, "__module__", "") == what.__name__}
        for member in members or [k for k in own if not k.startswith("_")]:
            one = getattr(what, member)
            if inspect.isclass(one) or inspect.isfunction(one):
                yield from shown(f"{name}.{member}", [])
        return
    yield name, what
    for member, value in vars(what).items() if inspect.isclass(what) else ():
        method = inspect.unwrap(getattr(value, "__func__", value))
        if inspect.isfunction(method) and method.__doc__ and not member.startswith("_"):
            yield f"{name}.{member}", method


def arguments_of(what) -> tuple[str, list[str]]:
    """The section of a docstring that describes the arguments, and their names."""
    if hasattr(what, "_fields"):
        return "Attributes", list(what._fields)
    has_arguments = not inspect.isclass(what) or "__init__" in vars(what)
    names = inspect.signature(what).parameters if has_arguments else {}
    return "Args", [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("entry", entries())
def test_the_api_page_describes_every_argument(entry):
    if entry.startswith("moe_ext.hf."):
        pytest.importorskip("transformers", reason="needs the extra peers")
    for name, what in shown(entry, entries()[entry]):
        text = inspect.cleandoc(what.__doc__ or "")
        section, names = arguments_of(what)
        found = re.search(rf"^{section}:\n((?: {{4}}.*\n?|\n)+)", text, re.M)
        described = re.findall(r"^ {4}\*{0,2}(\w+): ", found[1], re.M) if found else []
        assert described == names, name
        # Outside of backticks a page treats it as an HTML tag, and shows nothing.
        assert not re.search(r"<\w", re.sub(r"`[^`]*`", "", text)), name


def test_docstring_examples_run():
    (example,) = doctest.DocTestFinder(recurse=False).find(moe_ext.TopKGate, globs={})
    failed, attempted = doctest.DocTestRunner().run(example)
    assert attempted > 0
    assert failed == 0


def test_dir_lists_the_public_names_and_no_others():
    names = {name for name in dir(moe_ext) if not name.startswith("__")}
    assert names == set(moe_ext.__all__)
    assert "__version__" in dir(moe_ext)


def test_lazy_modules_are_attributes():
    """The import of a package with its library does not warn."""
    names = ("deepspeed", "plot", "sinks")
    lines = "".join(f"print(moe_ext.{name}.__name__)\n" for name in names)
    start = (
        "import warnings\nwith warnings.catch_warnings(record=True) as caught:\n import moe_ext\n"
    )
    check = "assert not [w for w in caught if 'moe_ext' in str(w.message)], caught\n"
    printed = output_of("-W", "always", "-c", start + check + lines).split()
    assert [name.rpartition(".")[2] for name in printed] == list(names)


def test_every_public_name_has_a_docstring():
    for name in moe_ext.__all__:
        assert (getattr(moe_ext, name).__doc__ or "").strip(), name
