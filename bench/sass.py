"""Count the machine instructions of kernels, in the text that NVIDIA's disassembler writes."""

import graphlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FUNCTION = re.compile(r"^\.text\.(\w+):$")
LABEL = re.compile(r"^(\.L_x_\d+):$")
INSTRUCTION = re.compile(
    r"^\s*(?:/\*[0-9a-f]{4,}\*/)?\s*(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*);$"
)
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP")


def is_tensors(opcode: str) -> bool:
    return opcode.startswith(("HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "UTCHMMA"))


def is_access(opcode: str) -> bool:
    """Whether it reads or writes global memory."""
    return opcode.startswith(("LDG", "STG"))


def is_vector(opcode: str) -> bool:
    """Whether it reads or writes 16 bytes of global memory."""
    return is_access(opcode) and ".128" in opcode


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may come next or before."""

    opcodes: list[str] = field(default_factory=list)
    target: str | None = None  # of a branch at its end
    falls: bool = True  # whether the block behind it may come next
    next: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)

    def count(self, kind: Callable[[str], bool]) -> int:
        return sum(map(kind, self.opcodes))


def disassembler(toolkit: Path) -> Path:
    """The toolkit's nvdisasm, or that of the nvidia-cuda-nvdisasm package."""
    packages = Path(sysconfig.get_path("purelib"))
    places = [toolkit / "bin", *sorted(packages.glob("nvidia/*/bin"), reverse=True)]
    for place in places:
        if (place / "nvdisasm").exists():
            return place / "nvdisasm"
    found = shutil.which("nvdisasm")
    if found is None:
        raise FileNotFoundError("no nvdisasm found; pip install nvidia-cuda-nvdisasm")
    return Path(found)


def functions(nvdisasm: Path, cubin: Path) -> dict[str, list[str]]:
    """{mangled name: lines of its text}"""
    run = subprocess.run([nvdisasm, "-c", cubin], text=True, capture_output=True, check=True)
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in run.stdout.splitlines():
        if match := FUNCTION.match(line):
            lines = found.setdefault(match[1], [])
        elif line.startswith("//---"):
            lines = []
        else:
            lines.append(line)
    return found


def blocks(lines: list[str]) -> list[Block]:
    """The control flow of a function; calls return to where they were made."""
    starts: dict[str, int] = {}
    found = [Block()]

    def begin() -> None:
        if found[-1].opcodes:
            found.append(Block())

    for line in lines:
        if match := LABEL.match(line):
            begin()
            starts[match[1]] = len(found) - 1
        elif match := INSTRUCTION.match(line):
            opcode, block = match["opcode"], found[-1]
            if opcode == "NOP":  # fills up the end
                continue
            block.opcodes.append(opcode)
            if opcode.split(".")[0] not in ENDS:
                continue
            if target := TARGET.search(match["rest"]):
                block.target = target[1]
            # A branch may have its condition among the operands too, or be for lanes that diverged.
            conditions = match["guard"], ".DIV" in opcode, re.search(r"\bU?P\d", match["rest"])
            block.falls = any(conditions)
            begin()
    for index, block in enumerate(found):
        if block.target in starts:
            block.next.append(starts[block.target])
        if block.falls and index + 1 < len(found):
            block.next.append(index + 1)
        for other in block.next:
            found[other].before.append(index)
    return found


def dominators(graph: list[Block]) -> list[set[int]]:
    everything = set(range(len(graph)))
    found = [{0}] + [everything] * (len(graph) - 1)
    changed = True
    while changed:
        changed = False
        for index, block in enumerate(graph[1:], 1):
            sets = [found[other] for other in block.before]
            new = {index} | (set.intersection(*sets) if sets else set())
            changed |= new != found[index]
            found[index] = new
    return found


def loops(graph: list[Block], dominated_by: list[set[int]]) -> dict[int, set[int]]:
    """{first block: all blocks} of every natural loop."""
    found: dict[int, set[int]] = {}
    for index, block in enumerate(graph):
        for first in block.next:
            # The block after EXIT, which jumps to itself, fills up the end.
            if first not in dominated_by[index] or (first == index and len(block.opcodes) == 1):
                continue
            body = found.setdefault(first, {first})
            waiting = [index]
            while waiting:
                member = waiting.pop()
                if member not in body:
                    body.add(member)
                    waiting += graph[member].before
    return found


def is_irreducible(graph: list[Block], dominated_by: list[set[int]]) -> bool:
    """Whether a loop has two entries: then it is not among `loops`."""
    # Circles that are left without the branches back to a loop's first block.
    forward = {
        index: [other for other in block.next if other not in dominated_by[index]]
        for index, block in enumerate(graph)
    }
    try:
        graphlib.TopologicalSorter(forward).prepare()
    except graphlib.CycleError:
        return True
    return False


def own(first: int, found: dict[int, set[int]]) -> Iterator[int]:
    """The blocks of a loop that are in none of those inside of it."""
    inside = [body for other, body in found.items() if other != first and other in found[first]]
    for index in found[first]:
        if not any(index in body for body in inside if body < found[first]):
            yield index


def main_loop(graph: list[Block], found: dict[int, set[int]]) -> list[str]:
    """Instructions of the loop that itself multiplies most, or else moves most vectors, with those
    of loops inside of it.

    All of the kernel's, where no loop accesses global memory, or vectors move outside of loops.
    """

    def moved(first: int) -> tuple[int, ...]:
        mine = [graph[index] for index in own(first, found)]
        counts = (sum(b.count(kind) for b in mine) for kind in (is_tensors, is_vector, is_access))
        return (*counts, len(found[first]))

    first = max(found, key=moved, default=None)
    multiplies, vectors, accesses, _ = (0, 0, 0, 0) if first is None else moved(first)
    moves = multiplies or vectors or (accesses and not any(b.count(is_vector) for b in graph))
    chosen = sorted(found[first]) if first is not None and moves else range(len(graph))
    return [opcode for index in chosen for opcode in graph[index].opcodes]


def counts(lines: list[str]) -> dict:
    """The counts in ptxas.json of a kernel's instructions; loop_instructions is None where the
    loops are not nested."""
    graph = blocks(lines)
    dominated_by = dominators(graph)
    whole = Block([opcode for block in graph for opcode in block.opcodes])
    if whole.opcodes[-1] == "BRA":  # to itself, behind the end
        whole.opcodes.pop()
    loop = Block(main_loop(graph, loops(graph, dominated_by)))
    tensor = loop.count(is_tensors)
    # Another loop may be that of the data, unless this one has all products.
    has_all = tensor and tensor == whole.count(is_tensors)
    is_hidden = is_irreducible(graph, dominated_by) and not has_all
    return {
        "instructions": len(whole.opcodes),
        "loop_instructions": None if is_hidden else min(len(loop.opcodes), len(whole.opcodes)),
        "loop_vectors": loop.count(is_vector),
        "loop_loads": loop.count(lambda opcode: is_vector(opcode) and opcode.startswith("LDG")),
        "hmma_share": round(tensor / max(len(loop.opcodes), 1), 3),
    }
