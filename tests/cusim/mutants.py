"""Break the CUDA kernels, one fault at a time, and see that the kernel tests notice.

    python tests/cusim/mutants.py [word ...]    the mutants whose file or change has all the words

Every mutant is compiled in a copy of the tree and given to kernel_tests: as it is, then under
AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, until one fails. A mutant that
none notices survives, and this program fails, unless it is listed as equivalent with the reason.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
COPY = ROOT / "build" / "mutants"
BUILDS = ("", "_address", "_undefined", "_thread")
SECONDS = 300  # a mutant may run for ever
# [] is all; those on rows where nothing is said.
OPERATORS = {
    "gate.cu": ["gate"],
    "plan.cu": ["plan"],
    "mask_weights.cu": ["mask_weights"],
    "../scoring.h": ["gate", "mask_weights"],
    "activate.cu": ["activate"],
    "rows.cuh": ["rows", "activate"],
    "vec.cuh": [],
}

BARRIER = "__syncthreads();"


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    after: str = ""  # the change is to the first `old` behind this text
    equivalent: str = ""  # why no test can notice

    def __str__(self) -> str:
        change = f"{self.old.strip()} -> {self.new.strip() or 'nothing'}"
        where = f" after {self.after.strip()}" if self.after else ""
        return f"{self.file}: {' '.join((change + where).split())}"

    def applied(self, text: str) -> str:
        if self.after not in text:
            raise ValueError(f"{self}: what it comes after is not there")
        start = text.index(self.after) + len(self.after) if self.after else 0
        if not self.after and text.count(self.old) != 1:
            raise ValueError(f"{self}: the text is there {text.count(self.old)} times")
        at = text.find(self.old, start)
        if at < 0:
            raise ValueError(f"{self}: the text is not there")
        return text[:at] + self.new + text[at + len(self.old) :]


GATE = [
    Mutant("gate.cu", BARRIER, "", after="/ divisor * scale);"),
    Mutant("gate.cu", BARRIER, "", after="half > 0; half /= 2) {"),
    Mutant("gate.cu", "active = token < num_tokens", "active = token <= num_tokens", "Sum* sums"),
    Mutant("gate.cu", "if (first + j >= num_experts)", "if (first + j > num_experts)"),
    Mutant("gate.cu", "if (first + j < num_experts) store", "if (first + j <= num_experts) store"),
    Mutant("gate.cu", "if (vectorised && first < num_experts) {", "if (vectorised) {", "read("),
    Mutant("gate.cu", "if (vectorised && first < num_experts) {", "if (vectorised) {", "write("),
    Mutant("gate.cu", "-INFINITY, row", "INFINITY, row", after="keys[kValues];"),
    Mutant("gate.cu", "-INFINITY, row", "0, row", after="if (choice_scores != logits)"),
    Mutant("gate.cu", "std::isnan(score) ? ~decltype(key){0} : key", "key"),
    Mutant("gate.cu", "if (K > kLanes) store(weights", "if (K > 2 * kLanes) store(weights"),
    Mutant("gate.cu", "normalize ? clamped(chosen_sum) : 1", "clamped(chosen_sum)"),
    Mutant("gate.cu", "kThreads + kWarp / kPack", "kThreads - kWarp / kPack"),
    Mutant("gate.cu", "if (keys[i] == best) id =", "if (keys[i] >= best - 1) id ="),
    Mutant(
        "gate.cu",
        "for (int i = L::kValues - 1; i >= 0; --i)",
        "for (int i = 0; i < L::kValues; ++i)",
    ),
    Mutant(
        "gate.cu",
        "== static_cast<int>(id)) keys[i] = 0",
        "== static_cast<int>(id)) keys[i] = 1",
        equivalent="the key of -inf is the least of any score and far above 1",
    ),
    Mutant("gate.cu", "== static_cast<int>(id)) keys[i] = 0;", "== static_cast<int>(id)) {}"),
    Mutant("gate.cu", "int count = min(K - k, kLanes)", "int count = kLanes"),
    Mutant("gate.cu", "if (i == lane) mine = id;", "mine = id;"),
    Mutant("gate.cu", "lanes_sum<kLanes>(lane < count ? p : 0)", "lanes_sum<kLanes>(p)"),
    Mutant("gate.cu", "if (lane >= count || !active) continue;", "if (lane >= count) continue;"),
    Mutant("gate.cu", "L::index_of(id) == i", "L::index_of(id) == i + 1"),
    Mutant(
        "gate.cu",
        "for (int k = lane; k < K; k += kLanes)",
        "for (int k = lane; k < K - 1; k += kLanes)",
    ),
    Mutant("gate.cu", "g < L::kRows; ++g", "g < L::kRows - 1; ++g"),
    Mutant("gate.cu", "if (part == 0 && e < num_experts) store", "if (part == 0) store"),
    Mutant("gate.cu", "b += kSumParts", "b += kSumParts + 1"),
    Mutant("gate.cu", "half > 0; half /= 2", "half > 1; half /= 2"),
    Mutant(
        "gate.cu",
        "first += int64_t{gridDim.x} * L::kRows",
        "first += int64_t{gridDim.x} * L::kRows + 1",
    ),
    Mutant("gate.cu", "if (blocks == 1) return;", "if (blocks <= 2) return;"),
    Mutant("gate.cu", "aligned(call.choice_scores) && ", ""),
    Mutant("gate.cu", "if (is_expert(id)) chosen_sum.add", "chosen_sum.add"),
    Mutant("gate.cu", "if (!is_expert(id)) continue;", ""),
    Mutant("gate.cu", "chosen_sum.centred(load(grad_chosen + k))", "load(grad_chosen + k)"),
    Mutant("gate.cu", "if (is_most(p[i])) shift = grad[i];", ""),
    Mutant("gate.cu", "shift = lanes_sum<kLanes>(shift);", ""),
    Mutant("gate.cu", "x = std::exp(x - largest)", "x = std::exp(x)"),
    Mutant("gate.cu", "if (active) {", "{"),
]

PLAN = [
    Mutant("plan.cu", BARRIER, "", after="mine[e] = 0;"),
    Mutant("plan.cu", BARRIER, "", after="if (e >= 0) atomicAdd(&mine[e], 1);\n  }"),
    Mutant("plan.cu", BARRIER, "", after="before[e] = total[e] = 0;"),
    Mutant("plan.cu", BARRIER, "", after="sum_counts(counts, E, before, total);"),
    Mutant("plan.cu", BARRIER, "", after="of_warps[warp] = sum;"),
    Mutant("plan.cu", BARRIER, "", after="offsets[e + 1] = sum;"),
    Mutant("plan.cu", "__syncwarp();", "", after="cursor[e] + earlier : 0;"),
    Mutant("plan.cu", "__syncwarp();", "", after="cursor[e] += __popc(same);"),
    Mutant("plan.cu", BARRIER, "", after="counts[d] = 0;"),
    Mutant("plan.cu", BARRIER, "", after="atomicAdd(&counts[digit], __popc(same));\n      }"),
    Mutant("plan.cu", BARRIER, "", after="digit.num_equal};\n      }"),
    Mutant("plan.cu", BARRIER, "", after="of_warps[warp] = {"),
    Mutant("plan.cu", BARRIER, "", after="before.y += of_warps[w].y;\n    }"),
    Mutant("plan.cu", "return e < num_experts ? e : -1;", "return e <= num_experts ? e : -1;"),
    Mutant("plan.cu", "return p % T * top_k + p / T;", "return p / T * top_k + p % T;"),
    Mutant("plan.cu", "min(begin + queue.chunk, queue.num_routes)", "begin + queue.chunk"),
    Mutant("plan.cu", "min(begin + part, queue.num_routes)", "begin + part"),
    Mutant("plan.cu", "expert_ids[i] = place < end ?", "expert_ids[i] = place <= end ?"),
    Mutant("plan.cu", "if (threadIdx.x == 0) offsets[0] = 0;", ""),
    Mutant("plan.cu", "if (lane == kWarp - 1) of_warps", "if (lane == kWarp - 2) of_warps"),
    Mutant("plan.cu", "(load + align - 1) / align * align", "load / align * align"),
    Mutant("plan.cu", "if (w < warp) sum +=", "if (w <= warp) sum +="),
    Mutant("plan.cu", "if (part >= parts) return;", ""),
    Mutant("plan.cu", "first = part; first < chunks", "first = 0; first < chunks"),
    Mutant("plan.cu", "first += kCountsAhead * parts", "first += kCountsAhead * parts + 1"),
    Mutant("plan.cu", "c < chunks ? load", "c <= chunks ? load"),
    Mutant("plan.cu", "first + i * parts < mine", "first + i * parts <= mine"),
    Mutant("plan.cu", "i < num_experts * parts;", "i < num_experts * parts - 1;"),
    Mutant("plan.cu", "first = i % parts * kWarp + lane", "first = i % parts + lane"),
    Mutant("plan.cu", "load[e] + first; row", "load[e] + first + 1; row"),
    Mutant("plan.cu", "row < offsets[e + 1];", "row <= offsets[e + 1];"),
    Mutant("plan.cu", "+ first_warp * kWarp + lane;", "+ first_warp * kWarp + lane + 1;"),
    Mutant("plan.cu", "row < num_rows;", "row <= num_rows;"),
    Mutant("plan.cu", "int rank = before[e];", "int rank = 0;"),
    Mutant("plan.cu", "same & ((1u << lane) - 1)", "same & ((2u << lane) - 1)"),
    Mutant("plan.cu", "rank < offsets[e + 1] - offsets[e]", "rank <= offsets[e + 1] - offsets[e]"),
    Mutant(
        "plan.cu",
        "if (kept) store(sources + offsets[e] + rank",
        "store(sources + offsets[e] + rank",
    ),
    Mutant(
        "plan.cu",
        "if (counts || blockIdx.x == 0) for_each_place",
        "for_each_place",
        equivalent="all blocks then store the same values: work done again, and nothing else",
    ),
    Mutant(
        "plan.cu",
        "e <= E; e += kThreads) store(all_offsets",
        "e < E; e += kThreads) store(all_offsets",
    ),
    Mutant("plan.cu", "if (blockIdx.x > 0) return;", ""),
    Mutant("plan.cu", "std::isnan(priority) ? 0 : bits", "bits"),
    Mutant(
        "plan.cu",
        "before < wanted && before + sum >= wanted",
        "before <= wanted && before + sum > wanted",
        equivalent="the threshold is then the next key in use, and none equal to it is kept",
    ),
    Mutant(
        "plan.cu",
        "before + counts[digit] < wanted; --digit",
        "before + counts[digit] <= wanted; --digit",
    ),
    Mutant("plan.cu", "min(int64_t{size}, capacity)", "capacity"),
    Mutant(
        "plan.cu",
        "i = kept + threadIdx.x; i < capacity",
        "i = kept + 1 + threadIdx.x; i < capacity",
    ),
    Mutant("plan.cu", "blockIdx.x == gridDim.x - 1", "blockIdx.x == 0"),
    Mutant(
        "plan.cu",
        ">> shift < kDigits",
        ">> shift <= kDigits",
        equivalent="what it counts too has digit 0, where the search from the top ends anyway",
    ),
    Mutant("plan.cu", "threshold.key | digit.key << shift", "digit.key << shift"),
    Mutant("plan.cu", "threadIdx.x, size - 1)", "threadIdx.x, size - 2)"),
    Mutant(
        "plan.cu", "body(begin + threadIdx.x, values[j])", "body(begin + threadIdx.x, values[0])"
    ),
    Mutant(
        "plan.cu", "store(keys + i, priority_key(value))", "store(keys + i, priority_key(-value))"
    ),
    Mutant("plan.cu", BARRIER, "", after="store(keys + i, priority_key(value));"),
    Mutant("plan.cu", "2 * num_routes + num_experts + 1", "num_routes + num_experts + 1"),
    Mutant("plan.cu", "(keep_all || key > threshold.key)", "(keep_all || key >= threshold.key)"),
    Mutant("plan.cu", "mine.y < threshold.num_equal)", "mine.y <= threshold.num_equal)"),
    Mutant("plan.cu", "if (w < warp) mine.x", "if (w <= warp) mine.x"),
    Mutant("plan.cu", "min(mine.y, threshold.num_equal)", "mine.y"),
]

KEEP = [
    Mutant("mask_weights.cu", "if (token >= num_tokens) return;", ""),
    Mutant("mask_weights.cu", "blockDim.x + threadIdx.x", "blockDim.x + threadIdx.x + 1"),
    Mutant("mask_weights.cu", "if (load(slots + k) < 0) continue;", ""),
    Mutant("mask_weights.cu", "load(slots + k) >= 0;", "true;"),
    Mutant("mask_weights.cu", "kept.divide(eps);", "kept.divide();"),
    Mutant("mask_weights.cu", "if (!grad) kept.shift = kept.mean = 0;", ""),
    Mutant("mask_weights.cu", "kept.centred(load(from + k))", "load(from + k)"),
    Mutant("mask_weights.cu", "/ kept.divisor * scale", "/ kept.divisor"),
    Mutant("mask_weights.cu", "if (normalize) {", "if (true) {"),
    Mutant("mask_weights.cu", "divide_up(call.num_tokens, kThreads)", "call.num_tokens / kThreads"),
]

SCORING = [
    Mutant("../scoring.h", "return sum < eps ? eps : sum;", "return sum;"),
    Mutant("../scoring.h", "if (sum < eps) mean = shift = 0;", ""),
    Mutant("../scoring.h", "if (p > largest) {", "if (largest == -INFINITY) {"),
    Mutant("../scoring.h", "mean += sum * (shift - g);", ""),
    Mutant("../scoring.h", "share > T{0.5}", "share > T{0.99}"),
    Mutant("../scoring.h", "return g - shift - mean;", "return g - (shift + mean);"),
]

ROWS = [
    Mutant("rows.cuh", "if (first_choice > 0) __syncthreads();", ""),
    Mutant("rows.cuh", BARRIER, "", after="weights_[i] = row >= 0 ? weight : 0;\n    }"),
    Mutant("rows.cuh", "slot < 0 || slot >= routes.num_rows", "slot >= routes.num_rows"),
    Mutant("rows.cuh", "slot < 0 || slot >= routes.num_rows", "slot < 0 || slot > routes.num_rows"),
    Mutant("rows.cuh", "load(routes.sources + slot) == route ? slot : -1", "slot"),
    Mutant("rows.cuh", "route < 0 || route >= routes", "route >= routes"),
    Mutant(
        "rows.cuh",
        "route >= routes.num_tokens * routes.top_k",
        "route > routes.num_tokens * routes.top_k",
    ),
    Mutant("rows.cuh", "load(routes.slots + route) == row ? route : -1", "route"),
    Mutant("rows.cuh", "mine < routes.num_rows && route_of", "mine <= routes.num_rows && route_of"),
    Mutant("rows.cuh", "__ffs(empty) - 1", "__ffs(empty)"),
    Mutant(
        "rows.cuh",
        "tokens_per_block = parts == 1 ? kRowThreads / columns",
        "tokens_per_block = parts == 1 ? kRowThreads / columns + 1",
    ),
    Mutant(
        "rows.cuh",
        "divide_up(routes.num_tokens, tokens_per_block) * parts",
        "routes.num_tokens / tokens_per_block * parts",
    ),
    Mutant("rows.cuh", "local_ < tiling.tokens_per_block && ", ""),
    Mutant("rows.cuh", "token < routes.num_tokens && column", "column"),
    Mutant("rows.cuh", " && column < tiling.columns;", ";"),
    Mutant(
        "rows.cuh",
        "within < tiling.width &&",
        "",
        equivalent="short of a part's width there are as many threads as columns",
    ),
    Mutant("rows.cuh", "t < routes_.num_tokens && k < routes_.top_k", "k < routes_.top_k"),
    Mutant("rows.cuh", "t < routes_.num_tokens && k < routes_.top_k", "t < routes_.num_tokens"),
    Mutant("rows.cuh", "weights_[i] = row >= 0 ? weight : 0;", "weights_[i] = weight;"),
    Mutant("rows.cuh", "rows_[local_ * kChoices + i]", "rows_[i]"),
    Mutant("rows.cuh", "bool full = hidden % kFullPack<T> == 0;", "bool full = true;"),
    Mutant("rows.cuh", "full = full && aligned(address)", "full = full"),
    Mutant("dispatch.cu", "if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
    Mutant(
        "dispatch.cu",
        "tiling.blocks + num_sweeps(routes)",
        "tiling.blocks + num_sweeps(routes) - 1",
    ),
    Mutant("dispatch.cu", "if (!tile.has_cell) continue;", ""),
    Mutant("dispatch.cu", "if (tile.row(i) < 0) continue;", ""),
    Mutant("dispatch.cu", "tile.weighted() ? scaled(token, tile.weight(i)) : token", "token"),
    Mutant(
        "combine.cu", "first < kChoices && k + first < routes.top_k", "first < kChoices - kInFlight"
    ),
    Mutant(
        "combine.cu",
        " && k + first < routes.top_k",
        "",
        equivalent="there choices have no row, and nothing is added",
    ),
    Mutant("combine.cu", "if (!tile.has_cell) return;", ""),
    Mutant("combine.cu", "tile.row(first + i)", "tile.row(i)"),
    Mutant("combine.cu", "row >= 0 ? load", "row > 0 ? load"),
    Mutant(
        "route_dot.cu",
        BARRIER,
        "",
        after="static_cast<const Sum*>(routes.weights) + route);\n    }",
    ),
    Mutant("route_dot.cu", BARRIER, "", after="partial[warp * kInFlight + i] = total;\n    }"),
    Mutant("route_dot.cu", "mine < routes.top_k", "mine <= routes.top_k"),
    Mutant("route_dot.cu", "if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
    Mutant("route_dot.cu", "if (row[i] < 0) continue;", ""),
    Mutant(
        "route_dot.cu",
        "w < static_cast<int>(blockDim.x) / kWarp",
        "w < static_cast<int>(blockDim.x) / kWarp - 1",
    ),
    Mutant("route_dot.cu", "partial[w * kInFlight + threadIdx.x]", "partial[w * kInFlight]"),
    Mutant("route_dot.cu", "if (lane == 0) partial", "if (lane <= 1) partial"),
]

ACTIVATE = [
    Mutant("activate.cu", "if (row >= routes.num_rows) return;", ""),
    Mutant("activate.cu", "cell = int64_t{blockIdx.x} * blockDim.x", "cell = int64_t{blockIdx.x}"),
    Mutant("activate.cu", "load(at + columns)", "load(at)"),
    Mutant("activate.cu", "if (gated) up = load", "up = load"),
    Mutant(
        "activate.cu",
        "row * columns * (gated ? 2 : 1) + column;\n    gate",
        "row * columns + column;\n    gate",
    ),
    Mutant("activate.cu", "if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
    Mutant("activate.cu", "route < num_routes && row_of", "row_of"),
    Mutant("activate.cu", "row_of(routes, route) < 0) store", "row_of(routes, route) <= 0) store"),
    Mutant("activate.cu", "if (column < columns) store", "store"),
    Mutant("activate.cu", "grad * of_gate.slope * up", "grad * of_gate.slope"),
    Mutant("activate.cu", "dot += grad * result", "dot += weight * grad * result"),
    Mutant("activate.cu", BARRIER, ""),
    Mutant("activate.cu", "if (lane == 0) partial[warp]", "if (lane <= 1) partial[warp]"),
    Mutant("activate.cu", "if (threadIdx.x > 0) return;", ""),
    Mutant("activate.cu", "/ kWarp; ++w) total", "/ kWarp - 1; ++w) total"),
    Mutant("rows.cuh", "load(routes.slots + route) == row ? route : -1", "route"),
    Mutant(
        "rows.cuh", "if (route < 0 || route >= routes.num_tokens * routes.top_k) return -1;", ""
    ),
]

SHARED = [
    Mutant("vec.cuh", "__float_as_uint(x + 0.0f)", "__float_as_uint(x)"),
    Mutant("vec.cuh", "bits >> 31 ? ~bits", "bits >> 31 ? bits"),
    Mutant("vec.cuh", "if (lane >= distance) x += below;", "if (lane > distance) x += below;"),
    Mutant("vec.cuh", "lanes = kLanes / 2; lanes > 0", "lanes = kLanes / 2; lanes > 1"),
]


def update(source: str, target: str) -> None:
    """Copy what differs, as of now: a killed run may have left a mutant, and objects made of it."""
    if not Path(target).exists() or not filecmp.cmp(source, target, shallow=False):
        shutil.copy(source, target)


def copy_tree() -> None:
    """The sources in a tree of their own, configured like build/cusim."""
    COPY.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "tests", "moe_ext"):
        shutil.copytree(
            ROOT / name, COPY / name, ignore=ignore, copy_function=update, dirs_exist_ok=True
        )
    update(ROOT / "CMakeLists.txt", COPY / "CMakeLists.txt")
    configure = ["cmake", "-S", str(COPY), "-B", str(COPY / "build"), "-G", "Ninja"]
    configure += ["-DMOE_EXT_CUSIM=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)


def notice(build: str, operators: list[str]) -> str | None:
    """What the build of that name says of the tree as it is: None where it passes."""
    target = f"kernel_tests{build}"
    made = subprocess.run(
        ["cmake", "--build", str(COPY / "build"), "--target", target],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        raise RuntimeError(made.stdout[-4000:])
    program = COPY / "build" / "tests" / "cusim" / target
    try:
        run = subprocess.run([program, *operators], capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "does not end"
    return None if run.returncode == 0 else f"kernel_tests{build}"


def try_mutant(mutant: Mutant) -> str | None:
    """Who noticed, or None."""
    path = COPY / "csrc" / "cuda" / mutant.file
    original = path.read_text()
    try:
        path.write_text(mutant.applied(original))
        operators = OPERATORS.get(mutant.file, ["rows"])
        return next((said for build in BUILDS if (said := notice(build, operators))), None)
    finally:
        path.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    mutants = [
        m
        for m in [*GATE, *PLAN, *KEEP, *SCORING, *ROWS, *ACTIVATE, *SHARED]
        if all(word in str(m) for word in words)
    ]
    if not mutants:
        parser.error(f"no mutant has {' '.join(words)}")
    for mutant in mutants:
        mutant.applied((ROOT / "csrc" / "cuda" / mutant.file).read_text())
    copy_tree()
    for build in BUILDS:
        if said := notice(build, []):
            sys.exit(f"{said} fails before any mutation")
    wrong, by = [], Counter()
    for mutant in (bar := tqdm(mutants, unit="mutant")):
        noticed = try_mutant(mutant)
        by[noticed or "equivalent"] += 1
        if (noticed is None) != bool(mutant.equivalent):
            what = (
                f"{noticed} notices, though it is listed as equivalent" if noticed else "survives"
            )
            wrong.append(f"{mutant}: {what}")
            bar.write(wrong[-1])
    print(f"{len(mutants)} mutants:", ", ".join(f"{count} {name}" for name, count in by.items()))
    if wrong:
        sys.exit("\n".join([f"{len(wrong)} not as listed:", *wrong]))


if __name__ == "__main__":
    main()
