# Still process 1 of the rig, now in the host's tree: runs the job, says how it ended, and powers off.
box=/run/rig/busybox
config=/sys/firmware/qemu_fw_cfg/by_name/opt/kiln
cat "$config/job/raw" >/run/rig/job

mount -t tmpfs -o mode=1777 none /dev/shm 2>/dev/null || { mkdir /dev/shm; mount -t tmpfs -o mode=1777 none /dev/shm; }
mkdir -p /dev/pts
mount -t devpts -o ptmxmode=666 none /dev/pts
ln -sf pts/ptmx /dev/ptmx
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin; ln -sf fd/1 /dev/stdout; ln -sf fd/2 /dev/stderr
mount -t cgroup2 none /sys/fs/cgroup
chmod 666 /dev/kvm /dev/fuse /dev/net/tun
$box hostname rig
$box ip link set lo up
if [ -e "$config/write" ]; then
  mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=mmap write "$(cat "$config/write/raw")"
fi

# The ports by their names; udev would make links of these.
port() {
  for dir in /sys/class/virtio-ports/*; do
    if [ "$(cat "$dir/name")" = "kiln.$1" ]; then echo "/dev/${dir##*/}"; fi
  done
}
mkfifo /run/rig/out /run/rig/err
cat /run/rig/out >"$(port out)" & out=$!
cat /run/rig/err >"$(port err)" & err=$!

# In a PID namespace of its own: when the job ends, whatever it left running ends too and lets go of the streams. A shell has what it starts in
# the background ignore what a Ctrl-C sends.
$box unshare -m -p -f --mount-proc $box sh -c '/usr/bin/env --default-signal /bin/bash /run/rig/job </dev/null & wait $!' \
  >/run/rig/out 2>/run/rig/err
status=$?
wait $out
wait $err
echo "exit $status" >"$(port status)"
sync
$box poweroff -f
