#!/bin/busybox sh
# Process 1 of the rig: loads the modules, lays the host's tree under an overlay, and goes there.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for name in $(cat /modules/order); do
  insmod "/modules/$name.ko" || echo "rig: module $name does not load"
done

share=trans=virtio,version=9p2000.L,msize=524288
mount -t 9p -o "$share,ro,cache=loose" root /lower || { echo 'rig: no root'; poweroff -f; }
mount -t tmpfs -o size=75% none /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work none /root

for dir in dev proc sys; do
  mount --move "/$dir" "/root/$dir"
done
mount -t tmpfs none /root/run
mkdir -p /root/run/lock /root/run/rig
cp /bin/busybox /session /root/run/rig/
exec switch_root /root /run/rig/busybox sh /run/rig/session
