#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that are missing, and nothing else; silent when there are none.
#
#   scripts/setup.sh [build|test|ci|hf]     build is the default; test and hf add to it, ci adds to test
#
# Installs only as root (or with a sudo that does not ask); otherwise prints the line to type and stops.
set -eu

build="gcc make libc6-dev libcjson-dev libxxhash-dev libpcre2-dev zlib1g-dev libzstd-dev libdnnl-dev python3"
test="libcmocka-dev strace g++ libboost-context-dev slurm-wlm munge"
hf="python3-torch python3-numpy python3-venv"
ci="clang libclang-rt-14-dev libomp-dev clang-format cppcheck git"

case ${1:-build} in
build) wanted=$build ;;
test) wanted="$build $test" ;;
ci) wanted="$build $test $ci" ;;
hf) wanted="$build $hf" ;;
*)
    echo "usage: scripts/setup.sh [build|test|ci|hf], not '$1'" >&2
    exit 64
    ;;
esac

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    # Another distribution: the compiler will say what it lacks; this says what that is called in Debian.
    for tool in gcc make python3; do
        command -v $tool >/dev/null && continue
        echo "setup: $tool is missing, and this is not Debian or Ubuntu. Needed, by Debian's names:" >&2
        echo "    $wanted" >&2
        exit 69
    done
    exit 0
fi

# Names of $wanted that are not installed; one may be listed several times, once per architecture.
installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' $wanted 2>/dev/null || true)
missing=
for package in $wanted; do
    grep -q "^$package installed$" <<<"$installed" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo="sudo -n"
    else
        echo "setup: packages are missing and only root can install them. Please run:" >&2
        echo "    sudo apt-get install$missing" >&2
        exit 69
    fi
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >>"$log" 2>&1 </dev/null; }
install() { apt install --yes --no-install-recommends $missing; }

echo "setup: installing$missing"
if ! install; then
    # A bare machine has no package lists yet, a long-lived one has stale ones.
    echo "setup: fetching the package lists"
    : >"$log"
    if ! apt update || ! install; then
        tail -n 15 "$log" >&2
        echo "setup: apt-get could not install$missing; its last words are above" >&2
        exit 69
    fi
fi
