#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh PROGRAM [ARGUMENT...]
# Runs a program in a small Linux on the x86 emulator Bochs, whose CPU has AVX-512 and AVX-VNNI, prints what it prints and exits as it exits.
# The program must be linked statically; variables whose names begin with MADTP_ go along.
# BOCHS         the emulator; otherwise that on PATH
# BOCHS_CPU     the CPU, one of those that bochs --help cpu lists; otherwise the one with the most of AVX-512
# BOCHS_DISPLAY its display_library
# KERNEL        an image of Linux; otherwise Debian's for virtual machines, downloaded once into build/emulated
# LIMIT         seconds until the machine is stopped
set -euo pipefail

fail() {
  echo "run.sh: $1" >&2
  exit 2
}

[ $# -gt 0 ] || fail "needs a program, got no argument"
program=$1
shift
bochs=${BOCHS:-bochs}
roms=/usr/share/bochs
boot=/usr/lib/ISOLINUX/isolinux.bin
loader=/usr/lib/syslinux/modules/bios/ldlinux.c32
kernels=$(cd "$(dirname "$0")/../../.." && pwd)/build/emulated/kernel

missing=()
need() { [ -e "$1" ] || command -v "$1" >/dev/null || missing+=("$2"); }
need "$bochs" "bochs bochs-term"
need "$roms/BIOS-bochs-latest" bochsbios
need "$roms/VGABIOS-lgpl-latest" bochs
need "$boot" isolinux
need "$loader" syslinux-common
need xorriso xorriso
need cpio cpio
need busybox busybox-static
[ ${#missing[@]} -eq 0 ] || fail "tools are missing: apt-get install --no-install-recommends ${missing[*]}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$kernels"
kernel=${KERNEL:-$(find "$kernels" -name 'vmlinuz-*' | sort -V | tail -n 1)}
if [ -z "$kernel" ]; then
  package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: //p' | head -n 1)
  (cd "$work" && apt-get -qq download "${package:-linux-image-cloud-amd64}" >&2 && dpkg-deb -x linux-image-*.deb kernel) ||
    fail "no kernel: run apt-get update, or set KERNEL to an image of Linux for x86-64"
  kernel=$(find "$work/kernel" -name 'vmlinuz-*')
  cp "$kernel" "$kernels/$$"
  mv "$kernels/$$" "$kernels/$(basename "$kernel")" # whole or not at all, as others may look for it now
fi

# The first process. Its last stty waits until the serial port has sent everything.
mkdir -p "$work"/root/{dev,proc} "$work/cd"
cp -L "$(command -v busybox)" "$work/root/busybox"
cp -L "$program" "$work/root/program"
{
  for name in "${!MADTP_@}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
  printf '%q ' /program "$@"
} >"$work/root/command"
cat >"$work/root/init" <<'INIT'
#!/busybox sh
/busybox stty -opost
/busybox mount -t proc proc /proc
/busybox mount -t devtmpfs dev /dev
/busybox sh /command </dev/null
echo "exit status $?"
/busybox stty -opost
/busybox poweroff -f
INIT
chmod +x "$work/root/init" "$work/root/program"
(cd "$work/root" && find . | cpio -o -H newc --quiet) >"$work/cd/initrd"

# Bochs switches fast string operations off, on which Linux copies wrongly unless it does without fsrm too. Of pku, xsavec and
# xsaves Bochs 2.7 tells wrong sizes of the saved registers, on which Linux gives up AVX. A crash resets the CPU, which ends Bochs.
cat >"$work/cd/isolinux.cfg" <<'CFG'
DEFAULT linux
LABEL linux
KERNEL vmlinuz
INITRD initrd
APPEND console=ttyS0,115200 quiet loglevel=0 mitigations=off clearcpuid=fsrm,pku,xsavec,xsaves lsm=capability panic=-1 reboot=t
CFG
cp "$boot" "$loader" "$work/cd"
cp "$kernel" "$work/cd/vmlinuz"
xorriso -as mkisofs -quiet -o "$work/cd.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
  "$work/cd" 2>/dev/null

models=$("$bochs" --help cpu 2>&1)
for model in sapphire_rapids tigerlake ""; do [[ $models == *"$model"* ]] && break; done
model=${BOCHS_CPU:-$model}
[ -n "$model" ] || fail "this Bochs has no CPU with AVX-512: 2.7 and newer have one"
cat >"$work/bochsrc" <<CFG
cpu: model=$model, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=1024, host=1024
romimage: file=$roms/BIOS-bochs-latest
vgaromimage: file=$roms/VGABIOS-lgpl-latest
display_library: ${BOCHS_DISPLAY:-term}
ata0-master: type=cdrom, path=$work/cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
log: $work/log
panic: action=fatal
error: action=ignore
info: action=ignore
clock: sync=none
CFG
emulate=("$bochs" -q -f "$work/bochsrc")
if [[ $("$bochs" --help 2>&1) == *" -rc "* ]]; then # built with a debugger, as Debian's is, it waits for a command
  echo continue >"$work/debugger"
  emulate+=(-rc "$work/debugger")
fi

# The display wants a terminal; script gives it one.
: >"$work/serial"
timeout -s KILL "${LIMIT:-1200}" script -qfc "${emulate[*]}" /dev/null </dev/null >"$work/screen" 2>&1 &
tail -q -c +1 -f --pid=$! "$work/serial" | tee "$work/output"
status=$(sed -n 's/^exit status \([0-9]*\)$/\1/p' "$work/output" | tail -n 1)
[ -n "$status" ] || fail "the machine stopped before the program ended: $(grep -a PANIC "$work/log" | tail -n 1)"
exit "$status"
