// SPDX-License-Identifier: Apache-2.0
#pragma once

// TEST(name) { ... EXPECT(condition); EXPECT_NEAR(a, b, tolerance); }: a failed expectation is counted, the
// first of a test are printed, and the test goes on. run_all is what main does.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

namespace madtp::test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int failures = 0;         // of all tests
inline int failures_before = 0;  // the one that runs

constexpr int kShown = 5;  // of a test: a wrong layout fails some expectation for every element

// Counts a failure. Whether it is to be printed.
inline bool add_failure() { return ++failures - failures_before <= kShown; }

inline bool add(const char* name, void (*run)()) {
  cases().push_back({name, run});
  return true;
}

inline void expect(bool holds, const char* text, const char* file, int line) {
  if (!holds && add_failure()) std::printf("%s:%d: expected %s\n", file, line, text);
}

inline void expect_near(double a, double b, double tolerance, const char* text, const char* file, int line) {
  if (std::abs(a - b) <= tolerance) return;  // false for NaN
  if (add_failure()) std::printf("%s:%d: expected %s, got %.9g and %.9g\n", file, line, text, a, b);
}

// Runs all tests, or the one of this name: what main returns.
inline int run_all(const char* only = nullptr) {
  for (const Case& test : cases()) {
    if (only != nullptr && std::strcmp(only, test.name) != 0) continue;
    failures_before = failures;
    try {
      test.run();
    } catch (const std::exception& error) {
      ++failures;
      std::printf("%s\n", error.what());
    }
    const int failed = failures - failures_before;
    if (failed > kShown) std::printf("and %d more\n", failed - kShown);
    std::printf("%s %s\n", failed == 0 ? "ok    " : "FAILED", test.name);
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace madtp::test

#define TEST(name)                                                                 \
  static void name();                                                              \
  [[maybe_unused]] static const bool added_##name = madtp::test::add(#name, name); \
  static void name()

#define EXPECT(condition) madtp::test::expect(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
#define EXPECT_NEAR(a, b, tolerance) \
  madtp::test::expect_near(a, b, tolerance, #a " within " #tolerance " of " #b, __FILE__, __LINE__)
