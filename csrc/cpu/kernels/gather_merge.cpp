// SPDX-License-Identifier: Apache-2.0
// Output rows are independent: a kept row is a copy, a merged row is a sum over the pruned rows of its
// sequence in row order. So x is read once, the output written once, and no result depends on threads or
// batch.

#include <cmath>

#include "cpu/kernels/dtype.h"
#include "cpu/kernels/tokens.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr std::int64_t kBlock = 1024;  // channels summed at a time: 4 KB of L1
constexpr int kRowsAtOnce = 4;         // pruned rows added per pass over the sums
constexpr std::int64_t kRowsPerTask = 16;

template <typename T>
struct Rows {
  T* data;
  std::int64_t stride;
  T* operator[](std::int64_t row) const { return data + row * stride; }
};

// sums[i] += sum over r of weights[r] * x[r][i], rows one after another.
template <int R, typename T>
void add_rows(const T* const* x, const float* weights, std::int64_t count, float* sums) {
  for_each_vector(count, [&](std::int64_t i, auto load, auto store) {
    Vec total = load(sums + i);
    for (int r = 0; r < R; ++r) total = load(x[r] + i) * broadcast(weights[r]) + total;
    store(sums + i, total);
  });
}

// out (channels,) = sum over the pruned rows j of sequence b of merge_weight_j x_j.
template <typename T>
void merge(Rows<const T> x, std::int64_t channels, const TokenSelection& selection, std::int64_t b, T* out) {
  const std::int64_t begin = selection.cu_seqlens_in[b], end = selection.cu_seqlens_in[b + 1];
  for (std::int64_t first = 0; first < channels; first += kBlock) {
    const std::int64_t count = channels - first < kBlock ? channels - first : kBlock;
    float sums[kBlock];
    for (std::int64_t i = 0; i < count; ++i) sums[i] = 0;
    const T* rows[kRowsAtOnce];
    float weights[kRowsAtOnce];
    int pending = 0;
    for (std::int64_t j = begin; j < end; ++j) {
      if (selection.keep[j]) continue;
      rows[pending] = x[j] + first;
      weights[pending] = selection.merge_weight[j];
      if (++pending < kRowsAtOnce) continue;
      add_rows<kRowsAtOnce>(rows, weights, count, sums);
      pending = 0;
    }
    for (int r = 0; r < pending; ++r) add_rows<1>(rows + r, weights + r, count, sums);
    for_each_vector(count,
                    [&](std::int64_t i, auto load, auto store) { store(out + first + i, load(sums + i)); });
  }
}

// Rows of no channels may be null, which memcpy and memset must not see.
template <typename T>
void copy_row(const T* row, std::int64_t channels, T* out) {
  if (channels > 0) __builtin_memcpy(out, row, std::size_t(channels) * sizeof(T));
}
template <typename T>
void zero_row(std::int64_t channels, T* out) {
  if (channels > 0) __builtin_memset(out, 0, std::size_t(channels) * sizeof(T));
}

// Writes output row `row`; false when it is padding (or names a row that does not exist) and was zeroed.
template <typename T>
bool gather_row(Rows<const T> x, std::int64_t channels, const TokenSelection& selection, std::int64_t row,
                T* out) {
  const std::int64_t source = selection.source[row];
  if (source >= 0 && source < selection.tokens) {
    copy_row(x[source], channels, out);
    return true;
  }
  if (source < 0 && -(source + 1) < selection.batch) {
    merge(x, channels, selection, -(source + 1), out);
    return true;
  }
  zero_row(channels, out);
  return false;
}

// normed = (x - mean) * rstd * weight + bias over one row, statistics in two passes; returns them.
template <typename T, typename A>
void normalise(const T* x, std::int64_t channels, const A* weight, const A* bias, double eps, T* normed,
               float* mean, float* rstd) {
  Vec total = {};
  for_each_vector(channels, [&](std::int64_t i, auto load, auto) { total += load(x + i); });
  const float mu = sum(total) / float(channels);

  Vec squares = {};
  const std::int64_t whole = channels - channels % kWidth;
  for (std::int64_t i = 0; i < whole; i += kWidth) {
    const Vec d = load(x + i) - broadcast(mu);
    squares = d * d + squares;
  }
  float variance = sum(squares);
  if (whole < channels) {  // apart, because the lanes past the end are not zero once the mean is subtracted
    const Vec d = load_part(x + whole, channels - whole) - broadcast(mu);
    for (std::int64_t i = 0; i < channels - whole; ++i) variance += d[i] * d[i];
  }
  const float scale = float(1.0 / std::sqrt(double(variance) / double(channels) + eps));

  for_each_vector(channels, [&](std::int64_t i, auto load, auto store) {
    store(normed + i, (load(x + i) - broadcast(mu)) * broadcast(scale) * load(weight + i) + load(bias + i));
  });
  *mean = mu;
  *rstd = scale;
}

