// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"
#include "tests/test.h"

int main() {
  const madtp::cpu::IsaChoice& choice = madtp::cpu::isa_choice();
  if (!choice.error.empty()) {
    std::printf("skipped: %s\n", choice.error.c_str());
    return 77;  // SKIP_RETURN_CODE
  }
  return madtp::test::run_all();
}
