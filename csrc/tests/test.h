// SPDX-License-Identifier: Apache-2.0
#pragma once

// TEST(name) { ... EXPECT(condition); EXPECT_NEAR(a, b, tolerance); }: a failed expectation is printed and
// counted, and the test goes on. run_all is what main does.

#include <cmath>
#include <cstdio>
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

inline int failures = 0;

inline bool add(const char* name, void (*run)()) {
  cases().push_back({name, run});
  return true;
}

inline void expect(bool holds, const char* text, const char* file, int line) {
  if (holds) return;
  ++failures;
  std::printf("%s:%d: expected %s\n", file, line, text);
}

inline void expect_near(double a, double b, double tolerance, const char* text, const char* file, int line) {
  if (std::abs(a - b) <= tolerance) return;  // false for NaN
  ++failures;
  std::printf("%s:%d: expected %s, got %.9g and %.9g\n", file, line, text, a, b);
}

// Runs all tests: what main returns.
inline int run_all() {
  for (const Case& test : cases()) {
    const int before = failures;
    try {
      test.run();
    } catch (const std::exception& error) {
      ++failures;
      std::printf("%s\n", error.what());
    }
    std::printf("%s %s\n", failures == before ? "ok    " : "FAILED", test.name);
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
