// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random operands for instructions.h, and the results by the fragment tables of the PTX manual, in float64.
// Small integers make every sum exact; numbers of the normal distribution do not.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "tests/gpu/instructions.h"
#include "tests/simt/quantized_cases.h"

namespace madtp::test {

enum class Numbers { integers, normal };

constexpr Operand kOperands[] = {Operand::bfloat16, Operand::float16, Operand::int8, Operand::e4m3};

inline bool has_selectors(Operand operand) {
  return operand == Operand::bfloat16 || operand == Operand::float16;
}

inline float draw(Numbers numbers, std::mt19937& generator) {
  if (numbers == Numbers::integers) return float(generator() % 9) - 4;
  return std::normal_distribution<float>(0, 1)(generator);
}

inline LdmatrixOperands draw_ldmatrix(std::mt19937& generator) {
  LdmatrixOperands o;
  for (auto& row : o.shared)
    for (std::uint32_t& word : row) word = std::uint32_t(generator());
  for (std::uint32_t& row : o.rows) row = generator() % 256;
  return o;
}

inline StmatrixOperands draw_stmatrix(std::mt19937& generator) {
  StmatrixOperands o;
  for (auto& words : o.r)
    for (std::uint32_t& word : words) word = std::uint32_t(generator());
  std::iota(std::begin(o.rows), std::end(o.rows), 0u);
  std::shuffle(std::begin(o.rows), std::end(o.rows), generator);
  return o;
}

inline CopyOperands draw_copies(std::mt19937& generator) {
  CopyOperands o;
  for (auto& chunk : o.from)
    for (unsigned char& byte : chunk) byte = static_cast<unsigned char>(generator());
  std::iota(std::begin(o.to), std::end(o.to), 0u);
  std::shuffle(std::begin(o.to), std::end(o.to), generator);
  for (int& bytes : o.bytes) bytes = int(generator() % 17);
  return o;
}

inline std::uint32_t bits_of(float x, Operand operand) {
  if (operand == Operand::int8) return std::uint8_t(int(x));
  if (operand == Operand::e4m3) return nearest_e4m3(x);
  return encode(x, operand == Operand::float16 ? DType::float16 : DType::bfloat16);
}
inline float number_of(std::uint32_t bits, Operand operand) {
  if (operand == Operand::int8) return float(std::int8_t(bits));
  if (operand == Operand::e4m3) return simt::e4m3_to_float(bits);
  return decode(std::uint16_t(bits), operand == Operand::float16 ? DType::float16 : DType::bfloat16);
}

// A (rows, 16 w), 2:4, B (16 w, columns) and D (rows, columns) of elements of which a word has w.
struct SparseProduct {
  Operand operand;
  int rows, columns, w, depth;
  std::vector<unsigned> nibbles;  // (rows, depth / 4)
  std::vector<float> kept;        // (rows, depth / 2)
  std::vector<float> b, d;

  SparseProduct(Operand operand, int rows, int columns, Numbers numbers, std::mt19937& generator)
      : operand(operand),
        rows(rows),
        columns(columns),
        w(operand == Operand::int8 || operand == Operand::e4m3 ? 4 : 2),
        depth(16 * w) {
    constexpr unsigned valid[] = {4, 8, 12, 9, 13, 14};
    const auto rounded = [&] { return number_of(bits_of(draw(numbers, generator), operand), operand); };
    for (int i = 0; i < rows * depth / 4; ++i) nibbles.push_back(valid[generator() % 6]);
    for (int i = 0; i < rows * depth / 2; ++i) kept.push_back(rounded());
    for (int i = 0; i < depth * columns; ++i) b.push_back(rounded());
    for (int i = 0; i < rows * columns; ++i)
      d.push_back(operand == Operand::int8 ? float(int(generator() % 999)) : draw(numbers, generator));
  }
  // use(a, b) for the two factors of every product in the sum at (row, column).
  template <typename Use>
  void for_each_product(int row, int column, Use&& use) const {
    for (int group = 0; group < depth / 4; ++group)
      for (int i = 0; i < 2; ++i) {
        const int k = 4 * group + int(nibble(row, group) >> (2 * i) & 3);
        use(double(kept[std::size_t(row * depth / 2 + 2 * group + i)]),
            double(b[std::size_t(k * columns + column)]));
      }
  }
  unsigned nibble(int row, int group) const { return nibbles[std::size_t(row * depth / 4 + group)]; }
  // w elements, the first in the lowest bits: number(i) of each.
  template <typename Number>
  std::uint32_t word(Number&& number) const {
    std::uint32_t bits = 0;
    for (int i = 0; i < w; ++i) bits |= bits_of(number(i), operand) << (32 / w * i);
    return bits;
  }
  std::uint32_t kept_word(int row, int place) const {  // kept values from `place` on
    return word([&](int i) { return kept[std::size_t(row * depth / 2 + place + i)]; });
  }
  std::uint32_t b_word(int k, int column) const {
    return word([&](int i) { return b[std::size_t((k + i) * columns + column)]; });
  }
  // What a thread holds: rows g and g + 8 of the 16 of its warp, g = lane / 4, kept values w t on and
  // 4 w + w t on, t = lane % 4.
  void fragment(int thread, std::uint32_t (&a)[4]) const {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    a[0] = kept_word(row, w * t), a[1] = kept_word(row + 8, w * t);
    a[2] = kept_word(row, 4 * w + w * t), a[3] = kept_word(row + 8, 4 * w + w * t);
  }
  // Of 16-bit elements columns 16 (t % 2) on of both rows, in the lanes t = 2 selector and + 1; of 8-bit ones
  // columns 32 (t / 2) on of row g + 8 (t % 2).
  std::uint32_t metadata(int thread, int selector) const {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    std::uint32_t bits = 0;
    if (w == 4) {
      for (int i = 0; i < 8; ++i) bits |= std::uint32_t(nibble(row + t % 2 * 8, t / 2 * 8 + i)) << (4 * i);
      return bits;
    }
    if (t / 2 != selector) return bits;
    for (int i = 0; i < 4; ++i)
      for (int high = 0; high < 2; ++high)
        bits |= std::uint32_t(nibble(row + 8 * high, t % 2 * 4 + i)) << (16 * high + 4 * i);
    return bits;
  }
};

// A sum in float64, and how far from it a sum of the same terms in float32 may be. Tensor cores add in an
// order of their own and cut off what lies below the last bit of the largest term, so each of 64 terms at
// most may cost a unit of 2^-23 of that; a wrong term costs as much as there is.
struct Bounded {
  double sum = 0, magnitude = 0;
  void add(double x) { sum += x, magnitude += std::abs(x); }
  // Of e4m3 it keeps 13 bits behind the leading one of the largest term.
  double tolerance(Operand operand) const {
    return magnitude * std::ldexp(1.0, operand == Operand::e4m3 ? -7 : -17);
  }
};

struct MmaCase {
  SparseProduct product;
  MmaOperands operands;

