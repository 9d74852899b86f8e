// SPDX-License-Identifier: Apache-2.0
// The layout of an int8 weight.

#include "cpu/kernels/pack.h"
#include "cpu/kernels/quantized.h"
#include "cpu/kernels/quantized_layout.h"

#if MADTP_HAS_BYTE_DOTS
#include "cpu/kernels/quantized_dots_layout.h"
#if MADTP_HAS_TWINS
#include "cpu/kernels/quantized_twins.h"
#endif
#endif

namespace madtp::cpu::MADTP_ISA {
#if MADTP_HAS_BYTE_DOTS
Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse,
                              bool many_rows, std::int64_t* bytes) {
  *bytes = DotsLayout(out_features, in_features, dots_form(sparse, many_rows)).bytes();
  return Status::ok;
}

Status quantized_pack(const QuantizedWeight& weight, void* data, int threads) {
  const DotsLayout layout(weight.out_features, weight.in_features,
                          dots_form(weight.indices != nullptr, weight.many_rows));
#if MADTP_HAS_TWINS
  if (layout.form == DotsForm::twins) return pack_twins(weight, layout, data, threads);
#endif
  pack_dots(weight, layout, data, threads);
  return Status::ok;
}
#else
namespace {

// One group and block of a dense weight: rows in their order, pairs of columns 0 2 and 1 3.
void pack_dense_units(const QuantizedWeight& weight, const Layout& layout, void* data, std::int64_t group,
                      std::int64_t block) {
  const int columns = layout.block_columns(block), steps = layout.steps(columns);
  for (std::int64_t u = 0; u < layout.unit_count(group); ++u) {
    const Unit unit = layout.unit(data, group, block, u);
    std::int8_t* const weights = static_cast<std::int8_t*>(const_cast<void*>(unit.weights()));
    std::uint8_t* const rows = const_cast<std::uint8_t*>(unit.rows());
    __builtin_memset(rows, 0, kHeader);
    for (int r = 0; r < kUnitRows; ++r) {
      const std::int64_t row = layout.first_row(group) + u * kUnitRows + r;
      rows[r] = std::uint8_t(u * kUnitRows + r);
      for (int s = 0; s < steps; ++s) {
        for (int half = 0; half < 2; ++half) {
          const std::int64_t column = block * kBlock + s / 2 * 4 + s % 2 + 2 * half;
          const bool has = row < weight.out_features && column < weight.in_features;
          weights[(s * kUnitRows + r) * 2 + half] =
              has ? weight.values[row * weight.in_features + column] : std::int8_t(0);
        }
      }
    }
  }
}

}  // namespace

Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse, bool,
                              std::int64_t* bytes) {
  *bytes = quantized_layout(out_features, in_features, sparse).bytes();
  return Status::ok;
}

Status quantized_pack(const QuantizedWeight& weight, void* data, int threads) {
  const Layout layout = quantized_layout(weight.out_features, weight.in_features, weight.indices != nullptr);
  if (weight.indices != nullptr) {
    // Two int8 are one element, of which the dtype is never asked.
    const Sparse24Weight pairs{DType::float32, weight.values, weight.indices, weight.out_features,
                               weight.in_features};
    return pack_layout<std::uint16_t, 6>(pairs, layout, data, threads);
  }
  for_each_task(layout.groups * layout.blocks, threads, [&](std::int64_t task, int) {
    pack_dense_units(weight, layout, data, task / layout.blocks, task % layout.blocks);
  });
  return Status::ok;
}

#endif

}  // namespace madtp::cpu::MADTP_ISA
