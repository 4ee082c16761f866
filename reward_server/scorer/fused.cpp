// One pass of hidden states through an LM head on the CPU: a tile of logits is made by oneDNN's matrix kernels (float32
// accumulation, also for bfloat16 operands), reduced while it lies in the L2 cache, and forgotten. Without bfloat16
// units, bfloat16 weights are widened to float32 a tile at a time.
//
// Per row t, with logits z_tj = scale_t * <hidden_t, weight_j>:
//   top_t   = max_j z_tj
//   total_t = sum_j exp(z_tj - top_t)
//   slope_t = sum_j exp(z_tj - top_t) * (z_tj - top_t)
//   square_t = sum_j exp(z_tj - top_t) * (z_tj - top_t)^2
//   the k largest <hidden_t, weight_j>, in descending order
// so that logsumexp = top + log(total), entropy = log(total) - slope / total, and the variance of log p under p is
// square / total - (slope / total)^2.

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
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
  double top = kNegativeInfinity, total = 0.0, slope = 0.0, square = 0.0;

  void add(const Sums& other) {
    if (other.total == 0.0) return;  // not `<= 0`: a NaN must go on
    if (other.top == top) {
      total += other.total;
      slope += other.slope;
      square += other.square;
      return;
    }
    const double to = std::max(top, other.top);
    const double mine = total == 0.0 ? 0.0 : std::exp(top - to), theirs = std::exp(other.top - to);
    const double my_shift = total == 0.0 ? 0.0 : top - to, their_shift = other.top - to;
    square = mine * moved_square(my_shift) + theirs * other.moved_square(their_shift);
    slope = mine * (slope + total * my_shift) + theirs * (other.slope + other.total * their_shift);
    total = mine * total + theirs * other.total;
    top = to;
  }

  void raise(double to) {
    const double shift = top - to, factor = std::exp(shift);
    square = factor * moved_square(shift);
    slope = factor * (slope + total * shift);
    total *= factor;
    top = to;
  }

  double moved_square(double shift) const { return square + 2.0 * shift * slope + shift * shift * total; }
};

// Sums of exp(x), exp(x) * x and, with kSquare, exp(x) * x^2 for x = scale * logit - shift, and the largest x.
template <bool kSquare>
inline void pass(const float* logits, int64_t count, float scale, float shift, float& largest, Sums& sums) {
  float high = -std::numeric_limits<float>::infinity(), sum = 0.0f, weighted = 0.0f, squared = 0.0f;
#pragma omp simd reduction(max : high) reduction(+ : sum, weighted, squared)
  for (int64_t j = 0; j < count; ++j) {
    const float x = logits[j] * scale - shift, e = exp_bounded(x), ex = e * x;
    high = x > high ? x : high;
    sum += e;
    weighted += ex;
    if constexpr (kSquare) squared += ex * x;
  }
  largest = high;
  sums = {shift, sum, weighted, squared};
}

// Not more than 32 float32 additions in a row.
constexpr int64_t kPiece = 32 * at::vec::Vectorized<float>::size();

// Adds at most kPiece logits. The largest so far serves as the shift, which saves a pass for their own maximum; a piece
// that rises far above it, where float32 would lose digits, is done again.
template <bool kSquare>
inline void add_piece(Sums& sums, const float* logits, int64_t count, float scale) {
  float largest;
  Sums here;
  auto shift = static_cast<float>(sums.top);
  const bool is_first = sums.total == 0.0;
  if (!is_first) pass<kSquare>(logits, count, scale, shift, largest, here);
  if (is_first || largest > kHighest) {
    float high = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : high)
    for (int64_t j = 0; j < count; ++j) high = logits[j] > high ? logits[j] : high;
    shift = high * scale;
    pass<kSquare>(logits, count, scale, shift, largest, here);
  }
  sums.add(here);
  if (largest > 0.0f) sums.raise(shift + largest);  // a float32 again, so that the next shift is exactly the top
}

template <bool kSquare>
inline void add(Sums& sums, const float* logits, int64_t count, float scale) {
  for (int64_t first = 0; first < count; first += kPiece)
    add_piece<kSquare>(sums, logits + first, std::min(kPiece, count - first), scale);
}

// Takes the logits that belong among the k largest so far, which are kept in descending order. Few tiles hold any, so
// most blocks cost one comparison of their maximum with the smallest that is kept.
inline void keep_largest(float* kept, int64_t k, const float* logits, int64_t count) {
  constexpr int64_t kBlock = 64;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    float high = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : high)
    for (int64_t j = first; j < last; ++j) high = logits[j] > high ? logits[j] : high;
    if (!(high > kept[k - 1])) continue;
    for (int64_t j = first; j < last; ++j) {
      if (!(logits[j] > kept[k - 1])) continue;
      int64_t place = k - 1;
      for (; place > 0 && kept[place - 1] < logits[j]; --place) kept[place] = kept[place - 1];
      kept[place] = logits[j];
    }
  }
}

