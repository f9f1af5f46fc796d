// The product of every group's rows and its weights in 8 and 4 bits, or those transposed, whose
// numbers are rounded to the rows' dtype.

#include "grouped_mm.cuh"
#include "packed.cuh"

namespace moe_ext::cuda {
namespace {

template <typename N, int kBits, bool kTransposed>
KERNEL(kProductThreads, 2)
void quantized_mm_kernel(Product product, GRID_CONSTANT const PackedWeights weights,
                         ToRows<typename N::T> epilogue) {
  using T = typename N::T;
  using Right = Packed<T, kBits, N::kN, kTransposed>;
  SharedMemory shared;
  uint4* ring = shared.take<uint4>(product.ring_slices * slice_vectors<Lines<T, N::kM>, Right>);
  OfRow* of_rows = shared.take<OfRow>(N::kM);
  uint4* unpacked = shared.take<uint4>(Right::kUnpackedVectors);
  float* table = shared.take<float>(kCodes);
  if (threadIdx.x < kCodes) table[threadIdx.x] = weights.numbers.of[threadIdx.x];
  __syncthreads();
  multiply_tiles<N>(product, epilogue, ring, of_rows, [&](const Tile& tile) {
    return Right(weights, tile.group, tile.column * N::kN, unpacked, table);
  });
}

template <typename N, int kBits, bool kTransposed>
void launch_quantized_mm(Product product, const PackedWeights& weights,
                         const ToRows<typename N::T>& epilogue, CUstream_st* stream) {
  using T = typename N::T;
  using Right = Packed<T, kBits, N::kN, kTransposed>;
  const auto kernel = quantized_mm_kernel<N, kBits, kTransposed>;
  require_tensor_cores("quantized_mm", kernel);
  const Ring ring = ring_for<Lines<T, N::kM>, Right>(shared_bytes<OfRow>(N::kM) +
                                                     shared_bytes<uint4>(Right::kUnpackedVectors) +
                                                     shared_bytes<float>(kCodes));
  product.ring_slices = ring.slices;
  launch("quantized_mm", kernel,
         num_blocks<N>(product, divide_up(product.width, N::kN), ring.bytes), kProductThreads,
         ring.bytes, stream, product, weights, epilogue);
}

int shift_of(int64_t group) {
  int shift = 0;
  while (int64_t{1} << shift < group) ++shift;
  return shift;
}

}  // namespace

void quantized_mm(const QuantizedMM& call, const void* bias, void* out, CUstream_st* stream) {
  const int lines = narrowed_size(call.transposed ? call.depth : call.width);
  const int width = narrowed_size(call.transposed ? call.width : call.depth);
  const PackedWeights weights{static_cast<const uint8_t*>(call.values),
                              call.scales,
                              static_cast<const uint8_t*>(call.zeros),
                              call.format,
                              lines,
                              width,
                              static_cast<int>(call.num_scales),
                              shift_of(width / call.num_scales),
                              numbers_of(call.format)};
  const Product product{source_of(call.rows, call.depth, false,
                                  {nullptr, nullptr, nullptr, 0, 1, call.groups.num_rows}),
                        nullptr,
                        call.groups,
                        narrowed_size(call.depth),
                        narrowed_size(call.width),
                        0};
  const bool many = call.groups.num_rows >= int64_t{96} * call.groups.num_groups;
  visit_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const ToRows<T> epilogue{bias, false, product.width, true, out};
      visit_constant<true, false>(many, [&](auto is_many) {
        visit_constant<true, false>(call.transposed, [&](auto is_transposed) {
          visit_constant<8, 4>(bits_of(call.format), [&](auto bits) {
            using N = Numbers<T, 1, is_many ? kManyRows : kFewRows>;
            launch_quantized_mm<N, bits, is_transposed>(product, weights, epilogue, stream);
          });
        });
      });
    } else {
      throw std::runtime_error("products of weights in 8 and 4 bits take rows of 16 bits");
    }
  });
}

}  // namespace moe_ext::cuda
