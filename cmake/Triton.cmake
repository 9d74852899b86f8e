# SPDX-License-Identifier: Apache-2.0
# MADTP_EMBED_TRITON=AUTO|ON|OFF: whether the CUDA library holds the Triton kernels, for programs without Python.
# -> MADTP_HAS_TRITON, or MADTP_TRITON_MISSING: the reason why not; madtp_triton_sources(), the sources of their tables
set(MADTP_HAS_TRITON OFF)
set(MADTP_TRITON_MISSING "")
set(madtp_triton_python OFF) # whether there is one that can make them

if(NOT MADTP_EMBED_TRITON MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MADTP_EMBED_TRITON must be AUTO, ON or OFF, got '${MADTP_EMBED_TRITON}'")
endif()
foreach(size IN LISTS MADTP_TRITON_HEAD_SIZES)
  if(NOT size MATCHES "^[0-9]+$" OR size LESS 8 OR size GREATER 256)
    message(FATAL_ERROR "MADTP_TRITON_HEAD_SIZES must be multiples of 8 up to 256 like 64;128, got '${MADTP_TRITON_HEAD_SIZES}'")
  endif()
endforeach()
find_package(Python 3.10 QUIET COMPONENTS Interpreter)
if(Python_Interpreter_FOUND)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import triton; print(triton.__version__)"
                  OUTPUT_VARIABLE madtp_triton_version OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE result ERROR_QUIET)
  if(result EQUAL 0)
    set(madtp_triton_python ON)
  endif()
endif()

set(madtp_triton_archs ${MADTP_CUDA_ARCHS})
list(TRANSFORM madtp_triton_archs REPLACE "[af]$" "")
list(FILTER madtp_triton_archs INCLUDE REGEX "^(80|90)$")
if(MADTP_EMBED_TRITON STREQUAL "OFF")
  set(MADTP_TRITON_MISSING "built with MADTP_EMBED_TRITON=OFF")
elseif(NOT MADTP_HAS_CUDA)
  set(MADTP_TRITON_MISSING "it needs the CUDA kernels: ${MADTP_CUDA_MISSING}")
elseif(NOT madtp_triton_python)
  set(MADTP_TRITON_MISSING "no Python with triton was found at build time (Python_EXECUTABLE)")
elseif(NOT madtp_triton_archs)
  set(MADTP_TRITON_MISSING "MADTP_CUDA_ARCHS has neither 80 nor 90")
else()
  set(MADTP_HAS_TRITON ON)
endif()
if(MADTP_HAS_TRITON)
  message(STATUS "Madtp: Triton ${madtp_triton_version} kernels embedded for sm_${madtp_triton_archs}, head sizes ${MADTP_TRITON_HEAD_SIZES}")
elseif(MADTP_EMBED_TRITON STREQUAL "ON")
  message(FATAL_ERROR "MADTP_EMBED_TRITON=ON, but ${MADTP_TRITON_MISSING}")
else()
  message(STATUS "Madtp: no Triton kernels embedded, ${MADTP_TRITON_MISSING}")
endif()

file(GLOB_RECURSE madtp_triton_files CONFIGURE_DEPENDS madtp_kernels/triton/*.py)

# The sources of the tables in `folder`, made by the arguments that follow.
function(madtp_triton_sources result folder)
  set(sources ${folder}/attention.cpp ${folder}/attention_rows.cpp ${folder}/tokens.cpp)
  add_custom_command(OUTPUT ${sources}
    COMMAND ${CMAKE_COMMAND} -E env TRITON_CACHE_DIR=${PROJECT_BINARY_DIR}/triton_cache
            ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/embed_triton.py --out ${folder} --head-sizes ${MADTP_TRITON_HEAD_SIZES} ${ARGN}
    DEPENDS ${PROJECT_SOURCE_DIR}/cmake/embed_triton.py ${madtp_triton_files} ${PROJECT_SOURCE_DIR}/madtp_kernels/selection.py
    COMMENT "Triton kernels of ${folder}" VERBATIM)
  set(${result} ${sources} PARENT_SCOPE)
endfunction()

set(werror "")
if(MADTP_WERROR)
  set(werror --werror)
endif()
set(triton_tables csrc/cuda/triton/absent/kernels.cpp)
if(MADTP_HAS_TRITON)
  madtp_triton_sources(triton_tables ${PROJECT_BINARY_DIR}/triton --archs ${madtp_triton_archs} --fatbinary ${CUDAToolkit_BIN_DIR}/fatbinary ${werror})
  add_custom_target(triton_kernels DEPENDS ${triton_tables}) # the libraries of both kinds wait for one compilation
endif()
