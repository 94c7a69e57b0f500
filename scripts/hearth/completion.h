// `hearth completion`: what a shell reads to complete our commands.
#pragma once

#include <string>

namespace hearth {

// A script for "bash" or "zsh". A command's options are taken from its own --help when they are asked for, so they are
// always those of the program that would run. `commands`: names, with spaces between them.
std::string CompletionScript(const std::string& shell, const std::string& commands);

}  // namespace hearth
