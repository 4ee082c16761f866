// One pass of hidden states through an LM head on the CPU: a tile of logits is made by oneDNN's matrix kernels (float32
// accumulation, also for bfloat16 operands), reduced while it lies in the L2 cache, and forgotten.
//
// Per row t, with logits z_tj = scale_t * <hidden_t, weight_j>:
//   top_t   = max_j z_tj
//   total_t = sum_j exp(z_tj - top_t)
//   slope_t = sum_j exp(z_tj - top_t) * (z_tj - top_t)
// so that logsumexp = top + log(total) and entropy = log(total) - slope / total.

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

constexpr float kHighest = 4.0f;  // how far above the shift a logit may lie

// exp(x) for x <= 87 to about 1e-7 relative, written so that the compiler vectorises it. Below -87 it is ~1e-38.
inline float exp_bounded(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;  // ln 2 in two parts keeps the remainder exact
  r = r + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

struct Sums {
  double top = kNegativeInfinity, total = 0.0, slope = 0.0;

  void add(const Sums& other) {
    if (other.total == 0.0) return;  // not `<= 0`: a NaN must go on
    const double to = std::max(top, other.top);
    const double mine = total == 0.0 ? 0.0 : std::exp(top - to), theirs = std::exp(other.top - to);
    const double my_shift = total == 0.0 ? 0.0 : top - to, their_shift = other.top - to;
    slope = mine * (slope + total * my_shift) + theirs * (other.slope + other.total * their_shift);
    total = mine * total + theirs * other.total;
    top = to;
  }

  void raise(double to) {
    const double shift = top - to, factor = std::exp(shift);
    slope = factor * (slope + total * shift);
    total *= factor;
    top = to;
  }
};

// Sums of exp(x) and exp(x) * x for x = scale * logit - shift, and the largest x.
inline void pass(const float* logits, int64_t count, float scale, float shift, float& largest, float& total,
                 float& slope) {
  float high = -std::numeric_limits<float>::infinity(), sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(max : high) reduction(+ : sum, weighted)
  for (int64_t j = 0; j < count; ++j) {
    const float x = logits[j] * scale - shift, e = exp_bounded(x);
    high = x > high ? x : high;
    sum += e;
    weighted += e * x;
  }
  largest = high;
  total = sum;
  slope = weighted;
}

// Adds a tile. The largest logit so far serves as the shift, which saves a pass for the tile's own maximum; a tile that
// rises far above it, where float32 would lose digits, is done again.
inline void add(Sums& sums, const float* logits, int64_t count, float scale) {
  float largest, total, slope;
  auto shift = static_cast<float>(sums.top);
  const bool is_first = sums.total == 0.0;
  if (!is_first) pass(logits, count, scale, shift, largest, total, slope);
  if (is_first || largest > kHighest) {
    float high = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : high)
    for (int64_t j = 0; j < count; ++j) high = logits[j] > high ? logits[j] : high;
    shift = high * scale;
    pass(logits, count, scale, shift, largest, total, slope);
  }
  sums.add({shift, total, slope});
  if (largest > 0.0f) sums.raise(static_cast<double>(shift) + largest);
}

template <typename T>
void run(const T* hidden, const T* weight, int64_t rows, int64_t vocab, int64_t width, const float* scale, double* top,
         double* total, double* slope, int64_t tile, int64_t threads) {
  constexpr int64_t kRows = 64;
  const int64_t words = width * sizeof(T) / 4;
  const int64_t tiles = (vocab + tile - 1) / tile;
  std::vector<std::vector<Sums>> parts(threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<Sums> sums(rows);
    auto* packed = static_cast<float*>(std::aligned_alloc(64, tile * words * 4));
    auto* logits = static_cast<float*>(std::aligned_alloc(64, tile * kRows * 4));
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tiles; ++index) {
      const int64_t first = index * tile, count = std::min(tile, vocab - first);
      // Transposing 32-bit words gives float32 columns, or the column pairs of bfloat16 that dot-product units read.
      const auto* source = reinterpret_cast<const float*>(weight + first * width);
      for (int64_t i = 0; i < count; i += 16)
        for (int64_t k = 0; k < words; k += 16)
          at::vec::transpose_mxn<float>(source + i * words + k, words, packed + k * count + i, count,
                                        static_cast<int>(std::min<int64_t>(16, count - i)),
                                        static_cast<int>(std::min<int64_t>(16, words - k)));
      for (int64_t start = 0; start < rows; start += kRows) {
        const int64_t height = std::min(kRows, rows - start);
        at::native::cpublas::brgemm(height, count, width, width, count, count, false, hidden + start * width,
                                    reinterpret_cast<const T*>(packed), logits, sizeof(T) == 2);
        for (int64_t i = 0; i < height; ++i) add(sums[start + i], logits + i * count, count, scale[start + i]);
      }
    }
    at::native::cpublas::brgemm_release(sizeof(T) == 2);
    std::free(packed);
    std::free(logits);
    parts[omp_get_thread_num()] = std::move(sums);
  }
  for (int64_t t = 0; t < rows; ++t) {
    Sums sums;
    for (const auto& part : parts)  // in thread order, so that equal inputs give equal bits
      if (!part.empty()) sums.add(part[t]);
    top[t] = sums.top;
    total[t] = sums.total;
    slope[t] = sums.slope;
  }
}

}  // namespace

extern "C" int rlif_supports_bfloat16() { return at::native::cpublas::could_pack(at::kBFloat16); }

extern "C" void rlif_head_bfloat16(const void* hidden, const void* weight, int64_t rows, int64_t vocab, int64_t width,
                                   const float* scale, double* top, double* total, double* slope, int64_t tile,
                                   int64_t threads) {
  run(static_cast<const at::BFloat16*>(hidden), static_cast<const at::BFloat16*>(weight), rows, vocab, width, scale,
      top, total, slope, tile, threads);
}

extern "C" void rlif_head_float32(const void* hidden, const void* weight, int64_t rows, int64_t vocab, int64_t width,
                                  const float* scale, double* top, double* total, double* slope, int64_t tile,
                                  int64_t threads) {
  run(static_cast<const float*>(hidden), static_cast<const float*>(weight), rows, vocab, width, scale, top, total,
      slope, tile, threads);
}
