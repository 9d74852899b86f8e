// SPDX-License-Identifier: Apache-2.0
// Reads calls, one a line, and prints the launches that they make, one a line of JSON:
//
//   attention capability=90 dtype=1 tokens_q=80 ...
//
// Pointers of a call are numbers, which are not read; -1 is the workspace, whose address is 0 in what is
// printed. A call ends in its status and the bytes of its workspace.

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/triton/kernels.h"
#include "madtp/attention.h"
#include "madtp/attention_rows.h"
#include "madtp/tokens.h"
#include "simt/driver.h"
#include "simt/machine.h"

using namespace madtp;

namespace {

std::vector<char> workspace;

struct Call {
  std::string op;
  std::map<std::string, double> values;

  double number(const char* name) const {
    const auto found = values.find(name);
    if (found == values.end()) throw std::runtime_error(std::string("no ") + name);
    return found->second;
  }
  std::int64_t operator[](const char* name) const { return std::int64_t(number(name)); }
  template <typename T>
  T* pointer(const char* name) const {
    return reinterpret_cast<T*>((*this)[name]);
  }
};

void print(const simt::DriverLaunch& launch) {
  const auto& kernel = *static_cast<const cuda::triton::Kernel*>(launch.image);
  std::printf("{\"kernel\": \"%s\", \"name\": \"%s\", \"arch\": %d, \"grid\": [%u, %u], \"threads\": %u, ",
              launch.entry.c_str(), kernel.name, kernel.arch, launch.columns, launch.rows, launch.threads);
  std::printf("\"constants\": {");
  const char* comma = "";
  for (const auto& constant : kernel.constants) {
    if (constant.name == nullptr) break;
    std::printf("%s\"%s\": %d", comma, constant.name, constant.value);
    comma = ", ";
  }
  std::printf("}, \"parameters\": [");
  const auto begin = std::uint64_t(workspace.data()), end = begin + workspace.size();
  for (std::size_t i = 0; kernel.signature[i] != 0; ++i) {
    const void* const value = launch.parameters[i];
    if (i > 0) std::printf(", ");
    if (kernel.signature[i] == 'p') {
      std::uint64_t address;
      std::memcpy(&address, value, 8);
      if (address >= begin && address < end)
        std::printf("[\"workspace\", %" PRIu64 "]", address - begin);
      else
        std::printf("[\"given\", %" PRIu64 "]", address);
    } else if (kernel.signature[i] == 'i') {
      std::int32_t number;
      std::memcpy(&number, value, 4);
      std::printf("%d", number);
    } else {
      float number;
      std::memcpy(&number, value, 4);
      std::printf("%.9g", double(number));
    }
  }
  std::printf("]}\n");
}

void finish(Status status) {
  std::printf("{\"status\": \"%s\", \"workspace\": %zu}\n", to_string(status), workspace.size());
}

void attention(const Call& c) {
  AttentionInputs a{};
  a.dtype = DType(c["dtype"]);
  a.q = c.pointer<void>("q"), a.k = c.pointer<void>("k"), a.v = c.pointer<void>("v");
  a.q_strides[0] = c["q_row"], a.q_strides[1] = c["q_head"];
  a.k_strides[0] = c["k_row"], a.k_strides[1] = c["k_head"];
  a.v_strides[0] = c["v_row"], a.v_strides[1] = c["v_head"];
  a.cu_seqlens_q = c.pointer<std::int32_t>("cu_seqlens_q"),
  a.cu_seqlens_k = c.pointer<std::int32_t>("cu_seqlens_k");
  a.tokens_q = c["tokens_q"], a.tokens_k = c["tokens_k"], a.batch = c["batch"];
  a.heads = c["heads"], a.key_heads = c["key_heads"], a.head_dim = c["head_dim"];
  a.softmax_scale = float(c.number("softmax_scale")), a.causal = c["causal"] != 0;
  a.window_left = c["window_left"], a.window_right = c["window_right"];
  a.summary_index = c.pointer<std::int32_t>("summary_index");
  const std::int64_t max_q = c["max_seqlen_q"], max_k = c["max_seqlen_k"];
  std::int64_t bytes = 0;
  const bool statistics = c["summary_attention"] != 0;
  Status status = cuda::varlen_attention_workspace(a, max_q, max_k, statistics, &bytes);
  if (status != Status::ok) return finish(status);
  workspace.assign(std::size_t(bytes), 0);
  finish(cuda::varlen_attention(a, max_q, max_k, c.pointer<void>("out"), c.pointer<float>("lse"),
                                c.pointer<float>("summary_attention"), c.pointer<float>("received_attention"),
                                workspace.data(), c.pointer<void>("stream")));
}

void rows(const Call& c) {
  AttentionRowsInputs a{};
  a.dtype = DType(c["dtype"]);
  a.q_rows = c.pointer<void>("q"), a.k = c.pointer<void>("k");
  a.q_strides[0] = c["q_row"], a.q_strides[1] = c["q_head"];
  a.k_strides[0] = c["k_row"], a.k_strides[1] = c["k_head"];
  a.cu_seqlens_q = c.pointer<std::int32_t>("cu_seqlens_q"),
  a.cu_seqlens_k = c.pointer<std::int32_t>("cu_seqlens_k");
  a.rows = c["rows"], a.tokens = c["tokens"], a.batch = c["batch"];
  a.heads = c["heads"], a.key_heads = c["key_heads"], a.head_dim = c["head_dim"];
  a.softmax_scale = float(c.number("softmax_scale")),
  a.row_position = c.pointer<std::int32_t>("row_position");
  std::int64_t bytes = 0;
  const Status status = cuda::attention_rows_workspace(a, &bytes);
  if (status != Status::ok) return finish(status);
  workspace.assign(std::size_t(bytes), 0);
  finish(cuda::attention_rows(a, c.pointer<float>("attention"), workspace.data(), c.pointer<void>("stream")));
}

void scores(const Call& c) {
  ScoreInputs s{};
  s.mag_logits = c.pointer<void>("mag_logits"), s.logits_dtype = DType(c["dtype"]);
  s.logits_stride = c["logits_stride"], s.alignment_tokens = c["alignment_tokens"];
  s.cu_seqlens = c.pointer<std::int32_t>("cu_seqlens");
  s.tokens = c["tokens"], s.batch = c["batch"];
  s.summary_index = c.pointer<std::int32_t>("summary_index");
  s.protected_rows = c.pointer<std::uint8_t>("protected");
  const SelectionOutputs to{c.pointer<std::uint8_t>("keep"), c.pointer<std::int32_t>("cu_seqlens_out"),
                            c.pointer<std::int32_t>("source"), c.pointer<float>("merge_weight")};
  const auto summary = c.pointer<float>("summary_attention"),
             received = c.pointer<float>("received_attention"), importance = c.pointer<float>("importance");
  const auto stream = c.pointer<void>("stream");
  std::int64_t bytes = 0;
  const Status status = cuda::score_workspace(s, &bytes);
  if (status != Status::ok) return finish(status);
  workspace.assign(std::size_t(bytes), 0);
  if (c.op == "token_importance")
    finish(cuda::token_importance(summary, received, s, importance, workspace.data(), stream));
  else if (c.op == "select_tokens")
    finish(cuda::select_tokens(importance, s, c.number("temperature"), to, workspace.data(), stream));
  else
    finish(cuda::score_and_select(summary, received, s, c.number("temperature"), importance, to,
                                  workspace.data(), stream));
}

}  // namespace

int main() {
  simt::driver_options.on_launch = print;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    Call call;
    words >> call.op;
    for (std::string word; words >> word;) {
      const std::size_t equals = word.find('=');
      call.values[word.substr(0, equals)] = std::stod(word.substr(equals + 1));
    }
    simt::options.capability = int(call["capability"]);
    if (call.op == "attention")
      attention(call);
    else if (call.op == "attention_rows")
      rows(call);
    else
      scores(call);
  }
}
