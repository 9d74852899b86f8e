# SPDX-License-Identifier: Apache-2.0
# cmake -DNM=... -DISA=avx2 -DOBJECTS=a.o;b.o -P CheckIsa.cmake
# An inline function of a shared header (std::vector, std::sort) that is compiled into a wide object as a weak symbol may be the
# copy the linker keeps for the whole program: an illegal instruction on a CPU without that set. So every weak symbol of such an
# object must carry its namespace, madtp::cpu::<isa>.
string(LENGTH ${ISA} length)
execute_process(COMMAND ${NM} ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL " [WVu] [^\n]+" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "5madtp3cpu${length}${ISA}|DW\\.ref\\.")
if(weak)
  list(JOIN weak "\n " weak)
  message(FATAL_ERROR "${ISA} kernels instantiate shared inline functions; use plain loops, or types of their own namespace:\n ${weak}")
endif()
