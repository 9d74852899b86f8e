// SPDX-License-Identifier: Apache-2.0
#pragma once

// One unit of a weight times a block of input features: `sums` of its rows grow by the products, each
// block added up from zero first. Two kernels share the layout and the order of every sum: one has tokens in
// the lanes of its vectors, the other, for few tokens, output features.

#include "cpu/kernels/step.h"

namespace madtp::cpu::MADTP_ISA {

// --- lanes are tokens

// What a tile of V vectors of tokens is multiplied with and added to.
struct TokenTile {
  const float* panel;  // (entries of the block, V * kWidth)
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
inline const float* panel_entry(const float* panel, std::uint8_t entry) {
  const float* at = panel + std::size_t(entry) * (V * kWidth);
  asm("" : "+r"(at));  // an address in one register: with an index, memory operands cost more
  return at;
}

// One step of rows that each have their own entry.
template <typename S, int V, int R>
inline __attribute__((always_inline)) void add_own(const float* panel, const typename S::Weight* weights,
                                                   const std::uint8_t* entries, Vec (&acc)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* const x = panel_entry<V>(panel, entries[r]);
    const Vec w = S::spread(weights[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = S::add(w, load(x + v * kWidth), acc[r][v]);
  }
}

// One step of pairs of rows that have their entry in common: each vector is loaded once. entries: null where
// all rows have the one that the panel begins with.
template <typename S, int V, int R>
inline __attribute__((always_inline)) void add_shared(const float* panel, const typename S::Weight* weights,
                                                      const std::uint8_t* entries, Vec (&acc)[R][V]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r += 2) {
    const float* const x = entries == nullptr ? panel : panel_entry<V>(panel, entries[r]);
    const Vec w0 = S::spread(weights[r]), w1 = S::spread(weights[r + 1]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec t = load(x + v * kWidth);
      hold(t);
      acc[r][v] = S::add(w0, t, acc[r][v]);
      acc[r + 1][v] = S::add(w1, t, acc[r + 1][v]);
    }
  }
}

template <typename S, int V>
__attribute__((noinline)) void multiply_tokens(const Unit& unit, const typename S::Weight* weights,
                                               const TokenTile& tile) {
  constexpr int R = 2 * pairs_at_once(V);
  const float* const panel = tile.panel;
  const int steps = unit.steps;
  const std::uint8_t* const unit_entries = unit.entries();
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
    const typename S::Weight* w = weights + r0;
    Vec acc[R][V] = {};
    int s = 0;
    if constexpr (S::kOwnEntries) {
      int begin = 0, end = steps;  // what all pairs share
      for (int r = 0; r < R; r += 2) {
        const int first = shared[r0 + r], last = shared[r0 + r + 1];
        begin = begin > first ? begin : first < steps ? first : steps;
        end = end < last ? end : last;
      }
      const std::uint8_t* entries = unit_entries + r0;
      for (; s < begin; ++s, w += kUnitRows, entries += kUnitRows) add_own<S, V>(panel, w, entries, acc);
      for (; s < end; ++s, w += kUnitRows, entries += kUnitRows) add_shared<S, V>(panel, w, entries, acc);
      for (; s < steps; ++s, w += kUnitRows, entries += kUnitRows) add_own<S, V>(panel, w, entries, acc);
    } else {
      const float* x = panel;
      for (; s < steps; ++s, w += kUnitRows, x += V * kWidth) add_shared<S, V>(x, w, nullptr, acc);
    }
    if (!tile.first) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = S::join(acc[r][v], load(rows[r] + v * kWidth));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(rows[r] + v * kWidth, acc[r][v]);
  }
}

template <typename S>
using MultiplyTokens = void (*)(const Unit&, const typename S::Weight* weights, const TokenTile&);

// multiply_tokens<S, vectors>
template <typename S, int V = S::kTileVectors>
inline MultiplyTokens<S> multiply_tokens_function(int vectors) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    return vectors == V ? &multiply_tokens<S, V> : multiply_tokens_function<S, V - 1>(vectors);
  }
}

// --- lanes are the rows of a unit

#if defined(__AVX512F__)
constexpr int kMaxRowTokens = 8;  // that this kernel takes

// Units at once: chains of additions enough to hide the latency of one.
constexpr int units_at_once(int tokens) { return tokens <= 3 ? 2 : 1; }

inline __m512i load_entries(const std::uint8_t* entries) {
  return _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}

// Looks up the columns of one section of a block: entries -> a lane's factor of x. W is how the weights are
// stored.
template <typename W>
struct ProductLookUp {
  using X = float;
  static constexpr int kSteps = kSection / 2;

  struct Token {
    Vec low, high;
  };

  static Token token(const float* x) { return {load(x), load(x + kWidth)}; }
  explicit ProductLookUp(int) {}
  static Vec weights(const void* from) { return load(static_cast<const W*>(from)); }
  __m512i select(__m512i entries) const { return entries; }
  static Vec add(Vec weight, const Token& x, __m512i columns, Vec sum) {
    return Product::add(
        weight,
        bit_cast<Vec>(_mm512_permutex2var_ps(bit_cast<__m512>(x.low), columns, bit_cast<__m512>(x.high))),
        sum);
  }
};

#if defined(__AVX512BF16__)
// Entry -> the two columns of its pair, a word each.
struct PairColumns {
  std::uint32_t of[kSection / 4 * 6];
};

