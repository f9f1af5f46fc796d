// The tiles of all groups' rows, in an order in which those of a group are neighbours: they share
// its weights in the L2 cache.

#pragma once

#include "../vec.cuh"

namespace moe_ext::cuda {

struct GroupRows {
  int first, last;  // the last is not one of them
};
__device__ inline GroupRows rows_of(const Groups& groups, int group) {
  const int num = static_cast<int>(groups.num_rows);
  const int first = min(max(load(groups.offsets + group), 0), num);
  const int end = min(max(load(groups.offsets + group + 1), first), num);
  return {first, first + min(max(load(groups.load + group), 0), end - first)};
}

// The group that has a row, if any has: offsets ascend.
__device__ inline int group_of(const Groups& groups, int row) {
  int group = 0, above = groups.num_groups;
  while (above - group > 1) {
    const int middle = (group + above) / 2;
    (load(groups.offsets + middle) <= row ? group : above) = middle;
  }
  return group;
}

// Zeros in the rows that no group owns, of so many vectors each. All threads of all blocks call it:
// a warp looks at 32 rows.
__device__ inline void zero_unowned_rows(const Groups& groups, uint4* rows, int64_t columns) {
  const int lane = threadIdx.x % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t warp = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp;
  for (int64_t first = warp * kWarp; first < groups.num_rows;
       first += int64_t{gridDim.x} * warps * kWarp) {
    const int64_t row = first + lane;
    bool is_unowned = false;
    if (row < groups.num_rows) {
      const GroupRows owned = rows_of(groups, group_of(groups, static_cast<int>(row)));
      is_unowned = row < owned.first || row >= owned.last;
    }
    for (unsigned rest = __ballot_sync(kAllLanes, is_unowned); rest; rest &= rest - 1) {
      uint4* zeroed = rows + (first + __ffs(rest) - 1) * columns;
      for (int64_t i = lane; i < columns; i += kWarp) store(zeroed + i, uint4{});
    }
  }
}

struct Tile {
  int group, first_row, last_row, column;  // the last row is the group's, not one of the tile's
};

// Every warp finds a block's tiles for itself, 32 groups at a time. They are asked for in ascending
// order.
template <int kTileRows>
class Tiles {
 public:
  __device__ Tiles(const Groups& groups, int columns) : groups_(groups), columns_(columns) {
    read();
  }

  // False behind the last tile.
  __device__ bool find(int64_t index, Tile& tile) {
    while (true) {
      const unsigned above = __ballot_sync(kAllLanes, index < (before_ + through_) * columns_);
      if (above) {
        const int lane = __ffs(above) - 1;
        const int count = __shfl_sync(kAllLanes, count_, lane);
        const int64_t before = before_ + __shfl_sync(kAllLanes, through_, lane) - count;
        const int within = static_cast<int>(index - before * columns_);
        tile.group = first_ + lane;
        tile.column = within / count;
        const int first = __shfl_sync(kAllLanes, rows_.first, lane);
        tile.first_row = first + (within - tile.column * count) * kTileRows;
        tile.last_row = __shfl_sync(kAllLanes, rows_.last, lane);
        return true;
      }
      before_ += __shfl_sync(kAllLanes, through_, kWarp - 1);
      first_ += kWarp;
      if (first_ >= groups_.num_groups) return false;
      read();
    }
  }

 private:
  __device__ void read() {
    const int group = first_ + static_cast<int>(threadIdx.x) % kWarp;
    rows_ = group < groups_.num_groups ? rows_of(groups_, group) : GroupRows{0, 0};
    count_ = (rows_.last - rows_.first + kTileRows - 1) / kTileRows;
    through_ = running_sum(count_);
  }

  const Groups& groups_;
  int columns_;
  int first_ = 0;       // of 32 groups
  int64_t before_ = 0;  // tiles of rows before it
  // The rows of this lane's group, its tiles of rows, and those with the lanes' below.
  GroupRows rows_;
  int count_, through_;
};

}  // namespace moe_ext::cuda
