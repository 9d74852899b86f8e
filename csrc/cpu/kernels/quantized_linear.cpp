// SPDX-License-Identifier: Apache-2.0
// Weights and x in int8. The rows of x are rounded first, all of them, since every span of output features
// needs them.

#include "cpu/kernels/linear.h"
#include "cpu/kernels/quantized.h"
#include "cpu/kernels/quantized_layout.h"
#include "cpu/kernels/quantized_rows.h"
#include "cpu/kernels/quantized_step.h"

#if MADTP_HAS_BYTE_DOTS
#include "cpu/kernels/quantized_dots.h"
#endif

namespace madtp::cpu::MADTP_ISA {
namespace {

// What sums of int8 products are worth.
template <typename T_>
struct Int8Sums {
  using Inputs = QuantizedLinear;
  using T = T_;

  const float *x_scale, *weight_scale;

  template <typename Load>
  Vec value(Vec sum, std::int64_t token, std::int64_t out_feature, Load load) const {
    const Vec sums = __builtin_convertvector(bit_cast<IntVec>(sum), Vec);
    return rounded(rounded(sums * x_scale[token]) * load(weight_scale + out_feature));
  }
  static Vec rounded(Vec v) { return MADTP_ISA::rounded(v); }
};

// Memory of one call: scales of the rows of x, then the rows in bytes.
class QuantizedX {
 public:
  QuantizedX(std::int64_t tokens, std::int64_t bytes) {
    const std::int64_t scales = ceil_div(tokens * std::int64_t(sizeof(float)), 64) * 64;
    if (posix_memalign(&memory_, 64, std::size_t(scales + bytes)) != 0) memory_ = nullptr;
    scale = static_cast<float*>(memory_);
    rows = memory_ == nullptr ? nullptr : static_cast<char*>(memory_) + scales;
  }
  ~QuantizedX() { std::free(memory_); }
  QuantizedX(const QuantizedX&) = delete;
  QuantizedX& operator=(const QuantizedX&) = delete;
  explicit operator bool() const { return memory_ != nullptr; }

  float* scale;  // (tokens,)
  char* rows;

 private:
  void* memory_ = nullptr;
};

#if MADTP_HAS_BYTE_DOTS
constexpr std::int64_t kTilesBytes =
    500000;  // of x, of the tiles that a unit is multiplied with in turn: in L2
constexpr std::int64_t kRowsOfTask = 4 * 2 * kWidth;  // of the weight, at most
constexpr std::int64_t kTasksOfThread = 4;            // with so many, no thread waits long for the last one

inline std::int64_t between(std::int64_t least, std::int64_t value, std::int64_t most) {
  return value < least ? least : value < most ? value : most;
}

typedef std::uint8_t Bytes __attribute__((vector_size(kDotsColumns)));

template <typename T>
Status run(const QuantizedLinear& a, void* out, std::int64_t out_stride, int threads) {
  const DotsLayout layout(a.out_features, a.in_features, dots_form(a.sparse, a.many_rows));
  return run_valid_rows<T>(a, out, out_stride, threads, [&](std::int64_t tokens, int threads) {
    const std::int64_t row_bytes = layout.columns();
    const QuantizedX x(tokens, tokens * row_bytes + kDotsColumns);
    // A row of each thread, before its blocks go to their places.
    void* memory = nullptr;
    if (!x || posix_memalign(&memory, 64, std::size_t((row_bytes + kDotsColumns) * threads)) != 0)
      return Status::out_of_memory;
    std::int8_t* const row_of_thread = static_cast<std::int8_t*>(memory);

    const Cut tiles{tokens, ceil_div(tokens, layout.tile_tokens)};
    for_each_task(tiles.parts, threads, [&](std::int64_t tile, int thread) {
      const std::int64_t first = tiles.begin(tile), count = tiles.begin(tile + 1) - first;
      std::int8_t* const row = row_of_thread + (row_bytes + kDotsColumns) * thread;
      for (std::int64_t t = 0; t < count; ++t) {
        x.scale[first + t] = quantize_row(static_cast<const T*>(a.x) + (first + t) * a.x_stride,
                                          a.in_features, row_bytes, row);
        for (std::int64_t block = 0; block < layout.blocks; ++block) {
          Bytes bytes;
          __builtin_memcpy(&bytes, row + block * kDotsColumns, sizeof bytes);
          bytes ^= std::uint8_t(kDotsOffset);  // plus the offset
          __builtin_memcpy(x.rows + first * row_bytes + (block * count + t) * kDotsColumns, &bytes,
                           sizeof bytes);
        }
      }
    });
    std::free(memory);

    const Int8Sums<T> sums{x.scale, a.weight_scale};
    const Epilogue<Int8Sums<T>> epilogue(sums, a, out, out_stride);
    const std::int64_t wanted = threads * kTasksOfThread;
    const std::int64_t units_of_task =
        between(1, layout.units * tiles.parts / wanted, kRowsOfTask / layout.unit_rows);
    const std::int64_t spans = ceil_div(layout.units, units_of_task);
    const std::int64_t by_cache = kTilesBytes / (layout.tile_tokens * (row_bytes + 1)),
                       by_threads = tiles.parts * spans / wanted;
    const std::int64_t together = between(1, by_cache < by_threads ? by_cache : by_threads, tiles.parts);
    for_each_task(ceil_div(tiles.parts, together) * spans, threads, [&](std::int64_t task, int) {
      const std::int64_t first_tile = task / spans * together, first_unit = task % spans * units_of_task;
      const auto run_unit = [&](std::int64_t u, std::int64_t tile) {
        const DotsUnit unit(layout, a.layout, u);
        const std::int64_t feature = u * layout.unit_rows, rest = a.out_features - feature;
        const std::int64_t features = rest < layout.unit_rows ? rest : layout.unit_rows;
        const std::int64_t token = tiles.begin(tile), count = tiles.begin(tile + 1) - token;
        // Otherwise the stores of a large output wait for memory.
        for (std::int64_t t = 0; t < count; ++t) {
          const T* const to = static_cast<const T*>(out) + (token + t) * out_stride + feature;
          __builtin_prefetch(to, 1);
          __builtin_prefetch(to + features - 1, 1);
        }
        alignas(64) std::int32_t tile_sums[kDotsSums * kWidth];
        multiply_dots_function(layout.form, int(count))(x.rows + token * row_bytes, unit, layout.blocks,
                                                        tile_sums);
        epilogue.run(reinterpret_cast<const float*>(tile_sums), layout.unit_rows, token, count, feature,
                     features);
      };
      for (std::int64_t u = first_unit; u < first_unit + units_of_task && u < layout.units; ++u) {
        for (std::int64_t tile = first_tile; tile < first_tile + together && tile < tiles.parts; ++tile)
          run_unit(u, tile);
      }
    });
    return Status::ok;
  });
}
#else
template <typename T_, typename Step_>
struct Int8Method : Int8Sums<T_> {
  using X = std::int8_t;
  using Step = Step_;
  static constexpr int kRowTokens = 0;

