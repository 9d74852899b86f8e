// SPDX-License-Identifier: Apache-2.0
#pragma once

// JSON of a file that may be damaged: strict, and read in bounded time and memory. What is wrong is a
// std::runtime_error of one line.

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace example {

constexpr std::size_t kMaxJsonBytes = std::size_t{16} << 20;

inline std::string read_file(const std::string& path, std::size_t most) {
  std::error_code error;
  const std::filesystem::file_status found = std::filesystem::status(path, error);
  if (!std::filesystem::exists(found)) throw std::runtime_error(path + ": is not there");
  if (!std::filesystem::is_regular_file(found)) throw std::runtime_error(path + ": is no regular file");
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  const std::streamoff size = file.tellg();
  if (size < 0 || std::size_t(size) > most)
    throw std::runtime_error(path + ": must have at most " + std::to_string(most) + " bytes");
  std::string text(std::size_t(size), '\0');
  file.seekg(0);
  if (!file.read(text.data(), size)) throw std::runtime_error(path + ": cannot be read");
  return text;
}

// A value. `where` names it in what is thrown, as in "config.json: vision_config.hidden_size".
class Json {
 public:
  enum class Kind { null, boolean, number, string, array, object };

  static Json parse(const std::string& text, const std::string& where);

  bool is_null() const { return kind_ == Kind::null; }
  bool has(const std::string& name) const { return kind_ == Kind::object && members_.count(name) != 0; }
  const std::map<std::string, Json>& members() const { return of(Kind::object, "an object").members_; }
  const std::vector<Json>& items() const { return of(Kind::array, "an array").items_; }
  const std::string& string() const { return of(Kind::string, "a string").string_; }
  double number() const { return of(Kind::number, "a number").number_; }

  const Json& operator[](const std::string& name) const {
    const auto found = members().find(name);
    if (found == members_.end()) throw std::runtime_error(where_ + ": has no \"" + name + "\"");
    return found->second;
  }

  // A whole number from `least` to `most`.
  long long integer(long long least, long long most) const {
    const double value = number();
    if (!(value >= double(least) && value <= double(most)) || value != std::floor(value))
      throw std::runtime_error(where_ + ": must be a whole number from " + std::to_string(least) + " to " +
                               std::to_string(most));
    return static_cast<long long>(value);
  }

  const std::string& where() const { return where_; }

 private:
  friend class JsonParser;

  const Json& of(Kind kind, const char* what) const {
    if (kind_ != kind) throw std::runtime_error(where_ + ": must be " + what);
    return *this;
  }

  Kind kind_ = Kind::null;
  bool boolean_ = false;
  double number_ = 0;
  std::string string_, where_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};

class JsonParser {
 public:
  JsonParser(const std::string& text, std::string where) : text_(text), where_(std::move(where)) {}

  Json whole() {
    Json value = this->value(where_ + ":", 0);
    skip_space();
    if (at_ != text_.size()) fail("there is text behind the value");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 32;

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error(where_ + ": is no JSON at byte " + std::to_string(at_) + ", " + why);
  }

  void skip_space() {
    while (at_ < text_.size() && std::string(" \t\n\r").find(text_[at_]) != std::string::npos) ++at_;
  }

  char peek() {
    skip_space();
    if (at_ == text_.size()) fail("it ends too early");
    return text_[at_];
  }

  bool take(char c) {
    const bool there = peek() == c;
    at_ += there;
    return there;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("expected ") + c);
  }

  Json value(const std::string& where, int depth) {
    if (depth > kMaxDepth) fail("it is nested too deeply");
    Json to;
    to.where_ = where;
    const char c = peek();
    if (c == '{') {
      to.kind_ = Json::Kind::object;
      expect('{');
      if (!take('}')) {
        do {
          if (peek() != '"') fail("expected a name");
          const std::string name = string();
          expect(':');
          const std::string inside = where + (where.back() == ':' ? " " : ".") + name;
          if (!to.members_.emplace(name, value(inside, depth + 1)).second) fail("there is a name twice");
        } while (take(','));
        expect('}');
      }
    } else if (c == '[') {
      to.kind_ = Json::Kind::array;
      expect('[');
      if (!take(']')) {
        do to.items_.push_back(value(where + "[]", depth + 1));
        while (take(','));
        expect(']');
      }
    } else if (c == '"') {
      to.kind_ = Json::Kind::string;
      to.string_ = string();
    } else if (word("true") || word("false")) {
      to.kind_ = Json::Kind::boolean;
      to.boolean_ = c == 't';
    } else if (!word("null")) {
      to.kind_ = Json::Kind::number;
      to.number_ = number();
    }
    return to;
  }

  bool word(const std::string& expected) {
    const bool there = text_.compare(at_, expected.size(), expected) == 0;
    at_ += there ? expected.size() : 0;
    return there;
  }

  std::size_t digits() {
    const std::size_t first = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    return at_ - first;
  }

  double number() {
    const std::size_t first = at_;
    if (text_[at_] == '-') ++at_;
    const bool zero = at_ < text_.size() && text_[at_] == '0';
    const std::size_t whole = digits();
    bool right = whole > 0 && !(zero && whole > 1);
    if (at_ < text_.size() && text_[at_] == '.') {
      ++at_;
      right = right && digits() > 0;
    }
    if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      ++at_;
      if (at_ < text_.size() && (text_[at_] == '+' || text_[at_] == '-')) ++at_;
      right = right && digits() > 0;
    }
    if (!right) fail("expected a value");
    const double value = std::strtod(text_.substr(first, at_ - first).c_str(), nullptr);
    if (!std::isfinite(value)) fail("a number is too large");
    return value;
  }

  // Characters beyond ASCII stay as they are; \u of one of these is not needed here, and refused.
  std::string string() {
    std::string to;
    ++at_;
    for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("there is a control character in a string");
      if (text_[at_] != '\\') {
        to += text_[at_];
        continue;
      }
      const char escaped = ++at_ < text_.size() ? text_[at_] : '\0';
      const std::string names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
      const std::size_t found = escaped == '\0' ? std::string::npos : names.find(escaped);
      if (found != std::string::npos) {
        to += meanings[found];
      } else if (escaped == 'u' && at_ + 4 < text_.size()) {
        int code = 0;
        for (int i = 1; i <= 4; ++i) {
          const std::string hex = "0123456789abcdef";
          const std::size_t digit = hex.find(char(text_[at_ + i] | 0x20));
          if (digit == std::string::npos) fail("there is a wrong \\u in a string");
          code = code * 16 + int(digit);
        }
        to += code < 0x80 ? char(code) : '?';
        at_ += 4;
      } else {
        fail("there is a wrong escape in a string");
      }
    }
    if (at_ >= text_.size()) fail("it ends in a string");
    ++at_;
    return to;
  }

  const std::string& text_;
  const std::string where_;
  std::size_t at_ = 0;
};

inline Json Json::parse(const std::string& text, const std::string& where) {
  return JsonParser(text, where).whole();
}

inline Json read_json(const std::string& path) { return Json::parse(read_file(path, kMaxJsonBytes), path); }

}  // namespace example
