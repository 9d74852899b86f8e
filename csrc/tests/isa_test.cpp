// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "tests/test.h"

using namespace madtp::cpu;

TEST(baseline_is_always_available) {
  EXPECT(available_isas().front() == Isa::baseline);
  EXPECT(available_isas().size() <= compiled_isas().size());
}

TEST(the_environment_chooses) {
  const char* wanted = std::getenv("MADTP_CPU_ISA");
  EXPECT(std::string(to_string(isa_choice().isa)) == (wanted ? wanted : to_string(available_isas().back())));
}

TEST(the_choice_is_available) {
  const std::vector<Isa> available = available_isas();
  EXPECT(std::find(available.begin(), available.end(), isa_choice().isa) != available.end());
}
