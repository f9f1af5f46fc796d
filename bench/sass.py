"""Count the machine instructions of kernels, in the text that NVIDIA's disassembler writes."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
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


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may come next."""

    opcodes: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def vectors(self) -> int:
        """Accesses to global memory of 16 bytes."""
        return sum(op.startswith(("LDG", "STG")) and ".128" in op for op in self.opcodes)

    def multiplies(self) -> int:
        """Instructions of tensor cores."""
        return sum(map(is_tensors, self.opcodes))

    def accesses(self) -> int:
        return sum(op.startswith(("LDG", "STG")) for op in self.opcodes)


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
    targets: list[list[str]] = [[]]
    falls: list[bool] = [True]
    found = [Block()]

    def begin() -> None:
        if found[-1].opcodes:
            found.append(Block())
            targets.append([])
            falls.append(True)

    for line in lines:
        if match := LABEL.match(line):
            begin()
            starts[match[1]] = len(found) - 1
        elif match := INSTRUCTION.match(line):
            opcode, guarded = match["opcode"], match["guard"] is not None
            if opcode == "NOP":  # what fills up the end
                continue
            found[-1].opcodes.append(opcode)
            branch = opcode.split(".")[0]
            if branch not in ENDS:
                continue
            target = TARGET.search(match["rest"])
            if target:
                targets[-1].append(target[1])
            # A branch may have its condition among the operands too, or be for lanes that diverged.
            conditional = guarded or ".DIV" in opcode or re.search(r"\bU?P\d", match["rest"])
            falls[-1] = bool(conditional)
            begin()
    for index, block in enumerate(found):
        block.next = [starts[target] for target in targets[index] if target in starts]
        if falls[index] and index + 1 < len(found):
            block.next.append(index + 1)
    return found


def dominators(graph: list[Block]) -> list[set[int]]:
    before: list[list[int]] = [[] for _ in graph]
    for index, block in enumerate(graph):
        for other in block.next:
            before[other].append(index)
    everything = set(range(len(graph)))
    found = [{0}] + [everything] * (len(graph) - 1)
    changed = True
    while changed:
        changed = False
        for index in range(1, len(graph)):
            sets = [found[other] for other in before[index]]
            new = {index} | (set.intersection(*sets) if sets else set())
            changed |= new != found[index]
            found[index] = new
    return found


def loops(graph: list[Block]) -> dict[int, set[int]]:
    """{first block: all blocks} of every natural loop."""
    dominated_by = dominators(graph)
    before: list[list[int]] = [[] for _ in graph]
    for index, block in enumerate(graph):
        for other in block.next:
            before[other].append(index)
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
                    waiting += before[member]
    return found


def is_irreducible(graph: list[Block]) -> bool:
    """Whether a loop has two entries: then it is none of `loops`."""
    dominated_by = dominators(graph)
    state = [0] * len(graph)  # 1: on the way, 2: done
    stack = [(0, iter(graph[0].next))]
    state[0] = 1
    while stack:
        index, following = stack[-1]
        for other in following:
            if state[other] == 1 and other not in dominated_by[index]:
                return True
            if state[other] == 0:
                state[other] = 1
                stack.append((other, iter(graph[other].next)))
                break
        else:
            state[index] = 2
            stack.pop()
    return False


def own(first: int, found: dict[int, set[int]]) -> Iterator[int]:
    """The blocks of a loop that are in none of those inside of it."""
    inside = [body for other, body in found.items() if other != first and other in found[first]]
    for index in found[first]:
        if not any(index in body for body in inside if body < found[first]):
            yield index


def main_loop(graph: list[Block]) -> list[str]:
    """Instructions of the loop that itself multiplies most, or else moves most vectors, with those
    of loops inside of it.

    All of the kernel's, where no loop accesses global memory, or vectors move outside of loops.
    """
    found = loops(graph)

    def moved(first: int) -> tuple[int, int, int, int]:
        mine = [graph[index] for index in own(first, found)]
        return (
            sum(block.multiplies() for block in mine),
            sum(block.vectors() for block in mine),
            sum(block.accesses() for block in mine),
            len(found[first]),
        )

    first = max(found, key=moved, default=None)
    multiplies, vectors, accesses, _ = (0, 0, 0, 0) if first is None else moved(first)
    moves = multiplies or vectors or (accesses and not any(block.vectors() for block in graph))
    chosen = sorted(found[first]) if first is not None and moves else range(len(graph))
    return [opcode for index in chosen for opcode in graph[index].opcodes]


def counts(lines: list[str]) -> dict:
    """What ptxas.json keeps of a kernel's instructions; loop_instructions is None where the loops
    are not nested."""
    graph = blocks(lines)
    every = [opcode for block in graph for opcode in block.opcodes]
    if every[-1] == "BRA":  # to itself, behind the end
        every.pop()
    loop = main_loop(graph)
    vectors = sum(op.startswith(("LDG", "STG")) and ".128" in op for op in loop)
    loads = sum(op.startswith("LDG") and ".128" in op for op in loop)
    tensor = sum(map(is_tensors, loop))
    # Another loop may be that of the data, unless this one has all products.
    is_hidden = is_irreducible(graph) and not (tensor and tensor == sum(map(is_tensors, every)))
    return {
        "instructions": len(every),
        "loop_instructions": None if is_hidden else min(len(loop), len(every)),
        "loop_vectors": vectors,
        "loop_loads": loads,
        "hmma_share": round(tensor / max(len(loop), 1), 3),
    }
