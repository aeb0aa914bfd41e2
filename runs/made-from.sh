# Sourced by scripts that keep what they made: `made_from OUTPUT INPUT...` says whether OUTPUT is there and was made from these
# inputs as they now are (files, folders, shipped names, words), and ends the script if it was made from others; when it is
# made, `stamp OUTPUT INPUT...` writes down from what.
_digest() {
  local input
  for input in "$@"; do
    [ ! -e "$input" ] && [ -e "data/$input.parquet" ] && input=data/$input.parquet
    if [ -d "$input" ]; then (cd "$input" && find . -type f ! -name '.*' -print0 | sort -z | xargs -0 -r sha256sum)
    elif [ -f "$input" ]; then sha256sum < "$input"
    else printf '%s\n' "$input"
    fi
  done | sha256sum
}
made_from() {
  local output=$1; shift
  [ -e "$output" ] || return 1
  if [ "$(cat "$output.made-from" 2>/dev/null)" != "$(_digest "$@")" ]; then
    echo "error: $output was made from other data or settings than these ($*), or does not say from which: move it away" >&2
    exit 2
  fi
}
stamp() { local output=$1; shift; _digest "$@" > "$output.made-from"; }