// What Python gives: [rows, width] hidden states, [vocab, width] weights, a scale and four sums a row, and [rows, k] of
// the largest products. `square` may be null, and k 0.
struct Job {
  const void *hidden, *weight;
  int64_t rows, vocab, width;
  const float* scale;
  double *top, *total, *slope, *square;
  float* largest;
  int64_t k, tile, threads;
};

// A tile's [count, width] weights, transposed. The unit is a 32-bit word, so that float32 makes columns, and bfloat16
// the column pairs that dot-product units read.
template <typename T>
void pack(const T* weight, int64_t count, int64_t width, float* packed) {
  const int64_t words = width * sizeof(T) / 4;
  const auto* source = reinterpret_cast<const float*>(weight);
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t j = 0; j < words; j += 16)
      at::vec::transpose_mxn<float>(source + i * words + j, words, packed + j * count + i, count,
                                    static_cast<int>(std::min<int64_t>(16, count - i)),
                                    static_cast<int>(std::min<int64_t>(16, words - j)));
}

void pack_widened(const at::BFloat16* weight, int64_t count, int64_t width, float* packed) {
  alignas(64) float block[16 * 16];
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t height = std::min<int64_t>(16, count - i);
    for (int64_t j = 0; j < width; j += 16) {  // the width is a multiple of 32
      for (int64_t row = 0; row < height; ++row)
        for (int64_t column = 0; column < 16; ++column)
          block[row * 16 + column] = static_cast<float>(weight[(i + row) * width + j + column]);
      at::vec::transpose_mxn<float>(block, 16, packed + j * count + i, count, static_cast<int>(height), 16);
    }
  }
}

// T is what is multiplied, and the type of the hidden states; Weight what the weights are in memory.
template <typename Weight, typename T, bool kSquare>
void run(const Job& job) {
  // Without oneDNN's AVX-512 kernels each product packs its operands again, which more rows pay for (measured).
  constexpr int64_t kRows = at::vec::Vectorized<float>::size() >= 16 ? 64 : 256;
  const int64_t rows = job.rows, vocab = job.vocab, width = job.width, tile = job.tile, k = job.k;
  const auto* hidden = static_cast<const T*>(job.hidden);
  const auto* weight = static_cast<const Weight*>(job.weight);
  const int64_t tiles = (vocab + tile - 1) / tile;
  std::vector<std::vector<Sums>> parts(job.threads);
  std::vector<std::vector<float>> kept(job.threads);
#pragma omp parallel num_threads(job.threads)
  {
    std::vector<Sums> sums(rows);
    std::vector<float> largest(rows * k, -std::numeric_limits<float>::infinity());
    auto* packed = static_cast<float*>(std::aligned_alloc(64, tile * width * sizeof(T)));
    auto* logits = static_cast<float*>(std::aligned_alloc(64, tile * kRows * 4));
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tiles; ++index) {
      const int64_t first = index * tile, count = std::min(tile, vocab - first);
      if constexpr (std::is_same_v<Weight, T>)
        pack(weight + first * width, count, width, packed);
      else
        pack_widened(weight + first * width, count, width, packed);
      for (int64_t start = 0; start < rows; start += kRows) {
        const int64_t height = std::min(kRows, rows - start);
        at::native::cpublas::brgemm(height, count, width, width, count, count, false, hidden + start * width,
                                    reinterpret_cast<const T*>(packed), logits, sizeof(T) == 2);
        for (int64_t i = 0; i < height; ++i) {
          const int64_t row = start + i;
          add<kSquare>(sums[row], logits + i * count, count, job.scale[row]);
          if (k) keep_largest(largest.data() + row * k, k, logits + i * count, count);
        }
      }
    }
    at::native::cpublas::brgemm_release(sizeof(T) == 2);
    std::free(packed);
    std::free(logits);
    parts[omp_get_thread_num()] = std::move(sums);
    kept[omp_get_thread_num()] = std::move(largest);
  }
  std::fill_n(job.largest, rows * k, -std::numeric_limits<float>::infinity());
  for (int64_t t = 0; t < rows; ++t) {
    Sums sums;
    for (const auto& part : parts)  // in thread order, so that equal inputs give equal bits
      if (!part.empty()) sums.add(part[t]);
    job.top[t] = sums.top;
    job.total[t] = sums.total;
    job.slope[t] = sums.slope;
    if (kSquare) job.square[t] = sums.square;
    for (const auto& part : kept)
      if (!part.empty()) keep_largest(job.largest + t * k, k, part.data() + t * k, k);
  }
}

template <typename Weight, typename T>
void run(const Job& job) {
  job.square ? run<Weight, T, true>(job) : run<Weight, T, false>(job);
}

}  // namespace

extern "C" int rlif_supports_bfloat16() { return at::native::cpublas::could_pack(at::kBFloat16); }

extern "C" void rlif_head_bfloat16(const Job* job) { run<at::BFloat16, at::BFloat16>(*job); }

extern "C" void rlif_head_widened(const Job* job) { run<at::BFloat16, float>(*job); }

extern "C" void rlif_head_float32(const Job* job) { run<float, float>(*job); }
