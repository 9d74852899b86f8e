#pragma once

// One unit of a 2:4 weight times a block of channels: `sums` of its rows grow by the products, each block
// added up from zero first. Two kernels share the layout and the order of every sum: one has tokens in the
// lanes of its vectors, the other, for few tokens, features.

#include "cpu/kernels/sparse24_layout.h"

namespace madtp::cpu::MADTP_ISA {

// --- lanes are tokens

// Times two rows: the accumulators, in registers. With more, a panel and the units leave L1.
constexpr int kTileVectors = 6;

// What a tile of V vectors of tokens is multiplied with and added to.
struct TokenTile {
  const float* panel;  // (columns of the block, V * kWidth)
  float* sums;         // (rows of the group, V * kWidth)
  bool first;          // sums hold nothing yet
};

// Pairs in flight: chains of additions enough to hide the latency of one, but more pairs share fewer steps.
constexpr int pairs_at_once(int vectors) {
  return kWidth == 16 ? (vectors == 1 ? 2 : 1) : vectors == 1 ? 4 : vectors <= 3 ? 2 : 1;
}

// Holds a vector that is used twice in its register: the compiler would rather load it twice.
inline void hold([[maybe_unused]] Vec& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
}

template <int V>
inline const float* panel_column(const float* panel, std::uint8_t column) {
  const float* at = panel + std::size_t(column) * (V * kWidth);
  asm("" : "+r"(at));  // an address in one register: with an index, memory operands cost more
  return at;
}

// One step of rows that each have their own column.
template <int V, int R>
inline __attribute__((always_inline)) void add_own(const float* panel, const float* weights,
                                                   const std::uint8_t* columns, Vec (&acc)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* const x = panel_column<V>(panel, columns[r]);
    const Vec w = broadcast(weights[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = w * load(x + v * kWidth) + acc[r][v];
  }
}

// One step of pairs of rows that have their column in common: each vector is loaded once.
template <int V, int R>
inline __attribute__((always_inline)) void add_shared(const float* panel, const float* weights,
                                                      const std::uint8_t* columns, Vec (&acc)[R][V]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r += 2) {
    const float* const x = panel_column<V>(panel, columns[r]);
    const Vec w0 = broadcast(weights[r]), w1 = broadcast(weights[r + 1]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec t = load(x + v * kWidth);
      hold(t);
      acc[r][v] = w0 * t + acc[r][v];
      acc[r + 1][v] = w1 * t + acc[r + 1][v];
    }
  }
}

template <int V>
__attribute__((noinline)) void multiply_tokens(const Unit& unit, const float* weights,
                                               const TokenTile& tile) {
  constexpr int R = 2 * pairs_at_once(V);
  const float* const panel = tile.panel;
  const int steps = unit.steps;
  const std::uint8_t* const unit_columns = unit.columns();
  const std::uint8_t* const unit_rows = unit.rows();
  const std::uint8_t* const shared = unit.shared();
  const char* ahead = unit.ahead();
  const std::int64_t slice = unit.bytes() * R / kUnitRows;
  for (int r0 = 0; r0 < kUnitRows; r0 += R) {
    float* rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      rows[r] = tile.sums + std::size_t(unit_rows[r0 + r]) * (V * kWidth);
      for (int i = 0; i < V * kWidth; i += 16) __builtin_prefetch(rows[r] + i, 1);  // a line has 16
    }
    for (const char* const stop = ahead + slice; ahead < stop; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    int begin = 0, end = steps;  // what all pairs share
    for (int r = 0; r < R; r += 2) {
      const int first = shared[r0 + r], last = shared[r0 + r + 1];
      begin = begin > first ? begin : first < steps ? first : steps;
      end = end < last ? end : last;
    }
    const float* w = weights + r0;
    const std::uint8_t* columns = unit_columns + r0;
    Vec acc[R][V] = {};
    int s = 0;
    for (; s < begin; ++s, w += kUnitRows, columns += kUnitRows) add_own<V>(panel, w, columns, acc);
    for (; s < end; ++s, w += kUnitRows, columns += kUnitRows) add_shared<V>(panel, w, columns, acc);
    for (; s < steps; ++s, w += kUnitRows, columns += kUnitRows) add_own<V>(panel, w, columns, acc);
    if (!tile.first) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] += load(rows[r] + v * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(rows[r] + v * kWidth, acc[r][v]);
  }
}

using MultiplyTokens = void (*)(const Unit&, const float* weights, const TokenTile&);

// multiply_tokens<vectors>
template <int V = kTileVectors>
inline MultiplyTokens multiply_tokens_function(int vectors) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    return vectors == V ? &multiply_tokens<V> : multiply_tokens_function<V - 1>(vectors);
  }
}

