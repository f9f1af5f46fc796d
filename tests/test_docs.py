"""What the pages say that can be checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_ext

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_drawing_is_of_this_plan():
    experts = torch.tensor([[2, 0], [0, 1], [2, 1], [2, 0]], dtype=torch.int32)
    plan = moe_ext.make_plan(experts, 3, 2)
    text = (ROOT / "docs" / "concepts.md").read_text()
    for t, (ids, slots) in enumerate(zip(experts.tolist(), plan.slots.tolist(), strict=True)):
        row = rf"t{t} +{ids[0]} {ids[1]} +t{t} +{slots[0]} +{slots[1]} "
        assert re.search(row, text), row
    for row, route in enumerate(plan.sources.tolist()):
        assert f"row {row}  route {route} (t{route // 2}, k{route % 2})" in text
    for e, offset in enumerate(plan.offsets.tolist()[:3]):
        assert f"e{e} from {offset}\n" in text
    assert f"load  {' '.join(map(str, plan.load.tolist()))} " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_files_that_are_named_are_there(page):
    text = page.read_text()
    last = None
    for name, function in re.findall(r"`(?:tests/)?(test_\w+\.py)?(?:::(\w+))?`", text):
        if not name and not function:
            continue
        last = name or last
        path = ROOT / "tests" / last
        assert path.exists(), last
        assert not function or f"def {function}(" in path.read_text(), (last, function)
    for name in re.findall(r"`((?:examples|bench|csrc|tests|moe_ext)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def python_blocks(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_code(page):
    compile(python_blocks(page), page.name, "exec")


def test_one_setuptools_is_asked_for_everywhere():
    pages = [ROOT / "pyproject.toml", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    asked = [re.findall(r'"(setuptools[<>=][^"]*)"', page.read_text()) for page in pages]
    assert {one for some in asked for one in some} == {"setuptools>=77,<82"}


def test_the_first_layer_runs():
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        first = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
        done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_faster_experts_give_the_same():
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


def test_every_public_name_is_on_the_api_page():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in moe_ext.__all__:
        what = getattr(moe_ext, name)
        if type(what).__name__ == "module" and name in ("build", "ops"):
            continue
        assert f"::: moe_ext.{name}\n" in text, name


def test_dir_lists_the_public_names_and_no_others():
    names = {name for name in dir(moe_ext) if not name.startswith("__")}
    assert names == set(moe_ext.__all__)
    assert "__version__" in dir(moe_ext)


def test_every_public_name_has_a_docstring():
    for name in moe_ext.__all__:
        assert (getattr(moe_ext, name).__doc__ or "").strip(), name
