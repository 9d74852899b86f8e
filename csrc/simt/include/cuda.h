// SPDX-License-Identifier: Apache-2.0
#pragma once

// Of the driver: tensor maps and how they are made, and launches of compiled kernels, which are recorded.

#include <cstddef>
#include <cstdint>

using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;
enum CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
  CUDA_ERROR_INVALID_HANDLE = 400,
};
struct CUstream_st;
using CUstream = CUstream_st*;
using CUcontext = struct CUctx_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;
using CUdevice = int;
enum CUjit_option : int {};
enum CUlibraryOption : int {};
enum CUfunction_attribute { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };

CUresult cuCtxGetCurrent(CUcontext* context);
CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned);
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name);
CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device);
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream, void** parameters, void** extra);
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE = 0,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3,
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// A matrix of 16-bit elements, and the box of it that a copy takes.
struct alignas(64) CUtensorMap {
  const unsigned char* data;
  std::uint64_t columns, rows, row_bytes;
  std::uint32_t box_columns, box_rows;
  bool swizzled;
};

// The rules of the CUDA driver API for two dimensions; those it has beyond them are refused too.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides,
                                       const cuuint32_t* box, const cuuint32_t* element_strides,
                                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool is_valid = rank == 2 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && data != nullptr &&
                        sizes[0] > 0 && sizes[1] > 0 && sizes[0] <= std::uint64_t{1} << 32 &&
                        sizes[1] <= std::uint64_t{1} << 32 && strides[0] % 16 == 0 &&
                        strides[0] < std::uint64_t{1} << 40 && strides[0] >= sizes[0] * 2 && box[0] >= 1 &&
                        box[0] <= 256 && box[1] >= 1 && box[1] <= 256 && box[0] * 2 % 16 == 0 &&
                        element_strides[0] == 1 && element_strides[1] == 1 &&
                        (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= 128);
  if (!is_valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const unsigned char*>(data), sizes[0], sizes[1], strides[0], box[0], box[1],
          swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  return CUDA_SUCCESS;
}