  MmaCase(Operand operand, int selector, Numbers numbers, std::mt19937& generator)
      : product(operand, 16, 8, numbers, generator) {
    for (int lane = 0; lane < 32; ++lane) {
      product.fragment(lane, operands.a[lane]);
      // Lanes that the selector does not name hold what is metadata of no matrix.
      operands.metadata[lane] = product.metadata(lane, selector);
      const int t = lane % 4, g = lane / 4;
      const int w = product.w;
      for (int i = 0; i < 4; ++i) operands.b[lane][i] = product.b_word(4 * w * i + w * t, g);
      for (int i = 0; i < 4; ++i)
        operands.d[lane][i] = product.d[std::size_t(row(lane, i) * 8 + column(lane, i))];
    }
  }
  static int row(int lane, int i) { return lane / 4 + i / 2 * 8; }
  static int column(int lane, int i) { return lane % 4 * 2 + i % 2; }

  Bounded expected(int lane, int i) const {
    Bounded result;
    result.add(double(operands.d[lane][i]));
    product.for_each_product(row(lane, i), column(lane, i), [&](double a, double b) { result.add(a * b); });
    return result;
  }
};

struct WgmmaCase {
  int n;
  bool accumulate;
  SparseProduct steps[2];  // along k
  WgmmaOperands operands;

  WgmmaCase(Operand operand, int n, bool accumulate, Numbers numbers, std::mt19937& generator)
      : n(n),
        accumulate(accumulate),
        steps{{operand, 64, n, numbers, generator}, {operand, 64, n, numbers, generator}} {
    std::fill_n(&operands.x[0][0], 256 * 32, ~std::uint32_t(0));  // of rows past n nothing is read
    for (int column = 0; column < n; ++column)
      for (int i = 0; i < 32; ++i) operands.x[column][i] = steps[i / 16].b_word(i % 16 * steps[0].w, column);
    for (int thread = 0; thread < 128; ++thread) {
      for (int step = 0; step < 2; ++step) {
        steps[step].fragment(thread, operands.a[step][thread]);
        operands.metadata[step][thread] = steps[step].metadata(thread, step);
      }
      std::fill_n(operands.d[thread], 128, 0.0f);
      for (int i = 0; i < n / 2; ++i)
        operands.d[thread][i] = steps[0].d[std::size_t(row(thread, i) * n + column(thread, i))];
    }
  }
  static int row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8; }
  static int column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

  Bounded expected(int thread, int i) const {
    Bounded result;
    if (accumulate) result.add(double(operands.d[thread][i]));
    for (int step = accumulate ? 0 : 1; step < 2; ++step)
      steps[step].for_each_product(row(thread, i), column(thread, i),
                                   [&](double a, double b) { result.add(a * b); });
    return result;
  }
};

inline BoxOperands draw_matrix(std::mt19937& generator) {
  BoxOperands o;
  for (auto& row : o.x)
    for (std::uint16_t& element : row) element = std::uint16_t(1 + generator() % 0xffff);
  return o;
}

// Where boxes are taken: inside, past every edge, and outside.
constexpr int kBoxColumnsAt[] = {-64, -8, 0, 8, 64, 72}, kBoxRowsAt[] = {-8, -3, 0, 4, 5, 13};

}  // namespace madtp::test
