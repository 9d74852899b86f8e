// SPDX-License-Identifier: Apache-2.0
#pragma once

// MADTP_API marks what the shared library exports: functions, and all that a namespace of a public header
// declares. What a static library is made of is built with MADTP_STATIC_OBJECTS, so that a shared library
// which takes it in does not export it again.
#if defined(__GNUC__) && !defined(MADTP_STATIC_OBJECTS)
#define MADTP_API __attribute__((visibility("default")))
#else
#define MADTP_API
#endif