  static const std::uint32_t* weights(const Unit& unit, float* scratch) {
    const std::int8_t* const bytes = static_cast<const std::int8_t*>(unit.weights());
    std::int16_t* const wide = reinterpret_cast<std::int16_t*>(scratch);
    for (int i = 0; i < unit.steps * kUnitRows * 2; ++i) wide[i] = bytes[i];
    return reinterpret_cast<const std::uint32_t*>(scratch);
  }
};

template <typename T, typename Step>
Status run_steps(const QuantizedLinear& a, void* out, std::int64_t out_stride, int threads) {
  const Layout layout = quantized_layout(a.out_features, a.in_features, a.sparse);
  return run_valid_rows<T>(a, out, out_stride, threads, [&](std::int64_t tokens, int threads) {
    const std::int64_t stride =
        ceil_div(a.in_features, kBlock) * kBlock + 64;  // off the strides that alias in L1
    const QuantizedX x(tokens, tokens * stride);
    if (!x) return Status::out_of_memory;
    std::int8_t* const rows = reinterpret_cast<std::int8_t*>(x.rows);
    constexpr std::int64_t kRowsOfTask = 8;
    const Cut tasks{tokens, ceil_div(tokens, kRowsOfTask)};
    for_each_task(tasks.parts, threads, [&](std::int64_t task, int) {
      for (std::int64_t t = tasks.begin(task); t < tasks.begin(task + 1); ++t)
        x.scale[t] = quantize_row(static_cast<const T*>(a.x) + t * a.x_stride, a.in_features, stride,
                                  rows + t * stride);
    });
    const Int8Method<T, Step> method{{x.scale, a.weight_scale}};
    return multiply(method, a, layout, Rows<std::int8_t>{rows, stride}, tokens, out, out_stride, threads);
  });
}

template <typename T>
Status run(const QuantizedLinear& a, void* out, std::int64_t out_stride, int threads) {
  return a.sparse ? run_steps<T, Int8Pairs>(a, out, out_stride, threads)
                  : run_steps<T, Int8DensePairs>(a, out, out_stride, threads);
}
#endif

}  // namespace

Status quantized_linear(const QuantizedLinear& a, void* out, std::int64_t out_stride, int threads) {
  Status status = Status::ok;
  with_type(a.dtype, [&](auto element) { status = run<decltype(element)>(a, out, out_stride, threads); });
  return status;
}

}  // namespace madtp::cpu::MADTP_ISA
