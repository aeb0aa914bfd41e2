# Sourced by scripts that evaluate: $work is a folder of the script and its arguments. An interrupted run leaves it, and the
# same command goes on from there (evaluate.py --resume); `finished` removes it.
arguments=$(printf -- '-%s' "$@")
work=outputs/$(basename "$0" .sh)${FROM:+-$FROM}${arguments//[\/ ]/_}
mkdir -p "$work"
finished() { rm -rf "$work"; }
