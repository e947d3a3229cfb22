// A PTX text cut into words and signs.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace ema_fused::testing::ptx {

struct Token {
  std::string text;
  u32 line;
};

// Comments are left out; the last token is empty.
std::vector<Token> tokens_of(const std::string& text);

}  // namespace ema_fused::testing::ptx
