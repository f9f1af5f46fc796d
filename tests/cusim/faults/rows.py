"""Faults of dispatch, combine, route_dot and combine_backward."""

from . import BARRIER, Mutant

TESTS = ["rows", "activate"]
MUTANTS = [
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
