// SPDX-License-Identifier: Apache-2.0
#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/tensor_map.h"

namespace madtp::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there: the library does not link it.
Encode find_encode() {
#ifdef MADTP_SIMT
  return &cuTensorMapEncodeTiled;
#else
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Encode>(function);
#endif
}

}  // namespace

Status encode_matrix(ptx::TensorMap* map, const void* data, DType dtype, std::int64_t rows,
                     std::int64_t columns, std::int64_t row_stride, int box_rows) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return Status::unsupported;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)},
                   strides[1] = {cuuint64_t(row_stride) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, every[2] = {1, 1};
  const CUtensorMapDataType type =
      dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, every,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status::ok : Status::invalid_argument;
}

}  // namespace madtp::cuda
