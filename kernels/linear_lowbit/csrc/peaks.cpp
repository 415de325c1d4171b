// What the machine could do, for the benchmark to measure in the same run: memory streamed, dot products in registers.
#include <atomic>
#include <vector>

#include "encode.h"
#include "linear.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define TARGET_STREAM __attribute__((target("avx2")))
#else
#define TARGET_STREAM
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dovetail {
namespace {

constexpr int kChains = 12;  // independent sums: more than latency times throughput of the instruction anywhere

// Sums a run of memory, so that every line is read and none can be left out.
DOVETAIL_INLINE uint64_t sum_words(const uint64_t* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}

uint64_t sum_plain(const uint64_t* words, int64_t count) { return sum_words(words, count); }
TARGET_STREAM uint64_t sum_wide(const uint64_t* words, int64_t count) { return sum_words(words, count); }

#if defined(__x86_64__) || defined(_M_X64)
__attribute__((target("avx512f,avx512bw,avx512vnni"))) int64_t dots_avx512(int64_t rounds) {
  __m512i sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_si512();
  const __m512i a = _mm512_set1_epi8(3);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sum[i] = _mm512_dpbusd_epi32(sum[i], a, a);
      asm volatile("" : "+v"(sum[i]));
    }
  }
  return rounds * kChains * 64;
}

__attribute__((target("avx2,avxvnni"))) int64_t dots_avx_vnni(int64_t rounds) {
  __m256i sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm256_setzero_si256();
  const __m256i a = _mm256_set1_epi8(3);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sum[i] = _mm256_dpbusd_avx_epi32(sum[i], a, a);
      asm volatile("" : "+x"(sum[i]));
    }
  }
  return rounds * kChains * 32;
}

__attribute__((target("avx2"))) int64_t dots_avx2(int64_t rounds) {
  __m256i sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm256_setzero_si256();
  const __m256i a = _mm256_set1_epi8(3);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      __m256i product = _mm256_maddubs_epi16(a, a);
      asm volatile("" : "+x"(product));
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(product, ones));
      asm volatile("" : "+x"(sum[i]));
    }
  }
  return rounds * kChains * 32;
}
#endif

#if defined(__aarch64__)
__attribute__((target("arch=armv8.2-a+dotprod"))) int64_t dots_arm(int64_t rounds) {
  int32x4_t sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = vdupq_n_s32(0);
  const int8x16_t a = vdupq_n_s8(3);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sum[i] = vdotq_s32(sum[i], a, a);
      asm volatile("" : "+w"(sum[i]));
    }
  }
  return rounds * kChains * 16;
}
#endif

int64_t dots(int64_t rounds) {
#if defined(__x86_64__) || defined(_M_X64)
  if (std::strncmp(instruction_set().name, "avx512", 6) == 0) return dots_avx512(rounds);
  if (std::strcmp(instruction_set().name, "avx2-vnni") == 0) return dots_avx_vnni(rounds);
  if (std::strcmp(instruction_set().name, "avx2") == 0) return dots_avx2(rounds);
#endif
#if defined(__aarch64__)
  if (std::strcmp(instruction_set().name, "arm-dotprod") == 0) return dots_arm(rounds);
#endif
  return rounds * 0;
}

}  // namespace
}  // namespace dovetail

#pragma GCC visibility push(default)
extern "C" {

using namespace dovetail;

// Reads `bytes` of memory on all threads; the answer is only there to be needed.
uint64_t dovetail_stream(const void* memory, int64_t bytes) {
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("stream", bytes, 0));
  const bool wide = avx2() != nullptr && avx2()->supported();
  std::atomic<uint64_t> total{0};
  constexpr int64_t piece = 1 << 17;
  auto body = [&](int64_t begin, int64_t end) {
    const uint64_t* words = static_cast<const uint64_t*>(memory) + begin * piece;
    total += (wide ? sum_wide : sum_plain)(words, (end - begin) * piece);
  };
  pool.run(bytes / 8 / piece, 1, body);
  return total;
}

// 8-bit multiply-adds done in registers by all threads together; 0 where the instruction set has no dot product.
int64_t dovetail_dots(int64_t rounds) {
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("dots", rounds, 0));
  std::atomic<int64_t> total{0};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) total += dots(rounds);
  };
  pool.run(int64_t{8} * pool.threads(), 1, body);
  return total;
}
}
#pragma GCC visibility pop
