// What helps with the names of our commands: `hearth completion`, which a shell reads, and what was probably meant.
#pragma once

#include <string>
#include <vector>

namespace hearth {

// A script for "bash" or "zsh". A command's options are taken from its own --help when they are asked for, so they are
// always those of the program that would run. `commands`: names, with spaces between them.
std::string CompletionScript(const std::string& shell, const std::string& commands);

// The name that `word` was probably meant to be: the nearest by letters put in, left out or replaced, and no more than
// two of them away, or one of a short word. Empty: none is so near.
std::string NearestName(const std::string& word, const std::vector<std::string>& names);

}  // namespace hearth
