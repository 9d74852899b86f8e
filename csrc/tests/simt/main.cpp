// SPDX-License-Identifier: Apache-2.0
// Runs the tests on the simulated machine; MADTP_SIMT_SEED seeds its scheduler.

#include <cstdlib>

#include "simt/machine.h"
#include "tests/test.h"

int main() {
  const char* const seed = std::getenv("MADTP_SIMT_SEED");
  madtp::simt::options.seed = seed == nullptr ? 0 : unsigned(std::atoi(seed));
  return madtp::test::run_all();
}
