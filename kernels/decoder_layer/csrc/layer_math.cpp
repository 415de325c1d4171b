// The same loops for each instruction set: vec16.h and what follows it are compiled once under each target.
#include "layer_math.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "encode.h"
#include "linear.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace dovetail {

#if defined(__x86_64__) || defined(_M_X64)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
namespace {
namespace avx512_bf16_loops {
#define DOVETAIL_VECTOR 512
#define DOVETAIL_BF16_DOTS
#include "vec16.h"
#include "layer_math_loops.h"
#include "attention_words.h"
#include "attention_loops.h"
#undef DOVETAIL_BF16_DOTS
#undef DOVETAIL_VECTOR
}  // namespace avx512_bf16_loops
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
namespace {
namespace avx512_loops {
#define DOVETAIL_VECTOR 512
#include "vec16.h"
#include "layer_math_loops.h"
#include "attention_words.h"
#include "attention_loops.h"
#undef DOVETAIL_VECTOR
}  // namespace avx512_loops
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace {
namespace avx2_loops {
#define DOVETAIL_VECTOR 256
#include "vec16.h"
#include "layer_math_loops.h"
#include "attention_words.h"
#include "attention_loops.h"
#undef DOVETAIL_VECTOR
}  // namespace avx2_loops
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace {
namespace portable_loops {
#define DOVETAIL_VECTOR 0
#include "vec16.h"
#include "layer_math_loops.h"
#include "attention_words.h"
#include "attention_loops.h"
#undef DOVETAIL_VECTOR
}  // namespace portable_loops

#define DOVETAIL_LAYER_MATH(LOOPS)                                                                                    \
  {LOOPS::normalise, LOOPS::centre,      LOOPS::rotate,    LOOPS::swiglu,      LOOPS::geglu,       LOOPS::silu, \
   LOOPS::blend,     LOOPS::log_sum_exp, LOOPS::store_row, LOOPS::attend_task, LOOPS::attend_chunk}

#if defined(__x86_64__) || defined(_M_X64)
const LayerMath kAvx512Bf16 = DOVETAIL_LAYER_MATH(avx512_bf16_loops);
const LayerMath kAvx512 = DOVETAIL_LAYER_MATH(avx512_loops);
const LayerMath kAvx2 = DOVETAIL_LAYER_MATH(avx2_loops);
#endif
const LayerMath kPortable = DOVETAIL_LAYER_MATH(portable_loops);

}  // namespace

const LayerMath& layer_math() {
#if defined(__x86_64__) || defined(_M_X64)
  if (&instruction_set() == avx512_bf16()) return kAvx512Bf16;
  if (&instruction_set() == avx512()) return kAvx512;
  if (&instruction_set() == avx_vnni() || &instruction_set() == avx2()) return kAvx2;
#endif
  return kPortable;
}

}  // namespace dovetail
