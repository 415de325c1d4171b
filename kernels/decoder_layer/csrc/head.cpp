#include "head.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "layer_math.h"

namespace dovetail {
namespace {

// The best of the candidates in the order of torch.argmax: NaN first, then the largest, then the smallest id.
bool better(float logit, int64_t id, float best, int64_t best_id) {
  if (std::isnan(logit) != std::isnan(best)) return std::isnan(logit);
  return logit > best || ((logit == best || std::isnan(logit)) && id < best_id);
}

// Whether all are at most `best`; NaN is not. Most panels end here, and the loop has no branch.
bool none_above(const float* logits, int64_t count, float best) {
  int above = 0;
  for (int64_t i = 0; i < count; ++i) above |= !(logits[i] <= best);
  return above == 0;
}

// Puts an id in its place among the best `k`, whose logits fall; called with rising ids, so equals stay behind.
void insert(float logit, int64_t id, int64_t k, int64_t& count, int64_t* ids, float* logits) {
  int64_t at = count < k ? count++ : k - 1;
  for (; at > 0 && logits[at - 1] < logit; --at) {
    ids[at] = ids[at - 1];
    logits[at] = logits[at - 1];
  }
  ids[at] = id;
  logits[at] = logit;
}

// Of the rows' logits only those above the k-th best so far are looked at one by one.
void best_of_row(const float* logits, int64_t vocabulary, int64_t k, int64_t* ids, float* log_probs) {
  int64_t count = 0;
  for (int64_t first = 0; first < vocabulary; first += kPanel) {
    const int64_t end = std::min<int64_t>(first + kPanel, vocabulary);
    float largest = logits[first];
    for (int64_t i = first; i < end; ++i) largest = logits[i] > largest ? logits[i] : largest;
    if (count == k && largest <= log_probs[k - 1]) continue;
    for (int64_t i = first; i < end; ++i)
      if (count < k || logits[i] > log_probs[k - 1]) insert(logits[i], i, k, count, ids, log_probs);
  }
  const float normaliser = layer_math().log_sum_exp(logits, vocabulary);
  for (int64_t i = 0; i < k; ++i) log_probs[i] -= normaliser;
}

}  // namespace

void Head::argmax(Pool& pool, const Packed& head, const float* x, int64_t rows, int64_t* ids, float* logits) {
  std::fill(ids, ids + rows, head.out);
  std::fill(logits, logits + rows, -INFINITY);
  std::mutex merging;
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int block = static_cast<int>(std::min<int64_t>(kBlock, rows - first));
    const Activations activations = workspace_.activations(head, block);
    encode_rows(pool, head, x + first * head.in, head.in, block, activations);
    auto body = [&](int64_t begin, int64_t end) {
      float best[kBlock], panel_logits[kBlock * kPanel];
      int64_t best_ids[kBlock];
      std::fill(best, best + block, -INFINITY);
      std::fill(best_ids, best_ids + block, head.out);
      for (int64_t panel = begin; panel < end; ++panel) {
        multiply_panels(head, activations, block, panel, panel + 1, panel_logits, kPanel);
        const int64_t valid = std::min<int64_t>(kPanel, head.out - panel * kPanel);
        for (int row = 0; row < block; ++row) {
          if (best_ids[row] != head.out && none_above(panel_logits + row * kPanel, valid, best[row])) continue;
          for (int64_t i = 0; i < valid; ++i) {
            const float logit = panel_logits[row * kPanel + i];
            if (!better(logit, panel * kPanel + i, best[row], best_ids[row])) continue;
            best[row] = logit;
            best_ids[row] = panel * kPanel + i;
          }
        }
      }
      lap(Part::kHead);
      const std::lock_guard<std::mutex> lock(merging);
      for (int row = 0; row < block; ++row) {
        if (!better(best[row], best_ids[row], logits[first + row], ids[first + row])) continue;
        logits[first + row] = best[row];
        ids[first + row] = best_ids[row];
      }
    };
    pool.run(head.panels(), panel_grain(head, block, pool.threads()), body);
  }
}

void Head::top_k(Pool& pool, const Packed& head, const float* x, int64_t rows, int64_t k, int64_t* ids, float* log_probs) {
  if (logits_.size() < static_cast<size_t>(rows * head.out)) logits_.resize(static_cast<size_t>(rows * head.out));
  linear(pool, workspace_, head, x, head.in, rows, logits_.data());
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) best_of_row(logits_.data() + row * head.out, head.out, k, ids + row * k, log_probs + row * k);
    lap(Part::kHead);
  };
  pool.run(rows, 1, body);
}

}  // namespace dovetail

#pragma GCC visibility push(default)
extern "C" {

using namespace dovetail;

static Head& shared_head() {  // one for the process: calls are serialised by the pool's lock
  static Head* const only = new Head;
  return *only;
}

void dovetail_argmax(const Packed* head, const float* x, int64_t rows, int64_t* ids, float* logits) {
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("argmax", head->out, rows));
  shared_head().argmax(pool, *head, x, rows, ids, logits);
}

void dovetail_top_k(const Packed* head, const float* x, int64_t rows, int64_t k, int64_t* ids, float* log_probs) {
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("top_k", head->out, rows));
  shared_head().top_k(pool, *head, x, rows, k, ids, log_probs);
}
}
#pragma GCC visibility pop
