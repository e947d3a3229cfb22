#include "mnemonics.h"

#include <map>
#include <set>
#include <vector>

namespace ema_fused::testing::ptx {
namespace {

const std::map<std::string, Op>& ops() {
  static const std::map<std::string, Op> by_mnemonic = {
#define PTX_ROW(name, text, ...) {text, Op::name},
      PTX_COMPUTATIONS(PTX_ROW) PTX_PARAMETER_LOADS(PTX_ROW) PTX_LOADS(PTX_ROW) PTX_STORES(PTX_ROW)
          PTX_CONTROLS(PTX_ROW)
#undef PTX_ROW
  };
  return by_mnemonic;
}

std::vector<std::string> parts_of(const std::string& mnemonic) {
  std::vector<std::string> parts(1);
  for (const char c : mnemonic) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) {
    text += (text.empty() ? "" : ".") + part;
  }
  return text;
}

// "u32" of letters "ub": a type whose width alone matters to the instruction.
bool is_type(const std::string& part, const std::string& letters) {
  static const std::set<std::string> widths{"8", "16", "32", "64"};
  return !part.empty() && letters.find(part[0]) != std::string::npos &&
         widths.count(part.substr(1)) != 0;
}

}  // namespace

std::optional<Op> op_named(const std::string& mnemonic) {
  static const std::set<std::string> widthless{"add", "sub", "mul", "mad", "and",
                                               "or",  "xor", "not", "mov", "selp"};
  std::vector<std::string> parts = parts_of(mnemonic);
  const std::string family = parts[0];
  const std::string type = parts.back();
  const bool moves = family == "mov" || family == "selp";
  const bool is_bitwise = family == "and" || family == "or" || family == "xor";
  if (mnemonic == "bra.uni") {
    parts.pop_back();
  } else if (family == "ld" || family == "st") {
    // Where it is cached is no matter of results. A signed load is longer than its memory.
    if (parts.size() > 2 && parts[2] == "cs") {
      parts.erase(parts.begin() + 2);
    }
    if (is_type(type, "ubf")) {
      parts.back() = type.substr(1);
    }
  } else if (widthless.count(family) != 0 && parts[1] != "wide" && parts[1] != "hi") {
    if (is_type(type, moves ? "ubsf" : "ubs") || (is_bitwise && type == "pred")) {
      parts.pop_back();
    }
  } else if ((family == "setp" || family == "shr") && is_type(type, "b")) {
    parts.back()[0] = 'u';
  }
  const auto found = ops().find(joined(parts));
  return found == ops().end() ? std::nullopt : std::optional<Op>(found->second);
}

}  // namespace ema_fused::testing::ptx