constexpr PairColumns pair_columns() {
  PairColumns columns{};
  int entry = 0;
  for (std::uint32_t group = 0; group < kSection / 4; ++group)
    for (std::uint32_t a = 0; a < 3; ++a)
      for (std::uint32_t b = a + 1; b < 4; ++b) columns.of[entry++] = (4 * group + a) | (4 * group + b) << 16;
  return columns;
}

struct DotLookUp {
  using X = BFloat16;
  static constexpr int kSteps = kSection / 4;

  struct Token {
    __m512i columns;
  };

  static Token token(const BFloat16* x) { return {_mm512_loadu_si512(x)}; }

  // 48 entries a section are three vectors: bits 0 to 4 look up two of them, bit 5 chooses the third. The
  // second section begins at entry 48, so that there the third comes first.
  explicit DotLookUp(int section) {
    alignas(64) static constexpr PairColumns kColumns = pair_columns();
    const std::uint32_t* const first = kColumns.of + (section == 0 ? 0 : kWidth);
    low = _mm512_loadu_si512(first);
    high = _mm512_loadu_si512(first + kWidth);
    bit5 = _mm512_loadu_si512(kColumns.of + (section == 0 ? 2 * kWidth : 0));
  }
  static Vec weights(const void* from) { return load(static_cast<const float*>(from)); }
  __m512i select(__m512i entries) const {
    const __mmask16 third = _mm512_test_epi32_mask(entries, _mm512_set1_epi32(32));
    return _mm512_mask_permutexvar_epi32(_mm512_permutex2var_epi32(low, entries, high), third, entries, bit5);
  }
  static Vec add(Vec weights, const Token& x, __m512i columns, Vec sum) {
    return Dot::add(weights, bit_cast<Vec>(_mm512_maskz_permutexvar_epi16(0xffffffff, columns, x.columns)),
                    sum);
  }

  __m512i low, high, bit5;
};
#endif

// How many floats the tokens of a row take, side by side: a power of two.
constexpr int row_stride(int tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8; }

// The sums of a unit's rows: (kGroupRows, row_stride(T)).
template <int T>
inline void add_to_rows(const Vec (&acc)[T], const std::uint8_t* rows, float* sums, bool first) {
  constexpr int P = row_stride(T);
  typedef float Tokens __attribute__((vector_size(P * 4)));
  Vec tile[P] = {};
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) tile[t] = acc[t];
  transpose(tile);
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    Tokens of_row[kWidth / P];
    __builtin_memcpy(of_row, &tile[i], sizeof(Vec));
    for (int square = 0; square < kWidth / P; ++square) {
      float* const to = sums + rows[square * P + i] * P;
      Tokens sum{};
      if (!first) __builtin_memcpy(&sum, to, sizeof sum);
      sum = first ? of_row[square] : sum + of_row[square];
      __builtin_memcpy(to, &sum, sizeof sum);
    }
  }
}

// U units that follow one another.
template <typename L, int T, int U>
inline __attribute__((always_inline)) void multiply_units(const Unit& unit, const typename L::X* x,
                                                          float* sums, bool first) {
  const std::int64_t next = unit.bytes(), ahead = unit.ahead() - unit.data;
  const char* weights = static_cast<const char*>(unit.weights());
  const std::uint8_t* entries = unit.entries();
  Vec acc[U][T] = {};
  for (int section = 0; section < 2; ++section) {
    const L look_up(section);
    typename L::Token tokens[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) tokens[t] = L::token(x + t * kBlock + section * kSection);
    const int end = section == 1 ? unit.steps : unit.steps < L::kSteps ? unit.steps : L::kSteps;
    for (int s = section * L::kSteps; s < end; ++s) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Vec w = L::weights(weights + u * next);
        const __m512i columns = look_up.select(load_entries(entries + u * next));
        __builtin_prefetch(weights + u * next + ahead, 0, 3);
        __builtin_prefetch(entries + u * next + ahead, 0, 3);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[u][t] = L::add(w, tokens[t], columns, acc[u][t]);
      }
      weights += kUnitRows * unit.weight_bytes;
      entries += kUnitRows;
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) add_to_rows(acc[u], unit.rows() + u * next, sums, first);
}

// `count` units that follow one another.
template <typename L, int T>
__attribute__((noinline)) void multiply_rows(Unit unit, std::int64_t count,
                                             const typename L::X* x,  // (T, kBlock)
                                             float* sums,             // (kGroupRows, row_stride(T))
                                             bool first) {
  constexpr int U = units_at_once(T);
  for (; count >= U; count -= U, unit.data += U * unit.bytes()) multiply_units<L, T, U>(unit, x, sums, first);
  for (; count > 0; --count, unit.data += unit.bytes()) multiply_units<L, T, 1>(unit, x, sums, first);
}
#else
constexpr int kMaxRowTokens = 0;  // no instruction looks up enough columns
constexpr int row_stride(int tokens) { return tokens; }

template <typename W>
struct ProductLookUp {
  using X = float;
};

template <typename L, int T>
void multiply_rows(Unit, std::int64_t, const float*, float*, bool) {}
#endif

template <typename L>
using MultiplyRows = void (*)(Unit, std::int64_t count, const typename L::X* x, float* sums, bool first);

// multiply_rows<L, tokens>
template <typename L, int T = kMaxRowTokens>
inline MultiplyRows<L> multiply_rows_function(int tokens) {
  if constexpr (T == 0) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_rows<L, T> : multiply_rows_function<L, T - 1>(tokens);
  }
}

}  // namespace madtp::cpu::MADTP_ISA
