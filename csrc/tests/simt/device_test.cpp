// SPDX-License-Identifier: Apache-2.0
// The device that a call is for, and what the library has for it.

#include "cuda/device.h"

#include <cuda_runtime.h>

#include <thread>
#include <vector>

#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

TEST(code_for_an_architecture) {
  const auto runs = [](const char* archs, int capability) { return cuda::has_code(archs, capability); };
  EXPECT(runs("80;90a", 80) && runs("80;90a", 86) && runs("80;90a", 90) && runs("80;90a", 120));
  EXPECT(!runs("80;90a", 75) && !runs("90a", 80) && runs("90a", 90) && !runs("90a", 100));
  EXPECT(!runs("89", 86) && runs("100f", 103) && !runs("100f", 120) && !runs("103f", 100));
  EXPECT(!runs("", 90));
}

TEST(code_for_an_architecture_alone) {
  EXPECT(cuda::specific_code("80;90a", 90) == 90 && cuda::specific_code("80;90a", 100) == 0);
  EXPECT(cuda::specific_code("80", 90) == 0 && cuda::specific_code("80;90a", 80) == 0);
  EXPECT(cuda::specific_code("100f;103a;100a", 103) == 103 && cuda::specific_code("80;100f", 103) == 100);
  EXPECT(cuda::specific_code("100f", 120) == 0);
}

TEST(a_device_is_asked_for_what_it_is) {
  cuda::Device device;
  for (int capability : {80, 90, 80}) {
    const Capability pretended(capability);
    EXPECT(cuda::current_device(&device) == Status::ok);
    EXPECT(device.capability == capability && device.specific_code == (capability == 90 ? 90 : 0));
    EXPECT(device.multiprocessors == simt::options.multiprocessors);
    EXPECT(device.block_shared_bytes == 227 * 1024 && device.shared_bytes == 228 * 1024);
  }
  const Capability no_hopper(90, "80");
  EXPECT(cuda::current_device(&device) == Status::ok && device.specific_code == 0);
}

TEST(a_device_is_asked_once) {
  cuda::Device device;
  EXPECT(cuda::current_device(&device) == Status::ok);
  const int before = simt::questions;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([] {
      cuda::Device same;
      for (int call = 0; call < 100; ++call)
        if (cuda::current_device(&same) != Status::ok || same.capability != 90) ++failures;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(simt::questions == before);
}

TEST(devices_without_code_are_refused) {
  const LinearCase p(DType::bfloat16, 4, 16, 32);
  const Guarded<std::uint16_t> out(4 * 16);
  const Sparse24Linear inputs = p.inputs(Activation::none);
  const auto refused = [&] {
    int count = -1;
    EXPECT(cuda::sparse24_linear(inputs, out.data(), 16, nullptr) == Status::unsupported);
    EXPECT(cuda::sparse24_linear_configs(inputs, nullptr, 0, &count) == Status::unsupported && count == -1);
    EXPECT(cuda::sparse24_pack(p.weight(), p.layout.data(), nullptr) == Status::unsupported);
  };
  for (int capability : {75, 80}) {  // too old; none of the library's architectures
    const Capability pretended(capability, "90a");
    refused();
  }
  {
    const Capability turing(75, "75");
    refused();
  }
  simt::options.device_error = cudaErrorNoDevice;
  refused();
  simt::options.device_error = cudaSuccess;
  for (std::uint16_t bits : out.values()) EXPECT(bits == 0xffff);
}

TEST(a_device_that_does_not_answer_is_asked_again) {
  const Capability pretended(89, "89");  // a device that no test has asked before
  cuda::Device device;
  simt::options.device_error = cudaErrorInvalidValue;
  for (int i = 0; i < 2; ++i) EXPECT(cuda::current_device(&device) == Status::unsupported);
  simt::options.device_error = cudaSuccess;
  EXPECT(cuda::current_device(&device) == Status::ok && device.capability == 89);
}

TEST(a_stream_of_another_device_is_refused) {
  int device = -1;
  EXPECT(cudaGetDevice(&device) == cudaSuccess);
  CUstream_st here{device}, elsewhere{device + 1};
  const LinearCase p(DType::bfloat16, 4, 16, 32);
  const Guarded<std::uint16_t> dense(16 * 32), values(16 * 16);
  const Guarded<std::uint8_t> layout(std::int64_t(p.layout.size())), indices(16 * 4);
  const Guarded<std::int32_t> has_nan(1);
  std::fill_n(dense.data(), 16 * 32, std::uint16_t(0));
  for (int architecture : {80, 90}) {
    const Guarded<std::uint16_t> out(4 * 16);
    const cuda::Sparse24Config config{architecture, 64, architecture == 80 ? 64 : 128};
    const auto linear = [&](void* stream) {
      return cuda::sparse24_linear(p.inputs(Activation::none), out.data(), 16, stream, &config);
    };
    EXPECT(linear(&elsewhere) == Status::invalid_argument);
    for (std::uint16_t bits : out.values()) EXPECT(bits == 0xffff);
    EXPECT(linear(&here) == Status::ok);
  }
  const auto pack = [&](void* stream) { return cuda::sparse24_pack(p.weight(), layout.data(), stream); };
  EXPECT(pack(&elsewhere) == Status::invalid_argument && pack(&here) == Status::ok);
  const auto prune = [&](void* stream) {
    return cuda::sparse24_prune({DType::bfloat16, dense.data(), 32, nullptr, 0, 16, 32}, values.data(),
                                indices.data(), has_nan.data(), stream);
  };
  EXPECT(prune(&elsewhere) == Status::invalid_argument && prune(&here) == Status::ok);
}
