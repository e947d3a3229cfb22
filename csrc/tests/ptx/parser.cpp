#include "parser.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>

#include "mnemonics.h"
#include "tokens.h"

namespace ema_fused::testing::ptx {
namespace {

// One kernel, from its name to the brace that ends it.
class KernelParser {
 public:
  KernelParser(const std::vector<Token>& tokens, std::size_t at) : tokens_(tokens), at_(at) {
    kernel_.register_names = {"%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x"};
    scopes_.emplace_back();
    for (u16 place = 0; place < kSpecialRegisters; ++place) {
      scopes_.back()[kernel_.register_names[place]] = place;
    }
  }

  Kernel parse() {
    kernel_.name = take();
    parameters();
    bounds();
    expect("{");
    while (scopes_.size() > 0) {
      statement();
    }
    resolve_branches();
    return std::move(kernel_);
  }
  std::size_t at() const { return at_; }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Fault("line " + std::to_string(tokens_[at_].line) + ": " + what + ", found '" +
                tokens_[at_].text + "'");
  }
  const std::string& next() const { return tokens_[at_].text; }
  std::string take() {
    if (next().empty()) {
      refuse("the text ends within a kernel");
    }
    return tokens_[at_++].text;
  }
  bool take_if(const std::string& text) {
    const bool is_there = next() == text;
    at_ += is_there ? 1 : 0;
    return is_there;
  }
  void expect(const std::string& text) {
    if (!take_if(text)) {
      refuse("expected '" + text + "'");
    }
  }
  s64 integer() {
    char* end = nullptr;
    const s64 value = next()[0] == '-' ? std::strtoll(next().c_str(), &end, 0)
                                       : static_cast<s64>(std::strtoull(next().c_str(), &end, 0));
    if (next().empty() || *end != '\0') {
      refuse("expected a number");
    }
    take();
    return value;
  }
  std::size_t size() { return static_cast<std::size_t>(integer()); }

  // ---- The head ---------------------------------------------------------------------------------

  void parameters() {
    expect("(");
    std::size_t offset = 0;
    while (!take_if(")")) {
      expect(".param");
      std::size_t alignment = take_if(".align") ? size() : 0;
      const std::string type = take();
      std::size_t bytes = type == ".u64" || type == ".b64" ? 8 : 1;
      if (bytes == 1 && type != ".b8") {
        refuse("expected a parameter of type .u64 or .b8 instead of " + type);
      }
      alignment = alignment == 0 ? bytes : alignment;
      if (take_if(".ptr")) {
        expect(".align");
        size();
      }
      parameter_names_[take()] = kernel_.parameters.size();
      if (take_if("[")) {
        bytes *= size();
        expect("]");
      }
      offset = (offset + alignment - 1) / alignment * alignment;
      kernel_.parameters.push_back({offset, bytes});
      offset += bytes;
      take_if(",");
    }
  }

  void bounds() {
    while (next() != "{") {
      if (take_if(".maxntid")) {
        kernel_.max_threads = static_cast<u32>(size());
        while (take_if(",")) {
          if (size() != 1) {
            refuse("expected threads in one dimension");
          }
        }
      } else if (take_if(".minnctapersm")) {
        kernel_.min_blocks_a_multiprocessor = static_cast<u32>(size());
      } else {
        refuse("a directive that this parser doesn't know");
      }
    }
  }

  // ---- The body ---------------------------------------------------------------------------------

  void statement() {
    if (take_if("{")) {
      scopes_.emplace_back();
    } else if (take_if("}")) {
      scopes_.pop_back();
    } else if (take_if(".reg")) {
      registers();
    } else if (take_if(".pragma")) {
      take();
      expect(";");
    } else if (tokens_[at_ + 1].text == ":") {
      labels_[take()] = kernel_.instructions.size();
      take();
    } else {
      instruction();
    }
  }

  void registers() {
    take();  // the type: each instruction names its own
    do {
      const std::string name = take();
      if (take_if("<")) {
        const std::size_t count = size();
        for (std::size_t i = 0; i < count; ++i) {
          scopes_.back()[name + std::to_string(i)] = new_place(name + std::to_string(i));
        }
        expect(">");
      } else {
        scopes_.back()[name] = new_place(name);
      }
    } while (take_if(","));
    expect(";");
  }

  u16 new_place(const std::string& name) {
    if (kernel_.register_names.size() > std::numeric_limits<u16>::max()) {
      refuse("more registers and constants than 65,536");
    }
    kernel_.register_names.push_back(name);
    return static_cast<u16>(kernel_.register_names.size() - 1);
  }

  u16 new_constant(u64 value) {
    const u16 place = new_place("a constant");
    kernel_.constants.push_back({place, value});
    return place;
  }

