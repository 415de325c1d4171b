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
    for (int kind = 0; kind < (bits == 4 ? 6 : 4); ++kind) {
      const int scale_bytes = kind % 2 == 0 ? 2 : 4;
      const int parts = kind / 2 == kMinimum ? 2 : 1;
      for (int group : {16, 32, 64, 128}) {
        for (int rows = 1; rows <= 10; ++rows) {
          Packed w{nullptr, 50, 384, bits, group, kind / 2, scale_bytes, {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};
          std::vector<uint8_t> data(w.panels() * w.panel_bytes());
          for (auto& byte : data) byte = static_cast<uint8_t>(random());
          for (int64_t g = 0; g < w.panels() * w.groups(); ++g) {  // scales and minima must be sane: 0x2cxx is near 0.07 as fp16, 0x3d.. as fp32
            uint8_t* scales = data.data() + (g + 1) * w.group_bytes() - kPanel * scale_bytes * parts;
            for (int i = scale_bytes - 1; i < kPanel * scale_bytes * parts; i += scale_bytes) scales[i] = scale_bytes == 2 ? 0x2c : 0x3d;
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
            return std::printf("bits %d kind %d group %d rows %d: error %g, rows %d\n", bits, kind, group, rows, std::sqrt(error / size), same_rows), 1;
          }
        }
      }
    }
  }
  std::puts("equal");
}
