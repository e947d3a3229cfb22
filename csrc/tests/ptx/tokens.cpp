#include "tokens.h"

#include <cctype>

namespace ema_fused::testing::ptx {
namespace {

bool is_in_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%' ||
         c == '.' || c == '-';
}

}  // namespace

std::vector<Token> tokens_of(const std::string& text) {
  std::vector<Token> tokens;
  u32 line = 1;
  for (std::size_t i = 0; i < text.size();) {
    std::size_t end = i + 1;
    if (text[i] == '\n') {
      ++line;
    } else if (text.compare(i, 2, "//") == 0) {
      end = std::min(text.find('\n', i), text.size());
    } else if (std::isspace(static_cast<unsigned char>(text[i])) == 0) {
      if (text[i] == '"') {
        end = std::min(text.find('"', i + 1), text.size() - 1) + 1;
      } else if (is_in_word(text[i])) {
        while (end < text.size() && is_in_word(text[end])) {
          ++end;
        }
      }
      tokens.push_back({text.substr(i, end - i), line});
    }
    i = end;
  }
  tokens.push_back({"", line});
  return tokens;
}

}  // namespace ema_fused::testing::ptx
