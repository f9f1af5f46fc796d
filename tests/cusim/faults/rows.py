"""Faults of dispatch, combine, route_dot and combine_backward."""

from . import BARRIER

TESTS = ["rows", "activate"]
MUTANTS = {
    "rows.cuh": [
        ("if (first_choice > 0) __syncthreads();", ""),
        (BARRIER, "", "weights_[i] = row >= 0 ? weight : 0;\n    }"),
        ("slot < 0 || slot >= routes.num_rows", "slot >= routes.num_rows"),
        ("slot < 0 || slot >= routes.num_rows", "slot < 0 || slot > routes.num_rows"),
        ("load(routes.sources + slot) == route ? slot : -1", "slot"),
        ("route < 0 || route >= routes", "route >= routes"),
        ("route >= routes.num_tokens * routes.top_k", "route > routes.num_tokens * routes.top_k"),
        ("load(routes.slots + route) == row ? route : -1", "route"),
        (BARRIER, "", "*found = lanes;\n  }"),
        ("mine < routes.num_rows && route_of", "mine <= routes.num_rows && route_of"),
        ("__ffs(empty) - 1", "__ffs(empty)"),
        (
            "rows_per_block = parts == 1 ? kRowThreads / columns",
            "rows_per_block = parts == 1 ? kRowThreads / columns + 1",
        ),
        ("divide_up(num_rows, rows_per_block) * parts", "num_rows / rows_per_block * parts"),
        ("local < tiling.rows_per_block && ", ""),
        ("row < tiling.num_rows && column", "column"),
        (" && column < tiling.columns;", ";"),
        ("divide_up(1 << 16, width)", "(1 << 16) / width"),
        ("part) * tiling.width + within", "part) + within"),
        ("t < routes_.num_tokens && k < routes_.top_k", "k < routes_.top_k"),
        ("t < routes_.num_tokens && k < routes_.top_k", "t < routes_.num_tokens"),
        ("weights_[i] = row >= 0 ? weight : 0;", "weights_[i] = weight;"),
        ("rows_[cell.local * kChoices + i]", "rows_[i]"),
        ("bool full = hidden % kFullPack<T> == 0;", "bool full = true;"),
        ("full = full && aligned(address)", "full = full"),
    ],
    "dispatch.cu": [
        ("if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
        ("tiling.blocks + num_sweeps(routes)", "tiling.blocks + num_sweeps(routes) - 1"),
        ("if (!tile.cell.exists) continue;", ""),
        ("if (row < 0) continue;", ""),
        ("kWeighted ? scaled<T>(wide, tile.weight(i)) : token", "token"),
        ("first < tile.count", "first < kChoices - kInFlight"),
    ],
    "combine.cu": [
        ("first < tile.count", "first < kChoices - kInFlight"),
        ("if (!tile.cell.exists) return;", ""),
        ("tile.row(first + i)", "tile.row(i)"),
        ("row >= 0) in[i] = load", "row > 0) in[i] = load"),
    ],
    "route_dot.cu": [
        (BARRIER, "", "static_cast<const Sum*>(routes.weights) + route);\n    }"),
        (BARRIER, "", "partial[warp * kInFlight + i] = total;\n    }"),
        ("mine < routes.top_k", "mine <= routes.top_k"),
        ("if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
        ("if (row[i] < 0) continue;", ""),
        (
            "w < static_cast<int>(blockDim.x) / kWarp",
            "w < static_cast<int>(blockDim.x) / kWarp - 1",
        ),
        ("partial[w * kInFlight + threadIdx.x]", "partial[w * kInFlight]"),
        ("if (lane == 0) partial", "if (lane <= 1) partial"),
    ],
}
