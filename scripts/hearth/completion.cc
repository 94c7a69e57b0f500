#include "scripts/hearth/completion.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_replace.h"

namespace hearth {

namespace {

constexpr char kBash[] = R"SHELL(# bash completion for hearth: source <(hearth completion bash)
_hearth_options() { "$1" "$2" --help 2>/dev/null | grep -oE -- '--[a-z][a-z-]*' | sort -u; }
_hearth() {
  local word=${COMP_WORDS[COMP_CWORD]}
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    mapfile -t COMPREPLY < <(compgen -W '@COMMANDS@ --help --version' -- "$word")
  elif [[ $word == -* ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$(_hearth_options "${COMP_WORDS[0]}" "${COMP_WORDS[1]}")" -- "$word")
  elif [ "${COMP_WORDS[1]}" = completion ]; then
    mapfile -t COMPREPLY < <(compgen -W 'bash zsh' -- "$word")
  else
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
  fi
}
complete -o filenames -F _hearth hearth
)SHELL";

constexpr char kZsh[] = R"SHELL(#compdef hearth
# zsh completion for hearth: source <(hearth completion zsh), behind compinit
_hearth() {
  local -a options
  if ((CURRENT == 2)); then
    compadd -- @COMMANDS@ --help --version
  elif [[ ${words[CURRENT]} == -* ]]; then
    options=(${(f)"$("${words[1]}" "${words[2]}" --help 2>/dev/null | grep -oE -- '--[a-z][a-z-]*' | sort -u)"})
    compadd -- $options
  elif [[ ${words[2]} == completion ]]; then
    compadd -- bash zsh
  else
    _files
  fi
}
compdef _hearth hearth
)SHELL";

}  // namespace

std::string CompletionScript(const std::string& shell, const std::string& commands) {
  return absl::StrReplaceAll(shell == "bash" ? kBash : kZsh, {{"@COMMANDS@", commands}});
}

std::string NearestName(const std::string& word, const std::vector<std::string>& names) {
  std::string nearest;
  size_t best = word.size() < 5 ? 2 : 3;  // one more than is allowed
  for (const std::string& name : names) {
    std::vector<size_t> row(name.size() + 1);  // edits from word's first i letters to name's first j
    std::iota(row.begin(), row.end(), size_t{0});
    for (size_t i = 1; i <= word.size(); ++i) {
      size_t diagonal = row[0]++;
      for (size_t j = 1; j <= name.size(); ++j) {
        const size_t replaced = diagonal + (word[i - 1] != name[j - 1] ? 1 : 0);
        diagonal = row[j];
        row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
      }
    }
    if (row.back() < best) {
      best = row.back();
      nearest = name;
    }
  }
  return nearest;
}

}  // namespace hearth
