// Runs the tests on the simulated machine; MADTP_SIMT_SEED seeds its scheduler.

#include <cstdlib>
#include <exception>

#include "simt/machine.h"
#include "tests/test.h"

int main() {
  const char* const seed = std::getenv("MADTP_SIMT_SEED");
  madtp::simt::options.seed = seed == nullptr ? 0 : unsigned(std::atoi(seed));
  for (const madtp::test::Case& test : madtp::test::cases()) {
    const int before = madtp::test::failures;
    try {
      test.run();
    } catch (const std::exception& error) {
      ++madtp::test::failures;
      std::printf("%s\n", error.what());
    }
    std::printf("%s %s\n", madtp::test::failures == before ? "ok    " : "FAILED", test.name);
    std::fflush(stdout);
  }
  return madtp::test::failures == 0 ? 0 : 1;
}
