#include "assignments.h"

#include <deque>

namespace ema_fused::testing::ptx {
namespace {

// One bit a place.
using Written = std::vector<u64>;

bool is_set(const Written& written, u16 place) {
  return (written[place / 64] >> place % 64 & 1) != 0;
}

void set(Written& written, u16 place) { written[place / 64] |= u64{1} << place % 64; }

bool is_branch(Op op) { return op == Op::branch || op == Op::branch_if || op == Op::branch_unless; }

// The places where one of several ways may begin or end.
std::vector<bool> starts_of_blocks(const Kernel& kernel) {
  std::vector<bool> starts(kernel.instructions.size() + 1, false);
  for (std::size_t i = 0; i < kernel.instructions.size(); ++i) {
    if (is_branch(kernel.instructions[i].op)) {
      starts[static_cast<std::size_t>(kernel.instructions[i].immediate)] = true;
      starts[i + 1] = true;
    }
  }
  return starts;
}

class Search {
 public:
  explicit Search(const Kernel& kernel)
      : kernel_(kernel), starts_(starts_of_blocks(kernel)), known_(kernel.instructions.size()) {}

  void run() {
    Written written(kernel_.register_names.size() / 64 + 1, 0);
    for (u16 place = 0; place < kSpecialRegisters; ++place) {
      set(written, place);
    }
    for (const Constant& constant : kernel_.constants) {
      set(written, constant.place);
    }
    reach(0, written);
    while (!queue_.empty()) {
      const std::size_t begin = queue_.front();
      queue_.pop_front();
      follow(begin, known_[begin]);
    }
    // Only now is it known what is written on every way.
    for (std::size_t begin = 0; begin < known_.size(); ++begin) {
      if (!known_[begin].empty()) {
        check_ = true;
        follow(begin, known_[begin]);
      }
    }
  }

 private:
  // What is written on all ways to the block that begins here.
  void reach(std::size_t begin, const Written& written) {
    Written& known = known_[begin];
    bool changed = known.empty();
    if (changed) {
      known = written;
    }
    for (std::size_t word = 0; word < known.size(); ++word) {
      changed = changed || (known[word] & ~written[word]) != 0;
      known[word] &= written[word];
    }
    if (changed && !check_) {
      queue_.push_back(begin);
    }
  }

  // To the end of the block.
  void follow(std::size_t begin, Written written) {
    for (std::size_t i = begin; i < known_.size(); ++i) {
      if (i != begin && starts_[i]) {
        reach(i, written);
        return;
      }
      const Instruction& one = kernel_.instructions[i];
      const OpInfo& info = info_of(one.op);
      for (std::size_t k = info.writes; check_ && k < info.writes + info.reads; ++k) {
        if (!is_set(written, one.operands[k])) {
          kernel_.fail(i, "expected a register that is written on every way to here, found " +
                              kernel_.register_names[one.operands[k]]);
        }
      }
      for (std::size_t k = 0; k < info.writes; ++k) {
        set(written, one.operands[k]);
      }
      if (is_branch(one.op)) {
        reach(static_cast<std::size_t>(one.immediate), written);
      }
      if (one.op == Op::branch || one.op == Op::leave) {
        return;
      }
    }
  }

  const Kernel& kernel_;
  const std::vector<bool> starts_;
  std::vector<Written> known_;  // of each start of a block that is reached
  std::deque<std::size_t> queue_;
  bool check_ = false;
};

}  // namespace

void check_assignments(const Kernel& kernel) { Search(kernel).run(); }

}  // namespace ema_fused::testing::ptx
