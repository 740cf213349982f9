#!/bin/sh
# Another Debian in a folder, with servers in it that nothing starts: `make compat` tests against them.
#
#   scripts/debian.sh trixie rabbitmq-server postgresql-17      .compat/trixie with these packages
#
# With nothing to do it returns at once. Needs root, and installs debootstrap if that is missing. Packages come from the
# Debian mirror in this machine's apt configuration; DEBIAN_MIRROR names another. What is built stands under another
# name until it is finished, downloads are kept until then, and every mount is private to this script: it may be
# killed at any moment and called again.
set -eu
cd "$(dirname "$0")/.."

say() {
    printf '%s\n' "$*" >&2
}

fail() {
    say "$*"
    exit 1
}

[ $# -ge 2 ] || fail "usage: scripts/debian.sh SUITE PACKAGE..."
suite=$1
shift
folder=$(pwd)/.compat/$suite
unfinished=$folder.unfinished
downloads=$folder.downloads

if [ "$(cat "$folder/.packages" 2>/dev/null)" = "$*" ]; then
    exit
fi
[ "$(id -u)" -eq 0 ] || fail "Making $folder needs root (debootstrap, chroot): run scripts/debian.sh $suite $* as root once."

# One at a time, in a mount namespace of its own. -o: what we start must not inherit the lock.
if [ -z "${DEBIAN_LOCKED:-}" ]; then
    mkdir -p .compat
    unshare --mount true 2>/dev/null || fail "Making $folder needs the right to mount (CAP_SYS_ADMIN), which this container does not have."
    DEBIAN_LOCKED=1 exec flock -o scripts/debian.sh unshare --mount sh scripts/debian.sh "$suite" "$@"
fi

# The archive that this machine's apt takes Debian itself from.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'ORIGIN: Debian' 'LABEL: Debian' 'COMPONENT: main' | head -n 1
}

inside() {
    # LC_ALL, HOME: the machine's own may not exist in there.
    chroot "$unfinished" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        ${http_proxy:+http_proxy="$http_proxy"} "$@"
}

command -v apt-get >/dev/null || fail "This is not Debian: there is no apt-get."
if ! command -v debootstrap >/dev/null; then
    say "Installing debootstrap"
    apt-get update -qq
    apt-get install -qq -o DPkg::Lock::Timeout=300 --no-install-recommends debootstrap >/dev/null
fi
if [ -z "${DEBIAN_MIRROR:=$(mirror)}" ]; then
    # apt knows whose an archive is once it has its lists.
    apt-get update -qq
    DEBIAN_MIRROR=$(mirror)
fi
[ -n "$DEBIAN_MIRROR" ] || fail "apt is configured for no Debian archive: set DEBIAN_MIRROR to the address of one."
eval "$(apt-config shell proxy Acquire::http::Proxy)"
if [ -n "${proxy:-}" ]; then
    export http_proxy="$proxy"
fi

say "Making .compat/$suite: $*"
log=$folder.log
trap '[ $? -eq 0 ] || { tail -n 20 "$log" >&2; say "That is the end of $log."; }' EXIT
rm -rf "$folder" "$unfinished"
mkdir -p "$unfinished/var/cache/apt/archives" "$downloads"
debootstrap --variant=minbase --cache-dir="$downloads" "$suite" "$unfinished" "$DEBIAN_MIRROR" >"$log" 2>&1
mount --bind "$downloads" "$unfinished/var/cache/apt/archives"
mount --rbind /proc "$unfinished/proc"
mount --rbind /dev "$unfinished/dev"
printf '#!/bin/sh\nexit 101\n' >"$unfinished/usr/sbin/policy-rc.d"
chmod 755 "$unfinished/usr/sbin/policy-rc.d"
mkdir -p "$unfinished/etc/postgresql-common"
echo 'create_main_cluster = false' >"$unfinished/etc/postgresql-common/createcluster.conf"
# Nodes of tests are called …@localhost.
printf '127.0.0.1 localhost\n::1 localhost\n' >"$unfinished/etc/hosts"
cp /etc/resolv.conf "$unfinished/etc/resolv.conf"
inside apt-get update -qq >>"$log" 2>&1
inside apt-get install -qq --no-install-recommends -o Dpkg::Options::=--force-confold "$@" >>"$log" 2>&1
umount -R "$unfinished/dev" "$unfinished/proc" "$unfinished/var/cache/apt/archives" 2>/dev/null || :
# Made by root on a machine with a strict umask it must still be passable for the servers' accounts.
chmod 755 "$unfinished"
echo "$*" >"$unfinished/.packages"
mv "$unfinished" "$folder"
rm -rf "$downloads" "$log"