// --- lanes are the rows of a unit

#if defined(__AVX512F__)
constexpr int kRowTokens = 8;  // at most

// Units at once: chains of additions enough to hide the latency of one.
constexpr int units_at_once(int tokens) { return tokens <= 3 ? 2 : 1; }

// U units that follow one another.
template <typename W, int T, int U>
inline __attribute__((always_inline)) void multiply_units(const Unit& unit, const float* x, float* sums,
                                                          bool first) {
  const std::int64_t next = unit.bytes(), ahead = unit.ahead() - unit.data;
  const char* weights = static_cast<const char*>(unit.weights());
  const std::uint8_t* columns = unit.columns();
  Vec acc[U][T] = {};
  for (int section = 0; section < 2; ++section) {
    Vec low[T], high[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      low[t] = load(x + t * kBlock + section * kSection);
      high[t] = load(x + t * kBlock + section * kSection + kWidth);
    }
    const int end = section == 1 ? unit.steps : unit.steps < kSection / 2 ? unit.steps : kSection / 2;
    for (int s = section * (kSection / 2); s < end; ++s) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Vec w = load(reinterpret_cast<const W*>(weights + u * next));
        const __m512i column = _mm512_maskz_cvtepu8_epi32(
            0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + u * next)));
        __builtin_prefetch(weights + u * next + ahead, 0, 3);
        __builtin_prefetch(columns + u * next + ahead, 0, 3);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          acc[u][t] = w * bit_cast<Vec>(_mm512_permutex2var_ps(bit_cast<__m512>(low[t]), column,
                                                               bit_cast<__m512>(high[t]))) +
                      acc[u][t];
      }
      weights += kUnitRows * sizeof(W);
      columns += kUnitRows;
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    const std::uint8_t* const rows = unit.rows() + u * next;
    for (int t = 0; t < T; ++t) {
      float* const to = sums + t * kGroupRows;
      for (int r = 0; r < kUnitRows; ++r) to[rows[r]] = first ? acc[u][t][r] : to[rows[r]] + acc[u][t][r];
    }
  }
}

// `count` units that follow one another.
template <typename W, int T>
__attribute__((noinline)) void multiply_rows(Unit unit, std::int64_t count,
                                             const float* x,  // (T, kBlock)
                                             float* sums,     // (T, kGroupRows)
                                             bool first) {
  constexpr int U = units_at_once(T);
  for (; count >= U; count -= U, unit.data += U * unit.bytes()) multiply_units<W, T, U>(unit, x, sums, first);
  for (; count > 0; --count, unit.data += unit.bytes()) multiply_units<W, T, 1>(unit, x, sums, first);
}
#else
constexpr int kRowTokens = 0;  // no instruction looks up enough columns

template <typename W, int T>
void multiply_rows(Unit, std::int64_t, const float*, float*, bool) {}
#endif

using MultiplyRows = void (*)(Unit, std::int64_t count, const float* x, float* sums, bool first);

// multiply_rows<W, tokens>
template <typename W, int T = kRowTokens>
inline MultiplyRows multiply_rows_function(int tokens) {
  if constexpr (T == 0) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_rows<W, T> : multiply_rows_function<W, T - 1>(tokens);
  }
}

}  // namespace madtp::cpu::MADTP_ISA
