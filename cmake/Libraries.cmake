# SPDX-License-Identifier: Apache-2.0
# libmadtp_kernels, static and shared. The kernels of each instruction set are compiled once for both, the entry points for each.
# BUILD_SHARED_LIBS builds and installs the one or the other; unset, both. What is built here beside them (the Python module, the
# tests) uses what is hidden in the shared library, and links madtp_kernels_static.
# -> madtp_libraries, those that are installed
foreach(kind IN ITEMS STATIC SHARED)
  string(TOLOWER madtp_kernels_${kind} library)
  add_library(${library} ${kind} EXCLUDE_FROM_ALL ${cpu_sources})
  madtp_compile(${library})
  if(MADTP_HAS_CUDA)
    target_sources(${library} PRIVATE ${cuda_sources} ${triton_sources} ${triton_tables})
    if(MADTP_HAS_TRITON)
      add_dependencies(${library} triton_kernels)
    endif()
    target_link_libraries(${library} PRIVATE CUDA::cudart_static)
  endif()
  if(MADTP_HAS_OPENMP)
    target_link_libraries(${library} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  target_compile_features(${library} INTERFACE cxx_std_17)
  target_include_directories(${library} INTERFACE
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include> $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  set_target_properties(${library} PROPERTIES OUTPUT_NAME madtp_kernels EXPORT_NAME kernels)
endforeach()
madtp_add_isa_kernels("madtp_kernels_static;madtp_kernels_shared" ${kernel_sources})
target_compile_definitions(madtp_kernels_static PRIVATE MADTP_STATIC_OBJECTS)

# Before 1.0 a minor version may change the ABI, so its number is part of the name that programs ask the loader for.
set_target_properties(madtp_kernels_shared PROPERTIES
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
# Templates of the standard library are not hidden by compiler flags, nor is a static CUDA runtime.
include(CheckLinkerFlag)
set(exports ${PROJECT_BINARY_DIR}/private/exports.map)
configure_file(cmake/exports.map.in ${exports} @ONLY)
check_linker_flag(CXX "-Wl,--version-script,${exports}" MADTP_HAS_VERSION_SCRIPT)
if(MADTP_HAS_VERSION_SCRIPT)
  target_link_options(madtp_kernels_shared PRIVATE "-Wl,--version-script,${exports}")
  set_target_properties(madtp_kernels_shared PROPERTIES LINK_DEPENDS ${exports})
endif()

if(NOT DEFINED BUILD_SHARED_LIBS)
  set(madtp_libraries madtp_kernels_static madtp_kernels_shared)
elseif(BUILD_SHARED_LIBS)
  set(madtp_libraries madtp_kernels_shared)
else()
  set(madtp_libraries madtp_kernels_static)
endif()
set_target_properties(${madtp_libraries} PROPERTIES EXCLUDE_FROM_ALL OFF)
list(GET madtp_libraries 0 library)
add_library(Madtp::kernels ALIAS ${library})
