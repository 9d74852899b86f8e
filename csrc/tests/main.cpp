#include "cpu/isa.h"
#include "tests/test.h"

int main() {
  const madtp::cpu::IsaChoice& choice = madtp::cpu::isa_choice();
  if (!choice.error.empty()) {
    std::printf("skipped: %s\n", choice.error.c_str());
    return 77;  // SKIP_RETURN_CODE
  }
  for (const madtp::test::Case& test : madtp::test::cases()) {
    const int before = madtp::test::failures;
    test.run();
    std::printf("%s %s\n", madtp::test::failures == before ? "ok    " : "FAILED", test.name);
  }
  return madtp::test::failures == 0 ? 0 : 1;
}
