// Compares the Arm dot-product kernels with the portable ones on random shapes; built by test_arm.py and run under emulation.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "linear.h"

using namespace dovetail;

extern "C" int dovetail_choose_instruction_set(const char* name);

int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Pool& pool = Pool::instance();
  Workspace workspace;
  if (std::strcmp(instruction_set().name, "arm-dotprod") != 0) return std::printf("chosen: %s\n", instruction_set().name), 2;
  for (int bits : {4, 8}) {
    for (int minimum : {0, 1}) {
      for (int group : {32, 64, 128}) {
        for (int rows = 1; rows <= 10; ++rows) {
          Packed w{nullptr, 50, 384, bits, group, minimum};
          std::vector<uint8_t> data(w.panels() * w.panel_bytes());
          for (auto& byte : data) byte = static_cast<uint8_t>(random());
          for (int64_t g = 0; g < w.panels() * w.groups(); ++g) {  // scales and minima must be sane halves: 0x2cxx is near 0.07
            uint8_t* halves = data.data() + (g + 1) * w.group_bytes() - kPanel * 2 * (1 + minimum);
            for (int i = 1; i < kPanel * 2 * (1 + minimum); i += 2) halves[i] = 0x2c;
          }
          w.data = data.data();
          std::vector<float> x(rows * w.in), fast(rows * w.out), slow(fast.size()), alone(fast.size());
          for (auto& value : x) value = normal(random);
          dovetail_choose_instruction_set("arm-dotprod");
          linear(pool, workspace, w, x.data(), w.in, rows, fast.data());
          for (int row = 0; row < rows; ++row) linear(pool, workspace, w, x.data() + row * w.in, w.in, 1, alone.data() + row * w.out);
          dovetail_choose_instruction_set("portable");
          linear(pool, workspace, w, x.data(), w.in, rows, slow.data());
          double error = 0, size = 0;
          for (size_t i = 0; i < fast.size(); ++i) error += std::pow(fast[i] - slow[i], 2), size += std::pow(slow[i], 2);
          const bool same_rows = std::memcmp(fast.data(), alone.data(), fast.size() * sizeof(float)) == 0;
          if (!(std::sqrt(error / size) < 1e-6) || !same_rows) {
            return std::printf("bits %d minimum %d group %d rows %d: error %g, rows %d\n", bits, minimum, group, rows, std::sqrt(error / size), same_rows), 1;
          }
        }
      }
    }
  }
  std::puts("equal");
}
