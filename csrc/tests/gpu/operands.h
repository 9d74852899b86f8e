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
#include "tests/simt/sparse24_cases.h"

namespace madtp::test {

enum class Numbers { integers, normal };

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

// A (rows, 32), 2:4, B (32, columns) and D (rows, columns).
struct SparseProduct {
  DType dtype;
  int rows, columns;
  std::vector<unsigned> nibbles;  // (rows, 8)
  std::vector<float> kept;        // (rows, 16)
  std::vector<float> b, d;

  SparseProduct(DType dtype, int rows, int columns, Numbers numbers, std::mt19937& generator)
      : dtype(dtype), rows(rows), columns(columns) {
    constexpr unsigned valid[] = {4, 8, 12, 9, 13, 14};
    const auto rounded = [&] { return decode(encode(draw(numbers, generator), dtype), dtype); };
    for (int i = 0; i < rows * 8; ++i) nibbles.push_back(valid[generator() % 6]);
    for (int i = 0; i < rows * 16; ++i) kept.push_back(rounded());
    for (int i = 0; i < 32 * columns; ++i) b.push_back(rounded());
    for (int i = 0; i < rows * columns; ++i) d.push_back(draw(numbers, generator));
  }
  // use(a, b) for the two factors of every product in the sum at (row, column).
  template <typename Use>
  void for_each_product(int row, int column, Use&& use) const {
    for (int group = 0; group < 8; ++group)
      for (int i = 0; i < 2; ++i) {
        const int k = 4 * group + int(nibbles[std::size_t(row * 8 + group)] >> (2 * i) & 3);
        use(double(kept[std::size_t(row * 16 + 2 * group + i)]),
            double(b[std::size_t(k * columns + column)]));
      }
  }
  std::uint32_t pair(int row, int column) const {  // kept values `column`, + 1
    return word(kept[std::size_t(row * 16 + column)], kept[std::size_t(row * 16 + column + 1)]);
  }
  std::uint32_t word(float low, float high) const {
    return std::uint32_t(encode(low, dtype)) | std::uint32_t(encode(high, dtype)) << 16;
  }
  // What a thread holds: rows g and g + 8 of the 16 of its warp, g = lane / 4, kept values 2 t, + 1 and
  // 2 t + 8, + 9, t = lane % 4; of the metadata for `selector` columns 16 (t % 2) on of both rows, in the
  // lanes t = 2 selector and + 1.
  void fragment(int thread, std::uint32_t (&a)[4]) const {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    a[0] = pair(row, 2 * t), a[1] = pair(row + 8, 2 * t);
    a[2] = pair(row, 2 * t + 8), a[3] = pair(row + 8, 2 * t + 8);
  }
  std::uint32_t metadata(int thread, int selector) const {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    std::uint32_t bits = 0;
    if (t / 2 != selector) return bits;
    for (int i = 0; i < 4; ++i)
      for (int high = 0; high < 2; ++high)
        bits |= std::uint32_t(nibbles[std::size_t((row + 8 * high) * 8 + t % 2 * 4 + i)])
                << (16 * high + 4 * i);
    return bits;
  }
};

// A sum in float64, and how far from it a sum of the same terms in float32 may be. Tensor cores add in an
// order of their own and cut off what lies below the last bit of the largest term, so each of 64 terms at
// most may cost a unit of 2^-23 of that; a wrong term costs as much as there is.
struct Bounded {
  double sum = 0, magnitude = 0;
  void add(double x) { sum += x, magnitude += std::abs(x); }
  double tolerance() const { return magnitude * std::ldexp(1.0, -17); }
};

struct MmaCase {
  SparseProduct product;
  MmaOperands operands;

  MmaCase(DType dtype, int selector, Numbers numbers, std::mt19937& generator)
      : product(dtype, 16, 8, numbers, generator) {
    for (int lane = 0; lane < 32; ++lane) {
      product.fragment(lane, operands.a[lane]);
      // Lanes that the selector does not name hold what is metadata of no matrix.
      operands.metadata[lane] = product.metadata(lane, selector);
      const int t = lane % 4, g = lane / 4;
      const auto b = [&](int k) { return product.b[std::size_t(k * 8 + g)]; };
      for (int i = 0; i < 4; ++i) operands.b[lane][i] = product.word(b(8 * i + 2 * t), b(8 * i + 2 * t + 1));
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
  SparseProduct steps[2];  // of 32 along k
  WgmmaOperands operands;

  WgmmaCase(DType dtype, int n, bool accumulate, Numbers numbers, std::mt19937& generator)
      : n(n),
        accumulate(accumulate),
        steps{{dtype, 64, n, numbers, generator}, {dtype, 64, n, numbers, generator}} {
    std::fill_n(&operands.x[0][0], 256 * 64, std::uint16_t(0xffff));  // of rows past n nothing is read
    for (int column = 0; column < n; ++column)
      for (int k = 0; k < 64; ++k)
        operands.x[column][k] = encode(steps[k / 32].b[std::size_t(k % 32 * n + column)], dtype);
    for (int thread = 0; thread < 128; ++thread) {
      operands.metadata[thread] = 0;
      for (int step = 0; step < 2; ++step) {
        steps[step].fragment(thread, operands.a[step][thread]);
        operands.metadata[thread] |= steps[step].metadata(thread, step);
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
