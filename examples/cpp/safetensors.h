// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tensors of a safetensors file: eight bytes that say how long the header is, a JSON header with dtype, shape
// and place of every tensor, and the tensors, one after another without a gap. A damaged file is a
// std::runtime_error of one line.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "json.h"

namespace example {

class Safetensors {
 public:
  explicit Safetensors(const std::string& path) : path_(path), bytes_(read_file(path, SIZE_MAX / 2)) {
    std::uint64_t length = 0;
    if (bytes_.size() < 8) fail("is cut short");
    for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(bytes_[i]);
    if (length > kMaxJsonBytes) fail("has a header of more than 16 MiB");
    if (length > bytes_.size() - 8) fail("is cut short in its header");
    data_ = 8 + std::size_t(length);
    const Json header = Json::parse(bytes_.substr(8, std::size_t(length)), path);
    std::vector<std::pair<std::size_t, std::size_t>> places;
    for (const auto& [name, entry] : header.members()) {
      if (name == "__metadata__") continue;
      const Tensor tensor = described(name, entry);
      places.emplace_back(tensor.begin, tensor.end);
      tensors_.emplace(name, tensor);
    }
    std::sort(places.begin(), places.end());
    std::size_t end = 0;
    for (const auto& [first, last] : places) {
      if (first != end) fail("has tensors that overlap or leave a gap");
      end = last;
    }
    if (end != bytes_.size() - data_) fail("does not end where its last tensor does");
  }

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }

  const std::vector<std::int64_t>& shape(const std::string& name) const { return find(name).shape; }

  // A copy of a tensor, which must be of this type and shape: float is F32, int8_t is I8, uint8_t is U8.
  template <class T>
  std::vector<T> read(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const Tensor& tensor = find(name);
    if (tensor.dtype != dtype_of(T{})) fail(name + " must be " + dtype_of(T{}) + ", got " + tensor.dtype);
    if (tensor.shape != shape)
      fail(name + " must be of shape " + text(shape) + ", got " + text(tensor.shape));
    std::vector<T> to((tensor.end - tensor.begin) / sizeof(T));
    if (!to.empty()) std::memcpy(to.data(), bytes_.data() + data_ + tensor.begin, tensor.end - tensor.begin);
    return to;
  }

 private:
  struct Tensor {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::size_t begin, end;  // bytes behind the header
  };

  static const char* dtype_of(float) { return "F32"; }
  static const char* dtype_of(std::int8_t) { return "I8"; }
  static const char* dtype_of(std::uint8_t) { return "U8"; }

  static std::size_t size_of(const std::string& dtype) {
    for (const char* name : {"BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"})
      if (dtype == name) return 1;
    for (const char* name : {"F16", "BF16", "I16", "U16"})
      if (dtype == name) return 2;
    for (const char* name : {"F32", "I32", "U32"})
      if (dtype == name) return 4;
    for (const char* name : {"F64", "I64", "U64"})
      if (dtype == name) return 8;
    return 0;
  }

  static std::string text(const std::vector<std::int64_t>& shape) {
    std::string to = "(";
    for (const std::int64_t size : shape) to += (to.size() > 1 ? ", " : "") + std::to_string(size);
    return to + ")";
  }

  [[noreturn]] void fail(const std::string& why) const { throw std::runtime_error(path_ + ": " + why); }

  const Tensor& find(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("has no tensor " + name);
    return found->second;
  }

  Tensor described(const std::string& name, const Json& entry) const {
    Tensor tensor{entry["dtype"].string(), {}, 0, 0};
    std::size_t bytes = size_of(tensor.dtype);
    if (bytes == 0) fail(name + " has the unknown dtype " + tensor.dtype);
    const std::vector<Json>& sizes = entry["shape"].items();
    if (sizes.size() > 8) fail(name + " has more than 8 dimensions");
    for (const Json& item : sizes) {
      tensor.shape.push_back(item.integer(0, INT32_MAX));
      if (__builtin_mul_overflow(bytes, std::size_t(tensor.shape.back()), &bytes))
        fail(name + " is too large");
    }
    const std::vector<Json>& offsets = entry["data_offsets"].items();
    if (offsets.size() != 2) fail(name + " must have two data_offsets");
    constexpr long long kMost = 1LL << 53;
    tensor.begin = std::size_t(offsets[0].integer(0, kMost));
    tensor.end = std::size_t(offsets[1].integer(0, kMost));
    if (tensor.begin > tensor.end || tensor.end - tensor.begin != bytes)
      fail(name + " has data_offsets that are not of its shape");
    if (tensor.end > bytes_.size() - data_) fail("is cut short, " + name + " is not all there");
    return tensor;
  }

  std::string path_, bytes_;
  std::size_t data_ = 0;  // where the tensors begin
  std::map<std::string, Tensor> tensors_;
};

}  // namespace example
