// SPDX-License-Identifier: Apache-2.0
// Prints, as JSON, what csrc/cuda/sparse24/model_sm90.h expects of the layers of ViT-B and ViT-L on an H100,
// with operands of 16 bits and quantised ones of 8.

#include <cstdio>

#include "cuda/sparse24/model_sm90.h"

using namespace madtp;
using namespace madtp::cuda::model_sm90;

namespace {

constexpr std::int64_t kRows[] = {64, 197, 577, 2308, 4616, 18464};
constexpr std::int64_t kLayers[][2] = {{768, 768},  {768, 2304},  {768, 3072},
                                       {3072, 768}, {1024, 4096}, {4096, 1024}};
// The first layer of an MLP has GELU, query, key and value nothing, the others a residual.
Layer layer_of(std::int64_t rows, std::int64_t in_features, std::int64_t out_features, bool is_cold,
               int bytes) {
  const bool is_first = out_features == 4 * in_features, is_qkv = out_features == 3 * in_features;
  return {rows,
          out_features,
          in_features,
          is_first ? Activation::gelu : Activation::none,
          !is_first && !is_qkv,
          is_cold,
          bytes};
}

void print_us(const char* name, double clocks) { std::printf(", \"%s\": %.1f", name, clocks / kClocksPerUs); }

}  // namespace

int main() {
  const Gpu gpu;
  const char* separator = "[\n";
  for (const int bytes : {2, 1}) {
    for (const bool is_cold : {true, false}) {
      for (const std::int64_t rows : kRows) {
        for (const auto& [in_features, out_features] : kLayers) {
          const Layer layer = layer_of(rows, in_features, out_features, is_cold, bytes);
          std::printf(
              "%s{\"weights\": \"%s\", \"bits\": %d, \"rows\": %lld, \"in_features\": %lld, "
              "\"out_features\": %lld",
              separator, is_cold ? "cold" : "warm", 8 * bytes, (long long)rows, (long long)in_features,
              (long long)out_features);
          separator = ",\n";
          const double dense = dense_clocks(layer, gpu);
          print_us("dense", dense);
          print_us("dense_separate", dense + separate_clocks(layer));
          const Schedule best = fastest(layer, gpu, [](const Schedule&) { return true; });
          print_us("sparse", clocks(layer, best, gpu).total);
          std::printf(", \"tile\": [%d, %d], \"cluster\": %d", best.tokens, best.features, best.cluster);
          if (bytes == 1) print_us("quantize", quantize_clocks(layer));
          std::printf("}");
        }
      }
    }
  }
  std::printf("\n]\n");
}
