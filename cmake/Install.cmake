# SPDX-License-Identifier: Apache-2.0
# Headers, library and the package files behind find_package(Madtp), target Madtp::kernels.
include(CMakePackageConfigHelpers)
set(config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/Madtp)

set_target_properties(madtp_kernels PROPERTIES EXPORT_NAME kernels)
install(TARGETS madtp_kernels EXPORT MadtpTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT MadtpTargets NAMESPACE Madtp:: DESTINATION ${config_dir})
install(DIRECTORY csrc/include/madtp ${PROJECT_BINARY_DIR}/include/madtp DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.h")

configure_package_config_file(cmake/MadtpConfig.cmake.in MadtpConfig.cmake INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file(MadtpConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/MadtpConfig.cmake ${PROJECT_BINARY_DIR}/MadtpConfigVersion.cmake DESTINATION ${config_dir})
