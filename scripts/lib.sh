# shellcheck shell=bash
# Helpers for the scripts of this repository: messages, timed stages, packages, the Rust toolchain.
# Sourced by scripts/* and guest/*; never run by itself. The caller has set -euo pipefail.
# What always holds: packages are installed only as root; an ordinary user gets the list of what is missing.

OSTLER_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
OSTLER_CACHE=${OSTLER_CACHE:-${HOME:?HOME is not set}/.cache/ostler}
STAGES=()
PACKAGE_LISTS_FRESH=

if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
  BOLD=$'\e[1m' PLAIN=$'\e[0m'
else
  BOLD='' PLAIN=''
fi

say() { printf '%s\n' "$@"; }
warn() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() {
  warn "$@"
  exit 1
}

# Prints the comment block at the head of the calling script, which is its help text.
print_help() { sed -n '2,/^[^#]/{/^#/!d; s/^# \{0,1\}//; p}' "$0"; }

now_ms() {
  local now=${EPOCHREALTIME/[.,]/}
  echo $((now / 1000))
}

# seconds MILLISECONDS: 12345 -> 12.3
seconds() { printf '%d.%d' $(($1 / 1000)) $(($1 % 1000 / 100)); }

# stage TITLE COMMAND ARGS…: runs one step of a script and says how long it took. A step that fails ends the script;
# call it bare (not in `if` or `||`), because bash ignores `set -e` inside functions that stand in a condition.
stage() {
  local title=$1 begin took
  shift
  say "${BOLD}==> $title${PLAIN}"
  begin=$(now_ms)
  STAGE_NOW=$title STAGE_BEGIN=$begin
  "$@"
  took=$(($(now_ms) - begin))
  STAGE_NOW=
  STAGES+=("$(printf '%8s s  %s' "$(seconds "$took")" "$title")")
  say "    $title: $(seconds "$took") s"
}

# Prints one line per stage that has run; for the end of a script, or from an EXIT trap when a stage failed.
stage_table() {
  if [[ -n ${STAGE_NOW:-} ]]; then
    STAGES+=("$(printf '%8s s  %s (failed)' "$(seconds $(($(now_ms) - STAGE_BEGIN)))" "$STAGE_NOW")")
  fi
  ((${#STAGES[@]} == 0)) || printf '%s\n' "" "Stages:" "${STAGES[@]}"
}

have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [[ $(id -u) == 0 ]]; }

# missing_packages PACKAGE…: those that are not installed, one per line.
missing_packages() {
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
  done
}

apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" </dev/null; }

# need_packages PACKAGE…: as root installs what is missing, else says exactly what to install and ends the script.
need_packages() {
  local missing log release
  have dpkg-query && have apt-get ||
    fail "this script knows Debian and Ubuntu only (no apt-get here). Install the equivalents of: $*"
  mapfile -t missing < <(missing_packages "$@")
  if ((${#missing[@]} == 0)); then
    say "all packages are there: $*"
    return
  fi
  if ! is_root; then
    warn "these packages are missing: ${missing[*]}"
    fail "ask an administrator to run: apt-get install --no-install-recommends ${missing[*]}"
  fi
  say "installing: ${missing[*]}"
  log=$(mktemp)
  if [[ -z $PACKAGE_LISTS_FRESH ]]; then
    apt-get update -q >"$log" 2>&1 </dev/null || warn "apt-get update failed, trying with the lists that are there: $(tail -n 3 "$log")"
    PACKAGE_LISTS_FRESH=yes
  fi
  if ! apt_install "${missing[@]}" >"$log" 2>&1; then
    # A qemu-utils from backports does not fit the release's qemu-system-x86: take both from the release.
    release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    if [[ " ${missing[*]} " != *" qemu-"* ]] ||
      ! apt_install --allow-downgrades "${missing[@]}" "qemu-system-x86/$release" "qemu-utils/$release" >"$log" 2>&1; then
      tail -n 30 "$log" >&2
      fail "apt-get could not install: ${missing[*]} (its last words are above)"
    fi
  fi
  rm -f "$log"
}

# version_at_least HAVE WANT
version_at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

wanted_rust() { sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$OSTLER_ROOT/Cargo.toml"; }

rust_is_good() {
  local version
  version=$(cd "$OSTLER_ROOT" && rustc --version 2>/dev/null | cut -d ' ' -f 2) || return 1
  [[ -n $version ]] && have cargo && version_at_least "$version" "$(wanted_rust)"
}

# candidate PACKAGE: the version that apt would install, up to the first character that is no digit or dot.
candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: *\([0-9.]*\).*/\1/p'; }

# packaged PACKAGE WANTED: whether apt would install that version or a newer one.
packaged() {
  local version
  version=$(candidate "$1")
  [[ -n $version ]] && version_at_least "$version" "$2"
}

# Finds cargo, or installs it from the distribution's packages: a rustc that is new enough, rustup (Debian 13, Ubuntu
# 24.04), or the newer rustc that Debian 12 keeps for building browsers (it comes without clippy).
ensure_rust() {
  local wanted
  wanted=$(wanted_rust)
  [[ ! -d $HOME/.cargo/bin ]] || PATH=$HOME/.cargo/bin:$PATH
  if rust_is_good; then
    say "Rust: $(rustc --version)"
    return
  fi
  if have rustup; then
    say "Rust $wanted or newer is missing: rustup installs the stable toolchain"
    rustup toolchain install stable --profile minimal --component rustfmt --component clippy
    rustup default stable
  elif is_root && have apt-get; then
    apt-get update -q >/dev/null 2>&1 </dev/null || true
    PACKAGE_LISTS_FRESH=yes
    if packaged rustc "$wanted"; then
      need_packages rustc cargo rustfmt rust-clippy
    elif [[ -n $(candidate rustup) ]]; then
      need_packages rustup
      rustup default stable
    elif packaged rustc-web "$wanted"; then
      need_packages rustc-web cargo-web rustfmt-web
    fi
  fi
  hash -r
  rust_is_good || fail "Rust $wanted or newer is needed and this system's packages do not have it.
Install rustup (https://rustup.rs), which needs no root, then run this again. Found: $(rustc --version 2>/dev/null || echo 'no rustc')"
}

# A process is named by its id and its start time, so that an id which was given out again is never ended by us.
# Prints nothing when the process has ended, also when nobody has collected it yet (state Z).
process_start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'; }

# wait_until SECONDS COMMAND…: polls until the command succeeds; returns 1 at the deadline.
wait_until() {
  local deadline=$(($(now_ms) + $1 * 1000))
  shift
  until "$@"; do
    (($(now_ms) < deadline)) || return 1
    sleep 0.1
  done
}