  void instruction() {
    const u32 line = tokens_[at_].line;
    std::string guard;
    if (take_if("@")) {
      guard = take_if("!") ? "@!" : "@";
      operands_ = {value()};
    } else {
      operands_.clear();
    }
    const std::size_t named = at_;
    std::string mnemonic = take();
    immediate_ = 0;
    if (mnemonic == "bra" || mnemonic == "bra.uni") {
      branches_.push_back({kernel_.instructions.size(), at_});
      take();
      expect(";");
      mnemonic = guard + "bra";
    } else {
      if (!guard.empty()) {
        at_ = named;
        refuse("expected no other instruction than bra behind a predicate");
      }
      mnemonic = operands(mnemonic);
    }
    const std::size_t behind = at_;
    at_ = named;
    const std::optional<Op> op = op_named(mnemonic);
    if (!op.has_value()) {
      refuse("an instruction that the interpreter doesn't know (operations.h)");
    }
    const OpInfo& info = info_of(*op);
    if (operands_.size() != info.writes + info.reads) {
      refuse("an instruction with " + std::to_string(operands_.size()) + " operands");
    }
    at_ = behind;
    Instruction made{*op, {}, immediate_};
    std::copy(operands_.begin(), operands_.end(), made.operands);
    kernel_.instructions.push_back(made);
    kernel_.lines.push_back(line);
  }

  // The rest of an instruction. Returns its mnemonic: that of a mov with a vector is another.
  std::string operands(const std::string& mnemonic) {
    std::string refined = mnemonic;
    std::vector<u16> values;
    bool is_first = true;
    while (!take_if(";")) {
      if (!is_first) {
        expect(",");
      }
      if (take_if("[")) {
        operands_.push_back(address());
      } else if (take_if("{")) {
        if (mnemonic.compare(0, 4, "mov.") == 0) {
          refined = (is_first ? "unpack" : "pack") + mnemonic.substr(3);
        }
        do {
          operands_.push_back(value());
        } while (take_if(","));
        expect("}");
      } else {
        operands_.push_back(value());
      }
      is_first = false;
    }
    return refined;
  }

  u16 address() {
    const u16 base = value();
    if (take_if("+")) {
      const s64 offset = integer();
      if (offset != static_cast<s32>(offset)) {
        refuse("an offset of more than 32 bits");
      }
      immediate_ = static_cast<s32>(offset);
    }
    expect("]");
    return base;
  }

  // A register, a number or the address of a parameter.
  u16 value() {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(next());
      if (found != scope->end()) {
        take();
        return found->second;
      }
    }
    const auto parameter = parameter_names_.find(next());
    if (parameter != parameter_names_.end()) {
      take();
      return new_constant(static_cast<u64>(parameter->second) << kParameterAddressBits);
    }
    if (next().compare(0, 2, "0f") == 0 || next().compare(0, 2, "0d") == 0) {
      return new_constant(std::strtoull(take().c_str() + 2, nullptr, 16));
    }
    return new_constant(static_cast<u64>(integer()));
  }

  void resolve_branches() {
    if (kernel_.instructions.empty() || kernel_.instructions.back().op != Op::leave) {
      refuse("expected a kernel that ends with ret");
    }
    for (const auto& [instruction, token] : branches_) {
      const auto label = labels_.find(tokens_[token].text);
      if (label == labels_.end()) {
        at_ = token;
        refuse("expected a label of this kernel");
      }
      kernel_.instructions[instruction].immediate = static_cast<s32>(label->second);
    }
  }

  const std::vector<Token>& tokens_;
  std::size_t at_;
  Kernel kernel_;
  std::map<std::string, std::size_t> parameter_names_;
  std::vector<std::unordered_map<std::string, u16>> scopes_;
  std::unordered_map<std::string, std::size_t> labels_;
  std::vector<std::pair<std::size_t, std::size_t>> branches_;  // instruction, token of the label
  std::vector<u16> operands_;                                  // of the instruction at hand
  s32 immediate_ = 0;
};

}  // namespace

std::vector<Kernel> parse(const std::string& text) {
  const std::vector<Token> tokens = tokens_of(text);
  std::vector<Kernel> kernels;
  std::size_t at = 0;
  while (!tokens[at].text.empty()) {
    const std::string& directive = tokens[at].text;
    if (directive == ".version" || directive == ".target" || directive == ".address_size") {
      at += 2;
    } else if (directive == ".entry" || directive == ".visible") {
      KernelParser parser(tokens, at + (directive == ".entry" ? 1 : 2));
      kernels.push_back(parser.parse());
      at = parser.at();
    } else {
      throw Fault("line " + std::to_string(tokens[at].line) +
                  ": expected the directives of a kernel, found '" + directive + "'");
    }
  }
  return kernels;
}

}  // namespace ema_fused::testing::ptx
