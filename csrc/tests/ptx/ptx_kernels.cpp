// Executes the PTX that nvcc makes of one kernel, beside the body as the host's compiler makes it:
//
//   ptx_kernels KERNEL TEXT... [--plant KIND:N] [--coverage] [--launches N]
//
// KERNEL: lerp, axpby, delta, products, stochastic, copy or swap. TEXT: files that nvcc has made of
// update_cuda_kernel.cu. --plant: changes one instruction of the first text (plants.h), which must
// be seen; the others aren't run. --coverage: tells how many instructions and comparisons were met.
// --launches: how many are drawn, 1500 if it isn't told. Exit status 1: a fault was found, which is
// told.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>

#include "generated_cases.h"
#include "random_tables.h"

using namespace ema_fused;
using namespace ema_fused::testing::ptx;

namespace {

constexpr std::size_t kMemory = std::size_t{16} << 20;
constexpr std::uint64_t kSeeds = 2;

const std::map<std::string, std::pair<Operation, Arithmetic>> kKernels = {
    {"lerp", {Operation::kAverage, Arithmetic::kLerp}},
    {"axpby", {Operation::kAverage, Arithmetic::kAxpby}},
    {"delta", {Operation::kAverage, Arithmetic::kDelta}},
    {"products", {Operation::kAverage, Arithmetic::kProducts}},
    {"stochastic", {Operation::kAverage, Arithmetic::kStochastic}},
    {"copy", {Operation::kCopy, Arithmetic::kLerp}},
    {"swap", {Operation::kSwap, Arithmetic::kLerp}},
};

struct Arguments {
  std::string kernel;
  std::vector<std::string> texts;
  std::string plant;
  bool covers = false;
  std::uint64_t launches = 1500;
};

Arguments arguments_of(int count, char** words) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--coverage") {
      arguments.covers = true;
    } else if (word == "--plant" && i + 1 < count) {
      arguments.plant = words[++i];
    } else if (word == "--launches" && i + 1 < count) {
      arguments.launches = std::strtoull(words[++i], nullptr, 10);
    } else if (arguments.kernel.empty()) {
      arguments.kernel = word;
    } else {
      arguments.texts.push_back(word);
    }
  }
  if (kKernels.count(arguments.kernel) == 0 || arguments.texts.empty()) {
    throw Fault("expected ptx_kernels KERNEL TEXT... [--plant KIND:N] [--coverage] [--launches N]");
  }
  return arguments;
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw Fault("expected a PTX text, found no file that can be read");
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

void check_text(const std::string& path, const Arguments& arguments) {
  const auto& [operation, arithmetic] = kKernels.at(arguments.kernel);
  KernelsUnderTest kernels(contents(path), operation, arithmetic, arguments.plant);
  if (!arguments.plant.empty()) {
    // Told at once: what comes of it may end the process.
    std::printf("planted at %s\n", kernels.planted().c_str());
    std::fflush(stdout);
  }
  if (arguments.covers) {
    kernels.cover();
  }
  DeviceMemory memory(kMemory);
  check_random_tables(kernels, memory, arguments.launches);
  check_generated_cases(kernels, memory, kSeeds);
  std::printf("%s: %s\n", path.c_str(), kernels.report().c_str());
}

}  // namespace

int main(int count, char** words) {
  std::string path;
  try {
    const Arguments arguments = arguments_of(count, words);
    for (const std::string& text : arguments.texts) {
      path = text + ": ";
      check_text(text, arguments);
      if (!arguments.plant.empty()) {
        break;
      }
    }
  } catch (const Fault& fault) {
    std::fprintf(stderr, "%sfailed: %s\n", path.c_str(), fault.what());
    return 1;
  }
  return 0;
}