// normed = x / sqrt(mean(x^2) + eps), rounded to T, times the weight, over one row: in this order models of
// transformers round.
template <typename T, typename A>
void normalise_rms(const T* x, std::int64_t channels, const A* weight, double eps, T* normed) {
  Vec squares = {};
  for_each_vector(channels, [&](std::int64_t i, auto load, auto) {
    const Vec value = load(x + i);
    squares = value * value + squares;
  });
  const float scale = float(1.0 / std::sqrt(double(sum(squares)) / double(channels) + eps));
  for_each_vector(channels, [&](std::int64_t i, auto load, auto store) {
    store(normed + i, load(x + i) * broadcast(scale));
    store(normed + i, load(normed + i) * load(weight + i));
  });
}

// <x, y> over one row.
template <typename T>
float dot(const T* x, const T* y, std::int64_t channels) {
  Vec total = {};
  for_each_vector(channels,
                  [&](std::int64_t i, auto load, auto) { total = load(x + i) * load(y + i) + total; });
  return sum(total);
}

// Gathers the rows, then norm(row, normed row, A{}, number) for each, A being the type of affine_dtype, or
// padding(number) and zeros.
template <typename Norm, typename Padding>
void gather_and_normalise(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                          const TokenSelection& selection, DType affine_dtype, void* x_out, void* normed,
                          int threads, Norm norm, Padding padding) {
  const auto run = [&](auto element, auto affine) {
    using T = decltype(element);
    const Rows<const T> input{static_cast<const T*>(x), x_stride};
    const Rows<T> rows{static_cast<T*>(x_out), channels}, normed_rows{static_cast<T*>(normed), channels};
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, kRowsPerTask)
    for (std::int64_t row = 0; row < selection.capacity; ++row) {
      if (gather_row(input, channels, selection, row, rows[row])) {
        norm(rows[row], normed_rows[row], affine, row);
      } else {
        zero_row(channels, normed_rows[row]);
        padding(row);
      }
    }
  };
  with_type(dtype, [&](auto element) {
    if (affine_dtype == DType::float32) {
      run(element, float{});
    } else {
      run(element, element);
    }
  });
}

}  // namespace

Status gather_merge(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                    const TokenSelection& selection, void* out, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Rows<const T> input{static_cast<const T*>(x), x_stride};
    const Rows<T> output{static_cast<T*>(out), channels};
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, kRowsPerTask)
    for (std::int64_t row = 0; row < selection.capacity; ++row)
      gather_row(input, channels, selection, row, output[row]);
  });
  return Status::ok;
}

Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                              const TokenSelection& selection, const void* weight, const void* bias,
                              DType affine_dtype, double eps, void* x_out, void* normed, float* mean,
                              float* rstd, int threads) {
  gather_and_normalise(
      x, dtype, x_stride, channels, selection, affine_dtype, x_out, normed, threads,
      [&](auto* row, auto* normed_row, auto affine, std::int64_t at) {
        using A = decltype(affine);
        normalise(row, channels, static_cast<const A*>(weight), static_cast<const A*>(bias), eps, normed_row,
                  mean + at, rstd + at);
      },
      [&](std::int64_t at) { mean[at] = rstd[at] = 0; });
  return Status::ok;
}

Status gather_merge_rmsnorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                            const TokenSelection& selection, const void* weight, DType affine_dtype,
                            double eps, void* x_out, void* normed, int threads) {
  gather_and_normalise(
      x, dtype, x_stride, channels, selection, affine_dtype, x_out, normed, threads,
      [&](auto* row, auto* normed_row, auto affine, std::int64_t) {
        normalise_rms(row, channels, static_cast<const decltype(affine)*>(weight), eps, normed_row);
      },
      [](std::int64_t) {});
  return Status::ok;
}

Status gather_merge_backward(const void* grad, std::int64_t grad_stride, const void* x, DType dtype,
                             std::int64_t x_stride, std::int64_t channels, const TokenSelection& selection,
                             void* grad_x, float* grad_weight, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Rows<const T> input{static_cast<const T*>(x), x_stride},
        grads{static_cast<const T*>(grad), grad_stride};
    const Rows<T> output{static_cast<T*>(grad_x), channels};
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (std::int64_t b = 0; b < selection.batch; ++b) {
      const std::int64_t last = selection.cu_seqlens_out[b + 1];  // one past the merged row, if there is one
      std::int64_t row = selection.cu_seqlens_out[b];             // of the output
      for (std::int64_t j = selection.cu_seqlens_in[b]; j < selection.cu_seqlens_in[b + 1]; ++j) {
        const bool kept = selection.keep[j] != 0;
        const std::int64_t from = kept ? row++ : last - 1;
        grad_weight[j] = 0;
        if (from < 0 || from >= last) {  // a selection that contradicts itself
          zero_row(channels, output[j]);
        } else if (kept) {
          copy_row(grads[from], channels, output[j]);
        } else {
          const Vec scale = broadcast(selection.merge_weight[j]);
          for_each_vector(channels, [&](std::int64_t i, auto load, auto store) {
            store(output[j] + i, load(grads[from] + i) * scale);
          });
          grad_weight[j] = dot(input[j], grads[from], channels);
        }
      }
    }
  });
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
