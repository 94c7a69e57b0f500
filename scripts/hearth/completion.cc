#include "scripts/hearth/completion.h"

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

}  // namespace hearth
